"""Promises of what the commands print that the other tests take for granted."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from flask_persist_session import SessionManager, SessionNotFound, SessionRecord, open_store
from flask_persist_session.cli import _owners, sessions_cli
from flask_persist_session.describe import columns, facts, fate
from flask_persist_session.exceptions import StoreError
from flask_persist_session.terminal import Column, plain, relative, size, table
from flask_persist_session.testing import make_record
from tests.conftest import Clock

NOW = 1_700_001_000.0


def printed(record: SessionRecord, now: float = NOW) -> list[str]:
    """All that ``list``, ``show`` and ``why`` say of a session."""
    return [*table(columns(now), iter([record]), 10_000), *(value for _, value in facts(record, now)), fate(record, now)]


@pytest.mark.parametrize(
    "fields",
    [
        {"user_id": "\x1b[2J"},
        {"tenant_id": "\x1b[2J"},
        {"tags": frozenset({"\x1b[2J"})},
        {"metadata": {"a": "\x9b2J\u202e"}},
        {"ended_at": 1.0, "end_reason": "\x1b[2J"},
    ],
    ids=lambda fields: "/".join(fields),
)
def test_nothing_of_a_record_commands_the_terminal(fields: dict[str, Any]) -> None:
    """Whatever an application or a visitor put into a session's record is printed as text."""
    assert [line for line in printed(make_record(**fields)) if not line.isprintable()] == []


def test_an_error_of_a_store_commands_no_terminal(make_app: Callable[..., Flask]) -> None:
    """What a store says of what it found is printed as text, too."""
    app = make_app()

    def fail(*, now: float) -> None:
        raise StoreError("found \x1b[2J")

    app.extensions["persist_session"].store.stats = fail
    result = app.test_cli_runner().invoke(sessions_cli, ["stats"])
    assert (result.exit_code, result.output) == (1, "Error: found \\x1b[2J\n")


def row(record: SessionRecord) -> dict[str, str]:
    """The cells of a session in the table, by title."""
    return {column.title: column.cell(record) for column in columns(NOW)}


def test_each_time_has_its_column() -> None:
    """Created, accessed and expires are three times; what has ended does not expire any more."""
    record = make_record(created_at=NOW - 3 * 86400, accessed_at=NOW - 180, expires_at=NOW + 4 * 3600)
    cells = row(record)
    assert [cells[title] for title in ("CREATED", "ACCESSED", "EXPIRES")] == ["3 days ago", "3 minutes ago", "in 4 hours"]
    assert row(make_record(ended_at=NOW, end_reason="revoked"))["EXPIRES"] == ""


def test_why_of_an_expired_session_tells_of_its_last_request() -> None:
    """When it was changed or renewed last, not when it began."""
    record = make_record(created_at=NOW - 86400, accessed_at=NOW - 7200, expires_at=NOW - 3600)
    assert "its last change or renewal was at 2023-11-14 20:30:00 UTC (2 hours ago)" in fate(record, NOW)


def test_why_knows_which_reasons_are_the_applications() -> None:
    """A reason that this package does not give came from the application."""
    record = make_record(ended_at=NOW, end_reason="bored")
    assert fate(record, NOW).endswith('with the reason "bored": a reason that the application gave')


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (10**9, "1.0 GB"),
        (5 * 10**12, "5,000.0 GB"),
    ],
)
def test_a_size_has_the_unit_that_suits_it(count: int, words: str) -> None:
    """Thousands of bytes are kB, and so on up to GB, which is the last."""
    assert size(count) == words


def test_one_second_is_singular() -> None:
    """A single one has no plural."""
    assert (relative(NOW - 1, NOW), relative(NOW + 2, NOW)) == ("1 second ago", "in 2 seconds")


def test_keys_become_text_as_their_values_do() -> None:
    """JSON takes text as a key only, and knows no tuples or dates."""
    value = {1: 2, None: 3, (1, "a"): 4, 2**70: 5}
    assert json.loads(json.dumps(plain(value))) == {"1": 2, "None": 3, "[1, 'a']": 4, hex(2**70): 5}


# Tables ---------------------------------------------------------------------------------------------------------------


def test_a_column_that_fills_late_is_shown() -> None:
    """With more rows than are looked at first, a column that has been empty so far may be needed later."""
    records = [make_record(number, tags=frozenset()) for number in range(600)]
    records.append(make_record(600, tags=frozenset({"late"})))
    head, *_, last = table(columns(NOW), iter(records), 10_000)
    assert "TAGS" in head
    assert "late" in last


def test_wide_characters_are_counted_as_two() -> None:
    """A table of East Asian names, or of ones with combining accents, is aligned and no wider than the terminal."""
    names = [
        "\u5c71\u7530" * 5,
        unicodedata.normalize("NFD", "\u00e9" * 12),
        "Ada",
    ]
    cells = [Column("USER", lambda record: str(record.user_id), narrowest=12), Column("X", lambda record: "x")]
    lines = list(table(cells, iter([make_record(number, user_id=name) for number, name in enumerate(names)]), 16))
    assert lines == [
        "USER" + " " * 11 + "X",
        "\u5c71\u7530" * 3 + "\u2026" + " " * 2 + "x",
        unicodedata.normalize("NFD", "\u00e9" * 12) + " " * 3 + "x",
        "Ada" + " " * 12 + "x",
    ]


def test_the_least_important_column_goes_first() -> None:
    """Where not all columns fit, ids are cut first; then SIZE is left out, and STATE and USER never are."""
    record = make_record(tags=frozenset())
    titles = {width: next(table(columns(NOW), iter([record]), width)).split() for width in (150, 100, 70, 40)}
    everything = ["ID", "STATE", "USER", "TENANT", "CREATED", "ACCESSED", "EXPIRES", "SIZE"]
    assert titles[150] == titles[100] == everything
    assert "SIZE" not in titles[70]
    assert titles[40][:3] == ["ID", "STATE", "USER"]
    assert next(iter(list(table(columns(NOW), iter([record]), 150))[1].split())) in (record.id, record.id[:12])


# Commands -------------------------------------------------------------------------------------------------------------


def test_list_of_all_in_reverse_is_in_order(make_app: Callable[..., Flask]) -> None:
    """``--reverse`` asks for an order, so that ``--limit 0`` has one too."""
    app, clock = make_app(), Clock()
    manager = app.extensions["persist_session"].manager
    manager.clock = clock
    clock.advance(100)
    ids = []
    for _ in range(5):
        clock.advance(-10)
        ids.append(manager.create().id)
    output = app.test_cli_runner().invoke(sessions_cli, ["list", "--limit", "0", "--reverse", "--json"]).output
    assert [json.loads(line)["id"] for line in output.splitlines()] == ids[::-1]


def test_list_heeds_a_timeout_that_was_shortened(make_app: Callable[..., Flask]) -> None:
    """What an absolute timeout has ended since it was shortened is listed as expired."""
    app = make_app(PERSIST_SESSION_ABSOLUTE_TIMEOUT=100)
    store = app.extensions["persist_session"].store
    SessionManager(store, clock=lambda: app.extensions["persist_session"].manager.clock() - 1000).create()
    output = app.test_cli_runner().invoke(sessions_cli, ["list", "--json"]).output
    assert json.loads(output)["state"] == "expired"


def test_a_question_names_a_few_users_and_counts_the_rest() -> None:
    """Who revokes many sessions is asked about five users by name, and told how many more there are."""
    records = [make_record(number, user_id=f"u{number}", tenant_id=None) for number in (0, 0, 1, 2, 3, 4, 5, 6)]
    assert _owners(records) == "user 'u0', user 'u1', user 'u2', user 'u3', user 'u4' and 2 others"
    assert _owners(records[:2]) == "user 'u0'"


def test_what_may_be_a_token_is_not_repeated() -> None:
    """An id that is none is told by its first 8 characters, and that it was cut."""
    manager = SessionManager(open_store("memory://"))
    with pytest.raises(SessionNotFound, match=r"^'3faTOKEN'… is no session id"):
        manager.look_up("3faTOKENsecret")
    with pytest.raises(SessionNotFound, match=r"^'3fa' is no session id"):
        manager.look_up("3fa")
