"""The floor: what the storage itself takes for a payload of the same size, with no session, no Flask around it."""

from __future__ import annotations

import itertools
import os
import sqlite3
from pathlib import Path

import redis

from benchmarks.measuring import Task
from benchmarks.places import Places

REDIS_FLOORS = ("Redis GET", "Redis SET", "Redis HGETALL")
SQLITE_FLOORS = ("SQLite SELECT", "SQLite UPDATE")
FILE_FLOORS = ("file read", "file append")
FLOORS = (*REDIS_FLOORS, *SQLITE_FLOORS, *FILE_FLOORS)


def floors(places: Places, size: int) -> list[Task]:
    """The bare operations with *size* bytes."""
    content = os.urandom(size)
    return [*_redis(places, content), *_sqlite(places, content), *_file(places, content)]


def _redis(places: Places, content: bytes) -> list[Task]:
    client = redis.Redis.from_url(places.redis.url)
    client.set("floor", content)
    client.hset("floor hash", mapping={"data": content, **{f"field {number}": "1700000000.0" for number in range(8)}})
    calls = (lambda: client.get("floor"), lambda: client.set("floor", content), lambda: client.hgetall("floor hash"))
    return [Task(name, call, call) for name, call in zip(REDIS_FLOORS, calls, strict=True)]


def _sqlite(places: Places, content: bytes) -> list[Task]:
    connection = sqlite3.connect(places.new_folder() / "floor.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=wal")
    connection.execute("PRAGMA synchronous=normal")
    connection.execute("CREATE TABLE floor (id TEXT PRIMARY KEY, data BLOB)")
    connection.execute("INSERT INTO floor VALUES ('one', ?)", (content,))

    def select() -> None:
        connection.execute("SELECT data FROM floor WHERE id = ?", ("one",)).fetchone()

    # Two contents in turn: SQLite writes no page whose bytes an update leaves as they are.
    contents = itertools.cycle((os.urandom(len(content)), content))

    def update() -> None:
        connection.execute("UPDATE floor SET data = ? WHERE id = ?", (next(contents), "one"))

    return [Task(name, call, call) for name, call in zip(SQLITE_FLOORS, (select, update), strict=True)]


def _file(places: Places, content: bytes) -> list[Task]:
    folder = places.new_folder()
    read_from, append_to = folder / "read", folder / "append"
    read_from.write_bytes(content)

    def read() -> None:
        handle = os.open(read_from, os.O_RDONLY)
        os.read(handle, len(content))
        os.close(handle)

    def append() -> None:
        handle = os.open(append_to, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(handle, content)
        os.close(handle)

    def restart() -> None:
        _empty(append_to)
        append()

    return [Task("file read", read, read), Task("file append", append, restart)]


def _empty(path: Path) -> None:
    path.write_bytes(b"")
