"""Coming from Flask's own signed cookie: nobody is signed out, and the old cookie opens nothing afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from flask import Flask, session
from flask.sessions import SecureCookieSessionInterface
from flask.testing import FlaskClient

from flask_persist_session import PersistSession, SessionManager, session_discarded
from tests.conftest import ALL_STORES, Clock
from tests.taken_over import SECRET, add_views, cookie_of, with_cookie

MakeApp = Callable[..., Flask]


@pytest.fixture
def former() -> FlaskClient:
    """A client of the application while Flask keeps its sessions, signed in as Ada."""
    client = flask_app().test_client()
    client.get("/login/Ada")
    return client


def flask_app(**settings: object) -> Flask:
    app = Flask("tested")
    app.config.update({"SECRET_KEY": SECRET, "TESTING": True, **settings})
    return add_views(app)


@pytest.fixture
def make_ours(make_app: MakeApp) -> MakeApp:
    """The same application on this extension."""
    return lambda *store, **settings: add_views(make_app(*store, PERSIST_SESSION_UPGRADE_FROM=["flask"], **settings))


def manager_of(app: Flask) -> SessionManager:
    manager: SessionManager = app.extensions["persist_session"].manager
    return manager


def set_clock(app: Flask) -> Clock:
    clock = Clock(time.time())
    manager_of(app).clock = clock
    return clock


@pytest.mark.parametrize("kind", ALL_STORES)
def test_a_user_stays_signed_in(former: FlaskClient, make_ours: MakeApp, new_url: Callable[[str], str], kind: str) -> None:
    """Whoever signed in with Flask's cookie is signed in here, with a new cookie and all data, on every store."""
    for path in "/put/color/blue", "/flash/hello", "/permanent":
        former.get(path)
    app = make_ours(new_url(kind))
    client = with_cookie(app, old := cookie_of(former))
    assert client.get("/me").text == "Ada"
    assert client.get("/data").json == {"data": {"color": "blue"}, "permanent": True}
    assert client.get("/flashes").json == [["news", "hello"]]
    assert cookie_of(client) not in ("", old)
    assert manager_of(app).stats().users == 1


def test_values_keep_their_types(make_app: MakeApp) -> None:
    """What Flask's cookie gives back for a tuple or bytes is what is taken over."""
    data = {"tuple": (1, "a"), "bytes": b"x", "nested": {"a": [None, 1.5]}}
    cookie = SecureCookieSessionInterface().get_signing_serializer(flask_app()).dumps(data)  # type: ignore[union-attr]
    app = make_app(PERSIST_SESSION_UPGRADE_FROM=["flask"])
    app.add_url_rule("/", view_func=lambda: repr(dict(session)))
    assert with_cookie(app, cookie).get("/").text == repr(data)


def test_the_first_request_knows_its_session(former: FlaskClient, make_app: MakeApp) -> None:
    """It is not new and has its user, though no id yet."""
    app = make_app(PERSIST_SESSION_UPGRADE_FROM=["flask"])
    app.add_url_rule("/", view_func=lambda: [session.new, session.user_id, session.id])  # type: ignore[attr-defined]
    assert with_cookie(app, cookie_of(former)).get("/").json == [False, "Ada", None]


def test_a_copy_of_the_cookie_opens_nothing_until_it_has_expired(former: FlaskClient, make_ours: MakeApp) -> None:
    """Neither while its user is signed in, nor after signing out, however the store is cleaned up in between."""
    app, old = make_ours(), cookie_of(former)
    client, clock = with_cookie(app, old), set_clock(app)
    client.get("/me")
    client.get("/clear")
    for _ in range(33):
        assert with_cookie(app, old).get("/me").text == "nobody"
        clock.advance(86400)
        manager_of(app).cleanup()
    assert manager_of(app).stats().total == 0


def test_another_spelling_of_the_signature_opens_nothing_either(former: FlaskClient, make_ours: MakeApp) -> None:
    """The last letter of a signature has bits that do not count: all its spellings are the same cookie."""
    app, old = make_ours(), cookie_of(former)
    assert with_cookie(app, old).get("/me").text == "Ada"
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    assert {with_cookie(app, old[:-1] + letter).get("/me").text for letter in alphabet} == {"nobody"}


def test_signing_out_in_the_first_request_ends_the_cookie(former: FlaskClient, make_ours: MakeApp) -> None:
    """Nothing is stored but that the cookie opens nothing any more."""
    app, old = make_ours(), cookie_of(former)
    client = with_cookie(app, old)
    client.get("/clear")
    assert cookie_of(client) == ""
    assert with_cookie(app, old).get("/me").text == "nobody"


def test_a_cookie_older_than_its_lifetime_is_not_taken_over(former: FlaskClient, make_ours: MakeApp) -> None:
    """``PERMANENT_SESSION_LIFETIME`` counts as it does for Flask."""
    app = make_ours(PERMANENT_SESSION_LIFETIME=timedelta(hours=1))
    clock = set_clock(app)
    clock.advance(3602)
    assert with_cookie(app, cookie_of(former)).get("/me").text == "nobody"


def test_a_cookie_of_another_application_or_tampered_is_not_taken_over(former: FlaskClient, make_ours: MakeApp) -> None:
    """Junk is refused by its signature, before any store is asked."""
    other = flask_app(SECRET_KEY="another secret").test_client()
    other.get("/login/Eve")
    app, old = make_ours(), cookie_of(former)
    for cookie in cookie_of(other), "x" + old, old[:-5], old.replace(".", "", 1), "." * 100, f"{old}.{old}", old * 100:
        client = app.test_client(use_cookies=False)
        assert client.get("/me", headers={"Cookie": f"session={cookie}"}).text == "nobody"
    assert manager_of(app).stats().total == 0


def test_a_cookie_signed_by_a_fallback_key_is_taken_over(former: FlaskClient, make_ours: MakeApp) -> None:
    """As Flask itself would accept it."""
    app = make_ours(SECRET_KEY="a new secret", SECRET_KEY_FALLBACKS=[SECRET])
    assert with_cookie(app, cookie_of(former)).get("/me").text == "Ada"


def test_a_cookie_interface_of_the_application_reads_its_own_cookies(tmp_path: Path) -> None:
    """An application that signs its cookies with another salt has them taken over with that salt."""

    class Salted(SecureCookieSessionInterface):
        salt = "ours"

    app = flask_app(PERSIST_SESSION_STORE="memory://", PERSIST_SESSION_UPGRADE_FROM=["flask"])
    app.session_interface = Salted()
    client = app.test_client()
    client.get("/login/Ada")
    app.config["PERSIST_SESSION_CLEANUP_INTERVAL"] = 0
    app._got_first_request = False
    PersistSession(app)
    assert client.get("/me").text == "Ada"


def test_without_the_setting_nothing_is_taken_over(former: FlaskClient, make_app: MakeApp) -> None:
    """The default takes over nothing."""
    assert with_cookie(add_views(make_app()), cookie_of(former)).get("/me").text == "nobody"


def test_a_value_that_cannot_be_kept_here_is_logged_and_ignored(
    make_ours: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """A cookie larger than ``PERSIST_SESSION_MAX_BYTES`` allows is no 500."""
    client = flask_app().test_client()
    client.get("/put/color/" + "x" * 100)
    app = make_ours(PERSIST_SESSION_MAX_BYTES=50)
    assert with_cookie(app, cookie_of(client)).get("/data").json == {"data": {}, "permanent": False}
    assert "PERSIST_SESSION_MAX_BYTES" in caplog.text


def test_a_full_user_is_refused_and_keeps_the_old_session(former: FlaskClient, make_ours: MakeApp) -> None:
    """A sign-in that the cap refuses is a 409, and nothing of the old session is lost."""
    app = make_ours(PERSIST_SESSION_MAX_PER_USER=1, PERSIST_SESSION_CAP_POLICY="reject")
    other = app.test_client()
    other.get("/login/Ada")
    client = with_cookie(app, cookie_of(former))
    assert client.get("/me").status_code == 409
    other.get("/clear")
    assert client.get("/me").text == "Ada"


def test_a_session_saved_before_its_response_is_taken_over_then(former: FlaskClient, make_ours: MakeApp) -> None:
    """``session.save()`` takes over at once; what is changed afterwards belongs to the new session."""
    app = make_ours()

    @app.get("/stream")
    def stream() -> str:
        session["size"] = "xl"
        session.save()  # type: ignore[attr-defined]
        session["color"] = "blue"
        return str(session.id)  # type: ignore[attr-defined]

    client = with_cookie(app, cookie_of(former))
    assert manager_of(app).get(client.get("/stream").text).user_id == "Ada"  # type: ignore[union-attr]
    assert client.get("/data").json["data"] == {"size": "xl", "color": "blue"}  # type: ignore[index]


def test_signing_in_as_another_in_the_first_request(former: FlaskClient, make_ours: MakeApp) -> None:
    """The session becomes that user's, and the old cookie opens neither."""
    app, old = make_ours(), cookie_of(former)
    client = with_cookie(app, old)
    client.get("/login/Bob")
    assert client.get("/me").text == "Bob"
    assert with_cookie(app, old).get("/me").text == "nobody"
    assert [record.user_id for record in manager_of(app).find(state="active")] == ["Bob"]


def test_a_change_that_is_dropped_is_told(former: FlaskClient, make_ours: MakeApp) -> None:
    """``session_discarded`` is sent for the change of a request that comes during the grace, and for no other."""
    app, old = make_ours(), cookie_of(former)
    with_cookie(app, old).get("/me")
    told: list[str | None] = []
    with session_discarded.connected_to(lambda sender, event: told.append(event.reason), sender=app):
        with_cookie(app, old).get("/me")
        with_cookie(app, old).get("/put/color/red")
    assert told == ["regenerated"]


def test_neither_the_store_nor_the_log_holds_the_cookie(
    former: FlaskClient, make_ours: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """What stands for the old cookie is a hash from which nobody gets back to it."""
    app, old = make_ours(), cookie_of(former)
    with_cookie(app, old).get("/me")
    kept = repr(list(manager_of(app).store.scan())) + caplog.text
    assert not [part for part in old.split(".") if part and part in kept]
