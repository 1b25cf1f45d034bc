"""Histories travel along: in backups and restores, in archives of removed sessions, to other stores."""

from __future__ import annotations

import json
import os
import signal
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_persist_session import (
    BackupReport,
    PersistSession,
    RestoreReport,
    SerializationError,
    SessionConflict,
    SessionManager,
    SessionNotFound,
    SessionStore,
    StoredSession,
    UnsupportedByStore,
    open_store,
)
from flask_persist_session import backup as backup_module
from flask_persist_session.archive import ArchiveWriter
from flask_persist_session.backup import Strategy, back_up, restore
from flask_persist_session.record_lines import dump_history, facts_of
from flask_persist_session.records import LogEntry
from flask_persist_session.stores.history import HistoryLog
from tests.conftest import Clock
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]
NewURL = Callable[[str], str]


def chats_on(store: SessionStore, clock: Callable[[], float], **options: Any) -> SessionManager:
    given = {"idle_timeout": lambda: 600.0, "renew_interval": 0.0, **options}
    return SessionManager(store.namespace("chat"), namespace="chat", keep_data=True, clock=clock, **given)


@pytest.fixture
def chats(store: SessionStore, clock: Clock) -> SessionManager:
    return chats_on(store, clock)


def say(chats: SessionManager, session_id: str, *texts: str) -> None:
    chats.history(session_id).append(*({"role": "user", "content": text} for text in texts))


def said(chats: SessionManager, session_id: str) -> list[str]:
    return [entry.content for entry in chats.history(session_id)]


def save_archive(chats: SessionManager, place: Path, **options: Any) -> BackupReport:
    return back_up({"chat": chats}, str(place), now=chats.clock(), **options)


def load(chats: SessionManager, path: str, strategy: Strategy = "skip", **options: Any) -> RestoreReport:
    return restore({"chat": chats}, path, strategy=strategy, **options)


def others(chats: SessionManager, session_id: str) -> list[str]:
    return [record.id for record in chats.find() if record.id != session_id]


# Backup and restore ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["memory", "file", "sqlite", "redis"])
def test_a_round_trip_brings_back_every_entry(
    chats: SessionManager, new_url: NewURL, clock: Clock, tmp_path: Path, target: str
) -> None:
    """With number, time, role, content and metadata, into a store of any kind; of ended sessions too."""
    ids = [chats.create({"n": n}, user_id="ada").id for n in range(5)]
    for number, session_id in enumerate(ids):
        for step in range(number):
            clock.advance(1)
            chats.history(session_id).append(
                {"role": "user", "content": {"text": f"é\n{step}", "t": (1, b"x")}, "metadata": {"n": step}},
                {"role": "assistant", "content": "answer"},
            )
    chats.end(ids[3])
    made = save_archive(chats, tmp_path)
    assert (made.sessions, made.entries) == (5, 20)
    other = chats_on(open_store(new_url(target)), clock)
    done = load(other, made.path)
    assert (done.restored, done.entries, done.failed) == (5, 20, 0)
    for session_id in ids:
        assert list(other.history(session_id)) == list(chats.history(session_id))
        before, after = chats.load(session_id), other.load(session_id)
        assert before is not None
        assert after is not None
        assert (after.data, after.state, after.end_reason) == (before.data, before.state, before.end_reason)
    say(other, ids[4], "goes on")
    assert said(other, ids[4])[-1] == "goes on"
    other.store.close()


def test_entries_of_a_forged_archive_get_into_no_other_session(
    chats: SessionManager, new_url: NewURL, clock: Clock, tmp_path: Path
) -> None:
    """Lines of a history that name another session than the record before them are refused, whatever the strategy."""
    victim, other = chats.create(user_id="ada"), chats_on(open_store(new_url("memory")), clock)
    say(chats, victim.id, "hi")
    theirs = other.create(user_id="eve")
    say(other, theirs.id, "one", "two")
    log, path = other.history_log(), tmp_path / "forged.tar.gz"
    assert log is not None
    with path.open("wb") as file, closing(ArchiveWriter(file, created_at=clock())) as writer:
        writer.start("chat")
        writer.add(theirs.record, **facts_of(log, theirs.id))
        for line in dump_history(log, theirs.id, 2):
            writer.add_line(line.replace(theirs.id.encode(), victim.id.encode()))
        writer.complete(package="0.1.0", stores={"chat": "memory"}, filters={}, counts={"chat": {"active": 1}})
    assert load(chats, str(path)).failed == 1
    assert said(chats, victim.id) == ["hi"]


def test_nothing_is_changed_by_restoring_twice(chats: SessionManager, tmp_path: Path) -> None:
    """Whatever the strategy."""
    chat = chats.create({"a": 1})
    say(chats, chat.id, "one", "two")
    made = save_archive(chats, tmp_path)
    for strategy in backup_module.STRATEGIES:
        load(chats, made.path, strategy)  # type: ignore[arg-type]
        assert said(chats, chat.id) == ["one", "two"]
        assert others(chats, chat.id) == []


@pytest.mark.parametrize("strategy", ["skip", "newer"])
def test_a_session_that_is_newer_in_the_store_keeps_its_history(
    chats: SessionManager, clock: Clock, tmp_path: Path, strategy: Strategy
) -> None:
    """Neither a word of it nor the session is changed."""
    chat = chats.create({"a": 1})
    say(chats, chat.id, "one")
    made = save_archive(chats, tmp_path)
    clock.advance(10)
    say(chats, chat.id, "two")
    assert load(chats, made.path, strategy).skipped == 1
    assert said(chats, chat.id) == ["one", "two"]


@pytest.mark.parametrize("then", [["two", "three"], [], ["other"]])
def test_overwriting_replaces_session_and_history_together(
    chats: SessionManager, clock: Clock, tmp_path: Path, then: list[str]
) -> None:
    """Both are as in the archive then; what they replace is kept as an ended session, with its history."""
    chat = chats.create({"a": 1})
    say(chats, chat.id, "one")
    made = save_archive(chats, tmp_path)
    clock.advance(10)
    if then[:1] != ["two"]:
        chats.history(chat.id).clear()
    if then:
        say(chats, chat.id, *then)
    with chats.edit(chat.id) as session:
        session.data["a"] = 2
    replaced = said(chats, chat.id)
    done = load(chats, made.path, "overwrite")
    assert (done.overwritten, done.entries) == (1, 1)
    assert (chats.existing(chat.id).data, said(chats, chat.id)) == ({"a": 1}, ["one"])
    [kept] = others(chats, chat.id)
    old = chats.load(kept)
    assert old is not None
    assert (old.end_reason, old.data, said(chats, kept)) == ("overwritten", {"a": 2}, replaced)


def test_an_archive_without_history_does_not_lose_that_of_the_store(
    chats: SessionManager, clock: Clock, tmp_path: Path
) -> None:
    """What was said since the backup is kept beside, when the session is overwritten."""
    chat = chats.create({"a": 1})
    made = save_archive(chats, tmp_path)
    say(chats, chat.id, "since")
    assert load(chats, made.path, "overwrite").overwritten == 1
    assert said(chats, chat.id) == []
    [kept] = others(chats, chat.id)
    assert said(chats, kept) == ["since"]


def test_overwriting_another_session_of_the_same_key(chats: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """The dialogue that is going on under the key by now is kept beside."""
    first = chats.resume_or_create(key="k", user_id="ada", data={"n": 1})
    say(chats, first.id, "first")
    made = save_archive(chats, tmp_path)
    chats.store.delete(first.id)
    clock.advance(10)
    chats.resume_or_create(key="k", user_id="ada", data={"n": 2})
    say(chats, first.id, "second")
    assert load(chats, made.path, "overwrite").overwritten == 1
    assert (chats.existing(first.id).data, said(chats, first.id)) == ({"n": 1}, ["first"])
    [kept] = others(chats, first.id)
    assert said(chats, kept) == ["second"]


def test_a_dry_run_counts_and_changes_nothing(chats: SessionManager, clock: Clock, tmp_path: Path) -> None:
    """The counts are those of the run that follows, but for the entries."""
    gone, kept = chats.create(), chats.create()
    for chat in gone, kept:
        say(chats, chat.id, "one")
    made = save_archive(chats, tmp_path)
    chats.store.delete(gone.id)
    say(chats, kept.id, "two")
    done = load(chats, made.path, "overwrite", dry_run=True)
    assert (done.restored, done.overwritten, done.sessions) == (1, 1, 2)
    assert chats.load(gone.id) is None
    assert said(chats, kept.id) == ["one", "two"]


def test_signing_out_leaves_sessions_of_the_application_their_user(
    chats: SessionManager, tmp_path: Path, clock: Clock
) -> None:
    """Nobody is signed in by them, and without their user nobody would find them again."""
    chat = chats.resume_or_create(key="k", user_id="ada")
    say(chats, chat.id, "one")
    made = save_archive(chats, tmp_path)
    chats.store.delete(chat.id)
    assert load(chats, made.path, sign_out=True).restored == 1
    again = chats.resume_or_create(key="k", user_id="ada")
    assert not again.new
    assert said(chats, again.id) == ["one"]


def test_a_store_without_histories_refuses_them(clock: Clock, chats: SessionManager, tmp_path: Path) -> None:
    """A session whose history could not be kept is counted as failed, with the reason, and not restored without it."""
    chat, other = chats.create(), chats.create()
    say(chats, chat.id, "one")
    made = save_archive(chats, tmp_path)

    class Without(type(open_store("memory://"))):  # type: ignore[misc]
        @property
        def history(self) -> HistoryLog:
            raise UnsupportedByStore("no histories here")

    target = SessionManager(Without("chat"), namespace="chat", keep_data=True, clock=clock)
    done = load(target, made.path)
    assert (done.restored, done.failed) == (1, 1)
    assert "no histories here" in done.reasons[0]
    assert [record.id for record in target.find()] == [other.id]


def test_a_damaged_entry_costs_what_follows_it(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup with all that can be read is made all the same, and the log says what is missing."""
    chats = chats_on(open_store("memory://"), clock)
    chat = chats.create()
    say(chats, chat.id, *map(str, range(10)))
    log = chats.store.history
    read = log.read

    def damaged(session_id: str, **limits: Any) -> list[LogEntry]:
        entries: list[LogEntry] = read(session_id, **limits)
        if any(entry.seq == 8 for entry in entries):
            raise SerializationError("entry 8 is damaged")
        return entries

    monkeypatch.setattr(log, "read", damaged)
    made = save_archive(chats, tmp_path)
    monkeypatch.undo()
    assert "left out from entry 8 on" in caplog.text
    other = chats_on(open_store("memory://"), clock)
    assert load(other, made.path).restored == 1
    assert said(other, chat.id) == [str(number) for number in range(7)]


def test_a_session_that_waits_for_its_handler_is_in_a_backup(store: SessionStore, clock: Clock, tmp_path: Path) -> None:
    """What has ended or expired and was not processed yet is no rubbish; restored, it is handed over."""
    got: list[StoredSession] = []
    chats = chats_on(store, clock, on_end=got.append)
    ended, idle = chats.create({"n": 1}), chats.create({"n": 2})
    for chat in ended, idle:
        say(chats, chat.id, "one")
    chats.end(ended.id)
    clock.advance(10_000)
    made = save_archive(chats, tmp_path)
    assert made.sessions == 2
    for session_id in ended.id, idle.id:
        chats.store.delete(session_id)
    assert load(chats, made.path).restored == 2
    assert chats.process_ended().processed == 2
    assert [said(chats, session.id) for session in got] == [["one"], ["one"]]


def test_a_long_history_needs_little_memory(tmp_path: Path, clock: Clock, new_url: NewURL) -> None:
    """40,000 entries are written and read a few at a time."""
    chats = chats_on(open_store(new_url("sqlite")), clock)
    chat = chats.create()
    entry = {"role": "user", "content": "x" * 100}
    for _ in range(8):
        chats.history(chat.id).append(*[entry] * 5000)
    other = chats_on(open_store(new_url("sqlite")), clock)
    tracemalloc.start()
    try:
        made = save_archive(chats, tmp_path)
        assert load(other, made.path).entries == 40_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert other.history(chat.id).count() == 40_000
    assert most < 13 * 1024 * 1024  # the text alone would be 8 MB more as JSON, and some 24 as entries
    for manager in chats, other:
        manager.store.close()


# Crashes --------------------------------------------------------------------------------------------------------------


def _die_restoring(url: str, path: str, clock: Clock, where: str) -> None:
    chats = chats_on(open_store(url), clock)

    def die(*_: object, **__: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "made way":
        backup_module._draft = die  # type: ignore[assignment]
    elif where == "being moved":
        chats._set_aside = die  # type: ignore[method-assign]
    else:
        log = chats.store.history
        restored = log.restore
        type(log).restore = lambda self, *given: (restored(*given), die())[0]  # type: ignore[method-assign]
    restore({"chat": chats}, path, strategy="overwrite")


@pytest.mark.parametrize("where", ["being moved", "made way", "half restored"])
def test_a_restore_that_is_killed_loses_nothing_and_can_be_repeated(
    shared_url: str, clock: Clock, tmp_path: Path, where: str
) -> None:
    """Whatever it was replacing is there with its history, here or beside; nobody appends to what is half restored."""
    chats = chats_on(open_store(shared_url), clock)
    chat = chats.create({"a": 1})
    say(chats, chat.id, *(f"{number}" * 3000 for number in range(300)))
    made = save_archive(chats, tmp_path)
    before = said(chats, chat.id)
    clock.advance(10)
    say(chats, chat.id, "since")
    worker = PROCESSES.Process(target=_die_restoring, args=(shared_url, made.path, clock, where))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert any(said(chats, record.id)[-1:] == ["since"] for record in chats.find())
    with pytest.raises(SessionNotFound):
        say(chats, chat.id, "in between")
    done = load(chats, made.path, "overwrite")
    assert done.restored + done.overwritten == 1
    assert (chats.existing(chat.id).data, said(chats, chat.id)) == ({"a": 1}, before)
    assert [said(chats, session_id)[-1] for session_id in others(chats, chat.id)] == ["since"]
    chats.store.close()


def test_a_key_is_not_used_anew_while_its_session_is_being_restored(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else entries that are on their way would be in the new dialogue. A minute after a crash the key is free."""
    chats = chats_on(open_store("memory://"), clock)
    chat = chats.resume_or_create(key="k", user_id="ada")
    say(chats, chat.id, "one")
    made = save_archive(chats, tmp_path)
    chats.store.delete(chat.id)

    def interfere(self: object, history: HistoryLog) -> int:
        with pytest.raises(SessionConflict, match="restored"):
            chats.create(key="k", user_id="ada")
        raise KeyboardInterrupt

    monkeypatch.setattr(backup_module._Dialogue, "put_into", interfere)
    with pytest.raises(KeyboardInterrupt):
        load(chats, made.path)
    clock.advance(61)
    assert chats.resume_or_create(key="k", user_id="ada").new
    assert said(chats, chat.id) == []


# Archives of removed sessions -----------------------------------------------------------------------------------------


@pytest.fixture
def archiving(make_app: MakeApp, tmp_path: Path, clock: Clock) -> Flask:
    app = make_app(PERSIST_SESSION_ARCHIVE_DIR=str(tmp_path / "archive"))
    chats = PersistSession().namespace("chat", app=app, idle_timeout=600, renew_interval=0)
    chats.clock = clock
    app.extensions["persist_session"].manager.clock = clock
    return app


def _archived(tmp_path: Path) -> str:
    [path] = (tmp_path / "archive").iterdir()
    return str(path)


def test_what_a_cleanup_removes_is_archived_with_its_history(archiving: Flask, clock: Clock, tmp_path: Path) -> None:
    """``show`` tells how much was said, and the last of it; ``restore`` brings all back."""
    with archiving.app_context():
        chats = PersistSession().namespace("chat")
        chat, other = chats.create({"a": 1}), chats.create({"b": 2})
        say(chats, chat.id, *(f"line {number} " + "x" * 20_000 for number in range(200)))
        clock.advance(601)
        assert chats.cleanup().removed == 2
        assert said(chats, chat.id) == []
        runner = archiving.test_cli_runner()
        shown = runner.invoke(args=["sessions", "show", "--namespace", "chat", chat.id]).output
        assert "entries   200, the last 5 of which follow" in shown
        assert "line 199" in shown
        assert "line 194" not in shown
        known = json.loads(runner.invoke(args=["sessions", "show", "--json", "--namespace", "chat", chat.id]).output)
        assert (known["entries"], [entry["seq"] for entry in known["latest"]]) == (200, [196, 197, 198, 199, 200])
        clock.advance(-601)
        done = PersistSession().restore(_archived(tmp_path))
        assert (done.restored, done.entries) == (2, 200)
        assert said(chats, chat.id)[199].startswith("line 199")
        assert chats.existing(other.id).data == {"b": 2}


def test_an_archive_that_a_crash_cut_off_within_a_history_is_continued(
    archiving: Flask, clock: Clock, tmp_path: Path
) -> None:
    """The session was not removed then, and comes once more; that one counts."""
    with archiving.app_context():
        chats = PersistSession().namespace("chat")
        chat = chats.create({"a": 1})
        say(chats, chat.id, *(os.urandom(30_000).hex() for _ in range(100)))
        before = said(chats, chat.id)
        clock.advance(601)
        record = chats.look_up(chat.id)
        archive = PersistSession().archive
        assert archive is not None
        archive.add("chat", [record], clock(), history=chats.store.history)
        path = _archived(tmp_path)
        os.truncate(path, os.path.getsize(path) * 2 // 3)
        assert chats.cleanup().removed == 1
        clock.advance(-601)
        done = PersistSession().restore(path)
        assert done.restored == 1
        assert said(chats, chat.id) == before
        assert chats.get(chat.id) is not None


# Other stores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [("sqlite", "file"), ("file", "redis"), ("redis", "sqlite")])
def test_migrating_takes_namespaces_and_histories_along(
    make_app: MakeApp, new_url: NewURL, clock: Clock, old: str, new: str
) -> None:
    """Copied while the application goes on, and brought up to date when it is repeated."""
    app, target = make_app(new_url(old)), new_url(new)
    sessions = PersistSession()
    with app.app_context():
        chats = sessions.namespace("chat", on_end=lambda session: "done")
        web = sessions.manager.create({"w": 1})
        chat, waiting = chats.create({"a": 1}), chats.create({"b": 1})
        for one in chat, waiting:
            say(chats, one.id, "one", "two")
        chats.end(waiting.id)
        report = sessions.migrate(target)
        assert (report.copied, report.entries, report.different) == (3, 4, ())
        say(chats, chat.id, "three")
        assert chats.process_ended().processed == 1
        again = sessions.migrate(target)
        assert (again.entries, again.updated) == (1, 1)
    there = make_app(target)
    with there.app_context():
        assert sessions.manager.get(web.id) is not None
        moved = sessions.namespace("chat")
        assert moved.existing(chat.id).data == {"a": 1}
        assert (said(moved, chat.id), said(moved, waiting.id)) == (["one", "two", "three"], ["one", "two"])
        assert [record.id for record in moved.find(processed=True)] == [waiting.id]


def test_moving_the_rest_takes_namespaces_and_histories_along(make_app: MakeApp, new_url: NewURL) -> None:
    """With ``PERSIST_SESSION_MIGRATE_FROM`` nothing is left in the old store."""
    old, new = new_url("sqlite"), new_url("file")
    sessions = PersistSession()
    with make_app(old).app_context():
        chat = sessions.namespace("chat").create({"a": 1})
        say(sessions.namespace("chat"), chat.id, "one")
        sessions.manager.create({"w": 1})
    with make_app(new, PERSIST_SESSION_MIGRATE_FROM=old).app_context():
        sessions.namespace("chat")
        assert sessions.move_rest() == 2
    with make_app(new).app_context():
        assert said(sessions.namespace("chat"), chat.id) == ["one"]


# Checking and showing -------------------------------------------------------------------------------------------------


def test_a_check_counts_the_entries(make_app: MakeApp, store_url: str) -> None:
    """Of all sessions that it looks at."""
    app = make_app(store_url)
    with app.app_context():
        chats = PersistSession().namespace("chat")
        for count in range(3):
            chat = chats.create()
            if count:
                say(chats, chat.id, *["x"] * count)
        report = PersistSession().check()
        assert (report.checked, report.entries, report.found) == (3, 3, 0)
        assert "3 sessions with 3 entries" in app.test_cli_runner().invoke(args=["sessions", "check"]).output


def test_show_tells_the_latest_entries(make_app: MakeApp, store_url: str) -> None:
    """How many there are, and the last few."""
    app = make_app(store_url)
    with app.app_context():
        chats = PersistSession().namespace("chat")
        chat = chats.create({"a": 1})
        say(chats, chat.id, "only one")
        shown = app.test_cli_runner().invoke(args=["sessions", "show", "--namespace", "chat", chat.id]).output
        assert "entries   1\n" in shown
        assert "only one" in shown
