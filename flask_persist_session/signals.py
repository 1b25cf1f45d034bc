"""Signals of the package (blinker), each with one frozen value that says what happened.

The sender is the Flask application of the session. A signal is sent by the manager, after what it tells has been done.
No value carries a token or a payload.
"""

from __future__ import annotations

from dataclasses import dataclass

from blinker import Namespace

_signals = Namespace()

session_conflict = _signals.signal("session-conflict")
"""Sent with a ``SessionConflicted``: a save met a change by another request and is about to be merged with it."""

session_discarded = _signals.signal("session-discarded")
"""Sent with a ``SessionDiscarded``: a change was dropped because the session has ended meanwhile."""

session_corrupt = _signals.signal("session-corrupt")
"""Sent with a ``SessionCorrupt``: a stored record could not be read; the request goes on with a new session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConflicted:
    """A save of *session_id* met another version and is merged: try number *attempt*, from 1."""

    session_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionDiscarded:
    """A change to *session_id* was dropped; *reason* is why the session ended, ``None`` if it was deleted."""

    session_id: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCorrupt:
    """The record of *session_id* could not be read; *error* says what is wrong with it."""

    session_id: str
    error: str
