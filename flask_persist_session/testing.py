"""The suite that every store must pass, for the stores of this package and for yours.

Needs ``pip install pytest hypothesis``. Subclass it in your own tests and say how your store is opened::

    class TestMyStore(SessionStoreContract):
        @pytest.fixture
        def open_store(self, tmp_path):
            return functools.partial(MyStore, tmp_path / "sessions")

Each call of what ``open_store`` returns must open the same, at first empty, sessions once more. The races call it in
other processes, so it must be picklable: a ``functools.partial`` of a class or of a function of a module. A store that
lives in one object says ``shared = False``: it is opened once per test, and its races are run by threads alone.

The suite holds a store to the docstrings of ``flask_persist_session.stores.base``. Stores that cannot list or have no
leases raise ``UnsupportedByStore`` and skip what they cannot do; where a transaction reaches the sessions of one user
only, the subclass says ``across_users = False``. Stores with ``atomic = False`` skip only the
races between processes. It needs a system with ``fork``.

``HistoryLogContract``, subclassed in the same way, does so for the histories of a store that keeps them.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import astuple, replace
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from .exceptions import (
    ConfigError,
    PersistSessionError,
    SerializationError,
    SessionConflict,
    SessionNotFound,
    SessionTooLarge,
    UnsupportedByStore,
)
from .records import ORDERS, Change, Deletion, LogEntry, SessionQuery, SessionRecord, StoreStats
from .stores.base import FIXED_FIELDS, LONGEST_NAME, SessionStore, add_up
from .stores.history import LONGEST_KEY, REMEMBERED, HistoryLog
from .tokens import SHARDS, shard_of

#: How long a race may take before it counts as hung, in seconds.
DEADLINE = 60.0
RACERS = 4


def make_record(number: int = 0, **fields: Any) -> SessionRecord:
    """A new record, another one for each *number* and user; *fields* replace what it is made of."""
    user_id = fields.get("user_id", "alice")
    shard = f"{number % SHARDS:03x}" if user_id is None else shard_of(user_id)
    made: dict[str, Any] = {
        "id": shard + hashlib.sha256(f"{number}".encode()).hexdigest(),
        "user_id": user_id,
        "tenant_id": "acme",
        "tags": frozenset({"web", "beta"}),
        "metadata": {"device": "Firefox on Linux"},
        "data": b"payload",
        "created_at": 1_700_000_000.25,
        "accessed_at": 1_700_000_100.5,
        "expires_at": 1_700_003_700.75,
        "ended_at": None,
        "end_reason": None,
        "version": 1,
    }
    return SessionRecord(**made | fields)


def following(record: SessionRecord, **fields: Any) -> SessionRecord:
    """The next version of *record*, with *fields* changed."""
    return replace(record, version=record.version + 1, **fields)


def _exactly(record: SessionRecord | None) -> object:
    """What two records have in common that are equal in every field, type included: 1 is neither 1.0 nor ``True``."""
    if record is None:
        return None
    fields = astuple(replace(record, metadata={}))
    return [(type(field), field) for field in fields], json.dumps(record.metadata, sort_keys=True)


MALFORMED_IDS = {
    "empty": "",
    "a word": "session",
    "one digit short": "a" * 66,
    "one digit long": "a" * 68,
    "upper case": "A" * 67,
    "not hexadecimal": "g" * 67,
    "newline at the end": "a" * 67 + "\n",
    "space before": " " + "a" * 66,
    "NUL": "\0" * 67,
    "digits that are not ASCII": "٣" * 67,
    "no text in UTF-8": "\ud800" * 67,
    "parent directories": "../" * 22 + "a",
    "absolute path": "/etc/passwd".ljust(67, "a"),
    "pattern": "*" * 67,
    "hash tag": "{aaa}" + "a" * 62,
    "quotes": "' OR ''='".ljust(67, "a"),
}
IDS_OF_NO_SESSION = {"missing": make_record(2).id, **MALFORMED_IDS}

# Text that no compression shortens, as an index of the user would have to hold it.
_LONG = "".join(hashlib.sha512(bytes([number])).hexdigest() for number in range(100))
# As much of it as UTF-8 can make of the longest name: four bytes a character.
_FOREIGN = "".join(chr(0x20000 + int(_LONG[start : start + 4], 16) % 40_000) for start in range(0, len(_LONG), 4))

ODD_FIELDS: dict[str, dict[str, Any]] = {
    "no data": {"data": b""},
    "a MiB of every byte": {"data": bytes(range(256)) * 4096},
    "data that looks like text": {"data": b"None\0\r\n\\x00\xff\xfe"},
    "nobody": {"user_id": None, "tenant_id": None, "end_reason": None},
    "empty text": {"user_id": "", "tenant_id": "", "end_reason": "", "ended_at": 1.0},
    "empty tenant of nobody": {"user_id": None, "tenant_id": ""},
    "text None": {"user_id": "None", "tenant_id": "null", "end_reason": "None", "ended_at": 1.0},
    "unicode": {"user_id": "Zoë 漢字 🎉 \u202e\u00a0", "tenant_id": "\u0130\u00df", "tags": frozenset({"ñ", "n\u0303"})},
    "composed and decomposed": {"user_id": "\u00e9", "tenant_id": "e\u0301"},
    "quotes": {"user_id": """'"`;--\\""", "tenant_id": "%s %(x)s ? :a $1", "tags": frozenset({"'", '"', "\\"})},
    "newlines": {"user_id": "\n\r\t", "tenant_id": " a\n\nb ", "tags": frozenset({"a\nb", " "})},
    "braces": {"user_id": "{3fa}", "tenant_id": "}{", "tags": frozenset({"{}", "[]"})},
    "paths": {"user_id": "../../x", "tenant_id": "/", "tags": frozenset({".", ".."})},
    "very long user id": {"user_id": _LONG[:LONGEST_NAME]},
    "very long tenant id": {"tenant_id": _LONG[:LONGEST_NAME]},
    "very long names": {"user_id": _FOREIGN[:LONGEST_NAME], "tenant_id": _FOREIGN[-LONGEST_NAME:]},
    "number as text": {"user_id": "007", "tenant_id": "1e3"},
    "no tags": {"tags": frozenset()},
    "the empty tag": {"tags": frozenset({""})},
    "many tags": {"tags": frozenset(f"tag {number}, 'x'" for number in range(1000))},
    "no metadata": {"metadata": {}},
    "nested metadata": {"metadata": {"a": {"b": [1, [2.5, {"c": None}], "d"]}, "": {"": []}, "a.b": {}}},
    "kinds of metadata": {"metadata": {"true": True, "one": 1, "float": 1.0, "sum": 0.1 + 0.2, "large": 2**53 + 1}},
    "text in metadata": {"metadata": {"é\n'\"\\": "漢字 🎉 \u2028 </script>", "long": _LONG}},
    "fractions": {"created_at": 0.1 + 0.2, "accessed_at": 1e-3, "expires_at": 1_700_000_000.123_456_7},
    "zero": {"created_at": 0.0, "accessed_at": 0.0, "expires_at": 0.0, "ended_at": 0.0},
    "before the epoch": {"created_at": -1e9, "accessed_at": -0.5, "expires_at": -1e-3, "ended_at": -7.0},
    "far away": {
        "created_at": 5e-324,
        "accessed_at": 2.0**37,
        "expires_at": 221_845_391_999.999,
        "ended_at": 2.0**37 + 0.5,
    },
    "ended": {"ended_at": 1_700_000_200.5, "end_reason": "logout"},
    "expired long ago": {"created_at": 1.0, "accessed_at": 2.0, "expires_at": 3.0},
}

#: Text that a store may not be able to keep.
HARD_TEXT = {"NUL": "a\0b", "half a surrogate pair": "a\ud800"}

# Random records and queries -------------------------------------------------------------------------------------------

# All are drawn from a few values, so that conditions hit and orders have ties.

_USERS = (None, "", "alice", "Alice", "straße")
_NUMBERS = range(12)
_POOL = tuple(make_record(number, user_id=_USERS[number % len(_USERS)]) for number in _NUMBERS)
_IDS = tuple(record.id for record in _POOL)
_times = st.sampled_from([-1.5, 0.0, 1e-3, 0.1 + 0.2, 1.0, 2.0, 1_700_000_000.25])
_tenants = st.sampled_from([None, "", "acme", "Acme"])
_tags = st.frozensets(st.sampled_from(["web", "WEB", "beta", "", "Straße"]), max_size=3)
_words = st.sampled_from(["Firefox", "firefox", "STRASSE", "%", "_", "", "漢"])
_metadata = st.dictionaries(_words, _words | st.integers(0, 9) | st.lists(_words, max_size=2), max_size=2)


@st.composite
def _changes(draw: st.DrawFn) -> dict[str, Any]:
    """Values for every field that may change."""
    ended_at = draw(st.none() | _times)
    return {
        "tenant_id": draw(_tenants),
        "tags": draw(_tags),
        "metadata": draw(_metadata),
        "data": draw(st.binary(max_size=20)),
        "created_at": draw(_times),
        "accessed_at": draw(_times),
        "expires_at": draw(_times),
        "ended_at": ended_at,
        "end_reason": None if ended_at is None else draw(st.sampled_from(["", "logout"])),
    }


_records = st.lists(
    st.builds(lambda record, fields: replace(record, **fields), st.sampled_from(_POOL), _changes()),
    unique_by=lambda record: record.id,
    max_size=7,
)
_conditions: dict[str, st.SearchStrategy[Any]] = {
    "ids": st.frozensets(st.sampled_from([*_IDS, "f" * 67, "../" * 22 + "a"])),
    "id_prefix": st.builds(
        lambda session_id, length: session_id[:length], st.sampled_from([*_IDS, "3" * 67]), st.integers(3, 67)
    ),
    "user_id": st.sampled_from([*_USERS, "bob"]),
    "tenant_id": _tenants,
    "tags": _tags,
    "state": st.sampled_from(["active", "expired", "ended"]),
    "now": _times,
    **{f"{name}_{side}": _times for name in ("created", "accessed", "expires") for side in ("after", "before")},
    "text": st.sampled_from(["fire", "FIREFOX", "strasse", "ß", "%", "_", "", "alice", "none"]),
}
_orders = st.sampled_from([None, *ORDERS, *(f"-{order}" for order in ORDERS)])


@st.composite
def _queries(draw: st.DrawFn) -> SessionQuery:
    """A query with at most four conditions, since more are hardly ever fulfilled."""
    names = draw(st.sets(st.sampled_from(sorted(_conditions)), max_size=4))
    conditions = {name: draw(_conditions[name]) for name in sorted(names)}
    order_by = draw(_orders)
    paging: dict[str, Any] = {"order_by": order_by, "limit": draw(st.none() | st.integers(0, 8))}
    if order_by and draw(st.booleans()):
        session_id = draw(st.sampled_from([*_IDS, "000" + "0" * 64, "3" + "f" * 66]))
        paging["after"] = session_id if order_by.endswith("id") else draw(_times | st.integers(0, 2)), session_id
    else:
        paging["offset"] = draw(st.integers(0, 3))
    return SessionQuery(**{"now": 1.0} | conditions | paging)


def _empty(store: SessionStore) -> None:
    store.delete_many([Deletion(id=session_id) for session_id in _IDS])


def _can_list(store: SessionStore) -> bool:
    with suppress(UnsupportedByStore):
        store.scan()
        return True
    return False


class _AgainstDict(RuleBasedStateMachine):
    """Does the same to a store and to a dict of records, and expects the same outcome."""

    def __init__(self, store: SessionStore) -> None:
        super().__init__()
        _empty(store)
        self.store = store
        self.model: dict[str, SessionRecord] = {}

    def version(self, session_id: str) -> int:
        return self.model[session_id].version if session_id in self.model else 0

    @rule(new=st.sampled_from(_POOL), fields=_changes(), off=st.sampled_from([0, 0, 0, -1, 1]))
    def save(self, new: SessionRecord, fields: dict[str, Any], off: int) -> None:
        """Creates, or saves over the version that is stored, or over one that is not."""
        expected = max(0, self.version(new.id) + off)
        fixed = {name: getattr(self.model[new.id], name) for name in FIXED_FIELDS} if new.id in self.model else {}
        record = replace(new, version=expected + 1, **fields | fixed)
        if expected == self.version(new.id):
            self.store.save(record, expected=expected)
            self.model[new.id] = record
        else:
            with pytest.raises(SessionConflict):
                self.store.save(record, expected=expected)

    @rule(session_id=st.sampled_from(_IDS), off=st.sampled_from([None, 0, -1, 1]))
    def delete(self, session_id: str, off: int | None) -> None:
        expected = None if off is None else self.version(session_id) + off
        removable = session_id in self.model and expected in (None, self.version(session_id))
        assert self.store.delete(session_id, expected=expected) is removable
        if removable:
            del self.model[session_id]

    @rule(session_id=st.sampled_from(_IDS))
    def get(self, session_id: str) -> None:
        assert _exactly(self.store.get(session_id)) == _exactly(self.model.get(session_id))

    @rule(user_id=st.sampled_from(_USERS))
    def list_and_count(self, user_id: str | None) -> None:
        if _can_list(self.store):
            records = list(self.store.scan())
            assert len(records) == len(self.model)
            assert {record.id: record for record in records} == self.model
            query = SessionQuery(user_id=user_id)
            assert self.store.count(query) == sum(map(query.matches, self.model.values()))

    def teardown(self) -> None:
        if _can_list(self.store):
            assert list(self.store.check(repair=False)) == []
        for session_id in _IDS:
            self.get(session_id)


# Races ----------------------------------------------------------------------------------------------------------------

Task = Callable[[SessionStore, int], Any]
Race = Callable[[Task], list[Any]]


def _take_part(barrier: threading.Barrier, opener: Callable[[], SessionStore], task: Task, number: int) -> Any:
    store = opener()
    store.get("0" * 67)  # connects, so that all start together
    barrier.wait(DEADLINE)
    try:
        return task(store, number)
    finally:
        barrier.wait(DEADLINE)
        store.close()


def in_threads(store: SessionStore, task: Task) -> list[Any]:
    """What *task* answers when several threads run it at once on the one store, each with its number."""
    barrier = threading.Barrier(RACERS)
    with ThreadPoolExecutor(RACERS) as pool:
        return list(pool.map(partial(_take_part, barrier, lambda: store, task), range(RACERS)))


def in_processes(opener: Callable[[], SessionStore], task: Task, count: int = RACERS) -> list[Any]:
    """What *task* answers when several processes run it at once, each with its number and a store of its own."""
    # A fork server starts them within milliseconds, and unlike plain fork hands down no connection, thread or lock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    barrier = context.Barrier(count)
    return _run(context, [partial(_take_part, barrier, opener, task, number) for number in range(count)])


def in_a_fork(function: Callable[[], Any]) -> Any:
    """What *function* answers in a forked child of this process."""
    return _run(multiprocessing.get_context("fork"), [function])[0]


def _run(context: Any, functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each function in a process of its own, and end them whatever happens."""
    running = []
    try:
        for function in functions:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(function, sender), daemon=True)
            process.start()
            running.append((process, receiver))
            sender.close()
        return [_answer(receiver) for _, receiver in running]
    finally:
        for process, receiver in running:
            process.kill()
            process.join()
            receiver.close()


def _report(function: Callable[[], Any], sender: Connection) -> None:
    try:
        sender.send((function(), ""))
    except Exception:
        sender.send((None, traceback.format_exc()))
        raise


def _answer(receiver: Connection) -> Any:
    assert receiver.poll(DEADLINE), f"a process did not finish within {DEADLINE:.0f} seconds"
    value, failure = receiver.recv()
    assert not failure, failure
    return value


def _raise_counter(session_id: str, steps: int, store: SessionStore, number: int) -> None:
    """Add 1 so many times, starting over after each conflict."""
    while steps:
        record = store.get(session_id)
        assert record is not None
        count = record.metadata["count"]
        assert isinstance(count, int)
        with suppress(SessionConflict):
            store.save(following(record, metadata={"count": count + 1}), expected=record.version)
            steps -= 1


def _create_all(records: Sequence[SessionRecord], store: SessionStore, number: int) -> list[bool]:
    """Create each record, signed with the racer's number; say which were."""
    return [_saves(store, replace(record, data=str(number).encode()), 0) for record in records]


def _save_or_delete(records: Sequence[SessionRecord], store: SessionStore, number: int) -> list[bool]:
    """Half of the racers change the records, half remove them, both only in the version given; say which they got."""
    if number % 2:
        return [store.delete(record.id, expected=record.version) for record in records]
    return [_saves(store, following(record), record.version) for record in records]


def _save_around_deletion(records: Sequence[SessionRecord], store: SessionStore, number: int) -> None:
    """All racers change each record in turn, over and over, until one of them removes it in the middle of that."""
    for record in records:
        for step in range(40):
            if number == 0 and step == 10:
                assert store.delete(record.id)
            if (found := store.get(record.id)) is None:
                break
            _saves(store, following(found), found.version)


def _saves(store: SessionStore, record: SessionRecord, expected: int) -> bool:
    with suppress(SessionConflict):
        store.save(record, expected=expected)
        return True
    return False


def _move_amounts(ids: Sequence[str], steps: int, store: SessionStore, number: int) -> int:
    """Move 1 between two of the sessions so many times, starting over after each conflict; returns how many there were."""
    chance, conflicts = random.Random(number), 0
    while steps:
        given, taken = (store.get(session_id) for session_id in chance.sample(ids, 2))
        assert given is not None
        assert taken is not None
        try:
            store.transaction(
                [
                    Change(record=following(given, data=b"%d" % (int(given.data) - 1)), expected=given.version),
                    Change(record=following(taken, data=b"%d" % (int(taken.data) + 1)), expected=taken.version),
                ]
            )
            steps -= 1
        except SessionConflict:
            conflicts += 1
    return conflicts


def _raise_all_or_look(ids: Sequence[str], steps: int, store: SessionStore, number: int) -> int:
    """One racer saves all sessions again and again in one transaction each; the others must never see one fall behind."""
    records = [make_record(version=1, id=session_id, user_id=None) for session_id in ids]
    if number == 0:
        for _ in range(steps):
            store.transaction([Change(record=following(record), expected=record.version) for record in records])
            records = [following(record) for record in records]
        return 0
    chance, latest, looks = random.Random(number), 0, 0
    while latest <= steps:
        for session_id in chance.sample(ids, len(ids)):
            found = store.get(session_id)
            assert found is not None
            assert found.version >= latest
            latest = found.version
        looks += 1
    return looks


def _take_leases(names: Sequence[str], store: SessionStore, number: int) -> list[bool]:
    return [store.lease(name, 600) for name in names]


_each = settings(
    deadline=None,
    max_examples=25,
    # One store per test serves all examples, which empty it; and each subclass runs the same test with its own store.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors, HealthCheck.too_slow],
)


class _Contract:
    """What the suites share: a store, a second one on the same sessions, races."""

    #: Whether a second store object, in this or in another process, reaches the same sessions.
    shared: bool = True
    #: Whether a transaction changes sessions of several users together, if there are transactions.
    across_users: bool = True

    @pytest.fixture
    def open_store(self) -> Callable[[], SessionStore]:
        """Returns what opens the store, empty at first; each call reaches the same sessions."""
        raise NotImplementedError(f"{type(self).__name__} must have a fixture open_store")

    @pytest.fixture
    def store(self, open_store: Callable[[], SessionStore]) -> Iterator[SessionStore]:
        opened = open_store()
        yield opened
        opened.close()

    @pytest.fixture
    def another(self, open_store: Callable[[], SessionStore], store: SessionStore) -> Iterator[SessionStore]:
        """A second store on the same sessions."""
        if not self.shared:
            pytest.skip("lives in one object")
        opened = open_store()
        yield opened
        opened.close()

    @pytest.fixture(params=["threads", "processes"])
    def race(self, request: pytest.FixtureRequest, open_store: Callable[[], SessionStore], store: SessionStore) -> Race:
        """Runs a task by several threads on one store, or by several processes with a store each."""
        if request.param == "threads":
            return partial(in_threads, store)
        if not self.shared or not store.atomic:
            pytest.skip("lives in one object" if not self.shared else "is not atomic")
        return partial(in_processes, open_store)


class SessionStoreContract(_Contract):
    """The tests of a store. Subclasses give the fixture ``open_store``."""

    @pytest.fixture
    def listing(self, store: SessionStore) -> SessionStore:
        """The store, if it can list."""
        if not _can_list(store):
            pytest.skip("cannot list")
        return store

    @pytest.fixture
    def leasing(self, store: SessionStore) -> SessionStore:
        """The store, if it has leases."""
        try:
            store.lease("is there any", 0)
        except UnsupportedByStore:
            pytest.skip("has no leases")
        return store

    # get --------------------------------------------------------------------------------------------------------------

    def test_get_of_a_missing_record(self, store: SessionStore) -> None:
        """An id of which nothing is stored gives ``None``."""
        store.save(make_record(1), expected=0)
        assert store.get(make_record(2).id) is None

    def test_get_of_a_malformed_id(self, store: SessionStore) -> None:
        """A malformed id names no record."""
        for name, session_id in MALFORMED_IDS.items():
            assert store.get(session_id) is None, name

    @pytest.mark.parametrize("fields", [{"expires_at": 1.0}, {"ended_at": 1.0, "end_reason": "revoked"}], ids=str)
    def test_get_judges_nothing(self, store: SessionStore, fields: dict[str, Any]) -> None:
        """Expired and ended records are returned like any other."""
        record = make_record(**fields)
        store.save(record, expected=0)
        assert store.get(record.id) == record

    def test_round_trip(self, store: SessionStore) -> None:
        """What was created comes back equal in every field, with its exact type."""
        for number, (name, fields) in enumerate(ODD_FIELDS.items()):
            record = make_record(number, **fields)
            store.save(record, expected=0)
            assert _exactly(store.get(record.id)) == _exactly(record), name

    def test_round_trip_of_a_change(self, store: SessionStore) -> None:
        """A later save replaces every field that is not fixed, by an empty value and by ``None`` too."""
        other = make_record(tags=frozenset({"old"}), metadata={"old": 1}, data=b"old", ended_at=6.0, end_reason="old")
        for number, (name, fields) in enumerate(ODD_FIELDS.items()):
            changed = make_record(number, version=2, **fields)
            store.save(replace(other, **{field: getattr(changed, field) for field in FIXED_FIELDS}), expected=0)
            store.save(changed, expected=1)
            assert _exactly(store.get(changed.id)) == _exactly(changed), name

    @pytest.mark.parametrize("text", HARD_TEXT.values(), ids=HARD_TEXT)
    @pytest.mark.parametrize("field", ["user_id", "tenant_id", "end_reason", "tags"])
    def test_text_is_kept_or_refused(self, store: SessionStore, field: str, text: str) -> None:
        """Text that a store cannot keep exactly is refused with an error of this package, and nothing is stored."""
        fields: dict[str, Any] = {field: frozenset({text}) if field == "tags" else text}
        record = make_record(**fields)
        try:
            store.save(record, expected=0)
        except (PersistSessionError, ValueError):
            assert store.get(record.id) is None
        else:
            assert store.get(record.id) == record

    @pytest.mark.parametrize("text", [_LONG[: LONGEST_NAME + 1], "a\0b", "\ud800"], ids=["long", "NUL", "half a pair"])
    @pytest.mark.parametrize("field", ["user_id", "tenant_id", "end_reason"])
    def test_save_refuses_names_that_not_every_store_keeps(self, store: SessionStore, field: str, text: str) -> None:
        """A user, tenant or reason that is too long or no text for a database is a ``ValueError`` that names it."""
        fields: dict[str, Any] = {field: text}
        with pytest.raises(ValueError, match=field):
            store.save(make_record(**fields), expected=0)

    def test_records_are_copies(self, store: SessionStore) -> None:
        """Changing the metadata that was saved or read changes nothing stored: ``save`` is the only way to write."""
        record = make_record(metadata={"titles": ["first"]})
        store.save(record, expected=0)
        for held in (record, store.get(record.id)):
            assert held is not None
            titles = held.metadata["titles"]
            assert isinstance(titles, list)
            titles.append("second")
        found = store.get(record.id)
        assert found is not None
        assert found.metadata == {"titles": ["first"]}

    # save -------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("fields", [{}, {"expires_at": 1.0}, {"ended_at": 1.0, "end_reason": "logout"}], ids=str)
    def test_creation_of_what_is_there(self, store: SessionStore, fields: dict[str, Any]) -> None:
        """Creating a record of an id that is taken is a conflict, even if the record there has expired or ended."""
        record = make_record(**fields)
        store.save(record, expected=0)
        with pytest.raises(SessionConflict):
            store.save(replace(record, data=b"another"), expected=0)
        assert store.get(record.id) == record

    def test_creation_after_a_deletion(self, store: SessionStore) -> None:
        """An id is free again once its record was deleted, and its record starts at version 1."""
        store.save(make_record(), expected=0)
        store.delete(make_record().id)
        again = make_record(data=b"again")
        store.save(again, expected=0)
        assert store.get(again.id) == again

    def test_save_of_what_is_missing(self, store: SessionStore) -> None:
        """Saving over a version of a record that is not there is a conflict, and nothing comes into being."""
        record = make_record(version=2)
        with pytest.raises(SessionConflict):
            store.save(record, expected=1)
        assert store.get(record.id) is None

    def test_save_does_not_revive(self, store: SessionStore) -> None:
        """A record that was deleted cannot be saved again in its next version."""
        record = make_record()
        store.save(record, expected=0)
        store.delete(record.id)
        with pytest.raises(SessionConflict):
            store.save(following(record), expected=1)
        assert store.get(record.id) is None

    @pytest.mark.parametrize("expected", [1, 3, 100])
    def test_save_over_another_version(self, store: SessionStore, expected: int) -> None:
        """A version other than the expected one, older or newer, is a conflict and stays."""
        first = make_record()
        second = following(first, data=b"second")
        store.save(first, expected=0)
        store.save(second, expected=1)
        with pytest.raises(SessionConflict):
            store.save(replace(first, version=expected + 1, data=b"late"), expected=expected)
        assert store.get(first.id) == second

    def test_creating_a_record_of_a_later_version(self, store: SessionStore) -> None:
        """A record that is brought over from another store keeps its version, and is saved on from there."""
        record = make_record(version=57)
        store.save(record, expected=0)
        with pytest.raises(SessionConflict):
            store.save(record, expected=0)
        with pytest.raises(SessionConflict):
            store.save(replace(record, version=1), expected=0)
        store.save(replace(record, version=58), expected=57)
        assert store.get(record.id) == replace(record, version=58)

    @pytest.mark.parametrize("version", [0, -1])
    def test_creating_a_record_of_no_version(self, store: SessionStore, version: int) -> None:
        """Versions start at 1: anything before is refused, and nothing is stored."""
        record = make_record(version=version)
        with pytest.raises(ValueError, match="version"):
            store.save(record, expected=0)
        assert store.get(record.id) is None

    @pytest.mark.parametrize("version", [0, 1, 3, -1])
    def test_save_of_a_version_that_does_not_follow(self, store: SessionStore, version: int) -> None:
        """A record that is not of the version after the expected one is refused, and the stored one stays."""
        record = make_record()
        store.save(record, expected=0)
        with pytest.raises(ValueError, match="version"):
            store.save(replace(record, version=version), expected=1)
        assert store.get(record.id) == record

    def test_save_of_a_malformed_id(self, store: SessionStore) -> None:
        """A malformed id is refused as such, not by what the driver makes of it."""
        for session_id in MALFORMED_IDS.values():
            with pytest.raises(ValueError, match="session id"):
                store.save(make_record(id=session_id, user_id=None), expected=0)

    def test_creation_in_a_wrong_shard(self, store: SessionStore) -> None:
        """A new session outside of its user's shard is refused, since the user's sessions are listed there."""
        record = make_record(id="3ff" + make_record().id[3:])
        assert record.id != make_record().id
        with pytest.raises(ValueError, match="shard"):
            store.save(record, expected=0)
        assert store.get(record.id) is None

    def test_save_touches_one_record(self, store: SessionStore) -> None:
        """Other records stay as they are, those of the same user too."""
        records = [make_record(number) for number in range(3)]
        for record in records:
            store.save(record, expected=0)
        store.save(following(records[1], data=b"changed"), expected=1)
        assert [store.get(record.id) for record in (records[0], records[2])] == [records[0], records[2]]

    def test_many_saves_of_one_record(self, store: SessionStore) -> None:
        """A record that is saved often keeps its last state alone, whatever size it had before."""
        record = make_record()
        store.save(record, expected=0)
        for number in range(100):
            record = following(record, data=bytes([number]) * (number % 7) * 1000)
            store.save(record, expected=record.version - 1)
        assert store.get(record.id) == record
        assert record.version == 101

    # delete -----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("fields", [{}, {"expires_at": 1.0}, {"ended_at": 1.0, "end_reason": "logout"}], ids=str)
    def test_delete(self, store: SessionStore, fields: dict[str, Any]) -> None:
        """A record, live or not, is deleted once and gone then; the answer tells the first time from the second."""
        record = make_record(**fields)
        store.save(record, expected=0)
        assert store.delete(record.id) is True
        assert store.get(record.id) is None
        assert store.delete(record.id) is False

    def test_delete_of_the_expected_version(self, store: SessionStore) -> None:
        """With the version that is stored, the record is removed."""
        record = make_record()
        store.save(record, expected=0)
        store.save(following(record), expected=1)
        assert store.delete(record.id, expected=2) is True
        assert store.get(record.id) is None

    @pytest.mark.parametrize("expected", [0, 1, 3])
    def test_delete_of_another_version(self, store: SessionStore, expected: int) -> None:
        """With another version than the stored one, nothing happens and the answer is ``False``."""
        first = make_record()
        second = following(first)
        store.save(first, expected=0)
        store.save(second, expected=1)
        assert store.delete(first.id, expected=expected) is False
        assert store.get(first.id) == second

    @pytest.mark.parametrize("expected", [None, 0, 1])
    def test_delete_of_what_is_missing(self, store: SessionStore, expected: int | None) -> None:
        """Deleting an id of which nothing is stored answers ``False``."""
        assert store.delete(make_record().id, expected=expected) is False

    @pytest.mark.parametrize("expected", [None, 1])
    def test_delete_of_a_malformed_id(self, store: SessionStore, expected: int | None) -> None:
        """Deleting a malformed id answers ``False``."""
        for name, session_id in MALFORMED_IDS.items():
            assert store.delete(session_id, expected=expected) is False, name

    def test_delete_touches_one_record(self, store: SessionStore) -> None:
        """Another session of the same user stays."""
        kept, removed = make_record(1), make_record(2)
        store.save(kept, expected=0)
        store.save(removed, expected=0)
        store.delete(removed.id)
        assert store.get(kept.id) == kept

    def test_delete_clears_every_index(self, listing: SessionStore) -> None:
        """A deleted record is in no listing, by user, by id, by time or in the statistics."""
        record = make_record(ended_at=1.0)
        listing.save(record, expected=0)
        listing.save(following(record), expected=1)
        listing.delete(record.id)
        ways: list[dict[str, Any]] = [{}, {"user_id": record.user_id}, {"ids": {record.id}}, {"expires_before": 1e12}]
        queries = [SessionQuery(**way) for way in ways]
        assert [list(listing.find(query)) for query in queries] == [[], [], [], []]
        assert [listing.count(query) for query in queries] == [0, 0, 0, 0]
        assert listing.stats(now=0.0) == StoreStats()

    # Listing ----------------------------------------------------------------------------------------------------------

    def test_listing_works_everywhere_or_nowhere(self, store: SessionStore) -> None:
        """If ``scan`` is not supported, every listing method says so with a reason, and ``scan`` at once."""
        query = SessionQuery()
        calls: list[Callable[[], object]] = [
            store.scan,
            store.snapshot,
            lambda: list(store.find(query)),
            lambda: store.count(query),
            lambda: store.stats(now=0.0),
        ]
        reasons = []
        for call in calls:
            try:
                call()
            except UnsupportedByStore as error:
                reasons.append(str(error))
        assert len(reasons) in (0, len(calls))
        assert all(reasons)

    def test_empty_store(self, listing: SessionStore) -> None:
        """An empty store lists nothing, counts 0 and has statistics of zeros without an oldest or newest."""
        assert list(listing.scan()) == list(listing.snapshot()) == []
        assert list(listing.find(SessionQuery(order_by="created_at"))) == []
        assert listing.count(SessionQuery()) == 0
        assert listing.stats(now=0.0) == StoreStats()

    def test_scan_yields_each_record_once(self, listing: SessionStore) -> None:
        """Every record is yielded once: of users and of nobody, live, expired and ended, in its last version."""
        records = [
            make_record(1),
            make_record(2),
            make_record(3, user_id=None),
            make_record(4, expires_at=1.0),
            make_record(5, user_id="bob", ended_at=1.0),
        ]
        for record in records:
            listing.save(record, expected=0)
        changed = following(records[0], data=b"changed")
        listing.save(changed, expected=1)
        for found in listing.scan(), listing.snapshot():
            assert sorted(found, key=lambda record: record.id) == sorted(
                [changed, *records[1:]], key=lambda record: record.id
            )

    @pytest.mark.parametrize("way", ["scan", "snapshot"])
    def test_scan_while_others_write(self, listing: SessionStore, way: str) -> None:
        """A record that is there all the time is yielded once, however many are saved and deleted during the scan."""
        staying = [make_record(number, user_id=None) for number in range(600)]
        going = [make_record(number, user_id=None) for number in range(1000, 1300)]
        coming = [make_record(number, user_id=None) for number in range(2000, 2300)]
        listing.save_many([Change(record=record, expected=0) for record in [*staying, *going]])
        seen = []
        for number, record in enumerate(getattr(listing, way)()):
            seen.append(record.id)
            if number % 10 == 0 and coming:
                listing.save(coming.pop(), expected=0)
                listing.delete(going.pop().id)
                changed = staying[number % 600]
                stored = listing.get(changed.id)
                assert stored is not None
                listing.save(following(stored), expected=stored.version)
        assert len(seen) == len(set(seen))
        assert {record.id for record in staying} <= set(seen)

    def test_scans_are_independent(self, listing: SessionStore) -> None:
        """Two scans at a time do not disturb each other, and one that is given up holds nothing up."""
        records = {record.id: record for record in map(make_record, range(5))}
        for record in records.values():
            listing.save(record, expected=0)
        given_up, closed = listing.scan(), listing.snapshot()
        next(given_up)
        next(closed)
        closed.close()  # type: ignore[attr-defined]
        pairs = list(zip(listing.scan(), listing.snapshot(), strict=True))
        assert {one.id: one for one, _ in pairs} == {other.id: other for _, other in pairs} == records
        assert listing.delete(next(iter(records)))

    @_each
    @given(records=_records, queries=st.lists(_queries(), min_size=1, max_size=3))
    def test_find_and_count_agree_with_matches(
        self, listing: SessionStore, records: list[SessionRecord], queries: list[SessionQuery]
    ) -> None:
        """``find`` and ``count`` give what ``matches``, the order, the offset and the limit make of ``scan``."""
        _empty(listing)
        assert all(listing.save_many([Change(record=record, expected=0) for record in records]))
        everything = list(listing.scan())
        for query in queries:
            matching = [record for record in everything if query.matches(record)]
            name = (query.order_by or "id").removeprefix("-")
            matching.sort(key=lambda record: (getattr(record, name), record.id), reverse=(query.order_by or "")[:1] == "-")
            end = None if query.limit is None else query.offset + query.limit
            wanted, found = matching[query.offset : end], list(listing.find(query))
            assert len(found) == len({record.id for record in found}) == len(wanted) == listing.count(query)
            # Without an order, which of them are within the limit is the store's choice.
            assert found == wanted if query.order_by else all(record in matching for record in found)

    @pytest.mark.parametrize("order_by", [None, "-created_at", "accessed_at"])
    def test_find_of_many(self, listing: SessionStore, order_by: str | None) -> None:
        """Many records are all found, once each and in order, though many have the same times."""
        records = [
            make_record(number, user_id=None, created_at=float(number % 3), accessed_at=0.0) for number in range(1100)
        ]
        listing.save_many([Change(record=record, expected=0) for record in records])
        found = list(listing.find(SessionQuery(order_by=order_by, offset=10, limit=1060)))
        name = (order_by or "id").removeprefix("-")
        records.sort(key=lambda record: (getattr(record, name), record.id), reverse=(order_by or "")[:1] == "-")
        assert len({record.id for record in found}) == 1060
        assert order_by is None or found == records[10:1070]
        assert listing.count(SessionQuery(order_by=order_by, offset=10)) == 1090

    @pytest.mark.parametrize("order_by", ["id", "-id", "accessed_at", "-accessed_at", "expires_at", "-expires_at"])
    @pytest.mark.parametrize("user_id", [None, "alice"])
    def test_find_page_by_page(self, listing: SessionStore, order_by: str, user_id: str | None) -> None:
        """Pages that each start after the last record of the one before are the whole, though many have the same times."""
        records = [
            make_record(number, user_id=user_id, accessed_at=float(number % 3), expires_at=number % 7 * 1000.0)
            for number in range(70)
        ]
        listing.save_many([Change(record=record, expected=0) for record in records])
        query = SessionQuery(order_by=order_by, user_id=user_id, limit=9)
        whole, found = list(listing.find(replace(query, limit=None))), list(listing.find(query))
        assert sorted(record.id for record in whole) == sorted(record.id for record in records)
        while (rest := len(whole) - len(found)) > 0:
            query = replace(query, after=query.position(found[-1]))
            assert listing.count(replace(query, limit=None)) == rest
            found += listing.find(query)
        assert found == whole

    @pytest.mark.parametrize("order_by", ["-accessed_at", "accessed_at", "-created_at", "expires_at"])
    @pytest.mark.parametrize("tenant_id", [None, "", "acme"])
    def test_find_active_ones_of_a_user(self, listing: SessionStore, order_by: str, tenant_id: str | None) -> None:
        """The pages of a user's active sessions are what matches, of whatever version, tenant and state the others are."""
        versions = [1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**40]
        records = [
            make_record(
                number,
                version=versions[number % len(versions)],
                tenant_id=(None, "", "acme")[number % 3],
                accessed_at=float(number % 7),
                created_at=-float(number % 5),
                expires_at=(100.0, 100.5, 99.5)[number % 11 % 3],
                ended_at=50.0 if number % 9 == 4 else None,
            )
            for number in range(90)
        ]
        listing.save_many([Change(record=record, expected=0) for record in records])
        query = SessionQuery(user_id="alice", tenant_id=tenant_id, state="active", now=100.0, order_by=order_by, limit=4)
        wanted = sorted(filter(query.matches, records), key=query.position, reverse=query.descending)
        assert list(listing.find(replace(query, offset=3))) == wanted[3:7]
        found = list(listing.find(query))
        while page := list(listing.find(replace(query, after=query.position(found[-1])))):
            found += page
        assert found == wanted

    def test_find_after_what_is_gone(self, listing: SessionStore) -> None:
        """A page starts after a record that was deleted since, and what comes before it by then is not on it."""
        records = sorted((make_record(number, user_id=None) for number in range(10, 14)), key=lambda record: record.id)
        listing.save_many([Change(record=record, expected=0) for record in records[1:]])
        query = SessionQuery(order_by="id", limit=2)
        last = list(listing.find(query))[-1]
        listing.delete(last.id)
        listing.save(records[0], expected=0)
        assert list(listing.find(replace(query, after=query.position(last)))) == records[3:]

    def test_find_of_a_user(self, listing: SessionStore) -> None:
        """A user is found by the exact id: nobody, the empty id, other case and other spelling are other users."""
        names = (None, "", "7", "07", "alice", "Alice", "é", "e\u0301", "%", "*", "../alice")
        records = {name: make_record(number, user_id=name) for number, name in enumerate(names)}
        for record in records.values():
            listing.save(record, expected=0)
        found = {name: list(listing.find(SessionQuery(user_id=name))) for name in names if name is not None}
        assert found == {name: [record] for name, record in records.items() if name is not None}

    def test_find_by_the_beginning_of_an_id(self, listing: SessionStore) -> None:
        """A session is found by the first digits of its id, from the shard alone to all 67; others are not."""
        record, other = make_record(1), make_record(2)
        listing.save(record, expected=0)
        listing.save(other, expected=0)
        own = [length for length in range(3, 68) if record.id[:length] != other.id[:length]]
        assert own
        assert all(list(listing.find(SessionQuery(id_prefix=record.id[:length]))) == [record] for length in own)
        assert list(listing.find(SessionQuery(id_prefix=record.id[:3], user_id="nobody of that name"))) == []

    def test_find_sees_the_last_version(self, listing: SessionStore) -> None:
        """Conditions are judged on what was saved last, by whichever index they are looked up."""
        record = make_record(expires_at=100.0)
        listing.save(record, expected=0)
        changed = following(record, expires_at=300.0, tags=frozenset({"new"}), metadata={"a": "late"})
        listing.save(changed, expected=1)
        outdated: list[dict[str, Any]] = [{"expires_before": 200.0}, {"tags": frozenset({"web"})}, {"text": "firefox"}]
        assert [list(listing.find(SessionQuery(**way))) for way in outdated] == [[], [], []]
        current: list[dict[str, Any]] = [{"expires_after": 300.0}, {"tags": frozenset({"new"})}, {"text": "LATE"}]
        assert [list(listing.find(SessionQuery(**way))) for way in current] == [[changed]] * 3

    def test_stats(self, listing: SessionStore) -> None:
        """Statistics tell states at the moment given, pairs of tenant and user, sizes, times, tenants and tags."""
        for record in (
            make_record(1, data=b"12345", created_at=-5.0, expires_at=100.0),
            make_record(2, data=b"", created_at=7.5, expires_at=101.0, tags=frozenset({"web", ""})),
            make_record(3, tenant_id=None, data=b"\0\0", expires_at=99.0, created_at=1.0),
            make_record(4, tenant_id="", data="é".encode(), expires_at=99.0, ended_at=200.0, created_at=1.0),
            make_record(5, user_id="", data=b"1", expires_at=500.0, ended_at=50.0, created_at=1.0),
            make_record(6, user_id=None, data=b"1", expires_at=500.0, created_at=1.0, tags=frozenset()),
        ):
            listing.save(record, expected=0)
        expected = StoreStats(
            total=6,
            active=2,
            expired=2,
            ended=2,
            users=4,
            bytes=11,
            oldest=-5.0,
            newest=7.5,
            tenants={"acme": 4, "": 1},
            tags={"web": 5, "beta": 4, "": 1},
        )
        assert listing.stats(now=100.0) == expected

    @_each
    @given(records=_records, changes=st.lists(_changes() | st.none(), max_size=3), now=_times)
    def test_stats_agree_with_add_up(
        self, listing: SessionStore, records: list[SessionRecord], changes: list[dict[str, Any] | None], now: float
    ) -> None:
        """``stats`` gives what ``add_up`` makes of the records, after some of them were changed and some deleted."""
        _empty(listing)
        assert all(listing.save_many([Change(record=record, expected=0) for record in records]))
        left = {record.id: record for record in records}
        for record, fields in zip(records, changes, strict=False):
            if fields is None:
                listing.delete(left.pop(record.id).id)
                continue
            changing = {name: value for name, value in fields.items() if name not in FIXED_FIELDS}
            left[record.id] = following(record, **changing)
            listing.save(left[record.id], expected=1)
        assert listing.stats(now=now) == add_up(iter(left.values()), now)

    def test_stats_of_odd_fields(self, listing: SessionStore) -> None:
        """Whatever a record may be made of, statistics count it; other spellings are other tenants and tags."""
        records = [make_record(number, **fields) for number, fields in enumerate(ODD_FIELDS.values())]
        for record in records:
            listing.save(record, expected=0)
        assert listing.stats(now=100.0) == add_up(iter(records), 100.0)

    def test_stats_of_many(self, listing: SessionStore) -> None:
        """Many records of many users, tenants and tags are all counted, once each."""
        seed = random.randrange(10**6)
        print(f"seed {seed}")
        chance = random.Random(seed)
        records = [
            make_record(
                number,
                user_id=chance.choice([None, f"user {chance.randrange(300)}"]),
                tenant_id=chance.choice([None, f"tenant {chance.randrange(40)}"]),
                tags=frozenset(f"tag {chance.randrange(60)}" for _ in range(chance.randrange(4))),
                data=chance.randbytes(chance.randrange(300)),
                created_at=chance.uniform(-100, 100),
                expires_at=chance.uniform(0, 200),
                ended_at=chance.choice([None, None, 50.0]),
            )
            for number in range(1100)
        ]
        listing.save_many([Change(record=record, expected=0) for record in records])
        assert listing.stats(now=100.0) == add_up(iter(records), 100.0)

    # save_many and delete_many ----------------------------------------------------------------------------------------

    def test_save_many(self, store: SessionStore) -> None:
        """Each change has its own outcome in the order given; a conflict is ``False`` and hinders no other."""
        taken, changed, fresh = make_record(1), make_record(2), make_record(3)
        store.save(taken, expected=0)
        store.save(changed, expected=0)
        outcomes = store.save_many(
            [
                Change(record=replace(taken, data=b"late"), expected=0),
                Change(record=following(changed, data=b"new"), expected=1),
                Change(record=make_record(4, version=8), expected=7),
                Change(record=fresh, expected=0),
                Change(record=following(fresh, data=b"twice"), expected=1),
                Change(record=following(fresh, data=b"stale"), expected=1),
            ]
        )
        assert outcomes == [False, True, False, True, True, False]
        found = [store.get(make_record(number).id) for number in (1, 2, 3, 4)]
        assert found == [taken, following(changed, data=b"new"), following(fresh, data=b"twice"), None]

    def test_save_many_of_which_some_are_there(self, store: SessionStore) -> None:
        """Of many new records those are stored of which there is none, each once, and the others stay as they are."""
        records = [make_record(number, user_id=None) for number in range(250)]
        there = [replace(record, data=b"there") for record in records[::3]]
        store.save_many([Change(record=record, expected=0) for record in there])
        again = [replace(record, data=b"again") for record in records[:100]]
        outcomes = store.save_many([Change(record=record, expected=0) for record in [*records, *again]])
        assert outcomes == [bool(number % 3) for number in range(250)] + [False] * 100
        assert [store.get(record.id) for record in records] == [
            record if number % 3 else there[number // 3] for number, record in enumerate(records)
        ]

    @pytest.mark.parametrize("missing", [0, 1, 149, 150])
    def test_save_many_of_which_nearly_all_or_none_are_there(self, store: SessionStore, missing: int) -> None:
        """Of many new records a single one that is there, or is not, has its own outcome."""
        records = [make_record(number, user_id=None) for number in range(150)]
        for record in records[missing:]:
            store.save(replace(record, data=b"there"), expected=0)
        outcomes = store.save_many([Change(record=record, expected=0) for record in records])
        assert outcomes == [True] * missing + [False] * (150 - missing)
        assert [found and found.data for found in map(store.get, (records[0].id, records[-1].id))] == [
            records[0].data if missing else b"there",
            records[-1].data if missing == 150 else b"there",
        ]

    @pytest.mark.parametrize("wrong", [make_record(id="x" * 67), make_record(version=0)], ids=["id", "version"])
    def test_save_many_of_something_wrong(self, store: SessionStore, wrong: SessionRecord) -> None:
        """What ``save`` refuses is refused among others too, and the changes after it are not saved."""
        behind = make_record(2)
        with pytest.raises(ValueError, match=r"id|version"):
            store.save_many([Change(record=wrong, expected=0), Change(record=behind, expected=0)])
        assert store.get(behind.id) is None

    def test_delete_many(self, store: SessionStore) -> None:
        """Each deletion has its own outcome in the order given: missing, malformed and other versions are ``False``."""
        records = [make_record(number) for number in range(4)]
        store.save_many([Change(record=record, expected=0) for record in records])
        outcomes = store.delete_many(
            [
                Deletion(id=records[0].id),
                Deletion(id=make_record(99).id),
                Deletion(id=records[1].id, expected=1),
                Deletion(id="../" * 22 + "a"),
                Deletion(id=records[2].id, expected=2),
                Deletion(id=records[0].id),
            ]
        )
        assert outcomes == [True, False, True, False, False, False]
        assert [store.get(record.id) for record in records] == [None, None, *records[2:]]

    def test_nothing_to_do(self, store: SessionStore) -> None:
        """No changes and no deletions have no outcomes."""
        assert store.save_many([]) == []
        assert store.delete_many([]) == []

    def test_many_at_once(self, store: SessionStore) -> None:
        """A thousand changes and deletions at once have a thousand outcomes."""
        records = [make_record(number, user_id=None) for number in range(1000)]
        assert store.save_many([Change(record=record, expected=0) for record in records]) == [True] * 1000
        assert store.get(records[-1].id) == records[-1]
        assert store.delete_many([Deletion(id=record.id, expected=1) for record in records]) == [True] * 1000
        assert store.get(records[-1].id) is None

    # transaction ------------------------------------------------------------------------------------------------------

    @pytest.fixture
    def transacting(self, store: SessionStore) -> SessionStore:
        """The store, if it has transactions."""
        try:
            store.transaction([])
        except UnsupportedByStore:
            pytest.skip("has no transactions")
        return store

    @pytest.fixture
    def somebody(self) -> str | None:
        """Whose sessions a transaction may change together: those of nobody, which are of many shards, if it can."""
        return None if self.across_users else "alice"

    def test_transactions_are_there_or_not(self, store: SessionStore) -> None:
        """A store has transactions, or says with a reason that it has none, and then nothing was changed."""
        record = make_record()
        outcome: object = True
        try:
            store.transaction([Change(record=record, expected=0)])
        except UnsupportedByStore as error:
            outcome = bool(str(error)) and store.get(record.id) is None
        assert outcome is True

    def test_transaction(self, transacting: SessionStore, somebody: str | None) -> None:
        """Changes, creations and deletions of one transaction are all done, of whatever users and shards."""
        changed, removed = make_record(1), make_record(2, user_id=somebody or "bob")
        gone, created = make_record(3, user_id=somebody), make_record(4, user_id=somebody, version=7)
        ended = make_record(5)
        for record in (changed, removed, gone, ended):
            transacting.save(record, expected=0)
        over = following(ended, ended_at=9.0, end_reason="revoked", data=b"")
        transacting.transaction(
            [
                Change(record=following(changed, data=b"new"), expected=1),
                Deletion(id=removed.id),
                Deletion(id=gone.id, expected=1),
                Change(record=created, expected=0),
                Change(record=over, expected=1),
                Deletion(id=make_record(99).id),
                Deletion(id="../" * 22 + "a"),
            ]
        )
        found = [transacting.get(record.id) for record in (changed, removed, gone, created, ended)]
        assert found == [following(changed, data=b"new"), None, None, created, over]
        transacting.save(following(created), expected=7)
        transacting.save(gone, expected=0)

    def test_lists_after_a_transaction(self, listing: SessionStore, transacting: SessionStore) -> None:
        """What a transaction has changed is in every list as if it had been saved and deleted; a check finds nothing."""
        changed, removed, created = make_record(1), make_record(2), make_record(3)
        listing.save(changed, expected=0)
        listing.save(removed, expected=0)
        after = following(changed, expires_at=5.0, tags=frozenset({"new"}), data=b"1234")
        listing.transaction([Change(record=after, expected=1), Deletion(id=removed.id), Change(record=created, expected=0)])
        by_id = sorted([after, created], key=lambda record: record.id)
        assert list(listing.find(SessionQuery(user_id="alice", order_by="id"))) == by_id
        assert list(listing.find(SessionQuery(order_by="id"))) == by_id
        assert list(listing.find(SessionQuery(expires_before=6.0))) == [after]
        assert listing.stats(now=100.0) == add_up(iter(by_id), 100.0)
        assert list(listing.check(repair=False)) == []

    def test_transactions_one_after_the_other(self, transacting: SessionStore, somebody: str | None) -> None:
        """Sessions that are changed together over and over keep their last state, whatever size they had before."""
        records = [make_record(number, user_id=somebody) for number in range(3)]
        transacting.transaction([Change(record=record, expected=0) for record in records])
        for number in range(60):
            records = [following(record, data=bytes([number]) * (number % 7) * 1000) for record in records]
            transacting.transaction([Change(record=record, expected=record.version - 1) for record in records])
        assert [transacting.get(record.id) for record in records] == records

    def test_transaction_in_conflict(self, transacting: SessionStore) -> None:
        """One version that differs hinders all, wherever it stands; the conflict names its session."""
        present, there = make_record(7), make_record(1)
        transacting.save(present, expected=0)
        transacting.save(there, expected=0)
        changes: list[Change | Deletion] = [
            Change(record=following(there), expected=1),
            Change(record=make_record(9), expected=0),
        ]
        wrong_ones: list[Change | Deletion] = [
            Change(record=present, expected=0),
            Change(record=make_record(7, version=3), expected=2),
            Change(record=make_record(8, version=2), expected=1),
            Deletion(id=present.id, expected=2),
            Deletion(id=present.id, expected=0),
            Deletion(id=make_record(8).id, expected=1),
            Deletion(id=make_record(8).id, expected=0),
            Deletion(id="x" * 67, expected=1),
        ]
        for wrong, place in product(wrong_ones, (0, 1, 2)):
            with pytest.raises(SessionConflict, match=wrong.id):
                transacting.transaction([*changes[:place], wrong, *changes[place:]])
            assert [transacting.get(make_record(number).id) for number in (7, 8, 1, 9)] == [present, None, there, None]
        transacting.transaction(changes)
        assert [transacting.get(make_record(number).id) for number in (1, 9)] == [following(there), make_record(9)]

    @pytest.mark.parametrize(
        "wrong",
        [
            Change(record=make_record(1, version=3), expected=1),
            Change(record=make_record(1, id="x" * 67), expected=0),
            Deletion(id=make_record(2).id),
            Change(record=make_record(2), expected=0),
        ],
        ids=["version", "id", "deleted too", "twice"],
    )
    def test_transaction_of_something_wrong(self, transacting: SessionStore, wrong: Change | Deletion) -> None:
        """What ``save`` refuses is refused, and so are two changes of one session; nothing is changed."""
        record = make_record(2)
        with pytest.raises(ValueError, match=r"id|version|twice"):
            transacting.transaction([Change(record=record, expected=0), wrong])
        assert transacting.get(record.id) is None

    def test_transaction_of_many(self, transacting: SessionStore, somebody: str | None) -> None:
        """Hundreds of sessions change together."""
        records = [make_record(number, user_id=somebody) for number in range(300)]
        transacting.transaction([Change(record=record, expected=0) for record in records])
        transacting.transaction([Deletion(id=record.id, expected=1) for record in records[1:]])
        assert [transacting.get(record.id) for record in records[:3]] == [records[0], None, None]

    def test_race_of_transactions(self, transacting: SessionStore, race: Race, somebody: str | None) -> None:
        """However many move amounts between a few sessions at once, the sum stays as it was."""
        records = [make_record(number, user_id=somebody, data=b"100") for number in range(5)]
        transacting.save_many([Change(record=record, expected=0) for record in records])
        race(partial(_move_amounts, [record.id for record in records], 15))
        found = [transacting.get(record.id) for record in records]
        assert sum(int(record.data) for record in found if record is not None) == 500
        assert sum(record.version - 1 for record in found if record is not None) == 15 * 2 * RACERS

    def test_readers_of_a_transaction(self, transacting: SessionStore, race: Race, somebody: str | None) -> None:
        """Whoever has read one session as a transaction left it reads none as it was before."""
        records = [make_record(number, user_id=somebody) for number in range(5)]
        transacting.save_many([Change(record=record, expected=0) for record in records])
        looks = race(partial(_raise_all_or_look, [record.id for record in records], 40))
        assert all(looks[1:])

    # lease ------------------------------------------------------------------------------------------------------------

    def test_leases_are_there_or_not(self, store: SessionStore) -> None:
        """A store has leases, or says with a reason that it has none."""
        outcome: object
        try:
            outcome = store.lease("sweep", 60)
        except UnsupportedByStore as error:
            outcome = bool(str(error))
        assert outcome is True

    def test_lease_is_prolonged_by_its_holder(self, leasing: SessionStore) -> None:
        """Who holds a lease gets it again."""
        assert [leasing.lease("sweep", 60), leasing.lease("sweep", 60)] == [True, True]

    def test_lease_has_one_holder(self, leasing: SessionStore, another: SessionStore) -> None:
        """A lease that somebody holds is refused, and the refused one changes nothing."""
        assert leasing.lease("sweep", 60) is True
        assert another.lease("sweep", 60) is False
        assert leasing.lease("sweep", 60) is True

    def test_leases_of_other_names(self, leasing: SessionStore, another: SessionStore) -> None:
        """Leases of different names have different holders."""
        assert leasing.lease("sweep", 60) is True
        assert another.lease("backup", 60) is True
        assert leasing.lease("backup", 60) is False

    @pytest.mark.parametrize("seconds", [0, -1, -1e9])
    def test_lease_is_given_up(self, leasing: SessionStore, another: SessionStore, seconds: float) -> None:
        """Asking for 0 seconds or less gives a lease up at once; the answer is ``False``."""
        leasing.lease("sweep", 60)
        assert leasing.lease("sweep", seconds) is False
        assert another.lease("sweep", 60) is True

    def test_lease_of_another_cannot_be_given_up(self, leasing: SessionStore, another: SessionStore) -> None:
        """Asking for 0 seconds of somebody else's lease takes nothing away."""
        leasing.lease("sweep", 60)
        assert another.lease("sweep", 0) is False
        assert another.lease("sweep", 60) is False

    def test_lease_ends_by_itself(self, leasing: SessionStore, another: SessionStore) -> None:
        """A lease that is not prolonged ends, another one gets it, and the first does not get it back."""
        leasing.lease("sweep", 60)
        leasing.lease("sweep", 0.05)
        end = time.monotonic() + DEADLINE
        while not another.lease("sweep", 60):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert leasing.lease("sweep", 60) is False

    def test_lease_in_a_race(self, leasing: SessionStore, another: SessionStore, open_store: Any) -> None:
        """When several processes ask at once, each lease has exactly one holder."""
        names = [f"lease{number}" for number in range(20)]
        answers = in_processes(open_store, partial(_take_leases, names))
        assert [sum(got) for got in zip(*answers, strict=True)] == [1] * len(names)

    # namespace --------------------------------------------------------------------------------------------------------

    @pytest.fixture
    def chat(self, store: SessionStore) -> Iterator[SessionStore]:
        """The store of another namespace in the same place, if there can be one."""
        try:
            opened = store.namespace("chat")
        except UnsupportedByStore:
            pytest.skip("has one namespace only")
        yield opened
        opened.close()

    def test_namespaces_are_there_or_not(self, store: SessionStore) -> None:
        """A store has namespaces, or says with a reason what to do."""
        try:
            outcome: object = store.namespace("chat")
        except UnsupportedByStore as error:
            outcome = str(error)
        assert outcome

    @pytest.mark.parametrize("name", ["", "Chat", "a-b", "../web", "a" * 41, "chat\n", "é", "a:b"])
    def test_a_namespace_of_a_wrong_name(self, store: SessionStore, chat: SessionStore, name: str) -> None:
        """A name that cannot be part of a path, a key and a table's name is refused."""
        with pytest.raises(ConfigError, match="namespace"):
            store.namespace(name)

    def test_the_same_namespace(self, store: SessionStore, chat: SessionStore) -> None:
        """Whoever asks for a namespace gets its records, from whichever namespace; also those of the first one."""
        mine, other = make_record(1), make_record(2)
        store.save(mine, expected=0)
        chat.save(other, expected=0)
        for place in store, chat:
            with closing(place.namespace("chat")) as again, closing(place.namespace("web")) as first:
                assert [again.get(other.id), first.get(mine.id)] == [other, mine]

    def test_records_of_another_namespace(self, store: SessionStore, chat: SessionStore) -> None:
        """The same id is another session in another namespace: read, changed and deleted there only."""
        mine, other = make_record(), make_record(data=b"of the chat")
        store.save(mine, expected=0)
        assert chat.get(mine.id) is None
        assert chat.delete(mine.id) is False
        with pytest.raises(SessionConflict):
            chat.save(following(mine), expected=1)
        chat.save(other, expected=0)
        chat.save(following(other), expected=1)
        assert [store.get(mine.id), chat.get(mine.id)] == [mine, following(other)]
        assert store.delete(mine.id)
        assert chat.get(mine.id) == following(other)

    def test_lists_of_another_namespace(self, listing: SessionStore, chat: SessionStore) -> None:
        """Lists, counts, statistics and checks know the records of their own namespace only."""
        mine, other = make_record(1), make_record(2)
        listing.save(mine, expected=0)
        chat.save(other, expected=0)
        for store, record in (listing, mine), (chat, other):
            seen: list[SessionRecord] = []
            assert list(store.check(repair=True, seen=seen.append)) == []
            queries = [SessionQuery(), SessionQuery(user_id="alice"), SessionQuery(ids=frozenset({mine.id, other.id}))]
            assert [list(store.find(query)) for query in queries] == [[record]] * 3
            assert [store.count(query) for query in queries] == [1] * 3
            assert list(store.scan()) == list(store.snapshot()) == seen == [record]
            assert store.stats(now=0.0).total == 1

    def test_leases_of_another_namespace(self, leasing: SessionStore, another: SessionStore, chat: SessionStore) -> None:
        """A lease of the same name is another one in another namespace."""
        assert leasing.lease("sweep", 60) is True
        with closing(another.namespace("chat")) as others:
            assert others.lease("sweep", 60) is True
        assert [chat.lease("sweep", 60), leasing.lease("sweep", 60), another.lease("sweep", 60)] == [False, True, False]

    def test_notes_of_another_namespace(self, noting: SessionStore, chat: SessionStore) -> None:
        """A note is one of its namespace."""
        noting.note("cleanup", 1.0)
        assert chat.noted("cleanup") is None

    def test_a_namespace_for_others(self, store: SessionStore, chat: SessionStore, another: SessionStore) -> None:
        """Another store of the same place has the same namespaces."""
        chat.save(make_record(), expected=0)
        with closing(another.namespace("chat")) as others:
            assert others.get(make_record().id) == make_record()
        assert another.get(make_record().id) is None

    def test_closing_a_namespace(self, store: SessionStore, chat: SessionStore) -> None:
        """Closing the one leaves the other one usable."""
        chat.save(make_record(1), expected=0)
        store.save(make_record(2), expected=0)
        chat.close()
        assert store.get(make_record(2).id) == make_record(2)
        store.close()
        assert chat.get(make_record(1).id) == make_record(1)
        chat.close()

    # Upkeep -----------------------------------------------------------------------------------------------------------

    @pytest.fixture
    def noting(self, store: SessionStore) -> SessionStore:
        """A store that keeps notes."""
        try:
            store.noted("something")
        except UnsupportedByStore:
            pytest.skip("has no notes")
        return store

    def test_a_note_is_there_or_not(self, noting: SessionStore) -> None:
        """A note that nobody made is ``None``; of two the last one counts, also where it is the earlier moment."""
        assert noting.noted("cleanup") is None
        for moment in 1_700_000_000.25, 0.1:
            noting.note("cleanup", moment)
            assert noting.noted("cleanup") == moment
        assert noting.noted("health") is None

    def test_a_note_is_everybodys(self, noting: SessionStore, another: SessionStore) -> None:
        """What one store object notes another one of the same sessions reads."""
        noting.note("cleanup", 1_700_000_000.0)
        assert another.noted("cleanup") == 1_700_000_000.0

    def test_notes_are_no_sessions(self, listing: SessionStore, noting: SessionStore) -> None:
        """Notes are in no list, in no statistics, and no lease."""
        noting.note("sweep", 1e10)
        assert listing.count(SessionQuery()) == listing.stats(now=0.0).total == len(list(listing.scan())) == 0
        with suppress(UnsupportedByStore):
            assert listing.lease("sweep", 60)
            assert noting.noted("sweep") == 1e10

    @pytest.mark.parametrize("repair", [False, True])
    def test_check_of_an_intact_store(self, listing: SessionStore, repair: bool) -> None:
        """A check finds nothing wrong with what the store itself has written, and shows each record once."""
        for number, fields in enumerate(ODD_FIELDS.values()):
            with suppress(ValueError, SerializationError):  # not every store keeps everything
                listing.save(make_record(number, **fields), expected=0)
        seen: list[SessionRecord] = []
        assert list(listing.check(repair=repair, seen=seen.append)) == []
        assert sorted(record.id for record in seen) == sorted(record.id for record in listing.scan())

    @pytest.mark.parametrize("full", [False, True])
    def test_optimize_keeps_everything(self, listing: SessionStore, full: bool) -> None:
        """Tidying up changes no record, and the store goes on working."""
        records = [make_record(number) for number in range(20)]
        for record in records:
            listing.save(record, expected=0)
            listing.save(following(record, data=b"changed" * 1000), expected=1)
        for record in records[:5]:
            listing.delete(record.id)
        before = {record.id: _exactly(record) for record in listing.scan()}
        assert all(improvement.text and improvement.freed >= 0 for improvement in listing.optimize(full=full))
        assert {record.id: _exactly(record) for record in listing.scan()} == before
        listing.save(records[0], expected=0)
        assert list(listing.check(repair=False)) == []

    # close, and a second store ----------------------------------------------------------------------------------------

    def test_close(self, store: SessionStore) -> None:
        """A store may be closed before its first use and twice, and opens again when it is used."""
        store.close()
        record = make_record()
        store.save(record, expected=0)
        store.close()
        store.close()
        assert store.get(record.id) == record
        store.save(following(record), expected=1)
        assert store.delete(record.id) is True

    def test_second_store_sees_everything(self, store: SessionStore, another: SessionStore) -> None:
        """What one store object saved or deleted, another one sees when the call has returned."""
        record = make_record()
        store.save(record, expected=0)
        assert another.get(record.id) == record
        another.save(following(record), expected=1)
        assert store.get(record.id) == following(record)
        store.delete(record.id)
        assert another.get(record.id) is None

    def test_what_was_saved_outlives_its_store(self, store: SessionStore, another: SessionStore) -> None:
        """Closing a store loses nothing and closes no other one."""
        record = make_record()
        assert another.get(record.id) is None
        store.save(record, expected=0)
        store.close()
        assert another.get(record.id) == record

    def test_second_store_lists_everything(self, listing: SessionStore, another: SessionStore) -> None:
        """What one store object saved, another one lists."""
        record = make_record()
        listing.save(record, expected=0)
        assert list(another.find(SessionQuery(user_id=record.user_id))) == list(another.scan()) == [record]

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_fork(self, store: SessionStore, another: SessionStore) -> None:
        """A store that was in use goes on working after a fork, in the child and in the parent."""
        parents, childs = make_record(1), make_record(2)
        store.save(parents, expected=0)

        def child() -> SessionRecord | None:
            store.save(childs, expected=0)
            store.save(following(parents), expected=1)
            return store.get(parents.id)

        assert in_a_fork(child) == following(parents)
        assert [store.get(parents.id), store.get(childs.id)] == [following(parents), childs]
        store.save(following(childs), expected=1)

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_fork_of_a_holder(self, leasing: SessionStore, another: SessionStore) -> None:
        """The child of a fork does not hold the lease of its parent."""
        leasing.lease("sweep", 60)
        assert in_a_fork(lambda: leasing.lease("sweep", 60)) is False
        assert leasing.lease("sweep", 60) is True

    # Everything together ----------------------------------------------------------------------------------------------

    def test_against_a_dict(self, store: SessionStore) -> None:
        """Whatever is done in whatever order, the store and a plain dict agree."""
        machine: Any = partial(_AgainstDict, store)
        run_state_machine_as_test(machine, settings=settings(deadline=None, max_examples=15, stateful_step_count=20))

    def test_race_of_changes(self, store: SessionStore, race: Race) -> None:
        """No update is lost: increments of several processes add up, in the counter and in the version."""
        record = make_record(metadata={"count": 0})
        store.save(record, expected=0)
        race(partial(_raise_counter, record.id, 20))
        found = store.get(record.id)
        assert found is not None
        assert (found.metadata, found.version) == ({"count": 20 * RACERS}, 20 * RACERS + 1)

    def test_race_of_creations(self, store: SessionStore, race: Race) -> None:
        """Of several that create one id at once, exactly one succeeds, and what it saved is stored."""
        records = [make_record(number) for number in range(20)]
        outcomes = race(partial(_create_all, records))
        winners = [[number for number, won in enumerate(won_by) if won] for won_by in zip(*outcomes, strict=True)]
        stored = [store.get(record.id) for record in records]
        assert [[int(record.data)] for record in stored if record is not None] == winners

    def test_race_of_saves_and_deletions(self, store: SessionStore, race: Race) -> None:
        """Of several that save or delete the same version at once, exactly one succeeds, and what it did stays done."""
        records = [make_record(number) for number in range(20)]
        store.save_many([Change(record=record, expected=0) for record in records])
        outcomes = race(partial(_save_or_delete, records))
        for record, succeeded in zip(records, zip(*outcomes, strict=True), strict=True):
            assert sum(succeeded) == 1
            assert store.get(record.id) == (None if succeeded.index(True) % 2 else following(record))

    def test_race_against_a_deletion(self, store: SessionStore, race: Race) -> None:
        """A record that is deleted while others save it again and again stays deleted."""
        records = [make_record(number) for number in range(10)]
        store.save_many([Change(record=record, expected=0) for record in records])
        race(partial(_save_around_deletion, records))
        assert [store.get(record.id) for record in records] == [None] * len(records)


# Histories ------------------------------------------------------------------------------------------------------------

ODD_ENTRIES = {
    "nothing in it": b"",
    "every byte": bytes(range(256)),
    "NUL": b"\0",
    "text that is none": b"\xff\xfe\xed\xa0\x80",
    "newlines": b"\r\n\n",
    "a MiB": bytes(range(256)) * 4096,
    "looks like a number": b"17",
}
ODD_KEYS = {
    "empty": "",
    "long": _FOREIGN[:LONGEST_KEY],
    "unicode": "Zoë 漢字 🎉",
    "braces": "{3fa}:*",
    "quotes": "'\"`;--",
    "newline": "a\n",
}
BAD_KEYS = {"too long": "k" * (LONGEST_KEY + 1), "NUL": "a\0b", "half a surrogate pair": "a\ud800"}
_MOMENT = 1_700_000_000.123_456_7
#: Entries of one append in a race: a question, an answer and a note.
_TURN = 3


def _turn(*parts: object) -> list[bytes]:
    return [" ".join(map(str, (*parts, place))).encode() for place in range(_TURN)]


def _append_turns(session_id: str, turns: int, store: SessionStore, number: int) -> list[int]:
    """Append so many turns, signed with the racer's number; the answers."""
    return [store.history.append(session_id, _turn(number, turn), created_at=1.0) for turn in range(turns)]


def _append_where_expected(session_id: str, rounds: int, store: SessionStore, number: int) -> list[bool]:
    """Try to be the one who appends behind the entry of each number in turn; say when it was."""
    won = []
    for last in range(rounds):
        while store.history.count(session_id) < last:
            time.sleep(0)
        won.append(_appends(store, session_id, [str(number).encode()], expected_seq=last))
    return won


def _append_with_key(session_id: str, keys: int, store: SessionStore, number: int) -> list[int]:
    """Append a turn under each of so many keys, as all racers do."""
    appends = (partial(store.history.append, session_id, _turn(number, key), key=f"key {key}") for key in range(keys))
    return [append(created_at=1.0) for append in appends]


def _append_until_gone(records: Sequence[SessionRecord], store: SessionStore, number: int) -> list[int]:
    """Half of the racers append to each session until it is gone, one ends or deletes it meanwhile; how often it went."""
    counts = []
    for place, record in enumerate(records):
        count = 0
        while _appends(store, record.id, _turn(number, count)):
            count += 1
            if number == 0 and count == 5:
                _finish(store, record, place)
        counts.append(count)
    return counts


def _finish(store: SessionStore, record: SessionRecord, place: int) -> None:
    """End every second one, delete the others."""
    if place % 2:
        store.delete(record.id)
    else:
        store.save(following(record, ended_at=2.0, end_reason="ended"), expected=1)


def _appends(store: SessionStore, session_id: str, entries: Sequence[bytes], **options: Any) -> bool:
    with suppress(SessionConflict, SessionNotFound):
        store.history.append(session_id, entries, created_at=1.0, **options)
        return True
    return False


def _read_while_others_append(session_id: str, turns: int, store: SessionStore, number: int) -> bool:
    """One racer reads while the others append; whether it saw whole turns only."""
    if number:
        _append_turns(session_id, turns, store, number)
        return True
    whole = True
    while (count := store.history.count(session_id)) < turns * _TURN * (RACERS - 1):
        whole = whole and count % _TURN == 0 and len(store.history.read(session_id)) % _TURN == 0
    return whole


class HistoryLogContract(_Contract):
    """The tests of a store's histories. Subclasses give the fixture ``open_store``."""

    @pytest.fixture
    def record(self, store: SessionStore) -> SessionRecord:
        """A session, stored, whose history is empty."""
        record = make_record(1)
        store.save(record, expected=0)
        return record

    @pytest.fixture
    def log(self, store: SessionStore) -> HistoryLog:
        return store.history

    @pytest.fixture
    def ten(self, log: HistoryLog, record: SessionRecord) -> list[LogEntry]:
        """The entries of *record*: ten of them."""
        for number in range(1, 11):
            log.append(record.id, [b"%d" % number], created_at=float(number))
        return [LogEntry(seq=number, data=b"%d" % number, created_at=float(number)) for number in range(1, 11)]

    # append -----------------------------------------------------------------------------------------------------------

    def test_append(self, log: HistoryLog, record: SessionRecord) -> None:
        """Entries are numbered on from 1, all of one append have its time, and the number of the last one comes back."""
        assert log.append(record.id, [b"a", b"b"], created_at=_MOMENT) == 2
        assert log.append(record.id, [b"c"], created_at=-5.0) == 3
        assert log.read(record.id) == [
            LogEntry(seq=1, data=b"a", created_at=_MOMENT),
            LogEntry(seq=2, data=b"b", created_at=_MOMENT),
            LogEntry(seq=3, data=b"c", created_at=-5.0),
        ]

    @pytest.mark.parametrize("data", ODD_ENTRIES.values(), ids=ODD_ENTRIES)
    def test_entries_come_back_as_they_were(self, log: HistoryLog, record: SessionRecord, data: bytes) -> None:
        """Whatever bytes an entry has, it comes back with them, and so do its neighbours."""
        log.append(record.id, [b"before", data, b"behind"], created_at=0.0)
        found = log.read(record.id)
        assert [(type(entry.data), entry.data) for entry in found] == [
            (bytes, b"before"),
            (bytes, data),
            (bytes, b"behind"),
        ]
        assert [(type(entry.created_at), entry.created_at) for entry in found] == [(float, 0.0)] * 3

    def test_a_whole_number_of_seconds(self, log: HistoryLog, record: SessionRecord) -> None:
        """A time that is given as an ``int`` comes back as a ``float``."""
        log.append(record.id, [b"a"], created_at=17)
        assert repr(log.read(record.id)[0].created_at) == "17.0"

    def test_an_append_of_nothing(self, log: HistoryLog, record: SessionRecord) -> None:
        """An empty sequence stores nothing and remembers no key, but is checked; the last number comes back."""
        assert log.append(record.id, [], created_at=1.0) == 0
        log.append(record.id, [b"a", b"b"], created_at=1.0)
        assert log.append(record.id, [], created_at=1.0, key="again", expected_seq=2, most=2) == 2
        assert log.append(record.id, [b"c"], created_at=1.0, key="again") == 3
        with pytest.raises(SessionConflict):
            log.append(record.id, [], created_at=1.0, expected_seq=2)
        with pytest.raises(SessionNotFound):
            log.append(make_record(2).id, [], created_at=1.0)

    def test_many_entries_at_once(self, log: HistoryLog, record: SessionRecord) -> None:
        """Thousands of entries may be appended at once."""
        entries = [b"%d" % number for number in range(1, 3001)]
        assert log.append(record.id, entries, created_at=1.0) == 3000
        assert [entry.data for entry in log.read(record.id, after=1490, limit=20)] == entries[1490:1510]
        assert [entry.data for entry in log.read(record.id, limit=2, newest=True)] == entries[-2:]

    def test_histories_are_apart(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """Each session has a history of its own, with numbers and keys of its own, of one user too."""
        other = make_record(2)
        store.save(other, expected=0)
        assert log.append(record.id, [b"a", b"b"], created_at=1.0, key="key") == 2
        assert log.append(other.id, [b"c"], created_at=1.0, key="key") == 1
        assert [entry.data for entry in log.read(other.id)] == [b"c"]
        assert log.count(record.id) == 2

    def test_append_to_no_session(self, log: HistoryLog, record: SessionRecord) -> None:
        """An id of which there is no record, or that is malformed, is ``SessionNotFound``, and nothing comes into being."""
        for name, session_id in IDS_OF_NO_SESSION.items():
            with pytest.raises(SessionNotFound) as caught:
                log.append(session_id, [b"a"], created_at=1.0, key="key")
            assert caught.value.missing
            assert (log.count(session_id), log.read(session_id)) == (0, []), name

    def test_append_to_an_ended_session(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """What has ended takes no entry, not even one whose key it knows; what it has can be read."""
        log.append(record.id, [b"a"], created_at=1.0, key="key")
        store.save(following(record, ended_at=2.0, end_reason="ended"), expected=1)
        for key in None, "key", "another":
            with pytest.raises(SessionNotFound) as caught:
                log.append(record.id, [b"b"], created_at=3.0, key=key)
            assert not caught.value.missing
        assert log.read(record.id) == [LogEntry(seq=1, data=b"a", created_at=1.0)]

    def test_expiry_is_not_judged(self, store: SessionStore, log: HistoryLog) -> None:
        """A session that expired long ago takes entries: to judge that is the manager's."""
        expired = make_record(3, created_at=1.0, accessed_at=2.0, expires_at=3.0)
        store.save(expired, expected=0)
        assert log.append(expired.id, [b"a"], created_at=1e9) == 1

    def test_a_saved_session_keeps_its_history(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """Saving the record, longer, shorter and ended, changes nothing of its history."""
        log.append(record.id, [b"a"], created_at=1.0, key="key")
        for fields in {"data": b"x" * 100_000}, {"data": b""}, {"expires_at": 1.8e9}, {"ended_at": 1.0}:
            record = following(record, **fields)
            store.save(record, expected=record.version - 1)
        assert log.read(record.id) == [LogEntry(seq=1, data=b"a", created_at=1.0)]

    def test_an_append_leaves_the_record(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """The record stays as it is, its version too."""
        log.append(record.id, [b"a"], created_at=1.0)
        assert store.get(record.id) == record

    def test_entries_must_be_bytes(self, log: HistoryLog, record: SessionRecord) -> None:
        """Anything else is a ``TypeError``, and nothing is stored of the others."""
        wrong: list[Any] = [b"a", "b"]
        with pytest.raises(TypeError, match="bytes"):
            log.append(record.id, wrong, created_at=1.0)
        assert log.count(record.id) == 0

    @pytest.mark.parametrize("moment", [float("nan"), float("inf"), 1e15, -1e15])
    def test_moments_beyond_all_dates(self, log: HistoryLog, record: SessionRecord, moment: float) -> None:
        """A time that is none is a ``ValueError``, and nothing is stored."""
        with pytest.raises(ValueError, match="created_at"):
            log.append(record.id, [b"a"], created_at=moment)
        assert log.count(record.id) == 0

    # expected_seq, most -----------------------------------------------------------------------------------------------

    def test_expected_number(self, log: HistoryLog, record: SessionRecord) -> None:
        """Entries are stored where the last one has the expected number, 0 where there is none."""
        assert log.append(record.id, [b"a", b"b"], created_at=1.0, expected_seq=0) == 2
        assert log.append(record.id, [b"c"], created_at=1.0, expected_seq=2) == 3

    @pytest.mark.parametrize("expected", [0, 1, 3, -1, 10**30])
    def test_another_number_than_expected(self, log: HistoryLog, record: SessionRecord, expected: int) -> None:
        """Where it has another one, that is a conflict, and nothing is stored."""
        log.append(record.id, [b"a", b"b"], created_at=1.0)
        with pytest.raises(SessionConflict):
            log.append(record.id, [b"c"], created_at=1.0, expected_seq=expected)
        assert log.count(record.id) == 2

    def test_no_more_than_allowed(self, log: HistoryLog, record: SessionRecord) -> None:
        """A history gets exactly as long as is allowed; beyond that it is ``SessionTooLarge``, and nothing is stored."""
        assert log.append(record.id, [b"a", b"b"], created_at=1.0, most=3) == 2
        with pytest.raises(SessionTooLarge):
            log.append(record.id, [b"c", b"d"], created_at=1.0, most=3)
        assert log.append(record.id, [b"c"], created_at=1.0, most=3) == 3
        with pytest.raises(SessionTooLarge):
            log.append(record.id, [b"d"], created_at=1.0, most=3)
        assert log.append(record.id, [b"d"], created_at=1.0, most=10**30) == 4

    def test_what_is_checked_first(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """A wrong number comes before too many, a missing session before both, a key that is none before all."""
        log.append(record.id, [b"a"], created_at=1.0)
        with pytest.raises(SessionConflict):
            log.append(record.id, [b"b"], created_at=1.0, expected_seq=0, most=1)
        store.delete(record.id)
        with pytest.raises(SessionNotFound):
            log.append(record.id, [b"b"], created_at=1.0, expected_seq=5, most=0)
        with pytest.raises(ValueError, match="key"):
            log.append(record.id, [b"b"], created_at=1.0, key="\0")

    # began ------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("began", [_MOMENT, 0.1 + 0.2, -5.1, 0.0, 1.0, 5e-324])
    def test_append_to_the_session_that_is_meant(self, store: SessionStore, log: HistoryLog, began: float) -> None:
        """A session that began at just that moment takes entries, in each of its versions."""
        record = make_record(1, created_at=began)
        store.save(record, expected=0)
        assert log.append(record.id, [b"a"], created_at=1.0, began=began) == 1
        store.save(following(record, data=b"more"), expected=1)
        assert log.append(record.id, [b"b"], created_at=1.0, began=began) == 2

    @pytest.mark.parametrize("towards", [-math.inf, math.inf], ids=["earlier", "later"])
    def test_append_to_another_session_than_is_meant(
        self, log: HistoryLog, record: SessionRecord, ten: list[LogEntry], towards: float
    ) -> None:
        """One that began the least bit earlier or later is ``SessionNotFound``, of a known key and of nothing too."""
        log.append(record.id, [b"11"], created_at=1.0, key="key")
        began = math.nextafter(record.created_at, towards)
        for entries, key in ([b"a"], None), ([b"11"], "key"), ([], None):
            with pytest.raises(SessionNotFound) as caught:
                log.append(record.id, entries, created_at=1.0, key=key, expected_seq=5, began=began)
            assert not caught.value.missing
        assert log.count(record.id) == 11

    def test_append_to_the_next_session_of_an_id(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """Whoever means the session that was there before adds nothing to the one there is now, and removes nothing."""
        store.delete(record.id)
        later = make_record(1, created_at=record.created_at + 1)
        store.save(later, expected=0)
        log.append(later.id, [b"new"], created_at=1.0, began=later.created_at)
        with pytest.raises(SessionNotFound):
            log.append(record.id, [b"late"], created_at=1.0, began=record.created_at)
        assert log.delete(record.id, began=record.created_at) is False
        assert [entry.data for entry in log.read(later.id)] == [b"new"]

    def test_no_session_is_meant(self, log: HistoryLog, record: SessionRecord) -> None:
        """Where there is no record, nothing can be added or removed, whenever it began."""
        for name, session_id in IDS_OF_NO_SESSION.items():
            with pytest.raises(SessionNotFound) as caught:
                log.append(session_id, [b"a"], created_at=1.0, began=record.created_at)
            assert caught.value.missing
            assert log.delete(session_id, began=record.created_at) is False, name

    def test_an_ended_session_is_meant(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """What has ended takes no entry; its history can be removed by who knows when it began."""
        log.append(record.id, [b"a"], created_at=1.0)
        store.save(following(record, ended_at=2.0), expected=1)
        with pytest.raises(SessionNotFound):
            log.append(record.id, [b"b"], created_at=1.0, began=record.created_at)
        assert log.delete(record.id, began=math.nextafter(record.created_at, 0.0)) is False
        assert log.delete(record.id, began=record.created_at) is True
        assert log.count(record.id) == 0

    @pytest.mark.parametrize("towards", [-math.inf, math.inf], ids=["earlier", "later"])
    def test_delete_of_another_session_than_is_meant(
        self, log: HistoryLog, record: SessionRecord, ten: list[LogEntry], towards: float
    ) -> None:
        """Nothing is removed unless it began at just that moment; keys are remembered too."""
        log.append(record.id, [b"11"], created_at=11.0, key="key")
        assert log.delete(record.id, began=math.nextafter(record.created_at, towards)) is False
        assert log.append(record.id, [b"11"], created_at=12.0, key="key") == 11
        assert log.read(record.id) == [*ten, LogEntry(seq=11, data=b"11", created_at=11.0)]
        assert [log.delete(record.id, began=record.created_at) for _ in range(2)] == [True, False]
        assert log.append(record.id, [b"a"], created_at=1.0, key="key") == 1

    # key --------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", ODD_KEYS.values(), ids=ODD_KEYS)
    def test_a_repeated_append(self, log: HistoryLog, record: SessionRecord, key: str) -> None:
        """An append with a known key stores nothing and returns what it returned, whatever else is asked for."""
        assert log.append(record.id, [b"a", b"b"], created_at=1.0, key=key) == 2
        log.append(record.id, [b"c"], created_at=2.0, key=key + "x" if len(key) < LONGEST_KEY else "x")
        for options in {}, {"expected_seq": 0}, {"expected_seq": 99}, {"most": 0}:
            assert log.append(record.id, [b"a", b"b"], created_at=3.0, key=key, **options) == 2
        assert log.append(record.id, [], created_at=3.0, key=key) == 2
        assert log.count(record.id) == 3

    @pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS)
    def test_a_key_that_is_none(self, log: HistoryLog, record: SessionRecord, key: str) -> None:
        """A key that is too long or no text is a ``ValueError`` that names it, and nothing is stored."""
        with pytest.raises(ValueError, match="key"):
            log.append(record.id, [b"a"], created_at=1.0, key=key)
        assert log.count(record.id) == 0

    def test_a_key_of_a_failed_append(self, log: HistoryLog, record: SessionRecord) -> None:
        """Only what succeeded is remembered."""
        with pytest.raises(SessionConflict):
            log.append(record.id, [b"a"], created_at=1.0, key="key", expected_seq=7)
        with pytest.raises(SessionTooLarge):
            log.append(record.id, [b"a"], created_at=1.0, key="key", most=0)
        assert log.append(record.id, [b"a"], created_at=1.0, key="key") == 1

    def test_keys_are_remembered(self, log: HistoryLog, record: SessionRecord) -> None:
        """Each of the latest appends is remembered, also where others without a key came in between."""
        for number in range(1, REMEMBERED + 41):
            log.append(record.id, [b"a"], created_at=1.0, key=f"key {number}" if number % 2 else None)
        latest = range(41, REMEMBERED + 41, 2)
        answers = [log.append(record.id, [b"a"], created_at=1.0, key=f"key {number}") for number in latest]
        assert answers == list(latest)

    # read -------------------------------------------------------------------------------------------------------------

    def test_read_everything(self, log: HistoryLog, record: SessionRecord, ten: list[LogEntry]) -> None:
        """Without conditions all entries come, in ascending order."""
        assert log.read(record.id) == log.read(record.id, newest=True) == ten

    @pytest.mark.parametrize("newest", [False, True])
    def test_read_a_part(self, log: HistoryLog, record: SessionRecord, ten: list[LogEntry], newest: bool) -> None:
        """Those behind *after* and ahead of *before*, the first or the last *limit* of them, always ascending."""
        afters, befores = (-5, 0, 1, 4, 9, 10, 10**30), (None, -5, 0, 1, 2, 6, 10, 11, 12, 10**30)
        for after, before, limit in product(afters, befores, (None, 0, 1, 3, 10, 11, 10**30)):
            between = [entry for entry in ten if after < entry.seq and (before is None or entry.seq < before)]
            start = max(0, len(between) - limit) if newest and limit is not None else 0
            wanted = between[start : None if limit is None else start + limit]
            assert log.read(record.id, after=after, before=before, limit=limit, newest=newest) == wanted

    def test_read_of_a_part_in_turns(self, log: HistoryLog, record: SessionRecord) -> None:
        """A part may begin and end within what was appended together."""
        data = []
        for number in range(1, 30):
            data += _turn(number)
            log.append(record.id, data[-_TURN:], created_at=1.0)
        for first in range(0, len(data), 4):
            for length in 1, 2, 5, 7:
                found = log.read(record.id, after=first, limit=length)
                assert [entry.data for entry in found] == data[first : first + length]
                assert [entry.seq for entry in found] == list(range(first + 1, first + 1 + len(found)))

    def test_nothing_of_no_session(self, log: HistoryLog, record: SessionRecord) -> None:
        """A missing session and a malformed id have no entries, and none to delete."""
        for name, session_id in IDS_OF_NO_SESSION.items():
            assert (log.read(session_id), log.count(session_id), log.delete(session_id)) == ([], 0, False), name

    def test_an_empty_history(self, log: HistoryLog, record: SessionRecord) -> None:
        """A session to which nothing was appended has no entries, and none to delete."""
        assert (log.read(record.id), log.count(record.id), log.delete(record.id)) == ([], 0, False)

    def test_a_negative_limit(self, log: HistoryLog, record: SessionRecord) -> None:
        """A negative limit is a ``ValueError``."""
        with pytest.raises(ValueError, match="limit"):
            log.read(record.id, limit=-1)

    def test_count(self, log: HistoryLog, record: SessionRecord, ten: list[LogEntry]) -> None:
        """There are as many entries as the last one's number says."""
        assert log.count(record.id) == 10

    # delete -----------------------------------------------------------------------------------------------------------

    def test_delete(self, store: SessionStore, log: HistoryLog, record: SessionRecord, ten: list[LogEntry]) -> None:
        """All entries go, the session stays, and numbers start at 1 again; the answer tells whether there were any."""
        assert [log.delete(record.id), log.delete(record.id)] == [True, False]
        assert (log.read(record.id), log.count(record.id), store.get(record.id)) == ([], 0, record)
        assert log.append(record.id, [b"again"], created_at=1.0, expected_seq=0) == 1
        assert [entry.data for entry in log.read(record.id)] == [b"again"]

    def test_delete_forgets_keys(self, log: HistoryLog, record: SessionRecord) -> None:
        """A key from before the deletion is a new one."""
        log.append(record.id, [b"a", b"b"], created_at=1.0, key="key")
        log.delete(record.id)
        assert log.append(record.id, [b"c"], created_at=1.0, key="key") == 1

    def test_delete_of_an_ended_session(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """The history of an ended session can be removed."""
        log.append(record.id, [b"a"], created_at=1.0)
        store.save(following(record, ended_at=2.0), expected=1)
        assert log.delete(record.id) is True
        assert log.count(record.id) == 0

    def test_delete_touches_one_history(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """The history of another session of the same user stays."""
        other = make_record(2)
        store.save(other, expected=0)
        log.append(record.id, [b"a"], created_at=1.0)
        log.append(other.id, [b"b"], created_at=1.0, key="key")
        log.delete(record.id)
        store.delete(record.id)
        assert [entry.data for entry in log.read(other.id)] == [b"b"]
        assert log.append(other.id, [b"b"], created_at=1.0, key="key") == 1

    @pytest.mark.parametrize("way", ["delete", "this version", "delete_many", "transaction"])
    def test_deleting_a_session(
        self, store: SessionStore, log: HistoryLog, record: SessionRecord, ten: list[LogEntry], way: str
    ) -> None:
        """The history goes with the record, and a session that is created under its id begins with none."""
        log.append(record.id, [b"a"], created_at=1.0, key="key")
        if way == "delete_many":
            assert store.delete_many([Deletion(id=record.id)]) == [True]
        elif way == "transaction":
            try:
                store.transaction([Deletion(id=record.id, expected=1)])
            except UnsupportedByStore as error:
                pytest.skip(str(error))
        else:
            assert store.delete(record.id, expected=1 if way == "this version" else None)
        assert (log.count(record.id), log.read(record.id), log.delete(record.id)) == (0, [], False)
        store.save(record, expected=0)
        assert (log.count(record.id), log.read(record.id)) == (0, [])
        assert log.append(record.id, [b"b"], created_at=1.0, key="key") == 1

    def test_not_deleting_a_session(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """Where the record is of another version and stays, its history does too."""
        log.append(record.id, [b"a"], created_at=1.0)
        assert store.delete(record.id, expected=7) is False
        assert store.delete_many([Deletion(id=record.id, expected=7)]) == [False]
        assert log.count(record.id) == 1

    # restore ----------------------------------------------------------------------------------------------------------

    def test_restore(self, log: HistoryLog, record: SessionRecord, ten: list[LogEntry]) -> None:
        """Entries come back as they were, with number and time, and the next one follows them."""
        log.delete(record.id)
        assert log.restore(record.id, ten) == 10
        assert log.read(record.id) == ten
        assert log.append(record.id, [b"11"], created_at=11.0, expected_seq=10) == 11

    def test_restoring_again(self, log: HistoryLog, record: SessionRecord, ten: list[LogEntry]) -> None:
        """What is there already is skipped, so repeating it and going on after an interruption are safe."""
        log.delete(record.id)
        assert [log.restore(record.id, part) for part in ([], ten[:4], ten[:4], ten, ten[5:], ten)] == [0, 4, 0, 6, 0, 0]
        assert log.read(record.id) == ten

    @pytest.mark.parametrize("numbers", [[12], [1, 3], [2, 1], [1, 1], [0, 1], [-1, 0]], ids=str)
    def test_restoring_a_gap(self, log: HistoryLog, record: SessionRecord, ten: list[LogEntry], numbers: list[int]) -> None:
        """Entries that do not follow each other, or what is there, are a ``ValueError``, and nothing is stored."""
        entries = [LogEntry(seq=number, data=b"", created_at=1.0) for number in numbers]
        with pytest.raises(ValueError, match=r"gap"):
            log.restore(record.id, entries)
        assert log.read(record.id) == ten

    def test_restoring_into_an_ended_session(self, store: SessionStore, log: HistoryLog) -> None:
        """Whatever the state of the record, its history can be brought over."""
        ended = make_record(4, ended_at=1.0, end_reason="ended")
        store.save(ended, expected=0)
        entries = [LogEntry(seq=1, data=b"a", created_at=_MOMENT)]
        assert log.restore(ended.id, entries) == 1
        assert log.read(ended.id) == entries

    def test_restoring_into_no_session(self, log: HistoryLog, record: SessionRecord) -> None:
        """Without a record nothing is restored."""
        for name, session_id in IDS_OF_NO_SESSION.items():
            with pytest.raises(SessionNotFound):
                log.restore(session_id, [LogEntry(seq=1, data=b"a", created_at=1.0)])
            assert log.count(session_id) == 0, name

    def test_restoring_a_long_history(self, store: SessionStore, log: HistoryLog, record: SessionRecord) -> None:
        """A history longer than what is restored in one step comes over as a whole, also after an interruption."""
        for number in range(12):
            log.append(record.id, [b"%d.%d" % (number, place) for place in range(100)], created_at=float(number))
        other = make_record(2)
        store.save(other, expected=0)
        entries = log.read(record.id)
        assert log.restore(other.id, entries) == 1200
        assert log.read(other.id) == entries
        log.delete(other.id)
        log.restore(other.id, entries[:700])
        assert log.restore(other.id, entries) == 500
        assert log.read(other.id) == entries

    # Around it --------------------------------------------------------------------------------------------------------

    def test_histories_are_no_sessions(self, store: SessionStore, record: SessionRecord, ten: list[LogEntry]) -> None:
        """Listings, statistics, checks and tidying up see the session and nothing else, and leave its history alone."""
        assert list(store.scan()) == list(store.find(SessionQuery(user_id=record.user_id))) == [record]
        assert store.count(SessionQuery()) == store.stats(now=0.0).total == 1
        for repair in False, True:
            assert list(store.check(repair=repair)) == []
        for full in False, True:
            list(store.optimize(full=full))
        assert store.history.read(record.id) == ten

    def test_second_store_sees_it(self, log: HistoryLog, another: SessionStore, record: SessionRecord) -> None:
        """What one store object appended or removed, another one sees when the call has returned, keys included."""
        log.append(record.id, [b"a"], created_at=1.0, key="key")
        assert another.history.read(record.id) == log.read(record.id) != []
        assert another.history.append(record.id, [b"a"], created_at=1.0, key="key") == 1
        assert another.history.append(record.id, [b"b"], created_at=1.0) == 2
        assert log.count(record.id) == 2
        log.delete(record.id)
        assert another.history.count(record.id) == 0

    def test_it_outlives_its_store(self, store: SessionStore, another: SessionStore, record: SessionRecord) -> None:
        """Closing a store loses nothing, and using its histories again opens it anew."""
        store.history.append(record.id, [b"a"], created_at=1.0)
        store.close()
        assert another.history.count(record.id) == 1
        assert store.history.append(record.id, [b"b"], created_at=1.0) == 2

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_fork(self, log: HistoryLog, another: SessionStore, record: SessionRecord) -> None:
        """Histories go on working after a fork, in the child and in the parent."""
        log.append(record.id, [b"a"], created_at=1.0)
        assert in_a_fork(lambda: log.append(record.id, [b"b"], created_at=1.0)) == 2
        assert log.append(record.id, [b"c"], created_at=1.0) == 3
        assert [entry.data for entry in log.read(record.id)] == [b"a", b"b", b"c"]

    def test_against_a_list(self, store: SessionStore) -> None:
        """Whatever is done in whatever order, the history and a plain list agree."""
        machine: Any = partial(_AgainstList, store)
        run_state_machine_as_test(machine, settings=settings(deadline=None, max_examples=15, stateful_step_count=20))

    # Races ------------------------------------------------------------------------------------------------------------

    def test_race_of_appends(self, store: SessionStore, record: SessionRecord, race: Race) -> None:
        """Turns of several processes follow one another: none is lost or torn apart, and each gets its own answer."""
        answers = race(partial(_append_turns, record.id, 20))
        entries = store.history.read(record.id)
        assert [entry.seq for entry in entries] == list(range(1, 20 * RACERS * _TURN + 1))
        turns = {entry.seq: [found.data for found in entries[entry.seq - _TURN : entry.seq]] for entry in entries}
        for number, ends in enumerate(answers):
            assert [turns[end] for end in ends] == [_turn(number, turn) for turn in range(20)]

    def test_race_for_a_number(self, store: SessionStore, record: SessionRecord, race: Race) -> None:
        """Of several that expect the same number, exactly one stores its entry."""
        outcomes = race(partial(_append_where_expected, record.id, 15))
        winners = [[number for number, won in enumerate(won_by) if won] for won_by in zip(*outcomes, strict=True)]
        assert [[int(entry.data)] for entry in store.history.read(record.id)] == winners

    def test_race_with_one_key(self, store: SessionStore, record: SessionRecord, race: Race) -> None:
        """Of several that append with the same key, one stores its turn, and all get the same answer."""
        answers = race(partial(_append_with_key, record.id, 15))
        assert answers == [[_TURN * number for number in range(1, 16)]] * RACERS
        turns = [entry.data.split()[1:] for entry in store.history.read(record.id)]
        assert turns == [[b"%d" % key, b"%d" % place] for key in range(15) for place in range(_TURN)]

    def test_race_against_the_end(self, store: SessionStore, race: Race) -> None:
        """Nothing is appended behind an ending, and nothing is left behind a deletion, not even for a new session."""
        records = [make_record(number) for number in range(10)]
        store.save_many([Change(record=record, expected=0) for record in records])
        counts = race(partial(_append_until_gone, records))
        for place, record in enumerate(records):
            appended = _TURN * sum(of_racer[place] for of_racer in counts)
            assert store.history.count(record.id) == (0 if place % 2 else appended)
            if place % 2:
                store.save(record, expected=0)
                assert store.history.read(record.id) == []

    def test_race_of_reads(self, store: SessionStore, record: SessionRecord, race: Race) -> None:
        """Whoever reads meanwhile sees whole turns only, and no error."""
        assert all(race(partial(_read_while_others_append, record.id, 20)))


class _AgainstList(RuleBasedStateMachine):
    """Does the same to a history and to a list of entries, and expects the same outcome."""

    def __init__(self, store: SessionStore) -> None:
        super().__init__()
        self.record = make_record(1)
        self.store = store
        store.delete(self.record.id)
        store.save(self.record, expected=0)
        self.log = store.history
        self.model: list[LogEntry] = []
        self.keys: dict[str, int] = {}

    @rule(
        entries=st.lists(st.binary(max_size=9), max_size=4),
        key=st.none() | st.sampled_from("abc"),
        off=st.sampled_from([None, None, 0, 1, -1]),
        most=st.none() | st.integers(0, 30),
    )
    def append(self, entries: list[bytes], key: str | None, off: int | None, most: int | None) -> None:
        last = len(self.model)
        expected = None if off is None else last + off
        append = partial(
            self.log.append, self.record.id, entries, created_at=0.5, key=key, expected_seq=expected, most=most
        )
        if key in self.keys:
            assert append() == self.keys[key]
        elif off:
            with pytest.raises(SessionConflict):
                append()
        elif most is not None and last + len(entries) > most:
            with pytest.raises(SessionTooLarge):
                append()
        else:
            assert append() == last + len(entries)
            self.model += [LogEntry(seq=seq, data=data, created_at=0.5) for seq, data in enumerate(entries, last + 1)]
            if entries and key is not None:
                self.keys[key] = len(self.model)

    @rule(first=st.integers(0, 12), size=st.integers(0, 5), limit=st.none() | st.integers(0, 4), newest=st.booleans())
    def read(self, first: int, size: int, limit: int | None, newest: bool) -> None:
        found = self.log.read(self.record.id, after=first, before=first + size, limit=limit, newest=newest)
        between = self.model[first : max(first, first + size - 1)]
        cut = len(between) if limit is None else limit
        assert found == (between[max(0, len(between) - cut) :] if newest else between[:cut])

    @rule()
    def restore(self) -> None:
        assert self.log.restore(self.record.id, self.model) == 0

    @rule(whole=st.booleans())
    def delete(self, whole: bool) -> None:
        if whole:
            assert self.store.delete(self.record.id)
            self.store.save(self.record, expected=0)
        else:
            assert self.log.delete(self.record.id) is bool(self.model)
        self.model, self.keys = [], {}

    def teardown(self) -> None:
        assert self.log.read(self.record.id) == self.model
        assert self.log.count(self.record.id) == len(self.model)
