"""Takes over the sessions of Flask and of Flask-Session: one by one as their users come, or all at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias

from .archive import Progress, silent
from .config import LONGEST
from .exceptions import SerializationError, SessionTooLarge, StoreError
from .manager import SessionManager
from .origins import OldSession, Origin, Read
from .records import Change
from .stored import Foreign, StoredSession
from .tokens import foreign_id

log = logging.getLogger("flask_persist_session")

_BATCH = 200
Fate: TypeAlias = Literal["imported", "already_there", "expired", "unreadable"]


class TakeOver:
    """Finds the session of another kind that a request came with.

    :param manager: whose sessions they become.
    :param origins: where to look, in this order.
    """

    def __init__(self, manager: SessionManager, origins: Sequence[Origin]) -> None:
        self._manager = manager
        self._origins = origins

    def find(self, cookies: list[str]) -> Foreign | StoredSession | None:
        """What the first of *cookies* means that means anything.

        That is a session to be taken over; or ours that stands for it and is closed, because it was taken over just now
        or ended otherwise; or ``None``. Raises ``StoreUnavailable`` if one of the stores is, ``StoreError``.
        """
        for origin in self._origins:
            for cookie in cookies:
                for key, read in origin.claims(cookie):
                    found = self._open(origin, key, read)
                    if found is not None:
                        return found
        return None

    def _open(self, origin: Origin, key: str, read: Read) -> Foreign | StoredSession | None:
        session_id = foreign_id(origin.kind, key)
        taken, held = self._manager.probe(session_id)
        forget = partial(_forget, origin, key, session_id)
        if held is not None and held.state == "active":
            until, version = held.expires_at, held.version
            return Foreign(id=session_id, data=held.data, valid_until=until, version=version, forget=forget)
        if taken:
            return held
        old = self._read(read, session_id)
        if old is None:
            return None
        return Foreign(id=session_id, data=old.data, valid_until=old.expires_at, forget=forget)

    def _read(self, read: Read, session_id: str) -> OldSession | None:
        """The session, if there is a valid one with data that can be kept here."""
        try:
            old = _valid(read(), self._manager.clock())
            if old is not None:
                self._manager.storable(old.data)
        except (SerializationError, SessionTooLarge) as error:
            _log_unreadable(session_id, error)
            return None
        return old


def _valid(old: OldSession | None, now: float) -> OldSession | None:
    """*old* if it has not expired and has data. "Never" is beyond what a date can be in some stores, here it is far."""
    if old is None or not old.data or old.expires_at <= now:
        return None
    return replace(old, expires_at=min(old.expires_at, now + LONGEST))


def _log_unreadable(session_id: str, error: Exception) -> None:
    log.error("the session of another kind %s is not taken over: %s", session_id, error)


def _forget(origin: Origin, key: str, session_id: str) -> None:
    try:
        origin.forget(key)
    except StoreError as error:
        # What is kept under its id here makes sure that it opens nothing.
        log.warning("the session of another kind %s could not be removed after it was taken over: %s", session_id, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import found: sessions that were imported, were here already, had expired, or cannot be read."""

    imported: int = 0
    already_there: int = 0
    expired: int = 0
    unreadable: int = 0
    dry_run: bool = False


class Import:
    """One import of all sessions of an origin; it can be interrupted at any point and repeated.

    :param manager: whose sessions they become, each when its user comes.
    :param delete: remove each where it was, once it is here.
    """

    def __init__(self, manager: SessionManager, origin: Origin, *, dry_run: bool = False, delete: bool = False) -> None:
        self._manager = manager
        self._origin = origin
        self._dry_run = dry_run
        self._delete = delete and not dry_run

    def run(self, progress: Progress) -> Counter[Fate]:
        """Import what there is and count; *progress* is told how many were looked at since it was told last."""
        counts: Counter[Fate] = Counter()
        sessions = self._origin.sessions()
        while batch := list(islice(sessions, _BATCH)):
            counts.update(self._take(batch))
            progress(len(batch))
        return counts

    def _take(self, batch: list[tuple[str, Read]]) -> Iterator[Fate]:
        changes: dict[str, Change] = {}
        for key, read in batch:
            change = self._prepare(key, read)
            if isinstance(change, Change):
                changes[key] = change
            else:
                yield change
        for key, saved in zip(changes, self._save(list(changes.values())), strict=True):
            if self._delete:
                self._origin.forget(key)
            yield "imported" if saved else "already_there"

    def _prepare(self, key: str, read: Read) -> Change | Fate:
        session_id = foreign_id(self._origin.kind, key)
        try:
            old = _valid(read(), self._manager.clock())
            if old is None:
                return "expired"
            return Change(record=self._manager.imported(session_id, old.data, old.expires_at), expected=0)
        except (SerializationError, SessionTooLarge) as error:
            _log_unreadable(session_id, error)
            return "unreadable"

    def _save(self, changes: list[Change]) -> list[bool]:
        if self._dry_run:
            return [not self._manager.probe(change.record.id)[0] for change in changes]
        return self._manager.store.save_many(changes)


def import_all(
    manager: SessionManager,
    origins: Sequence[Origin],
    *,
    dry_run: bool = False,
    delete: bool = False,
    progress: Progress = silent,
) -> ImportReport:
    """Import the sessions of all *origins*. *progress* is told how many were looked at since it was told last.

    Raises ``StoreError``, and ``UnsupportedByStore`` where they cannot be listed; what was imported until then is kept.
    """
    counts: Counter[Fate] = Counter()
    for origin in origins:
        counts += Import(manager, origin, dry_run=dry_run, delete=delete).run(progress)
    return ImportReport(dry_run=dry_run, **{str(fate): count for fate, count in counts.items()})
