"""Devices: what the metadata has of them, and the page on which users sign them out."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cachelib import SimpleCache
from flask import Flask, redirect, session, url_for
from flask_login import LoginManager, UserMixin, login_user, logout_user
from flask_wtf import CSRFProtect
from werkzeug.middleware.proxy_fix import ProxyFix

import flask_persist_session
from flask_persist_session import ConfigError, SessionManager, SessionRecord, open_store
from flask_persist_session.web.devices import devices_blueprint
from tests.conftest import Clock
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]
FIREFOX = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:130.0) Gecko/20100101 Firefox/130.0"
CHROME = "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/129.0.0.0 Mobile Safari/537.36"
SAFARI = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) "
    "Version/17.5 Mobile/15E148 Safari/604.1"
)
MAC = (
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Safari/605.1.15"
)
PAGE = "/account/devices"


def manager_of(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def records(app: Flask, state: Any = "active", **conditions: Any) -> list[SessionRecord]:
    return list(manager_of(app).find(state=state, **conditions))


def add_views(app: Flask) -> None:
    @app.get("/untouched")
    def untouched() -> str:
        return ""

    @app.get("/set/<key>/<value>")
    def put(key: str, value: str) -> str:
        session[key] = value
        return ""

    @app.get("/sign-in/<user>")
    @app.get("/sign-in/<user>/<tenant>")
    def sign_in(user: str, tenant: str | None = None) -> str:
        session.bind(user, tenant)  # type: ignore[attr-defined]
        return ""

    @app.get("/sign-out")
    def sign_out() -> str:
        session.unbind()  # type: ignore[attr-defined]
        return ""

    @app.get("/restart/<user>")
    def restart(user: str) -> str:
        session.clear()
        session["_user_id"] = user
        return ""

    @app.get("/anew")
    def anew() -> str:
        session.clear()
        session["a"] = 1
        return ""

    @app.get("/regenerate")
    def regenerate() -> str:
        session.regenerate()  # type: ignore[attr-defined]
        return ""

    @app.get("/user")
    def user() -> str:
        return str(session.user_id)  # type: ignore[attr-defined]


# What the metadata has ------------------------------------------------------------------------------------------------


@pytest.fixture
def counting(store_url: str) -> CountingStore:
    return CountingStore(open_store(store_url))


@pytest.fixture
def tracked(make_app: MakeApp, counting: CountingStore, clock: Clock) -> Flask:
    """An application that tracks devices, on every store."""
    app = make_app(counting, PERSIST_SESSION_TRACK_DEVICES=True)
    manager_of(app).clock = clock
    add_views(app)
    return app


def device(ip: str, user_agent: str | None) -> dict[str, str | None]:
    return {"ip": ip, "user_agent": user_agent}


def coming_from(ip: str, user_agent: str) -> Any:
    return {"environ_overrides": {"REMOTE_ADDR": ip}, "headers": {"User-Agent": user_agent}}


HOME, AWAY = coming_from("192.0.2.1", FIREFOX), coming_from("2001:db8::7", CHROME)
AT_HOME, AT_AWAY = device("192.0.2.1", FIREFOX), device("2001:db8::7", CHROME)


def metadata(app: Flask) -> Mapping[str, Any]:
    [record] = records(app)
    return record.metadata


def test_a_visitor_is_noted_without_a_sign_in(tracked: Flask) -> None:
    """The session of nobody has where it was last seen from, and no sign-in."""
    tracked.test_client().get("/set/a/1", **HOME)
    assert metadata(tracked) == {"last_seen": AT_HOME}


@pytest.mark.parametrize("path", ["/sign-in/Ada", "/restart/Ada", "/set/_user_id/Ada"])
@pytest.mark.parametrize("visitor", [True, False])
def test_a_sign_in_is_noted(tracked: Flask, path: str, visitor: bool) -> None:
    """However a user signs in, and whether or not there was a session before, the device is that of the sign-in."""
    client = tracked.test_client()
    if visitor:
        client.get("/set/a/1", **HOME)
    client.get(path, **AWAY)
    assert metadata(tracked) == {"sign_in": AT_AWAY, "last_seen": AT_AWAY}


def test_a_renewal_notes_where_it_comes_from(tracked: Flask, clock: Clock) -> None:
    """The device of the sign-in stays, that of the last renewal follows; within an interval nothing is noted."""
    client = tracked.test_client()
    client.get("/sign-in/Ada", **HOME)
    client.get("/set/a/1", **AWAY)
    assert metadata(tracked) == {"sign_in": AT_HOME, "last_seen": AT_HOME}
    clock.advance(60)
    client.get("/untouched", **AWAY)
    assert metadata(tracked) == {"sign_in": AT_HOME, "last_seen": AT_AWAY}
    clock.advance(60)
    client.get("/set/a/2", **HOME)
    assert metadata(tracked) == {"sign_in": AT_HOME, "last_seen": AT_HOME}


def test_a_regenerated_session_keeps_its_sign_in(tracked: Flask) -> None:
    """A new token is no sign-in, but the device is seen."""
    client = tracked.test_client()
    client.get("/sign-in/Ada", **HOME)
    client.get("/regenerate", **AWAY)
    assert metadata(tracked) == {"sign_in": AT_HOME, "last_seen": AT_AWAY}


def test_signing_out_forgets_the_sign_in(tracked: Flask) -> None:
    """A session that goes on as nobody's does not tell from where its user had signed in."""
    client = tracked.test_client()
    client.get("/set/a/1")
    client.get("/sign-in/Ada", **HOME)
    client.get("/sign-out", **AWAY)
    assert metadata(tracked) == {"sign_in": None, "last_seen": AT_AWAY}


def test_starting_anew_forgets_everything(tracked: Flask) -> None:
    """A session that was cleared and filled again by a visitor has nothing of the device before."""
    client = tracked.test_client()
    client.get("/sign-in/Ada", **HOME)
    client.get("/anew", **AWAY)
    assert [record.metadata for record in records(tracked)] == [{"last_seen": AT_AWAY}]


def test_tracking_costs_no_operation(tracked: Flask, counting: CountingStore, clock: Clock) -> None:
    """Every kind of request costs what it costs without tracking, an untouched one nothing."""
    client = tracked.test_client()
    costs: dict[str, dict[str, int]] = {}
    for path in ("/set/a/1", "/untouched", "/set/a/2", "/sign-in/Ada", "/regenerate", "/user"):
        counting.operations.clear()
        client.get(path, **HOME)
        costs[path] = dict(counting.operations)
    clock.advance(60)
    counting.operations.clear()
    client.get("/untouched", **AWAY)
    assert counting.operations == {"get": 1, "save": 1}
    assert costs == {
        "/set/a/1": {"save": 1},
        "/untouched": {},
        "/set/a/2": {"get": 1, "save": 1},
        "/sign-in/Ada": {"get": 1, "save": 2},
        "/regenerate": {"get": 1, "save": 2},
        "/user": {"get": 1},
    }


def test_without_the_setting_nothing_is_noted(make_app: MakeApp) -> None:
    """IP address and user agent are personal data: they are stored only on demand."""
    app = make_app()
    add_views(app)
    app.test_client().get("/sign-in/Ada", **HOME)
    assert metadata(app) == {}


def test_without_a_request_nothing_is_noted(tracked: Flask) -> None:
    """What a command or a worker creates has no device."""
    with tracked.app_context():
        manager_of(tracked).create({"a": 1}, user_id="Ada")
    assert metadata(tracked) == {}


def test_the_address_is_the_one_that_the_application_trusts(make_app: MakeApp) -> None:
    """Behind a proxy the address is that of ``ProxyFix``, and a header that nobody vouches for counts nothing."""
    forwarded = {"headers": {"X-Forwarded-For": "203.0.113.9"}}
    app = make_app(PERSIST_SESSION_TRACK_DEVICES=True)
    add_views(app)
    app.test_client().get("/sign-in/Eve", **forwarded)
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1)  # type: ignore[method-assign]
    app.test_client().get("/sign-in/Ada", **forwarded)
    addresses = {record.user_id: record.metadata["sign_in"]["ip"] for record in records(app)}  # type: ignore[index, call-overload]
    assert addresses == {"Eve": "127.0.0.1", "Ada": "203.0.113.9"}


def test_what_a_client_says_of_itself_is_cut_and_harmless(tracked: Flask) -> None:
    """Of a user agent 400 characters are kept, a space for each control character; an address is no longer than 64."""
    client = tracked.test_client()
    client.get(
        "/sign-in/Ada", environ_overrides={"REMOTE_ADDR": "1" * 99, "HTTP_USER_AGENT": "a\x1b[2J\0\x85é" + "b" * 9999}
    )
    kept = metadata(tracked)["sign_in"]
    assert kept == {"ip": "1" * 64, "user_agent": "a [2J  é" + "b" * 392}


def test_a_client_that_says_nothing_is_noted_as_unknown(tracked: Flask) -> None:
    """Without an address, as behind a Unix socket, and without a user agent both are ``None``."""
    tracked.test_client().get("/sign-in/Ada", environ_overrides={"REMOTE_ADDR": "", "HTTP_USER_AGENT": ""})
    assert metadata(tracked)["sign_in"] == {"ip": None, "user_agent": None}


def test_sessions_are_found_by_their_device(tracked: Flask) -> None:
    """An address is looked up with ``find(text=…)``."""
    tracked.test_client().get("/sign-in/Ada", **HOME)
    tracked.test_client().get("/sign-in/Bob", **AWAY)
    assert [record.user_id for record in records(tracked, text="2001:db8::7")] == ["Bob"]


def test_the_setting_is_checked(make_app: MakeApp) -> None:
    """Something that is neither on nor off is refused by name."""
    with pytest.raises(ConfigError, match="PERSIST_SESSION_TRACK_DEVICES is 'yes'"):
        make_app(PERSIST_SESSION_TRACK_DEVICES="yes")


# The page -------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page has: its text, the forms with their fields, the names of its buttons, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.forms: list[tuple[str, dict[str, str]]] = []
        self.buttons: list[str] = []
        self._words: list[str] = []
        self._button: list[str] | None = None
        self.feed(html)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "form":
            assert attributes["method"] == "post"
            self.forms.append((str(attributes["action"]), {}))
        if tag == "input":
            self.forms[-1][1][str(attributes["name"])] = str(attributes["value"])
        if tag == "button":
            self._button = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "button" and self._button is not None:
            self.buttons.append("".join(self._button))
            self._button = None

    def handle_data(self, data: str) -> None:
        self._words.append(data)
        if self._button is not None:
            self._button.append(data)


@pytest.fixture
def app(make_app: MakeApp, store_url: str, clock: Clock) -> Flask:
    """An application with the page, on every store."""
    app = make_app(store_url, PERSIST_SESSION_TRACK_DEVICES=True)
    manager_of(app).clock = clock
    add_views(app)
    app.register_blueprint(devices_blueprint(), url_prefix=PAGE)
    return app


@pytest.fixture
def simple(make_app: MakeApp, clock: Clock) -> Flask:
    """The same with sessions in memory, for what no store has a part in."""
    app = make_app(PERSIST_SESSION_TRACK_DEVICES=True)
    manager_of(app).clock = clock
    add_views(app)
    app.register_blueprint(devices_blueprint(), url_prefix=PAGE)
    return app


def signed_in(app: Flask, path: str = "/sign-in/Ada", user_agent: str = FIREFOX, ip: str = "192.0.2.1") -> Any:
    """A browser whose user has signed in."""
    client = app.test_client()
    client.environ_base.update(REMOTE_ADDR=ip, HTTP_USER_AGENT=user_agent)
    assert client.get(path).status_code == 200
    return client


def page(client: Any) -> Page:
    response = client.get(PAGE)
    assert response.status_code == 200
    return Page(response.text)


def user(client: Any) -> str:
    return str(client.get("/user").text)


def session_id(client: Any) -> str:
    """The id of the session that the page marks as this one."""
    [(_, fields), *_] = page(client).forms
    return fields["session_id"]


def test_the_page_shows_where_the_user_is_signed_in(app: Flask, clock: Clock) -> None:
    """Each active session of the user is there, this one first, then the others by their last request."""
    signed_in(app, user_agent=SAFARI, ip="192.0.2.3")
    clock.advance(7200)
    signed_in(app, user_agent=CHROME, ip="2001:db8::7")
    here = signed_in(app)
    signed_in(app, "/sign-in/Bob", MAC, "198.51.100.1")
    shown = page(here)
    assert [action for action, _ in shown.forms] == [f"{PAGE}/sign-out"] * 3 + [f"{PAGE}/sign-out-others"]
    assert re.findall(r"(\w+ on \w+)(?: This device)? Last seen ([\w ]+) IP address ([\w.:]+)", shown.text) == [
        ("Firefox on Windows", "now", "192.0.2.1"),
        ("Chrome on Android", "in the last minute", "2001:db8::7"),
        ("Safari on iPhone", "2 hours ago", "192.0.2.3"),
    ]
    assert shown.text.count("Firefox on Windows This device") == 1
    assert "Bob" not in shown.text
    assert "macOS" not in shown.text


def test_the_page_shows_the_time_of_the_sign_in_and_where_it_was_if_elsewhere(app: Flask, clock: Clock) -> None:
    """A session that was signed in from another place with another browser says so."""
    client = signed_in(app)
    clock.advance(3600)
    client.environ_base.update(REMOTE_ADDR="2001:db8::7", HTTP_USER_AGENT=CHROME)
    client.get("/untouched")
    assert "Signed in 2023-11-14 22:13 UTC from 192.0.2.1 with Firefox on Windows" in page(client).text


@pytest.mark.parametrize(
    ("user_agent", "words"),
    [
        (FIREFOX, "Firefox on Windows"),
        (CHROME, "Chrome on Android"),
        (SAFARI, "Safari on iPhone"),
        (MAC, "Safari on macOS"),
        (SAFARI.replace("Version/17.5", "CriOS/129.0.6668.46"), "Chrome on iPhone"),
        (FIREFOX.replace("Windows NT 10.0; Win64; x64", "X11; Linux x86_64"), "Firefox on Linux"),
        ("curl/8.5.0", "curl"),
        ("Something/1.0 (X11; Linux x86_64)", "Unknown browser on Linux"),
        ("nothing known", "Unknown browser"),
        ("", "Unknown browser"),
        ("<script>alert(1)</script>", "Unknown browser"),
    ],
)
def test_browser_and_system_are_words(simple: Flask, user_agent: str, words: str) -> None:
    """A device has the names that its user knows; what is not known is said to be so."""
    assert f"change your password. {words} This device" in page(signed_in(simple, user_agent=user_agent)).text


@pytest.mark.parametrize(
    ("interval", "passed", "words"),
    [
        (60, 0, "in the last minute"),
        (0, 59, "in the last minute"),
        (0, 60, "1 minute ago"),
        (300, 60, "in the last 5 minutes"),
        (300, 300, "5 minutes ago"),
        (7200, 60, "in the last 2 hours"),
        (60, 3600, "1 hour ago"),
        (60, 3 * 86400, "3 days ago"),
        (60, -30, "in the last minute"),
    ],
)
def test_last_seen_is_as_exact_as_renewals(make_app: MakeApp, clock: Clock, interval: int, passed: int, words: str) -> None:
    """Requests within the renew interval are not all noted, so the page claims to know no better."""
    app = make_app(PERSIST_SESSION_RENEW_INTERVAL=interval)
    manager_of(app).clock = clock
    add_views(app)
    app.register_blueprint(devices_blueprint(), url_prefix=PAGE)
    signed_in(app)
    clock.advance(passed)
    assert f"Last seen {words} Signed in" in page(signed_in(app)).text


def test_sessions_from_before_tracking_are_listed(make_app: MakeApp) -> None:
    """Without the setting, devices have no names and no addresses, but can be signed out."""
    app = make_app()
    add_views(app)
    app.register_blueprint(devices_blueprint(), url_prefix=PAGE)
    signed_in(app)
    shown = page(signed_in(app))
    assert shown.text.count("Unknown browser Last seen") + shown.text.count("Unknown browser This device") == 2
    assert "IP address" not in shown.text


def test_metadata_of_the_application_does_not_break_the_page(simple: Flask) -> None:
    """What stands under our keys without being ours is taken for unknown."""
    manager_of(simple).create({}, user_id="Ada", metadata={"sign_in": "yes", "last_seen": {"user_agent": 7, "ip": None}})
    assert "Unknown browser Last seen" in page(signed_in(simple)).text


def test_signing_out_one_device(app: Flask) -> None:
    """The chosen session ends with the reason ``revoked``, the others stay, and the browser is sent back to the page."""
    here, there, other = signed_in(app), signed_in(app, user_agent=CHROME), signed_in(app, user_agent=SAFARI)
    [form] = [fields for _, fields in page(here).forms if fields.get("session_id") == session_id(there)]
    response = here.post(f"{PAGE}/sign-out", data=form)
    assert (response.status_code, response.location) == (303, f"{PAGE}?done=1")
    assert [user(client) for client in (here, there, other)] == ["Ada", "None", "Ada"]
    assert "revoked" in [record.end_reason for record in records(app, "ended")]
    assert "Chrome" not in page(here).text
    assert here.post(f"{PAGE}/sign-out", data=form).status_code == 303  # sent twice


def test_signing_out_all_others(app: Flask) -> None:
    """All other sessions of the user end, and nobody else's; then there is nothing left to sign out but this one."""
    here, there, bob = signed_in(app), signed_in(app), signed_in(app, "/sign-in/Bob")
    signed_in(app)
    action, form = page(here).forms[-1]
    assert here.post(action, data=form).status_code == 303
    assert [user(client) for client in (here, there, bob)] == ["Ada", "None", "Bob"]
    assert [action for action, _ in page(here).forms] == [f"{PAGE}/sign-out"]
    assert 'role="status"' in here.get(f"{PAGE}?done=1").text


def test_signing_out_this_device(app: Flask) -> None:
    """The session is deleted with its cookie, and the browser sent to the root of the application."""
    here, there = signed_in(app), signed_in(app)
    old = here.get_cookie("session").value
    action, form = page(here).forms[0]
    response = here.post(action, data=form, base_url="http://localhost/mounted")
    assert (response.status_code, response.location) == (303, "/mounted/")
    assert here.get_cookie("session") is None
    here.set_cookie("session", old)
    assert (user(here), user(there)) == ("None", "Ada")


# Whose sessions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/sign-in/Bob", "/sign-in/Ada/acme", "/set/a/1"])
@pytest.mark.parametrize("mine", ["/sign-in/Ada", "/sign-in/Ada/umbrella"])
def test_nobody_ends_or_sees_a_session_of_another(app: Flask, mine: str, path: str) -> None:
    """Another user's, the same user's of another tenant and nobody's are not shown; a form for them is a 404."""
    here, foreign = signed_in(app, mine), signed_in(app, path, SAFARI)
    [other] = [record for record in records(app) if record.metadata["last_seen"]["user_agent"] == SAFARI]  # type: ignore[index, call-overload]
    shown = page(here)
    assert len(shown.forms) == 1
    response = here.post(f"{PAGE}/sign-out", data={**shown.forms[0][1], "session_id": other.id})
    assert response.status_code == 404
    here.post(f"{PAGE}/sign-out-others", data=shown.forms[0][1])
    assert manager_of(app).store.get(other.id) == other
    assert user(foreign) == str(other.user_id)


@pytest.mark.parametrize("wanted", ["", "x", "0" * 67, "é", "../../etc", "a" * 9999])
def test_a_session_that_is_none_is_a_404(simple: Flask, wanted: str) -> None:
    """An id that names nothing is refused, whatever it is."""
    here = signed_in(simple)
    form = page(here).forms[0][1]
    assert here.post(f"{PAGE}/sign-out", data={**form, "session_id": wanted}).status_code == 404


def test_no_token_is_on_the_page(app: Flask) -> None:
    """Neither this session's token nor its signed form is in the page, only public ids."""
    here = signed_in(app)
    signed = here.get_cookie("session").value
    html = here.get(PAGE).text
    assert signed.split(".")[0] not in html
    assert signed.rsplit(".")[-1] not in html


@pytest.mark.parametrize("visitor", [False, True])
def test_visitors_are_refused(app: Flask, visitor: bool) -> None:
    """Who is not signed in gets a 403 from the page and from its forms, and no session for asking."""
    client = app.test_client()
    if visitor:
        client.get("/set/a/1")
    before = records(app)
    answers = [client.get(PAGE), client.post(f"{PAGE}/sign-out"), client.post(f"{PAGE}/sign-out-others")]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert records(app) == before


@pytest.mark.parametrize("login_url", ["/login", lambda: url_for("login")])
def test_visitors_are_sent_to_sign_in(make_app: MakeApp, login_url: Any) -> None:
    """With a ``login_url`` visitors are sent there, as are those who have signed out this very device."""
    app = make_app()
    add_views(app)
    app.add_url_rule("/login", "login", lambda: "please sign in")
    app.register_blueprint(devices_blueprint(login_url=login_url))
    client = app.test_client()
    response = client.get("/devices")
    assert (response.status_code, response.location) == (303, "/login")
    client.get("/sign-in/Ada")
    action, form = Page(client.get("/devices").text).forms[0]
    response = client.post(action, data=form)
    assert (response.status_code, response.location) == (303, "/login")


# Forged requests ------------------------------------------------------------------------------------------------------


def test_forms_work_only_with_the_key_of_their_page(app: Flask) -> None:
    """Without the key, with a wrong one and with that of another session of the same user nothing is ended."""
    here, there = signed_in(app), signed_in(app)
    theirs = page(there).forms[0][1]["form_key"]
    for form in ({}, {"form_key": ""}, {"form_key": "x"}, {"form_key": "é"}, {"form_key": theirs}):
        fields = {**form, "session_id": session_id(there)}
        assert here.post(f"{PAGE}/sign-out", data=fields).status_code == 400
        assert here.post(f"{PAGE}/sign-out-others", data=fields).status_code == 400
    assert (user(here), user(there)) == ("Ada", "Ada")


def test_the_key_changes_at_sign_in(app: Flask) -> None:
    """What somebody saw in a session that they planted in another's browser is worth nothing after that user's sign-in."""
    planted = signed_in(app, "/sign-in/Eve")
    form = page(planted).forms[0][1]
    planted.get("/sign-in/Ada")
    assert planted.post(f"{PAGE}/sign-out-others", data=form).status_code == 400


def test_the_key_survives_a_change_of_the_secret_key(simple: Flask) -> None:
    """A page that was shown before the secret key was rotated still works while the old key is a fallback."""
    here = signed_in(simple)
    form = page(here).forms[-1][1]
    simple.config.update(SECRET_KEY="a new one", SECRET_KEY_FALLBACKS=["a secret for tests"])
    assert here.post(f"{PAGE}/sign-out", data=form).status_code == 303


def test_only_post_changes_anything(app: Flask) -> None:
    """A link to a form's address does nothing."""
    here = signed_in(app)
    form = page(here).forms[0][1]
    for path in ("sign-out", "sign-out-others"):
        assert here.get(f"{PAGE}/{path}", query_string=form).status_code == 405
    assert user(here) == "Ada"


def test_showing_the_page_writes_nothing(make_app: MakeApp, store_url: str) -> None:
    """The page costs one get and one look at the user's sessions; its key is not stored."""
    counting = CountingStore(open_store(store_url))
    app = make_app(counting)
    add_views(app)
    app.register_blueprint(devices_blueprint(), url_prefix=PAGE)
    here = signed_in(app)
    counting.operations.clear()
    page(here)
    assert counting.operations == {"get": 1, "find": 1}


@pytest.mark.parametrize("settings", [{}, {"WTF_CSRF_FIELD_NAME": "_protection"}])
def test_flask_wtf_protects_the_page_as_well(make_app: MakeApp, settings: dict[str, Any]) -> None:
    """Where ``CSRFProtect`` checks all forms, those of the page have its field too, and both must be right."""
    app = make_app(**settings)
    CSRFProtect(app)
    add_views(app)
    app.register_blueprint(devices_blueprint(), url_prefix=PAGE)
    here, there = signed_in(app), signed_in(app)
    action, form = page(here).forms[-1]
    assert set(form) == {"form_key", settings.get("WTF_CSRF_FIELD_NAME", "csrf_token")}
    for left_out in form:
        assert here.post(action, data={**form, left_out: ""}).status_code == 400
    assert user(there) == "Ada"
    assert here.post(action, data=form).status_code == 303
    assert user(there) == "None"


def test_flask_login_forgets_the_browser_too(make_app: MakeApp) -> None:
    """With ``on_sign_out=logout_user`` a remember-me cookie does not sign the user in again."""
    app = make_app()
    login = LoginManager(app)

    @login.user_loader
    def load(name: str) -> UserMixin:
        found = UserMixin()
        found.id = name
        return found

    @app.get("/login")
    def sign_in() -> Any:
        login_user(load("Ada"), remember=True)
        return redirect("/")

    app.register_blueprint(devices_blueprint(on_sign_out=logout_user), url_prefix=PAGE)
    client = app.test_client()
    client.get("/login")
    assert client.get_cookie("remember_token") is not None
    action, form = page(client).forms[0]
    assert client.post(action, data=form).status_code == 303
    assert [client.get_cookie(name) for name in ("remember_token", "session")] == [None, None]
    assert records(app) == []


# The page as a page ---------------------------------------------------------------------------------------------------


def test_the_page_is_kept_by_no_cache_and_shown_in_no_frame(simple: Flask) -> None:
    """It is never stored, depends on the cookie, and cannot be framed by a site that lures a click."""
    headers = signed_in(simple).get(PAGE).headers
    assert (headers["Cache-Control"], headers["Vary"], headers["X-Frame-Options"]) == ("no-store", "Cookie", "DENY")


def test_the_page_works_under_a_strict_content_security_policy(simple: Flask) -> None:
    """No script, no inline style, no event handler; its one style sheet comes from the application itself."""
    client = signed_in(simple)
    tags = page(client).tags
    assert not [tag for tag, _ in tags if tag in ("script", "style", "img", "iframe")]
    assert not [name for _, attributes in tags for name in attributes if name == "style" or name.startswith("on")]
    [link] = [attributes["href"] for tag, attributes in tags if tag == "link"]
    assert link == f"{PAGE}/static/devices.css"
    with client.get(link) as response:
        assert (response.status_code, response.mimetype) == (200, "text/css")


def test_the_page_can_be_read_aloud(simple: Flask) -> None:
    """It has a language, a title, one heading and one for each device, a list, and buttons with names of their own."""
    signed_in(simple)
    shown = page(signed_in(simple))
    names = [tag for tag, _ in shown.tags]
    assert ("html", {"lang": "en"}) in shown.tags
    assert [names.count(tag) for tag in ("title", "main", "h1", "h2", "ol", "li")] == [1, 1, 1, 2, 1, 2]
    assert shown.buttons == [
        "Sign out device 1, Firefox on Windows, this device",
        "Sign out device 2, Firefox on Windows",
        "Sign out all other devices",
    ]


def test_the_application_replaces_the_page(make_app: MakeApp, tmp_path: Path) -> None:
    """A template of its own with the same name takes the page's place, and can include the list."""
    app = make_app()
    app.template_folder = str(tmp_path)
    (tmp_path / "persist_session").mkdir()
    (tmp_path / "persist_session" / "devices.html").write_text(
        '<title>Ours</title>{% include "persist_session/device_list.html" %}', encoding="utf-8"
    )
    add_views(app)
    app.register_blueprint(devices_blueprint("places"), url_prefix=PAGE)
    client = signed_in(app)
    shown = page(client)
    assert shown.text.startswith("Ours Your devices")
    action, form = shown.forms[0]
    assert client.post(action, data=form).status_code == 303


def test_a_store_that_cannot_list_says_so(make_app: MakeApp) -> None:
    """On a cachelib cache the page is a 501 that tells why, and nobody is signed out."""
    app = make_app(SimpleCache())
    add_views(app)
    app.register_blueprint(devices_blueprint(), url_prefix=PAGE)
    client = signed_in(app)
    response = client.get(PAGE)
    assert response.status_code == 501
    assert "cannot be listed" in Page(response.text).text
    assert user(client) == "Ada"


def test_with_the_extension_switched_off_the_page_says_so(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """The page and its forms are a 501 as on a store that cannot list; the log names the setting."""
    app = make_app(PERSIST_SESSION_ENABLED=False)
    app.register_blueprint(devices_blueprint(login_url="/login"), url_prefix=PAGE)
    client = app.test_client()
    answers = [client.get(PAGE), client.post(f"{PAGE}/sign-out"), client.post(f"{PAGE}/sign-out-others")]
    assert [answer.status_code for answer in answers] == [501] * 3
    assert all("cannot be listed" in Page(answer.text).text for answer in answers)
    assert "PERSIST_SESSION_ENABLED is False" in caplog.text


def test_the_page_needs_server_side_sessions() -> None:
    """Where the extension was forgotten the error says what is missing."""
    app = Flask("tested")
    app.config.update(SECRET_KEY="a secret for tests", TESTING=True)
    app.register_blueprint(devices_blueprint(), url_prefix=PAGE)
    with pytest.raises(ConfigError, match="server-side sessions"):
        app.test_client().get(PAGE)


def test_the_application_asks_for_the_password_first(make_app: MakeApp, clock: Clock) -> None:
    """A ``before_request`` of the blueprint stands before the page and its forms; ``created_at`` has the sign-in."""
    app = make_app()
    manager_of(app).clock = clock
    add_views(app)
    blueprint = devices_blueprint()

    @blueprint.before_request
    def ask() -> Any:
        long_ago = session.created_at is not None and clock() - session.created_at > 300  # type: ignore[attr-defined]
        return redirect("/confirm") if long_ago else None

    @app.get("/confirm")
    def confirm() -> str:
        session.bind(session.user_id, session.tenant_id)  # type: ignore[attr-defined]
        return ""

    app.register_blueprint(blueprint, url_prefix=PAGE)
    client = signed_in(app)
    action, form = page(client).forms[0]
    clock.advance(301)
    assert [client.get(PAGE).location, client.post(action, data=form).location] == ["/confirm"] * 2
    client.get("/confirm")
    action, form = page(client).forms[0]
    assert client.post(action, data=form).status_code == 303
    assert user(client) == "None"


def test_without_the_library_the_extra_is_named() -> None:
    """Where ua-parser is not installed, importing the page says what to install."""
    code = "import sys; sys.modules['ua_parser'] = None; import flask_persist_session.web.devices"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: the page of devices needs ua-parser: pip install 'flask-persist-session[devices]'" in done.stderr


def test_templates_and_style_are_installed() -> None:
    """What is no Python in the package is named in setup.cfg, so that an installed copy has it."""
    web = Path(flask_persist_session.__file__).parent / "web"
    setup = configparser.ConfigParser()
    setup.read(web.parent.parent / "setup.cfg")
    patterns = setup["options.package_data"]["flask_persist_session.web"].split()
    named = {path for pattern in patterns for path in web.glob(pattern)}
    assert named == {path for path in web.rglob("*.*") if path.suffix not in (".py", ".pyc")}
