"""Archives of what cleanups remove: nothing goes that is not in one, whatever goes wrong at that moment."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import stat
import subprocess
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest
from cachelib import SimpleCache
from flask import Flask
from markupsafe import Markup

from flask_persist_session import (
    BackupError,
    Change,
    ConfigError,
    MonthlyArchive,
    SerializationError,
    SessionManager,
    SessionRecord,
    SessionStore,
    open_store,
)
from flask_persist_session import monthly_archive as format_
from flask_persist_session.monthly_archive import is_monthly_archive, opened, read_archive, verify
from flask_persist_session.record_lines import dump_record, load_record
from flask_persist_session.sweeper import Sweeper
from flask_persist_session.testing import make_record
from tests.conftest import Clock
from tests.servers import DEADLINE, wait_until
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]
NOW = 1_700_010_000.0
NAME = "sessions_archive_202311.jsonl.gz"


def expired(number: int, **fields: Any) -> SessionRecord:
    return make_record(number, user_id=None, **fields)


def fill(store: SessionStore, count: int) -> list[SessionRecord]:
    records = [expired(number) for number in range(count)]
    assert all(store.save_many([Change(record=record, expected=0) for record in records]))
    return records


def manager_of(store: SessionStore, directory: Path, now: float = NOW) -> SessionManager:
    return SessionManager(store, archive=partial(MonthlyArchive(str(directory)).add, "web"), clock=Clock(now))


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an archive, as Python's own module for gzip reads them."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def ids(records: list[SessionRecord]) -> set[str]:
    return {record.id for record in records}


def archived_ids(path: Path) -> list[str]:
    return [line["id"] for line in lines(path)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "archives"


@pytest.fixture
def archive(directory: Path) -> MonthlyArchive:
    return MonthlyArchive(str(directory))


@pytest.fixture
def memory() -> SessionStore:
    return open_store("memory://")


# What is archived -----------------------------------------------------------------------------------------------------


def test_what_a_cleanup_removes_is_in_the_archive(store: SessionStore, directory: Path) -> None:
    """Expired, ended and idle sessions are archived as they were; active ones are neither archived nor removed."""
    removed = [
        expired(1),
        expired(2, ended_at=NOW - 90000, end_reason="logout", data=b"", tags=frozenset(), metadata={}),
        expired(3, accessed_at=NOW - 10 * 86400, expires_at=NOW + 86400, metadata={"name": "Zoë\n\u2028"}, version=7),
    ]
    active = expired(4, accessed_at=NOW, expires_at=NOW + 86400)
    store.save_many([Change(record=record, expected=0) for record in (*removed, active)])
    report = manager_of(store, directory).cleanup(older_than=86400)
    assert (report.expired, report.ended, report.idle) == (1, 1, 1)
    archived = dict.fromkeys(("web",), sorted(removed, key=lambda record: record.id))
    found = sorted((record for _, record in read_archive(str(directory / NAME), now=NOW)), key=lambda record: record.id)
    assert {"web": found} == archived
    assert [record.id for record in store.scan()] == [active.id]


def test_each_line_says_namespace_and_time(memory: SessionStore, directory: Path) -> None:
    """A line is a record of a backup, and has the namespace and when it was archived."""
    [record] = fill(memory, 1)
    manager_of(memory, directory).cleanup()
    [line] = lines(directory / NAME)
    assert (line.pop("namespace"), line.pop("archived_at")) == ("web", NOW)
    assert json.dumps(line, separators=(",", ":")).encode() + b"\n" == dump_record(record)


def test_a_record_comes_back_from_its_line() -> None:
    """Every field has its value and its type, version and order of tags included."""
    record = make_record(data=bytes(range(256)), metadata={"a": [1, 2.5, None, {"id": "x"}]}, version=9)
    loaded = load_record(dump_record(record))
    assert loaded == record
    assert type(loaded.tags) is frozenset


@pytest.mark.parametrize(
    "value", ["\ud800", "Zoë\udfff", 2**70, -(2**70), 0.1, -0.0, 1e-300, {"\ud83d": [None, True]}], ids=ascii
)
def test_whatever_is_json_comes_back_from_a_line(value: Any) -> None:
    """Halves of characters, and numbers of any size, come back as they were."""
    record = make_record(metadata={"value": value})
    assert repr(load_record(dump_record(record)).metadata) == repr({"value": value})


def test_a_text_of_a_type_of_its_own_is_text_in_a_line() -> None:
    """Some stores keep what they are given, and it is JSON for Python."""
    record = make_record(metadata={"value": Markup("<b>")})
    assert load_record(dump_record(record)).metadata == {"value": "<b>"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 7),
        ("user_id", 7),
        ("user_id", "\ud800"),
        ("tags", "tag"),
        ("tags", [7]),
        ("metadata", [1]),
        ("metadata", None),
        ("data", "no base64!"),
        ("data", "\ud800"),
        ("data", None),
        ("created_at", "now"),
        ("expires_at", True),
        ("ended_at", [0.5]),
        ("version", 1.5),
        ("version", 0),
        ("entries", "seven"),
    ],
)
def test_a_line_with_a_field_of_another_type_is_no_record(field: str, value: Any) -> None:
    """Such a line is refused, be it of JSON that only Python reads."""
    for surrogate in ("", "\ud800"):
        fields = json.loads(dump_record(make_record())) | {field: value}
        with pytest.raises(SerializationError, match="the line is no session record"):
            load_record(json.dumps(fields | {"more": surrogate}).encode())


def test_a_dry_run_archives_nothing(memory: SessionStore, directory: Path) -> None:
    """What is only counted is not archived."""
    fill(memory, 3)
    assert manager_of(memory, directory).cleanup(dry_run=True).removed == 3
    assert not directory.exists()


def test_nothing_to_remove_makes_no_archive(memory: SessionStore, directory: Path) -> None:
    """A cleanup that finds nothing leaves the disk alone."""
    manager_of(memory, directory).cleanup()
    assert not directory.exists()


def test_a_month_has_a_file_of_its_own(memory: SessionStore, directory: Path) -> None:
    """The file is that of the month in UTC in which the cleanup began, to the second."""
    turn = datetime(2026, 12, 1, tzinfo=timezone.utc).timestamp()
    for number, now in enumerate((turn - 1, turn)):
        memory.save(expired(number), expected=0)
        manager_of(memory, directory, now).cleanup()
    assert sorted(os.listdir(directory)) == ["sessions_archive_202611.jsonl.gz", "sessions_archive_202612.jsonl.gz"]
    assert archived_ids(directory / "sessions_archive_202612.jsonl.gz") == [expired(1).id]


def test_an_archive_is_for_its_user_alone(archive: MonthlyArchive, directory: Path) -> None:
    """Whatever the umask, the directory has mode 0700 and the file 0600."""
    before = os.umask(0)
    try:
        archive.add("web", [expired(1)], NOW)
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / NAME).stat().st_mode) == 0o600


def test_an_archive_has_no_token(memory: SessionStore, directory: Path) -> None:
    """What opened a session is nowhere in the archive of it."""
    manager = manager_of(memory, directory)
    token = manager.create({"a": 1}).token
    manager.clock = Clock(NOW + 100 * 86400)
    manager.cleanup()
    [path] = directory.iterdir()
    content = gzip.decompress(path.read_bytes())
    assert token
    assert token.encode() not in content
    assert token[3:].encode() not in content


def test_zcat_reads_it(archive: MonthlyArchive, directory: Path) -> None:
    """The usual tool prints all lines of all batches."""
    for number in range(5):
        archive.add("web", [expired(number)], NOW)
    printed = subprocess.run(["zcat", str(directory / NAME)], capture_output=True, check=True).stdout
    assert [json.loads(line)["id"] for line in printed.splitlines()] == [expired(number).id for number in range(5)]


def test_large_batches_are_several_members(archive: MonthlyArchive, directory: Path) -> None:
    """Members stay small, and a record that is larger than one has one of its own."""
    records = [expired(number, data=os.urandom(400_000)) for number in range(5)]
    records.insert(2, expired(9, data=os.urandom(3_000_000)))
    archive.add("web", records, NOW)
    assert [record for _, record in read_archive(str(directory / NAME), now=NOW)] == records
    assert (directory / NAME).read_bytes().count(format_._START) == 6


# A crash in between ---------------------------------------------------------------------------------------------------


class _KilledStore:
    """A store whose process is killed at the removal: before it or after it."""

    def __init__(self, store: SessionStore, when: str) -> None:
        self._store, self._when = store, when

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete_many(self, deletions: Any) -> Any:
        if self._when == "after":
            self._store.delete_many(deletions)
        os.kill(os.getpid(), signal.SIGKILL)


def clean_up_killed(url: str, directory: Path, when: str) -> None:
    store: Any = _KilledStore(open_store(url), when)
    manager_of(store, directory).cleanup()


@pytest.mark.parametrize(("when", "left"), [("before", 1200), ("after", 700)])
def test_a_killed_cleanup_has_archived_what_it_removed(shared_url: str, directory: Path, when: str, left: int) -> None:
    """Killed between archiving and removing a batch, or just after, all sessions are in the store or in the archive."""
    with closing(open_store(shared_url)) as store:
        records = fill(store, 1200)
        process = PROCESSES.Process(target=clean_up_killed, args=(shared_url, directory, when))
        process.start()
        process.join(DEADLINE)
        assert process.exitcode == -signal.SIGKILL
        there = {record.id for record in store.scan()}
        assert len(there) == left
        assert len(archived_ids(directory / NAME)) == 500
        assert there | set(archived_ids(directory / NAME)) == ids(records)
        manager_of(store, directory).cleanup()
        assert set(archived_ids(directory / NAME)) == ids(records)
        assert len(archived_ids(directory / NAME)) == left + 500


@pytest.mark.parametrize("cut", [1, 8, 15, 16, 19, 20, 21, 200, -9, -1])
def test_what_a_crash_left_unfinished_is_cut_off(directory: Path, cut: int) -> None:
    """A member that ends anywhere within is no hindrance: the next batch takes its place, and what was before stays."""
    MonthlyArchive(str(directory)).add("web", [expired(1)], NOW)
    path = directory / NAME
    whole = path.read_bytes()
    MonthlyArchive(str(directory)).add("web", [expired(2, data=os.urandom(5000))], NOW)
    added = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + added[:cut])
    assert [record.id for _, record in read_archive(str(path), now=NOW)] == [expired(1).id]
    MonthlyArchive(str(directory)).add("web", [expired(3)], NOW)
    assert archived_ids(path) == [expired(1).id, expired(3).id]


def test_zeros_of_a_power_failure_are_cut_off(directory: Path) -> None:
    """Some file systems leave zeros where the last batch was to be."""
    MonthlyArchive(str(directory)).add("web", [expired(1)], NOW)
    with (directory / NAME).open("ab") as file:
        file.write(bytes(5000))
    MonthlyArchive(str(directory)).add("web", [expired(2)], NOW)
    assert archived_ids(directory / NAME) == [expired(1).id, expired(2).id]


def damage(path: Path, at: int) -> bytes:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("at", [0, 12, 18])
def test_a_damaged_archive_is_never_cut(directory: Path, at: int) -> None:
    """Where a whole member follows a damaged one, nothing is cut off or added: the cleanup stops and says what to do."""
    for number in range(2):
        MonthlyArchive(str(directory)).add("web", [expired(number)], NOW)
    content = damage(directory / NAME, at)
    with pytest.raises(BackupError, match=f"{NAME} is damaged at byte 0.*move it"):
        MonthlyArchive(str(directory)).add("web", [expired(2)], NOW)
    assert (directory / NAME).read_bytes() == content


def test_a_file_of_others_is_left_alone(directory: Path) -> None:
    """What has the name of an archive and is none is neither cut nor added to."""
    directory.mkdir()
    (directory / NAME).write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(BackupError, match="no archive of this package"):
        MonthlyArchive(str(directory)).add("web", [expired(2)], NOW)
    assert gzip.decompress((directory / NAME).read_bytes()) == b"{}\n"


def add_until_killed(directory: Path, started: Event) -> None:
    archive = MonthlyArchive(str(directory))
    number = 0
    while True:
        archive.add("web", [expired(number + at, data=os.urandom(20_000)) for at in range(10)], NOW)
        number += 10
        started.set()


def test_an_archive_survives_kills(directory: Path) -> None:
    """Processes that are killed while they add leave batches that verify, each after those before."""
    before = 0
    for _ in range(6):
        started = PROCESSES.Event()
        process = PROCESSES.Process(target=add_until_killed, args=(directory, started))
        process.start()
        assert started.wait(DEADLINE)
        process.kill()
        process.join(DEADLINE)
        with opened(str(directory / NAME)) as file:
            found = verify(file, now=NOW).records
        assert found >= before + 10
        before = found


# Several at once ------------------------------------------------------------------------------------------------------


def clean_up_together(url: str, directory: Path, barrier: Barrier) -> None:
    with closing(open_store(url)) as store:
        barrier.wait(DEADLINE)
        manager_of(store, directory).cleanup()


def test_two_processes_clean_up_at_once(shared_url: str, directory: Path) -> None:
    """All that they remove is in the archive, once or twice, and the archive is whole."""
    with closing(open_store(shared_url)) as store:
        records = fill(store, 1200)
        barrier = PROCESSES.Barrier(2)
        processes = [PROCESSES.Process(target=clean_up_together, args=(shared_url, directory, barrier)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(DEADLINE)
        assert [process.exitcode for process in processes] == [0, 0]
        assert list(store.scan()) == []
        assert set(archived_ids(directory / NAME)) == ids(records)


def test_an_archive_that_was_moved_away_is_begun_anew(archive: MonthlyArchive, directory: Path) -> None:
    """An operator may take a file away at any time: the next batch begins another one."""
    archive.add("web", [expired(1)], NOW)
    (directory / NAME).rename(directory / "taken.jsonl.gz")
    archive.add("web", [expired(2)], NOW)
    assert archived_ids(directory / NAME) == [expired(2).id]


def test_who_waited_for_a_file_that_was_moved_away_begins_another(
    archive: MonthlyArchive, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is taken away while a process waits for its lock is not added to any more."""
    archive.add("web", [expired(1)], NOW)
    flock, taken = format_.fcntl.flock, directory / "taken.jsonl.gz"

    def move_away(handle: int, operation: int) -> None:
        flock(handle, operation)
        if not taken.exists():
            (directory / NAME).rename(taken)

    monkeypatch.setattr(format_.fcntl, "flock", move_away)
    archive.add("web", [expired(2)], NOW)
    assert (archived_ids(taken), archived_ids(directory / NAME)) == ([expired(1).id], [expired(2).id])


# Where nothing can be written -----------------------------------------------------------------------------------------


def clean_up_with_little_room(directory: Path, most: int) -> tuple[int, str]:
    """How many sessions stay, and the error, where the kernel refuses to write beyond so many bytes of a file.

    Without root there is no small disk to mount. The error is EFBIG instead of ENOSPC, and comes at the same place:
    after a write that was cut short. Python ignores the signal that comes with it.
    """
    store = open_store("memory://")
    fill(store, 1200)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        manager_of(store, directory).cleanup()
    except BackupError as error:
        return sum(1 for _ in store.scan()), str(error)
    return 0, ""


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    results = PROCESSES.SimpleQueue()
    process = PROCESSES.Process(target=_tell, args=(results, function, arguments))
    process.start()
    process.join(DEADLINE)
    assert process.exitcode == 0
    return results.get()


def _tell(results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    results.put(function(*arguments))


def test_a_full_disk_stops_the_cleanup(directory: Path) -> None:
    """The batch for which there is no room stays in the store and leaves no trace; those before are archived and gone."""
    MonthlyArchive(str(directory)).add("web", [expired(number) for number in range(500)], NOW)
    room = (directory / NAME).stat().st_size * 3 // 2
    (directory / NAME).unlink()
    left, message = in_a_process(clean_up_with_little_room, directory, room)
    assert left == 700
    assert f"{NAME} cannot be written: File too large" in message
    assert len(archived_ids(directory / NAME)) == 500


def clean_up_as_nobody(directory: Path) -> tuple[int, str]:
    """How many sessions stay, and the error, where this user may not write."""
    if os.geteuid() == 0:
        os.setuid(65534)
    store = open_store("memory://")
    fill(store, 3)
    with pytest.raises(BackupError) as caught:
        manager_of(store, directory).cleanup()
    return sum(1 for _ in store.scan()), str(caught.value)


def test_a_directory_that_cannot_be_written_stops_the_cleanup() -> None:
    """Nothing is removed, and the error names the archive and what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        left, message = in_a_process(clean_up_as_nobody, Path(folder))
        Path(folder).chmod(0o755)
    assert left == 3
    assert f"{NAME} cannot be written: Permission denied" in message


def test_a_directory_that_has_become_a_file_stops_the_cleanup(memory: SessionStore, directory: Path) -> None:
    """Whatever the disk answers, nothing is removed."""
    fill(memory, 3)
    directory.write_text("")
    with pytest.raises(BackupError, match="Not a directory"):
        manager_of(memory, directory).cleanup()
    assert sum(1 for _ in memory.scan()) == 3


def test_a_disk_that_fails_at_the_end_leaves_nothing(
    archive: MonthlyArchive, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that may not have reached the disk is not in the archive."""
    archive.add("web", [expired(1)], NOW)

    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(format_.os, "fsync", fail)
    with pytest.raises(BackupError, match="Input/output error"):
        archive.add("web", [expired(2)], NOW)
    monkeypatch.undo()
    assert archived_ids(directory / NAME) == [expired(1).id]


def test_a_link_in_place_of_an_archive_is_not_followed(memory: SessionStore, directory: Path, tmp_path: Path) -> None:
    """It might lead to any file of this user: nothing is written there, and nothing is removed from the store."""
    fill(memory, 3)
    directory.mkdir()
    other = tmp_path / "mine"
    other.touch()
    os.symlink(other, directory / f"sessions_archive_{datetime.fromtimestamp(NOW, timezone.utc):%Y%m}.jsonl.gz")
    with pytest.raises(BackupError, match="cannot be written"):
        manager_of(memory, directory).cleanup()
    assert other.read_bytes() == b""
    assert len(list(memory.scan())) == 3


def test_the_sweeper_logs_it_and_goes_on(memory: SessionStore, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run that cannot archive is told in the log, and a later one does the work."""
    fill(memory, 3)
    directory.write_text("")
    manager = manager_of(memory, directory)
    sweeper = Sweeper({"web": manager}, 0.01)
    sweeper.start()
    wait_until(lambda: caplog.text, "the error in the log")
    directory.unlink()
    wait_until(lambda: not list(memory.scan()), "the sweep after it")
    sweeper.stop()
    assert "the cleanup of sessions failed; it is tried again" in caplog.text
    assert "Not a directory" in caplog.text
    assert len(archived_ids(next(directory.iterdir()))) == 3


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_stays_the_same(archive: MonthlyArchive, directory: Path) -> None:
    """Adding, verifying and searching 10 MB takes some members' worth of memory."""
    batch = [expired(number, data=os.urandom(2000)) for number in range(500)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10):
            archive.add("web", batch, NOW)
        with opened(str(directory / NAME)) as file:
            assert verify(file, now=NOW).records == 10 * 500
        assert archive.search("3ff" + "f" * 64) is None
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert (directory / NAME).stat().st_size > 10e6
    assert peak < 7e6


def test_an_end_that_is_known_is_not_looked_for(
    archive: MonthlyArchive, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that adds many batches looks for the end of the file once, and again after somebody else has added."""
    looked: list[int] = []
    members = format_._members
    monkeypatch.setattr(format_, "_members", lambda handle: looked.append(handle) or members(handle))
    for number in range(5):
        archive.add("web", [expired(number)], NOW)
    assert len(looked) == 1
    MonthlyArchive(str(directory)).add("web", [expired(5)], NOW)
    archive.add("web", [expired(6)], NOW)
    assert len(looked) == 3
    assert len(archived_ids(directory / NAME)) == 7


# Looking up -----------------------------------------------------------------------------------------------------------


def test_a_session_is_found_by_the_beginning_of_its_id(archive: MonthlyArchive, directory: Path) -> None:
    """Its last state is found, with when it was archived and where."""
    record = expired(1)
    later = replace(record, version=2, ended_at=NOW, end_reason="logout", data=b"")
    archive.add("web", [record, expired(2)], NOW)
    archive.add("web", [later, expired(3)], NOW + 60)
    archive.add("web", [expired(4)], NOW + 90 * 86400)
    found = archive.search(record.id[:8])
    assert found is not None
    assert (found.record, found.namespace, found.archived_at) == (later, "web", NOW + 60)
    assert found.path == str(directory / NAME)


def test_the_newest_month_is_searched_first(archive: MonthlyArchive, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit ends the search: what is older is not even opened."""
    archive.add("web", [expired(1)], NOW)
    archive.add("web", [expired(2)], NOW + 90 * 86400)
    looked: list[str] = []
    monkeypatch.setattr(format_, "opened", lambda path: looked.append(os.path.basename(path)) or opened(path))
    assert archive.search(expired(2).id) is not None
    assert looked == ["sessions_archive_202402.jsonl.gz"]


def test_an_id_elsewhere_in_a_line_is_not_found(archive: MonthlyArchive) -> None:
    """Only the id of a session itself counts, not one that its metadata has."""
    other = expired(2).id
    archive.add("web", [expired(1, metadata={"id": other, "note": f'\n{{"id":"{other}'})], NOW)
    assert archive.search(other) is None


def test_progress_adds_up_to_the_size(archive: MonthlyArchive) -> None:
    """A search without a hit has told of all bytes."""
    for month in range(3):
        archive.add("web", [expired(number) for number in range(10)], NOW + month * 31 * 86400)
    told: list[int] = []
    archive.search("3ff" + "f" * 64, lambda count: told.append(count))
    assert sum(told) == archive.size() > 0


def test_other_files_are_passed_over(archive: MonthlyArchive, directory: Path) -> None:
    """What an operator keeps beside the archives disturbs nobody."""
    archive.add("web", [expired(1)], NOW)
    (directory / "README").write_text("kept for two years")
    (directory / f"{NAME}.old").write_text("broken")
    assert archive.search("3ff" + "f" * 64) is None


def test_damage_is_told_if_nothing_was_found(archive: MonthlyArchive, directory: Path) -> None:
    """A damaged member hides only its own sessions; who looks for one of them, or for another, is told."""
    for number in range(3):
        archive.add("web", [expired(number)], NOW)
    damage(directory / NAME, (directory / NAME).stat().st_size // 2)
    assert archive.search(expired(0).id) is not None
    assert archive.search(expired(2).id) is not None
    with pytest.raises(BackupError, match=f"{NAME} is refused: it is damaged"):
        archive.search(expired(1).id)


def test_no_archives_have_no_session(archive: MonthlyArchive) -> None:
    """Before the first cleanup there is no directory, and nothing to find."""
    assert archive.search("3ff" + "f" * 64) is None
    assert archive.size() == 0


@pytest.mark.parametrize("beginning", ["", "3f", "XYZ", "3ff" * 40, 'abc"'])
def test_what_is_no_id_is_not_looked_for(archive: MonthlyArchive, beginning: str) -> None:
    """Nothing else gets into the search."""
    with pytest.raises(ValueError, match="session id"):
        archive.search(beginning)


# For a restore --------------------------------------------------------------------------------------------------------


def test_only_the_last_state_is_read(archive: MonthlyArchive, directory: Path) -> None:
    """A session that was archived, stayed and was signed out later is not read as active: a restore could revive it."""
    idle = expired(1, expires_at=NOW + 86400)
    gone = replace(idle, version=2, ended_at=NOW, end_reason="logout", data=b"")
    archive.add("web", [idle, expired(2)], NOW)
    archive.add("web", [idle], NOW)
    archive.add("web", [gone], NOW)
    assert [record for _, record in read_archive(str(directory / NAME), now=NOW)] == [expired(2), gone]
    with opened(str(directory / NAME)) as file:
        assert is_monthly_archive(file)
        assert verify(file, now=NOW).records == 2


@pytest.mark.parametrize("at", [0, 30, -30, -5, -1])
def test_a_damaged_archive_is_refused_before_the_first_session(directory: Path, at: int) -> None:
    """Checksums of all members are compared before anything is read of the first."""
    for number in range(3):
        MonthlyArchive(str(directory)).add("web", [expired(number)], NOW)
    damage(directory / NAME, at)
    with pytest.raises(BackupError, match=f"{NAME} is refused"):
        next(read_archive(str(directory / NAME), now=NOW))


def test_a_bomb_of_zeros_is_refused(directory: Path) -> None:
    """A member that would fill the memory is not read to its end."""
    directory.mkdir()
    (directory / NAME).write_bytes(format_._member(bytes(100_000_000)))
    with pytest.raises(BackupError, match="more than 67,108,864 bytes"):
        next(read_archive(str(directory / NAME), now=NOW))


BEYOND = dump_record(make_record(0), namespace="web", archived_at=1e300)


@pytest.mark.parametrize("content", [b"[]\n", b"{}\n", b"\n", b"no line end", b'{"id":"0"}\n', b"\xff\n", BEYOND])
def test_lines_that_are_no_session_are_refused(directory: Path, content: bytes) -> None:
    """A whole member of something else is no session."""
    directory.mkdir()
    (directory / NAME).write_bytes(format_._member(content))
    with pytest.raises(BackupError):
        next(read_archive(str(directory / NAME), now=NOW))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", gzip.compress(b"a tar", mtime=0)])
def test_other_files_are_no_archive(tmp_path: Path, content: bytes) -> None:
    """A backup and other files are told from archives by how they begin."""
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        assert not is_monthly_archive(file)


def test_a_missing_archive_is_told(tmp_path: Path) -> None:
    """There is nothing to read where there is no file."""
    with pytest.raises(BackupError, match="No such file"):
        next(read_archive(str(tmp_path / NAME), now=NOW))


# The application and its commands -------------------------------------------------------------------------------------


@pytest.fixture
def app(make_app: MakeApp, clock: Clock, directory: Path) -> Flask:
    """An application whose sessions of Ada have been cleaned up: one expired, one signed out, one idle."""
    app = make_app(PERSIST_SESSION_ARCHIVE_DIR=directory)
    manager = app.extensions["persist_session"].manager
    manager.clock = clock
    app.config["IDS"] = {
        "expired": manager.create({"cart": ["apple"]}, user_id="Ada", lifetime=86400).id,
        "ended": manager.create({"cart": ["pear"]}, user_id="Ada").id,
        "idle": manager.create({"cart": ["plum"]}, user_id="Ada").id,
    }
    manager.end(app.config["IDS"]["ended"], "logout")
    clock.advance(5 * 86400)
    assert manager.cleanup(older_than=3 * 86400).removed == 3
    clock.advance(3600)
    return app


def run(app: Flask, *arguments: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["sessions", *arguments], env={"COLUMNS": "100"})
    return result.exit_code, result.output


def test_show_finds_what_was_removed(app: Flask, directory: Path) -> None:
    """All that was known of the session, its data, and that it is in an archive."""
    status, output = run(app, "show", app.config["IDS"]["expired"][:12])
    assert status == 0
    assert output.startswith("archived  2023-11-19 22:13:20 UTC (60 minutes ago), in ")
    assert str(directory / NAME) in output
    assert "state     expired" in output
    assert "['apple']" in output


def test_show_prints_it_as_json(app: Flask, directory: Path) -> None:
    """A program reads where it is and since when."""
    status, output = run(app, "show", "--json", app.config["IDS"]["idle"])
    told = json.loads(output)
    assert (status, told["data"], told["archive"]) == (0, {"cart": ["plum"]}, str(directory / NAME))
    assert told["archived_at"] == 1_700_000_000 + 5 * 86400


@pytest.mark.parametrize(
    ("which", "fate"),
    [
        ("expired", "expired at 2023-11-15 22:14:20 UTC"),
        ("ended", 'ended at 2023-11-14 22:13:20 UTC (5 days ago) with the reason "logout"'),
        ("idle", "was idle and removed from the store at 2023-11-19 22:13:20 UTC (60 minutes ago)"),
    ],
)
def test_why_tells_what_became_of_it(app: Flask, which: str, fate: str) -> None:
    """Why it ended and when, and when it was removed."""
    status, output = run(app, "why", app.config["IDS"][which])
    assert status == 0
    assert f"of user 'Ada' {fate}" in output
    assert "removed from the store at 2023-11-19 22:13:20 UTC (60 minutes ago)" in output


def test_show_says_that_an_idle_one_was_removed(app: Flask) -> None:
    """A session that no request can use is not called active."""
    _, output = run(app, "show", app.config["IDS"]["idle"])
    assert "state     removed as idle" in output


def test_a_session_in_the_store_is_shown_from_there(app: Flask, clock: Clock) -> None:
    """The archives are not looked at for what the store has."""
    manager: SessionManager = app.extensions["persist_session"].manager
    [archived] = [record for _, record in read_archive(app.extensions["persist_session"].archive._paths()[0], now=0)][:1]
    manager.store.save(replace(archived, expires_at=clock() + 86400), expected=0)
    status, output = run(app, "why", archived.id)
    assert status == 0
    assert "is active" in output


def test_an_unknown_session_is_told(app: Flask) -> None:
    """What is in neither store nor archive is told as without archives."""
    status, output = run(app, "show", "3ff" + "f" * 64)
    assert status == 1
    assert "no session 3ff" in output
    assert run(app, "why", "no-id")[0] == 1


def test_a_restore_brings_back_what_would_be_active(app: Flask, directory: Path) -> None:
    """A session that was removed as idle comes back with its data; those that had expired or ended do not."""
    status, output = run(app, "restore", "--yes", str(directory / NAME))
    assert (status, output.splitlines()[0][:26]) == (0, "restored 1 of 3 sessions; ")
    assert "2 expired" in output
    assert [record.id for record in app.extensions["persist_session"].store.scan()] == [app.config["IDS"]["idle"]]


def test_a_restore_revives_nobody(app: Flask, directory: Path, clock: Clock) -> None:
    """Who was archived as idle, came back at that moment and signed out later stays signed out."""
    archive: MonthlyArchive = app.extensions["persist_session"].archive
    found = archive.search(app.config["IDS"]["idle"])
    assert found is not None
    gone = replace(found.record, data=b"", ended_at=clock(), end_reason="logout", expires_at=clock(), version=2)
    archive.add("web", [gone], clock())
    assert run(app, "restore", "--yes", str(directory / NAME))[0] == 0
    assert list(app.extensions["persist_session"].store.scan()) == []


def test_a_restore_of_a_damaged_archive_changes_nothing(app: Flask, directory: Path) -> None:
    """The whole file is verified before the first session is stored."""
    app.extensions["persist_session"].archive.add("web", [expired(1)], NOW)
    damage(directory / NAME, -10)
    status, output = run(app, "restore", "--yes", str(directory / NAME))
    assert (status, list(app.extensions["persist_session"].store.scan())) == (1, [])
    assert "is refused: it is damaged at byte" in output


def test_a_cleanup_that_cannot_archive_fails(app: Flask, directory: Path, clock: Clock) -> None:
    """The command says in one line what is wrong, with exit status 1."""
    app.extensions["persist_session"].manager.create({"a": 1}, lifetime=60)
    clock.advance(86400)
    (directory / NAME).write_bytes(gzip.compress(b"of somebody else"))
    status, output = run(app, "cleanup")
    assert status == 1
    assert output.startswith("Error: the archive ")
    assert "is damaged at byte 0, or no archive of this package" in output
    assert app.extensions["persist_session"].manager.stats().total == 1


@pytest.mark.parametrize("value", ["", 7, True, b"archives", "a\0b", ["archives"]])
def test_a_wrong_directory_is_refused(make_app: MakeApp, value: Any) -> None:
    """What is no path of a directory raises when the extension is set up."""
    with pytest.raises(ConfigError, match=r"PERSIST_SESSION_ARCHIVE_DIR is .*the path of a directory, or None"):
        make_app(PERSIST_SESSION_ARCHIVE_DIR=value)


def test_a_file_is_no_directory(make_app: MakeApp, tmp_path: Path) -> None:
    """A file where the archives are to be raises when the extension is set up."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"PERSIST_SESSION_ARCHIVE_DIR is 'taken'.* no directory"):
        make_app(PERSIST_SESSION_ARCHIVE_DIR="taken")


def test_a_store_that_cannot_list_has_no_archive(make_app: MakeApp) -> None:
    """A cache removes its entries itself, so nothing of them would be archived: that is told at the start."""
    with pytest.raises(ConfigError, match="PERSIST_SESSION_ARCHIVE_DIR needs a store that can list"):
        make_app(SimpleCache(), PERSIST_SESSION_ARCHIVE_DIR="archives")


def test_a_relative_directory_is_in_the_instance_folder(make_app: MakeApp, tmp_path: Path, clock: Clock) -> None:
    """It is made there with the first session that is archived."""
    manager = make_app(PERSIST_SESSION_ARCHIVE_DIR="kept/archives").extensions["persist_session"].manager
    manager.clock = clock
    manager.create({"a": 1})
    assert not (tmp_path / "kept").exists()
    clock.advance(40 * 86400)
    manager.cleanup()
    assert os.listdir(tmp_path / "kept" / "archives") == ["sessions_archive_202312.jsonl.gz"]
