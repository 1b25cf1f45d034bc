"""What the HTTP API takes and gives: models that check requests, make answers and describe both in the OpenAPI document."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from typing import Annotated, Any, Literal, TypeAlias

from ..config import LONGEST
from ..exceptions import ConfigError
from ..records import FIRST_MOMENT, LAST_MOMENT, ORDERS, Position
from ..stores.base import LONGEST_NAME
from ..stores.history import LONGEST_KEY

try:
    from pydantic import BaseModel as BaseModel  # the other modules of the API have these two from here
    from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, StringConstraints
    from pydantic import ValidationError as ValidationError
    from pydantic.json_schema import JsonSchemaMode, models_json_schema
except ImportError as error:
    raise ConfigError("the HTTP API needs pydantic: pip install 'Flask-Persist-Session[api]'") from error

#: So many sessions or entries a page has at most, and so many entries one append.
MOST = 100
DEFAULT = 20
_NO_NUL = r"^[^\x00]*$"


def _whole(value: object) -> object:
    """A number as an integer if it is one: for JSON 3.0 is 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_NAME, pattern=_NO_NUL)]
Key: TypeAlias = Annotated[str, StringConstraints(max_length=LONGEST_NAME, pattern=_NO_NUL)]
Tag: TypeAlias = Annotated[str, StringConstraints(max_length=LONGEST_NAME, pattern=_NO_NUL)]
Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_NAME, pattern=_NO_NUL)]
SessionId: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-3][0-9a-f]{66}$")]
IdempotencyKey: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_KEY, pattern=r"^[!-~]+$")]
Moment: TypeAlias = Annotated[
    float, Field(ge=FIRST_MOMENT, lt=LAST_MOMENT, allow_inf_nan=False, description="Seconds since the epoch, UTC.")
]
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=LONGEST, allow_inf_nan=False)]
Number: TypeAlias = Annotated[int, Field(ge=0, lt=2**53), BeforeValidator(_whole)]
Object: TypeAlias = dict[str, JsonValue]
State: TypeAlias = Literal["active", "expired", "ended"]
Order: TypeAlias = Literal[
    "id", "-id", "created_at", "-created_at", "accessed_at", "-accessed_at", "expires_at", "-expires_at"
]
Limit: TypeAlias = Annotated[int, Field(ge=1, le=MOST, description="How many at most.")]


# Requests -------------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """What a request carries."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Query(BaseModel):
    """What a request asks in its URL or its headers."""

    model_config = ConfigDict(extra="forbid")


class NewSession(Body):
    """A session to be created; with *key*, to be gone on with if the user has an active one of that name."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": "7", "key": "support", "metadata": {"title": "My order"}}]}
    )
    user_id: Name | None = Field(None, description="Whose it is; nobody's if not given.")
    tenant_id: Name | None = Field(None, description="Within which tenant; none if not given.")
    key: Key | None = Field(None, description="The application's own name for it among the sessions of its user.")
    data: Object = Field({}, description="What it keeps.")
    metadata: Object = Field({}, description="What lists show and searches find.")
    tags: list[Tag] = Field([], max_length=MOST)
    lifetime: Seconds | None = Field(None, description="Its own idle timeout in seconds.")


class SessionChange(Body):
    """What is to be changed; *data* and *metadata* are merged as RFC 7396 says: null removes a key."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"metadata": {"title": "Delivery"}, "tags": ["open"]}]})
    data: Object = {}
    metadata: Object = {}
    tags: list[Tag] | None = Field(None, max_length=MOST, description="All tags from now on.")


class Nothing(Body):
    """An empty object; a form of another site cannot send one."""


class NewEntry(Body):
    """An entry to be appended to a history."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_NAME)]
    content: JsonValue
    metadata: Object = {}


class Append(Body):
    """Entries to be appended together or not at all."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"entries": [{"role": "user", "content": "Where is it?"}], "expected_seq": 0}]}
    )
    entries: list[NewEntry] = Field(min_length=1, max_length=MOST)
    expected_seq: Number | None = Field(None, description="The number of the entry that must be the last one until now.")


class Revocation(Body):
    """Which of the user's sessions stays."""

    except_id: SessionId | None = None


class CleanupOrder(Body):
    """What is to be removed besides expired sessions."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"older_than": 86400, "dry_run": True}]})
    older_than: Seconds | None = Field(None, description="Also active sessions without a request for so many seconds.")
    dry_run: bool = Field(False, description="Only count.")


class UserSessionsQuery(Query):
    """Which of a user's sessions are listed."""

    tenant_id: Name | None = None
    tags: list[Tag] = Field([], max_length=MOST, description="All of these; repeat the parameter.")
    state: Literal["active", "expired", "ended", "any"] = "active"
    created_after: Moment | None = None
    created_before: Moment | None = None
    accessed_after: Moment | None = None
    accessed_before: Moment | None = None
    expires_after: Moment | None = None
    expires_before: Moment | None = None
    text: Text | None = Field(None, description="In user id, tags or metadata, ignoring case.")
    has_history: Literal["true", "false"] | None = None
    order_by: Order = "-accessed_at"
    limit: Limit = DEFAULT
    cursor: Annotated[str, StringConstraints(max_length=LONGEST_NAME)] | None = Field(
        None, description="`next` of the page before, in the same order.", json_schema_extra={"format": "cursor"}
    )


class SessionsQuery(UserSessionsQuery):
    """Which sessions are listed."""

    ids: list[SessionId] = Field([], max_length=MOST, description="Only these; repeat the parameter.")
    user_id: Name | None = None


class HistoryQuery(Query):
    """Which entries are read: the first ones after one; or else the last ones, or the last ones with a text."""

    before: Number | None = None
    after: Number | None = None
    limit: Limit = DEFAULT
    text: Text | None = Field(None, description="In role, content or metadata, ignoring case.")


class NoQuery(Query):
    """No parameters."""


class UserPath(Query):
    """The user of a path."""

    user_id: Name


class AppendHeaders(Query):
    """The headers of an append."""

    idempotency_key: IdempotencyKey | None = None


# Answers --------------------------------------------------------------------------------------------------------------


class SessionSummary(BaseModel):
    """A session without its data."""

    id: SessionId
    user_id: str | None
    tenant_id: str | None
    state: State
    tags: list[str]
    metadata: dict[str, Any]
    created_at: float
    accessed_at: float
    expires_at: float
    ended_at: float | None
    end_reason: str | None
    version: int = Field(description="1 on creation, one more with each change; the ETag has it.")


class SessionDocument(SessionSummary):
    """A session with its data."""

    data: dict[str, Any] = Field(description="Values that are no JSON are shown in the nearest form that is.")


class SessionPage(BaseModel):
    """A page of a list of sessions."""

    sessions: list[SessionSummary]
    next: str | None = Field(description="The cursor of the next page; null on the last one.")


class Entry(BaseModel):
    """An entry of a history."""

    seq: int
    role: str
    content: Any
    metadata: dict[str, Any]
    created_at: float


class EntryPage(BaseModel):
    """A part of a history, oldest entry first."""

    entries: list[Entry]
    count: int = Field(description="How many entries the history has.")


class Appended(BaseModel):
    """The number of the last entry that was appended."""

    seq: int


class Revoked(BaseModel):
    """How many sessions were ended."""

    revoked: int


class Figures(BaseModel):
    """Figures of sessions in whatever state."""

    total: int
    active: int
    expired: int
    ended: int
    users: int
    bytes: int = Field(description="Of the encoded data.")
    oldest: float | None
    newest: float | None
    tenants: dict[str, int]
    tags: dict[str, int]


class StoreHealth(BaseModel):
    """Whether the store works."""

    healthy: bool
    issues: list[str]
    write_seconds: float | None
    read_seconds: float | None
    last_cleanup: float | None
    last_backup: float | None


class StorageFigures(BaseModel):
    """The store, with the sessions of all namespaces."""

    type: str = Field(description="The scheme of the store's URL, or the class of a store of the application's own.")
    place: str | None = Field(description="The store's URL without its password and options.")
    total: int
    active: int
    expired: int
    ended: int
    bytes: int
    namespaces: dict[str, int] = Field(description="How many sessions each namespace has.")
    health: StoreHealth


class CleanupResult(BaseModel):
    """What was removed, or would be."""

    expired: int
    ended: int
    idle: int
    removed: int
    dry_run: bool


class FieldError(BaseModel):
    """What is wrong with one field of a request."""

    location: Literal["body", "query", "path", "header"]
    field: str
    detail: str


class ProblemDocument(BaseModel):
    """A problem as RFC 9457 describes it."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldError] | None = Field(None, description="Of a request that is not valid: each field.")
    missed: list[Entry] | None = Field(None, description="Of an append that came too late: the entries it did not know.")


# Values ---------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """*value* in the nearest form that is JSON.

    Times are text in ISO 8601, durations are seconds, bytes are Base64, sets and tuples are lists, sets sorted by what
    their members look like; keys and everything else are text.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=repr)
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else _as_text(value)


def _as_text(value: Any) -> str | float:
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def merged(target: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """*target* with *patch* merged into it as RFC 7396, section 2, says."""
    result = {key: value for key, value in target.items() if patch.get(key, value) is not None or key not in patch}
    for key, value in patch.items():
        if isinstance(value, dict):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, dict) else {}, value)
        elif value is not None:
            result[key] = value
    return result


# Cursors --------------------------------------------------------------------------------------------------------------


def dump_cursor(order: str, position: Position) -> str:
    """The text of a place in a list. It tells only the last session of a page, and opens nothing, so it is not signed."""
    packed = json.dumps([order, *position], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def load_cursor(order: str, cursor: str) -> Position:
    """The place that *cursor* stands for. Raises ``ValueError`` if it is none in that order."""
    try:
        packed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        made_for, value, session_id = json.loads(packed)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("is no cursor of this API") from None
    if made_for != order or order.removeprefix("-") not in ORDERS or not isinstance(session_id, str):
        raise ValueError(f"is no cursor of a list ordered by {order}")
    return value, session_id


# What pydantic says ---------------------------------------------------------------------------------------------------


def field_errors(error: ValidationError, location: str) -> list[dict[str, str]]:
    """What is wrong with each field of a request, in words and without what was sent."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)
    return [{"location": location, "field": ".".join(map(str, one["loc"])), "detail": one["msg"]} for one in wrong]


def json_error(error: ValidationError) -> str | None:
    """Why a body is no JSON; ``None`` if it is."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return first["msg"] if first["type"] == "json_invalid" else None


def definitions(
    taken: Iterable[type[BaseModel]], given: Iterable[type[BaseModel]], ref_template: str
) -> dict[str, dict[str, Any]]:
    """The JSON schemas of models that are taken from clients, and of those that are given to them, by name."""
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in taken]
    models += [(model, "serialization") for model in given]
    _, schemas = models_json_schema(sorted(models, key=lambda item: item[0].__name__), ref_template=ref_template)
    found: dict[str, dict[str, Any]] = schemas["$defs"]
    return found
