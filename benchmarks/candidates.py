"""The applications that are compared: the same views, each on sessions of another kind."""

from __future__ import annotations

import random
import string
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import redis
from cachelib import FileSystemCache
from flask import Flask, request, session
from sqlalchemy import event

from benchmarks.places import Places
from flask_persist_session import PersistSession, SessionRecord, SessionStore, open_store
from flask_persist_session.stores.cachelib import CachelibStore

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from flask_session import Session as FlaskSession  # type: ignore[import-untyped]
    from flask_sqlalchemy import SQLAlchemy

View: TypeAlias = Literal["untouched", "read", "change"]
VIEWS: tuple[View, ...] = get_args(View)

BARE = "bare Flask, no session"
COOKIE = "Flask's cookie session"
THEIRS_REDIS = "Flask-Session, Redis"
THEIRS_FILE = "Flask-Session, cachelib file"
THEIRS_SQLITE = "Flask-Session, SQLAlchemy on SQLite"
THEIRS_SQLITE_WAL = "Flask-Session, SQLAlchemy, WAL"
OURS = "this, "


class Tally:
    """Counts store operations."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *ignored: Any) -> None:
        self.count += 1


@dataclass(frozen=True)
class Candidate:
    """A name and what builds its application: with a tally one that counts, and is not for timing."""

    name: str
    build: Callable[[Places, Tally | None], Flask]


def payload(size: int) -> dict[str, str]:
    """Session data of *size* bytes, keys and values counted: text that does not compress better than real text."""
    letters = random.Random(size)
    number = max(4, round(0.45 * size**0.5))
    keys = [f"key {index:03}" for index in range(number)]
    return {key: "".join(letters.choices(string.ascii_letters, k=size // number - len(key))) for key in keys}


def new_app(**settings: Any) -> Flask:
    """An application with the views that every candidate has."""
    app = Flask("benchmarked")
    # 0: do not warn that a browser would not keep a cookie of 50 kB.
    app.config.update(SECRET_KEY="a secret for benchmarks", MAX_COOKIE_SIZE=0)
    app.config.update(settings)

    @app.get("/sign-in")
    def sign_in() -> str:
        session.update(payload(request.args.get("size", 0, int)), _user_id="42", counter=1000)
        return "ok"

    @app.get("/untouched")
    def untouched() -> str:
        return "ok"

    @app.get("/read")
    def read() -> str:
        return "ok" if session["key 000"] else "missing"

    @app.get("/change")
    def change() -> str:
        session["counter"] += 1
        return "ok"

    return app


# Flask and Flask-Session ----------------------------------------------------------------------------------------------


def _bare(places: Places, tally: Tally | None) -> Flask:
    # Without a secret key there is a null session: nothing reads the cookie, nothing is saved, no view may use it.
    app = new_app(SECRET_KEY=None)
    for endpoint in ("sign_in", "read", "change"):
        app.view_functions[endpoint] = app.view_functions["untouched"]
    return app


def _cookie(places: Places, tally: Tally | None) -> Flask:
    return new_app()


def _theirs(app: Flask) -> Flask:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        FlaskSession(app)
    return app


def _theirs_redis(places: Places, tally: Tally | None) -> Flask:
    client: Any = redis.Redis.from_url(places.redis.url)
    if tally is not None:
        client.execute_command = _counting(client.execute_command, tally)
    return _theirs(new_app(SESSION_TYPE="redis", SESSION_REDIS=client))


def _theirs_file(places: Places, tally: Tally | None) -> Flask:
    # Threshold 0: with any other it counts the files, and then removes some at random.
    cache: Any = FileSystemCache(str(places.new_folder()), threshold=0)
    if tally is not None:
        cache.get, cache.set = _counting(cache.get, tally), _counting(cache.set, tally)
    return _theirs(new_app(SESSION_TYPE="cachelib", SESSION_CACHELIB=cache))


def _counting(method: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        tally()
        return method(*arguments, **options)

    return counted


def _theirs_sqlite(places: Places, tally: Tally | None, *, wal: bool = False) -> Flask:
    # Flask-Session 0.8 works with Flask-SQLAlchemy 3.1 on SQLAlchemy 2 as it comes: it makes its model and its table
    # itself, once it is given an SQLAlchemy object that knows the application.
    app = new_app(SQLALCHEMY_DATABASE_URI=f"sqlite:///{places.new_folder()}/s.db", SESSION_TYPE="sqlalchemy")
    database = app.config["SESSION_SQLALCHEMY"] = SQLAlchemy(app)
    with app.app_context():
        if wal:
            event.listen(database.engine, "connect", _set_wal)
        if tally is not None:
            event.listen(database.engine, "before_cursor_execute", tally)
    return _theirs(app)


def _set_wal(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=wal")
    connection.execute("PRAGMA synchronous=normal")


def _theirs_sqlite_wal(places: Places, tally: Tally | None) -> Flask:
    # As it comes, each write waits for the disk (rollback journal, synchronous=full). This one has the journal and the
    # durability that this package's store has, so that the difference is not only that of the disk.
    return _theirs_sqlite(places, tally, wal=True)


# This package ---------------------------------------------------------------------------------------------------------


class CountingStore(SessionStore):
    """Counts what is asked of another store."""

    def __init__(self, store: SessionStore, tally: Tally) -> None:
        self._store = store
        self._tally = tally

    def get(self, session_id: str) -> SessionRecord | None:
        self._tally()
        return self._store.get(session_id)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        self._tally()
        self._store.save(record, expected=expected)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        self._tally()
        return self._store.delete(session_id, expected=expected)

    def scan(self) -> Iterator[SessionRecord]:
        self._tally()
        return self._store.scan()


def ours(store: SessionStore, tally: Tally | None = None) -> Flask:
    """An application with this package, on *store*."""
    app = new_app(PERSIST_SESSION_STORE=store if tally is None else CountingStore(store, tally))
    PersistSession(app)
    return app


def _ours_by_url(kind: str) -> Candidate:
    return Candidate(OURS + kind, lambda places, tally: ours(open_store(places.new_url(kind)), tally))


def _ours_cachelib(places: Places, tally: Tally | None) -> Flask:
    return ours(CachelibStore(FileSystemCache(str(places.new_folder()), threshold=0)), tally)


CANDIDATES = (
    Candidate(BARE, _bare),
    Candidate(COOKIE, _cookie),
    Candidate(THEIRS_REDIS, _theirs_redis),
    Candidate(THEIRS_FILE, _theirs_file),
    Candidate(THEIRS_SQLITE, _theirs_sqlite),
    Candidate(THEIRS_SQLITE_WAL, _theirs_sqlite_wal),
    *map(_ours_by_url, ("memory", "file", "sqlite", "redis", "postgresql")),
    Candidate(OURS + "cachelib file", _ours_cachelib),
)
