"""Signals of the package (blinker), each with one frozen value that says what happened.

The sender is the Flask application of the session. A signal is sent once, by the process in which it happened, after
what it tells has been stored. No value carries a token or a payload. What a receiver raises reaches whoever caused the
event; from the background cleanup it is logged.
"""

from __future__ import annotations

from dataclasses import dataclass

from blinker import Namespace

_signals = Namespace()

session_created = _signals.signal("session-created")
"""Sent with a ``SessionCreated``: a new session is stored."""

session_saved = _signals.signal("session-saved")
"""Sent with a ``SessionSaved``: a change of a session is stored; not for renewals."""

session_regenerated = _signals.signal("session-regenerated")
"""Sent with a ``SessionRegenerated``: a session goes on under a new token and id."""

session_bound = _signals.signal("session-bound")
"""Sent with a ``SessionBound``: a session has become that of a user, after it was created or regenerated."""

session_unbound = _signals.signal("session-unbound")
"""Sent with a ``SessionUnbound``: a session has become nobody's, after it was regenerated."""

session_ended = _signals.signal("session-ended")
"""Sent with a ``SessionEnded``: a session was closed for a reason: revoked, evicted, replaced by a new one, idle …"""

session_expired = _signals.signal("session-expired")
"""Sent with a ``SessionExpired``: a session that had expired was removed by a cleanup."""

session_deleted = _signals.signal("session-deleted")
"""Sent with a ``SessionDeleted``: a session was emptied or deleted, as when its user signs out."""

session_conflict = _signals.signal("session-conflict")
"""Sent with a ``SessionConflicted``: a save met a change by another request and is about to be merged with it."""

session_discarded = _signals.signal("session-discarded")
"""Sent with a ``SessionDiscarded``: a change was dropped because the session has ended meanwhile."""

session_corrupt = _signals.signal("session-corrupt")
"""Sent with a ``SessionCorrupt``: a stored record could not be read; the request goes on with a new session."""

sessions_cleaned_up = _signals.signal("sessions-cleaned-up")
"""Sent with a ``SessionsCleanedUp``: a cleanup has finished, after the events of what it removed."""

backup_created = _signals.signal("backup-created")
"""Sent with a ``BackupCreated``: a backup is complete and in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCreated:
    """The session *session_id* was stored for the first time, for *user_id* within *tenant_id* if it has a user."""

    session_id: str
    user_id: str | None
    tenant_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSaved:
    """A change of *session_id* was stored as its version *version*."""

    session_id: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRegenerated:
    """The session *old_id* goes on as *session_id*; the old token opens nothing any more."""

    session_id: str
    old_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBound:
    """The session *session_id* is now that of *user_id* within *tenant_id*."""

    session_id: str
    user_id: str
    tenant_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionUnbound:
    """The session *session_id* is nobody's any more; it was that of *user_id* within *tenant_id*."""

    session_id: str
    user_id: str
    tenant_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnded:
    """The session *session_id* of *user_id* was closed for *reason*."""

    session_id: str
    user_id: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionExpired:
    """The session *session_id* of *user_id*, expired at *expires_at* (seconds since the epoch), was removed."""

    session_id: str
    user_id: str | None
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionDeleted:
    """The session *session_id* of *user_id* was emptied or deleted; ``None`` is nobody, or its record was unreadable."""

    session_id: str
    user_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConflicted:
    """A save of *session_id* met another version and is merged: try number *attempt*, from 1."""

    session_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionDiscarded:
    """A change to *session_id* was dropped; *reason* is why the session ended, such as ``"logout"``.

    ``None`` if that is not kept any more, or the record could not be read.
    """

    session_id: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCorrupt:
    """The record of *session_id* could not be read; *error* says what is wrong with it."""

    session_id: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsCleanedUp:
    """A cleanup removed so many sessions that had *expired*, had *ended* long enough ago, or were *idle* too long."""

    expired: int
    ended: int
    idle: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupCreated:
    """The archive *path*, of so many *bytes*, was written with so many *sessions*."""

    path: str
    sessions: int
    bytes: int
