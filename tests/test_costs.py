"""What a request costs, counted in store operations, on every store: promises P1 to P3 and P13."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask, session

from flask_persist_session import SessionManager, open_store
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.servers import RedisServer

MakeApp = Callable[..., Flask]


@pytest.fixture
def counting(store_url: str) -> CountingStore:
    return CountingStore(open_store(store_url))


@pytest.fixture
def app(make_app: MakeApp, counting: CountingStore) -> Flask:
    app = make_app(counting)
    add_views(app)
    return app


def add_views(app: Flask) -> None:
    @app.get("/untouched")
    def untouched() -> str:
        return ""

    @app.get("/read")
    def read() -> str:
        return f"{session.get('count')} {session.get('list')} {'user' in session} {len(session)}"

    @app.get("/change")
    def change() -> str:
        session["count"] = session.get("count", 0) + 1
        return ""

    @app.get("/nested")
    def nested() -> str:
        session.setdefault("list", []).append(1)
        return ""

    @app.get("/same")
    def same() -> str:
        session["count"] = session["count"]
        return ""

    @app.get("/regenerate")
    def regenerate() -> str:
        session.regenerate()  # type: ignore[attr-defined]
        return ""

    @app.get("/restart")
    def restart() -> str:
        session.clear()
        session["user"] = "Ada"
        return ""

    @app.get("/clear")
    def clear() -> str:
        session.clear()
        return ""


@pytest.mark.parametrize(
    ("path", "operations"),
    [
        ("/untouched", {}),
        ("/read", {"get": 1}),
        ("/same", {"get": 1}),
        ("/change", {"get": 1, "save": 1}),
        ("/nested", {"get": 1, "save": 1}),
        ("/regenerate", {"get": 1, "save": 2}),
        ("/restart", {"get": 2, "save": 2}),
        ("/clear", {"get": 1, "save": 1}),
    ],
)
def test_operations_of_a_request(app: Flask, counting: CountingStore, path: str, operations: dict[str, int]) -> None:
    """Untouched costs nothing, a read one get, a change one get and one save, a new token one save more."""
    client = app.test_client()
    client.get("/change")
    client.get("/nested")
    counting.operations.clear()
    assert client.get(path).status_code == 200
    assert counting.operations == operations


def test_a_first_change_costs_one_save(app: Flask, counting: CountingStore) -> None:
    """A visitor without a cookie costs nothing until something is put into the session, and then one save."""
    client = app.test_client()
    client.get("/read")
    assert counting.operations == {}
    client.get("/change")
    assert counting.operations == {"save": 1}


def test_a_renewal_costs_one_get_and_one_save_an_interval(app: Flask, counting: CountingStore, clock: Clock) -> None:
    """Once an interval, a request that does not touch the session pays for its renewal."""
    app.extensions["persist_session"].manager.clock = clock
    client = app.test_client()
    client.get("/change")
    clock.advance(60)
    counting.operations.clear()
    for _ in range(3):
        client.get("/untouched")
    assert counting.operations == {"get": 1, "save": 1}


def test_the_operations_do_not_grow_with_the_sessions_stored(app: Flask, counting: CountingStore) -> None:
    """Beside a thousand other sessions a request costs the same operations, none of which lists anything."""
    manager = SessionManager(counting.store)
    for _ in range(1000):
        manager.create({"a": 1})
    client = app.test_client()
    client.get("/change")
    counting.operations.clear()
    client.get("/change")
    assert counting.operations == {"get": 1, "save": 1}


@pytest.mark.parametrize(("path", "round_trips"), [("/untouched", 0), ("/read", 1), ("/change", 2)])
def test_round_trips_to_redis(make_app: MakeApp, redis_server: RedisServer, path: str, round_trips: int) -> None:
    """A read is one command to Redis, a change two."""
    app = make_app(f"{redis_server.url}?prefix=costs")
    add_views(app)
    client = app.test_client()
    client.get("/change")
    client.get("/change")

    with redis_server.client() as monitor:

        def requests() -> int:
            # Commands as such would include those that a script runs.
            return int(monitor.info("stats")["total_reads_processed"])

        monitor.ping()
        before = requests()
        idle = requests() - before  # what asking costs
        before = requests()
        client.get(path)
        assert requests() - before - idle == round_trips
