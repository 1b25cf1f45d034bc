"""The records of one tenant of a store, and of no other, whatever is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..exceptions import SerializationError, SessionNotFound
from ..records import Change, Deletion, LogEntry, SessionQuery, SessionRecord, StoreStats
from .base import SessionStore, add_up, conflict
from .history import HistoryLog


class TenantStore(SessionStore):
    """Shows what *tenant_id* has in *store*. To what others have there is no way: it is missing.

    Leases, notes, checks and optimizing concern the store as a whole, and are not to be had here.
    """

    def __init__(self, store: SessionStore, tenant_id: str) -> None:
        self._store = store
        self._tenant_id = tenant_id
        self.writers = store.writers
        self.atomic = store.atomic

    def get(self, session_id: str) -> SessionRecord | None:
        record = self._store.get(session_id)
        return record if record is not None and record.tenant_id == self._tenant_id else None

    def save(self, record: SessionRecord, *, expected: int) -> None:
        self._check(Change(record=record, expected=expected))
        self._store.save(record, expected=expected)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        return self._is_own(session_id) and self._store.delete(session_id, expected=expected)

    def scan(self) -> Iterator[SessionRecord]:
        return self.find(SessionQuery())

    def snapshot(self) -> Iterator[SessionRecord]:
        return (record for record in self._store.snapshot() if record.tenant_id == self._tenant_id)

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        own = self._own(query)
        return iter(()) if own is None else self._store.find(own)

    def count(self, query: SessionQuery) -> int:
        own = self._own(query)
        return 0 if own is None else self._store.count(own)

    def stats(self, *, now: float) -> StoreStats:
        return add_up(self.scan(), now)

    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        for change in changes:
            self._check(change)
        self._store.transaction(changes)

    def namespace(self, name: str) -> TenantStore:
        return TenantStore(self._store.namespace(name), self._tenant_id)

    @property
    def history(self) -> HistoryLog:
        return _TenantHistory(self, self._store.history)

    def close(self) -> None:
        self._store.close()

    def _own(self, query: SessionQuery) -> SessionQuery | None:
        """*query* within this tenant; ``None`` if it asks for another."""
        return replace(query, tenant_id=self._tenant_id) if query.tenant_id in (None, self._tenant_id) else None

    def _is_own(self, session_id: str) -> bool:
        try:
            return self.get(session_id) is not None
        except SerializationError:
            return False  # whose it was cannot be known any more

    def _check(self, change: Change | Deletion) -> None:
        """Refuse to write what is not this tenant's, be it what is there or what it is to become."""
        if isinstance(change, Change) and change.record.tenant_id != self._tenant_id:
            raise ValueError(f"session {change.record.id} is not one of the tenant {self._tenant_id!r}")
        session_id = change.record.id if isinstance(change, Change) else change.id
        if change.expected != 0 and not self._is_own(session_id):
            raise conflict(session_id, change.expected or 0)


class _TenantHistory(HistoryLog):
    """The histories of the sessions of a tenant."""

    def __init__(self, store: TenantStore, log: HistoryLog) -> None:
        self._store = store
        self._log = log

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
        self._check(session_id)
        return self._log.append(
            session_id, entries, created_at=created_at, expected_seq=expected_seq, key=key, most=most, began=began
        )

    def read(
        self, session_id: str, *, after: int = 0, before: int | None = None, limit: int | None = None, newest: bool = False
    ) -> list[LogEntry]:
        if not self._is_own(session_id):
            return []
        return self._log.read(session_id, after=after, before=before, limit=limit, newest=newest)

    def count(self, session_id: str) -> int:
        return self._log.count(session_id) if self._is_own(session_id) else 0

    def delete(self, session_id: str, *, began: float | None = None) -> bool:
        return self._is_own(session_id) and self._log.delete(session_id, began=began)

    def restore(self, session_id: str, entries: Sequence[LogEntry]) -> int:
        self._check(session_id)
        return self._log.restore(session_id, entries)

    def _is_own(self, session_id: str) -> bool:
        return self._store.get(session_id) is not None

    def _check(self, session_id: str) -> None:
        if not self._is_own(session_id):
            raise SessionNotFound(f"no session {session_id}", missing=True)
