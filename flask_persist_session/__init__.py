"""Server-side sessions for Flask that lose no update, stay ended, and can be listed, revoked and moved."""

from __future__ import annotations

from .backup import BackupReport, RestoreReport
from .cleanup import CleanupReport, EndingReport
from .exceptions import (
    BackupError,
    ConfigError,
    HistoryConflict,
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
from .history import History
from .lookup import SessionDetails
from .manager import SessionManager
from .monthly_archive import ArchivedSession, MonthlyArchive
from .records import Change, Deletion, Finding, HistoryEntry, Improvement, LogEntry, SessionQuery, SessionRecord, StoreStats
from .session import Session
from .signals import (
    BackupCreated,
    SessionBound,
    SessionConflicted,
    SessionCorrupt,
    SessionCreated,
    SessionDeleted,
    SessionDiscarded,
    SessionEnded,
    SessionExpired,
    SessionRegenerated,
    SessionSaved,
    SessionsCleanedUp,
    SessionUnbound,
    backup_created,
    session_bound,
    session_conflict,
    session_corrupt,
    session_created,
    session_deleted,
    session_discarded,
    session_ended,
    session_expired,
    session_regenerated,
    session_saved,
    session_unbound,
    sessions_cleaned_up,
)
from .stored import StoredSession
from .stores import open_store
from .stores.base import SessionStore
from .stores.cached import CachedStore
from .stores.history import HistoryLog
from .transaction import Transaction
from .upgrade import ImportReport
from .upkeep import CheckReport, Health

__all__ = [
    "ArchivedSession",
    "BackupCreated",
    "BackupError",
    "BackupReport",
    "CachedStore",
    "Change",
    "CheckReport",
    "CleanupReport",
    "ConfigError",
    "Deletion",
    "EndingReport",
    "Finding",
    "Health",
    "History",
    "HistoryConflict",
    "HistoryEntry",
    "HistoryLog",
    "ImportReport",
    "Improvement",
    "LogEntry",
    "MonthlyArchive",
    "PersistSession",
    "PersistSessionError",
    "RestoreReport",
    "SerializationError",
    "Session",
    "SessionBound",
    "SessionConflict",
    "SessionConflicted",
    "SessionCorrupt",
    "SessionCreated",
    "SessionDeleted",
    "SessionDetails",
    "SessionDiscarded",
    "SessionEnded",
    "SessionExpired",
    "SessionLimitReached",
    "SessionManager",
    "SessionNotFound",
    "SessionQuery",
    "SessionRecord",
    "SessionRegenerated",
    "SessionSaved",
    "SessionStore",
    "SessionTooLarge",
    "SessionUnbound",
    "SessionsCleanedUp",
    "StoreError",
    "StoreStats",
    "StoreUnavailable",
    "StoredSession",
    "Transaction",
    "UnsupportedByStore",
    "backup_created",
    "open_store",
    "session_bound",
    "session_conflict",
    "session_corrupt",
    "session_created",
    "session_deleted",
    "session_discarded",
    "session_ended",
    "session_expired",
    "session_regenerated",
    "session_saved",
    "session_unbound",
    "sessions_cleaned_up",
]
