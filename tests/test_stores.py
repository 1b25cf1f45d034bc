"""What is special to one store: its files, its connections, its keys, its URL."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import re
import resource
import select
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import peewee as pw
import pytest
import redis
from cachelib import FileSystemCache, NullCache, RedisCache, SimpleCache

from flask_persist_session import (
    Change,
    ConfigError,
    Deletion,
    SerializationError,
    SessionConflict,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoreError,
    StoreUnavailable,
    open_store,
)
from flask_persist_session.serializers import pack_record, values_of
from flask_persist_session.stores import databases
from flask_persist_session.stores.base import add_up
from flask_persist_session.stores.cached import CachedStore
from flask_persist_session.stores.frames import framed
from flask_persist_session.stores.migrating import MigratingStore
from flask_persist_session.stores.sql import SQLStore
from flask_persist_session.stores.tenant import TenantStore
from flask_persist_session.testing import following, in_a_fork, in_processes, make_record
from flask_persist_session.tokens import SHARDS
from tests.conftest import SHARED_STORES
from tests.servers import DEADLINE, RedisServer, Relay, free_port, wait_until

NewURL = Callable[[str], str]


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Takes nothing away from the modes of new files."""
    before = os.umask(0)
    yield
    os.umask(before)


def _modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


# File -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "var" / "sessions"


@pytest.fixture
def file_store(root: Path) -> SessionStore:
    return open_store(f"file://{root}")


def _file_of(root: Path, record: SessionRecord) -> Path:
    [path] = root.rglob(f"{record.id}.session")
    return path


def _save_twice(store: SessionStore, root: Path) -> tuple[SessionRecord, SessionRecord, Path, int]:
    """Two versions, their file, and where the frame of the second starts."""
    first = make_record()
    second = following(first, data=b"second")
    store.save(first, expected=0)
    path = _file_of(root, first)
    end = path.stat().st_size
    store.save(second, expected=1)
    return first, second, path, end


def _flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.usefixtures("open_umask")
def test_file_modes(tmp_path: Path, root: Path) -> None:
    """Every directory is 0700 and every file 0600, whatever the umask: new, rewritten, indexed or a lease."""
    store = open_store(f"file://{root}")
    record = make_record()
    store.save(record, expected=0)
    for version in range(1, 200):
        record = following(record, data=bytes(1000))
        store.save(record, expected=version)
    store.lease("sweep", 60)
    modes = _modes(tmp_path)
    assert {mode for name, mode in modes.items() if (tmp_path / name).is_dir()} == {0o700}
    assert {mode for name, mode in modes.items() if (tmp_path / name).is_file()} == {0o600}
    assert len(modes) > 6


def test_file_torn_tail(file_store: SessionStore, root: Path) -> None:
    """A file that ends anywhere within its last frame is in the state before, and can be saved again."""
    first, second, path, end = _save_twice(file_store, root)
    content = path.read_bytes()
    for cut in range(end, len(content)):
        path.write_bytes(content[:cut])
        assert file_store.get(first.id) == first
        with pytest.raises(SessionConflict):
            file_store.save(following(second), expected=2)
        file_store.save(second, expected=1)
        assert file_store.get(first.id) == second


def test_file_torn_creation(file_store: SessionStore, root: Path) -> None:
    """A file that ends anywhere within its first frame cannot be read, is not listed, and its id can be created."""
    record = make_record()
    file_store.save(record, expected=0)
    path = _file_of(root, record)
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with pytest.raises(SerializationError):
            file_store.get(record.id)
        assert list(file_store.scan()) == []
        file_store.save(record, expected=0)
        assert file_store.get(record.id) == record


class _Killed(BaseException):
    """The end of the process, in the middle of what it does."""


@pytest.mark.parametrize("created", [True, False], ids=["creation", "later save"])
def test_file_forged_frame_in_a_torn_save(
    file_store: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch, created: bool
) -> None:
    """Data that look like a frame are none, even if a save is stopped just behind them, where a frame could end."""
    record = make_record(1, user_id=None)
    forged = framed(9, pack_record(replace(record, version=9, metadata={"forged": True})))
    record = replace(record, data=bytes(5000) + forged + bytes(5000))
    if not created:
        file_store.save(replace(record, data=b"first"), expected=0)
        record = replace(record, version=2)
    stop, pwrite = framed(record.version, pack_record(record)).index(forged) + len(forged), os.pwrite

    def write_until_killed(handle: int, content: bytes, offset: int) -> int:
        pwrite(handle, content[:stop], offset)
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write_until_killed)
        with pytest.raises(_Killed):
            file_store.save(record, expected=record.version - 1)
    assert [found.data for found in file_store.scan()] == ([] if created else [b"first"])
    file_store.save(record, expected=record.version - 1)
    assert file_store.get(record.id) == record


def test_file_flipped_bit_in_the_last_frame(file_store: SessionStore, root: Path) -> None:
    """A bit flipped anywhere in the last frame harms nothing or falls back to the state before, which can be saved."""
    first, second, path, end = _save_twice(file_store, root)
    content = path.read_bytes()
    stuck = []
    for bit in range(end * 8, len(content) * 8):
        path.write_bytes(_flip(content, bit))
        found = file_store.get(first.id)
        assert found in (first, second), f"bit {bit} of {end * 8} to {len(content) * 8}"
        assert found is not None
        try:
            file_store.save(following(found), expected=found.version)
        except SessionConflict:
            stuck.append(bit - end * 8)
    assert stuck == []


def test_file_flipped_bit_in_an_earlier_frame(file_store: SessionStore, root: Path) -> None:
    """A bit flipped anywhere in a frame before the last one does no harm to the last one."""
    first, second, path, end = _save_twice(file_store, root)
    content = path.read_bytes()
    harmed = []
    for bit in range(end * 8):
        path.write_bytes(_flip(content, bit))
        try:
            found = file_store.get(first.id)
        except SerializationError:
            found = None
        if found != second:
            harmed.append(bit)
    assert harmed == []


def test_file_flipped_bit_in_the_only_frame(file_store: SessionStore, root: Path) -> None:
    """A bit flipped anywhere in the only frame harms nothing or is a ``SerializationError``: the id is never free."""
    record = make_record()
    file_store.save(record, expected=0)
    path = _file_of(root, record)
    content = path.read_bytes()
    missing = []
    for bit in range(len(content) * 8):
        path.write_bytes(_flip(content, bit))
        try:
            if file_store.get(record.id) != record:
                missing.append(bit)
        except SerializationError:
            pass
    assert missing == []


def test_file_stays_small(file_store: SessionStore, root: Path) -> None:
    """A session that is saved over and over is rewritten, so its file stays within a few times its record."""
    record = make_record(data=bytes(1000))
    file_store.save(record, expected=0)
    path, largest = _file_of(root, record), 0
    for version in range(1, 300):
        record = following(record)
        file_store.save(record, expected=version)
        largest = max(largest, path.stat().st_size)
    assert 2_000 < largest < 100_000
    assert file_store.get(record.id) == record


def test_file_left_over_temporary_file(file_store: SessionStore, root: Path) -> None:
    """A temporary file that a crash left is in no listing and does not hinder the next rewrite."""
    record = make_record(data=bytes(1000))
    file_store.save(record, expected=0)
    path = _file_of(root, record)
    path.with_name(f"{path.name}.tmp").write_bytes(b"left over" * 10_000)
    assert list(file_store.scan()) == list(file_store.find(SessionQuery(user_id=record.user_id))) == [record]
    for version in range(1, 200):
        record = following(record)
        file_store.save(record, expected=version)
    assert list(file_store.scan()) == [record]
    assert path.stat().st_size < 100_000


def test_file_delete_leaves_nothing(file_store: SessionStore, root: Path) -> None:
    """Deleting a session removes its file and its entry in the index of its user."""
    record = make_record()
    file_store.save(record, expected=0)
    assert len(list(root.rglob(f"{record.id}*"))) == 2
    file_store.delete(record.id)
    assert list(root.rglob(f"{record.id}*")) == []


def test_file_index_entry_of_a_crash(file_store: SessionStore, root: Path) -> None:
    """An index entry whose session is gone, as a crash leaves it, is not listed."""
    record = make_record()
    file_store.save(record, expected=0)
    _file_of(root, record).unlink()
    assert list(file_store.find(SessionQuery(user_id=record.user_id))) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_file_lock_in_a_forked_child(
    file_store: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A child that was forked in the middle of a save does not keep the session locked."""
    record = make_record()
    file_store.save(record, expected=0)
    write, children = os.pwrite, []

    def fork_and_write(*arguments: Any) -> int:
        if not children:
            child = os.fork()
            if child == 0:
                select.select([], [], [], 60)  # lives on with the files it inherited
                os._exit(0)
            children.append(child)
            request.addfinalizer(lambda: (os.kill(child, 9), os.waitpid(child, 0)))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", fork_and_write)
    file_store.save(following(record), expected=1)
    assert children
    later = threading.Thread(target=open_store(f"file://{root}").delete, args=(record.id,), daemon=True)
    later.start()
    later.join(10)
    assert not later.is_alive()
    assert file_store.get(record.id) is None


def test_file_fsync(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``fsync=1`` every save waits for the disk, without it none does."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    open_store(f"file://{root}").save(make_record(1), expected=0)
    assert synced == []
    store = open_store(f"file://{root}?fsync=1")
    store.save(make_record(2), expected=0)
    created = len(synced)
    store.save(following(make_record(2)), expected=1)
    assert 0 < created < len(synced)


def test_file_removals_keep_few_files_open(file_store: SessionStore) -> None:
    """However many sessions are removed at once, their files are closed on the way, and all at the end."""
    records = [make_record(number) for number in range(600)]
    file_store.save_many([Change(record=record, expected=0) for record in records])
    before, limits = _open_handles(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 250, limits[1]))
    try:
        removed = file_store.delete_many([Deletion(id=record.id, expected=1) for record in records])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert removed == [True] * 600
    assert _open_handles() == before


def _open_handles() -> set[int]:
    return {handle for handle in map(int, os.listdir("/dev/fd")) if _is_open(handle)}


def _is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False  # the one that listed them
    return True


# SQL ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Process and thread of each connection to SQLite that is made from now on."""
    made: list[tuple[int, int]] = []
    connect = sqlite3.connect

    def noted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        made.append((os.getpid(), threading.get_ident()))
        return connect(*arguments, **options)

    monkeypatch.setattr("sqlite3.connect", noted)
    monkeypatch.setattr("sqlite3.dbapi2.connect", noted)
    return made


@pytest.mark.parametrize("at_once", [800, 50, 1])
@pytest.mark.parametrize("size", [100, 100_000])
def test_sqlite_copies_its_log_in_a_thread_that_ends(
    database: Path, connections: list[tuple[int, int]], at_once: int, size: int
) -> None:
    """After many changes another thread empties the log on a connection of its own, not a request; closing waits for it."""
    other = sqlite3.connect(database)  # so that closing does not empty it
    connections.clear()
    store, count = open_store(f"sqlite:///{database}"), 800 if size == 100 else 150
    changes = [Change(record=make_record(number, data=bytes(size)), expected=0) for number in range(count)]
    for start in range(0, count, at_once):
        if at_once > 1:
            assert all(store.save_many(changes[start : start + at_once]))
        else:
            store.save(changes[start].record, expected=0)
    threads = {thread for _, thread in connections}
    assert len(threads) == 2
    alone = {threading.get_ident()}
    wait_until(lambda: threads & {thread.ident for thread in threading.enumerate()} <= alone, "the end of the thread")
    store.save(make_record(count), expected=0)  # not again so soon
    assert len(connections) == 2
    store.close()
    assert threads & {thread.ident for thread in threading.enumerate()} <= {threading.get_ident()}
    assert database.stat().st_size > count * size * 0.7
    other.close()


def test_sqlite_empties_its_log_again_and_again(database: Path) -> None:
    """However much is saved while others read and write, the log does not grow without end."""
    store, other = open_store(f"sqlite:///{database}"), open_store(f"sqlite:///{database}")
    for start in range(0, 12_000, 600):
        records = [make_record(number, user_id=None, data=bytes(3000)) for number in range(start, start + 600)]
        assert all(store.save_many([Change(record=record, expected=0) for record in records]))
        other.save(make_record(20_000 + start), expected=0)
    store.close()
    # Twice as much was written. How long it gets depends on when the thread that empties it has its turn.
    assert Path(f"{database}-wal").stat().st_size < 30_000_000
    other.close()


def test_sqlite_empties_a_log_that_others_add_to(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long log is begun anew though others write on, who are held up for what came after the last copy only."""
    store, other, run = open_store(f"sqlite:///{database}"), sqlite3.connect(database), databases._SQLite._run
    other.execute("CREATE TABLE other (data)")
    saves, left = itertools.chain([500], itertools.repeat(1)), list[int]()

    def run_beside_others(self: Any, sql: str, parameters: Any = None) -> Any:
        if "RESTART" in sql:
            frames = Path(f"{database}-shm").read_bytes()  # how many there are, how many are copied
            left.append(int.from_bytes(frames[16:20], sys.byteorder) - int.from_bytes(frames[96:100], sys.byteorder))
        found = run(self, sql, parameters)
        if "PASSIVE" in sql:
            with closing(sqlite3.connect(database)) as writer, writer:
                writer.execute("INSERT INTO other VALUES (zeroblob(?))", (next(saves) * 4096,))
        return found

    monkeypatch.setattr(databases._SQLite, "_run", run_beside_others)
    assert all(store.save_many([Change(record=make_record(n, data=bytes(100_000)), expected=0) for n in range(250)]))
    store.close()
    other.execute("CREATE TABLE another (data)")
    assert other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1] < 1000
    assert [frames < 10 for frames in left] == [True]
    other.close()


def test_sqlite_writers_do_not_wait_for_a_long_reader(database: Path) -> None:
    """The log cannot be emptied behind somebody who reads for long, as a backup does, and nobody waits until it can."""
    store, done = open_store(f"sqlite:///{database}"), threading.Event()
    store.save_many([Change(record=make_record(10_000 + number), expected=0) for number in range(600)])  # read in two pages

    def save_on() -> None:
        other = open_store(f"sqlite:///{database}?timeout=1")
        for number in itertools.count(20_000):
            other.save(make_record(number), expected=0)
            if done.wait(0.001):
                break
        other.close()

    with closing(store.snapshot()) as reading, ThreadPoolExecutor(1) as pool:
        next(reading)
        saving = pool.submit(save_on)
        for start in range(0, 6000, 600):
            records = [make_record(number, user_id=None, data=bytes(3000)) for number in range(start, start + 600)]
            assert all(store.save_many([Change(record=record, expected=0) for record in records]))
        store.close()
        done.set()
        saving.result(DEADLINE)


def test_sqlite_saves_while_the_interpreter_ends(database: Path) -> None:
    """Where no thread can be started any more, the commit after many empties the log."""
    script = (
        "import atexit, sys\n"
        "from flask_persist_session import Change, open_store\n"
        "from flask_persist_session.testing import make_record\n"
        "store = open_store(sys.argv[1])\n"
        "def save():\n"
        "    for number in range(900):\n"
        "        store.save(make_record(number), expected=0)\n"
        "    log = store._database.connection().execute('PRAGMA wal_checkpoint(PASSIVE)')\n"
        "    print(0 <= log.fetchone()[1] < 1000)\n"
        "    store.close()\n"
        "atexit.register(save)\n"
    )
    command = [sys.executable, "-c", script, f"sqlite:///{database}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    store = open_store(f"sqlite:///{database}")
    assert store.count(SessionQuery()) == 900
    store.close()


def test_sqlite_leaves_the_log_to_no_commit(database: Path) -> None:
    """Behind a backup it grows, and the first commit afterwards would copy it: a request took 60 ms. 400 MB end it."""
    store = open_store(f"sqlite:///{database}")
    store.save(make_record(), expected=0)
    assert isinstance(store, SQLStore)
    assert store._database.connection().execute("PRAGMA wal_autocheckpoint").fetchone() == (100_000,)
    store.close()


def test_sqlite_empties_a_log_that_was_left_long(database: Path, connections: list[tuple[int, int]]) -> None:
    """Nobody counted what those wrote who are gone: so the first change of a process has it copied, and no later one."""
    other = sqlite3.connect(database)
    other.executescript("PRAGMA journal_mode = wal; PRAGMA wal_autocheckpoint = 0; CREATE TABLE other (data)")
    with other:
        other.execute("INSERT INTO other VALUES (zeroblob(30000000))")
    connections.clear()
    store = open_store(f"sqlite:///{database}")
    for number in range(3):
        store.save(make_record(number), expected=0)
    store.close()
    assert len(connections) == 2
    assert database.stat().st_size > 30_000_000
    other.close()


def test_sqlite_histories_have_their_log_copied_beside_too(database: Path, connections: list[tuple[int, int]]) -> None:
    """What is appended counts like what is saved, so that no request has to copy all of it."""
    store = open_store(f"sqlite:///{database}")
    store.save(make_record(), expected=0)
    connections.clear()
    for number in range(200):
        store.history.append(make_record().id, [bytes(100_000)], created_at=float(number))
    assert {thread for _, thread in connections} - {threading.get_ident()}
    store.close()


def test_sqlite_counts_text_as_well(database: Path, connections: list[tuple[int, int]]) -> None:
    """Metadata fill the log as data do, so after as many bytes another thread empties it."""
    store = open_store(f"sqlite:///{database}")
    for number in range(150):
        store.save(make_record(number, metadata={"page": "x" * 100_000}), expected=0)
    assert {thread for _, thread in connections} - {threading.get_ident()}
    store.close()


def test_sqlite_is_closed_once_closing_returns(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that empties the log is closed as well then, however long its thread takes to end."""
    ends, forget = threading.Event(), databases._Closer.__del__

    def forget_late(closer: databases._Closer) -> None:
        ends.wait(DEADLINE)
        forget(closer)

    store = open_store(f"sqlite:///{database}")
    assert all(store.save_many([Change(record=make_record(number), expected=0) for number in range(900)]))
    monkeypatch.setattr(databases._Closer, "__del__", forget_late)
    try:
        store.close()
        assert os.listdir(database.parent) == [database.name]
    finally:
        ends.set()


def test_sqlite_saves_on_where_its_log_cannot_be_emptied(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed is in the log: neither who saves next nor who closes is told that it could not be copied yet."""
    store, tried = open_store(f"sqlite:///{database}"), list[int]()

    def fails(self: Any) -> int:
        tried.append(threading.get_ident())
        raise pw.OperationalError("disk I/O error")

    monkeypatch.setattr(databases._SQLite, "_copy_log", fails)
    for start in 0, 900:
        changes = [Change(record=make_record(start + number), expected=0) for number in range(900)]
        assert all(store.save_many(changes))
    store.close()
    assert len(tried) == 2
    assert store.count(SessionQuery()) == 1800
    store.close()


def test_sqlite_empties_its_log_once_at_a_time(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes, no second thread begins meanwhile; the next one comes after it."""
    begun, goes_on = list[int](), threading.Event()

    def wait(self: Any) -> None:
        begun.append(threading.get_ident())
        goes_on.wait(DEADLINE)

    monkeypatch.setattr(databases, "_PAGES_TO_EMPTY", 10)
    monkeypatch.setattr(databases._SQLite, "_empty_log_here", wait)
    store = open_store(f"sqlite:///{database}")
    for number in range(20):
        store.save(make_record(number), expected=0)
    wait_until(lambda: begun, "the thread that empties the log")
    assert len(begun) == 1
    goes_on.set()
    store._database.settle()
    store.save(make_record(20), expected=0)
    store.close()
    assert len(begun) == 2


def test_sqlite_empties_its_log_after_a_transaction(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not within it: what is not committed cannot be copied yet."""
    monkeypatch.setattr(databases, "_PAGES_TO_EMPTY", 1)
    within: list[bool] = []
    monkeypatch.setattr(databases._SQLite, "_empty_log_beside", lambda self: within.append(self.in_transaction()))
    store = open_store(f"sqlite:///{database}")
    store.get(make_record().id)
    within.clear()
    store.transaction([Change(record=make_record(number), expected=0) for number in range(5)])
    assert within == [False]
    store.close()


def test_a_fork_in_a_transaction_waits_until_the_log_is_emptied(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child would inherit the connection of a thread that it does not have, and the locks of SQLite itself."""
    store = open_store(f"sqlite:///{database}")
    store.save(make_record(), expected=0)
    settled: list[int] = []
    monkeypatch.setattr(store._database, "settle", lambda: settled.append(os.getpid()))
    with store._database.atomic():
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert settled == [os.getpid()]
    store.close()


@pytest.mark.usefixtures("open_umask")
def test_sqlite_modes(tmp_path: Path, database: Path) -> None:
    """The database and the files beside it can be read by its owner alone, whatever the umask."""
    store = open_store(f"sqlite:///{database}")
    store.save(make_record(), expected=0)
    assert _modes(tmp_path) == dict.fromkeys(("sessions.db", "sessions.db-wal", "sessions.db-shm"), 0o600)
    store.close()


def test_sqlite_wal(database: Path) -> None:
    """The database is in WAL mode, so readers and a writer do not wait for each other."""
    store = open_store(f"sqlite:///{database}")
    store.save(make_record(), expected=0)
    other = sqlite3.connect(database)
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.execute("BEGIN IMMEDIATE")
    assert store.get(make_record().id) == make_record()
    other.close()
    store.close()


def test_sqlite_locked(database: Path) -> None:
    """A save that waits for a lock longer than the timeout is a ``StoreUnavailable``, and succeeds later."""
    store = open_store(f"sqlite:///{database}?timeout=0.05")
    store.get(make_record().id)
    other = sqlite3.connect(database)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable):
        store.save(make_record(), expected=0)
    other.close()
    store.save(make_record(), expected=0)
    assert store.get(make_record().id) == make_record()
    store.close()


@pytest.mark.parametrize("changes", [1, 100], ids=["one", "many"])
def test_sqlite_looks_for_the_lock_often(database: Path, monkeypatch: pytest.MonkeyPatch, changes: int) -> None:
    """Whoever waits for the lock looks at it every 5 ms however long it waits, and has it when it is free."""
    store, other, pauses = open_store(f"sqlite:///{database}"), sqlite3.connect(database), list[float]()
    store.get(make_record().id)
    other.execute("BEGIN IMMEDIATE")

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 50:
            other.rollback()

    monkeypatch.setattr(databases.time, "sleep", sleep)
    assert all(store.save_many([Change(record=make_record(number), expected=0) for number in range(changes)]))
    waited = [pause for pause in pauses if pause]
    assert 48 <= len(waited) <= 50
    assert min(waited) == waited[0] < max(waited) <= 0.005
    other.close()
    store.close()


def test_sqlite_inserts_many_in_a_single_statement(database: Path) -> None:
    """The lock is taken once the values are bound, and there is no moment at which who has it waits for other threads."""
    store, statements = open_store(f"sqlite:///{database}"), list[str]()
    store.get(make_record().id)
    store._database.connection().set_trace_callback(statements.append)  # type: ignore[attr-defined]
    changes = [Change(record=make_record(number), expected=0) for number in range(600)]
    assert all(store.save_many(changes))
    assert [statement.split()[0] for statement in statements] == ["PRAGMA", "INSERT"]
    statements.clear()
    assert not any(store.save_many(changes))
    begun = [statement[:12] for statement in statements]
    assert begun == ["PRAGMA cache", "INSERT INTO ", *["SELECT COUNT"] * 2]  # only so many ids are in one statement
    store.close()


def test_sqlite_binds_no_value_of_a_column_that_no_row_fills(database: Path) -> None:
    """To bind None takes its driver longer than any other value."""
    store = open_store(f"sqlite:///{database}")
    empty = {"tenant_id": None, "ended_at": None, "end_reason": None}
    rows = [values_of(make_record(number, **empty)) for number in range(3)]  # type: ignore[attr-defined]
    statement, values = store._insert_new.of_rows(rows)  # type: ignore[attr-defined]
    assert (statement.count("NULL"), statement.count("?"), len(values)) == (9, 27, 27)
    assert None not in values
    store.close()


def test_sqlite_waits_for_the_lock_before_it_binds_many_values(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once without; then each look at the lock is a ``BEGIN``, for which nothing is bound."""
    store, looks, tried = open_store(f"sqlite:///{database}"), list[float](), list[int]()
    store.get(make_record().id)
    execute = pw.SqliteDatabase.execute_sql
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")

        def sleep(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 20:
                other.rollback()

        def noted(self: Any, sql: str, values: Any = None) -> Any:
            tried.append(len(values or ()))
            return execute(self, sql, values)

        monkeypatch.setattr(pw.SqliteDatabase, "execute_sql", noted)
        monkeypatch.setattr(databases.time, "sleep", sleep)
        assert all(store.save_many([Change(record=make_record(number), expected=0) for number in range(100)]))
    assert len([values for values in tried if values]) == 2
    assert store.count(SessionQuery()) == 100
    store.close()


def test_sqlite_tries_many_once_where_no_lock_is_in_the_way(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that waiting does not mend is told at once."""
    store, tried = open_store(f"sqlite:///{database}"), list[str]()
    store.get(make_record().id)
    execute = pw.SqliteDatabase.execute_sql

    def fails(self: Any, sql: str, values: Any = None) -> Any:
        tried.append(sql.split()[0])
        if tried[-1] == "INSERT":
            raise pw.OperationalError("database or disk is full")
        return execute(self, sql, values)

    monkeypatch.setattr(pw.SqliteDatabase, "execute_sql", fails)
    with pytest.raises(StoreError, match="full"):
        store.save_many([Change(record=make_record(number), expected=0) for number in range(100)])
    assert tried.count("INSERT") == 1
    store.close()


def test_sqlite_empties_its_log_of_large_descriptions_too(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata and tags take pages like data; many rows together are counted like single ones."""
    store, size = open_store(f"sqlite:///{database}"), 20 * 4096
    monkeypatch.setattr(databases._SQLite, "_empty_log_beside", lambda self: None)
    counted = []
    for start, fields in enumerate(
        [{"data": b"x" * size}, {"metadata": {"a": "x" * size}}, {"tags": frozenset({"x" * size})}]
    ):
        changes = [Change(record=make_record(start * 100 + number, **fields), expected=0) for number in range(100)]
        before = store._database._pages  # type: ignore[attr-defined]
        assert all(store.save_many(changes))
        counted.append(store._database._pages - before)  # type: ignore[attr-defined]
    assert min(counted) > 2000
    store.close()


def test_sqlite_inserts_rows_of_several_statements_together(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older releases take few values at once. If one of them is there, the others are stored all the same, each once."""
    monkeypatch.setattr(databases._SQLite, "rows_at_once", 30)
    store, statements = open_store(f"sqlite:///{database}"), list[str]()
    changes = [Change(record=make_record(number), expected=0) for number in range(200)]
    assert all(store.save_many(changes[:100]))
    store._database.connection().set_trace_callback(statements.append)  # type: ignore[attr-defined]
    assert all(store.save_many(changes[100:]))
    assert [statement.split()[0] for statement in statements] == ["PRAGMA", "BEGIN", *["INSERT"] * 4, "COMMIT"]
    store.delete(changes[50].id)
    assert store.save_many(changes) == [change is changes[50] for change in changes]
    assert store.count(SessionQuery()) == 200
    store.close()


def test_sqlite_waits_for_no_table_whose_name_says_locked(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error whose message has the word in a name only is told at once."""
    store, pauses = open_store(f"sqlite:///{database}?timeout=0.05"), list[float]()
    unlocked = store.namespace("unlocked")
    unlocked.get(make_record().id)
    with closing(sqlite3.connect(database)) as other:
        other.execute("DROP TABLE persist_session_unlocked")
    monkeypatch.setattr(databases.time, "sleep", pauses.append)
    with pytest.raises(StoreError, match="no such table: persist_session_unlocked"):
        unlocked.get(make_record().id)
    assert pauses == []
    store.close()


def test_sqlite_waits_for_nothing_but_a_lock(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that waiting does not mend is told at once, and so is any within a transaction, which holds up others."""
    store, pauses = open_store(f"sqlite:///{database}?timeout=1"), list[float]()
    store.get(make_record().id)
    monkeypatch.setattr(databases.time, "sleep", pauses.append)

    def fails() -> None:
        raise pw.OperationalError("database is locked")

    with pytest.raises(pw.OperationalError, match="no such table"):
        store._database.execute_sql("SELECT * FROM lost")
    with pytest.raises(pw.OperationalError, match="locked"), store._database.atomic():
        store._database._once_free(fails)
    assert pauses == []
    store.close()


def test_sqlite_store_that_nobody_has_any_more(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is closed at once, also by who made the tables: a child process would take over its locks."""
    closed, close = list[object](), databases._Closer.__del__
    monkeypatch.setattr(databases._Closer, "__del__", lambda closer: (close(closer), closed.append(closer)))
    gc.disable()
    try:
        open_store(f"sqlite:///{database}").transaction([Change(record=make_record(), expected=0)])
        assert len(closed) == 1
    finally:
        gc.enable()


def test_sqlite_connection_of_each_thread(database: Path, connections: list[tuple[int, int]]) -> None:
    """Each thread has a connection of its own, made by itself and used again."""
    store = open_store(f"sqlite:///{database}")
    idents = []

    def use() -> None:
        idents.append(threading.get_ident())
        store.get(make_record().id)
        store.get(make_record().id)
        store.close()

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert connections == [(os.getpid(), ident) for ident in idents]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sqlite_connection_after_a_fork(database: Path, connections: list[tuple[int, int]]) -> None:
    """The forking thread closes its connection before, so that parent and child each make a new one of their own."""
    store = open_store(f"sqlite:///{database}")
    store.save(make_record(), expected=0)
    before = len(connections)

    def child() -> tuple[int, int, SessionRecord | None]:
        found = store.get(make_record().id)
        return os.getpid(), connections[-1][0], found

    process, connected, found = in_a_fork(child)
    assert (process, found) == (connected, make_record())
    store.save(following(make_record()), expected=1)
    assert [process for process, _ in connections[before:]] == [os.getpid()]
    store.close()


def test_sqlite_newer_schema(database: Path) -> None:
    """A table of a version that this release does not know is a ``StoreError`` that names the version."""
    store = open_store(f"sqlite:///{database}")
    store.save(make_record(), expected=0)
    store.close()
    with sqlite3.connect(database) as other:
        other.execute("UPDATE persist_schema SET version = 99")
    other.close()
    store = open_store(f"sqlite:///{database}")
    with pytest.raises(StoreError, match="version 99"):
        store.get(make_record().id)
    store.close()


def test_sqlite_indexes_of_each_namespace(database: Path) -> None:
    """The table of every namespace has the same indexes, by user and by expiry."""
    for namespace in ("web", "chat"):
        store = open_store(f"sqlite:///{database}", namespace=namespace)
        store.save(make_record(), expected=0)
        store.close()
    connection = sqlite3.connect(database)
    indexes = {
        namespace: {
            (unique, tuple(column for *_, column in connection.execute(f"PRAGMA index_info({name})")))
            for _, name, unique, *_ in connection.execute(f"PRAGMA index_list(persist_session_{namespace})")
        }
        for namespace in ("web", "chat")
    }
    connection.close()
    by_hour, by_user = (None,), (None, "user_id", "tenant_id")  # neither hour nor shard is a column
    assert indexes["web"] == {(0, by_hour), (0, by_user), (1, ("id",))}
    assert indexes["chat"] == indexes["web"]


@pytest.mark.parametrize("name", ["web_user", "chat_expiry", "web_pkey"])
def test_sqlite_namespace_of_the_name_of_an_index(database: Path, name: str) -> None:
    """A namespace whose table would be called like an index of another table is refused, by whichever way it comes."""
    store = open_store(f"sqlite:///{database}")
    with pytest.raises(ConfigError, match=name):
        store.namespace(name)
    with pytest.raises(ConfigError, match=name):
        open_store(f"sqlite:///{database}", namespace=name)


def test_sqlite_statistics_need_not_read_data(database: Path) -> None:
    """Data is the last column, so that nothing is behind it, and an index alone tells users and tenants, to be sorted."""
    store = open_store(f"sqlite:///{database}")
    store.save(make_record(), expected=0)
    store.close()
    connection = sqlite3.connect(database)
    columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(persist_session_web)")]
    plan = connection.execute(
        "EXPLAIN QUERY PLAN SELECT COUNT(*) FROM persist_session_web GROUP BY user_id, tenant_id"
    ).fetchall()
    connection.close()
    assert columns[-1] == "data"
    assert plan[0][-1] == "SCAN persist_session_web USING COVERING INDEX persist_session_web_user"


def test_sqlite_finds_the_sessions_of_a_user_by_an_index(database: Path) -> None:
    """Also where they are counted, or those of one tenant are asked for."""
    store, statements = open_store(f"sqlite:///{database}"), list[str]()
    store.save(make_record(), expected=0)
    connection = store._database.connection()  # type: ignore[attr-defined]
    connection.set_trace_callback(statements.append)
    for query in SessionQuery(user_id="alice"), SessionQuery(user_id="alice", tenant_id="acme"):
        assert (len(list(store.find(query))), store.count(query)) == (1, 1)
    connection.set_trace_callback(None)
    plans = [connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchone()[-1] for statement in statements]
    by_user = "SEARCH t1 USING INDEX persist_session_web_user (<expr>=? AND user_id=?"
    assert plans == [f"{by_user})"] * 2 + [f"{by_user} AND tenant_id=?)"] * 2
    store.close()


def test_sqlite_stores_sessions_in_the_order_of_their_ids_in_few_pages(database: Path) -> None:
    """As a restore does: of the index by user it changes those of a few shards, and not one page for each session."""
    records = sorted((make_record(number, user_id=f"user {number}") for number in range(6000)), key=attrgetter("id"))
    store = open_store(f"sqlite:///{database}")
    assert all(store.save_many([Change(record=record, expected=0) for record in records[:5800]]))
    store._database.settle()  # type: ignore[attr-defined]
    with closing(sqlite3.connect(database)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert all(store.save_many([Change(record=record, expected=0) for record in records[5800:]]))
        _, pages, _ = other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    assert pages < 40
    store.close()


def test_sqlite_takes_many_changes_from_one_thread(database: Path) -> None:
    """Others would only wait for its lock; so it is behind a cache, before an old store and for a tenant."""
    sqlite, memory = open_store(f"sqlite:///{database}"), open_store(SimpleCache())
    assert memory.writers == 2
    around = [CachedStore(sqlite, SimpleCache()), MigratingStore(sqlite, memory), TenantStore(sqlite, "acme")]
    assert [store.writers for store in (sqlite, *around)] == [1] * 4


def test_sqlite_no_database(database: Path) -> None:
    """A file that is no database is a ``StoreError``, and stays as it was."""
    database.write_bytes(b"no database at all" * 1000)
    store = open_store(f"sqlite:///{database}")
    with pytest.raises(StoreError):
        store.save(make_record(), expected=0)
    assert database.read_bytes() == b"no database at all" * 1000


def test_sqlite_relative_path(tmp_path: Path) -> None:
    """A relative path starts at the base path, and its directory is made."""
    store = open_store("sqlite:///data/sessions.db", base_path=str(tmp_path))
    store.save(make_record(), expected=0)
    assert (tmp_path / "data" / "sessions.db").is_file()
    store.close()


def _create_in_each(urls: list[str], store: SessionStore, number: int) -> None:
    for url in urls:
        opened = open_store(url)
        opened.save(make_record(number), expected=0)
        opened.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mysql"])
def test_sql_database_made_by_many(new_url: NewURL, kind: str) -> None:
    """Eight processes that come at once to a new database make its tables once and all go on."""
    urls = [new_url(kind) for _ in range(3)]
    in_processes(partial(open_store, "memory://"), partial(_create_in_each, urls), count=8)
    for url in urls:
        store = open_store(url)
        assert store.count(SessionQuery()) == 8
        store.close()


@pytest.mark.parametrize("there", [(), (7,), range(1100)], ids=["none", "one", "all"])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mysql"])
def test_sql_many_new_sessions(new_url: NewURL, kind: str, there: Sequence[int]) -> None:
    """Those that are missing are stored, with every field; one that is there is a conflict, and stays as it is."""
    store = open_store(new_url(kind))
    assert all(store.save_many([Change(record=make_record(number, data=b"old"), expected=0) for number in there]))
    records = [make_record(number, tenant_id="acme" if number % 3 else None, ended_at=None) for number in range(1100)]
    outcomes = store.save_many([Change(record=record, expected=0) for record in records])
    assert outcomes == [number not in there for number in range(1100)]
    expected = [make_record(number, data=b"old") if number in there else records[number] for number in range(1100)]
    assert list(store.find(SessionQuery(order_by="id"))) == sorted(expected, key=lambda record: record.id)
    store.close()


def test_postgresql_is_asked_for_no_conflict(new_url: NewURL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server would log the statement of each batch of a restore that meets a session which is there."""
    refused: list[BaseException] = []
    store = open_store(new_url("postgresql"))
    changes = [Change(record=make_record(number), expected=0) for number in range(150)]
    assert all(store.save_many(changes))
    run = databases._PostgreSQL.execute_sql

    def noted(self: Any, sql: str, values: Any = None) -> Any:
        try:
            return run(self, sql, values)
        except pw.PeeweeException as error:
            refused.append(error)
            raise

    monkeypatch.setattr(databases._PostgreSQL, "execute_sql", noted)
    assert store.save_many([*changes, Change(record=make_record(150), expected=0)]) == [False] * 150 + [True]
    assert not any(store.save_many(changes))
    assert not refused
    store.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mysql"])
def test_sql_many_new_sessions_of_which_one_comes_twice(new_url: NewURL, kind: str) -> None:
    """The first of the two is stored, and the second one is a conflict."""
    store = open_store(new_url(kind))
    changes = [Change(record=make_record(number), expected=0) for number in range(150)]
    again = Change(record=make_record(3, data=b"again"), expected=0)
    assert store.save_many([*changes, again]) == [True] * 150 + [False]
    assert store.save_many([*changes, again]) == [False] * 151
    assert store.get(again.id) == changes[3].record
    store.close()


@pytest.mark.parametrize(("kind", "count"), [("sqlite", 260_000), ("postgresql", 70_000), ("mysql", 70_000)])
def test_sql_query_of_many_ids(new_url: NewURL, kind: str, count: int) -> None:
    """A query may name more ids than a statement can have parameters."""
    store = open_store(new_url(kind))
    store.save(make_record(), expected=0)
    query = SessionQuery(ids=frozenset({make_record().id, *(f"{number:067x}" for number in range(count))}))
    assert list(store.find(query)) == [make_record()]
    assert store.count(query) == 1
    store.close()


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


def _keys(client: redis.Redis) -> list[str]:
    return [key.decode() for key in client.scan_iter(count=1000)]


def test_redis_hash_tag(client: redis.Redis, redis_store: SessionStore) -> None:
    """Every key of a session carries its shard as hash tag, whatever its user is called, so they share a slot."""
    record = make_record(user_id="{other} }{")
    redis_store.save(record, expected=0)
    tags = {key[key.index("{") + 1 : key.index("}")] for key in _keys(client)}
    assert tags == {record.id[:3]}


def test_redis_time_to_live(client: redis.Redis, redis_store: SessionStore) -> None:
    """Every key of a session has a time to live, which ends later than the session."""
    now = time.time()
    for number, lifetime in enumerate((100.0, 1e6, 1.0)):
        redis_store.save(make_record(number, accessed_at=now, expires_at=now + lifetime), expected=0)
    times = {key: client.pttl(key) / 1000 for key in _keys(client)}
    hashes = [left for key, left in times.items() if ":s:" in key]
    assert len(hashes) == 3
    assert min(hashes) > 100
    assert [key for key, left in times.items() if ":s:" not in key and left <= 1e6] == []


@pytest.mark.parametrize(
    "query", [SessionQuery(), SessionQuery(user_id="alice"), SessionQuery(expires_before=1e12)], ids=str
)
def test_redis_prunes(client: redis.Redis, redis_store: SessionStore, query: SessionQuery) -> None:
    """A listing takes a session whose key is gone out of every index, and leaves the others there."""
    kept, gone = make_record(1), make_record(2)
    redis_store.save(kept, expected=0)
    redis_store.save(gone, expected=0)
    [key] = client.scan_iter(f"*:s:{gone.id}", count=1000)
    client.delete(key)
    members = _index_members(client, gone.id)
    assert list(redis_store.find(query)) == [kept]
    assert _index_members(client, gone.id) == 0
    assert _index_members(client, kept.id) == members


def _index_members(client: redis.Redis, session_id: str) -> int:
    """In how many indexes a session is."""
    indexes = [key for key in client.scan_iter(count=1000) if client.type(key) == b"zset"]
    facts = [key for key in client.scan_iter(count=1000) if key.endswith(b":facts")]
    return sum(client.zscore(key, session_id) is not None for key in indexes) + sum(
        client.hexists(key, session_id) for key in facts
    )


def _key_of(client: redis.Redis, record: SessionRecord) -> bytes:
    [key] = client.scan_iter(f"*:s:{record.id}", count=1000)
    return key


def test_redis_stats_without_what_ended_by_itself(client: redis.Redis, redis_store: SessionStore) -> None:
    """A session whose key's own time to live has ended is not counted, though nothing told the indexes."""
    kept, gone, late = make_record(1), make_record(2), make_record(3, expires_at=time.time() + 1000)
    for record in kept, gone, late:
        redis_store.save(record, expected=0)
    client.delete(_key_of(client, gone))
    assert redis_store.stats(now=100.0) == add_up(iter([kept, late]), 100.0)
    assert _index_members(client, gone.id) == 0


@pytest.mark.parametrize("damage", ["hdel", "hset"])
def test_redis_stats_without_facts(client: redis.Redis, redis_store: SessionStore, damage: str) -> None:
    """Where the facts of a session are missing or damaged, the sessions themselves are counted, and it can be deleted."""
    records = [make_record(number, user_id=None, tenant_id=f"tenant {number}") for number in range(5)]
    for record in records:
        redis_store.save(record, expected=0)
    [key] = client.scan_iter(f"*{{{records[3].id[:3]}}}:facts", count=1000)
    client.execute_command(damage, key, records[3].id, *(["junk"] if damage == "hset" else []))
    assert redis_store.stats(now=100.0) == add_up(iter(records), 100.0)
    assert redis_store.delete(records[3].id)
    assert _index_members(client, records[3].id) == 0


def test_redis_saves_write_indexes_only_when_needed(client: redis.Redis, redis_store: SessionStore) -> None:
    """A change that keeps expiry and size writes the session alone, one of another size its facts too."""
    record = make_record(data=b"12345")
    redis_store.save(record, expected=0)
    same, longer = following(record, data=b"54321"), following(following(record), data=b"123456")
    assert _written(client, partial(redis_store.save, same, expected=1)) == ["HSET"]
    assert _written(client, partial(redis_store.save, longer, expected=2)) == ["HSET", "HSET"]


def _written(client: redis.Redis, call: Callable[[], object]) -> list[str]:
    """The writing commands of the scripts that *call* runs, as the server sees them."""
    with client.monitor() as monitor:
        client.ping()
        call()
        client.echo("the end")
        commands = iter(monitor.next_command, None)
        seen = itertools.takewhile(lambda command: command["command"] != "ECHO the end", commands)
        inside = [command["command"].split()[0].upper() for command in seen if command["client_type"] == "lua"]
    return [name for name in inside if name not in ("HMGET", "HGET")]


def _scripts(client: redis.Redis, call: Callable[[], object]) -> list[list[str]]:
    """The sessions of each script that *call* runs, as the server sees them."""
    with client.monitor() as monitor:
        client.ping()
        call()
        client.echo("the end")
        commands = (command["command"] for command in iter(monitor.next_command, None))
        seen = itertools.takewhile(lambda command: command != "ECHO the end", commands)
        return [re.findall(r":s:([0-9a-f]{67})", command) for command in seen if command.startswith("EVAL")]


def test_redis_saves_many_of_a_shard_with_few_scripts(client: redis.Redis, redis_store: SessionStore) -> None:
    """Sessions of a shard that follow each other are created, saved and deleted two hundred by a script."""
    records = [make_record(number) for number in range(250)]
    steps: list[Callable[[], object]] = [
        partial(redis_store.save_many, [Change(record=record, expected=0) for record in records]),
        partial(redis_store.save_many, [Change(record=following(record), expected=1) for record in records]),
        partial(redis_store.delete_many, [Deletion(id=record.id, expected=2) for record in records]),
    ]
    for step, left in zip(steps, (250, 250, 0), strict=True):
        assert [len(ids) for ids in _scripts(client, step)] == [200, 50]
        assert redis_store.count(SessionQuery()) == left
    assert _keys(client) == []


def test_redis_many_are_created_as_each_alone_is(client: redis.Redis, new_url: NewURL) -> None:
    """The keys of sessions that one script creates, and how long they live, are those that a script for each makes."""
    records = [
        make_record(
            number * SHARDS,
            user_id="user 186" if number % 3 else None,  # whose shard is the first one, too
            tenant_id="acme" if number % 2 else None,
            tags=frozenset({"chat"}) if number % 5 else frozenset(),
            version=number % 4 * 2**61 + 1,
            created_at=1_700_000_000.1 + number,
            expires_at=1_800_000_000.7 + number * 1e4,
        )
        for number in range(60)
    ]
    assert len({record.id[:3] for record in records}) == 1
    alone, together = open_store(new_url("redis")), open_store(new_url("redis"))
    for record in records:
        alone.save(record, expected=0)
    assert all(together.save_many([Change(record=record, expected=0) for record in records]))
    prefixes = sorted({key.partition(":")[0] for key in _keys(client)})
    contents, lives = ([{}, {}] for _ in range(2))
    for key in _keys(client):
        prefix, _, name = key.partition(":")
        contents[prefixes.index(prefix)][name] = client.dump(key)
        lives[prefixes.index(prefix)][name] = round(client.pttl(key) / 60_000)
    assert contents[0] == contents[1]
    assert lives[0] == lives[1]
    alone.close()
    together.close()


def test_redis_of_many_those_that_are_there_are_left(client: redis.Redis, redis_store: SessionStore) -> None:
    """Whatever a key holds already, it stays as it is, and the others of the script are created."""
    records = [make_record(number) for number in range(6)]
    redis_store.save(records[0], expected=0)
    [key] = client.scan_iter(f"*:s:{records[0].id}", count=1000)
    keys = [key.decode().replace(records[0].id, record.id) for record in records]
    client.hset(keys[5], "record", "of which the version was lost")  # as good as missing, for one that is saved alone too
    client.set(keys[1], "not ours")
    client.hset(keys[2], "version", "")
    before = [client.dump(key) for key in keys[:3]]
    assert redis_store.save_many([Change(record=record, expected=0) for record in records]) == [False] * 3 + [True] * 3
    assert [client.dump(key) for key in keys[:3]] == before
    assert [redis_store.get(record.id) for record in records[3:]] == records[3:]


def test_redis_many_begin_without_a_history(client: redis.Redis, redis_store: SessionStore) -> None:
    """What is left of one that has gone is not the history of what comes in its place; of one that is there it stays."""
    records = [make_record(number) for number in range(3)]
    there, gone, _ = (record.id for record in records)
    for record in records[:2]:
        redis_store.save(record, expected=0)
        redis_store.history.append(record.id, [b"old"], created_at=1.0, key="once")
    for key in client.scan_iter(f"*:s:{gone}", count=1000):
        client.delete(key)
    for key in client.scan_iter("*:facts", count=1000):
        client.hdel(key, gone)
    assert len(list(client.scan_iter(f"*:h*:{gone}", count=1000))) == 2
    outcomes = redis_store.save_many([Change(record=record, expected=0) for record in records])
    assert outcomes == [False, True, True]
    assert [redis_store.history.count(record.id) for record in records] == [1, 0, 0]
    assert len(list(client.scan_iter(f"*:h*:{there}", count=1000))) == 2
    assert list(client.scan_iter(f"*:h*:{gone}", count=1000)) == []


@pytest.mark.parametrize("index", ["expiry", "facts"])
def test_redis_many_of_a_shard_with_a_damaged_index(client: redis.Redis, redis_store: SessionStore, index: str) -> None:
    """Where nothing can be created because an index of the shard is damaged, nothing is left in the others either."""
    records = [make_record(number) for number in range(3)]
    redis_store.save(records[0], expected=0)
    [key] = client.scan_iter(f"*:{index}", count=1000)
    client.delete(key)
    client.set(key, "not ours")
    before = {key: client.dump(key) for key in _keys(client)}
    with pytest.raises(StoreError):
        redis_store.save_many([Change(record=record, expected=0) for record in records[1:]])
    assert {key: client.dump(key) for key in _keys(client)} == before


def test_redis_script_stays_within_a_shard(client: redis.Redis, redis_store: SessionStore) -> None:
    """What a script saves is on one server of a cluster, and each session gets its own outcome, in the order given."""
    records = [make_record(number, user_id=None) for number in (1, 1 + SHARDS, 2, 1, 3, 3 + SHARDS, 2)]
    outcomes: list[bool] = []
    scripts = _scripts(
        client, lambda: outcomes.extend(redis_store.save_many([Change(record=record, expected=0) for record in records]))
    )
    assert [[session_id[:3] for session_id in ids] for ids in scripts] == [
        ["001"] * 2,
        ["002"],
        ["001"],
        ["003"] * 2,
        ["002"],
    ]
    assert outcomes == [True, True, True, False, True, True, False]


def test_redis_script_of_large_sessions(client: redis.Redis, redis_store: SessionStore) -> None:
    """A script is given some 256 kB at once, so that the server is not held up for long, or one session that is larger."""
    records = [make_record(number, data=bytes(size * 1024)) for number, size in enumerate((100, 100, 100, 300, 1, 1))]
    step = partial(redis_store.save_many, [Change(record=record, expected=0) for record in records])
    assert [len(ids) for ids in _scripts(client, step)] == [2, 1, 1, 2]
    assert redis_store.count(SessionQuery()) == 6


def test_redis_index_lives_as_long_as_the_longest_of_many(client: redis.Redis, redis_store: SessionStore) -> None:
    """Of sessions that are saved by one script, the one that lives longest decides how long their indexes do."""
    lifetimes = (100, 5000, 20, 300)
    records = [make_record(n, expires_at=make_record().accessed_at + lifetime) for n, lifetime in enumerate(lifetimes)]
    redis_store.save_many([Change(record=record, expected=0) for record in records])
    shared = [key for key in _keys(client) if ":s:" not in key]
    assert len(shared) == 3
    for key in shared:
        assert 4900 < client.ttl(key) - redis_store.margin <= 5000
    redis_store.save_many(
        [Change(record=following(record, expires_at=record.accessed_at + 1), expected=1) for record in records]
    )
    assert all(client.ttl(key) - redis_store.margin > 4900 for key in shared)


def test_redis_damaged_index_concerns_its_own_sessions(client: redis.Redis, redis_store: SessionStore) -> None:
    """One session that cannot be deleted or created does not keep the others of its script from it."""
    records = [make_record(number, user_id=None) for number in range(0, 3 * SHARDS, SHARDS)]
    damaged = make_record(1, user_id="user 186")
    assert damaged.id[:3] == records[0].id[:3]
    every = [records[0], damaged, *records[1:]]
    redis_store.save_many([Change(record=record, expected=0) for record in every])
    [index] = client.scan_iter("*:u:user 186", count=1000)
    client.set(index, b"foreign")
    with pytest.raises(StoreError):
        redis_store.delete_many([Deletion(id=record.id) for record in every])
    assert [redis_store.get(record.id) is None for record in every] == [True, False, True, True]
    another = make_record(2, user_id="user 186")
    with pytest.raises(StoreError):
        redis_store.save_many([Change(record=record, expected=0) for record in (records[0], another, *records[1:])])
    assert [redis_store.get(record.id) is None for record in (*records, another)] == [False, False, False, True]
    assert _index_members(client, another.id) == 0


def test_redis_script_flush(client: redis.Redis, redis_store: SessionStore) -> None:
    """A server that forgets its scripts between any two calls does no harm."""
    record, other = make_record(1), make_record(2)
    calls: list[tuple[Callable[[], object], object]] = [
        (lambda: redis_store.save(record, expected=0), None),
        (lambda: redis_store.save(following(record), expected=1), None),
        (lambda: redis_store.get(record.id), following(record)),
        (lambda: redis_store.save_many([Change(record=other, expected=0)] * 2), [True, False]),
        (lambda: redis_store.delete(record.id), True),
        (lambda: redis_store.lease("sweep", 60), True),
        (lambda: list(redis_store.scan()), [other]),
        (lambda: redis_store.delete_many([Deletion(id=other.id, expected=1)] * 2), [True, False]),
    ]
    for call, expected in calls:
        client.script_flush()
        assert call() == expected


def test_many_hosts_without_ports_are_hosts() -> None:
    """A name has no more than 63 letters, a list of names may have."""
    names = ",".join(f"redis-cluster-{number}" for number in range(9))
    open_store(f"redis+cluster://{names}").close()


def test_redis_lost_answers(redis_server: RedisServer, new_url: NewURL) -> None:
    """What was sent is not sent again if the connection breaks before the answer: it is done once, and unavailable."""
    relay = Relay(redis_server.port)
    url = new_url("redis")
    store, watching = open_store(url.replace(f":{redis_server.port}", f":{relay.port}")), open_store(url)
    record, other = make_record(1), make_record(2)
    store.save(record, expected=0)
    store.history.append(record.id, [b"first"], created_at=1.0)
    store.save(following(record), expected=1)
    changes: list[Callable[[], object]] = [
        lambda: store.history.append(record.id, [b"second"], created_at=2.0),
        lambda: store.save(following(following(record)), expected=2),
        lambda: store.save_many([Change(record=other, expected=0)]),
    ]
    for change in changes:
        relay.losing = b"EVAL"
        with pytest.raises(StoreUnavailable):
            change()
    assert [entry.data for entry in watching.history.read(record.id)] == [b"first", b"second"]
    assert [watching.get(found.id) for found in (record, other)] == [following(following(record)), other]
    assert store.get(other.id) == other
    for opened in (store, watching):
        opened.close()
    relay.close()


def test_redis_closed_connections_are_not_noticed(client: redis.Redis, redis_store: SessionStore) -> None:
    """Connections that the server closed cost no error, whether one session is asked for or changed, or many."""
    record = make_record()
    calls: list[tuple[Callable[[], object], object]] = [
        (lambda: redis_store.save(record, expected=0), None),
        (lambda: redis_store.get(record.id), record),
        (lambda: redis_store.save_many([Change(record=following(record), expected=1)]), [True]),
        (lambda: list(redis_store.scan()), [following(record)]),
        (lambda: redis_store.delete(record.id), True),
    ]
    for call, expected in calls:
        client.client_kill_filter(_type="normal", skipme=True)
        assert call() == expected


def test_redis_user_like_an_index(redis_server: RedisServer, client: redis.Redis) -> None:
    """A check is not misled by a user who is called like the key of an index."""
    store = open_store(redis_server.url)
    record = make_record(user_id="x:{abc}:u:expiry")
    store.save(record, expected=0)
    before = _index_members(client, record.id)
    assert list(store.check(repair=True)) == []
    assert _index_members(client, record.id) == before == 3
    store.close()


@pytest.mark.parametrize("prefix", ["{}", "{abc}", "shop{", "}:u:"])
@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_redis_prefix_with_braces(scheme: str, prefix: str) -> None:
    """By braces a cluster chooses the server of a key, so a prefix has none."""
    with pytest.raises(ConfigError, match=f"prefix {re.escape(repr(prefix))}.* has braces"):
        open_store(f"{scheme}://127.0.0.1?prefix={prefix}")


def test_redis_prefixes(redis_server: RedisServer, client: redis.Redis) -> None:
    """Two stores with different prefixes do not see each other, and every key starts with its prefix."""
    one, two = (open_store(f"{redis_server.url}?prefix={prefix}") for prefix in ("one", "two"))
    one.save(make_record(), expected=0)
    one.lease("sweep", 60)
    assert {key.split(":")[0] for key in _keys(client)} == {"one"}
    assert two.get(make_record().id) is None
    assert list(two.scan()) == []
    assert two.lease("sweep", 60) is True
    one.close()
    two.close()


def test_redis_foreign_key(client: redis.Redis, redis_store: SessionStore) -> None:
    """Something else under a session's key is a ``SerializationError``, no id to create, and can be deleted."""
    record = make_record()
    redis_store.save(record, expected=0)
    [key] = client.scan_iter(f"*:s:{record.id}", count=1000)
    client.set(key, b"foreign")
    with pytest.raises(SerializationError):
        redis_store.get(record.id)
    with pytest.raises(SessionConflict):
        redis_store.save(record, expected=0)
    assert redis_store.delete(record.id) is True


# cachelib -------------------------------------------------------------------------------------------------------------


def test_cachelib_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cache that several processes can reach is warned of once, naming it."""
    store = open_store(FileSystemCache(str(tmp_path), threshold=0))
    [message] = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert "FileSystemCache" in message
    assert store.atomic is False


def test_cachelib_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A cache of this process alone is as safe as memory and not warned of."""
    assert open_store(SimpleCache()).atomic is True
    assert caplog.records == []


@pytest.mark.parametrize("wrong", [NullCache(), SimpleCache, {}, 7, None, object()], ids=lambda wrong: type(wrong).__name__)
def test_cachelib_refuses(wrong: object) -> None:
    """What is no cache, or a cache that keeps nothing, is a ``ConfigError`` that names it and its kind."""
    with pytest.raises(ConfigError, match=rf"\({type(wrong).__name__}\) is no store"):
        open_store(wrong)


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.get(make_record().id),
        lambda store: store.save(make_record(), expected=0),
        lambda store: store.save(make_record(version=2), expected=1),
        lambda store: store.delete(make_record().id),
    ],
    ids=["get", "create", "save", "delete"],
)
def test_cachelib_server_is_gone(call: Callable[[SessionStore], object]) -> None:
    """A cache server that cannot be reached is a ``StoreError``: no driver's error leaves a store."""
    store = open_store(RedisCache("127.0.0.1", free_port(), retry=None))
    with pytest.raises(StoreError):
        call(store)


# Every store that is shared -------------------------------------------------------------------------------------------


def test_namespaces(shared_url: str) -> None:
    """Two namespaces of one store do not see each other: neither records nor listings nor leases."""
    web, chat = open_store(shared_url), open_store(shared_url, namespace="chat")
    web.save(make_record(1), expected=0)
    chat.save(make_record(2), expected=0)
    assert [chat.get(make_record(1).id), web.get(make_record(2).id)] == [None, None]
    assert [list(web.scan()), list(chat.scan())] == [[make_record(1)], [make_record(2)]]
    assert [web.lease("sweep", 60), chat.lease("sweep", 60)] == [True, True]
    web.close()
    chat.close()


def _damage_file(url: str, session_id: str) -> None:
    [path] = Path(url.removeprefix("file://")).rglob(f"{session_id}.session")
    content = path.read_bytes()
    path.write_bytes(_flip(content, len(content) * 4))


def _damage_sqlite(url: str, session_id: str) -> None:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    connection.execute("UPDATE persist_session_web SET metadata = '[' WHERE id = ?", (session_id,))
    connection.commit()
    connection.close()


def _damage_redis(url: str, session_id: str) -> None:
    with redis.Redis.from_url(url.partition("?")[0]) as client:
        prefix = url.partition("prefix=")[2]
        [key] = client.scan_iter(f"{prefix}:*:s:{session_id}", count=1000)
        client.hset(key, "record", b"\x07")


@pytest.fixture(params=[_damage_file, _damage_sqlite, _damage_redis], ids=["file", "sqlite", "redis"])
def damaged(request: pytest.FixtureRequest, new_url: NewURL) -> Iterator[tuple[SessionStore, list[SessionRecord]]]:
    """A store of two records in the order of their ids, of which the first is unreadable."""
    url = new_url(request.param.__name__.removeprefix("_damage_"))
    store = open_store(url)
    records = sorted((make_record(number) for number in range(2)), key=lambda record: record.id)
    for record in records:
        store.save(record, expected=0)
    request.param(url, records[0].id)
    yield store, records
    store.close()


def test_unreadable_record(damaged: tuple[SessionStore, list[SessionRecord]]) -> None:
    """A record that cannot be read is a ``SerializationError``, cannot be saved over, and can be deleted."""
    store, [unreadable, _] = damaged
    with pytest.raises(SerializationError):
        store.get(unreadable.id)
    with pytest.raises(SessionConflict):
        store.save(unreadable, expected=0)
    assert store.delete(unreadable.id) is True
    store.save(unreadable, expected=0)
    assert store.get(unreadable.id) == unreadable


@pytest.mark.parametrize("conditions", [{}, {"user_id": "alice"}, {"order_by": "id", "limit": 1}], ids=str)
def test_unreadable_record_in_a_listing(
    damaged: tuple[SessionStore, list[SessionRecord]], conditions: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A listing leaves an unreadable record out with a warning that names it, and finds the others."""
    store, [unreadable, readable] = damaged
    assert list(store.find(SessionQuery(**conditions))) == [readable]
    assert any(unreadable.id in entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING)


def test_unreadable_record_in_statistics(damaged: tuple[SessionStore, list[SessionRecord]]) -> None:
    """Statistics count an unreadable record or not, and the others as they are."""
    store, [unreadable, readable] = damaged
    possible = [add_up(iter(records), 100.0) for records in ([readable], [readable, unreadable])]
    assert store.stats(now=100.0) in possible


def test_sqlite_statistics_of_damaged_columns(database: Path) -> None:
    """A row with anything in its columns is counted as far as it can be told, and spoils no figure of the others."""
    store = open_store(f"sqlite:///{database}")
    record, damaged = make_record(1), make_record(2)
    store.save(record, expected=0)
    store.save(damaged, expected=0)
    with sqlite3.connect(database) as other:
        other.execute(
            "UPDATE persist_session_web SET tenant_id = x'ff', tags = '[', created_at = 'soon', data = '' WHERE id = ?",
            (damaged.id,),
        )
    other.close()
    found = store.stats(now=100.0)
    store.close()
    alone = add_up(iter([record]), 100.0)
    assert found == replace(alone, total=2, active=2, users=2)


# open_store -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("mongodb://localhost/x", "mongodb"),
        ("sessions.db", "sessions.db"),
        ("", "scheme"),
        ("memory://?size=1", "size"),
        ("file:///tmp/x?sync=1", "sync"),
        ("sqlite:///x.db?wal=1", "wal"),
        ("redis://localhost?ttl=1", "ttl"),
        ("postgresql://localhost/x?pool=1", "pool"),
        ("file:///tmp/x?fsync=yes", "fsync"),
        ("sqlite:///x.db?timeout=0", "timeout"),
        ("sqlite:///x.db?timeout=soon", "timeout"),
        ("sqlite:///x.db?synchronous=maybe", "synchronous"),
        ("redis://localhost?timeout=-1", "timeout"),
        ("redis://localhost?db=one", "db"),
        ("redis://localhost?max_connections=many", "max_connections"),
        ("redis://localhost:port/0", "port"),
        ("redis://localhost/one", "one"),
        ("postgresql://localhost/x?timeout=inf", "timeout"),
        ("postgresql://localhost:port/x", "port"),
        ("mysql://localhost/x?charset=latin1", "charset"),
        ("mysql://localhost/x?ssl_mode=maybe", "verify_identity"),
        ("mysql://localhost/x?ssl_ca=/no/such/file", "ssl_ca=.*No such file"),
        ("mariadb://localhost/x?timeout=soon", "timeout"),
        ("mysql://localhost", "database"),
        ("sqlite://", "file"),
        ("sqlite:///", "file"),
        ("sqlite:///:memory:", "file"),
        ("sqlite://host/x.db", "file"),
        ("file://host/x", "host"),
        ("postgresql://localhost", "database"),
        ("redis://[::1", "URL"),
    ],
)
def test_open_store_refuses(url: str, named: str, tmp_path: Path) -> None:
    """A URL that cannot work is a ``ConfigError`` that names what is wrong with it."""
    with pytest.raises(ConfigError, match=named):
        open_store(url, base_path=str(tmp_path))


@pytest.mark.parametrize("scheme", ["file:{}", "sqlite:///{}"])
def test_open_store_in_an_unwritable_place(scheme: str, tmp_path: Path) -> None:
    """A path where nothing can be made is a ``ConfigError`` that names it."""
    (tmp_path / "regular").write_text("a file")
    with pytest.raises(ConfigError, match="regular/below"):
        open_store(scheme.format("regular/below/sessions"), base_path=str(tmp_path))


def test_open_store_takes_a_store() -> None:
    """A store is returned as it is."""
    store = open_store("memory://")
    assert open_store(store) is store


@pytest.mark.parametrize("namespace", ["../other", "", "a b", 'x"; DROP TABLE y', "Web"])
@pytest.mark.parametrize("kind", SHARED_STORES)
def test_open_store_refuses_a_namespace(kind: str, namespace: str, new_url: NewURL) -> None:
    """A namespace of anything but lower-case letters, digits and underscores is a ``ConfigError``."""
    with pytest.raises(ConfigError, match="namespace"):
        open_store(new_url(kind), namespace=namespace)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:geheim@localhost",
        "mysql://user:geheim@localhost/x?timeout=soon",
        "mysql5://user:geheim@localhost/x",
        "redis://user:geheim@localhost?ttl=1",
        "redis://user:geheim@localhost?timeout=soon",
        "redis://user:geheim@localhost:port/0",
        "redis://user:geheim/x@localhost/0",
        "redis://user:geheim#x@localhost/0?ttl=1",
        "postgresql://user:geheim@localhost",
        "postgresql://user:geheim@localhost:port/x",
        "sqlite://user:geheim@localhost/x.db",
        "redis://localhost?password=geheim",
        "redis://user:geheim@[localhost/0",
    ],
)
def test_open_store_keeps_the_password(url: str) -> None:
    """The password of a URL is in no message, however wrong the URL is."""
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "scheme",
    ["redis://user:geheim@127.0.0.1:{}/0", "postgresql://user:geheim@127.0.0.1:{}/x", "mysql://user:geheim@127.0.0.1:{}/x"],
)
def test_unreachable_store_keeps_the_password(scheme: str) -> None:
    """A server that cannot be reached is a ``StoreUnavailable`` that names the place and not the password."""
    port = free_port()
    store = open_store(scheme.format(port))
    with pytest.raises(StoreUnavailable, match=str(port)) as caught:
        store.get(make_record().id)
    assert "geheim" not in str(caught.value)


def test_a_file_that_is_just_being_created_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is read between the making of its file and the first write is not taken for damaged."""
    store, record = open_store(f"file://{tmp_path}/sessions"), make_record()
    path = tmp_path / "sessions" / "web" / record.id[:3] / f"{record.id}.session"
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    monkeypatch.setattr(time, "sleep", lambda _: store.save(record, expected=0))
    assert store.get(record.id) == record


def test_redis_over_a_unix_socket(redis_server: RedisServer) -> None:
    """A ``unix:`` URL reaches the server's socket, with options as any other."""
    store, record = open_store(f"unix://{redis_server.socket}?prefix=socket&db=1"), make_record()
    store.save(record, expected=0)
    assert store.get(record.id) == record
    store.close()
