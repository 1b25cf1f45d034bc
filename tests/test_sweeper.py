"""The background cleanup: who does it, when, what it tells, and what does not stop it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, session

from flask_persist_session import SessionManager, SessionQuery, SessionStore, open_store
from flask_persist_session.signals import session_expired, sessions_cleaned_up
from flask_persist_session.sweeper import Sweeper
from tests.conftest import Clock
from tests.servers import wait_until

MakeApp = Callable[..., Flask]


@pytest.fixture
def manager(store: SessionStore, clock: Clock) -> SessionManager:
    return SessionManager(store, clock=clock)


@pytest.fixture
def sweeper(manager: SessionManager) -> Iterator[Sweeper]:
    made = Sweeper({"web": manager}, 0.01)
    yield made
    made.stop()


def expire(manager: SessionManager, clock: Clock, count: int) -> None:
    """Leave so many expired sessions in the store, one of which has been there long enough for a cleanup."""
    for _ in range(count):
        manager.create({"a": 1}, user_id="Ada")
    clock.advance(32 * 86400)


def test_a_sweep_removes_what_has_expired(manager: SessionManager, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """What has expired goes, what is active stays, and one line in the log says how many."""
    expire(manager, clock, 3)
    active = manager.create()
    caplog.set_level(logging.INFO)
    assert Sweeper({"web": manager}, 600).sweep() is True
    assert [record.id for record in manager.store.scan()] == [active.id]
    [line] = [entry.getMessage() for entry in caplog.records]
    assert "3 expired, 0 ended" in line
    assert [(entry.name, entry.levelname) for entry in caplog.records] == [("flask_persist_session", "INFO")]


def test_one_of_all_processes_sweeps(shared_url: str, clock: Clock) -> None:
    """While one holds the lease, nobody else cleans up."""
    first, second = (SessionManager(open_store(shared_url), clock=clock) for _ in range(2))
    expire(first, clock, 1)
    assert Sweeper({"web": first}, 600).sweep() is True
    expire(first, clock, 1)
    assert Sweeper({"web": second}, 600).sweep() is False
    assert first.store.count(SessionQuery()) == 1
    for manager in (first, second):
        manager.store.close()


def test_each_expired_session_is_told_once(manager: SessionManager, clock: Clock) -> None:
    """One event for each session that expired, then one with the counts; a second sweep tells of none."""
    heard: list[Any] = []

    def hear(_sender: object, event: Any) -> None:
        heard.append(event)

    expire(manager, clock, 3)
    ids = {record.id for record in manager.store.scan()}
    with session_expired.connected_to(hear), sessions_cleaned_up.connected_to(hear):
        for _ in range(2):
            Sweeper({"web": manager}, 600).sweep()
    assert {event.session_id for event in heard[:3]} == ids
    assert [(event.expired, event.ended, event.idle) for event in heard[3:]] == [(3, 0, 0), (0, 0, 0)]


def test_a_failing_receiver_stops_nothing(manager: SessionManager, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """What a receiver raises in the background is logged, and every session is removed all the same."""

    def fail(_sender: object, event: Any) -> None:
        raise ZeroDivisionError("in a receiver")

    expire(manager, clock, 3)
    with session_expired.connected_to(fail):
        assert Sweeper({"web": manager}, 600).sweep() is True
    assert manager.stats().total == 0
    assert sum("receiver" in entry.getMessage() for entry in caplog.records) == 3


def test_the_thread_goes_on_after_an_error(sweeper: Sweeper, manager: SessionManager, clock: Clock) -> None:
    """A store that fails for a while is swept once it is back."""
    expire(manager, clock, 1)
    failures = []
    find = manager.store.find

    def failing(query: SessionQuery) -> Any:
        if len(failures) < 3:
            failures.append(query)
            raise ZeroDivisionError("switched off")
        return find(query)

    manager.store.find = failing  # type: ignore[method-assign]
    sweeper.start()
    wait_until(lambda: manager.stats().total == 0, "the sweep after three failures")
    assert len(failures) == 3


def test_a_clock_that_was_set_ends_nothing(manager: SessionManager, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A clock that leaps forward removes nothing at the next run; if it leaps back, nothing was lost."""
    sweeper = Sweeper({"web": manager}, 600)
    session_ = manager.create({"a": 1})
    clock.advance(10 * 365 * 86400)
    assert sweeper.sweep() is False
    assert "the clock was set" in caplog.text
    clock.advance(-10 * 365 * 86400)
    assert sweeper.sweep() is False
    assert sweeper.sweep() is True
    assert manager.get(session_.id) is not None


def test_a_clock_that_stays_is_believed(manager: SessionManager, clock: Clock) -> None:
    """A run later the new time is taken for granted."""
    sweeper = Sweeper({"web": manager}, 600)
    manager.create()
    clock.advance(40 * 86400)
    assert sweeper.sweep() is False
    assert sweeper.sweep() is True
    assert manager.stats().total == 0


def test_the_first_request_starts_it(make_app: MakeApp) -> None:
    """There is no thread before the first request, one afterwards, and none with an interval of 0."""
    for interval, threads in ((600, 1), (0, 0)):
        app = make_app(PERSIST_SESSION_CLEANUP_INTERVAL=interval)
        app.add_url_rule("/", view_func=lambda: str(len(session)))
        before = sweepers()
        app.test_client().get("/")
        app.test_client().get("/")
        assert len(set(sweepers()) - set(before)) == threads
        if sweeper := app.extensions["persist_session"].sweeper:
            sweeper.stop()


def sweepers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "session-sweeper"]


def test_a_forked_process_has_a_thread_of_its_own(sweeper: Sweeper) -> None:
    """After a fork the next request starts the thread again."""
    sweeper.start()
    child = os.fork()
    if child == 0:
        started = sweeper.running
        sweeper.start()
        os._exit(0 if not started and sweeper.running else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_stopped_one_stays_stopped(sweeper: Sweeper) -> None:
    """After ``stop`` the thread ends, and no request starts another."""
    before = set(sweepers())
    sweeper.start()
    sweeper.stop()
    wait_until(lambda: set(sweepers()) <= before, "the end of the thread")
    sweeper.start()
    assert set(sweepers()) <= before
