"""What OWASP ASVS 5.0, chapter V7, asks for, seen from outside: each test shows one requirement of docs/security.md."""

from __future__ import annotations

import random
import re
import threading
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, abort, session
from flask.testing import FlaskClient
from flask_login import LoginManager, UserMixin, login_user, logout_user
from werkzeug.serving import make_server

from flask_persist_session import SessionManager, SessionQuery
from tests.conftest import Clock
from tests.web import Browser

MakeApp = Callable[..., Flask]
ROOT = Path(__file__).parent.parent
MINUTE = 60.0

#: The requirements of the chapter in release 5.0.0, with the level from which each is asked for.
REQUIREMENTS = {
    number: level
    for level, numbers in {
        1: "7.2.1 7.2.2 7.2.3 7.2.4 7.4.1 7.4.2",
        2: "7.1.1 7.1.2 7.1.3 7.3.1 7.3.2 7.4.3 7.4.4 7.4.5 7.5.1 7.5.2 7.6.1 7.6.2",
        3: "7.5.3",
    }.items()
    for number in numbers.split()
}


def add_views(app: Flask) -> None:
    """Pages for everybody, signing in and out."""

    @app.get("/untouched")
    def untouched() -> str:
        return ""

    @app.route("/who", methods=["GET", "POST"])
    def who() -> dict[str, Any]:
        return {name: getattr(session, name) for name in ("id", "user_id", "end_reason")} | {"keys": sorted(session)}

    @app.get("/put/<key>/<value>")
    def put(key: str, value: str) -> str:
        session[key] = value
        return ""

    @app.get("/sign-in/<name>")
    def sign_in(name: str) -> str:
        session["user_id"] = name
        return ""

    @app.get("/authenticate-again/<how>")
    def authenticate_again(how: str) -> str:
        if how == "bind":
            session.bind(session.user_id)  # type: ignore[attr-defined]
        else:
            session.regenerate()  # type: ignore[attr-defined]
        return ""

    @app.get("/sign-out")
    def sign_out() -> str:
        session.clear()
        return ""


def add_pages_of_users(app: Flask) -> None:
    """What an application offers to those who have signed in."""
    manager = manager_of(app)

    @app.get("/change-password")
    def change_password() -> str:
        session.regenerate()  # type: ignore[attr-defined]
        return str(manager.revoke_user(session.user_id, except_id=session.id))  # type: ignore[attr-defined]

    @app.get("/transfer")
    def transfer() -> str:
        if manager.clock() - session.created_at > 5 * MINUTE:  # type: ignore[attr-defined]
            abort(403)
        return "done"

    @app.get("/sessions")
    def own_sessions() -> list[str]:
        own = manager.find(user_id=session.user_id, state="active")  # type: ignore[attr-defined]
        return sorted(record.id for record in own)

    @app.get("/sessions/<session_id>/end")
    def end(session_id: str) -> str:
        if session_id not in own_sessions():
            abort(404)
        return str(manager.revoke(session_id))


@pytest.fixture
def app(make_app: MakeApp, store_url: str, clock: Clock) -> Flask:
    app = make_app(
        store_url,
        PERSIST_SESSION_USER_KEY="user_id",
        PERSIST_SESSION_IDLE_TIMEOUT="30m",
        PERSIST_SESSION_ABSOLUTE_TIMEOUT="12h",
    )
    manager_of(app).clock = clock
    add_views(app)
    add_pages_of_users(app)
    return app


def manager_of(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def signed_in(app: Flask, name: str) -> FlaskClient:
    client = app.test_client()
    client.get(f"/sign-in/{name}")
    return client


def cookie_of(client: FlaskClient) -> str:
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


def token_of(client: FlaskClient) -> str:
    return cookie_of(client).split(".")[0]


def user_of(client: FlaskClient) -> str | None:
    user: str | None = client.get("/who").get_json()["user_id"]
    return user


def id_of(client: FlaskClient) -> str:
    return str(client.get("/who").get_json()["id"])


def thief(app: Flask, cookie: str) -> FlaskClient:
    """Somebody else with a copy of a cookie."""
    client = app.test_client()
    client.set_cookie("session", cookie)
    return client


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_a_token_is_taken_from_the_cookie_alone(app: Flask) -> None:
    """A good token in the URL, a form or another header opens nothing."""
    client = signed_in(app, "Ada")
    cookie = cookie_of(client)
    assert user_of(thief(app, cookie)) == "Ada"
    stranger = app.test_client()
    ways: list[dict[str, Any]] = [
        {"query_string": {"session": cookie}},
        {"method": "POST", "data": {"session": cookie}},
        {"headers": {"Authorization": f"Bearer {cookie}"}},
        {"headers": {"X-Session": cookie, "Session": cookie}},
    ]
    assert [stranger.open("/who", **way).get_json()["user_id"] for way in ways] == [None] * 4


def test_each_session_has_a_token_of_its_own(app: Flask) -> None:
    """The same user signing in at the same moment gets another token each time, in other browsers and in the same one."""
    tokens = {token_of(signed_in(app, "Ada")) for _ in range(10)}
    client = app.test_client()
    for _ in range(10):
        client.get("/sign-in/Ada")
        tokens.add(token_of(client))
        client.get("/sign-out")
    assert len(tokens) == 20


def test_every_bit_of_a_token_is_random(make_app: MakeApp) -> None:
    """Of 32 bytes no bit is the same in 200 tokens of one user."""
    app = make_app(PERSIST_SESSION_USER_KEY="user_id")
    add_views(app)
    numbers = []
    for _ in range(200):
        secret = urlsafe_b64decode(token_of(signed_in(app, "Ada"))[3:] + "=")
        assert len(secret) == 32
        numbers.append(int.from_bytes(secret, "big"))
    # A bit is the same in all of them once in 2 to the 199.
    assert [bit for bit in range(256) if len({number >> bit & 1 for number in numbers}) == 1] == []


def test_no_token_comes_from_a_generator_that_can_be_seeded(make_app: MakeApp) -> None:
    """Whoever knows the state of ``random`` does not know the next token."""
    app = make_app(PERSIST_SESSION_USER_KEY="user_id")
    add_views(app)
    state = random.getstate()
    try:
        tokens = []
        for _ in range(2):
            random.seed(7)
            tokens.append(token_of(signed_in(app, "Ada")))
    finally:
        random.setstate(state)
    assert tokens[0] != tokens[1]


def test_signing_in_gives_a_new_token_and_ends_the_old_one(app: Flask) -> None:
    """What somebody planted before opens nothing after sign-in, and the store holds one session with the data."""
    client = app.test_client()
    client.get("/put/cart/apple")
    planted, visitor = cookie_of(client), id_of(client)
    client.get("/sign-in/Ada")
    assert client.get("/who").get_json()["keys"] == ["cart", "user_id"]
    assert thief(app, planted).get("/who").get_json()["keys"] == []
    closed = manager_of(app).load(visitor)
    assert closed is not None
    assert (closed.end_reason, closed.data) == ("regenerated", {})
    assert [record.user_id for record in manager_of(app).find(state="active")] == ["Ada"]


@pytest.mark.parametrize("how", ["bind", "regenerate"])
def test_authenticating_again_gives_a_new_token(app: Flask, how: str) -> None:
    """A copy of the cookie from before opens nothing once its user has given the password again."""
    client = signed_in(app, "Ada")
    before = cookie_of(client)
    client.get(f"/authenticate-again/{how}")
    assert user_of(client) == "Ada"
    assert user_of(thief(app, before)) is None


# Timeouts -------------------------------------------------------------------------------------------------------------


def test_a_user_who_is_idle_is_signed_out_by_the_server(app: Flask, clock: Clock) -> None:
    """After the idle timeout and one interval a browser that keeps its cookie is nobody's, and the reason is there."""
    client = signed_in(app, "Ada")
    clock.advance(30 * MINUTE)
    assert user_of(client) == "Ada"
    cookie = cookie_of(client)
    clock.advance(31 * MINUTE)
    answer = thief(app, cookie).get("/who").get_json()
    assert (answer["user_id"], answer["keys"], answer["end_reason"]) == (None, [], "expired")


def test_a_user_who_is_busy_is_signed_out_at_the_absolute_timeout(app: Flask, clock: Clock) -> None:
    """Twelve hours after sign-in the session is over, however many requests and new tokens there were."""
    client = signed_in(app, "Ada")
    for _ in range(35):
        clock.advance(20 * MINUTE)
        client.get("/authenticate-again/regenerate")
        assert user_of(client) == "Ada"
    clock.advance(20 * MINUTE)
    assert user_of(client) is None


def test_authenticating_again_starts_the_absolute_timeout_anew(app: Flask, clock: Clock) -> None:
    """``bind`` says that the user has proved again who it is."""
    client = signed_in(app, "Ada")
    for _ in range(33):
        clock.advance(20 * MINUTE)
        user_of(client)
    client.get("/authenticate-again/bind")
    for _ in range(35):
        clock.advance(20 * MINUTE)
        assert user_of(client) == "Ada"
    clock.advance(20 * MINUTE)
    assert user_of(client) is None


# Ending ---------------------------------------------------------------------------------------------------------------


def test_signing_out_ends_the_session_on_the_server(app: Flask) -> None:
    """A copy of the cookie opens nothing after sign-out, and of the session nothing is left but that it ended."""
    client = signed_in(app, "Ada")
    cookie, session_id = cookie_of(client), id_of(client)
    client.get("/sign-out")
    assert thief(app, cookie).get("/who").get_json() == {"id": None, "user_id": None, "end_reason": "logout", "keys": []}
    left = manager_of(app).store.get(session_id)
    assert left is not None
    assert (left.data, left.metadata, left.tags) == (b"", {}, frozenset())


@pytest.fixture
def port(app: Flask) -> Iterator[int]:
    """Where the application answers over HTTP."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.port
    server.shutdown()
    thread.join()
    server.server_close()


def test_signing_out_over_http(port: int) -> None:
    """The browser forgets the cookie, and sending it again opens nothing."""
    browser = Browser(port)
    browser.get("/sign-in/Ada")
    cookies = dict(browser.cookies)
    assert browser.get("/who").json()["user_id"] == "Ada"
    browser.get("/sign-out")
    assert browser.cookies == {}
    copy = Browser(port, cookies)
    assert copy.get("/who").json()["user_id"] is None
    browser.close()
    copy.close()


class Member(UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


def test_signing_out_of_flask_login_leaves_nothing(make_app: MakeApp) -> None:
    """``session.clear()`` and then ``logout_user()`` end the session and take the *remember me* cookie away."""
    app = make_app()
    add_views(app)
    LoginManager(app).user_loader(Member)

    @app.get("/login")
    def login() -> str:
        login_user(Member("Ada"), remember=True)
        session["address"] = "private"
        return ""

    @app.get("/logout")
    def logout() -> str:
        session.clear()
        logout_user()
        return ""

    client = app.test_client()
    client.get("/login")
    assert user_of(client) == "Ada"
    assert client.get_cookie("remember_token") is not None
    cookie = cookie_of(client)
    client.get("/logout")
    assert [client.get_cookie(name) for name in ("session", "remember_token")] == [None, None]
    assert thief(app, cookie).get("/who").get_json()["keys"] == []
    assert [record.data for record in manager_of(app).store.scan()] == [b""]


def test_closing_an_account_ends_all_its_sessions(app: Flask) -> None:
    """``revoke_user`` ends each session of a user at once and leaves those of others."""
    clients = [signed_in(app, name) for name in ("Ada", "Ada", "Ada", "Bob")]
    assert manager_of(app).revoke_user("Ada") == 3
    assert [user_of(client) for client in clients] == [None, None, None, "Bob"]


def test_changing_the_password_ends_the_other_sessions(app: Flask) -> None:
    """Only the browser in which it was changed stays signed in, under a new token."""
    here, there, elsewhere = (signed_in(app, "Ada") for _ in range(3))
    before = cookie_of(here)
    assert here.get("/change-password").text == "2"
    assert [user_of(client) for client in (here, there, elsewhere)] == ["Ada", None, None]
    assert user_of(thief(app, before)) is None


def test_an_administrator_ends_the_sessions_of_all_users(app: Flask) -> None:
    """Revoking whatever ``find`` lists leaves nobody signed in; each browser can say why."""
    clients = [signed_in(app, name) for name in ("Ada", "Bob", "Eve")]
    manager = manager_of(app)
    assert [manager.revoke(record.id) for record in list(manager.find(state="active"))] == [True] * 3
    answers = [client.get("/who").get_json() for client in clients]
    assert [(answer["user_id"], answer["end_reason"]) for answer in answers] == [(None, "revoked")] * 3


# What users see and prove ---------------------------------------------------------------------------------------------


def test_a_user_sees_the_own_sessions_and_ends_one(app: Flask) -> None:
    """The list has the sessions of this user alone, and any of them can be ended from any other."""
    here, there, bob = (signed_in(app, name) for name in ("Ada", "Ada", "Bob"))
    assert here.get("/sessions").get_json() == sorted([id_of(here), id_of(there)])
    assert here.get(f"/sessions/{id_of(bob)}/end").status_code == 404
    assert here.get(f"/sessions/{id_of(there)}/end").text == "True"
    assert [user_of(client) for client in (here, there, bob)] == ["Ada", None, "Bob"]


def test_created_at_tells_when_the_user_authenticated(app: Flask, clock: Clock) -> None:
    """Neither requests nor a new token alone make a sign-in younger; authenticating again does."""
    client = app.test_client()
    client.get("/put/cart/apple")
    clock.advance(10 * MINUTE)
    client.get("/sign-in/Ada")
    assert client.get("/transfer").status_code == 200
    for _ in range(2):
        clock.advance(3 * MINUTE)
        client.get("/authenticate-again/regenerate")
    assert client.get("/transfer").status_code == 403
    client.get("/authenticate-again/bind")
    assert client.get("/transfer").status_code == 200


def test_a_visit_creates_no_session(app: Flask) -> None:
    """Requests that put nothing into the session leave neither a cookie nor a record."""
    client = app.test_client()
    assert [client.get(path).headers.getlist("Set-Cookie") for path in ("/untouched", "/who", "/sessions")] == [[]] * 3
    assert manager_of(app).store.count(SessionQuery()) == 0


# The table ------------------------------------------------------------------------------------------------------------


def rows() -> dict[str, tuple[str, str]]:
    """Level and text of each row of the table in docs/security.md, by requirement."""
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (7\.\d\.\d), level (\d) \|(.*)\|$", text, re.MULTILINE)
    assert len(found) == len({number for number, _, _ in found})
    return {number: (level, rest) for number, level, rest in found}


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", text)


def test_the_table_has_every_requirement() -> None:
    """Each requirement of the chapter is in the table, with its level, and no other."""
    assert {number: int(level) for number, (level, _) in rows().items()} == REQUIREMENTS


@pytest.mark.parametrize("number", REQUIREMENTS)
def test_a_row_says_who_meets_it(number: str) -> None:
    """Each row names the tests that show it, or else says what the application has to do."""
    text = rows()[number][1]
    assert named_tests(text) or "The application:" in text


def test_the_tests_of_the_table_exist() -> None:
    """Each test that docs/security.md names is there under this name."""
    named = named_tests((ROOT / "docs/security.md").read_text(encoding="utf-8"))
    assert len(named) >= len(REQUIREMENTS) / 2
    missing = [(path, name) for path, name in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")]
    assert missing == []
