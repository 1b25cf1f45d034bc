"""What a sweep costs, counted, and that requests get their turn while it goes on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_persist_session import Change, Deletion, SessionManager, SessionQuery, SessionRecord, SessionStore, open_store
from flask_persist_session.stores import databases, redis
from flask_persist_session.stores.sql import SQLStore
from flask_persist_session.testing import following, make_record
from tests.conftest import Clock
from tests.counting import CountingStore

_EXPIRED = 1200
_NOW = 1e6


def visitor(number: int) -> SessionRecord:
    return make_record(number, user_id=None, expires_at=1000.0 + number)


def fill(store: SessionStore, count: int = _EXPIRED) -> None:
    store.save_many([Change(record=visitor(number), expected=0) for number in range(count)])


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SQLStore]:
    store = open_store(f"sqlite:///{tmp_path}/s.db")
    assert isinstance(store, SQLStore)
    fill(store)
    yield store
    store.close()


@pytest.fixture
def statements(sqlite: SQLStore) -> list[str]:
    """What SQLite is told from now on, with the values filled in."""
    heard: list[str] = []
    sqlite._database.connection().set_trace_callback(heard.append)
    return heard


def test_a_sweep_asks_once_and_removes_in_batches(store: SessionStore) -> None:
    """A sweep of 1,200 sessions costs one listing and three removals of up to 500; none looks at a session by itself."""
    fill(store)
    counting = CountingStore(store)
    assert SessionManager(counting, clock=Clock(_NOW)).cleanup().expired == _EXPIRED
    assert counting.operations == {"find": 1, "delete_many": 3, "note": 1}
    assert store.count(SessionQuery()) == 0


def test_a_sweep_of_nothing_removes_nothing(store: SessionStore) -> None:
    """Where nothing has expired a sweep only notes when it was."""
    fill(store, 3)
    counting = CountingStore(store)
    assert SessionManager(counting, clock=Clock(0.0)).cleanup().removed == 0
    assert counting.operations == {"find": 1, "note": 1}


def test_outcomes_keep_their_places(store: SessionStore) -> None:
    """Of many deletions each has its outcome in its place, and only the versions that were seen are removed."""
    fill(store, 600)
    changed = [following(visitor(number)) for number in range(0, 600, 7)]
    store.save_many([Change(record=record, expected=1) for record in changed])
    stay = {record.id for record in changed}
    ids = [visitor(number).id for number in range(600)]
    outcomes = store.delete_many([Deletion(id=session_id, expected=1) for session_id in ids])
    assert outcomes == [session_id not in stay for session_id in ids]
    assert {record.id for record in store.scan()} == stay


# SQLite ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_reads_page_by_page(sqlite: SQLStore, statements: list[str]) -> None:
    """1,200 sessions are found in 3 pages and removed in 5 transactions."""
    SessionManager(sqlite, clock=Clock(_NOW)).cleanup()
    assert sum(statement.startswith("SELECT") for statement in statements) == 3
    assert sum(statement.startswith("BEGIN IMMEDIATE") for statement in statements) == 5
    assert sum(statement.startswith("DELETE") for statement in statements) == _EXPIRED


def test_each_page_is_a_range_of_the_index(sqlite: SQLStore, statements: list[str]) -> None:
    """No page looks at hours in which nothing has expired, nor again at those of the pages before it; nothing is sorted."""
    SessionManager(sqlite, clock=Clock(_NOW)).cleanup(dry_run=True)
    index = "SEARCH t1 USING INDEX persist_session_web_expiry"
    first, *following = _plans(sqlite, statements)
    assert first == [f"{index} (<expr><?)"]
    assert following == [[f"{index} (<expr>>? AND <expr><?)"]] * 2


@pytest.mark.parametrize(("order_by", "sign"), [("expires_at", ">"), ("-expires_at", "<")])
def test_pages_in_the_order_of_expiry(sqlite: SQLStore, statements: list[str], order_by: str, sign: str) -> None:
    """They begin in the hour where the last one ended, and only what is within an hour is sorted."""
    found = list(sqlite.find(SessionQuery(order_by=order_by)))
    assert found == sorted(map(visitor, range(_EXPIRED)), key=lambda one: one.expires_at, reverse=order_by[0] == "-")
    list(sqlite.find(SessionQuery(order_by=order_by, after=(found[-1].expires_at, found[-1].id))))
    for search, sort in _plans(sqlite, statements)[1:]:
        assert search == f"SEARCH t1 USING INDEX persist_session_web_expiry (<expr>{sign}?)"
        assert "RIGHT PART" in sort


@pytest.mark.parametrize("bound", [2**70, -(2**70), float("inf")], ids=str)
def test_bounds_beyond_all_expiries(sqlite: SQLStore, bound: float) -> None:
    """A bound that is no moment, nor a number that SQLite has, finds what comes before and after it."""
    assert sqlite.count(SessionQuery(expires_before=bound)) == (_EXPIRED if bound > 0 else 0)
    assert sqlite.count(SessionQuery(expires_after=bound)) == (0 if bound > 0 else _EXPIRED)


def test_a_sweep_while_the_database_is_rewritten(sqlite: SQLStore) -> None:
    """Every session that expired is found, though the rows before it are gone when VACUUM comes between two pages."""
    sqlite.delete_many([Deletion(id=visitor(number).id) for number in range(100)])
    expired = sqlite.find(SessionQuery(expires_before=_NOW))
    found = [next(expired)]
    assert any("rewrote" in done.text for done in sqlite.optimize(full=True))
    assert len({record.id for record in [*found, *expired]}) == _EXPIRED - 100


def test_sessions_that_are_stored_together_share_pages(tmp_path: Path) -> None:
    """Sessions that expire within a day, in any order, change as many pages of the index as a day has hours."""
    store = open_store(f"sqlite:///{tmp_path}/s.db?synchronous=off")
    assert isinstance(store, SQLStore)
    chance = random.Random(7)
    records = [make_record(number, user_id=None, expires_at=chance.uniform(0, 86400)) for number in range(24_000)]
    records.sort(key=lambda record: record.id)  # as archives have them
    connection = store._database.connection
    for start in range(0, len(records), 600):
        store.save_many([Change(record=record, expected=0) for record in records[start : start + 600]])
        store._database.settle()
        _, written, copied = connection().execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
    assert 0 < written == copied < 120


def _plans(store: SQLStore, statements: list[str]) -> list[list[str]]:
    """How SQLite looks for the rows of those that ask for some."""
    run = store._database.connection().execute
    queries = [statement for statement in statements if statement.startswith("SELECT")]
    return [[step[3] for step in run(f"EXPLAIN QUERY PLAN {query}")] for query in queries]


class FakeTime:
    """A clock that moves by *step* whenever it is read, and by what is slept."""

    def __init__(self, step: float, sleeping: Callable[[], object]) -> None:
        self.now = time.monotonic() + 1000  # long after what was before
        self.step, self.sleeping = step, sleeping
        self.slept: list[float] = []

    def monotonic(self) -> float:
        self.now += self.step
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.sleeping()


@pytest.mark.parametrize(("held", "pause"), [(0.0, 0.008), (0.03, 0.0)])
def test_a_writer_gets_its_turn(
    sqlite: SQLStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: float, pause: float
) -> None:
    """Between two transactions of a sweep the lock is free for 8 ms."""
    writer = open_store(f"sqlite:///{tmp_path}/s.db?timeout=0.001")  # one that does not wait: it raises if it is locked
    live = [make_record(_EXPIRED, user_id=None, expires_at=_NOW * 2)]
    writer.save(live[0], expected=0)

    def write() -> None:
        live.append(following(live[-1]))
        writer.save(live[-1], expected=live[-1].version - 1)

    clock = FakeTime(held, write)
    monkeypatch.setattr(databases, "time", clock)
    SessionManager(sqlite, clock=Clock(_NOW)).cleanup()
    monkeypatch.undo()
    assert writer.get(live[0].id) == live[-1]
    assert live[-1].version == 1 + 5
    assert clock.slept == pytest.approx([0, *[pause] * 4])
    writer.close()


# Redis and files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_a_listing_of_redis_in_parts_of_any_size(
    new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """However many ids are fetched at once, each session is found once."""
    monkeypatch.setattr(redis, "_IDS_AT_ONCE", at_once)
    store = open_store(new_url("redis"))
    fill(store, 300)
    assert sorted(record.id for record in store.scan()) == sorted(visitor(number).id for number in range(300))
    store.close()


def test_a_listing_of_redis_holds_few_ids(new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The more sessions there are in a shard, the fewer shards are asked at once, so memory stays the same."""
    monkeypatch.setattr(redis, "_IDS_AT_ONCE", 8)
    store: Any = open_store(new_url("redis"))
    first_of_shards = [make_record(id=f"{shard:03x}" + "0" * 64, user_id=None) for shard in range(1024)]
    store.save_many([Change(record=record, expected=0) for record in first_of_shards])
    held: list[int] = []
    pipeline = store._client.pipeline

    def counted(**options: Any) -> Any:
        made = pipeline(**options)
        execute = made.execute
        made.execute = lambda: held.append(len(made)) or execute()
        return made

    monkeypatch.setattr(store._client, "pipeline", counted)
    assert len(list(store._ids(SessionQuery()))) == 1024
    assert max(held) == 8
    store.close()


def test_a_damaged_end_of_a_file_is_of_no_version(tmp_path: Path) -> None:
    """Where the last save is damaged, the version that is removed is the one that is read."""
    store = open_store(f"file://{tmp_path}/s")
    record = make_record(user_id=None)
    store.save(record, expected=0)
    store.save(following(record), expected=1)
    [path] = tmp_path.rglob("*.session")
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert store.get(record.id) == record
    assert store.delete(record.id, expected=2) is False
    assert store.delete(record.id, expected=1) is True
