"""A cache in front of a store: what it saves, and that nothing that has ended is read from it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cachelib.simple
import pytest
from cachelib import BaseCache, FileSystemCache, NullCache, RedisCache, SimpleCache
from cachelib.valkey import ValkeyCache
from flask import Flask, session

from flask_persist_session import (
    CachedStore,
    Change,
    ConfigError,
    Deletion,
    PersistSession,
    SessionConflict,
    SessionManager,
    SessionRecord,
    SessionStore,
    StoreUnavailable,
    open_store,
)
from flask_persist_session.stores.memory import MemoryStore
from flask_persist_session.testing import following, in_a_fork, make_record
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.servers import RedisServer

MakeApp = Callable[..., Flask]
NewURL = Callable[[str], str]
RECORD = make_record()
ENDED = following(RECORD, ended_at=1_700_000_200.0, end_reason="logout")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of each SimpleCache."""
    clock = Clock()
    monkeypatch.setattr(cachelib.simple, "time", clock)
    return clock


@pytest.fixture
def counting() -> CountingStore:
    return CountingStore(MemoryStore())


@pytest.fixture
def cache(clock: Clock) -> SimpleCache:
    return SimpleCache(threshold=1_000_000)


@pytest.fixture
def store(counting: CountingStore, cache: SimpleCache) -> CachedStore:
    return CachedStore(counting, cache)


@pytest.fixture
def cached(store: CachedStore, counting: CountingStore, clock: Clock) -> CachedStore:
    """The store with one record, of which the cache has a copy."""
    store.save(RECORD, expected=0)
    clock.advance(6)
    assert [store.get(RECORD.id), store.get(RECORD.id)] == [RECORD, RECORD]
    assert counting.operations["get"] == 1
    counting.operations.clear()
    return store


def marks(cache: SimpleCache) -> list[str]:
    return [key for key in cache._cache if ":mark:" in key]


# What it costs --------------------------------------------------------------------------------------------------------


def test_a_copy_costs_no_store_operation(cached: CachedStore, counting: CountingStore) -> None:
    """A session that was read lately is read again without the store."""
    assert cached.get(RECORD.id) == RECORD
    assert counting.operations == {}


def test_a_request_that_reads_costs_no_store_operation(make_app: MakeApp, store: CachedStore, clock: Clock) -> None:
    """An application on a cached store reads its session from the cache."""
    app = make_app(store)

    @app.get("/put")
    def put() -> str:
        session["name"] = "Ada"
        return ""

    @app.get("/read")
    def read() -> str:
        return str(session["name"])

    client = app.test_client()
    client.get("/put")
    clock.advance(6)
    client.get("/read")
    store.store.operations.clear()  # type: ignore[attr-defined]
    assert client.get("/read").text == "Ada"
    assert store.store.operations == {}  # type: ignore[attr-defined]


def test_a_copy_goes_after_its_time(cached: CachedStore, counting: CountingStore, clock: Clock) -> None:
    """After ttl seconds the store is asked again."""
    clock.advance(1801)
    assert cached.get(RECORD.id) == RECORD
    assert counting.operations == {"get": 1}


def test_a_written_session_is_read_from_the_store_for_a_while(cached: CachedStore, counting: CountingStore) -> None:
    """Just after a write the store answers, and nothing is put into the cache."""
    cached.save(ENDED, expected=1)
    assert [cached.get(RECORD.id) for _ in range(3)] == [ENDED] * 3
    assert counting.operations == {"save": 1, "get": 3}


def test_a_missing_session_is_not_remembered(store: CachedStore, counting: CountingStore) -> None:
    """That there was no record is no copy: whoever creates one elsewhere is seen at once."""
    assert store.get(RECORD.id) is None
    counting.store.save(RECORD, expected=0)
    assert store.get(RECORD.id) == RECORD


def test_what_is_no_id_costs_nothing(store: CachedStore, counting: CountingStore, cache: SimpleCache) -> None:
    """Neither the cache nor the store is asked for junk."""
    assert store.get("junk") is None
    assert (counting.operations, cache._cache) == ({}, {})


# What was written counts ----------------------------------------------------------------------------------------------

WRITES: dict[str, tuple[Callable[[SessionStore], object], SessionRecord | None]] = {
    "save": (lambda store: store.save(ENDED, expected=1), ENDED),
    "save_many": (lambda store: store.save_many([Change(record=ENDED, expected=1)]), ENDED),
    "transaction": (lambda store: store.transaction([Change(record=ENDED, expected=1)]), ENDED),
    "delete": (lambda store: store.delete(RECORD.id), None),
    "delete_many": (lambda store: store.delete_many([Deletion(id=RECORD.id)]), None),
    "deletion in a transaction": (lambda store: store.transaction([Deletion(id=RECORD.id)]), None),
}


@pytest.fixture(params=list(WRITES))
def write(request: pytest.FixtureRequest) -> tuple[Callable[[SessionStore], object], SessionRecord | None]:
    return WRITES[request.param]


def test_what_was_written_counts(cached: CachedStore, cache: SimpleCache, clock: Clock, write: Any) -> None:
    """No way of writing leaves a copy that counts: neither at once nor when the session is cached again."""
    change, left = write
    change(cached)
    other = CachedStore(cached.store, cache)
    assert other.get(RECORD.id) == left
    clock.advance(6)
    assert [other.get(RECORD.id), cached.get(RECORD.id)] == [left, left]


class Turns:
    """Has named threads do their steps one at a time, in a given order; who has none left is passed over."""

    def __init__(self, order: Iterable[str]) -> None:
        self._order = list(order)
        self._finished: set[str] = set()
        self._changed = threading.Condition()

    @contextmanager
    def step(self) -> Iterator[None]:
        name = threading.current_thread().name
        with self._changed:
            assert self._changed.wait_for(lambda: self._next() in (name, None), timeout=60)
            yield
            if self._order:
                self._order.pop(0)
            self._changed.notify_all()

    def run(self, **tasks: Callable[[], object]) -> None:
        threads = [threading.Thread(target=self._run, args=item, name=item[0], daemon=True) for item in tasks.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert self._finished == tasks.keys()

    def _run(self, name: str, task: Callable[[], object]) -> None:
        try:
            task()
        finally:
            with self._changed:
                self._finished.add(name)
                self._changed.notify_all()

    def _next(self) -> str | None:
        while self._order and self._order[0] in self._finished:
            self._order.pop(0)
        return self._order[0] if self._order else None


def _stepping(kind: type, *names: str) -> Any:
    """A class like *kind* whose methods of these names are steps of its ``turns``, when it has some."""

    def stepped(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.turns is None:
                return getattr(kind, name)(self, *arguments, **options)
            with self.turns.step():
                return getattr(kind, name)(self, *arguments, **options)

        return method

    return type(f"Stepping{kind.__name__}", (kind,), {"turns": None, **{name: stepped(name) for name in names}})


SteppingCache = _stepping(SimpleCache, "get_many", "add", "set", "delete")
SteppingStore = _stepping(MemoryStore, "get", "save", "delete", "transaction", "save_many", "delete_many")


def orders(**steps: int) -> list[tuple[str, ...]]:
    """Every order in which so many steps of each can come."""
    if not any(steps.values()):
        return [()]
    left = [name for name, count in steps.items() if count]
    return [(name, *rest) for name in left for rest in orders(**steps | {name: steps[name] - 1})]


def _expire_closings(cache: SimpleCache) -> None:
    for key in marks(cache):
        if cache.get(key) == b"closed":
            cache.delete(key)


def _after(order: Iterable[str], start: str, change: Callable[[SessionStore], object], readers: int = 1) -> list[Any]:
    """What is read once all have done their steps in that order, of a session that began as *start* says."""
    cache, below = SteppingCache(threshold=1_000_000), SteppingStore()
    store = CachedStore(below, cache)
    store.save(RECORD, expected=0)
    if start != "closed":
        _expire_closings(cache)
    if start == "cached":
        store.get(RECORD.id)
    tasks: dict[str, Callable[[], object]] = {f"reader{n}": partial(store.get, RECORD.id) for n in range(readers)}
    cache.turns = below.turns = turns = Turns(order)
    turns.run(writer=partial(change, store), evictor=lambda: cache.delete(f"persist-cached:web:mark:{RECORD.id}"), **tasks)
    cache.turns = below.turns = None
    answers = [store.get(RECORD.id)]
    _expire_closings(cache)
    return [*answers, store.get(RECORD.id), store.get(RECORD.id)]


@pytest.mark.parametrize("start", ["cached", "missed", pytest.param("closed", marks=pytest.mark.soak)])
def test_a_slow_reader_brings_nothing_back(write: Any, start: str) -> None:
    """In whatever order a reader, a writer and an eviction do their steps, what is read afterwards is what was written."""
    change, left = write
    wrong = [order for order in orders(reader0=4, writer=3, evictor=1) if _after(order, start, change) != [left] * 3]
    assert wrong == []


def test_several_slow_readers_bring_nothing_back(write: Any) -> None:
    """The same with three readers, in orders drawn at random."""
    change, left = write
    seed = random.randrange(2**32)
    print("seed", seed)
    steps = [*(f"reader{n}" for n in range(3) for _ in range(4)), *["writer"] * 3, "evictor"]
    draw = random.Random(seed)
    for start in ("cached", "missed", "closed") * 50:
        order = draw.sample(steps, len(steps))
        assert _after(order, start, change, readers=3) == [left] * 3, (order, start)


def test_two_writers_leave_the_last_record() -> None:
    """Of two writers the slower one does not put the older record back, in whatever order they tell the cache."""
    last = following(ENDED, end_reason="revoked")  # in some orders in conflict
    for order in orders(writer=3, second=3):
        cache, below = SteppingCache(threshold=1_000_000), SteppingStore()
        store = CachedStore(below, cache)
        store.save(RECORD, expected=0)
        cache.turns = below.turns = turns = Turns(order)
        second = partial(store.save_many, [Change(record=last, expected=2)])
        turns.run(writer=partial(store.save, ENDED, expected=1), second=second)
        cache.turns = below.turns = None
        _expire_closings(cache)
        assert [store.get(RECORD.id), store.get(RECORD.id)] == [below.get(RECORD.id)] * 2


class Overtaken(SimpleCache):
    """Has others do something just before a mark is added, once."""

    others: tuple[Callable[[], object], ...] = ()

    def add(self, key: str, value: Any, timeout: Any = None) -> bool:
        others, self.others = self.others, ()
        for other in others:
            other()
        return super().add(key, value, timeout)


@pytest.mark.parametrize("mark", [b"closed", b"m" * 16], ids=["writer", "reader"])
def test_a_reader_leaves_the_mark_of_who_was_faster(clock: Clock, mark: bytes) -> None:
    """Be it that of another reader or of a writer, who may be killed before it could close the session once more."""
    cache, key = Overtaken(), f"persist-cached:web:mark:{RECORD.id}"
    store = CachedStore(MemoryStore(), cache)
    store.save(RECORD, expected=0)
    clock.advance(6)
    cache.others = (lambda: cache.set(key, mark, 60),)
    assert store.get(RECORD.id) == RECORD
    assert cache.get(key) == mark
    assert cache.get(f"persist-cached:web:copy:{RECORD.id}") is None


# Conflicts ------------------------------------------------------------------------------------------------------------


def test_a_conflict_makes_the_copy_void(cached: CachedStore, counting: CountingStore, clock: Clock) -> None:
    """Whoever changed the store past the cache is met with one conflict; the next get reads what is stored."""
    counting.store.save(ENDED, expected=1)
    assert cached.get(RECORD.id) == RECORD
    with pytest.raises(SessionConflict):
        cached.save(following(RECORD), expected=1)
    assert cached.get(RECORD.id) == ENDED
    clock.advance(6)
    counting.operations.clear()
    assert [cached.get(RECORD.id), cached.get(RECORD.id)] == [ENDED, ENDED]
    assert counting.operations == {"get": 1}


def test_the_manager_gets_over_a_conflict(make_app: MakeApp, new_url: NewURL, clock: Clock) -> None:
    """Two processes with a cache each: a change on an outdated copy is merged with what the other one has stored."""
    url = new_url("sqlite")
    here, there = (_manager(make_app(CachedStore(open_store(url), SimpleCache()))) for _ in range(2))
    made = here.create({"one": 1})
    clock.advance(6)
    assert here.get(made.id) is not None
    with there.edit(made.id) as edited:
        edited.data["two"] = 2
    with here.edit(made.id) as edited:
        edited.data["three"] = 3
    clock.advance(6)
    found = here.get(made.id)
    assert found is not None
    assert dict(found.data) == {"one": 1, "two": 2, "three": 3}


@pytest.mark.parametrize("end", ["end", "revoke", "delete"])
def test_a_slow_request_revives_nothing(make_app: MakeApp, new_url: NewURL, clock: Clock, end: str) -> None:
    """A request that read a copy before a sign-out stores nothing after it, and renews nothing."""
    url, cache = new_url("sqlite"), SimpleCache()
    here, there = (_manager(make_app(CachedStore(open_store(url), cache))) for _ in range(2))
    made = here.create({"one": 1}, user_id="7")
    clock.advance(6)
    slow, slower = here.existing(made.id), here.existing(made.id)
    getattr(there, end)(made.id)
    slow.data["two"] = 2
    assert here.save(slow) == "discarded"
    here.clock = lambda: slower.expires_at - 1
    assert here.save(slower, renew=True) == "unchanged"
    clock.advance(6)
    assert [manager.get(made.id) for manager in (here, there, here)] == [None] * 3


def _manager(app: Flask) -> SessionManager:
    manager: SessionManager = app.extensions["persist_session"].manager
    return manager


# A cache that fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RedisCache, ValkeyCache])
def test_a_cache_that_is_down(kind: type[RedisCache], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without its cache a store goes on, with a line in the log for each miss."""
    server = RedisServer(tmp_path).start()
    store = CachedStore(MemoryStore(), kind("127.0.0.1", server.port, retry=None))
    try:
        store.save(RECORD, expected=0)
    finally:
        server.stop()
    assert store.get(RECORD.id) == RECORD
    assert f"the {kind.__name__} failed" in caplog.text
    assert "the store is asked" in caplog.text
    store.save(ENDED, expected=1)
    assert store.get(RECORD.id) == ENDED
    assert store.delete(RECORD.id) is True


def test_a_cache_that_does_not_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a timeout its readers and writers go on without it, and the log says what may be read when it is back."""
    server = RedisServer(tmp_path).start()
    cache = RedisCache("127.0.0.1", server.port, socket_timeout=0.2, socket_connect_timeout=0.2, retry=None)
    counting = CountingStore(MemoryStore())
    store = CachedStore(counting, cache)
    store.save(RECORD, expected=0)
    _drop_closings(store)
    store.get(RECORD.id)
    try:
        server.pause()
        assert store.get(RECORD.id) == RECORD
        assert "the store is asked" in caplog.text
        store.save(ENDED, expected=1)
        assert store.get(RECORD.id) == ENDED
    finally:
        server.resume()
        server.stop()
    assert "may be read for up to 1800 seconds" in caplog.text


class Failing(SimpleCache):
    """Fails to store while ``mode`` says how, and then also to remove if it is ``"locked"``."""

    mode = ""

    def delete(self, key: str) -> bool:
        return False if self.mode == "locked" else super().delete(key)

    def set(self, key: str, value: Any, timeout: Any = None) -> bool | None:
        if self.mode == "raises":
            raise ConnectionResetError("gone")
        return False if self.mode else super().set(key, value, timeout)


@pytest.mark.parametrize("mode", ["raises", "locked"])
def test_a_cache_that_was_not_told(clock: Clock, caplog: pytest.LogCaptureFixture, mode: str) -> None:
    """A write that cannot reach the cache is stored and logged; the old record is read for ttl seconds and no longer."""
    cache = Failing()
    store = CachedStore(MemoryStore(), cache, ttl=60)
    store.save(RECORD, expected=0)
    clock.advance(6)
    store.get(RECORD.id)
    cache.mode = mode
    store.save(ENDED, expected=1)
    assert "may be read for up to 60 seconds" in caplog.text
    cache.mode = ""
    assert store.get(RECORD.id) == RECORD
    clock.advance(61)
    assert store.get(RECORD.id) == ENDED


def test_a_cache_that_is_full(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A cache that refuses what is new, as on a full disk, has the old removed, and nothing is warned of."""
    cache = Failing()
    store = CachedStore(MemoryStore(), cache)
    store.save(RECORD, expected=0)
    clock.advance(6)
    store.get(RECORD.id)
    cache.mode = "refuses"
    store.save(ENDED, expected=1)
    assert store.get(RECORD.id) == ENDED
    assert "did not store" not in caplog.text


def test_a_cache_that_takes_no_copy(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """One that goes down after it was asked costs a line in the log, too."""
    cache = Failing()
    store = CachedStore(MemoryStore(), cache)
    store.save(RECORD, expected=0)
    clock.advance(6)
    cache.mode = "raises"
    assert store.get(RECORD.id) == RECORD
    assert "the Failing failed: gone; the store is asked" in caplog.text


@pytest.mark.parametrize("junk", [b"", b"junk", 7, "text", ["a"], b"x" * 16 + b"junk"], ids=repr)
@pytest.mark.parametrize("entry", ["mark", "copy"])
def test_an_unreadable_entry_is_a_miss(
    cached: CachedStore, cache: SimpleCache, counting: CountingStore, entry: str, junk: object
) -> None:
    """Whatever else is found in the cache costs a read of the store; afterwards there is a copy again."""
    cache.set(f"persist-cached:web:{entry}:{RECORD.id}", junk)
    assert [cached.get(RECORD.id) for _ in range(3)] == [RECORD] * 3
    counting.operations.clear()
    assert cached.get(RECORD.id) == RECORD
    assert counting.operations == {}


@pytest.mark.parametrize(
    "raw", [b"", b"cnosuchmodule\nThing\n.", b"cbuiltins\nnosuchname\n.", b"]."], ids=["cut", "module", "name", "list"]
)
@pytest.mark.parametrize("entry", ["mark", "copy"])
def test_a_pickle_that_cannot_be_loaded_is_a_miss(
    cached: CachedStore,
    cache: SimpleCache,
    counting: CountingStore,
    entry: str,
    raw: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Be it cut off or of a class that is gone; it is removed and logged, and then there is a copy again."""
    key = f"persist-cached:web:{entry}:{RECORD.id}"
    cache._cache[key] = cache._cache[key][0], raw
    assert [cached.get(RECORD.id) for _ in range(3)] == [RECORD] * 3
    assert f"session {RECORD.id} is removed, as it cannot be read" in caplog.text
    counting.operations.clear()
    assert cached.get(RECORD.id) == RECORD
    assert counting.operations == {}


def test_the_copy_of_another_session_is_a_miss(cached: CachedStore, cache: SimpleCache, clock: Clock) -> None:
    """A copy that says that it is another session's is none."""
    other = make_record(1)
    cached.save(other, expected=0)
    clock.advance(6)
    cached.get(other.id)
    mark, copy = (cache.get(f"persist-cached:web:{entry}:{other.id}") for entry in ("mark", "copy"))
    cache.set(f"persist-cached:web:mark:{RECORD.id}", mark)
    cache.set(f"persist-cached:web:copy:{RECORD.id}", copy)
    assert cached.get(RECORD.id) == RECORD


class Slow(MemoryStore):
    """Takes its time to save, and calls ``meanwhile`` before."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        self.meanwhile()
        super().save(record, expected=expected)


@pytest.mark.parametrize("ttl", [2, 1800])
def test_a_slow_store_whose_writer_cannot_tell_the_cache(clock: Clock, ttl: float) -> None:
    """Be it killed or cut off: a reader who came in the middle has put nothing there, as the session was closed before."""
    cache, below = Failing(), Slow()
    store = CachedStore(below, cache, ttl=ttl)
    store.save(RECORD, expected=0)
    clock.advance(6)
    store.get(RECORD.id)

    def meanwhile() -> None:
        clock.advance(min(ttl, 60))
        assert [store.get(RECORD.id), store.get(RECORD.id)] == [RECORD, RECORD]
        cache.mode = "raises"

    below.meanwhile = meanwhile  # type: ignore[method-assign]
    store.save(ENDED, expected=1)
    cache.mode = ""
    assert store.get(RECORD.id) == ENDED


class Doubtful(MemoryStore):
    """Says that it failed, and does what was asked for later."""

    later: Callable[[], object] = staticmethod(lambda: None)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        if record.ended_at is None:
            return super().save(record, expected=expected)
        self.later = partial(super().save, record, expected=expected)
        raise StoreUnavailable("timed out")


def test_a_write_in_doubt(cache: SimpleCache, clock: Clock) -> None:
    """After a save that failed nothing is cached: the database may be about to do it."""
    below = Doubtful()
    store = CachedStore(below, cache)
    store.save(RECORD, expected=0)
    with pytest.raises(StoreUnavailable):
        store.save(ENDED, expected=1)
    clock.advance(1000)
    assert store.get(RECORD.id) == RECORD
    below.later()
    assert store.get(RECORD.id) == ENDED


# Several processes ----------------------------------------------------------------------------------------------------


def _open_in(url: str, folder: Path) -> CachedStore:
    return CachedStore(open_store(url), FileSystemCache(str(folder), threshold=0))


def _drop_closings(store: CachedStore) -> None:
    """As if the time had passed for which a session that was written is not cached."""
    store._cache.delete(f"persist-cached:web:mark:{RECORD.id}")


@pytest.fixture(params=[FileSystemCache, RedisCache, ValkeyCache])
def shared_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], BaseCache]]:
    """Makes caches of one kind that all reach the same entries."""
    if request.param is FileSystemCache:
        yield lambda: FileSystemCache(str(tmp_path / "cache"), threshold=0)
        return
    server = RedisServer(tmp_path).start()
    try:
        yield lambda: request.param("127.0.0.1", server.port)
    finally:
        server.stop()


def test_ended_by_another_process(new_url: NewURL, shared_cache: Callable[[], BaseCache]) -> None:
    """What one process ends another one does not read from the cache."""
    url = new_url("sqlite")
    counting = CountingStore(open_store(url))
    store = CachedStore(counting, shared_cache())
    store.save(RECORD, expected=0)
    _drop_closings(store)
    assert [store.get(RECORD.id), store.get(RECORD.id)] == [RECORD, RECORD]
    assert counting.operations["get"] == 1
    in_a_fork(lambda: CachedStore(open_store(url), shared_cache()).save(ENDED, expected=1))
    assert store.get(RECORD.id) == ENDED


class _Held(CountingStore):
    """Has read a record, and comes back with it when it may."""

    def __init__(self, store: SessionStore) -> None:
        super().__init__(store)
        self.read, self.go = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def get(self, session_id: str) -> SessionRecord | None:
        record = self.store.get(session_id)
        self.read.set()
        assert self.go.wait(60)
        return record


@pytest.mark.parametrize("cached_again", [False, True])
def test_a_slow_reader_of_another_process(
    new_url: NewURL, shared_cache: Callable[[], BaseCache], cached_again: bool
) -> None:
    """What it read before a sign-out and brings to the cache long after that, nobody reads."""
    url = new_url("sqlite")
    store = CachedStore(open_store(url), shared_cache())
    store.save(RECORD, expected=0)
    _drop_closings(store)
    slow = _Held(open_store(url))
    behind = CachedStore(slow, shared_cache())
    reader = multiprocessing.get_context("fork").Process(target=behind.get, args=[RECORD.id])
    reader.start()
    assert slow.read.wait(60)
    store.save(ENDED, expected=1)
    _drop_closings(store)
    if cached_again:
        store.get(RECORD.id)
    slow.go.set()
    reader.join(60)
    assert reader.exitcode == 0
    assert [store.get(RECORD.id), store.get(RECORD.id)] == [ENDED, ENDED]


class _KilledAfterSaving(CountingStore):
    def save(self, record: SessionRecord, *, expected: int) -> None:
        self.store.save(record, expected=expected)
        os.kill(os.getpid(), signal.SIGKILL)


def _save_and_die(url: str, folder: Path) -> None:
    cache = FileSystemCache(str(folder), threshold=0)
    CachedStore(_KilledAfterSaving(open_store(url)), cache).save(ENDED, expected=1)


def test_a_writer_is_killed(new_url: NewURL, tmp_path: Path) -> None:
    """A process that is killed between the store and the cache leaves no old record to be read."""
    url = new_url("sqlite")
    store = _open_in(url, tmp_path / "cache")
    store.save(RECORD, expected=0)
    _drop_closings(store)
    store.get(RECORD.id)
    process = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(url, tmp_path / "cache"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert store.get(RECORD.id) == ENDED


def test_files_that_expired_are_cached_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FileSystemCache adds nothing over an expired file; the session is cached again nevertheless."""
    clock = Clock()
    monkeypatch.setattr("cachelib.file.time", clock)
    counting = CountingStore(MemoryStore())
    store = CachedStore(counting, FileSystemCache(str(tmp_path), threshold=0))
    store.save(RECORD, expected=0)
    clock.advance(7)
    assert [store.get(RECORD.id), store.get(RECORD.id)] == [RECORD, RECORD]
    assert counting.operations["get"] == 1


# Namespaces, settings -------------------------------------------------------------------------------------------------


def test_namespaces_have_their_own_copies(cached: CachedStore) -> None:
    """The copy of one namespace is not found in another; asked for again, a namespace shares its copies."""
    chat = cached.namespace("chat")
    assert chat.get(RECORD.id) is None
    cached.namespace("web").save(ENDED, expected=1)
    assert cached.get(RECORD.id) == ENDED


def test_what_concerns_the_store_alone() -> None:
    """Whether it is atomic, and how long it keeps what expired, is as the store has it; closing closes it."""
    below, closed = MemoryStore(), list[str]()
    below.atomic = False
    below.close = lambda: closed.append("once")  # type: ignore[method-assign]
    store = CachedStore(below, SimpleCache())
    store.margin = 99.0
    assert (store.atomic, below.margin, store.margin) == (False, 99.0, 99.0)
    store.close()
    assert closed == ["once"]


def test_two_stores_in_one_cache(cached: CachedStore, cache: SimpleCache) -> None:
    """With a prefix of its own another store finds nothing of this one."""
    assert CachedStore(MemoryStore(), cache, prefix="other").get(RECORD.id) is None


def test_a_cache_of_one_process_is_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """With a cache that other processes do not reach, the log says how late their sign-outs are seen, once."""
    CachedStore(MemoryStore(), FileSystemCache(str(tmp_path)))
    assert caplog.records == []
    CachedStore(MemoryStore(), SimpleCache(), ttl=20).namespace("chat")
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "up to 20 seconds late" in record.getMessage()


@pytest.mark.parametrize("ttl", [0, 0.5, -1, 30 * 86400 + 1, float("nan"), float("inf"), "30m", "60", None, True, [60]])
def test_a_ttl_that_is_none(ttl: Any) -> None:
    """A ttl is refused that a cache takes for no time, or for a moment, and what is no number."""
    with pytest.raises(ConfigError, match=r"ttl of CachedStore is .*allowed"):
        CachedStore(MemoryStore(), SimpleCache(), ttl=ttl)


@pytest.mark.parametrize("ttl", [1, 1.9, 30 * 86400])
def test_a_ttl_of_a_second_to_thirty_days(ttl: float) -> None:
    """The shortest and the longest time are allowed."""
    CachedStore(MemoryStore(), SimpleCache(), ttl=ttl)


@pytest.mark.parametrize("prefix", ["", "two words", "line\n", "é", "x" * 101, None, 7])
def test_a_prefix_that_is_none(prefix: Any) -> None:
    """A prefix is refused of which not every cache makes keys, memcached for one."""
    with pytest.raises(ConfigError, match=r"prefix of CachedStore is .*allowed is text of 1 to 100"):
        CachedStore(MemoryStore(), SimpleCache(), prefix=prefix)


def test_a_namespace_that_is_none() -> None:
    """It is refused as by ``open_store``."""
    with pytest.raises(ConfigError, match="the namespace 'Chat' is not made of"):
        CachedStore(MemoryStore(), SimpleCache(), namespace="Chat")


def test_the_longest_key_fits_into_memcached() -> None:
    """It takes keys of up to 250 characters."""
    keys: list[str] = []
    cache = SimpleCache()
    cache.get_many = lambda *given: keys.extend(given) or [None, None]  # type: ignore[method-assign,func-returns-value]
    CachedStore(MemoryStore(), cache, prefix="x" * 100, namespace="n" * 40).get(RECORD.id)
    assert [len(key) <= 250 for key in keys] == [True, True]


@pytest.mark.parametrize(
    "given",
    [(MemoryStore(), NullCache()), (MemoryStore(), {}), ("memory://", SimpleCache())],
    ids=["no cache", "a dict", "no store"],
)
def test_what_is_no_store_and_no_cache(given: Any) -> None:
    """What is no store or no cache is refused by its kind."""
    with pytest.raises(ConfigError, match=r"CachedStore was given (NullCache|dict|str)"):
        CachedStore(*given)


def test_a_repair_makes_the_copy_void(new_url: NewURL, cache: SimpleCache, clock: Clock) -> None:
    """What a check has mended is read from the store; what it only tells of is not."""
    url = new_url("file")
    counting = CountingStore(open_store(url))
    store = CachedStore(counting, cache)
    store.save(RECORD, expected=0)
    clock.advance(6)
    store.get(RECORD.id)
    [file] = Path(url.removeprefix("file://")).rglob("*.session")
    file.write_bytes(b"junk" * 100)
    counting.operations.clear()
    assert [finding.repaired for finding in store.check(repair=False)] == [False]
    assert store.get(RECORD.id) == RECORD
    assert "get" not in counting.operations
    assert all(finding.repaired for finding in store.check(repair=True))
    assert store.get(RECORD.id) is None


def test_backup_and_check_see_the_store(make_app: MakeApp, new_url: NewURL, tmp_path: Path) -> None:
    """Backup, restore, check and migration of an application work on the store behind the cache."""
    app = make_app(CachedStore(open_store(new_url("sqlite")), SimpleCache()))
    manager, sessions = _manager(app), PersistSession()
    with app.app_context():
        made = manager.create({"cart": ["apple"]}, user_id="7")
        report = sessions.backup(tmp_path / "backups")
        app.extensions["persist_session"].store.delete(made.id)
        assert manager.get(made.id) is None
        sessions.restore(report.path)
        assert manager.get(made.id) is not None
        assert [sessions.check().checked, sessions.check(repair=True).found] == [1, 0]
        assert sessions.migrate(new_url("file")).copied == 1
