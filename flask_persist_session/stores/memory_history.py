"""The histories of the sessions of a memory store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..records import LogEntry, SessionRecord
from .history import (
    REMEMBERED,
    HistoryLog,
    behind,
    check_began,
    check_entries,
    check_restored,
    check_room,
    digest_of,
    no_session,
    span,
    within,
)


@dataclass
class _Log:
    entries: list[LogEntry] = field(default_factory=list)
    keys: dict[bytes, int] = field(default_factory=dict)

    def remember(self, digest: bytes) -> None:
        self.keys[digest] = len(self.entries)
        if len(self.keys) > REMEMBERED:
            del self.keys[next(iter(self.keys))]  # the oldest one


class MemoryHistory(HistoryLog):
    """Keeps entries in a list for each session.

    :param records: the sessions, by id.
    :param lock: returns the lock that guards them.
    """

    def __init__(self, records: Mapping[str, SessionRecord], lock: Callable[[], threading.Lock]) -> None:
        self._records = records
        self._lock = lock
        self._logs: dict[str, _Log] = {}

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
        digest = digest_of(key)
        check_entries(entries, created_at)
        with self._lock():
            log = self._log(session_id, ended=False, began=began)
            if digest is not None and digest in log.keys:
                return log.keys[digest]
            last = len(log.entries)
            check_room(session_id, last, len(entries), expected_seq, most)
            numbered = enumerate(entries, last + 1)
            log.entries += [LogEntry(seq=seq, data=data, created_at=float(created_at)) for seq, data in numbered]
            if digest is not None and entries:
                log.remember(digest)
            return len(log.entries)

    def read(
        self,
        session_id: str,
        *,
        after: int = 0,
        before: int | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> list[LogEntry]:
        first, last = span(after, before, limit)
        with self._lock():
            entries = self._entries(session_id)
            first, last = within(first, min(last, len(entries)), limit, newest)
            return entries[first - 1 : max(last, 0)]

    def count(self, session_id: str) -> int:
        with self._lock():
            return len(self._entries(session_id))

    def delete(self, session_id: str, *, began: float | None = None) -> bool:
        with self._lock():
            record = self._records.get(session_id)
            is_meant = began is None or (record is not None and record.created_at == began)
            return is_meant and self.forget(session_id)

    def forget(self, session_id: str) -> bool:
        """What ``delete`` does, for a caller who holds the lock."""
        log = self._logs.pop(session_id, None)
        return bool(log and log.entries)

    def restore(self, session_id: str, entries: Sequence[LogEntry]) -> int:
        check_restored(entries)
        with self._lock():
            log = self._log(session_id, ended=True)
            missing = behind(session_id, len(log.entries), entries)
            log.entries += missing
            return len(missing)

    def _entries(self, session_id: str) -> list[LogEntry]:
        log = self._logs.get(session_id)
        return log.entries if log else []

    def _log(self, session_id: str, *, ended: bool, began: float | None = None) -> _Log:
        """The log of a session.

        Raises ``SessionNotFound`` if there is none, not the one that *began* then, or it has *ended* and must not have.
        """
        record = self._records.get(session_id)
        if record is None:
            raise no_session(session_id)
        check_began(session_id, record.created_at, began)
        if record.ended_at is not None and not ended:
            raise no_session(session_id, ended=True)
        return self._logs.setdefault(session_id, _Log())
