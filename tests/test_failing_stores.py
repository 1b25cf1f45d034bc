"""Stores that cannot be reached, hang, forget, or have no room: an error in bounded time, and then they work again."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from flask import Flask, Response, redirect, session
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from flask_persist_session import (
    ConfigError,
    PersistSession,
    SessionRecord,
    StoreError,
    StoreUnavailable,
    open_store,
)

# Imported here because a child that has given up its rights may not be able to read them any more.
from flask_persist_session.stores import file, sql  # noqa: F401
from flask_persist_session.tokens import TokenSigner, make_token
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.servers import MySQLServer, RedisServer, connect_to_mysql, free_port
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]
#: Far more than any of the timeouts below, far less than waiting for good.
PATIENCE = 5.0


def with_views(app: Flask) -> Flask:
    @app.get("/read")
    def read() -> str:
        return session.get("name", "nobody")

    @app.get("/write/<name>")
    def write(name: str) -> str:
        session["name"] = name
        return name

    @app.get("/sign-in/<name>")
    def sign_in(name: str) -> Any:
        session["name"] = name
        return redirect("/read")

    @app.get("/download")
    def download() -> Response:
        session["name"] = "downloader"
        headers = {
            "Accept-Ranges": "bytes",
            "Cache-Control": "public, max-age=3600",
            "Content-Disposition": "attachment",
            "Content-Language": "de",
            "Content-Range": "bytes 0-7/8",
            "Expires": "Thu, 01 Jan 2099 00:00:00 GMT",
            "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
        }
        answer = Response("the file", 206, headers, mimetype="application/pdf")
        answer.set_etag("of the file")
        answer.set_cookie("seen", "yes")
        return answer

    @app.get("/untouched")
    def untouched() -> str:
        return "no session"

    return app


@pytest.fixture
def make_site(make_app: MakeApp) -> Callable[..., Flask]:
    """Makes an application with the views of these tests that answers errors as in production."""

    def make(store: Any, **settings: Any) -> Flask:
        return with_views(make_app(store, TESTING=False, **settings))

    return make


def ask(client: FlaskClient, path: str, patience: float = PATIENCE) -> TestResponse:
    """Ask, and see that the answer does not take for ever."""
    start = time.monotonic()
    answer = client.get(path)
    assert time.monotonic() - start < patience
    return answer


def url_of_nobody() -> str:
    """The URL of a Redis server that nobody runs."""
    return f"redis://127.0.0.1:{free_port()}/0?timeout=0.3"


def assert_unavailable(answer: TestResponse) -> None:
    """The answer says that the store is down for now, and nothing that belongs to a success."""
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert "Set-Cookie" not in answer.headers


# Redis ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis server that a test may break."""
    own = RedisServer(tmp_path).start()
    yield own
    own.stop()


@pytest.fixture
def app(server: RedisServer, make_site: Callable[..., Flask]) -> Flask:
    return make_site(f"{server.url}?timeout=0.3")


@pytest.fixture
def ada(app: Flask) -> FlaskClient:
    """A browser whose session holds the name Ada."""
    client = app.test_client()
    assert client.get("/write/Ada").status_code == 200
    return client


@contextmanager
def stopped(server: RedisServer) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextmanager
def hanging(server: RedisServer) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


OUTAGES = {"refuses": stopped, "hangs": hanging}


@pytest.fixture(params=OUTAGES.values(), ids=OUTAGES)
def outage(request: pytest.FixtureRequest) -> Callable[[RedisServer], Any]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", ["/read", "/write/Grace", "/sign-in/Grace", "/download"])
def test_needed_store_that_is_down(
    server: RedisServer, ada: FlaskClient, outage: Callable[[RedisServer], Any], path: str
) -> None:
    """While Redis refuses or hangs, a request that needs the session is answered with 503 and Retry-After, in time."""
    with outage(server):
        assert_unavailable(ask(ada, path))


def test_new_session_while_the_store_is_down(server: RedisServer, app: Flask, outage: Callable[[RedisServer], Any]) -> None:
    """A new session that cannot be stored is no success and gets no cookie."""
    with outage(server):
        assert_unavailable(ask(app.test_client(), "/write/Grace"))


def test_untouched_session_while_the_store_is_down(
    server: RedisServer, ada: FlaskClient, outage: Callable[[RedisServer], Any]
) -> None:
    """A request that does not touch the session is answered as ever while Redis is down."""
    with outage(server):
        assert ask(ada, "/untouched").status_code == 200


def test_due_renewal_while_the_store_is_down(
    server: RedisServer, app: Flask, ada: FlaskClient, outage: Callable[[RedisServer], Any]
) -> None:
    """A renewal that is due does not make a request need the store that does not touch the session."""
    with app.app_context():
        PersistSession().manager.clock = lambda: time.time() + 61
    with outage(server):
        answer = ask(ada, "/untouched")
    assert answer.status_code == 200
    assert answer.text == "no session"


def test_renewal_is_made_up_for(server: RedisServer, app: Flask, clock: Clock) -> None:
    """A renewal that could not be made during an outage is made within a minute after it."""
    with app.app_context():
        PersistSession().manager.clock = clock
    client = app.test_client()
    client.get("/write/Ada")
    clock.advance(61)
    with hanging(server):
        client.get("/untouched")
    clock.advance(60)
    assert "Set-Cookie" in client.get("/untouched").headers


def test_works_again_after_hanging(server: RedisServer, app: Flask, ada: FlaskClient) -> None:
    """After a server that hung goes on, every session is read as its own again, without a restart."""
    grace = app.test_client()
    grace.get("/write/Grace")
    with hanging(server):
        ask(ada, "/read")
        ask(grace, "/read")
    assert [client.get("/read").text for client in (ada, grace, ada)] == ["Ada", "Grace", "Ada"]


def test_works_again_after_a_restart(server: RedisServer, ada: FlaskClient) -> None:
    """After a server was started again, without data and without scripts, sessions are stored and read at once."""
    with stopped(server):
        ask(ada, "/read")
    assert ada.get("/write/Grace").status_code == 200
    assert ada.get("/read").text == "Grace"


def test_quick_restart_is_not_noticed(server: RedisServer, ada: FlaskClient) -> None:
    """Connections that a restart closed cost no request an error."""
    with stopped(server):
        pass
    assert ada.get("/read").status_code == 200
    assert ada.get("/write/Grace").status_code == 200


def test_closed_connection_is_not_noticed(server: RedisServer, ada: FlaskClient) -> None:
    """A connection that the server closed is opened anew within the request."""
    with server.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    assert ada.get("/read").text == "Ada"
    assert ada.get("/write/Grace").status_code == 200


def test_setting_up_needs_no_server(make_site: Callable[..., Flask]) -> None:
    """An application starts while its store is down, and answers what needs no session."""
    client = make_site(url_of_nobody()).test_client()
    assert ask(client, "/untouched").status_code == 200
    assert_unavailable(ask(client, "/write/Ada"))


def test_lost_scripts_are_not_noticed(server: RedisServer, ada: FlaskClient) -> None:
    """After SCRIPT FLUSH sessions are saved, deleted and listed as before."""
    with server.client() as client:
        client.script_flush()
        assert ada.get("/write/Grace").status_code == 200
        client.script_flush()
        with ada.application.app_context():
            manager = PersistSession().manager
            [record] = manager.store.scan()
            client.script_flush()
            assert manager.delete(record.id)
    assert ada.get("/read").text == "nobody"


def test_out_of_memory_is_told(server: RedisServer, ada: FlaskClient) -> None:
    """A server that is out of memory takes no save: the answer is a 503, and what was stored is read."""
    with server.client() as client:
        client.config_set("maxmemory", 1)
        assert_unavailable(ask(ada, "/write/Grace"))
        assert ada.get("/read").text == "Ada"
        client.config_set("maxmemory", 0)
    assert ada.get("/write/Grace").status_code == 200
    assert ada.get("/read").text == "Grace"


def test_new_session_out_of_memory_is_told(server: RedisServer, app: Flask) -> None:
    """A server that is out of memory takes no new session: the answer is a 503 without a cookie."""
    with server.client() as client:
        client.config_set("maxmemory", 1)
        assert_unavailable(ask(app.test_client(), "/write/Grace"))


def test_server_that_became_a_replica(server: RedisServer, ada: FlaskClient) -> None:
    """A server that takes no writes because another is the primary now is unavailable until that has changed."""
    with server.client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
        assert_unavailable(ask(ada, "/write/Grace"))
        client.replicaof("NO", "ONE")
    assert ada.get("/read").text == "Ada"
    assert ada.get("/write/Grace").status_code == 200


# What the application makes of it -------------------------------------------------------------------------------------


@pytest.fixture
def down(make_site: Callable[..., Flask]) -> Flask:
    """An application whose store refuses from the start."""
    return make_site(url_of_nobody())


def with_a_cookie(app: Flask) -> FlaskClient:
    """A browser whose cookie is good, so that the store must be asked."""
    client = app.test_client()
    client.set_cookie("session", TokenSigner([app.config["SECRET_KEY"]], time.time).sign(make_token("000")))
    return client


@pytest.fixture(params=[with_a_cookie, Flask.test_client], ids=["reading", "saving"])
def browser(request: pytest.FixtureRequest) -> Callable[[Flask], FlaskClient]:
    """Makes a browser for which writing fails when the session is read, or only when it is saved."""
    return request.param  # type: ignore[no-any-return]


def test_handler_of_503_is_used(down: Flask, browser: Callable[[Flask], FlaskClient]) -> None:
    """An application's own page for 503 is shown, whether reading or saving fails."""
    down.register_error_handler(503, lambda error: ("back soon", 503, {"Retry-After": "7"}))
    answer = ask(browser(down), "/write/Ada")
    assert (answer.status_code, answer.text, answer.headers["Retry-After"]) == (503, "back soon", "7")


@pytest.mark.parametrize("before", [True, False])
def test_handler_of_the_error_is_used(before: bool, browser: Callable[[Flask], FlaskClient]) -> None:
    """An application's handler for StoreUnavailable answers, whether it is registered before the extension or after."""
    app = Flask("tested")
    app.config.update(SECRET_KEY="a secret for tests", PERSIST_SESSION_STORE=url_of_nobody())
    steps = [
        lambda: app.register_error_handler(StoreUnavailable, lambda error: (f"down: {type(error).__name__}", 599)),
        lambda: PersistSession(with_views(app)),
    ]
    for step in steps if before else reversed(steps):
        step()
    answer = ask(browser(app), "/write/Ada")
    assert (answer.status_code, answer.text) == (599, "down: StoreUnavailable")


def test_handler_that_reads_the_session(down: Flask, browser: Callable[[Flask], FlaskClient]) -> None:
    """A page for 503 whose layout asks for the session is still a 503."""
    down.register_error_handler(503, lambda error: (f"sorry, {session.get('name', 'nobody')}", 503))
    assert ask(browser(down), "/write/Ada").status_code == 503


def test_store_that_is_down_is_asked_once(make_site: Callable[..., Flask]) -> None:
    """A request whose session could not be read does not wait for the store a second time when it ends."""
    counting = CountingStore(open_store(url_of_nobody()))
    app = make_site(counting)
    client = with_a_cookie(app)
    with app.app_context():
        PersistSession().manager.clock = lambda: time.time() + 61
    assert_unavailable(ask(client, "/read"))
    assert counting.operations == {"get": 1}


def test_headers_of_the_old_body_are_gone(down: Flask) -> None:
    """When the save fails, no header stays that described the body which is not sent."""
    answer = ask(down.test_client(), "/download")
    assert_unavailable(answer)
    assert "the file" not in answer.text
    assert answer.content_type.startswith("text/html")
    assert answer.content_length == len(answer.data)
    gone = ["Accept-Ranges", "Content-Disposition", "Content-Language", "Content-Range", "ETag", "Last-Modified"]
    assert [name for name in (*gone, "Expires") if name in answer.headers] == []
    assert answer.headers["Cache-Control"] == "no-store"


def test_redirect_is_not_followed(down: Flask) -> None:
    """A sign-in that cannot be stored does not send the browser on."""
    answer = ask(down.test_client(), "/sign-in/Ada")
    assert_unavailable(answer)
    assert "Location" not in answer.headers


def test_head_is_unavailable_too(down: Flask) -> None:
    """A HEAD request whose session cannot be stored has the status of the error."""
    assert down.test_client().head("/write/Ada").status_code == 503


# SQLite ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another connection holds the database for writing."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def test_locked_sqlite_takes_no_save(make_site: Callable[..., Flask], database: Path) -> None:
    """A database locked for longer than the timeout answers a save with 503; reading goes on, and later saving."""
    client = make_site(f"sqlite:///{database}?timeout=0.2").test_client()
    client.get("/write/Ada")
    with locked(database):
        assert_unavailable(ask(client, "/write/Grace"))
        assert client.get("/read").text == "Ada"
    assert client.get("/write/Grace").status_code == 200
    assert client.get("/read").text == "Grace"


def test_sqlite_locked_for_a_moment_is_waited_for(make_site: Callable[..., Flask], database: Path) -> None:
    """A lock that ends within the timeout costs no error."""
    client = make_site(f"sqlite:///{database}?timeout=5").test_client()
    client.get("/write/Ada")
    taken, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(database):
            taken.set()
            enough.wait(0.2)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    assert client.get("/write/Grace").status_code == 200
    enough.set()
    holder.join()


def test_sqlite_locked_at_the_first_request(make_site: Callable[..., Flask], database: Path) -> None:
    """A new database that somebody else holds is unavailable in bounded time, and is set up later."""
    client = make_site(f"sqlite:///{database}?timeout=0.1").test_client()
    with locked(database):
        assert_unavailable(ask(client, "/write/Ada", patience=2.0))
    assert client.get("/write/Ada").status_code == 200


def test_lost_table_is_an_error_of_the_server(make_site: Callable[..., Flask], database: Path) -> None:
    """A failure that does not pass by itself is a 500 and no success, has no cookie, and works again once it is mended."""
    client = make_site(f"sqlite:///{database}").test_client()
    client.get("/write/Ada")
    with closing(sqlite3.connect(database)) as other:
        other.execute("ALTER TABLE persist_session_web RENAME TO lost")
        for path in ("/read", "/write/Grace", "/download"):
            answer = client.get(path)
            assert answer.status_code == 500
            assert "Set-Cookie" not in answer.headers
        assert client.get("/untouched").status_code == 200
        other.execute("ALTER TABLE lost RENAME TO persist_session_web")
    assert client.get("/read").text == "Ada"


def test_file_that_is_no_database(make_site: Callable[..., Flask], database: Path) -> None:
    """A file that holds something else is never written over: each request that needs the session is a 500."""
    database.write_bytes(b"something else\n" * 100)
    assert make_site(f"sqlite:///{database}").test_client().get("/write/Ada").status_code == 500
    assert database.read_bytes() == b"something else\n" * 100


# PostgreSQL -----------------------------------------------------------------------------------------------------------


@contextmanager
def administrator(url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def backends(connection: psycopg.Connection[Any]) -> list[int]:
    """The server processes of all other connections to this database."""
    found = connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )
    return [pid for (pid,) in found]


def test_terminated_connection_costs_one_request(make_site: Callable[..., Flask], new_url: Callable[[str], str]) -> None:
    """When the server ends our connection, at most one request fails, with 503, and the next ones work."""
    url = new_url("postgresql")
    client = make_site(url).test_client()
    client.get("/write/Ada")
    with administrator(url) as connection:
        ended = [
            connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,)).fetchone() for pid in backends(connection)
        ]
    assert ended == [(True,)]
    first = client.get("/read")
    assert first.status_code in (200, 503)
    assert client.get("/read").text == "Ada"
    assert client.get("/write/Grace").status_code == 200


def test_locked_postgresql_is_unavailable(make_site: Callable[..., Flask], new_url: Callable[[str], str]) -> None:
    """A table that somebody locks for longer than the timeout is unavailable in bounded time, and works again later."""
    url = new_url("postgresql")
    client = make_site(f"{url}&timeout=0.3").test_client()
    client.get("/write/Ada")
    with administrator(url) as connection, connection.transaction():
        connection.execute("LOCK TABLE persist_session_web")
        assert_unavailable(ask(client, "/read"))
        assert_unavailable(ask(client, "/write/Grace"))
    assert client.get("/read").text == "Ada"
    assert client.get("/write/Grace").status_code == 200


def test_hanging_postgresql_is_unavailable(make_site: Callable[..., Flask], new_url: Callable[[str], str]) -> None:
    """A server process that never answers is unavailable in bounded time."""
    url = new_url("postgresql")
    client = make_site(f"{url}&timeout=0.3").test_client()
    client.get("/write/Ada")
    with administrator(url) as connection:
        [pid] = backends(connection)
    os.kill(pid, signal.SIGSTOP)
    rescue = threading.Timer(PATIENCE - 2, os.kill, (pid, signal.SIGCONT))
    rescue.start()
    try:
        assert_unavailable(ask(client, "/read"))
    finally:
        rescue.cancel()
        os.kill(pid, signal.SIGCONT)


def test_postgresql_that_refuses(make_site: Callable[..., Flask]) -> None:
    """A server that nobody runs is unavailable in bounded time."""
    client = make_site(f"postgresql://nobody@127.0.0.1:{free_port()}/none?timeout=1").test_client()
    assert_unavailable(ask(client, "/write/Ada"))
    assert ask(client, "/untouched").status_code == 200


# MySQL ----------------------------------------------------------------------------------------------------------------


def test_ended_mysql_connection_costs_one_request(
    make_site: Callable[..., Flask], new_url: Callable[[str], str], mysql_server: MySQLServer
) -> None:
    """When the server ends our connection, reading goes on with a new one."""
    url = new_url("mysql")
    client = make_site(url).test_client()
    client.get("/write/Ada")
    for (number,) in mysql_server.connections(url):
        mysql_server.execute(f"KILL {number}")
    assert client.get("/read").text == "Ada"
    assert client.get("/write/Grace").status_code == 200


def test_locked_mysql_is_unavailable(make_site: Callable[..., Flask], new_url: Callable[[str], str]) -> None:
    """A table that somebody locks for longer than the timeout is unavailable in bounded time, and works again later."""
    url = new_url("mysql")
    client = make_site(f"{url}&timeout=1").test_client()
    client.get("/write/Ada")
    with connect_to_mysql(url) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLES persist_session_web WRITE")
        assert_unavailable(ask(client, "/read"))
        assert_unavailable(ask(client, "/write/Grace"))
    assert client.get("/read").text == "Ada"
    assert client.get("/write/Grace").status_code == 200


def test_locked_mysql_session_is_unavailable(make_site: Callable[..., Flask], new_url: Callable[[str], str]) -> None:
    """A session whose row somebody keeps locked can be read all the time, and written again later."""
    url = new_url("mysql")
    client = make_site(f"{url}&timeout=1").test_client()
    client.get("/write/Ada")
    with connect_to_mysql(url) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT 1 FROM persist_session_web FOR UPDATE")
        assert ask(client, "/read").text == "Ada"
        assert_unavailable(ask(client, "/write/Grace"))
    assert client.get("/write/Grace").status_code == 200


def test_hanging_mysql_is_unavailable(
    make_site: Callable[..., Flask], new_url: Callable[[str], str], mysql_server: MySQLServer
) -> None:
    """A server that never answers is unavailable in bounded time, whether there is a connection to it or not."""
    client = make_site(f"{new_url('mysql')}&timeout=0.3").test_client()
    client.get("/write/Ada")
    rescue = threading.Timer(2 * PATIENCE, mysql_server.resume)
    mysql_server.pause()
    rescue.start()
    try:
        assert_unavailable(ask(client, "/read"))
        assert_unavailable(ask(client, "/read"))
    finally:
        rescue.cancel()
        mysql_server.resume()
    assert client.get("/read").text == "Ada"


def test_mysql_that_refuses(make_site: Callable[..., Flask]) -> None:
    """A server that nobody runs is unavailable in bounded time."""
    client = make_site(f"mysql://nobody@127.0.0.1:{free_port()}/none?timeout=1").test_client()
    assert_unavailable(ask(client, "/write/Ada"))
    assert ask(client, "/untouched").status_code == 200


@pytest.mark.parametrize(("wrong", "told"), [("nobody:geheim@", "Access denied"), ("root@", "Unknown database")])
def test_mysql_that_lets_nobody_in(
    make_site: Callable[..., Flask], new_url: Callable[[str], str], caplog: pytest.LogCaptureFixture, wrong: str, told: str
) -> None:
    """A user or database that is not there is an error that says so, without the password, and does not ask to retry."""
    url = new_url("mysql").replace("root@", wrong)
    answer = make_site(url.replace("/test", "/none")).test_client().get("/write/Ada")
    assert answer.status_code == 500
    assert told in caplog.text
    assert "geheim" not in caplog.text


# A full disk ----------------------------------------------------------------------------------------------------------


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What *function* returns, or raises, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(function, *arguments).result(timeout=60)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let every write beyond *size* fail, as it does on a full disk. Python ignores the signal that comes with it."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def record_of(number: int, data: bytes, version: int = 1) -> SessionRecord:
    return SessionRecord(
        id=f"{number:067x}",
        user_id=None,
        tenant_id=None,
        tags=frozenset(),
        metadata={},
        data=data,
        created_at=1.0,
        accessed_at=1.0,
        expires_at=2.0,
        ended_at=None,
        end_reason=None,
        version=version,
    )


def fails(save: Callable[[], None]) -> bool:
    try:
        save()
    except StoreError:
        return True
    return False


def size_of_the_largest_file(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill_up(url: str, folder: Path) -> dict[str, Any]:
    """Save, fail to save and to create for want of room, and save again."""
    store = open_store(url)
    first = record_of(1, b"before")
    second = replace(first, data=b"x" * 500_000, version=2)
    store.save(first, expected=0)
    with files_no_larger_than(size_of_the_largest_file(folder) + 100):
        update = fails(lambda: store.save(second, expected=1))
        creation = fails(lambda: store.save(record_of(2, b"x" * 500_000), expected=0))
        told = {"update fails": update, "creation fails": creation, "during": store.get(first.id)}
        told["created"] = store.get(record_of(2, b"").id)
    told["after"] = open_store(url).get(first.id)
    store.save(second, expected=1)
    store.save(record_of(2, b"room"), expected=0)
    return told | {"first": first, "saved": store.get(first.id) == second, "count": len(list(store.scan()))}


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_full_disk(kind: str, new_url: Callable[[str], str], tmp_path: Path) -> None:
    """On a full disk saving and creating fail, what was stored stays readable, and with room again all is saved."""
    told = in_child(fill_up, new_url(kind), tmp_path)
    first = told.pop("first")
    assert told == {
        "update fails": True,
        "creation fails": True,
        "during": first,
        "created": None,
        "after": first,
        "saved": True,
        "count": 2,
    }


def fill_up_in_a_rewrite(url: str, folder: Path) -> dict[str, Any]:
    """Save until the next save rewrites the file, and let that one fail in the middle."""
    store = open_store(url)
    record = record_of(1, os.urandom(3000))
    store.save(record, expected=0)
    size = 0
    while size_of_the_largest_file(folder) > size:
        size, before = size_of_the_largest_file(folder), record
        content = next(path.read_bytes() for path in folder.rglob("*.session"))
        record = replace(record, data=os.urandom(3000), version=record.version + 1)
        store.save(record, expected=before.version)
    # The last save was a rewrite. Go back to the moment before it.
    [path] = folder.rglob("*.session")
    path.write_bytes(content)
    with files_no_larger_than(1000):
        failed = fails(lambda: store.save(record, expected=before.version))
        told = {"fails": failed, "during": store.get(record.id) == before, "content": path.read_bytes() == content}
    told["files"] = [path.name for path in folder.rglob("*") if path.is_file()] == [path.name]
    store.save(record, expected=before.version)
    return told | {"saved": store.get(record.id) == record, "rewritten": path.stat().st_size < size}


def test_full_disk_in_a_rewrite(new_url: Callable[[str], str], tmp_path: Path) -> None:
    """A rewrite of a session's file that runs out of room leaves the file as it was and nothing beside it."""
    told = in_child(fill_up_in_a_rewrite, new_url("file"), tmp_path)
    assert told == dict.fromkeys(("fails", "during", "content", "files", "saved", "rewritten"), True)


def create_without_room(url: str, folder: Path) -> list[str]:
    store = open_store(url)
    with files_no_larger_than(10):
        assert fails(lambda: store.save(record_of(1, b"x" * 1000), expected=0))
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_failed_creation_leaves_no_file(new_url: Callable[[str], str], tmp_path: Path) -> None:
    """A session that could not be created for want of room leaves no file that nobody would ever remove."""
    assert in_child(create_without_room, new_url("file"), tmp_path) == []


def ask_without_room(url: str, folder: Path) -> list[tuple[int, str, bool]]:
    app = with_views(Flask("tested"))
    app.config.update(SECRET_KEY="k", PERSIST_SESSION_STORE=url)
    sessions = PersistSession(app)
    with app.app_context():
        clock = Clock(time.time())
        sessions.manager.clock = clock
    client = app.test_client()
    answers = [client.get("/write/Ada")]
    with files_no_larger_than(size_of_the_largest_file(folder)):
        answers += [client.get("/write/" + "G" * 9000), client.get("/read"), client.get("/untouched")]
        clock.advance(61)
        answers += [client.get("/read"), client.get("/untouched")]
    answers += [client.get("/write/Grace"), client.get("/read")]
    return [(answer.status_code, answer.text[:20], "Set-Cookie" in answer.headers) for answer in answers]


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_full_disk_in_requests(kind: str, new_url: Callable[[str], str], tmp_path: Path) -> None:
    """On a full disk a request that writes is no success; those that read go on, even when their renewal is due."""
    first, failed, *others = in_child(ask_without_room, new_url(kind), tmp_path)
    assert first == (200, "Ada", True)
    assert failed[0] in (500, 503)
    assert failed[2] is False
    reading = [(200, "Ada"), (200, "no session")] * 2
    assert [answer[:2] for answer in others] == [*reading, (200, "Grace"), (200, "Grace")]


# Places that cannot be written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite:///{}/sessions.db", "file://{}/sessions"])
def test_place_below_a_file(make_site: Callable[..., Flask], tmp_path: Path, url: str) -> None:
    """A database or directory below a regular file is refused when the extension is set up, naming the place."""
    blocking = tmp_path / "regular"
    blocking.write_text("a file")
    with pytest.raises(ConfigError, match=str(blocking)):
        make_site(url.format(blocking))
    assert blocking.read_text() == "a file"


@pytest.mark.parametrize("url", ["sqlite:///{}/sessions.db", "file://{}/sessions"])
def test_place_below_a_link_to_nowhere(make_site: Callable[..., Flask], tmp_path: Path, url: str) -> None:
    """A place below a link whose target is gone, such as a disk that is not mounted, is refused, naming the place."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=str(link)):
        make_site(url.format(link))


@pytest.mark.parametrize("url", ["sqlite:///{}", "file://{}"])
def test_place_of_the_wrong_kind(make_site: Callable[..., Flask], tmp_path: Path, url: str) -> None:
    """A directory is no database, and a file is no directory of sessions: refused, naming the place."""
    place = tmp_path / "place"
    if url.startswith("sqlite"):
        place.mkdir()
    else:
        place.write_text("a file")
    with pytest.raises(ConfigError, match=str(place)):
        make_site(url.format(place))


def refusal_in(url: str) -> str | None:
    """How a user without rights is told that the place of *url* cannot be written."""
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        open_store(url)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("url", ["sqlite:///{}/sessions.db", "sqlite:///{}/new/sessions.db", "file://{}", "file://{}/new"])
def test_read_only_directory(url: str) -> None:
    """A directory that this user cannot write is refused when the store is opened, naming it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        refusal = in_child(refusal_in, url.format(folder))
        Path(folder).chmod(0o755)
    assert refusal is not None
    assert folder in refusal


def test_directory_that_vanished_is_made_again(tmp_path: Path) -> None:
    """A session directory that somebody removed is made again by the next save, for this user alone."""
    folder = tmp_path / "vanishing"
    store = open_store(f"file://{folder}")
    (folder / "web").rmdir()
    folder.rmdir()
    store.save(record_of(1, b"data"), expected=0)
    assert store.get(record_of(1, b"").id) == record_of(1, b"data")
    assert folder.stat().st_mode & 0o777 == 0o700
