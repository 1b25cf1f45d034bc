"""Sessions in a SQL database through peewee: SQLite, PostgreSQL with psycopg, MySQL and MariaDB with PyMySQL.

One table per namespace, ``persist_session_web`` for Flask's own; made by the first that comes, however many come at
once. The store has connections of its own, one per thread, and never touches one of the application's.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain, compress, count, islice
from operator import itemgetter
from typing import Any

import peewee as pw

from ..exceptions import ConfigError, SerializationError, StoreError, StoreUnavailable
from ..records import (
    LAST_MOMENT,
    Change,
    Deletion,
    Finding,
    Improvement,
    SessionQuery,
    SessionRecord,
    StoreStats,
    is_session_id,
)
from ..serializers import DAMAGED, record_of, values_of
from ..tokens import shard_of
from . import Location
from .base import (
    FIXED_FIELDS,
    SessionStore,
    after_fork,
    before_fork,
    can_match,
    check_namespace,
    check_save,
    check_transaction,
    conflict,
    ignore,
    lease_holder,
    log_unreadable,
    order_and_cut,
    per_tag,
    that_of,
)
from .databases import (
    Connect,
    GaveWay,
    Name,
    PerThread,
    again,
    inherited,
    open_mysql,
    open_postgresql,
    open_sqlite,
    translated,
)
from .sql_history import HistoryTable, SQLHistory
from .sql_upkeep import SQLCheck, tidy_up

SCHEMA_VERSION = 1
_PAGE = 500
#: So many rows are deleted in one transaction. In SQLite others wait for it: it takes some 5 ms.
_AT_ONCE = 250
#: So many changes at once are more than requests make.
_MANY = 100
#: What is added to the name of a table for those of its indexes; the last one by PostgreSQL.
_NAMES_OF_INDEXES = ("_expiry", "_user", "_pkey")
_COLUMNS = tuple(field.name for field in fields(SessionRecord))
#: The names of what statements are given, in their order: those that store a record, and the others.
_OF_RECORD = (*_COLUMNS, "expected")
_OF_ID = ("id", "expected")
#: Where in the former the version is that is replaced, and what may be large.
_EXPECTED = _OF_RECORD.index("expected")
_LARGE = tuple(map(_OF_RECORD.index, ("tags", "metadata", "data")))


def open_location(location: Location, namespace: str) -> SQLStore:
    """``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``postgresql://user:password@host:port/name``, ``mysql://…``.

    Options: ``timeout`` (seconds to wait for a lock, a connection or an answer, 5); for SQLite ``synchronous``
    (``normal``; ``full`` makes each save survive a power cut); for PostgreSQL ``host`` (a directory of sockets),
    ``sslmode`` and ``sslrootcert``; for MySQL, which may be written ``mariadb:``, ``socket``, ``ssl_mode``, ``ssl_ca``.
    """
    open_database = {"sqlite": open_sqlite, "postgresql": open_postgresql}.get(location.scheme, open_mysql)
    name, connect, patience = open_database(location)
    return SQLStore(connect, namespace, name=name, patience=patience)


class _WrongSchema(StoreError):
    """The table is that of another release."""


class SQLStore(SessionStore):
    """Keeps records as rows of a table.

    :param connect: makes a database object, not connected yet; called again after a fork.
    :param namespace: part of the table's name.
    :param name: what messages call the database.
    :param patience: seconds to wait for other processes that set up the database.

    Raises ``ConfigError`` for a namespace whose table would have the name of an index of another one.
    """

    def __init__(
        self, connect: Connect, namespace: str = "web", *, name: str = "the database", patience: float = 5.0
    ) -> None:
        if namespace.endswith(_NAMES_OF_INDEXES):
            raise ConfigError(
                f"the namespace {namespace!r} ends like an index of the table of another one, and a database has one thing "
                f"of a name; in SQL no namespace may end with {', '.join(_NAMES_OF_INDEXES)}"
            )
        self._connect = connect
        self._patience = patience
        self._name = name
        self._namespace = namespace
        # Weak: a store that is part of a circle is not closed by its last user letting go of it.
        self._family = weakref.WeakValueDictionary({namespace: self})
        self._holder = secrets.token_hex(16)
        self._open_database()
        before_fork(self._close_idle)
        after_fork(self._leave_to_parent)
        self._of_sqlite = isinstance(self._database, pw.SqliteDatabase)
        self._model, self._leases, self._schema = _models(f"persist_session_{namespace}", self._of_sqlite)
        self.writers = 1 if self._of_sqlite else SessionStore.writers
        self._histories = HistoryTable(self._model._meta.table_name, namespace, self._database)
        self._get, self._insert_new, self._insert, self._update, *deleting = self._compile()
        self._delete, self._delete_version = deleting

    # The contract -----------------------------------------------------------------------------------------------------

    def get(self, session_id: str) -> SessionRecord | None:
        if not is_session_id(session_id):
            return None
        try:
            row = self._row(session_id)
        except pw.PeeweeException as error:
            if self._database.timed_out(error) or not self._lost_connection():
                raise self._failure(error) from error
            with self._using():  # the server was restarted, say: once more on a new connection
                row = self._row(session_id)
        return None if row is None else that_of(_record(row), session_id)

    @again
    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        try:
            saved = self._save(self._ready_database(), record, expected)
        except pw.PeeweeException as error:
            raise self._failure(error) from error
        if not saved:
            raise conflict(record.id, expected)

    @again
    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        with self._using() as database:
            return self._remove(database, Deletion(id=session_id, expected=expected))

    def scan(self) -> Iterator[SessionRecord]:
        return self.find(SessionQuery())

    def snapshot(self) -> Iterator[SessionRecord]:
        # A single statement sees the table as it was when it began, and holds up no writer. It runs on a connection of
        # its own, because others of this thread go on meanwhile.
        database, model = self._connect(), self._model
        rows = model.select(*(getattr(model, name) for name in _COLUMNS)).order_by(model.id)
        statement, _ = rows.bind(database).sql()
        with self._using(), database.streaming(statement) as cursor:
            while found := cursor.fetchmany(_PAGE):
                yield from _readable(found)

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        if not can_match(query):
            return iter(())
        if query.ids is not None and len(query.ids) > _PAGE:
            return order_and_cut(chain.from_iterable(map(self.find, _parts(query, query.ids))), query)
        # What the database cannot judge is judged on what it yields; then it cannot cut either.
        rest = _without_what_sql_judges(query)
        if rest is None:
            return self._pages(query, query.offset, query.limit)
        matching = (record for record in self._pages(query, 0, None) if rest.matches(record))
        return islice(matching, query.offset, None if query.limit is None else query.offset + query.limit)

    def count(self, query: SessionQuery) -> int:
        if not can_match(query) or _without_what_sql_judges(query) is not None:
            return super().count(query)
        if query.ids is not None and len(query.ids) > _PAGE:
            found = sum(map(self.count, _parts(query, query.ids)))
        else:
            with self._using() as database:
                statement = self._model.select(pw.fn.COUNT(pw.SQL("*"))).where(*self._conditions(query))
                found = int(statement.scalar(database))
        rest = max(0, found - query.offset)
        return rest if query.limit is None else min(rest, query.limit)

    def stats(self, *, now: float) -> StoreStats:
        with self._using() as database, translated:
            total, ended, expired, size, oldest, newest = self._sums(now).execute(database)[0]
            tenants = list(self._tenants().execute(database))
            tags = per_tag(self._tag_sets().iterator(database))
        return StoreStats(
            total=total,
            active=total - int(ended or 0) - int(expired or 0),
            expired=int(expired or 0),
            ended=int(ended or 0),
            users=sum(users for _, users, _ in tenants),
            bytes=int(size or 0),
            oldest=oldest,
            newest=newest,
            tenants={tenant: int(count) for tenant, _, count in tenants if type(tenant) is str},
            tags=tags,
        )

    # Three statements: a database that sorts the rows to group them would carry the data along for its length.

    def _sums(self, now: float) -> Any:
        model = self._model
        ended = model.ended_at.is_null(False)
        expired = model.ended_at.is_null() & (model.expires_at <= now)
        # SQLite keeps anything in any column; what is no number is larger than all numbers.
        began = pw.Case(None, [(model.created_at < LAST_MOMENT, model.created_at)])
        return model.select(
            pw.fn.COUNT(pw.SQL("*")),
            pw.fn.SUM(pw.Case(None, [(ended, 1)], 0)),
            pw.fn.SUM(pw.Case(None, [(expired, 1)], 0)),
            pw.fn.SUM(pw.fn.LENGTH(model.data)),
            pw.fn.MIN(began),
            pw.fn.MAX(began),
        ).tuples()

    def _tenants(self) -> Any:
        """Of each tenant, and of none: how many different users, how many sessions."""
        model, count = self._model, pw.fn.COUNT(pw.SQL("*")).alias("count")
        users = model.select(model.tenant_id, model.user_id, count).group_by(model.user_id, model.tenant_id).alias("users")
        different, sessions = pw.fn.COUNT(users.c.user_id), pw.fn.SUM(users.c.count)
        return pw.Select([users], [users.c.tenant_id, different, sessions]).group_by(users.c.tenant_id).tuples()

    def _tag_sets(self) -> Any:
        model = self._model
        counted = model.select(model.tags, pw.fn.COUNT(pw.SQL("*"))).where(model.tags != "")
        return counted.group_by(model.tags).tuples()

    @again
    def save_many(self, changes: Sequence[Change]) -> list[bool]:
        for change in changes:
            check_save(change.record, change.expected)
        outcomes, order, many = [False] * len(changes), _in_order(changes), len(changes) >= _MANY
        # Built before the transaction, for which others may have to wait.
        values = [(*values_of(changes[n].record), changes[n].expected) for n in order]
        with self._using() as database:
            if many and database.rows_at_once > 1 and not any(change.expected for change in changes):
                all_or_none = self._insert_together(database, values)
                if all_or_none is not None:
                    return [all_or_none] * len(changes)
            statements = [self._statement(given) for given in values]
            run: Any = database.execute_sql
            with database.of_many() if many else database.atomic():
                for number, statement in zip(order, statements, strict=True):
                    outcomes[number] = bool(run(*statement).rowcount)
        return outcomes

    def _insert_together(self, database: PerThread, values: Sequence[tuple[Any, ...]]) -> bool | None:
        """Insert rows with few statements, all or none; says whether they were. ``None`` if some were there, not all.

        After every single statement the driver waits for the interpreter, in which other threads compute, for 5 ms each.
        """
        rows = [self._insert_new(given)[1] for given in values]
        parts = [rows[start : start + database.rows_at_once] for start in range(0, len(rows), database.rows_at_once)]
        statements = [self._insert_new.of_rows(part) for part in parts]
        try:
            database.insert_many(statements, len(rows), sum(len(given[n]) for given in values for n in _LARGE))
        except pw.IntegrityError:
            ids = frozenset(given[0] for given in values)
            return False if self.count(SessionQuery(ids=ids)) == len(ids) else None
        return True

    def delete_many(self, deletions: Sequence[Deletion]) -> list[bool]:
        outcomes, order = [False] * len(deletions), _in_order(deletions)
        for start in range(0, len(order), _AT_ONCE):
            numbers = order[start : start + _AT_ONCE]
            for number, removed in zip(numbers, self._delete_in_turn([deletions[n] for n in numbers]), strict=True):
                outcomes[number] = removed
        return outcomes

    @again
    def _delete_in_turn(self, deletions: Sequence[Deletion]) -> list[bool]:
        with self._using() as database, database.in_turn():
            return [self._remove(database, deletion) for deletion in deletions]

    @again
    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        check_transaction(changes)
        with self._using() as database, database.atomic():
            for change in map(changes.__getitem__, _in_order(changes)):
                if isinstance(change, Change):
                    done = self._save(database, change.record, change.expected)
                else:
                    done = self._remove(database, change) or change.expected is None
                if not done:
                    raise conflict(change.id, change.expected)

    @again
    def lease(self, name: str, seconds: float) -> bool:
        leases, now = self._leases, time.time()
        key, holder = f"{self._namespace}:{name}", lease_holder(self._holder)
        free = (leases.name == key) & ((leases.until <= now) | (leases.holder == holder))
        with self._using() as database:
            if leases.update(holder=holder, until=now + seconds).where(free).execute(database):
                return seconds > 0
            row = leases.insert(name=key, holder=holder, until=now + seconds).on_conflict_ignore()
            return bool(row.as_rowcount().execute(database)) and seconds > 0

    def namespace(self, name: str) -> SQLStore:
        check_namespace(name)
        store = self._family.get(name)
        if store is None:
            store = SQLStore(self._connect, name, name=self._name, patience=self._patience)
            store._family = self._family
            self._family[name] = store
        return store

    @property
    def history(self) -> SQLHistory:
        # Not kept: a store that is part of a circle is not closed by its last user letting go of it.
        return SQLHistory(self._using, self._histories)

    def check(self, *, repair: bool, seen: Callable[[SessionRecord], object] = ignore) -> Iterator[Finding]:
        try:
            self._ready_database()
            with self._unhurried() as database:
                check = SQLCheck(database, self._model, repair=repair, seen=seen, read=_named_record)
                with translated:
                    yield from check.run()
            yield from self._stray_histories(repair)
        except pw.PeeweeException as error:
            if not isinstance(error, pw.DatabaseError) or self._database.will_pass(error):
                raise self._failure(error) from error
            text = f"it cannot be read: {error}; restore the newest backup into a new database"
            yield Finding(kind="database", where=self._name, text=text)
        except _WrongSchema as error:
            yield Finding(kind="schema", where=self._name, text=str(error))

    def _stray_histories(self, repair: bool) -> Iterator[Finding]:
        for session_id in self.history.strays(repair=repair):
            text = "there is a history, but no session of that id"
            yield Finding(kind="leftover", where=session_id, text=text, repaired=repair)

    def optimize(self, *, full: bool = False) -> Iterator[Improvement]:
        with self._using(), self._unhurried() as database, translated:
            yield from tidy_up(database, self._model._meta.table_name, full=full)

    @contextmanager
    def _unhurried(self) -> Iterator[PerThread]:
        """The database on a connection of its own, on which a statement may take as long as it takes."""
        database = self._connect()
        database.take_time()
        try:
            yield database
        finally:
            database.close()

    @again
    def note(self, name: str, moment: float) -> None:
        leases, key = self._leases, self._note_key(name)
        row = leases.insert(name=key, holder="", until=moment)
        with self._using() as database:
            row.on_conflict(conflict_target=[leases.name], update={leases.until: moment}).execute(database)

    def noted(self, name: str) -> float | None:
        leases = self._leases
        with self._using() as database:
            found = leases.select(leases.until).where(leases.name == self._note_key(name)).scalar(database)
        return found if isinstance(found, float) else None

    def _note_key(self, name: str) -> str:
        # Beside the leases, whose names have no space.
        return f"{self._namespace}:note {name}"

    def close(self) -> None:
        for store in list(self._family.values()):
            store._close()

    def _close(self) -> None:
        # Of this thread: to close a connection that another thread is using can crash it. Theirs close when they end.
        try:
            self._database.settle()
            if not self._database.is_closed():
                self._database.close()
        except pw.PeeweeException as error:
            raise self._failure(error) from error

    # One row ----------------------------------------------------------------------------------------------------------

    def _row(self, session_id: str) -> Any:
        with translated:
            database: pw.Database = self._ready_database()
            return database.execute_sql(*self._get((session_id, None))).fetchone()

    # A single statement is a transaction of its own, and SQLite takes the write lock at its start just as it does for
    # BEGIN IMMEDIATE, waiting for it within the timeout.

    def _save(self, database: pw.Database, record: SessionRecord, expected: int) -> bool:
        return bool(database.execute_sql(*self._statement((*values_of(record), expected))).rowcount)

    def _statement(self, values: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        return (self._update if values[_EXPECTED] else self._insert)(values)

    def _remove(self, database: pw.Database, deletion: Deletion) -> bool:
        if not is_session_id(deletion.id):
            return False
        statement = self._delete if deletion.expected is None else self._delete_version
        return bool(database.execute_sql(*statement((deletion.id, deletion.expected))).rowcount)

    def _compile(self) -> tuple[_Statement, ...]:
        """The hot statements. peewee needs several times as long to build one as SQLite needs to run it."""
        model, given = self._model, _placeholder
        columns = {name: given(name) for name in _COLUMNS}
        # SQLite writes the index of every column that is named, even if its value stays: that doubles the time.
        changing = {name: value for name, value in columns.items() if name not in FIXED_FIELDS}
        this, unchanged = model.id == given("id"), model.version == given("expected")
        insert = model.insert(columns).on_conflict_ignore().as_rowcount()
        # PostgreSQL would log each batch that meets a row which is there.
        insert_new = model.insert(columns).as_rowcount() if self._of_sqlite else insert
        queries = (
            (model.select(*(getattr(model, name) for name in _COLUMNS)).where(this), _OF_ID),
            (insert_new, _OF_RECORD),
            (insert, _OF_RECORD),
            (model.update(changing).where(this & unchanged), _OF_RECORD),
            (model.delete().where(this), _OF_ID),
            (model.delete().where(this & unchanged), _OF_ID),
        )
        return tuple(_Statement(*query.bind(self._database).sql(), given=names) for query, names in queries)

    # Many rows --------------------------------------------------------------------------------------------------------

    def _conditions(self, query: SessionQuery) -> list[Any]:
        model = self._model
        conditions: list[Any] = [pw.SQL("1 = 1")]
        if query.ids is not None:
            conditions.append(model.id.in_([session_id for session_id in sorted(query.ids) if is_session_id(session_id)]))
        if query.id_prefix is not None:
            conditions.append(model.id.between(query.id_prefix, query.id_prefix.ljust(67, "f")))
        conditions += self._owner(query)
        for name in ("created", "accessed", "expires"):
            column = getattr(model, f"{name}_at")
            after, before = getattr(query, f"{name}_after"), getattr(query, f"{name}_before")
            conditions += [column >= after] if after is not None else []
            conditions += [column < before] if before is not None else []
        conditions += self._hours(query.expires_after, query.expires_before)
        if query.state == "ended":
            conditions.append(model.ended_at.is_null(False))
        elif query.state is not None:
            live = model.expires_at > query.now
            conditions += [model.ended_at.is_null(), live if query.state == "active" else ~live]
        if query.after is not None and query.order_by is not None:
            keys = self._keys(query.order_by)
            value, session_id = query.after
            values = [session_id] if query.by_id else [float(value), session_id]
            if self._of_sqlite and query.order_by.removeprefix("-") == "expires_at":
                values = [_hour(pw.Value(float(value))), *values]
            conditions.append(self._database.beyond(keys, values, descending=query.descending))
        return conditions

    def _owner(self, query: SessionQuery) -> list[Any]:
        """Whose sessions they are; for the index of SQLite, which begins with it, also in which shard those are."""
        model, user_id, tenant_id = self._model, query.user_id, query.tenant_id
        conditions = [_shard(model.id) == shard_of(user_id)] if user_id is not None and self._of_sqlite else []
        conditions += [model.user_id == user_id] if user_id is not None else []
        return conditions + ([model.tenant_id == tenant_id] if tenant_id is not None else [])

    def _hours(self, after: float | None, before: float | None) -> list[Any]:
        """What of an expiry within these bounds the index of SQLite judges: its hour."""
        if not self._of_sqlite:
            return []
        hour = _hour(self._model.expires_at)
        conditions = [hour >= _hour(pw.Value(float(after)))] if after is not None else []
        return conditions + ([hour <= _hour(pw.Value(float(before)))] if before is not None else [])

    def _keys(self, order_by: str) -> list[Any]:
        name, model = order_by.removeprefix("-"), self._model
        if name == "id":
            return [model.id]
        hour = [_hour(model.expires_at)] if name == "expires_at" and self._of_sqlite else []
        return [*hour, getattr(model, name), model.id]

    def _keys_of_index(self, query: SessionQuery) -> list[Any]:
        """The order of the index that serves the conditions of *query*."""
        if query.expires_before is None:
            return self._keys("id")
        # A table of SQLite keeps the number of a row as long as it has an index, VACUUM or not.
        return [_hour(self._model.expires_at), pw.SQL("rowid")] if self._of_sqlite else self._keys("expires_at")

    def _pages(self, query: SessionQuery, offset: int, limit: int | None) -> Iterator[SessionRecord]:
        """The rows page by page, each starting after the last one, so that no cursor and no snapshot is held open."""
        keys = self._keys(query.order_by) if query.order_by else self._keys_of_index(query)
        model, descending = self._model, query.descending
        rows = model.select(*(getattr(model, name) for name in _COLUMNS), *keys).where(*self._conditions(query))
        rows = rows.order_by(*(key.desc() if descending else key for key in keys))
        after: list[Any] | None = None
        while limit is None or limit > 0:
            size = _PAGE if limit is None else min(_PAGE, limit)
            page = rows.limit(size).offset(offset if after is None else 0)
            if after is not None:
                page = page.where(self._database.beyond(keys, after, descending=descending))
            with self._using() as database, translated:
                # Not through the rows of peewee, which take as long as making the records does.
                found = database.execute_sql(*page.bind(database).sql()).fetchall()  # type: ignore[no-untyped-call]
            records = list(_readable(row[: len(_COLUMNS)] for row in found))
            yield from records
            if len(found) < size:
                return
            after = list(found[-1][len(_COLUMNS) :])
            limit = None if limit is None else limit - len(records)

    # Connections and schema -------------------------------------------------------------------------------------------

    def _open_database(self) -> None:
        self._database = self._connect()
        self._lock = threading.Lock()
        self._ready = False

    def _close_idle(self) -> None:
        # SQLite takes its locks for the process that it knows, so a child that inherits its tables believes to hold
        # what the parent holds: then somebody may remove the log that the child goes on writing to. Threads other than
        # the forking one keep theirs; fork before starting threads. The one that empties a log is none of the application.
        self._database.settle()
        if not self._database.in_transaction():
            self._close()

    def _leave_to_parent(self) -> None:
        inherited.append(self._database)
        self._open_database()

    def _ready_database(self) -> PerThread:
        """The database, with its tables."""
        if not self._ready:
            self._prepare()
        return self._database

    @contextmanager
    def _using(self) -> Iterator[PerThread]:
        """The database, errors translated. What runs with each request does without, which saves a tenth of it."""
        try:
            yield self._ready_database()
        except pw.PeeweeException as error:
            raise self._failure(error) from error

    def _lost_connection(self) -> bool:
        """Whether the connection broke; then it is closed, and the next use connects anew."""
        if self._database.is_closed() or self._database.is_connection_usable():
            return False
        self._database.close()
        return True

    def _failure(self, error: pw.PeeweeException) -> StoreError:
        text = f"{self._name} failed: {error}"
        if self._database.gave_way(error):
            return GaveWay(text)
        passing = self._database.will_pass(error)
        if passing and not self._database.is_closed() and not self._database.in_transaction():
            self._database.close()  # the next use connects anew
        return (StoreUnavailable if passing else StoreError)(text)

    def _prepare(self) -> None:
        self._connect_in_turn()  # outside of the lock: nobody waits for the connections of other threads
        with self._lock:
            if not self._ready:
                with self._database.atomic():
                    self._make_tables()
                self._ready = True

    def _connect_in_turn(self) -> None:
        """Connect; SQLite does not wait for a lock when it changes to WAL, as the first of several processes does."""
        start = time.monotonic()
        while True:
            try:
                self._database.connect(reuse_if_open=True)
                return
            except pw.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > start + self._patience:
                    raise
                time.sleep(0.02)

    def _make_tables(self) -> None:
        database, table = self._database, self._model._meta.table_name
        # A user who may not create anything can use what somebody else created.
        missing = [
            model
            for model in (self._schema, self._leases, self._model)
            if not database.table_exists(model._meta.table_name)
        ]
        if missing:
            # The one of the sessions last: where each of them is there at once, for good, whoever finds that finds all.
            database.make([model for model in missing if model is not self._model])
            self._schema.insert(name=table, version=SCHEMA_VERSION).on_conflict_ignore().execute(database)
            database.make([model for model in missing if model is self._model])
        found = self._schema.select(self._schema.version).where(self._schema.name == table).scalar(database)
        if found != SCHEMA_VERSION:
            raise _WrongSchema(
                f"{self._name} has version {found} of the table {table}, this release knows {SCHEMA_VERSION}; "
                "use the release that made it, or a newer one"
            )


def _models(table: str, of_sqlite: bool) -> tuple[Any, Any, Any]:
    """The tables of one namespace: its sessions, the leases, the versions of the schema."""

    class Session(pw.Model):
        id = Name(primary_key=True)
        user_id = Name(null=True)
        tenant_id = Name(null=True)
        tags = pw.TextField()
        metadata = pw.TextField()
        created_at = pw.DoubleField()
        accessed_at = pw.DoubleField()
        expires_at = pw.DoubleField()
        ended_at = pw.DoubleField(null=True)
        end_reason = pw.TextField(null=True)
        version = pw.BigIntegerField()
        # Last: SQLite gets to what is behind large data only by reading all of it.
        data = pw.BlobField()

        class Meta:
            table_name = table

    # Named after the table: peewee would name them after the class, alike for all namespaces.
    # SQLite stores whole pages. By the hour, sessions that are stored together are mostly near to each other in the index,
    # and a renewal seldom moves an entry; by the second each of them would write a page of its own.
    expiry = _hour(Session.expires_at) if of_sqlite else Session.expires_at
    Session.add_index(pw.ModelIndex(Session, [expiry], name=f"{table}_expiry"))
    # SQLite has the sessions of users by shard first, because archives are in the order of ids, and so of shards. With the
    # tenant it counts all users in the index alone, ten times as fast. Other databases do not need that, and limit what
    # one entry may hold to less than the longest names take.
    of_user = (
        [_shard(Session.id), Session.user_id, Session.tenant_id] if of_sqlite else [Session.user_id, Session.created_at]
    )
    Session.add_index(pw.ModelIndex(Session, of_user, name=f"{table}_user"))

    class Lease(pw.Model):
        name = Name(primary_key=True)
        holder = pw.TextField()
        until = pw.DoubleField()

        class Meta:
            table_name = "persist_lease"

    class Schema(pw.Model):
        name = Name(primary_key=True)
        version = pw.IntegerField()

        class Meta:
            table_name = "persist_schema"

    return Session, Lease, Schema


def _hour(moment: Any) -> Any:
    """In which hour a moment of SQL is, given in seconds."""
    return (moment / pw.SQL("3600")).cast("INTEGER")


def _shard(session_id: Any) -> Any:
    """In which shard the session of an id of SQL is, and all others of its user."""
    return pw.fn.SUBSTR(session_id, pw.SQL("1"), pw.SQL("3"))


# Statements and rows --------------------------------------------------------------------------------------------------


def _readable(rows: Iterable[Sequence[Any]]) -> Iterator[SessionRecord]:
    for row in rows:
        try:
            yield _record(row)
        except SerializationError as error:
            log_unreadable(row[0], error)


class _Placeholder(str):
    """The name of a value that is given when the statement is run."""


def _in_order(changes: Sequence[Change | Deletion]) -> list[int]:
    """Where the changes stand, ordered by id: in one order, so that no two transactions wait for each other."""
    return sorted(range(len(changes)), key=lambda number: changes[number].id)


def _placeholder(name: str) -> pw.Value:
    return pw.Value(_Placeholder(name), converter=False)


class _Statement:
    """SQL that peewee compiled once; calling it with the values *given* gives what ``execute_sql`` takes."""

    def __init__(self, sql: str, parameters: Sequence[Any], *, given: tuple[str, ...]) -> None:
        assert all(isinstance(name, _Placeholder) for name in parameters)
        self._sql = sql
        self._in_order: Any = itemgetter(*map(given.index, parameters))
        self._is_single = len(parameters) == 1

    def __call__(self, values: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        given = self._in_order(values)
        return self._sql, (given,) if self._is_single else given

    def of_rows(self, rows: Sequence[tuple[Any, ...]]) -> tuple[str, tuple[Any, ...]]:
        """SQL that does for many *rows* what this one does for one, whose values stand in parentheses; and the values.

        A column that none of the rows fills is NULL in the SQL: for each None, the driver of SQLite looks for an adapter.
        """
        before, row, after = re.split(r"(\((?:%s|\?)(?:, (?:%s|\?))*\))", self._sql)
        unused = (None,) * len(rows)
        used = [column != unused for column in zip(*rows, strict=True)]
        cells = [cell if is_used else "NULL" for cell, is_used in zip(row[1:-1].split(", "), used, strict=True)]
        values = chain.from_iterable(map(itemgetter(*compress(count(), used)), rows))
        return before + ", ".join([f"({', '.join(cells)})"] * len(rows)) + after, tuple(values)


def _record(row: Sequence[Any]) -> SessionRecord:
    try:
        return record_of(*row)
    except DAMAGED as error:
        raise SerializationError(f"the row is damaged: {error}") from error


def _named_record(values: dict[str, Any]) -> SessionRecord:
    return _record([values[name] for name in _COLUMNS])


def _parts(query: SessionQuery, ids: frozenset[str]) -> Iterator[SessionQuery]:
    """Queries that find together what *query* with its *ids* does, uncut: a database takes only so many parameters."""
    every = sorted(ids)
    for start in range(0, len(every), _PAGE):
        yield replace(query.uncut(), ids=frozenset(every[start : start + _PAGE]))


def _without_what_sql_judges(query: SessionQuery) -> SessionQuery | None:
    """The part of *query* that only ``matches`` can judge; ``None`` if there is none."""
    if query.tags or query.text is not None:
        return SessionQuery(tags=query.tags, text=query.text)
    return None
