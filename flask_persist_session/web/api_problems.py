"""Problems: every error of the HTTP API, as RFC 9457 describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, current_app, request
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

from ..exceptions import (
    HistoryConflict,
    PersistSessionError,
    SerializationError,
    SessionConflict,
    SessionLimitReached,
    SessionNotFound,
    SessionTooLarge,
    StoreUnavailable,
    UnsupportedByStore,
)
from ..records import HistoryEntry
from .api_schemas import to_json

MEDIA_TYPE = "application/problem+json"
#: What a type begins with; RFC 9457 allows one that leads nowhere.
_TYPES = "urn:flask-persist-session:"
_RETRY_AFTER = "5"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem."""

    name: str
    status: int
    title: str

    @property
    def type(self) -> str:
        """The URI of the kind."""
        return f"{_TYPES}{self.name}"


REFUSED = Kind("refused", 403, "This is not allowed")
MISSING = Kind("no-session", 404, "There is no such session")
DELETED = Kind("session-deleted", 410, "The session was deleted")
ENDED = Kind("session-ended", 409, "The session has ended")
LIMIT = Kind("session-limit", 409, "The user has too many sessions")
BEHIND = Kind("history-conflict", 409, "The history is at another entry")
BUSY = Kind("session-conflict", 409, "The session is changed by others all the time")
OTHER_VERSION = Kind("version-conflict", 412, "The session has another version")
TOO_LARGE = Kind("too-large", 413, "This is too large")
NO_JSON = Kind("no-json", 415, "This API takes JSON")
INVALID = Kind("invalid-request", 422, "The request is not valid")
UNSTORABLE = Kind("unstorable", 422, "This cannot be stored")
NO_VERSION = Kind("version-required", 428, "If-Match is required")
BROKEN = Kind("broken", 500, "Something is wrong with the store")
UNSUPPORTED = Kind("unsupported-by-store", 501, "The store cannot do this")
UNAVAILABLE = Kind("store-unavailable", 503, "The store cannot be reached")
FULL = Kind("store-full", 503, "There are too many sessions")
KINDS = (
    *(REFUSED, MISSING, DELETED, ENDED, LIMIT, BEHIND, BUSY, OTHER_VERSION, TOO_LARGE, NO_JSON, INVALID, UNSTORABLE),
    *(NO_VERSION, BROKEN, UNSUPPORTED, UNAVAILABLE, FULL),
)


class Problem(Exception):
    """An answer of the API that is a problem; *more* are members besides those that every problem has."""

    def __init__(
        self, kind: Kind, detail: str, *, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})
        self.more = dict(more or {})


def handle_problems(blueprint: Blueprint) -> None:
    """Have all that goes wrong in *blueprint* answered with a problem."""
    blueprint.register_error_handler(Problem, answer)
    blueprint.register_error_handler(PersistSessionError, lambda error: answer(_problem_of(error)))
    blueprint.register_error_handler(HTTPException, _answer_http)


def answer(problem: Problem) -> Response:
    """The response for a problem."""
    kind = problem.kind
    headers = {"Retry-After": _RETRY_AFTER, **problem.headers} if kind.status == 503 else problem.headers
    return _response(kind.type, kind.title, kind.status, problem.detail, headers, problem.more)


def entry_document(entry: HistoryEntry) -> dict[str, Any]:
    """An entry as the API shows it."""
    return {
        "seq": entry.seq,
        "role": entry.role,
        "content": to_json(entry.content),
        "metadata": to_json(entry.metadata),
        "created_at": entry.created_at,
    }


def _problem_of(error: PersistSessionError) -> Problem:
    """The problem for an error of the manager. What a store says of itself is for the log."""
    if isinstance(error, HistoryConflict):
        return Problem(BEHIND, str(error), more={"missed": [entry_document(entry) for entry in error.missed]})
    if isinstance(error, SessionNotFound):
        return missing() if error.missing else Problem(ENDED, "It takes no change any more.")
    if isinstance(error, SessionLimitReached):
        return Problem(LIMIT if error.scope == "user" else FULL, "End one first, or try again later.")
    if isinstance(error, SerializationError) and request.method in ("POST", "PATCH"):
        return Problem(UNSTORABLE, str(error))
    for kind, as_kind in ((SessionConflict, BUSY), (SessionTooLarge, TOO_LARGE), (UnsupportedByStore, UNSUPPORTED)):
        if isinstance(error, kind):
            return Problem(as_kind, str(error))
    current_app.logger.error("%s %s failed: %s", request.method, request.path, error)
    if isinstance(error, StoreUnavailable):
        return Problem(UNAVAILABLE, "Please try again shortly.")
    return Problem(BROKEN, "The log of the application says what it is.")


def missing() -> Problem:
    """The problem of a session that does not exist, or that whoever asks may not know of.

    Both are told in the same words: the OWASP API Security Top 10 of 2023 calls telling them apart, and then reaching for
    what is there, broken object level authorization (API1).
    """
    return Problem(MISSING, "It does not exist, or is not yours.")


def _answer_http(error: HTTPException) -> Response:
    status = error.response.status_code if error.response is not None else error.code or 500
    headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    # No words of the error's own after a crash: they may be anybody's.
    detail = error.description or "" if status < 500 else ""
    title = HTTP_STATUS_CODES.get(status, "Error")
    return _response("about:blank", title, status, detail or title, headers, {})


def _response(
    kind: str, title: str, status: int, detail: str, headers: Mapping[str, str], more: Mapping[str, Any]
) -> Response:
    document = {"type": kind, "title": title, "status": status, "detail": detail, **more}
    response = Response(json.dumps(document, allow_nan=False), status, mimetype=MEDIA_TYPE)
    response.headers.update(headers)
    return response
