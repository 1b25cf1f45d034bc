"""What happens on a disk that is really full: a small file system in memory, mounted for a process of the test's own.

``RLIMIT_FSIZE``, which other tests use, limits each file; here the file system as a whole has no room.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from flask_persist_session import BackupError, Change, SessionManager, SessionRecord, SessionStore, StoreError, open_store
from flask_persist_session.backup import back_up, restore
from flask_persist_session.migrate import Migration
from flask_persist_session.monthly_archive import MonthlyArchive
from flask_persist_session.testing import make_record

NOW = 1_700_000_000.0
KINDS = ("file", "sqlite")
#: Room that the disk has, and of which most is taken at first.
ROOM, TAKEN = 8_000_000, 7_600_000
_MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
_CALL = "import sys, tests.test_full_disk as module; getattr(module, sys.argv[1])(*sys.argv[2:])"


def mounting(folder: Path, *command: str) -> list[str]:
    """The command that runs another one with a small file system at *folder*, which nobody else sees."""
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", _MOUNT, "sh", str(ROOM), str(folder), *command]


@cache
def why_not(folder: Path) -> str | None:
    """Why nothing can be mounted here."""
    if shutil.which("unshare") is None:
        return "there is no unshare, which mounts without being root"
    tried = subprocess.run(mounting(folder, "true"), capture_output=True, text=True)
    return f"this kernel lets us mount nothing: {tried.stderr.strip()}" if tried.returncode else None


@pytest.fixture
def on_small_disk(tmp_path: Path) -> Callable[..., None]:
    """Calls a function of this module in a process for which a directory, its first argument, is a small disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if reason := why_not(disk):
        pytest.skip(reason)

    def call(function: Callable[..., None], *given: object) -> None:
        command = mounting(disk, sys.executable, "-c", _CALL, function.__name__, str(disk), *map(str, given))
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    return call


def take_room(disk: str) -> Callable[[], None]:
    """Take most of the room; returns what gives it back."""
    path = os.path.join(disk, "taken")
    with open(path, "wb") as file:
        file.write(bytes(TAKEN))
    return lambda: os.unlink(path)


def records(count: int = 600, **fields: float) -> list[SessionRecord]:
    fields = {"expires_at": NOW + 9} | fields
    return [
        make_record(number, user_id=None, data=random.Random(number).randbytes(1000), **fields) for number in range(count)
    ]


def store_with(wanted: list[SessionRecord]) -> SessionStore:
    store = open_store("memory://")
    assert all(store.save_many([Change(record=record, expected=0) for record in wanted]))
    return store


def contents(store: SessionStore) -> dict[str, SessionRecord]:
    return {record.id: replace(record, version=1) for record in store.scan()}


def manager_of(store: SessionStore, now: float = NOW) -> dict[str, SessionManager]:
    return {"web": SessionManager(store, clock=lambda: now)}


def store_on(disk: str, kind: str) -> SessionStore:
    return open_store(f"file://{disk}/sessions" if kind == "file" else f"sqlite:///{disk}/sessions.db")


def backing_up(disk: str) -> None:
    store, place = store_with(records()), f"{disk}/backups"
    back_up(manager_of(store_with(records(9))), place, now=NOW)
    give_room, before = take_room(disk), os.listdir(place)
    with pytest.raises(BackupError, match="No space left on device"):
        back_up(manager_of(store), place, now=NOW + 1, keep=1)
    assert os.listdir(place) == before
    give_room()
    assert back_up(manager_of(store), place, now=NOW + 1, keep=1).sessions == 600


def test_a_backup(on_small_disk: Callable[..., None]) -> None:
    """It says so, leaves no file and removes no older archive; with room it succeeds."""
    on_small_disk(backing_up)


def restoring(disk: str, kind: str, archive: str) -> None:
    wanted, store = {record.id: record for record in records()}, store_on(disk, kind)
    fills(store, disk, wanted, lambda: restore(manager_of(store), archive))


@pytest.mark.parametrize("kind", KINDS)
def test_a_restore(kind: str, on_small_disk: Callable[..., None], tmp_path: Path) -> None:
    """It ends with an error of the store; what is there is whole, and a repeat with room brings the rest."""
    archive = back_up(manager_of(store_with(records())), str(tmp_path / "backups"), now=NOW).path
    on_small_disk(restoring, kind, archive)


def migrating(disk: str, kind: str) -> None:
    source, target = store_with(records()), store_on(disk, kind)
    fills(target, disk, contents(source), lambda: Migration(source, target, lambda: NOW).run())


@pytest.mark.parametrize("kind", KINDS)
def test_a_migration(kind: str, on_small_disk: Callable[..., None]) -> None:
    """It ends with an error of the target; what is there is whole, and a repeat with room brings the rest."""
    on_small_disk(migrating, kind)


def fills(store: SessionStore, disk: str, wanted: dict[str, SessionRecord], run: Callable[[], object]) -> None:
    """*run* brings *wanted* into *store*, for which there is no room at first."""
    give_room = take_room(disk)
    with pytest.raises(StoreError, match=r"No space left on device|disk is full"):
        run()
    assert contents(store).items() < wanted.items()
    give_room()
    run()
    assert contents(store) == wanted
    assert list(store.check(repair=False)) == []


def archiving(disk: str) -> None:
    store, archive = store_with(records(expires_at=NOW - 1)), MonthlyArchive(f"{disk}/archives")
    earlier = make_record(9999, user_id=None)
    archive.add("web", [earlier], NOW)
    give_room, before = take_room(disk), archive.size()
    manager = SessionManager(store, clock=lambda: NOW, archive=lambda batch, now: archive.add("web", batch, now))
    with pytest.raises(BackupError, match="No space left on device"):
        manager.cleanup()
    assert (len(contents(store)), archive.size()) == (600, before)
    give_room()
    assert manager.cleanup().expired == 600
    assert all(archive.search(record.id) for record in [earlier, *records()])


def test_an_archive_of_removed_sessions(on_small_disk: Callable[..., None]) -> None:
    """A cleanup removes nothing that could not be archived, and goes on when there is room."""
    on_small_disk(archiving)
