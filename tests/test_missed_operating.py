"""Promises of backups, restores, migrations, take-overs and checks that the other tests take for granted."""

from __future__ import annotations

import errno
import gc
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cachelib import FileSystemCache, SimpleCache
from flask import Flask

from flask_persist_session import (
    BackupError,
    BackupReport,
    Change,
    CheckReport,
    Finding,
    MonthlyArchive,
    PersistSession,
    RestoreReport,
    SerializationError,
    SessionConflict,
    SessionManager,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoreError,
    StoreUnavailable,
    backup_created,
    open_store,
    upkeep,
)
from flask_persist_session import backup as backup_module
from flask_persist_session import backup_files as files_module
from flask_persist_session import monthly_archive as monthly_module
from flask_persist_session.announcer import Announcer
from flask_persist_session.archive import ArchiveWriter
from flask_persist_session.auto_backup import AutomaticBackup
from flask_persist_session.backup import Strategy, back_up, restore
from flask_persist_session.backup_files import backups_in
from flask_persist_session.cleanup import NOTE
from flask_persist_session.migrate import Migration, MigrationReport, move_rest
from flask_persist_session.stores import databases, file_upkeep, frames
from flask_persist_session.stores.frames import name_of_user
from flask_persist_session.stores.migrating import MigratingStore
from flask_persist_session.testing import following, make_record
from flask_persist_session.upgrade import ImportReport
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.taken_over import add_views, with_cookie

MakeApp = Callable[..., Flask]


@pytest.fixture
def manager(clock: Clock) -> SessionManager:
    return new_manager(clock)


def new_manager(clock: Clock, url: str = "memory://") -> SessionManager:
    return SessionManager(open_store(url), clock=clock, user_key="_user_id")


def save_archive(manager: SessionManager, place: Path, **options: Any) -> str:
    return back_up({"web": manager}, str(place), **({"now": manager.clock()} | options)).path


def load(manager: SessionManager, path: object, strategy: Strategy = "skip", **options: Any) -> RestoreReport:
    return restore({"web": manager}, str(path), strategy=strategy, **options)


# The files of backups -------------------------------------------------------------------------------------------------


def test_a_backup_has_its_name_once_it_is_on_the_disk(
    manager: SessionManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the archive is synced before it is renamed, and the directory after that."""
    steps: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(handle: int) -> None:
        fsync(handle)
        found = os.fstat(handle)
        same = os.path.samestat(found, tmp_path.stat())
        steps.append(("directory", 0) if same else ("archive", found.st_size))

    def note_rename(old: str, new: str) -> None:
        rename(old, new)
        steps.append(("rename", 0))

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    path = save_archive(manager, tmp_path)
    assert steps == [("archive", Path(path).stat().st_size), ("rename", 0), ("directory", 0)]


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """What a backup left that was killed."""
    path = Path(files_module._unfinished(str(tmp_path / "sessions_backup_20200101-000000.tar.gz")))
    path.write_bytes(b"half of it")
    return path


def test_what_a_killed_backup_left_is_removed_by_the_next(manager: SessionManager, unfinished: Path) -> None:
    """It has no owner any more."""
    path = save_archive(manager, unfinished.parent)
    assert list(unfinished.parent.iterdir()) == [Path(path)]


def test_a_backup_under_way_is_not_taken_for_abandoned(manager: SessionManager, unfinished: Path) -> None:
    """Who writes it has locked it."""
    with unfinished.open("rb") as file:
        files_module.fcntl.flock(file, files_module.fcntl.LOCK_EX)
        save_archive(manager, unfinished.parent)
        assert unfinished.exists()


def before_the_first_lock(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen just before the first file is locked."""
    flock, todo = files_module.fcntl.flock, [happens]

    def late(handle: int, operation: int) -> None:
        if todo:
            todo.pop()()
        flock(handle, operation)

    monkeypatch.setattr(files_module.fcntl, "flock", late)


def test_the_file_of_another_backup_in_the_place_of_an_abandoned_one_stays(
    manager: SessionManager, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is removed is the file that was locked, not the one that has its name by then."""

    def replace() -> None:
        unfinished.unlink()
        unfinished.write_bytes(b"of another backup")

    before_the_first_lock(monkeypatch, replace)
    save_archive(manager, unfinished.parent)
    assert unfinished.read_bytes() == b"of another backup"


def test_a_backup_whose_file_was_taken_for_abandoned_takes_another(
    manager: SessionManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making its file and locking it another process may remove it, as nobody had the lock."""
    before_the_first_lock(monkeypatch, lambda: [path.unlink() for path in tmp_path.iterdir()])
    path = save_archive(manager, tmp_path)
    assert [(found.path, found.error) for found in backups_in(str(tmp_path))] == [(path, None)]


def test_a_link_to_nowhere_has_the_name_of_an_archive(manager: SessionManager, tmp_path: Path) -> None:
    """What has the name already is not replaced, whatever it is."""
    (tmp_path / "mine.tgz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BackupError, match="is there already"):
        save_archive(manager, tmp_path / "mine.tgz")
    assert (tmp_path / "mine.tgz").is_symlink()


def test_the_name_of_an_archive_is_its_time_in_utc(
    manager: SessionManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Wherever the server is."""
    request.addfinalizer(time.tzset)  # runs after the zone is as it was
    with monkeypatch.context() as here:
        here.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        path = save_archive(manager, tmp_path)
        [found] = backups_in(str(tmp_path))
    assert (found.path, found.created_at) == (path, manager.clock())
    assert path.endswith("sessions_backup_20231114-221320.tar.gz")


def test_rotating_at_once_with_another_is_no_error(
    manager: SessionManager, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive that somebody else has just removed is gone, as it was to be."""
    old = save_archive(manager, tmp_path)
    clock.advance(60)
    unlink = os.unlink

    def twice(path: str) -> None:
        unlink(path)
        if path == old:
            unlink(path)

    monkeypatch.setattr(os, "unlink", twice)
    path = save_archive(manager, tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [Path(path)]


def test_an_archive_that_is_rotated_away_is_not_listed(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """The listing goes on with the others."""
    paths = []
    for _ in range(3):
        paths.append(save_archive(manager, tmp_path))
        clock.advance(60)
    listing = backups_in(str(tmp_path))
    assert next(listing).path == paths[0]
    os.unlink(paths[1])
    assert [found.path for found in listing] == paths[2:]


def test_a_directory_may_be_named_like_an_archive(manager: SessionManager, tmp_path: Path) -> None:
    """What is there as a directory gets the archive into it, and can be rotated."""
    place = tmp_path / "all.tar.gz"
    place.mkdir()
    path = save_archive(manager, place, keep=1)
    assert list(place.iterdir()) == [Path(path)]


def test_a_directory_of_backups_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """It is not taken for an empty one."""
    (tmp_path / "file").touch()
    with pytest.raises(BackupError, match="file cannot be read: Not a directory"):
        list(backups_in(str(tmp_path / "file")))


def test_archives_made_during_a_long_backup_are_rotated_with_it(
    manager: SessionManager, clock: Clock, tmp_path: Path
) -> None:
    """They are not from the future when it ends, though their times are later than its own."""
    began = clock.now
    clock.advance(60)
    other = save_archive(manager, tmp_path)
    save_archive(manager, tmp_path, now=began, keep=1)
    assert list(tmp_path.iterdir()) == [Path(other)]


def test_a_backup_tells_its_progress(manager: SessionManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is told how many sessions were read since the last time."""
    monkeypatch.setattr(backup_module, "_STEP", 2)
    for number in range(5):
        manager.create({"n": number})
    steps: list[int] = []
    save_archive(manager, tmp_path, progress=steps.append)
    assert steps == [2, 2]


def test_a_backup_that_fails_takes_no_older_ones_place(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """Not even those are removed that are too many already."""
    for _ in range(3):
        save_archive(manager, tmp_path)
        clock.advance(60)
    before = sorted(tmp_path.iterdir())
    manager.store.snapshot = lambda: iter([None])  # type: ignore[method-assign, assignment, list-item, return-value]
    with pytest.raises(AttributeError):
        save_archive(manager, tmp_path, keep=1)
    assert sorted(tmp_path.iterdir()) == before


# Restoring ------------------------------------------------------------------------------------------------------------


def test_each_namespace_has_members_of_its_own(clock: Clock, tmp_path: Path) -> None:
    """Sessions come back to the namespace that they were in."""
    old, new = ({name: new_manager(clock) for name in ("web", "chat")} for _ in range(2))
    for name, manager in old.items():
        manager.create({"of": name})
    report = back_up(old, str(tmp_path), now=clock())
    assert restore(new, report.path).restored == 2
    assert {name: [session.data for session in manager.find()] for name, manager in new.items()} == {
        name: [session.data for session in manager.find()] for name, manager in old.items()
    }
    [found] = backups_in(str(tmp_path))
    assert found.manifest is not None
    assert found.manifest.counts == {"web": {"active": 1}, "chat": {"active": 1}}


def test_a_session_that_expired_early_in_the_store_is_not_replaced(
    manager: SessionManager, clock: Clock, tmp_path: Path
) -> None:
    """Its time is up, though the archive has it with a later end."""
    created = manager.create({"a": 1})
    path = save_archive(manager, tmp_path)
    shorter = replace(created.record, version=2, expires_at=clock() + 10)
    manager.store.save(shorter, expected=1)
    clock.advance(20)
    assert load(manager, path, "overwrite") == RestoreReport(expired=1)
    assert manager.store.get(created.id) == shorter


@pytest.mark.parametrize("change", [{"tenant_id": "other"}, {"tenant_id": None}, {"created_at": 1_600_000_000.0}], ids=str)
def test_a_session_of_another_tenant_or_time_is_replaced_as_a_whole(
    change: dict[str, Any], store: SessionStore, clock: Clock, tmp_path: Path
) -> None:
    """What stores take for fixed under one id is that of the archive afterwards, in the record and in the indexes."""
    manager = SessionManager(store, clock=clock)
    archived = manager.create({"a": 1}, user_id="7", tenant_id="acme").record
    path = save_archive(manager, tmp_path / "backups")
    store.delete(archived.id)
    store.save(replace(archived, **change), expected=0)
    assert load(manager, path, "overwrite") == RestoreReport(overwritten=1)
    assert store.get(archived.id) == archived
    assert [found.id for found in manager.find(user_id="7", tenant_id="acme")] == [archived.id]
    assert list(store.check(repair=False)) == []


def test_a_session_that_ends_just_before_it_is_replaced_stays_ended(manager: SessionManager, tmp_path: Path) -> None:
    """Also where it must be deleted first, because the archive has it without its user."""
    created = manager.create({"_user_id": "7"}, user_id="7")
    path = save_archive(manager, tmp_path)
    delete = manager.store.delete

    def end_and_delete(session_id: str, *, expected: int | None = None) -> bool:
        manager.end(session_id, "revoked")
        return delete(session_id, expected=expected)

    manager.store.delete = end_and_delete  # type: ignore[method-assign]
    assert load(manager, path, "overwrite", sign_out=True) == RestoreReport(ended=1)
    found = manager.store.get(created.id)
    assert found is not None
    assert found.end_reason == "revoked"


class Times:
    """Times that pass as they are told, and the pauses that were made meanwhile."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.now = 0.0
        self.pauses: list[float] = []

    def perf_counter(self) -> float:
        self.now += self.step
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.mark.parametrize(("passed", "pause"), [(0.0, 0.008), (0.003, 0.005), (0.02, 0.0)])
def test_many_changes_of_sqlite_pause_between_transactions(
    passed: float, pause: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is free for longer than whoever waits for it sleeps between two looks, so that everybody gets it."""
    store, times = open_store(f"sqlite:///{tmp_path}/sessions.db"), Times(0.0)
    monkeypatch.setattr(databases, "time", times)
    times.now = 1.0
    for start in range(0, 300, 100):
        assert all(store.save_many([Change(record=make_record(start + n), expected=0) for n in range(100)]))
        times.now += passed
    store.close()
    assert times.pauses == [0.0, *[pytest.approx(pause)] * 2]


def test_sqlite_pauses_before_it_stores_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between finding that some of many new sessions are there already and storing the others."""
    store, times = open_store(f"sqlite:///{tmp_path}/sessions.db"), Times(0.0)
    store.save(make_record(5), expected=0)
    monkeypatch.setattr(databases, "time", times)
    times.now = 1.0
    outcomes = store.save_many([Change(record=make_record(number), expected=0) for number in range(100)])
    store.close()
    assert outcomes == [number != 5 for number in range(100)]
    assert times.pauses == [0.0, pytest.approx(0.008)]


def test_reading_a_backup_leaves_other_threads_their_turn(
    manager: SessionManager, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the interpreter, such as the thread that writes, gets it when the turn of reading is over."""
    for number in range(5):
        manager.create({"n": number})
    path, times = save_archive(manager, tmp_path), Times(backup_module._TURN * 0.6)
    monkeypatch.setattr(backup_module, "time", times)
    assert load(new_manager(clock), path).restored == 5
    assert times.pauses == [backup_module._MOMENT] * 2


def test_a_restore_keeps_what_was_there_from_the_garbage_collector(
    manager: SessionManager, clock: Clock, tmp_path: Path
) -> None:
    """To look at all objects of an application takes long, and no thread goes on meanwhile; afterwards it is as before."""
    manager.create({"n": 1})
    path, frozen = save_archive(manager, tmp_path), list[int]()
    gc.unfreeze()
    load(new_manager(clock), path, progress=lambda _: frozen.append(gc.get_freeze_count()))
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


def test_restores_that_begin_at_once_leave_the_garbage_collector_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the one sets for the time being is not what the other sets at its end."""
    before, other = gc.get_threshold(), backup_module._collecting_little()
    gc.unfreeze()

    def frozen() -> int:
        monkeypatch.undo()
        other.__enter__()  # it begins just after this one looked
        return 0

    monkeypatch.setattr(gc, "get_freeze_count", frozen)
    try:
        with backup_module._collecting_little():
            other.__exit__(None, None, None)
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*before)


@pytest.fixture
def thresholds() -> Iterator[tuple[int, int, int]]:
    """Those of the garbage collector, which are set again afterwards, and nothing is kept from it."""
    before = gc.get_threshold()
    gc.unfreeze()
    yield before
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.parametrize(("young", "meanwhile"), [(700, 20_000), (50_000, 50_000), (0, 0)])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_restore_collects_less_often_while_it_runs(
    manager: SessionManager,
    clock: Clock,
    tmp_path: Path,
    thresholds: tuple[int, int, int],
    young: int,
    meanwhile: int,
    error: type[BaseException] | None,
) -> None:
    """Not where the application wants it seldom or never; afterwards it is as before, however the restore ends."""
    manager.create({"n": 1})
    path, seen = save_archive(manager, tmp_path), list[tuple[int, int, int]]()
    gc.set_threshold(young, *thresholds[1:])

    def look(_count: int) -> None:
        seen.append(gc.get_threshold())
        if error:
            raise error

    with pytest.raises(error) if error else nullcontext():
        load(new_manager(clock), path, progress=look)
    assert seen == [(meanwhile, *thresholds[1:])]
    assert (gc.get_threshold(), gc.get_freeze_count()) == ((young, *thresholds[1:]), 0)


def test_a_restore_leaves_alone_what_an_application_froze(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """An application that keeps its own objects from the garbage collector finds them so."""
    manager.create({"n": 1})
    path = save_archive(manager, tmp_path)
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        load(new_manager(clock), path)
        assert gc.get_freeze_count() >= before * 0.9
    finally:
        gc.unfreeze()


def test_a_restore_of_large_sessions_takes_few_at_once(
    manager: SessionManager, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch has about so many bytes, and neither memory nor a lock is taken for more."""
    for size in 10, 10, 2000, 5000, 10, 10:
        manager.create({"n": "x" * size})
    path = save_archive(manager, tmp_path)
    monkeypatch.setattr(backup_module, "_BATCH_BYTES", 3000)
    steps: list[int] = []
    load(new_manager(clock), path, progress=steps.append)
    assert steps == [2, 1, 1, 2]


def test_a_restore_tells_its_progress(
    manager: SessionManager, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First how many sessions the archive has, then how many more were looked at."""
    for number in range(5):
        manager.create({"n": number})
    path = save_archive(manager, tmp_path)
    monkeypatch.setattr(backup_module, "_BATCH", 2)
    steps: list[int] = []
    load(new_manager(clock), path, started=steps.append, progress=steps.append)
    assert steps == [5, 2, 2, 1]


def test_a_store_that_cannot_list_takes_a_restore(clock: Clock, tmp_path: Path) -> None:
    """What is there is asked for one by one."""
    source = open_store("memory://")
    records = [make_record(number, user_id=None, expires_at=clock() + 100) for number in range(2)]
    for record in records:
        source.save(record, expected=0)
    path = save_archive(SessionManager(source, clock=clock), tmp_path)
    target = open_store(SimpleCache())
    target.save(records[0], expected=0)
    assert load(SessionManager(target, clock=clock), path) == RestoreReport(restored=1, skipped=1)
    assert target.get(records[1].id) == records[1]


# Automatic backups ----------------------------------------------------------------------------------------------------


def automatic(manager: SessionManager, folder: Path, *, interval: float = 3600, keep: int = 2) -> AutomaticBackup:
    return AutomaticBackup({"web": manager}, Announcer(manager), str(folder), interval, keep)


def test_a_lease_that_comes_after_anothers_backup_makes_no_other(manager: SessionManager, tmp_path: Path) -> None:
    """Somebody may have made one between the look and the lease."""
    lease = manager.store.lease

    def late(name: str, seconds: float) -> bool:
        if seconds:
            save_archive(manager, tmp_path)
        return lease(name, seconds)

    manager.store.lease = late  # type: ignore[method-assign]
    assert automatic(manager, tmp_path).turn() is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("interval", "longest"), [(600, 600), (86400, 3600)])
def test_a_crash_during_a_backup_does_not_stop_the_others_for_long(
    interval: float, longest: float, manager: SessionManager, tmp_path: Path
) -> None:
    """Its lease ends after the interval, and after an hour; when nothing goes wrong, with the backup."""
    asked: list[float] = []
    manager.store.lease = lambda name, seconds: bool(asked.append(seconds)) or True  # type: ignore[method-assign, func-returns-value]
    assert automatic(manager, tmp_path, interval=interval).turn() is not None
    assert asked == [longest, 0]


def test_a_failed_backup_gives_the_lease_back(manager: SessionManager, tmp_path: Path) -> None:
    """Another process can try at once."""
    asked: list[float] = []
    manager.store.lease = lambda name, seconds: bool(asked.append(seconds)) or True  # type: ignore[method-assign, func-returns-value]
    manager.store.snapshot = _fail  # type: ignore[method-assign]
    with pytest.raises(BackupError):
        automatic(manager, tmp_path).turn()
    assert asked == [3600, 0]


def _fail() -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_member_that_could_not_be_written_fails_the_backup(
    manager: SessionManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written by another thread, whose error is not lost."""
    monkeypatch.setattr(ArchiveWriter, "_write_member", lambda *_: _fail())
    manager.create({"a": 1})
    with pytest.raises(BackupError, match="No space left on device"):
        save_archive(manager, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_automatic_backups_are_kept_where_none_is_to_go(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """So says a ``BACKUP_KEEP`` of 0."""
    for number in range(1, 4):
        assert automatic(manager, tmp_path, keep=0).turn() is not None
        assert len(list(tmp_path.iterdir())) == number
        clock.advance(3600)


@pytest.mark.parametrize(("interval", "pause"), [(300, 30), (86400, 60)])
def test_a_backup_that_is_due_is_noticed_soon(
    interval: float, pause: float, manager: SessionManager, tmp_path: Path
) -> None:
    """It is looked every minute, or ten times an interval that is shorter."""
    assert automatic(manager, tmp_path, interval=interval)._interval == pause


def test_a_receiver_that_fails_costs_no_automatic_backup(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """Automatic backups are announced as others are; what a receiver raises is logged."""
    app = make_app(PERSIST_SESSION_BACKUP_INTERVAL=3600)
    heard: list[str] = []

    def hear(sender: Flask, event: Any) -> None:
        heard.append(event.path)
        raise ZeroDivisionError

    with backup_created.connected_to(hear, app):
        report = app.extensions["persist_session"].automatic_backup.turn()
    assert heard == [report.path]
    assert "a receiver of a session's event failed" in caplog.text


# Copying to another store ---------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> SessionStore:
    return open_store("memory://")


@pytest.fixture
def target() -> SessionStore:
    return open_store("memory://")


def copy(source: SessionStore, target: SessionStore, now: float = 0.0, **options: Any) -> MigrationReport:
    return Migration(source, target, lambda: now, **options).run()


def after_copying(target: SessionStore, happens: Callable[[], object]) -> None:
    """Let something happen once, just before the copies are compared."""
    get, todo = target.get, [happens]

    def late(session_id: str) -> SessionRecord | None:
        if todo:
            todo.pop()()
        return get(session_id)

    target.get = late  # type: ignore[method-assign]


def test_a_copy_that_is_missing_at_the_end_is_named(source: SessionStore, target: SessionStore) -> None:
    """A target that loses sessions is found out."""
    record = make_record()
    source.save(record, expected=0)
    after_copying(target, lambda: target.delete(record.id))
    report = copy(source, target)
    assert (report.compared, report.different) == (1, (record.id,))


def test_a_session_that_has_gone_or_expired_since_it_was_copied_is_not_compared(
    source: SessionStore, target: SessionStore, clock: Clock
) -> None:
    """The target may have removed it too."""
    gone, expired = make_record(1), make_record(2, expires_at=clock() + 10)
    for record in gone, expired:
        source.save(replace(record, expires_at=clock() + 10), expected=0)

    def happens() -> None:
        source.delete(gone.id)
        clock.advance(10)
        for record in gone, expired:
            target.delete(record.id)

    report = Migration(source, target, clock, lambda _: happens()).run()
    assert (report.copied, report.compared, report.different) == (2, 0, ())


@pytest.mark.parametrize("who", ["source", "target"])
def test_a_session_that_is_used_while_it_is_compared_is_no_difference(
    who: str, source: SessionStore, target: SessionStore
) -> None:
    """One of the stores has a later state of it."""
    record = make_record()
    source.save(record, expected=0)
    used = {"source": source, "target": target}[who]
    change = replace(record, data=b"later", accessed_at=record.accessed_at + 1, version=2)
    after_copying(target, lambda: used.save(change, expected=1))
    if who == "source":
        get = source.get
        source.get = lambda session_id: target.get(session_id) and get(session_id)  # type: ignore[method-assign]
    assert copy(source, target).different == ()


def test_a_session_expires_at_its_moment(source: SessionStore, target: SessionStore) -> None:
    """One whose time is up just now is left behind."""
    record = make_record()
    source.save(record, expected=0)
    assert copy(source, target, record.expires_at) == MigrationReport(expired=1)


def test_a_copy_that_is_used_at_that_moment_is_left_alone(source: SessionStore, target: SessionStore) -> None:
    """What it has is newer than what the source had."""
    record = make_record()
    target.save(record, expected=0)
    source.save(record, expected=0)
    source.save(following(record, data=b"of the source", accessed_at=record.accessed_at + 1), expected=1)
    get = target.get

    def get_and_use(session_id: str) -> SessionRecord | None:
        found = get(session_id)
        if found == record:
            target.save(following(record, data=b"used", accessed_at=record.accessed_at + 2), expected=1)
        return found

    target.get = get_and_use  # type: ignore[method-assign]
    report = copy(source, target)
    assert (report.updated, report.present, report.different) == (0, 1, ())
    assert get(record.id) == following(record, data=b"used", accessed_at=record.accessed_at + 2)


def test_the_later_request_counts_and_then_the_later_version(source: SessionStore, target: SessionStore) -> None:
    """Versions of two stores tell nothing of each other, but of two changes in one moment the second has the higher."""
    requested, saved, older = (make_record(number) for number in range(3))
    for record in requested, saved, older:
        source.save(record, expected=0)
    copy(source, target)
    later = replace(requested, accessed_at=requested.accessed_at + 1, data=b"later", version=2)
    for version in 2, 3:
        target.save(replace(requested, version=version), expected=version - 1)
        source.save(following(replace(older, version=version - 1), data=b"x"), expected=version - 1)
    target.save(replace(older, accessed_at=older.accessed_at + 1, version=2), expected=1)
    source.save(later, expected=1)
    source.save(following(saved, data=b"again"), expected=1)
    assert copy(source, target).updated == 2
    assert {record.data for record in target.scan()} == {b"later", b"again", older.data}


def test_the_sample_is_of_all_sessions_and_no_larger(
    source: SessionStore, target: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each session may be in it, be it copied first or last; the comparison does not grow with the store."""
    monkeypatch.setattr("flask_persist_session.migrate.SAMPLE", 2)
    for number in range(4):
        source.save(make_record(number), expected=0)
    met: set[str] = set()
    compare = Migration._compare

    def listen(self: Migration) -> Any:
        met.update(self._sample)
        return compare(self)

    monkeypatch.setattr(Migration, "_compare", listen)
    for _ in range(200):
        assert copy(source, target).compared == 2
        for record in target.scan():
            target.delete(record.id)
        if len(met) == 4:
            break
    assert met == {record.id for record in source.scan()}


def test_what_was_transferred_is_all_that_the_target_has() -> None:
    """Copied, updated, or there already."""
    assert MigrationReport(copied=1, updated=2, present=4, expired=8).transferred == 7


# Moving to another store ----------------------------------------------------------------------------------------------


@pytest.fixture
def migrating() -> MigratingStore:
    return MigratingStore(open_store("memory://"), open_store("memory://"))


@pytest.fixture
def left(migrating: MigratingStore) -> SessionRecord:
    """A session that is in the old store only."""
    record = make_record()
    migrating.old.save(record, expected=0)
    return record


def test_the_id_of_a_session_of_the_old_store_is_taken(migrating: MigratingStore, left: SessionRecord) -> None:
    """Nothing is created over it."""
    with pytest.raises(SessionConflict):
        migrating.save(left, expected=0)
    assert migrating.store.get(left.id) is None


def test_a_change_of_a_session_of_the_old_store_is_saved_in_the_new_one(
    migrating: MigratingStore, left: SessionRecord
) -> None:
    """A request that read it before it could be moved saves what it has."""
    changed = following(left, data=b"changed")
    migrating.save(changed, expected=left.version)
    assert (migrating.store.get(left.id), migrating.old.get(left.id)) == (changed, None)


def test_a_change_of_another_version_of_the_old_store_is_a_conflict(migrating: MigratingStore, left: SessionRecord) -> None:
    """As in any store."""
    with pytest.raises(SessionConflict):
        migrating.save(following(following(left)), expected=2)
    assert migrating.get(left.id) == left


@pytest.mark.parametrize("expected", [None, 1])
def test_a_session_of_the_old_store_is_deleted_there(
    expected: int | None, migrating: MigratingStore, left: SessionRecord
) -> None:
    """It does not come back from either store."""
    assert migrating.delete(left.id, expected=expected)
    assert migrating.get(left.id) is None


def test_another_version_of_the_old_store_is_not_deleted(migrating: MigratingStore, left: SessionRecord) -> None:
    """A cleanup removes just the version that it saw expire."""
    assert not migrating.delete(left.id, expected=2)
    assert migrating.get(left.id) == left


@pytest.mark.parametrize("expected", [None, 1])
def test_a_copy_that_was_left_behind_is_deleted_too(
    expected: int | None, migrating: MigratingStore, left: SessionRecord
) -> None:
    """A crash in the middle of a move leaves one; a session that was deleted does not come back by it."""
    migrating.store.save(left, expected=0)
    assert migrating.delete(left.id, expected=expected)
    assert migrating.get(left.id) is None


def test_leases_and_notes_are_those_of_the_new_store() -> None:
    """Where the old one is down, or gone at last, cleanups and what is known of them go on."""
    store, old = (CountingStore(open_store("memory://")) for _ in range(2))
    migrating = MigratingStore(store, old)
    assert migrating.lease("sweep", 60)
    migrating.note("cleanup", 7.0)
    assert migrating.noted("cleanup") == 7.0
    assert (store.operations, old.operations) == ({"lease": 1, "note": 1, "noted": 1}, {})


def test_both_stores_are_looked_after(tmp_path: Path) -> None:
    """A check repairs each, and optimizing gives back the room of each, in full where it is asked for."""
    places = [tmp_path / name for name in ("new", "old")]
    store, old = (open_store(f"file://{place}") for place in places)
    records = [make_record(number) for number in range(2)]
    for each, place, record in zip((store, old), places, records, strict=True):
        each.save(record, expected=0)
        for version in range(1, 40):
            each.save(replace(record, data=bytes(500), version=version + 1), expected=version)
        [path] = place.rglob("*.session")
        path.chmod(0o644)
    migrating = MigratingStore(store, old)
    seen: list[str] = []
    found = list(migrating.check(repair=True, seen=lambda record: seen.append(record.id)))
    assert [(finding.kind, finding.repaired) for finding in found] == [("mode", True)] * 2
    assert sorted(seen) == sorted(record.id for record in records)
    assert [improvement.text.split(" that")[0] for improvement in migrating.optimize()] == ["rewrote 1 files"] * 2


def test_optimizing_in_full_is_handed_on_to_both_stores(migrating: MigratingStore) -> None:
    """A database is rewritten only in full, be it the old one or the new one."""
    asked: list[bool] = []
    for store in migrating.store, migrating.old:
        store.optimize = lambda *, full=False: iter(asked.append(full) or ())  # type: ignore[method-assign, func-returns-value]
    assert list(migrating.optimize(full=True)) == []
    assert asked == [True, True]


def test_moving_the_rest_tells_its_progress(migrating: MigratingStore, left: SessionRecord) -> None:
    """Session by session."""
    steps: list[int] = []
    assert move_rest(migrating, steps.append) == 1
    assert steps == [1]


# Monthly archives -----------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> MonthlyArchive:
    return MonthlyArchive(str(tmp_path / "archives"))


def test_a_new_archive_is_synced_with_its_directory(archive: MonthlyArchive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the sessions are removed that are in it; later batches need the file alone."""
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    for number in range(2):
        archive.add("web", [make_record(number)], 0.0)
    assert synced == [False, True, False]


def test_the_month_of_an_archive_is_that_in_utc(
    archive: MonthlyArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Wherever the server is."""
    request.addfinalizer(time.tzset)  # runs after the zone is as it was
    with monkeypatch.context() as here:
        here.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        archive.add("web", [make_record()], 1_701_388_799.0)  # a second before December, in UTC
    assert os.listdir(tmp_path / "archives") == ["sessions_archive_202311.jsonl.gz"]


def test_the_last_state_of_a_batch_is_found(archive: MonthlyArchive) -> None:
    """Of a session that is twice in one batch, too."""
    record = make_record()
    archive.add("web", [record, following(record, data=b"later")], 0.0)
    found = archive.search(record.id)
    assert found is not None
    assert found.record.data == b"later"


@pytest.mark.parametrize("damage", ["cut off within", "with something behind it"])
def test_a_member_that_is_not_one_whole_gzip_is_refused(damage: str, archive: MonthlyArchive, tmp_path: Path) -> None:
    """Though its length is right: a part of its sessions would be missing, or something else hidden in it."""
    archive.add("web", [make_record()], 0.0)
    [path] = (tmp_path / "archives").iterdir()
    content = path.read_bytes()
    start, head = content[: len(monthly_module._START)], monthly_module._HEADER_BYTES
    rest = content[head:-4] if damage == "cut off within" else content[head:] + b"hidden"
    path.write_bytes(start + monthly_module._LENGTH.pack(head + len(rest)) + rest)
    with pytest.raises(BackupError, match="damaged at byte 0"):
        archive.search(make_record().id)


# Checking files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a store of files, in which nobody else writes."""
    monkeypatch.setattr(file_upkeep, "_SETTLED", 0.0)
    return tmp_path / "sessions" / "web"


@pytest.fixture
def files(root: Path) -> SessionStore:
    """A store with a session of a user, a lease and a note."""
    store = open_store(f"file://{root.parent}")
    store.save(RECORD, expected=0)
    store.lease("sweep", 60)
    store.note("cleanup", 7.0)
    return store


RECORD = make_record(7, user_id="alice")
PLACES = {
    "namespace": "",
    "shard": "{shard}",
    "session": "{shard}/{id}.session",
    "users": "{shard}/users",
    "user": "{shard}/users/{user}",
    "entry": "{shard}/users/{user}/{id}",
    "leases": "leases",
    "lease": "leases/sweep",
    "notes": "notes",
    "note": "notes/cleanup",
}


def place_of(root: Path, name: str) -> Path:
    return root / PLACES[name].format(shard=RECORD.id[:3], id=RECORD.id, user=name_of_user("alice"))


def found(store: SessionStore, *, repair: bool) -> list[tuple[str, bool]]:
    return sorted((finding.kind, finding.repaired) for finding in store.check(repair=repair))


@pytest.mark.parametrize("place", PLACES)
def test_everything_that_the_group_may_use_is_closed(place: str, files: SessionStore, root: Path) -> None:
    """Each file and directory of the store; users can be told from the names alone."""
    path = place_of(root, place)
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(before | 0o040)
    assert found(files, repair=False) == [("mode", False)]
    assert stat.S_IMODE(path.stat().st_mode) == before | 0o040
    assert found(files, repair=True) == [("mode", True)]
    assert stat.S_IMODE(path.stat().st_mode) == before


def test_what_belongs_to_another_user_is_told(files: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose it is only that user, or an administrator, can change."""
    assert found(files, repair=False) == []
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    told = list(files.check(repair=True))
    assert {(finding.kind, finding.repaired) for finding in told} == {("mode", False)}
    assert {Path(finding.where) for finding in told} == {place_of(root, place) for place in PLACES}
    assert f"not to {another}: give it back with chown" in told[0].text


def test_a_session_in_the_shard_of_another_is_foreign(files: SessionStore, root: Path) -> None:
    """Nothing would find it there."""
    wrong = root / ("3ff" if RECORD.id[:3] != "3ff" else "3fe")
    wrong.mkdir(mode=0o700)
    (wrong / f"{RECORD.id}.session").write_bytes(place_of(root, "session").read_bytes())
    assert found(files, repair=True) == [("foreign", False)]


def test_every_damaged_file_is_kept_for_people(files: SessionStore, root: Path) -> None:
    """Also one of which nothing is intact, and each time."""
    kept = set()
    for number in range(3):
        content = b"nothing of a session %d" % number * 50
        place_of(root, "session").write_bytes(content)
        place_of(root, "session").chmod(0o600)
        kept.add(content)
        assert ("record", True) in found(files, repair=True)
        assert {path.read_bytes() for path in (root / "damaged").iterdir()} == kept
        assert not place_of(root, "session").exists()


def test_what_is_damaged_is_on_the_disk_elsewhere_before_it_is_removed(
    files: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the store syncs its saves."""
    place_of(root, "session").write_bytes(b"nothing of a session" * 50)
    steps: list[str] = []
    fsync, unlink = os.fsync, os.unlink

    def note_fsync(handle: int) -> None:
        steps.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def note_unlink(path: str) -> None:
        steps.append("removed")
        unlink(path)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "unlink", note_unlink)
    list(files.check(repair=True))
    assert steps[:3] == ["file", "directory", "removed"]


def test_a_session_that_is_locked_for_long_is_told(root: Path, files: SessionStore) -> None:
    """The check goes on with the others, and touches nothing of it."""
    impatient = open_store(f"file://{root.parent}?timeout=0.05")
    path = place_of(root, "session")
    os.truncate(path, path.stat().st_size - 1)
    content = path.read_bytes()
    handle, _ = frames.lock(str(path), 1.0, create=False)
    try:
        told = list(impatient.check(repair=True))
    finally:
        frames.unlock(handle)
    assert any("locked for more than 0.05 s" in finding.text for finding in told)
    assert path.read_bytes() == content


def test_a_session_on_its_way_out_is_not_entered_again(files: SessionStore, root: Path) -> None:
    """Its entry in the index has gone, and its file follows while the check waits for the lock."""
    path, entry = place_of(root, "session"), place_of(root, "entry")
    handle, _ = frames.lock(str(path), 1.0, create=False)
    entry.unlink()
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(found, files, repair=True)
        with suppress(TimeoutError):
            checking.result(timeout=0.1)
        path.unlink()
        frames.unlock(handle)
        assert checking.result() == []
    assert not entry.exists()


def test_a_file_that_may_not_be_read_is_told(files: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check goes on with the others."""

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(file_upkeep, "_frame_at_end", refuse)
    assert ("mode", False) in found(files, repair=True)


def test_a_session_that_comes_into_being_during_a_repair_stays(
    files: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry without a session is removed only once it is locked, and only if there is none still."""
    place_of(root, "session").unlink()
    lock = file_upkeep.lock

    def save_and_lock(path: str, timeout: float, *, create: bool) -> tuple[int, int]:
        monkeypatch.setattr(file_upkeep, "lock", lock)
        files.save(RECORD, expected=0)
        return lock(path, timeout, create=create)

    monkeypatch.setattr(file_upkeep, "lock", save_and_lock)
    assert found(files, repair=True) == []
    assert list(files.find(SessionQuery(user_id="alice"))) == [RECORD]


def test_a_file_is_written_anew_only_while_it_is_locked(files: SessionStore, root: Path) -> None:
    """Else what a request saves at this moment would be lost."""
    record = RECORD
    for version in range(1, 30):
        record = following(record, data=bytes(700))
        files.save(record, expected=version)
    path = place_of(root, "session")
    before = path.read_bytes()
    handle, _ = frames.lock(str(path), 1.0, create=False)
    with ThreadPoolExecutor(1) as pool:
        optimizing = pool.submit(lambda: list(files.optimize()))
        with suppress(TimeoutError):
            optimizing.result(timeout=0.1)
        assert path.read_bytes() == before
        frames.unlock(handle)
        assert len(optimizing.result()) == 1


@pytest.mark.parametrize(("call", "work"), [("scandir", "check"), ("scandir", "optimize"), ("rmdir", "optimize")])
def test_a_disk_that_fails_is_an_error_of_the_store(
    call: str, work: str, files: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that could not be looked at counts as whole, or as tidied up."""

    def fail(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        list(files.check(repair=False) if work == "check" else files.optimize())


def test_optimizing_leaves_a_torn_file_to_a_repair(files: SessionStore, root: Path) -> None:
    """What may still be of use to people is not thrown away by the way."""
    path = place_of(root, "session")
    record = RECORD
    for version in range(1, 30):
        record = following(record, data=bytes(700))
        files.save(record, expected=version)
    os.truncate(path, path.stat().st_size - 1)
    content = path.read_bytes()
    assert list(files.optimize()) == []
    assert path.read_bytes() == content


def test_optimizing_syncs_where_saves_do(files: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``fsync=1`` a file that is written anew is on the disk before it takes the place of the other."""
    synced: list[bool] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        fsync(handle)

    for fsynced in True, False:
        store, record = open_store(f"file://{root.parent}?fsync={int(fsynced)}"), files.get(RECORD.id)
        assert record is not None
        for version in range(record.version, record.version + 30):
            record = following(record, data=bytes(700))
            files.save(record, expected=version)
        with monkeypatch.context() as here:
            here.setattr(os, "fsync", note)
            assert len(list(store.optimize())) == 1
        assert synced == [False, True] * fsynced
        synced.clear()


def test_a_lock_is_never_on_a_file_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking somebody may delete the session: what is saved then goes to a new file."""
    path, flock = tmp_path / "x.session", frames.fcntl.flock
    path.touch()

    def remove_and_lock(handle: int, operation: int) -> None:
        monkeypatch.setattr(frames.fcntl, "flock", flock)
        path.unlink()
        flock(handle, operation)

    monkeypatch.setattr(frames.fcntl, "flock", remove_and_lock)
    handle, _ = frames.lock(str(path), 1.0, create=True)
    assert os.path.samestat(os.fstat(handle), path.stat())
    frames.unlock(handle)


def test_a_lock_is_never_on_a_file_that_was_replaced(tmp_path: Path) -> None:
    """Also where a hard link, as some backups make, keeps the old file alive."""
    path = tmp_path / "x.session"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "backup")
    held, _ = frames.lock(str(path), 1.0, create=False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(frames.lock, str(path), 10.0, create=False)
        with suppress(TimeoutError):
            waiting.result(timeout=0.1)
        (tmp_path / "new").write_bytes(b"newer")
        (tmp_path / "new").rename(path)
        frames.unlock(held)
        handle, size = waiting.result()
    assert (os.path.samestat(os.fstat(handle), path.stat()), size) == (True, 5)
    frames.unlock(handle)


def test_a_lock_that_cannot_be_had_leaves_nothing_open(files: SessionStore, root: Path) -> None:
    """Else a session that is locked for long would use up the files that a process may have open."""
    path = str(place_of(root, "session"))
    held, _ = frames.lock(path, 1.0, create=False)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(TimeoutError):
        frames.lock(path, 0.01, create=False)
    assert os.listdir("/proc/self/fd") == before
    frames.unlock(held)


def test_a_rewrite_that_fails_leaves_the_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state before counts on."""
    path = tmp_path / "x.session"
    path.write_bytes(b"old")

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        frames.rewrite(str(path), b"new", sync=True)
    assert [(found, found.read_bytes()) for found in tmp_path.iterdir()] == [(path, b"old")]


def test_a_rewrite_takes_nothing_of_what_a_crash_left(tmp_path: Path) -> None:
    """Its temporary file may be there, and longer; whatever its mode was, the new file is this user's alone."""
    path = tmp_path / "x.session"
    (tmp_path / "x.session.tmp").write_bytes(b"left by a crash")
    frames.rewrite(str(path), b"new", sync=False)
    assert path.read_bytes() == b"new"
    frames.rewrite(str(path), b"newer", sync=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_comes_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system may write and read less than it was asked for."""
    path = tmp_path / "x.session"
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: pread(handle, min(size, 7), offset))
    monkeypatch.setattr(os, "pwrite", lambda handle, content, offset: pwrite(handle, content[:5], offset))
    frames.rewrite(str(path), bytes(range(100)), sync=False)
    handle = frames.open_file(str(path), os.O_RDONLY)
    assert frames.read_range(handle, 100, 0) == bytes(range(100))
    os.close(handle)
    assert path.read_bytes() == bytes(range(100))


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_what_is_no_plain_file_is_neither_followed_nor_waited_for(what: str, files: SessionStore, root: Path) -> None:
    """Somebody may have put a link or a pipe in the place of a session."""
    path = place_of(root, "session")
    content = path.read_bytes()
    path.rename(root.parent / "elsewhere")
    if what == "link":
        path.symlink_to(root.parent / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises((StoreError, SerializationError)):
        files.get(RECORD.id)
    assert (root.parent / "elsewhere").read_bytes() == content


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE])
def test_an_error_of_the_disk_that_passes_is_a_503(code: int) -> None:
    """A full disk or a missing right is not: somebody has to do something."""
    assert isinstance(frames.failure(OSError(code, "x", "y")), StoreUnavailable)
    for lasting in errno.ENOSPC, errno.EACCES, errno.EROFS:
        assert not isinstance(frames.failure(OSError(lasting, "x", "y")), StoreUnavailable)


# Health and checks of several namespaces -------------------------------------------------------------------------------


@pytest.fixture
def managers(clock: Clock) -> dict[str, SessionManager]:
    return {name: new_manager(clock) for name in ("web", "chat")}


def test_health_is_that_of_the_worst_namespace(managers: dict[str, SessionManager], clock: Clock) -> None:
    """The slowest write and read, and the cleanup that was longest ago."""
    moments = iter([0.0, 0.1, 1.0, 1.4, 2.0, 2.2, 3.0, 3.3])
    for manager, ago in zip(managers.values(), (10, 20), strict=True):
        manager.store.note(NOTE, clock() - ago)
    told = upkeep.health(managers, timer=lambda: next(moments))
    assert told.write_seconds == pytest.approx(0.2)
    assert told.read_seconds == pytest.approx(0.4)
    assert told.last_cleanup == clock() - 20


def test_health_writes_and_reads_each_store(managers: dict[str, SessionManager]) -> None:
    """A store of which only one of both works is not healthy."""
    stores = [CountingStore(manager.store) for manager in managers.values()]
    for manager, store in zip(managers.values(), stores, strict=True):
        manager.store = store
    upkeep.health(managers)
    assert all(store.operations["get"] == 1 <= store.operations["note"] for store in stores)


def test_all_namespaces_are_checked_and_tidied_up(managers: dict[str, SessionManager]) -> None:
    """With repair and in full where it is asked for."""
    asked: list[tuple[str, bool]] = []
    for manager in managers.values():
        manager.create({"a": 1})
        manager.store = _Noting(manager.store, asked)
    assert upkeep.check(managers, repair=True).checked == 2
    assert upkeep.optimize(managers, full=True) == ()
    assert asked == [("check", True)] * 2 + [("optimize", True)] * 2


class _Noting(CountingStore):
    """Notes with which option a check or a tidying up was asked for."""

    def __init__(self, store: SessionStore, asked: list[tuple[str, bool]]) -> None:
        super().__init__(store)
        self._asked = asked

    def check(self, *, repair: bool, **options: Any) -> Any:
        self._asked.append(("check", repair))
        return self.store.check(repair=repair, **options)

    def optimize(self, *, full: bool = False) -> Any:
        self._asked.append(("optimize", full))
        return self.store.optimize(full=full)


# Taking over ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def former(tmp_path: Path) -> FileSystemCache:
    """The files of Flask-Session, with a session of one user."""
    cache = FileSystemCache(str(tmp_path / "old"))
    cache.set("session:ada", {"_user_id": "Ada"}, 86400)
    return cache


def taking_over(make_app: MakeApp, tmp_path: Path, **settings: Any) -> Flask:
    """An application that takes over what is there."""
    return add_views(make_app(PERSIST_SESSION_UPGRADE_FROM=[f"flask-session+file://{tmp_path}/old?pickle=1"], **settings))


def import_all(app: Flask, **options: Any) -> ImportReport:
    with app.app_context():
        return PersistSession().import_sessions(**options)


def test_a_dry_run_of_an_import_deletes_nothing(former: FileSystemCache, make_app: MakeApp, tmp_path: Path) -> None:
    """Also where it is told to."""
    app = taking_over(make_app, tmp_path)
    report = import_all(app, dry_run=True, delete=True)
    assert (report.imported, report.dry_run) == (1, True)
    assert former.get("session:ada") == {"_user_id": "Ada"}
    assert app.extensions["persist_session"].manager.stats().total == 0


def test_an_import_of_what_has_expired_counts_it_and_leaves_it(
    former: FileSystemCache, make_app: MakeApp, tmp_path: Path
) -> None:
    """Nobody is signed in by a session whose time is up."""
    app = taking_over(make_app, tmp_path)
    app.extensions["persist_session"].manager.clock = Clock(time.time() + 86401)
    assert import_all(app, delete=True) == ImportReport(expired=1)
    assert former.get("session:ada") == {"_user_id": "Ada"}


def test_a_session_too_large_to_be_imported_costs_itself_alone(
    former: FileSystemCache, make_app: MakeApp, tmp_path: Path
) -> None:
    """It counts as unreadable, and stays where it was."""
    former.set("session:bob", {"x": "y" * 5000}, 86400)
    report = import_all(taking_over(make_app, tmp_path, PERSIST_SESSION_MAX_BYTES=2000), delete=True)
    assert report == ImportReport(imported=1, unreadable=1)
    assert former.get("session:bob") is not None


def test_an_import_is_of_all_that_is_set(former: FileSystemCache, make_app: MakeApp, tmp_path: Path) -> None:
    """Counts of several places are added up."""
    FileSystemCache(str(tmp_path / "older")).set("session:bob", {"_user_id": "Bob"}, 86400)
    app = make_app()
    with app.app_context():
        urls = [f"flask-session+file://{tmp_path}/{name}?pickle=1" for name in ("old", "older")]
        assert PersistSession().import_sessions(urls).imported == 2


def test_a_record_that_cannot_be_removed_is_logged_and_its_user_served(
    former: FileSystemCache,
    make_app: MakeApp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What stands for it here makes sure that the old cookie opens nothing."""

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("flask_persist_session.origins.os.remove", refuse)
    app = taking_over(make_app, tmp_path)
    client = with_cookie(app, "ada")
    assert [client.get("/me").text for _ in range(2)] == ["Ada", "Ada"]
    assert "could not be removed after it was taken over" in caplog.text
    assert with_cookie(app, "ada").get("/me").text == "nobody"


# Commands -------------------------------------------------------------------------------------------------------------


def run(app: Flask, *arguments: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["sessions", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "command",
    ["backup {here}/backups", "restore {archive} --yes", "migrate --to file:{here}/copy", "import", "check", "migrate"],
)
def test_a_long_command_shows_its_progress(
    command: str, former: FileSystemCache, make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it shows adds up to the sessions that it has dealt with."""
    monkeypatch.setattr(backup_module, "_STEP", 1)
    settings = {"PERSIST_SESSION_MIGRATE_FROM": f"file://{tmp_path}/before"} if command == "migrate" else {}
    app = taking_over(make_app, tmp_path, **settings)
    store = open_store(f"file://{tmp_path}/before") if settings else app.extensions["persist_session"].store
    SessionManager(store).create({"a": 1})
    archive = save_archive(SessionManager(store), tmp_path / "archives", now=time.time())
    steps: dict[str, list[int]] = {}

    class Bar(AbstractContextManager[Callable[[int], None]]):
        def __init__(self, label: str, length: int | None = None) -> None:
            assert length in (None, 1)
            self.steps = steps.setdefault(label, [])

        def __enter__(self) -> Callable[[int], None]:
            return self.steps.append

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr("flask_persist_session.terminal.progress", Bar)
    status, output = run(app, *command.format(here=tmp_path, archive=archive).split())
    assert (status, {sum(done) for done in steps.values()}) == (0, {1}), output


def test_copies_that_are_not_alike_make_the_command_fail(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status is 1, and five of them are named."""
    ids = tuple(make_record(number).id for number in range(7))
    monkeypatch.setattr(Migration, "_compare", lambda self: (9, ids))
    status, output = run(make_app(), "migrate", "--to", "file:copy")
    assert status == 1
    assert f"7 of 9 compared sessions are not alike: {', '.join(ids[:5])}; run it again" in output


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("user_id", ("--user", "7")),
        ("tenant_id", ("--tenant", "acme")),
        ("tags", ("--tag", "a", "--tag", "b")),
        ("include_expired", ("--include-expired",)),
        ("keep", ("--keep", "3")),
    ],
)
def test_each_option_of_a_backup_is_handed_on(
    option: str, arguments: tuple[str, ...], make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command chooses as the function does."""
    asked: list[dict[str, Any]] = []
    report = BackupReport(path="x", created_at=0.0, bytes=0)
    monkeypatch.setattr(PersistSession, "backup", lambda self, path, **options: asked.append(options) or report)
    assert run(make_app(), "backup", str(tmp_path), *arguments)[0] == 0
    given = {"user_id": "7", "tenant_id": "acme", "tags": ("a", "b"), "include_expired": True, "keep": 3}
    nothing = {"user_id": None, "tenant_id": None, "tags": (), "include_expired": False, "keep": None}
    assert {name: asked[0][name] for name in nothing} == nothing | {option: given[option]}


@pytest.mark.parametrize(
    ("option", "arguments", "value"),
    [
        ("strategy", ("--strategy", "newer"), "newer"),
        ("dry_run", ("--dry-run",), True),
        ("sign_out", ("--sign-out",), True),
    ],
)
def test_each_option_of_a_restore_is_handed_on(
    option: str, arguments: tuple[str, ...], value: object, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run asks nobody, for it changes nothing."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        PersistSession, "restore", lambda self, path, **options: asked.append(options) or RestoreReport(restored=1)
    )
    yes = () if option == "dry_run" else ("--yes",)
    assert run(make_app(), "restore", "x.tar.gz", *arguments, *yes)[0] == 0
    nothing = {"strategy": "skip", "dry_run": False, "sign_out": False}
    assert {name: asked[0][name] for name in nothing} == nothing | {option: value}


def test_a_restore_that_failed_in_part_tells_why(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exit status 1."""
    report = RestoreReport(restored=1, failed=1, reasons=("7e1: no good",))
    monkeypatch.setattr(PersistSession, "restore", lambda self, path, **options: report)
    status, output = run(make_app(), "restore", "x.tar.gz", "--yes")
    assert status == 1
    assert output.endswith("\nfailed: 7e1: no good\n")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (StoreError("it is down"), 1)])
@pytest.mark.parametrize("dry", [True, False])
def test_a_restore_that_stops_says_what_it_did(
    error: BaseException, status: int, dry: bool, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far it came, in what state the store is, and what to do."""

    def stop(self: PersistSession, path: str, *, progress: Callable[[int], None], **options: Any) -> RestoreReport:
        for _ in range(2):
            progress(400)
        raise error

    monkeypatch.setattr(PersistSession, "restore", stop)
    ended, output = run(make_app(), "restore", "x.tar.gz", "--dry-run" if dry else "--yes")
    assert ended == status
    state = "nothing was changed" if dry else "what it restored is complete"
    assert f"after 800 sessions: {state}; run it again for the rest" in output


def test_an_archive_that_does_not_verify_makes_the_listing_fail(make_app: MakeApp, tmp_path: Path) -> None:
    """The exit status is for monitoring; the facts are there for programs too."""
    app = make_app()
    app.extensions["persist_session"].manager.create({"a": 1})
    with app.app_context():
        path = Path(PersistSession().backup(tmp_path).path)
    status, output = run(app, "backups", str(tmp_path), "--json")
    [facts] = json.loads(output)
    assert (status, facts["sessions"], facts["verified"], facts["error"]) == (0, 1, True, None)
    path.write_bytes(path.read_bytes()[:-10])
    status, output = run(app, "backups", str(tmp_path), "--json")
    [facts] = json.loads(output)
    assert (status, facts["sessions"], facts["verified"]) == (1, None, False)
    assert "cut off" in facts["error"]
    assert run(app, "backups", str(tmp_path))[0] == 1


def test_sessions_too_large_for_an_archive_are_told(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes the archive for complete."""
    report = BackupReport(path="x", created_at=0.0, bytes=0, left_out=2)
    monkeypatch.setattr(PersistSession, "backup", lambda self, path, **options: report)
    assert "left out 2 sessions that are too large" in run(make_app(), "backup", "x")[1]


def test_a_check_of_many_findings_counts_the_rest(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not listed is not hidden."""
    finding = Finding(kind="torn", where="x", text="it is torn")
    report = CheckReport(checked=1, found=1005, findings=(finding,) * 1000)
    monkeypatch.setattr(PersistSession, "check", lambda self, **options: report)
    assert "\n… and 5 more\n" in run(make_app(), "check")[1]
