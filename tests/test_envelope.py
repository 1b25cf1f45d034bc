"""What is stored may be compressed and encrypted, and is read whatever the settings are by then."""

from __future__ import annotations

import hashlib
import importlib
import os
import secrets
import sqlite3
import sys
import tarfile
import threading
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cachelib import SimpleCache
from cryptography.fernet import Fernet
from flask import Flask, session
from hypothesis import given
from hypothesis import strategies as st

from flask_persist_session import (
    CachedStore,
    ConfigError,
    PersistSession,
    SerializationError,
    SessionManager,
    SessionQuery,
    SessionStore,
    SessionTooLarge,
)
from flask_persist_session import envelope as envelope_module
from flask_persist_session.config import Config
from flask_persist_session.envelope import LARGEST_COMPRESSED, Envelope
from flask_persist_session.serializers import SERIALIZERS, Codec
from flask_persist_session.stores import open_store
from flask_persist_session.testing import following, in_a_fork
from tests.conftest import ALL_STORES, Clock
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]


# The same in every run: they are part of the names of tests.
KEY, OTHER = (urlsafe_b64encode(hashlib.sha256(name).digest()).decode() for name in (b"a key", b"another key"))
LONG = {"secret": "the treasure is under the oak " * 100}
ENVELOPES = [(compress, keys) for compress in (None, "zlib", "zstd") for keys in ((), (KEY,))]


def codec(compress: str | None = None, keys: tuple[str, ...] = (), serializer: str = "msgpack") -> Codec:
    return Codec(serializer, keys=lambda: ["a secret"], envelope=Envelope(compress, keys))


def manager_on(store: SessionStore, clock: Clock, *envelope: Any, **options: Any) -> SessionManager:
    return SessionManager(store, codec(*envelope), clock=clock, renew_interval=60.0, **options)


# Reading back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize(("compress", "keys"), ENVELOPES)
@pytest.mark.parametrize("data", [{}, {"a": (1, {2})}, LONG], ids=["empty", "short", "long"])
def test_every_form_comes_back(compress: str | None, keys: tuple[str, ...], serializer: str, data: dict[str, Any]) -> None:
    """Whatever is compressed, encrypted and serialized how."""
    given_form = codec(compress, keys, serializer)
    assert given_form.decode(given_form.encode(data)) == data


@pytest.mark.parametrize(("compress", "keys"), ENVELOPES)
def test_every_form_is_read_with_other_settings(compress: str | None, keys: tuple[str, ...]) -> None:
    """Turning compression off, or new forms on, loses nothing while the keys are there."""
    payload = codec(compress, keys).encode(LONG)
    assert [codec(other, (OTHER, KEY), "json").decode(payload) for other in (None, "zlib", "zstd")] == [LONG] * 3


ENCRYPTING = [codec(compress, (KEY,)) for compress in (None, "zlib", "zstd")]


@given(st.dictionaries(st.text(), st.recursive(st.text() | st.binary() | st.integers() | st.none(), st.lists)))
def test_any_data_comes_back_compressed_and_encrypted(data: dict[str, Any]) -> None:
    """Also what compression makes no shorter."""
    for one in ENCRYPTING:
        payload = one.encode(data)
        assert one.decode(payload) == data
        assert one.unchanged(one.plain(data), payload)


@pytest.mark.parametrize(
    ("stored", "data"),
    [
        ("0181a16101", {"a": 1}),
        ("11789c6b5c98788b292269148c021a00001723e868", {"a": "b" * 600}),
        ("2128b52ffd605e017500003881a161da0258620100542a6004", {"a": "b" * 600}),
        ("41763710311415caef012dfb283eac719cf832609bfefdaacc1973559fae1a10e77d1da267d3b21640", {"a": 1}),
        (
            "51763710311415caeff8270c9ac011d06b26ad7915dab1c1787be72e836e340364fe002bc0f115c59bd8216abdc62cb417fc8d91715f87c570",
            {"a": "b" * 600},
        ),
    ],
    ids=["plain", "zlib", "zstd", "encrypted", "both"],
)
def test_what_an_earlier_version_stored_is_read(stored: str, data: dict[str, Any]) -> None:
    """These bytes are in somebody's store; whoever changes this test loses sessions."""
    assert codec(None, (KEY,)).decode(bytes.fromhex(stored)) == data


def test_without_settings_payloads_are_as_they_were() -> None:
    """The leading byte and the encoded data, nothing else."""
    assert codec().encode({"a": 1}) == codec().plain({"a": 1}) == b"\x01\x81\xa1a\x01"


def test_an_envelope_of_a_newer_version_is_unknown() -> None:
    """Bits without a meaning are a corrupt record and not guessed at."""
    for first in (0x80, 0x81, 0x30, 0x31, 0x71, 0xFF):
        with pytest.raises(SerializationError, match=f"0x{first:02x} is unknown"):
            codec(None, (KEY,)).decode(bytes([first]) + b"\x80" * 60)


# Compression ----------------------------------------------------------------------------------------------------------


def _only(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing but this library for zstd, as it is on other installations."""
    if library == "compression.zstd" and sys.version_info < (3, 14):
        monkeypatch.setitem(sys.modules, "compression", ModuleType("compression"))
        monkeypatch.setitem(sys.modules, library, importlib.import_module("backports.zstd"))  # the same, for older Pythons
    for other in {"zstandard", "compression.zstd"} - {library}:
        monkeypatch.setitem(sys.modules, other, None)


@pytest.fixture(params=["zlib", "zstandard", "compression.zstd"])
def compress(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to compress, zstd with either library."""
    _only(request.param, monkeypatch)
    return "zlib" if request.param == "zlib" else "zstd"


def test_what_one_library_has_compressed_the_other_one_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a newer Python, or another package, loses no session."""
    payloads = []
    for library in "zstandard", "compression.zstd":
        with monkeypatch.context() as only:
            _only(library, only)
            payloads.append(codec("zstd").encode(LONG))
    for library in "compression.zstd", "zstandard":
        with monkeypatch.context() as only:
            _only(library, only)
            assert [codec().decode(payload) for payload in payloads] == [LONG, LONG]
    assert [payload[0] for payload in payloads] == [0x21, 0x21]


def test_only_what_is_large_is_compressed(compress: str) -> None:
    """A small payload would spare little and cost time; from 512 bytes on, as encoded, they are compressed."""
    one = codec(compress)
    small, large = ({"a": "x" * (size - 7)} for size in (511, 512))
    assert (len(one.plain(small)), len(one.plain(large))) == (511, 512)
    assert one.encode(small) == one.plain(small)
    assert len(one.encode(large)) < 100


def test_what_does_not_get_smaller_stays_as_it_is(compress: str) -> None:
    """Random bytes, for example."""
    one, data = codec(compress), {"a": os.urandom(2000)}
    assert one.encode(data) == one.plain(data)


def _compressed(compress: str, content: bytes) -> bytes:
    compression = envelope_module.open_compression(compress)
    return bytes([0x01 | compression.bits]) + compression.compress(content)


def test_a_bomb_is_a_corrupt_record(compress: str) -> None:
    """A few bytes that would become a hundred million are refused."""
    bomb = _compressed(compress, bytes(LARGEST_COMPRESSED + 1))
    assert len(bomb) < 100_000
    with pytest.raises(SerializationError, match="more than 67,108,864 bytes"):
        codec().decode(bomb)


def test_what_may_be_decompressed_ends_at_the_limit(compress: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just so many bytes are read, one more is refused."""
    monkeypatch.setattr(envelope_module, "LARGEST_COMPRESSED", 1000)
    most, more = ({"a": "x" * size} for size in (994, 995))
    packed = [codec().plain(data)[1:] for data in (most, more)]
    assert [len(content) for content in packed] == [1000, 1001]
    assert codec().decode(_compressed(compress, packed[0])) == most
    with pytest.raises(SerializationError, match="more than 1,000 bytes"):
        codec().decode(_compressed(compress, packed[1]))


@pytest.mark.parametrize("library", ["zstandard", "compression.zstd"])
def test_a_bomb_that_lies_about_its_size_is_a_corrupt_record(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a frame of zstd that says nothing of its size, or less than it takes."""
    zstandard = importlib.import_module("zstandard")
    _only(library, monkeypatch)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000))
    liar = bytearray(zstandard.ZstdCompressor().compress(bytes(10_000)))
    at = liar.index((10_000 - 256).to_bytes(2, "little"))
    liar[at : at + 2] = (100).to_bytes(2, "little")
    for frame in silent, bytes(liar):
        with pytest.raises(SerializationError, match="damaged"):
            codec().decode(b"\x21" + frame)


def test_a_damaged_compressed_payload_is_a_corrupt_record(compress: str) -> None:
    """Cut off anywhere, followed by something, or no such thing at all."""
    payload = _compressed(compress, codec().plain(LONG)[1:])
    damaged = [payload[:end] for end in range(1, len(payload))] + [payload + b"x", payload[:1] + b"junk" * 9]
    for one in damaged:
        with pytest.raises(SerializationError):
            codec().decode(one)


def test_what_is_larger_than_can_be_read_is_not_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever raised ``PERSIST_SESSION_MAX_BYTES`` beyond that bound can read what was stored."""
    monkeypatch.setattr(envelope_module, "LARGEST_COMPRESSED", 1000)
    one = codec("zlib")
    assert one.decode(one.encode(LONG)) == LONG


def test_the_limit_counts_what_is_not_compressed(store: SessionStore, clock: Clock) -> None:
    """``max_bytes`` is a limit for what a process has in memory, so compression makes no more room."""
    manager = manager_on(store, clock, "zlib", (KEY,), max_bytes=1000)
    with pytest.raises(SessionTooLarge):
        manager.create(LONG)
    assert manager.create({"a": "x" * 990}).data == {"a": "x" * 990}


# Encryption -----------------------------------------------------------------------------------------------------------


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    """So a new key is put in front, and the old one goes when nothing is left that it has encrypted."""
    before, rotating, after = codec(None, (KEY,)), codec(None, (OTHER, KEY)), codec(None, (OTHER,))
    assert rotating.decode(before.encode(LONG)) == LONG
    assert after.decode(rotating.encode(LONG)) == LONG


def test_a_value_set_in_all_sessions_encrypts_them_anew(store: SessionStore, clock: Clock) -> None:
    """So that an old key can go, and so that what was stored without keys is encrypted."""
    made = [manager_on(store, clock, None, keys).create({"n": 1}) for keys in ((), (KEY,))]
    assert manager_on(store, clock, None, (OTHER, KEY)).update_many(SessionQuery(), data={"_key": 2}) == 2
    after = manager_on(store, clock, None, (OTHER,))
    assert [after.existing(one.id).data for one in made] == [{"n": 1, "_key": 2}] * 2
    assert [after.existing(one.id).record.data[0] for one in made] == [0x41, 0x41]


@pytest.mark.parametrize("keys", [(), (OTHER,)])
def test_a_missing_key_is_named_by_its_id(keys: tuple[str, ...]) -> None:
    """Not by its value; without it the payload cannot be read."""
    payload = codec(None, (KEY,)).encode(LONG)
    with pytest.raises(SerializationError, match="is missing in PERSIST_SESSION_ENCRYPTION_KEYS") as raised:
        codec(None, keys).decode(payload)
    assert payload[1:9].hex() in str(raised.value)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("compress", [None, "zlib"])
def test_a_change_of_any_byte_is_noticed(compress: str | None) -> None:
    """The leading byte, the key's id, the nonce, text and tag; every bit of each."""
    one = codec(compress, (KEY,))
    payload = one.encode(LONG if compress else {"a": 1})
    for place in range(len(payload)):
        for bit in range(8):
            changed = bytearray(payload)
            changed[place] ^= 1 << bit
            with pytest.raises(SerializationError):
                one.decode(bytes(changed))


def test_an_encrypted_payload_that_is_cut_off_is_noticed() -> None:
    """Wherever it ends."""
    one = codec(None, (KEY,))
    payload = one.encode({"a": 1})
    for end in range(len(payload)):
        with pytest.raises(SerializationError):
            one.decode(payload[:end])


def test_the_same_data_is_never_encrypted_alike() -> None:
    """Nobody sees in the store that two sessions hold the same."""
    one = codec(None, (KEY,))
    assert len({one.encode(LONG) for _ in range(100)}) == 100


def test_forked_processes_never_use_a_nonce_twice() -> None:
    """Workers that were forked with one codec begin in the same state, and encrypt differently all the same."""
    one = codec(None, (KEY,))
    one.encode(LONG)
    payloads = [in_a_fork(lambda: one.encode(LONG)) for _ in range(4)]
    assert len({payload[9:21] for payload in payloads}) == 4
    assert len({payload[1:9] for payload in payloads}) == 1  # the key's id stands before the nonce


def test_threads_share_a_codec() -> None:
    """Whatever others compress and encrypt meanwhile, each reads what it has written."""
    one, start = codec("zstd", (KEY,)), threading.Barrier(8)

    def differing(worker: int) -> list[int]:
        start.wait(60)
        written = [{"text": f"{worker} {number} " * number} for number in range(200)]
        return [number for number, data in enumerate(written) if one.decode(one.encode(data)) != data]

    with ThreadPoolExecutor(8) as workers:
        assert list(workers.map(differing, range(8))) == [[]] * 8


def test_a_payload_in_place_of_another_is_read(store: SessionStore, clock: Clock) -> None:
    """Encryption hides what is stored; who can write to the store can exchange sessions, as the page on security says."""
    manager = manager_on(store, clock, None, (KEY,))
    ada, bob = manager.create({"name": "Ada"}), manager.create({"name": "Bob"})
    store.save(following(bob.record, data=ada.record.data), expected=bob.version)
    assert manager.existing(bob.id).data == {"name": "Ada"}


def test_a_bare_payload_is_read_with_keys_set(store: SessionStore, clock: Clock) -> None:
    """Sessions from before the keys were set go on, and are encrypted with their next change."""
    created = manager_on(store, clock).create({"a": 1})
    manager = manager_on(store, clock, None, (KEY,))
    found = manager.existing(created.id)
    found.data["b"] = 2
    manager.save(found)
    assert manager.existing(created.id).data == {"a": 1, "b": 2}
    assert manager.existing(created.id).record.data[0] == 0x41


# In a store -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize(("compress", "keys"), ENVELOPES)
def test_an_unchanged_session_costs_no_write(
    clock: Clock, compress: str | None, keys: tuple[str, ...], serializer: str
) -> None:
    """Though each encryption makes other bytes: data is compared before it is sealed."""
    store = CountingStore(open_store("memory://"))
    manager = manager_on(store, clock, compress, keys, serializer)
    created = manager.create(LONG)
    store.operations.clear()
    found = manager.existing(created.id)
    assert manager.save(found) == "unchanged"
    with manager.edit(created.id) as edited:
        assert edited.data == LONG
    assert manager.update_many(SessionQuery(), data=LONG) == 0
    assert "save" not in store.operations
    assert store.operations["save_many"] <= 1  # of nothing


@pytest.mark.parametrize(("compress", "keys"), ENVELOPES)
def test_a_request_costs_what_it_cost_without(make_app: MakeApp, compress: str | None, keys: tuple[str, ...]) -> None:
    """One operation to read, two to change, none where the session is not touched."""
    store = CountingStore(open_store("memory://"))
    app = make_app(store, PERSIST_SESSION_COMPRESS=compress, PERSIST_SESSION_ENCRYPTION_KEYS=list(keys))
    app.add_url_rule("/write/<text>", "write", lambda text: session.update(LONG, text=text) or "")
    app.add_url_rule("/read", "read", lambda: session["text"])
    app.add_url_rule("/neither", "neither", lambda: "")
    client = app.test_client()
    client.get("/write/a")
    costs = []
    for path in "/read", "/write/a", "/write/b", "/neither":
        store.operations.clear()
        assert client.get(path).status_code == 200
        costs.append(dict(store.operations))
    assert costs == [{"get": 1}, {"get": 1}, {"get": 1, "save": 1}, {}]


def test_renewing_leaves_the_payload_as_it_is(store: SessionStore, clock: Clock) -> None:
    """Nothing is encrypted again that did not change."""
    manager = manager_on(store, clock, "zlib", (KEY,))
    created = manager.create(LONG)
    clock.advance(100)
    assert manager.save(manager.existing(created.id), renew=True) == "saved"
    assert manager.existing(created.id).record.data == created.record.data


def test_parallel_changes_of_an_encrypted_session_are_merged(store: SessionStore, clock: Clock) -> None:
    """Key by key, as without encryption."""
    manager = manager_on(store, clock, "zlib", (KEY,))
    created = manager.create(LONG)
    one, other = manager.existing(created.id), manager.existing(created.id)
    one.data["one"], other.data["other"] = 1, 2
    assert (manager.save(one), manager.save(other)) == ("saved", "saved")
    assert manager.existing(created.id).data == {**LONG, "one": 1, "other": 2}


def test_changing_the_settings_keeps_every_session(store: SessionStore, clock: Clock) -> None:
    """Each form after each other, in every store, read and changed."""
    created = manager_on(store, clock).create({"steps": 0, **LONG})
    forms = [*ENVELOPES, *reversed(ENVELOPES)]
    for step, (compress, keys) in enumerate(forms, start=1):
        manager = manager_on(
            store, clock, compress, (*keys, OTHER, KEY) if keys else (OTHER, KEY), ("json", "msgpack")[step % 2]
        )
        found = manager.existing(created.id)
        assert found.data == {"steps": step - 1, **LONG}
        found.data["steps"] = step
        manager.save(found)


def test_a_missing_key_costs_that_one_session(make_app: MakeApp, new_url: Callable[[str], str]) -> None:
    """Its request goes on with a new session; with the key put back the old one is there again."""
    url = new_url("sqlite")
    made = make_app(url, PERSIST_SESSION_ENCRYPTION_KEYS=[KEY]).extensions["persist_session"].manager.create({"a": 1})
    without = make_app(url).extensions["persist_session"].manager
    assert without.get(made.id) is None
    again = make_app(url, PERSIST_SESSION_ENCRYPTION_KEYS=[OTHER, KEY]).extensions["persist_session"].manager
    assert again.existing(made.id).data == {"a": 1}


def test_a_check_tells_what_needs_a_missing_key(make_app: MakeApp, new_url: Callable[[str], str]) -> None:
    """Run with the setting that lacks it; a repair leaves the session as it is."""
    url = new_url("sqlite")
    sessions, whole = PersistSession(), make_app(url, PERSIST_SESSION_ENCRYPTION_KEYS=[OTHER, KEY])
    manager = whole.extensions["persist_session"].manager
    old = manager_on(manager.store, Clock(), None, (KEY,)).create({"a": 1})
    manager.create({"b": 2})
    with make_app(url, PERSIST_SESSION_ENCRYPTION_KEYS=[OTHER]).app_context():
        for repair in False, True:
            report = sessions.check(repair=repair)
            assert [(found.kind, found.where, found.repaired) for found in report.findings] == [("data", old.id, False)]
    with whole.app_context():
        assert sessions.check().found == 0


def test_a_session_of_a_key_that_cannot_be_read_is_kept_beside(
    make_app: MakeApp, new_url: Callable[[str], str], clock: Clock
) -> None:
    """While its encryption key is missing a new one takes its place; it is not lost, nor is what was said."""
    url, sessions = new_url("sqlite"), PersistSession()
    chats = sessions.namespace("chat", app=make_app(url, PERSIST_SESSION_ENCRYPTION_KEYS=[KEY]))
    old = chats.resume_or_create(key="thread", user_id=7, data={"topic": "Lisbon"})
    chats.history(old.id).append({"role": "user", "content": "Hello"})
    new = sessions.namespace("chat", app=make_app(url)).resume_or_create(key="thread", user_id=7)
    assert (new.new, new.id) == (True, old.id)
    [aside] = [chats.load(record.id) for record in chats.store.scan() if record.id != new.id]
    assert aside is not None
    assert (aside.data, aside.record.end_reason) == ({"topic": "Lisbon"}, "overwritten")
    assert [entry.content for entry in chats.history(aside.id)] == ["Hello"]


def test_a_restore_that_signs_out_needs_the_key(make_app: MakeApp, new_url: Callable[[str], str], tmp_path: Path) -> None:
    """It has to read who is signed in: without the key the session counts as failed, and is not restored as it is."""
    sessions, keys = PersistSession(), {"PERSIST_SESSION_ENCRYPTION_KEYS": [KEY]}
    source = make_app(new_url("sqlite"), **keys)
    made = source.extensions["persist_session"].manager.create({"_user_id": "7", "cart": ["apple"]}, user_id=7)
    with source.app_context():
        path = sessions.backup(str(tmp_path / "backup.tar.gz")).path
    target = new_url("file")
    with make_app(target).app_context():
        report = sessions.restore(path, sign_out=True)
    assert (report.restored, report.failed) == (0, 1)
    assert "missing in PERSIST_SESSION_ENCRYPTION_KEYS" in report.reasons[0]
    whole = make_app(target, **keys)
    with whole.app_context():
        assert sessions.restore(path, sign_out=True).restored == 1
    restored = whole.extensions["persist_session"].manager.existing(made.id)
    assert (restored.data, restored.user_id, restored.record.data[0]) == ({"cart": ["apple"]}, None, 0x41)


def test_a_cache_in_front_has_what_is_encrypted(clock: Clock) -> None:
    """A copy of the cache of a ``CachedStore`` tells no more than one of the store."""
    cache = SimpleCache()
    manager = manager_on(CachedStore(open_store("memory://"), cache), clock, None, (KEY,))
    created = manager.create({"secret": "buried treasure"}, metadata={"title": "readable"})
    cache.clear()  # as if some time had passed since it was written
    assert manager.existing(created.id).data == {"secret": "buried treasure"}
    content = b"".join(value for _, value in cache._cache.values())
    assert (b"readable" in content, b"buried" in content) == (True, False)


def _bytes_of(url: str) -> bytes:
    path = url.removeprefix("sqlite:///")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return Path(path).read_bytes()


@pytest.mark.parametrize("keys", [[], [KEY]])
def test_neither_data_nor_history_is_in_the_file_of_the_store(
    make_app: MakeApp, new_url: Callable[[str], str], keys: list[str]
) -> None:
    """With keys; without them both are, so this test can see them."""
    url = new_url("sqlite")
    app = make_app(url, PERSIST_SESSION_ENCRYPTION_KEYS=keys)
    chats = PersistSession().namespace("chat", app=app)
    chat = chats.create({"secret": "buried treasure"}, metadata={"title": "readable"})
    chats.history(chat.id).append({"role": "user", "content": "under the oak"})
    content = _bytes_of(url)
    assert [text in content for text in (b"buried treasure", b"under the oak")] == [not keys] * 2
    assert b"readable" in content
    assert [entry.content for entry in chats.history(chat.id).search("OAK")] == ["under the oak"]


@pytest.mark.parametrize("target", ALL_STORES)
def test_backups_hold_what_is_encrypted_and_restore_with_the_key(
    make_app: MakeApp, new_url: Callable[[str], str], tmp_path: Path, target: str
) -> None:
    """Into another store of any kind, histories included."""
    keys = {"PERSIST_SESSION_ENCRYPTION_KEYS": [KEY]}
    sessions = PersistSession()
    source = make_app(new_url("sqlite"), **keys)
    chats = sessions.namespace("chat", app=source)
    chat = chats.create({"secret": "buried treasure"})
    chats.history(chat.id).append({"role": "user", "content": "under the oak"})
    with source.app_context():
        path = sessions.backup(str(tmp_path / "backup.tar.gz")).path
    with tarfile.open(path) as archive:
        content = b"".join(archive.extractfile(member).read() for member in archive)  # type: ignore[union-attr]
    assert chats.existing(chat.id).record.data[0] == 0x41
    assert not [text for text in (b"buried", b"under the oak", b"YnVyaWVk", KEY.encode()) if text in content]
    restored = make_app(new_url(target), **keys)
    there = sessions.namespace("chat", app=restored)
    with restored.app_context():
        sessions.restore(path)
    assert there.existing(chat.id).data == {"secret": "buried treasure"}
    assert [entry.content for entry in there.history(chat.id)] == ["under the oak"]


# Settings -------------------------------------------------------------------------------------------------------------


def read(**settings: Any) -> Config:
    return Config.from_mapping({f"PERSIST_SESSION_{name.upper()}": value for name, value in settings.items()})


@pytest.mark.parametrize("wrong", ["gzip", "", True, 6, ["zlib"]])
def test_an_unknown_compression_is_refused(wrong: object) -> None:
    """The message says which there are."""
    with pytest.raises(ConfigError, match=r"PERSIST_SESSION_COMPRESS is .* allowed is one of zlib, zstd, or None"):
        read(compress=wrong)


@pytest.mark.parametrize("wrong", ["", "short", KEY[:-2], KEY + "A", "+" * 43, b"\xff" * 44, "é" * 43, None, 7, f" {KEY}"])
def test_what_is_no_key_is_refused_and_not_repeated(wrong: Any) -> None:
    """The message says which one it is and how to make one."""
    with pytest.raises(ConfigError, match=r"ENCRYPTION_KEYS\[1\]: this is no key.*secrets.token_urlsafe\(32\)") as raised:
        read(encryption_keys=[OTHER, wrong])
    assert not wrong or str(wrong) not in str(raised.value)
    assert raised.value.__cause__ is None
    with pytest.raises(ConfigError, match="this is no key"):
        Envelope(None, [OTHER, wrong])


@pytest.mark.parametrize("wrong", ["A" * 43, "x" * 43 + "=", ("changeme" * 6)[:43], "_" * 43])
def test_a_key_that_is_not_random_is_refused(wrong: str) -> None:
    """What somebody has typed to have something there, such as one letter 43 times, encrypts nothing."""
    with pytest.raises(ConfigError, match=r"ENCRYPTION_KEYS\[0\]: this is no key: 32 random bytes"):
        read(encryption_keys=[wrong])


def test_how_random_a_key_has_to_look() -> None:
    """Twelve different bytes of its 32, which a random one lacks less often than once in 10²⁴ times."""
    few, enough = (urlsafe_b64encode(bytes(n % different for n in range(32))).decode() for different in (11, 12))
    with pytest.raises(ConfigError, match="this is no key"):
        read(encryption_keys=[few])
    assert read(encryption_keys=[enough]).encryption_keys == (enough,)


def test_random_keys_are_taken() -> None:
    """Those of both programs that the documentation names, always."""
    keys = [secrets.token_urlsafe(32) for _ in range(500)] + [Fernet.generate_key() for _ in range(500)]
    assert read(encryption_keys=keys).encryption_keys == tuple(keys)


@pytest.mark.parametrize("wrong", [KEY, KEY.encode(), {KEY: 1}, None])
def test_a_single_key_in_place_of_a_list_is_refused(wrong: object) -> None:
    """Each letter of it would be taken for a key; its value is not repeated."""
    with pytest.raises(ConfigError, match="allowed is a list of keys") as raised:
        read(encryption_keys=wrong)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("form", [KEY, KEY.encode(), KEY.rstrip("=")])
def test_a_key_may_have_each_form_that_programs_make(form: str | bytes) -> None:
    """That of ``secrets.token_urlsafe(32)``, and that of ``Fernet.generate_key()``, which are the same key."""
    [key] = read(encryption_keys=[form]).encryption_keys
    assert Codec(envelope=Envelope(None, [key])).decode(codec(None, (KEY,)).encode({"a": 1})) == {"a": 1}


def test_no_key_is_shown() -> None:
    """Neither in the settings' form for logs nor in the codec's."""
    assert KEY not in repr(read(encryption_keys=[KEY])) + repr(vars(codec(None, (KEY,))))


@pytest.mark.parametrize(
    ("missing", "settings", "extra"),
    [
        (("zstandard", "compression.zstd"), {"compress": "zstd"}, "zstd"),
        (("cryptography.hazmat.primitives.ciphers.aead",), {"encryption_keys": [KEY]}, "encryption"),
    ],
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], settings: dict[str, Any], extra: str
) -> None:
    """The error says which setting wants it and what to install."""
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf'PERSIST_SESSION_.*: .*pip install "Flask-Persist-Session\[{extra}\]"'):
        read(**settings)


def test_a_payload_of_zstd_without_zstd_is_a_corrupt_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install; zlib is always there."""
    by_zstd, by_zlib = codec("zstd").encode(LONG), codec("zlib").encode(LONG)
    for name in "zstandard", "compression.zstd":
        monkeypatch.setitem(sys.modules, name, None)
    assert codec().decode(by_zlib) == LONG
    with pytest.raises(SerializationError, match="cannot be decompressed: zstd is not installed"):
        codec().decode(by_zstd)


def test_zlib_is_that_of_everybody() -> None:
    """What is compressed can be read by any program: the leading byte, then a zlib stream."""
    payload = codec("zlib").encode(LONG)
    assert payload[0] == 0x11
    assert zlib.decompress(payload[1:]) == codec().plain(LONG)[1:]
