"""The operations of the HTTP API, in one table that routes requests, checks them and becomes the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..version import __version__
from . import api_problems as problems
from . import api_schemas as schemas
from .api_problems import Kind
from .api_schemas import BaseModel

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
_REF = "#/components/schemas/{model}"
_PLAIN = {400: "The request cannot be read", 405: "The path does not take this method"}
_COMMON = (problems.REFUSED, problems.INVALID, problems.BROKEN, problems.UNSUPPORTED, problems.UNAVAILABLE)
_ONE = (problems.MISSING, problems.DELETED)
_CHANGE = (*_ONE, problems.ENDED, problems.BUSY)
_STORED = (problems.TOO_LARGE, problems.UNSTORABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    name: str
    """Of the view."""
    method: str
    path: str
    """As a rule of Flask."""
    action: str | None
    """What ``authorize`` is asked; ``None``: nothing."""
    summary: str
    answers: dict[int, type[BaseModel] | None]
    body: type[schemas.Body] | None = None
    query: type[schemas.Query] = schemas.NoQuery
    headers: type[schemas.Query] = schemas.NoHeaders
    problems: tuple[Kind, ...] = ()
    version: str | None = None
    """Whether ``If-Match`` is ``"required"`` or ``"optional"``; ``None``: not taken."""

    @property
    def media_types(self) -> tuple[str, ...]:
        """What its body may be sent as."""
        return (JSON, MERGE_PATCH) if self.method == "PATCH" else (JSON,)


_SESSION = "/sessions/<session_id>"
_USER = "/users/<path:user_id>/sessions"
OPERATIONS = (
    Operation(
        name="create_session",
        method="POST",
        path="/sessions",
        action="create",
        summary="Create a session, or go on with the one of that key.",
        body=schemas.NewSession,
        answers={201: schemas.SessionDocument, 200: schemas.SessionDocument},
        problems=(problems.LIMIT, problems.FULL, problems.BUSY, *_STORED),
    ),
    Operation(
        name="list_sessions",
        method="GET",
        path="/sessions",
        action="list",
        summary="List sessions, a page at a time.",
        query=schemas.SessionsQuery,
        answers={200: schemas.SessionPage},
    ),
    Operation(
        name="read_session",
        method="GET",
        path=_SESSION,
        action="read",
        summary="Read a session in whatever state.",
        answers={200: schemas.SessionDocument, 304: None},
        problems=_ONE,
    ),
    Operation(
        name="update_session",
        method="PATCH",
        path=_SESSION,
        action="update",
        summary="Change an active session of a known version.",
        body=schemas.SessionChange,
        answers={200: schemas.SessionDocument},
        problems=(*_CHANGE, *_STORED),
        version="required",
    ),
    Operation(
        name="delete_session",
        method="DELETE",
        path=_SESSION,
        action="delete",
        summary="Remove a session with its data and its history.",
        answers={204: None},
        problems=(*_ONE, problems.BUSY),
        version="optional",
    ),
    Operation(
        name="end_session",
        method="POST",
        path=f"{_SESSION}/end",
        action="end",
        summary="Close a session for good; what it has stays until it is cleaned up.",
        body=schemas.Nothing,
        answers={200: schemas.SessionDocument},
        problems=_CHANGE,
    ),
    Operation(
        name="read_history",
        method="GET",
        path=f"{_SESSION}/history",
        action="history.read",
        summary="Read entries of a session's history.",
        query=schemas.HistoryQuery,
        answers={200: schemas.EntryPage},
        problems=_ONE,
    ),
    Operation(
        name="append_history",
        method="POST",
        path=f"{_SESSION}/history",
        action="history.append",
        summary="Append entries, all or none.",
        body=schemas.Append,
        headers=schemas.AppendHeaders,
        answers={201: schemas.Appended},
        problems=(*_CHANGE, problems.BEHIND, *_STORED),
    ),
    Operation(
        name="list_user_sessions",
        method="GET",
        path=_USER,
        action="list",
        summary="List the sessions of a user, a page at a time.",
        query=schemas.UserSessionsQuery,
        answers={200: schemas.SessionPage},
    ),
    Operation(
        name="revoke_user_sessions",
        method="POST",
        path=f"{_USER}/revoke",
        action="revoke",
        summary="End all active sessions of a user.",
        body=schemas.Revocation,
        answers={200: schemas.Revoked},
        problems=(problems.BUSY,),
    ),
    Operation(
        name="read_stats",
        method="GET",
        path="/sessions/stats",
        action="stats",
        summary="Figures of the sessions.",
        answers={200: schemas.Figures},
    ),
    Operation(
        name="read_storage_stats",
        method="GET",
        path="/sessions/storage/stats",
        action="storage.stats",
        summary="Figures and health of the store, with the sessions of all namespaces.",
        answers={200: schemas.StorageFigures},
    ),
    Operation(
        name="clean_up",
        method="POST",
        path="/sessions/cleanup",
        action="cleanup",
        summary="Remove expired sessions, and ended ones that were kept long enough.",
        body=schemas.CleanupOrder,
        answers={200: schemas.CleanupResult},
    ),
    Operation(
        name="openapi",
        method="GET",
        path="/openapi.json",
        action=None,
        summary="This document.",
        answers={200: None},
    ),
)


def document(base: str) -> dict[str, Any]:
    """The OpenAPI document of the API that is mounted at *base*."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sessions",
            "version": __version__,
            "description": "Sessions of one namespace and their histories. All times are seconds since the epoch, UTC.",
        },
        "servers": [{"url": base or "/"}],
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def _schemas() -> dict[str, Any]:
    taken = {operation.body for operation in OPERATIONS if operation.body}
    given = {model for operation in OPERATIONS for model in operation.answers.values() if model}
    return schemas.definitions(taken, given | {schemas.ProblemDocument}, _REF)


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "description": f"`authorize` is asked for `{operation.action}`." if operation.action else "Nobody is asked.",
        "parameters": [*_path_parameters(operation), *_query_parameters(operation.query), *_headers(operation)],
        "responses": {
            **{str(status): _answer(operation, status, model) for status, model in operation.answers.items()},
            **_problem_answers(operation),
        },
    }
    if operation.body:
        schema = {"$ref": _REF.format(model=operation.body.__name__)}
        content = {media_type: {"schema": schema} for media_type in operation.media_types}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _path_parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    if "<session_id>" in operation.path:
        yield _parameter("session_id", "path", {"type": "string", "pattern": "^[0-3][0-9a-f]{66}$"}, required=True)
    if "<path:user_id>" in operation.path:
        yield _parameter("user_id", "path", _properties(schemas.UserPath)["user_id"], required=True)


def _query_parameters(query: type[schemas.Query]) -> Iterator[dict[str, Any]]:
    for name, schema in _properties(query).items():
        yield _parameter(name, "query", schema)


def _headers(operation: Operation) -> Iterator[dict[str, Any]]:
    version = {"type": "string", "examples": ["*", '"3"']}
    if operation.version:
        text = "The ETag of the version to be changed; `*`: whatever version."
        yield _parameter("If-Match", "header", version | {"description": text}, required=operation.version == "required")
    if 304 in operation.answers:
        text = "The ETag of the version that is known."
        yield _parameter("If-None-Match", "header", version | {"description": text})
    for name, schema in _properties(operation.headers).items():
        yield _parameter(name, "header", schema)


def _parameter(name: str, place: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    schema = dict(schema)
    described = {"name": name, "in": place, "required": required, "schema": schema}
    if text := schema.pop("description", None):
        described["description"] = text
    return described


def _properties(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The fields of a model as parameters, which are left out where a field may be ``None``."""
    found = {}
    for name, schema in model.model_json_schema().get("properties", {}).items():
        plain = {key: value for key, value in schema.items() if key not in ("title", "anyOf", "default")}
        options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
        if schema.get("default") not in (None, []):
            plain["default"] = schema["default"]
        found[name] = {**options[0], **plain} if len(options) == 1 else plain | ({"anyOf": options} if options else {})
    return found


def _answer(operation: Operation, status: int, model: type[BaseModel] | None) -> dict[str, Any]:
    described: dict[str, Any] = {"description": _WORDS[status]}
    if model:
        described["content"] = {JSON: {"schema": {"$ref": _REF.format(model=model.__name__)}}}
    elif status == 200:
        described["content"] = {JSON: {"schema": {"type": "object"}}}
    if headers := dict(_answer_headers(operation, status, model)):
        described["headers"] = headers
    if status in (200, 201) and operation.body is schemas.NewSession:
        described["links"] = dict(_links())
    return described


def _links() -> Iterator[tuple[str, Any]]:
    """From a session that was created to what can be done with it."""
    for operation in OPERATIONS:
        if operation.path.startswith(_SESSION):
            parameters = {"path.session_id": "$response.body#/id"}
            if operation.version:
                parameters["header.If-Match"] = "$response.header.ETag"
            yield operation.name, {"operationId": operation.name, "parameters": parameters}


def _answer_headers(operation: Operation, status: int, model: type[BaseModel] | None) -> Iterator[tuple[str, Any]]:
    if model is schemas.SessionDocument or status == 304:
        yield "ETag", _header("The version of the session, for If-Match and If-None-Match.", required=True)
    if status == 201 and operation.body is schemas.NewSession:
        yield "Location", _header("Where the session is.", required=True)
    if model in (schemas.SessionPage, schemas.EntryPage):
        yield "Link", _header('`rel="next"`: the page that follows, if there is one.')


def _header(text: str, *, required: bool = False) -> dict[str, Any]:
    return {"description": text, "required": required, "schema": {"type": "string"}}


_WORDS = {
    200: "Done.",
    201: "Stored.",
    204: "Done; there is nothing to tell.",
    304: "The known version is the current one.",
}


def _problem_answers(operation: Operation) -> dict[str, Any]:
    kinds: dict[int, list[Kind]] = {}
    for kind in dict.fromkeys(_kinds(operation)):
        kinds.setdefault(kind.status, []).append(kind)
    answers = {str(status): _problem_answer(kinds[status]) for status in sorted(kinds)}
    for status, title in _PLAIN.items():
        answers[str(status)] = _problem_answer([Kind("about:blank", status, title)])
    return answers


def _kinds(operation: Operation) -> Iterator[Kind]:
    yield from () if operation.action is None else _COMMON
    yield from () if operation.action else (problems.REFUSED, problems.INVALID)
    yield from operation.problems
    if operation.body:
        yield from (problems.NO_JSON, problems.TOO_LARGE)
    if operation.version:
        yield problems.OTHER_VERSION
    if operation.version == "required":
        yield problems.NO_VERSION


def _problem_answer(kinds: Iterable[Kind]) -> dict[str, Any]:
    kinds = list(kinds)
    examples = {
        kind.name.replace(":", "-"): {
            "value": {"type": kind.type, "title": kind.title, "status": kind.status, "detail": f"{kind.title}."}
        }
        for kind in kinds
    }
    schema = {"$ref": _REF.format(model=schemas.ProblemDocument.__name__)}
    described: dict[str, Any] = {
        "description": "; or ".join(kind.title for kind in kinds) + ".",
        "content": {problems.MEDIA_TYPE: {"schema": schema, "examples": examples}},
    }
    if kinds[0].status == 503:
        described["headers"] = {"Retry-After": _header("Seconds to wait.", required=True)}
    if kinds[0].status == 405:
        described["headers"] = {"Allow": _header("The methods that the path takes.", required=True)}
    return described
