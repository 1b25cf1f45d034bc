"""A store that takes over the sessions of another one while both are in use.

Whatever is asked for and missing in the new store is looked for in the old one and moved over; everything is written to
the new one. A session keeps its id and version when it moves, so a request that loaded it before saves it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from ..exceptions import SessionConflict
from ..records import Finding, Improvement, SessionQuery, SessionRecord
from .base import SessionStore, conflict, ignore, order_and_cut


class MigratingStore(SessionStore):
    """Keeps sessions in *store* and moves those of *old* there when they are first used.

    Two processes may have the two stores the other way round, as in a rolling restart: sessions then move back and forth.
    """

    def __init__(self, store: SessionStore, old: SessionStore) -> None:
        self.store = store
        self.old = old
        self.atomic = store.atomic and old.atomic

    def get(self, session_id: str) -> SessionRecord | None:
        record = self.store.get(session_id)
        return self.move(session_id) if record is None else record

    def move(self, session_id: str) -> SessionRecord | None:
        """Move the session over if it is in the old store only; return it, from whichever store."""
        record, expected = self.old.get(session_id), 0
        while record is not None:
            try:
                self.store.save(record, expected=expected)
            except SessionConflict:
                break  # somebody else was faster
            if self.old.delete(session_id, expected=record.version):
                return record
            # A process that knows only the old store has changed it meanwhile, or others have ended and removed it.
            expected, record = record.version, self.old.get(session_id)
            if record is None:
                self.store.delete(session_id, expected=expected)
            else:
                record = replace(record, version=expected + 1)
        # Whoever was faster has put it here, perhaps since it was found missing.
        return self.store.get(session_id)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        if expected == 0 and self.old.get(record.id) is not None:
            raise conflict(record.id, expected)
        try:
            self.store.save(record, expected=expected)
        except SessionConflict:
            if not self._moved(record.id, expected):
                raise
            self.store.save(record, expected=expected)
        if record.ended_at is not None:
            self.old.delete(record.id)  # a copy that a crash left behind must not come back when this one is cleaned up

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
        return order_and_cut(self._both(replace(query, order_by=None, limit=None, offset=0)), query)

    def lease(self, name: str, seconds: float) -> bool:
        return self.store.lease(name, seconds)

    def note(self, name: str, moment: float) -> None:
        self.store.note(name, moment)

    def noted(self, name: str) -> float | None:
        return self.store.noted(name)

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
