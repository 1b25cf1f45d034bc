"""An HTTP API over the sessions of one namespace and their histories: JSON in, JSON out, shut until it is opened."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from flask import Blueprint, Response, request, url_for
from flask.blueprints import BlueprintSetupState
from flask.wrappers import Request
from werkzeug.exceptions import BadRequest, MethodNotAllowed, NotFound

from ..exceptions import ConfigError, HistoryConflict, SessionConflict
from ..extension import PersistSession
from ..history import History
from ..lifecycle import WEB
from ..manager import SessionManager
from ..records import HistoryEntry, Position, SessionRecord
from ..stored import StoredSession
from ..stores import redacted
from ..stores.base import combined
from . import api_openapi, api_problems, api_schemas
from .api_openapi import OPERATIONS, Operation
from .api_problems import Problem
from .api_schemas import ValidationError

#: Every method that a path of the API answers itself, be it with a 405.
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a request is about: a session, or those of a user; fields that it does not name are ``None``.

    A session that does not exist has an *id* and nothing else.
    """

    id: str | None = None
    user_id: str | None = None
    """Whose it is, or of whom sessions are created, listed or revoked; ``None``: nobody's, or those of everybody."""
    tenant_id: str | None = None
    record: SessionRecord | None = field(default=None, repr=False)
    """The session as it is stored, if there is one."""


#: Says whether a request may do something to something; see ``api_blueprint``.
Authorize = Callable[[Request, str, Target], "bool | None"]


def api_blueprint(
    authorize: Authorize | None = None,
    namespace: str = "chat",
    *,
    name: str = "sessions_api",
    tenant: Callable[[Request], object] | None = None,
    max_body: int = 2 * 1024 * 1024,
) -> Blueprint:
    """A blueprint with an HTTP API over the sessions of a namespace::

        app.register_blueprint(api_blueprint(may), url_prefix="/api")

    :param authorize: called with the request, the name of an action and what it is about, before anything is done or told;
        it returns ``True`` or ``False``. Each request is refused with 403 without it.
    :param namespace: of the sessions; set up beforehand with ``PersistSession.namespace`` if it has options.
    :param name: of the blueprint, for ``url_for("sessions_api.read_session", session_id=…)``.
    :param tenant: called with the request; it returns the tenant, whose sessions are all that the request can reach, or
        ``None``, with which it is refused.
    :param max_body: largest body of a request in bytes.

    Every error below its prefix is a problem as in RFC 9457. Raises ``ConfigError`` for the namespace of ``flask.session``:
    what could be changed there is who is signed in.
    """
    if namespace == WEB:
        raise ConfigError(f"{WEB!r} is the namespace of flask.session, which no API may change; name one of your own")
    api = _Api(authorize, namespace, tenant, max_body)
    blueprint = Blueprint(name, __name__, url_prefix="/api")
    blueprint.record(_check_prefix)
    blueprint.before_request(api.admit)
    blueprint.after_request(_forbid_caching)
    for path in dict.fromkeys(operation.path for operation in OPERATIONS):
        operations = {operation.method: operation for operation in OPERATIONS if operation.path == path}
        _add_rule(blueprint, path, next(iter(operations.values())).name, api.view(operations))
    for path in "/", "/<path:anything>":
        _add_rule(blueprint, path, "missing", _answer_missing)
    api_problems.handle_problems(blueprint)
    return blueprint


def _add_rule(blueprint: Blueprint, path: str, endpoint: str, view: Callable[..., Response]) -> None:
    blueprint.add_url_rule(
        path, endpoint, view, methods=_METHODS, provide_automatic_options=False, strict_slashes=path != "/"
    )


def _check_prefix(state: BlueprintSetupState) -> None:
    if not (state.url_prefix or "").strip("/"):
        raise ConfigError("the API answers for every path below its prefix; register it with one: url_prefix='/api'")


def _forbid_caching(response: Response) -> Response:
    response.headers.setdefault("Cache-Control", "private, no-cache")
    return response


def _answer_missing(anything: str = "") -> Response:
    raise NotFound("The API has no such path.")


@dataclass(frozen=True, slots=True)
class _Call:
    """A request that was checked: for which operation, with what in it."""

    operation: Operation
    manager: SessionManager
    tenant_id: str | None
    path: dict[str, str]
    query: Any
    body: Any
    headers: Any


class _Api:
    """The views of the blueprint."""

    def __init__(
        self,
        authorize: Authorize | None,
        namespace: str,
        tenant: Callable[[Request], object] | None,
        max_body: int,
    ) -> None:
        self._authorize = authorize
        self._namespace = namespace
        self._tenant = tenant
        self._max_body = max_body

    def admit(self) -> None:
        """Refuse everything as long as nobody says who may do what."""
        if self._authorize is None:
            raise Problem(api_problems.REFUSED, "The application has not said who may use this API.")
        allowed = request.max_content_length
        request.max_content_length = self._max_body if allowed is None else min(allowed, self._max_body)

    def view(self, operations: dict[str, Operation]) -> Callable[..., Response]:
        """The view of a path with these operations, by method."""
        allowed = sorted({*operations, "OPTIONS", *(["HEAD"] if "GET" in operations else [])})

        def dispatch(**path: str) -> Response:
            operation = operations.get("GET" if request.method == "HEAD" else request.method)
            if operation is None and request.method == "OPTIONS":
                return Response(status=204, headers={"Allow": ", ".join(allowed)})
            if operation is None:
                raise MethodNotAllowed(allowed, "The path does not take this method.")
            view: Callable[[_Call], Response] = getattr(self, operation.name)
            return view(self._call(operation, path))

        return dispatch

    def _call(self, operation: Operation, path: dict[str, str]) -> _Call:
        """The request, checked without a look at what is stored, so that nothing is told of it."""
        query, body, headers = _read_query(operation), _read_body(operation), _read_headers(operation)
        if operation.version == "required" and "If-Match" not in request.headers:
            raise Problem(api_problems.NO_VERSION, 'Send the ETag of the version that you change, such as If-Match: "3".')
        if "user_id" in path:
            path = {"user_id": _checked(api_schemas.UserPath, path, "path").user_id}
        manager, tenant_id = self._bound(PersistSession().namespace(self._namespace))
        return _Call(operation, manager, tenant_id, path, query, body, headers)

    def _bound(self, manager: SessionManager) -> tuple[SessionManager, str | None]:
        """*manager*, confined to the tenant of the request if requests have one, and that tenant."""
        if self._tenant is None:
            return manager, None
        tenant_id = self._tenant(request)
        try:
            return manager.for_tenant(tenant_id), str(tenant_id)
        except ValueError:  # such as "": that must not open what all have
            raise _refused() from None

    # Asking -----------------------------------------------------------------------------------------------------------

    def _may(self, call: _Call, target: Target, action: str | None = None) -> bool:
        """Whether the request may do what it asks for, or else another *action* that this comes to."""
        assert self._authorize is not None
        answer = self._authorize(request, action or call.operation.action or "", target)
        if answer is not None and not isinstance(answer, bool):
            # A response that refuses, or a coroutine nobody awaits, would be true.
            raise TypeError(f"authorize returned a {type(answer).__name__}; it has to return True or False")
        return bool(answer)

    def _require(self, call: _Call, *, user_id: str | None = None, tenant_id: str | None = None) -> None:
        target = Target(user_id=user_id, tenant_id=call.tenant_id or tenant_id)
        if tenant_id not in (None, target.tenant_id) or not self._may(call, target):
            raise _refused()

    def _session(self, call: _Call) -> StoredSession:
        """The session of a path, if the request may have it."""
        session_id = call.path["session_id"]
        found = call.manager.load(session_id)
        target = Target(id=session_id) if found is None else _target(found)
        # Asked in any case: what it raises must not tell whether there is one.
        if not self._may(call, target) or found is None:
            raise api_problems.missing()
        if found.end_reason == "deleted":
            raise Problem(api_problems.DELETED, "Its id is remembered for a while, and nothing else.")
        return found

    def _active(self, call: _Call) -> StoredSession:
        session = self._session(call)
        if session.state != "active":
            raise Problem(api_problems.ENDED, f"It takes no change any more: {session.end_reason}.")
        return session

    # Sessions ---------------------------------------------------------------------------------------------------------

    def create_session(self, call: _Call) -> Response:
        """Create a session, or go on with the one of that key; the token is nobody's to see."""
        body: api_schemas.NewSession = call.body
        self._require(call, user_id=body.user_id, tenant_id=body.tenant_id)
        with _values():
            session = call.manager.resume_or_create(**body.model_dump())
        if not session.new and not self._may(call, _target(session), "read"):
            raise _refused()
        response = _session_response(call.manager, session, 201 if session.new else 200)
        response.headers["Location"] = url_for(".read_session", session_id=session.id)
        return response

    def read_session(self, call: _Call) -> Response:
        """A session in whatever state."""
        response = _session_response(call.manager, self._session(call))
        response.make_conditional(request)
        return response

    def update_session(self, call: _Call) -> Response:
        """Merge what was sent into a session of a version."""
        body: api_schemas.SessionChange = call.body
        session = self._active(call)
        with _values(), _expected(session) as version, call.manager.edit(session.id, version) as changed:
            changed.data = api_schemas.merged(changed.data, body.data)
            metadata = api_schemas.merged(changed.metadata, body.metadata)
            changed.metadata.clear()
            changed.metadata.update(metadata)
            if body.tags is not None:
                changed.tags.clear()
                changed.tags.update(body.tags)
        return _session_response(call.manager, changed)

    def delete_session(self, call: _Call) -> Response:
        """Remove a session with all that it has, in whatever state it is."""
        session = self._session(call)
        with _expected(session) as version:
            if not call.manager.delete(session.id, expected_version=version):
                raise Problem(api_problems.DELETED, "Somebody else has deleted it at this moment.")
        return Response(status=204)

    def end_session(self, call: _Call) -> Response:
        """Close a session for good."""
        session = self._active(call)
        if not call.manager.end(session.id):
            raise Problem(api_problems.ENDED, "It ended at this moment.")
        return _session_response(call.manager, self._session(call))

    # Lists ------------------------------------------------------------------------------------------------------------

    def list_sessions(self, call: _Call) -> Response:
        """A page of the sessions that match."""
        return self._page(call, call.query.user_id)

    def list_user_sessions(self, call: _Call) -> Response:
        """A page of the sessions of a user that match."""
        return self._page(call, call.path["user_id"])

    def _page(self, call: _Call, user_id: str | None) -> Response:
        query: api_schemas.UserSessionsQuery = call.query
        self._require(call, user_id=user_id, tenant_id=query.tenant_id)
        conditions = query.model_dump(exclude={"cursor", "user_id", "ids"})
        conditions["state"] = None if query.state == "any" else query.state
        conditions["has_history"] = query.has_history and query.has_history == "true"
        conditions["limit"] += 1  # whether there is another page
        with _invalid("query", "cursor"):
            after = _position(query)
            ids = getattr(query, "ids", None) or None
            found = list(call.manager.find(**conditions, user_id=user_id, ids=ids, after=after))
        shown = found[: query.limit]
        following = _cursor(query, shown[-1]) if len(found) > len(shown) else None
        page = api_schemas.SessionPage(
            sessions=[api_schemas.SessionSummary(**_summary(call.manager, record)) for record in shown], next=following
        )
        return _with_next(_json(page), call, cursor=following) if following else _json(page)

    def revoke_user_sessions(self, call: _Call) -> Response:
        """End all active sessions of a user."""
        user_id = call.path["user_id"]
        self._require(call, user_id=user_id)
        return _json(api_schemas.Revoked(revoked=call.manager.revoke_user(user_id, except_id=call.body.except_id)))

    # History ----------------------------------------------------------------------------------------------------------

    def read_history(self, call: _Call) -> Response:
        """Entries of a history, oldest first."""
        query: api_schemas.HistoryQuery = call.query
        log = call.manager.history(self._session(call).id)
        entries = _entries(log, query)
        shown = [api_schemas.Entry(**api_problems.entry_document(entry)) for entry in entries]
        response = _json(api_schemas.EntryPage(entries=shown, count=log.count()))
        following = _following(query, entries)
        return _with_next(response, call, **following) if following else response

    def append_history(self, call: _Call) -> Response:
        """Append entries, all or none."""
        body: api_schemas.Append = call.body
        session = self._active(call)
        entries = [entry.model_dump() for entry in body.entries]
        try:
            with _values():
                seq = call.manager.history(session.id).append(
                    *entries, expected_seq=body.expected_seq, idempotency_key=call.headers.idempotency_key
                )
        except HistoryConflict as conflict:
            readable = self._may(call, _target(session), "history.read")
            raise conflict if readable else Problem(api_problems.BEHIND, str(conflict)) from None
        return _json(api_schemas.Appended(seq=seq), 201)

    # Operating --------------------------------------------------------------------------------------------------------

    def read_stats(self, call: _Call) -> Response:
        """Figures of the sessions of the namespace."""
        self._require(call)
        return _json(api_schemas.Figures(**asdict(call.manager.stats())))

    def read_storage_stats(self, call: _Call) -> Response:
        """Figures and health of the store, which no tenant may see: they are of all."""
        if call.tenant_id is not None:
            raise _refused()
        self._require(call)
        sessions = PersistSession()
        parts = {name: manager.stats() for name, manager in sessions.managers.items()}
        sums = combined(parts.values())
        kind, place = _place(sessions.config.store)
        figures = {name: getattr(sums, name) for name in ("total", "active", "expired", "ended", "bytes")}
        totals = {name: part.total for name, part in parts.items()}
        health = api_schemas.StoreHealth(**asdict(sessions.health()))
        return _json(api_schemas.StorageFigures(type=kind, place=place, **figures, namespaces=totals, health=health))

    def clean_up(self, call: _Call) -> Response:
        """Remove what has expired, and ended long enough ago."""
        self._require(call)
        report = call.manager.cleanup(older_than=call.body.older_than, dry_run=call.body.dry_run)
        return _json(api_schemas.CleanupResult(**asdict(report), removed=report.removed))

    def openapi(self, call: _Call) -> Response:
        """The OpenAPI document."""
        base = url_for(".openapi").removesuffix("/openapi.json")
        return _dump(api_openapi.document(base), 200)


# Requests -------------------------------------------------------------------------------------------------------------


def _read_query(operation: Operation) -> Any:
    fields = operation.query.model_fields
    given: dict[str, Any] = {}
    for key, values in request.args.lists():
        several = len(values) > 1 or (key in fields and isinstance(fields[key].default, list))
        given[key] = values if several else values[0]
    return _checked(operation.query, given, "query")


def _read_body(operation: Operation) -> Any:
    """The body, which no form of another site can send: browsers ask before they send JSON to another origin."""
    if operation.body is None:
        return None
    if request.mimetype not in operation.media_types:
        raise Problem(api_problems.NO_JSON, f"Send the header Content-Type: {operation.media_types[0]}.")
    try:
        return operation.body.model_validate_json(request.get_data())
    except ValidationError as error:
        if why := api_schemas.json_error(error):
            raise BadRequest(f"The body is no JSON: {why}.") from None
        raise _invalid_request(api_schemas.field_errors(error, "body")) from None


def _read_headers(operation: Operation) -> Any:
    names = [field.alias or name for name, field in operation.headers.model_fields.items()]
    return _checked(operation.headers, {name: request.headers[name] for name in names if name in request.headers}, "header")


def _target(session: StoredSession) -> Target:
    return Target(id=session.id, user_id=session.user_id, tenant_id=session.tenant_id, record=session.record)


def _checked(model: type[api_schemas.Query], given: dict[str, Any], location: str) -> Any:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _invalid_request(api_schemas.field_errors(error, location)) from None


@contextmanager
def _expected(session: StoredSession) -> Iterator[int | None]:
    """The version that ``If-Match`` asks for, if it is that of *session*; ``None``: whatever version."""
    etags = request.if_match
    if "If-Match" not in request.headers or etags.star_tag:
        yield None
        return
    if not etags.contains(_etag(session)):
        raise _other_version()
    try:
        yield session.version
    except SessionConflict:
        raise _other_version() from None


@contextmanager
def _values() -> Iterator[None]:
    """Tell what the manager refuses of a body that has the right form."""
    with _invalid("body", ""):
        yield


@contextmanager
def _invalid(location: str, name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise _invalid_field(location, name, str(error)) from None


def _position(query: api_schemas.UserSessionsQuery) -> Position | None:
    return None if query.cursor is None else api_schemas.load_cursor(query.order_by, query.cursor)


# Problems -------------------------------------------------------------------------------------------------------------


def _refused() -> Problem:
    return Problem(api_problems.REFUSED, "You may not do this.")


def _other_version() -> Problem:
    return Problem(api_problems.OTHER_VERSION, "It was changed or renewed since; read it again.")


def _invalid_field(location: str, name: str, detail: str) -> Problem:
    return _invalid_request([{"location": location, "field": name, "detail": detail}])


def _invalid_request(errors: list[dict[str, str]]) -> Problem:
    return Problem(api_problems.INVALID, "See the errors of its fields.", more={"errors": errors})


# Answers --------------------------------------------------------------------------------------------------------------


def _json(document: Any, status: int = 200) -> Response:
    return _dump(document.model_dump(), status)


def _dump(document: dict[str, Any], status: int) -> Response:
    return Response(json.dumps(document, allow_nan=False), status, mimetype=api_openapi.JSON)


def _session_response(manager: SessionManager, session: StoredSession, status: int = 200) -> Response:
    data = api_schemas.to_json(session.data)
    response = _json(api_schemas.SessionDocument(**_summary(manager, session.record), data=data), status)
    response.set_etag(_etag(session))
    return response


def _etag(session: StoredSession) -> str:
    """One for each thing that can be read: a session expires without a new version."""
    return str(session.version) if session.state == "active" else f"{session.version}-{session.state}"


def _summary(manager: SessionManager, record: SessionRecord) -> dict[str, Any]:
    shown = manager.judge(record)
    return {
        "id": shown.id,
        "user_id": shown.user_id,
        "tenant_id": shown.tenant_id,
        "state": manager.state(record),
        "tags": sorted(shown.tags),
        "metadata": api_schemas.to_json(shown.metadata),
        "created_at": shown.created_at,
        "accessed_at": shown.accessed_at,
        "expires_at": shown.expires_at,
        "ended_at": shown.ended_at,
        "end_reason": shown.end_reason,
        "version": shown.version,
    }


def _cursor(query: api_schemas.UserSessionsQuery, last: SessionRecord) -> str:
    return api_schemas.dump_cursor(query.order_by, (getattr(last, query.order_by.removeprefix("-")), last.id))


def _entries(log: History, query: api_schemas.HistoryQuery) -> list[HistoryEntry]:
    """The first entries after one, or else the last ones, or the last ones with a text."""
    if query.text is not None:
        found = log.search(query.text, before=query.before, limit=query.limit)
    elif query.after is not None:
        found = log.after(query.after, query.limit)
    else:
        found = log.page(query.before, query.limit)
    first, end = query.after or 0, math.inf if query.before is None else query.before
    return [entry for entry in found if first < entry.seq < end]


def _following(query: api_schemas.HistoryQuery, entries: list[HistoryEntry]) -> dict[str, int]:
    """What leads to the entries behind these in the direction of reading; nothing if there can be none."""
    if len(entries) < query.limit:
        return {}
    if query.after is not None and query.text is None:
        return {"after": entries[-1].seq}
    return {"before": entries[0].seq} if entries[0].seq > 1 else {}


def _with_next(response: Response, call: _Call, **changed: object) -> Response:
    """*response* with a link to the page that follows, which is asked for as this one was."""
    arguments = {**request.args.to_dict(flat=False), **changed}
    values: dict[str, Any] = {**call.path, **arguments}
    url = url_for(f".{_ENDPOINTS[call.operation.path]}", **values)
    response.headers["Link"] = f'<{url}>; rel="next"'
    return response


_ENDPOINTS = {operation.path: operation.name for operation in reversed(OPERATIONS)}


def _place(store: object) -> tuple[str, str | None]:
    """What kind of store it is and where, without anything secret."""
    if not isinstance(store, str):
        return type(store).__name__, None
    parts = urlsplit(store)
    return parts.scheme, redacted(parts)
