"""MySQL and MariaDB with PyMySQL, through peewee, and where their SQL differs from that of the other databases."""

from __future__ import annotations

import math
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import peewee as pw
import pymysql
from pymysql.constants import CR, ER, FIELD_TYPE
from pymysql.converters import conversions, escape_float
from pymysql.cursors import SSCursor

from ..exceptions import ConfigError
from . import Location, seconds
from .databases import Connect, PerThread

#: Errors after which it is worth to try again: locks, timeouts, lost connections, a server that is full, stops or became a
#: replica. PyMySQL takes whatever it does not know for an ``OperationalError``.
_PASSING: frozenset[int] = frozenset({
    *(ER.CON_COUNT_ERROR, ER.SERVER_SHUTDOWN, ER.NORMAL_SHUTDOWN, ER.TOO_MANY_USER_CONNECTIONS, ER.USER_LIMIT_REACHED),
    *(ER.LOCK_WAIT_TIMEOUT, ER.LOCK_DEADLOCK, ER.QUERY_INTERRUPTED, ER.OPTION_PREVENTS_STATEMENT),
    *(ER.NEW_ABORTING_CONNECTION, ER.ABORTING_CONNECTION),
    *(ER.NET_READ_ERROR, ER.NET_READ_INTERRUPTED, ER.NET_ERROR_ON_WRITE, ER.NET_WRITE_INTERRUPTED),
    *(CR.CR_CONNECTION_ERROR, CR.CR_CONN_HOST_ERROR, CR.CR_UNKNOWN_HOST, CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST),
    1047,  # Galera: this node is not ready
    1836,  # MySQL: read-only
    1927,  # MariaDB: somebody ended the connection
    1969,  # MariaDB: max_statement_time
    3024,  # MySQL: max_execution_time
    4031,  # MySQL: nobody used the connection for long
})  # fmt: skip
#: What PyMySQL says of a connection that it gave up because no answer came in time.
_TIMED_OUT = "(timed out)"
#: Seconds after which a connection that nobody used is tried first: servers, and what is between, close such ones.
_IDLE = 30.0
#: Seconds for which the server itself waits for the next statement.
_LONGEST_IDLE = 7 * 86400
#: The bytes by which a statement may be longer than its characters: the data are in it as digits, names are not.
_BYTES_OF_NAMES = 16_384
#: How far a connection is secured, in the words of MySQL's own programs.
_SSL_MODES = ("disabled", "preferred", "required", "verify_ca", "verify_identity")


class _Connection(pymysql.connections.Connection):  # type: ignore[misc]
    """A connection that knows how long a statement may be, and when it was used last."""

    longest: float = float("inf")
    used = 0.0

    def _create_ssl_ctx(self, options: Any) -> Any:
        # Asked for nothing, it makes one for each connection, which takes ten times as long as connecting.
        return options if isinstance(options, ssl.SSLContext) else _unverified()

    def query(self, sql: Any, unbuffered: bool = False) -> Any:
        if len(sql) + _BYTES_OF_NAMES > self.longest:
            # The server would close the connection in the middle of it, without a word.
            raise pymysql.err.DataError(
                ER.NET_PACKET_TOO_LARGE,
                f"a statement has {len(sql):,} bytes, two for each of the data; the server takes {int(self.longest):,}. "
                "Raise its max_allowed_packet, or lower PERSIST_SESSION_MAX_BYTES",
            )
        try:
            return super().query(sql, unbuffered=unbuffered)
        finally:
            self.used = time.monotonic()

    def close(self) -> None:
        if self._result is not None:
            self._result.unbuffered_active = False  # else the rest of a result is read when it is collected
        if self.open:
            super().close()


class _Stream(SSCursor):  # type: ignore[misc]
    """A cursor that fetches rows as they are asked for; it leaves the rest of them by closing the connection."""

    connection: Any

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    __del__ = close


class _PyMySQL(pw.MySQLDatabase):
    def _connect(self) -> _Connection:
        connection = _Connection(database=self.database, autocommit=True, **self.connect_params)
        with connection.cursor() as cursor:
            cursor.execute("SELECT @@max_allowed_packet")
            connection.longest = cursor.fetchone()[0]
        return connection


class _MySQL(PerThread, _PyMySQL):
    # No collation that both servers have compares texts as the other databases do: some letters, or spaces at the end, are
    # equal to it.
    field_types = pw.MySQLDatabase.field_types | {
        "NAME": "VARBINARY(2048)",
        "TEXT": "LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
        "BLOB": "LONGBLOB",
    }
    row_lock = " FOR UPDATE"
    history_tables = (
        """CREATE TABLE IF NOT EXISTS "{table}" (session_id VARBINARY(2048) NOT NULL, seq BIGINT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL, "key" VARBINARY(64), data LONGBLOB NOT NULL, PRIMARY KEY (session_id, seq),
        INDEX "{index}" (session_id, "key"), FOREIGN KEY (session_id) REFERENCES "{sessions}" (id) ON DELETE CASCADE)""",
    )

    def make(self, models: Sequence[Any]) -> None:
        for model in models:
            with model.bind_ctx(self):
                statement, parameters = model._schema._create_table(safe=True).query()
            # Whatever is made is there for good at once, so the indexes are made with the table, not after it.
            indexes = map(_index, model._meta.fields_to_index())
            text = ", ".join([statement.removesuffix(")"), *indexes])
            self.execute_sql(f"{text})", parameters)  # type: ignore[no-untyped-call]

    def beyond(self, keys: Sequence[Any], values: Sequence[Any], *, descending: bool) -> Any:
        # Row by row, as the other databases compare them, it would use no index.
        key, value = keys[0], values[0]
        later = key < value if descending else key > value
        if len(keys) == 1:
            return later
        return later | ((key == value) & self.beyond(keys[1:], values[1:], descending=descending))

    # INSERT IGNORE would cut what is too long, and REPLACE removes the history.

    def conflict_statement(self, on_conflict: Any, query: Any) -> None:
        return None

    def conflict_update(self, on_conflict: Any, query: Any) -> Any:
        changes = on_conflict._update or {query.table._meta.primary_key: query.table._meta.primary_key}
        items = self._conflict_update_items(  # type: ignore[attr-defined]
            pw.OnConflict(update=changes), query, qualify=False
        )
        return pw.NodeList((pw.SQL("ON DUPLICATE KEY UPDATE"), pw.CommaNodeList(items)))

    def will_pass(self, error: pw.PeeweeException) -> bool:
        return isinstance(error, pw.InterfaceError) or _number_of(error) in _PASSING

    def timed_out(self, error: pw.PeeweeException) -> bool:
        return _TIMED_OUT in str(error)

    def gave_way(self, error: pw.PeeweeException) -> bool:
        return bool(_number_of(error) == ER.LOCK_DEADLOCK)

    def take_time(self) -> None:
        self.connect_params |= {"read_timeout": None, "write_timeout": None}
        self._take_time_on_the_server()

    def _take_time_on_the_server(self) -> None:
        settings = self.connect_params["init_command"]
        self.connect_params["init_command"] = f"{settings}, net_write_timeout = 86400{_longest_statement(0)}"

    def _streaming_cursor(self) -> Any:
        self._take_time_on_the_server()
        return _Stream(self.connection())  # type: ignore[no-untyped-call]

    def _current(self) -> Any:
        return self._state.conn  # type: ignore[attr-defined]

    def cursor(self, named_cursor: Any = None) -> Any:
        connection = self._current()
        if connection is not None and time.monotonic() > connection.used + _IDLE and not self.in_transaction():
            self._close_if_lost()
        return super().cursor(named_cursor)  # type: ignore[no-untyped-call]

    def _close_if_lost(self) -> None:
        try:
            self._current().ping(reconnect=False)
        except pymysql.err.Error as error:
            self.close()
            if _TIMED_OUT in str(error):  # a new connection would be waited for as long once more
                raise

    def is_connection_usable(self) -> bool:
        connection = self._current()
        if connection is None or not connection.open:
            return False
        try:
            connection.ping(reconnect=False)
        except pymysql.err.Error:
            return False
        return True

    def rollback(self) -> None:
        # A server that is gone has rolled back; to tell it so is an error, which would hide the first one.
        if self._current().open:
            super().rollback()


def _index(index: Any) -> str:
    columns = ", ".join(f'"{field.column_name}"' for field in index._expressions)
    return f'INDEX "{index._name}" ({columns})'


def _number_of(error: pw.PeeweeException) -> int:
    number = error.args[0] if error.args else 0
    return number if type(number) is int else 0


def _text(value: str | bytes) -> str | bytes:
    """What a column of names has; bytes that are no text stay bytes, so that they damage their own record only."""
    with suppress(UnicodeDecodeError):
        return value.decode() if isinstance(value, bytes) else value
    return value


def _moment(value: float, mapping: Any = None) -> str:
    """A number as SQL, which has no word for infinity: whatever is stored is nearer than the largest number."""
    if math.isnan(value):
        return "NULL"
    return str(escape_float(max(-sys.float_info.max, min(value, sys.float_info.max))))


def open_mysql(location: Location) -> tuple[str, Connect, float]:
    """For a ``mysql:`` or ``mariadb:`` URL: what messages call the database, how to connect, how many seconds to wait.

    Raises ``ConfigError``.
    """
    url, name = location.url, unquote(location.url.path.removeprefix("/"))
    if not name or not url.path.startswith("/"):
        raise ConfigError(f"{location} names no database; write {url.scheme}://user:password@host:port/name")
    options = location.read_options(timeout=seconds, socket=_path, ssl_mode=_ssl_mode, ssl_ca=_path)
    wait = float(options.get("timeout", 5.0))
    parameters = {
        "host": url.hostname,
        "port": url.port,
        "unix_socket": options.get("socket"),
        "user": unquote(url.username) if url.username else None,
        # As bytes: PyMySQL would take the characters for Latin-1.
        "password": unquote_to_bytes(url.password) if url.password else None,
        "connect_timeout": wait,
        "read_timeout": wait + 1,
        "write_timeout": wait + 1,
        "init_command": _settings(wait) + _longest_statement(wait),
        "conv": conversions | {float: _moment, FIELD_TYPE.VAR_STRING: _text, FIELD_TYPE.STRING: _text},
        **_security(location, options),
    }
    given = {key: value for key, value in parameters.items() if value is not None}
    connect: Callable[[], PerThread] = partial(_MySQL, name, **given)
    return f"the MySQL database {location}", connect, wait


def _settings(wait: float) -> str:
    """What every connection is set to, whatever the server's own settings are."""
    locked = max(1, round(wait))
    return (
        # Names in double quotes, as in the other databases; nothing is cut to fit.
        "SET SESSION sql_mode = 'ANSI_QUOTES,STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', "
        f"innodb_lock_wait_timeout = {locked}, lock_wait_timeout = {locked}, wait_timeout = {_LONGEST_IDLE}, "
        "default_storage_engine = InnoDB"
        # With REPEATABLE READ, its default, a statement locks what is between the rows too, and so other sessions.
        "/*M! , tx_isolation = 'READ-COMMITTED' *//*!80000 , transaction_isolation = 'READ-COMMITTED' */"
    )


def _longest_statement(wait: float) -> str:
    """The seconds that the server takes for a statement, 0 for no limit; in comments that one of them reads alone."""
    return f"/*M! , max_statement_time = {wait} *//*!80000 , max_execution_time = {round(wait * 1000)} */"


def _path(text: str) -> str:
    # Such as of a variable that is not set: a connection would be less secure than whoever wrote the option meant it to be.
    if not text:
        raise ValueError("it names no path")
    return text


def _ssl_mode(text: str) -> str:
    if text not in _SSL_MODES:
        raise ValueError(f"allowed is {', '.join(_SSL_MODES)}")
    return text


@cache
def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _security(location: Location, options: dict[str, Any]) -> dict[str, Any]:
    """How PyMySQL is told to secure a connection."""
    authorities = options.get("ssl_ca")
    # What goes through a socket does not leave the machine.
    usual = "verify_identity" if authorities else "disabled" if "socket" in options else "preferred"
    mode = options.get("ssl_mode", usual)
    if mode == "preferred":
        return {}
    if mode == "disabled":
        return {"ssl_disabled": True}
    if mode == "required":
        return {"ssl": _unverified()}
    try:
        context = ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise ConfigError(f"{location} has the option ssl_ca={authorities!r}: {error.strerror or error}") from error
    # The certificates that MySQL makes for itself are not of the form that Python 3.13 asks for.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.check_hostname = mode == "verify_identity"
    return {"ssl": context}
