"""What Flask's own sessions do, ours do: cookies, headers, keys, factories, flashing, testing, streaming."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import flask
import pytest
from flask import Flask, Response, flash, get_flashed_messages, session, stream_with_context
from flask.testing import FlaskClient
from werkzeug.http import parse_cookie, parse_date

from flask_persist_session import ConfigError, PersistSession, Session
from tests.conftest import Clock

MakeApp = Callable[..., Flask]


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    app = make_app()
    add_views(app)
    return app


def add_views(app: Flask) -> None:
    @app.get("/untouched")
    def untouched() -> str:
        return "untouched"

    @app.get("/get/<key>")
    def get(key: str) -> str:
        return repr(session.get(key))

    @app.get("/set/<key>/<value>")
    def set_(key: str, value: str) -> str:
        session[key] = value
        return "set"

    @app.get("/permanent/<int:value>")
    def permanent(value: int) -> str:
        session["key"] = "value"
        session.permanent = bool(value)
        return "set"

    @app.get("/clear")
    def clear() -> str:
        session.clear()
        return "cleared"


def cookie_of(response: Any) -> str | None:
    """The session cookie that a response sets, as it is in the header."""
    found = [header for header in response.headers.getlist("Set-Cookie") if re.match(r"[\w-]*session=", header)]
    assert len(found) <= 1
    return found[0] if found else None


def expires_of(response: Any) -> datetime | None:
    match = re.search(r"expires=([^;]+)", cookie_of(response) or "", re.IGNORECASE)
    return parse_date(match[1]) if match else None


def set_clock(app: Flask, clock: Clock) -> None:
    app.extensions["persist_session"].manager.clock = clock


# Values and attributes ------------------------------------------------------------------------------------------------


def test_a_value_is_there_in_the_next_request(app: Flask) -> None:
    """What one request puts into the session, the next one reads."""
    client = app.test_client()
    client.get("/set/name/Ada")
    assert client.get("/get/name").text == "'Ada'"


def test_the_session_is_a_session(app: Flask) -> None:
    """``flask.session`` is our mapping and Flask's mixin."""
    with app.test_request_context():
        assert isinstance(flask.session._get_current_object(), Session)  # type: ignore[attr-defined]
        assert isinstance(flask.session, flask.sessions.SessionMixin)


def test_the_mapping_has_all_methods(app: Flask) -> None:
    """Everything that works on a dict works on the session."""
    with app.test_request_context():
        session.update(a=1, b=2)
        session.setdefault("c", 3)
        assert session.pop("a") == 1
        assert session.pop("none", None) is None
        del session["b"]
        assert dict(session) == {"c": 3}
        assert session.copy() == {"c": 3}  # type: ignore[attr-defined]
        assert ("c" in session, len(session), list(session.items()), session == {"c": 3}) == (True, 1, [("c", 3)], True)
        with pytest.raises(KeyError, match="none"):
            session["none"]
        assert session.popitem() == ("c", 3)
        assert not session


def test_new_tells_whether_the_request_came_with_a_session(app: Flask) -> None:
    """``session.new`` is true until a session is stored."""

    @app.get("/new")
    def new() -> str:
        return str(session.new)

    client = app.test_client()
    assert client.get("/new").text == "True"
    client.get("/set/a/1")
    assert client.get("/new").text == "False"


def test_modified_follows_the_keys(app: Flask) -> None:
    """``session.modified`` turns true when a key is set or removed."""
    with app.test_request_context():
        assert not session.modified
        session["a"] = 1
        assert session.modified


def test_modified_set_to_false_keeps_the_changes_out(app: Flask) -> None:
    """An application that takes its changes back with ``modified = False`` stores none of them."""

    @app.get("/taken-back")
    def taken_back() -> str:
        session["a"] = 2
        session.modified = False
        return ""

    client = app.test_client()
    client.get("/set/a/1")
    client.get("/taken-back")
    assert client.get("/get/a").text == "'1'"


def test_modified_set_to_true_renews(app: Flask, clock: Clock) -> None:
    """``modified = True`` on an unchanged session saves it and sends the cookie again, as Flask does."""

    @app.get("/forced")
    def forced() -> str:
        session.modified = True
        return ""

    set_clock(app, clock)
    client = app.test_client()
    client.get("/set/a/1")
    clock.advance(5)
    assert cookie_of(client.get("/forced")) is not None


def test_a_change_in_a_nested_value_is_noticed(app: Flask) -> None:
    """``session["cart"].append(x)`` is stored without ``modified = True``."""

    @app.get("/append/<item>")
    def append(item: str) -> str:
        session.setdefault("cart", []).append(item)
        return ""

    client = app.test_client()
    client.get("/append/apple")
    client.get("/append/pear")
    assert client.get("/get/cart").text == "['apple', 'pear']"


def test_a_value_changed_after_a_save_in_the_same_request_is_noticed(app: Flask) -> None:
    """A list that was put in, saved, and changed through the application's own name for it is stored as it is last."""

    @app.get("/twice")
    def twice() -> str:
        items = ["one"]
        session["items"] = items
        session.save()  # type: ignore[attr-defined]
        items.append("two")
        return ""

    client = app.test_client()
    client.get("/twice")
    assert client.get("/get/items").text == "['one', 'two']"


def test_the_representation_shows_neither_values_nor_token(app: Flask) -> None:
    """``repr(session)`` can be logged."""

    @app.get("/repr")
    def representation() -> str:
        return repr(session._get_current_object())  # type: ignore[attr-defined]

    client = app.test_client()
    client.get("/set/password/hunter2")
    token = parse_cookie(cookie_of(client.get("/set/a/1")) or f"session={client.get_cookie('session').value}")["session"]  # type: ignore[union-attr]
    client.get("/get/a")
    text = client.get("/repr").text
    assert "password" not in text or "hunter2" not in text
    assert token.split(".")[0] not in text


# The cookie -----------------------------------------------------------------------------------------------------------


def test_every_cookie_setting_is_used_on_setting_and_deleting(make_app: MakeApp) -> None:
    """Name, domain, path, Secure, HttpOnly, SameSite and Partitioned are on both headers."""
    app = make_app(
        SESSION_COOKIE_NAME="my-session",
        SESSION_COOKIE_DOMAIN=".example.com",
        SESSION_COOKIE_PATH="/app",
        SESSION_COOKIE_SECURE=True,
        SESSION_COOKIE_HTTPONLY=False,
        SESSION_COOKIE_SAMESITE="Strict",
        SESSION_COOKIE_PARTITIONED=True,
    )
    add_views(app)
    client = app.test_client()
    base = "https://www.example.com/app"
    set_header = cookie_of(client.get("/set/a/1", base_url=base)) or ""
    delete_header = cookie_of(client.get("/clear", base_url=base)) or ""
    assert set_header.startswith("my-session=")
    assert delete_header.startswith("my-session=;")
    for header in (set_header, delete_header):
        attributes = {part.strip().lower() for part in header.split(";")[1:]}
        assert {"domain=example.com", "path=/app", "secure", "samesite=strict", "partitioned"} <= attributes
        assert "httponly" not in attributes


def test_the_path_falls_back_to_the_application_root(make_app: MakeApp) -> None:
    """Without ``SESSION_COOKIE_PATH`` the cookie is for ``APPLICATION_ROOT``."""
    app = make_app(APPLICATION_ROOT="/root")
    add_views(app)
    header = cookie_of(app.test_client().get("/set/a/1", base_url="http://localhost/root"))
    assert "Path=/root" in (header or "")


def test_no_secret_key_is_flasks_null_session(make_app: MakeApp) -> None:
    """Without a secret key the session reads as empty and refuses changes with Flask's message."""
    app = make_app(SECRET_KEY=None)
    add_views(app)
    assert app.test_client().get("/get/a").text == "None"
    with pytest.raises(RuntimeError, match="no secret key was set"):
        app.test_client().get("/set/a/1")


def test_a_retired_key_still_opens_sessions(app: Flask) -> None:
    """After the key is rotated, cookies of ``SECRET_KEY_FALLBACKS`` open their sessions, others do not."""
    client = app.test_client()
    client.get("/set/a/1")
    app.config.update(SECRET_KEY="new", SECRET_KEY_FALLBACKS=["a secret for tests"])
    assert client.get("/get/a").text == "'1'"
    app.config.update(SECRET_KEY_FALLBACKS=None)
    assert client.get("/get/a").text == "None"


def test_a_session_that_is_emptied_deletes_its_cookie(app: Flask) -> None:
    """Removing everything ends the session: the cookie is deleted and opens nothing."""
    client = app.test_client()
    client.get("/set/a/1")
    value = client.get_cookie("session").value  # type: ignore[union-attr]
    response = client.get("/clear")
    assert "Max-Age=0" in (cookie_of(response) or "")
    client.set_cookie("session", value)
    assert client.get("/get/a").text == "None"


def test_clearing_and_refilling_gives_a_new_token(app: Flask) -> None:
    """A sign-in that clears the session and fills it again leaves the old cookie without effect."""

    @app.get("/sign-in")
    def sign_in() -> str:
        session.clear()
        session["user"] = "Ada"
        return ""

    client = app.test_client()
    client.get("/set/a/1")
    old = client.get_cookie("session").value  # type: ignore[union-attr]
    client.get("/sign-in")
    assert client.get("/get/user").text == "'Ada'"
    assert client.get("/get/a").text == "None"
    client.set_cookie("session", old)
    assert client.get("/get/user").text == "None"
    assert client.get("/get/a").text == "None"


def test_a_permanent_session_has_an_expiry(app: Flask) -> None:
    """A permanent cookie expires with its session, another one with the browser."""
    app.permanent_session_lifetime = timedelta(days=3)
    expires = expires_of(app.test_client().get("/permanent/1"))
    assert expires is not None
    assert timedelta(0) <= expires - datetime.now(timezone.utc) - timedelta(days=3) < timedelta(seconds=61)
    assert expires_of(app.test_client().get("/permanent/0")) is None


def test_permanent_is_kept(app: Flask) -> None:
    """``session.permanent`` stays as it was set, in the data as Flask keeps it."""
    client = app.test_client()
    client.get("/permanent/1")
    assert client.get("/get/_permanent").text == "True"


def test_a_session_expires_after_its_lifetime(app: Flask, clock: Clock) -> None:
    """After the lifetime and one interval without a request the session is empty and says that it expired."""

    @app.get("/reason")
    def reason() -> str:
        return repr(session.end_reason)  # type: ignore[attr-defined]

    set_clock(app, clock)
    app.permanent_session_lifetime = timedelta(hours=1)
    client = app.test_client()
    client.get("/permanent/1")
    clock.advance(3600 + 60)
    assert client.get("/get/key").text == "None"
    assert client.get("/reason").text == "'expired'"


def test_a_session_in_use_does_not_expire(app: Flask, clock: Clock) -> None:
    """Requests renew the session, so it lives a whole lifetime after the last of them, even one that does not use it."""
    set_clock(app, clock)
    app.permanent_session_lifetime = timedelta(hours=1)
    client = app.test_client()
    client.get("/set/a/1")
    for path in ("/get/a", "/untouched", "/untouched", "/get/a"):
        clock.advance(3599)
        client.get(path)
    clock.advance(59)
    client.get("/untouched")  # within the interval, does not renew
    clock.advance(3599)
    assert client.get("/get/a").text == "'1'"


# Renewal and SESSION_REFRESH_EACH_REQUEST -----------------------------------------------------------------------------


def test_the_cookie_is_sent_again_once_an_interval(app: Flask, clock: Clock) -> None:
    """Within the interval no cookie is sent, after it once, with a new expiry."""
    set_clock(app, clock)
    client = app.test_client()
    first = expires_of(client.get("/permanent/1"))
    clock.advance(59)
    assert cookie_of(client.get("/untouched")) is None
    clock.advance(1)
    renewed = client.get("/untouched")
    assert (expires_of(renewed), renewed.vary.to_header()) > (first, "")
    assert cookie_of(client.get("/untouched")) is None


@pytest.mark.parametrize(("refresh", "permanent", "sent"), [(1, 1, True), (1, 0, False), (0, 1, False), (0, 0, False)])
def test_without_an_interval_the_cookie_is_sent_as_flask_sends_it(
    make_app: MakeApp, refresh: int, permanent: int, sent: bool
) -> None:
    """With interval 0 an unchanged cookie is sent for permanent sessions if ``SESSION_REFRESH_EACH_REQUEST`` is on."""
    app = make_app(PERSIST_SESSION_RENEW_INTERVAL=0, SESSION_REFRESH_EACH_REQUEST=bool(refresh))
    add_views(app)
    client = app.test_client()
    assert cookie_of(client.get(f"/permanent/{permanent}")) is not None
    for path in ("/untouched", "/get/key"):
        assert (cookie_of(client.get(path)) is not None) is sent
    assert cookie_of(client.get("/set/other/1")) is not None


def test_without_refresh_only_changes_renew(make_app: MakeApp, clock: Clock) -> None:
    """With ``SESSION_REFRESH_EACH_REQUEST`` off, a session that is only read expires a lifetime after its last change."""
    app = make_app(SESSION_REFRESH_EACH_REQUEST=False, PERMANENT_SESSION_LIFETIME=3600)
    add_views(app)
    set_clock(app, clock)
    client = app.test_client()
    client.get("/set/a/1")
    clock.advance(3000)
    assert client.get("/get/a").text == "'1'"
    clock.advance(660)
    assert client.get("/get/a").text == "None"


def test_the_absolute_timeout_never_moves(make_app: MakeApp, clock: Clock) -> None:
    """However busy it is, a session ends at its absolute timeout; regenerating does not prolong it."""
    app = make_app(PERSIST_SESSION_ABSOLUTE_TIMEOUT="2h", PERSIST_SESSION_IDLE_TIMEOUT="1h")
    add_views(app)
    set_clock(app, clock)

    @app.get("/regenerate")
    def regenerate() -> str:
        session.regenerate()  # type: ignore[attr-defined]
        return ""

    client = app.test_client()
    client.get("/set/a/1")
    for _ in range(7):
        clock.advance(1000)
        client.get("/regenerate")
        assert client.get("/get/a").text == "'1'"
    clock.advance(200)
    assert client.get("/get/a").text == "None"


# Headers --------------------------------------------------------------------------------------------------------------


def test_vary_is_where_flask_sets_it(make_app: MakeApp) -> None:
    """``Vary: Cookie`` comes with each access and each cookie, and not otherwise: response by response as Flask's."""
    ours, theirs = make_app(), Flask("theirs")
    theirs.secret_key = "a secret for tests"
    for app in (ours, theirs):
        add_views(app)

        @app.get("/template")
        def template() -> str:
            return flask.render_template_string("no session here")

        @app.get("/template-with-session")
        def template_with_session() -> str:
            return flask.render_template_string("{{ session.get('a') }}")

    ours_client, theirs_client = ours.test_client(), theirs.test_client()
    for path in ("untouched", "get/a", "set/a/1", "untouched", "template", "template-with-session", "clear", "untouched"):
        ours_vary = ours_client.get(f"/{path}").headers.get("Vary")
        assert (path, ours_vary) == (path, theirs_client.get(f"/{path}").headers.get("Vary"))


def test_no_store_is_added_where_the_application_says_nothing(make_app: MakeApp) -> None:
    """With ``PERSIST_SESSION_NO_STORE`` responses that used the session are not kept by caches, unless they say how."""
    app = make_app(PERSIST_SESSION_NO_STORE=True)
    add_views(app)

    @app.get("/public")
    def public() -> Response:
        response = flask.make_response(str(session.get("a")))
        response.headers["Cache-Control"] = "private"
        return response

    client = app.test_client()
    assert client.get("/get/a").headers["Cache-Control"] == "no-store"
    assert client.get("/public").headers["Cache-Control"] == "private"
    assert "Cache-Control" not in client.get("/untouched").headers


# What applications do with sessions -----------------------------------------------------------------------------------


def test_flashing(app: Flask) -> None:
    """Flashed messages are read once, in the next request, and the session without anything else ends."""

    @app.get("/flash")
    def flash_two() -> str:
        flash("one")
        flash("two", "error")
        return ""

    @app.get("/flashed")
    def flashed() -> str:
        return repr(get_flashed_messages(with_categories=True))

    client = app.test_client()
    client.get("/flash")
    assert client.get("/flashed").text == "[('message', 'one'), ('error', 'two')]"
    assert client.get("/flashed").text == "[]"


def test_session_transaction(app: Flask) -> None:
    """The test client's ``session_transaction`` reads, changes and creates sessions."""
    client = app.test_client()
    with client.session_transaction() as opened:
        opened["a"] = [1]
    with client.session_transaction() as opened:
        opened["a"].append(2)
    assert client.get("/get/a").text == "[1, 2]"
    with client.session_transaction() as opened:
        opened.clear()
    assert client.get_cookie("session") is None


def test_stream_with_context_reads_the_session(app: Flask) -> None:
    """A body that streams after the view has returned reads the session, and stores changes with ``save``."""

    @app.get("/stream")
    def stream() -> Response:
        def body() -> Iterator[str]:
            yield session["name"]
            session["streamed"] = "yes"
            session.save()  # type: ignore[attr-defined]

        return Response(stream_with_context(body()))

    client = app.test_client()
    client.get("/set/name/Ada")
    assert client.get("/stream").text == "Ada"
    assert client.get("/get/streamed").text == "'yes'"


def test_what_a_failing_view_changed_is_stored(make_app: MakeApp) -> None:
    """As with Flask's cookie, the response of an error handler carries the session as the view left it."""
    app = make_app(PROPAGATE_EXCEPTIONS=False)
    add_views(app)

    @app.get("/fail")
    def fail() -> str:
        session["a"] = "1"
        raise ZeroDivisionError

    client = app.test_client()
    assert client.get("/fail").status_code == 500
    assert client.get("/get/a").text == "'1'"


# Extension ------------------------------------------------------------------------------------------------------------


def test_one_extension_serves_several_applications() -> None:
    """A module-level extension and an application factory: sessions of two applications are apart."""
    sessions = PersistSession()
    apps = [Flask("tested") for _ in range(2)]
    for number, app in enumerate(apps):
        app.config.update(SECRET_KEY=f"key {number}", PERSIST_SESSION_STORE="memory://")
        sessions.init_app(app)
        add_views(app)
    client, other = (app.test_client() for app in apps)
    client.get("/set/a/1")
    other.set_cookie("session", client.get_cookie("session").value)  # type: ignore[union-attr]
    assert other.get("/get/a").text == "None"
    with apps[0].app_context():
        assert sessions.manager.stats().total == 1
    with apps[1].app_context():
        assert sessions.manager.stats().total == 0


def test_two_applications_share_sessions_through_one_store_and_key(make_app: MakeApp) -> None:
    """Two processes of one application, or two applications on purpose, see the same session."""
    store = make_app().extensions["persist_session"].store
    apps = [make_app(store) for _ in range(2)]
    for app in apps:
        add_views(app)
    client, other = (app.test_client() for app in apps)
    client.get("/set/a/1")
    other.set_cookie("session", client.get_cookie("session").value)  # type: ignore[union-attr]
    assert other.get("/get/a").text == "'1'"


def test_the_same_application_twice_is_an_error(app: Flask) -> None:
    """Setting up an application a second time says so instead of replacing its store."""
    with pytest.raises(ConfigError, match="already set up for the application 'tested'"):
        PersistSession(app)


def test_an_application_without_the_extension_is_named() -> None:
    """Asking for the manager of an application that was not set up says what was forgotten."""
    with Flask("forgetful").app_context(), pytest.raises(ConfigError, match=r"'forgetful'.*init_app"):
        PersistSession().manager  # noqa: B018


def test_switched_off_it_leaves_flasks_own_session(make_app: MakeApp) -> None:
    """With ``PERSIST_SESSION_ENABLED = False`` the data is in Flask's cookie again."""
    app = make_app(PERSIST_SESSION_ENABLED=False)
    add_views(app)
    client: FlaskClient = app.test_client()
    client.get("/set/a/1")
    assert isinstance(app.session_interface, flask.sessions.SecureCookieSessionInterface)
    assert client.get("/get/a").text == "'1'"
