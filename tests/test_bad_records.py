"""Records that something has damaged: each costs its own session and nothing else."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
import redis
from cachelib import SimpleCache
from flask import Flask, session
from flask.testing import FlaskClient

from flask_persist_session import (
    PersistSession,
    SessionCorrupt,
    SessionDiscarded,
    SessionStore,
    open_store,
    session_corrupt,
    session_discarded,
)
from flask_persist_session.serializers import pack_record, unpack_record
from tests.conftest import ALL_STORES
from tests.servers import connect_to_mysql

KINDS = (*ALL_STORES, "cachelib")


# Damaging what each store keeps ---------------------------------------------------------------------------------------


class Vandal(ABC):
    """Reaches what a store keeps of a session without the application's store."""

    @abstractmethod
    def kept(self, session_id: str) -> Any:
        """All that is kept of the session, to be compared."""

    @abstractmethod
    def put_payload(self, session_id: str, payload: bytes) -> None:
        """Save the session with other data, leaving the record around it intact."""


class StoreVandal(Vandal):
    """One that needs a store of the same place to write an intact record around a damaged payload."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store

    def kept(self, session_id: str) -> Any:
        return self.store.get(session_id)

    def put_payload(self, session_id: str, payload: bytes) -> None:
        record = self.store.get(session_id)
        assert record is not None
        self.store.save(replace(record, data=payload, version=record.version + 1), expected=record.version)


class CachelibVandal(Vandal):
    def __init__(self, cache: SimpleCache) -> None:
        self.cache = cache

    def kept(self, session_id: str) -> Any:
        return self.cache.get(f"persist:web:{session_id}")

    def put(self, session_id: str, entry: object) -> None:
        assert self.cache.set(f"persist:web:{session_id}", entry)

    def put_payload(self, session_id: str, payload: bytes) -> None:
        record = unpack_record(self.kept(session_id))
        self.put(session_id, pack_record(replace(record, data=payload, version=record.version + 1)))


class FileVandal(StoreVandal):
    def __init__(self, url: str) -> None:
        super().__init__(open_store(url))
        self.folder = Path(urlsplit(url).path) / "web"

    def path(self, session_id: str) -> Path:
        return self.folder / session_id[:3] / f"{session_id}.session"

    def kept(self, session_id: str) -> bytes:
        return self.path(session_id).read_bytes()

    def put(self, session_id: str, content: bytes) -> None:
        self.path(session_id).write_bytes(content)


class SQLVandal(Vandal):
    """One that sets columns."""

    @abstractmethod
    def put(self, session_id: str, column: str, value: object) -> None: ...

    def put_payload(self, session_id: str, payload: bytes) -> None:
        self.put(session_id, "data", payload)
        self.put(session_id, "version", 2)


class SQLiteVandal(SQLVandal):
    def __init__(self, url: str) -> None:
        self.path = urlsplit(url).path.removeprefix("/")

    def kept(self, session_id: str) -> Any:
        with closing(sqlite3.connect(self.path)) as database:
            database.text_factory = bytes
            return database.execute("SELECT * FROM persist_session_web WHERE id = ?", (session_id,)).fetchall()

    def put(self, session_id: str, column: str, value: object) -> None:
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(f"UPDATE persist_session_web SET {column} = ? WHERE id = ?", (value, session_id))

    def put_text(self, session_id: str, column: str, text: bytes) -> None:
        """Put what is kept as text, though no encoding knows it."""
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(f"UPDATE persist_session_web SET {column} = CAST(? AS TEXT) WHERE id = ?", (text, session_id))


class PostgreSQLVandal(SQLVandal):
    def __init__(self, url: str) -> None:
        self.url = url

    def kept(self, session_id: str) -> Any:
        with psycopg.connect(self.url) as database:
            return database.execute("SELECT * FROM persist_session_web WHERE id = %s", (session_id,)).fetchall()

    def put(self, session_id: str, column: str, value: object) -> None:
        with psycopg.connect(self.url) as database:
            database.execute(f"UPDATE persist_session_web SET {column} = %s WHERE id = %s", (value, session_id))


class MySQLVandal(SQLVandal):
    def __init__(self, url: str) -> None:
        self.url = url

    def kept(self, session_id: str) -> Any:
        return self.run("SELECT * FROM persist_session_web WHERE id = %s", session_id)

    def put(self, session_id: str, column: str, value: object) -> None:
        self.run(f"UPDATE persist_session_web SET {column} = %s WHERE id = %s", value, session_id)

    def run(self, statement: str, *values: object) -> Any:
        with connect_to_mysql(self.url) as database, database.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall()


class RedisVandal(Vandal):
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        [self.prefix] = parse_qs(parts.query)["prefix"]
        self.url = parts._replace(query="").geturl()

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=5)

    def key(self, session_id: str) -> str:
        return f"{self.prefix}:web:{{{session_id[:3]}}}:s:{session_id}"

    def kept(self, session_id: str) -> Any:
        with self.client() as client:
            return client.dump(self.key(session_id))

    def put(self, session_id: str, field: str, value: str | bytes | int) -> None:
        with self.client() as client:
            client.hset(self.key(session_id), field, value)

    def drop(self, session_id: str, field: str) -> None:
        with self.client() as client:
            client.hdel(self.key(session_id), field)

    def put_string(self, session_id: str) -> None:
        with self.client() as client:
            client.set(self.key(session_id), "no hash")

    def put_payload(self, session_id: str, payload: bytes) -> None:
        with self.client() as client:
            record = unpack_record(client.hget(self.key(session_id), "record"))
        self.put(session_id, "record", pack_record(replace(record, data=payload, version=record.version + 1)))
        self.put(session_id, "version", record.version + 1)


Damage = Callable[[Any, str], None]


def payload(content: bytes) -> Damage:
    return lambda vandal, session_id: vandal.put_payload(session_id, content)


#: What may stand where a session's data should. The manager reads it, so the common ones do for most of the stores.
PAYLOADS: dict[str, Damage] = {
    "empty": payload(b""),
    "nothing behind the envelope": payload(b"\x01"),
    "truncated": payload(b"\x01\x81\xa4name\xa3Ad"),
    "truncated JSON": payload(b'\x02{"name": "Ad'),
    "of an unknown serializer": payload(b"\x0f\x80"),
    "of a newer envelope": payload(b"\x11\x80"),
    "pickle that nobody configured": payload(b"\x03.\x80\x04}\x94."),
    "list": payload(b'\x02["name", "Ada"]'),
    "number": payload(b"\x01\x07"),
    "None": payload(b"\x01\xc0"),
    "unknown extension type": payload(b"\x01\x81\xa4name\xd4\x63\x00"),
    "date that is none": payload(b'\x02{"name": {" da": "2024-02-31"}}'),
    "nested beyond the stack": payload(b"\x01\x81\xa4name" + b"\x91" * 100_000 + b"\xc0"),
    "noise": payload(bytes(range(200, 256)) * 4),
}


def flip(offset: int) -> Damage:
    """Change one bit of a session's file, counted from its start or its end."""

    def damage(vandal: FileVandal, session_id: str) -> None:
        content = bytearray(vandal.kept(session_id))
        content[offset] ^= 0x40
        vandal.put(session_id, bytes(content))

    return damage


def cut(keep: slice) -> Damage:
    return lambda vandal, session_id: vandal.put(session_id, vandal.kept(session_id)[keep])


def column(name: str, value: object) -> Damage:
    return lambda vandal, session_id: vandal.put(session_id, name, value)


#: What else may happen to a record, by the store that it happens to.
RECORDS: dict[str, dict[str, Damage]] = {
    "file": {
        "bit of the record": flip(-20),
        "bit of the checksum": flip(4),
        "bit of the length": flip(1),
        "cut to half": cut(slice(100)),
        "cut to nothing": cut(slice(0)),
        "cut within the header": cut(slice(5)),
        "all zeros": lambda vandal, session_id: vandal.put(session_id, bytes(len(vandal.kept(session_id)))),
        "text": lambda vandal, session_id: vandal.put(session_id, b"this was never a session\n" * 20),
    },
    "sqlite": {
        "text for data": column("data", "Ada"),
        "number for data": column("data", 7),
        "text for a time": column("expires_at", "soon"),
        "text for the version": column("version", "newest"),
        "tags that are no JSON": column("tags", "{"),
        "tags that are a number": column("tags", "7"),
        "metadata that is a list": column("metadata", "[]"),
        "a user that is no text": lambda vandal, session_id: vandal.put_text(session_id, "user_id", b"Ad\xff"),
        "a tenant that is no text": lambda vandal, session_id: vandal.put_text(session_id, "tenant_id", b"Ad\xff"),
        "a tag that is no text": lambda vandal, session_id: vandal.put_text(session_id, "tags", b'["Ad\xff"]'),
        "metadata that are no text": lambda vandal, session_id: vandal.put_text(session_id, "metadata", b'{"a":"\xff"}'),
        "a reason that is no text": lambda vandal, session_id: vandal.put_text(session_id, "end_reason", b"Ad\xff"),
    },
    "postgresql": {
        "tags that are no JSON": column("tags", "{"),
        "tags that are a number": column("tags", "7"),
        "metadata that is a list": column("metadata", "[]"),
    },
    "mysql": {
        "tags that are no JSON": column("tags", "{"),
        "tags that are a number": column("tags", "7"),
        "metadata that is a list": column("metadata", "[]"),
        "bytes that are no text": column("user_id", b"Ad\xff"),
    },
    "redis": {
        "string in place of the hash": lambda vandal, session_id: vandal.put_string(session_id),
        "no version": lambda vandal, session_id: vandal.drop(session_id, "version"),
        "no record": lambda vandal, session_id: vandal.drop(session_id, "record"),
        "text for the version": column("version", "newest"),
        "another version": column("version", 7),
        "bytes that are no record": column("record", b"\x07"),
        "text": column("record", "Ada"),
    },
    "cachelib": {
        "text": lambda vandal, session_id: vandal.put(session_id, "Ada"),
        "mapping": lambda vandal, session_id: vandal.put(session_id, {"name": "Ada"}),
        "bytes that are no record": lambda vandal, session_id: vandal.put(session_id, b"\x07"),
        "half a record": lambda vandal, session_id: vandal.put(session_id, vandal.kept(session_id)[:100]),
    },
}
COMMON = {name: PAYLOADS[name] for name in ("truncated", "list", "of an unknown serializer")}
DAMAGES = [
    pytest.param(kind, damage, id=f"{kind}-{name}")
    for kind in KINDS
    for name, damage in ((PAYLOADS if kind == "memory" else COMMON) | RECORDS.get(kind, {})).items()
]


# The application ------------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """An application on a store of one kind, and the vandal who knows where that store keeps things."""

    app: Flask
    vandal: Any
    meanwhile: Callable[[], None] = lambda: None
    """What happens between the loading and the saving of a session."""

    def client(self, name: str) -> FlaskClient:
        """A browser whose stored session holds *name*."""
        client = self.app.test_client()
        client.get(f"/write/{name}")
        return client


@pytest.fixture
def make_site(make_app: Callable[..., Flask], new_url: Callable[[str], str]) -> Callable[[str], Site]:
    def make(kind: str) -> Site:
        place: Any = SimpleCache() if kind == "cachelib" else new_url(kind)
        app = make_app(place, TESTING=False)
        with app.app_context():
            place = PersistSession().store if kind == "memory" else place
        vandals = {
            "memory": StoreVandal,
            "file": FileVandal,
            "sqlite": SQLiteVandal,
            "redis": RedisVandal,
            "postgresql": PostgreSQLVandal,
            "mysql": MySQLVandal,
            "cachelib": CachelibVandal,
        }
        site = Site(app, vandals[kind](place))
        add_views(site)
        return site

    return make


def add_views(site: Site) -> None:
    @site.app.get("/read")
    def read() -> dict[str, object]:
        return {"id": session.id, "name": session.get("name")}

    @site.app.get("/write/<name>")
    def write(name: str) -> str:
        session["name"] = name
        return name

    @site.app.get("/change")
    def change() -> str:
        session["seen"] = session["name"]
        site.meanwhile()
        return "changed"

    @site.app.get("/regenerate")
    def regenerate() -> str:
        session.regenerate()
        site.meanwhile()
        return "regenerated"

    @site.app.get("/restart")
    def restart() -> str:
        session.clear()
        session["name"] = "Eve"
        site.meanwhile()
        return "started again"

    @site.app.get("/clear")
    def clear() -> str:
        session.clear()
        site.meanwhile()
        return "cleared"

    @site.app.get("/untouched")
    def untouched() -> str:
        return "no session"


@pytest.fixture
def corrupt() -> Iterator[list[SessionCorrupt]]:
    """The events that session_corrupt was sent with."""
    events: list[SessionCorrupt] = []

    def note(sender: object, event: SessionCorrupt) -> None:
        events.append(event)

    with session_corrupt.connected_to(note):
        yield events


def id_of(client: FlaskClient) -> str:
    return str(client.get("/read").json["id"])


# A request that meets one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_costs_that_one_session(make_site: Callable[[str], Site], kind: str, damage: Damage) -> None:
    """A request whose record is damaged is answered with an empty session; the other sessions go on."""
    site = make_site(kind)
    ada, grace = site.client("Ada"), site.client("Grace")
    damage(site.vandal, id_of(ada))
    answer = ada.get("/read")
    assert answer.status_code == 200
    assert answer.json == {"id": None, "name": None}
    assert grace.get("/read").json["name"] == "Grace"


@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_is_reported(
    make_site: Callable[[str], Site],
    corrupt: list[SessionCorrupt],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    damage: Damage,
) -> None:
    """A damaged record is told of by one line in the log and one signal, both naming the session."""
    site = make_site(kind)
    ada = site.client("Ada")
    damaged = id_of(ada)
    damage(site.vandal, damaged)
    caplog.clear()
    ada.get("/read")
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.name for record in errors] == ["flask_persist_session"]
    assert damaged in errors[0].getMessage()
    assert [event.session_id for event in corrupt] == [damaged]


@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_stays_where_it_is(make_site: Callable[[str], Site], kind: str, damage: Damage) -> None:
    """What is written afterwards gets another id, and the damaged record stays for whoever wants to look at it."""
    site = make_site(kind)
    ada = site.client("Ada")
    damaged = id_of(ada)
    damage(site.vandal, damaged)
    before = site.vandal.kept(damaged)
    ada.get("/write/Eve")
    assert ada.get("/read").json["name"] == "Eve"
    assert id_of(ada) != damaged
    assert site.vandal.kept(damaged) == before


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_requests_do_not_notice(
    make_site: Callable[[str], Site], corrupt: list[SessionCorrupt], kind: str
) -> None:
    """A request that does not touch its session does not look at the damaged record."""
    site = make_site(kind)
    ada = site.client("Ada")
    PAYLOADS["noise"](site.vandal, id_of(ada))
    assert ada.get("/untouched").status_code == 200
    assert corrupt == []


@pytest.mark.parametrize("kind", KINDS)
def test_report_keeps_the_secret(
    make_site: Callable[[str], Site], caplog: pytest.LogCaptureFixture, corrupt: list[SessionCorrupt], kind: str
) -> None:
    """Neither the log nor the signal holds what opens the session."""
    site = make_site(kind)
    ada = site.client("Ada")
    cookie = ada.get_cookie("session")
    assert cookie is not None
    PAYLOADS["noise"](site.vandal, id_of(ada))
    ada.get("/read")
    assert cookie.value.split(".")[0] not in caplog.text + repr(corrupt)


# A save that meets one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/change", "/regenerate", "/restart", "/clear"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_while_a_request_is_under_way(make_site: Callable[[str], Site], kind: str, path: str) -> None:
    """A record that is changed and damaged between loading and saving costs that session, never a 500."""
    site = make_site(kind)
    ada, grace = site.client("Ada"), site.client("Grace")
    damaged = id_of(ada)
    site.meanwhile = lambda: PAYLOADS["truncated"](site.vandal, damaged)
    assert ada.get(path).status_code == 200
    assert grace.get("/read").json["name"] == "Grace"


@pytest.mark.parametrize("kind", KINDS)
def test_change_to_a_damaged_record_is_reported(
    make_site: Callable[[str], Site], corrupt: list[SessionCorrupt], kind: str
) -> None:
    """A change that meets a damaged record is dropped, with a signal for the damage and one for the change."""
    site = make_site(kind)
    ada = site.client("Ada")
    damaged = id_of(ada)
    site.meanwhile = lambda: PAYLOADS["truncated"](site.vandal, damaged)
    dropped: list[SessionDiscarded] = []

    def note(sender: object, event: SessionDiscarded) -> None:
        dropped.append(event)

    with session_discarded.connected_to(note):
        ada.get("/change")
    assert [event.session_id for event in corrupt] == [damaged]
    assert dropped == [SessionDiscarded(session_id=damaged, reason=None)]


@pytest.mark.parametrize("path", ["/regenerate", "/restart"])
@pytest.mark.parametrize("kind", ALL_STORES)
def test_failed_move_leaves_no_second_session(make_site: Callable[[str], Site], kind: str, path: str) -> None:
    """A session that is damaged while it moves to a new id leaves at most one readable session in its place."""
    site = make_site(kind)
    ada = site.client("Ada")
    damaged = id_of(ada)
    site.meanwhile = lambda: PAYLOADS["truncated"](site.vandal, damaged)
    ada.get(path)
    with site.app.app_context():
        others = {record.id for record in PersistSession().store.scan()} - {damaged}
    opened = ada.get("/read").json["id"]
    assert others <= {opened}


# Operating a store that holds one -------------------------------------------------------------------------------------


UNREADABLE = {
    "file": "bit of the record",
    "sqlite": "tags that are no JSON",
    "postgresql": "tags that are no JSON",
    "mysql": "tags that are no JSON",
    "redis": "no version",
}


@pytest.fixture(params=UNREADABLE)
def damaged_site(request: pytest.FixtureRequest, make_site: Callable[[str], Site]) -> tuple[Site, str]:
    """A site with the sessions of Ada, whose record is damaged, and Grace; and the id of Ada's."""
    site = make_site(request.param)
    ada = site.client("Ada")
    site.client("Grace")
    damaged = id_of(ada)
    RECORDS[request.param][UNREADABLE[request.param]](site.vandal, damaged)
    return site, damaged


def test_listing_leaves_it_out(damaged_site: tuple[Site, str], caplog: pytest.LogCaptureFixture) -> None:
    """A listing yields every other session and warns of the damaged one."""
    site, damaged = damaged_site
    with site.app.app_context():
        found = [record.id for record in PersistSession().store.scan()]
    assert len(found) == 1
    assert damaged in caplog.text


def test_cleaning_up_goes_on(damaged_site: tuple[Site, str]) -> None:
    """A cleanup removes what it would remove without the damaged record."""
    site, _ = damaged_site
    with site.app.app_context():
        manager = PersistSession().manager
        manager.clock = lambda: time.time() + 3600
        assert manager.cleanup(older_than=60).removed == 1


def test_can_be_deleted(damaged_site: tuple[Site, str], corrupt: list[SessionCorrupt]) -> None:
    """Deleting removes a damaged record like any other."""
    site, damaged = damaged_site
    with site.app.app_context():
        assert PersistSession().manager.delete(damaged)
        assert PersistSession().manager.load(damaged) is None
    assert corrupt == []


def test_ending_finds_nothing_to_end(damaged_site: tuple[Site, str]) -> None:
    """A damaged session is no active one: ending it answers so and raises nothing."""
    site, damaged = damaged_site
    with site.app.app_context():
        assert not PersistSession().manager.end(damaged)


# Torn frames ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file_site(make_site: Callable[[str], Site]) -> Site:
    return make_site("file")


def test_torn_frame_falls_back(file_site: Site, corrupt: list[SessionCorrupt]) -> None:
    """Wherever the newest frame of a session's file is torn, the state before it is read, and nothing is reported."""
    ada = file_site.client("Ada")
    damaged = id_of(ada)
    before = file_site.vandal.kept(damaged)
    ada.get("/write/Grace")
    after = file_site.vandal.kept(damaged)
    names = set()
    for length in range(len(before), len(after)):
        file_site.vandal.put(damaged, after[:length])
        names.add(ada.get("/read").json["name"])
    assert names == {"Ada"}
    assert corrupt == []


def test_frame_with_a_wrong_bit_falls_back(file_site: Site) -> None:
    """A newest frame whose checksum is wrong is passed over for the one before."""
    ada = file_site.client("Ada")
    damaged = id_of(ada)
    ada.get("/write/Grace")
    flip(-20)(file_site.vandal, damaged)
    assert ada.get("/read").json["name"] == "Ada"


def test_save_after_a_torn_frame(file_site: Site) -> None:
    """A save over a torn frame is read again, and leaves nothing of it in the file."""
    ada = file_site.client("Ada")
    damaged = id_of(ada)
    ada.get("/write/Grace")
    cut(slice(-3))(file_site.vandal, damaged)
    torn = file_site.vandal.kept(damaged)
    ada.get("/write/Ruth")
    assert ada.get("/read").json["name"] == "Ruth"
    assert torn not in file_site.vandal.kept(damaged)


def test_left_over_temporary_file_does_no_harm(file_site: Site) -> None:
    """What a process left that was stopped while it rewrote a file is neither read nor listed."""
    ada = file_site.client("Ada")
    damaged = id_of(ada)
    path = file_site.vandal.path(damaged)
    path.with_name(f"{path.name}.tmp").write_bytes(b"half a frame")
    for _ in range(100):
        ada.get(f"/write/{os.urandom(300).hex()}")
    assert re.fullmatch("[0-9a-f]{600}", ada.get("/read").json["name"])
    with file_site.app.app_context():
        assert PersistSession().manager.stats().total == 1
