"""Backups and restores with other processes at work: writers, killed runs, two at once, a full disk, Ctrl-C."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest

from flask_persist_session import (
    BackupError,
    Change,
    Deletion,
    RestoreReport,
    SessionManager,
    SessionRecord,
    SessionStore,
    StoreError,
    open_store,
)
from flask_persist_session.backup import Strategy, back_up, restore
from flask_persist_session.backup_files import backups_in
from flask_persist_session.testing import make_record
from tests.killing import MANY, assert_whole, killed_runs
from tests.servers import DEADLINE, wait_until
from tests.web import PROCESSES

NOW = 1_700_000_000.0
KINDS = ("sqlite", "redis", "file", "postgresql", "mysql")


def manager_of(store: SessionStore) -> SessionManager:
    return SessionManager(store, clock=lambda: NOW)


def records(count: int, size: int = 200) -> list[SessionRecord]:
    return [
        make_record(number, user_id=None, data=random.Random(number).randbytes(size), expires_at=NOW + 86400)
        for number in range(count)
    ]


def save_all(store: SessionStore, wanted: list[SessionRecord]) -> None:
    assert all(store.save_many([Change(record=record, expected=0) for record in wanted]))


def contents(store: SessionStore) -> dict[str, SessionRecord]:
    return {record.id: replace(record, version=1) for record in store.scan()}


def make_backup(url: str, place: str) -> None:
    """What a process does that is killed or runs beside others."""
    with closing(open_store(url)) as store:
        back_up({"web": manager_of(store)}, place, now=NOW)


def load(url: str, path: str, strategy: Strategy = "skip") -> RestoreReport:
    with closing(open_store(url)) as store:
        return restore({"web": manager_of(store)}, path, strategy=strategy)


# A snapshot while others write ----------------------------------------------------------------------------------------


FIRST, LAST = make_record(id="000" + "0" * 64, user_id=None), make_record(id="3ff" + "f" * 64, user_id=None)


def write_in_step(url: str, started: Event, stop: Event) -> None:
    """Save the first record and then the last one, over and over: no moment has the last one ahead."""
    store, version = open_store(url), 1
    while not stop.is_set():
        for record in FIRST, LAST:
            store.save(replace(record, version=version + 1), expected=version)
        version += 1
        started.set()


@pytest.fixture
def writer(new_url: Callable[[str], str], request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a store of 2,000 records in which a process writes all the time."""
    url = new_url(request.param)
    store = open_store(url)
    save_all(store, [FIRST, *records(2000), LAST])
    started, stop = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=write_in_step, args=(url, started, stop))
    process.start()
    try:
        assert started.wait(DEADLINE)
        yield url
    finally:
        stop.set()
        process.join(DEADLINE)
        assert process.exitcode == 0
        store.close()


def versions_of(found: Iterator[SessionRecord], store: SessionStore) -> tuple[int, int]:
    """The versions of the first and the last record of a listing in which some time passes."""
    versions = {}
    for number, record in enumerate(found):
        if record.id in (FIRST.id, LAST.id):
            versions[record.id] = record.version
        if number == 1000:
            wait_for_saves(store)
    return versions[FIRST.id], versions[LAST.id]


def wait_for_saves(store: SessionStore) -> None:
    def version() -> int:
        found = store.get(FIRST.id)
        assert found is not None
        return found.version

    enough = version() + 5
    wait_until(lambda: version() > enough, "some saves")


@pytest.mark.parametrize("writer", ["sqlite", "postgresql", "mysql"], indirect=True)
def test_a_snapshot_is_of_one_moment(writer: str) -> None:
    """Records that are written one after the other differ by one version at most, however long the reading takes."""
    store = open_store(writer)
    first, last = versions_of(store.snapshot(), store)
    assert first - last in (0, 1)
    first, last = versions_of(store.scan(), store)
    assert last > first + 1  # what a listing gives instead, so that the test above means something
    store.close()


@pytest.mark.parametrize("writer", KINDS, indirect=True)
def test_a_backup_while_others_write_is_whole(writer: str, tmp_path: Path) -> None:
    """Every record that is there all the time is in it, and it verifies."""
    make_backup(writer, str(tmp_path))
    [found] = backups_in(str(tmp_path))
    assert found.manifest is not None
    assert found.manifest.records == 2002


@pytest.mark.parametrize("writer", KINDS, indirect=True)
def test_a_restore_while_others_write_loses_nothing(writer: str, tmp_path: Path) -> None:
    """Requests go on saving during a restore, and none of their saves is undone."""
    make_backup(writer, str(tmp_path))
    [found] = backups_in(str(tmp_path))
    store = open_store(writer)
    before = store.get(FIRST.id)
    assert before is not None
    for record in records(2000)[::2]:
        store.delete(record.id)
    report = load(writer, found.path)
    after = store.get(FIRST.id)
    assert after is not None
    assert (report.restored, report.skipped) == (1000, 1002)
    assert after.version >= before.version
    assert len(contents(store)) == 2002
    store.close()


# Killed at any moment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", MANY)
def test_a_killed_backup_leaves_nothing_like_one(kills: int, new_url: Callable[[str], str], tmp_path: Path) -> None:
    """However it ends, every archive verifies, the store is as it was, and a repeat succeeds and clears up."""
    url, place = new_url("sqlite"), tmp_path / "backups"
    store = open_store(url)
    wanted = records(3000, 1000)
    save_all(store, wanted)
    outcomes = []
    for killed in killed_runs(make_backup, url, str(place), times=kills):
        outcomes.append(killed)
        for found in backups_in(str(place)):
            assert found.error is None
            os.unlink(found.path)  # otherwise each round would verify those of all rounds before
    assert any(outcomes)
    make_backup(url, str(place))
    assert all(name.endswith(".tar.gz") and not name.startswith(".") for name in os.listdir(place))
    assert contents(store) == {record.id: record for record in wanted}
    store.close()


@pytest.mark.parametrize("kills", MANY)
@pytest.mark.parametrize("kind", ["sqlite", "redis", "file"])
def test_a_killed_restore_leaves_whole_sessions(
    kind: str, kills: int, new_url: Callable[[str], str], tmp_path: Path
) -> None:
    """What is there after each kill is whole and of the archive, and a repeat brings the rest."""
    source = open_store("memory://")
    wanted = {record.id: record for record in records(1500)}  # more than one batch
    save_all(source, list(wanted.values()))
    report = back_up({"web": manager_of(source)}, str(tmp_path), now=NOW)
    url = new_url(kind)
    store = open_store(url)
    outcomes = []
    for killed in killed_runs(load, url, report.path, "overwrite", times=kills):
        outcomes.append(killed)
        found = contents(store)
        assert found.items() <= wanted.items()
        step = 1 if len(outcomes) % 2 else 2
        store.delete_many([Deletion(id=session_id) for session_id in list(found)[::step]])
    assert any(outcomes)
    assert_whole(store)
    load(url, report.path)
    assert contents(store) == wanted
    store.close()


# Two at once ----------------------------------------------------------------------------------------------------------


def backup_at_once(url: str, place: str, start: Barrier) -> None:
    start.wait(DEADLINE)
    with closing(open_store(url)) as store:
        back_up({"web": manager_of(store)}, place, now=NOW, keep=10)


def test_backups_at_once_all_succeed(new_url: Callable[[str], str], tmp_path: Path) -> None:
    """Four processes that back up in the same second write an archive each, and none takes another's for abandoned."""
    url, place = new_url("sqlite"), tmp_path / "backups"
    store = open_store(url)
    save_all(store, records(2000, 1000))
    run_at_once(backup_at_once, [(url, str(place))] * 4)
    found = list(backups_in(str(place)))
    assert [item.manifest.records for item in found if item.manifest] == [2000] * 4
    assert len(os.listdir(place)) == 4
    store.close()


def restore_at_once(url: str, path: str, start: Barrier) -> None:
    start.wait(DEADLINE)
    load(url, path, "overwrite")


@pytest.mark.parametrize("kind", ["sqlite", "redis", "file"])
def test_restores_at_once_bring_back_everything(kind: str, new_url: Callable[[str], str], tmp_path: Path) -> None:
    """Two restores of one archive into one store end with each session once."""
    source, url = open_store("memory://"), new_url(kind)
    save_all(source, records(1000))
    report = back_up({"web": manager_of(source)}, str(tmp_path), now=NOW)
    run_at_once(restore_at_once, [(url, report.path)] * 2)
    store = open_store(url)
    assert contents(store) == contents(source)
    store.close()


def run_at_once(target: Callable[..., object], arguments: list[tuple[str, ...]]) -> None:
    start = PROCESSES.Barrier(len(arguments))
    processes = [PROCESSES.Process(target=target, args=(*these, start)) for these in arguments]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(4 * DEADLINE)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


# A full disk ----------------------------------------------------------------------------------------------------------

# RLIMIT_FSIZE makes the kernel refuse what goes beyond so many bytes of a file, in the middle of a write; SQLite takes its
# EFBIG for an I/O error. test_full_disk.py has a disk without room, where one can be mounted.


def with_small_files(size: int, target: Callable[..., object], *given: str) -> None:
    """Run *target* where no file can grow beyond *size* bytes, and expect one of our errors."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    target(*given)


def backup_expecting_error(url: str, place: str) -> None:
    with pytest.raises(BackupError, match=r"cannot be written to .*File too large"):
        make_backup(url, place)


def restore_expecting_error(url: str, path: str) -> None:
    with pytest.raises(StoreError):
        load(url, path)


def test_a_full_disk_during_a_backup(new_url: Callable[[str], str], tmp_path: Path) -> None:
    """The backup says so and leaves no file; older archives are all there, and a repeat with room succeeds."""
    url, place = new_url("sqlite"), tmp_path / "backups"
    store = open_store(url)
    save_all(store, records(100))
    make_backup(url, str(place))
    before = os.listdir(place)
    save_all(store, records(4000, 1000)[100:])
    in_process(with_small_files, 1_000_000, backup_expecting_error, url, str(place))
    assert os.listdir(place) == before
    make_backup(url, str(place))
    assert len(os.listdir(place)) == 2
    store.close()


@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_a_full_disk_during_a_restore(kind: str, new_url: Callable[[str], str], tmp_path: Path) -> None:
    """The restore ends with an error of the store; what is there is whole, and a repeat with room brings the rest."""
    source, url = open_store("memory://"), new_url(kind)
    save_all(source, [*records(600, 1000), make_record(9999, user_id=None, data=bytes(900_000), expires_at=NOW + 9)])
    report = back_up({"web": manager_of(source)}, str(tmp_path / "backups"), now=NOW)
    in_process(with_small_files, 600_000, restore_expecting_error, url, report.path)
    store = open_store(url)
    assert contents(store).items() < contents(source).items()
    load(url, report.path)
    assert contents(store) == contents(source)
    store.close()


def in_process(target: Callable[..., object], *given: object) -> None:
    process = PROCESSES.Process(target=target, args=given)
    process.start()
    process.join(4 * DEADLINE)
    assert process.exitcode == 0


# Ctrl-C ---------------------------------------------------------------------------------------------------------------

APPLICATION = """
from flask import Flask
from flask_persist_session import PersistSession
app = Flask(__name__)
app.config.update(SECRET_KEY="x", PERSIST_SESSION_STORE="sqlite:///{path}")
PersistSession(app)
"""


def test_ctrl_c_ends_a_command_without_harm(new_url: Callable[[str], str], tmp_path: Path) -> None:
    """A command that is interrupted in the middle says what to do next, with status 130, and leaves no file."""
    url, place = new_url("sqlite"), tmp_path / "backups"
    store = open_store(url)
    save_all(store, records(20_000, 1000))
    (tmp_path / "application.py").write_text(APPLICATION.format(path=url.removeprefix("sqlite:///")))
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "application", "sessions", "backup", str(place)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: place.is_dir() and bool(os.listdir(place)), "the unfinished archive")
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, printed) == (130, "")
    assert told == "Error: interrupted: no archive was written; run it again\n"
    assert os.listdir(place) == []
    store.close()
