"""``flask sessions …`` through Flask's own runner, and once as the command that users type."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import select
import shlex
import struct
import subprocess
import sys
import termios
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import flask.cli
import pytest
from cachelib import SimpleCache
from flask import Flask

from flask_persist_session import (
    PersistSession,
    SessionEnded,
    SessionManager,
    SessionNotFound,
    SessionRecord,
    SessionStore,
    open_store,
    session_ended,
)
from flask_persist_session.cli import sessions_cli
from flask_persist_session.testing import make_record
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.servers import free_port
from tests.web import PROCESSES, take_streams

MakeApp = Callable[..., Flask]


@pytest.fixture
def app(make_app: MakeApp, clock: Clock) -> Flask:
    """An application with two sessions that have expired, one of them ended, and one that is active."""
    app = make_app()
    manager = app.extensions["persist_session"].manager
    manager.clock = clock
    manager.create({"a": "x" * 2000}, user_id="Ada")
    manager.end(manager.create({"a": 1}).id)
    clock.advance(32 * 86400)
    manager.create({"a": 1}, user_id="Bob")
    return app


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have set how wide a terminal is."""
    monkeypatch.delenv("COLUMNS", raising=False)


def run(app: Flask, *arguments: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["sessions", *arguments])
    return result.exit_code, result.output


def test_stats_is_a_table_for_people(app: Flask) -> None:
    """Counts, size in readable units and times."""
    status, output = run(app, "stats")
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert (rows["sessions"], rows["active"], rows["expired"], rows["ended"], rows["users"]) == ("3", "1", "1", "1", "2")
    assert (rows["size"], rows["oldest"]) == ("2.0 kB", "2023-11-14 22:13 UTC")


def test_stats_is_json_for_programs(app: Flask) -> None:
    """``--json`` prints one object with plain numbers."""
    status, output = run(app, "stats", "--json")
    figures = json.loads(output)
    assert (status, figures["total"], figures["oldest"]) == (0, 3, 1_700_000_000.0)


def test_stats_show_tenants_and_tags(make_app: MakeApp) -> None:
    """The largest ten of the tenants and of the tags, and how many there are more; names that cannot be seen quoted."""
    app = make_app()
    manager = app.extensions["persist_session"].manager
    for number in range(12):
        manager.create({}, tenant_id=f"tenant {number:02}", tags=["web"])
    for tenant in ("tenant 11", "tenant 11", "tenant 04", "\x1b[2J"):
        manager.create({}, tenant_id=tenant, tags=["web", ""])
    output = run(app, "stats")[1]
    tenants, tags = (part.splitlines()[1:] for part in output.split("\n\n")[1:])
    assert [line.split(maxsplit=1) for line in tenants[:4]] == [
        ["3", "tenant 11"],
        ["2", "tenant 04"],
        ["1", "\\x1b[2J"],
        ["1", "tenant 00"],
    ]
    assert (len(tenants), tenants[-1]) == (11, "and 3 more")
    assert [line.split() for line in tags] == [["16", "web"], ["4", "''"]]
    figures = json.loads(run(app, "stats", "--json")[1])
    assert (len(figures["tenants"]), figures["tags"]) == (13, {"web": 16, "": 4})


def test_cleanup_counts_first_and_removes_then(app: Flask) -> None:
    """``--dry-run`` tells what a cleanup would remove, and removes nothing."""
    assert run(app, "cleanup", "--dry-run") == (0, "would remove 2 sessions (1 expired, 1 ended, 0 idle)\n")
    assert run(app, "cleanup") == (0, "removed 2 sessions (1 expired, 1 ended, 0 idle)\n")
    assert run(app, "cleanup") == (0, "removed 0 sessions (0 expired, 0 ended, 0 idle)\n")


def test_cleanup_takes_an_age(app: Flask, clock: Clock) -> None:
    """``--older-than 24h`` removes active sessions without a request for a day."""
    clock.advance(86461)
    assert run(app, "cleanup", "--older-than", "24h")[1] == "removed 3 sessions (1 expired, 1 ended, 1 idle)\n"


def test_an_age_that_is_none_is_explained(app: Flask) -> None:
    """A wrong duration is a usage error that shows how to write one."""
    status, output = run(app, "cleanup", "--older-than", "soon")
    assert status == 2
    assert "'soon' is not a duration; write a number and s, m, h, d or w" in output


def test_an_age_needs_a_unit(app: Flask, clock: Clock) -> None:
    """7 might be meant as days: it is a usage error that names the units, and nobody is signed out. 0 needs none."""
    clock.advance(3600)
    status, output = run(app, "cleanup", "--older-than", "7")
    assert status == 2
    assert "'7' has no unit; write a number and s, m, h, d or w, such as 90m, 24h or 7d" in output
    assert len(listed(app, "--state", "active")) == 1
    assert run(app, "cleanup", "--older-than", "0") == (0, "removed 3 sessions (1 expired, 1 ended, 1 idle)\n")


@pytest.mark.parametrize("option", ["--user", "--tenant"])
@pytest.mark.parametrize(
    "command", [["list"], ["revoke", "--yes", "--user", "Bob"], ["backup"]], ids=lambda words: words[0]
)
def test_an_empty_id_is_a_usage_error(app: Flask, command: list[str], option: str) -> None:
    """``--user "$NAME"`` with no such variable is neither everybody nor a traceback, and changes nothing."""
    status, output = run(app, *command, option, "")
    assert status == 2
    assert f"Invalid value for '{option}': it is empty, and no id is; is a variable not set?" in output
    assert len(listed(app, "--state", "active")) == 1


def test_an_error_of_a_server_is_one_line_without_escapes(make_app: MakeApp) -> None:
    """What the driver says in several lines is told in one."""
    app = make_app(f"postgresql://127.0.0.1:{free_port()}/shop")
    status, output = run(app, "stats")
    assert (status, output.count("\n")) == (1, 1)
    assert "Is the server running on that host" in output
    assert "\\n" not in output
    assert "\\t" not in output


def test_a_store_that_cannot_be_reached_is_one_line(make_app: MakeApp) -> None:
    """The error names the server, and the exit status is 1."""
    app = make_app(f"redis://:secret@127.0.0.1:{free_port()}/0?timeout=0.5")
    status, output = run(app, "stats")
    assert (status, output.count("\n")) == (1, 1)
    assert output.startswith("Error: the Redis server redis://***@127.0.0.1:")
    assert "secret@" not in output


def test_every_command_and_option_has_help() -> None:
    """``--help`` explains each of them."""
    for command in sessions_cli.commands.values():
        assert command.help
        assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("PERSIST_SESSION_STROE", "PERSIST_SESSION_STROE is not a setting of Flask-Persist-Session; did you mean"),
        ("PERSIST_SESSION_MAX_BYTES", "PERSIST_SESSION_MAX_BYTES is 'wrong'; allowed is a whole number of bytes"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, setting: str, message: str) -> None:
    """``flask sessions`` typed in a shell tells a wrong setting in one line, with exit status 1."""
    (tmp_path / "wrong.py").write_text(
        "from flask import Flask\n"
        "from flask_persist_session import PersistSession\n"
        "def create_app():\n"
        "    app = Flask(__name__)\n"
        f"    app.config[{setting!r}] = 'wrong'\n"
        "    PersistSession(app)\n"
        "    return app\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wrong", "sessions", "stats"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"Error: {message}")


# Looking --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def manager(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def listed(app: Flask, *arguments: str) -> list[dict[str, Any]]:
    """What ``list --json`` prints on standard output."""
    result = app.test_cli_runner().invoke(args=["sessions", "list", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_list_is_a_table_for_people(app: Flask) -> None:
    """One line for each session, the newest first, with times as people say them and whole ids where there is room."""
    status, output = run(app, "list")
    head, *rows = [line.split() for line in output.splitlines()]
    assert (status, head) == (0, ["ID", "STATE", "USER", "CREATED", "ACCESSED", "EXPIRES", "SIZE"])
    assert [row[1:3] for row in rows] == [
        ["active", "Bob"],
        *sorted([["expired", "Ada"], ["ended", "(ended)"]], key=rows_key(app)),
    ]
    assert rows[0][3:8] == ["now", "now", "in", "31", "days"]
    assert {row[0] for row in rows} == {session["id"] for session in listed(app)}


def rows_key(app: Flask) -> Callable[[list[str]], int]:
    """Sessions of one moment are listed by their id, which is random."""
    states = [session["state"] for session in listed(app)]
    return lambda row: states.index(row[0])


def test_list_filters(app: Flask, manager: SessionManager) -> None:
    """By user, tenant, tags, all of which must be there, and state."""
    chosen = manager.create(user_id="Cy", tenant_id="acme", tags=["web", "beta"]).id
    manager.create(user_id="Cy", tags=["web"])
    for arguments in (["--tenant", "acme"], ["--tag", "web", "--tag", "beta"], ["--user", "Cy", "--tenant", "acme"]):
        assert [session["id"] for session in listed(app, *arguments)] == [chosen]
    assert [session["user_id"] for session in listed(app, "--state", "expired")] == ["Ada"]
    assert listed(app, "--user", "ada") == []


@pytest.mark.parametrize("sort", ["created", "accessed", "expires"])
def test_list_sorts(app: Flask, manager: SessionManager, clock: Clock, sort: str) -> None:
    """The latest first by the time that was asked for, with ``--reverse`` the earliest."""
    for lifetime in (300, 100, 200):
        clock.advance(10)
        manager.create(user_id="Cy", lifetime=lifetime)
    times = [session[f"{sort}_at"] for session in listed(app, "--user", "Cy", "--sort", sort)]
    assert times == sorted(times, reverse=True)
    assert [session[f"{sort}_at"] for session in listed(app, "--user", "Cy", "--sort", sort, "--reverse")] == times[::-1]


def test_list_says_that_it_was_cut(app: Flask) -> None:
    """After ``--limit`` sessions a line on standard error says that there are more; with 0 all are shown."""
    cut, whole, just = (app.test_cli_runner().invoke(args=["sessions", "list", "--limit", n]) for n in ("2", "0", "3"))
    assert (cut.stdout.count("\n"), cut.stderr) == (3, "… and more; --limit 0 shows all\n")
    assert (whole.stdout.count("\n"), whole.stderr) == (just.stdout.count("\n"), just.stderr) == (4, "")


def test_list_of_nothing_says_so(app: Flask) -> None:
    """No table, and a word on standard error."""
    result = app.test_cli_runner().invoke(args=["sessions", "list", "--user", "nobody of that name"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no such sessions\n")


def test_list_of_an_empty_store_says_so(make_app: MakeApp) -> None:
    """Without a filter the store has none at all."""
    result = make_app().test_cli_runner().invoke(args=["sessions", "list"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no sessions\n")


def test_spaces_around_a_name_are_seen(app: Flask, manager: SessionManager) -> None:
    """A user whose id begins or ends with a space is listed in quotes, as is a tenant and a tag; others are not."""
    made = manager.create(user_id=" Cy", tenant_id="acme ", tags=[" web", "beta"])
    row = next(line for line in run(app, "list")[1].splitlines() if line.startswith(made.id))
    assert "  ' Cy'  'acme '  ' web', beta  " in row
    assert "user      ' Cy'\n" in run(app, "show", made.id)[1]
    assert "'Bob'" not in run(app, "list")[1]


def test_list_tells_programs_all_but_the_data(app: Flask) -> None:
    """``--json`` prints plain values, times in seconds, and no payload."""
    [session] = listed(app, "--user", "Bob")
    assert session == {
        "id": session["id"],
        "state": "active",
        "user_id": "Bob",
        "tenant_id": None,
        "tags": [],
        "metadata": {},
        "created_at": 1_702_764_800.0,
        "accessed_at": 1_702_764_800.0,
        "expires_at": 1_705_443_260.0,
        "ended_at": None,
        "end_reason": None,
        "version": 1,
        "bytes": 5,
    }


class LongStore(SessionStore):
    """Has as many sessions of 1 MB as are asked for, made while they are listed."""

    def __init__(self, length: int) -> None:
        self.length = length

    def scan(self) -> Iterator[SessionRecord]:
        for number in range(self.length):
            yield make_record(number, user_id=None, data=bytes(1_000_000), expires_at=4e9)

    def get(self, session_id: str) -> SessionRecord | None:
        return None

    def save(self, record: SessionRecord, *, expected: int) -> None:
        raise NotImplementedError

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        return False


@pytest.mark.parametrize("arguments", [["--json"], []], ids=["json", "table"])
def test_list_of_all_needs_little_memory(make_app: MakeApp, arguments: list[str]) -> None:
    """600 sessions of 1 MB each are listed with memory for a few of them."""
    app = make_app(LongStore(600))
    tracemalloc.start()
    status, output = run(app, "list", "--limit", "0", *arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (status, output.count("\n")) == (0, 600 + (not arguments))
    assert peak < 20_000_000


EVIL = "red\x1b[31m\n\u202eeman"


def test_no_control_character_reaches_the_terminal(app: Flask, manager: SessionManager) -> None:
    """Users, tenants, tags, metadata, keys, values and reasons are printed with escapes instead."""
    fields = {"user_id": EVIL, "tenant_id": EVIL, "tags": [EVIL], "metadata": {EVIL: EVIL}}
    first, second = (manager.create({EVIL: [EVIL], "raw": EVIL.encode()}, **fields) for _ in range(2))
    manager.end(second.id, EVIL)
    for arguments in (["list"], ["show", first.id], ["show", second.id], ["why", first.id], ["why", second.id]):
        status, output = run(app, *arguments)
        assert status == 0
        assert r"red\x1b[31m\n\u202eeman" in output
        assert all(char.isprintable() for char in output.replace("\n", ""))


def test_show_tells_all_of_a_session(app: Flask, manager: SessionManager, clock: Clock) -> None:
    """State, owner, times, labels, and the data with the size of each key, the largest first."""
    data = {"n": 1, "cart": {"apples": (1, Decimal("2.50"))}}
    made = manager.create(data, user_id="Cy", tenant_id="acme", tags=["web"], metadata={"device": "phone"})
    clock.advance(300)
    status, output = run(app, "show", made.id[:8])
    facts, *values = output.split("\n\n")
    rows = dict(line.split(maxsplit=1) for line in facts.splitlines())
    assert status == 0
    assert rows == {
        "session": made.id,
        "state": "active",
        "user": "Cy",
        "tenant": "acme",
        "tags": "web",
        "created": "2023-12-16 22:13:20 UTC (5 minutes ago)",
        "accessed": "2023-12-16 22:13:20 UTC (5 minutes ago)",
        "expires": "2024-01-16 22:14:20 UTC (in 30 days)",
        "version": "1",
        "metadata": '{"device": "phone"}',
        "size": f"{len(made.record.data)} bytes",
    }
    assert [value.splitlines()[1].strip() for value in values] == ["{'apples': (1, Decimal('2.50'))}", "1"]
    assert [value.split(":")[0] for value in values] == ["'cart'", "'n'"]


def test_show_has_a_line_for_each_device(app: Flask, manager: SessionManager) -> None:
    """What is noted of the sign-in and of the last renewal is apart from the other metadata."""
    seen = {"ip": "192.0.2.1", "user_agent": "Mozilla/5.0"}
    made = manager.create(metadata={"last_seen": seen, "sign_in": None, "title": "phone"})
    rows = dict(line.split(maxsplit=1) for line in run(app, "show", made.id)[1].splitlines())
    assert rows["sign_in"] == "none"
    assert rows["last_seen"] == '{"ip": "192.0.2.1", "user_agent": "Mozilla/5.0"}'
    assert rows["metadata"] == '{"title": "phone"}'


def test_show_as_json_has_text_for_what_json_lacks(app: Flask, manager: SessionManager) -> None:
    """Dates in ISO form, lists for tuples and sets, text for numbers that JSON readers would change."""
    moment = datetime(2024, 2, 29, 12, tzinfo=timezone.utc)
    data = {"at": moment, "pair": (1, {2}), "price": Decimal("2.50"), "raw": b"\x1b", "inf": math.inf, "big": 1 << 64}
    status, output = run(app, "show", manager.create({**data, "map": {1: None}}).id, "--json")
    shown = json.loads(output)
    assert status == 0
    assert shown["data"] == {
        "at": "2024-02-29T12:00:00+00:00",
        "pair": [1, [2]],
        "price": "2.50",
        "raw": r"b'\x1b'",
        "inf": "inf",
        "big": "0x10000000000000000",
        "map": {"1": None},
    }
    assert list(shown["sizes"]) == sorted(shown["sizes"], key=lambda key: -shown["sizes"][key])


def test_show_prints_an_integer_that_python_does_not(app: Flask, manager: SessionManager) -> None:
    """Beyond 4,300 digits Python refuses decimal, so it is shown in hexadecimal."""
    status, output = run(app, "show", manager.create({"huge": 1 << 20_000}).id)
    assert status == 0
    assert "0x1" + "0" * 5000 in output


def test_show_has_the_data_of_an_expired_session(app: Flask) -> None:
    """The data is there until a cleanup; that of an ended session is gone."""
    [expired], [ended] = listed(app, "--state", "expired"), listed(app, "--state", "ended")
    assert "xxxx" in run(app, "show", expired["id"])[1]
    assert "kept " in run(app, "show", ended["id"])[1]
    assert json.loads(run(app, "show", ended["id"], "--json")[1])["data"] == {}


@pytest.mark.parametrize("command", ["show", "why"])
def test_data_that_cannot_be_read_is_told(app: Flask, manager: SessionManager, command: str) -> None:
    """One line says what is wrong and what to do, with exit status 1."""
    record = manager.create(user_id="Cy").record
    manager.store.save(replace(record, data=b"\xffjunk", version=2), expected=1)
    status, output = run(app, command, record.id)
    assert (status, output.count("\n")) == (1, 1)
    assert output.startswith(
        f"Error: the data of session {record.id} cannot be read: the payload's envelope 0xff is unknown"
    )
    assert "or revoke it" in output
    assert run(app, "revoke", record.id, "--yes") == (0, "revoked 1 active session\n")


def test_a_record_that_cannot_be_read_is_told(make_app: MakeApp) -> None:
    """What is no record at all: exit status 1, and how to get rid of it; other ids are revoked all the same."""
    cache = SimpleCache()
    app = make_app(cache)
    manager = app.extensions["persist_session"].manager
    broken, good = manager.create().id, manager.create().id
    cache.set(f"persist:web:{broken}", b"junk")
    for command in (["show"], ["why"], ["revoke", "--yes"]):
        status, output = run(app, *command, broken)
        assert status == 1
        assert output.startswith(f"Error: session {broken} cannot be read: ")
        assert "manager.delete(id)" in output
    assert run(app, "revoke", "--yes", broken, good)[0] == 1
    assert manager.load(good).end_reason == "revoked"


def test_why_tells_what_became_of_a_session(app: Flask, manager: SessionManager, clock: Clock) -> None:
    """Active until when; expired when; ended when, with the reason in words."""
    made = manager.create(user_id="Cy", tenant_id="acme", lifetime=3600)
    whose = f"session {made.id} of user 'Cy' of tenant 'acme'"
    until = "2023-12-16 23:14:20 UTC"
    assert run(app, "why", made.id) == (
        0,
        f"{whose} is active until {until} (in 61 minutes), or longer if a request renews it\n",
    )
    clock.advance(2 * 86400)
    assert f"{whose} expired at {until} (46 hours ago); its last " in run(app, "why", made.id)[1]
    ended = manager.create()
    manager.revoke(ended.id)
    assert run(app, "why", ended.id)[1] == (
        f'session {ended.id} of nobody ended at 2023-12-18 22:13:20 UTC (now) with the reason "revoked": somebody ended it '
        "from outside: an operator or the application\n"
    )


def test_why_heeds_an_absolute_timeout_that_was_shortened(store: SessionStore, clock: Clock) -> None:
    """A session that the store has as active expires when the shorter timeout says."""
    record = SessionManager(store, clock=clock).create().record
    manager = SessionManager(store, clock=clock, absolute_timeout=60)
    clock.advance(61)
    details = manager.inspect(record.id)
    assert (details.state, details.record.expires_at) == ("expired", record.created_at + 60)
    assert manager.judge(record) == details.record


@pytest.mark.parametrize("command", [["show"], ["why"], ["revoke", "--yes"]], ids=str)
def test_an_unknown_id_is_explained(app: Flask, command: list[str]) -> None:
    """Exit status 1, and where the session may have gone."""
    status, output = run(app, *command, "0" * 67)
    assert status == 1
    assert output.startswith(f"Error: no session {'0' * 67}: it never existed, or was removed by a ")
    assert "ended ones after 24 hours (PERSIST_SESSION_KEEP_ENDED)" in output
    assert run(app, *command, "0" * 12)[1].startswith(f"Error: no session {'0' * 12}: ")


def test_an_age_of_idle_sessions_is_not_that_of_chats(app: Flask, clock: Clock) -> None:
    """Signing out who was idle for a day leaves the dialogues, unless their namespace is named."""
    chats = PersistSession().namespace("chat", app=app)
    chats.clock = clock
    chat = chats.create({"a": 1})
    clock.advance(2 * 86400)
    removed = "removed 3 sessions (1 expired, 1 ended, 1 idle)\nremoved 0 sessions of chat (0 expired, 0 ended, 0 idle)\n"
    assert run(app, "cleanup", "--older-than", "24h") == (0, removed)
    assert chats.get(chat.id) is not None
    removed = "removed 1 session of chat (0 expired, 0 ended, 1 idle)\n"
    assert run(app, "cleanup", "--older-than", "24h", "--namespace", "chat") == (0, removed)
    assert chats.get(chat.id) is None
    assert "no namespace 'caht'" in run(app, "cleanup", "--namespace", "caht")[1]


@pytest.mark.parametrize("command", [["show"], ["why"], ["revoke", "--yes"]], ids=str)
def test_an_id_of_another_namespace_is_pointed_to(app: Flask, command: list[str]) -> None:
    """Whoever copies the id of a chat is told which option is missing, and nothing is done."""
    chats = PersistSession().namespace("chat", app=app)
    chat = chats.create({"a": 1})
    for given in chat.id, chat.id[:12]:
        expected = f"Error: no session {given} here, but there is one with --namespace chat\n"
        assert run(app, *command, given) == (1, expected)
    assert run(app, *command, chat.id, "--namespace", "chat")[0] == 0


@pytest.mark.parametrize("word", ["", "0123456", "X" * 67, "3abZtoken-of-somebody", "%_%_%_%_%_", "0" * 68])
def test_what_is_no_id_is_explained(app: Flask, word: str) -> None:
    """Exit status 1, and how an id looks; no more of it is repeated than what no token is guessed from."""
    status, output = run(app, "show", "--", word)
    assert status == 1
    assert "is no session id: give its 67 hex digits, or at least the first 8 of them" in output
    assert word[:8] in output
    assert "token-of" not in output


@pytest.mark.parametrize("word", ["abcdef123456", "f" * 67])
def test_digits_that_begin_no_id_are_an_unknown_session(app: Flask, word: str) -> None:
    """Ids begin with 0 to 3, which nobody needs to know: there is no such session."""
    status, output = run(app, "why", word)
    assert status == 1
    assert output.startswith(f"Error: no session {word}: it never existed, or was removed by a cleanup, ")


def test_an_id_is_taken_as_it_was_copied(app: Flask, manager: SessionManager) -> None:
    """Capitals and spaces around it make no difference, to a whole id and to the beginning of one."""
    made = manager.create().id
    for copied in (f" {made.upper()}\n", f"{made[:12].upper()} "):
        assert run(app, "why", copied)[1].startswith(f"session {made} of nobody is active")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 seconds"), (90, "90 seconds"), (5400, "90 minutes"), (86400, "24 hours"), (604800, "7 days")],
)
def test_how_long_ended_sessions_are_kept_is_told_exactly(store: SessionStore, seconds: int, words: str) -> None:
    """In the largest unit that needs no rounding."""
    with pytest.raises(SessionNotFound, match=f"ended ones after {words} "):
        SessionManager(store, keep_ended=seconds).look_up("0" * 67)


def test_an_ambiguous_id_is_explained(store: SessionStore) -> None:
    """The error has both ids; more digits name one session."""
    manager = SessionManager(store)
    record = manager.create(user_id="Cy").record
    ids = [record.id[:8] + digit * 59 for digit in "ab"]
    for session_id in ids:
        store.save(replace(record, id=session_id), expected=0)
    with pytest.raises(SessionNotFound, match="begins the ids of several sessions: give more digits of") as raised:
        manager.look_up(record.id[:8])
    assert len([session_id for session_id in [*ids, record.id] if session_id in str(raised.value)]) == 2
    assert [manager.look_up(session_id[:12]).id for session_id in ids] == ids


# Revoking -------------------------------------------------------------------------------------------------------------


def test_revoke_some(app: Flask, manager: SessionManager) -> None:
    """Ids or their beginnings; those that had ended are counted apart, an unknown one does not stop the others."""
    first, second = manager.create(user_id="Cy").id, manager.create().id
    assert run(app, "revoke", "--yes", first[:12]) == (0, "revoked 1 active session\n")
    status, output = run(app, "revoke", "--yes", first, "0" * 67, second)
    assert status == 1
    assert output.count(f"no session {'0' * 67}") == 1
    assert output.endswith("revoked 1 active session; 1 had ended or expired before\n")
    assert [manager.inspect(session_id).record.end_reason for session_id in (first, second)] == ["revoked"] * 2


def test_revoke_a_user(app: Flask, manager: SessionManager) -> None:
    """All sessions of a user, or those within a tenant; others stay."""
    for tenant in ("acme", "acme", None):
        manager.create(user_id="Cy", tenant_id=tenant)
    assert run(app, "revoke", "--yes", "--user", "Cy", "--tenant", "acme") == (0, "revoked 2 active sessions\n")
    assert run(app, "revoke", "--yes", "--user", "Cy") == (0, "revoked 1 active session\n")
    assert [session["user_id"] for session in listed(app, "--state", "active")] == ["Bob"]


@pytest.mark.parametrize("yes", [[], ["--yes"]], ids=["asking", "yes"])
def test_revoke_a_user_who_has_no_session(app: Flask, yes: list[str]) -> None:
    """Nothing is asked: exit status 1 as for an unknown id, and where the ids of users are to be seen."""
    status, output = run(app, "revoke", "--user", "noone", *yes)
    assert (status, output) == (
        1,
        "Error: user 'noone' has no active session; the id is what `list` shows under USER\n",
    )
    assert "user 'Bob' of tenant 'acme' has no" in run(app, "revoke", "--user", "Bob", "--tenant", "acme", *yes)[1]


@pytest.mark.parametrize("others", [[], ["--all"], ["0" * 67]], ids=str)
def test_revoke_a_tenant_alone_is_explained(app: Flask, others: list[str]) -> None:
    """The usage error names the option that was wrong."""
    status, output = run(app, "revoke", "--tenant", "acme", *others)
    assert status == 2
    assert "Error: --tenant goes with --user; a whole tenant cannot be revoked at once" in output


def test_revoke_everybody(app: Flask) -> None:
    """All active sessions, and there are none left."""
    assert run(app, "revoke", "--all", "--yes") == (0, "revoked 1 active session\n")
    assert run(app, "revoke", "--all", "--yes") == (0, "revoked 0 active sessions\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--yes"],
        ["0" * 67, "--all"],
        ["--user", "Bob", "--all"],
        ["0" * 67, "--user", "Bob"],
        ["--all", "--tenant", "a"],
    ],
    ids=str,
)
def test_revoke_takes_one_way_of_three(app: Flask, arguments: list[str]) -> None:
    """None or several ways are a usage error, and nothing is revoked."""
    assert run(app, "revoke", *arguments)[0] == 2
    assert len(listed(app, "--state", "active")) == 1


@pytest.mark.parametrize("arguments", [["--all"], ["--user", "Bob"], ["ID"]], ids=str)
def test_revoke_in_a_pipe_needs_yes(app: Flask, arguments: list[str]) -> None:
    """Where nobody can be asked, nothing is revoked and the error names the option."""
    [active] = listed(app, "--state", "active")
    status, output = run(app, "revoke", *(active["id"] if word == "ID" else word for word in arguments))
    assert (status, output) == (
        1,
        "Error: nothing was revoked: there is no terminal to ask on, so confirm with --yes\n",
    )
    assert listed(app, "--state", "active") == [active]


def test_an_interrupted_cleanup_says_what_to_do(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends it with status 130 and a line."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SessionManager, "cleanup", interrupt)
    assert run(app, "cleanup") == (130, "Error: interrupted: what was removed is gone; run it again for the rest\n")


def test_revoking_all_can_be_interrupted_and_started_again(store: SessionStore, clock: Clock) -> None:
    """What was ended before stays ended, the rest is as it was, and a second run ends it; nothing is ended twice."""
    manager = SessionManager(store, clock=clock)
    for number in range(600):
        manager.create(user_id=str(number))
    batches: list[int] = []

    def interrupt(ended: int) -> None:
        batches.append(ended)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manager.revoke_all(on_batch=interrupt)
    assert manager.stats().active == 600 - batches[0] > 0
    assert manager.revoke_all(on_batch=batches.append) == 600 - batches[0]
    assert (sum(batches), manager.stats().ended) == (600, 600)


def test_revoking_all_takes_no_step_for_each_session(clock: Clock) -> None:
    """1,000 sessions are ended in batches: two of changes, and two listings."""
    store = CountingStore(open_store("memory://"))
    manager = SessionManager(store, clock=clock)
    for _ in range(1000):
        manager.create()
    store.operations.clear()
    assert manager.revoke_all() == 1000
    assert store.operations == {"find": 2, "save_many": 2}


def test_revoking_all_meets_what_happens_meanwhile(clock: Clock) -> None:
    """A session that is saved is ended all the same, one under a new token too, and one that has ended is not counted."""
    manager = SessionManager(open_store("memory://"), clock=clock)
    sessions = [manager.create({"n": n}) for n in range(600)]
    saved, moved, gone = sessions[-3:]  # the memory store lists in the order of creation, 500 at a time
    after = []

    def meanwhile(ended: int) -> None:
        if not after:
            saved.data["n"] = -1
            assert manager.save(saved) == "saved"
            after.append(manager.regenerate(moved))
            manager.end(gone.id, "logout")

    assert manager.revoke_all(on_batch=meanwhile) == 599
    [new] = after
    assert new is not None
    ends = [manager.inspect(session.id).record.end_reason for session in (saved, moved, new, gone)]
    assert ends == ["revoked", "regenerated", "revoked", "logout"]


def test_each_revoked_session_is_told(store: SessionStore) -> None:
    """``session_ended`` is sent once for each, with its user and the reason."""
    manager = SessionManager(store)
    made = {manager.create(user_id=str(number)).id for number in range(3)}
    events: list[SessionEnded] = []

    def receive(sender: object, event: SessionEnded) -> None:
        events.append(event)

    with session_ended.connected_to(receive, manager):
        assert manager.revoke_all() == 3
    assert {event.session_id for event in events} == made
    assert [event.reason for event in events] == ["revoked"] * 3


def test_a_cache_that_cannot_list_does_the_rest(make_app: MakeApp) -> None:
    """``show``, ``why`` and ``revoke`` work with whole ids; what needs a listing fails with the reason."""
    app = make_app(SimpleCache())
    session_id = app.extensions["persist_session"].manager.create({"a": 1}, user_id="Cy").id
    for arguments in (
        ["list"],
        ["revoke", "--yes", "--user", "Cy"],
        ["revoke", "--yes", "--all"],
    ):
        status, output = run(app, *arguments)
        assert (status, output.splitlines()[-1][:45]) == (1, "Error: CachelibStore cannot list sessions: a "), arguments
    status, output = run(app, "why", session_id[:12])
    assert status == 1
    assert output.startswith("Error: give the whole id, all 67 digits: CachelibStore cannot list sessions: a ")
    assert [run(app, *arguments, session_id)[0] for arguments in (["show"], ["why"], ["revoke", "--yes"])] == [0] * 3


# In a terminal --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with an application whose store has 30 sessions."""
    (tmp_path / "shop.py").write_text(
        "from flask import Flask\n"
        "from flask_persist_session import PersistSession\n"
        "app = Flask(__name__)\n"
        f"app.config.update(SECRET_KEY='for tests', PERSIST_SESSION_STORE='sqlite:///{tmp_path}/shop.db')\n"
        "PersistSession(app)\n"
    )
    store = open_store(f"sqlite:///{tmp_path}/shop.db")
    manager = SessionManager(store)
    for number in range(30):
        user = f"somebody.with.a.long.name.{number}@example.com"
        manager.create({"n": number}, user_id=user, tenant_id="acme", tags=["web", "beta"])
    store.close()
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flask", "--app", "shop", "sessions", *arguments]


def environment() -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return others | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONUTF8": "1"}


def in_terminal(folder: Path, columns: int, *arguments: str, answer: str = "") -> tuple[int, str]:
    """What the command prints, and its exit status, in a terminal of so many columns where *answer* is typed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    given = (os.ttyname(theirs), folder, command(*arguments))
    process = PROCESSES.Process(target=run_in_terminal, args=given, daemon=True)
    process.start()
    os.write(ours, answer.encode())
    printed = b""
    while process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours, process.sentinel], [], [])[0][0] == ours:
            printed += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    assert process.exitcode is not None
    return process.exitcode, printed.decode().replace("\r\n", "\n")


def run_in_terminal(name: str, folder: Path, command: list[str]) -> None:
    """Run a command of ``python -m flask`` as a shell does in this terminal."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # the first one that is opened rules a session
    take_streams(terminal, terminal)
    os.chdir(folder)
    for size in ("COLUMNS", "LINES"):
        os.environ.pop(size, None)
    sys.argv = command[2:]
    flask.cli.main()


@pytest.mark.parametrize(
    "columns", [30, 80, 200, *(pytest.param(width, marks=pytest.mark.soak) for width in (40, 60, 120))]
)
def test_a_table_fits_the_terminal(shop: Path, columns: int) -> None:
    """No line is longer than the terminal is wide, and each id that is shown names its session."""
    status, output = in_terminal(shop, columns, "list", "--limit", "5")
    head, *rows, last = output.splitlines()
    assert (status, len(rows), last) == (0, 5, "… and more; --limit 0 shows all")
    assert max(map(len, [head, *rows])) <= columns
    assert head.split()[:3] == ["ID", "STATE", "USER"]
    titles = [title for title in ("TENANT", "TAGS") if title in head]
    # With 80 it depends on how long ago the sessions were made: "now" takes less room than "10 seconds ago".
    assert titles in ([[], ["TENANT"]] if columns == 80 else [["TENANT", "TAGS"][: max(0, columns - 60) // 20]])
    shown = rows[0].split()[0]
    assert len(shown) == (67 if columns == 200 else 12)
    assert in_terminal(shop, columns, "why", shown)[1].startswith(f"session {shown}")


def test_a_pipe_gets_whole_lines(shop: Path) -> None:
    """What is no terminal has no width: nothing is cut."""
    done = subprocess.run(command("list"), cwd=shop, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(rows) == 30
    assert all(len(row[0]) == 67 and row[2].endswith("@example.com") for row in rows)


def test_a_pipe_that_ends_early_is_no_error(shop: Path) -> None:
    """``| head`` gets its lines, and nobody a traceback."""
    listing = shlex.join(command("list", "--json", "--limit", "0"))
    done = subprocess.run(["sh", "-c", f"{listing} | true"], cwd=shop, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_revoke_asks_first(shop: Path) -> None:
    """The question says how many sessions and of whom; without a yes nothing happens."""
    user = "somebody.with.a.long.name.7@example.com"
    status, output = in_terminal(shop, 80, "revoke", "--user", user, answer="n\n")
    assert (status, f"Revoke 1 active session of user '{user}'? [y/N]: " in output) == (1, True)
    assert in_terminal(shop, 80, "revoke", "--user", user, answer="y\n")[1].endswith("revoked 1 active session\n")
    shown = in_terminal(shop, 80, "list", "--limit", "1", "--state", "active")[1].splitlines()[1].split()[0]
    assert "Revoke 1 session of user 'somebody" in in_terminal(shop, 80, "revoke", shown, answer="n\n")[1]


def test_revoking_all_shows_how_far_it_is(shop: Path) -> None:
    """The question warns that it is everybody; a bar is shown on a terminal, and not in a pipe."""
    status, output = in_terminal(shop, 80, "revoke", "--all", answer="n\n")
    assert (status, "Revoke 30 active sessions, those of all users and visitors of 'shop'?" in output) == (1, True)
    status, output = in_terminal(shop, 80, "revoke", "--all", "--yes")
    assert (status, "100%" in output) == (0, True)
    assert output.endswith("revoked 30 active sessions\n")
    done = subprocess.run(command("revoke", "--all", "--yes"), cwd=shop, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "revoked 0 active sessions\n", "")


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["backup", "archives"], ["backing up"]),
        (["backups", "archives"], ["verifying"]),
        (["restore", "--yes", "archives/mine.tar.gz"], ["verifying", "restoring"]),
        (["migrate", "--to", "file:copy"], ["copying"]),
        (["check"], ["checking"]),
        (["optimize", "--full"], ["tidying up"]),
    ],
    ids=lambda given: given[0],
)
def test_long_commands_show_how_far_they_are(shop: Path, arguments: list[str], labels: list[str]) -> None:
    """Each part of the work has a bar on a terminal, and in a pipe there is nothing of the kind."""
    for place in {"restore": ["archives/mine.tar.gz"], "backups": ["archives"]}.get(arguments[0], []):
        made = subprocess.run(command("backup", place), cwd=shop, env=environment(), capture_output=True)
        assert made.returncode == 0
    status, output = in_terminal(shop, 80, *arguments)
    assert (status, [label for label in labels if label in output]) == (0, labels)
    done = subprocess.run(command(*arguments), cwd=shop, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(label in done.stdout for label in labels)


def test_archives_are_listed_below_their_bar(shop: Path) -> None:
    """The bar of ``backups`` is complete before the first line of the list."""
    made = subprocess.run(command("backup", "archives"), cwd=shop, env=environment(), capture_output=True)
    assert made.returncode == 0
    _, output = in_terminal(shop, 80, "backups", "archives")
    assert output.endswith(" verified\n")
    assert "verifying" not in output.splitlines()[-1]
