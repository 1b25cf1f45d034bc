"""The histories of the sessions of a SQL database: one row per entry.

The table is made when the first entry is appended, so a database whose sessions have no histories needs none. It is
``persist_history_<namespace>`` and not named after the table of the sessions, because there may be a namespace of that
name. The database itself removes a history together with its session, whoever deletes that: SQLite by a trigger, because
it obeys foreign keys only where each connection asks for it; other databases by a foreign key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..records import LogEntry, is_session_id
from .databases import PerThread, again, translated
from .history import (
    RESTORED_AT_ONCE,
    HistoryLog,
    behind,
    check_began,
    check_entries,
    check_restored,
    check_room,
    digest_of,
    log_entry,
    no_session,
    span,
)

_NO_LIMIT = 2**63 - 1
_STATEMENTS = {
    # In SQLite the transaction has the only write lock there is. Where it is a lock on the row, what follows must be a
    # statement of its own, to see what was committed while this one waited.
    "session": 'SELECT created_at, ended_at FROM "{sessions}" WHERE id = ?{locked}',
    "last": 'SELECT MAX(seq) FROM "{table}" WHERE session_id = ?',
    "known": 'SELECT seq FROM "{table}" WHERE session_id = ? AND "key" = ?',
    "insert": 'INSERT INTO "{table}" (session_id, seq, created_at, "key", data) VALUES (?, ?, ?, ?, ?)',
    "first": """SELECT seq, created_at, data FROM "{table}" WHERE session_id = ? AND seq BETWEEN ? AND ?
    ORDER BY seq LIMIT ?""",
    "newest": """SELECT seq, created_at, data FROM "{table}" WHERE session_id = ? AND seq BETWEEN ? AND ?
    ORDER BY seq DESC LIMIT ?""",
    "delete": 'DELETE FROM "{table}" WHERE session_id = ?',
    "next": 'SELECT MIN(session_id) FROM "{table}" WHERE session_id > ?',
    # Each in one statement, which sees the tables as they are at one moment.
    "stray": """SELECT 1 FROM "{table}" WHERE session_id = ? AND NOT EXISTS (SELECT 1 FROM "{sessions}" WHERE id = ?)
    LIMIT 1""",
    "remove_stray": 'DELETE FROM "{table}" WHERE session_id = ? AND NOT EXISTS (SELECT 1 FROM "{sessions}" WHERE id = ?)',
}


class HistoryTable:
    """The table of the histories of a namespace: how it is made, and the statements that use it.

    :param sessions: the table of the sessions.
    :param namespace: part of the names of the table and its index.
    :param database: one of the kind whose SQL it is to be.
    """

    def __init__(self, sessions: str, namespace: str, database: PerThread) -> None:
        self._name = f"persist_history_{namespace}"
        names = {"sessions": sessions, "table": self._name, "index": f"persist_key_{namespace}"}
        names["locked"] = database.row_lock
        place = database.param
        self.statements = {name: text.format(**names).replace("?", place) for name, text in _STATEMENTS.items()}
        self._making = [statement.format(**names) for statement in database.history_tables]
        self._is_made = False

    def is_made(self, database: PerThread) -> bool:
        # A user who may not create anything can use what somebody else created.
        self._is_made = self._is_made or bool(database.table_exists(self._name))
        return self._is_made

    def make(self, database: PerThread) -> None:
        with database.atomic():
            for statement in self._making:
                database.execute_sql(statement)  # type: ignore[no-untyped-call]
        self._is_made = True


class SQLHistory(HistoryLog):
    """Keeps each entry as a row of a table.

    :param using: gives the database, connected and with the table of the sessions, and translates errors.
    """

    def __init__(self, using: Callable[[], AbstractContextManager[PerThread]], table: HistoryTable) -> None:
        self._using = using
        self._table = table

    @again
    def append(
        self,
        session_id: str,
        entries: Sequence[bytes],
        *,
        created_at: float,
        expected_seq: int | None = None,
        key: str | None = None,
        most: int | None = None,
        began: float | None = None,
    ) -> int:
        digest = digest_of(key)
        check_entries(entries, created_at)
        with self._changing(session_id, ended=False, began=began) as run:
            if digest is not None and (known := run("known", session_id, digest).fetchone()):
                return int(known[0])
            last = run("last", session_id).fetchone()[0] or 0
            check_room(session_id, last, len(entries), expected_seq, most)
            end = last + len(entries)
            # The key stands with the last entry, whose number was the answer.
            run.many(
                [
                    (session_id, seq, created_at, digest if seq == end else None, data)
                    for seq, data in enumerate(entries, last + 1)
                ]
            )
            return end

    def read(
        self,
        session_id: str,
        *,
        after: int = 0,
        before: int | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> list[LogEntry]:
        first, last = span(after, before, limit)
        if not is_session_id(session_id) or first > last:
            return []
        most = _NO_LIMIT if limit is None else min(limit, _NO_LIMIT)
        rows = self._rows("newest" if newest else "first", session_id, first, last, most)
        return [
            log_entry(session_id, seq, created_at, data) for seq, created_at, data in (reversed(rows) if newest else rows)
        ]

    def count(self, session_id: str) -> int:
        rows = self._rows("last", session_id) if is_session_id(session_id) else []
        return rows[0][0] or 0 if rows else 0

    @again
    def delete(self, session_id: str, *, began: float | None = None) -> bool:
        if not self.count(session_id):
            return False
        with self._transaction() as run:
            # Locked: an append must not go on from a number that is just being removed.
            found = run("session", session_id).fetchone()
            if began is not None and (found is None or found[0] != began):
                return False
            return bool(run("delete", session_id).rowcount)

    @again
    def restore(self, session_id: str, entries: Sequence[LogEntry]) -> int:
        check_restored(entries)
        stored = 0
        for start in range(0, max(len(entries), 1), RESTORED_AT_ONCE):
            with self._changing(session_id, ended=True) as run:
                last = run("last", session_id).fetchone()[0] or 0
                part = behind(session_id, last, entries[start : start + RESTORED_AT_ONCE])
                run.many([(session_id, entry.seq, entry.created_at, None, entry.data) for entry in part])
                stored += len(part)
        return stored

    def strays(self, *, repair: bool) -> Iterator[str]:
        """The ids of which there is a history but no session; with *repair* it is removed."""
        session_id = ""
        # From one history to the next, however long they are.
        while (found := self._rows("next", session_id)) and found[0][0] is not None:
            session_id = found[0][0]
            with self._transaction() as run:
                found = run("remove_stray" if repair else "stray", session_id, session_id)
                is_stray = found.rowcount > 0 if repair else found.fetchone() is not None
            if is_stray:
                yield session_id

    # Statements -------------------------------------------------------------------------------------------------------

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        """What a statement gives; nothing if there is no table yet."""
        with self._using() as database, translated:
            if not self._table.is_made(database):
                return []
            cursor: Any = database.execute_sql(self._table.statements[statement], values)  # type: ignore[no-untyped-call]
            return list(cursor.fetchall())

    @contextmanager
    def _changing(self, session_id: str, *, ended: bool, began: float | None = None) -> Iterator[_Run]:
        """A transaction during which nobody else changes the session or its history.

        Raises ``SessionNotFound`` if there is no session, not the one that *began* then, or it has *ended* and must not
        have.
        """
        if not is_session_id(session_id):
            raise no_session(session_id)
        with self._transaction() as run:
            found = run("session", session_id).fetchone()
            if found is None:
                raise no_session(session_id)
            check_began(session_id, found[0], began)
            if found[1] is not None and not ended:
                raise no_session(session_id, ended=True)
            yield run

    @contextmanager
    def _transaction(self) -> Iterator[_Run]:
        with self._using() as database, translated:
            if not self._table.is_made(database):
                self._table.make(database)
            with database.atomic():
                yield _Run(database, self._table.statements)


class _Run:
    """Runs statements by their names, on one cursor."""

    def __init__(self, database: PerThread, statements: dict[str, str]) -> None:
        self._cursor: Any = database.cursor()  # type: ignore[no-untyped-call]
        self._written = database.count_written
        self._statements = statements

    def __call__(self, name: str, *values: Any) -> Any:
        self._cursor.execute(self._statements[name], values)
        self._written(self._cursor.rowcount, 0)
        return self._cursor

    def many(self, rows: list[tuple[Any, ...]]) -> None:
        """Insert entries."""
        if rows:
            self._cursor.executemany(self._statements["insert"], rows)
            self._written(len(rows), sum(len(value) for row in rows for value in row if type(value) is bytes))
