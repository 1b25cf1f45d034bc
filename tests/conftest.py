"""What the tests share: the servers, a new store of each kind, applications on it, a clock that stands still."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_persist_session import PersistSession, SessionStore, open_store
from tests.servers import MemcachedServer, MySQLServer, PostgreSQLServer, RedisCluster, RedisServer
from tests.web import start_fork_server

#: The stores that several processes can share.
SHARED_STORES = ("file", "sqlite", "redis", "postgresql", "mysql")
ALL_STORES = ("memory", *SHARED_STORES)
#: The files that take longest. They come first, so that at the end no process is left alone with one of them.
LONG_FILES = (
    "test_store_contract.py",
    "test_backup_process.py",
    "test_response_order.py",
    "test_cli.py",
    "test_upgrade_races.py",
    "test_restore_served.py",
    "test_streaming.py",
    "test_chat.py",
    "test_stores.py",
    "test_migrate.py",
    "test_processes.py",
    "test_check.py",
    "test_pages.py",
    "test_transactions.py",
    "test_devices.py",
)
_numbers = itertools.count(1)


class Clock:
    """A clock that moves only when told."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class TickingClock(Clock):
    """A clock that moves only when told, but shows each look and each process another moment, as real ones do."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        super().__init__(now)
        self._looks = itertools.count(1)

    def __call__(self) -> float:
        return self.now + next(self._looks) * 1e-3 + os.getpid() % 997 * 1e-6


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """Start what starts processes, for its imports to be done when the first test needs one."""
    start_fork_server()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def memcached_server() -> Iterator[MemcachedServer]:
    if MemcachedServer.program() is None:
        pytest.skip("no package of PyPI brings memcached, and there is none on PATH")
    server = MemcachedServer().start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    # Not below pytest's own folder, which is closed to the other user that the server runs as where we are root.
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        server = PostgreSQLServer(Path(folder))
        yield server
        server.stop()


@pytest.fixture(scope="session")
def mysql_server() -> Iterator[MySQLServer]:
    if MySQLServer.program() is None:
        pytest.skip(
            "there is no MariaDB or MySQL server here; “make database” gets one, or apt-get install mariadb-server-core"
        )
    # The name of a socket has to be short, which those below pytest's own folder are not. In memory, where there is enough,
    # tables are made in a third of the time.
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and shutil.disk_usage(memory).free > 2**30 else None
    with tempfile.TemporaryDirectory(prefix="mysql-", dir=place) as folder:
        server = MySQLServer(Path(folder)).start()
        yield server
        server.stop()


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Makes the URL of a new, empty store of a kind."""
    taken: list[tuple[str, str]] = []

    def make(kind: str) -> str:
        number = next(_numbers)
        if kind == "redis":
            # A prefix of its own is an empty store of its own.
            return f"{request.getfixturevalue('redis_server').url}?prefix=test{os.getpid()}x{number}"
        if kind == "redis-cluster":
            return f"{request.getfixturevalue('redis_cluster').url}?prefix=test{os.getpid()}x{number}"
        if kind in ("postgresql", "mysql"):
            url = request.getfixturevalue(f"{kind}_server").take()
            taken.append((kind, url))
            return str(url)
        return {
            "memory": "memory://",
            "file": f"file://{tmp_path}/sessions{number}",
            "sqlite": f"sqlite:///{tmp_path}/sessions{number}.db",
        }[kind]

    yield make
    for kind, url in taken:
        request.getfixturevalue(f"{kind}_server").give_back(url)


@pytest.fixture(params=ALL_STORES)
def store_url(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> str:
    """The URL of a new, empty store, of each kind in turn."""
    return new_url(request.param)


@pytest.fixture(params=SHARED_STORES)
def shared_url(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> str:
    """The URL of a new, empty store, of each kind in turn that several processes can share."""
    return new_url(request.param)


@pytest.fixture
def store(store_url: str) -> Iterator[SessionStore]:
    opened = open_store(store_url)
    yield opened
    opened.close()


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[Callable[..., Flask]]:
    """Makes an application with the extension; keyword arguments are settings."""
    stores: list[SessionStore] = []

    def make(store: Any = "memory://", **settings: Any) -> Flask:
        app = Flask("tested", instance_path=str(tmp_path))
        app.config.update(SECRET_KEY="a secret for tests", TESTING=True, PERSIST_SESSION_STORE=store)
        app.config["PERSIST_SESSION_CLEANUP_INTERVAL"] = 0  # no thread for each of a thousand applications
        app.config.update(settings)
        PersistSession(app)
        if "persist_session" in app.extensions:
            stores.append(app.extensions["persist_session"].store)
        return app

    yield make
    for opened in stores:
        opened.close()
