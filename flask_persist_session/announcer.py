"""Tells of what happens to sessions: builds the event of each signal and sends it."""

from __future__ import annotations

from blinker import Signal

from . import signals
from .records import SessionRecord


class Announcer:
    """Sends the signals of one manager.

    :param sender: the sender of all of them.
    """

    def __init__(self, sender: object) -> None:
        self._sender = sender

    def created(self, record: SessionRecord) -> None:
        """A new session is stored."""
        event = signals.SessionCreated(session_id=record.id, user_id=record.user_id, tenant_id=record.tenant_id)
        self._send(signals.session_created, event)
        self._bound(record)

    def moved(self, before: SessionRecord, after: SessionRecord) -> None:
        """A session goes on under a new token, and may have another user."""
        self._send(signals.session_regenerated, signals.SessionRegenerated(session_id=after.id, old_id=before.id))
        if (before.user_id, before.tenant_id) == (after.user_id, after.tenant_id):
            return
        self._bound(after)
        if after.user_id is None and before.user_id is not None:
            event = signals.SessionUnbound(session_id=after.id, user_id=before.user_id, tenant_id=before.tenant_id)
            self._send(signals.session_unbound, event)

    def _bound(self, record: SessionRecord) -> None:
        if record.user_id is not None:
            event = signals.SessionBound(session_id=record.id, user_id=record.user_id, tenant_id=record.tenant_id)
            self._send(signals.session_bound, event)

    def saved(self, record: SessionRecord) -> None:
        """A change is stored."""
        if signals.session_saved.receivers:  # each change comes by here
            self._send(signals.session_saved, signals.SessionSaved(session_id=record.id, version=record.version))

    def conflict(self, session_id: str, attempt: int) -> None:
        """A save met another one and is merged."""
        self._send(signals.session_conflict, signals.SessionConflicted(session_id=session_id, attempt=attempt))

    def discarded(self, session_id: str, reason: str | None) -> None:
        """A change was dropped because the session had ended for *reason*, ``None`` if it is gone."""
        self._send(signals.session_discarded, signals.SessionDiscarded(session_id=session_id, reason=reason))

    def ended(self, record: SessionRecord, reason: str) -> None:
        """A session was closed."""
        event = signals.SessionEnded(session_id=record.id, user_id=record.user_id, reason=reason)
        self._send(signals.session_ended, event)

    def expired(self, record: SessionRecord) -> None:
        """A session that had expired was removed."""
        event = signals.SessionExpired(session_id=record.id, user_id=record.user_id, expires_at=record.expires_at)
        self._send(signals.session_expired, event)

    def deleted(self, session_id: str, user_id: str | None) -> None:
        """A session was emptied, or deleted with all that it had."""
        self._send(signals.session_deleted, signals.SessionDeleted(session_id=session_id, user_id=user_id))

    def corrupt(self, session_id: str, error: Exception) -> None:
        """A record could not be read."""
        self._send(signals.session_corrupt, signals.SessionCorrupt(session_id=session_id, error=str(error)))

    def cleaned_up(self, *, expired: int, ended: int, idle: int) -> None:
        """A cleanup has finished."""
        self._send(signals.sessions_cleaned_up, signals.SessionsCleanedUp(expired=expired, ended=ended, idle=idle))

    def backed_up(self, *, path: str, sessions: int, size: int) -> None:
        """A backup is in its place."""
        self._send(signals.backup_created, signals.BackupCreated(path=path, sessions=sessions, bytes=size))

    def _send(self, signal: Signal, event: object) -> None:
        signal.send(self._sender, event=event)
