"""The documentation says what the code does: these tests fail when the two part."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from blinker import NamedSignal
from flask import Flask

import flask_persist_session
from flask_persist_session import ConfigError, PersistSession, SessionManager, open_store, tokens
from flask_persist_session import exceptions as exceptions_module
from flask_persist_session import signals as signals_module
from flask_persist_session.cli import sessions_cli
from flask_persist_session.config import PREFIX, Config
from tests.conftest import Clock

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGES.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, kind: str) -> list[tuple[int, str]]:
    """Each code block of a kind, with the number of lines above it."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == kind]
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in found]


def sections(page: str) -> dict[str, str]:
    """The text below each heading of a page of the docs, by heading; code blocks are left out."""
    text = BLOCK.sub("", (DOCS / page).read_text(encoding="utf-8"))
    _, *rest = HEADING.split(text)
    return dict(zip(rest[::2], rest[1::2], strict=True))


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end in."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def by_name(values: Any) -> list[Any]:
    return [pytest.param(value, id=value.name) for value in values]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Settings -------------------------------------------------------------------------------------------------------------


def test_settings_page_has_each_setting_and_no_other() -> None:
    """The settings page describes the settings that exist, each under its key."""
    documented = {heading.strip("`") for heading in sections("settings.md") if heading.startswith("`")}
    assert documented == {PREFIX + field.name.upper() for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("field", by_name(dataclasses.fields(Config)))
def test_setting_has_its_default(field: dataclasses.Field[Any]) -> None:
    """Each setting is described with its type, its default, what is allowed and an example."""
    section = sections("settings.md")[f"`{PREFIX}{field.name.upper()}`"]
    assert re.findall(r"^\* (\w+): ", section, re.MULTILINE) == ["Type", "Default", "Allowed", "Example"]
    assert f"* Default: `{field.default!r}`" in section


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", by_name(sessions_cli.commands.values()))
def test_command_is_described(command: click.Command) -> None:
    """Each command and each of its options has help, and is on the page of commands."""
    section = sections("cli.md")[f"`flask sessions {command.name}`"]
    assert command.help
    for option in command.params:
        if isinstance(option, click.Argument):
            continue
        assert option.help
        assert all(re.search(rf"\| `{name}[ `]", section) for name in option.opts)


def test_commands_page_has_no_other_command() -> None:
    """The page of commands describes only what exists."""
    documented = {heading.strip("`").split()[-1] for heading in sections("cli.md") if heading.startswith("`flask")}
    assert documented == set(sessions_cli.commands)


@pytest.fixture
def shop(make_app: Callable[..., Flask], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Flask:
    """An application with the sessions that the page of commands shows: 2 active, 1 idle, 1 expired, 1 ended."""
    numbers = itertools.count(1)
    monkeypatch.setattr(tokens, "make_token", lambda shard: f"{shard}{next(numbers):043}")
    monkeypatch.setattr(tokens.secrets, "randbelow", lambda _: 291)
    app = make_app(PERSIST_SESSION_IDLE_TIMEOUT="30d")
    manager: SessionManager = app.extensions["persist_session"].manager
    manager.clock = clock
    manager.create({"cart": ["apple"]})
    clock.advance(20 * 86400)
    manager.create({"cart": ["pear", "plum"]}, user_id="7")
    clock.advance(11 * 86400)
    for user in "7", "8":
        manager.create({"name": f"user {user}"}, user_id=user)
    clock.advance(3600)
    manager.end(manager.create({"cart": []}).id, "revoked")
    clock.advance(2 * 86400)
    return app


@pytest.mark.parametrize(("line", "dialogue"), blocks(DOCS / "cli.md", "console"))
def test_shown_output_of_commands_is_real(shop: Flask, line: int, dialogue: str) -> None:
    """The output that the page of commands shows is what the commands print."""
    for step in re.split(r"^\$ flask ", dialogue, flags=re.MULTILINE)[1:]:
        arguments, _, output = step.partition("\n")
        result = shop.test_cli_runner().invoke(args=arguments.split(), env={"COLUMNS": "100"}, catch_exceptions=False)
        assert (result.exit_code, result.output) == (0, output), f"cli.md, line {line}"


# Signals and errors ---------------------------------------------------------------------------------------------------

SIGNALS = [value for value in vars(signals_module).values() if isinstance(value, NamedSignal)]
EVENTS = [value for value in vars(signals_module).values() if dataclasses.is_dataclass(value)]
ERRORS = [
    value
    for value in vars(exceptions_module).values()
    if isinstance(value, type) and issubclass(value, flask_persist_session.PersistSessionError)
]


def test_signals_page_has_each_signal_and_no_other() -> None:
    """The page of signals has a section for each signal, and no other."""
    documented = {heading.strip("`") for heading in sections("signals.md") if heading.startswith("`")}
    assert documented == {signal.name.replace("-", "_") for signal in SIGNALS}


@pytest.mark.parametrize("event", EVENTS)
def test_event_is_described_with_its_fields(event: type) -> None:
    """Each event value is in the section of one signal, with all of its fields and no other."""
    [section] = [text for text in sections("signals.md").values() if f"Event: `{event.__name__}`" in text]
    assert re.findall(r"^\* `(\w+)`", section, re.MULTILINE) == [field.name for field in dataclasses.fields(event)]


def test_errors_page_has_each_error_and_no_other() -> None:
    """The page of errors has a section for each error, which says when it is raised and what to do."""
    documented = {heading.strip("`"): text for heading, text in sections("errors.md").items() if heading.startswith("`")}
    assert set(documented) == {error.__name__ for error in ERRORS}
    assert all("When: " in text and "What to do: " in text for text in documented.values())


# The manager ----------------------------------------------------------------------------------------------------------

METHODS = [heading.strip("`") for heading in sections("manager.md") if heading.startswith("`")]


@pytest.mark.parametrize("name", METHODS)
def test_method_is_described_with_its_arguments(name: str) -> None:
    """Each method on the page of the manager exists, and its section names all of its arguments."""
    section = sections("manager.md")[f"`{name}`"]
    arguments = list(inspect.signature(getattr(SessionManager, name)).parameters)[1:]
    assert section.lstrip().startswith(f"`{name}(")
    assert [argument for argument in arguments if not re.search(rf"\b{argument}\b", section)] == []


def test_manager_page_has_what_applications_need() -> None:
    """No method is left out that creates, finds, changes or ends sessions outside of requests."""
    assert {
        *("create", "get", "load", "find", "judge", "look_up", "inspect", "stats", "save", "renew"),
        *("end", "revoke", "revoke_user", "revoke_all", "delete", "cleanup"),
    } <= set(METHODS)


# Stores ---------------------------------------------------------------------------------------------------------------

#: A URL of each scheme that opens without a server; the test below notices a scheme that is missing here.
URLS = {
    "memory": "memory://",
    "file": "file:sessions",
    "sqlite": "sqlite:///sessions.db",
    "postgresql": "postgresql://localhost/sessions",
    "mysql": "mysql://localhost/sessions",
    "mariadb": "mariadb://localhost/sessions",
    "redis": "redis://localhost",
    "rediss": "rediss://localhost",
    "unix": "unix:///run/redis.sock",
    "redis+cluster": "redis+cluster://localhost",
    "rediss+cluster": "rediss+cluster://localhost",
    "redis+sentinel": "redis+sentinel://localhost/service",
    "rediss+sentinel": "rediss+sentinel://localhost/service",
}


def test_every_scheme_is_described() -> None:
    """Each scheme of a store URL is in a heading of the page of stores."""
    with pytest.raises(ConfigError) as raised:
        open_store("nosuch://place")
    schemes = re.findall(r"([\w+]+):(?:,|$)", str(raised.value).partition("allowed are")[2])
    assert schemes == list(URLS)
    documented = re.findall(r"`([\w+]+):`", " ".join(sections("stores.md")))
    assert sorted(documented) == sorted(schemes)


@pytest.mark.parametrize("scheme", URLS)
def test_every_store_option_is_described(scheme: str, tmp_path: Path) -> None:
    """The tables of options in the section of a store have the options that its URLs take, and no other."""
    [(heading, section)] = [item for item in sections("stores.md").items() if f"`{scheme}:`" in item[0]]
    allowed = set()
    for sibling in re.findall(r"`([\w+]+):`", heading):
        with pytest.raises(ConfigError) as raised:
            open_store(f"{URLS[sibling]}?nosuch=1", base_path=str(tmp_path))
        allowed |= set(str(raised.value).partition("allowed is ")[2].split(", "))
    names = re.findall(r"^\| (`\w+`.*?) \|", section, re.MULTILINE)
    documented = set(re.findall(r"\w+", " ".join(names)))
    assert documented == allowed - {"none"}


# Names ----------------------------------------------------------------------------------------------------------------

PUBLIC = {name: getattr(flask_persist_session, name) for name in flask_persist_session.__all__}


def members(public: Any) -> Iterator[Any]:
    """The public methods and properties of a class that this package defines."""
    for base in inspect.getmro(public) if isinstance(public, type) else ():
        if base.__module__.startswith("flask_persist_session"):
            found = [getattr(public, name) for name in vars(base) if not name.startswith("_")]
            yield from [member for member in found if isinstance(member, property) or inspect.isroutine(member)]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_in_the_docs(name: str) -> None:
    """Each public name is somewhere in the docs."""
    assert any(re.search(rf"\b{name}\b", page.read_text(encoding="utf-8")) for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", [name for name, public in PUBLIC.items() if callable(public)])
def test_public_name_has_a_docstring(name: str) -> None:
    """Each public class and function, and each of its public methods and properties, says what it does."""
    assert PUBLIC[name].__doc__
    assert not PUBLIC[name].__doc__.startswith(f"{name}(")  # what a dataclass without a docstring gets
    assert not [member for member in members(PUBLIC[name]) if not inspect.getdoc(member)]


# Pages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link leads to a file that exists, and to a heading in it."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.is_file() or (anchor and anchor not in anchors(target)):
                broken.append(link)
    assert not broken


def test_index_leads_to_every_page() -> None:
    """The index of the docs links to each of its pages."""
    linked = set(LINK.findall((DOCS / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked


@pytest.fixture
def applications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Flask]]:
    """The applications that examples set up, in an empty directory; afterwards the environment is as it was before."""
    made: list[Flask] = []
    init_app = PersistSession.init_app

    def remember(self: PersistSession, app: Flask) -> None:
        init_app(self, app)
        made.append(app)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PersistSession, "init_app", remember)
    environment = dict(os.environ)
    yield made
    os.environ.clear()
    os.environ.update(environment)
    logging.getLogger("flask_persist_session").setLevel(logging.NOTSET)
    for app in made:
        app.extensions["persist_session"].store.close()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_examples_run(page: Path, applications: list[Flask], capsys: pytest.CaptureFixture[str]) -> None:
    """The Python examples of a page run one after the other, and print what the page shows."""
    namespace: dict[str, Any] = {"__name__": "documented"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)
    assert applications
    printed = capsys.readouterr().out
    assert all(shown in printed for _, shown in blocks(page, "output"))
