"""Promises of the stores' listings, counts and moves that the other tests take for granted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from flask_persist_session import (
    Deletion,
    SerializationError,
    SessionConflict,
    SessionQuery,
    SessionRecord,
    SessionStore,
    UnsupportedByStore,
    open_store,
)
from flask_persist_session.stores.base import add_up
from flask_persist_session.stores.migrating import MigratingStore
from flask_persist_session.stores.redis import RedisStore
from flask_persist_session.testing import following, make_record
from tests.counting import CountingStore
from tests.servers import RedisServer

NewURL = Callable[[str], str]


# Moving between stores ------------------------------------------------------------------------------------------------


class _Busy(CountingStore):
    """A store that does something just after each save."""

    def __init__(self, after_save: Callable[[], object]) -> None:
        super().__init__(open_store("memory://"))
        self.after_save = after_save

    def save(self, record: SessionRecord, *, expected: int) -> None:
        super().save(record, expected=expected)
        self.after_save()


@pytest.mark.parametrize("changes", [1, 2, 5])
def test_a_change_during_a_move_moves_along(changes: int) -> None:
    """What a process that knows only the old store saves while a session moves is there afterwards, however often."""
    old, versions = open_store("memory://"), [make_record()]
    old.save(versions[0], expected=0)

    def change() -> None:
        store.after_save = lambda: None
        for number in range(changes):
            versions.append(following(versions[-1], data=b"change %d" % number))
            old.save(versions[-1], expected=versions[-2].version)

    store = _Busy(change)
    moved = MigratingStore(store, old).get(versions[0].id)
    assert moved is not None
    assert moved.data == versions[-1].data
    assert (store.get(moved.id), old.get(moved.id)) == (moved, None)


@pytest.fixture
def left_over() -> tuple[MigratingStore, SessionRecord]:
    """A session that has moved and was changed since, of which a crash left the copy in the old store."""
    migrating = MigratingStore(open_store("memory://"), open_store("memory://"))
    first = make_record()
    second = following(first, data=b"second")
    migrating.old.save(first, expected=0)
    migrating.store.save(first, expected=0)
    migrating.store.save(second, expected=1)
    return migrating, second


def test_a_copy_that_was_left_behind_is_not_listed(left_over: tuple[MigratingStore, SessionRecord]) -> None:
    """The new store counts, and the session is listed and counted once."""
    migrating, record = left_over
    assert list(migrating.scan()) == [record]
    assert list(migrating.find(SessionQuery(order_by="id"))) == [record]
    assert migrating.count(SessionQuery()) == 1


def test_a_copy_that_was_left_behind_does_not_come_back(left_over: tuple[MigratingStore, SessionRecord]) -> None:
    """A session that ended stays so when a process that has left the old store behind cleans it up."""
    migrating, record = left_over
    ended = following(record, data=b"", ended_at=100.0, end_reason="revoked")
    migrating.save(ended, expected=record.version)
    assert migrating.store.delete_many([Deletion(id=ended.id, expected=ended.version)]) == [True]
    assert migrating.get(record.id) is None


def test_a_session_that_moves_is_listed_once() -> None:
    """One that was met in the old store and moves before the new one is listed is not met again."""
    migrating, record = MigratingStore(open_store("memory://"), open_store("memory://")), make_record()
    migrating.old.save(record, expected=0)
    listing = migrating.scan()
    assert next(listing) == record
    assert migrating.get(record.id) == record
    assert list(listing) == []


def test_a_page_of_both_stores_is_cut_once() -> None:
    """Order, offset and limit are those of all sessions together."""
    migrating = MigratingStore(open_store("memory://"), open_store("memory://"))
    records = [make_record(number, created_at=float(number)) for number in range(8)]
    for number, record in enumerate(records):
        (migrating.old if number % 2 else migrating.store).save(record, expected=0)
    assert list(migrating.find(SessionQuery(order_by="-created_at", offset=2, limit=3))) == records[5:2:-1]


def test_two_stores_are_as_atomic_as_the_lesser() -> None:
    """Moving is safe only where both stores are."""
    for ours, theirs in ((True, False), (False, True), (True, True)):
        store, old = open_store("memory://"), open_store("memory://")
        store.atomic, old.atomic = ours, theirs
        assert MigratingStore(store, old).atomic is (ours and theirs)


def test_closing_closes_both_stores() -> None:
    """Nothing of the old store stays open either."""
    closed: list[str] = []
    store, old = open_store("memory://"), open_store("memory://")
    store.close = lambda: closed.append("new")  # type: ignore[method-assign]
    old.close = lambda: closed.append("old")  # type: ignore[method-assign]
    MigratingStore(store, old).close()
    assert sorted(closed) == ["new", "old"]


def test_a_store_that_cannot_list_says_so_before_anything_is_listed() -> None:
    """A new store that cannot list is told at once, not when the old one has been gone through."""
    store = open_store("memory://")

    def refuse() -> Iterator[SessionRecord]:
        raise UnsupportedByStore("cannot list")

    store.scan = refuse  # type: ignore[method-assign]
    with pytest.raises(UnsupportedByStore):
        MigratingStore(store, open_store("memory://")).scan()


# Redis ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_store(new_url: NewURL) -> Iterator[SessionStore]:
    store = open_store(new_url("redis"))
    yield store
    store.close()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client of a server on which nothing is stored."""
    with redis_server.client() as connected:
        connected.flushall()
        yield connected


def _key_of(client: redis.Redis, record: SessionRecord) -> Any:
    [key] = client.scan_iter(f"*:s:{record.id}", count=1000)
    return key


def _shard_key(client: redis.Redis, record: SessionRecord, name: str) -> Any:
    [key] = client.scan_iter(f"*{{{record.id[:3]}}}:{name}", count=1000)
    return key


@pytest.mark.parametrize("days", [6, 8, 20, 400])
def test_redis_statistics_know_when_a_key_may_be_gone(client: redis.Redis, redis_store: SessionStore, days: float) -> None:
    """A session that expired some days ago is counted if its key is there, and not if its time to live took it."""
    now = time.time()
    kept, gone = (make_record(number, expires_at=now - days * 86400) for number in (1, 2))
    redis_store.save(kept, expected=0)
    redis_store.save(gone, expected=0)
    assert redis_store.stats(now=now) == add_up(iter([kept, gone]), now)
    if days > 7:
        client.delete(_key_of(client, gone))
        assert redis_store.stats(now=now) == add_up(iter([kept]), now)


def test_redis_prunes_the_index_of_a_user_without_facts(client: redis.Redis, redis_store: SessionStore) -> None:
    """A listing of a user forgets a session whose key is gone, also where nothing else tells whose it was."""
    record = make_record(user_id="alice")
    redis_store.save(record, expected=0)
    client.delete(_key_of(client, record), _shard_key(client, record, "facts"))
    assert list(redis_store.find(SessionQuery(user_id="alice"))) == []
    assert list(client.scan_iter("*:u:*", count=1000)) == []


def test_redis_does_not_prune_what_came_back(client: redis.Redis, redis_store: SessionStore) -> None:
    """A session that was found missing and is there again, as it may be between stores, stays in its indexes."""
    assert isinstance(redis_store, RedisStore)
    record, run = make_record(), redis_store._run
    redis_store.save(record, expected=0)
    key = _key_of(client, record)
    kept = client.dump(key)
    assert kept is not None
    client.delete(key)

    def bring_back(script: Any, arguments: Any) -> Any:
        client.restore(key, 0, kept, replace=True)
        return run(script, arguments)

    redis_store._run = bring_back  # type: ignore[method-assign]
    assert list(redis_store.scan()) == []
    assert list(redis_store.scan()) == [record]


def test_redis_creates_nothing_over_a_session_without_facts(client: redis.Redis, redis_store: SessionStore) -> None:
    """Whatever has a version under the key of a session is there, and no id to create."""
    record = make_record()
    redis_store.save(record, expected=0)
    client.hdel(_key_of(client, record), "facts")
    with pytest.raises(SessionConflict):
        redis_store.save(record, expected=0)


def test_redis_deletes_no_version_of_something_else(client: redis.Redis, redis_store: SessionStore) -> None:
    """Something else under a session's key has no version: asked for one, nothing is deleted, and it is no error."""
    record = make_record()
    redis_store.save(record, expected=0)
    key = _key_of(client, record)
    client.set(key, b"foreign")
    assert redis_store.delete(record.id, expected=1) is False
    assert client.get(key) == b"foreign"


def test_redis_statistics_tell_no_tenant_from_an_empty_one(redis_store: SessionStore) -> None:
    """Nobody is no user and no tenant, not the ones whose names are empty."""
    owners = [(None, None), ("", None), ("", ""), (None, ""), (":", ":")]
    records = [make_record(number, user_id=user, tenant_id=tenant) for number, (user, tenant) in enumerate(owners)]
    for record in records:
        redis_store.save(record, expected=0)
    assert redis_store.stats(now=0.0) == add_up(iter(records), 0.0)


# Files ----------------------------------------------------------------------------------------------------------------


def test_file_of_an_ended_session_has_no_data(tmp_path: Path) -> None:
    """What a session held is nowhere on the disk once it has ended, nor does a torn tail bring it back."""
    store = open_store(f"file://{tmp_path}/sessions")
    record = make_record(data=b"my secret")
    store.save(record, expected=0)
    ended = following(record, data=b"", ended_at=100.0, end_reason="revoked")
    store.save(ended, expected=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if b"my secret" in path.read_bytes()] == []
    [path] = tmp_path.rglob(f"{record.id}.session")
    path.write_bytes(path.read_bytes()[:-1])
    with suppress(SerializationError):
        assert store.get(record.id) is None


# Every store ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 8, 66, 67])
def test_only_ids_that_begin_so_are_found(store: SessionStore, length: int) -> None:
    """Neither those before nor those after, within the shard or outside of it."""
    ids = [f"{shard}{middle}{last}" for shard in ("000", "1ab", "3ff") for middle in ("0" * 63, "8" * 63) for last in "0f"]
    for session_id in ids:
        store.save(make_record(id=session_id, user_id=None), expected=0)
    for session_id in ids:
        prefix = session_id[:length]
        found = store.find(SessionQuery(id_prefix=prefix, order_by="id"))
        assert [record.id for record in found] == [other for other in ids if other.startswith(prefix)]
        assert store.count(SessionQuery(id_prefix=prefix)) == len([other for other in ids if other.startswith(prefix)])


@pytest.mark.parametrize("query", [SessionQuery(user_id="a\0"), SessionQuery(tenant_id="a" * 600)])
def test_nobody_has_a_name_that_no_store_keeps(store: SessionStore, query: SessionQuery) -> None:
    """To look for one finds and counts nothing, and is no error of the driver."""
    store.save(make_record(), expected=0)
    assert (list(store.find(query)), store.count(query)) == ([], 0)


@pytest.mark.parametrize(
    ("offset", "limit", "count"), [(0, None, 5), (0, 2, 2), (4, 2, 1), (5, 2, 0), (9, None, 0), (0, 0, 0)]
)
def test_a_count_heeds_offset_and_limit(store: SessionStore, offset: int, limit: int | None, count: int) -> None:
    """What is counted is what would be found."""
    for number in range(5):
        store.save(make_record(number), expected=0)
    query = SessionQuery(user_id="alice", offset=offset, limit=limit)
    assert (store.count(query), len(list(store.find(query)))) == (count, count)


@pytest.mark.parametrize("name", ["created", "accessed", "expires"])
def test_a_moment_is_after_itself_and_not_before(store: SessionStore, name: str) -> None:
    """Of the bounds of a query the earlier is within and the later is not, so two queries that meet share nothing."""
    records = [make_record(number, **{f"{name}_at": float(number)}) for number in range(1, 4)]
    for record in records:
        store.save(record, expected=0)
    ordered = SessionQuery(order_by=f"{name}_at")
    bounds: list[dict[str, Any]] = [{f"{name}_before": 2.0}, {f"{name}_after": 2.0}]
    queries = [replace(ordered, **bound) for bound in bounds]
    assert [list(store.find(query)) for query in queries] == [records[:1], records[1:]]
    assert [store.count(query) for query in queries] == [1, 2]
