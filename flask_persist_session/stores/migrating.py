"""A store that takes over the sessions of another one while both are in use.

Whatever is asked for and missing in the new store is looked for in the old one and moved over; everything is written to
the new one. A session keeps its id and version when it moves, so a request that loaded it before saves it afterwards. Its
history moves with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain

from ..exceptions import SerializationError, SessionConflict, SessionNotFound, UnsupportedByStore
from ..records import Change, Deletion, Finding, Improvement, LogEntry, SessionQuery, SessionRecord
from .base import SessionStore, check_transaction, conflict, ignore, order_and_cut
from .history import HistoryLog, copy_history

log = logging.getLogger("flask_persist_session")


class MigratingStore(SessionStore):
    """Keeps sessions in *store* and moves those of *old* there when they are first used.

    Two processes may have the two stores the other way round, as in a rolling restart: sessions then move back and forth.
    """

    def __init__(self, store: SessionStore, old: SessionStore) -> None:
        self.store = store
        self.old = old
        self.writers = store.writers
        self.atomic = store.atomic and old.atomic

    @property
    def margin(self) -> float:
        return self.store.margin

    @margin.setter
    def margin(self, seconds: float) -> None:
        self.store.margin = self.old.margin = seconds

    def get(self, session_id: str) -> SessionRecord | None:
        record = self.store.get(session_id)
        return self.move(session_id) if record is None else record

    def move(self, session_id: str) -> SessionRecord | None:
        """Move the session over if it is in the old store only; return it, from whichever store."""
        record, expected = self.old.get(session_id), 0
        while record is not None:
            if self._old_history_of(session_id):
                _ = self.store.history  # raises where there is none, before anything is moved
            try:
                self.store.save(record, expected=expected)
            except SessionConflict:
                break  # somebody else was faster
            if not self._took_history(session_id) or self.old.delete(session_id, expected=record.version):
                return record
            # A process that knows only the old store has changed it meanwhile, or others have ended and removed it.
            expected, record = record.version, self.old.get(session_id)
            if record is None:
                self.store.delete(session_id, expected=expected)
            else:
                record = replace(record, version=expected + 1)
        # Whoever was faster has put it here, perhaps since it was found missing.
        return self.store.get(session_id)

    def _took_history(self, session_id: str) -> bool:
        """Bring the history over; say whether all of it is in the new store, and none is damaged."""
        try:
            self.bring_history(session_id)
        except SerializationError as error:
            log.warning("the history of session %s stays where it is: %s", session_id, error)
            return False
        return True

    def bring_history(self, session_id: str) -> None:
        """Bring over what is missing of the history of a session that is in the new store.

        It goes from the old store together with the record there, and never before: of two processes that have the stores
        the other way round, each would remove what the other one has just brought over.

        Raises ``UnsupportedByStore`` if the new store keeps none, ``SerializationError`` if an entry is damaged.
        """
        if self._old_history_of(session_id):
            with suppress(SessionNotFound):  # deleted meanwhile
                copy_history(self.old.history, self.store.history, session_id)

    def _old_history_of(self, session_id: str) -> int:
        """How many entries the old store has."""
        try:
            return self.old.history.count(session_id)
        except UnsupportedByStore:
            return 0

    @property
    def history(self) -> HistoryLog:
        return _MigratingHistory(self)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        if expected == 0 and self.old.get(record.id) is not None:
            raise conflict(record.id, expected)
        try:
            self.store.save(record, expected=expected)
        except SessionConflict:
            if not self._moved(record.id, expected):
                raise
            self.store.save(record, expected=expected)
        self._clear_up_behind(record)

    def _clear_up_behind(self, record: SessionRecord) -> None:
        """Remove the copy that a crash left behind of what has ended: it must not come back when this is cleaned up."""
        if record.ended_at is not None and self._took_history(record.id):
            self.old.delete(record.id)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        deleted = self.store.delete(session_id, expected=expected)
        if deleted or expected is None:
            deleted = self.old.delete(session_id) or deleted
            return deleted or self.store.delete(session_id)  # perhaps it moved over in between
        return self._moved(session_id, expected) and self.store.delete(session_id, expected=expected)

    def _moved(self, session_id: str, expected: int) -> bool:
        """Whether the session was in the old store only, and is in the new one now with the version *expected*."""
        record = self.move(session_id) if expected else None
        return record is not None and record.version == expected

    def scan(self) -> Iterator[SessionRecord]:
        return self._both(SessionQuery())

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        return order_and_cut(self._both(query.uncut()), query)

    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        check_transaction(changes)
        # All of them to one store first: where a session is kept says nothing about what is in it.
        for change in changes:
            self.move(change.id)
        self.store.transaction(changes)
        for change in changes:
            if isinstance(change, Deletion):
                self.old.delete(change.id)
            else:
                self._clear_up_behind(change.record)

    def lease(self, name: str, seconds: float) -> bool:
        return self.store.lease(name, seconds)

    def note(self, name: str, moment: float) -> None:
        self.store.note(name, moment)

    def noted(self, name: str) -> float | None:
        return self.store.noted(name)

    def namespace(self, name: str) -> MigratingStore:
        return MigratingStore(self.store.namespace(name), self.old.namespace(name))

    def check(self, *, repair: bool, seen: Callable[[SessionRecord], object] = ignore) -> Iterator[Finding]:
        return chain(self.old.check(repair=repair, seen=seen), self.store.check(repair=repair, seen=seen))

    def optimize(self, *, full: bool = False) -> Iterator[Improvement]:
        return chain(self.old.optimize(full=full), self.store.optimize(full=full))

    def close(self) -> None:
        self.store.close()
        self.old.close()

    def _both(self, query: SessionQuery) -> Iterator[SessionRecord]:
        # The old store first: what moves over meanwhile is met again in the new one, and not missed.
        self.store.scan()  # raises at once if this store cannot list
        return self._merged(self.old.find(query), query)

    def _merged(self, of_old: Iterator[SessionRecord], query: SessionQuery) -> Iterator[SessionRecord]:
        seen = set()
        for record in of_old:
            if self.store.get(record.id) is None:
                seen.add(record.id)
                yield record
        yield from (record for record in self.store.find(query) if record.id not in seen)


class _MigratingHistory(HistoryLog):
    """The histories of the new store, to which those of the old one are moved when they are first used.

    Two stores have no step in common: what a process appends that knows only the old store, while another one moves the
    session, can be lost.
    """

    def __init__(self, stores: MigratingStore) -> None:
        self._stores = stores
        self._log = stores.store.history

    def append(
        self,
        session_id: str,
        entries: Sequence[bytes],
        *,
        created_at: float,
        expected_seq: int | None = None,
        key: str | None = None,
        most: int | None = None,
        began: float | None = None,
    ) -> int:
        self._move(session_id)
        return self._log.append(
            session_id, entries, created_at=created_at, expected_seq=expected_seq, key=key, most=most, began=began
        )

    def read(
        self,
        session_id: str,
        *,
        after: int = 0,
        before: int | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> list[LogEntry]:
        self._move(session_id)
        return self._log.read(session_id, after=after, before=before, limit=limit, newest=newest)

    def count(self, session_id: str) -> int:
        self._move(session_id)
        return self._log.count(session_id)

    def delete(self, session_id: str, *, began: float | None = None) -> bool:
        self._move(session_id)
        with suppress(UnsupportedByStore):
            self._stores.old.history.delete(session_id, began=began)  # what a crash left behind
        return self._log.delete(session_id, began=began)

    def restore(self, session_id: str, entries: Sequence[LogEntry]) -> int:
        self._move(session_id)
        return self._log.restore(session_id, entries)

    def _move(self, session_id: str) -> None:
        """Move the session if it is in the old store only, and what is left there of its history."""
        if self._stores.old.get(session_id) is not None:
            self._stores.move(session_id)
            self._stores.bring_history(session_id)
