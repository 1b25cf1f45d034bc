"""What an attacker, a crash or a neighbour may try: each a way in that is closed."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import ormsgpack
import pytest
from flask import Flask, Response, session

from flask_persist_session import (
    ConfigError,
    SerializationError,
    SessionManager,
    SessionQuery,
    SessionStore,
    StoreUnavailable,
    open_store,
)
from flask_persist_session.serializers import Codec
from flask_persist_session.testing import following, make_record
from tests.conftest import Clock
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]


def manager_of(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


# What has ended stays ended -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["end", "delete"])
def test_clearing_and_refilling_does_not_revive_a_revoked_session(make_app: MakeApp, store_url: str, how: str) -> None:
    """A view that moves its data by clear and update stores nothing if the session was revoked meanwhile."""
    app = make_app(store_url)

    @app.get("/in")
    def sign_in() -> str:
        session["user"] = "Ada"
        return ""

    @app.get("/rotate")
    def rotate() -> str:
        kept = dict(session)
        session.clear()
        getattr(manager_of(app), how)(session.id)  # type: ignore[attr-defined]
        session.update(kept)
        return ""

    @app.get("/who")
    def who() -> str:
        return repr(session.get("user"))

    client = app.test_client()
    client.get("/in")
    assert client.get("/rotate").headers.getlist("Set-Cookie") == []
    assert client.get("/who").text == "None"
    assert manager_of(app).store.count(SessionQuery(state="active", now=manager_of(app).clock())) == 0


def test_a_session_that_this_process_cannot_decode_can_be_ended(store: SessionStore) -> None:
    """An operator with other settings revokes a session all the same."""
    web = SessionManager(store, Codec("pickle", keys=lambda: ["key of the application"]))
    admin = SessionManager(store)
    created = web.create({"a": 1})
    assert admin.end(created.id, "revoked") is True
    assert web.get(created.id) is None


def test_an_ended_file_keeps_no_data(new_url: Callable[[str], str]) -> None:
    """Neither the data nor a state before the end is left in the file of an ended session."""
    url = new_url("file")
    manager = SessionManager(open_store(url))
    created = manager.create({"secret": "TOPSECRET"})
    manager.end(created.id, "revoked")
    [path] = Path(url.removeprefix("file://")).rglob(f"{created.id}.session")
    content = path.read_bytes()
    assert b"TOPSECRET" not in content
    path.write_bytes(content[:-1] + b"\xff")
    assert manager.get(created.id) is None


# Records that are not what they should be -----------------------------------------------------------------------------


def test_a_file_with_another_record_harms_nobody(new_url: Callable[[str], str], tmp_path: Path) -> None:
    """A record under the wrong name is not believed, and deleting it removes nothing outside of the store."""
    url = new_url("file")
    store = open_store(url)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    record, other = make_record(), make_record(number=1)
    store.save(record, expected=0)
    store.save(other, expected=0)
    [path] = Path(url.removeprefix("file://")).rglob(f"{record.id}.session")
    [source] = Path(url.removeprefix("file://")).rglob(f"{other.id}.session")
    path.write_bytes(source.read_bytes())
    with pytest.raises(SerializationError):
        store.get(record.id)
    assert store.delete(record.id) is True
    assert store.get(other.id) == other
    assert precious.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"\x01" + ormsgpack.packb({"a": ormsgpack.Ext(11, ormsgpack.packb(10**9))}),
        b'\x02{"a":{" ba":1000000000}}',
        b'\x02{"a":{" ba":1099511627776}}',
    ],
)
def test_a_small_payload_takes_little_memory(payload: bytes) -> None:
    """A number in the place of bytes is damage, and not the size of something to make."""
    with pytest.raises(SerializationError):
        Codec().decode(payload)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan"), 1e300])
def test_a_time_beyond_all_dates_is_refused(store: SessionStore, wrong: float) -> None:
    """What no date can show is not stored, so no request can fail on it."""
    with pytest.raises(ValueError, match="moment"):
        store.save(replace(make_record(), expires_at=wrong), expected=0)


def test_tags_are_text(store: SessionStore) -> None:
    """A text in place of a list of tags, or a tag that is none, is refused."""
    for wrong in ("abc", [1]):
        with pytest.raises(ValueError, match="tags are"):
            SessionManager(store).create(tags=wrong)  # type: ignore[arg-type]


# Responses ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def app(make_app: MakeApp, clock: Clock) -> Flask:
    app = make_app(CountingStore(open_store("memory://")), PERSIST_SESSION_NO_STORE=True)
    manager_of(app).clock = clock

    @app.get("/set")
    def put() -> str:
        session["a"] = 1
        return ""

    @app.get("/untouched")
    def untouched() -> str:
        return ""

    @app.get("/public")
    def public() -> Response:
        response = Response("public")
        response.cache_control.public = True
        response.cache_control.max_age = 3600
        return response

    return app


def test_a_token_never_goes_out_for_everybody(app: Flask, clock: Clock) -> None:
    """A response that shared caches may keep carries no renewed cookie; the next one does, and is not kept."""
    client = app.test_client()
    client.get("/set")
    clock.advance(61)
    assert client.get("/public").headers.getlist("Set-Cookie") == []
    renewed = client.get("/untouched")
    assert renewed.headers.getlist("Set-Cookie") != []
    assert renewed.headers["Cache-Control"] == "no-store"


def test_an_old_cookie_renews_once_an_interval(app: Flask, clock: Clock) -> None:
    """Many requests with the same old cookie, as a page with many images sends them, write once."""
    client = app.test_client()
    client.get("/set")
    old = client.get_cookie("session").value  # type: ignore[union-attr]
    clock.advance(61)
    store = manager_of(app).store
    assert isinstance(store, CountingStore)
    store.operations.clear()
    for _ in range(5):
        client.set_cookie("session", old)
        assert client.get("/untouched").headers.getlist("Set-Cookie") != []
    assert store.operations["save"] == 1


def test_a_store_that_is_down_harms_no_request_that_only_hooks_touch(make_app: MakeApp) -> None:
    """An extension that looks at the session after each view does not make a page fail that does without."""
    store = CountingStore(open_store("memory://"))
    app = make_app(store, PROPAGATE_EXCEPTIONS=False)
    app.add_url_rule("/free", "free", lambda: "free")
    app.add_url_rule("/set", "set", lambda: session.update(a=1) or "set")

    @app.after_request
    def look(response: Response) -> Response:
        session.get("_remember")
        return response

    client = app.test_client()
    client.get("/set")

    def down(session_id: str) -> None:
        raise StoreUnavailable("switched off")

    store.get = down  # type: ignore[method-assign, assignment]
    assert client.get("/free").status_code == 200
    assert (client.get("/set").status_code, client.get("/set").headers["Retry-After"]) == (503, "5")


def test_a_page_of_the_application_keeps_retry_after(make_app: MakeApp) -> None:
    """An error page for 503 need not know when to come back."""
    app = make_app(CountingStore(open_store("memory://")))
    app.register_error_handler(503, lambda error: ("sorry", 503))

    @app.get("/fail")
    def fail() -> str:
        raise StoreUnavailable("switched off")

    response = app.test_client().get("/fail")
    assert (response.text, response.headers["Retry-After"]) == ("sorry", "5")


@pytest.mark.parametrize("wrong", ["old key", b"old key", [""]])
def test_fallback_keys_must_be_a_list(make_app: MakeApp, wrong: object) -> None:
    """Text in place of a list would make each of its letters a key."""
    with pytest.raises(ConfigError, match="SECRET_KEY_FALLBACKS is not a list"):
        make_app(SECRET_KEY_FALLBACKS=wrong)


def test_clearing_is_not_taken_back_by_modified(make_app: MakeApp) -> None:
    """``modified = False`` after ``clear()`` does not keep the user signed in."""
    app = make_app()
    app.add_url_rule("/set", "set", lambda: session.update(a=1) or "set")
    app.add_url_rule("/get", "get", lambda: repr(session.get("a")))

    @app.get("/out")
    def out() -> str:
        session.clear()
        session.modified = False
        return ""

    client = app.test_client()
    client.get("/set")
    client.get("/out")
    assert client.get("/get").text == "None"


# Files, databases, messages -------------------------------------------------------------------------------------------


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """Whoever can put files into the directory could plant sessions or links."""
    folder = tmp_path / "web"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others"):
        open_store(f"file://{tmp_path}")


def test_a_link_in_place_of_a_session_is_not_followed(new_url: Callable[[str], str], tmp_path: Path) -> None:
    """A link to another file is an error, and that file stays as it is."""
    url = new_url("file")
    store = open_store(url)
    record = make_record()
    store.save(record, expected=0)
    [path] = Path(url.removeprefix("file://")).rglob(f"{record.id}.session")
    target = tmp_path / "target"
    target.write_text("precious")
    path.unlink()
    path.symlink_to(target)
    for call in (lambda: store.get(record.id), lambda: store.save(following(record), expected=1)):
        with pytest.raises(Exception, match="session file"):
            call()
    assert target.read_text() == "precious"


def test_a_lock_that_is_held_is_waited_for_so_long(new_url: Callable[[str], str]) -> None:
    """A writer that hangs with the lock costs others their timeout, and no more."""
    import fcntl

    url = new_url("file")
    store = open_store(f"{url}?timeout=0.05")
    record = make_record()
    store.save(record, expected=0)
    [path] = Path(url.removeprefix("file://")).rglob(f"{record.id}.session")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="locked"):
            store.save(following(record), expected=1)
    store.save(following(record), expected=1)


def test_a_new_database_is_private(tmp_path: Path) -> None:
    """The file and the directories that are made for it belong to their user alone."""
    store = open_store(f"sqlite:///{tmp_path}/deep/down/sessions.db")
    store.save(make_record(), expected=0)
    for path in (tmp_path / "deep", tmp_path / "deep/down", tmp_path / "deep/down/sessions.db"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    store.close()


def test_sqlite_keeps_what_a_forked_process_saves(tmp_path: Path) -> None:
    """A daemon that was forked from a process that used the store saves where everybody reads, whoever closes first."""
    path = tmp_path / "sessions.db"
    store = open_store(f"sqlite:///{path}")
    store.save(make_record(), expected=0)
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        store.save(following(make_record()), expected=1)
        os.write(ready[1], b"1")
        os.read(go_on[0], 1)
        store.save(following(following(make_record())), expected=2)
        os._exit(0)
    os.read(ready[0], 1)
    store.close()
    with closing(sqlite3.connect(path)) as somebody:
        somebody.execute("SELECT count(*) FROM persist_session_web").fetchall()
    os.write(go_on[1], b"1")
    assert os.waitpid(child, 0)[1] == 0
    found = store.get(make_record().id)
    assert found is not None
    assert found.version == 3
    store.close()
    for end in (*ready, *go_on):
        os.close(end)


@pytest.mark.parametrize(
    "url",
    [
        "redis:user:geheim@host:6379/0",
        "redis://:12/geheim@host/0",
        "postgresql:u:geheim@h/x",
        "mysql:u:geheim@h/x",
        "memory:u:geheim@x",
        "redis://u:geheim@h/0?nosuch=1",
    ],
)
def test_no_message_shows_a_password(url: str) -> None:
    """However a URL is misspelled, what stands before the @ stays out of the error."""
    with pytest.raises(ConfigError) as raised:
        open_store(url)
    assert "geheim" not in str(raised.value)


def test_many_processes_open_a_new_directory_at_once(tmp_path: Path) -> None:
    """Starting together on a root that does not exist yet works for all of them."""
    from concurrent.futures import ThreadPoolExecutor

    def start(number: int) -> None:
        store = open_store(f"file://{tmp_path}/a/b/c{number % 3}")
        store.save(make_record(number), expected=0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(48)))
    assert os.path.isdir(tmp_path / "a/b/c0/web")
