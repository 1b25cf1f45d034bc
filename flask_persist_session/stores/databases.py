"""The SQL databases, their connections and where their SQL differs: SQLite, and PostgreSQL with psycopg, through peewee.

MySQL has a module of its own. Every thread has a connection of its own, which is closed when the thread ends.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from functools import partial, wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar
from urllib.parse import unquote

import peewee as pw

from ..exceptions import ConfigError, StoreUnavailable
from . import Location, make_directory, seconds

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Makes a database object that is not connected yet.
Connect = Callable[[], "PerThread"]

#: Connections that a process inherited by being forked. They belong to the parent: using or even closing one here
#: would disturb it, so they are kept from being collected.
inherited: list[object] = []


#: Turns errors of the drivers into those of peewee, for what peewee leaves to its callers.
translated: Any = pw.__exception_wrapper__  # type: ignore[attr-defined]


#: Seconds between two transactions in turn, of which the second takes the first's commit.
_LEAST_FOR_OTHERS = 0.008
#: Seconds from one transaction of many changes to the next at least. Whoever waits for the lock looks after 1, 3, 8, 18 and
#: 33 ms: many short gaps would be missed more often than one that is about as long as it waits between looks. The log is
#: emptied besides, which adds some milliseconds.
_FREE_BETWEEN_MANY = 0.012
#: Seconds that nobody waits for.
_LONG = 86400.0
#: So often a transaction gives way to others before that is an error.
_WAYS_GIVEN = 5


class GaveWay(StoreUnavailable):
    """The database undid the transaction, so that another one could go on; it may be run again."""


def again(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Runs a transaction again that gave way to another one."""

    @wraps(method)
    def run(*arguments: _P.args, **options: _P.kwargs) -> _T:
        for _ in range(_WAYS_GIVEN):
            try:
                return method(*arguments, **options)
            except GaveWay:
                continue
        return method(*arguments, **options)

    return run


class Name(pw.TextField):
    """A text that is looked up: of at most 512 characters, compared byte by byte."""

    field_type = "NAME"


class _Closer:
    """Closes a connection when the thread that keeps it has ended; the drivers only warn that it was left open."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._process = os.getpid()

    def __del__(self) -> None:
        if self._process != os.getpid():
            inherited.append(self._connection)
            return
        with suppress(pw.PeeweeException), translated:  # nobody needs it any more, be it broken or not
            self._connection.close()


class PerThread(pw.Database):
    """A database whose connections are closed when the thread that opened them ends, and what is its own in its SQL."""

    #: What locks the rows that a query finds against changes, at its end.
    row_lock = ""
    #: What makes the table of the histories of a namespace.
    history_tables: tuple[str, ...]
    #: Words of errors that do not pass by themselves.
    lasting = ("full", "no such", "readonly", "does not exist", "malformed", "not a database", "permission")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._own = threading.local()
        super().__init__(*arguments, **options)
        # peewee connects one thread after the other, so each would wait out its timeout behind all that came before.
        self._lock = nullcontext()

    def _connect(self) -> Any:
        connection = super()._connect()  # type: ignore[misc]
        self._own.closer = _Closer(connection)
        return connection

    def in_turn(self) -> AbstractContextManager[Any]:
        """A transaction of many in a row, which let others write in between."""
        return self.atomic()

    def make(self, models: Sequence[Any]) -> None:
        """Make the tables of *models* with their indexes; to be called in a transaction, and by any number at once."""
        for model in models:
            with model.bind_ctx(self):
                model.create_table(safe=True)

    def beyond(self, keys: Sequence[Any], values: Sequence[Any], *, descending: bool) -> Any:
        """That a row comes later in the order of *keys* than one with *values*."""
        here, there = pw.Tuple(*keys), pw.Tuple(*values)
        return here < there if descending else here > there

    def will_pass(self, error: pw.PeeweeException) -> bool:
        """Whether the database may be reachable again soon: locked, refused, timed out, connection lost."""
        if isinstance(error, pw.InterfaceError):
            return True
        text = str(error)
        return isinstance(error, pw.OperationalError) and not any(word in text for word in self.lasting)

    def timed_out(self, error: pw.PeeweeException) -> bool:
        """Whether the connection was lost by waiting for the server, so that nobody should wait a second time."""
        return False

    def gave_way(self, error: pw.PeeweeException) -> bool:
        """Whether the database undid the transaction, so that another one could go on."""
        return False

    def take_time(self) -> None:
        """Let statements take as long as they take; to be called before it is connected."""

    def give_way(self) -> None:
        """Wait, before a transaction of many changes is prepared, until others had their turn."""

    def of_many(self) -> AbstractContextManager[Any]:
        """A transaction of so many changes that what follows from them is not to be left to the next request."""
        return self.atomic()

    def settle(self) -> None:
        """Return once nothing goes on any more that such a transaction left to do. Raises what went wrong with it."""

    @contextmanager
    def streaming(self, statement: str) -> Iterator[Any]:
        """A cursor over what *statement* finds, fetched as it is asked for and all of one moment; then disconnect."""
        try:
            with translated, closing(self._streaming_cursor()) as cursor:
                cursor.execute(statement)
                yield cursor
        finally:
            self.close()

    def _streaming_cursor(self) -> Any:
        return self.cursor()  # type: ignore[no-untyped-call]


_INDEX_OF_KEYS = 'CREATE INDEX IF NOT EXISTS "{index}" ON "{table}" (session_id, "key") WHERE "key" IS NOT NULL'
#: How many pages the log of a SQLite database may have before writers are held up for a moment to empty it.
_LONGEST_LOG = 4000
#: KiB that a connection keeps in memory once it made many changes: they are all over the indexes.
_CACHE_OF_MANY = 12_000
#: How many pages the log has when commits begin to empty it; SQLite's own default.
_LOG_LEFT_TO_COMMITS = 1000


class _SQLite(PerThread, pw.SqliteDatabase):
    field_types = pw.SqliteDatabase.field_types | {"NAME": "TEXT"}
    # Not WITHOUT ROWID: the inner pages of its tree hold whole entries, so few that reading takes twice as long.
    history_tables = (
        """CREATE TABLE IF NOT EXISTS "{table}" (session_id TEXT NOT NULL, seq INTEGER NOT NULL, created_at REAL NOT NULL,
        "key" BLOB, data BLOB NOT NULL, PRIMARY KEY (session_id, seq))""",
        _INDEX_OF_KEYS,
        """CREATE TRIGGER IF NOT EXISTS "{table}_end" AFTER DELETE ON "{sessions}"
        BEGIN DELETE FROM "{table}" WHERE session_id = OLD.id; END""",
    )
    _others_until = 0.0
    _emptying: Future[None] | None = None

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        # Nobody is told that the lock is free: whoever waits for it looks again after 1, 2, 5, 10, 15, 20 … ms. Who
        # takes it again at once would keep them out for long; so it stays free for as long as it was held, and at least
        # until the third look.
        self.give_way()
        with self.atomic():
            start = time.monotonic()
            yield
            # Before the commit: most of what that takes is the checkpoint, during which others may write.
            now = time.monotonic()
            self._others_until = now + max(_LEAST_FOR_OTHERS, now - start)

    def rollback(self) -> None:
        # On a full disk SQLite rolls back by itself; to do so again is an error, which would hide the first one.
        if self.connection().in_transaction:  # type: ignore[no-untyped-call]
            super().rollback()

    def give_way(self) -> None:
        time.sleep(max(0.0, self._others_until - time.monotonic()))

    @contextmanager
    def of_many(self) -> Iterator[None]:
        self.settle()
        # Otherwise whoever commits into a long log copies what is in it, and waits for the disk to have it.
        run: Any = self.execute_sql
        run("PRAGMA wal_autocheckpoint = 0")
        run(f"PRAGMA cache_size = -{_CACHE_OF_MANY}")
        try:
            with self.atomic():
                yield
        finally:
            self._others_until = time.monotonic() + _FREE_BETWEEN_MANY
            run(f"PRAGMA wal_autocheckpoint = {_LOG_LEFT_TO_COMMITS}")
        # On a connection of its own, while the next changes are prepared: it waits for the disk several times. Thread and
        # connection end with it, so that nothing is left that a fork could inherit.
        thread = ThreadPoolExecutor(1, "session-log")
        self._emptying = thread.submit(self._empty_log)
        thread.shutdown(wait=False)

    def settle(self) -> None:
        emptying, self._emptying = self._emptying, None
        if emptying is not None:
            emptying.result()

    def _empty_log(self) -> None:
        # While others write all the time, a log that they can add to is never empty, and grows without end: each page
        # then takes longer to find. Most of it is copied without a lock, so that only the rest holds others up.
        run: Any = self.execute_sql
        _, pages, _ = run("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages > _LONGEST_LOG:
            run("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            run("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def _connect(self) -> Any:
        connection: Any = super()._connect()
        # By default a damaged text makes the driver fail for the whole statement; so it damages its own record only.
        connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        return connection


#: The lock under which the tables of this package are made on a PostgreSQL server.
_TABLES_LOCK = 0x70657273697374


class _Adapter(pw.Psycopg3Adapter):
    """Connections of psycopg that wait for an answer so many seconds and no longer.

    The server's own ``statement_timeout`` does not help where the server itself hangs.
    """

    def connect(self, db: pw.Database, **parameters: Any) -> Any:
        import psycopg

        bound = parameters.pop("bound")

        class Bounded(psycopg.Connection[Any]):
            def wait(self, *arguments: Any, **options: Any) -> Any:
                return super().wait(*arguments, **{"timeout": bound} | options)

        return Bounded.connect(dbname=db.database, **parameters)


class _PostgreSQL(PerThread, pw.PostgresqlDatabase):
    field_types = pw.PostgresqlDatabase.field_types | {"NAME": "TEXT"}
    psycopg3_adapter = _Adapter
    row_lock = " FOR NO KEY UPDATE"
    history_tables = (
        f"SELECT pg_advisory_xact_lock({_TABLES_LOCK})",
        """CREATE TABLE IF NOT EXISTS "{table}" (session_id TEXT NOT NULL REFERENCES "{sessions}" (id) ON DELETE CASCADE,
        seq BIGINT NOT NULL, created_at DOUBLE PRECISION NOT NULL, "key" BYTEA, data BYTEA NOT NULL,
        PRIMARY KEY (session_id, seq))""",
        _INDEX_OF_KEYS,
    )

    def make(self, models: Sequence[Any]) -> None:
        # CREATE TABLE IF NOT EXISTS fails there for the second of two that come at once.
        self.execute_sql(f"SELECT pg_advisory_xact_lock({_TABLES_LOCK})")  # type: ignore[no-untyped-call]
        super().make(models)

    def _streaming_cursor(self) -> Any:
        self.begin()  # outside of a transaction the server would copy all of it first
        adapter: Any = self._adapter  # type: ignore[attr-defined]
        return adapter.server_side_cursor(self.connection())  # type: ignore[no-untyped-call]

    def take_time(self) -> None:
        self.connect_params |= {"bound": _LONG, "options": ""}


def open_sqlite(location: Location) -> tuple[str, Connect, float]:
    """For a ``sqlite:`` URL: what messages call the database, how to connect to it, how many seconds to wait for it.

    Raises ``ConfigError``.
    """
    name = location.url.path.removeprefix("/")
    if location.url.netloc or name in ("", ":memory:"):
        raise ConfigError(
            f"{location} names no file; write sqlite:///relative.db or sqlite:////absolute.db, or memory:// to keep "
            "sessions in memory"
        )
    options: dict[str, Any] = {"timeout": 5.0, "synchronous": "normal"}
    options |= location.read_options(timeout=seconds, synchronous=_synchronous)
    path = location.path(name)
    _check_file(path)
    pragmas = {"journal_mode": "wal", "synchronous": options["synchronous"]}

    def connect() -> PerThread:
        # The closing of a connection may happen in another thread; each is used by its own alone.
        return _SQLite(path, pragmas=pragmas, timeout=options["timeout"], lock_type="IMMEDIATE", check_same_thread=False)

    return f"the SQLite database {path}", connect, options["timeout"]


def _synchronous(text: str) -> str:
    if text not in ("off", "normal", "full", "extra"):
        raise ValueError("allowed is off, normal, full or extra")
    return text


def _check_file(path: str) -> None:
    folder = os.path.dirname(path)
    try:
        make_directory(folder)
        # SQLite would make it readable for everybody; its -wal and -shm files get the mode of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise ConfigError(f"the session database {path} cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"the directory of the session database {path} cannot be written, SQLite needs that")


def open_postgresql(location: Location) -> tuple[str, Connect, float]:
    """The same for a ``postgresql:`` URL. Raises ``ConfigError``, also where psycopg is not installed."""
    if find_spec("psycopg") is None:
        raise ConfigError(f"{location} needs psycopg: pip install 'flask-persist-session[postgresql]'")
    url, name = location.url, unquote(location.url.path.removeprefix("/"))
    if not name or not url.path.startswith("/"):
        raise ConfigError(f"{location} names no database; write postgresql://user:password@host:port/name")
    options: dict[str, Any] = {"host": url.hostname} | location.read_options(
        timeout=seconds, host=str, sslmode=str, sslrootcert=str
    )
    wait = float(options.pop("timeout", 5.0))
    parameters = {
        **options,
        "port": url.port,
        "user": unquote(url.username) if url.username else None,
        "password": unquote(url.password) if url.password else None,
        "connect_timeout": max(1, round(wait)),
        "options": f"-c statement_timeout={round(wait * 1000)}",
        "bound": wait + 1,
    }
    given = {key: value for key, value in parameters.items() if value is not None}

    def connect() -> PerThread:
        return _PostgreSQL(name, prefer_psycopg3=True, **given)

    return f"the PostgreSQL database {location}", connect, wait


def open_mysql(location: Location) -> tuple[str, Connect, float]:
    """The same for a ``mysql:`` or ``mariadb:`` URL. Raises ``ConfigError``, also where PyMySQL is not installed."""
    if find_spec("pymysql") is None:
        raise ConfigError(f"{location} needs PyMySQL: pip install 'flask-persist-session[mysql]'")
    from . import mysql

    return mysql.open_mysql(location)
