"""Sessions in a dict of this process: for tests and development, gone when the process ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace

from ..exceptions import ConfigError
from ..records import Change, Deletion, SessionRecord
from . import Location
from .base import SessionStore, after_fork, check_namespace, check_save, check_transaction, conflict
from .memory_history import MemoryHistory


def open_location(location: Location, namespace: str) -> MemoryStore:
    """A store of its own for each call: ``memory://`` has no options."""
    if location.url.netloc or location.url.path:
        raise ConfigError(f"{location} names a place; write memory://")
    location.read_options()
    return MemoryStore(namespace)


class MemoryStore(SessionStore):
    """Keeps records in a dict behind a lock. Each process has its own."""

    writers = 1

    def __init__(self, namespace: str = "web") -> None:
        self._family = {namespace: self}
        self._records: dict[str, SessionRecord] = {}
        self._notes: dict[str, float] = {}
        self._history = MemoryHistory(self._records, lambda: self._lock)
        self._renew_lock()
        after_fork(self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def get(self, session_id: str) -> SessionRecord | None:
        with self._lock:  # a transaction may be in the middle
            record = self._records.get(session_id)
        return _copy(record) if record else None

    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        with self._lock:
            if self._version(record.id) != expected:
                raise conflict(record.id, expected)
            self._records[record.id] = _copy(record)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        with self._lock:
            if session_id not in self._records or expected not in (None, self._version(session_id)):
                return False
            del self._records[session_id]
            self._history.forget(session_id)
            return True

    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        check_transaction(changes)
        with self._lock:
            for change in changes:
                if change.expected not in (None, self._version(change.id) or (0 if isinstance(change, Change) else None)):
                    raise conflict(change.id, change.expected)
            for change in changes:
                if isinstance(change, Change):
                    self._records[change.id] = _copy(change.record)
                else:
                    self._records.pop(change.id, None)
                    self._history.forget(change.id)

    def _version(self, session_id: str) -> int:
        stored = self._records.get(session_id)
        return stored.version if stored else 0

    def scan(self) -> Iterator[SessionRecord]:
        with self._lock:
            records = list(self._records.values())
        yield from map(_copy, records)

    @property
    def history(self) -> MemoryHistory:
        return self._history

    def lease(self, name: str, seconds: float) -> bool:
        # Nobody but this object reaches the dict, so whoever asks is the holder.
        return seconds > 0

    def namespace(self, name: str) -> MemoryStore:
        check_namespace(name)
        child = MemoryStore(name)
        child._family = self._family
        return self._family.setdefault(name, child)

    def note(self, name: str, moment: float) -> None:
        self._notes[name] = moment

    def noted(self, name: str) -> float | None:
        return self._notes.get(name)


def _copy(record: SessionRecord) -> SessionRecord:
    """A record whose metadata nobody else can change."""
    return replace(record, metadata=deepcopy(record.metadata)) if record.metadata else record
