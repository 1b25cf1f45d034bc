"""Several sessions changed together: all or none, wherever the process is stopped, and for whoever goes on meanwhile."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from flask_persist_session import (
    Change,
    Deletion,
    SessionConflict,
    SessionNotFound,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoreError,
    UnsupportedByStore,
    open_store,
)
from flask_persist_session.stores import file_upkeep
from flask_persist_session.stores.migrating import MigratingStore
from flask_persist_session.stores.redis import RedisStore
from flask_persist_session.testing import following, in_processes, make_record
from tests.servers import RedisServer, free_port, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

NewURL = Callable[[str], str]
MANY = [pytest.param(12, id="a few"), pytest.param(50, id="fifty", marks=pytest.mark.soak)]
#: Sessions that are there all the time, and two of which there is one at a time.
STAYING = [make_record(number, user_id=None, data=b"100") for number in range(3)]
TURNS = [make_record(number, user_id=user_id) for number, user_id in ((10, "alice"), (11, None))]


def step(number: int, *, fresh: bool = False) -> list[Change | Deletion]:
    """What makes state *number* of the one before: amounts move on, and one of two sessions makes room for the other."""
    changes: list[Change | Deletion] = []
    for place, record in enumerate(STAYING):
        # Of many sizes, so that files are rewritten too.
        data = b"%d " % (100 + (number if place == 0 else -number if place == 1 else 0)) + bytes(number % 5 * 3000)
        changes.append(Change(record=_version(record, number + 1, data), expected=number))
    coming, going = TURNS[number % 2], TURNS[(number + 1) % 2]
    changes.append(Change(record=_version(coming, 1, b"%d" % number), expected=0))
    return changes if fresh else [*changes, Deletion(id=going.id, expected=1)]


def _version(record: SessionRecord, version: int, data: bytes) -> SessionRecord:
    return make_record(id=record.id, user_id=record.user_id, version=version, data=data)


def state_of(store: SessionStore) -> int:
    """Which state all sessions are in."""
    found = {record.id: store.get(record.id) for record in (*STAYING, *TURNS)}
    versions = {record.version for other in STAYING if (record := found[other.id])}
    assert len(versions) == 1, versions
    number = versions.pop() - 1
    expected = {change.id: change.record if isinstance(change, Change) else None for change in step(number)}
    assert found == expected, number
    return number


def is_whole(store: SessionStore) -> int:
    """The same, and that every list agrees with it, before and after a repair that leaves nothing to find."""
    number = state_of(store)
    for _ in range(2):
        there = sorted(record.id for record in store.scan())
        assert there == sorted([*(record.id for record in STAYING), TURNS[number % 2].id])
        assert [record.id for record in store.find(SessionQuery(user_id="alice"))] == [TURNS[0].id][: number % 2 == 0]
        assert all(finding.repaired for finding in store.check(repair=True))
        assert state_of(store) == number
    assert list(store.check(repair=False)) == []
    return number


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is at work when a check looks."""
    monkeypatch.setattr(file_upkeep, "_SETTLED", 0.0)


# Killed ---------------------------------------------------------------------------------------------------------------


def go_on(store: SessionStore, first: int) -> None:
    """Make one state after the other, without end."""
    while True:
        store.transaction(step(first))
        first += 1


def forked(work: Callable[[], object]) -> int:
    """Run *work* in a child process that does nothing else; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


@pytest.mark.parametrize("kind", ["file", "file?fsync=1", "sqlite", "redis"])
@pytest.mark.parametrize("kills", MANY)
def test_processes_that_are_killed(new_url: NewURL, kind: str, kills: int) -> None:
    """Processes that are killed in the middle, one after the other, leave all sessions in one state each time."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    name, mark, options = kind.partition("?")
    url = new_url(name) + mark + options
    first = step(0, fresh=True)
    open_store(url).transaction(first)
    reached = 1
    for number in range(kills):
        # A store of its own, opened in the child.
        child = forked(lambda: go_on(open_store(url), reached))  # noqa: B023
        if number == 0:  # on a busy machine all might be killed before they do anything
            store = open_store(url)
            wait_until(lambda: store.get(STAYING[0].id) != first[0].record, "the first transaction")  # noqa: B023
            store.close()
        signal.sigtimedwait([], chance.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        store = open_store(url)
        before, reached = reached, state_of(store) + 1
        assert reached >= before
        if chance.random() < 0.3:  # otherwise the next process finds what this one left
            assert is_whole(store) + 1 == reached
        store.close()
    store = open_store(url)
    assert is_whole(store) + 1 == reached > 1
    store.close()


#: The calls by which a transaction changes something on the disk.
CALLS = ("open", "pwrite", "ftruncate", "link", "unlink", "rename", "mkdir", "fsync")


def stopped_at(number: int, work: Callable[[], object], *, half: bool) -> bool:
    """Run *work* in a child that ends just before so many calls of the system; say whether it got that far."""

    def run() -> None:
        left = number

        def counting(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if half and call.__name__ == "pwrite":
                    handle, content, offset = arguments
                    call(handle, content[: len(content) // 2], offset)
                os._exit(77)
            return call(*arguments, **options)

        for name in CALLS:
            setattr(os, name, partial(counting, getattr(os, name)))
        work()
        os._exit(0)

    status = os.waitstatus_to_exitcode(os.waitpid(forked(run), 0)[1])
    assert status in (0, 77)
    return status == 77


@pytest.mark.parametrize("half", [False, True], ids=["between calls", "in the middle of writing"])
@pytest.mark.parametrize("options", ["", pytest.param("?fsync=1", marks=pytest.mark.soak)])
@pytest.mark.parametrize("then", ["look", "check", "go on", "go on elsewhere"])
def test_stopped_at_every_call(new_url: NewURL, then: str, options: str, half: bool) -> None:
    """Wherever in its calls of the system a process ends: all or none, for readers, for a check, and for the next one."""
    store = open_store(new_url("file") + options)
    store.transaction(step(0, fresh=True))
    state, number, seen = 0, 0, set()
    while stopped_at(number, partial(store.transaction, step(state + 1)), half=half):
        number += 1
        after = state_of(store)
        assert after in (state, state + 1)
        seen.add(after - state)
        if then == "check":
            assert is_whole(store) == after
        elif then == "go on":
            store.transaction(step(after + 1))
            after += 1
        elif then == "go on elsewhere":  # with each session on its own
            for change in step(after + 1):
                if isinstance(change, Change):
                    store.save(change.record, expected=change.expected)
                else:
                    assert store.delete(change.id, expected=change.expected)
            after += 1
        assert state_of(store) == after
        state = after
    assert seen == {0, 1}
    assert number > 10
    assert is_whole(store) == state + 1


@pytest.mark.parametrize("kind", ["ends", "deletes", "creates"])
def test_appending_after_a_transaction_was_stopped(new_url: NewURL, kind: str) -> None:
    """Wherever it is stopped, a history can be appended to if and only if its session is there and has not ended."""
    url, one, other = new_url("file"), make_record(1), make_record(2)
    first = {
        "ends": Change(record=following(one, ended_at=5.0, end_reason="ended"), expected=1),
        "deletes": Deletion(id=one.id, expected=1),
        "creates": Change(record=one, expected=0),
    }[kind]
    number, seen, more = 0, set(), True
    while more:
        store = open_store(f"{url}/{number}")
        store.save(other, expected=0)
        if kind != "creates":
            store.save(one, expected=0)
        both = [first, Change(record=following(other), expected=1)]
        more = stopped_at(number, partial(store.transaction, both), half=False)
        found = store.get(one.id)
        if found is not None and found.ended_at is None:
            assert store.history.append(one.id, [b"x"], created_at=1.0) == 1
        else:
            with pytest.raises(SessionNotFound):
                store.history.append(one.id, [b"x"], created_at=1.0)
        assert store.get(one.id) == found
        seen.add(found and (found.version, found.ended_at))
        number += 1
    assert len(seen) == 2


def test_a_check_while_transactions_go_on(new_url: NewURL) -> None:
    """A check with repair takes nothing from transactions that are under way, and finds nothing."""
    url = new_url("file")
    store = open_store(url)
    store.transaction(step(0, fresh=True))
    file_upkeep._SETTLED = 0.3
    child = forked(partial(go_on, store, 1))
    try:
        findings = [finding for _ in range(4) for finding in store.check(repair=True)]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert findings == []
    assert is_whole(store) > 10


def test_what_a_check_says(new_url: NewURL, tmp_path: Path) -> None:
    """A committed transaction that was not settled is found as such, once for each file and for the marker."""
    store = open_store(new_url("file"))
    store.transaction(step(0, fresh=True))
    number = 0
    while state_of(store) == 0:
        list(store.check(repair=True))
        stopped_at(number, partial(store.transaction, step(1)), half=False)
        number += 1
    found = list(store.check(repair=False))
    assert sorted(finding.kind for finding in found) == ["leftover", *["torn"] * 5]
    assert all("was committed" in finding.text for finding in found if finding.kind == "torn")
    assert list(store.check(repair=False)) == found
    assert len(list(tmp_path.rglob("transactions/*"))) == 1
    assert sorted(finding.kind for finding in store.check(repair=True)) == ["leftover", *["torn"] * 5]
    assert list(tmp_path.rglob("transactions/*")) == []
    assert is_whole(store) == 1


def test_optimize_does_not_commit(new_url: NewURL) -> None:
    """Rewriting files keeps the state that counts of those in which a transaction was stopped."""
    store = open_store(new_url("file"))
    store.transaction(step(0, fresh=True))
    for number in range(1, 5):
        store.transaction(step(number))
    assert stopped_at(6, partial(store.transaction, step(5)), half=False)
    list(store.optimize())
    assert is_whole(store) == 4


def test_what_waits_for_the_disk(new_url: NewURL, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``fsync=1`` the frames are on the disk before the marker, and that before anything is settled."""
    store = open_store(new_url("file") + "?fsync=1")
    store.transaction(step(0, fresh=True))
    done: list[tuple[str, str]] = []

    def noted(name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        place = arguments[-1] if name == "rename" else arguments[0]
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place
        done.append((name, "marker" if Path(path).parent.name == "transactions" else path))
        return call(*arguments, **options)

    for name in ("pwrite", "fsync", "rename", "unlink"):
        monkeypatch.setattr(os, name, partial(noted, name, getattr(os, name)))
    store.transaction(step(1))
    marked = done.index(("rename", "marker"))
    removed = len(done) - 1
    assert done[removed] == ("unlink", "marker")
    for start, end in (0, marked), (marked + 1, removed):
        written = {path: at for at, (name, path) in enumerate(done[:end]) if name in ("pwrite", "rename") and at >= start}
        synced = {path: at for at, (name, path) in enumerate(done[:end]) if name == "fsync" and at >= start}
        assert len(written) >= 4
        assert all(synced[path] > at for path, at in written.items())
    following_calls = iter(done[marked + 1 :])
    assert next(following_calls)[0] == "fsync"
    assert next(following_calls)[0] == "fsync"


# Failing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pwrite", "link", "rename"])
def test_a_full_disk(new_url: NewURL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Where the disk takes no more before it is committed, nothing is changed and nothing is left."""
    store = open_store(new_url("file"))
    store.transaction(step(0, fresh=True))
    files = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    call, left = getattr(os, name), [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return call(*arguments, **options)

    monkeypatch.setattr(os, name, failing)
    for allowed in range(5 if name == "pwrite" else 1):
        left[0] = allowed
        with pytest.raises(StoreError, match="No space left"):
            store.transaction(step(1))
        assert {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} == files
    monkeypatch.undo()
    assert is_whole(store) == 0


def test_a_full_disk_after_the_commit(
    new_url: NewURL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is committed counts, though the disk takes no more to settle it; a warning says so."""
    store = open_store(new_url("file"))
    store.transaction(step(0, fresh=True))
    rename = os.rename

    def then_full(*arguments: Any) -> None:
        rename(*arguments)
        monkeypatch.setattr(os, "pwrite", _no_space)

    monkeypatch.setattr(os, "rename", then_full)
    store.transaction(step(1))
    assert state_of(store) == 1
    assert "was not settled" in caplog.text
    monkeypatch.undo()
    store.transaction(step(2))
    monkeypatch.setattr(file_upkeep, "_SETTLED", 0.0)
    assert is_whole(store) == 2


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_two_orders_at_once(shared_url: str) -> None:
    """Transactions that name the same sessions the other way round do not wait for each other for ever."""
    records = [make_record(number, user_id=None) for number in range(6)]
    store = open_store(shared_url)
    store.transaction([Change(record=record, expected=0) for record in records])
    done = in_processes(partial(open_store, shared_url), partial(_save_in_order, [record.id for record in records]), 2)
    assert done == [30, 30]
    assert {record.version for record in store.scan()} == {61}
    store.close()


def _save_in_order(ids: list[str], store: SessionStore, number: int) -> int:
    """Save all of them together 30 times, one process forwards and the other one backwards."""
    done = 0
    while done < 30:
        found = [record for session_id in ids if (record := store.get(session_id)) is not None]
        changes = [Change(record=following(record), expected=record.version) for record in found]
        try:
            store.transaction(changes[:: -1 if number else 1])
            done += 1
        except SessionConflict:
            continue
    return done


# Redis ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A cluster of one node, which has all the slots."""
    server = RedisServer(tmp_path_factory.mktemp("cluster"), "--cluster-enabled", "yes")
    while server.port > 55_535:  # the nodes talk to each other on a port that is 10,000 higher
        server.port = free_port()
    try:
        with server.start().client() as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster")
        yield server
    finally:
        server.stop()


@pytest.fixture(params=[redis.Redis, redis.RedisCluster])
def clustered(request: pytest.FixtureRequest, cluster: RedisServer) -> Iterator[SessionStore]:
    """A store with a client of one node, or one that knows of clusters."""
    store = RedisStore(request.param(host="127.0.0.1", port=cluster.port), prefix=request.param.__name__)
    yield store
    store.close()


def test_a_transaction_on_a_cluster(clustered: SessionStore) -> None:
    """A cluster cannot change sessions of several shards together and says so; those of one user it can."""
    with pytest.raises(UnsupportedByStore, match="cluster"):
        clustered.transaction([Change(record=record, expected=0) for record in STAYING])
    assert [clustered.get(record.id) for record in STAYING] == [None] * 3
    clustered.transaction([Change(record=make_record(number), expected=0) for number in (20, 21)])
    clustered.transaction([Deletion(id=make_record(number).id, expected=1) for number in (20, 21)])


def test_a_transaction_on_a_damaged_index(new_url: NewURL, redis_server: RedisServer) -> None:
    """An index that is something else fails the transaction before anything is written."""
    url = new_url("redis")
    store = open_store(url)
    store.save(STAYING[0], expected=0)
    with redis_server.client() as client:
        [key] = client.scan_iter(match=f"{url.partition('prefix=')[2]}:*:expiry")
        other = key.replace(b"{%s}" % STAYING[0].id[:3].encode(), b"{%s}" % STAYING[1].id[:3].encode())
        client.set(other, "something else")
        with pytest.raises(StoreError):
            store.transaction([Change(record=following(STAYING[0]), expected=1), Change(record=STAYING[1], expected=0)])
        client.delete(other)
    assert [store.get(record.id) for record in STAYING[:2]] == [STAYING[0], None]
    store.close()


# Two stores -----------------------------------------------------------------------------------------------------------


def test_a_transaction_while_a_store_is_changed() -> None:
    """Sessions of the old store move to the new one first; a conflict changes none, and what is deleted stays away."""
    new, old = open_store("memory://"), open_store("memory://")
    moving, there, copied = STAYING
    for store, records in ((old, (moving, copied)), (new, (there, copied))):
        store.save_many([Change(record=record, expected=0) for record in records])
    both = MigratingStore(new, old)
    with pytest.raises(SessionConflict, match=moving.id):
        both.transaction([Change(record=following(there), expected=1), Change(record=moving, expected=0)])
    assert [both.get(record.id) for record in STAYING] == STAYING
    both.transaction(
        [Change(record=following(moving), expected=1), Change(record=following(there), expected=1), Deletion(id=copied.id)]
    )
    assert [both.get(record.id) for record in STAYING] == [following(moving), following(there), None]
    assert list(old.scan()) == []
