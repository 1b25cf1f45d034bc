"""The policy of sessions, on every store, with a clock that stands still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flask_persist_session import (
    SessionConflict,
    SessionManager,
    SessionQuery,
    SessionRecord,
    SessionStore,
    open_store,
    session_conflict,
    session_discarded,
)
from tests.conftest import Clock


@pytest.fixture
def manager(store: SessionStore, clock: Clock) -> SessionManager:
    return SessionManager(store, clock=clock, idle_timeout=lambda: 3600.0, renew_interval=60.0)


@pytest.fixture
def other(manager: SessionManager) -> SessionManager:
    """Another manager of the same sessions, as another process has it."""
    return SessionManager(manager.store, clock=manager.clock, idle_timeout=lambda: 3600.0, renew_interval=60.0)


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """The events of conflicts and discarded changes, in order."""
    heard: list[Any] = []

    def hear(_sender: object, event: Any) -> None:
        heard.append(event)

    with session_conflict.connected_to(hear), session_discarded.connected_to(hear):
        yield heard


# Creating, loading, expiry --------------------------------------------------------------------------------------------


def test_a_created_session_is_loaded_as_it_was(manager: SessionManager, clock: Clock) -> None:
    """User and tenant are text, times come from the clock, data and description are what was given."""
    created = manager.create({"a": (1, {2})}, user_id=7, tenant_id="t", metadata={"title": "x"}, tags={"chat"})  # type: ignore[arg-type]
    loaded = manager.get(created.id)
    assert loaded is not None
    assert (loaded.data, loaded.user_id, loaded.tenant_id) == ({"a": (1, {2})}, "7", "t")
    assert (loaded.record.metadata, loaded.record.tags) == ({"title": "x"}, {"chat"})
    assert (loaded.created_at, loaded.accessed_at, loaded.expires_at) == (clock.now, clock.now, clock.now + 3660)
    assert (loaded.version, loaded.state, loaded.end_reason) == (1, "active", None)


def test_the_sessions_of_a_user_share_a_shard(manager: SessionManager) -> None:
    """Their ids start alike, those of nobody's sessions do not."""
    assert len({manager.create(user_id="Ada").id[:3] for _ in range(5)}) == 1
    assert len({manager.create().id[:3] for _ in range(5)}) > 1


def test_the_store_never_holds_the_token(manager: SessionManager) -> None:
    """Neither the record nor any representation contains what opens the session."""
    created = manager.create({"a": 1}, user_id="Ada")
    [record] = manager.store.find(SessionQuery())
    assert created.token is not None
    assert created.token not in repr(record) + repr(created) + repr(record.data)


@pytest.mark.parametrize("junk", ["", "x", "0" * 66, "0" * 68, "../" + "0" * 64, "A" * 67, "0" * 66 + "\n"])
def test_a_malformed_id_is_no_session(manager: SessionManager, junk: str) -> None:
    """Junk names no session, whatever is asked of it."""
    assert (manager.get(junk), manager.load(junk), manager.end(junk), manager.delete(junk)) == (None, None, False, False)


def test_a_session_expires_at_its_expiry(manager: SessionManager, clock: Clock) -> None:
    """A moment before it is active, at the moment it is expired and without data."""
    session = manager.create({"a": 1})
    clock.now = session.expires_at - 0.001
    assert manager.get(session.id) is not None
    clock.now = session.expires_at
    assert manager.get(session.id) is None
    loaded = manager.load(session.id)
    assert loaded is not None
    assert (loaded.state, loaded.end_reason, loaded.data) == ("expired", "expired", {})


def test_a_shortened_absolute_timeout_counts_at_once(manager: SessionManager, clock: Clock) -> None:
    """A session that is older than a timeout set later is expired."""
    session = manager.create()
    clock.advance(100)
    shorter = SessionManager(manager.store, clock=clock, absolute_timeout=100)
    assert shorter.get(session.id) is None


def test_a_renewal_moves_the_expiry_forward_only(manager: SessionManager, clock: Clock) -> None:
    """A clock that was set back, or a shorter timeout, takes nothing away."""
    session = manager.create()
    clock.advance(60)
    assert manager.renew(session) == "saved"
    later = session.expires_at
    clock.advance(-500)
    assert manager.renew(session) == "saved"
    stored = manager.get(session.id)
    assert stored is not None
    assert (stored.expires_at, stored.accessed_at) == (later, later - 3660)


# Saving and merging ---------------------------------------------------------------------------------------------------


def test_an_unchanged_session_is_not_written(manager: SessionManager) -> None:
    """Saving what was loaded leaves the version as it is."""
    session = manager.create({"a": [1, {"b": {2, 3}}]})
    loaded = manager.get(session.id)
    assert loaded is not None
    assert (manager.save(loaded), loaded.version) == ("unchanged", 1)


def test_changes_of_different_keys_are_merged(manager: SessionManager, other: SessionManager, events: list[Any]) -> None:
    """Set, changed, nested and removed keys of two savers all survive, and the conflict is told."""
    created = manager.create({"mine": 1, "theirs": 1, "list": [1], "gone": 1, "same": 1})
    first, second = manager.get(created.id), other.get(created.id)
    assert first is not None
    assert second is not None
    second.data.update(theirs=2, new=2)
    del second.data["gone"]
    assert other.save(second) == "saved"
    first.data["mine"] = 3
    first.data["list"].append(2)
    assert manager.save(first) == "saved"
    expected = {"mine": 3, "theirs": 2, "list": [1, 2], "same": 1, "new": 2}
    stored = manager.get(created.id)
    assert stored is not None
    assert stored.data == first.data == expected
    assert [(event.session_id, event.attempt) for event in events] == [(created.id, 1)]


def test_on_the_same_key_the_last_one_wins(manager: SessionManager, other: SessionManager) -> None:
    """Two savers of one key: what was saved last is there, also when one of them removed it."""
    created = manager.create({"a": 1, "b": 1})
    first, second = manager.get(created.id), other.get(created.id)
    assert first is not None
    assert second is not None
    second.data.update(a="second", b="second")
    other.save(second)
    first.data["a"] = "first"
    del first.data["b"]
    manager.save(first)
    stored = manager.get(created.id)
    assert stored is not None
    assert stored.data == {"a": "first"}


def test_a_change_of_type_alone_is_a_change(manager: SessionManager, other: SessionManager) -> None:
    """1, 1.0 and True are equal in Python and different in a session, in a merge as well."""
    created = manager.create({"a": 1, "b": 1})
    first, second = manager.get(created.id), other.get(created.id)
    assert first is not None
    assert second is not None
    second.data["b"] = 2
    other.save(second)
    first.data["a"] = True
    manager.save(first)
    stored = manager.get(created.id)
    assert stored is not None
    assert stored.data["a"] is True


def test_both_making_the_same_change_is_no_second_write(manager: SessionManager, other: SessionManager) -> None:
    """A merge that changes nothing any more is not written."""
    created = manager.create({"a": 1})
    first, second = manager.get(created.id), other.get(created.id)
    assert first is not None
    assert second is not None
    for saver, session in ((other, second), (manager, first)):
        session.data["a"] = 2
        assert saver.save(session) == "saved"
    stored = manager.get(created.id)
    assert stored is not None
    assert stored.version == first.version == 2


@pytest.mark.parametrize("how", ["end", "delete", "expire", "regenerate"])
def test_what_has_ended_stays_ended(
    manager: SessionManager, other: SessionManager, clock: Clock, events: list[Any], how: str
) -> None:
    """A change or renewal that was under way when its session ended is dropped, and told with the reason."""
    created = manager.create({"a": 1})
    clock.advance(60)
    writer, renewer = manager.get(created.id), manager.get(created.id)
    assert writer is not None
    assert renewer is not None
    if how == "end":
        other.end(created.id, "revoked")
    elif how == "delete":
        other.delete(created.id)
    elif how == "regenerate":
        other.regenerate(created)
    else:
        clock.now = created.expires_at
        other.store.delete(created.id)
    writer.data["a"] = 2
    events.clear()
    assert manager.save(writer) == "discarded"
    assert manager.renew(renewer) == "unchanged"
    assert manager.get(created.id) is None
    reasons = {"end": "revoked", "delete": "deleted", "expire": None, "regenerate": "regenerated"}
    assert [getattr(event, "reason", "conflict") for event in events] == ["conflict", reasons[how]]


def test_a_save_that_never_wins_gives_up(manager: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries are bounded: after the last one the error says how often it was tried."""
    session = manager.create({"a": 1})

    def always_conflict(*args: object, **kwargs: object) -> None:
        raise SessionConflict("always")

    monkeypatch.setattr(type(manager.store), "save", always_conflict)
    monkeypatch.setattr("flask_persist_session.lifecycle.ATTEMPTS", 3)
    session.data["a"] = 2
    with pytest.raises(SessionConflict, match="3 times"):
        manager.save(session)


# Regenerating and ending ----------------------------------------------------------------------------------------------


def test_regenerating_moves_everything_but_the_token(manager: SessionManager, clock: Clock) -> None:
    """Data, user, description and beginning stay; id and token are new; the old id keeps no data for its 30 seconds."""
    old = manager.create({"a": 1}, user_id="Ada", metadata={"m": 1}, tags={"t"})
    clock.advance(5)
    new = manager.regenerate(old)
    assert new is not None
    assert (new.id != old.id, new.token != old.token) == (True, True)
    loaded, left = manager.get(new.id), manager.load(old.id)
    assert loaded is not None
    assert left is not None
    assert (loaded.data, loaded.user_id, loaded.created_at) == ({"a": 1}, "Ada", old.created_at)
    assert (loaded.record.metadata, loaded.record.tags) == ({"m": 1}, {"t"})
    assert (left.state, left.end_reason, left.data, left.record.data) == ("ended", "regenerated", {}, b"")
    assert new.id not in repr(left.record)
    clock.advance(30)
    assert manager.load(old.id) is None


def test_a_regenerated_session_is_known_as_long_as_any_other_that_ended(store: SessionStore, clock: Clock) -> None:
    """Requests are told for 30 seconds, but its record stays for as long as that of others: older backups may hold it."""
    for keep, known in ((86400.0, 86400.0), (0.0, 30.0)):
        manager = SessionManager(store, clock=clock, keep_ended=keep)
        old = manager.create({"a": 1})
        manager.regenerate(old)
        record = manager.store.get(old.id)
        assert record is not None
        assert record.expires_at == clock.now + known


def test_regenerating_takes_along_what_others_changed_meanwhile(manager: SessionManager, other: SessionManager) -> None:
    """A change under the old token that was stored before it ended is found under the new one."""
    created = manager.create({"a": 1})
    first, second = manager.get(created.id), other.get(created.id)
    assert first is not None
    assert second is not None
    second.data["b"] = 2
    other.save(second)
    first.data["a"] = 3
    new = manager.regenerate(first)
    assert new is not None
    stored = manager.get(new.id)
    assert stored is not None
    assert stored.data == new.data == {"a": 3, "b": 2}


def test_regenerating_a_session_that_has_ended_leaves_nothing(manager: SessionManager, other: SessionManager) -> None:
    """No new session is left behind when the old one was ended by somebody else."""
    created = manager.create({"a": 1})
    first = manager.get(created.id)
    assert first is not None
    other.delete(created.id)
    assert manager.regenerate(first) is None
    assert [record.id for record in manager.store.scan()] == [created.id]


def test_ending_keeps_the_reason_and_no_data(manager: SessionManager, clock: Clock) -> None:
    """An ended session says why for a day, ends once, and is then removed by the cleanup."""
    session = manager.create({"a": 1})
    assert manager.end(session.id, "revoked") is True
    assert manager.end(session.id, "again") is False
    loaded = manager.load(session.id)
    assert loaded is not None
    assert (loaded.end_reason, loaded.record.data, loaded.expires_at) == ("revoked", b"", clock.now + 86400)
    clock.advance(86400)
    assert manager.cleanup().ended == 1
    assert manager.load(session.id) is None


def test_deleting_leaves_nothing_but_that_it_was_done(manager: SessionManager, clock: Clock) -> None:
    """Of a deleted session only its id, user and times are kept, for a day; deleting it again says that it was gone."""
    session = manager.create({"a": 1}, user_id="Ada", metadata={"m": 1}, tags={"t"})
    assert (manager.delete(session.id), manager.delete(session.id), manager.get(session.id)) == (True, False, None)
    left = manager.store.get(session.id)
    assert left is not None
    assert (left.end_reason, left.data, left.metadata, left.tags) == ("deleted", b"", {}, frozenset())
    clock.advance(86400)
    assert (manager.cleanup().ended, manager.store.get(session.id)) == (1, None)


def test_deleting_merges_with_nothing(manager: SessionManager, other: SessionManager) -> None:
    """A session is deleted whatever others save at the same moment."""
    session = manager.create({"a": 1})
    changing, get = other.get(session.id), manager.store.get

    def get_and_change(session_id: str) -> SessionRecord | None:
        found = get(session_id)
        if changing is not None and changing.data == {"a": 1}:
            changing.data["b"] = 2
            other.save(changing)
        return found

    manager.store.get = get_and_change  # type: ignore[method-assign]
    assert manager.delete(session.id) is True
    assert manager.get(session.id) is None


# Cleaning up ----------------------------------------------------------------------------------------------------------


def test_cleanup_removes_what_has_expired(manager: SessionManager, clock: Clock) -> None:
    """Expired and long-ended sessions go, active ones and freshly ended ones stay, and the counts say so."""
    manager.create()
    manager.end(manager.create().id, "revoked")
    clock.advance(86400)
    active = manager.create()
    fresh = manager.create()
    manager.end(fresh.id, "revoked")
    planned = manager.cleanup(dry_run=True)
    assert (planned.expired, planned.ended, planned.idle, planned.removed, planned.dry_run) == (1, 1, 0, 2, True)
    assert manager.stats().total == 4
    done = manager.cleanup()
    assert (done.expired, done.ended, done.removed, done.dry_run) == (1, 1, 2, False)
    assert {record.id for record in manager.store.scan()} == {active.id, fresh.id}


def test_cleanup_with_an_age_removes_idle_sessions(manager: SessionManager, clock: Clock) -> None:
    """``older_than`` takes active sessions without a request for so long as well."""
    idle = manager.create()
    clock.advance(661)
    used = manager.create()
    assert manager.cleanup(older_than=600).idle == 1
    assert manager.get(idle.id) is None
    assert manager.get(used.id) is not None


@pytest.mark.parametrize("age", ["7d", -1, float("nan")], ids=str)
def test_cleanup_takes_its_age_in_seconds(manager: SessionManager, age: Any) -> None:
    """Anything else is a mistake, and removes nothing."""
    manager.create()
    with pytest.raises(ValueError, match=r"older_than is .* number of seconds"):
        manager.cleanup(older_than=age)
    assert manager.stats().active == 1


def test_cleanup_spares_a_session_renewed_meanwhile(
    manager: SessionManager, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved between being seen expired and being removed stays, because exactly that version is removed."""
    session = manager.create()
    seen = session.record
    clock.advance(60)
    manager.renew(session)
    clock.now = seen.expires_at
    monkeypatch.setattr(manager.store, "find", lambda query: iter([seen]))
    assert manager.cleanup().removed == 0
    assert manager.store.get(session.id) == session.record


def test_cleanup_takes_more_than_one_batch(manager: SessionManager, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, all that has expired is removed."""
    monkeypatch.setattr("flask_persist_session.cleanup._BATCH", 7)
    for _ in range(20):
        manager.create()
    clock.advance(10_000)
    assert manager.cleanup().expired == 20
    assert manager.stats().total == 0


def test_stats_count_by_state(manager: SessionManager, clock: Clock) -> None:
    """Every session is counted once, in its state at this moment."""
    first = manager.create({"a": 1}, user_id="Ada")
    clock.advance(4000)
    manager.create({"a": 1}, user_id="Ada")
    manager.end(manager.create().id)
    stats = manager.stats()
    assert (stats.total, stats.active, stats.expired, stats.ended, stats.users) == (3, 1, 1, 1, 1)
    assert (stats.oldest, stats.newest, stats.bytes) == (first.created_at, clock.now, 2 * len(first.record.data))


def test_two_namespaces_are_apart(shared_url: str, clock: Clock) -> None:
    """Sessions of one namespace are neither seen nor counted nor removed in another."""
    web, chat = (SessionManager(open_store(shared_url, namespace=name), clock=clock) for name in ("web", "chat"))
    session = web.create({"a": 1}, user_id="Ada")
    assert (chat.get(session.id), chat.stats().total, chat.delete(session.id)) == (None, 0, False)
    assert list(chat.store.find(SessionQuery(user_id="Ada"))) == []
    assert web.get(session.id) is not None
    for manager in (web, chat):
        manager.store.close()


# Lifetimes and clocks -------------------------------------------------------------------------------------------------


def test_a_session_may_have_a_lifetime_of_its_own(manager: SessionManager, clock: Clock) -> None:
    """``lifetime`` replaces the idle timeout, also at renewals."""
    session = manager.create({"a": 1}, lifetime=100)
    assert session.expires_at == clock.now + 160
    clock.advance(150)
    manager.renew(session)
    assert session.expires_at == clock.now + 160


@pytest.mark.parametrize("wrong", [0, -1, float("inf"), float("nan")])
def test_a_lifetime_that_is_none_is_refused(manager: SessionManager, wrong: float) -> None:
    """A lifetime must be a number of seconds above 0."""
    with pytest.raises(ValueError, match="lifetime"):
        manager.create(lifetime=wrong)


def test_a_clock_that_was_ahead_makes_no_session_immortal(manager: SessionManager, clock: Clock) -> None:
    """A session that was renewed by a clock ten years ahead has its usual lifetime after the next renewal."""
    session = manager.create({"a": 1})
    clock.advance(10 * 365 * 86400)
    manager.save(session)
    created_ahead = manager.create({"a": 1})
    clock.advance(-10 * 365 * 86400)
    manager.renew(created_ahead)
    assert (created_ahead.expires_at, created_ahead.accessed_at) == (clock.now + 3660, clock.now)


def test_a_clock_that_is_set_back_a_little_takes_nothing_away(manager: SessionManager, clock: Clock) -> None:
    """Within an hour, times only move forward."""
    session = manager.create({"a": 1})
    before = session.expires_at
    clock.advance(-3000)
    manager.renew(session)
    assert session.expires_at == before


def test_find_takes_no_text_for_tags(manager: SessionManager) -> None:
    """Its letters would be the tags, and nothing would be found."""
    manager.create(tags=["hot"])
    with pytest.raises(ValueError, match="tags are 'hot'; allowed is a list or set"):
        manager.find(tags="hot")


def test_find_lists_by_condition(manager: SessionManager, clock: Clock) -> None:
    """User, tags, state, order and limit choose what is listed."""
    ids = []
    for tag in ("x", "y", "y"):
        ids.append(manager.create({"a": 1}, user_id="Ada", tags=[tag]).id)
        clock.advance(1)
    manager.create(user_id="Bob", tags=["y"])
    manager.end(ids[1])
    assert [record.id for record in manager.find(user_id="Ada", order_by="-created_at", limit=2)] == ids[:0:-1]
    assert [record.id for record in manager.find(user_id="Ada", tags=["y"], state="active")] == [ids[2]]
