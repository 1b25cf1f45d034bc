"""Takes over sessions of another kind, such as those of Flask's own cookie."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from .exceptions import SessionConflict
from .lifecycle import Metadata
from .records import SessionRecord
from .stored import Foreign, Owner, StoredSession
from .users import Users


class Adopting(Users):
    """Takes over sessions of another kind; see ``SessionManager``."""

    def adopt(
        self, foreign: Foreign, data: dict[str, Any], owner: Owner, *, metadata: Metadata | None = None
    ) -> StoredSession | None:
        """Store *data* of a session of another kind as a new session of *owner*; ``None`` if somebody was faster.

        From then on what the foreign session is known by opens nothing any more, for as long as it could be taken for
        valid, and it is forgotten where it was. Raises as ``create`` does; then it is as it was.
        """
        self._store_cap.admit()
        fresh = self._create(data, owner, metadata or {})
        self._store_cap.count()
        with ExitStack() as undo:
            undo.callback(self._take_back, fresh)
            self._user_cap.admit(fresh.record)
            if not self._retire(foreign, "regenerated"):
                return None
            undo.pop_all()
        self._announcer.created(fresh.record)
        self._user_cap.evict(fresh.record)
        return fresh

    def end_foreign(self, foreign: Foreign) -> bool:
        """End a session of another kind for good: its user has signed out. ``False`` if somebody was faster.

        Raises ``StoreError``.
        """
        return self._retire(foreign, "logout")

    def _tombstone(self, foreign: Foreign, reason: str) -> SessionRecord:
        record = self._nobodys(foreign.id, b"", foreign.valid_until, foreign.version)
        ended = self._lifetime.ended(record, reason)
        return replace(ended, expires_at=max(ended.expires_at, foreign.valid_until))

    def _nobodys(self, session_id: str, payload: bytes, expires_at: float, version: int) -> SessionRecord:
        now = self.clock()
        return SessionRecord(
            id=session_id,
            user_id=None,
            tenant_id=None,
            tags=frozenset(),
            metadata={},
            data=payload,
            created_at=now,
            accessed_at=now,
            expires_at=expires_at,
            ended_at=None,
            end_reason=None,
            version=version,
        )

    def _retire(self, foreign: Foreign, reason: str) -> bool:
        try:
            self._save_own(self._tombstone(foreign, reason), expected=foreign.version)
        except SessionConflict:
            return False
        foreign.forget()
        return True

    def storable(self, data: dict[str, Any]) -> bytes:
        """The payload of *data*. Raises ``SerializationError`` and ``SessionTooLarge`` for what cannot be stored."""
        self.owner_in(data)
        return self._encode(data)

    def imported(self, session_id: str, data: dict[str, Any], expires_at: float) -> SessionRecord:
        """A record of a session of another kind, nobody's until its user comes and it is adopted.

        *expires_at*: until when it was valid there, in seconds since the epoch. Raises as ``storable`` does.
        """
        return self._nobodys(session_id, self.storable(data), expires_at, 1)
