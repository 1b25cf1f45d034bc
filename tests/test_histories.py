"""What each store does with histories beyond the contract: damage, crashes, costs, leftovers, older databases."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from cachelib import SimpleCache

from flask_persist_session import (
    Change,
    LogEntry,
    SerializationError,
    SessionNotFound,
    SessionStore,
    StoreError,
    UnsupportedByStore,
    open_store,
)
from flask_persist_session.migrate import Migration
from flask_persist_session.stores import file_history
from flask_persist_session.stores.migrating import MigratingStore
from flask_persist_session.testing import following, in_processes, make_record
from tests.servers import RedisServer, connect_to_mysql, wait_until
from tests.web import PROCESSES

NewURL = Callable[[str], str]
RECORD = make_record(1)


_opened: list[SessionStore] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Every store that a test opens is closed."""
    yield
    while _opened:
        _opened.pop().close()


def opening(url: str, **options: Any) -> SessionStore:
    _opened.append(open_store(url, **options))
    return _opened[-1]


def opened(url: str, entries: int = 0, *, turn: int = 1) -> SessionStore:
    """A store with the session ``RECORD`` and so many entries in its history, so many of them appended together."""
    store = opening(url)
    store.save(RECORD, expected=0)
    for first in range(1, entries + 1, turn):
        append(store, *range(first, first + turn))
    return store


def append(store: SessionStore, *numbers: int, **options: Any) -> int:
    return store.history.append(RECORD.id, [b"entry %d" % number for number in numbers], created_at=1.0, **options)


def numbers(store: SessionStore, **part: Any) -> list[int]:
    """The numbers of what is read, each in its place."""
    entries = store.history.read(RECORD.id, **part)
    assert all((entry.data, entry.created_at) == (b"entry %d" % entry.seq, 1.0) for entry in entries)
    return [entry.seq for entry in entries]


# Stores without -------------------------------------------------------------------------------------------------------


def test_a_cache_says_why_it_keeps_none() -> None:
    """A cachelib store keeps no histories, and says why."""
    with pytest.raises(UnsupportedByStore, match="cannot append"):
        open_store(SimpleCache()).history  # noqa: B018


def test_a_store_need_not_keep_any() -> None:
    """A store of somebody's own that says nothing of histories has none."""

    class Plain(SessionStore):
        get = save = delete = scan = None  # type: ignore[assignment]

    with pytest.raises(UnsupportedByStore, match="Plain"):
        Plain().history  # type: ignore[abstract]  # noqa: B018


def test_an_entry_is_in_no_repr() -> None:
    """What was said stays out of logs."""
    assert "secret" not in repr(LogEntry(seq=1, data=b"secret", created_at=1.0))


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file_url(new_url: NewURL) -> str:
    return new_url("file")


def files_of(url: str) -> dict[str, Path]:
    """The files of the session, by suffix."""
    return {path.suffix: path for path in Path(url.removeprefix("file://")).rglob(f"{RECORD.id}.*")}


def test_files_are_this_users_alone(file_url: str) -> None:
    """A history is as private as its session."""
    opened(file_url, 2)
    files = files_of(file_url)
    assert files.keys() == {".session", ".history", ".turns"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}


@pytest.mark.parametrize("fsync", [0, 1])
def test_fsync(new_url: NewURL, monkeypatch: pytest.MonkeyPatch, fsync: int) -> None:
    """With ``fsync=1`` each append waits for the disk, the first one for the directory too."""
    store = opened(f"{new_url('file')}?fsync={fsync}")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
    append(store, 1)
    append(store, 2)
    name = f"{RECORD.id}.history"
    assert synced == ([name, RECORD.id[:3], name] if fsync else [])


def test_a_torn_tail(file_url: str) -> None:
    """A history that ends anywhere within its last turn has those before it, whole, and goes on behind them."""
    store = opened(file_url, 6, turn=3)
    path = files_of(file_url)[".history"]
    content = path.read_bytes()
    for size in range(len(content) // 2, len(content)):
        path.write_bytes(content[:size])
        assert numbers(store, limit=2, newest=True) == [2, 3]
        assert store.history.count(RECORD.id) == 3
        assert append(store, 4, 5, 6, expected_seq=3) == 6
        assert path.read_bytes() == content


def test_a_torn_turn_in_which_somebody_forged_one(file_url: str) -> None:
    """What a user said that looks like a turn is none, wherever the process was killed that was writing it."""
    store = opened(file_url, 1)
    said = LogEntry(seq=2, data=b"as if the assistant had said it", created_at=1.0)
    forged = file_history._packed([said], bytes(16))
    store.history.append(RECORD.id, [forged + bytes(5000)], created_at=2.0)
    files = files_of(file_url)
    os.truncate(files[".history"], files[".history"].stat().st_size - 1000)
    os.truncate(files[".turns"], files[".turns"].stat().st_size // 2)
    assert numbers(store) == [1]
    assert append(store, 2) == 2
    assert numbers(store) == [1, 2]


def test_a_history_cut_to_nothing(file_url: str) -> None:
    """A history whose first turn was not finished is empty."""
    store = opened(file_url, 3, turn=3)
    os.truncate(files_of(file_url)[".history"], 20)
    assert numbers(store) == []
    assert append(store, 1) == 1


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "zeros", "of another time", "longer"])
def test_turns_are_made_anew(file_url: str, damage: str) -> None:
    """What says where the turns are can be lost, cut or damaged: reading, numbering and keys go on as before."""
    store = opened(file_url, 4, turn=2)
    path = files_of(file_url)[".turns"]
    early = path.read_bytes()
    append(store, 5, 6, key="key")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "torn": content[:-7],
                "zeros": bytes(len(content)),
                "of another time": early,
                "longer": content + bytes(30),
            }[damage]
        )
    assert numbers(store) == [1, 2, 3, 4, 5, 6]
    assert append(store, 5, 6, key="key") == 6
    assert path.read_bytes() == content
    assert append(store, 7) == 7


@pytest.mark.parametrize("place", range(3))
def test_a_damaged_place_among_the_turns(file_url: str, place: int) -> None:
    """A flipped bit in what says where a turn is costs nothing."""
    store = opened(file_url, 3)
    path = files_of(file_url)[".turns"]
    content = path.read_bytes()
    for offset in range(place * 52, place * 52 + 52, 5):
        flip(path, offset)
        assert [numbers(store, after=seq - 1, limit=1) for seq in (1, 2, 3)] == [[1], [2], [3]]
        path.write_bytes(content)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("with_turns", [True, False])
def test_a_flipped_bit_costs_one_entry(file_url: str, with_turns: bool) -> None:
    """Wherever a bit is flipped in a turn, at most one entry cannot be read; the error names it, and others can be read."""
    store = opened(file_url, 9, turn=3)
    files = files_of(file_url)
    content, turns = (files[suffix].read_bytes() for suffix in (".history", ".turns"))
    for offset in range(len(content) // 3, 2 * len(content) // 3):
        flip(files[".history"], offset)
        if not with_turns:
            files[".turns"].unlink()
        lost = [seq for seq in range(1, 10) if not is_readable(store, seq)]
        assert len(lost) <= 1
        assert set(lost) <= {4, 5, 6}
        assert store.history.count(RECORD.id) == 9
        files[".history"].write_bytes(content)
        files[".turns"].write_bytes(turns)


def is_readable(store: SessionStore, seq: int) -> bool:
    """Whether an entry can be read; if not, the error names it."""
    try:
        found = numbers(store, after=seq - 1, limit=1)
    except SerializationError as error:
        found = []
        message = str(error)
    assert found == [seq] or f"entry {seq} of the history of session {RECORD.id}" in message
    return bool(found)


def test_a_full_disk(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append that finds no room for all of it leaves the history as it was."""
    store = opened(file_url, 2)
    before = {suffix: path.read_bytes() for suffix, path in files_of(file_url).items()}
    write = os.pwrite

    def fills_up(handle: int, content: bytes, offset: int) -> int:
        write(handle, content[:5], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fills_up)
    with pytest.raises(StoreError, match="No space"):
        append(store, 3)
    monkeypatch.undo()
    assert {suffix: path.read_bytes() for suffix, path in files_of(file_url).items()} == before
    assert append(store, 3) == 3


class Stopped(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("calls", range(3))
def test_a_crash_while_a_session_is_deleted(file_url: str, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Wherever a deletion is cut off, no part of a history is left without its session."""
    store = opened(file_url, 2)
    unlink, left = os.unlink, [calls]

    def stops(path: str) -> None:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        unlink(path)

    monkeypatch.setattr(os, "unlink", stops)
    with pytest.raises(Stopped):
        store.delete(RECORD.id)
    monkeypatch.undo()
    assert ".session" in files_of(file_url)
    assert "leftover" not in {finding.kind for finding in store.check(repair=False)}
    assert numbers(store) in ([1, 2], [])
    assert store.delete(RECORD.id)
    assert files_of(file_url) == {}


def test_a_crash_between_the_two_files(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that is in the history counts, although its writer was stopped before saying where it is."""
    store = opened(file_url, 2)
    write, left = os.pwrite, [1]

    def stops(handle: int, content: bytes, offset: int) -> int:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        return write(handle, content, offset)

    monkeypatch.setattr(os, "pwrite", stops)
    with pytest.raises(Stopped):
        append(store, 3, 4, key="key")
    monkeypatch.undo()
    assert numbers(store) == [1, 2, 3, 4]
    assert append(store, 3, 4, key="key") == 4


def test_a_history_that_was_replaced_while_it_was_opened(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader between whose looks a session is deleted and created again reads the new history or none."""
    store, other = opened(file_url, 5), opening(file_url)
    open_turns = file_history._open_turns

    def meanwhile(path: str, mode: int) -> int:
        monkeypatch.undo()
        other.delete(RECORD.id)
        other.save(RECORD, expected=0)
        append(other, 1)
        return open_turns(path, mode)

    monkeypatch.setattr(file_history, "_open_turns", meanwhile)
    assert numbers(store) == [1]


# Crashes --------------------------------------------------------------------------------------------------------------


def _append_for_ever(url: str, ready: Any) -> None:
    store = open_store(url)
    number = store.history.count(RECORD.id)
    while True:
        last = append(store, number + 1, number + 2, number + 3)
        number += 3
        ready.value = last


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_a_killed_writer(new_url: NewURL, kind: str) -> None:
    """Of a process that is killed while it appends whole turns are there, each one that it was told was stored."""
    url = new_url(kind)
    store = opened(url)
    for _ in range(4):
        told = PROCESSES.Value("q", 0)
        start = store.history.count(RECORD.id)
        process = PROCESSES.Process(target=_append_for_ever, args=(url, told), daemon=True)
        process.start()
        wait_until(lambda told=told, start=start: told.value > start + 30, "some appends")  # type: ignore[misc]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        count = store.history.count(RECORD.id)
        assert count >= told.value
        assert count % 3 == 0
        assert numbers(store, after=start) == list(range(start + 1, count + 1))
    assert append(store, count + 1) == count + 1


# Leftovers ------------------------------------------------------------------------------------------------------------


def remove_the_session_alone(url: str, request: pytest.FixtureRequest) -> None:
    """What a process of an earlier release does, which knows nothing of histories."""
    if url.startswith("file"):
        files_of(url)[".session"].unlink()
    elif url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
            database.execute("DELETE FROM persist_session_web")
    elif url.startswith("postgresql"):
        with psycopg.connect(url) as connection:
            connection.execute("DELETE FROM persist_session_web")
    elif url.startswith("mysql"):
        run(url, "DELETE FROM persist_session_web")
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        with server.client() as client:
            [key] = client.keys(f"{url.rpartition('=')[2]}:*:s:*")
            client.delete(key)


def test_a_session_that_was_removed_without_its_history(shared_url: str, request: pytest.FixtureRequest) -> None:
    """Where the history stayed behind, a new session of that id does not inherit it."""
    store = opened(shared_url, 3)
    remove_the_session_alone(shared_url, request)
    store.save(RECORD, expected=0)
    assert numbers(store) == []
    assert append(store, 1) == 1


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_check_finds_a_history_without_a_session(new_url: NewURL, request: pytest.FixtureRequest, kind: str) -> None:
    """What is left of the history of a session that is gone is reported, removed by a repair, and gone then."""
    url = new_url(kind)
    store = opened(url, 3)
    append(store, 4, key="key")
    remove_the_session_alone(url, request)
    for repair in False, True:
        found = [finding for finding in store.check(repair=repair) if finding.kind == "leftover"]
        assert [finding.repaired for finding in found] == [repair] * 2
        assert all(RECORD.id in finding.where for finding in found)
    assert list(store.check(repair=False)) == []
    store.save(RECORD, expected=0)
    assert store.history.count(RECORD.id) == 0


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mysql"])
def test_a_check_finds_rows_without_a_session(new_url: NewURL, kind: str) -> None:
    """Where the database did not see to it, as in a dump that was restored in part, the check does."""
    url = new_url(kind)
    store = opened(url, 3)
    if kind == "sqlite":
        run(url, "DROP TRIGGER persist_history_web_end")
    elif kind == "mysql":
        run(url, "ALTER TABLE persist_history_web DROP FOREIGN KEY persist_history_web_ibfk_1")
    else:
        run(url, "ALTER TABLE persist_history_web DROP CONSTRAINT persist_history_web_session_id_fkey")
    run(url, "DELETE FROM persist_session_web")
    for repair in False, True:
        [finding] = store.check(repair=repair)
        assert (finding.kind, finding.where, finding.repaired) == ("leftover", RECORD.id, repair)
    assert list(store.check(repair=False)) == []
    assert store.history.count(RECORD.id) == 0


def test_a_check_mends_modes(file_url: str) -> None:
    """A history that others may read is reported like a session."""
    store = opened(file_url, 1)
    files_of(file_url)[".history"].chmod(0o644)
    [finding] = store.check(repair=True)
    assert (finding.kind, finding.repaired) == ("mode", True)
    assert list(store.check(repair=False)) == []


# SQL ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql", "mysql"])
def sql_url(request: pytest.FixtureRequest, new_url: NewURL) -> str:
    return new_url(request.param)


def run(url: str, statement: str) -> list[Any]:
    """What a statement gives on a connection of nobody's."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
            return database.execute(statement).fetchall()
    if url.startswith("mysql"):
        with connect_to_mysql(url) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())
    with psycopg.connect(url) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def test_no_history_needs_no_table(sql_url: str) -> None:
    """A database whose sessions have no histories gets no table for them, also by reading and checking."""
    store = opened(sql_url)
    assert (numbers(store), store.history.count(RECORD.id), store.history.delete(RECORD.id)) == ([], 0, False)
    assert list(store.check(repair=True)) == []
    with pytest.raises(Exception, match="persist_history_web"):
        run(sql_url, "SELECT 1 FROM persist_history_web")


def _append_first(store: SessionStore, number: int) -> int:
    return append(store, 1)


def test_the_table_is_made_once(sql_url: str) -> None:
    """Processes that append to a database without the table at the same moment all succeed."""
    opened(sql_url)
    answers = in_processes(partial(open_store, sql_url), _append_first, 6)
    assert sorted(answers) == [1, 2, 3, 4, 5, 6]


def test_names_of_namespaces_do_not_collide(sql_url: str) -> None:
    """Namespaces that are called like tables of others keep sessions and histories of their own."""
    names = ("web", "web_history", "history_web", "key_web", "web_key", "a" * 40, "a" * 39 + "b")
    stores = [opening(sql_url, namespace=name) for name in names]
    for number, store in enumerate(stores, 1):
        store.save(RECORD, expected=0)
        append(store, *range(1, number + 1), key="key")
    assert [store.history.count(RECORD.id) for store in stores] == [1, 2, 3, 4, 5, 6, 7]


def test_a_damaged_row(new_url: NewURL) -> None:
    """SQLite keeps anything anywhere: a row with something else is an error that names it, others can be read."""
    url = new_url("sqlite")
    store = opened(url, 3)
    for damage in "data = 'text'", "created_at = 'soon'":
        run(url, f"UPDATE persist_history_web SET {damage} WHERE seq = 2")
        assert [is_readable(store, seq) for seq in (1, 2, 3)] == [True, False, True]


# Redis ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        yield client


def keys_of(client: redis.Redis, url: str) -> dict[str, str]:
    """The keys of the session and its history, by kind."""
    found = [key.decode() for key in client.keys(f"{url.rpartition('=')[2]}:*{RECORD.id}")]
    return {key.split(":")[-2]: key for key in found}


def test_a_history_lives_as_long_as_its_session(new_url: NewURL, client: redis.Redis) -> None:
    """An append gives the history the time to live of the session, and a save that prolongs that prolongs both."""
    url = new_url("redis")
    store = opened(url)
    append(store, 1, key="key")
    keys = keys_of(client, url)
    assert keys.keys() == {"s", "h", "hk"}
    session = client.pttl(keys["s"])
    # To some seconds, which pass between the questions.
    assert all(client.pttl(key) > session - 60_000 for key in keys.values())
    longer = following(RECORD, expires_at=RECORD.expires_at + 9e6)
    store.save(longer, expected=1)
    assert all(client.pttl(key) > session + 8e9 for key in keys.values())


def test_a_history_of_a_session_that_is_about_to_go(new_url: NewURL, client: redis.Redis) -> None:
    """It is not left for ever, however little time the session has."""
    url = new_url("redis")
    store = opened(url)
    [key] = client.keys(f"{url.rpartition('=')[2]}:*:s:{RECORD.id}")
    client.pexpire(key, 900)
    with suppress(SessionNotFound):
        append(store, 1)
    assert all(client.pttl(key) != -1 for key in keys_of(client, url).values())


def test_a_history_that_was_restored_lives_as_long_as_its_session(new_url: NewURL, client: redis.Redis) -> None:
    """It is not left for ever when the session goes by itself."""
    url = new_url("redis")
    store = opened(url)
    store.history.restore(RECORD.id, [LogEntry(seq=1, data=b"entry 1", created_at=1.0)])
    keys = keys_of(client, url)
    assert client.pttl(keys["h"]) > client.pttl(keys["s"]) - 60_000 > 0


def test_what_the_server_expired(new_url: NewURL, client: redis.Redis) -> None:
    """When a session's own time to live took it, a listing that notices takes the history too."""
    url = new_url("redis")
    store = opened(url)
    append(store, 1, key="key")
    client.delete(keys_of(client, url)["s"])
    assert list(store.scan()) == []
    assert keys_of(client, url) == {}


def test_a_history_has_the_slot_of_its_session(new_url: NewURL, client: redis.Redis) -> None:
    """On a cluster one script reaches them all."""
    url = new_url("redis")
    append(opened(url), 1, key="key")
    slots = {key[key.index("{") : key.index("}")] for key in keys_of(client, url).values()}
    assert slots == {"{" + RECORD.id[:3]}


def test_keys_do_not_pile_up(new_url: NewURL, client: redis.Redis) -> None:
    """However many appends have a key, so many are remembered and no more."""
    url = new_url("redis")
    store = opened(url)
    for number in range(1, 400):
        append(store, number, key=f"key {number}")
    assert client.zcard(keys_of(client, url)["hk"]) == 256


def test_a_damaged_entry_of_a_stream(new_url: NewURL, client: redis.Redis) -> None:
    """An entry that somebody else put there is an error that names it."""
    url = new_url("redis")
    store = opened(url, 1)
    client.xadd(keys_of(client, url)["h"], {"x": "y"}, id="2-0")
    append(store, 3)
    assert [is_readable(store, seq) for seq in (1, 2, 3)] == [True, False, True]


# Costs ----------------------------------------------------------------------------------------------------------------


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the operating system, and bytes read and written by them."""
    counts: Counter[str] = Counter()

    def counted(name: str, call: Any, *arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        answer = call(*arguments, **options)
        counts["bytes"] += len(answer) if name == "pread" else answer if name == "pwrite" else 0
        return answer

    for name in "pread", "pwrite", "open", "stat", "fstat", "unlink", "ftruncate":
        monkeypatch.setattr(os, name, partial(counted, name, getattr(os, name)))
    return counts


def costs_of_files(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    counts = count_calls(monkeypatch)
    costs = []
    for operation in operations(store):
        counts.clear()
        operation()
        costs.append(dict(counts))
    monkeypatch.undo()
    return costs


def operations(store: SessionStore) -> list[Callable[[], object]]:
    log = store.history
    return [
        partial(log.append, RECORD.id, [b"x" * 200], created_at=1.0),
        partial(log.read, RECORD.id, limit=5, newest=True),
        partial(log.count, RECORD.id),
    ]


def test_what_a_long_history_costs_in_files(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10,000 entries an append, a look at the last ones and a count make as many calls and read as many bytes."""
    store = opened(file_url, 10)
    short = costs_of_files(store, monkeypatch)
    for first in range(1, 10_000, 2):
        store.history.append(RECORD.id, [b"%d" % first, b"%d" % first], created_at=1.0)
    long = costs_of_files(store, monkeypatch)
    assert len(short) == len(long) == 3
    for before, after in zip(short, long, strict=True):
        assert before.keys() == after.keys()
        assert all(after[name] <= 1.1 * before[name] for name in before), (before, after)


def test_what_a_place_in_a_long_history_costs_in_files(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read a few in the middle of 10,000 turns takes some 14 looks to find them, and no scan."""
    store = opened(file_url)
    for number in range(1, 10_001):
        append(store, number)
    counts = count_calls(monkeypatch)
    assert numbers(store, before=5001, limit=20, newest=True) == list(range(4981, 5001))
    assert counts["pread"] < 20 * 2 + 14 + 8
    assert counts["bytes"] < 5000


def test_an_entry_of_a_long_turn_is_read_alone(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of many entries that were appended together are read without the others."""
    store = opened(file_url)
    append(store, *range(1, 10_001))
    counts = count_calls(monkeypatch)
    assert numbers(store, after=7000, limit=3) == [7001, 7002, 7003]
    assert counts["bytes"] < 1000


def test_what_a_long_history_costs_on_redis(new_url: NewURL, client: redis.Redis) -> None:
    """With 10,000 entries the server runs as many commands, those within scripts counted."""
    store = opened(new_url("redis"), 10)

    def commands() -> list[dict[str, int]]:
        costs = []
        for operation in operations(store):
            operation()  # the script is known then
            client.config_resetstat()
            operation()
            stats = client.info("commandstats")
            costs.append({name: value["calls"] for name, value in stats.items() if "config" not in name})
        return costs

    short = commands()
    assert not any("cmdstat_pexpire" in costs for costs in short)
    store.history.append(RECORD.id, [b"x"] * 10_000, created_at=1.0)
    assert commands() == short


def test_what_a_long_history_costs_in_sqlite(new_url: NewURL) -> None:
    """With 10,000 entries SQLite takes as many steps of its machine."""
    store: Any = opened(new_url("sqlite"), 10)

    def steps() -> list[int]:
        taken = []
        for operation in operations(store):
            operation()
            count = [0]
            connection = store._database.connection()
            connection.set_progress_handler(lambda count=count: count.__setitem__(0, count[0] + 1), 1)
            operation()
            connection.set_progress_handler(None, 1)
            taken.append(count[0])
        return taken

    short = steps()
    store.history.append(RECORD.id, [b"x"] * 10_000, created_at=1.0)
    assert all(after <= 1.1 * before for before, after in zip(short, steps(), strict=True))


def test_what_a_long_history_costs_in_postgresql(new_url: NewURL) -> None:
    """With 10,000 entries PostgreSQL touches about as many pages: one level more of one index."""
    url = new_url("postgresql")
    store = opened(url, 10)
    store.history.append(RECORD.id, [b"x"] * 10_000, created_at=1.0)
    run(url, "ANALYZE persist_history_web")
    for part in (
        f"SELECT max(seq) FROM persist_history_web WHERE session_id = '{RECORD.id}'",
        (
            f"SELECT data FROM persist_history_web WHERE session_id = '{RECORD.id}' "
            "AND seq BETWEEN 1 AND 9223372036854775807 ORDER BY seq DESC LIMIT 5"
        ),
    ):
        plan = "\n".join(line for (line,) in run(url, f"EXPLAIN (ANALYZE, BUFFERS) {part}"))
        assert "Seq Scan" not in plan
        assert "Sort" not in plan


# Two stores -----------------------------------------------------------------------------------------------------------


def both(new_url: NewURL, entries: int = 5) -> MigratingStore:
    """A new store, and an old one with a session and its history."""
    old = opened(new_url("file"), entries)
    return MigratingStore(opening(new_url("sqlite")), old)


def test_a_history_moves_with_its_session(new_url: NewURL) -> None:
    """When a session is first used its history moves with it, and goes on in the new store."""
    stores = both(new_url)
    assert stores.get(RECORD.id) == RECORD
    assert stores.old.history.count(RECORD.id) == 0
    assert numbers(stores.store) == [1, 2, 3, 4, 5]
    assert append(stores, 6, expected_seq=5) == 6


@pytest.mark.parametrize("use", ["read", "count", "append", "delete", "restore"])
def test_whatever_is_done_to_a_history_moves_it(new_url: NewURL, use: str) -> None:
    """A history that is used before its session is found moves both first."""
    stores = both(new_url)
    log = stores.history
    expected = {"read": [1, 2, 3, 4, 5], "count": 5, "append": 6, "delete": True, "restore": 1}[use]
    entry = LogEntry(seq=6, data=b"entry 6", created_at=1.0)
    done = {
        "read": partial(numbers, stores),
        "count": partial(log.count, RECORD.id),
        "append": partial(append, stores, 6),
        "delete": partial(log.delete, RECORD.id),
        "restore": partial(log.restore, RECORD.id, [entry]),
    }
    assert done[use]() == expected
    assert stores.old.get(RECORD.id) is None
    assert stores.store.get(RECORD.id) == RECORD


@pytest.mark.parametrize("moved", [0, 2, 5])
@pytest.mark.parametrize("then", ["read", "append", "end", "clear", "delete"])
def test_a_move_that_was_cut_off(new_url: NewURL, moved: int, then: str) -> None:
    """A session of whose history a part was moved is moved on when it is used, and what is removed does not come back."""
    stores = both(new_url)
    stores.store.save(RECORD, expected=0)
    stores.store.history.restore(RECORD.id, stores.old.history.read(RECORD.id, limit=moved))
    wanted = [1, 2, 3, 4, 5]
    if then == "append":
        wanted.append(append(stores, 6))
    elif then == "end":
        stores.save(following(RECORD, ended_at=2.0), expected=1)
        assert stores.old.history.count(RECORD.id) == 0
    elif then != "read":
        assert stores.delete(RECORD.id) if then == "delete" else stores.history.delete(RECORD.id)
        wanted = []
    for _ in range(2):
        assert numbers(stores) == wanted


def test_two_that_move_a_history_towards_each_other(new_url: NewURL, monkeypatch: pytest.MonkeyPatch) -> None:
    """While processes have the stores the other way round, as in a rolling restart, none removes what another one moved."""
    stores = both(new_url)
    reverse = MigratingStore(stores.old, stores.store)
    delete = stores.old.delete

    def meanwhile(session_id: str, **options: Any) -> bool:
        monkeypatch.undo()
        assert numbers(reverse) == [1, 2, 3, 4, 5]
        return delete(session_id, **options)

    monkeypatch.setattr(stores.old, "delete", meanwhile)
    assert stores.get(RECORD.id) == RECORD
    assert numbers(stores) == [1, 2, 3, 4, 5]
    assert numbers(reverse) == numbers(stores) == numbers(reverse) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("together", [False, True], ids=["save", "transaction"])
def test_ending_what_a_crash_left_half_moved(new_url: NewURL, together: bool) -> None:
    """A session whose history was not brought over yet has all of it when it ends."""
    old, new = opened(new_url("file"), 3), opening(new_url("sqlite"))
    new.save(RECORD, expected=0)
    stores = MigratingStore(new, old)
    ended = following(RECORD, ended_at=1_700_000_100.0, end_reason="ended")
    if together:
        stores.transaction([Change(record=ended, expected=RECORD.version)])
    else:
        stores.save(ended, expected=RECORD.version)
    assert (old.get(RECORD.id), numbers(stores)) == (None, [1, 2, 3])


def test_a_store_without_histories_takes_no_session_that_has_one(new_url: NewURL) -> None:
    """Rather than lose its history a session stays where it is; one without a history moves."""
    old = opened(new_url("file"), 3)
    stores = MigratingStore(open_store(SimpleCache()), old)
    with pytest.raises(UnsupportedByStore):
        stores.get(RECORD.id)
    assert (old.get(RECORD.id), old.history.count(RECORD.id)) == (RECORD, 3)
    old.history.delete(RECORD.id)
    assert stores.get(RECORD.id) == RECORD


def test_a_migration_copies_histories(new_url: NewURL) -> None:
    """Copying sessions copies their histories; repeating it brings what came meanwhile and leaves what went another way."""
    source, target = opened(new_url("file"), 5), opening(new_url("sqlite"))
    other = make_record(2)
    source.save(other, expected=0)
    source.history.append(other.id, [b"a"], created_at=1.0)
    migration = partial(Migration, source, target, lambda: 1_700_000_200.0)
    migration().run()
    assert (numbers(target), target.history.count(other.id)) == ([1, 2, 3, 4, 5], 1)
    append(source, 6)
    target.history.append(other.id, [b"b"], created_at=1.0)
    source.history.append(other.id, [b"c"], created_at=1.0)
    source.history.append(other.id, [b"d"], created_at=1.0)
    migration().run()
    assert numbers(target) == [1, 2, 3, 4, 5, 6]
    assert [entry.data for entry in target.history.read(other.id)] == [b"a", b"b"]


def damage_entry(store: SessionStore, seq: int) -> None:
    """Damage an entry of a file store."""
    [path] = Path(store._folder).rglob(f"{RECORD.id}.history")  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes().replace(b"entry %d" % seq, b"entry ?"))


def test_a_damaged_history_is_not_moved(new_url: NewURL) -> None:
    """The session moves all the same; its history tells that it is damaged, and nothing of it is lost."""
    stores = both(new_url)
    damage_entry(stores.old, 3)
    assert stores.get(RECORD.id) == stores.get(RECORD.id) == RECORD
    for use in partial(numbers, stores), partial(append, stores, 6), partial(stores.history.count, RECORD.id):
        with pytest.raises(SerializationError, match="entry 3"):
            use()
    stores.save(following(RECORD, ended_at=2.0), expected=1)
    assert [is_readable(stores.old, seq) for seq in (1, 2, 3, 4, 5)] == [True, True, False, True, True]


def test_a_migration_goes_on_behind_a_damaged_history(new_url: NewURL) -> None:
    """A migration copies what comes behind a damaged history, and tells of it."""
    source, target = opened(new_url("file"), 5), opening(new_url("sqlite"))
    damage_entry(source, 3)
    others = [make_record(number) for number in range(2, 8)]
    for other in others:
        source.save(other, expected=0)
        source.history.append(other.id, [b"a"], created_at=1.0)
    report = Migration(source, target, lambda: 1_700_000_200.0).run()
    assert (report.copied, report.different) == (7, (RECORD.id,))
    assert [target.history.count(other.id) for other in others] == [1] * 6


def test_a_damaged_session_takes_no_entry(file_url: str) -> None:
    """Where it cannot be known whether a session has ended nothing is appended to it."""
    store = opened(file_url, 1)
    files_of(file_url)[".session"].write_bytes(b"something else, and longer than the header of a frame")
    with pytest.raises(SerializationError):
        append(store, 2)
    assert numbers(store) == [1]
