"""The histories of every store pass the public suite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cachelib import FileSystemCache

from flask_persist_session import CachedStore, SessionStore, open_store
from flask_persist_session.stores.migrating import MigratingStore
from flask_persist_session.testing import HistoryLogContract

NewURL = Callable[[str], str]
Opener = Callable[[], SessionStore]


class TestMemory(HistoryLogContract):
    shared = False

    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("memory"))


class TestFile(HistoryLogContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("file"))


class TestSQLite(HistoryLogContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("sqlite"))


class TestRedis(HistoryLogContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("redis"))


class TestRedisCluster(HistoryLogContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("redis-cluster"))


class TestPostgreSQL(HistoryLogContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("postgresql"))


class TestMySQL(HistoryLogContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL) -> Opener:
        return partial(open_store, new_url("mysql"))


def _open_both(store: str, old: str) -> SessionStore:
    return MigratingStore(open_store(store), open_store(old))


class TestMigrating(HistoryLogContract):
    @pytest.fixture(params=["sqlite-file", pytest.param("redis-sqlite", marks=pytest.mark.soak)])
    def open_store(self, request: pytest.FixtureRequest, new_url: NewURL) -> Opener:
        return partial(_open_both, *map(new_url, request.param.split("-")))


def _open_cached(url: str, folder: str) -> SessionStore:
    return CachedStore(open_store(url), FileSystemCache(folder, threshold=0))


class TestCached(HistoryLogContract):
    @pytest.fixture
    def open_store(self, new_url: NewURL, tmp_path: Path) -> Opener:
        return partial(_open_cached, new_url("sqlite"), str(tmp_path / "cache"))
