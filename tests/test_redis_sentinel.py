"""A primary and its replica, watched by a Sentinel: which of the two it is does not matter to the sessions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from flask_persist_session import (
    Change,
    SessionConflict,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoreUnavailable,
    open_store,
)
from flask_persist_session.testing import following, make_record
from tests.servers import RedisServer, SentinelServer, free_port, wait_until

RECORDS = [make_record(number, user_id=None) for number in range(30)]
PASSWORD, OTHER_PASSWORD = "gehe:im/1@", "gehe/im?2"
QUOTED, OTHER_QUOTED = "gehe%3Aim%2F1%40", "gehe%2Fim%3F2"


@dataclass
class Watched:
    """A primary, its replica and the Sentinel."""

    primary: RedisServer
    replica: RedisServer
    sentinel: SentinelServer

    @property
    def url(self) -> str:
        """The store URL; the first of its Sentinels has never been there."""
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{self.sentinel.port}"
        return f"redis+sentinel://:{QUOTED}@{hosts}/sessions/1?timeout=0.5&sentinel_password={OTHER_QUOTED}"

    def notice_after(self, milliseconds: int) -> None:
        """Have the Sentinel take the primary for down if it does not answer for so long."""
        with self.sentinel.client() as client:
            client.execute_command("SENTINEL", "SET", "sessions", "down-after-milliseconds", milliseconds)

    def is_primary(self, server: RedisServer) -> bool:
        with self.sentinel.client() as client:
            _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "sessions")
        return int(port) == server.port

    def has_a_replica(self) -> bool:
        with self.sentinel.client() as client:
            found = client.sentinel_slaves("sessions")
        return [replica["master-link-status"] for replica in found] == ["ok"]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    folders = [tmp_path / name for name in ("primary", "replica", "sentinel")]
    for folder in folders:
        folder.mkdir()
    primary = RedisServer(folders[0], "--requirepass", PASSWORD, "--masterauth", PASSWORD)
    replica = RedisServer(folders[1], *primary.options, "--replicaof", "127.0.0.1", str(primary.port))
    sentinel = SentinelServer(folders[2], primary, f'sentinel auth-pass sessions "{PASSWORD}"', password=OTHER_PASSWORD)
    made = Watched(primary, replica, sentinel)
    try:
        for server in (primary, replica):
            server.password = PASSWORD
            server.start()
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", "the replica")
        sentinel.start()
        wait_until(made.has_a_replica, "the Sentinel to see the replica")
        yield made
    finally:
        for each in (sentinel, replica, primary):
            each.stop()


@pytest.fixture
def store(watched: Watched) -> Iterator[SessionStore]:
    opened = open_store(watched.url)
    opened.save_many([Change(record=record, expected=0) for record in RECORDS])
    with watched.primary.client() as client:
        assert client.wait(1, 5000) == 1
    yield opened
    opened.close()


def _is_served(store: SessionStore, record: SessionRecord) -> bool:
    """Whether a session is found; any error but that the store is unavailable is one."""
    try:
        return store.get(record.id) == record
    except StoreUnavailable:
        return False


def test_a_primary_that_is_killed(watched: Watched, store: SessionStore) -> None:
    """The replica takes over with all that it has got, and remains the primary when the old one is back."""
    watched.notice_after(500)
    watched.primary.stop()
    assert not _is_served(store, RECORDS[0])
    wait_until(lambda: _is_served(store, RECORDS[0]), "the replica to take over")
    assert sorted(record.id for record in store.scan()) == [record.id for record in RECORDS]
    store.save(following(RECORDS[0]), expected=1)
    store.history.append(RECORDS[0].id, [b"an entry"], created_at=1.0)
    assert list(store.check(repair=False)) == []
    watched.notice_after(60_000)
    watched.primary.start()
    for opened in (store, open_store(watched.url)):
        assert opened.get(RECORDS[0].id) == following(RECORDS[0])
        opened.close()


def test_a_failover_that_is_ordered(watched: Watched, store: SessionStore) -> None:
    """While servers change places on purpose, a save is done, or unavailable, or in conflict since others were lost."""
    saved = RECORDS[0]

    def save_another() -> bool:
        nonlocal saved
        try:
            store.save(following(saved), expected=saved.version)
        except (StoreUnavailable, SessionConflict):
            wait_until(lambda: _can_be_read(store, saved.id), "the new primary")
            saved = store.get(saved.id) or saved
        else:
            saved = following(saved)
        return watched.is_primary(watched.replica)

    with watched.sentinel.client() as client:
        client.execute_command("SENTINEL", "FAILOVER", "sessions")
    wait_until(save_another, "the servers to change places")
    wait_until(lambda: _is_served(store, saved), "the new primary")
    store.save(following(saved), expected=saved.version)
    with watched.replica.client() as client:
        assert client.info("replication")["role"] == "master"
        assert client.info("keyspace")["db1"]["keys"] > len(RECORDS)


def _can_be_read(store: SessionStore, session_id: str) -> bool:
    try:
        return store.get(session_id) is not None
    except StoreUnavailable:
        return False


def test_connections_outlive_the_sentinel(watched: Watched, store: SessionStore) -> None:
    """Where no Sentinel is left, whoever is connected goes on; a new one is told so, in time and without passwords."""
    watched.sentinel.stop()
    assert store.get(RECORDS[0].id) == RECORDS[0]
    with pytest.raises(StoreUnavailable, match=f"no Sentinel knows.*{watched.sentinel.port}") as caught:
        open_store(watched.url).get(RECORDS[0].id)
    assert "gehe" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("/sessions/", "/elsewhere/", "there is no service 'elsewhere'"),
        (f":{QUOTED}@", ":geheim@", "password"),
        (OTHER_QUOTED, "geheim", "password"),
        (f":{QUOTED}@", "", "uthenticat"),
        (f"&sentinel_password={OTHER_QUOTED}", "", "uthenticat"),
    ],
    ids=["service", "password", "password of the Sentinel", "none", "none of the Sentinel"],
)
def test_a_wrong_name_or_password(watched: Watched, old: str, new: str, message: str) -> None:
    """An unknown service and a wrong password are told, the password itself is not."""
    store = open_store(watched.url.replace(old, new))
    with pytest.raises(StoreUnavailable, match=message) as caught:
        store.get(RECORDS[0].id)
    assert "gehe" not in str(caught.value)


def test_a_primary_that_hangs(watched: Watched, store: SessionStore) -> None:
    """Eight threads wait as long as one for a primary that hangs, until the replica takes over; then all are served."""
    watched.notice_after(500)
    watched.primary.pause()
    with ThreadPoolExecutor(8) as pool:
        start = time.monotonic()
        served = list(pool.map(partial(_is_served, store), RECORDS[:8]))
        assert time.monotonic() - start < 5
        assert not all(served)
        wait_until(lambda: all(pool.map(partial(_is_served, store), RECORDS[:8])), "the replica to take over")
    watched.primary.resume()
    assert [store.get(record.id) for record in RECORDS] == RECORDS


def test_a_server_that_takes_no_writes_is_left(redis_server: RedisServer, new_url: Callable[[str], str]) -> None:
    """A name may lead to another server after a failover: who meets a replica connects anew for the next attempt."""
    store = open_store(new_url("redis"))
    store.save(RECORDS[0], expected=0)
    with redis_server.client() as client:
        before = {found["id"] for found in client.client_list()}
        client.replicaof("127.0.0.1", str(free_port()))
        with pytest.raises(StoreUnavailable):
            store.save(following(RECORDS[0]), expected=1)
        client.replicaof("NO", "ONE")
        store.save(following(RECORDS[0]), expected=1)
        assert {found["id"] for found in client.client_list()} - before
    store.close()


def test_a_server_says_without_a_script_that_it_takes_no_writes(
    redis_server: RedisServer, new_url: Callable[[str], str]
) -> None:
    """That a server is a replica or out of memory is told as unavailable, in whichever way the driver words it."""
    store = open_store(new_url("redis"))
    with redis_server.client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
        with pytest.raises(StoreUnavailable):
            store.note("cleanup", 1.0)
        client.replicaof("NO", "ONE")
        client.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable):
            store.note("cleanup", 1.0)
        client.config_set("maxmemory", 0)
    store.note("cleanup", 1.0)
    store.close()


def test_a_primary_that_lacks_replicas(redis_server: RedisServer, new_url: Callable[[str], str]) -> None:
    """A primary that takes no writes since its replicas are gone counts as unavailable, with a script and without."""
    store = open_store(new_url("redis"))
    with redis_server.client() as client:
        client.config_set("min-replicas-to-write", 1)
        for change in (partial(store.save, RECORDS[0], expected=0), partial(store.note, "cleanup", 1.0)):
            with pytest.raises(StoreUnavailable):
                change()
        client.config_set("min-replicas-to-write", 0)
    store.save(RECORDS[0], expected=0)
    store.close()


def test_a_server_that_gives_nothing_at_the_moment(redis_server: RedisServer, new_url: Callable[[str], str]) -> None:
    """Sessions that a replica without its primary keeps to itself are not taken for damaged ones, which lists leave out."""
    store = open_store(new_url("redis"))
    store.save(RECORDS[0], expected=0)
    with redis_server.client() as client:
        client.config_set("replica-serve-stale-data", "no")
        client.replicaof("127.0.0.1", str(free_port()))
        with pytest.raises(StoreUnavailable):
            list(store.find(SessionQuery(ids=frozenset({RECORDS[0].id}))))
        client.replicaof("NO", "ONE")
        client.config_set("replica-serve-stale-data", "yes")
    assert list(store.find(SessionQuery(ids=frozenset({RECORDS[0].id})))) == [RECORDS[0]]
    store.close()
