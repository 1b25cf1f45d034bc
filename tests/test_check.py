"""A check finds what is broken in a store and mends it where nothing is lost; it finds nothing where others only work."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from flask_persist_session import Finding, SerializationError, SessionQuery, SessionRecord, SessionStore, open_store
from flask_persist_session.stores import databases, file_transactions, file_upkeep, frames, sql_upkeep
from flask_persist_session.stores.file import FileStore
from flask_persist_session.stores.redis import _Checked
from flask_persist_session.stores.redis_upkeep import RedisCheck
from flask_persist_session.stores.sql_upkeep import SQLCheck
from flask_persist_session.testing import following, make_record
from tests.servers import RedisServer, wait_until
from tests.web import PROCESSES

NewURL = Callable[[str], str]


def kinds(store: SessionStore, *, repair: bool = False) -> list[tuple[str, bool]]:
    """What a check finds: of which kind, and whether it was repaired."""
    return sorted((finding.kind, finding.repaired) for finding in store.check(repair=repair))


def found_and_repaired(store: SessionStore, kind: str) -> None:
    """A check finds one thing of *kind*, a repair mends it, and then there is nothing to find."""
    assert kinds(store) == [(kind, False)]
    assert kinds(store) == [(kind, False)]  # looking changes nothing
    assert kinds(store, repair=True) == [(kind, True)]
    assert kinds(store) == []


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is alone in these tests need not be waited for; where others write it is."""
    if "shared_url" not in request.fixturenames:
        monkeypatch.setattr(file_upkeep, "_SETTLED", 0.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "sessions" / "web"


@pytest.fixture
def files(root: Path) -> SessionStore:
    return open_store(f"file://{root.parent}")


RECORD = make_record(7, user_id="alice")


def path_of(root: Path) -> Path:
    return root / RECORD.id[:3] / f"{RECORD.id}.session"


def written(files: SessionStore, root: Path, versions: int = 6) -> list[int]:
    """Save *RECORD* in so many versions; returns where the frame of each ends in the file."""
    record, ends = RECORD, []
    files.save(record, expected=0)
    ends.append(path_of(root).stat().st_size)
    for version in range(2, versions + 1):
        record = following(record, data=bytes([version]) * (40 * version))
        files.save(record, expected=version - 1)
        ends.append(path_of(root).stat().st_size)
    return ends


def cut(content: bytes, start: int, _: random.Random) -> bytes:
    return content[:start]


def flipped(content: bytes, start: int, rng: random.Random) -> bytes:
    return content[:start] + bytes(byte ^ rng.randrange(1, 256) for byte in content[start:])


def zeroed(content: bytes, start: int, _: random.Random) -> bytes:
    return content[:start] + bytes(len(content) - start)


def overgrown(content: bytes, start: int, rng: random.Random) -> bytes:
    return content[:start] + rng.randbytes(rng.randrange(1, 3000))


@pytest.mark.parametrize("rounds", [25, pytest.param(60, marks=pytest.mark.soak)])
@pytest.mark.parametrize("damage", [cut, flipped, zeroed, overgrown])
def test_repair_brings_back_the_last_intact_state(
    files: SessionStore, root: Path, damage: Callable[..., bytes], rounds: int
) -> None:
    """Wherever the damage of a file begins, a repair leaves it with the last state that ends before it."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for number in range(rounds):
        files.delete(RECORD.id)
        ends = written(files, root)
        start = rng.randrange(ends[-1])
        content = path_of(root).read_bytes()
        if damage is zeroed and not any(content[start:]):
            continue
        damaged = damage(content, start, rng)
        path_of(root).write_bytes(damaged)
        # The last four bytes of a frame only help to find it from behind.
        whole = sum(end - 4 <= start and end <= len(damaged) for end in ends)
        told = f"seed {seed}, round {number}: from byte {start} of {ends}"
        repaired = kinds(files, repair=True)
        record = files.get(RECORD.id)
        assert (record.version if record else 0) == whole, told
        assert all(done for _, done in repaired), told
        assert kinds(files) == [], told
        if record is not None:
            assert [one.id for one in files.find(SessionQuery(user_id="alice"))] == [RECORD.id], told
            files.save(following(record, data=b"on"), expected=record.version)


def test_torn_tail_is_found(files: SessionStore, root: Path) -> None:
    """A file that ends in the middle of a frame is cut to the last whole one."""
    ends = written(files, root)
    os.truncate(path_of(root), ends[-1] - 5)
    found_and_repaired(files, "torn")
    assert path_of(root).stat().st_size == ends[-2]
    assert not (root / "damaged").exists()  # half a frame tells nothing


@pytest.mark.parametrize("part", range(20))
def test_states_behind_a_damaged_one_count(files: SessionStore, root: Path, part: int) -> None:
    """A damaged header in the middle of a file whose last save was not finished costs its own state, not those after it."""
    ends = written(files, root)
    content = bytearray(path_of(root).read_bytes()[: ends[-1] - 5])
    content[ends[1] + part] ^= 255
    path_of(root).write_bytes(content)
    record = files.get(RECORD.id)
    assert (record and record.version) == 5
    found_and_repaired(files, "torn")
    assert path_of(root).stat().st_size == ends[-2]
    assert files.get(RECORD.id) == record


def test_damage_is_kept_for_people(files: SessionStore, root: Path) -> None:
    """What no crash leaves, such as zeros in place of a frame, is copied before it is cut off."""
    ends = written(files, root)
    damaged = path_of(root).read_bytes()[: ends[-2]] + bytes(500)
    path_of(root).write_bytes(damaged)
    found_and_repaired(files, "torn")
    [aside] = (root / "damaged").iterdir()
    assert aside.read_bytes() == damaged
    assert aside.stat().st_mode & 0o777 == 0o600


def test_file_without_an_intact_state(files: SessionStore, root: Path) -> None:
    """A file of which nothing is intact is moved out of the way, so that nobody meets it any more."""
    written(files, root)
    path_of(root).write_bytes(b"nothing of a session" * 50)
    with pytest.raises(SerializationError):
        files.get(RECORD.id)
    assert kinds(files) == [("record", False)]
    # The entry of the index follows: whose it was cannot be known before.
    assert kinds(files, repair=True) == [("index", True), ("record", True)]
    assert files.get(RECORD.id) is None
    assert kinds(files) == []


def test_record_that_another_release_wrote(files: SessionStore, root: Path) -> None:
    """An intact frame whose record cannot be read may be that of a newer release: it stays where it is."""
    written(files, root)
    content = frames.framed(1, b"a record of the future")
    path_of(root).write_bytes(content)
    assert kinds(files, repair=True) == [("record", False)]
    assert path_of(root).read_bytes() == content


def test_creation_that_was_stopped(files: SessionStore, root: Path) -> None:
    """A file in which nothing was ever saved is removed, and so is its entry in the index."""
    ends = written(files, root, versions=1)
    os.truncate(path_of(root), ends[0] - 1)
    assert kinds(files, repair=True) == [("index", True), ("leftover", True)]
    assert kinds(files) == []


@pytest.mark.parametrize("alone", [False, True])
def test_temporary_file_of_a_stopped_rewrite(files: SessionStore, root: Path, alone: bool) -> None:
    """The temporary file of a rewrite that was stopped is removed, whether its session is still there or not."""
    written(files, root)
    if alone:
        files.delete(RECORD.id)
    path_of(root).with_name(f"{path_of(root).name}.tmp").write_bytes(b"half")
    path_of(root).with_name(f"{path_of(root).name}.tmp").chmod(0o600)
    found_and_repaired(files, "leftover")


def test_temporary_file_of_a_rewrite_under_way(files: SessionStore, root: Path) -> None:
    """The temporary file of a rewrite that is going on is neither reported nor removed."""
    written(files, root)
    path = str(path_of(root))
    handle, _ = frames.lock(path, 5.0, create=False)
    Path(f"{path}.tmp").touch(mode=0o600)
    Path(f"{path}.tmp").write_bytes(Path(path).read_bytes())
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(kinds, files, repair=True)
        with suppress(TimeoutError):
            checking.result(timeout=0.1)
        assert Path(f"{path}.tmp").exists()
        os.rename(f"{path}.tmp", path)
        frames.unlock(handle)
        assert checking.result() == []


HISTORY_DAMAGES = {
    "half an append": lambda history, turns: history.write_bytes(history.read_bytes() + b"\x93TRN half of it"),
    "a whole append that is not in its index": lambda history, turns: turns.write_bytes(turns.read_bytes()[:-52]),
    "an index that is cut": lambda history, turns: turns.write_bytes(turns.read_bytes()[:-1]),
    "no index": lambda history, turns: turns.unlink(),
}


@pytest.mark.parametrize("damage", HISTORY_DAMAGES)
def test_history_of_an_append_that_was_stopped(files: SessionStore, root: Path, damage: str) -> None:
    """A history whose two files do not agree is found and brought to agree; every entry that was stored is there."""
    files.save(RECORD, expected=0)
    for number in range(3):
        files.history.append(RECORD.id, [b"%d" % number], created_at=1.0)
    path = path_of(root)
    HISTORY_DAMAGES[damage](path.with_suffix(".history"), path.with_suffix(".turns"))
    sizes = [path.with_suffix(suffix).stat().st_size for suffix in (".history", ".turns") if damage != "no index"]
    assert kinds(files) == [("torn", False)]
    assert sizes == [path.with_suffix(suffix).stat().st_size for suffix in (".history", ".turns") if damage != "no index"]
    found_and_repaired(files, "torn")
    assert [entry.data for entry in files.history.read(RECORD.id)] == [b"0", b"1", b"2"]
    assert path.with_suffix(".history").read_bytes().count(b"\x93TRN") == 3


def test_entry_without_session(files: SessionStore, root: Path) -> None:
    """An entry of the index of users that leads nowhere is removed."""
    written(files, root)
    path_of(root).unlink()
    found_and_repaired(files, "index")


def test_session_without_entry(files: SessionStore, root: Path) -> None:
    """A session that is missing in the index of its user is entered again."""
    written(files, root)
    next((path_of(root).parent / "users").glob("*/*")).unlink()
    assert not list(files.find(SessionQuery(user_id="alice")))
    found_and_repaired(files, "index")
    assert [record.id for record in files.find(SessionQuery(user_id="alice"))] == [RECORD.id]


def test_entry_of_another_user(files: SessionStore, root: Path) -> None:
    """An entry under a user whose session it is not is removed; that of its user stays."""
    written(files, root)
    wrong = path_of(root).parent / "users" / ("0" * 64)
    wrong.mkdir(mode=0o700)
    (wrong / RECORD.id).touch(mode=0o600)
    found_and_repaired(files, "index")
    assert [record.id for record in files.find(SessionQuery(user_id="alice"))] == [RECORD.id]


def test_modes(files: SessionStore, root: Path) -> None:
    """Files and directories that others may read or write are closed again."""
    written(files, root)
    path_of(root).chmod(0o644)
    found_and_repaired(files, "mode")
    assert path_of(root).stat().st_mode & 0o777 == 0o600
    (path_of(root).parent / "users").chmod(0o755)
    found_and_repaired(files, "mode")
    files.note("cleanup", 1.0)
    (root / "notes" / "cleanup").chmod(0o606)
    found_and_repaired(files, "mode")


def test_foreign_files_stay(files: SessionStore, root: Path) -> None:
    """What no store has put there is reported and stays: it may be somebody's."""
    written(files, root)
    (root / "notes.txt").write_text("mine")
    (path_of(root).parent / "core").mkdir()
    (path_of(root).parent / f"{'f' * 67}.session").write_text("no id of a session")
    os.symlink("/etc/passwd", path_of(root).with_name(f"{RECORD.id[:3]}{'0' * 64}.session"))
    os.mkfifo(path_of(root).with_name(f"{RECORD.id[:3]}{'1' * 64}.session"))
    shard = next(shard for shard in ("000", "001") if not RECORD.id.startswith(shard))
    (root / shard).write_text("no directory of sessions")
    assert kinds(files, repair=True) == [("foreign", False)] * 6
    assert kinds(files) == [("foreign", False)] * 6
    assert [record.id for record in files.scan()] == [RECORD.id]  # nothing of the store reads them
    assert files.count(SessionQuery()) == 1


def test_creation_that_is_under_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair that comes between the entry of a session in the index and its first frame takes neither away."""
    files = open_store(f"file://{root.parent}?timeout=0.05")
    index = FileStore._index
    found: list[Finding] = []

    def index_and_repair(self: FileStore, record: SessionRecord) -> None:
        index(self, record)
        found.extend(files.check(repair=True))

    monkeypatch.setattr(FileStore, "_index", index_and_repair)
    files.save(RECORD, expected=0)
    assert [record.id for record in files.find(SessionQuery(user_id="alice"))] == [RECORD.id]
    # All it tells is that somebody has the session locked for long.
    assert {("locked" in finding.text, finding.repaired) for finding in found} == {(True, False)}
    assert kinds(files) == []


def test_deletion_that_is_under_way(files: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry whose session is being removed is looked at again before it is reported."""
    written(files, root)
    met, removed = Event(), Event()
    unindex = file_transactions.unindex

    def unindex_when_met(*arguments: Any) -> None:
        assert met.wait(10)
        unindex(*arguments)
        removed.set()

    def wait_for_removal(_: float) -> None:
        met.set()
        assert removed.wait(10)

    monkeypatch.setattr(file_transactions, "unindex", unindex_when_met)
    monkeypatch.setattr(file_upkeep, "_SETTLED", 60.0)
    with ThreadPoolExecutor(2) as pool:
        deleting = pool.submit(files.delete, RECORD.id)
        wait_until(lambda: not path_of(root).exists(), "the session's file to go")
        now = time.monotonic()
        monkeypatch.setattr(file_upkeep.time, "sleep", wait_for_removal)
        monkeypatch.setattr(file_upkeep.time, "monotonic", lambda: now + 100 * removed.is_set())
        assert pool.submit(kinds, files).result() == []
        assert met.is_set()
        assert deleting.result()


def test_optimize_rewrites_files_of_many_states(files: SessionStore, root: Path) -> None:
    """A file that holds earlier states becomes as small as its record; the disk has the room back."""
    record = RECORD
    files.save(record, expected=0)
    for version in range(1, 40):
        record = following(record, data=bytes([version]) * 500)
        files.save(record, expected=version)
    before = path_of(root).stat().st_blocks * 512
    [done] = files.optimize()
    assert done.freed == before - path_of(root).stat().st_blocks * 512 > 0
    assert files.get(record.id) == record
    assert list(files.optimize()) == []


def test_optimize_survives_a_session_that_ends_behind_it(
    files: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is that of the file that was replaced: whoever finds the new one may remove the session at once."""
    files.save(RECORD, expected=0)
    files.save(following(RECORD, data=bytes(9000)), expected=1)
    files.save(following(following(RECORD)), expected=2)

    def rewrite_and_lose(path: str, content: bytes, *, sync: bool) -> None:
        frames.rewrite(path, content, sync=sync)
        assert files.delete(RECORD.id)

    monkeypatch.setattr(file_upkeep, "rewrite", rewrite_and_lose)
    file, _directory_of_user = files.optimize()
    assert "1 files" in file.text
    assert file.freed > 0
    assert kinds(files) == []


def test_two_may_optimize_at_once(files: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that another one has just removed is as good as removed."""
    written(files, root)
    files.delete(RECORD.id)
    listed = file_upkeep._entries

    def entries_that_go(folder: str) -> Iterator[os.DirEntry[str]]:
        for entry in listed(folder):
            if folder.endswith("users"):
                os.rmdir(entry.path)
            yield entry

    monkeypatch.setattr(file_upkeep, "_entries", entries_that_go)
    assert list(files.optimize()) == []


def test_optimize_removes_directories_of_users_without_sessions(files: SessionStore, root: Path) -> None:
    """The directory of a user who has no session any more is removed; the user can sign in again."""
    written(files, root)
    files.delete(RECORD.id)
    [done] = files.optimize()
    assert "1 directories" in done.text
    assert not list((path_of(root).parent / "users").iterdir())
    written(files, root)
    assert kinds(files) == []


# SQLite and PostgreSQL ------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def sqlite(database: Path) -> Iterator[SessionStore]:
    store = open_store(f"sqlite:///{database}")
    for number in range(600):
        store.save(make_record(number), expected=0)
    yield store
    store.close()


def tell(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_a_row_that_was_given_another_user_is_told(sqlite: SessionStore, database: Path) -> None:
    """Its id says in which shard the sessions of its user are looked for; nobody's may be anywhere."""
    moved, nobodys = make_record(1, user_id="bob"), make_record(2, user_id=None)
    for record in moved, nobodys:
        sqlite.save(record, expected=0)
    tell(database, f"UPDATE persist_session_web SET user_id = 'robert' WHERE id = '{moved.id}'")
    assert not list(sqlite.find(SessionQuery(user_id="robert")))
    for repair in False, True:
        [finding] = sqlite.check(repair=repair)
        assert (finding.kind, finding.where, finding.repaired) == ("index", moved.id, False)
        assert "changed to 'robert', whose lists lack it. Set the user back, or delete the row" in finding.text


def test_missing_index_is_created(sqlite: SessionStore, database: Path) -> None:
    """An index that is missing is made again."""
    tell(database, "DROP INDEX persist_session_web_expiry")
    found_and_repaired(sqlite, "schema")


def test_index_out_of_step_is_made_anew(sqlite: SessionStore, database: Path) -> None:
    """An index in which rows are missing is told by SQLite itself, and made anew."""
    name = "persist_session_web_user"
    plain = f"CREATE INDEX {name} ON persist_session_web (user_id, tenant_id)"
    tell(
        database,
        f"DROP INDEX {name}",
        f"{plain} WHERE user_id = 'nobody'",
        "PRAGMA writable_schema = 1",
        f"UPDATE sqlite_master SET sql = '{plain}' WHERE name = '{name}'",
    )
    sqlite.close()
    before = kinds(sqlite)
    assert before
    assert set(before) == {("database", False)}
    assert set(kinds(sqlite, repair=True)) == {("database", True)}
    assert kinds(sqlite) == []


def test_damaged_row_stays(sqlite: SessionStore, database: Path) -> None:
    """A row that cannot be read is reported, with what to do; nothing is taken away, and the others are all seen."""
    damaged = make_record(3).id
    tell(database, f"UPDATE persist_session_web SET metadata = '[' WHERE id = '{damaged}'")
    seen: list[Any] = []
    [finding] = sqlite.check(repair=True, seen=seen.append)
    assert (finding.kind, finding.where, finding.repaired) == ("record", damaged, False)
    assert len(seen) == 599
    assert sqlite.count(SessionQuery()) == 600


def test_database_that_everybody_may_read(sqlite: SessionStore, database: Path) -> None:
    """A database file that everybody may read is closed to them; what its group may do stays."""
    for path in database.parent.glob("sessions.db*"):
        path.chmod(0o660)
    assert kinds(sqlite) == []
    database.chmod(0o664)
    found_and_repaired(sqlite, "mode")
    assert database.stat().st_mode & 0o777 == 0o660


def test_database_that_is_none(sqlite: SessionStore, database: Path) -> None:
    """A file that is no database any more is a finding, and no error."""
    sqlite.close()
    for path in database.parent.glob("sessions.db*"):
        path.unlink()
    database.write_bytes(b"no database" * 1000)
    database.chmod(0o600)
    fresh = open_store(f"sqlite:///{database}")
    [finding] = fresh.check(repair=True)
    assert (finding.kind, finding.repaired) == ("database", False)
    assert "backup" in finding.text


def test_damaged_pages(sqlite: SessionStore, database: Path) -> None:
    """Damaged pages are findings, and no error."""
    sqlite.close()
    size = database.stat().st_size
    with database.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(range(256)) * 64)
    assert ("database", False) in kinds(open_store(f"sqlite:///{database}"), repair=True)


def test_schema_of_another_release(sqlite: SessionStore, database: Path) -> None:
    """A table of another release is a finding that says what to do."""
    tell(database, "UPDATE persist_schema SET version = 99")
    [finding] = open_store(f"sqlite:///{database}").check(repair=True)
    assert (finding.kind, finding.repaired) == ("schema", False)


def test_optimize_gives_back_room(sqlite: SessionStore, database: Path) -> None:
    """The log of the database is emptied; the database itself, for which writers wait, is rewritten only in full."""
    for number in range(590):
        sqlite.delete(make_record(number).id)
    before = database.stat().st_size
    assert sum(done.freed for done in sqlite.optimize()) > 0
    assert (database.parent / "sessions.db-wal").stat().st_size == 0
    assert database.stat().st_size >= before
    before = database.stat().st_size
    [freed] = [done.freed for done in sqlite.optimize(full=True) if "rewrote" in done.text]
    assert freed == before - database.stat().st_size > 0
    assert sqlite.count(SessionQuery()) == 10


def test_optimizing_while_somebody_copies_the_log(
    sqlite: SessionStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store does so after many changes, in a thread of its own; the log is emptied once that is done."""
    ours, theirs = PROCESSES.Pipe()
    copying = PROCESSES.Process(target=seem_to_copy, args=(f"{database}-shm", theirs))
    copying.start()
    ours.recv()

    def end(_: float) -> None:
        ours.send("end")
        copying.join()

    monkeypatch.setattr(sql_upkeep.time, "sleep", end)
    assert "emptied the log of the database" in [done.text for done in sqlite.optimize()]
    assert copying.exitcode == 0  # it was there until then


def seem_to_copy(index: str, orders: Connection) -> None:
    """Hold the lock of whoever copies the log of a SQLite database until told to end (https://sqlite.org/walformat.html)."""
    with open(index, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 121)
        orders.send("locked")
        orders.recv()


def test_index_that_stays_out_of_step(sqlite: SessionStore, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still wrong after a repair is not told as repaired."""
    problem = "wrong # of entries in index persist_session_web_user"
    monkeypatch.setattr(SQLCheck, "_problems", lambda self: [problem])
    [finding] = sqlite.check(repair=True)
    assert (finding.kind, finding.repaired) == ("database", False)
    assert finding.text.startswith(problem)
    assert "restore the newest backup" in finding.text


def test_log_that_everybody_may_read(sqlite: SessionStore, database: Path) -> None:
    """The newest sessions are in the log of the database."""
    log = database.with_name("sessions.db-wal")
    log.chmod(0o604)
    found_and_repaired(sqlite, "mode")
    assert log.stat().st_mode & 0o777 == 0o600


def test_statistics_are_brought_up_to_date(sqlite: SessionStore, database: Path) -> None:
    """Those of this table; what others keep in the database is theirs."""
    tell(database, "CREATE TABLE theirs (a)", "CREATE INDEX theirs_a ON theirs (a)", "INSERT INTO theirs VALUES (1)")
    assert any("statistics" in done.text for done in sqlite.optimize())
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT DISTINCT tbl FROM sqlite_stat1").fetchall() == [("persist_session_web",)]


def test_optimizing_while_others_write(sqlite: SessionStore, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics can wait; nobody is held up, not even whoever asked for them, and it is no error."""
    pauses = list[float]()
    monkeypatch.setattr(databases.time, "sleep", pauses.append)
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        start = [done.text for done in sqlite.optimize()]
        connection.execute("ROLLBACK")
    assert not any("statistics" in text for text in start)
    assert sum(pauses) < 0.05


def test_unused_room_is_told(sqlite: SessionStore) -> None:
    """With what gives it back, which requests would have to wait for."""
    for number in range(590):
        sqlite.delete(make_record(number).id)
    assert any("--full gives them back" in done.text for done in sqlite.optimize())


def test_missing_index_of_postgresql(new_url: NewURL) -> None:
    """PostgreSQL gets its index again too, and without locking anybody out."""
    store = open_store(new_url("postgresql"))
    store.save(RECORD, expected=0)
    store._database.execute_sql("DROP INDEX persist_session_web_user")  # type: ignore[attr-defined]
    found_and_repaired(store, "schema")
    store.close()


def test_unfinished_index_of_postgresql(new_url: NewURL) -> None:
    """What an interrupted creation leaves is in the way of another one: it is dropped, and the index made anew."""
    store = open_store(new_url("postgresql"))
    store.save(RECORD, expected=0)
    store._database.execute_sql(  # type: ignore[attr-defined]
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'persist_session_web_user'::regclass"
    )
    assert kinds(store) == [("schema", False)]
    assert kinds(store, repair=True) == [("schema", True)] * 2
    assert kinds(store) == []
    store.close()


# Redis ----------------------------------------------------------------------------------------------------------------


class Keys:
    """A store on Redis with one session, and a client to break its keys with."""

    def __init__(self, server: RedisServer, url: str) -> None:
        self.client: Any = server.client()
        self.store = open_store(url)
        self.store.save(RECORD, expected=0)
        prefix = f"{url.partition('prefix=')[2]}:web"
        shard = f"{prefix}:{{{RECORD.id[:3]}}}"
        self.prefix = prefix
        self.session, self.expiry, self.facts = f"{shard}:s:{RECORD.id}", f"{shard}:expiry", f"{shard}:facts"
        self.user = f"{shard}:u:alice"


@pytest.fixture
def keys(redis_server: RedisServer, new_url: NewURL) -> Iterator[Keys]:
    made = Keys(redis_server, new_url("redis"))
    yield made
    made.client.close()
    made.store.close()


BREAKING: dict[str, Callable[[Keys], object]] = {
    "no expiry": lambda keys: keys.client.delete(keys.expiry),
    "wrong expiry": lambda keys: keys.client.zadd(keys.expiry, {RECORD.id: 1.0}),
    "no facts": lambda keys: keys.client.delete(keys.facts),
    "wrong facts": lambda keys: keys.client.hset(keys.facts, RECORD.id, b"wrong"),
    "wrong facts of its own": lambda keys: keys.client.hset(keys.session, "facts", b"wrong"),
    "no user": lambda keys: keys.client.delete(keys.user),
}


@pytest.mark.parametrize("broken", BREAKING)
def test_session_that_nothing_leads_to(keys: Keys, broken: str) -> None:
    """A session that an index or the statistics miss is entered again."""
    BREAKING[broken](keys)
    found_and_repaired(keys.store, "index")
    assert [record.id for record in keys.store.find(SessionQuery(user_id="alice"))] == [RECORD.id]
    assert keys.store.stats(now=0.0).total == keys.store.count(SessionQuery()) == 1


def test_entries_of_a_session_that_is_gone(keys: Keys) -> None:
    """What leads to a session that is gone is removed, from all three."""
    keys.client.delete(keys.session)
    assert kinds(keys.store) == [("index", False)] * 3
    assert kinds(keys.store, repair=True) == [("index", True)] * 3
    assert kinds(keys.store) == []
    assert not keys.client.exists(keys.expiry, keys.facts, keys.user)


def test_index_of_very_many_entries(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that is too long for one step of the server is gone through a part at a time, to the same end."""
    monkeypatch.setattr("flask_persist_session.stores.redis_upkeep._AT_ONCE", 0)
    assert kinds(keys.store) == []
    keys.client.delete(keys.session)
    assert kinds(keys.store, repair=True) == [("index", True)] * 3
    assert kinds(keys.store) == []


def test_entry_under_another_user_of_redis(keys: Keys) -> None:
    """An entry under a user whose session it is not is removed."""
    keys.client.zadd(f"{keys.user}}}:x", {RECORD.id: 1.0})
    found_and_repaired(keys.store, "index")


@pytest.mark.parametrize("index", ["expiry", "facts", "user"])
def test_index_of_a_wrong_type(keys: Keys, index: str) -> None:
    """A key in the place of an index is renamed, and the index made anew."""
    key = getattr(keys, index)
    keys.client.delete(key)
    keys.client.set(key, "something else")
    assert {kind for kind, _ in kinds(keys.store)} == {"type", "index"}
    kinds(keys.store, repair=True)
    assert kinds(keys.store) == []
    [aside] = keys.client.keys(f"{keys.prefix}:*:damaged:*")
    assert keys.client.get(aside) == b"something else"


def test_record_of_redis_that_cannot_be_read(keys: Keys) -> None:
    """Neither a record that cannot be read nor a key of a wrong type in its place is taken away."""
    keys.client.hset(keys.session, "record", b"nothing")
    assert kinds(keys.store, repair=True) == [("record", False)]
    keys.client.delete(keys.session)
    keys.client.set(keys.session, "something else")
    assert kinds(keys.store, repair=True) == [("type", False)]
    assert keys.client.get(keys.session) == b"something else"


def test_foreign_keys_stay(keys: Keys) -> None:
    """What no store has put below its prefix is reported and stays; other prefixes are not looked at."""
    keys.client.set(f"{keys.prefix}:mine", "kept")
    keys.client.set(f"{keys.prefix}x:mine", "kept")
    assert kinds(keys.store, repair=True) == [("foreign", False)]
    assert keys.client.get(f"{keys.prefix}:mine") == b"kept"


def test_session_that_changes_while_it_is_repaired(keys: Keys) -> None:
    """What leads to it is that of its new state; the old one is not put back."""
    keys.client.delete(keys.facts)
    changed = following(RECORD, expires_at=RECORD.expires_at + 1000, tags=frozenset({"new"}))

    def change(record: SessionRecord) -> None:
        if record.version == RECORD.version:
            keys.store.save(changed, expected=RECORD.version)

    assert list(keys.store.check(repair=True, seen=change)) == []
    assert keys.client.zscore(keys.expiry, RECORD.id) == changed.expires_at
    assert kinds(keys.store) == []
    assert list(keys.store.find(SessionQuery(user_id="alice"))) == [changed]


def test_index_made_anew_ends_by_itself(keys: Keys) -> None:
    """As one does that a save makes: nothing stays for good on a server whose application is gone."""
    indexes = keys.expiry, keys.facts, keys.user
    before = [keys.client.pttl(key) for key in indexes]
    keys.client.delete(*indexes)
    kinds(keys.store, repair=True)
    after = [keys.client.pttl(key) for key in indexes]
    assert min(before) > 0
    assert all(abs(then - now) < 60_000 for now, then in zip(after, before, strict=True)), (after, before)


def test_record_of_another_session_of_redis(keys: Keys) -> None:
    """A hash that was copied to another session's key opens nothing there, and is told."""
    other = keys.session[:-1] + ("0" if RECORD.id[-1] != "0" else "1")
    keys.client.copy(keys.session, other)
    assert kinds(keys.store, repair=True) == [("record", False)]
    assert keys.client.exists(other)


def test_session_under_the_key_of_another_shard(keys: Keys) -> None:
    """Nothing would find it there."""
    shard = RECORD.id[:3]
    keys.client.copy(keys.session, keys.session.replace(f"{{{shard}}}", "{3ff}" if shard != "3ff" else "{3fe}"))
    assert kinds(keys.store, repair=True) == [("foreign", False)]


def test_entry_of_a_session_whose_facts_are_damaged(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose it is cannot be known from them, so its entry under its user stays."""
    monkeypatch.setattr(RedisCheck, "_sessions", lambda self, sessions: iter(()))
    keys.client.hset(keys.session, "facts", b"wrong")
    assert kinds(keys.store, repair=True) == []
    assert keys.client.zscore(keys.user, RECORD.id) is not None


def test_entry_that_has_gone_before_it_is_looked_at(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an index that is gone through a part at a time; its session went with it."""
    monkeypatch.setattr("flask_persist_session.stores.redis_upkeep._AT_ONCE", 0)
    members = _Checked.members

    def late(self: _Checked, key: str, count: int) -> Iterator[str]:
        found = list(members(self, key, count))
        keys.store.delete(RECORD.id)
        return iter(found)

    monkeypatch.setattr(_Checked, "members", late)
    assert kinds(keys.store) == []


# Others at work -------------------------------------------------------------------------------------------------------


def work(url: str, number: int, stop: Any, started: Any) -> int:
    """Create, change, end and remove sessions until told to stop; returns how many are left."""
    store, rng, kept = open_store(url), random.Random(number), {}
    started.wait()
    for count in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
        record = make_record(number * 10**6 + count, user_id=rng.choice((None, "alice", f"user {count}")))
        store.save(record, expected=0)
        kept[record.id] = record
        for session_id in rng.sample(list(kept), min(len(kept), 6)):
            record = following(kept[session_id], data=rng.randbytes(rng.randrange(3000)))
            if kept[session_id].ended_at is None and rng.random() < 0.1:
                record = following(kept[session_id], ended_at=1.0, end_reason="logout", data=b"")
            if record.ended_at is None:
                store.history.append(session_id, [rng.randbytes(rng.randrange(300))], created_at=1.0)
            store.save(record, expected=record.version - 1)
            kept[session_id] = record
        if len(kept) > 40:
            session_id = rng.choice(list(kept))
            assert store.delete(session_id, expected=kept.pop(session_id).version)
    store.close()
    return len(kept)


def test_nothing_is_found_while_others_work(shared_url: str) -> None:
    """While processes create, change, end and remove sessions, checks find nothing, and their repairs harm nobody."""
    findings: list[Finding] = []
    checked = 0
    with PROCESSES.Manager() as manager, PROCESSES.Pool(2) as pool, closing(open_store(shared_url)) as store:
        stop, started = manager.Event(), manager.Barrier(3)
        working = [pool.apply_async(work, (shared_url, number, stop, started)) for number in range(2)]
        started.wait(60)
        while checked < 10:
            seen: list[Any] = []
            findings += store.check(repair=checked % 2 == 1, seen=seen.append)
            list(store.optimize())
            checked += len(seen) > 30  # now there is something to be met in the middle
        stop.set()
        left = sum(worker.get(timeout=60) for worker in working)
        assert findings == []
        assert store.count(SessionQuery()) == left
        assert list(store.check(repair=False)) == []
