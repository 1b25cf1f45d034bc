"""The values that cross the store contract: records, queries, changes and statistics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import update_wrapper
from typing import Any, Literal, TypeAlias, TypeVar

_T = TypeVar("_T")

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
State: TypeAlias = Literal["active", "expired", "ended"]
#: Where a record stands in an order: the value of the field that it is ordered by, and the id.
Position: TypeAlias = "tuple[float | str, str]"

ORDERS = ("id", "created_at", "accessed_at", "expires_at")
#: The year 1 in seconds since the epoch; Python has no date before.
FIRST_MOMENT = -62_135_596_800.0
#: The year 9000 in seconds since the epoch; a date of the year 10000 is none for Python.
LAST_MOMENT = 221_845_392_000.0
_SESSION_ID = re.compile(r"[0-3][0-9a-f]{66}", re.ASCII)
_ID_PREFIX = re.compile(r"[0-3][0-9a-f]{2,66}", re.ASCII)


def is_session_id(value: str) -> bool:
    """Whether *value* has the form of a session id: 3 hex digits of shard, below 400, and 64 of SHA-256.

    Nothing else names a record, so a store may use an id in a path or key once this is true.
    """
    return _SESSION_ID.fullmatch(value) is not None


def is_id_prefix(value: str) -> bool:
    """Whether a session id can begin with *value*, and it has at least the shard, so that a store knows where to look."""
    return _ID_PREFIX.fullmatch(value) is not None


def _setting_slots(cls: type[_T]) -> type[_T]:
    """Give a frozen dataclass, without defaults, an ``__init__`` that sets its slots; its own looks up each by its name.

    That takes twice as long or more, and every request makes some records, a restore a million.
    """
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    setters = ", ".join(f"set_{name}" for name in names)
    body = "".join(f"\n  set_{name}(self, {name})" for name in names)
    made: dict[str, Any] = {}
    exec(f"def make({setters}):\n def __init__(self, *, {', '.join(names)}):{body}\n return __init__", globals(), made)
    init = made["make"](*(cls.__dict__[name].__set__ for name in names))
    cls.__init__ = update_wrapper(init, cls.__init__)  # type: ignore[method-assign]
    return cls


@_setting_slots
@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """What a store keeps of one session. All times are seconds since the epoch, UTC."""

    id: str
    """Public name of the session; it opens nothing."""
    user_id: str | None
    tenant_id: str | None
    tags: frozenset[str]
    metadata: Mapping[str, JSON]
    """Searchable description, readable without decoding the payload."""
    data: bytes = field(repr=False)
    """The encoded payload, opaque to the store."""
    created_at: float
    accessed_at: float
    expires_at: float
    ended_at: float | None
    end_reason: str | None
    version: int
    """1 on creation, one more with each save."""

    def state(self, now: float) -> State:
        """Say whether the session is ``active``, ``expired`` or ``ended`` at *now* (seconds since the epoch)."""
        if self.ended_at is not None:
            return "ended"
        return "active" if now < self.expires_at else "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One compare-and-set: store *record* if the stored version is *expected* (0: if there is none)."""

    record: SessionRecord
    expected: int

    @property
    def id(self) -> str:
        """The id of the record."""
        return self.record.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """One removal: delete the record *id* if its version is *expected* (``None``: whatever its version)."""

    id: str
    expected: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One entry of a session's history, as the log keeps it."""

    seq: int
    """Its number: 1 for the first one of the session, one more for each that follows."""
    data: bytes = field(repr=False)
    """The encoded entry, opaque to the store."""
    created_at: float
    """When it was appended, in seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuery:
    """A filter over records, with order and paging; ``None`` and empty conditions match everything.

    ``*_after`` includes the given moment, ``*_before`` excludes it. *state* is judged at *now*, which it requires.
    *id_prefix* is the beginning of an id, 3 digits or more. *tags* must all be present. *text* is looked for, ignoring
    case, in the user id, the tags and the metadata's strings. *order_by* is one of ``ORDERS``, with a leading ``-`` for
    descending, ties broken by id; ``None`` lets the store stream in any order. *offset* and *limit* cut the result after
    ordering.

    *after* is the ``position`` of the last record of the page before: only what comes later in *order_by*, which it needs,
    matches. Such a page costs the same however many come before it, and what is created or deleted meanwhile neither
    repeats nor skips a record on it, as it does with *offset*.

    Raises ``ValueError`` for a user or tenant that is no text, tags that are no frozenset, an unknown order, a negative
    limit or offset, a state without *now*, an *id_prefix* that no id can have, or an *after* that is no position in
    *order_by* or comes with an *offset*.
    """

    ids: frozenset[str] | None = None
    id_prefix: str | None = None
    user_id: str | None = None
    tenant_id: str | None = None
    tags: frozenset[str] = frozenset()
    state: State | None = None
    now: float | None = None
    created_after: float | None = None
    created_before: float | None = None
    accessed_after: float | None = None
    accessed_before: float | None = None
    expires_after: float | None = None
    expires_before: float | None = None
    text: str | None = None
    order_by: str | None = None
    limit: int | None = None
    offset: int = 0
    after: Position | None = None

    def __post_init__(self) -> None:
        self._check_owner_and_tags()
        if self.order_by is not None and self.order_by.removeprefix("-") not in ORDERS:
            raise ValueError(f"order_by is {self.order_by!r}; allowed are {', '.join(ORDERS)}, each with an optional '-'")
        if self.offset < 0 or (self.limit is not None and self.limit < 0):
            raise ValueError(f"limit ({self.limit}) and offset ({self.offset}) cannot be negative")
        if self.state is not None and self.now is None:
            raise ValueError("a query by state needs now=, the moment at which the state is judged")
        if self.id_prefix is not None and not is_id_prefix(self.id_prefix):
            raise ValueError(
                f"id_prefix is {self.id_prefix!r}; allowed are the first 3 to 67 lower-case hex digits of an id"
            )
        if self.after is not None:
            self._check_after(self.after)

    def _check_owner_and_tags(self) -> None:
        # 7 would match nobody, since ids are kept as text, and the letters of a text would be taken for tags.
        for name, value in ("user_id", self.user_id), ("tenant_id", self.tenant_id):
            if not isinstance(value, str | None):
                raise ValueError(f"{name} is {value!r}; a query takes it as text: {str(value)!r}")
        if not isinstance(self.tags, frozenset):
            raise ValueError(f'tags are {self.tags!r}; a query takes a frozenset of text, such as frozenset({{"a tag"}})')

    def _check_after(self, after: Position) -> None:
        if self.order_by is None or self.offset:
            raise ValueError("a query with after= needs order_by=, and takes no offset=")
        if not (isinstance(after, tuple) and len(after) == 2 and self._is_position(*after)):
            raise ValueError(
                f"after is {after!r}; allowed is the position of a record in {self.order_by}: the value of that field and "
                "the id"
            )

    def _is_position(self, value: object, session_id: object) -> bool:
        if not isinstance(session_id, str) or not is_session_id(session_id):
            return False
        if self.by_id:
            return value == session_id
        return type(value) in (int, float) and FIRST_MOMENT <= value < LAST_MOMENT  # type: ignore[operator]

    @property
    def by_id(self) -> bool:
        """Whether the order is by id, one way or the other."""
        return self.order_by in ("id", "-id")

    @property
    def descending(self) -> bool:
        """Whether the order is from the last to the first."""
        return self.order_by is not None and self.order_by.startswith("-")

    def position(self, record: SessionRecord) -> Position:
        """Where *record* stands in the order: *after* of the page that follows it. Without an order, by id."""
        return getattr(record, (self.order_by or "id").removeprefix("-")), record.id

    def uncut(self) -> SessionQuery:
        """The same conditions without limit and offset, and without an order unless a condition needs it."""
        return replace(self, order_by=self.order_by if self.after else None, limit=None, offset=0)

    def matches(self, record: SessionRecord) -> bool:
        """Whether *record* fulfils every condition; this is what each store's ``find`` and ``count`` must agree with."""
        return (
            (self.ids is None or record.id in self.ids)
            and (self.id_prefix is None or record.id.startswith(self.id_prefix))
            and (self.user_id is None or record.user_id == self.user_id)
            and (self.tenant_id is None or record.tenant_id == self.tenant_id)
            and self.tags <= record.tags
            and (self.state is None or self.now is None or record.state(self.now) == self.state)
            and _within(record.created_at, self.created_after, self.created_before)
            and _within(record.accessed_at, self.accessed_after, self.accessed_before)
            and _within(record.expires_at, self.expires_after, self.expires_before)
            and (self.text is None or _mentions(record, self.text.casefold()))
            and (self.after is None or self._comes_after(self.position(record), self.after))
        )

    def _comes_after(self, position: Any, after: Any) -> bool:
        return bool(position < after if self.descending else position > after)


def _within(moment: float, after: float | None, before: float | None) -> bool:
    return (after is None or moment >= after) and (before is None or moment < before)


def _mentions(record: SessionRecord, text: str) -> bool:
    haystack = [record.user_id or "", *record.tags, *_strings(record.metadata)]
    return any(text in straw.casefold() for straw in haystack)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One entry of the history of a session."""

    seq: int
    """1 for the first, one more with each; there are no gaps."""
    role: str
    """Who speaks: ``"user"``, ``"assistant"``, or whatever else the application says."""
    content: Any = field(repr=False)
    """What is said: text, or anything else that a session can hold."""
    metadata: Mapping[str, Any] = field(repr=False)
    created_at: float
    """Seconds since the epoch at which it was appended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Figures of one store: how many records in which state, of which users, tenants and tags, how large and how old."""

    total: int = 0
    active: int = 0
    expired: int = 0
    ended: int = 0
    users: int = 0
    """Different pairs of tenant and user among all records."""
    bytes: int = 0
    """Sum of the encoded payloads."""
    oldest: float | None = None
    """``created_at`` of the first record."""
    newest: float | None = None
    """``created_at`` of the last record."""
    tenants: Mapping[str, int] = field(default_factory=dict)
    """How many records each tenant has, in any state. Records without a tenant are in no entry."""
    tags: Mapping[str, int] = field(default_factory=dict)
    """How many records have each tag, in any state. One with several tags is in several entries."""


Kind: TypeAlias = Literal["record", "data", "torn", "leftover", "index", "mode", "foreign", "type", "schema", "database"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that a check of a store found not to be as it should."""

    kind: Kind
    """``record`` and ``data``: of a session that cannot be read, as a whole or its data alone; ``torn``: a save or a
    transaction that was not finished; ``leftover``: what a process left that was stopped; ``index``: an entry without its
    session, or the other way round; ``mode``: of a file that others can read, or that is theirs; ``foreign``: what no store
    has put there; ``type``, ``schema``, ``database``: what the server or the database keeps in another form than it
    should."""
    where: str
    """The session's id, the path, the key or the table."""
    text: str
    """What is wrong, and what becomes or became of it."""
    repaired: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """Something that ``optimize`` did to a store."""

    text: str
    freed: int = 0
    """Bytes of disk that are free now."""
