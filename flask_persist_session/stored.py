"""A session as it is in the store, decoded, and whose it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .records import SessionRecord, State
from .stores.base import NAME_LIMITS, is_name


@dataclass(slots=True, eq=False)
class StoredSession:
    """A session as it is in the store, with its data decoded. Change *data* and hand it to ``SessionManager.save``."""

    record: SessionRecord
    data: dict[str, Any] = field(repr=False)
    state: State = "active"
    token: str | None = field(default=None, repr=False)
    """The secret that opens it; known only right after ``create``, ``regenerate``, ``bind`` and ``restart``."""

    @property
    def id(self) -> str:
        """Public id; it opens nothing."""
        return self.record.id

    @property
    def user_id(self) -> str | None:
        """The user whose session this is."""
        return self.record.user_id

    @property
    def tenant_id(self) -> str | None:
        """The tenant within which the session lives."""
        return self.record.tenant_id

    @property
    def created_at(self) -> float:
        """Seconds since the epoch at which the session, or its user's signing in, began."""
        return self.record.created_at

    @property
    def accessed_at(self) -> float:
        """Seconds since the epoch of the last save or renewal."""
        return self.record.accessed_at

    @property
    def expires_at(self) -> float:
        """Seconds since the epoch at which the session expires unless it is renewed."""
        return self.record.expires_at

    @property
    def version(self) -> int:
        """1 on creation, one more with each save."""
        return self.record.version

    @property
    def end_reason(self) -> str | None:
        """Why the session is closed, ``"expired"`` included; ``None`` while it is active."""
        return "expired" if self.state == "expired" else self.record.end_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A session of another kind that a request came with, to be taken over when the request ends."""

    id: str
    """The session id that stands for it here. No token opens it."""
    data: dict[str, Any] = field(repr=False)
    valid_until: float
    """Seconds since the epoch until which the old cookie or record could be taken for valid."""
    version: int = 0
    """Of the record that an import left under that id; 0: there is none."""
    forget: Callable[[], object] = field(repr=False)
    """Removes it where it was kept until now."""


#: What is no id: its text is the same for many users, or another one whenever something in it changes.
_NO_IDS = (bool, float, bytes, list, tuple, dict, set, frozenset)


def _id_text(value: object) -> str:
    if isinstance(value, _NO_IDS):
        raise ValueError(f"a {type(value).__name__} is no id of a user or tenant; allowed is text, a whole number, a UUID")
    text = str(value)
    if not text:
        raise ValueError("the id of a user or tenant is empty; nobody is None")
    if not is_name(text):
        raise ValueError(f"an id of {len(text):,} characters cannot be stored: {NAME_LIMITS}")
    return text


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose session it is: a user within a tenant, both as ``str``; ``NOBODY`` for a visitor."""

    user_id: str | None = None
    tenant_id: str | None = None

    @classmethod
    def of(cls, user_id: object, tenant_id: object = None) -> Owner:
        """An owner of any ids: 7 and "7" are the same user, ``None`` is nobody. Raises ``ValueError`` for what is no id."""
        if user_id is None:
            return NOBODY
        return cls(_id_text(user_id), None if tenant_id is None else _id_text(tenant_id))

    @classmethod
    def within(cls, tenant_id: object) -> Owner:
        """Nobody, within a tenant. Raises ``ValueError`` for what is no id."""
        return NOBODY if tenant_id is None else cls(None, _id_text(tenant_id))


NOBODY = Owner()
