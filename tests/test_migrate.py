"""Bringing sessions into another store: copied while the application goes on, or moved as they are used."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from flask import Flask, session
from flask.cli import FlaskGroup
from flask.testing import FlaskClient

from flask_persist_session import (
    ConfigError,
    Deletion,
    PersistSession,
    SessionManager,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoreUnavailable,
    open_store,
)
from flask_persist_session.migrate import Migration
from flask_persist_session.stores.migrating import MigratingStore
from flask_persist_session.testing import make_record
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.killing import MANY, assert_whole, killed_runs
from tests.servers import free_port
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]
NewURL = Callable[[str], str]
#: Between stores of different kinds, each once on either side.
WAYS = ("memory-sqlite", "sqlite-redis", "redis-file", "file-postgresql", "postgresql-mysql", "mysql-memory")


@pytest.fixture(params=WAYS)
def stores(request: pytest.FixtureRequest, new_url: NewURL) -> Iterator[tuple[SessionStore, SessionStore]]:
    """The store in use and a new one of another kind."""
    both = tuple(open_store(new_url(kind)) for kind in request.param.split("-"))
    yield both[0], both[1]
    for store in both:
        store.close()


def all_of(store: SessionStore) -> dict[str, Any]:
    """What a store keeps, versions aside."""
    return {record.id: replace(record, version=1) for record in store.scan()}


# Copying --------------------------------------------------------------------------------------------------------------


def test_a_copy_is_complete(stores: tuple[SessionStore, SessionStore], clock: Clock) -> None:
    """Active and ended sessions are copied with all that they have, expired ones are left behind, all are counted."""
    source, target = stores
    manager = SessionManager(source, clock=clock, idle_timeout=lambda: 1000.0)
    manager.create({"old": 1})
    clock.advance(2000)
    for number in range(30):
        manager.create({"number": number}, user_id=str(number % 3), tenant_id="acme", tags={"t"}, metadata={"m": number})
    ended = manager.create({"gone": 1})
    manager.end(ended.id, "revoked")
    report = Migration(source, target, clock).run()
    assert (report.copied, report.expired, report.compared, report.different) == (31, 1, 31, ())
    assert all_of(target) == {key: value for key, value in all_of(source).items() if value.expires_at > clock.now}
    assert len(list(SessionManager(target, clock=clock).find(user_id="1"))) == 10


def test_a_second_copy_brings_up_to_date(stores: tuple[SessionStore, SessionStore], clock: Clock) -> None:
    """What changed or ended since is updated, what did not is left alone, and nothing is copied twice."""
    source, target = stores
    manager = SessionManager(source, clock=clock)
    changed, ended, _ = [manager.create({"a": 1}) for _ in range(3)]
    Migration(source, target, clock).run()
    clock.advance(1)
    changed.data["a"] = 2
    manager.save(changed)
    manager.end(ended.id, "revoked")
    report = Migration(source, target, clock).run()
    assert (report.copied, report.updated, report.present, report.different) == (0, 2, 1, ())
    assert all_of(target) == all_of(source)


def test_what_ended_or_went_on_in_the_target_stays(stores: tuple[SessionStore, SessionStore], clock: Clock) -> None:
    """A copy that was ended, or used, after it was made is not replaced by what the source still has."""
    source, target = stores
    old, new = (SessionManager(store, clock=clock) for store in (source, target))
    ids = [old.create({"a": 1}).id for _ in range(2)]
    Migration(source, target, clock).run()
    clock.advance(1)
    new.end(ids[0], "revoked")
    used = new.get(ids[1])
    assert used is not None
    used.data["a"] = 2
    new.save(used)
    report = Migration(source, target, clock).run()
    assert (report.updated, report.present, report.different) == (0, 2, ())
    assert new.get(ids[0]) is None
    assert all_of(target)[ids[1]].data == used.record.data


def test_what_was_cleaned_up_since_an_earlier_copy_is_told(stores: tuple[SessionStore, SessionStore], clock: Clock) -> None:
    """A session that ended so long ago that the source has forgotten it is counted while the target has it as active."""
    source, target = stores
    manager = SessionManager(source, clock=clock)
    gone, _ = [manager.create({"a": 1}) for _ in range(2)]
    assert Migration(source, target, clock).run().only_there == 0
    manager.flush(gone)
    clock.advance(2 * 86400)
    manager.cleanup()
    report = Migration(source, target, clock).run()
    assert (report.present, report.only_there) == (1, 1)
    SessionManager(target, clock=clock).revoke(gone.id)
    assert Migration(source, target, clock).run().only_there == 0


def test_what_changes_while_it_is_copied_is_copied_again(clock: Clock) -> None:
    """A session that is changed, and one that ends, after they were copied are up to date at the end."""
    source, target = open_store("memory://"), open_store("memory://")
    manager = SessionManager(source, clock=clock)
    changed, ended = manager.create({"a": 1}), manager.create({"a": 1})
    late: list[str] = []

    def work(_count: int) -> None:
        clock.advance(1)
        changed.data["a"] = 2
        manager.save(changed)
        manager.end(ended.id, "revoked")
        late.append(manager.create({"late": 1}).id)

    report = Migration(source, target, clock, work).run()
    assert (report.copied, report.updated, report.different) == (3, 2, ())
    assert all_of(target) == all_of(source)


def test_a_copy_that_is_not_alike_is_named(clock: Clock) -> None:
    """A target that does not keep what it is given is found out by the comparison."""
    source, target = open_store("memory://"), open_store("memory://")
    session_id = SessionManager(source, clock=clock).create({"a": 1}).id
    save_many = target.save_many

    def damage(changes: Any) -> list[bool]:
        return save_many([replace(change, record=replace(change.record, data=b"damaged")) for change in changes])

    target.save_many = damage  # type: ignore[method-assign]
    assert Migration(source, target, clock).run().different == (session_id,)


def test_a_session_that_no_store_takes_is_named_and_the_others_are_copied(tmp_path: Path, clock: Clock) -> None:
    """As a row whose user somebody changed with SQL: its id is not in the shard of that user."""
    path = tmp_path / "old.db"
    source, target = open_store(f"sqlite:///{path}"), open_store("memory://")
    records = [make_record(number, user_id="bob", expires_at=clock() + 60) for number in range(3)]
    for record in records:
        source.save(record, expected=0)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE persist_session_web SET user_id = 'robert' WHERE id = ?", (records[1].id,))
    report = Migration(source, target, clock).run()
    assert (report.copied, report.expired, report.different) == (2, 0, (records[1].id,))
    assert {record.id for record in target.scan()} == {records[0].id, records[2].id}
    source.close()


def test_a_copy_keeps_few_records_in_memory(clock: Clock) -> None:
    """The source is read batch by batch, never as a whole."""
    source, target = open_store("memory://"), CountingStore(open_store("memory://"))
    manager = SessionManager(source, clock=clock)
    for _ in range(450):
        manager.create({})
    steps: list[int] = []
    Migration(source, target, clock, steps.append).run()
    assert (steps, target.operations["save_many"]) == ([200, 200, 50], 6)


def _copy(source: str, target: str) -> None:
    Migration(open_store(source), open_store(target), time.time).run()


@pytest.mark.parametrize("kills", MANY)
@pytest.mark.parametrize("way", ["sqlite-file", "file-redis", "redis-sqlite"])
def test_a_copy_that_is_killed_can_be_repeated(way: str, kills: int, new_url: NewURL) -> None:
    """However often the copying process is killed, the source is whole, and the next copy is complete."""
    source_url, target_url = map(new_url, way.split("-"))
    source, target = open_store(source_url), open_store(target_url)
    manager = SessionManager(source)
    for number in range(400):
        manager.create({"number": number, "text": "x" * 500}, user_id=str(number % 7))
    before = all_of(source)
    outcomes = []
    for killed in killed_runs(_copy, source_url, target_url, times=kills):
        outcomes.append(killed)
        assert all_of(target).items() <= before.items()
        if len(outcomes) % 2:  # otherwise the next one goes on where this one ended
            target.delete_many([Deletion(id=session_id) for session_id in before])
    assert any(outcomes)
    assert_whole(target)
    assert all_of(source) == before
    report = Migration(source, target, time.time).run()
    assert (report.transferred, report.different) == (400, ())
    assert all_of(target) == before
    for store in (source, target):
        store.close()


# Moving as they are used ----------------------------------------------------------------------------------------------


def add_views(app: Flask) -> None:
    app.add_url_rule("/add/<key>", "add", view_func=lambda key: str(session.setdefault(key, 1)))
    app.add_url_rule("/keys", "keys", view_func=lambda: " ".join(sorted(session)))


@pytest.fixture
def make_site(make_app: MakeApp) -> Callable[..., Flask]:
    def make(store: object, **settings: Any) -> Flask:
        app = make_app(store, **settings)
        add_views(app)
        return app

    return make


def client_with(app: Flask, cookie_of: FlaskClient) -> FlaskClient:
    """A browser of *app* with the cookie of another one."""
    client, cookie = app.test_client(), cookie_of.get_cookie("session")
    assert cookie is not None
    client.set_cookie("session", cookie.value)
    return client


def test_sessions_move_when_they_are_used(make_site: Callable[..., Flask], new_url: NewURL) -> None:
    """After the change of the setting a user goes on where they were, in the new store alone."""
    old_url, new_store_url = new_url("file"), new_url("sqlite")
    before = make_site(old_url).test_client()
    before.get("/add/cart")
    app = make_site(new_store_url, PERSIST_SESSION_MIGRATE_FROM=old_url)
    after = client_with(app, before)
    assert after.get("/keys").text == "cart"
    after.get("/add/more")
    assert [open_store(url).count(SessionQuery()) for url in (old_url, new_store_url)] == [0, 1]
    alone = make_site(new_store_url)
    assert client_with(alone, after).get("/keys").text == "cart more"


def test_a_rolling_restart_signs_nobody_out(make_site: Callable[..., Flask], new_url: NewURL) -> None:
    """First every process learns of both stores, then they change places: whichever answers has the session."""
    old, new = new_url("sqlite"), new_url("redis")
    first = make_site(old)
    prepared = make_site(old, PERSIST_SESSION_MIGRATE_FROM=new)
    changed = make_site(new, PERSIST_SESSION_MIGRATE_FROM=old)
    browser = first.test_client()
    browser.get("/add/start")
    expected = ["start"]
    for number, app in enumerate([prepared, first, prepared, changed, prepared, changed, changed]):
        browser = client_with(app, browser)
        browser.get(f"/add/step{number}")
        expected.append(f"step{number}")
        assert browser.get("/keys").text.split() == sorted(expected)


def test_signing_out_ends_copies_in_both_stores(new_url: NewURL, clock: Clock) -> None:
    """A copy that a crash left in the old store does not come back when the ended one is cleaned up."""
    store, old = open_store(new_url("sqlite")), open_store(new_url("file"))
    manager = SessionManager(MigratingStore(store, old), clock=clock)
    created = manager.create({"a": 1})
    old.save(created.record, expected=0)
    manager.flush(created)
    clock.advance(10 * 86400)
    assert manager.cleanup().ended == 1
    assert manager.load(created.id) is None


def test_what_is_removed_while_it_moves_does_not_come_back(
    new_url: NewURL, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that others removed for good between reading it in the old store and saving it in the new one is gone."""
    store, old = open_store(new_url("sqlite")), open_store(new_url("file"))
    session_id = SessionManager(old, clock=clock).create({"a": 1}).id
    read = old.get

    def get_and_lose(session_id: str) -> SessionRecord | None:
        record = read(session_id)
        old.delete(session_id)
        return record

    monkeypatch.setattr(old, "get", get_and_lose)
    assert SessionManager(MigratingStore(store, old), clock=clock).get(session_id) is None
    assert (store.get(session_id), read(session_id)) == (None, None)


def test_what_moves_while_it_is_removed_is_removed(new_url: NewURL, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that others move over after the new store was asked to remove it, and before the old one, is gone."""
    store, old = open_store(new_url("sqlite")), open_store(new_url("file"))
    both = MigratingStore(store, old)
    session_id = SessionManager(old, clock=clock).create({"a": 1}).id
    delete = store.delete

    def delete_and_move(session_id: str, **options: Any) -> bool:
        monkeypatch.undo()
        deleted = delete(session_id, **options)
        assert both.move(session_id) is not None
        return deleted

    monkeypatch.setattr(store, "delete", delete_and_move)
    assert both.delete(session_id)
    assert both.get(session_id) is None


def test_users_of_both_stores_are_known(new_url: NewURL, clock: Clock) -> None:
    """Caps, lists and revocation reach sessions that have not moved yet, each once."""
    store, old = open_store(new_url("sqlite")), open_store(new_url("file"))
    left = [SessionManager(old, clock=clock).create({"a": 1}, user_id="Ada") for _ in range(3)]
    clock.advance(1)
    manager = SessionManager(MigratingStore(store, old), clock=clock, max_per_user=3)
    latest = manager.create({"a": 1}, user_id="Ada")
    active = {record.id for record in manager.find(user_id="Ada", state="active")}
    assert active < {latest.id, *(session.id for session in left)}
    assert (len(active), manager.stats().users, manager.stats().active) == (3, 1, 3)
    assert manager.revoke_user("Ada") == 3
    assert list(manager.find(user_id="Ada", state="active")) == []


def test_what_is_in_the_new_store_costs_nothing_more(clock: Clock) -> None:
    """Once a session has moved, the old store is not asked for it."""
    store, old = (CountingStore(open_store("memory://")) for _ in range(2))
    created = SessionManager(old.store, clock=clock).create({"a": 1})
    manager = SessionManager(MigratingStore(store, old), clock=clock)
    assert manager.get(created.id) is not None
    for counting in (store, old):
        counting.operations.clear()
    again = manager.get(created.id)
    assert again is not None
    again.data["b"] = 2
    manager.save(again)
    assert (store.operations, old.operations) == ({"get": 1, "save": 1}, {})


def test_an_old_store_that_is_down_stops_only_what_it_may_have(new_url: NewURL) -> None:
    """Sessions that have moved go on; for others nobody can say, so it is an error, not a sign-out."""
    down = open_store(f"redis://127.0.0.1:{free_port()}/0?timeout=0.2")
    store = open_store("memory://")
    moved = SessionManager(store).create({"a": 1})
    manager = SessionManager(MigratingStore(store, down))
    assert manager.get(moved.id) is not None
    with pytest.raises(StoreUnavailable):
        manager.get("3fa" + "0" * 64)


def _move(url: str, old_url: str, ids: list[str], barrier: Any, results: Any) -> None:
    store = MigratingStore(open_store(url), open_store(old_url))
    barrier.wait()
    manager = SessionManager(store)
    found = 0
    for session_id in ids:
        stored = manager.get(session_id)
        if stored is not None:
            found += 1
            stored.data[f"by {os.getpid()}"] = True
            manager.save(stored)
    results.put(found)


@pytest.mark.parametrize("way", ["file-sqlite", "sqlite-redis", "redis-file"])
def test_many_move_the_same_sessions_at_once(way: str, new_url: NewURL) -> None:
    """Four processes that use and change the same sessions find each of them, and keep every change."""
    old_url, url = map(new_url, way.split("-"))
    old = open_store(old_url)
    ids = [SessionManager(old).create({"number": number}).id for number in range(40)]
    old.close()
    barrier, results = PROCESSES.Barrier(4), PROCESSES.Queue()
    processes = [PROCESSES.Process(target=_move, args=(url, old_url, ids, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [40] * 4
    for process in processes:
        process.join()
    manager = SessionManager(open_store(url))
    assert [len(stored.data) for session_id in ids if (stored := manager.get(session_id))] == [5] * 40
    assert open_store(old_url).count(SessionQuery()) == 0


# Commands and settings ------------------------------------------------------------------------------------------------


def run(app: Flask, *arguments: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["sessions", "migrate", *arguments])
    return result.exit_code, result.output


def test_the_command_copies(make_app: MakeApp, new_url: NewURL) -> None:
    """``migrate --to`` says what it copied and that the copies are alike."""
    app, url = make_app(new_url("sqlite")), new_url("file")
    manager = app.extensions["persist_session"].manager
    for _ in range(3):
        manager.create({"a": 1})
    status, output = run(app, "--to", url)
    assert (status, output) == (
        0,
        "copied 3 sessions (0 updated, 0 there already, 0 expired and left behind)\n"
        "compared 3 sessions with their copies: all alike\n",
    )
    assert open_store(url).count(SessionQuery()) == 3


def test_the_url_can_be_given_in_the_environment(
    make_app: MakeApp, new_url: NewURL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a password is not in the list of processes. ``flask`` sets the prefix of its variables."""
    monkeypatch.setenv("FLASK_SESSIONS_MIGRATE_URL", new_url("file"))
    group = FlaskGroup(create_app=lambda: make_app(new_url("sqlite")))
    result = CliRunner().invoke(group, ["sessions", "migrate"], auto_envvar_prefix="FLASK")
    assert (result.exit_code, result.output.startswith("copied 0 sessions")) == (0, True)


def test_the_command_tells_what_only_the_target_has(make_app: MakeApp, new_url: NewURL) -> None:
    """Sessions that are active there and unknown here may have ended here: a line says how many."""
    app, url = make_app(new_url("sqlite")), new_url("file")
    SessionManager(open_store(url)).create({"a": 1})
    status, output = run(app, "--to", url)
    assert (status, "1 active session is only there" in output) == (0, True)


def test_the_command_moves_the_rest(make_app: MakeApp, new_url: NewURL) -> None:
    """Without ``--to`` it moves what the store of ``PERSIST_SESSION_MIGRATE_FROM`` still has."""
    old_url = new_url("file")
    for _ in range(3):
        SessionManager(open_store(old_url)).create({"a": 1})
    app = make_app(new_url("sqlite"), PERSIST_SESSION_MIGRATE_FROM=old_url)
    status, output = run(app)
    assert (status, output.startswith("moved 3 sessions")) == (0, True)
    assert open_store(old_url).count(SessionQuery()) == 0


def test_the_command_needs_a_place(make_app: MakeApp) -> None:
    """Without either it says what is missing."""
    status, output = run(make_app())
    assert status == 1
    assert "give a store to copy to, or set PERSIST_SESSION_MIGRATE_FROM" in output


def test_a_target_that_is_down_is_told(make_app: MakeApp) -> None:
    """A target that cannot be reached ends the command with one line, and nothing has changed."""
    app = make_app()
    app.extensions["persist_session"].manager.create({"a": 1})
    status, output = run(app, "--to", f"redis://127.0.0.1:{free_port()}/0?timeout=0.2")
    assert (status, output.count("\n"), "cannot be reached" in output) == (1, 1, True)


def test_a_full_disk_is_told_and_repeated_when_there_is_room(tmp_path: Path, make_app: MakeApp) -> None:
    """A target without room ends the command with an error; the source is whole, and a later copy is complete."""
    source, target = f"file://{tmp_path}/source", f"sqlite:///{tmp_path}/target.db"
    manager = SessionManager(open_store(source))
    for number in range(300):
        manager.create({"number": number, "text": "x" * 1000})
    limited = subprocess.run(
        [sys.executable, "-c", _LIMITED, source, target], capture_output=True, text=True, check=False, timeout=60
    )
    assert limited.returncode == 3, limited.stderr
    app = make_app(source)
    status, output = run(app, "--to", target)
    assert (status, "all alike" in output) == (0, True)
    assert open_store(target).count(SessionQuery()) == 300


#: Copies with files limited to 100 kB, which fails as a full disk does.
_LIMITED = """
import resource, signal, sys, time
from flask_persist_session import StoreError, open_store
from flask_persist_session.migrate import Migration
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    Migration(open_store(sys.argv[1]), open_store(sys.argv[2]), time.time).run()
except StoreError:
    sys.exit(3)
"""


def test_an_interruption_says_what_to_do(make_app: MakeApp, new_url: NewURL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with status 130; what was copied stays, and a repeat copies the rest."""
    app, url = make_app(new_url("sqlite")), new_url("file")
    app.extensions["persist_session"].manager.create({"a": 1})

    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Migration, "_compare", interrupt)
    status, output = run(app, "--to", url)
    assert (status, "run it again" in output) == (130, True)
    monkeypatch.undo()
    assert run(app, "--to", url)[1].startswith("copied 0 sessions (0 updated, 1 there already")


def test_a_wrong_store_is_named_by_its_setting(make_app: MakeApp) -> None:
    """A URL that is wrong raises with the setting that holds it."""
    with pytest.raises(ConfigError, match=r"PERSIST_SESSION_MIGRATE_FROM: .*unknown scheme"):
        make_app(PERSIST_SESSION_MIGRATE_FROM="sqlit:///x.db")


def test_a_store_is_not_moved_to_itself(make_app: MakeApp, new_url: NewURL) -> None:
    """One URL in both places is a mistake that is told: it would copy nothing, and forget what has ended."""
    url = new_url("sqlite")
    with pytest.raises(ConfigError, match="PERSIST_SESSION_MIGRATE_FROM names the store that PERSIST_SESSION_STORE is"):
        make_app(url, PERSIST_SESSION_MIGRATE_FROM=url)
    status, output = run(make_app(url), "--to", url)
    assert (status, "migrate names the store that PERSIST_SESSION_STORE is" in output) == (1, True)


def test_migrating_in_code(make_app: MakeApp, new_url: NewURL) -> None:
    """``sessions.migrate`` takes a URL or a store and returns the counts."""
    app, target = make_app(), open_store("memory://")
    with app.app_context():
        PersistSession().manager.create({"a": 1})
        assert PersistSession().migrate(target).copied == 1
        assert PersistSession().migrate(new_url("sqlite")).copied == 1
    assert target.count(SessionQuery()) == 1
