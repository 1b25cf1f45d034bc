"""A session as it is in the store, decoded, and whose it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from .records import JSON, SessionRecord, State
from .serializers import dump_metadata
from .stores.base import NAME_LIMITS, is_name

#: Why a session is not active, although its id is that of one that is.
ANOTHER = "it has ended, and its key leads to another now"


@dataclass(slots=True, eq=False)
class StoredSession:
    """A session as it is in the store, with its data decoded. Change *data* and hand it to ``SessionManager.save``."""

    record: SessionRecord
    data: dict[str, Any] = field(repr=False)
    state: State = "active"
    token: str | None = field(default=None, repr=False)
    """The secret that opens it; known only right after ``create``, ``regenerate``, ``bind`` and ``restart``."""
    new: bool = False
    """Whether it was created just now; for those who call ``resume_or_create``."""
    _metadata: dict[str, JSON] | None = field(default=None, repr=False)
    _tags: set[str] | None = field(default=None, repr=False)

    @property
    def metadata(self) -> dict[str, JSON]:
        """The searchable description of the session; change it and save."""
        if self._metadata is None:
            self._metadata = deepcopy(dict(self.record.metadata))
        return self._metadata

    @property
    def tags(self) -> set[str]:
        """The labels of the session; change them and save."""
        if self._tags is None:
            self._tags = set(self.record.tags)
        return self._tags

    def redescribed(self) -> Redescribed | None:
        """What was changed in metadata and tags since they were loaded; ``None`` for nothing."""
        if self._metadata is None and self._tags is None:
            return None
        before, tags = self.record.metadata, self.record.tags
        changed = Redescribed(
            metadata={
                key: value for key, value in self.metadata.items() if key not in before or _differ(before[key], value)
            },
            without=frozenset(before.keys() - self.metadata.keys()),
            add_tags=frozenset(self.tags - tags),
            remove_tags=frozenset(tags - self.tags),
        )
        return changed if changed != _NOTHING else None

    def replace_record(self, record: SessionRecord) -> None:
        """Go on from *record*, which was just stored or loaded; metadata and tags are as they are there."""
        self.record, self._metadata, self._tags = record, None, None

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
class Redescribed:
    """A change of the metadata and tags of a session, to be applied to whichever version of it is the latest."""

    metadata: Mapping[str, JSON] = field(default_factory=dict)
    """Keys that are set."""
    without: frozenset[str] = frozenset()
    """Keys that are removed."""
    add_tags: frozenset[str] = frozenset()
    remove_tags: frozenset[str] = frozenset()

    def applied(self, record: SessionRecord) -> SessionRecord:
        """*record* with this change."""
        kept = {key: value for key, value in record.metadata.items() if key not in self.without}
        return replace(record, metadata={**kept, **self.metadata}, tags=(record.tags - self.remove_tags) | self.add_tags)


_NOTHING = Redescribed()


def _differ(one: JSON, other: JSON) -> bool:
    # As they are stored: 1 and True are equal for Python.
    return dump_metadata({"": one}) != dump_metadata({"": other})


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
