"""Every error this package raises; all of them descend from ``PersistSessionError``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .records import HistoryEntry


class PersistSessionError(Exception):
    """Base of all errors of this package."""


class ConfigError(PersistSessionError):
    """A setting or store URL is wrong; the message names the key, the value and what is allowed."""


class SerializationError(PersistSessionError):
    """A value cannot be stored, or a stored record cannot be read.

    On the way in the message names the key path of the value; on the way out it says what is wrong with the record.
    """


class SessionTooLarge(PersistSessionError):
    """The payload exceeds ``PERSIST_SESSION_MAX_BYTES``, and the message names the largest keys; or the metadata do; or a
    history would have more entries than are allowed."""


class SessionConflict(PersistSessionError):
    """A record was not at the expected version, or a history not at the expected number: somebody else was faster."""


class HistoryConflict(SessionConflict):
    """A history was not at the expected entry: somebody else appended, or cleared it."""

    def __init__(self, message: str, *, missed: Sequence[HistoryEntry] = ()) -> None:
        super().__init__(message)
        self.missed = tuple(missed)
        """The entries behind the expected one, oldest first; at most 100 of them."""


class SessionNotFound(PersistSessionError):
    """No session has the id that was looked up, or several have the beginning of it; the message says which."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        """Whether what was looked up is, or begins, the id of no session."""


class SessionLimitReached(PersistSessionError):
    """No further session is allowed: of this user (inside a request an HTTP 409), or in the whole store (a 503)."""

    def __init__(self, message: str, *, scope: Literal["user", "store"] = "user") -> None:
        super().__init__(message)
        self.scope = scope
        """Whether the ``user`` or the ``store`` has as many as are allowed."""


class StoreError(PersistSessionError):
    """The store failed; what was stored before is unchanged. The driver's error is the ``__cause__``."""


class StoreUnavailable(StoreError):
    """The store could not be reached within its timeout; inside a request this becomes an HTTP 503 with ``Retry-After``."""


class UnsupportedByStore(StoreError):
    """The store cannot do this; the message says why."""


class BackupError(PersistSessionError):
    """A backup could not be written, or an archive is broken or none; the message names it. Nothing was changed."""
