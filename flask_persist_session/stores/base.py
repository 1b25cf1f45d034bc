"""The store contract, in full. A store that works needs four methods; this one keeps everything in a dict::

    class DictStore(SessionStore):
        def __init__(self):
            self.records = {}
            self.lock = threading.Lock()

        def get(self, session_id):
            return copy.deepcopy(self.records.get(session_id))

        def save(self, record, *, expected):
            check_save(record, expected)
            with self.lock:
                stored = self.records.get(record.id)
                if (stored.version if stored else 0) != expected:
                    raise conflict(record.id, expected)
                self.records[record.id] = copy.deepcopy(record)

        def delete(self, session_id, *, expected=None):
            with self.lock:
                stored = self.records.get(session_id)
                if stored is None or expected not in (None, stored.version):
                    return False
                del self.records[session_id]
                return True

        def scan(self):
            yield from copy.deepcopy(list(self.records.values()))

Run ``flask_persist_session.testing.SessionStoreContract`` against yours: it checks each sentence below.

What holds for every method: a store knows no policy. It does not judge expiry (the manager does, with one clock), so
expired and ended records are returned and counted like any other; a time to live of the store's own is only a safety
net, set later than ``expires_at``. No driver's error leaves a store: what cannot be reached raises
``StoreUnavailable`` after a bounded wait, what fails otherwise raises ``StoreError``. One store object may be used by
many threads at once, and after a fork by both processes.
"""

from __future__ import annotations

import heapq
import logging
import math
import os
import re
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import NoReturn, TypeAlias

from ..exceptions import ConfigError, SerializationError, SessionConflict, UnsupportedByStore
from ..records import (
    FIRST_MOMENT,
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
from ..serializers import DAMAGED, load_tags
from ..tokens import SHARDS, shard_of
from .history import HistoryLog

log = logging.getLogger("flask_persist_session")

#: How many characters a user id, a tenant id or an end reason may have: databases index so much.
LONGEST_NAME = 512
NAME_LIMITS = f"at most {LONGEST_NAME} characters of Unicode, without NUL"
_NAMESPACE = re.compile(r"[a-z0-9_]{1,40}", re.ASCII)
#: What never changes under one id; a session that gets another user gets another id.
FIXED_FIELDS = frozenset({"id", "user_id", "tenant_id", "created_at"})


def ignore(record: SessionRecord) -> None:
    """Do nothing with a record that a check has seen."""


def _looked_at(records: Iterator[SessionRecord], seen: Callable[[SessionRecord], object]) -> Iterator[Finding]:
    for record in records:
        seen(record)
    yield from ()


class SessionStore(ABC):
    """Keeps the records of one namespace."""

    #: Whether ``save`` and ``delete`` are one indivisible step among all processes that use the same store.
    #: Where this is ``False``, two processes that save at the same moment can lose one of the changes.
    atomic: bool = True
    #: Seconds for which what has expired is there at least, where a store removes records by itself; set before it is used.
    margin: float = 7 * 86400.0
    #: How many threads should call ``save_many`` at once where there are very many to save: 1 if they would only wait for
    #: one lock; more if one can prepare its records while another waits for a server.
    writers: int = 2

    @abstractmethod
    def get(self, session_id: str) -> SessionRecord | None:
        """Return the record, or ``None`` if there is none.

        Ended and expired records are returned. A malformed id names no record: ``None``. What was saved comes back
        equal in every field.

        Raises ``SerializationError`` if something is stored under this id that is no intact record and no intact
        earlier state of it can be had; ``StoreUnavailable``, ``StoreError``.
        """

    @abstractmethod
    def save(self, record: SessionRecord, *, expected: int) -> None:
        """Store *record* if the version stored now is *expected*; the only way anything is written.

        ``expected=0`` creates: no record of that id may exist, not even an ended or expired one. Among any number of
        processes that save with the same *expected*, exactly one succeeds. When this returns, every process sees the
        new record and it survives the end of this process. When it raises, the stored record is the one before.

        A session keeps its ``FIXED_FIELDS`` for life: on a later save a store may leave them as they were created.

        The version is ``expected + 1``; only a record that is brought over from elsewhere is created with the one that
        it has.

        Raises ``SessionConflict`` if the version differs or the record is missing; ``ValueError`` if the record's own
        version does not follow, or it cannot be stored for another reason that ``check_save`` tells;
        ``StoreUnavailable``, ``StoreError``.
        """

    @abstractmethod
    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        """Remove the record, every index entry and its history; say whether there was a record to remove.

        All go in one step: nobody can append to the history of a record that is gone, and a session that is created
        under the same id later begins with none.

        With *expected*, only the record of just that version is removed, otherwise nothing happens and the answer is
        ``False``. Missing and malformed ids: ``False``.

        Raises ``StoreUnavailable``, ``StoreError``.
        """

    @abstractmethod
    def scan(self) -> Iterator[SessionRecord]:
        """Yield every record once, in any order, a few at a time in memory.

        What is saved or deleted meanwhile may or may not be seen; a record that is there all the time is. Unreadable
        records are left out with a warning in the log.

        Raises ``UnsupportedByStore`` at once if the store cannot list; ``StoreUnavailable``, ``StoreError``.
        """

    def snapshot(self) -> Iterator[SessionRecord]:
        """Yield every record once as ``scan`` does, where the store can all as they were at one moment.

        Others go on reading and writing meanwhile. To be used up or closed: it may hold what it reads from open.

        Raises as ``scan`` does.
        """
        return self.scan()

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        """Yield the records for which ``query.matches`` is true, in its order, within its offset and limit."""
        matching = (record for record in self.scan() if query.matches(record))
        return order_and_cut(matching, query)

    def count(self, query: SessionQuery) -> int:
        """Count what ``find`` would yield, with offset and limit."""
        return sum(1 for _ in self.find(query))

    def stats(self, *, now: float) -> StoreStats:
        """Add up all records; states are judged at *now* (seconds since the epoch).

        ``add_up`` over ``scan`` is the definition. What is saved or deleted meanwhile may be counted, not counted, or
        counted in some figures and not in others. A store that adds up without decoding may count unreadable records,
        in all figures that it can tell of them.

        Raises ``UnsupportedByStore`` if the store cannot list; ``StoreUnavailable``, ``StoreError``.
        """
        return add_up(self.scan(), now)

    def save_many(self, changes: Sequence[Change]) -> list[bool]:
        """Save each change on its own, as ``save`` does; the answer says of each whether it was saved.

        ``False`` is a conflict. Raises as ``save`` does; changes before the failing one may have been saved.
        """
        return [self._save_or_conflict(change) for change in changes]

    def _save_or_conflict(self, change: Change) -> bool:
        try:
            self.save(change.record, expected=change.expected)
        except SessionConflict:
            return False
        return True

    def delete_many(self, deletions: Sequence[Deletion]) -> list[bool]:
        """Delete each on its own, as ``delete`` does; the answer says of each whether it was removed."""
        return [self.delete(deletion.id, expected=deletion.expected) for deletion in deletions]

    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        """Make all of the changes and deletions, or none of them; without any, do nothing.

        When this returns, all are done, as after ``save`` and ``delete``. When it raises one of the errors below, none is.
        Stopped anywhere in between, be it by ``kill -9``, a process leaves all of them or none, for every other process.
        Whoever has read one record as it is afterwards reads none as it was before. A deletion without *expected* of a
        record that is missing is done.

        Raises ``SessionConflict`` if a version differs, naming the session; ``ValueError`` for two changes of one
        session, and for what ``save`` refuses; ``UnsupportedByStore``; ``StoreUnavailable``, ``StoreError``.
        """
        raise UnsupportedByStore(
            f"{type(self).__name__} has no transactions; save the sessions one by one, or use a store that has them: "
            "memory, files, SQLite, PostgreSQL, MySQL or a single Redis server"
        )

    def lease(self, name: str, seconds: float) -> bool:
        """Take or prolong the lease *name* for so many seconds; say whether this store object holds it now.

        At most one store object among all processes holds a lease at a time. A lease that is not prolonged ends by
        itself, by the clock of the store. A lease of 0 seconds or less gives it up.

        Raises ``UnsupportedByStore``; ``StoreUnavailable``, ``StoreError``.
        """
        raise UnsupportedByStore(f"{type(self).__name__} has no leases")

    def note(self, name: str, moment: float) -> None:
        """Keep *moment* (seconds since the epoch) under *name* for ``noted``, of whatever process; the last one counts.

        Raises ``UnsupportedByStore``; ``StoreUnavailable``, ``StoreError``.
        """
        raise UnsupportedByStore(f"{type(self).__name__} has no notes")

    def noted(self, name: str) -> float | None:
        """The moment that was noted under *name*, ``None`` if there is none that can be read.

        Raises ``UnsupportedByStore``; ``StoreUnavailable``, ``StoreError``.
        """
        raise UnsupportedByStore(f"{type(self).__name__} has no notes")

    def namespace(self, name: str) -> SessionStore:
        """The store that keeps the records of the namespace *name* in the same place.

        Its records, notes and leases are others than those of this store. Asked twice it gives the same records, and
        asked for the name of this store those of this one, where a store knows its name.

        Raises ``ConfigError`` for a name that is not made of 1 to 40 lower-case letters, digits and underscores, or that
        the place cannot have; ``UnsupportedByStore`` if the store has one namespace only.
        """
        raise UnsupportedByStore(
            f"{type(self).__name__} has one namespace only; give it a method namespace(name) that returns the store of "
            "another one, or set PERSIST_SESSION_STORE to the URL of a store of this package"
        )

    @property
    def history(self) -> HistoryLog:
        """The append-only logs of the sessions kept here.

        Raises ``UnsupportedByStore``, with the reason, if there are none.
        """
        raise UnsupportedByStore(f"{type(self).__name__} keeps no histories: it has no log that entries can be appended to")

    def check(self, *, repair: bool, seen: Callable[[SessionRecord], object] = ignore) -> Iterator[Finding]:
        """Yield what is not as it should be, and with *repair* mend it where nothing can be lost by that.

        *seen* is called with each record that can be read. What others are about to write is not reported, and a repair
        takes nothing from them: it holds their locks, or compares before it sets. What only a person can decide stays as
        it is. By default there is nothing to find but what ``scan`` cannot read at all.

        Raises ``UnsupportedByStore`` at once if the store cannot list; ``StoreUnavailable``, ``StoreError``.
        """
        return _looked_at(self.scan(), seen)

    def optimize(self, *, full: bool = False) -> Iterator[Improvement]:
        """Give back room and bring statistics of the database up to date; yield what was done, by default nothing.

        Requests go on meanwhile and wait for at most some milliseconds, but with *full* they may for as long as it takes.

        Raises ``StoreUnavailable``, ``StoreError``.
        """
        return iter(())

    def close(self) -> None:
        """Give back what the calling thread holds open, for other namespaces too.

        What other threads hold is given back when they end. Using the store again opens it anew; closing twice is fine.
        """


_Hooks: TypeAlias = "list[weakref.WeakMethod[Callable[[], None]]]"
_before_fork: _Hooks = []
_after_fork: _Hooks = []


def before_fork(method: Callable[[], None]) -> None:
    """Have a method of a store called before this process is forked, in the thread that does so."""
    _remember(_before_fork, method)


def after_fork(method: Callable[[], None]) -> None:
    """Have a method of a store called in each process that is forked from this one, for as long as the store lives.

    The child has one thread: it must give up the connections of the parent, and locks that another thread held.
    """
    _remember(_after_fork, method)


def _remember(hooks: _Hooks, method: Callable[[], None]) -> None:
    hooks[:] = [hook for hook in hooks if hook() is not None]
    hooks.append(weakref.WeakMethod(method))


def _run(hooks: _Hooks) -> None:
    for hook in hooks:
        method = hook()
        if method is not None:
            method()


os.register_at_fork(before=partial(_run, _before_fork), after_in_child=partial(_run, _after_fork))


def check_namespace(name: str) -> None:
    """Refuse what cannot be part of a path, a key and the name of a table. Raises ``ConfigError``."""
    if not _NAMESPACE.fullmatch(name):
        raise ConfigError(f"the namespace {name!r} is not made of 1 to 40 lower-case letters, digits and underscores")


def check_save(record: SessionRecord, expected: int) -> None:
    """Refuse what no store may save.

    Raises ``ValueError`` for a malformed id, a version that does not follow, a time beyond all dates, a user, tenant or
    reason that not every database can keep, or a new session outside of the shard of its user, where the index of the
    user's sessions is.
    """
    if not is_session_id(record.id):
        raise ValueError(f"{record.id!r} is not a session id (67 lower-case hex digits)")
    if record.version != expected + 1 and (expected or record.version < 1):
        raise ValueError(f"a record saved over version {expected} must be version {expected + 1}, not {record.version}")
    if not (
        FIRST_MOMENT <= record.created_at < LAST_MOMENT
        and FIRST_MOMENT <= record.accessed_at < LAST_MOMENT
        and FIRST_MOMENT <= record.expires_at < LAST_MOMENT
        and (record.ended_at is None or FIRST_MOMENT <= record.ended_at < LAST_MOMENT)
    ):
        raise ValueError(f"a time of session {record.id} is no moment up to the year 9000, in seconds since the epoch")
    _check_name("user_id", record.user_id)
    _check_name("tenant_id", record.tenant_id)
    _check_name("end_reason", record.end_reason)
    if expected == 0 and record.user_id is not None and record.id[:3] != shard_of(record.user_id):
        raise ValueError(f"session {record.id} is not in the shard of its user, {shard_of(record.user_id)}")


def check_transaction(changes: Sequence[Change | Deletion]) -> None:
    """Refuse what no store may do in one transaction. Raises ``ValueError``, as ``check_save`` does."""
    ids = Counter(change.id for change in changes)
    twice = [session_id for session_id, count in ids.items() if count > 1]
    if twice:
        raise ValueError(f"session {twice[0]!r} is changed twice in one transaction; make one change of the two")
    for change in changes:
        if isinstance(change, Change):
            check_save(change.record, change.expected)


def _check_name(field: str, value: str | None) -> None:
    if value is not None and not is_name(value):
        raise ValueError(f"{field} {value[:40]!r} cannot be stored: {NAME_LIMITS}")


def is_name(value: str | None) -> bool:
    """Whether every store can keep *value* as a user, tenant or reason."""
    try:
        return value is None or (len(value) <= LONGEST_NAME and "\0" not in value and bool(value.encode() or True))
    except UnicodeEncodeError:
        return False


def conflict(session_id: str, expected: int | None) -> SessionConflict:
    """The error of a save or deletion that found another version than *expected*."""
    wanted = "no record" if expected == 0 else f"version {expected}"
    return SessionConflict(f"session {session_id}: expected {wanted}, but it was changed, ended or removed meanwhile")


def lease_holder(store_object: str) -> str:
    """Who holds a lease: a store object, named by a random text, in this process. A forked child is somebody else."""
    return f"{os.getpid()}:{store_object}"


def cannot_list(store: SessionStore, why: str) -> NoReturn:
    """Raise the error of a store that has no way to enumerate its records."""
    raise UnsupportedByStore(f"{type(store).__name__} cannot list sessions: {why}")


def that_of(record: SessionRecord, session_id: str) -> SessionRecord:
    """*record*, if it is the one that was asked for. Raises ``SerializationError`` for one that says it is another's."""
    if record.id != session_id:
        raise SerializationError("the record is that of another session")
    return record


def can_match(query: SessionQuery) -> bool:
    """Whether any record can have the user and tenant of *query*: a driver may not even take what no store keeps."""
    return is_name(query.user_id) and is_name(query.tenant_id)


def log_unreadable(session_id: str, error: SerializationError) -> None:
    """Say that a listing leaves out a record that cannot be read."""
    log.warning("session %s is left out of a listing: %s", session_id, error)


def moment_in(text: str) -> float | None:
    """The moment that a lease or note has as text; ``None`` for what is none."""
    try:
        moment = float(text)
    except ValueError:
        return None
    return moment if math.isfinite(moment) else None


def order_and_cut(records: Iterator[SessionRecord], query: SessionQuery) -> Iterator[SessionRecord]:
    """Apply the order, offset and limit of *query*; holds ``offset + limit`` records in memory, or all if unlimited."""
    return cut(records if query.order_by is None else _ordered(records, query), query)


def cut(records: Iterator[SessionRecord], query: SessionQuery) -> Iterator[SessionRecord]:
    """Apply the offset and limit of *query* to records that are in its order."""
    return islice(records, query.offset, _end(query))


def _end(query: SessionQuery) -> int | None:
    return None if query.limit is None else query.offset + query.limit


def _ordered(records: Iterator[SessionRecord], query: SessionQuery) -> Iterator[SessionRecord]:
    end = _end(query)
    if end is None:
        return iter(sorted(records, key=query.position, reverse=query.descending))
    return iter((heapq.nlargest if query.descending else heapq.nsmallest)(end, records, key=query.position))


def shards_of(query: SessionQuery) -> range:
    """The shards in which what *query* finds can be; in its order, if that is by id."""
    start = int(query.after[1][:3], 16) if query.by_id and query.after else None
    if query.order_by == "-id":
        return range(SHARDS - 1 if start is None else start, -1, -1)
    return range(start or 0, SHARDS)


def in_order(ids: Iterable[str], query: SessionQuery) -> Iterable[str]:
    """The ids of one shard; if the order of *query* is by id, then in that order and those alone that can match."""
    if not query.by_id:
        return ids
    beyond = sorted(ids, reverse=query.descending)
    if query.after is None:
        return beyond
    last = query.after[1]
    return [session_id for session_id in beyond if (session_id < last if query.descending else session_id > last)]


def add_up(records: Iterator[SessionRecord], now: float) -> StoreStats:
    """The statistics of *records*, judged at *now*, with memory for the different users, tenants and tags only."""
    states = {"active": 0, "expired": 0, "ended": 0}
    users: set[tuple[str | None, str]] = set()
    tenants, tags = Counter[str](), Counter[str]()
    size, oldest, newest = 0, math.inf, -math.inf
    for record in records:
        states[record.state(now)] += 1
        size += len(record.data)
        oldest, newest = min(oldest, record.created_at), max(newest, record.created_at)
        if record.user_id is not None:
            users.add((record.tenant_id, record.user_id))
        if record.tenant_id is not None:
            tenants[record.tenant_id] += 1
        tags.update(record.tags)
    total = sum(states.values())
    return StoreStats(
        total=total,
        **states,
        users=len(users),
        bytes=size,
        oldest=oldest if total else None,
        newest=newest if total else None,
        tenants=dict(tenants),
        tags=dict(tags),
    )


def per_tag(tag_sets: Iterable[tuple[str, int]]) -> dict[str, int]:
    """How many records have each tag, from how many have each text of ``dump_tags``; damaged ones count for no tag."""
    counts = Counter[str]()
    for text, count in tag_sets:
        with suppress(*DAMAGED):
            counts.update(dict.fromkeys(load_tags(text), count))
    return dict(counts)


def combined(parts: Iterable[StoreStats]) -> StoreStats:
    """The statistics of all records together, from those of parts that have no record and no user in common."""
    sums, tenants, tags = Counter[str](), Counter[str](), Counter[str]()
    oldest, newest = math.inf, -math.inf
    for part in parts:
        sums.update({name: getattr(part, name) for name in ("total", "active", "expired", "ended", "users", "bytes")})
        tenants.update(part.tenants)
        tags.update(part.tags)
        if part.oldest is not None and part.newest is not None:
            oldest, newest = min(oldest, part.oldest), max(newest, part.newest)
    return StoreStats(
        **sums,
        oldest=oldest if sums["total"] else None,
        newest=newest if sums["total"] else None,
        tenants=dict(tenants),
        tags=dict(tags),
    )
