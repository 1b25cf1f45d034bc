"""Backups: what is in an archive, what a restore brings back, and which archives are refused."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import re
import signal
import sqlite3
import stat
import sys
import tarfile
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flask import Flask, session

from flask_persist_session import (
    BackupError,
    BackupReport,
    ConfigError,
    PersistSession,
    RestoreReport,
    SerializationError,
    SessionManager,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoreError,
    backup_created,
    backup_files,
    open_store,
)
from flask_persist_session import archive as archive_module
from flask_persist_session.announcer import Announcer
from flask_persist_session.archive import LARGEST_MEMBER, MANIFEST, fastest_zlib
from flask_persist_session.auto_backup import AutomaticBackup
from flask_persist_session.backup import Strategy, back_up, restore
from flask_persist_session.backup_files import backups_in, newest_before
from flask_persist_session.record_lines import HISTORY
from flask_persist_session.stores import redis_scripts
from tests.conftest import ALL_STORES, Clock
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]
NAME = re.compile(r"sessions_backup_\d{8}-\d{6}(-\d+)?\.tar\.gz")


@pytest.fixture
def manager(clock: Clock) -> SessionManager:
    return new_manager(clock)


def new_manager(clock: Clock, url: str = "memory://") -> SessionManager:
    return SessionManager(open_store(url), clock=clock, user_key="_user_id")


def save_archive(manager: SessionManager, place: Path, **options: Any) -> BackupReport:
    return back_up({"web": manager}, str(place), now=manager.clock(), **options)


def load(manager: SessionManager, path: object, strategy: Strategy = "skip", **options: Any) -> RestoreReport:
    return restore({"web": manager}, str(path), strategy=strategy, **options)


def counts(report: RestoreReport) -> dict[str, int]:
    """What happened to how many sessions, without zeros."""
    names = ("restored", "overwritten", "skipped", "ended", "expired", "failed")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def contents(store: SessionStore) -> dict[str, SessionRecord]:
    """The records of a store by id, all as of one version."""
    return {record.id: replace(record, version=1) for record in store.scan()}


def fill(manager: SessionManager) -> None:
    """Sessions of users and of nobody, described, changed, large, ended."""
    manager.create({"a": 1})
    manager.create({"é\n": ["\0", (1, 2)], "_user_id": "7"}, user_id="7", tenant_id="acme", tags=["web", "ü"])
    manager.create({"x": "y" * 5000}, user_id="7", metadata={"device": {"name": "Füchsin 🦊", "n": [1, 2.5, None]}})
    changed = manager.create({"n": 1}, user_id="8")
    changed.data["n"] = 2
    manager.save(changed)
    manager.end(manager.create({"secret": 1}, user_id="9").id, "revoked")


# Round trips ----------------------------------------------------------------------------------------------------------


def test_a_round_trip_brings_back_every_field(store_url: str, clock: Clock, tmp_path: Path) -> None:
    """What a restore puts into an empty store is what was backed up, in every field but the version."""
    manager = new_manager(clock, store_url)
    fill(manager)
    before = contents(manager.store)
    report = save_archive(manager, tmp_path)
    assert (report.active, report.ended, report.expired, report.left_out) == (4, 1, 0, 0)
    for session_id in before:
        manager.store.delete(session_id)
    assert counts(load(manager, report.path)) == {"restored": 5}
    assert contents(manager.store) == before
    assert {record.version for record in manager.store.scan()} == {1}
    manager.store.close()


@pytest.mark.parametrize("source", ALL_STORES)
@pytest.mark.parametrize("target", ALL_STORES)
def test_a_store_of_another_kind_takes_it(
    source: str, target: str, new_url: Callable[[str], str], clock: Clock, tmp_path: Path
) -> None:
    """A backup of any kind of store is restored into any other."""
    one, other = new_manager(clock, new_url(source)), new_manager(clock, new_url(target))
    fill(one)
    load(other, save_archive(one, tmp_path).path)
    assert contents(other.store) == contents(one.store)
    for manager in one, other:
        manager.store.close()


def test_many_sessions_make_several_members(
    manager: SessionManager, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members are closed when they have grown, so that neither side holds more than some of them in memory."""
    monkeypatch.setattr(archive_module, "_MEMBER_BYTES", 20_000)
    for number in range(500):
        manager.create({"n": number})
    report = save_archive(manager, tmp_path)
    with tarfile.open(report.path) as archive:
        sizes = {member.name: member.size for member in archive}
    assert list(sizes)[-1] == MANIFEST
    assert len(sizes) > 5
    assert all(size <= 20_000 for name, size in sizes.items() if name != MANIFEST)
    other = new_manager(clock)
    assert counts(load(other, report.path)) == {"restored": 500}


def test_an_empty_store_makes_an_archive(manager: SessionManager, tmp_path: Path) -> None:
    """It has a manifest and restores nothing."""
    report = save_archive(manager, tmp_path)
    assert (report.sessions, load(manager, report.path)) == (0, RestoreReport())


def test_tar_lists_it(manager: SessionManager, tmp_path: Path) -> None:
    """It is a tar that any tool reads: records as lines of JSON, and a manifest with counts and checksums."""
    fill(manager)
    with tarfile.open(save_archive(manager, tmp_path).path) as archive:
        assert archive.getnames() == ["web/records-000001.jsonl", "manifest.json"]
        records = archive.extractfile("web/records-000001.jsonl")
        manifest = archive.extractfile("manifest.json")
        assert records is not None
        assert manifest is not None
        lines = [json.loads(line) for line in records]
        facts = json.loads(manifest.read())
    assert {line["id"] for line in lines} == {record.id for record in manager.store.scan()}
    assert facts["format"] == 1
    assert facts["stores"] == {"web": "MemoryStore"}
    assert facts["counts"] == {"web": {"active": 4, "ended": 1}}
    assert facts["members"]["web/records-000001.jsonl"]["records"] == 5


def test_no_token_is_in_an_archive(make_app: MakeApp, tmp_path: Path) -> None:
    """Whoever has an archive has no cookie: neither the token nor what is signed of it is in there."""
    app = make_app()
    app.add_url_rule("/", view_func=lambda: str(session.setdefault("a", 1)))
    client = app.test_client()
    client.get("/")
    cookie = client.get_cookie("session")
    assert cookie is not None
    token = cookie.value.split(".")[0]
    with app.app_context():
        created = PersistSession().manager.create({"a": 1})
        path = PersistSession().backup(tmp_path).path
    text = gzip.decompress(Path(path).read_bytes()).decode("latin-1")
    assert created.token is not None
    assert created.id in text
    for secret in token, created.token:
        assert secret not in text
        assert secret[3:20] not in text


# What is chosen -------------------------------------------------------------------------------------------------------


def test_filters_choose(manager: SessionManager, tmp_path: Path) -> None:
    """A user, a tenant and tags choose sessions as they do in ``find``; 7 is the same user as "7"."""
    fill(manager)
    chosen = [
        save_archive(manager, tmp_path, **options).sessions
        for options in ({"user_id": 7}, {"tenant_id": "acme"}, {"tags": ["ü", "web"]}, {"tags": "none"}, {})
    ]
    assert chosen == [2, 1, 1, 0, 5]


def test_expired_ones_are_left_out(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """What the next cleanup removes is not backed up unless asked for, and is never brought back."""
    fill(manager)
    clock.advance(40 * 86400)
    manager.create({"a": 1})
    assert save_archive(manager, tmp_path).sessions == 1
    report = save_archive(manager, tmp_path, include_expired=True)
    assert (report.active, report.expired) == (1, 5)
    assert counts(load(new_manager(clock), report.path)) == {"restored": 1, "expired": 5}


def test_a_session_too_large_for_an_archive_is_counted(
    manager: SessionManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs only itself, and the report says so."""
    monkeypatch.setattr(archive_module, "LARGEST_MEMBER", 10_000)
    manager.create({"x": "y" * 20_000})
    manager.create({"a": 1})
    report = save_archive(manager, tmp_path)
    assert (report.sessions, report.left_out) == (1, 1)
    assert counts(load(manager, report.path)) == {"skipped": 1}


# Restoring into a store that lives ------------------------------------------------------------------------------------


@pytest.fixture
def before_and_after(manager: SessionManager, clock: Clock, tmp_path: Path) -> tuple[str, SessionManager]:
    """A backup of two sessions, after which one was changed."""
    manager.create({"kept": 1}, user_id="1")
    changed = manager.create({"n": "old"}, user_id="2")
    path = save_archive(manager, tmp_path).path
    clock.advance(100)
    changed.data["n"] = "new"
    manager.save(changed)
    return path, manager


@pytest.mark.parametrize(
    ("strategy", "value", "expected"),
    [("skip", "new", {"skipped": 2}), ("overwrite", "old", {"overwritten": 2}), ("newer", "new", {"skipped": 2})],
)
def test_strategies(
    before_and_after: tuple[str, SessionManager], strategy: Strategy, value: str, expected: dict[str, int]
) -> None:
    """``skip`` leaves what is there, ``overwrite`` replaces it, ``newer`` does so only with a later request."""
    path, manager = before_and_after
    assert counts(load(manager, path, strategy)) == expected
    [found] = manager.find(user_id="2")
    loaded = manager.get(found.id)
    assert loaded is not None
    assert loaded.data == {"n": value}


def test_newer_takes_what_is_newer(before_and_after: tuple[str, SessionManager], clock: Clock, tmp_path: Path) -> None:
    """Into a store with an older state, ``newer`` brings the later one."""
    path, manager = before_and_after
    other = new_manager(clock)
    load(other, path)
    later = save_archive(manager, tmp_path).path
    assert counts(load(other, later, "newer")) == {"overwritten": 1, "skipped": 1}
    assert contents(other.store) == contents(manager.store)


@pytest.mark.parametrize("strategy", ["skip", "overwrite", "newer"])
def test_what_has_ended_stays_ended(before_and_after: tuple[str, SessionManager], strategy: Strategy) -> None:
    """A session that was ended after the backup is not brought back by any strategy."""
    path, manager = before_and_after
    for record in list(manager.find()):
        manager.end(record.id, "revoked")
    before = contents(manager.store)
    assert counts(load(manager, path, strategy)) == {"ended": 2}
    assert contents(manager.store) == before


def test_what_has_expired_meanwhile_stays_so(before_and_after: tuple[str, SessionManager], clock: Clock) -> None:
    """A session whose time is up at the restore is not brought back, be it there or not."""
    path, manager = before_and_after
    clock.advance(40 * 86400)
    assert counts(load(manager, path, "overwrite")) == {"expired": 2}
    manager.cleanup()
    assert counts(load(manager, path, "overwrite")) == {"expired": 2}
    assert manager.stats().total == 0


def test_an_end_is_restored_too(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """An older archive does not bring back what a newer one knows as ended."""
    created = manager.create({"a": 1})
    older = save_archive(manager, tmp_path).path
    manager.end(created.id, "revoked")
    newer = save_archive(manager, tmp_path).path
    other = new_manager(clock)
    assert counts(load(other, newer)) == {"restored": 1}
    assert counts(load(other, older, "overwrite")) == {"ended": 1}


def test_a_dry_run_changes_nothing(before_and_after: tuple[str, SessionManager], clock: Clock) -> None:
    """It counts what a restore would do, and writes nothing."""
    path, manager = before_and_after
    store = manager.store = CountingStore(manager.store)
    manager.store.delete(next(manager.find(user_id="1")).id)
    store.operations.clear()
    assert counts(load(manager, path, "overwrite", dry_run=True)) == {"restored": 1, "overwritten": 1}
    assert not {"save", "save_many", "delete", "delete_many"} & store.operations.keys()
    assert counts(load(manager, path, "overwrite")) == {"restored": 1, "overwritten": 1}


@pytest.mark.parametrize("kind", ALL_STORES)
def test_signing_out_restores_the_data_alone(
    kind: str, new_url: Callable[[str], str], clock: Clock, tmp_path: Path
) -> None:
    """With ``sign_out`` the sessions have their data but no user, where they were missing and where they are replaced."""
    manager = new_manager(clock, new_url(kind))
    created = manager.create({"cart": [1], "_user_id": "7"}, user_id="7", tenant_id="acme")
    path = save_archive(manager, tmp_path).path
    for expected in {"overwritten": 1}, {"restored": 1}:
        assert counts(load(manager, path, "overwrite", sign_out=True)) == expected
        found = manager.get(created.id)
        assert found is not None
        assert (found.data, found.user_id, found.tenant_id) == ({"cart": [1]}, None, None)
        assert list(manager.find(user_id="7")) == []
        manager.store.delete(created.id)
    manager.store.close()


def test_a_session_changed_during_the_restore_is_looked_at_again(before_and_after: tuple[str, SessionManager]) -> None:
    """A request that saves between the look and the write is met as a conflict, and the restore decides again."""
    path, manager = before_and_after
    [record] = manager.find(user_id="2")
    save, changes = manager.store.save, []

    def meddling(new: SessionRecord, *, expected: int) -> None:
        if new.id == record.id and expected and not changes:
            changes.append(new)
            save(replace(record, version=expected + 1), expected=expected)
        save(new, expected=expected)

    manager.store.save = meddling  # type: ignore[method-assign]
    assert counts(load(manager, path, "overwrite")) == {"overwritten": 2}
    found = manager.get(record.id)
    assert found is not None
    assert (found.data, found.version) == ({"n": "old"}, record.version + 2)


def test_an_unreadable_session_is_not_touched(new_url: Callable[[str], str], clock: Clock, tmp_path: Path) -> None:
    """A stored record that cannot be read counts as failed, and the others are restored."""
    url = new_url("sqlite")
    manager = new_manager(clock, url)
    broken, fine = manager.create({"a": 1}), manager.create({"b": 1})
    path = save_archive(manager, tmp_path).path
    manager.store.delete(fine.id)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        database.execute("UPDATE persist_session_web SET metadata = '{' WHERE id = ?", (broken.id,))
    report = load(manager, path, "overwrite")
    assert counts(report) == {"restored": 1, "failed": 1}
    assert report.reasons[0].startswith(broken.id)
    with pytest.raises(SerializationError):
        manager.store.get(broken.id)
    manager.store.close()


def test_a_server_that_loses_its_scripts_gets_them_again(
    new_url: Callable[[str], str], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis server that does not know a script in the middle of a batch saves each of it all the same."""
    manager = new_manager(clock)
    fill(manager)
    path = save_archive(manager, tmp_path).path
    for script in redis_scripts.CREATE, redis_scripts.CREATE_MANY, redis_scripts.EACH:
        monkeypatch.setattr(script, "sha", "0" * 40)
    other = new_manager(clock, new_url("redis"))
    assert counts(load(other, path)) == {"restored": 5}
    assert contents(other.store) == contents(manager.store)
    other.store.close()


# Archives that are refused --------------------------------------------------------------------------------------------


Files = dict[str, bytes]


def unpacked(path: str) -> Files:
    """The files of an archive by name."""
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    """Write an archive of *members*."""
    with tarfile.open(path, "w:gz", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def edited(files: Files, **changes: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The members of an archive with a changed manifest."""
    manifest = json.dumps(json.loads(files[MANIFEST]) | changes).encode()
    return [member(name, content) for name, content in (files | {MANIFEST: manifest}).items()]


RECORDS = "web/records-000001.jsonl"
ODD_MEMBERS: dict[str, tuple[tarfile.TarInfo, bytes]] = {
    "parent directories": member("../../tmp/evil", b"x"),
    "parent directories in the middle": member("web/../../records-000001.jsonl", b"x"),
    "an absolute path": member("/etc/cron.d/evil", b"x"),
    "a symbolic link": member(RECORDS, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member(RECORDS, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a device": member(RECORDS, type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a pipe": member(RECORDS, type=tarfile.FIFOTYPE),
    "a directory": member("web", type=tarfile.DIRTYPE),
    "a contiguous file": member(RECORDS, b"{}\n", type=tarfile.CONTTYPE),
    "a sparse file": member(RECORDS, b"", type=tarfile.GNUTYPE_SPARSE),
    "another file": member("readme.txt", b"x"),
    "no name": member("", b"x"),
    "a newline in the name": member("web/records-000001.jsonl\n", b"x"),
    "a file that nobody lists": member("web/records-000009.jsonl", b"{}\n"),
    "a namespace in capitals": member("WEB/records-000001.jsonl", b"{}\n"),
}


@pytest.fixture(params=["isal.isal_zlib", "zlib"])
def compression(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that compresses archives, and is used to do so."""
    module: ModuleType = pytest.importorskip(request.param)
    monkeypatch.setattr(archive_module, "fastest_zlib", lambda: module)
    return module


@pytest.fixture
def good(manager: SessionManager, tmp_path: Path, compression: ModuleType) -> str:
    """The path of an archive of five sessions, which the manager still has."""
    fill(manager)
    return save_archive(manager, tmp_path / "good").path


def test_each_compression_reads_what_the_other_wrote(
    good: str, manager: SessionManager, clock: Clock, compression: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive may be restored where isal is installed, and was not, or the other way round."""
    other = pytest.importorskip("isal.isal_zlib") if compression is zlib else zlib
    monkeypatch.setattr(archive_module, "fastest_zlib", lambda: other)
    empty = new_manager(clock)
    load(empty, good)
    assert contents(empty.store) == contents(manager.store)


def test_without_isal_it_is_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra may be missing."""
    monkeypatch.setitem(sys.modules, "isal", None)
    assert fastest_zlib() is zlib


def assert_refused(path: object, clock: Clock, message: str) -> None:
    """A restore says why it refuses the archive and asks nothing of the store; a listing says it does not verify."""
    store = CountingStore(open_store("memory://"))
    with pytest.raises(BackupError, match=message) as raised:
        load(SessionManager(store, clock=clock), path, "overwrite")
    assert str(path) in str(raised.value)
    assert not store.operations


@pytest.mark.parametrize("odd", ODD_MEMBERS, ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last but one"])
def test_an_archive_with_another_member_is_refused(odd: str, first: bool, good: str, clock: Clock, tmp_path: Path) -> None:
    """Paths that lead elsewhere, links, devices and unknown files: nothing of such an archive is used."""
    rest = [member(name, content) for name, content in unpacked(good).items()]
    rest.insert(0 if first else len(rest) - 1, ODD_MEMBERS[odd])
    before = sorted(tmp_path.rglob("*"))
    assert_refused(packed(tmp_path / "odd.tar.gz", *rest), clock, "member")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "odd.tar.gz"])


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_headers_of_any_length_are_refused(form: int, good: str, clock: Clock, tmp_path: Path) -> None:
    """A long name is kept in a member of its own, which could be of any size: it is not read."""
    path = packed(tmp_path / "long.tar.gz", member("web/" + "x" * 300, b"x"), form=form)
    assert_refused(path, clock, "no plain file")


def test_a_gigabyte_of_zeros_is_refused(good: str, clock: Clock, tmp_path: Path) -> None:
    """Neither zeros as an archive nor a member that says to have a gigabyte are read; memory is bounded."""
    zeros = tmp_path / "zeros.tar.gz"
    with gzip.open(zeros, "wb", compresslevel=1) as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    assert_refused(zeros, clock, "damaged, or no archive")
    files = unpacked(good)
    info = tarfile.TarInfo("web/records-000001.jsonl")
    info.size = 1 << 30
    hollow = tmp_path / "hollow.tar.gz"
    hollow.write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + files[MANIFEST]) + zeros.read_bytes())
    assert_refused(hollow, clock, f"1,073,741,824 bytes, {LARGEST_MEMBER:,} are possible")
    behind = tmp_path / "behind.tar.gz"
    behind.write_bytes(gzip.compress(gzip.decompress(Path(good).read_bytes()) + bytes(1 << 28)))
    assert_refused(behind, clock, "something follows")


def test_a_manifest_that_would_fill_the_memory_is_refused(good: str, clock: Clock, tmp_path: Path) -> None:
    """Some kilobytes of archive can hold a manifest of many empty lists: it may not be larger than its members explain."""
    files = unpacked(good)
    bloated = json.dumps(json.loads(files[MANIFEST]) | {"filters": {"tags": [[]] * 70_000}}).encode()
    path = packed(tmp_path / "bloated.tar.gz", *(member(*item) for item in (files | {MANIFEST: bloated}).items()))
    assert path.stat().st_size < 4096
    assert_refused(path, clock, f"{MANIFEST} says to have {len(bloated):,} bytes, 262,400 are possible")


#: Where a test looks at each byte: every third one, and with ``make soak`` the others.
one_in_three = pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.soak) for first in (1, 2))])


@one_in_three
def test_every_cut_is_noticed(good: str, clock: Clock, tmp_path: Path, first: int) -> None:
    """An archive that ends after any of its bytes but the last is refused."""
    whole = Path(good).read_bytes()
    path = tmp_path / "cut.tar.gz"
    for end in range(first, len(whole), 3):
        path.write_bytes(whole[:end])
        assert_refused(path, clock, "cut off|damaged|no manifest")


def unzipped(archive: bytes) -> bytes | None:
    """What gzip makes of an archive, ``None`` if it finds it broken."""
    try:
        return gzip.decompress(archive)
    except (OSError, EOFError, zlib.error):
        return None


@one_in_three
def test_every_flipped_byte_is_noticed(good: str, clock: Clock, tmp_path: Path, first: int) -> None:
    """An archive with one wrong byte is refused, or, where the byte means nothing to gzip, is whole."""
    whole = bytearray(Path(good).read_bytes())
    content, path = gzip.decompress(whole), tmp_path / "flipped.tar.gz"
    for position in range(first, len(whole), 3):
        whole[position] ^= 0xFF
        path.write_bytes(whole)
        meaningless = unzipped(bytes(whole)) == content
        whole[position] ^= 0xFF
        if meaningless:  # time and system in the header of gzip, or the length of a code that it does not use
            assert counts(load(new_manager(clock), path)) == {"restored": 5}
        else:
            assert_refused(path, clock, "refused")


def test_a_newer_format_is_refused(good: str, clock: Clock, tmp_path: Path) -> None:
    """The message names the format and what to do, also where the archive has members that this release does not know."""
    members = edited(unpacked(good), format=2)
    assert_refused(packed(tmp_path / "newer.tar.gz", *members), clock, "has format 2, and this release")
    members.insert(1, member("web/history-000001.jsonl", b"{}\n"))
    assert_refused(packed(tmp_path / "newest.tar.gz", *members), clock, "has format 2")


MANIFESTS: dict[str, dict[str, Any]] = {
    "format 0": {"format": 0},
    "a format that is no number": {"format": "1"},
    "counts that are too high": {"counts": {"web": {"active": 9}}},
    "counts of nothing": {"counts": {}},
    "counts that are text": {"counts": {"web": "5"}},
    "no members": {"members": {}},
    "members that are a list": {"members": [RECORDS]},
    "a member more": {"members": {RECORDS: {}, "web/records-000002.jsonl": {}}},
    "another checksum": {"members": {RECORDS: {"sha256": "0" * 64, "bytes": 1, "records": 5}}},
    "a time that is none": {"created_at": "today"},
    "a field more": {"future": 1},
}


@pytest.mark.parametrize("change", MANIFESTS, ids=str)
def test_a_manifest_that_does_not_fit_is_refused(change: str, good: str, clock: Clock, tmp_path: Path) -> None:
    """The manifest must describe just what is there."""
    assert_refused(packed(tmp_path / "x.tar.gz", *edited(unpacked(good), **MANIFESTS[change])), clock, "refused")


def facts_of(content: bytes) -> dict[str, Any]:
    """What a manifest says of a member."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "records": content.count(b"\n")}


def test_a_member_of_an_unknown_kind_is_refused_though_it_is_listed(good: str, clock: Clock, tmp_path: Path) -> None:
    """Nobody would know what to do with it, so it would be lost without a word."""
    content = unpacked(good)[RECORDS]
    name = "web/history-000001.jsonl"
    files = {name: content, MANIFEST: unpacked(good)[MANIFEST]}
    path = packed(tmp_path / "x.tar.gz", *edited(files, members={name: facts_of(content)}))
    assert_refused(path, clock, "unknown member web/history")


def test_a_member_that_comes_twice_is_refused(good: str, clock: Clock, tmp_path: Path) -> None:
    """The manifest could say which of them only by its checksum."""
    files = unpacked(good)
    members = [member(name, content) for name, content in files.items()]
    assert_refused(packed(tmp_path / "x.tar.gz", members[0], *members), clock, "twice")


@pytest.mark.parametrize("field", ["bytes", "records"])
def test_a_size_or_number_that_is_not_that_of_the_member_is_refused(
    field: str, good: str, clock: Clock, tmp_path: Path
) -> None:
    """Also where its checksum is right, and the sum of all records."""
    files = unpacked(good)
    facts = facts_of(files[RECORDS])
    changes: dict[str, Any] = {"members": {RECORDS: facts | {field: facts[field] + 1}}}
    if field == "records":
        changes["counts"] = {"web": {"active": 6}}
    assert_refused(packed(tmp_path / "x.tar.gz", *edited(files, **changes)), clock, "size, count or checksum differ")


def test_a_negative_count_is_refused(good: str, clock: Clock, tmp_path: Path) -> None:
    """Though all counts together are right."""
    path = packed(tmp_path / "x.tar.gz", *edited(unpacked(good), counts={"web": {"active": 6, "ended": -1}}))
    assert_refused(path, clock, "manifest is not one of this package")


FOLLOWING = {
    "a byte": b"x",
    "another member": gzip.compress(bytes(512)),
    "zeros": bytes(1),
    "zeros beyond a record": b"",
}


@pytest.mark.parametrize("what", FOLLOWING)
def test_an_archive_with_something_behind_it_is_refused(what: str, good: str, clock: Clock, tmp_path: Path) -> None:
    """Nothing that tools for tar or gzip might find is beyond what the manifest describes."""
    content = Path(good).read_bytes()
    if what == "zeros beyond a record":
        content = gzip.compress(gzip.decompress(content) + bytes(20_000))
    path = tmp_path / "x.tar.gz"
    path.write_bytes(content + FOLLOWING[what])
    assert_refused(path, clock, "something follows its manifest")


def test_an_archive_with_something_behind_the_last_piece_is_refused(
    good: str, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the archive ends with what was read at once."""
    monkeypatch.setattr(archive_module, "_READ_BYTES", Path(good).stat().st_size)
    (tmp_path / "x.tar.gz").write_bytes(Path(good).read_bytes() + b"x")
    assert_refused(tmp_path / "x.tar.gz", clock, "something follows its manifest")


def test_a_member_that_ends_within_a_line_is_refused(good: str, clock: Clock, tmp_path: Path) -> None:
    """Its last session would be left out."""
    files = unpacked(good)
    content = files[RECORDS] + b"{}"
    path = packed(tmp_path / "x.tar.gz", *edited(files | {RECORDS: content}, members={RECORDS: facts_of(content)}))
    assert_refused(path, clock, "ends within a line")


def test_a_format_that_is_no_whole_number_is_not_one_of_a_newer_release(good: str, clock: Clock, tmp_path: Path) -> None:
    """The advice to use a newer release would lead nowhere."""
    assert_refused(packed(tmp_path / "x.tar.gz", *edited(unpacked(good), format=1.5)), clock, "not one of this package")


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{", b"[" * 100_000, b'{"format": 1}', b"\xff", b"1" * 5000])
def test_a_manifest_that_is_none_is_refused(text: bytes, good: str, clock: Clock, tmp_path: Path) -> None:
    """Text that is no manifest, nested deep or with huge numbers."""
    members = [member(RECORDS, unpacked(good)[RECORDS]), member(MANIFEST, text)]
    assert_refused(packed(tmp_path / "x.tar.gz", *members), clock, "manifest")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x1f\x8b", b"SQLite format 3\0" * 100, gzip.compress(b"hello", mtime=0)]
)
def test_a_foreign_file_is_refused(content: bytes, clock: Clock, tmp_path: Path) -> None:
    """Something that is no archive at all."""
    path = tmp_path / "foreign.tar.gz"
    path.write_bytes(content)
    assert_refused(path, clock, "refused")


def test_what_is_no_file_is_refused(clock: Clock, tmp_path: Path) -> None:
    """A missing file, a directory, a device and a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "missing.tar.gz", clock, "there is no archive")
    for path in tmp_path, tmp_path / "pipe", "/dev/zero":
        assert_refused(path, clock, "no plain file")


def test_an_archive_of_another_namespace_is_refused(good: str, clock: Clock, tmp_path: Path) -> None:
    """Sessions of a namespace that the application does not have would be lost without a word."""
    store = CountingStore(open_store("memory://"))
    with pytest.raises(BackupError, match="has sessions of web, and this application has only chat"):
        restore({"chat": SessionManager(store, clock=clock)}, good)
    assert not store.operations


def test_an_archive_changed_after_its_check_is_refused(good: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are compared with the checksum once more when they are used."""
    other = new_manager(clock)

    def change(count: int) -> None:
        files = unpacked(good)
        changed = files[RECORDS].replace(b'"version":1', b'"version":2', 1)
        packed(Path(good), *[member(name, changed if name == RECORDS else text) for name, text in files.items()])

    with pytest.raises(BackupError, match="changed while it was being read"):
        load(other, good, started=change)
    assert other.stats().total == 0


BAD_LINES: dict[str, dict[str, Any]] = {
    "an id that is none": {"id": "../x"},
    "an id of another user's shard": {"user_id": "somebody else"},
    "a time that is text": {"expires_at": "9999999999"},
    "a time beyond all dates": {"expires_at": 1e300},
    "a time before all dates": {"created_at": -2e11},
    "an end beyond all dates": {"ended_at": 10**300},
    "an end before all dates": {"ended_at": -2e11},
    "an end that is no number": {"ended_at": float("nan")},
    "a user that is a number": {"user_id": 7},
    "a NUL in the user": {"user_id": "a\0b"},
    "tags that are numbers": {"tags": [1]},
    "metadata that is a list": {"metadata": [1]},
    "metadata that are no JSON": {"metadata": {"a": [float("nan")]}},
    "data that is no base64": {"data": "x"},
    "data that is a number": {"data": 7},
}


@pytest.mark.parametrize("change", BAD_LINES, ids=str)
def test_a_wrong_record_costs_itself_alone(change: str, good: str, clock: Clock, tmp_path: Path, store_url: str) -> None:
    """A record that cannot be restored, in an archive that is whole, is counted with its reason; the others come back.

    A dry run says the same.
    """
    files = unpacked(good)
    lines = files[RECORDS].splitlines(keepends=True)
    first = next(line for line in lines if json.loads(line)["user_id"] is None)
    wrong = json.dumps(json.loads(first) | BAD_LINES[change]).encode() + b"\n"
    other = new_manager(clock, store_url)
    path = repacked(files, [wrong if line == first else line for line in lines], tmp_path)
    for dry_run in True, False:
        report = load(other, path, dry_run=dry_run)
        assert counts(report) == {"restored": 4, "failed": 1}
        assert len(report.reasons) == 1
    assert len(contents(other.store)) == 4
    other.store.close()


@pytest.mark.parametrize("in_front", [False, True])
def test_a_record_whose_history_is_missing_is_not_restored(
    in_front: bool, good: str, clock: Clock, tmp_path: Path, store_url: str
) -> None:
    """Wherever in its line stands how many entries it had: without them it would not be the same session."""
    files = unpacked(good)
    first, *others = files[RECORDS].splitlines(keepends=True)
    fields, said = json.loads(first), {"entries": 3, "last_entry_at": 1.0}
    line = json.dumps(said | fields if in_front else fields | said, separators=(",", ":")).encode() + b"\n"
    other = new_manager(clock, store_url)
    report = load(other, repacked(files, [line, *others], tmp_path))
    assert counts(report) == {"restored": 4, "failed": 1}
    assert "of the 3 entries" in report.reasons[0]
    other.store.close()


def test_a_record_whose_history_ends_too_early_is_not_restored(good: str, clock: Clock, tmp_path: Path) -> None:
    """It fails with what is missing, nobody gets the half of it, and a whole archive brings it back."""
    files = unpacked(good)
    session_id, line, others = with_a_history(files)
    half = HISTORY + session_id.encode() + b'","seq":1,"entries":[[1.0,"YQ=="],[1.0,"Yg=="]]}\n'
    other = new_manager(clock)
    report = load(other, repacked(files, [line, half, *others], tmp_path))
    assert counts(report) == {"restored": 4, "failed": 1}
    assert "has 2 of the 3 entries" in report.reasons[0]
    assert other.get(session_id) is None
    assert counts(load(other, good)) == {"restored": 1, "skipped": 3, "ended": 1}


def test_a_session_that_is_there_needs_no_history_of_the_archive(
    good: str, manager: SessionManager, clock: Clock, tmp_path: Path
) -> None:
    """It stays as it is, and is not counted as failed because its history is missing in the archive."""
    files = unpacked(good)
    _, line, others = with_a_history(files)
    assert counts(load(manager, repacked(files, [line, *others], tmp_path))) == {"skipped": 4, "ended": 1}


def test_the_first_reasons_are_told(good: str, clock: Clock, tmp_path: Path) -> None:
    """Of many failures all are counted, and ten explained."""
    report = load(new_manager(clock), repacked(unpacked(good), [b"no record\n"] * 25, tmp_path))
    assert (report.failed, len(report.reasons)) == (25, 10)
    assert report.reasons[0].startswith("line 'no record': the line is no session record")


def with_a_history(files: dict[str, bytes]) -> tuple[str, bytes, list[bytes]]:
    """The id of an active session, its line with a history of three entries, and the lines of the others."""
    first, *others = sorted(files[RECORDS].splitlines(keepends=True), key=lambda line: bool(json.loads(line)["ended_at"]))
    fields = json.loads(first) | {"entries": 3, "last_entry_at": 1.0}
    return fields["id"], json.dumps(fields, separators=(",", ":")).encode() + b"\n", others


def repacked(files: Files, lines: list[bytes], folder: Path) -> Path:
    """An archive of other lines, with a manifest that fits."""
    content, records = b"".join(lines), sum(not line.startswith(HISTORY) for line in lines)
    changed = edited(
        files | {RECORDS: content},
        members={RECORDS: facts_of(content) | {"records": records}},
        counts={"web": {"active": records}},
    )
    return packed(folder / "repacked.tar.gz", *changed)


# Files ----------------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_it_is_for_its_user_alone(manager: SessionManager, tmp_path: Path) -> None:
    """The archive has mode 0600 and a directory that is made for it 0700, whatever the umask."""
    old = os.umask(0)
    try:
        path = Path(save_archive(manager, tmp_path / "new" / "backups").path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in path.parents[:2]] == [0o700, 0o700]
    assert path.name == "sessions_backup_20231114-221320.tar.gz"


def test_names_do_not_collide(manager: SessionManager, tmp_path: Path) -> None:
    """Backups within a second get numbers, and are listed in their order."""
    paths = [save_archive(manager, tmp_path).path for _ in range(11)]
    assert [found.path for found in backups_in(str(tmp_path))] == paths
    assert all(NAME.fullmatch(name) for name in names(tmp_path))


def test_a_name_of_ones_own_must_be_free(manager: SessionManager, tmp_path: Path) -> None:
    """An archive may have any name that ends as archives do; what has it already is not replaced."""
    report = save_archive(manager, tmp_path / "mine.tgz")
    assert report.path == str(tmp_path / "mine.tgz")
    with pytest.raises(BackupError, match="is there already"):
        save_archive(manager, tmp_path / "mine.tgz")
    assert names(tmp_path) == ["mine.tgz"]
    assert load(manager, report.path) == RestoreReport()


def test_rotation_keeps_the_newest(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """All but the newest archives of ours go, and nothing else in the directory."""
    for name in ("notes.txt", "sessions_backup_old.tar.gz", "sessions_backup_20200101-000000.tar.gz.part"):
        (tmp_path / name).write_text("mine")
    made = []
    for _ in range(5):
        made.append(save_archive(manager, tmp_path, keep=2).path)
        clock.advance(60)
    assert [found.path for found in backups_in(str(tmp_path))] == made[-2:]
    assert {"notes.txt", "sessions_backup_old.tar.gz", "sessions_backup_20200101-000000.tar.gz.part"} < set(names(tmp_path))


def test_what_is_no_file_is_neither_counted_nor_removed(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """Directories and links that have the name of an archive stay, and keep no backup from being made."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "sessions_backup_20200101-000000.tar.gz").mkdir()
    os.symlink(tmp_path / "mine", tmp_path / "sessions_backup_20200102-000000.tar.gz")
    before = set(names(tmp_path))
    first = save_archive(manager, tmp_path, keep=1).path
    clock.advance(60)
    (tmp_path / "sessions_backup_20230101-000000.tar.gz").mkdir()
    assert newest_before(str(tmp_path), 1672531201.0) is None
    before.add("sessions_backup_20230101-000000.tar.gz")
    second = save_archive(manager, tmp_path, keep=1)
    assert second.removed == (first,)
    assert set(names(tmp_path)) == before | {os.path.basename(second.path)}


@pytest.mark.parametrize("trap", ["pipe", "directory", "link"])
def test_a_trap_among_the_unfinished_ones_is_left_alone(manager: SessionManager, tmp_path: Path, trap: str) -> None:
    """What somebody put there under the name of an abandoned backup neither stops nor delays another, and stays."""
    place, other = tmp_path / ".x.unfinished-sessions-backup", tmp_path / "mine"
    other.write_text("mine")
    {"pipe": os.mkfifo, "directory": os.mkdir, "link": partial(os.symlink, other)}[trap](place)
    assert save_archive(manager, tmp_path).sessions == 0
    assert os.path.lexists(place)
    assert other.read_text() == "mine"


def test_a_clock_set_back_loses_no_backup(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """A new backup is never the one to make room, and those from the future stay until their time comes."""
    future = [save_archive(manager, tmp_path, keep=2).path]
    clock.advance(-86400)
    for _ in range(4):
        clock.advance(60)
        last = save_archive(manager, tmp_path, keep=2)
    kept = [found.path for found in backups_in(str(tmp_path))]
    assert (len(kept), kept[1:]) == (3, [last.path, *future])
    clock.advance(2 * 86400)
    newest = save_archive(manager, tmp_path, keep=2).path
    assert [found.path for found in backups_in(str(tmp_path))] == [*future, newest]


def test_a_backup_of_some_pushes_out_none_of_all(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """Archives of a user, tenant or tag have names of their own, and neither kind is counted with the other."""
    whole, part = [], []
    for _ in range(3):
        whole.append(save_archive(manager, tmp_path, keep=2).path)
        part.append(save_archive(manager, tmp_path, user_id="7", keep=1).path)
        clock.advance(60)
    assert sorted(map(str, tmp_path.iterdir())) == sorted([*whole[1:], part[-1]])
    assert [Path(path).name for path in part[:1]] == ["sessions_backup_20231114-221320-part.tar.gz"]
    assert [found.path for found in backups_in(str(tmp_path))] == [whole[1], whole[2], part[-1]]


def test_nothing_is_rotated_for_a_backup_that_fails(
    manager: SessionManager, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older archives go only after the new one is complete, and what was written of it is removed."""
    first = save_archive(manager, tmp_path).path
    clock.advance(60)

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BackupError, match=f"{re.escape(str(tmp_path))}: No space left on device"):
        save_archive(manager, tmp_path, keep=1)
    assert [str(tmp_path / name) for name in names(tmp_path)] == [first]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, StoreError("gone")], ids=["Ctrl-C", "store"])
def test_an_interrupted_backup_leaves_nothing(failure: BaseException, manager: SessionManager, tmp_path: Path) -> None:
    """A backup that is stopped half-way leaves no file at all."""
    fill(manager)
    records = list(manager.store.scan())

    def failing() -> Any:
        yield from records
        raise failure

    manager.store.snapshot = failing  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, StoreError)):
        save_archive(manager, tmp_path)
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_told(manager: SessionManager, tmp_path: Path) -> None:
    """The message names the place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BackupError, match=r"cannot be written to .*Not a directory"):
        save_archive(manager, tmp_path / "file" / "backups")


@pytest.mark.parametrize("keep", [0, -1])
def test_to_keep_none_is_refused(keep: int, manager: SessionManager, tmp_path: Path) -> None:
    """A rotation that would remove the new archive too, or has no directory, is a mistake."""
    for place, number in ((tmp_path, keep), (tmp_path / "mine.tgz", 3)):
        with pytest.raises(ValueError, match="keep is"):
            save_archive(manager, place, keep=number)
    assert names(tmp_path) == []


def test_the_listing_says_what_is_broken(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """Each archive is listed with its counts, or with why it does not verify."""
    fill(manager)
    one = save_archive(manager, tmp_path).path
    clock.advance(60)
    other = save_archive(manager, tmp_path).path
    Path(one).write_bytes(Path(one).read_bytes()[:-20])
    broken, whole = backups_in(str(tmp_path))
    assert (broken.path, broken.manifest) == (one, None)
    assert "cut off" in str(broken.error)
    assert (whole.path, whole.error, whole.created_at) == (other, None, clock.now)
    assert whole.manifest is not None
    assert whole.manifest.counts == {"web": {"active": 4, "ended": 1}}


# The extension, in the foreground and in the background ---------------------------------------------------------------


def test_what_is_no_archive_is_listed_as_such(manager: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """A link that leads nowhere, a directory and a pipe keep nobody from seeing the others."""
    os.symlink(tmp_path / "nowhere", tmp_path / "sessions_backup_20200101-000000.tar.gz")
    (tmp_path / "sessions_backup_20200102-000000.tar.gz").mkdir()
    os.mkfifo(tmp_path / "sessions_backup_20200103-000000.tar.gz")
    made = save_archive(manager, tmp_path).path
    *odd, good = backups_in(str(tmp_path))
    assert ["it is no plain file" in (found.error or "") for found in odd] == [True] * 3
    assert (good.path, good.error) == (made, None)


def test_the_extension_backs_up_and_restores(make_app: MakeApp, tmp_path: Path) -> None:
    """Without a path the archive goes to the instance folder; a signal tells of it."""
    app = make_app()
    heard: list[Any] = []

    def hear(sender: Flask, event: Any) -> None:
        heard.append((sender, event.path, event.sessions, event.bytes))

    with app.app_context(), backup_created.connected_to(hear):
        sessions = PersistSession()
        created = sessions.manager.create({"a": 1})
        report = sessions.backup()
        sessions.manager.store.delete(created.id)
        assert counts(sessions.restore(report.path)) == {"restored": 1}
    assert Path(report.path).parent == tmp_path / "backups"
    assert heard == [(app, report.path, 1, os.path.getsize(report.path))]


def test_an_unknown_strategy_is_refused(make_app: MakeApp, tmp_path: Path) -> None:
    """The error names those that there are."""
    with make_app().app_context(), pytest.raises(ValueError, match="allowed is one of skip, overwrite, newer"):
        PersistSession().restore(tmp_path, strategy="merge")  # type: ignore[arg-type]


@pytest.fixture
def automatic(manager: SessionManager, tmp_path: Path) -> AutomaticBackup:
    return new_automatic(manager, tmp_path)


def new_automatic(manager: SessionManager, folder: Path) -> AutomaticBackup:
    return AutomaticBackup({"web": manager}, Announcer(manager), str(folder / "auto"), 3600, 2)


def test_a_backup_is_made_when_it_is_due(automatic: AutomaticBackup, clock: Clock, tmp_path: Path) -> None:
    """One at once, then one each interval, and no more are kept than asked for."""
    made = []
    for _ in range(8):
        made.append(automatic.turn() is not None)
        clock.advance(1200)
    assert made == [True, False, False, True, False, False, True, False]
    assert len(names(tmp_path / "auto")) == 2


def test_a_restart_makes_no_other_backup(automatic: AutomaticBackup, manager: SessionManager, tmp_path: Path) -> None:
    """The newest archive tells when the last backup was, so a new process goes on counting."""
    assert automatic.turn() is not None
    assert new_automatic(manager, tmp_path).turn() is None
    [name] = names(tmp_path / "auto")
    (tmp_path / "auto" / name).unlink()
    assert new_automatic(manager, tmp_path).turn() is not None


def test_a_backup_of_some_is_not_the_one_that_is_due(
    automatic: AutomaticBackup, manager: SessionManager, tmp_path: Path
) -> None:
    """Somebody's sessions saved by hand do not put off the next backup of all."""
    save_archive(manager, tmp_path / "auto", user_id="7")
    assert automatic.turn() is not None
    assert automatic.turn() is None


def test_one_of_all_processes_backs_up(shared_url: str, clock: Clock, tmp_path: Path) -> None:
    """Whoever has the lease does it; it is given up afterwards."""
    first, second = (new_manager(clock, shared_url) for _ in range(2))
    assert first.store.lease("backup", 60)
    assert new_automatic(second, tmp_path).turn() is None
    first.store.lease("backup", 0)
    assert new_automatic(second, tmp_path).turn() is not None
    assert first.store.lease("backup", 60)
    for manager in first, second:
        manager.store.close()


def test_a_clock_set_back_does_not_stop_backups(automatic: AutomaticBackup, clock: Clock) -> None:
    """An archive from the future is no reason to wait for that time."""
    assert automatic.turn() is not None
    clock.advance(-30 * 86400)
    assert automatic.turn() is not None
    assert automatic.turn() is None


def test_the_first_request_starts_the_thread(make_app: MakeApp, tmp_path: Path) -> None:
    """With an interval a request starts the thread, also where nothing is cleaned up in the background."""
    app = make_app(PERSIST_SESSION_BACKUP_INTERVAL=3600, PERSIST_SESSION_BACKUP_DIR="elsewhere")
    app.add_url_rule("/", view_func=lambda: str(len(session)))
    thread = app.extensions["persist_session"].automatic_backup
    assert not thread.running
    app.test_client().get("/")
    assert thread.running
    thread.stop()
    assert app.extensions["persist_session"].backup_dir == str(tmp_path / "elsewhere")


WRONG = {
    "BACKUP_DIR": ["", 7, b"backups", "a\0b"],
    "BACKUP_INTERVAL": [-1, "daily", None, True],
    "BACKUP_KEEP": [-1, 1.5, "7", None, True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_told(key: str, value: object, make_app: MakeApp) -> None:
    """The error names the setting and what is allowed."""
    with pytest.raises(ConfigError, match=f"^PERSIST_SESSION_{key} is .*; allowed is "):
        make_app(**{f"PERSIST_SESSION_{key}": value})


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def app(make_app: MakeApp, clock: Clock) -> Flask:
    app = make_app()
    manager = app.extensions["persist_session"].manager
    manager.clock = clock
    fill(manager)
    return app


def run(app: Flask, *arguments: str, **options: Any) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["sessions", *arguments], **options)
    return result.exit_code, result.output


def test_commands_make_list_and_restore(app: Flask, tmp_path: Path) -> None:
    """A backup, the list of backups and a restore, each with one line and status 0."""
    status, output = run(app, "backup", str(tmp_path / "b"))
    assert status == 0
    assert output.startswith(f"backed up 5 sessions (4 active, 0 expired, 1 ended) to {tmp_path}/b/sessions_backup_2023")
    path = output.split(" to ")[1].split(",")[0]
    status, output = run(app, "backups", str(tmp_path / "b"))
    assert (status, output.count("\n")) == (0, 1)
    assert "2023-11-14 22:13 UTC" in output
    assert "5 sessions" in output
    assert output.endswith(f"{path}: verified\n")
    told = "0 of 5 sessions; 0 overwritten, 4 skipped, 1 ended since, 0 expired, 0 failed\n"
    assert run(app, "restore", path, "--dry-run") == (0, f"would restore {told}")
    assert run(app, "restore", path, "--yes") == (0, f"restored {told}")


def test_commands_print_json(app: Flask, tmp_path: Path) -> None:
    """``--json`` prints what programs read."""
    made = json.loads(run(app, "backup", str(tmp_path / "b"), "--json", "--user", "7", "--tag", "web")[1])
    assert (made["active"], made["path"].startswith(str(tmp_path))) == (1, True)
    [listed] = json.loads(run(app, "backups", str(tmp_path / "b"), "--json")[1])
    assert (listed["sessions"], listed["verified"], listed["filters"]["user_id"]) == (1, True, "7")
    done = json.loads(run(app, "restore", made["path"], "--yes", "--json", "--strategy", "overwrite")[1])
    assert (done["overwritten"], done["reasons"]) == (1, [])


def test_a_restore_asks_first(app: Flask, tmp_path: Path) -> None:
    """Without ``--yes`` it asks, and does nothing unless told to; where nobody can answer, neither."""
    path = json.loads(run(app, "backup", str(tmp_path), "--json")[1])["path"]
    with app.app_context():
        for record in list(PersistSession().manager.find()):
            PersistSession().manager.store.delete(record.id)
        for answer in "n\n", "":
            assert run(app, "restore", path, input=answer)[0] == 1
            assert PersistSession().store.count(SessionQuery()) == 0
        assert run(app, "restore", path, input="y\n")[0] == 0
        assert PersistSession().store.count(SessionQuery()) == 5


def test_where_nobody_can_be_asked_the_option_is_named(app: Flask, tmp_path: Path) -> None:
    """As in cron: nothing is restored, and the error says how to confirm."""
    path = json.loads(run(app, "backup", str(tmp_path), "--json")[1])["path"]
    status, output = run(app, "restore", path, input="")
    assert (status, "nothing was restored" in output, "--yes" in output) == (1, True, True)


def test_an_empty_path_is_a_usage_error(app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is not set neither puts a backup into the current directory nor removes older ones there."""
    monkeypatch.chdir(tmp_path)
    for arguments in ["backup", ""], ["backup", "", "--keep", "1"], ["backups", ""]:
        status, output = run(app, *arguments)
        assert (status, "is a variable not set?" in output) == (2, True)
    assert names(tmp_path) == []


def test_a_directory_without_backups_is_told(app: Flask, tmp_path: Path) -> None:
    """On standard error, as a list of nothing is no failure; so a mistyped directory does not pass in silence."""
    result = app.test_cli_runner().invoke(args=["sessions", "backups", str(tmp_path / "b")])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"no backups in {tmp_path}/b\n")
    assert run(app, "backups", str(tmp_path / "b"), "--json") == (0, "[]\n")


def test_a_broken_archive_is_one_line(app: Flask, tmp_path: Path) -> None:
    """A restore of it and a listing with it end with status 1 and say what is wrong."""
    path = Path(json.loads(run(app, "backup", str(tmp_path), "--json")[1])["path"])
    path.write_bytes(path.read_bytes()[:100])
    assert run(app, "restore", str(path), "--yes") == (1, f"Error: the archive {path} is refused: it is cut off\n")
    status, output = run(app, "backups", str(tmp_path))
    assert (status, "broken" in output, "it is cut off" in output) == (1, True, True)


def test_an_archive_commands_no_terminal(app: Flask, tmp_path: Path) -> None:
    """What a forged archive says of itself is printed with its control characters as escapes."""
    files = unpacked(json.loads(run(app, "backup", str(tmp_path / "b"), "--json")[1])["path"])
    packed(tmp_path / "sessions_backup_20260101-000000.tar.gz", *edited(files, **{"\x1b[2J": 1}))
    status, output = run(app, "backups", str(tmp_path))
    assert (status, "\\x1b[2J" in output, "\x1b" in output) == (1, True, False)


def test_keep_rotates(app: Flask, tmp_path: Path) -> None:
    """``--keep`` removes older archives and says how many; without a directory it is a usage error."""
    for _ in range(3):
        status, output = run(app, "backup", str(tmp_path), "--keep", "2")
    assert (status, output.splitlines()[1]) == (0, "removed 1 older archive")
    assert len(list(backups_in(str(tmp_path)))) == 2
    assert run(app, "backup", str(tmp_path / "a.tgz"), "--keep", "2")[0] == 2
    assert run(app, "backup", str(tmp_path), "--keep", "0")[0] == 2


def test_a_link_that_leads_nowhere_is_listed_as_broken(app: Flask, tmp_path: Path) -> None:
    """Of what has the name of an archive and is none, ``backups`` says why, and goes on to the others."""
    run(app, "backup", str(tmp_path))
    (tmp_path / "sessions_backup_20200101-000000.tar.gz").symlink_to(tmp_path / "nowhere")
    status, output = run(app, "backups", str(tmp_path))
    assert (status, output.count("no plain file\n"), output.count(": verified\n")) == (1, 1, 1)


def test_an_interrupted_listing_shows_what_was_verified(
    app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second archive is verified leaves the line of the first; programs get no half of a list."""
    for _ in range(2):
        run(app, "backup", str(tmp_path))
    verified = []

    def interrupt(*given: Any) -> Any:
        verified.append(given)
        if len(verified) % 2 == 0:
            raise KeyboardInterrupt
        return verify(*given)

    verify = backup_files.verify
    monkeypatch.setattr(backup_files, "verify", interrupt)
    status, output = run(app, "backups", str(tmp_path))
    assert (status, output.count(": verified\n"), output.count("run it again\n")) == (130, 1, 1)
    status, output = run(app, "backups", str(tmp_path), "--json")
    assert (status, output.count("\n")) == (130, 1)


def test_an_interrupted_command_says_what_to_do(app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command with status 130 and a line; a store that fails half-way with status 1."""
    path = json.loads(run(app, "backup", str(tmp_path), "--json")[1])["path"]
    store = app.extensions["persist_session"].store

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(store, "snapshot", interrupt)
    monkeypatch.setattr(store, "save_many", interrupt)
    assert run(app, "backup", str(tmp_path)) == (130, "Error: interrupted: no archive was written; run it again\n")
    told = "Error: interrupted after 0 sessions: what it restored is complete; run it again for the rest\n"
    assert run(app, "restore", path, "--yes") == (130, told)

    def fail(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(store, "save_many", fail)
    status, output = run(app, "restore", path, "--yes")
    assert (status, output.startswith("Error: the disk is full; stopped after 0 sessions")) == (1, True)
