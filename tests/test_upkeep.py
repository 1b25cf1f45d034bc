"""``sessions.check``, ``health`` and ``optimize``, and the commands over them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cachelib import SimpleCache
from flask import Flask
from flask.testing import FlaskCliRunner

from flask_persist_session import (
    CheckReport,
    Finding,
    Health,
    Improvement,
    PersistSession,
    SessionManager,
    SessionStore,
    StoreUnavailable,
    UnsupportedByStore,
    open_store,
    upkeep,
)
from flask_persist_session.testing import following, make_record
from flask_persist_session.upkeep import BackupPlan
from tests.conftest import Clock
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]
HOUR = 3600.0


def manager_of(store: SessionStore, clock: Clock) -> dict[str, SessionManager]:
    return {"web": SessionManager(store, clock=clock)}


# Checking -------------------------------------------------------------------------------------------------------------


def test_check_counts_what_it_sees(store: SessionStore, clock: Clock) -> None:
    """A check of a store in order says how many sessions it has looked at, and tells how far it is."""
    managers = manager_of(store, clock)
    for user in range(5):
        managers["web"].create({"name": user}, user_id=user)
    managers["web"].end(managers["web"].create({}).id)
    steps: list[int] = []
    assert upkeep.check(managers, progress=steps.append) == CheckReport(checked=6)
    assert sum(steps) == 6


def test_data_that_cannot_be_read(store: SessionStore, clock: Clock) -> None:
    """A session whose data cannot be decoded is found, though the store has nothing to object to; it stays as it is."""
    managers = manager_of(store, clock)
    session_id = managers["web"].create({"name": "Ada"}).id
    record = store.get(session_id)
    assert record is not None
    store.save(following(record, data=b"\xffnothing"), expected=record.version)
    report = upkeep.check(managers, repair=True)
    assert (report.found, report.repaired, report.left) == (1, 0, 1)
    assert [(finding.kind, finding.where) for finding in report.findings] == [("data", session_id)]


def test_check_of_many_findings_holds_a_thousand(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is broken, a report has a bounded number of findings, and counts all of them."""
    store = open_store("memory://")
    findings = [Finding(kind="index", where=str(number), text="broken", repaired=number < 7) for number in range(1500)]
    monkeypatch.setattr(store, "check", lambda **_: iter(findings))
    report = upkeep.check(manager_of(store, clock))
    assert (report.found, report.repaired, report.left, len(report.findings)) == (1500, 7, 1493, 1000)


def test_check_of_a_cache_says_why_not(clock: Clock) -> None:
    """A cache cannot list its sessions, so nothing can be checked, and the error says why."""
    with pytest.raises(UnsupportedByStore, match="cannot enumerate"):
        upkeep.check(manager_of(open_store(SimpleCache()), clock))


# Health ---------------------------------------------------------------------------------------------------------------


def test_health_of_a_store_that_works(store: SessionStore, clock: Clock) -> None:
    """A store that can be written and read is healthy, and the times of both are told."""
    found = upkeep.health(manager_of(store, clock))
    assert (found.healthy, found.issues, found.last_cleanup, found.last_backup) == (True, (), None, None)
    assert isinstance(found.write_seconds, float)
    assert isinstance(found.read_seconds, float)


def test_health_leaves_no_session(store: SessionStore, clock: Clock) -> None:
    """However often it is asked for, health costs the same few operations and leaves nothing in lists and statistics."""
    counting = CountingStore(store)
    managers = manager_of(counting, clock)
    for _ in range(3):
        upkeep.health(managers)
    counting.operations.clear()
    upkeep.health(managers)
    assert counting.operations == {"note": 1, "get": 1, "noted": 2}
    assert list(store.scan()) == list(store.check(repair=False)) == []
    assert store.stats(now=clock()).total == 0


def test_health_of_a_cache(clock: Clock) -> None:
    """A cache can be written and read too; that it is never cleaned up is as it should be."""
    managers = manager_of(open_store(SimpleCache()), clock)
    upkeep.health(managers, cleanup_interval=60.0)
    clock.advance(24 * HOUR)
    found = upkeep.health(managers, cleanup_interval=60.0)
    assert found.healthy
    assert found.write_seconds is not None


def test_health_of_a_store_without_notes(clock: Clock) -> None:
    """A store of somebody's own that keeps no notes is not less healthy; what cannot be known is ``None``."""

    class Bare(CountingStore):
        note = SessionStore.note
        noted = SessionStore.noted

    found = upkeep.health(manager_of(Bare(open_store("memory://")), clock), cleanup_interval=60.0)
    assert (found.healthy, found.write_seconds) == (True, None)
    assert found.read_seconds is not None


def test_health_of_a_store_that_is_down(clock: Clock) -> None:
    """A store that cannot be reached is an issue and no error."""
    store = open_store("redis://127.0.0.1:1/0?timeout=0.2")
    found = upkeep.health(manager_of(store, clock))
    assert not found.healthy
    assert any("a write failed" in issue and "cannot be reached" in issue for issue in found.issues)
    assert (found.write_seconds, found.read_seconds) == (None, None)


def test_health_of_a_store_that_can_only_be_read(clock: Clock) -> None:
    """Where only writing fails, reading is measured all the same."""

    class ReadOnly(CountingStore):
        def note(self, name: str, moment: float) -> None:
            raise StoreUnavailable("it is full")

    found = upkeep.health(manager_of(ReadOnly(open_store("memory://")), clock))
    assert "web: a write failed: it is full" in found.issues
    assert found.read_seconds is not None


def test_health_of_a_slow_store(clock: Clock) -> None:
    """A store that takes more than a second for an answer is not healthy."""
    moments = iter([0.0, 1.5, 2.0, 2.25])
    found = upkeep.health(manager_of(open_store("memory://"), clock), timer=lambda: next(moments))
    assert found.issues == ("web: a write took 1.5 s",)
    assert (found.write_seconds, found.read_seconds) == (1.5, 0.25)


def test_last_cleanup_is_known_to_everybody(shared_url: str, clock: Clock) -> None:
    """When a process has cleaned up, another one knows when; a dry run is no cleanup."""
    with closing(open_store(shared_url)) as store, closing(open_store(shared_url)) as another:
        managers = manager_of(store, clock)
        managers["web"].cleanup(dry_run=True)
        assert upkeep.health(managers).last_cleanup is None
        managers["web"].cleanup()
        cleaned_up = clock()
        clock.advance(HOUR)
        assert upkeep.health(manager_of(another, clock)).last_cleanup == cleaned_up


def test_stopped_cleanup_is_none(store: SessionStore, clock: Clock) -> None:
    """A cleanup that was stopped in between does not count."""
    managers = manager_of(store, clock)
    managers["web"].cleanup(stop=lambda: True)
    assert upkeep.health(managers).last_cleanup is None


@pytest.mark.parametrize("cleaned_up", [True, False])
def test_cleanup_that_is_overdue(store: SessionStore, clock: Clock, cleaned_up: bool) -> None:
    """Three intervals without a cleanup are an issue, counted from the last one or from the first examination."""
    managers = manager_of(store, clock)
    if cleaned_up:
        managers["web"].cleanup()
    assert upkeep.health(managers, cleanup_interval=600.0).healthy
    clock.advance(1800)
    assert upkeep.health(managers, cleanup_interval=600.0).healthy
    clock.advance(1)
    [issue] = upkeep.health(managers, cleanup_interval=600.0).issues
    assert "1,801 s" in issue
    assert "PERSIST_SESSION_CLEANUP_INTERVAL is 600 s" in issue
    assert upkeep.health(managers, cleanup_interval=0.0).healthy


@pytest.mark.parametrize(("newest", "issue"), [(None, "there is no backup"), (4 * HOUR, "14,400 s old"), (HOUR, None)])
def test_backup_that_is_overdue(clock: Clock, newest: float | None, issue: str | None) -> None:
    """Automatic backups of which three are missing are an issue; otherwise the newest one is told."""
    made = None if newest is None else clock() - newest
    plan = BackupPlan(newest=lambda now: made, interval=HOUR)
    found = upkeep.health(manager_of(open_store("memory://"), clock), backups=plan)
    assert found.last_backup == made
    assert [issue for issue in found.issues if "BACKUP_INTERVAL is 3,600 s" in issue] == list(found.issues)
    assert (issue in found.issues[0]) if issue else found.healthy


def test_backups_that_cannot_be_listed_are_an_issue(make_app: MakeApp, tmp_path: Path) -> None:
    """A directory of backups that is none makes the health bad, and does not hide the rest of it."""
    (tmp_path / "backups").write_text("no directory")
    app = make_app("memory://")
    with app.app_context():
        found = PersistSession().health()
    assert (found.healthy, found.last_backup, len(found.issues)) == (False, None, 1)
    assert "the directory of backups" in found.issues[0]
    assert found.write_seconds is not None


# The extension and the commands ---------------------------------------------------------------------------------------


@pytest.fixture
def app(make_app: MakeApp, tmp_path: Path) -> Flask:
    return make_app(f"file://{tmp_path}/sessions")


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


def break_one(app: Flask, tmp_path: Path) -> Path:
    """Leave a session's file torn."""
    manager: SessionManager = app.extensions["persist_session"].manager
    session_id = manager.create({"name": "Ada"}).id
    path = tmp_path / "sessions" / "web" / session_id[:3] / f"{session_id}.session"
    path.write_bytes(path.read_bytes() * 2)
    os.truncate(path, path.stat().st_size - 3)
    return path


def test_extension_has_all_three(app: Flask) -> None:
    """The extension checks, examines and tidies up the store of the current application."""
    sessions = PersistSession()
    with app.app_context():
        sessions.manager.create({})
        assert sessions.check(repair=True) == CheckReport(checked=1)
        assert isinstance(sessions.health(), Health)
        assert sessions.optimize(full=True) == ()


def test_check_command(app: Flask, runner: FlaskCliRunner, tmp_path: Path) -> None:
    """The command prints what it found, what to do and what it repaired; its exit status says whether anything is left."""
    path = break_one(app, tmp_path)
    found = runner.invoke(args=["sessions", "check"])
    assert found.exit_code == 1
    assert found.stdout.startswith(f"found torn: {path}: its last ")
    assert "checked 1 session: 1 found, 0 repaired\n" in found.stdout
    assert "--repair" in found.stderr
    repaired = runner.invoke(args=["sessions", "check", "--repair"])
    assert repaired.exit_code == 0
    assert repaired.stdout.startswith(f"repaired torn: {path}")
    again = runner.invoke(args=["sessions", "check"])
    assert (again.exit_code, again.output) == (0, "checked 1 session: nothing is wrong\n")


def test_check_command_for_programs(app: Flask, runner: FlaskCliRunner, tmp_path: Path) -> None:
    """With --json the report is one object."""
    path = break_one(app, tmp_path)
    found = runner.invoke(args=["sessions", "check", "--json"])
    report = json.loads(found.stdout)
    assert found.exit_code == 1
    assert (report["checked"], report["found"], report["repaired"]) == (1, 1, 0)
    assert (report["findings"][0]["kind"], report["findings"][0]["where"]) == ("torn", str(path))


def test_check_command_escapes_what_it_shows(app: Flask, runner: FlaskCliRunner, tmp_path: Path) -> None:
    """A name that a terminal might obey is printed as an escape."""
    (tmp_path / "sessions" / "web" / "\x1b[2J").touch()
    assert "\\x1b[2J" in runner.invoke(args=["sessions", "check"]).stdout


def test_health_command(app: Flask, runner: FlaskCliRunner) -> None:
    """The command prints the figures, with exit status 0."""
    with app.app_context():
        PersistSession().manager.cleanup()
    found = runner.invoke(args=["sessions", "health"])
    assert found.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in found.stdout.splitlines()[1:])
    assert found.stdout.startswith("healthy\n")
    assert list(lines) == ["write", "read", "cleanup", "backup"]
    assert lines["write"].endswith(" ms")
    assert "UTC" in lines["cleanup"]
    assert lines["backup"] == "none is known"


def test_health_command_of_a_store_that_is_down(make_app: MakeApp) -> None:
    """A store that is down makes the exit status 1, and for programs ``healthy`` false."""
    runner = make_app("redis://127.0.0.1:1/0?timeout=0.2").test_cli_runner()
    shown = runner.invoke(args=["sessions", "health"])
    assert shown.exit_code == 1
    assert shown.stdout.startswith("not healthy\nissue ")
    for_programs = runner.invoke(args=["sessions", "health", "--json"])
    assert for_programs.exit_code == 1
    facts = json.loads(for_programs.stdout)
    assert facts["healthy"] is False
    assert facts["write_seconds"] is None
    assert runner.invoke(args=["sessions", "health", "--nosuch"]).exit_code == 2


def test_optimize_command(app: Flask, runner: FlaskCliRunner) -> None:
    """The command prints what it did and how much room that gave back, or that there was nothing to do."""
    assert runner.invoke(args=["sessions", "optimize"]).output == "there was nothing to do\n"
    store: SessionStore = app.extensions["persist_session"].store
    record = make_record(1)
    store.save(record, expected=0)
    for version in range(1, 30):
        record = following(record, data=b"x" * 900)
        store.save(record, expected=version)
    shown = runner.invoke(args=["sessions", "optimize"])
    assert shown.exit_code == 0
    assert "rewrote 1 files" in shown.stdout
    assert "kB freed" in shown.stdout
    assert json.loads(runner.invoke(args=["sessions", "optimize", "--json"]).stdout) == []


def test_full_optimizing_is_handed_on(app: Flask, runner: FlaskCliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --full the store does what requests have to wait for."""
    store = app.extensions["persist_session"].store
    monkeypatch.setattr(store, "optimize", lambda *, full: iter([Improvement(text=f"full is {full}")]))
    assert runner.invoke(args=["sessions", "optimize", "--full"]).output == "full is True\n"


@pytest.mark.parametrize("command", ["check", "optimize"])
def test_commands_can_be_interrupted(
    app: Flask, runner: FlaskCliRunner, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Ctrl-C ends a command with exit status 130 and a line that says what to do."""

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(app.extensions["persist_session"].store, command, interrupted)
    result = runner.invoke(args=["sessions", command])
    assert result.exit_code == 130
    assert "run it again" in result.stderr


@pytest.mark.parametrize("step", [0.04, pytest.param(0.01, marks=pytest.mark.soak)])
def test_interrupted_repair_leaves_a_store_that_can_be_repaired(tmp_path: Path, step: float) -> None:
    """A repair that is killed at any moment loses nothing, and the next one finishes the work."""
    url = f"file://{tmp_path}/sessions"
    store = open_store(url)
    records = [make_record(number, user_id=f"user {number % 40}") for number in range(200)]
    for record in records:
        store.save(record, expected=0)
    web = tmp_path / "sessions" / "web"
    script = (
        f"from flask_persist_session import open_store\nprint(flush=True)\nlist(open_store({url!r}).check(repair=True))"
    )
    for moment in itertools.takewhile((0.12).__gt__, itertools.count(0.0, step)):
        for path in web.glob("*/*.session"):
            os.truncate(path, path.stat().st_size)
            with path.open("ab") as file:
                file.write(b"torn")
        for entry in list(web.glob("*/users/*/*"))[::2]:
            entry.unlink()
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(1)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        list(store.check(repair=True))
        assert list(store.check(repair=False)) == []
        assert [store.get(record.id) for record in records] == records
