"""Promises of users, caps, events and devices that the other tests take for granted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Thread
from time import sleep
from typing import Any
from uuid import UUID

import pytest
from flask import Flask, session

import flask_persist_session
from flask_persist_session import (
    Change,
    Deletion,
    SerializationError,
    Session,
    SessionBound,
    SessionConflicted,
    SessionCreated,
    SessionDeleted,
    SessionEnded,
    SessionExpired,
    SessionLimitReached,
    SessionManager,
    SessionQuery,
    SessionRecord,
    SessionRegenerated,
    SessionsCleanedUp,
    SessionStore,
    SessionUnbound,
    StoreUnavailable,
    open_store,
    session_expired,
    sessions_cleaned_up,
)
from flask_persist_session.stored import NOBODY, Owner
from flask_persist_session.sweeper import Sweeper
from tests.conftest import Clock
from tests.counting import CountingStore

Act = Callable[[Session], object]
SIGNALS = [name for name in flask_persist_session.__all__ if name.startswith(("session_", "sessions_"))]


@pytest.fixture
def memory() -> SessionStore:
    return open_store("memory://")


@pytest.fixture
def manager(memory: SessionStore, clock: Clock) -> SessionManager:
    return SessionManager(memory, clock=clock)


@contextmanager
def all_signals(sender: object, heard: list[Any]) -> Iterator[None]:
    """The events of *sender* go to *heard*, in order."""

    def hear(_sender: object, event: Any) -> None:
        heard.append(event)

    with ExitStack() as stack:
        for name in SIGNALS:
            stack.enter_context(getattr(flask_persist_session, name).connected_to(hear, sender))
        yield


@pytest.fixture
def events(manager: SessionManager) -> Iterator[list[Any]]:
    """The events of the manager."""
    heard: list[Any] = []
    with all_signals(manager, heard):
        yield heard


# Owners ---------------------------------------------------------------------------------------------------------------


def test_ids_of_users_and_tenants_are_text() -> None:
    """Whole numbers and UUIDs become text, of the tenant as of the user."""
    number = UUID(int=7)
    assert Owner.of(7, 8) == Owner("7", "8")
    assert Owner.of(number, number) == Owner(str(number), str(number))


@pytest.mark.parametrize("wrong", [True, 1.5, b"Ada", ["Ada"], ("Ada",), {"Ada": 1}, {"Ada"}, frozenset({"Ada"})])
def test_what_is_no_id_is_refused(wrong: object) -> None:
    """Neither a user nor a tenant has an id whose text is the same for many or differs from time to time."""
    with pytest.raises(ValueError, match="is no id of a user or tenant"):
        Owner.of(wrong)
    with pytest.raises(ValueError, match="is no id of a user or tenant"):
        Owner.of("Ada", wrong)


# Caps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [Owner("Ada"), Owner("Ada", "acme")])
def test_a_session_that_moves_is_not_refused(memory: SessionStore, owner: Owner) -> None:
    """With the policy ``reject`` a user who is at the cap goes on under a new token: the old one does not count."""
    manager = SessionManager(memory, max_per_user=1, cap_policy="reject")
    session = manager.create({"a": 1}, user_id=owner.user_id, tenant_id=owner.tenant_id)
    bound = manager.bind(session, owner)
    assert bound is not None
    moved = manager.regenerate(bound)
    assert moved is not None
    restarted = manager.restart(moved, {"a": 2}, owner)
    assert restarted is not None
    assert [record.id for record in manager.find(user_id="Ada", state="active")] == [restarted.id]


def test_a_refused_session_is_not_stored(memory: SessionStore) -> None:
    """With the policy ``reject`` ``create`` beyond the cap leaves no session behind, and tells nobody of one."""
    manager = SessionManager(memory, max_per_user=1, cap_policy="reject")
    first = manager.create(user_id="Ada")
    told: list[object] = []
    with all_signals(manager, told), pytest.raises(SessionLimitReached):
        manager.create(user_id="Ada")
    assert ([record.id for record in memory.scan()], told) == ([first.id], [])


# Events ---------------------------------------------------------------------------------------------------------------


def test_events_say_whose_session_it_is(manager: SessionManager, clock: Clock, events: list[Any]) -> None:
    """Each event carries the id, user and tenant that its documentation names."""
    created = manager.create({"a": 1}, user_id="Ada", tenant_id="acme")
    assert events == [
        SessionCreated(session_id=created.id, user_id="Ada", tenant_id="acme"),
        SessionBound(session_id=created.id, user_id="Ada", tenant_id="acme"),
    ]
    events.clear()
    elsewhere = manager.bind(created, Owner("Ada", "other"))
    assert elsewhere is not None
    assert events == [
        SessionRegenerated(session_id=elsewhere.id, old_id=created.id),
        SessionBound(session_id=elsewhere.id, user_id="Ada", tenant_id="other"),
    ]
    events.clear()
    left = manager.bind(elsewhere, NOBODY)
    assert left is not None
    assert events == [
        SessionRegenerated(session_id=left.id, old_id=elsewhere.id),
        SessionUnbound(session_id=left.id, user_id="Ada", tenant_id="other"),
    ]


def test_a_new_session_is_told_before_those_that_it_ends(
    memory: SessionStore, clock: Clock, events: list[Any], manager: SessionManager
) -> None:
    """``session_created`` and ``session_bound`` come first, then ``session_ended`` of what exceeds the cap."""
    capped = SessionManager(memory, clock=clock, max_per_user=1, sender=manager)
    first = capped.create(user_id="Ada")
    clock.advance(1)
    events.clear()
    second = capped.create(user_id="Ada")
    assert events == [
        SessionCreated(session_id=second.id, user_id="Ada", tenant_id=None),
        SessionBound(session_id=second.id, user_id="Ada", tenant_id=None),
        SessionEnded(session_id=first.id, user_id="Ada", reason="evicted"),
    ]


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (SessionManager.revoke, lambda session_id: SessionEnded(session_id=session_id, user_id="Ada", reason="revoked")),
        (SessionManager.delete, lambda session_id: SessionDeleted(session_id=session_id, user_id="Ada")),
    ],
)
def test_events_of_an_end_say_whose_session_it_was(
    manager: SessionManager, events: list[Any], act: Callable[..., object], expected: Callable[[str], object]
) -> None:
    """What ends or deletes a session tells its id, and the user whose it was."""
    created = manager.create({"a": 1}, user_id="Ada")
    events.clear()
    act(manager, created.id)
    assert events == [expected(created.id)]


def test_events_of_a_cleanup_say_what_was_removed(manager: SessionManager, clock: Clock, events: list[Any]) -> None:
    """Of each expired session its user and expiry, of an idle one that it ended, of an ended one nothing; then the sums.

    To count only is told to nobody.
    """
    gone = manager.create({"a": 1}, user_id="Ada", lifetime=100)
    ended = manager.create({"a": 1}, user_id="Bob")
    manager.end(ended.id)
    clock.advance(90_000)
    idle = manager.create({"a": 1}, user_id="Cy", lifetime=1e6)
    clock.advance(7200)
    events.clear()
    counted = manager.cleanup(older_than=3600, dry_run=True)
    assert (counted.removed, counted.expired, counted.ended, counted.idle, events) == (3, 1, 1, 1, [])
    assert manager.cleanup(older_than=3600) == replace(counted, dry_run=False)
    assert events == [
        SessionExpired(session_id=gone.id, user_id="Ada", expires_at=gone.expires_at),
        SessionEnded(session_id=idle.id, user_id="Cy", reason="idle"),
        SessionsCleanedUp(expired=1, ended=1, idle=1),
    ]


def test_a_damaged_record_is_told_as_deleted(manager: SessionManager, events: list[Any]) -> None:
    """Whoever deletes a record that cannot be read tells of it, without a user, whom nobody knows."""
    session = manager.create({"a": 1}, user_id="Ada")
    events.clear()

    def damaged(session_id: str) -> None:
        raise SerializationError("damaged")

    manager.store.get = damaged  # type: ignore[method-assign]
    assert manager.delete(session.id) is True
    assert events == [SessionDeleted(session_id=session.id, user_id=None)]


def test_a_record_that_is_gone_is_not_told_as_deleted(manager: SessionManager, events: list[Any]) -> None:
    """A damaged record that somebody else removes at the same moment was deleted by them, who tell of it."""
    session = manager.create({"a": 1})
    events.clear()

    def damaged(session_id: str) -> None:
        manager.store.delete(session_id)
        raise SerializationError("damaged")

    manager.store.get = damaged  # type: ignore[method-assign]
    assert manager.delete(session.id) is False
    assert events == []


# Ending ---------------------------------------------------------------------------------------------------------------


def test_signing_out_wins_over_a_change_under_way(manager: SessionManager) -> None:
    """``flush`` deletes a session that another request has changed since it was loaded, without trying for long."""
    session = manager.create({"a": 1})
    other = manager.get(session.id)
    assert other is not None
    other.data["b"] = 2
    manager.save(other)
    assert manager.flush(session) == "deleted"
    assert manager.get(session.id) is None


def test_signing_out_does_not_follow_a_session_that_moved(manager: SessionManager, clock: Clock) -> None:
    """A slow sign-out of a session that was regenerated meanwhile is dropped: it makes no second session of it."""
    session = manager.create({"a": 1}, user_id="Ada")
    slow = manager.get(session.id)
    assert slow is not None
    moved = manager.regenerate(session)
    assert moved is not None
    clock.advance(1)
    assert manager.bind(slow, NOBODY) is None
    assert manager.restart(slow, {"a": 2}) is None
    assert [record.id for record in manager.find(state="active")] == [moved.id]


def test_ending_an_expired_session_is_not_told(manager: SessionManager, clock: Clock, events: list[Any]) -> None:
    """Revoking a session that expired before says that it was not active, and tells nobody."""
    session = manager.create({"a": 1}, lifetime=100)
    clock.advance(1000)
    events.clear()
    assert manager.revoke(session.id) is False
    assert events == []


def test_starting_anew_as_a_user_ends_the_oldest(memory: SessionStore, clock: Clock) -> None:
    """The cap counts for a sign-in that clears the session first, as for any other."""
    manager = SessionManager(memory, clock=clock, max_per_user=1)
    oldest = manager.create(user_id="Ada")
    clock.advance(1)
    fresh = manager.restart(manager.create({"a": 1}), {"b": 2}, Owner("Ada"))
    assert fresh is not None
    assert [record.id for record in manager.find(user_id="Ada", state="active")] == [fresh.id]
    assert manager.inspect(oldest.id).record.end_reason == "evicted"


def test_revoking_all_ends_a_lone_session_that_is_just_saved(manager: SessionManager) -> None:
    """A session that was changed between being listed and being ended is ended all the same, if it is the only one."""
    session, save_many = manager.create({"a": 1}), manager.store.save_many

    def change_first(changes: Sequence[Change]) -> list[bool]:
        session.data["a"] = 2
        manager.save(session)
        return save_many(changes)

    manager.store.save_many = change_first  # type: ignore[method-assign]
    assert manager.revoke_all() == 1
    assert manager.get(session.id) is None


def test_revoking_all_comes_to_an_end(manager: SessionManager, clock: Clock) -> None:
    """Sessions that begin all the time do not keep it going: it looks again only for those that were there before."""
    manager.create({"a": 1})
    began: list[object] = []

    def begin(ended: int) -> None:
        clock.advance(1)
        if len(began) < 10:
            began.append(manager.create({"a": 1}))

    manager.revoke_all(on_batch=begin)
    assert len(began) < 10


def test_revoking_all_spares_what_a_shortened_timeout_ended(memory: SessionStore, clock: Clock) -> None:
    """A session that has reached an absolute timeout that was shortened since has expired, and is not counted."""
    session = SessionManager(memory, clock=clock, idle_timeout=lambda: 1e6).create({"a": 1})
    clock.advance(1000)
    shortened = SessionManager(memory, clock=clock, absolute_timeout=100.0)
    assert shortened.revoke_all() == 0
    assert shortened.inspect(session.id).state == "expired"


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"created_after": 2}, [2, 3]),
        ({"created_before": 2}, [1]),
        ({"accessed_after": 2}, [2, 3]),
        ({"accessed_before": 2}, [1]),
        ({"text": "number 3"}, [3]),
        ({"tenant_id": 2}, [2]),
        ({"offset": 1}, [2, 3]),
        ({"offset": 1, "limit": 1}, [2]),
    ],
)
def test_find_heeds_each_condition(
    memory: SessionStore, clock: Clock, conditions: dict[str, Any], expected: list[int]
) -> None:
    """Times, text, tenant, offset and limit all choose what is listed."""
    clock.now = 1.0
    manager = SessionManager(memory, clock=clock)
    numbers = {}
    for number in (1, 2, 3):
        created = manager.create(user_id="Ada", tenant_id=str(number), metadata={"title": f"Number {number}"})
        numbers[created.id] = number
        clock.advance(1)
    found = manager.find(order_by="created_at", **conditions)
    assert [numbers[record.id] for record in found] == expected


# What protects the user -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "act",
    [Session.clear, Session.regenerate, Session.unbind, lambda session: session.bind("Bob")],
    ids=["clear", "regenerate", "unbind", "bind"],
)
def test_modified_takes_back_nothing_that_protects(
    make_app: Callable[..., Flask], act: Callable[[Session], object], first: bool
) -> None:
    """``modified = False``, before or after, neither keeps an old token alive nor a user signed in."""
    app = make_app()

    @app.get("/sign-in")
    def sign_in() -> str:
        session["a"] = 1
        session.bind("Ada")  # type: ignore[attr-defined]
        return ""

    @app.get("/act")
    def protect() -> str:
        if first:
            session.modified = False
        act(session._get_current_object())  # type: ignore[attr-defined]
        if not first:
            session.modified = False
        return ""

    client = app.test_client()
    client.get("/sign-in")
    manager = app.extensions["persist_session"].manager
    [before] = manager.find(user_id="Ada", state="active")
    client.get("/act")
    assert manager.get(before.id) is None


# Late requests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def late(make_app: Callable[..., Flask]) -> Callable[[Act, Act, Act], tuple[int, int, list[str]]]:
    """What comes of a request under the token from before another one: active sessions before and after, its cookies."""
    app = make_app()
    acts: list[Act] = []

    @app.get("/")
    def view() -> str:
        acts.pop()(session._get_current_object())  # type: ignore[attr-defined]
        return ""

    def visit(begin: Act, then: Act, late: Act) -> tuple[int, int, list[str]]:
        client, slow = app.test_client(), app.test_client()
        manager = app.extensions["persist_session"].manager
        acts[:] = [late, then, begin]
        client.get("/")
        slow.set_cookie("session", client.get_cookie("session").value)  # type: ignore[union-attr]
        client.get("/")
        before = manager.stats().active
        cookies = slow.get("/").headers.getlist("Set-Cookie")
        return before, manager.stats().active, cookies

    return visit


def visitor(session: Session) -> None:
    session["cart"] = "apple"


def ada(session: Session) -> None:
    session.bind("Ada")


def bob(session: Session) -> None:
    session.bind("Bob")


def test_a_visitor_signs_in_by_a_form_sent_twice(late: Any) -> None:
    """The second of two sign-ins under a visitor's token signs in beside the first: its answer may be the last."""
    before, after, cookies = late(visitor, ada, ada)
    assert (before, after, len(cookies)) == (1, 2, 1)


@pytest.mark.parametrize(
    ("begin", "then", "act"),
    [
        (ada, Session.regenerate, bob),
        (ada, bob, ada),
        (visitor, Session.clear, ada),
        (visitor, ada, Session.unbind),
        (visitor, ada, Session.clear),
        (visitor, ada, visitor),
    ],
)
def test_what_is_late_otherwise_stores_nothing(late: Any, begin: Act, then: Act, act: Act) -> None:
    """Under the token of a user, of a session that was signed out, or to do anything but to sign in, nothing is stored."""
    before, after, cookies = late(begin, then, act)
    assert (after, cookies) == (before, [])


# Times ----------------------------------------------------------------------------------------------------------------


def test_an_ended_session_is_kept_as_long_as_was_said(memory: SessionStore, clock: Clock) -> None:
    """An absolute timeout that was shortened since says nothing of how long the reason of an ended session is kept."""
    session = SessionManager(memory, clock=clock).create({"a": 1})
    clock.advance(1000)
    shortened = SessionManager(memory, clock=clock, absolute_timeout=100.0, keep_ended=5000.0)
    ended_at = clock.now
    SessionManager(memory, clock=clock, keep_ended=5000.0).end(session.id)
    assert shortened.look_up(session.id).expires_at == ended_at + 5000


def test_a_listed_session_has_the_expiry_that_counts(memory: SessionStore, clock: Clock) -> None:
    """An absolute timeout that was shortened since comes before the expiry that is stored."""
    session = SessionManager(memory, clock=clock).create({"a": 1})
    shortened = SessionManager(memory, clock=clock, absolute_timeout=100.0)
    assert [shortened.judge(record).expires_at for record in shortened.find()] == [session.created_at + 100]


def test_a_lifetime_in_metadata_may_be_a_whole_number(manager: SessionManager, clock: Clock) -> None:
    """An application that writes the lifetime itself need not write 100.0."""
    assert manager.create(metadata={"lifetime": 100}).expires_at == clock.now + 160


def test_a_forced_renewal_does_not_wait_for_the_interval(manager: SessionManager, clock: Clock) -> None:
    """A change that is saved with ``renew`` moves the expiry, however short ago the last renewal was; without, it waits."""
    session = manager.create({"a": 1}, lifetime=100)
    clock.advance(10)
    session.data["a"] = 2
    manager.save(session)
    assert session.expires_at == clock.now + 150
    session.data["a"] = 3
    manager.save(session, renew=True)
    assert session.expires_at == clock.now + 160


def test_a_change_brings_back_what_a_clock_ahead_wrote(manager: SessionManager, clock: Clock) -> None:
    """A session of a clock that was a year ahead has its usual lifetime after its next change, not only a renewal."""
    clock.advance(365 * 86400)
    session = manager.create({"a": 1}, lifetime=100)
    clock.advance(-365 * 86400)
    session.data["a"] = 2
    manager.save(session)
    assert (session.expires_at, session.accessed_at) == (clock.now + 160, clock.now)


@pytest.mark.parametrize("renew", [False, True])
def test_a_change_by_a_clock_a_little_behind_takes_no_time_away(manager: SessionManager, clock: Clock, renew: bool) -> None:
    """Of several servers whose clocks differ by minutes, one that is behind moves neither expiry nor last access back."""
    session = manager.create({"a": 1})
    before = session.expires_at, session.accessed_at
    clock.advance(-600)
    session.data["a"] = 2
    assert manager.save(session, renew=renew) == "saved"
    assert (session.expires_at, session.accessed_at) == before


def test_metadata_is_added_at_renewals_only(manager: SessionManager, clock: Clock) -> None:
    """A change within the interval leaves the metadata as it is, the first one after it adds to it."""
    session = manager.create({"a": 1}, metadata={"title": "x"})
    for passed, expected in ((10, {"title": "x"}), (60, {"title": "x", "last_seen": "here"})):
        clock.advance(passed)
        session.data["a"] += 1
        manager.save(session, metadata={"last_seen": "here"})
        assert session.record.metadata == expected


@pytest.mark.parametrize(
    ("end", "kept"), [(SessionManager.revoke, True), (SessionManager.end, True), (SessionManager.delete, False)]
)
def test_what_an_operator_ends_stays_described(
    manager: SessionManager, end: Callable[[SessionManager, str], object], kept: bool
) -> None:
    """A revoked or ended session is still found by its tags and metadata, a deleted one is not; data has neither."""
    session = manager.create({"a": 1}, user_id="Ada", metadata={"title": "x"}, tags=["chat"])
    end(manager, session.id)
    record = manager.look_up(session.id)
    assert (record.user_id, record.data) == ("Ada", b"")
    assert (record.tags == {"chat"}, record.metadata == {"title": "x"}) == (kept, kept)
    assert kept or not (record.tags or record.metadata)


# More of caps ---------------------------------------------------------------------------------------------------------


def test_nobody_is_refused_without_a_cap(memory: SessionStore) -> None:
    """The policy ``reject`` alone refuses nothing: there is no cap."""
    manager = SessionManager(memory, cap_policy="reject")
    for _ in range(3):
        manager.create(user_id="Ada")
    assert manager.stats().active == 3


def test_of_two_sign_ins_at_once_the_later_is_refused(memory: SessionStore, clock: Clock) -> None:
    """A session that another process stored first, but that began later, gives way with the reason ``rejected``."""
    manager = SessionManager(memory, clock=clock, max_per_user=1, cap_policy="reject")
    later = manager.create(user_id="Ada")
    clock.advance(-1)
    earlier = manager.create(user_id="Ada")
    assert [record.id for record in manager.find(user_id="Ada", state="active")] == [earlier.id]
    assert manager.inspect(later.id).record.end_reason == "rejected"


def test_a_sign_in_that_is_refused_looks_once(clock: Clock) -> None:
    """The policy ``reject`` costs one look at the user's sessions, as the other does."""
    store = CountingStore(open_store("memory://"))
    manager = SessionManager(store, clock=clock, max_per_user=10, cap_policy="reject")
    store.operations.clear()
    manager.create(user_id="Ada")
    assert store.operations == {"save": 1, "find": 1}


def test_sessions_of_one_moment_end_in_the_order_of_their_ids(memory: SessionStore, clock: Clock) -> None:
    """Where sessions began at the same moment, all processes agree which are the oldest."""
    uncapped = SessionManager(memory, clock=clock)
    ids = {uncapped.create(user_id="Ada").id for _ in range(10)}
    capped = SessionManager(memory, clock=clock, max_per_user=3)
    ids.add(capped.create(user_id="Ada").id)
    assert {record.id for record in capped.find(user_id="Ada", state="active")} == set(sorted(ids)[-3:])


class _Count(CountingStore):
    """A store that does something while it is counted."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def count(self, query: SessionQuery) -> int:
        self.operations["count"] += 1
        self.meanwhile()
        return self.store.count(query)


def test_nobody_waits_for_a_count(clock: Clock) -> None:
    """A session that is created while another thread counts the store goes by what is known."""
    store = _Count(open_store("memory://"))
    manager = SessionManager(store, clock=clock, max_sessions=10)
    manager.create()
    other = Thread(target=manager.create)
    waited: list[bool] = []

    def create_elsewhere() -> None:
        other.start()
        other.join(1.0)
        waited.append(other.is_alive())

    store.meanwhile = create_elsewhere
    clock.advance(3600)
    manager.create()
    other.join()
    assert waited == [False]


def test_counting_is_as_rare_as_it_takes_long(clock: Clock) -> None:
    """A count that takes a tenth of a second is not made again within ten."""
    store = _Count(open_store("memory://"))
    store.meanwhile = lambda: sleep(0.1)
    manager = SessionManager(store, clock=clock, max_sessions=10)
    manager.create()
    clock.advance(9)
    manager.create()
    assert store.operations["count"] == 1
    clock.advance(3600)
    manager.create()
    assert store.operations["count"] == 2


def test_a_count_that_failed_is_made_again(clock: Clock) -> None:
    """A store that fails while it is counted is counted by the next session that is created."""
    store = _Count(open_store("memory://"))
    manager = SessionManager(store, clock=clock, max_sessions=1)

    def fail() -> None:
        store.meanwhile = lambda: None
        raise StoreUnavailable("gone for a moment")

    SessionManager(store, clock=clock).create()
    store.meanwhile = fail
    with pytest.raises(StoreUnavailable):
        manager.create()
    with pytest.raises(SessionLimitReached):
        manager.create()


# Sweeping -------------------------------------------------------------------------------------------------------------


def test_a_sweep_that_is_stopped_ends_after_the_batch(manager: SessionManager, clock: Clock) -> None:
    """Who shuts down waits for one batch of 500 at most; what is left is removed by the next run."""
    for _ in range(600):
        manager.create()

    clock.advance(400 * 86400)
    sweeper = Sweeper({"web": manager}, 600)

    def stop(_sender: object, event: object) -> None:
        sweeper.stop()

    with session_expired.connected_to(stop, manager):
        assert sweeper.sweep() is True
    assert manager.stats().total == 100


def test_a_sweep_tells_only_of_what_it_removed(manager: SessionManager, clock: Clock, events: list[Any]) -> None:
    """Of two expired sessions, one that another process removes at the same moment is neither counted nor told."""
    gone, ours = manager.create(), manager.create()
    clock.advance(400 * 86400)
    delete_many = manager.store.delete_many

    def delete_after_another(deletions: Sequence[Deletion]) -> list[bool]:
        manager.store.delete(gone.id)
        return delete_many(deletions)

    manager.store.delete_many = delete_after_another  # type: ignore[method-assign]
    events.clear()
    assert manager.cleanup().expired == 1
    assert [event.session_id for event in events if isinstance(event, SessionExpired)] == [ours.id]


def test_a_receiver_of_the_sums_that_fails_is_logged(manager: SessionManager, caplog: pytest.LogCaptureFixture) -> None:
    """In the background a failing receiver of ``sessions_cleaned_up`` does not make a sweep a failed one."""

    def fail(_sender: object, event: object) -> None:
        raise RuntimeError("a receiver's mistake")

    with sessions_cleaned_up.connected_to(fail, manager):
        assert Sweeper({"web": manager}, 600).sweep() is True
    assert "a receiver of a session's event failed" in caplog.text


def test_the_holder_keeps_the_lease_until_its_next_run(manager: SessionManager) -> None:
    """The lease of a sweep outlasts the longest pause before the next one, or two processes would take turns."""
    leases: list[tuple[str, float]] = []

    def lease(name: str, seconds: float) -> bool:
        leases.append((name, seconds))
        return True

    manager.store.lease = lease  # type: ignore[method-assign]
    Sweeper({"web": manager}, 600).sweep()
    assert leases == [("sweep", 1200)]


def test_what_was_stopped_before_it_began_stays_so(manager: SessionManager) -> None:
    """A process that shuts down before its first request starts no thread."""
    sweeper = Sweeper({"web": manager}, 600)
    sweeper.stop()
    sweeper.start()
    assert not sweeper.running


def test_the_thread_is_stopped_when_the_process_ends(manager: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls ``stop`` at its end, so that no batch is cut off by it."""
    registered: list[object] = []
    monkeypatch.setattr("atexit.register", registered.append)
    sweeper = Sweeper({"web": manager}, 600)
    sweeper.start()
    sweeper.stop()
    assert registered == [sweeper.stop]


def test_processes_that_started_together_do_not_sweep_together(manager: SessionManager) -> None:
    """Pauses are the interval give or take a tenth, each another."""
    sweeper, pauses = Sweeper({"web": manager}, 600), list[float]()

    def wait(seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) == 20

    sweeper._stopping.wait = wait  # type: ignore[method-assign, assignment]
    sweeper._run()
    assert all(540 <= pause <= 660 for pause in pauses)
    assert len(set(pauses)) > 1


def test_conflicts_are_numbered(memory: SessionStore, manager: SessionManager, events: list[Any]) -> None:
    """``session_conflict`` says how often this save has met another one."""
    session, save = manager.create({"a": 1}), memory.save
    writer, left = SessionManager(memory, clock=manager.clock), [3, 2, 1]

    def save_after_another(record: SessionRecord, *, expected: int) -> None:
        if left:
            left.pop()
            memory.save = save  # type: ignore[method-assign]
            other = writer.get(session.id)
            assert other is not None
            other.data["n"] = len(left)
            writer.save(other)
            memory.save = save_after_another  # type: ignore[method-assign]
        save(record, expected=expected)

    memory.save = save_after_another  # type: ignore[method-assign]
    events.clear()
    session.data["a"] = 2
    assert manager.save(session) == "saved"
    assert [event.attempt for event in events if isinstance(event, SessionConflicted)] == [1, 2, 3]


# Devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "noted"), [("\x01Firefox\x02", "Firefox"), ("\x01 \x02", None)])
def test_a_device_is_noted_without_what_is_around_it(make_app: Callable[..., Flask], sent: str, noted: str | None) -> None:
    """Control characters around a user agent leave no spaces, and nothing else is as good as none."""
    app = make_app(PERSIST_SESSION_TRACK_DEVICES=True)
    app.add_url_rule("/", view_func=lambda: str(session.setdefault("a", 1)))
    app.test_client().get("/", environ_overrides={"HTTP_USER_AGENT": sent, "REMOTE_ADDR": "\x01"})
    [record] = app.extensions["persist_session"].manager.find()
    assert record.metadata["last_seen"] == {"ip": None, "user_agent": noted}
