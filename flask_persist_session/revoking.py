"""Ends sessions from outside: one, those of a user, all."""

from __future__ import annotations

import math
from collections.abc import Callable

from .cleanup import batches
from .exceptions import SessionConflict
from .lifecycle import ATTEMPTS, Lifecycle
from .records import Change, SessionQuery, SessionRecord
from .stored import NOBODY, Owner, StoredSession


class Revoking(Lifecycle):
    """Ends sessions from outside; see ``SessionManager``."""

    def revoke(self, session_id: str) -> bool:
        """End the session from outside, with the reason ``"revoked"``; say whether it was active. Raises as ``end``."""
        return self.end(session_id, "revoked")

    def revoke_user(self, user_id: object, tenant_id: object = None, *, except_id: str | None = None) -> int:
        """End all active sessions of a user, of every tenant if none is given, except one; say how many there were.

        Raises ``StoreError``, ``UnsupportedByStore`` where the store cannot list, ``ValueError`` for a user that is none:
        for ``None``, too, which would be everybody.
        """
        owner = Owner.of(user_id, tenant_id)
        if owner is NOBODY:
            raise ValueError("revoke_user needs a user; None is nobody, and would match the sessions of everybody")
        return self._revoke_matching(SessionQuery(user_id=owner.user_id, tenant_id=owner.tenant_id), except_id)

    def revoke_others(self, session: StoredSession) -> int:
        """End all active sessions of the user of *session* within its tenant, but this one; say how many there were.

        Raises ``StoreError``, ``UnsupportedByStore`` where the store cannot list, ``ValueError`` for nobody's session.
        """
        if session.user_id is None:
            raise ValueError(f"session {session.id} is nobody's, so there are no others of its user")
        query = SessionQuery(user_id=session.user_id, tenant_id=session.tenant_id)
        return self._revoke_matching(query, session.id, only_without_tenant=session.tenant_id is None)

    def _revoke_matching(self, query: SessionQuery, except_id: str | None, *, only_without_tenant: bool = False) -> int:
        seen, revoked = {except_id}, 0
        for _attempt in range(ATTEMPTS):
            # One that gets a new token between being listed and being ended goes on under another id; it was stored before
            # the old one ended, so a listing that begins after that has it.
            fresh = [
                record
                for record in self.store.find(query)
                if record.id not in seen
                and record.end_reason in (None, "regenerated")
                and not (only_without_tenant and record.tenant_id is not None)
            ]
            if not fresh:
                return revoked
            seen |= {record.id for record in fresh}
            revoked += sum(self.revoke(record.id) for record in fresh if record.ended_at is None)
        raise _still_moving()

    def revoke_all(self, *, on_batch: Callable[[int], object] = lambda _: None) -> int:
        """End every active session, in batches, with the reason ``"revoked"``; say how many there were.

        *on_batch* is called with the number that each batch ended. Sessions that begin meanwhile may or may not be among
        them; one that is given a new token meanwhile is. It can be interrupted at any time and called again.

        Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``, and what a receiver raises.
        """
        began, total = self.clock(), 0
        moved: set[str] = set()
        for _attempt in range(ATTEMPTS):
            ended, moving = self._revoke_found(began, on_batch)
            total += ended
            # One that moves on meanwhile may go to where the listing has been already.
            if not ended and moving <= moved:
                return total
            moved |= moving
        raise _still_moving()

    def _revoke_found(self, began: float, on_batch: Callable[[int], object]) -> tuple[int, set[str]]:
        """One pass: how many sessions it ended, and the ids of those that had moved on since *began*."""
        total, moved = 0, set()
        for batch in batches(self.store.find(SessionQuery(created_before=math.nextafter(began, math.inf)))):
            active = [record for record in batch if self._lifetime.state(record) == "active"]
            ended = self._revoke_batch(active) if active else 0
            moved |= {r.id for r in batch if r.end_reason == "regenerated" and (r.ended_at or 0.0) >= began}
            on_batch(ended)
            total += ended
        return total, moved

    def _revoke_batch(self, records: list[SessionRecord]) -> int:
        """End these; returns how many were still active."""
        changes = [Change(record=self._lifetime.ended(record, "revoked"), expected=record.version) for record in records]
        ended = 0
        for record, saved in zip(records, self.store.save_many(changes), strict=True):
            if saved:
                self._announcer.ended(record, "revoked")
            # Whatever was changed meanwhile is ended on its own, which tries again.
            ended += saved or self.revoke(record.id)
        return ended


def _still_moving() -> SessionConflict:
    return SessionConflict(f"sessions moved to new tokens {ATTEMPTS} times while they were being revoked; try again")
