"""Promises of backups, restores, migrations, take-overs and checks that the other tests take for granted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cachelib import SimpleCache
from flask import Flask

from flask_persist_session import BackupError, RestoreReport, SessionManager, SessionStore, backup_created, open_store
from flask_persist_session import backup as backup_module
from flask_persist_session import backup_files as files_module
from flask_persist_session.announcer import Announcer
from flask_persist_session.auto_backup import AutomaticBackup
from flask_persist_session.backup import Strategy, back_up, restore
from flask_persist_session.backup_files import backups_in
from flask_persist_session.testing import make_record
from tests.conftest import Clock

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


def test_a_restore_pauses_between_batches(
    manager: SessionManager, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pause requests get the lock of a store that has one lock for all."""
    for number in range(5):
        manager.create({"n": number})
    path = save_archive(manager, tmp_path)
    pauses: list[float] = []
    monkeypatch.setattr(backup_module, "_BATCH", 2)
    monkeypatch.setattr(backup_module.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(backup_module.time, "sleep", pauses.append)
    assert load(new_manager(clock), path).restored == 5
    assert pauses == [0.0, backup_module._GAP, backup_module._GAP]


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
    (tmp_path / "file").touch()
    with pytest.raises(BackupError):
        automatic(manager, tmp_path / "file" / "backups").turn()
    assert automatic(manager, tmp_path).turn() is not None


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
