"""``flask sessions …`` through Flask's own runner, and once as the command that users type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from flask import Flask

from flask_persist_session.cli import sessions_cli
from tests.conftest import Clock
from tests.servers import free_port

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
        assert all(option.help for option in command.params if isinstance(option, click.Option))


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
