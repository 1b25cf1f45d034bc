"""The SQL databases, their connections and where their SQL differs: SQLite, and PostgreSQL with psycopg, through peewee.

MySQL has a module of its own. Every thread has a connection of its own, which is closed when the thread ends.
"""

from __future__ import annotations

import os
import sqlite3
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


#: Seconds after which whoever waits for SQLite's lock looks at it for the first time, and at most between two looks; SQLite
#: itself looks every 10 to 100 ms.
_FIRST_LOOK, _LONGEST_BETWEEN_LOOKS = 0.0005, 0.005
#: What SQLite says then, and nothing else.
_LOCKED = "database is locked"
#: Seconds between two transactions of many changes: whoever waits looks meanwhile, be it a little late.
_FOR_OTHERS = 0.008
#: Seconds that nobody waits for.
_LONG = 86400.0
#: Rows that one statement inserts: databases take 32,766 values or more in one, older releases of SQLite 999.
_MANY_ROWS = 1000
_FEW_ROWS = 80
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
    #: How many rows one statement inserts at most.
    rows_at_once = 1
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
            # Not bound to this database: it would become part of a circle, and be closed some time after its last use.
            pw.SchemaManager(model, self).create_all(safe=True)

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

    def of_many(self) -> AbstractContextManager[Any]:
        """A transaction of so many changes that what follows from them is not to be left to the next request."""
        return self.atomic()

    def insert_many(self, statements: Sequence[tuple[str, Sequence[Any]]], rows: int, size: int) -> None:
        """Run statements that insert so many rows, with about so many bytes of text and data: all of them or none.

        Raises ``IntegrityError`` if one of the rows is there already.
        """
        with self.of_many():
            run: Any = self.execute_sql
            if sum(run(*statement).rowcount for statement in statements) < rows:
                raise pw.IntegrityError("some of the rows are there already")

    def count_written(self, rows: int, size: int) -> None:
        """Told how many rows, and about how many bytes of data, a transaction writes without ``execute_sql``."""

    def settle(self) -> None:
        """Return once nothing goes on any more that a transaction left to do."""

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
#: KiB that a connection keeps in memory once it made many changes: they are all over the indexes.
_CACHE_OF_MANY = 12_000
#: How many pages of the log of a SQLite database a change writes beside its data, about: of its row and its indexes.
_PAGES_OF_A_CHANGE, _PAGE_SIZE = 4, 4096
#: After so many pages, counted like this, the log is emptied.
_PAGES_TO_EMPTY = 3000
#: How many pages it may have before writers are held up for a moment to empty it, and for how many milliseconds somebody
#: tries to: whoever reads for long keeps the log from being emptied.
_LONGEST_LOG, _TO_EMPTY_IT = 5000, 5
#: How many pages it has when a commit copies it after all: what triggers delete and what others write is not counted.
_MOST_PAGES = 100_000
#: So often what was added meanwhile is copied before.
_SHORT_COPIES = 4


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
    rows_at_once = _MANY_ROWS if sqlite3.sqlite_version_info >= (3, 32) else _FEW_ROWS
    _others_until = 0.0
    _pages = 0
    _emptying: Future[None] | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._guard = threading.Lock()
        super().__init__(*arguments, **options)
        if size_of(f"{self.database}-wal") > _LONGEST_LOG * _PAGE_SIZE:
            self._pages = _PAGES_TO_EMPTY  # others left it, and may be gone

    def execute_sql(self, sql: str, params: Sequence[Any] | None = None) -> Any:
        cursor = self._run(sql, params)
        if cursor.rowcount > 0:
            size = sum(len(value) for value in params or () if type(value) is bytes or type(value) is str)
            self.count_written(cursor.rowcount, size)
            if not self.in_transaction():
                self._after_commit()
        return cursor

    def insert_many(self, statements: Sequence[tuple[str, Sequence[Any]]], rows: int, size: int) -> None:
        if len(statements) > 1 or not self._insert_at_once(*statements[0]):
            super().insert_many(statements, rows, size)
            return
        self.count_written(rows, size)
        self._after_commit()

    def _insert_at_once(self, sql: str, values: Sequence[Any]) -> bool:
        """Run a statement that inserts many rows, unless somebody else has the lock; says whether it was run.

        It is no transaction with BEGIN and COMMIT: so the lock is taken once the values are bound, and who has it waits for
        no other thread that computes. But who waited for the lock like this would bind all values for each look at it.
        """
        self._prepare_for_many()
        try:
            with self._turn():
                super().execute_sql(sql, values)  # type: ignore[no-untyped-call]
        except pw.OperationalError as error:
            if str(error) != _LOCKED:
                raise
            self._others_until = 0.0  # they have it now
            return False
        return True

    def count_written(self, rows: int, size: int) -> None:
        self._pages += max(0, rows) * _PAGES_OF_A_CHANGE + size // _PAGE_SIZE

    def commit(self) -> Any:
        committed = super().commit()
        self._after_commit()
        return committed

    def _after_commit(self) -> None:
        if self._pages > _PAGES_TO_EMPTY:
            self._empty_log_beside()

    def beyond(self, keys: Sequence[Any], values: Sequence[Any], *, descending: bool) -> Any:
        # Of several it does not see where in the index to begin if the first is an expression.
        first = keys[0] <= values[0] if descending else keys[0] >= values[0]
        return first & super().beyond(keys, values, descending=descending)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        with self._turn(), self.atomic():
            yield

    @contextmanager
    def _turn(self) -> Iterator[None]:
        time.sleep(max(0.0, self._others_until - time.monotonic()))
        try:
            yield
        finally:
            self._let_others()

    def _let_others(self) -> None:
        self._others_until = time.monotonic() + _FOR_OTHERS

    def rollback(self) -> None:
        # On a full disk SQLite rolls back by itself; to do so again is an error, which would hide the first one.
        if self.connection().in_transaction:  # type: ignore[no-untyped-call]
            super().rollback()

    @contextmanager
    def of_many(self) -> Iterator[None]:
        self._prepare_for_many()
        with self.in_turn():
            yield

    def _prepare_for_many(self) -> None:
        self.settle()
        self._run(f"PRAGMA cache_size = -{_CACHE_OF_MANY}")

    def settle(self) -> None:
        emptying = self._emptying
        if emptying is not None:
            emptying.result()

    # What is committed is in the log first. By default whoever commits into a long one copies what is in it, and waits for
    # the disk to have it: some 25 ms for 1000 pages, and as many times as long after a backup, behind which it grows. Here
    # another thread does, so that no request has to.

    def _empty_log_beside(self) -> None:
        with self._guard:
            if self._emptying is not None and not self._emptying.done():
                return
            self._pages = 0
            # Thread and connection end with it, so that nothing is left that a fork could inherit.
            thread = ThreadPoolExecutor(1, "session-log")
            try:
                self._emptying = thread.submit(self._empty_log)
            except RuntimeError:  # the interpreter ends, or there are too many threads
                self._emptying = None
            thread.shutdown(wait=False)
        if self._emptying is None:
            with suppress(pw.PeeweeException):
                self._copy_log()

    def _empty_log(self) -> None:
        with suppress(pw.PeeweeException):  # nothing is lost: what is wrong with the disk is told to the next that commits
            try:
                self._empty_log_here()
            finally:
                # The thread would do so at its end, which comes after whoever waits was told: a fork would come between.
                self.close()

    def _empty_log_here(self) -> None:
        pages = self._copy_log()
        if pages > _LONGEST_LOG:
            # While others write all the time, a log that they can add to is never empty, and grows without end: each page
            # then takes longer to find. For the last of it they are held up, and it must be little: the disk has the rest
            # once nobody has written while it was copied, and short copies are such sooner or later.
            for _ in range(_SHORT_COPIES):
                self._copy_log()
            self._run(f"PRAGMA busy_timeout = {_TO_EMPTY_IT}")
            self._run("PRAGMA wal_checkpoint(RESTART)").fetchone()
            self._let_others()

    def _copy_log(self) -> int:
        """Copy what is in the log into the database, without a lock; returns how many pages the log has."""
        _, pages, _ = self._run("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return int(pages)

    def _run(self, sql: str, params: Sequence[Any] | None = None) -> Any:
        return self._once_free(partial(super().execute_sql, sql, params))

    def begin(self, lock_type: str | None = None) -> None:
        self._once_free(partial(super().begin, lock_type))

    def _once_free(self, attempt: Callable[[], _T]) -> _T:
        """What *attempt* returns once nobody else has the lock that it needs."""
        pause, ends = _FIRST_LOOK, time.monotonic() + self.timeout
        while True:
            try:
                return attempt()
            except pw.OperationalError as error:
                # Within a transaction nothing waits: it has had the lock since it began. Other locks are this connection's
                # own, and other messages name tables, which may be called anything.
                if str(error) != _LOCKED or self.in_transaction() or time.monotonic() > ends:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_BETWEEN_LOOKS)

    def _connect(self) -> Any:
        connection: Any = super()._connect()
        connection.execute("PRAGMA busy_timeout = 0")  # it is looked at more often than SQLite would
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
    rows_at_once = _MANY_ROWS
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
    pragmas = {
        "journal_mode": "wal",
        "synchronous": options["synchronous"],
        "wal_autocheckpoint": _MOST_PAGES,
    }

    def connect() -> PerThread:
        # The closing of a connection may happen in another thread; each is used by its own alone.
        return _SQLite(path, pragmas=pragmas, timeout=options["timeout"], lock_type="IMMEDIATE", check_same_thread=False)

    return f"the SQLite database {path}", connect, options["timeout"]


def size_of(path: str) -> int:
    """The bytes of a file, none if it is missing."""
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


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
