"""Server-side sessions for Flask that lose no update, stay ended, and can be listed, revoked and moved."""

from __future__ import annotations

from .exceptions import (
    ConfigError,
    PersistSessionError,
    SerializationError,
    SessionConflict,
    SessionLimitReached,
    SessionNotFound,
    SessionTooLarge,
    StoreError,
    StoreUnavailable,
    UnsupportedByStore,
)
from .extension import PersistSession
from .manager import CleanupReport, SessionManager, StoredSession
from .records import Change, Deletion, SessionQuery, SessionRecord, StoreStats
from .session import Session
from .signals import (
    SessionConflicted,
    SessionCorrupt,
    SessionDiscarded,
    session_conflict,
    session_corrupt,
    session_discarded,
)
from .stores import open_store
from .stores.base import SessionStore

__all__ = [
    "Change",
    "CleanupReport",
    "ConfigError",
    "Deletion",
    "PersistSession",
    "PersistSessionError",
    "SerializationError",
    "Session",
    "SessionConflict",
    "SessionConflicted",
    "SessionCorrupt",
    "SessionDiscarded",
    "SessionLimitReached",
    "SessionManager",
    "SessionNotFound",
    "SessionQuery",
    "SessionRecord",
    "SessionStore",
    "SessionTooLarge",
    "StoreError",
    "StoreStats",
    "StoreUnavailable",
    "StoredSession",
    "UnsupportedByStore",
    "open_store",
    "session_conflict",
    "session_corrupt",
    "session_discarded",
]
