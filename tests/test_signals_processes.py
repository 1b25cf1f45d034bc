"""Events over several processes: each happening is told once, by the one process in which it happened, in order."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session

import flask_persist_session
from flask_persist_session import PersistSession, SessionManager, StoredSession, open_store
from tests.conftest import TickingClock
from tests.order_app import ACTS
from tests.servers import DEADLINE
from tests.web import PROCESSES

WORKERS = 3
CAP = 2
SIGNALS = [name for name in flask_persist_session.__all__ if name.startswith(("session_", "sessions_"))]


# The workers ----------------------------------------------------------------------------------------------------------


class Worker:
    """What one process does on command; each event it gets becomes a line of *log*."""

    def __init__(self, url: str, log: Path, cap: int) -> None:
        self._app = Flask("tested")
        self._app.config.update(
            SECRET_KEY="for tests only",
            PERSIST_SESSION_STORE=url,
            PERSIST_SESSION_USER_KEY="user_id",
            PERSIST_SESSION_MAX_PER_USER=cap,
            PERSIST_SESSION_CLEANUP_INTERVAL=0,
        )
        PersistSession(self._app)
        self._app.add_url_rule("/<act>", view_func=self._view)
        self._manager: SessionManager = self._app.extensions["persist_session"].manager
        self._manager.clock = self._clock = TickingClock()
        self._loaded: StoredSession | None = None
        # One write appends one line, whole, whoever else writes.
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for name in SIGNALS:
            getattr(flask_persist_session, name).connect(self._receiver(name), self._app, weak=False)

    def _receiver(self, name: str) -> Callable[..., None]:
        def receive(sender: object, event: Any) -> None:
            line = {"signal": name, "pid": os.getpid(), **asdict(event)}
            os.write(self._log, json.dumps(line).encode() + b"\n")

        return receive

    def _view(self, act: str) -> str:
        ACTS[act]()
        return str(session.id)  # type: ignore[attr-defined]

    def visit(self, act: str, cookie: str | None = None) -> str | None:
        """A request with a cookie; the browser's cookie afterwards."""
        client = self._app.test_client()
        if cookie is not None:
            client.set_cookie("session", cookie)
        assert client.get(f"/{act}").status_code == 200
        kept = client.get_cookie("session")
        return kept.value if kept else None

    def id_of(self, cookie: str) -> str:
        client = self._app.test_client()
        client.set_cookie("session", cookie)
        return client.get("/nothing").text

    def sign_in_often(self, number: int) -> None:
        for _ in range(number):
            self.visit("sign in")

    def load(self, session_id: str) -> None:
        self._loaded = self._manager.get(session_id)

    def change_loaded(self) -> None:
        assert self._loaded is not None
        self._loaded.data["changed by"] = os.getpid()
        self._manager.save(self._loaded)

    def revoke(self, *ids: str) -> None:
        for session_id in ids:
            self._manager.revoke(session_id)

    def delete(self, *ids: str) -> None:
        for session_id in ids:
            self._manager.delete(session_id)

    def cleanup(self) -> None:
        self._manager.cleanup()

    def advance(self, seconds: float) -> None:
        self._clock.advance(seconds)


def work(url: str, log: Path, cap: int, together: Barrier, commands: Connection) -> None:
    """A process that obeys until it is told to stop."""
    worker = Worker(url, log, cap)
    while (command := commands.recv()) is not None:
        name, at_once, arguments = command
        if at_once:
            together.wait(DEADLINE)
        commands.send(getattr(worker, name)(*arguments))


class Team:
    """Several workers on one store; commands go to one after the other, or to all at once."""

    def __init__(self, url: str, log: Path, cap: int) -> None:
        self._together = PROCESSES.Barrier(WORKERS)  # it goes with its last reference here
        pipes = [PROCESSES.Pipe() for _ in range(WORKERS)]
        self._log, self._read = log, 0
        self._commands = [ours for ours, _ in pipes]
        self._processes = [
            PROCESSES.Process(target=work, args=(url, log, cap, self._together, theirs)) for _, theirs in pipes
        ]
        self._next = 0
        for process in self._processes:
            process.start()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def tell(self, number: int, name: str, *arguments: Any) -> Any:
        """The answer of one worker."""
        self._commands[number].send((name, False, arguments))
        return self._answer(self._commands[number])

    def next(self, name: str, *arguments: Any) -> Any:
        """The answer of the worker whose turn it is."""
        self._next = (self._next + 1) % WORKERS
        return self.tell(self._next, name, *arguments)

    def all_at_once(self, name: str, *arguments: Any) -> list[Any]:
        """The answers of all workers, who begin together."""
        for commands in self._commands:
            commands.send((name, True, arguments))
        return [self._answer(commands) for commands in self._commands]

    def _answer(self, commands: Connection) -> Any:
        assert commands.poll(DEADLINE)
        return commands.recv()

    def events(self) -> list[dict[str, Any]]:
        """What was told since this was asked last."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        new, self._read = lines[self._read :], len(lines)
        return [json.loads(line) for line in new]

    def told(self) -> list[str]:
        """The signals of these events in their order, without "session_" and with the reason if there is one."""
        return [
            event["signal"].removeprefix("session_") + (f" {event['reason']}" if event.get("reason") else "")
            for event in self.events()
        ]


@pytest.fixture
def team(shared_url: str, tmp_path: Path) -> Iterator[Team]:
    team = Team(shared_url, tmp_path / "events", CAP)
    yield team
    team.stop()


@pytest.fixture
def uncapped_team(shared_url: str, tmp_path: Path) -> Iterator[Team]:
    team = Team(shared_url, tmp_path / "events", 0)
    yield team
    team.stop()


def counted(events: list[dict[str, Any]], signal: str, **fields: str) -> Counter[str]:
    """How often a signal was sent for each session."""
    chosen = [event for event in events if event["signal"] == signal and fields.items() <= event.items()]
    return Counter(event["session_id"] for event in chosen)


# One thing after the other --------------------------------------------------------------------------------------------


def test_each_happening_is_told_once_and_in_order(team: Team, tmp_path: Path) -> None:
    """The life of some sessions, each step in another process than the one before, told as the documentation says."""
    first = team.next("visit", "write")
    assert team.told() == ["created"]
    team.next("visit", "write the same", first)
    assert team.told() == ["saved"]
    team.next("visit", "read", first)
    team.next("visit", "write the same", first)
    assert team.told() == []
    first = team.next("visit", "sign in", first)
    assert team.told() == ["regenerated", "bound"]
    first = team.next("visit", "regenerate", first)
    assert team.told() == ["regenerated"]
    first = team.next("visit", "sign in as another", first)
    assert team.told() == ["regenerated", "bound"]
    first = team.next("visit", "sign out", first)
    assert team.told() == ["regenerated", "unbound"]
    first = team.next("visit", "sign in after clearing", first)
    assert team.told() == ["ended regenerated", "created", "bound"]

    cookies = [first]
    for expected in ([], ["ended evicted"]):
        for number in range(WORKERS):
            team.tell(number, "advance", 1)
        cookies.append(team.next("visit", "write"))
        assert team.told() == ["created"]
        cookies[-1] = team.next("visit", "sign in", cookies[-1])
        assert team.told() == ["regenerated", "bound", *expected]
    team.next("visit", "read", first)
    assert team.told() == []

    member = team.next("id_of", cookies[1])
    team.next("revoke", member)
    assert team.told() == ["ended revoked"]
    team.next("revoke", member)
    assert team.told() == []
    team.next("visit", "clear", cookies[2])
    assert team.told() == ["deleted"]

    fourth = team.next("visit", "write")
    cookies.append(fourth)
    shared = team.next("id_of", fourth)
    team.told()
    team.tell(0, "load", shared)
    team.tell(1, "load", shared)
    team.tell(1, "change_loaded")
    assert team.told() == ["saved"]
    team.tell(0, "change_loaded")
    assert team.told() == ["conflict", "saved"]
    team.tell(1, "load", shared)
    team.tell(2, "revoke", shared)
    assert team.told() == ["ended revoked"]
    team.tell(1, "change_loaded")
    assert team.told() == ["conflict", "discarded revoked"]

    cookies.append(team.next("visit", "write"))
    team.next("delete", team.next("id_of", cookies[-1]))
    assert team.told() == ["created", "deleted"]
    cookies.append(team.next("visit", "write"))
    assert team.told() == ["created"]
    for number in range(WORKERS):
        team.tell(number, "advance", 400 * 86400)
    team.next("cleanup")
    assert team.told() == ["expired", "sessions_cleaned_up"]
    team.next("cleanup")
    assert team.told() == ["sessions_cleaned_up"]

    log = (tmp_path / "events").read_text()
    assert len({json.loads(line)["pid"] for line in log.splitlines()}) == WORKERS
    tokens = [cookie.partition(".")[0] for cookie in cookies if cookie]
    assert not [secret for secret in (*tokens, "late", "cart", "apple", "changed by") if secret in log]


# All at once ----------------------------------------------------------------------------------------------------------


def test_each_evicted_session_is_told_of_once(team: Team, shared_url: str) -> None:
    """Thirty sign-ins of one user in three processes at once: all but as many as are allowed end, each with one event."""
    team.all_at_once("sign_in_often", 10)
    events = team.events()
    created, bound = counted(events, "session_created"), counted(events, "session_bound", user_id="Ada")
    ended = counted(events, "session_ended", reason="evicted", user_id="Ada")
    assert created == bound
    assert set(created.values()) == set(ended.values()) == {1}
    assert (len(created), len(ended), len(events)) == (30, 30 - CAP, 90 - CAP)
    store = open_store(shared_url)
    assert {record.id for record in store.scan() if record.ended_at is None} == created.keys() - ended.keys()
    store.close()


def test_each_expired_session_is_told_of_once(team: Team, shared_url: str) -> None:
    """Three processes that clean up at once tell of each expired session once, and of their shares at the end."""
    store = open_store(shared_url)
    manager = SessionManager(store, clock=TickingClock(0.0))
    ids = {manager.create({"number": number}).id for number in range(300)}
    store.close()
    team.all_at_once("cleanup")
    events = team.events()
    assert counted(events, "session_expired") == Counter(ids)
    shares = [event["expired"] for event in events if event["signal"] == "sessions_cleaned_up"]
    assert (len(shares), sum(shares), len(events)) == (WORKERS, 300, 300 + WORKERS)


@pytest.mark.parametrize(("command", "signal"), [("revoke", "session_ended"), ("delete", "session_deleted")])
def test_what_all_end_is_told_of_once(team: Team, shared_url: str, command: str, signal: str) -> None:
    """Three processes that revoke or delete the same sessions at once: one event for each."""
    store = open_store(shared_url)
    manager = SessionManager(store, clock=TickingClock())
    ids = [manager.create({"number": number}).id for number in range(20)]
    store.close()
    team.all_at_once(command, *ids)
    events = team.events()
    assert (counted(events, signal), len(events)) == (Counter(ids), 20)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("regenerate", {"session_regenerated": 1}),
        ("sign in", {"session_regenerated": 1, "session_created": 2, "session_bound": 3}),
        ("sign out", {"session_regenerated": 1, "session_unbound": 1}),
        ("clear", {"session_deleted": 1}),
        ("clear with a farewell", {"session_ended": 1, "session_created": 1}),
    ],
)
def test_what_all_do_to_one_session_is_told_of_once(uncapped_team: Team, act: str, expected: dict[str, int]) -> None:
    """The same request in three processes at once happens once; what the others wanted is dropped, and told as that."""
    team = uncapped_team
    for _ in range(5):
        cookie = team.next("visit", "sign in as another" if act == "sign out" else "write the same")
        cookie = team.next("visit", "write the same", cookie)
        if act == "sign out":
            cookie = team.next("visit", "sign in", cookie)
        team.events()
        team.all_at_once("visit", act, cookie)
        told = Counter(event["signal"] for event in team.events())
        assert {signal: number for signal, number in told.items() if signal != "session_discarded"} == expected
        assert told["session_discarded"] < WORKERS
