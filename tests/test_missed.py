"""Promises that the other tests take for granted."""

from __future__ import annotations

import os
import re
import signal
import stat
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from time import tzset
from typing import Any
from uuid import UUID

import ormsgpack
import psycopg
import pytest
from cachelib import SimpleCache
from flask import Flask, Response, session
from flask.testing import FlaskClient
from markupsafe import Markup
from werkzeug.local import LocalProxy
from werkzeug.test import TestResponse, create_environ, run_wsgi_app

from flask_persist_session import (
    ConfigError,
    Deletion,
    SerializationError,
    Session,
    SessionConflict,
    SessionDiscarded,
    SessionManager,
    SessionRecord,
    SessionStore,
    StoreError,
    StoreUnavailable,
    open_store,
    session_discarded,
)
from flask_persist_session.serializers import Codec, pack_record, unpack_record
from flask_persist_session.testing import following, make_record
from flask_persist_session.tokens import TokenSigner, make_token, session_id, shard_of
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.servers import RedisServer

MakeApp = Callable[..., Flask]


class FailingStore(CountingStore):
    """A store whose saves fail while it has a failure, and that does what it is told to before it ends a session."""

    failure: StoreError | None = None

    def __init__(self, store: SessionStore) -> None:
        super().__init__(store)
        self.before_ending: list[Callable[[], object]] = []

    def save(self, record: SessionRecord, *, expected: int) -> None:
        if record.ended_at is not None and self.before_ending:
            self.before_ending.pop(0)()
        if self.failure is not None:
            self.operations["save"] += 1
            raise self.failure
        super().save(record, expected=expected)


@pytest.fixture
def memory() -> FailingStore:
    return FailingStore(open_store("memory://"))


@pytest.fixture
def make_site(make_app: MakeApp, memory: FailingStore, clock: Clock) -> Callable[..., Flask]:
    """Makes an application on that store that answers errors as in production."""

    def make(**settings: Any) -> Flask:
        app = make_app(memory, TESTING=False, **settings)
        manager_of(app).clock = clock

        @app.get("/untouched")
        def untouched() -> str:
            return "untouched"

        @app.get("/read")
        def read() -> dict[str, Any]:
            return dict(session)

        @app.get("/set/<key>")
        def put(key: str) -> str:
            session[key] = []
            return "set"

        @app.get("/clear")
        def clear() -> str:
            session.clear()
            return "cleared"

        @app.get("/do")
        def do_() -> str:
            app.config["ACTION"]()
            return "done"

        return app

    return make


@pytest.fixture
def site(make_site: Callable[..., Flask]) -> Flask:
    return make_site()


def manager_of(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def do(client: FlaskClient, action: Callable[[], object]) -> TestResponse:
    """Have a view do something with the session."""
    client.application.config["ACTION"] = action
    answer = client.get("/do")
    assert answer.status_code == 200
    return answer


@pytest.fixture
def client(site: Flask) -> FlaskClient:
    """A browser whose session holds an empty list ``a``."""
    client = site.test_client()
    client.get("/set/a")
    return client


@pytest.fixture
def other(site: Flask, client: FlaskClient) -> FlaskClient:
    """The same browser in another tab: the same cookie."""
    other = site.test_client()
    other.set_cookie("session", token_in(client))
    return other


def token_in(client: FlaskClient) -> str:
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


@pytest.fixture
def discarded() -> Iterator[list[SessionDiscarded]]:
    """The events of discarded changes."""
    heard: list[SessionDiscarded] = []

    def hear(_sender: object, event: SessionDiscarded) -> None:
        heard.append(event)

    with session_discarded.connected_to(hear):
        yield heard


# interface ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/set/a", "/clear"])
def test_secure_needs_no_other_setting(make_site: Callable[..., Flask], path: str) -> None:
    """``SESSION_COOKIE_SECURE`` alone is on the header that sets the cookie and on the one that deletes it."""
    client = make_site(SESSION_COOKIE_SECURE=True).test_client()
    client.get("/set/b", base_url="https://localhost")
    client.delete_cookie("session") if path == "/set/a" else None
    assert "; Secure" in client.get(path, base_url="https://localhost").headers["Set-Cookie"]


def test_renewed_cookie_varies(site: Flask, clock: Clock) -> None:
    """A response that sends the cookie again says ``Vary: Cookie`` although nobody touched the session."""
    client = site.test_client()
    client.get("/set/a")
    clock.advance(61)
    answer = client.get("/untouched")
    assert "Set-Cookie" in answer.headers
    assert answer.headers["Vary"] == "Cookie"


def test_caching_is_left_alone_by_default(site: Flask) -> None:
    """Without ``PERSIST_SESSION_NO_STORE`` a response that used the session gets no ``Cache-Control``."""
    assert "Cache-Control" not in site.test_client().get("/set/a").headers


def test_cookie_name_may_have_any_character(make_site: Callable[..., Flask]) -> None:
    """A cookie name with characters that mean something in a pattern finds its session again."""
    client = make_site(SESSION_COOKIE_NAME="a+session").test_client()
    client.get("/set/a")
    assert client.get("/read").json == {"a": []}


def test_cookie_of_a_longer_name_is_another_one(site: Flask, client: FlaskClient) -> None:
    """The value of a cookie whose name only ends like that of the session opens nothing."""
    stranger = site.test_client()
    stranger.set_cookie("my-session", token_in(client))
    assert stranger.get("/read").json == {}


def test_untouched_session_costs_no_signature_check(site: Flask, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """A request that does not touch the session verifies nothing until a renewal is due."""
    client = site.test_client()
    client.get("/set/a")
    checks: list[str] = []
    verify = TokenSigner.verify

    def count(signer: TokenSigner, value: str) -> Any:
        checks.append(value)
        return verify(signer, value)

    monkeypatch.setattr(TokenSigner, "verify", count)
    client.get("/untouched")
    assert checks == []
    clock.advance(61)
    client.get("/untouched")
    assert len(checks) == 1


def test_dead_cookies_do_not_pile_up(
    site: Flask, memory: FailingStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only so many cookies of dead sessions are remembered; then all but the last are looked up again."""
    monkeypatch.setattr("flask_persist_session.interface._MOST_DEAD", 2)
    clients = [site.test_client() for _ in range(3)]
    for client in clients:
        client.get("/set/a")
    clock.advance(32 * 86400)
    for client in clients:
        client.get("/untouched")
    memory.operations.clear()
    for client in reversed(clients):
        client.get("/untouched")
    assert memory.operations == {"get": 2}


def test_due_renewal_does_not_hide_a_failed_save(site: Flask, memory: FailingStore, clock: Clock) -> None:
    """A change that cannot be stored is no success, also where the session was to be renewed anyway."""
    client = site.test_client()
    client.get("/set/a")
    clock.advance(61)
    memory.failure = StoreUnavailable("switched off")
    answer = client.get("/set/b")
    assert answer.status_code == 503
    assert "Set-Cookie" not in answer.headers


def test_renewal_that_cannot_be_made_is_logged(
    client: FlaskClient,
    memory: FailingStore,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A request that needs no session is served while the store is down, and the log says why nothing was renewed."""

    def get(session_id: str) -> SessionRecord | None:
        raise StoreUnavailable("switched off")

    clock.advance(61)
    monkeypatch.setattr(memory, "get", get)
    assert client.get("/untouched").text == "untouched"
    assert "could not be renewed: switched off" in caplog.text


def test_failed_save_is_not_tried_again(site: Flask, memory: FailingStore) -> None:
    """The response that reports an error nobody handles does not save the session a second time."""
    memory.failure = StoreError("broken")
    assert site.test_client().get("/set/a").status_code == 500
    assert memory.operations == {"save": 1}


class File:
    """What a view sends without copying it; knows whether it was closed."""

    closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield b"the file"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def sent(site: Flask, memory: FailingStore) -> File:
    """The file that ``/file`` would have sent, had its session been stored."""
    memory.failure = StoreError("broken")
    file = File()

    @site.get("/file")
    def send() -> Response:
        session["a"] = 1
        return Response(file, headers={"Content-Encoding": "br"}, direct_passthrough=True)

    site.register_error_handler(StoreError, lambda error: Response((part for part in ["so", "rry"]), 500))
    return file


def test_error_takes_the_place_of_a_file(site: Flask, sent: File) -> None:
    """The application's answer to a failed save is sent whatever kind of body it replaces, and whatever kind it has."""
    # Without the test client, which mends bodies that a server would choke on.
    body, _status, _headers = run_wsgi_app(site, create_environ("/file"))
    assert b"".join(body) == b"sorry"


def test_error_is_not_encoded_as_the_file_was(site: Flask, sent: File) -> None:
    """The answer to a failed save does not keep the ``Content-Encoding`` of the body that is not sent."""
    assert "Content-Encoding" not in site.test_client().get("/file").headers


def test_file_that_is_not_sent_is_closed(site: Flask, sent: File) -> None:
    """The body that an error replaces is closed."""
    site.test_client().get("/file")
    assert sent.closed


# session --------------------------------------------------------------------------------------------------------------


def current() -> Session:
    """The session of the request, with the methods that Flask's does not have."""
    assert isinstance(session, LocalProxy)
    return session._get_current_object()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "take", [lambda: session.get("a"), lambda: current().copy()["a"], lambda: session.setdefault("a", [])]
)
def test_change_of_what_was_handed_out_is_noticed(client: FlaskClient, take: Callable[[], list[int]]) -> None:
    """A list of the session may be had in any way: what is appended to it is stored."""
    do(client, lambda: take().append(1))
    assert client.get("/read").json == {"a": [1]}


def test_removing_the_last_key_deletes_the_session(client: FlaskClient, memory: FailingStore) -> None:
    """A session that lost its last key is deleted, with its cookie."""
    answer = do(client, lambda: session.pop("a"))
    assert "Max-Age=0" in answer.headers["Set-Cookie"]
    assert [(record.end_reason, record.data) for record in memory.scan()] == [("emptied", b"")]


@pytest.mark.parametrize("touch", [lambda: session.clear(), lambda: setattr(session, "modified", True)])
def test_empty_session_deletes_a_dead_cookie(
    client: FlaskClient, memory: FailingStore, clock: Clock, touch: Callable[[], object]
) -> None:
    """A request that leaves its session empty, and says that it did so, stores nothing and deletes the old cookie."""
    clock.advance(32 * 86400)
    memory.operations.clear()
    answer = do(client, touch)
    assert "Max-Age=0" in answer.headers["Set-Cookie"]
    assert memory.operations == {"get": 1}


@pytest.mark.parametrize("change", [lambda: session.update(b=1), lambda: setattr(session, "modified", True)])
def test_saved_session_is_not_modified(client: FlaskClient, change: Callable[[], object]) -> None:
    """``session.modified`` is true after a change or when told so, and no longer after ``session.save()``."""

    def save() -> None:
        assert not session.modified
        change()
        assert session.modified
        current().save()
        assert not session.modified

    do(client, save)


def test_change_in_a_tuple_is_noticed(client: FlaskClient) -> None:
    """What is appended to a list inside a tuple is stored."""
    do(client, lambda: session.update(pair=([], 1)))
    do(client, lambda: session["pair"][0].append(2))
    do(client, lambda: session.update(seen=session["pair"] == ([2], 1)))
    assert client.get("/read").json["seen"] is True  # type: ignore[index]


def test_key_set_after_modified_was_set_to_false_is_stored(client: FlaskClient) -> None:
    """``session.modified = False`` holds until the next key is set."""

    def set_later() -> None:
        session.modified = False
        session["b"] = 1

    do(client, set_later)
    assert client.get("/read").json == {"a": [], "b": 1}


@pytest.mark.parametrize("reason", ["expired", "revoked"])
def test_closed_session_gives_way_to_a_new_one(site: Flask, client: FlaskClient, clock: Clock, reason: str) -> None:
    """With the cookie of a session that expired or was ended, a request learns why and may start a new one."""
    ids: list[str] = []
    do(client, lambda: ids.append(str(current().id)))
    if reason == "revoked":
        manager_of(site).end(ids[0], reason)
    else:
        clock.advance(32 * 86400)
    do(client, lambda: session.update(why=current().end_reason))
    assert client.get("/read").json == {"why": reason}


def test_failed_renewal_is_no_error(client: FlaskClient, memory: FailingStore, clock: Clock) -> None:
    """A request that only reads is served although its session could not be renewed."""
    clock.advance(61)
    memory.failure = StoreUnavailable("switched off")
    answer = client.get("/read")
    assert (answer.status_code, answer.json) == (200, {"a": []})
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("move", [Session.regenerate, Session.clear])
def test_session_moves_once(client: FlaskClient, move: Callable[[Session], None]) -> None:
    """After ``session.save()`` has given the session a new token, the end of the request does not give another."""
    ids: list[str | None] = []

    def save_between() -> None:
        move(current())
        session["b"] = 1
        current().save()
        ids.append(current().id)
        session["c"] = 2

    do(client, save_between)
    do(client, lambda: ids.append(current().id))
    assert ids[0] == ids[1]


def test_session_starts_anew_after_its_deletion_was_saved(client: FlaskClient) -> None:
    """What is put in after ``clear()`` and ``save()`` is a new session with a new token."""
    old = token_in(client)

    def clear_and_go_on() -> None:
        session.clear()
        current().save()
        session["b"] = 1

    do(client, clear_and_go_on)
    assert client.get("/read").json == {"b": 1}
    assert token_in(client).split(".")[0] != old.split(".")[0]


@pytest.mark.parametrize("change", [lambda: session.update(b=1), lambda: session.pop("a"), lambda: current().regenerate()])
def test_session_goes_on_with_what_was_merged(
    client: FlaskClient, other: FlaskClient, change: Callable[[], object]
) -> None:
    """After a save that was merged, the request sees what others added, and what it changes then is stored too."""

    def save_beside_another() -> None:
        list(session)
        other.get("/set/theirs")
        change()
        current().save()
        assert session["theirs"] == []
        session["later"] = []

    do(client, save_beside_another)
    assert {"theirs", "later"} <= set(client.get("/read").json or ())


def test_change_under_an_old_token_is_reported(
    client: FlaskClient, other: FlaskClient, discarded: list[SessionDiscarded]
) -> None:
    """A change made with the token of before a regeneration is dropped, and ``session_discarded`` says why."""
    do(client, lambda: current().regenerate())
    assert "Set-Cookie" not in other.get("/set/b").headers
    assert [event.reason for event in discarded] == ["regenerated"]


def test_request_with_a_token_of_before_clearing_stores_nothing(client: FlaskClient, other: FlaskClient) -> None:
    """A session that was cleared and filled again has moved: a request under way with the old token stores nothing."""

    def clear_and_fill() -> None:
        session.clear()
        session["b"] = 1

    do(client, clear_and_fill)
    assert "Set-Cookie" not in other.get("/set/c").headers
    assert client.get("/read").json == {"b": 1}


@pytest.mark.parametrize("change", [lambda: session.update(b=1), lambda: current().regenerate()])
def test_session_that_ended_during_a_request_stays_ended(
    client: FlaskClient, other: FlaskClient, memory: FailingStore, change: Callable[[], object]
) -> None:
    """A request that finds its session ended when it saves it stores nothing any more, whatever it puts in."""

    def come_too_late() -> None:
        list(session)
        other.get("/clear")
        change()
        current().save()
        session.clear()
        session["c"] = 1

    assert "Set-Cookie" not in do(client, come_too_late).headers
    assert [(record.end_reason, record.data) for record in memory.scan()] == [("logout", b"")]


# manager --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def manager(memory: FailingStore, clock: Clock) -> SessionManager:
    return SessionManager(memory, clock=clock, idle_timeout=lambda: 3600.0, renew_interval=60.0)


@pytest.mark.parametrize(("passed", "moved"), [(59, 0), (60, 60), (600, 600)])
def test_saving_moves_the_expiry_once_an_interval(
    manager: SessionManager, clock: Clock, passed: float, moved: float
) -> None:
    """A save outside of requests renews the session if the last renewal is an interval ago, and not before."""
    stored = manager.create({"a": 1})
    before = stored.expires_at
    clock.advance(passed)
    stored.data["a"] = 2
    manager.save(stored)
    assert stored.expires_at - before == moved
    assert stored.accessed_at == clock.now


def test_regenerating_takes_along_the_last_of_several_changes(manager: SessionManager, memory: FailingStore) -> None:
    """Of a key that others set again and again while the session moves, the last value is found under the new token."""
    stored = manager.create({"mine": 1})

    def set_(value: int) -> None:
        found = manager.get(stored.id)
        assert found is not None
        found.data["theirs"] = value
        manager.save(found)

    memory.before_ending = [lambda: set_(1), lambda: set_(2), lambda: set_(3)]
    moved = manager.regenerate(stored)
    assert moved is not None
    found = manager.get(moved.id)
    assert found is not None
    assert found.data == {"mine": 1, "theirs": 3}


def test_failure_of_regenerating_is_the_one_that_is_told(
    manager: SessionManager, memory: FailingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the store fails while the session moves, and again while that is undone, the first error is raised."""

    def delete(session_id: str, *, expected: int | None = None) -> bool:
        raise StoreError("second")

    def break_down() -> None:
        monkeypatch.setattr(memory, "delete", delete)
        raise StoreError("first")

    stored = manager.create({"a": 1})
    memory.before_ending = [break_down]
    with pytest.raises(StoreError, match="first"):
        manager.regenerate(stored)


def test_failed_restart_leaves_the_old_session(manager: SessionManager) -> None:
    """If what is to start a new session cannot be stored, the old one is as it was."""
    stored = manager.create({"a": 1})
    with pytest.raises(SerializationError):
        manager.restart(stored, {"a": object()})
    found = manager.get(stored.id)
    assert found is not None
    assert found.data == {"a": 1}


def test_cleanup_with_an_age_adds_the_interval(manager: SessionManager, clock: Clock) -> None:
    """A session may have been used one renewal interval later than the store knows: it is idle only after both."""
    manager.create({"a": 1})
    clock.advance(600 + 60)
    assert manager.cleanup(older_than=600).removed == 0
    clock.advance(1)
    assert manager.cleanup(older_than=600).idle == 1


def test_cleanup_with_an_age_spares_the_reasons(manager: SessionManager, clock: Clock) -> None:
    """A session that was ended is remembered as long as it should be, whatever the age given to a cleanup."""
    stored = manager.create({"a": 1})
    manager.end(stored.id, "revoked")
    clock.advance(3600)
    assert manager.cleanup(older_than=10).removed == 0
    found = manager.load(stored.id)
    assert found is not None
    assert found.end_reason == "revoked"


def test_creation_sent_twice_is_one(memory: FailingStore, clock: Clock) -> None:
    """A session is created although its driver lost the first answer and was refused when it asked again."""

    class Repeating(FailingStore):
        def save(self, record: SessionRecord, *, expected: int) -> None:
            super().save(record, expected=expected)
            super().save(record, expected=expected)

    stored = SessionManager(Repeating(memory), clock=clock).create({"a": 1})
    record = memory.get(stored.id)
    assert record is not None
    assert record.version == 1


def test_created_token_is_nobody_elses(manager: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a new token were one that is in use, nothing would be created and the session in use would be untouched."""
    monkeypatch.setattr("flask_persist_session.tokens.make_token", lambda shard: "000" + "A" * 43)
    first = manager.create({"a": 1})
    with pytest.raises(SessionConflict):
        manager.create({"a": 2})
    found = manager.get(first.id)
    assert found is not None
    assert found.data == {"a": 1}


@pytest.mark.parametrize("secret", ["hunter2", "token"])
def test_representation_of_a_stored_session_shows_no_secret(manager: SessionManager, secret: str) -> None:
    """Neither the data nor the token of a session gets into a log with its representation."""
    stored = manager.create({"password": "hunter2"})
    assert (stored.token if secret == "token" else secret) not in repr(stored)  # type: ignore[operator]


def test_tenants_are_text(manager: SessionManager) -> None:
    """The tenant 7 is the tenant "7", as it is with users."""
    stored = manager.create(user_id=3, tenant_id=7)  # type: ignore[arg-type]
    assert (stored.user_id, stored.tenant_id) == ("3", "7")


def test_regenerating_keeps_what_describes_the_session(manager: SessionManager) -> None:
    """User, tenant, tags and metadata move along with the data."""
    stored = manager.create({"a": 1}, user_id="Ada", tenant_id="acme", tags={"phone"}, metadata={"device": "phone"})
    moved = manager.regenerate(stored)
    assert moved is not None
    found = manager.get(moved.id)
    assert found is not None
    assert (found.user_id, found.tenant_id) == ("Ada", "acme")
    assert found.record.tags == {"phone"}
    assert found.record.metadata == {"device": "phone"}


def test_cleanup_counts_what_it_removed(
    manager: SessionManager, memory: FailingStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that somebody else removes at the same moment is not counted."""
    stored = manager.create({"a": 1})
    clock.advance(3600 + 60)
    delete_many = memory.delete_many

    def too_late(deletions: Sequence[Deletion]) -> list[bool]:
        memory.delete(stored.id)
        return delete_many(deletions)  # type: ignore[no-any-return]

    monkeypatch.setattr(memory, "delete_many", too_late)
    assert manager.cleanup().removed == 0


def test_signals_come_from_the_application(site: Flask, client: FlaskClient, other: FlaskClient) -> None:
    """A receiver that listens to one application hears of its sessions."""
    heard: list[SessionDiscarded] = []

    def hear(_sender: object, event: SessionDiscarded) -> None:
        heard.append(event)

    with session_discarded.connected_to(hear, site):
        do(client, lambda: current().regenerate())
        other.get("/set/b")
    assert len(heard) == 1


# tokens and serializers: what is kept must be read by every later release ----------------------------------------------


def test_token_is_long_enough() -> None:
    """A token is its shard and 32 random bytes, in an alphabet that a cookie needs not quote."""
    assert re.fullmatch(r"3fa[A-Za-z0-9_-]{43}", make_token("3fa"))
    assert make_token("3fa") != make_token("3fa")


def test_cookies_of_earlier_releases_are_good() -> None:
    """The form, salt and algorithm of the signed cookie, and the way from a token to its session, stay what they are."""
    token = "3fa" + "A" * 43
    signer = TokenSigner(["key"], lambda: 1_700_000_000.0)
    assert signer.sign(token) == f"{token}.ZVPxAA.lddRrafQbmJmjOl-jEy7hw7ihyGzA-k8pUuY18q2uVI"
    assert session_id(token) == "3fac008f56e465d62b6c6032c7f5a01979dc46c3a46b48a7c2a674d69c09a658945"
    assert [shard_of("Ada"), shard_of("Guido")] == ["1a5", "2de"]


@pytest.mark.parametrize(
    ("value", "packed", "text"),
    [
        ((1,), "d5019101", '{" t":[1]}'),
        ({1}, "d5029101", '{" set":[1]}'),
        (frozenset({1}), "d5039101", '{" fs":[1]}'),
        (
            datetime(2024, 2, 29, 1, 2, 3, tzinfo=timezone.utc),
            "c71a0493b3323032342d30322d32395430313a30323a30330093000000",
            '{" dt":["2024-02-29T01:02:03",0,[0,0,0]]}',
        ),
        (date(2024, 2, 29), "c70b05aa323032342d30322d3239", '{" da":"2024-02-29"}'),
        (time(1, 2, 3), "c70c0693a830313a30323a303300c0", '{" ti":["01:02:03",0,null]}'),
        (timedelta(1, 2, 3), "d60793010203", '{" td":[1,2,3]}'),
        (UUID(int=1), "c72208d920" + "30" * 31 + "31", '{" u":"00000000000000000000000000000001"}'),
        (Decimal("1.10"), "c70509a4312e3130", '{" dec":"1.10"}'),
        (Markup("<b>"), "d60aa33c623e", '{" m":"<b>"}'),
        (bytearray(b"x"), "c7030bc40178", '{" ba":{" b":"eA=="}}'),
        ({1: 2}, "d60c91920102", '{" k":[[1,2]]}'),
        ("\ud800", "c7050dc403eda080", '{" s8":{" b":"7aCA"}}'),
        (2**64, "c7140eb330783130303030303030303030303030303030", '{" i":"0x10000000000000000"}'),
        (OrderedDict(a=1), "c7050f9192a16101", '{" od":[["a",1]]}'),
        (deque([1], 2), "d61092029101", '{" dq":[2,[1]]}'),
        (b"x", "c40178", '{" b":"eA=="}'),
        ({" t": 1}, "81a2207401", '{" di":{" t":1}}'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_payloads_of_earlier_releases_are_read(value: Any, packed: str, text: str) -> None:
    """The bytes of each type stay what they are, in both serializers."""
    payloads = {"msgpack": b"\x01\x81\xa1v" + bytes.fromhex(packed), "json": b'\x02{"v":' + text.encode() + b"}"}
    for serializer, payload in payloads.items():
        assert Codec(serializer).encode({"v": value}) == payload
        found = Codec(serializer).decode(payload)["v"]
        assert (type(found), found) == (type(value), value)


def test_pickles_of_earlier_releases_are_read() -> None:
    """The salt and algorithm that sign pickles stay what they are."""
    pickled = bytes.fromhex("80059512000000000000007d948c0176945d94284b014b02859465732e")
    assert Codec("pickle", keys=lambda: ["key"]).decode(b"\x03sB1aPFkR46oOOK5pAeol-HljtDji072RJs_TLT-rQ7A." + pickled) == {
        "v": [1, (2,)]
    }


def test_records_of_earlier_releases_are_read() -> None:
    """The bytes of a whole record, as files and caches keep it, stay what they are."""
    record = SessionRecord(
        id="3fa" + "0" * 64,
        user_id="Ada",
        tenant_id=None,
        tags=frozenset({"a", "b"}),
        metadata={"device": "phone"},
        data=b"x",
        created_at=1.0,
        accessed_at=2.0,
        expires_at=3.5,
        ended_at=None,
        end_reason=None,
        version=7,
    )
    packed = (
        "9cd943336661" + "30" * 64 + "a3416461c0aa5b2261222c202262225db27b22646576696365223a2270686f6e65227dc40178"
        "cb3ff0000000000000cb4000000000000000cb400c000000000000c0c007"
    )
    assert pack_record(record).hex() == packed
    assert unpack_record(bytes.fromhex(packed)) == record


def test_long_values_are_refused_unseen() -> None:
    """A value longer than any cookie of ours is refused, even with a good signature."""
    signer = TokenSigner(["key"], lambda: 1_700_000_000.0)
    assert signer.verify(signer.sign("3fa" + "A" * 43)) is not None
    assert signer.verify(signer.sign("3fa" + "A" * 300)) is None


@pytest.mark.parametrize("serializer", ["msgpack", "json"])
@pytest.mark.parametrize("size", [0, 255, 256, 65_535, 65_536])
def test_bytearray_of_any_size_comes_back(serializer: str, size: int) -> None:
    """A ``bytearray`` is no ``bytes``, however long it is and whatever is in it."""
    codec = Codec(serializer)
    found = codec.decode(codec.encode({"v": [bytearray(size)]}))["v"][0]
    assert (type(found), found) == (bytearray, bytearray(size))


def test_pickle_that_varies_is_not_written_again(make_site: Callable[..., Flask], memory: FailingStore) -> None:
    """A request that only reads does not write, also where pickling what was read gives other bytes."""
    client = make_site(PERSIST_SESSION_SERIALIZER="pickle").test_client()
    shrunk = set(range(100))  # which keeps its room, and so an order that a copy of it has not
    for number in range(100):
        if number not in (1, 32):
            shrunk.discard(number)
    do(client, lambda: session.update(kept=shrunk))
    memory.operations.clear()
    do(client, lambda: session["kept"])
    assert memory.operations == {"get": 1}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        (0, 7),
        (1, 7),
        (2, 7),
        (3, "[[]]"),
        (4, "[]"),
        (5, "text"),
        (6, "1.0"),
        (7, None),
        (8, "soon"),
        (9, "never"),
        (10, 7),
        (11, 1.0),
    ],
)
def test_record_with_a_field_of_the_wrong_type_is_damaged(field: int, wrong: object) -> None:
    """Each field of a record has its type, or the record is damaged."""
    fields: list[Any] = ["3fa" + "0" * 64, "Ada", None, "", "", b"x", 1.0, 2.0, 3.5, None, None, 7]
    assert unpack_record(ormsgpack.packb(fields)).version == 7
    fields[field] = wrong
    with pytest.raises(SerializationError):
        unpack_record(ormsgpack.packb(fields))


# extension ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "lifetime"),
    [
        ({"PERSIST_SESSION_IDLE_TIMEOUT": 600}, 600 + 60),
        ({"PERSIST_SESSION_IDLE_TIMEOUT": 600, "PERSIST_SESSION_RENEW_INTERVAL": 10}, 600 + 10),
        ({"PERSIST_SESSION_IDLE_TIMEOUT": 600, "PERSIST_SESSION_ABSOLUTE_TIMEOUT": 300}, 300),
        ({"PERMANENT_SESSION_LIFETIME": 700}, 700 + 60),
        ({"PERSIST_SESSION_IDLE_TIMEOUT": 600, "PERMANENT_SESSION_LIFETIME": 700}, 600 + 60),
    ],
    ids=str,
)
def test_timeouts_are_those_of_the_settings(
    make_site: Callable[..., Flask], clock: Clock, settings: dict[str, Any], lifetime: float
) -> None:
    """A session lives for its idle timeout and one interval, no longer than the absolute timeout."""
    stored = manager_of(make_site(**settings)).create()
    assert stored.expires_at - clock.now == lifetime


def test_ended_sessions_are_kept_as_long_as_is_set(make_site: Callable[..., Flask], clock: Clock) -> None:
    """The reason of an ended session is there for ``PERSIST_SESSION_KEEP_ENDED`` seconds."""
    manager = manager_of(make_site(PERSIST_SESSION_KEEP_ENDED=100))
    stored = manager.create()
    manager.end(stored.id)
    clock.advance(99)
    assert manager.load(stored.id) is not None
    clock.advance(1)
    assert manager.load(stored.id) is None


def test_lifetime_beyond_the_calendar_is_cut(make_site: Callable[..., Flask]) -> None:
    """A ``PERMANENT_SESSION_LIFETIME`` beyond all dates gives sessions and cookies that last for very long."""
    client = make_site(PERMANENT_SESSION_LIFETIME=timedelta.max).test_client()
    do(client, lambda: setattr(session, "permanent", True))
    assert token_in(client)


def test_relative_store_is_in_the_instance_folder(make_app: MakeApp, tmp_path: Path) -> None:
    """A store with a relative path is made in the application's instance folder."""
    make_app("sqlite:///kept/sessions.db")
    assert (tmp_path / "kept" / "sessions.db").exists()


def test_error_of_a_store_names_the_setting(make_app: MakeApp) -> None:
    """Whoever gives a wrong URL learns which setting it is in."""
    with pytest.raises(ConfigError, match=r"^PERSIST_SESSION_STORE: "):
        make_app("memory://", PERSIST_SESSION_STORE="memory://somewhere")


def test_secret_key_may_come_later(make_site: Callable[..., Flask]) -> None:
    """What signs pickles, too, is the secret key of the moment, not that of ``init_app``."""
    site = make_site(SECRET_KEY=None, PERSIST_SESSION_SERIALIZER="pickle")
    site.secret_key = "first"
    client = site.test_client()
    client.get("/set/a")
    site.config.update(SECRET_KEY="second", SECRET_KEY_FALLBACKS=["first"])
    assert client.get("/read").json == {"a": []}
    site.config.update(SECRET_KEY="second", SECRET_KEY_FALLBACKS=[])
    assert client.get("/read").json == {}


def test_unavailable_store_is_logged(site: Flask, memory: FailingStore, caplog: pytest.LogCaptureFixture) -> None:
    """The log says why requests are answered with 503."""
    memory.failure = StoreUnavailable("switched off")
    site.test_client().get("/set/a")
    assert "switched off" in caplog.text


# cli ------------------------------------------------------------------------------------------------------------------


def test_each_state_has_its_figure(site: Flask, clock: Clock) -> None:
    """``stats`` counts active, expired and ended sessions, each in its own line."""
    manager = manager_of(site)
    for _ in range(3):
        manager.create()
    clock.advance(32 * 86400)
    for _ in range(2):
        manager.end(manager.create().id)
    manager.create()
    lines = site.test_cli_runner().invoke(args=["sessions", "stats"]).output.splitlines()
    assert [line.split() for line in lines[:4]] == [["sessions", "6"], ["active", "1"], ["expired", "3"], ["ended", "2"]]


def test_moments_are_in_utc(site: Flask, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """``stats`` shows UTC, as it says, wherever the server is."""
    request.addfinalizer(tzset)  # runs after the zone is as it was
    manager_of(site).create()
    with monkeypatch.context() as here:
        here.setenv("TZ", "Asia/Tokyo")
        tzset()
        output = site.test_cli_runner().invoke(args=["sessions", "stats"]).output
    assert "2023-11-14 22:13 UTC" in output


# stores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, -1])
def test_lease_of_no_time_is_not_held(store: SessionStore, seconds: float) -> None:
    """Asking for 0 seconds or less of a lease that nobody holds takes nothing."""
    assert store.lease("sweep", seconds) is False
    assert store.lease("sweep", 60) is True


def test_redis_keeps_nothing_of_a_deleted_session(redis_server: RedisServer, new_url: Callable[[str], str]) -> None:
    """Deleting the last session of a user leaves no key: neither of the session nor of an index."""
    url = new_url("redis")
    prefix = url.partition("prefix=")[2]
    store, record = open_store(url), make_record()
    assert record.user_id is not None
    store.save(record, expected=0)
    with redis_server.client() as client:
        assert len(client.keys(f"{prefix}:*")) == 4
        store.delete(record.id)
        assert client.keys(f"{prefix}:*") == []
    store.close()


def test_terminated_connection_is_not_noticed_by_reading(new_url: Callable[[str], str]) -> None:
    """When PostgreSQL ends a connection between two requests, reading goes on with a new one."""
    url = new_url("postgresql")
    store, record = open_store(url), make_record()
    store.save(record, expected=0)
    place = dict(part.split("=") for part in url.partition("?")[2].split("&"))
    name = url.partition("@/")[2].partition("?")[0]
    with psycopg.connect(host=place["host"], user="postgres", dbname=name, autocommit=True) as administrator:
        administrator.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert store.get(record.id) == record
    store.close()


def test_cache_that_refuses_is_an_error() -> None:
    """A change that the cache did not take is no success."""

    class Refusing(SimpleCache):
        def set(self, key: str, value: Any, timeout: Any = None) -> bool:
            return False

    store, record = open_store(Refusing()), make_record()
    store.save(record, expected=0)
    with pytest.raises(StoreError, match="Refusing"):
        store.save(following(record), expected=1)


def test_cache_forgets_later_than_the_session_expires() -> None:
    """The time to live of a cache entry is a safety net: the manager judges expiry, and may still tell of it."""
    lifetimes: list[Any] = []

    class Listening(SimpleCache):
        def add(self, key: str, value: Any, timeout: Any = None) -> bool:
            lifetimes.append(timeout)
            return bool(super().add(key, value, timeout))

        def set(self, key: str, value: Any, timeout: Any = None) -> bool:
            lifetimes.append(timeout)
            return bool(super().set(key, value, timeout))

    store, record = open_store(Listening()), make_record(accessed_at=1000.0, expires_at=2000.0)
    store.save(record, expected=0)
    store.save(following(record), expected=1)
    assert [lifetime > 2000 for lifetime in lifetimes] == [True, True]


def test_namespaces_of_a_cache_are_apart() -> None:
    """Two namespaces in one cache do not see each other."""
    cache, record = SimpleCache(), make_record()
    open_store(cache).save(record, expected=0)
    assert open_store(cache, namespace="chat").get(record.id) is None


def test_fsync_waits_for_the_directory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``fsync=1`` a save waits for its file, and for the directory whenever the name of a file is new in it."""
    synced: list[bool] = []
    fsync = os.fsync

    def listen(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", listen)
    store, record = open_store(f"file://{tmp_path}/sessions?fsync=1"), make_record(data=bytes(10_000))
    store.save(record, expected=0)
    assert synced == [False, True]
    [path] = tmp_path.rglob("*.session")
    rewrites = 0
    for version in range(1, 20):
        before = path.stat().st_ino
        synced.clear()
        record = following(record)
        store.save(record, expected=version)
        rewritten = path.stat().st_ino != before
        assert synced == ([False, True] if rewritten else [False])
        rewrites += rewritten
    assert rewrites > 0


def test_lease_is_prolonged_again_and_again(store: SessionStore) -> None:
    """Its holder prolongs a lease as often as it likes, for times that take more or fewer digits."""
    assert {store.lease("sweep", 60 + number / 7) for number in range(50)} == {True}


def in_the_child(action: Callable[[], object]) -> None:
    """Fork, and see that *action* comes to an end in the child."""
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        with suppress(SessionConflict):
            action()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_memory_is_not_locked_in_a_forked_child() -> None:
    """A child that was forked in the middle of a save can save."""
    store = open_store("memory://")

    class Forking(dict[str, Any]):
        def __deepcopy__(self, memo: object) -> dict[str, Any]:
            in_the_child(lambda: store.save(make_record(2), expected=0))
            return dict(self)

    store.save(make_record(1, metadata=Forking(a=1)), expected=0)


def test_cache_is_not_locked_in_a_forked_child() -> None:
    """A child that was forked in the middle of a save can save the same session."""
    record = make_record()

    class Forking(SimpleCache):
        def add(self, key: str, value: Any, timeout: Any = None) -> bool:
            in_the_child(lambda: store.save(following(record), expected=1))
            return bool(super().add(key, value, timeout))

    store = open_store(Forking())
    store.save(record, expected=0)


def test_damaged_cache_entry_is_a_conflict() -> None:
    """A damaged entry has no version: nothing is saved over it, and nothing is deleted for the sake of its version."""
    cache, record = SimpleCache(), make_record()
    store = open_store(cache)
    store.save(record, expected=0)
    [key] = cache._cache
    cache.set(key, b"junk")
    with pytest.raises(SessionConflict):
        store.save(following(record), expected=1)
    assert store.delete(record.id, expected=1) is False


def test_large_session_is_appended(tmp_path: Path) -> None:
    """The file of a large session, too, takes several saves before it is rewritten."""
    store, record = open_store(f"file://{tmp_path}/sessions"), make_record(data=bytes(100_000))
    store.save(record, expected=0)
    [path] = tmp_path.rglob("*.session")
    files = [path.stat().st_ino]
    for version in range(1, 20):
        record = following(record)
        store.save(record, expected=version)
        files.append(path.stat().st_ino)
    assert 1 <= sum(before != after for before, after in pairwise(files)) < 5
    assert store.get(record.id) == record
