"""The HTTP API over the sessions of a namespace."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Request, abort
from flask.testing import FlaskClient
from flask_wtf import CSRFProtect
from openapi_spec_validator import validate
from werkzeug.test import TestResponse

from flask_persist_session import (
    ConfigError,
    PersistSession,
    SessionManager,
    SessionStore,
    StoreError,
    StoreUnavailable,
    UnsupportedByStore,
)
from flask_persist_session.stores.memory import MemoryStore
from flask_persist_session.web.api import Target, api_blueprint
from flask_persist_session.web.api_openapi import OPERATIONS
from flask_persist_session.web.api_problems import KINDS
from tests.conftest import Clock
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]
NOBODYS = "123" + "0" * 64
PATHS = [
    ("POST", "/api/sessions"),
    ("GET", "/api/sessions"),
    ("GET", f"/api/sessions/{NOBODYS}"),
    ("PATCH", f"/api/sessions/{NOBODYS}"),
    ("DELETE", f"/api/sessions/{NOBODYS}"),
    ("POST", f"/api/sessions/{NOBODYS}/end"),
    ("GET", f"/api/sessions/{NOBODYS}/history"),
    ("POST", f"/api/sessions/{NOBODYS}/history"),
    ("GET", "/api/users/7/sessions"),
    ("POST", "/api/users/7/sessions/revoke"),
    ("GET", "/api/sessions/stats"),
    ("GET", "/api/sessions/storage/stats"),
    ("POST", "/api/sessions/cleanup"),
    ("GET", "/api/openapi.json"),
    ("PUT", "/api/sessions"),
    ("GET", "/api/nothing"),
]


def anybody(request: Request, action: str, target: Target) -> bool:
    return True


def owner(request: Request, action: str, target: Target) -> bool:
    """Who says to be a user may do what concerns that user."""
    user_id = request.headers.get("X-User")
    return user_id is not None and target.user_id == user_id


def serve(app: Flask, authorize: Any = anybody, **options: Any) -> FlaskClient:
    PersistSession().namespace("chat", app=app)
    app.register_blueprint(api_blueprint(authorize, **options), url_prefix="/api")
    return app.test_client()


def chats(app: Flask) -> SessionManager:
    return PersistSession().namespace("chat", app=app)


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return serve(app)


def create(client: FlaskClient, **body: Any) -> TestResponse:
    response = client.post("/api/sessions", json=body)
    assert response.status_code in (200, 201), response.get_data(as_text=True)
    return response


def problem(response: TestResponse, status: int, name: str | None = None) -> dict[str, Any]:
    """The problem that a response is, which must be one in the sense of RFC 9457."""
    document: dict[str, Any] = json.loads(response.get_data())
    assert (response.status_code, document["status"]) == (status, status), document
    assert response.content_type == "application/problem+json"
    assert document["type"] == (f"urn:flask-persist-session:{name}" if name else "about:blank")
    assert document["title"]
    assert document["detail"]
    return document


# Who may do what ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_shut_without_an_authorization_function(app: Flask, method: str, path: str) -> None:
    """As long as the application does not say who may use it, every request is refused, whatever its path."""
    client = serve(app, None)
    problem(client.open(path, method=method, json={}), 403, "refused")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("PATCH", "", {"data": {"x": 1}}),
        ("DELETE", "", None),
        ("POST", "/end", {}),
        ("GET", "/history", None),
        ("POST", "/history", {"entries": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_a_session_of_another_cannot_be_told_from_none(app: Flask, method: str, path: str, body: Any) -> None:
    """A session that one may not have is answered byte for byte like one that does not exist, and stays as it is."""
    client = serve(app, owner)
    other = chats(app).create({"secret": 1}, user_id="8")
    headers = {"X-User": "7", "If-Match": '"1"'}
    refused, none = (
        client.open(f"/api/sessions/{session_id}{path}", method=method, json=body, headers=headers)
        for session_id in (other.id, NOBODYS)
    )
    problem(none, 404, "no-session")
    assert (refused.status, refused.get_data(), list(refused.headers)) == (none.status, none.get_data(), list(none.headers))
    assert chats(app).existing(other.id).record == other.record


def test_what_authorize_raises_does_not_tell_whether_a_session_exists(app: Flask) -> None:
    """It is asked for a missing session as well, with nothing but the id."""
    asked = []

    def authorize(request: Request, action: str, target: Target) -> bool:
        asked.append((action, target.id, target.user_id, target.record is None))
        abort(401)

    client, there = serve(app, authorize), chats(app).create(user_id="7").id
    answers = [client.get(f"/api/sessions/{session_id}") for session_id in (there, NOBODYS)]
    assert problem(answers[0], 401) == problem(answers[1], 401)
    assert asked == [("read", there, "7", False), ("read", NOBODYS, None, True)]


@pytest.mark.parametrize(
    ("method", "path", "body", "action", "user_id"),
    [
        ("POST", "/api/sessions", {"user_id": "7"}, "create", "7"),
        ("GET", "/api/sessions", None, "list", None),
        ("GET", "/api/sessions?user_id=7", None, "list", "7"),
        ("GET", "/api/users/a%2Fb/sessions", None, "list", "a/b"),
        ("POST", "/api/users/7/sessions/revoke", {}, "revoke", "7"),
        ("GET", "/api/sessions/stats", None, "stats", None),
        ("GET", "/api/sessions/storage/stats", None, "storage.stats", None),
        ("POST", "/api/sessions/cleanup", {}, "cleanup", None),
    ],
)
def test_authorize_is_asked_with_the_action_and_the_user(
    app: Flask, method: str, path: str, body: Any, action: str, user_id: str | None
) -> None:
    """What concerns no single session is asked with the user whom it concerns; refused, it is a 403 that does nothing."""
    asked = []

    def authorize(request: Request, name: str, target: Target) -> bool:
        asked.append((name, target))
        return False

    problem(serve(app, authorize).open(path, method=method, json=body), 403, "refused")
    assert asked == [(action, Target(user_id=user_id))]
    assert chats(app).stats().total == 0


@pytest.mark.parametrize(("path", "action"), [("", "read"), ("/history", "history.read")])
def test_authorize_is_asked_with_the_session(app: Flask, path: str, action: str) -> None:
    """What concerns a session is asked with its record."""
    asked = []

    def authorize(request: Request, name: str, target: Target) -> bool:
        asked.append((name, target.record))
        return True

    session = chats(app).create(user_id="7", metadata={"title": "x"})
    assert serve(app, authorize).get(f"/api/sessions/{session.id}{path}").status_code == 200
    assert asked == [(action, session.record)]


def test_a_tenant_reaches_its_own_sessions_alone(app: Flask) -> None:
    """With ``tenant`` every other tenant's sessions are missing, however much authorize allows."""
    client = serve(app, tenant=lambda request: request.headers.get("X-Tenant"))
    mine, other = ({"X-Tenant": name} for name in "ab")
    url = client.post("/api/sessions", json={"user_id": "7"}, headers=mine).headers["Location"]
    assert client.get(url, headers=mine).json["tenant_id"] == "a"
    problem(client.get(url, headers=other), 404, "no-session")
    assert client.get("/api/sessions", headers=other).json["sessions"] == []
    assert client.get("/api/sessions/stats", headers=other).json["total"] == 0
    assert client.post("/api/users/7/sessions/revoke", json={}, headers=other).json == {"revoked": 0}
    problem(client.post("/api/sessions", json={"tenant_id": "a"}, headers=other), 403, "refused")
    problem(client.get("/api/sessions/storage/stats", headers=mine), 403, "refused")


@pytest.mark.parametrize("tenant", [None, "", "x" * 600, False, ["a"]])
def test_no_tenant_is_no_access(app: Flask, tenant: Any) -> None:
    """A request whose tenant is not known, or cannot be one, is refused; above all, it does not reach what all have."""
    client = serve(app, tenant=lambda request: tenant)
    for path in "/api/sessions", "/api/sessions/storage/stats":
        problem(client.get(path), 403, "refused")


async def _says_no() -> bool:
    return False


@pytest.mark.parametrize("answer", [_says_no, lambda: ("No", 403), lambda: "no"])
def test_only_true_opens(app: Flask, answer: Callable[[], Any]) -> None:
    """What is neither true nor false, such as a response or the promise of an answer, is a mistake that opens nothing."""
    given = answer()
    with pytest.raises(TypeError, match="it has to return True or False"):
        serve(app, lambda *asked: given).get("/api/sessions")
    if answer is _says_no:
        given.close()  # else it is told that nobody waited for it, wherever it is collected


def test_what_was_missed_is_told_to_readers_alone(app: Flask) -> None:
    """Whoever may append to a history, but not read it, does not get it by appending at the wrong place."""
    client = serve(app, lambda request, action, target: action == "history.append")
    session = chats(app).create(user_id="7")
    chats(app).history(session.id).append({"role": "user", "content": "geheim"})
    said = {"entries": [{"role": "user", "content": "x"}], "expected_seq": 0}
    answer = problem(client.post(f"/api/sessions/{session.id}/history", json=said), 409, "history-conflict")
    assert "missed" not in answer


def test_a_key_in_use_is_no_way_to_read_a_session(app: Flask) -> None:
    """Whoever may create sessions, but not read them, does not get one that is there by naming its key."""
    client = serve(app, lambda request, action, target: action == "create")
    assert create(client, user_id="8", key="k").status_code == 201
    chats(app).create({"pin": "geheim"}, user_id="7", key="k")
    problem(client.post("/api/sessions", json={"user_id": "7", "key": "k"}), 403, "refused")


def test_no_api_for_the_sessions_of_browsers() -> None:
    """The namespace of ``flask.session`` is refused: what is in it says who is signed in."""
    with pytest.raises(ConfigError, match="'web' is the namespace"):
        api_blueprint(anybody, "web")


@pytest.mark.parametrize("prefix", ["", "/"])
def test_a_prefix_is_needed(app: Flask, prefix: str) -> None:
    """Without a prefix the API would answer for the paths of the application."""
    with pytest.raises(ConfigError, match="url_prefix"):
        app.register_blueprint(api_blueprint(anybody), url_prefix=prefix)


def test_without_pydantic_the_error_says_what_to_install() -> None:
    """Importing the API without its extra says how it is installed."""
    code = "import sys; sys.modules['pydantic'] = None; import flask_persist_session.web.api"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: the HTTP API needs pydantic: pip install 'Flask-Persist-Session[api]'" in done.stderr


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
@pytest.mark.parametrize(
    "path", ["/api/sessions", "/api/sessions/cleanup", "/api/users/7/sessions/revoke", f"/api/sessions/{NOBODYS}/end"]
)
def test_a_form_of_another_site_is_refused(client: FlaskClient, path: str, content_type: str | None) -> None:
    """What browsers send to another origin without asking it is no JSON, and is refused even if it is empty."""
    problem(client.post(path, data="{}", content_type=content_type), 415, "no-json")
    problem(client.post(path, data="", content_type=content_type), 415, "no-json")


def test_goes_along_with_the_protection_of_flask_wtf(make_app: MakeApp) -> None:
    """An application that protects its forms exempts the blueprint, which takes none."""
    app = make_app(TESTING=False)
    csrf, blueprint = CSRFProtect(app), api_blueprint(anybody)
    csrf.exempt(blueprint)
    app.register_blueprint(blueprint)
    assert app.test_client().post("/api/sessions", json={}).status_code == 201


def test_the_token_is_never_told(client: FlaskClient) -> None:
    """A session that is made has a token, which opens it as a cookie would; no answer has it."""
    response = create(client, user_id="7", data={"x": 1})
    assert not response.headers.get("Set-Cookie")
    assert set(response.json) == {
        *("id", "user_id", "tenant_id", "state", "tags", "metadata", "data", "version"),
        *("created_at", "accessed_at", "expires_at", "ended_at", "end_reason"),
    }


# Sessions -------------------------------------------------------------------------------------------------------------


def test_created_as_asked(store_url: str, make_app: MakeApp) -> None:
    """A session is created with all that was sent, and is where Location says, with its version as ETag."""
    client = serve(make_app(store_url, PERSIST_SESSION_RENEW_INTERVAL=0))
    asked = {"user_id": "7", "tenant_id": "t", "data": {"a": [1, None]}, "metadata": {"title": "x"}, "tags": ["b", "a"]}
    response = create(client, **asked, lifetime=90)
    assert response.status_code == 201
    assert response.headers["ETag"] == '"1"'
    read = client.get(response.headers["Location"])
    assert read.json == response.json
    assert {key: read.json[key] for key in asked} == asked | {
        "tags": ["a", "b"],
        "metadata": {"title": "x", "lifetime": 90.0},
    }
    assert read.json["expires_at"] == pytest.approx(read.json["created_at"] + 90, abs=1)


def test_a_key_leads_to_the_same_session(client: FlaskClient) -> None:
    """The first request with a key creates, later ones go on, each user has an own one of that name."""
    first, again, other = (create(client, key="support", user_id=user) for user in "778")
    assert [first.status_code, again.status_code, other.status_code] == [201, 200, 201]
    assert first.json["id"] == again.json["id"] != other.json["id"]


def test_a_session_that_is_known_is_not_sent_again(client: FlaskClient) -> None:
    """With If-None-Match the answer is 304 until the session changes, which its expiry is as well."""
    url = create(client).headers["Location"]
    etag = client.get(url).headers["ETag"]
    assert client.get(url, headers={"If-None-Match": etag}).status_code == 304
    client.patch(url, json={"data": {"x": 1}}, headers={"If-Match": etag})
    assert client.get(url, headers={"If-None-Match": etag}).status_code == 200


def test_an_expired_session_has_another_etag(app: Flask, client: FlaskClient, clock: Clock) -> None:
    """A session expires without a new version, and nobody takes it for what it was before."""
    chats(app).clock = clock
    url = create(client, lifetime=60).headers["Location"]
    before = client.get(url)
    clock.advance(200)
    after = client.get(url, headers={"If-None-Match": before.headers["ETag"]})
    assert (before.json["state"], after.json["state"]) == ("active", "expired")
    problem(client.patch(url, json={}, headers={"If-Match": before.headers["ETag"]}), 409, "session-ended")


def test_changes_are_merged_as_rfc_7396_says(client: FlaskClient) -> None:
    """Objects are merged at every depth, null removes, everything else replaces; tags are replaced."""
    created = create(client, data={"a": {"b": 1, "c": 2}, "d": [1, 2], "e": 5}, metadata={"m": 1, "n": 2}, tags=["x"])
    patch = {"data": {"a": {"b": None, "f": {"g": 1, "h": None}}, "d": {"x": None}}, "metadata": {"m": None}, "tags": ["y"]}
    response = client.patch(
        created.headers["Location"],
        data=json.dumps(patch),
        content_type="application/merge-patch+json",
        headers={"If-Match": created.headers["ETag"]},
    )
    assert response.json["data"] == {"a": {"c": 2, "f": {"g": 1}}, "d": {}, "e": 5}
    assert (response.json["metadata"], response.json["tags"], response.headers["ETag"]) == ({"n": 2}, ["y"], '"2"')
    assert client.get(created.headers["Location"]).json == response.json


def test_a_change_names_the_version_that_it_changes(client: FlaskClient) -> None:
    """Without If-Match a change is refused with 428, with that of another version with 412; ``*`` is any version."""
    url = create(client, data={"x": 1}).headers["Location"]
    problem(client.patch(url, json={"data": {"x": 2}}), 428, "version-required")
    for other in '"2"', 'W/"1"', "", '"1-ended"':
        problem(client.patch(url, json={"data": {"x": 2}}, headers={"If-Match": other}), 412, "version-conflict")
    assert client.get(url).json["data"] == {"x": 1}
    assert client.patch(url, json={"data": {"x": 3}}, headers={"If-Match": "*"}).json["data"] == {"x": 3}
    assert client.patch(url, json={"data": {"x": 4}}, headers={"If-Match": '"7", "2"'}).json["data"] == {"x": 4}


def _patch(url: str, number: int, path: str, barrier: Any, results: Any) -> None:
    app = Flask("tested")
    app.config.update(SECRET_KEY="x", PERSIST_SESSION_STORE=url, PERSIST_SESSION_CLEANUP_INTERVAL=0)
    PersistSession(app)
    client = serve(app)
    barrier.wait()
    response = client.patch(path, json={"data": {"by": number}}, headers={"If-Match": '"1"'})
    results.put((number, response.status_code))


def test_of_several_processes_one_changes_a_version(shared_url: str, make_app: MakeApp) -> None:
    """Of those who change one version at the same moment one succeeds, and the others are told."""
    app = make_app(shared_url)
    client = serve(app)
    path = create(client).headers["Location"]
    barrier, results = PROCESSES.Barrier(3), PROCESSES.Queue()
    workers = [PROCESSES.Process(target=_patch, args=(shared_url, number, path, barrier, results)) for number in range(3)]
    for worker in workers:
        worker.start()
    outcomes = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert sorted(outcomes.values()) == [200, 412, 412]
    winner = next(number for number, status in outcomes.items() if status == 200)
    assert client.get(path).json["data"] == {"by": winner}


def test_deleted_with_all_that_it_has(store_url: str, make_app: MakeApp) -> None:
    """DELETE removes data and history; who may know of the session reads that it was deleted."""
    app = make_app(store_url)
    client = serve(app)
    url = create(client, user_id="7", data={"x": 1}).headers["Location"]
    client.post(f"{url}/history", json={"entries": [{"role": "user", "content": "hi"}]})
    session_id = url.rpartition("/")[2]
    assert client.delete(url).status_code == 204
    for answer in client.get(url), client.get(f"{url}/history"), client.delete(url):
        problem(answer, 410, "session-deleted")
    assert chats(app).history(session_id).count() == 0


def test_deleting_honours_if_match(client: FlaskClient) -> None:
    """With If-Match just that version is deleted."""
    url = create(client).headers["Location"]
    problem(client.delete(url, headers={"If-Match": '"2"'}), 412, "version-conflict")
    problem(client.delete(url, headers={"If-Match": ""}), 412, "version-conflict")
    assert client.get(url).json["state"] == "active"
    assert client.delete(url, headers={"If-Match": '"1"'}).status_code == 204


def test_ended_it_can_be_read_and_not_changed(client: FlaskClient) -> None:
    """Ending keeps data and history for those who read, and refuses every change."""
    url = create(client, data={"x": 1}).headers["Location"]
    client.post(f"{url}/history", json={"entries": [{"role": "user", "content": "hi"}]})
    ended = client.post(f"{url}/end", json={})
    assert (ended.json["state"], ended.json["end_reason"], ended.headers["ETag"]) == ("ended", "ended", '"2-ended"')
    assert client.get(url).json["data"] == {"x": 1}
    assert client.get(f"{url}/history").json["count"] == 1
    for answer in (
        client.patch(url, json={}, headers={"If-Match": "*"}),
        client.post(f"{url}/end", json={}),
        client.post(f"{url}/history", json={"entries": [{"role": "user", "content": "late"}]}),
    ):
        problem(answer, 409, "session-ended")


def test_what_has_ended_is_deleted_with_all_that_it_has(store_url: str, make_app: MakeApp) -> None:
    """Ending keeps data and history for a while; whoever asks for it to be erased need not wait."""
    app = make_app(store_url)
    client = serve(app)
    url = create(client, data={"x": 1}).headers["Location"]
    client.post(f"{url}/history", json={"entries": [{"role": "user", "content": "hi"}]})
    etag = client.post(f"{url}/end", json={}).headers["ETag"]
    problem(client.delete(url, headers={"If-Match": '"1"'}), 412, "version-conflict")
    assert client.delete(url, headers={"If-Match": etag}).status_code == 204
    problem(client.get(url), 410, "session-deleted")
    assert chats(app).history(url.rpartition("/")[2]).count() == 0


def test_values_that_are_no_json_are_shown_in_words(app: Flask, client: FlaskClient) -> None:
    """Times, sets, bytes and the like have a form in JSON, and a change of another key leaves them as they are."""
    day = datetime(2024, 5, 1, 12, tzinfo=timezone.utc)
    data = {
        "at": day,
        "day": day.date(),
        "for": timedelta(minutes=1),
        "price": Decimal("1.10"),
        "set": {3, 1, 2},
        "pair": (1, 2),
        "raw": b"\x00\xff",
        "map": {1: "one"},
        "huge": float("inf"),
    }
    session = chats(app).create(data)
    response = client.patch(f"/api/sessions/{session.id}", json={"data": {"new": 1}}, headers={"If-Match": "*"})
    assert response.json["data"] == {
        "at": "2024-05-01T12:00:00+00:00",
        "day": "2024-05-01",
        "for": 60.0,
        "price": "1.10",
        "set": [1, 2, 3],
        "pair": [1, 2],
        "raw": base64.b64encode(b"\x00\xff").decode(),
        "map": {"1": "one"},
        "huge": "inf",
        "new": 1,
    }
    assert chats(app).existing(session.id).data == data | {"new": 1}


# Lists ----------------------------------------------------------------------------------------------------------------


def pages(client: FlaskClient, url: str | None) -> Iterator[list[str]]:
    while url:
        response = client.get(url)
        yield [session["id"] for session in response.json["sessions"]]
        assert (response.json["next"] is None) == ("Link" not in response.headers)
        url = response.headers["Link"].partition(">")[0][1:] if "Link" in response.headers else None


@pytest.mark.parametrize("order", ["-accessed_at", "created_at", "id", "-expires_at"])
def test_pages_follow_each_other(store_url: str, make_app: MakeApp, order: str) -> None:
    """Each page links to the next one; together they have each session once, in order."""
    app = make_app(store_url)
    client = serve(app)
    for number in range(7):
        chats(app).create(user_id="7", metadata={"number": number})
    chats(app).create(user_id="8")
    url = f"/api/sessions?user_id=7&limit=3&order_by={order}"
    found = list(pages(client, url))
    assert [len(page) for page in found] == [3, 3, 1]
    expected = [record.id for record in chats(app).find(user_id="7", order_by=order)]
    assert [session_id for page in found for session_id in page] == expected


def test_a_page_is_not_shifted_by_what_comes_meanwhile(client: FlaskClient) -> None:
    """A session that is created while somebody pages repeats or skips none."""
    made = [create(client, user_id="7").json["id"] for _ in range(4)]
    walk = pages(client, "/api/users/7/sessions?order_by=created_at&limit=2")
    assert next(walk) == made[:2]
    client.delete(f"/api/sessions/{made[0]}")
    late = create(client, user_id="7").json["id"]
    assert [session_id for page in walk for session_id in page] == [*made[2:], late]


def test_lists_show_active_sessions_unless_asked(client: FlaskClient) -> None:
    """Without ``state`` a list has the active sessions; ``any`` has all of them."""
    active, ended = (create(client, user_id="7").json["id"] for _ in range(2))
    client.post(f"/api/sessions/{ended}/end", json={})
    shown = {
        state: {session["id"] for session in client.get(f"/api/users/7/sessions{state}").json["sessions"]}
        for state in ("", "?state=ended", "?state=any")
    }
    assert shown == {"": {active}, "?state=ended": {ended}, "?state=any": {active, ended}}


@pytest.mark.parametrize(
    ("query", "titles"),
    [
        ("tags=x", {"a", "b"}),
        ("tags=x&tags=y", {"b"}),
        ("text=TITLE+C", {"c"}),
        ("tenant_id=t", {"c"}),
        ("has_history=true", {"a"}),
        ("has_history=false", {"b", "c"}),
        ("created_after=99999999999", set()),
        ("created_before=99999999999", {"a", "b", "c"}),
    ],
)
def test_lists_are_filtered(app: Flask, client: FlaskClient, query: str, titles: set[str]) -> None:
    """A list has the sessions that meet all conditions."""
    for title, tags, tenant_id in (("a", "x", None), ("b", "xy", None), ("c", "", "t")):
        created = create(client, user_id="7", tenant_id=tenant_id, tags=list(tags), metadata={"title": f"title {title}"})
        if title == "a":
            client.post(f"{created.headers['Location']}/history", json={"entries": [{"role": "user", "content": 1}]})
    found = client.get(f"/api/sessions?{query}").json["sessions"]
    assert {session["metadata"]["title"][-1] for session in found} == titles


def test_named_sessions_are_listed(client: FlaskClient) -> None:
    """``ids`` asks for certain sessions."""
    made = [create(client).json["id"] for _ in range(3)]
    found = client.get("/api/sessions", query_string={"ids": [made[2], made[0], NOBODYS]}).json["sessions"]
    assert {session["id"] for session in found} == {made[0], made[2]}


@pytest.mark.parametrize("cursor", ["x", "", "bnVsbA", "WyJpZCIsMSwyXQ", "W1tdLDEsMl0", "////", "é"])
def test_a_cursor_that_is_none_is_refused(client: FlaskClient, cursor: str) -> None:
    """Only what a page gave is a cursor."""
    document = problem(client.get("/api/sessions", query_string={"cursor": cursor}), 422, "invalid-request")
    assert [error["field"] for error in document["errors"]] == ["cursor"]


def test_a_cursor_belongs_to_an_order(client: FlaskClient) -> None:
    """The cursor of a list in another order is refused, and not taken for a place in this one."""
    for _ in range(2):
        create(client)
    cursor = client.get("/api/sessions?limit=1").json["next"]
    problem(client.get(f"/api/sessions?cursor={cursor}&order_by=created_at"), 422, "invalid-request")


def test_all_sessions_of_a_user_are_revoked_but_one(client: FlaskClient) -> None:
    """Revoking ends what the user has, but the session that is to stay."""
    kept, other = (create(client, user_id="a/b").json["id"] for _ in range(2))
    foreign = create(client, user_id="8").json["id"]
    answer = client.post("/api/users/a%2Fb/sessions/revoke", json={"except_id": kept})
    assert answer.json == {"revoked": 1}
    states = [client.get(f"/api/sessions/{session_id}").json["state"] for session_id in (kept, other, foreign)]
    assert states == ["active", "ended", "active"]


# History --------------------------------------------------------------------------------------------------------------


def say(client: FlaskClient, url: str, *texts: str, **more: Any) -> TestResponse:
    body = {"entries": [{"role": "user", "content": text} for text in texts], **more}
    return client.post(f"{url}/history", json=body)


def seqs(client: FlaskClient, url: str) -> list[int]:
    return [entry["seq"] for entry in client.get(url).json["entries"]]


def test_entries_are_read_back_in_part(store_url: str, make_app: MakeApp) -> None:
    """The last entries, those before or after one, and those with a text, oldest first."""
    client = serve(make_app(store_url))
    url = create(client).headers["Location"]
    assert say(client, url, *(f"number {n}" for n in range(1, 8))).json == {"seq": 7}
    history = f"{url}/history"
    assert seqs(client, f"{history}?limit=3") == [5, 6, 7]
    assert seqs(client, f"{history}?limit=3&before=5") == [2, 3, 4]
    assert seqs(client, f"{history}?limit=3&after=2") == [3, 4, 5]
    assert seqs(client, f"{history}?limit=9&after=2&before=5") == [3, 4]
    assert seqs(client, f"{history}?text=NUMBER 3") == [3]
    assert seqs(client, f"{history}?text=number&before=5&limit=2") == [3, 4]
    assert client.get(history).json["count"] == 7


@pytest.mark.parametrize("start", ["limit=3", "after=0&limit=3", "text=say&limit=3"])
def test_links_lead_through_a_history(client: FlaskClient, start: str) -> None:
    """From each part a link leads on in the direction of reading, until all was read."""
    url = create(client).headers["Location"]
    say(client, url, *(f"say {n}" for n in range(7)))
    following, read = f"{url}/history?{start}", []
    while following:
        response = client.get(following)
        read += [entry["seq"] for entry in response.json["entries"]]
        following = response.headers.get("Link", "").partition(">")[0][1:]
    assert sorted(read) == [1, 2, 3, 4, 5, 6, 7]


def test_who_appends_too_late_is_told_what_was_missed(client: FlaskClient) -> None:
    """With ``expected_seq`` nothing is appended behind entries that one has not seen, and they are in the answer."""
    url = create(client).headers["Location"]
    say(client, url, "one", "two")
    document = problem(say(client, url, "three", expected_seq=1), 409, "history-conflict")
    assert [(entry["seq"], entry["content"]) for entry in document["missed"]] == [(2, "two")]
    assert seqs(client, f"{url}/history") == [1, 2]
    assert say(client, url, "three", expected_seq=2).json == {"seq": 3}


def test_an_append_that_is_sent_twice_is_stored_once(client: FlaskClient) -> None:
    """The same Idempotency-Key has the same answer, and stores nothing again."""
    url = create(client).headers["Location"]
    body = {"entries": [{"role": "user", "content": {"text": "hi"}, "metadata": {"lang": "en"}}], "expected_seq": 0}
    answers = [client.post(f"{url}/history", json=body, headers={"Idempotency-Key": "k1"}) for _ in range(2)]
    assert [(answer.status_code, answer.json) for answer in answers] == [(201, {"seq": 1})] * 2
    [entry] = client.get(f"{url}/history").json["entries"]
    assert (entry["content"], entry["metadata"]) == ({"text": "hi"}, {"lang": "en"})


def test_an_idempotency_key_that_is_none_is_refused(client: FlaskClient) -> None:
    """It is at most 512 visible characters."""
    url = create(client).headers["Location"]
    body = {"entries": [{"role": "user", "content": "hi"}]}
    response = client.post(f"{url}/history", json=body, headers={"Idempotency-Key": "k" * 513})
    document = problem(response, 422, "invalid-request")
    assert [(error["location"], error["field"]) for error in document["errors"]] == [("header", "Idempotency-Key")]


# Operating ------------------------------------------------------------------------------------------------------------


def test_figures_of_the_sessions(client: FlaskClient) -> None:
    """The figures are those of the namespace."""
    create(client, user_id="7", tags=["x"])
    ended = create(client, user_id="7", tenant_id="t")
    client.post(f"{ended.headers['Location']}/end", json={})
    figures = client.get("/api/sessions/stats").json
    assert {key: figures[key] for key in ("total", "active", "ended", "expired", "users", "tenants", "tags")} == {
        "total": 2,
        "active": 1,
        "ended": 1,
        "expired": 0,
        "users": 2,
        "tenants": {"t": 1},
        "tags": {"x": 1},
    }
    assert figures["bytes"] > 0


def test_figures_of_the_store(store_url: str, make_app: MakeApp) -> None:
    """They are those of all namespaces, with the kind of store, its place and its health."""
    app = make_app(store_url)
    client = serve(app)
    create(client)
    app.extensions["persist_session"].manager.create()
    figures = client.get("/api/sessions/storage/stats").json
    assert figures["type"] == store_url.partition(":")[0]
    assert (figures["total"], figures["active"], figures["namespaces"]) == (2, 2, {"web": 1, "chat": 1})
    assert figures["health"]["healthy"] is True


def test_the_place_of_a_store_tells_no_password(make_app: MakeApp, redis_server: Any) -> None:
    """A password in the URL of the store, and its options, are in no answer."""
    url = redis_server.url.replace("redis://", "redis://default:geheim@") + "?prefix=hidden"
    with pytest.MonkeyPatch.context() as patch:
        app = make_app("memory://")
        object.__setattr__(app.extensions["persist_session"].config, "store", url)
        answer = serve(app).get("/api/sessions/storage/stats")
        patch.undo()
    assert answer.json["type"] == "redis"
    assert answer.json["place"].startswith("redis://***@")
    assert "geheim" not in answer.get_data(as_text=True)
    assert "hidden" not in answer.get_data(as_text=True)


def test_a_store_of_the_applications_own_is_named_by_its_class(make_app: MakeApp) -> None:
    """It has no URL, so no place is told."""
    figures = serve(make_app(MemoryStore())).get("/api/sessions/storage/stats").json
    assert (figures["type"], figures["place"]) == ("MemoryStore", None)


def test_cleaned_up_by_hand(app: Flask, client: FlaskClient, clock: Clock) -> None:
    """A dry run counts, a run removes; ``older_than`` reaches active sessions."""
    chats(app).clock = clock
    create(client, lifetime=60)
    create(client)
    clock.advance(3600)
    order = {"older_than": 1800, "dry_run": True}
    expected = {"expired": 1, "ended": 0, "idle": 1, "removed": 2}
    assert client.post("/api/sessions/cleanup", json=order).json == expected | {"dry_run": True}
    assert client.post("/api/sessions/cleanup", json={"older_than": 1800}).json == expected | {"dry_run": False}
    assert chats(app).stats().total == 0


# Problems -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api", "/api/", "/api/nothing", "/api/sessions/", "/api/sessions/a/b", "/api/users"])
def test_unknown_paths_below_the_prefix(client: FlaskClient, path: str) -> None:
    """Every path below the prefix is the API's, and one that it has not is a problem."""
    problem(client.get(path), 404)


def test_other_paths_stay_the_applications(app: Flask, client: FlaskClient) -> None:
    """What is not below the prefix is answered as before."""
    assert client.get("/elsewhere").content_type == "text/html; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "allowed"), [("/api/sessions", "GET, HEAD, OPTIONS, POST"), ("/api/sessions/cleanup", "OPTIONS, POST")]
)
def test_other_methods(client: FlaskClient, path: str, allowed: str) -> None:
    """A method that a path does not take is answered with those that it takes; OPTIONS asks for them."""
    response = client.put(path, json={})
    problem(response, 405)
    assert response.headers["Allow"] == client.options(path).headers["Allow"] == allowed


def test_head_is_get_without_a_body(client: FlaskClient) -> None:
    """HEAD tells the version and the size."""
    url = create(client).headers["Location"]
    got, head = client.get(url), client.head(url)
    assert (head.status_code, head.get_data(), head.headers["ETag"]) == (200, b"", got.headers["ETag"])


@pytest.mark.parametrize("body", ["", "{", '{"data": }', "\xff", "[" * 5000])
def test_a_body_that_is_no_json(client: FlaskClient, body: str) -> None:
    """It is a bad request."""
    response = client.post("/api/sessions", data=body.encode("latin-1"), content_type="application/json")
    problem(response, 400)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"user_id": 7}, ["user_id"]),
        ({"user_id": ""}, ["user_id"]),
        ({"user_id": "a\0b"}, ["user_id"]),
        ({"user_id": "x" * 513}, ["user_id"]),
        ({"data": []}, ["data"]),
        ({"tags": [1]}, ["tags.0"]),
        ({"lifetime": -1}, ["lifetime"]),
        ({"lifetime": "60"}, ["lifetime"]),
        ({"data": {"x": [float("nan")]}, "metadata": {"y": float("inf")}}, ["data", "metadata"]),
        ({"nosuch": 1, "key": 2}, ["key", "nosuch"]),
        ([], [""]),
    ],
)
def test_the_fields_of_a_request_that_is_not_valid_are_named(client: FlaskClient, body: Any, fields: list[str]) -> None:
    """Each field that is wrong is listed, without what was sent."""
    document = problem(client.post("/api/sessions", json=body), 422, "invalid-request")
    assert sorted(error["field"] for error in document["errors"]) == fields


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=1&limit=2", "limit"),
        ("state=x", "state"),
        ("nosuch=1", "nosuch"),
    ],
)
def test_the_parameters_of_a_query_that_is_not_valid_are_named(client: FlaskClient, query: str, field: str) -> None:
    """What is in the query is checked as the body is."""
    document = problem(client.get(f"/api/sessions?{query}"), 422, "invalid-request")
    assert [(error["location"], error["field"]) for error in document["errors"]] == [("query", field)]


def test_what_cannot_be_kept_is_said(make_app: MakeApp) -> None:
    """What has the right form and cannot be stored is refused with the reason, and changes nothing."""
    client = serve(make_app(PERSIST_SESSION_SERIALIZER="json"))
    deep: Any = 1
    for _ in range(110):
        deep = {"x": deep}
    problem(client.post("/api/sessions", json={"data": deep}), 422, "unstorable")
    created = create(client)
    answer = client.patch(created.headers["Location"], json={"metadata": {"lifetime": -1}}, headers={"If-Match": "*"})
    problem(answer, 422, "invalid-request")
    assert client.get(created.headers["Location"]).json == created.json


def test_too_large_a_session(make_app: MakeApp) -> None:
    """What exceeds the limit of the session is a 413."""
    client = serve(make_app(PERSIST_SESSION_MAX_BYTES=1000))
    problem(client.post("/api/sessions", json={"data": {"x": "x" * 2000}}), 413, "too-large")


def test_too_large_a_body(app: Flask) -> None:
    """A body that exceeds the limit of the API is not read."""
    problem(serve(app, max_body=100).post("/api/sessions", json={"data": {"x": "x" * 200}}), 413)


def test_too_many_sessions_of_a_user(app: Flask) -> None:
    """Where the policy is to refuse, it is a conflict."""
    PersistSession().namespace("chat", app=app, max_per_user=1, cap_policy="reject")
    client = serve(app)
    create(client, user_id="7")
    problem(client.post("/api/sessions", json={"user_id": "7"}), 409, "session-limit")


class Failing(MemoryStore):
    """A store that fails as it is told."""

    error: Exception | None = None

    def get(self, session_id: str) -> Any:
        if self.error:
            raise self.error
        return super().get(session_id)

    def namespace(self, name: str) -> SessionStore:
        return self


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (StoreUnavailable("geheim"), 503, "store-unavailable"),
        (StoreError("geheim"), 500, "broken"),
        (UnsupportedByStore("it keeps none"), 501, "unsupported-by-store"),
    ],
)
def test_a_store_that_fails(make_app: MakeApp, error: Exception, status: int, name: str) -> None:
    """It is a problem that tells the client what to do, and nothing of the store's inside."""
    store = Failing()
    client = serve(make_app(store))
    url = create(client).headers["Location"]
    store.error = error
    response = client.get(url)
    document = problem(response, status, name)
    assert "geheim" not in json.dumps(document)
    assert response.headers.get("Retry-After") == ("5" if status == 503 else None)


def test_a_crash_of_the_application_is_a_problem_too(make_app: MakeApp) -> None:
    """What authorize raises by mistake is a 500 of the API's form, which tells nothing of it."""

    def authorize(request: Request, action: str, target: Target) -> bool:
        raise RuntimeError("geheim")

    app = make_app(TESTING=False, PROPAGATE_EXCEPTIONS=False)
    assert "geheim" not in json.dumps(problem(serve(app, authorize).get("/api/sessions"), 500))


def test_a_session_that_cannot_be_read_is_missing(app: Flask, client: FlaskClient) -> None:
    """A corrupt session costs that one, and is told as one that does not exist."""
    session = chats(app).create({"x": 1})
    broken = chats(app).existing(session.id).record
    chats(app).store.save(replace(broken, data=b"\xff\xff", version=2), expected=1)
    problem(client.get(f"/api/sessions/{session.id}"), 404, "no-session")


# The document ---------------------------------------------------------------------------------------------------------


def test_the_document_is_valid(client: FlaskClient) -> None:
    """The description of the API is an OpenAPI 3.1 document."""
    response = client.get("/api/openapi.json")
    validate(response.json)
    assert response.json["openapi"].startswith("3.1")
    assert response.json["servers"] == [{"url": "/api"}]


def test_the_document_has_each_path(app: Flask, client: FlaskClient) -> None:
    """Each path and method that the application routes to the API is described, with its errors."""
    document = client.get("/api/openapi.json").json
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert ("POST", "/sessions/{session_id}/history") in described
    for method, path in described:
        operation = document["paths"][path][method.lower()]
        assert operation["summary"]
        assert {"400", "403", "405", "422"} <= set(operation["responses"])
        response = client.open("/api" + path.replace("{session_id}", NOBODYS).replace("{user_id}", "7"), method=method)
        assert str(response.status_code) in operation["responses"]


def test_two_apis_of_two_namespaces(app: Flask, client: FlaskClient) -> None:
    """An application can register the API for several namespaces, under a prefix and a name each."""
    app.register_blueprint(api_blueprint(anybody, "jobs", name="jobs_api"), url_prefix="/jobs")
    url = create(client).headers["Location"]
    assert client.get(url).status_code == 200
    problem(client.get(url.replace("/api", "/jobs")), 404, "no-session")
    assert client.post("/jobs/sessions", json={}).headers["Location"].startswith("/jobs/sessions/")


def test_the_page_of_the_docs_has_each_path_action_and_problem() -> None:
    """What the API has and what its page says are the same."""
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    paths = {(f"{one.method} {re.sub('<[^>]*>', '<id>', one.path)}", one.action or "") for one in OPERATIONS}
    rows = re.findall(r"^\| `([A-Z]+ /[^`]*)` \| `?([a-z.]*)`? ?\|", page, re.MULTILINE)
    assert set(rows) == paths
    problems = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", page, re.MULTILINE)
    assert set(problems) == {(kind.name, str(kind.status)) for kind in KINDS}
