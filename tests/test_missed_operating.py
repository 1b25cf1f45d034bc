"""Promises of backups, restores, migrations, take-overs and checks that the other tests take for granted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flask_persist_session import BackupError, SessionManager, open_store
from flask_persist_session import backup as backup_module
from flask_persist_session import backup_files as files_module
from flask_persist_session.backup import back_up
from flask_persist_session.backup_files import backups_in
from tests.conftest import Clock


@pytest.fixture
def manager(clock: Clock) -> SessionManager:
    return new_manager(clock)


def new_manager(clock: Clock, url: str = "memory://") -> SessionManager:
    return SessionManager(open_store(url), clock=clock, user_key="_user_id")


def save_archive(manager: SessionManager, place: Path, **options: Any) -> str:
    return back_up({"web": manager}, str(place), **({"now": manager.clock()} | options)).path


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
    request.addfinalizer(time.tzset)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    save_archive(manager, tmp_path)
    assert [found.created_at for found in backups_in(str(tmp_path))] == [manager.clock()]


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
