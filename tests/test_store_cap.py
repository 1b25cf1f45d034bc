"""``PERSIST_SESSION_MAX_SESSIONS``: a store keeps about so many sessions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask, session

from flask_persist_session import SessionLimitReached, SessionManager, SessionQuery, SessionStore, open_store
from flask_persist_session.stored import Owner
from tests.conftest import Clock
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]


@pytest.fixture
def manager(store: SessionStore, clock: Clock) -> SessionManager:
    """A manager that allows three sessions, on each store in turn."""
    return SessionManager(store, clock=clock, max_sessions=3)


def test_a_full_store_takes_no_new_session(manager: SessionManager) -> None:
    """The session beyond the limit is refused, naming the setting, and not stored."""
    for _ in range(3):
        manager.create({"a": 1})
    with pytest.raises(SessionLimitReached, match="PERSIST_SESSION_MAX_SESSIONS is 3") as caught:
        manager.create({"a": 1})
    assert caught.value.scope == "store"
    assert manager.store.count(SessionQuery()) == 3


def test_sessions_of_a_full_store_go_on(manager: SessionManager) -> None:
    """What exists can be changed, and its user can sign in and out: that makes no session more."""
    first, *_ = (manager.create({"a": 1}) for _ in range(3))
    first.data["b"] = 2
    assert manager.save(first) == "saved"
    bound = manager.bind(first, Owner("Ada"))
    assert bound is not None
    assert manager.restart(bound, {"c": 3}) is not None


def test_room_is_noticed_at_the_next_count(manager: SessionManager, clock: Clock) -> None:
    """After some were removed new ones are taken again, some time later."""
    first, *_ = (manager.create({"a": 1}) for _ in range(3))
    manager.store.delete(first.id)
    clock.advance(3600)  # counting is as rare as it takes long
    assert manager.create({"a": 1}).state == "active"


def test_sessions_of_other_processes_are_counted(store: SessionStore, clock: Clock) -> None:
    """What another manager created counts from the next count on."""
    manager, other = (SessionManager(store, clock=clock, max_sessions=3) for _ in range(2))
    manager.create({"a": 1})
    other.create({"a": 1})
    other.create({"a": 1})
    clock.advance(3600)  # counting is as rare as it takes long
    with pytest.raises(SessionLimitReached):
        manager.create({"a": 1})


def test_counting_is_rare(clock: Clock) -> None:
    """Within five seconds the store is counted once, and not at all without a limit."""
    store = CountingStore(open_store("memory://"))
    manager = SessionManager(store, clock=clock, max_sessions=1000)
    for _ in range(100):
        manager.create({"a": 1})
    SessionManager(store, clock=clock).create({"a": 1})
    assert store.operations["count"] == 1


def test_a_clock_set_back_does_not_keep_the_store_full(clock: Clock) -> None:
    """The store is counted again although the clock is before the last count."""
    manager = SessionManager(open_store("memory://"), clock=clock, max_sessions=1)
    manager.store.delete(manager.create({"a": 1}).id)
    clock.advance(-86400)
    assert manager.create({"a": 1}).state == "active"


def test_a_full_store_is_answered_with_503(make_app: MakeApp) -> None:
    """A visitor who would need a new session is asked to come back later; others are served."""
    app = make_app(PERSIST_SESSION_MAX_SESSIONS=1)
    app.add_url_rule("/put", view_func=lambda: str(session.setdefault("a", 1)))
    first, second = app.test_client(), app.test_client()
    assert first.get("/put").status_code == 200
    refused = second.get("/put")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert first.get("/put").status_code == 200
