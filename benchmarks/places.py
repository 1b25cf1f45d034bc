"""Where the candidates keep their sessions: new folders, and servers that are started when the first one asks."""

from __future__ import annotations

import itertools
import tempfile
from functools import cached_property
from pathlib import Path
from types import TracebackType

import psycopg

from tests.servers import PostgreSQLServer, RedisServer


class Places:
    """A temporary directory and the servers in it; leaving the context ends the servers and removes the directory."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="benchmarks-")
        self._numbers = itertools.count(1)

    def __enter__(self) -> Places:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in ("redis", "postgresql"):
            if name in self.__dict__:  # that is, if the cached property was used
                getattr(self, name).stop()
        self._directory.cleanup()

    def new_folder(self) -> Path:
        folder = Path(self._directory.name, f"folder{next(self._numbers)}")
        folder.mkdir()
        return folder

    @cached_property
    def redis(self) -> RedisServer:
        return RedisServer(self.new_folder()).start()

    @cached_property
    def postgresql(self) -> PostgreSQLServer:
        server = PostgreSQLServer(self.new_folder())
        # The tests switch off waiting for the disk. A figure without it would be of no use.
        with psycopg.connect(host=str(server.folder), user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET fsync")
            connection.execute("SELECT pg_reload_conf()")
        return server

    def new_url(self, kind: str) -> str:
        """The URL of a new, empty store of this package."""
        if kind == "redis":
            return f"{self.redis.url}?prefix=bench{next(self._numbers)}"
        if kind == "postgresql":
            return self.postgresql.take()
        urls = {
            "memory": "memory://",
            "file": f"file://{self.new_folder()}",
            "sqlite": f"sqlite:///{self.new_folder()}/s.db",
        }
        return urls[kind]
