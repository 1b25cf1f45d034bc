"""Looks after the tables of a SQL database while the application goes on."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import peewee as pw

from ..exceptions import SerializationError
from ..records import Finding, Improvement, SessionRecord
from ..tokens import shard_of
from .databases import PerThread, size_of

_PAGE = 500
#: SQLite compares indexes and tables of a database up to so many bytes; of a larger one it looks at the pages alone, which
#: takes a fraction of the time.
_LARGE = 1_000_000_000
#: How many rows of an index SQLite looks at for its statistics, so that writers wait for a moment only.
_ANALYSED = 400
#: Milliseconds for which the end of a checkpoint waits for readers, while writers wait for it.
_CHECKPOINT_WAIT = 20
#: So often, and with so many seconds in between, it is looked whether others are done with copying the log.
_LOOKS, _BETWEEN_LOOKS = 50, 0.05


class SQLCheck:
    """One check of the table of a namespace; see ``SessionStore.check``.

    :param read: makes a record of a row, given by column.
    """

    def __init__(
        self,
        database: PerThread,
        model: Any,
        *,
        repair: bool,
        seen: Callable[[SessionRecord], object],
        read: Callable[[dict[str, Any]], SessionRecord],
    ) -> None:
        self._database = database
        self._model = model
        self._table = model._meta.table_name
        self._repair = repair
        self._seen = seen
        self._read = read

    def run(self) -> Iterator[Finding]:
        if isinstance(self._database, pw.SqliteDatabase):
            yield from self._modes()
            yield from self._integrity()
        elif isinstance(self._database, pw.PostgresqlDatabase):
            yield from self._invalid_indexes()
        yield from self._indexes()
        yield from self._rows()

    def _modes(self) -> Iterator[Finding]:
        for path in map(self._database.database.__add__, ("", "-wal", "-shm")):
            with suppress(FileNotFoundError):
                mode = stat.S_IMODE(os.stat(path).st_mode)
                if mode & 0o007:
                    # By its name: SQLite loses its locks if this process opens and closes the file.
                    if self._repair:
                        os.chmod(path, mode & ~0o007)
                    text = f"everybody on this machine may use it: its mode is {mode:04o}"
                    yield Finding(kind="mode", where=path, text=text, repaired=self._repair)

    # The database of SQLite -------------------------------------------------------------------------------------------

    def _integrity(self) -> Iterator[Finding]:
        problems = self._problems()
        broken = [name for name in self._wanted() if any(name in problem for problem in problems)]
        if self._repair and broken:
            for name in broken:
                self._run(f'REINDEX "{name}"')
            left = self._problems()
        else:
            left = problems
        for problem in problems:
            mended = problem not in left
            hint = "" if mended else "; if a repair does not help, restore the newest backup into a new database"
            yield Finding(kind="database", where=self._database.database, text=f"{problem}{hint}", repaired=mended)

    def _problems(self) -> list[str]:
        (pages,), (size,) = self._run("PRAGMA page_count")[0], self._run("PRAGMA page_size")[0]
        check = "integrity_check" if pages * size <= _LARGE else "quick_check"
        lines = [line for (text,) in self._run(f"PRAGMA {check}") for line in str(text).splitlines()]
        return [line for line in lines if line != "ok" and not line.startswith("***")]

    # Indexes ----------------------------------------------------------------------------------------------------------

    def _wanted(self) -> dict[str, Any]:
        return {index._name: index for index in self._model._meta.fields_to_index()}

    def _invalid_indexes(self) -> Iterator[Finding]:
        """What is left of indexes that PostgreSQL could not finish; they are made anew afterwards."""
        rows = self._run(
            "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "WHERE i.indrelid = to_regclass(%s) AND NOT i.indisvalid",
            (f'"{self._table}"',),
        )
        for (name,) in rows:
            if self._repair:
                self._run(f'DROP INDEX CONCURRENTLY "{name}"')
            yield Finding(kind="schema", where=name, text="the index was not finished", repaired=self._repair)

    def _indexes(self) -> Iterator[Finding]:
        there = {index.name for index in self._database.get_indexes(self._table)}
        for name, index in self._wanted().items():
            if name not in there:
                if self._repair:
                    self._create(index)
                text = "the index is missing, so listings look at every session"
                yield Finding(kind="schema", where=name, text=text, repaired=self._repair)

    def _create(self, index: Any) -> None:
        with self._model.bind_ctx(self._database):
            statement, parameters = self._model._schema._create_index(index).query()
        if isinstance(self._database, pw.PostgresqlDatabase):
            statement = statement.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)
        self._run(statement, parameters)

    # Rows -------------------------------------------------------------------------------------------------------------

    def _rows(self) -> Iterator[Finding]:
        columns = self._model._meta.sorted_fields
        names = ", ".join(f'"{column.column_name}"' for column in columns)
        statement = f'SELECT {names} FROM "{self._table}" WHERE id > {self._database.param} ORDER BY id LIMIT {_PAGE}'
        last = ""
        while rows := self._run(statement, (last,)):
            for row in rows:
                yield from self._row(dict(zip((column.name for column in columns), row, strict=True)))
            last = rows[-1][0]

    def _row(self, values: dict[str, Any]) -> Iterator[Finding]:
        try:
            record = self._read(values)
            self._seen(record)
        except SerializationError as error:
            text = f"{error}; it stays, and counts as corrupt for its user. To remove it, delete the row or the session"
            yield Finding(kind="record", where=str(values["id"]), text=text)
            return
        of_sqlite = isinstance(self._database, pw.SqliteDatabase)
        if of_sqlite and record.user_id is not None and record.id[:3] != shard_of(record.user_id):
            text = f"its user was changed to {record.user_id!r}, whose lists lack it. Set the user back, or delete the row"
            yield Finding(kind="index", where=record.id, text=text)

    def _run(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        return fetched(self._database, statement, parameters)


def fetched(database: PerThread, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
    """All rows that a statement gives."""
    cursor: Any = database.execute_sql(statement, parameters or None)  # type: ignore[no-untyped-call]
    return list(cursor.fetchall()) if cursor.description else []


# Tidying up -----------------------------------------------------------------------------------------------------------


def tidy_up(database: PerThread, table: str, *, full: bool) -> Iterator[Improvement]:
    """Bring the statistics of the database up to date and give back room, on a connection of its own."""
    if isinstance(database, pw.SqliteDatabase):
        yield from _tidy_up_sqlite(database, table, full)
    elif isinstance(database, pw.PostgresqlDatabase):
        yield from _tidy_up_postgresql(database, table, full)
    else:
        yield from _tidy_up_mysql(database, table, full)


def _tidy_up_sqlite(database: Any, table: str, full: bool) -> Iterator[Improvement]:
    database.connect()
    database.timeout = 0  # as requests wait for a lock; here SQLite itself waits, as long as each part is worth
    fetched(database, f"PRAGMA busy_timeout = {_CHECKPOINT_WAIT}")
    yield from _analyse(database, table)
    yield from _truncate_log(database)
    free = _number(database, "freelist_count") * _number(database, "page_size")
    if full:
        yield from _vacuum(database)
    elif free:
        # To rewrite even 1 MB of it holds up writers for as long as a request may wait, 50 ms.
        yield Improvement(
            text=f"{free:,} bytes of the database are unused and wait for new sessions; --full gives them back"
        )


def _analyse(database: PerThread, table: str) -> Iterator[Improvement]:
    fetched(database, f"PRAGMA analysis_limit = {_ANALYSED}")
    with suppress(pw.OperationalError):  # somebody writes all the time; the statistics can wait
        fetched(database, f'ANALYZE "{table}"')
        yield Improvement(text="brought the statistics of the query planner up to date")


def _truncate_log(database: PerThread) -> Iterator[Improvement]:
    """Bring what is in the log into the database; where somebody reads from it all the time, it stays as long as it is."""
    log = f"{database.database}-wal"
    before = size_of(log)
    # First what holds up nobody, so that next to nothing is left for what does.
    for _ in range(_LOOKS):
        [(busy, _, _)] = fetched(database, "PRAGMA wal_checkpoint(PASSIVE)")
        if not busy:
            break
        time.sleep(_BETWEEN_LOOKS)  # somebody else copies it just now
    fetched(database, "PRAGMA wal_checkpoint(TRUNCATE)")
    if (freed := before - size_of(log)) > 0:
        yield Improvement(text="emptied the log of the database", freed=freed)


def _vacuum(database: PerThread) -> Iterator[Improvement]:
    before = size_of(database.database)
    fetched(database, "PRAGMA busy_timeout = 5000")
    fetched(database, "VACUUM")
    fetched(database, f"PRAGMA busy_timeout = {_CHECKPOINT_WAIT}")
    fetched(database, "PRAGMA wal_checkpoint(TRUNCATE)")
    yield Improvement(text="rewrote the database", freed=max(0, before - size_of(database.database)))


def _tidy_up_postgresql(database: PerThread, table: str, full: bool) -> Iterator[Improvement]:
    size = f"SELECT pg_total_relation_size('\"{table}\"')"
    before = fetched(database, size)[0][0]
    fetched(database, f'VACUUM ({"FULL, " if full else ""}ANALYZE) "{table}"')
    freed = max(0, before - fetched(database, size)[0][0])
    text = "rewrote the table" if full else "made room in the table for new sessions"
    yield Improvement(text=f"{text} and brought the statistics of the query planner up to date", freed=freed)


def _tidy_up_mysql(database: PerThread, table: str, full: bool) -> Iterator[Improvement]:
    before = _bytes_in_mysql(database, table)
    if full:
        _maintain(database, "OPTIMIZE", table)
    freed = max(0, before - _bytes_in_mysql(database, table)) if full else 0
    text = "rewrote the table and brought" if full else "brought"
    yield Improvement(text=f"{text} the statistics of the query planner up to date", freed=freed)


def _bytes_in_mysql(database: PerThread, table: str) -> int:
    # What the dictionary of tables says of it may be as old as the statistics.
    _maintain(database, "ANALYZE", table)
    size = "SELECT data_length + index_length FROM information_schema.tables WHERE table_schema = DATABASE()"
    return int(fetched(database, f"{size} AND table_name = %s", (table,))[0][0] or 0)


def _maintain(database: PerThread, what: str, table: str) -> None:
    # It answers with what went wrong in place of failing.
    for _, _, kind, text in fetched(database, f'{what} TABLE "{table}"'):
        if kind.lower() == "error":
            raise pw.OperationalError(f"{what} TABLE {table}: {text}")


def _number(database: PerThread, pragma: str) -> int:
    return int(fetched(database, f"PRAGMA {pragma}")[0][0])
