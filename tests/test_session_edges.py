"""``flask.session`` at its edges: last keys, old tokens, failing stores, renewals that are due at odd moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, render_template_string, session

from flask_persist_session import (
    ConfigError,
    SerializationError,
    Session,
    SessionManager,
    SessionStore,
    StoreUnavailable,
    open_store,
)
from tests.conftest import Clock
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]


class FailingStore(CountingStore):
    """A store that can be switched off."""

    down = False

    def get(self, session_id: str) -> Any:
        found = super().get(session_id)
        if self.down:
            raise StoreUnavailable("switched off")
        return found


@pytest.fixture
def store() -> FailingStore:
    return FailingStore(open_store("memory://"))


@pytest.fixture
def app(make_app: MakeApp, store: SessionStore, clock: Clock) -> Flask:
    app = make_app(store, PROPAGATE_EXCEPTIONS=False)
    manager_of(app).clock = clock

    @app.get("/set/<key>")
    def put(key: str) -> str:
        session[key] = 1
        return "set"

    @app.get("/regenerate")
    def regenerate() -> str:
        session.regenerate()  # type: ignore[attr-defined]
        return "regenerated"

    @app.get("/keys")
    def keys() -> str:
        return ",".join(sorted(session))

    @app.get("/untouched")
    def untouched() -> str:
        return "untouched"

    return app


def manager_of(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def token_of(client: Any) -> str:
    return str(client.get_cookie("session").value)


def test_an_old_token_starts_a_new_session_after_its_30_seconds(app: Flask, clock: Clock) -> None:
    """A browser that missed its new token stores nothing for 30 seconds, and begins anew after them."""
    client = app.test_client()
    client.get("/set/a")
    old = token_of(client)
    client.get("/regenerate")
    client.set_cookie("session", old)
    clock.advance(29)
    assert client.get("/set/b").headers.getlist("Set-Cookie") == []
    assert client.get("/keys").text == ""
    clock.advance(1)
    client.get("/set/b")
    assert client.get("/keys").text == "b"


def test_removing_the_last_key_keeps_what_others_added(app: Flask) -> None:
    """A request that removes the last key it knows does not take along a key that another added meanwhile."""
    client = app.test_client()
    client.get("/set/flash")
    token = token_of(client)
    with client.session_transaction() as slow:
        slow.pop("flash")
        other = app.test_client()
        other.set_cookie("session", token)
        other.get("/set/cart")
    client.set_cookie("session", token)
    assert client.get("/keys").text == "cart"


def test_clearing_ends_the_session_whatever_others_add(app: Flask) -> None:
    """Signing out with ``clear`` is final, also when another request changed the session meanwhile."""
    client = app.test_client()
    client.get("/set/user")
    token = token_of(client)
    with client.session_transaction() as leaving:
        leaving.clear()
        other = app.test_client()
        other.set_cookie("session", token)
        other.get("/set/cart")
    client.set_cookie("session", token)
    assert client.get("/keys").text == ""
    assert [(record.end_reason, record.data) for record in manager_of(app).store.scan()] == [("logout", b"")]


def test_clearing_after_a_regeneration_leaves_the_old_token_closed(app: Flask) -> None:
    """A sign-out under a token that was replaced meanwhile neither opens it again nor deletes the new cookie."""
    client = app.test_client()
    client.get("/set/user")
    slow = app.test_client()
    slow.set_cookie("session", token_of(client))
    with slow.session_transaction() as leaving:
        leaving.clear()
        client.get("/regenerate")
    assert slow.get_cookie("session") is not None
    assert slow.get("/set/again").headers.getlist("Set-Cookie") == []
    assert client.get("/keys").text == "user"


def test_regenerating_an_empty_session_keeps_it(app: Flask, clock: Clock) -> None:
    """A stored session without data gets its new token like any other."""
    created = manager_of(app).create({}, user_id="Ada")
    with app.test_request_context():
        opened = Session(manager_of(app), lambda: created.token)
        opened.regenerate()
        task, token = opened.finish("no")
    assert (task, token != created.token, opened.user_id) == ("set", True, "Ada")


def test_modified_set_to_false_does_not_cancel_a_regeneration(app: Flask) -> None:
    """A ``regenerate()`` asked for after ``modified = False`` happens."""

    @app.get("/both")
    def both() -> str:
        session.modified = False
        session.regenerate()  # type: ignore[attr-defined]
        return ""

    client = app.test_client()
    client.get("/set/a")
    old = token_of(client)
    client.get("/both")
    assert token_of(client) != old


def test_save_works_after_a_failed_save(app: Flask) -> None:
    """An application that mends what ``save()`` refused and saves again has its session stored."""

    @app.get("/mend")
    def mend() -> str:
        session["bad"] = object()
        try:
            session.save()  # type: ignore[attr-defined]
        except SerializationError:
            session["bad"] = "mended"
        return ""

    client = app.test_client()
    assert client.get("/mend").status_code == 200
    assert client.get("/keys").text == "bad"


def test_untouched_requests_go_on_while_the_store_is_down(app: Flask, store: FailingStore, clock: Clock) -> None:
    """A renewal that cannot be made is no error, and the next requests do not wait for the store again."""
    client = app.test_client()
    client.get("/set/a")
    clock.advance(61)
    store.down = True
    before = store.operations["get"]
    assert [client.get("/untouched").status_code for _ in range(3)] == [200, 200, 200]
    assert store.operations["get"] == before + 1


def test_a_renewal_is_made_up_for(app: Flask, store: FailingStore, clock: Clock) -> None:
    """Once the store is back, the next request after the pause renews."""
    client = app.test_client()
    client.get("/set/a")
    clock.advance(61)
    store.down = True
    client.get("/untouched")
    store.down = False
    clock.advance(5)
    assert client.get("/untouched").headers.getlist("Set-Cookie") != []


def test_a_dead_cookie_is_looked_up_once(app: Flask, store: FailingStore, clock: Clock) -> None:
    """Requests that do not touch the session cost nothing with the cookie of a session that has expired."""
    client = app.test_client()
    client.get("/set/a")
    clock.advance(32 * 86400)
    client.get("/untouched")
    before = sum(store.operations.values())
    client.get("/untouched")
    assert sum(store.operations.values()) == before


def test_a_request_asks_a_failing_store_once(app: Flask, store: FailingStore, clock: Clock) -> None:
    """Neither the page of the error nor a renewal that is due makes it wait a second time."""

    @app.errorhandler(503)
    def page(error: Exception) -> tuple[str, int]:
        return render_template_string("Hello {{ session.get('user', 'stranger') }}, come back later"), 503

    client = app.test_client()
    client.get("/set/user")
    clock.advance(61)
    store.down = True
    before = store.operations["get"]
    response = client.get("/keys")
    assert (response.status_code, response.text) == (503, "Hello stranger, come back later")
    assert store.operations["get"] == before + 1


def test_a_change_to_a_session_that_could_not_be_loaded_is_no_success(app: Flask, store: FailingStore) -> None:
    """An application that swallows the error and changes the session all the same answers 503, not a success."""

    @app.get("/swallow")
    def swallow() -> str:
        try:
            session["a"]
        except StoreUnavailable:
            session["a"] = 2
        return "stored?"

    client = app.test_client()
    client.get("/set/a")
    store.down = True
    assert client.get("/swallow").status_code == 503


def test_a_nested_change_renews_without_refresh(make_app: MakeApp, clock: Clock) -> None:
    """With ``SESSION_REFRESH_EACH_REQUEST`` off, a nested change counts as a change and sends the cookie again."""
    app = make_app(SESSION_REFRESH_EACH_REQUEST=False)
    manager_of(app).clock = clock

    @app.get("/add")
    def add() -> str:
        session["list"].append(1)
        return ""

    client = app.test_client()
    with client.session_transaction() as opened:
        opened["list"] = []
    clock.advance(61)
    assert client.get("/add").headers.getlist("Set-Cookie") != []


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0?ssl_ca_certs=/x",
        "redis://127.0.0.1:1/notanumber",
        "postgresql://u@h:notaport/x",
        "memory://sessions.db",
        "sqlite:///sessions.db?timeout=1&timeout=2",
        "postgres://u@h/x",
    ],
)
def test_a_store_url_that_cannot_work_is_refused(url: str) -> None:
    """What would fail at the first request is told when the store is opened."""
    with pytest.raises(ConfigError):
        open_store(url)


def test_the_reason_of_regenerating_is_its_own(app: Flask) -> None:
    """An application cannot end a session as "regenerated", which would keep its browser from starting another."""
    with pytest.raises(ValueError, match="choose another"):
        manager_of(app).end("0" * 67, "regenerated")
