"""Every store, and the one in the docstring of the contract, passes the public suite."""

from __future__ import annotations

import copy
import inspect
import itertools
import textwrap
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cachelib import FileSystemCache, RedisCache, SimpleCache

from flask_persist_session import CachedStore, SessionRecord, SessionStore, open_store
from flask_persist_session.stores import base
from flask_persist_session.stores.migrating import MigratingStore
from flask_persist_session.testing import SessionStoreContract
from tests.servers import RedisServer

NewURL = Callable[[str], str]
Opener = Callable[[], SessionStore]
_numbers = itertools.count(1)


class TestMemory(SessionStoreContract):
    shared = False

    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("memory"))


class TestFile(SessionStoreContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("file"))


class TestSQLite(SessionStoreContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("sqlite"))


class TestRedis(SessionStoreContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("redis"))


class TestRedisCluster(SessionStoreContract):
    across_users = False

    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("redis-cluster"))


class TestPostgreSQL(SessionStoreContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("postgresql"))


class TestMySQL(SessionStoreContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("mysql"))


def _open_cache(make: Callable[[], Any]) -> SessionStore:
    """The store of a new cache object, made in the process that uses it."""
    return open_store(make())


class TestSimpleCache(SessionStoreContract):
    shared = False

    @pytest.fixture
    def open_store(self) -> Opener:
        return partial(_open_cache, partial(SimpleCache, threshold=1_000_000))


class TestFileSystemCache(SessionStoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Opener:
        return partial(_open_cache, partial(FileSystemCache, str(tmp_path / "cache"), threshold=0))


class TestRedisCache(SessionStoreContract):
    @pytest.fixture
    def open_store(self, redis_server: RedisServer) -> Opener:
        prefix = f"cache{next(_numbers)}:"
        return partial(_open_cache, partial(RedisCache, "127.0.0.1", redis_server.port, key_prefix=prefix))


def _open_both(store: str, old: str) -> SessionStore:
    return MigratingStore(open_store(store), open_store(old))


class TestMigrating(SessionStoreContract):
    @pytest.fixture(params=["sqlite-file", pytest.param("redis-sqlite", marks=pytest.mark.soak)])
    def open_store(self, request: pytest.FixtureRequest, new_url: NewURL) -> Opener:
        return partial(_open_both, *map(new_url, request.param.split("-")))


class _MovingBack(MigratingStore):
    """Another process has the two stores the other way round, and moves each session back as soon as it is saved."""

    def save(self, record: SessionRecord, *, expected: int) -> None:
        super().save(record, expected=expected)
        MigratingStore(self.old, self.store).move(record.id)


def _open_moving_back(store: str, old: str) -> SessionStore:
    return _MovingBack(open_store(store), open_store(old))


@pytest.mark.soak
class TestMigratingBackAndForth(SessionStoreContract):
    # Two stores have no step in common: while a session moves, processes that have them the other way round may both
    # save it. So what races is promised only where all have them the same way.
    test_race_of_changes = None
    test_race_of_creations = None
    test_race_of_saves_and_deletions = None
    test_race_against_a_deletion = None

    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(_open_moving_back, new_url("file"), new_url("sqlite"))


def _open_cached(url: str, make_cache: Callable[[], Any]) -> SessionStore:
    """A store and its cache, both made in the process that uses them."""
    return CachedStore(open_store(url), make_cache())


class TestCachedInOneProcess(SessionStoreContract):
    shared = False

    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(_open_cached, new_url("sqlite"), partial(SimpleCache, threshold=1_000_000))


class TestCachedInFiles(SessionStoreContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL, tmp_path: Path) -> Opener:
        return partial(_open_cached, new_url("sqlite"), partial(FileSystemCache, str(tmp_path / "cache"), threshold=0))


@pytest.mark.soak
class TestCachedInRedis(SessionStoreContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL, redis_server: RedisServer) -> Opener:
        prefix = f"cache{next(_numbers)}:"
        make_cache = partial(RedisCache, "127.0.0.1", redis_server.port, key_prefix=prefix)
        return partial(_open_cached, new_url("sqlite"), make_cache)


class _Forgetful:
    """Evicts at once what closes a session, so that nearly every get is answered by a copy."""

    def set(self, key: str, value: Any, *arguments: Any, **options: Any) -> Any:
        stored = super().set(key, value, *arguments, **options)  # type: ignore[misc]
        if value == b"closed":
            self.delete(key)  # type: ignore[attr-defined]
        return stored


class _ForgetfulCache(_Forgetful, SimpleCache):
    pass


class _ForgetfulFiles(_Forgetful, FileSystemCache):
    pass


class TestCachedAndEvicted(SessionStoreContract):
    shared = False
    # What closes all sessions of a transaction together is evicted here.
    test_readers_of_a_transaction = None

    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(_open_cached, new_url("sqlite"), partial(_ForgetfulCache, threshold=1_000_000))


@pytest.mark.soak
class TestCachedInFilesAndEvicted(SessionStoreContract):
    test_readers_of_a_transaction = None

    @pytest.fixture
    def open_store(self, new_url: NewURL, tmp_path: Path) -> Opener:
        return partial(_open_cached, new_url("sqlite"), partial(_ForgetfulFiles, str(tmp_path / "cache"), threshold=0))


# The store in the docstring of the contract ---------------------------------------------------------------------------


def _documented_code() -> str:
    """The indented block that follows the first double colon of the docstring."""
    lines = inspect.getdoc(base).split("::\n", 1)[1].splitlines()  # type: ignore[union-attr]
    block = itertools.takewhile(lambda line: not line or line.startswith(" "), lines)
    return textwrap.dedent("\n".join(block))


def _documented_store() -> type[SessionStore]:
    names: dict[str, Any] = {"copy": copy, "threading": threading, **vars(base)}
    exec(compile(_documented_code(), "the docstring of stores/base.py", "exec"), names)
    store: type[SessionStore] = names["DictStore"]
    return store


class TestDocumented(SessionStoreContract):
    shared = False

    @pytest.fixture
    def open_store(self) -> Opener:
        return _documented_store()


def test_a_store_is_short() -> None:
    """The store of the docstring, which is complete, has less than 100 lines."""
    assert len(_documented_code().splitlines()) < 100
