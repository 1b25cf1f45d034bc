"""What attacks and reviews found, each so that it does not come back: clocks, lost answers, moving sessions, caps, ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, session
from flask.testing import FlaskClient

from flask_persist_session import (
    SerializationError,
    SessionConflict,
    SessionLimitReached,
    SessionManager,
    SessionQuery,
    SessionRecord,
    SessionStore,
    SessionTooLarge,
    StoreUnavailable,
    UnsupportedByStore,
    open_store,
    session_deleted,
    session_ended,
    session_regenerated,
)
from flask_persist_session.stored import NOBODY, Owner
from tests.conftest import Clock

MakeApp = Callable[..., Flask]
YEAR = 365 * 86400.0


@pytest.fixture
def manager(clock: Clock) -> SessionManager:
    return SessionManager(open_store("memory://"), clock=clock, user_key="user_id")


def active(manager: SessionManager, user: str = "Ada") -> list[str]:
    return sorted(record.id for record in manager.find(user_id=user, state="active"))


# Clocks ---------------------------------------------------------------------------------------------------------------


def test_a_clock_that_was_ahead_makes_no_browser_immortal(make_app: MakeApp, clock: Clock) -> None:
    """After a session was stored by a clock a year ahead, reading it with the right one gives it its right expiry."""
    app = make_app(PERSIST_SESSION_IDLE_TIMEOUT="1h")
    app.extensions["persist_session"].manager.clock = clock
    app.add_url_rule("/set", "set", lambda: str(session.setdefault("a", 1)))
    app.add_url_rule("/get", "get", lambda: str(session.get("a")))
    client = app.test_client()
    clock.advance(YEAR)
    client.get("/set")
    clock.advance(-YEAR)
    assert client.get("/get").text == "1"
    clock.advance(2 * 3600)
    assert client.get("/get").text == "None"


def test_a_session_of_a_clock_ahead_does_not_keep_newer_ones_out(clock: Clock) -> None:
    """Of a user's sessions the one that claims to begin in two hours counts as the oldest, and goes first."""
    manager = SessionManager(open_store("memory://"), clock=clock, max_per_user=2)
    clock.advance(7200)
    manager.create({}, user_id="Ada")
    clock.advance(-7200)
    later = [manager.create({}, user_id="Ada").id]
    clock.advance(1)
    later.append(manager.create({}, user_id="Ada").id)
    assert active(manager) == sorted(later)


def test_what_a_wrong_clock_takes_for_expired_can_be_revoked(manager: SessionManager, clock: Clock) -> None:
    """A session revoked while the clock was ahead stays revoked once it is right; it did not count as active."""
    created = manager.create({"a": 1})
    clock.advance(YEAR)
    assert manager.revoke(created.id) is False
    clock.advance(-YEAR)
    assert manager.get(created.id) is None


# Answers that are lost ------------------------------------------------------------------------------------------------


class Resending:
    """Makes a store behave like a driver that lost the answer to its next save and sent it once more."""

    def __init__(self, store: SessionStore) -> None:
        self._store, self._save = store, store.save

    def next_ending(self) -> None:
        def save_twice(record: SessionRecord, *, expected: int) -> None:
            self._save(record, expected=expected)
            if record.ended_at is not None:
                self._store.save = self._save  # type: ignore[method-assign]
                self._save(record, expected=expected)

        self._store.save = save_twice  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("act", "signal"),
    [
        (lambda manager, created: manager.regenerate(created) is not None, session_regenerated),
        (lambda manager, created: manager.restart(created, {"b": 1}) is not None, session_ended),
        (lambda manager, created: manager.flush(created) == "deleted", session_deleted),
        (lambda manager, created: manager.end(created.id), session_ended),
        (lambda manager, created: manager.delete(created.id), session_deleted),
    ],
    ids=["regenerate", "restart", "flush", "end", "delete"],
)
def test_an_ending_whose_answer_was_lost_is_an_ending(
    manager: SessionManager, act: Callable[[SessionManager, Any], bool], signal: Any
) -> None:
    """Sent once more it meets its own record: it has succeeded, and is told of once."""
    created, told = manager.create({"a": 1}), []

    def hear(_sender: object, event: Any) -> None:
        told.append(event)

    Resending(manager.store).next_ending()
    with signal.connected_to(hear):
        assert act(manager, created)
    assert len(told) == 1


# Sessions that move ---------------------------------------------------------------------------------------------------


def move_between_ids_and_records(manager: SessionManager, times: int) -> None:
    """Let the next listings take the ids of what is there, and read the records after each session has moved on."""
    store, find = manager.store, manager.store.find
    left = iter(range(times))

    def slow_find(query: SessionQuery) -> Iterator[SessionRecord]:
        ids = [record.id for record in store.scan()]
        if next(left, None) is not None:
            for session_id in ids:
                moving = manager.get(session_id)
                if moving is not None:
                    manager.regenerate(moving)
            return iter([record for name in ids if query.matches(record := store.get(name))])  # type: ignore[arg-type]
        return find(query)

    store.find = slow_find  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "revoke",
    [lambda manager: manager.revoke_user("Ada"), lambda manager: manager.revoke_all()],
    ids=["revoke_user", "revoke_all"],
)
def test_a_session_that_moves_while_it_is_listed_is_revoked(
    manager: SessionManager, revoke: Callable[[SessionManager], int]
) -> None:
    """A listing that meets only what a session was before it moved is no proof that there is none."""
    manager.create({"a": 1}, user_id="Ada")
    move_between_ids_and_records(manager, 3)
    assert revoke(manager) == 1
    assert active(manager) == []


def test_sessions_that_never_stop_moving_are_told(manager: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking again is bounded: whoever revokes learns that it could not be done."""
    monkeypatch.setattr("flask_persist_session.revoking.ATTEMPTS", 3)
    manager.create({"a": 1}, user_id="Ada")
    move_between_ids_and_records(manager, 10)
    with pytest.raises(SessionConflict, match="moved to new tokens 3 times"):
        manager.revoke_user("Ada")


def test_revoking_others_stays_within_the_tenant(manager: SessionManager) -> None:
    """All others of the same user and tenant end; this one, other tenants and other users stay."""
    here, there = (manager.create({}, user_id="Ada", tenant_id="a") for _ in range(2))
    others = [manager.create({}, user_id="Ada", tenant_id=tenant).id for tenant in ("b", None)]
    assert manager.revoke_others(here) == 1
    assert active(manager) == sorted([here.id, *others])
    nobodys = manager.create({}, user_id="Ada")
    assert manager.revoke_others(nobodys) == 1
    assert active(manager) == sorted([here.id, others[0], nobodys.id])
    assert manager.get(there.id) is None
    with pytest.raises(ValueError, match="nobody's"):
        manager.revoke_others(manager.create({}))


@pytest.mark.parametrize("owner", [Owner("Ada", "second"), Owner("Bob")], ids=["tenant", "user"])
def test_a_late_change_of_a_users_session_does_not_survive_sign_out(manager: SessionManager, owner: Owner) -> None:
    """Another tenant or user, bound by a request that was under way while the user signed out, comes to nothing."""
    created = manager.create({"private": 1}, user_id="Ada")
    slow = manager.get(created.id)
    assert slow is not None
    assert manager.bind(created, NOBODY) is not None
    assert manager.bind(slow, owner) is None
    assert active(manager) == active(manager, "Bob") == []


# Caps -----------------------------------------------------------------------------------------------------------------


def test_a_lower_cap_ends_nothing_by_refusing(clock: Clock) -> None:
    """With ``reject`` a sign-in beyond a cap that was lowered is refused, and the sessions that were there stay."""
    store = open_store("memory://")
    before = SessionManager(store, clock=clock)
    ids = []
    for _ in range(5):
        ids.append(before.create({}, user_id="Ada").id)
        clock.advance(1)
    manager = SessionManager(store, clock=clock, max_per_user=2, cap_policy="reject")
    with pytest.raises(SessionLimitReached):
        manager.create({}, user_id="Ada")
    assert active(manager) == sorted(ids)


@pytest.mark.parametrize("policy", ["reject", "evict_oldest"])
def test_a_new_token_takes_nobodys_place(clock: Clock, policy: Any) -> None:
    """A session that is regenerated is neither refused nor evicted, and evicts none, however full the cap is."""
    manager = SessionManager(open_store("memory://"), clock=clock, max_per_user=2, cap_policy=policy)
    first, second = (manager.create({}, user_id="Ada") for _ in range(2))
    moved = manager.regenerate(first)
    assert moved is not None
    assert active(manager) == sorted([moved.id, second.id])


def test_sessions_beyond_the_absolute_timeout_hold_no_place(clock: Clock) -> None:
    """After the timeout was shortened, sessions that are too old are neither listed as active nor counted by the cap."""
    store = open_store("memory://")
    SessionManager(store, clock=clock).create({}, user_id="Ada")
    clock.advance(7200)
    manager = SessionManager(
        store, clock=clock, max_per_user=1, cap_policy="reject", absolute_timeout=3600, idle_timeout=lambda: 86400.0
    )
    assert active(manager) == []
    created = manager.create({}, user_id="Ada")
    assert active(manager) == [created.id]


def test_a_creation_that_cannot_be_admitted_leaves_nothing(clock: Clock) -> None:
    """When the store fails while the user's sessions are counted, the new one is taken back."""
    store = open_store("memory://")
    manager = SessionManager(store, clock=clock, max_per_user=1, cap_policy="reject")

    def fail(query: SessionQuery) -> Iterator[SessionRecord]:
        raise StoreUnavailable("gone for a moment")

    find, store.find = store.find, fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable):
        manager.create({}, user_id="Ada")
    store.find = find  # type: ignore[method-assign]
    assert store.count(SessionQuery()) == 0


def test_what_was_not_stored_does_not_fill_the_store(clock: Clock) -> None:
    """Sessions that are refused for their size do not count towards the limit of the store."""
    manager = SessionManager(open_store("memory://"), clock=clock, max_sessions=2, max_bytes=100)
    for _ in range(5):
        with pytest.raises(SessionTooLarge):
            manager.create({"a": "x" * 200})
    assert manager.create({"a": 1}).state == "active"


@pytest.mark.parametrize("cap", [{"max_per_user": 1}, {"max_sessions": 1}], ids=str)
def test_a_manager_with_a_cap_needs_a_store_that_lists(cap: dict[str, Any]) -> None:
    """A manager made by hand tells at once that its store cannot hold a cap."""

    class Unlisted(type(open_store("memory://"))):  # type: ignore[misc]
        def scan(self) -> Iterator[SessionRecord]:
            raise UnsupportedByStore("no listing here")

    with pytest.raises(UnsupportedByStore, match="no listing here"):
        SessionManager(Unlisted(), **cap)


# Signing out ----------------------------------------------------------------------------------------------------------


def test_unbinding_takes_the_user_out_of_the_data(make_app: MakeApp) -> None:
    """``session.unbind()`` leaves no user behind under the user key, so nobody stays signed in whom no list shows."""
    app = make_app(PERSIST_SESSION_USER_KEY="user_id")
    app.add_url_rule("/in", "in", lambda: session.update(user_id="Ada", cart=1) or "")
    app.add_url_rule("/out", "out", lambda: session.unbind() or "")  # type: ignore[attr-defined]
    app.add_url_rule("/keys", "keys", lambda: " ".join(session))
    client = app.test_client()
    client.get("/in")
    client.get("/out")
    assert client.get("/keys").text == "cart"


@pytest.fixture
def forgetful(make_app: MakeApp) -> FlaskClient:
    """A browser of an application that forgets ended sessions at once."""
    app = make_app(PERSIST_SESSION_KEEP_ENDED=0)
    app.add_url_rule("/add/<key>", "add", lambda key: str(session.setdefault(key, 1)))
    app.add_url_rule("/clear", "clear", lambda: str(session.clear()))
    return app.test_client()


def test_a_signed_out_token_is_known_for_the_grace_in_any_case(forgetful: FlaskClient) -> None:
    """Although nothing is to be kept, a late request under the signed-out token starts no session."""
    forgetful.get("/add/a")
    late = forgetful.application.test_client()
    late.set_cookie("session", forgetful.get_cookie("session").value)  # type: ignore[union-attr]
    forgetful.get("/clear")
    assert "Set-Cookie" not in late.get("/add/b").headers


def test_a_bound_session_may_be_empty(make_app: MakeApp) -> None:
    """A session whose user is bound by hand is not signed out when its last value is taken."""
    app = make_app()
    app.add_url_rule("/in", "in", lambda: session.bind("Ada") or session.update(note=1) or "")  # type: ignore[attr-defined]
    app.add_url_rule("/take", "take", lambda: str(session.pop("note", None)))
    app.add_url_rule("/who", "who", lambda: str(session.user_id))  # type: ignore[attr-defined]
    client = app.test_client()
    client.get("/in")
    client.get("/take")
    assert client.get("/who").text == "Ada"


# Ids and lifetimes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [True, [1], "", 1.5, "x" * 513, "nul\0"], ids=repr)
def test_no_session_is_created_for_what_is_no_id(manager: SessionManager, user: Any) -> None:
    """``create`` refuses the same users as ``bind`` and ``revoke_user`` do."""
    with pytest.raises(ValueError, match="id"):
        manager.create({}, user_id=user)
    assert manager.stats().total == 0


@pytest.mark.parametrize("user", ["x" * 513, "nul\0"], ids=["long", "nul"])
def test_a_user_that_no_store_keeps_is_named_by_its_key(make_app: MakeApp, user: str) -> None:
    """An id under the user key that cannot be stored is an error that names the key, as for a list or truth value."""
    app = make_app(PERSIST_SESSION_USER_KEY="user_id")
    with app.test_request_context():
        app.preprocess_request()
        session["user_id"] = user
        with pytest.raises(SerializationError, match=r"session\['user_id'\].*512"):
            session.save()  # type: ignore[attr-defined]


@pytest.mark.parametrize("lifetime", [-5, 0, "soon", True, 1e12], ids=repr)
def test_a_lifetime_in_the_metadata_is_checked(manager: SessionManager, lifetime: Any) -> None:
    """What ``lifetime=`` refuses is refused in the metadata too, where it is kept."""
    with pytest.raises(ValueError, match="lifetime"):
        manager.create({}, metadata={"lifetime": lifetime})
