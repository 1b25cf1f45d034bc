"""Coming from Flask-Session 0.8, the real one: nobody is signed out, and the old cookie opens nothing afterwards."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cachelib import FileSystemCache
from flask import Flask

from flask_persist_session import ConfigError, SessionManager, open_store
from flask_persist_session.exceptions import SerializationError
from flask_persist_session.origins import decode
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.servers import RedisServer
from tests.taken_over import ORIGINS, SECRET, Former, add_views, cookie_of, former_app, with_cookie

MakeApp = Callable[..., Flask]
MakeFormer = Callable[..., Former]


@pytest.fixture
def make_former(request: pytest.FixtureRequest, tmp_path: Path) -> MakeFormer:
    return lambda kind, **settings: former_app(request, tmp_path, kind, **settings)


@pytest.fixture
def make_ours(make_app: MakeApp) -> Callable[..., Flask]:
    """The same application on this extension, taking over from *urls*."""
    return lambda *urls, **settings: add_views(make_app(PERSIST_SESSION_UPGRADE_FROM=list(urls), **settings))


def manager_of(app: Flask) -> SessionManager:
    manager: SessionManager = app.extensions["persist_session"].manager
    return manager


def set_clock(app: Flask) -> Clock:
    """Give the manager of *app* a clock that stands at the real time, by which the others judge."""
    clock = Clock(time.time())
    manager_of(app).clock = clock
    return clock


FORMS = {
    f"{kind}{'-signed' * signed}-{form}": (kind, {"SESSION_USE_SIGNER": signed, "SESSION_SERIALIZATION_FORMAT": form})
    for kind, signed, form in itertools.product(ORIGINS, (False, True), ("msgpack", "json"))
    if form == "msgpack" or kind not in ("file", "cachelib")  # which pickle whatever the setting says
}


@pytest.mark.parametrize(("kind", "settings"), FORMS.values(), ids=FORMS)
def test_a_user_stays_signed_in(make_former: MakeFormer, make_ours: MakeApp, kind: str, settings: dict[str, Any]) -> None:
    """Whoever signed in on Flask-Session is signed in here, bound to the user, with a new cookie and all of the data."""
    former = make_former(kind, **settings)
    for path in "/login/Ada", "/put/color/blue", "/flash/hello", "/permanent":
        former.client.get(path)
    app = make_ours(former.url)
    client = with_cookie(app, old := cookie_of(former.client))
    assert client.get("/me").text == "Ada"
    assert client.get("/data").json == {"data": {"color": "blue"}, "permanent": True}
    assert client.get("/flashes").json == [["news", "hello"]]
    assert cookie_of(client) not in ("", old)
    assert [record.user_id for record in manager_of(app).find(state="active")] == ["Ada"]


@pytest.mark.parametrize("kind", ORIGINS)
def test_the_old_cookie_opens_nothing_afterwards(make_former: MakeFormer, make_ours: MakeApp, kind: str) -> None:
    """Neither here, now or after the grace or after signing out, nor with Flask-Session."""
    former = make_former(kind)
    former.client.get("/login/Ada")
    app, old = make_ours(former.url), cookie_of(former.client)
    client, clock = with_cookie(app, old), set_clock(app)
    assert client.get("/me").text == "Ada"
    replayed = with_cookie(app, old)
    assert (replayed.get("/me").text, cookie_of(replayed)) == ("nobody", old)
    clock.advance(31)
    assert replayed.get("/me").text == "nobody"
    client.get("/clear")
    assert replayed.get("/me").text == "nobody"
    assert with_cookie(former.app, old).get("/me").text == "nobody"


@pytest.mark.parametrize("kind", ORIGINS)
def test_a_cookie_that_differs_in_case_opens_nothing(make_former: MakeFormer, make_ours: MakeApp, kind: str) -> None:
    """Though a database may take its letters for the same."""
    former = make_former(kind)
    former.client.get("/login/Ada")
    old = cookie_of(former.client)
    app = make_ours(former.url)
    assert with_cookie(app, old.swapcase()).get("/me").text == "nobody"
    assert with_cookie(app, old).get("/me").text == "Ada"


def test_the_old_cookie_opens_nothing_though_its_record_could_not_be_removed(
    make_former: MakeFormer, make_ours: MakeApp
) -> None:
    """A process that dies, or a directory that cannot be written: what stands for the record here lives as long as it."""
    former = make_former("redis")
    former.client.get("/login/Ada")
    [key] = former.app.config["SESSION_REDIS"].keys(former.app.config["SESSION_KEY_PREFIX"] + "*")
    kept = former.app.config["SESSION_REDIS"].get(key)
    app, old = make_ours(former.url), cookie_of(former.client)
    clock = set_clock(app)
    assert with_cookie(app, old).get("/me").text == "Ada"
    former.app.config["SESSION_REDIS"].set(key, kept, ex=31 * 86400)
    for _ in range(30):
        clock.advance(86400)
        manager_of(app).cleanup()
        assert with_cookie(app, old).get("/me").text == "nobody"


def test_a_request_during_the_grace_does_not_sign_the_user_out(make_former: MakeFormer, make_ours: MakeApp) -> None:
    """It stores nothing and sets no cookie that would replace the new one in the browser."""
    former = make_former("redis")
    former.client.get("/login/Ada")
    app, old = make_ours(former.url), cookie_of(former.client)
    client = with_cookie(app, old)
    client.get("/me")
    late = with_cookie(app, old).get("/put/color/red")
    assert "Set-Cookie" not in late.headers
    assert client.get("/data").json["data"] == {}
    assert manager_of(app).stats().active == 1


def test_after_the_grace_a_visitor_with_the_old_cookie_can_start_anew(make_former: MakeFormer, make_ours: MakeApp) -> None:
    """The old cookie is then nothing at all, so a new session begins and replaces it."""
    former = make_former("redis")
    former.client.get("/login/Ada")
    app, old = make_ours(former.url), cookie_of(former.client)
    clock = set_clock(app)
    with_cookie(app, old).get("/me")
    clock.advance(31)
    client = with_cookie(app, old)
    client.get("/put/color/red")
    assert client.get("/data").json["data"] == {"color": "red"}


def test_signing_out_in_the_first_request_ends_the_old_session(make_former: MakeFormer, make_ours: MakeApp) -> None:
    """Nothing is taken over, the cookie goes, and the old record with it."""
    former = make_former("redis")
    former.client.get("/login/Ada")
    app, old = make_ours(former.url), cookie_of(former.client)
    client = with_cookie(app, old)
    client.get("/clear")
    assert cookie_of(client) == ""
    assert with_cookie(app, old).get("/me").text == "nobody"
    assert with_cookie(former.app, old).get("/me").text == "nobody"
    assert manager_of(app).stats().active == 0


@pytest.mark.parametrize("kind", ORIGINS)
def test_an_expired_session_is_not_taken_over(make_former: MakeFormer, make_ours: MakeApp, kind: str) -> None:
    """What Flask-Session would not open any more is not opened here."""
    former = make_former(kind, PERMANENT_SESSION_LIFETIME=1)
    former.client.get("/login/Ada")
    app = make_ours(former.url)
    set_clock(app).advance(2)
    if kind in ("redis", "memcached"):
        time.sleep(2.1)  # these expire by themselves, memcached in whole seconds
    assert with_cookie(app, cookie_of(former.client)).get("/me").text == "nobody"


def test_untouched_requests_cost_nothing(make_app: MakeApp) -> None:
    """A request that does not use the session asks neither store, takes nothing over and sets no cookie."""
    store = CountingStore(open_store("memory://"))
    # Nobody listens on that port: whoever asked would get a 503.
    app = make_app(store, PERSIST_SESSION_UPGRADE_FROM=["flask-session+memcached://127.0.0.1:1"])
    app.add_url_rule("/", view_func=lambda: "untouched")
    response = with_cookie(app, "a-session-id").get("/")
    assert (response.status_code, "Set-Cookie" in response.headers) == (200, False)
    assert not store.operations


def test_costs_of_taking_over(make_former: MakeFormer, make_ours: MakeApp) -> None:
    """One look here, one there; then the new session, what stands for the old one, and its removal."""
    former = make_former("redis")
    former.client.get("/login/Ada")
    store = CountingStore(open_store("memory://"))
    client = with_cookie(make_ours(former.url, PERSIST_SESSION_STORE=store), cookie_of(former.client))
    client.get("/me")
    assert store.operations == {"get": 1, "save": 2}
    store.operations.clear()
    client.get("/me")
    assert store.operations == {"get": 1}


def test_a_token_of_ours_never_asks_the_old_store(make_former: MakeFormer, make_ours: MakeApp, tmp_path: Path) -> None:
    """Once taken over, a session does without the old store, even if that is down."""
    server = RedisServer(tmp_path).start()
    app = make_ours(f"flask-session+{server.url}")
    client = app.test_client()
    client.get("/login/Ada")
    server.stop()
    assert client.get("/me").text == "Ada"
    manager_of(app).delete(next(manager_of(app).find(user_id="Ada")).id)
    assert client.get("/me").text == "nobody"


def test_an_old_store_that_hangs_means_a_503_for_those_who_need_it(make_ours: MakeApp, tmp_path: Path) -> None:
    """Old cookies get a 503 after a bounded wait and keep their session; the others go on."""
    server = RedisServer(tmp_path).start()
    try:
        server.client().set("session:zzz", json.dumps({"_user_id": "Ada"}))
        app = make_ours(f"flask-session+{server.url}?timeout=0.2")
        client = with_cookie(app, "zzz")
        server.pause()
        response = client.get("/me")
        assert (response.status_code, cookie_of(client)) == (503, "zzz")
        assert "Retry-After" in response.headers
        assert app.test_client().get("/me").status_code == 200
        server.resume()
        assert client.get("/me").text == "Ada"
    finally:
        server.stop()


@pytest.mark.parametrize(
    "url", ["sqlite:////{}/old.db", "memcached://127.0.0.1:1", "postgresql://127.0.0.1:1/gone", "mysql://127.0.0.1:1/gone"]
)
def test_other_old_stores_that_are_down_mean_a_503_too(make_ours: MakeApp, tmp_path: Path, url: str) -> None:
    """Whatever the driver says."""
    (tmp_path / "old.db").touch()
    app = make_ours(f"flask-session+{url.format(tmp_path)}")
    (tmp_path / "old.db").unlink()
    assert with_cookie(app, "zzz").get("/me").status_code == 503


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\xc1",
        b"{",
        b"\x93\x01\x02\x03",
        b"[1]",
        b'{"a": NaN',
        b"\x80\x04K\x01.",
        b"\x82\xa1a",
        b"\x81\x01\x02",
        pickle.dumps({"a": 1}),
        json.dumps({"a": "x" * 2_000_000}).encode(),
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b"\x81\xa1a" * 3000 + b"\x01",
    ],
    ids=lambda stored: repr(stored[:12]),
)
def test_a_record_that_cannot_be_read_is_logged_and_ignored(
    make_ours: MakeApp, redis_server: RedisServer, caplog: pytest.LogCaptureFixture, stored: bytes
) -> None:
    """Never a 500: its user is nobody, can sign in anew, and the record stays where it is."""
    key = f"bad{os.getpid()}:zzz"
    redis_server.client().set(key, stored)
    client = with_cookie(make_ours(f"flask-session+{redis_server.url}?prefix=bad{os.getpid()}:"), "zzz")
    assert client.get("/me").text == "nobody"
    assert "not taken over" in caplog.text
    assert "zzz" not in caplog.text
    client.get("/login/Ada")
    assert client.get("/me").text == "Ada"
    assert redis_server.client().get(key) == stored
    redis_server.client().delete(key)


def test_a_key_of_another_type_is_logged_and_ignored(make_ours: MakeApp, redis_server: RedisServer) -> None:
    """A list where a session should be is no session."""
    redis_server.client().rpush(f"list{os.getpid()}:zzz", "x")
    client = with_cookie(make_ours(f"flask-session+{redis_server.url}?prefix=list{os.getpid()}:"), "zzz")
    assert client.get("/me").text == "nobody"
    redis_server.client().delete(f"list{os.getpid()}:zzz")


def test_a_session_that_is_to_last_beyond_all_dates_is_taken_over(make_ours: MakeApp, redis_server: RedisServer) -> None:
    """As one that lasts for a hundred years; its old cookie opens nothing for as long."""
    prefix = f"far{os.getpid()}:"
    client = redis_server.client()
    client.set(f"{prefix}zzz", b'{"_user_id": "Ada"}', px=10**16)
    app = make_ours(f"flask-session+{redis_server.url}?prefix={prefix}")
    ours = with_cookie(app, "zzz")
    assert [ours.get("/me").text for _ in range(2)] == ["Ada", "Ada"]
    client.set(f"{prefix}zzz", b'{"_user_id": "Ada"}')
    assert with_cookie(app, "zzz").get("/me").text == "nobody"
    client.delete(f"{prefix}zzz")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (f"{os.environ['EVIL']}/evil",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where pickle is asked for, only plain values are read."""
    monkeypatch.setenv("EVIL", str(tmp_path))
    for allow in False, True:
        with pytest.raises(SerializationError):
            decode(pickle.dumps({"a": Evil()}), allow_pickle=allow)
    assert not (tmp_path / "evil").exists()


def test_a_pickle_is_read_only_where_it_is_asked_for() -> None:
    """And then with the types that a session keeps."""
    import datetime
    import decimal
    import uuid

    data = {"a": {1, 2}, "b": datetime.datetime.now(datetime.timezone.utc), "c": decimal.Decimal("1.5"), "d": uuid.uuid4()}
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        assert decode(pickle.dumps(data, protocol), allow_pickle=True) == data
    with pytest.raises(SerializationError, match="pickle=1"):
        decode(pickle.dumps(data), allow_pickle=False)


@pytest.mark.parametrize("cookie", ["x" * 5000, "..", "a.b.c", "*", "a/../b", "%00", "-" * 300, "ü", "abc."])
def test_a_cookie_that_is_none_of_theirs_asks_no_store(make_ours: MakeApp, tmp_path: Path, cookie: str) -> None:
    """Huge and strange cookies are refused by their form; the store, which is down, is not asked."""
    app = make_ours("flask-session+memcached://127.0.0.1:1")
    header = {"Cookie": f"session={cookie}"}
    assert app.test_client(use_cookies=False).get("/me", headers=header).text == "nobody"


def test_a_tampered_signature_is_refused(make_former: MakeFormer, make_ours: MakeApp) -> None:
    """And, where cookies were signed, an id without a signature, as a copy of the store would give it."""
    former = make_former("redis", SESSION_USE_SIGNER=True)
    former.client.get("/login/Ada")
    app, old = make_ours(former.url), cookie_of(former.client)
    sid, _, signature = old.rpartition(".")
    for cookie in sid, f"{sid}.{signature[::-1]}", f"x{sid}.{signature}":
        assert with_cookie(app, cookie).get("/me").text == "nobody"
    assert with_cookie(app, old).get("/me").text == "Ada"


def test_a_signature_by_an_old_secret_key_is_accepted(make_former: MakeFormer, make_ours: MakeApp) -> None:
    """The fallbacks of the secret key count, as everywhere."""
    former = make_former("redis", SESSION_USE_SIGNER=True)
    former.client.get("/login/Ada")
    app = make_ours(former.url, SECRET_KEY="a new secret", SECRET_KEY_FALLBACKS=[SECRET])
    assert with_cookie(app, cookie_of(former.client)).get("/me").text == "Ada"


def test_files_of_older_cachelib_are_found(make_ours: MakeApp, tmp_path: Path) -> None:
    """Older versions of cachelib name the file by MD5, newer ones by SHA-256."""
    FileSystemCache(str(tmp_path / "old"), hash_method=hashlib.md5).set("session:zzz", {"_user_id": "Ada"}, 60)
    app = make_ours(f"flask-session+file://{tmp_path}/old?pickle=1")
    assert with_cookie(app, "zzz").get("/me").text == "Ada"
    assert with_cookie(app, "zzz").get("/me").text == "nobody"


@pytest.mark.parametrize("content", [b"", b"ab", struct.pack("I", 0), struct.pack("I", 0) + b"\x80\x04junk"])
def test_damaged_files_are_logged_and_ignored(make_ours: MakeApp, tmp_path: Path, content: bytes) -> None:
    """Cut off or overwritten."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / hashlib.sha256(b"session:zzz").hexdigest()).write_bytes(content)
    app = make_ours(f"flask-session+file://{tmp_path}/old?pickle=1")
    assert with_cookie(app, "zzz").get("/me").text == "nobody"


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("flask", r'write \["flask"\]'),
        ([""], "list of texts"),
        (["flaks"], "neither"),
        (["flask-session+nosuch://host"], "unknown scheme"),
        (["flask-session+mongodb://u:secret@host"], "in mongodb cannot be read; leave the entry out"),
        (
            ["flask-session+oracle://u:secret@host/db"],
            "in oracle cannot be read; copy its table to SQLite, PostgreSQL or MySQL",
        ),
        (["flask-session+mssql+pyodbc://u:secret@host/db"], "in mssql cannot be read"),
        (["flask-session+mysql+pymysql://u:secret@host/db"], r"write flask-session\+mysql: without \+pymysql"),
        (["flask-session+mysql://u:secret@host/db?charset=latin1"], "unknown option 'charset'"),
        (["flask-session+postgresql+psycopg2://u:secret@host/db"], r"write flask-session\+postgresql: without \+psycopg2"),
        (["flask-session+redis://host?nosuch=1"], "allowed is .*prefix, signed, pickle"),
        (["flask-session+file:///nowhere?pickle=1"], "no directory /nowhere"),
        (["flask-session+file:///tmp"], "pickle=1"),
        (["flask-session+sqlite:////nowhere.db"], "no file /nowhere.db"),
        (["flask-session+redis://host?signed=yes"], "0 or 1"),
        (["flask-session+memcached://"], "names no server"),
        (["flask-session+postgresql://u:secret@host/db?table=a;b"], "name of a table"),
    ],
)
def test_a_wrong_setting_is_told_at_once(make_app: MakeApp, setting: Any, message: str) -> None:
    """With the setting's name and what to write, and without a password."""
    with pytest.raises(ConfigError, match=message) as raised:
        make_app(PERSIST_SESSION_UPGRADE_FROM=setting)
    assert "PERSIST_SESSION_UPGRADE_FROM" in str(raised.value)
    assert "secret" not in str(raised.value)
