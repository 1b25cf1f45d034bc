"""A Redis Cluster as a store: what its nodes do to each other must not be told wrongly, nor take for ever."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import redis
from flask import Flask, session
from redis.crc import key_slot

from flask_persist_session import (
    Change,
    ConfigError,
    Deletion,
    PersistSession,
    SessionConflict,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoreUnavailable,
    open_store,
)
from flask_persist_session.stores.redis import RedisStore
from flask_persist_session.testing import following, make_record
from tests.servers import RedisCluster, RedisServer, free_port, wait_until

NewURL = Callable[[str], str]
#: Of many shards, so that each node has some.
RECORDS = [make_record(number, user_id=None) for number in range(0, 1024, 32)]
#: Far more than a few timeouts of those below, far less than one for each of the records.
PATIENCE = 5.0


@pytest.fixture
def url(new_url: NewURL) -> str:
    """A new, empty store on a cluster, with a short timeout."""
    return f"{new_url('redis-cluster')}&timeout=0.3"


@pytest.fixture
def store(url: str) -> Iterator[SessionStore]:
    opened = open_store(url)
    opened.save_many([Change(record=record, expected=0) for record in RECORDS])
    yield opened
    opened.close()


@pytest.fixture
def handed(redis_cluster: RedisCluster) -> Iterator[SessionStore]:
    """A store with a client that an application has made, which sends again what was lost."""
    client = redis.RedisCluster(host="127.0.0.1", port=redis_cluster.nodes[0].port, socket_timeout=0.3)
    opened = RedisStore(client, prefix="handed")
    yield opened
    opened.close()


def node_of(cluster: RedisCluster, record: SessionRecord) -> RedisServer:
    """The node that has a session."""
    slot = key_slot(record.id[:3].encode())
    return next(node for number, node in enumerate(cluster.nodes) if slot in cluster.slots_of(number))


@contextmanager
def hanging(*nodes: RedisServer) -> Iterator[None]:
    for node in nodes:
        node.pause()
    try:
        yield
    finally:
        for node in nodes:
            node.resume()


def in_time(call: Callable[[], object]) -> None:
    """The call says that the store is down for now, and before long."""
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        call()
    assert time.monotonic() - start < PATIENCE


def test_sessions_are_on_all_nodes(redis_cluster: RedisCluster, store: SessionStore) -> None:
    """Sessions of nobody are spread over the nodes, and lists, counts and statistics are of all of them."""
    assert {node_of(redis_cluster, record).port for record in RECORDS} == {node.port for node in redis_cluster.nodes}
    assert sorted(record.id for record in store.scan()) == [record.id for record in RECORDS]
    assert store.count(SessionQuery()) == store.stats(now=0.0).total == len(RECORDS)


# Nodes that hang, lose connections or scripts -------------------------------------------------------------------------


def test_a_node_that_hangs(redis_cluster: RedisCluster, store: SessionStore) -> None:
    """Sessions of the other nodes are served; those of the one that hangs are unavailable, in bounded time."""
    with hanging(node_of(redis_cluster, RECORDS[0])):
        in_time(partial(store.get, RECORDS[0].id))
        there = [record for record in RECORDS if node_of(redis_cluster, record) is not node_of(redis_cluster, RECORDS[0])]
        assert [store.get(record.id) for record in there] == there
    assert store.get(RECORDS[0].id) == RECORDS[0]


@pytest.mark.parametrize("kind", ["store", "handed"])
def test_many_at_once_while_a_node_hangs(redis_cluster: RedisCluster, request: pytest.FixtureRequest, kind: str) -> None:
    """Many sessions at once wait for a node together, and not each by itself."""
    opened: SessionStore = request.getfixturevalue(kind)
    records = [make_record(number, user_id=None) for number in range(300)]
    with hanging(redis_cluster.nodes[0]):
        in_time(lambda: opened.save_many([Change(record=record, expected=0) for record in records]))
        in_time(lambda: opened.delete_many([Deletion(id=record.id) for record in records]))
        in_time(lambda: list(opened.scan()))
        in_time(lambda: opened.count(SessionQuery()))
        in_time(lambda: opened.stats(now=0.0))
        in_time(lambda: list(opened.check(repair=False)))


def test_threads_do_not_wait_for_each_other(redis_cluster: RedisCluster, url: str, store: SessionStore) -> None:
    """Where no node answers, eight threads wait as long as one, with a client that is connected and without."""
    with hanging(*redis_cluster.nodes), ThreadPoolExecutor(8) as pool:
        for opened in (store, open_store(url)):
            list(pool.map(lambda record, opened=opened: in_time(partial(opened.get, record.id)), RECORDS[:8]))
    wait_until(lambda: store.get(RECORDS[0].id) == RECORDS[0], "the cluster to go on")


def test_what_was_lost_is_not_sent_again(redis_cluster: RedisCluster, store: SessionStore) -> None:
    """A change whose answer does not come in time is unavailable, no conflict, and is not done twice."""
    node, record = node_of(redis_cluster, RECORDS[0]), following(RECORDS[0])
    store.save(record, expected=1)
    store.history.append(record.id, [b"first"], created_at=1.0)
    later = following(record, data=b"later")
    with hanging(node):
        in_time(lambda: store.save(later, expected=2))
    wait_until(lambda: _is_served(store, later), "the node to do what it was told")
    with hanging(node):
        in_time(lambda: store.history.append(record.id, [b"second"], created_at=1.0))
    wait_until(lambda: store.history.count(record.id) > 1, "the node to do what it was told")
    assert [entry.data for entry in store.history.read(record.id)] == [b"first", b"second"]


def test_closed_connections_are_not_noticed(redis_cluster: RedisCluster, store: SessionStore) -> None:
    """Connections that a node closed cost no error, whether one session is asked for or many."""
    for asked in (lambda: store.get(RECORDS[0].id), lambda: len(list(store.scan()))):
        for node in redis_cluster.nodes:
            with node.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
        assert asked() in (RECORDS[0], len(RECORDS))


def test_lost_scripts_are_not_noticed(redis_cluster: RedisCluster, store: SessionStore) -> None:
    """After SCRIPT FLUSH on all nodes sessions are saved and deleted as before, each by a few scripts at most."""
    for node in redis_cluster.nodes:
        with node.client() as client:
            client.script_flush()
            client.config_resetstat()
    assert store.save_many([Change(record=following(record), expected=1) for record in RECORDS]) == [True] * len(RECORDS)
    for node in redis_cluster.nodes:
        with node.client() as client:
            assert client.info("commandstats")["cmdstat_eval"]["calls"] == 1
    assert store.delete_many([Deletion(id=record.id, expected=2) for record in RECORDS]) == [True] * len(RECORDS)


# Slots that move ------------------------------------------------------------------------------------------------------


class Move:
    """A slot that moves from one node of a cluster to another."""

    def __init__(self, cluster: RedisCluster, slot: int, source: RedisServer, target: RedisServer) -> None:
        self.slot, self.target, self.target_id = slot, target, cluster.id_of(target)
        self.here, self.there = source.client(), target.client()
        self.there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.id_of(source))
        self.here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.target_id)

    def take(self, part: bytes = b"") -> None:
        """Move the keys, or those that have *part* in their name."""
        keys = self.here.execute_command("CLUSTER", "GETKEYSINSLOT", self.slot, 1000)
        if keys := [key for key in keys if part in key]:
            self.here.execute_command("MIGRATE", "127.0.0.1", self.target.port, "", 0, 5000, "KEYS", *keys)

    def finish(self) -> None:
        """Move what is left, and the slot."""
        self.take()
        for client in (self.there, self.here):
            client.execute_command("CLUSTER", "SETSLOT", self.slot, "NODE", self.target_id)
            client.close()


@contextmanager
def moving(cluster: RedisCluster, record: SessionRecord) -> Iterator[Move]:
    """The slot of a session is about to move to the next node; afterwards it moves back."""
    slot, source = key_slot(record.id[:3].encode()), node_of(cluster, record)
    target = cluster.nodes[(cluster.nodes.index(source) + 1) % cluster.primaries]
    yield Move(cluster, slot, source, target)
    Move(cluster, slot, target, source).finish()


def test_a_slot_that_moves(redis_cluster: RedisCluster, store: SessionStore) -> None:
    """Sessions are read and changed where they are before, while and after their slot moves to another node."""
    record = RECORDS[0]
    with moving(redis_cluster, record) as move:
        store.save(following(record), expected=1)
        assert store.get(make_record(5, user_id=None).id) is None
        move.finish()
        assert sorted(found.id for found in store.scan()) == [other.id for other in RECORDS]
        assert store.get(record.id) == following(record)
        with pytest.raises(SessionConflict):
            store.save(following(record), expected=1)
        assert store.save_many([Change(record=following(following(record)), expected=2)]) == [True]
        assert store.stats(now=0.0).total == len(RECORDS)
    assert store.get(record.id) == following(following(record))
    assert list(store.check(repair=False)) == []


def save_one(store: SessionStore, record: SessionRecord, expected: int) -> None:
    store.save(record, expected=expected)


def save_with_others(store: SessionStore, record: SessionRecord, expected: int) -> None:
    """Save it beside a conflict."""
    assert store.save_many([Change(record=record, expected=expected), Change(record=record, expected=expected)])[0]


def delete_one(store: SessionStore, session_id: str) -> None:
    assert store.delete(session_id)


def delete_with_others(store: SessionStore, session_id: str) -> None:
    assert store.delete_many([Deletion(id=session_id), Deletion(id=session_id)])[0]


@pytest.mark.parametrize(
    ("save", "delete"), [(save_one, delete_one), (save_with_others, delete_with_others)], ids=["one", "many"]
)
@pytest.mark.parametrize("first", [b":s:", b":expiry", b":facts", b":u:", b":h:"])
def test_a_slot_that_has_moved_in_part(
    redis_cluster: RedisCluster, store: SessionStore, first: bytes, save: Callable[..., None], delete: Callable[..., None]
) -> None:
    """While a node has some of the keys of a shard, changes are done or unavailable, and none is done in part."""
    records = {number: make_record(number, user_id="bob") for number in range(6)}
    store.save_many([Change(record=records[number], expected=0) for number in range(5)])
    store.history.append(records[0].id, [b"first"], created_at=1.0)
    changes: dict[int, Callable[[], object]] = {
        0: lambda: store.history.append(records[0].id, [b"second"], created_at=2.0),
        1: lambda: save(store, following(records[1]), 1),
        2: lambda: save(store, following(records[2], user_id="bob", expires_at=9.0, data=b"longer"), 1),
        3: lambda: delete(store, records[3].id),
        5: lambda: save(store, records[5], 0),
    }
    with moving(redis_cluster, records[0]) as move:
        move.take(first)
        done = {number for number, change in changes.items() if _is_done(change)}
        with pytest.raises(StoreUnavailable, match="slot of the session moves"):
            save(store, make_record(6, user_id="bob"), 0)
        move.finish()
        assert store.history.count(records[0].id) == 1 + (0 in done)
        versions = {number: found.version for number in records if (found := store.get(records[number].id))}
        expected = {0: 1, 1: 1 + (1 in done), 2: 1 + (2 in done), 3: 1, 4: 1, 5: 1}
        missing = {number for number, there in ((3, 3 not in done), (5, 5 in done)) if not there}
        assert versions == {number: version for number, version in expected.items() if number not in missing}
        assert list(store.check(repair=False)) == []
        assert all(_is_done(change) for number, change in changes.items() if number not in done)


@pytest.mark.parametrize("first", [b"nothing", b":s:", b":expiry", b":facts", b":u:"])
def test_a_transaction_while_a_slot_moves(redis_cluster: RedisCluster, store: SessionStore, first: bytes) -> None:
    """While a node has some of the keys of a shard, a transaction is done or unavailable, and none is done in part."""
    kept, gone, new = (make_record(number, user_id="bob") for number in range(3))
    store.save_many([Change(record=record, expected=0) for record in (kept, gone)])
    changes = [Change(record=following(kept), expected=1), Deletion(id=gone.id), Change(record=new, expected=0)]
    before, after = [kept, gone, None], [following(kept), None, new]
    with moving(redis_cluster, kept) as move:
        move.take(first)
        for some in (changes[:2], changes[::2], changes):
            with pytest.raises(StoreUnavailable):
                store.transaction(some)
        move.finish()
        assert [store.get(record.id) for record in (kept, gone, new)] == before
        assert list(store.check(repair=False)) == []
        store.transaction(changes)
        assert [store.get(record.id) for record in (kept, gone, new)] == after
    assert list(store.check(repair=False)) == []


def _is_done(change: Callable[[], object]) -> bool:
    """Whether a change is done; any error but that the store is unavailable is one."""
    try:
        change()
    except StoreUnavailable:
        return False
    return True


# Processes ------------------------------------------------------------------------------------------------------------


def _save_in_a_child(store: SessionStore, record: SessionRecord) -> None:
    store.save(following(record), expected=1)


def test_a_process_that_was_forked(store: SessionStore) -> None:
    """A child gets connections of its own, and the parent goes on with its own."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_save_in_a_child, args=(store, record)) for record in RECORDS[:3]]
    for child in children:
        child.start()
    assert [store.get(record.id) for record in RECORDS[3:]] == RECORDS[3:]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert [store.get(record.id) for record in RECORDS[:3]] == [following(record) for record in RECORDS[:3]]


def test_the_whole_extension(url: str, make_app: Callable[..., Flask], tmp_path: Path, new_url: NewURL) -> None:
    """An application keeps its sessions on a cluster, and what operates stores works there."""
    app = make_app(url)

    @app.get("/<name>")
    def write(name: str) -> str:
        session["seen"] = [*session.get("seen", []), name]
        return " ".join(session["seen"])

    browsers = [app.test_client() for _ in range(5)]
    assert [browser.get("/one").text for browser in browsers] == ["one"] * 5
    assert [browser.get("/two").text for browser in browsers] == ["one two"] * 5
    with app.app_context():
        sessions = PersistSession()
        assert sessions.manager.stats().active == 5
        assert sessions.health().healthy
        sessions.optimize()
        assert sessions.check().findings == ()
        backup = tmp_path / "sessions.tar.gz"
        sessions.backup(backup)
        other = open_store(new_url("sqlite"))
        assert sessions.migrate(other).copied == 5
        sessions.manager.store.delete_many([Deletion(id=record.id) for record in sessions.manager.store.scan()])
        assert sessions.restore(backup).restored == 5
    assert [browser.get("/three").text for browser in browsers] == ["one two three"] * 5


# URLs and what does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("redis+cluster://", "redis\\+cluster://host:6379"),
        ("redis+cluster:///", "redis\\+cluster://host:6379"),
        ("redis+cluster://one:7000,,two:7000", "lacks the name of a server"),
        ("redis+cluster://one:7000,:7001", "lacks the name of a server"),
        ("redis+cluster://one:7000/1", "database"),
        ("redis+cluster://one:7000/shop", "database"),
        ("redis+cluster://one:7000?db=0", "'db'; allowed is timeout, prefix"),
        ("redis+cluster://one:7000?ssl_ca_certs=x", "ssl_ca_certs"),
        ("rediss+cluster://one:7000?ssl_check_hostname=no", "ssl_check_hostname"),
        ("redis+cluster://one:7000,two:seven", "port"),
        ("redis+cluster://one:7000,two:70000", "port"),
        ("redis+cluster://user:geheim@one:7000,user:geheim@two:7000", "more than one @"),
        ("redis+cluster://user:geheim@one:7000?speed=1", "speed"),
        ("redis+clusters://user:geheim@one:7000", r"did you mean redis\+cluster"),
        ("redis+cluster://user:geheim@one:7000,two..example:7001", "empty part"),
        ("redis+sentinel://one..example:26379/sessions", "empty part"),
        ("redis://user:geheim@one..example:6379/0", "empty part"),
        (f"rediss://{64 * 'x'}", "63 letters"),
        ("redis+sentinel://one:26379", r"write redis\+sentinel://host:26379,other:26379/service/0"),
        ("redis+sentinel://one:26379/", "service"),
        ("redis+sentinel://one:26379/sessions/first", "service"),
        ("redis+sentinel:///sessions/0", "lacks the name of a server"),
        ("redis+sentinel://one/sessions?sentinel_secret=geheim", "sentinel_secret"),
        ("redis+sentinel://one/sessions?db=1", "'db'"),
        ("redis+sentinel://one/sessions?sentinel_password=geheim&timeout=0", "timeout"),
        ("redis+sentinel://user:geheim@one,two:x/sessions", "port"),
    ],
)
def test_a_url_that_cannot_work(url: str, named: str) -> None:
    """A URL of a cluster or of Sentinels that cannot work is a ``ConfigError``: what to write, and no password."""
    with pytest.raises(ConfigError, match=named) as caught:
        open_store(url)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://user:geheim@127.0.0.1:{0},127.0.0.1:{1}",
        "rediss+cluster://user:geheim@127.0.0.1:{0},[::1]:{1}?timeout=0.3",
        "redis+sentinel://user:geheim@127.0.0.1:{0},127.0.0.1:{1}/sessions/0?sentinel_password=geheim",
        "rediss+sentinel://user:geheim@127.0.0.1:{0},[::1]:{1}/sessions?sentinel_username=x&sentinel_password=geheim",
    ],
)
def test_nobody_is_there(url: str) -> None:
    """Opening a store connects nothing; what needs a server says which, and no password, in text and in repr."""
    ports = free_port(), free_port()
    store = open_store(url.format(*ports))
    with pytest.raises(StoreUnavailable, match=str(ports[0])) as caught:
        store.get(RECORDS[0].id)
    assert not any("geheim" in text for text in (str(caught.value), repr(caught.value), repr(store), repr(vars(store))))
    store.close()


def test_a_server_that_is_no_cluster(redis_server: RedisServer) -> None:
    """A server outside of any cluster is told as such."""
    store = open_store(f"redis+cluster://127.0.0.1:{redis_server.port}")
    with pytest.raises(StoreUnavailable, match="Cluster mode is not enabled"):
        store.get(RECORDS[0].id)


def test_a_cluster_without_slots(tmp_path: Path) -> None:
    """A node that nobody has given slots is unavailable until it has got them; so is one that has lost some."""
    cluster = RedisCluster(tmp_path, primaries=1)
    [node] = cluster.nodes
    try:
        with node.start().client() as client:
            store = open_store(cluster.url)
            for asked in (partial(store.get, RECORDS[0].id), partial(list, store.scan())):
                with pytest.raises(StoreUnavailable):
                    asked()
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the slots")
            store.save(RECORDS[0], expected=0)
            handed = RedisStore(cluster.client())
            client.execute_command("CLUSTER", "DELSLOTS", key_slot(RECORDS[0].id[:3].encode()))
            for opened in (store, handed):
                for asked in (partial(opened.get, RECORDS[0].id), partial(opened.count, SessionQuery())):
                    with pytest.raises(StoreUnavailable):
                        asked()
                opened.close()
    finally:
        cluster.stop()


def test_a_cluster_that_is_only_read(tmp_path: Path) -> None:
    """A cluster that lacks slots and may be read all the same is unavailable to whoever changes something."""
    cluster = RedisCluster(tmp_path, "--cluster-allow-reads-when-down", "yes", primaries=1)
    try:
        store = open_store(cluster.start().url)
        store.save(RECORDS[0], expected=0)
        with cluster.nodes[0].client() as client:
            other = next(slot for slot in range(2) if slot != key_slot(RECORDS[0].id[:3].encode()))
            client.execute_command("CLUSTER", "DELSLOTS", other)
            wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "fail", "the cluster to notice")
        for change in (
            partial(store.save, following(RECORDS[0]), expected=1),
            partial(store.save_many, [Change(record=following(RECORDS[0]), expected=1)]),
        ):
            with pytest.raises(StoreUnavailable):
                change()
        assert store.get(RECORDS[0].id) == RECORDS[0]
        store.close()
    finally:
        cluster.stop()


def test_passwords_of_a_cluster(tmp_path: Path) -> None:
    """User and password of the URL open all nodes; wrong ones are told without them."""
    cluster = RedisCluster(tmp_path, "--requirepass", "gehe:im/1@", primaries=1)
    [node] = cluster.nodes
    node.password = "gehe:im/1@"
    try:
        cluster.start()
        for credentials in (":gehe%3Aim%2F1%40", "default:gehe%3Aim%2F1%40"):
            store = open_store(cluster.url.replace("//", f"//{credentials}@"))
            assert store.get(RECORDS[0].id) is None
            store.close()
        with pytest.raises(StoreUnavailable) as caught:
            open_store(cluster.url.replace("//", "//wrong:geheim@")).get(RECORDS[0].id)
        assert "geheim" not in str(caught.value)
    finally:
        cluster.stop()


# A primary that fails -------------------------------------------------------------------------------------------------


def test_a_primary_that_is_killed(tmp_path: Path) -> None:
    """Its replica takes over: until then its sessions are unavailable, and nothing that has reached the replica is lost."""
    cluster = RedisCluster(tmp_path, "--cluster-node-timeout", "700", replica=True)
    try:
        store = open_store(f"{cluster.start().url}?timeout=0.5")
        store.save_many([Change(record=record, expected=0) for record in RECORDS])
        with cluster.nodes[0].client() as client:
            assert client.wait(1, 5000) == 1
        cluster.nodes[0].stop()
        lost = next(record for record in RECORDS if node_of(cluster, record) is cluster.nodes[0])
        there = next(record for record in RECORDS if node_of(cluster, record) is not cluster.nodes[0])
        wait_until(lambda: all(_is_served(store, record) for record in RECORDS), "the replica to take over")
        assert sorted(record.id for record in store.scan()) == [record.id for record in RECORDS]
        assert [store.get(record.id) for record in (lost, there)] == [lost, there]
        store.save(following(lost), expected=1)
        assert list(store.check(repair=False)) == []
        store.close()
    finally:
        cluster.stop()


def _is_served(store: SessionStore, record: SessionRecord) -> bool:
    """Whether a session is found; any error but that the store is unavailable is one."""
    try:
        return store.get(record.id) == record
    except StoreUnavailable:
        return False
