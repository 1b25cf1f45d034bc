"""Changing sessions by their id: with merging or an expected version, many alike, several together or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from flask_persist_session import (
    SerializationError,
    SessionConflict,
    SessionDeleted,
    SessionEnded,
    SessionLimitReached,
    SessionManager,
    SessionNotFound,
    SessionQuery,
    SessionSaved,
    SessionStore,
    SessionTooLarge,
    StoredSession,
    session_created,
    session_deleted,
    session_ended,
    session_saved,
)
from tests.conftest import Clock
from tests.counting import CountingStore

UNKNOWN = "000" + "0" * 64


@pytest.fixture
def chats(store: SessionStore, clock: Clock) -> SessionManager:
    return SessionManager(
        store.namespace("chat"),
        namespace="chat",
        keep_data=True,
        clock=clock,
        idle_timeout=lambda: 600.0,
        renew_interval=60.0,
    )


def data_of(chats: SessionManager, session: StoredSession) -> dict[str, object]:
    return chats.existing(session.id).data


# One ------------------------------------------------------------------------------------------------------------------


def test_what_is_changed_in_an_edit_is_stored_at_its_end(chats: SessionManager) -> None:
    """Data, metadata and tags alike."""
    chat = chats.create({"a": 1}, metadata={"title": "Trip", "old": 1}, tags=["x", "y"])
    with chats.edit(chat.id) as session:
        session.data["b"] = [2]
        session.metadata["title"] = "Journey"
        del session.metadata["old"]
        session.tags.add("z")
        session.tags.remove("x")
    found = chats.existing(chat.id)
    assert (found.data, found.metadata, found.tags) == ({"a": 1, "b": [2]}, {"title": "Journey"}, {"y", "z"})


def test_an_edit_that_changes_nothing_writes_nothing(clock: Clock, store: SessionStore) -> None:
    """Looking is not saving."""
    counting = CountingStore(store)
    chats = SessionManager(counting, namespace="chat", clock=clock)
    chat = chats.create({"a": 1}, metadata={"title": "Trip"})
    counting.operations.clear()
    with chats.edit(chat.id) as session:
        assert (session.data["a"], session.metadata["title"], session.tags) == (1, "Trip", set())
    assert counting.operations == {"get": 1}


def test_an_edit_that_fails_stores_nothing(chats: SessionManager) -> None:
    """The error goes on, and the session is as it was."""
    chat = chats.create({"a": 1})
    with pytest.raises(ZeroDivisionError), chats.edit(chat.id) as session:
        session.data["a"] = 1 / 0
    assert data_of(chats, chat) == {"a": 1}


def test_metadata_are_limited(store: SessionStore) -> None:
    """Lists read them as a whole, so they may take as much as the data, however many changes they come from."""
    chats = SessionManager(store.namespace("chat"), namespace="chat", max_bytes=1000)
    with pytest.raises(SessionTooLarge, match="metadata"):
        chats.create(metadata={"about": "x" * 1000})
    session = chats.create(metadata={"about": "x" * 600})
    with pytest.raises(SessionTooLarge, match="metadata"), chats.edit(session.id) as edited:
        edited.metadata["more"] = "x" * 600
    with pytest.raises(SessionTooLarge, match="metadata"):
        chats.update_many(SessionQuery(), metadata={"more": "x" * 600})
    assert chats.existing(session.id).metadata == {"about": "x" * 600}


def test_edits_side_by_side_are_merged(chats: SessionManager) -> None:
    """Keys of the data, keys of the metadata and tags that different edits change all survive."""
    chat = chats.create({"a": 1}, metadata={"m": 1}, tags=["t"])
    with chats.edit(chat.id) as one, chats.edit(chat.id) as other:
        one.data["b"], other.data["c"] = 2, 3
        one.metadata["n"], other.metadata["o"] = 2, 3
        one.tags.add("u")
        other.tags.remove("t")
    found = chats.existing(chat.id)
    assert (found.data, found.metadata) == ({"a": 1, "b": 2, "c": 3}, {"m": 1, "n": 2, "o": 3})
    assert found.tags == {"u"}


def test_a_change_of_the_title_alone_survives_a_change_of_the_data(chats: SessionManager) -> None:
    """What is left to save after a conflict is not only the data."""
    chat = chats.create({"a": 1}, metadata={"title": "Trip"})
    with chats.edit(chat.id) as session:
        session.metadata["title"] = "Journey"
        with chats.edit(chat.id) as other:
            other.data["a"] = 2
    found = chats.existing(chat.id)
    assert (found.data, found.metadata) == ({"a": 2}, {"title": "Journey"})


def test_true_in_the_place_of_one_is_a_change(chats: SessionManager) -> None:
    """They are equal for Python, but not as JSON."""
    chat = chats.create(metadata={"n": 1})
    with chats.edit(chat.id) as session:
        session.metadata["n"] = True
    assert chats.existing(chat.id).metadata["n"] is True


def test_many_edits_at_once_all_survive(chats: SessionManager) -> None:
    """No update is lost, whichever part of the session it changes."""
    chat = chats.create()

    def edit(number: int) -> None:
        with chats.edit(chat.id) as session:
            session.data[f"k{number}"] = number
            session.tags.add(f"t{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(edit, range(16)))
    found = chats.existing(chat.id)
    assert found.data == {f"k{number}": number for number in range(16)}
    assert len(found.tags) == 16


@pytest.mark.parametrize("state", ["unknown", "ended", "expired", "malformed"])
def test_only_an_active_session_can_be_edited(chats: SessionManager, clock: Clock, state: str) -> None:
    """The error says why there is none."""
    chat = chats.create()
    if state == "ended":
        chats.end(chat.id, "closed")
    elif state == "expired":
        clock.advance(700)
    wanted = {"unknown": UNKNOWN, "malformed": "../x"}.get(state, chat.id)
    reason = {"ended": "closed", "expired": "expired"}.get(state, "never existed")
    with pytest.raises(SessionNotFound, match=reason) as caught, chats.edit(wanted):
        pytest.fail("the block ran")
    assert caught.value.missing == (state in ("unknown", "malformed"))


def test_an_edit_of_a_session_that_ends_meanwhile_is_told(chats: SessionManager) -> None:
    """The change comes to nothing, and whoever made it learns why."""
    chat = chats.create({"a": 1})

    def attempt() -> None:
        with chats.edit(chat.id) as session:
            session.data["a"] = 2
            chats.end(chat.id, "closed")

    with pytest.raises(SessionNotFound, match="closed"):
        attempt()
    assert chats.decode(chats.look_up(chat.id)) == {"a": 1}


def test_an_edit_with_the_expected_version_is_stored(chats: SessionManager) -> None:
    """Whoever saw the latest version may change it."""
    chat = chats.create({"a": 1})
    with chats.edit(chat.id, expected_version=1) as session:
        session.data["a"] = 2
    assert session.version == 2
    assert data_of(chats, chat) == {"a": 2}


def test_a_renewal_during_an_edit_of_a_version_is_no_change(chats: SessionManager, clock: Clock) -> None:
    """Somebody goes on talking while a form is stored: the session has another version, but is what it was."""
    chat = chats.create({"a": 1}, metadata={"title": "Trip"})
    clock.advance(120)
    with chats.edit(chat.id, expected_version=chat.version) as session:
        chats.history(chat.id).append({"role": "user", "content": "Hello"})
        renewed = chats.existing(chat.id)
        session.data["a"] = 2
        session.metadata["title"] = "Journey"
    assert renewed.version > chat.version
    now = chats.existing(chat.id)
    assert (now.data, now.metadata, now.expires_at) == ({"a": 2}, {"title": "Journey"}, renewed.expires_at)


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_edit_that_expects_another_version_is_a_conflict(chats: SessionManager, when: str) -> None:
    """Nothing is merged, and what the other one stored stays."""
    chat = chats.create({"a": 1})

    def change() -> None:
        with chats.edit(chat.id) as other:
            other.data["b"] = 1

    if when == "before":
        change()

    def attempt() -> None:
        with chats.edit(chat.id, expected_version=1) as session:
            session.data["a"] = 2
            change()

    with pytest.raises(SessionConflict, match="expected version 1, but it is version 2"):
        attempt()
    assert data_of(chats, chat) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "wrong", [{"metadata": {"x": object()}}, {"metadata": {"x": float("nan")}}, {"tags": {7}}, {"data": {"x": object()}}]
)
def test_what_cannot_be_stored_is_told_and_changes_nothing(chats: SessionManager, wrong: dict[str, object]) -> None:
    """The session stays as it was in every part."""
    chat = chats.create({"a": 1}, metadata={"m": 1}, tags=["t"])

    def attempt() -> None:
        with chats.edit(chat.id) as session:
            session.data["a"] = 2
            for part, value in wrong.items():
                getattr(session, part).update(value)

    with pytest.raises((SerializationError, ValueError)):
        attempt()
    found = chats.existing(chat.id)
    assert (found.data, found.metadata, found.tags) == ({"a": 1}, {"m": 1}, {"t"})


# Time -----------------------------------------------------------------------------------------------------------------


def test_extending_lets_a_session_live_so_much_longer(chats: SessionManager, clock: Clock) -> None:
    """From when it would have expired, and the answer says when it does now."""
    chat = chats.create()
    assert chats.extend(chat.id, 100) == chat.expires_at + 100
    clock.now = chat.expires_at + 99
    assert chats.get(chat.id) is not None
    clock.advance(1)
    assert chats.get(chat.id) is None


def test_extending_does_not_move_the_absolute_timeout(store: SessionStore, clock: Clock) -> None:
    """That holds whatever happens."""
    chats = SessionManager(store, clock=clock, idle_timeout=lambda: 600.0, absolute_timeout=1000.0)
    chat = chats.create()
    assert chats.extend(chat.id, 5000) == chat.created_at + 1000


@pytest.mark.parametrize("seconds", [0, -5, float("nan"), float("inf"), "1h"])
def test_a_session_is_extended_by_a_positive_number(chats: SessionManager, seconds: float) -> None:
    """Anything else is a mistake, and moves nothing."""
    chat = chats.create()
    with pytest.raises(ValueError, match="extended"):
        chats.extend(chat.id, seconds)
    assert chats.existing(chat.id).expires_at == chat.expires_at


def test_refreshing_renews_at_once(chats: SessionManager, clock: Clock) -> None:
    """Also within the interval of renewals."""
    chat = chats.create()
    clock.advance(10)
    assert chats.refresh(chat.id) == chat.expires_at + 10


@pytest.mark.parametrize("move", ["extend", "refresh"])
def test_what_has_ended_is_neither_extended_nor_refreshed(chats: SessionManager, move: str) -> None:
    """It stays ended."""
    chat = chats.create()
    chats.end(chat.id)
    with pytest.raises(SessionNotFound):
        chats.extend(chat.id, 5) if move == "extend" else chats.refresh(chat.id)
    assert chats.look_up(chat.id).ended_at is not None


# Many -----------------------------------------------------------------------------------------------------------------


def test_all_that_a_query_finds_are_changed_alike(chats: SessionManager) -> None:
    """Data and metadata are set, tags added and removed; what the query does not find stays as it is."""
    mine = [chats.create({"a": n}, user_id="ada", metadata={"m": n}, tags=["old"]) for n in range(3)]
    other = chats.create({"a": 9}, user_id="bob", tags=["old"])
    query = SessionQuery(user_id="ada")
    done = chats.update_many(query, data={"b": 1}, metadata={"k": "v"}, add_tags=["new"], remove_tags=["old"])
    assert done == 3
    for number, chat in enumerate(mine):
        found = chats.existing(chat.id)
        assert (found.data, found.metadata) == ({"a": number, "b": 1}, {"m": number, "k": "v"})
        assert found.tags == {"new"}
    assert chats.existing(other.id).tags == {"old"}


def test_a_bulk_change_leaves_what_has_ended(chats: SessionManager) -> None:
    """Only active sessions are changed and counted."""
    ended, active = chats.create(), chats.create()
    chats.end(ended.id)
    assert chats.update_many(SessionQuery(), add_tags=["x"]) == 1
    assert chats.look_up(ended.id).tags == frozenset()
    assert chats.look_up(active.id).tags == {"x"}


def test_repeating_a_bulk_change_changes_nothing(chats: SessionManager) -> None:
    """So it can be interrupted and run again."""
    chats.create({"a": 1})
    query = SessionQuery()
    assert [chats.update_many(query, data={"b": 2}, metadata={"k": 1}, add_tags=["x"]) for _ in range(2)] == [1, 0]


def test_a_bulk_change_is_merged_with_others(store: SessionStore, clock: Clock) -> None:
    """A session that is saved between being found and being changed keeps both."""
    chats = SessionManager(store, namespace="chat", clock=clock)
    chat = chats.create({"a": 1})
    query, save_many = SessionQuery(), store.save_many

    def meet(changes: object) -> list[bool]:
        with chats.edit(chat.id) as session:
            session.data["c"] = 3
        return save_many(changes)  # type: ignore[arg-type]

    store.save_many = meet  # type: ignore[method-assign, assignment]
    assert chats.update_many(query, data={"b": 2}, add_tags=["x"]) == 1
    found = chats.existing(chat.id)
    assert (found.data, found.tags) == ({"a": 1, "b": 2, "c": 3}, {"x"})


def test_ending_many_says_of_each_what_became_of_it(chats: SessionManager) -> None:
    """One that had ended, and one that is not there, do not keep the others from ending."""
    active, ended = chats.create(), chats.create()
    chats.end(ended.id, "before")
    outcome = chats.end_many([active.id, ended.id, UNKNOWN, active.id], "closed")
    assert outcome == {active.id: "ended", ended.id: "had ended", UNKNOWN: "missing"}
    assert [chats.look_up(chat.id).end_reason for chat in (active, ended)] == ["closed", "before"]


def test_one_id_in_place_of_many_is_told(chats: SessionManager) -> None:
    """Its characters are no ids."""
    with pytest.raises(ValueError, match="list or set of ids"):
        chats.end_many(chats.create().id)


def test_many_cannot_be_ended_as_regenerated(chats: SessionManager) -> None:
    """That reason says that a session goes on elsewhere."""
    with pytest.raises(ValueError, match="regenerated"):
        chats.end_many([chats.create().id], "regenerated")


# Together -------------------------------------------------------------------------------------------------------------


def test_a_transaction_stores_all(chats: SessionManager) -> None:
    """Changed, created, ended and deleted sessions together."""
    one, other, closed, gone = (chats.create({"n": number}) for number in range(4))
    with chats.transaction() as together:
        together.get(one.id).data["n"] -= 5
        together.get(other.id).metadata["k"] = 1
        made = together.create({"n": 9}, user_id="ada", tags=["x"])
        together.end(closed.id, "merged")
        together.delete(gone.id)
    assert data_of(chats, one) == {"n": -5}
    assert chats.existing(other.id).metadata == {"k": 1}
    assert (data_of(chats, made), chats.look_up(made.id).user_id) == ({"n": 9}, "ada")
    assert [chats.look_up(chat.id).end_reason for chat in (closed, gone)] == ["merged", "deleted"]


def test_a_transaction_stores_nothing_if_its_block_fails(chats: SessionManager) -> None:
    """The error goes on, and every session is as it was."""
    one = chats.create({"n": 1})

    def attempt() -> None:
        with chats.transaction() as together:
            together.get(one.id).data["n"] = 2
            together.create()
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        attempt()
    assert data_of(chats, one) == {"n": 1}
    assert chats.stats().total == 1


def test_a_transaction_that_fails_leaves_what_ended_under_a_key(chats: SessionManager) -> None:
    """What ended makes room for the next session of its key once that is stored, and not before."""
    ended = chats.create({"n": 1}, key="k")
    chats.end(ended.id, "closed")

    def attempt() -> None:
        with chats.transaction() as together:
            together.create(key="k")
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        attempt()
    assert chats.look_up(ended.id).end_reason == "closed"
    with chats.transaction() as together:
        made = together.create({"n": 2}, key="k")
    assert (made.id, data_of(chats, made), chats.stats().total) == (ended.id, {"n": 2}, 2)


def test_a_key_in_use_is_a_conflict_in_a_transaction(chats: SessionManager) -> None:
    """At once, and not only at the end of the block."""
    chats.create(key="k")
    with chats.transaction() as together, pytest.raises(SessionConflict, match="active already"):
        together.create(key="k")


def test_what_is_changed_and_ended_in_a_transaction_keeps_the_change(chats: SessionManager) -> None:
    """The last word is stored with the end."""
    one = chats.create({"n": 1})
    with chats.transaction() as together:
        together.get(one.id).data["n"] = 2
        together.get(one.id).metadata["title"] = "Done"
        together.end(one.id)
    closed = chats.load(one.id)
    assert closed is not None
    assert (closed.data, closed.metadata, closed.version) == ({"n": 2}, {"title": "Done"}, one.version + 1)


def test_a_transaction_that_meets_another_change_stores_nothing(chats: SessionManager) -> None:
    """A sum over several sessions is right only if none of them was changed."""
    one, other = chats.create({"n": 1}), chats.create({"n": 1})

    def attempt() -> None:
        with chats.transaction() as together:
            together.get(one.id).data["n"] = 2
            together.get(other.id).data["n"] = 0
            with chats.edit(one.id) as session:
                session.data["n"] = 7

    with pytest.raises(SessionConflict, match=one.id):
        attempt()
    assert (data_of(chats, one), data_of(chats, other)) == ({"n": 7}, {"n": 1})


def test_what_is_changed_in_a_session_that_a_transaction_ends_is_stored(chats: SessionManager) -> None:
    """Such as where it went on: its data, metadata and tags are as they were at the end."""
    chat = chats.create({"n": 1}, metadata={"title": "Trip"})
    with chats.transaction() as together:
        session = together.get(chat.id)
        session.data["n"] = 2
        session.metadata["merged into"] = "another"
        session.tags.add("x")
        together.end(chat.id, "merged")
    found = chats.load(chat.id)
    assert found is not None
    assert (found.data, found.metadata, found.tags) == ({"n": 2}, {"title": "Trip", "merged into": "another"}, {"x"})
    assert (found.end_reason, found.version) == ("merged", 2)


def test_a_transaction_hands_out_one_object_per_session(chats: SessionManager) -> None:
    """Two parts of a block that ask for the same session change the same one."""
    one = chats.create()
    with chats.transaction() as together:
        assert together.get(one.id) is together.get(one.id)


def test_a_transaction_needs_active_sessions(chats: SessionManager) -> None:
    """What has ended is not changed."""
    one = chats.create()
    chats.end(one.id)
    with chats.transaction() as together:
        for use in (together.get, together.end, together.delete):
            with pytest.raises(SessionNotFound):
                use(one.id)


def test_a_transaction_tells_of_what_it_did_once_it_is_stored(chats: SessionManager) -> None:
    """Each happening once, none of them if it comes to nothing."""
    one, other, third = (chats.create({"n": 1}) for _ in range(3))
    heard: list[object] = []

    def note(sender: object, event: object) -> None:
        heard.append(event)

    signals = [session_saved, session_ended, session_deleted, session_created]
    for signal in signals:
        signal.connect(note, sender=chats)
    with chats.transaction() as together:
        together.get(one.id).data["n"] = 2
        together.end(other.id)
        together.delete(third.id)
        assert heard == []
    assert [type(event) for event in heard] == [SessionSaved, SessionEnded, SessionDeleted]


def test_a_transaction_evicts_as_a_sign_in_does(store: SessionStore, clock: Clock) -> None:
    """The cap holds for sessions that are created together with others."""
    chats = SessionManager(store, namespace="chat", clock=clock, max_per_user=1)
    old = chats.create(user_id="ada")
    clock.advance(1)
    with chats.transaction() as together:
        new = together.create(user_id="ada")
    assert [chats.get(chat.id) is not None for chat in (old, new)] == [False, True]


def test_a_transaction_does_not_create_where_sign_ins_are_refused(store: SessionStore, clock: Clock) -> None:
    """Whether one is too many is known only when it is stored, and then the others would be too."""
    chats = SessionManager(store, namespace="chat", clock=clock, max_per_user=1, cap_policy="reject")
    with chats.transaction() as together:
        with pytest.raises(ValueError, match="reject"):
            together.create(user_id="ada")
        together.create()


def test_a_transaction_heeds_the_limit_of_the_store(store: SessionStore, clock: Clock) -> None:
    """A full store takes no session in a transaction either, and one that is nearly full not more than it has room for."""
    chats = SessionManager(store, namespace="chat", clock=clock, max_sessions=3)
    chats.create()

    def create(count: int) -> None:
        with chats.transaction() as together:
            for _ in range(count):
                together.create()

    with pytest.raises(SessionLimitReached):
        create(3)
    create(2)
    with pytest.raises(SessionLimitReached):
        create(1)
    assert chats.stats().total == 3


def test_deleting_one_version(chats: SessionManager) -> None:
    """With an expected version a session that was changed since is left as it is."""
    session = chats.create({"x": 1})
    with chats.edit(session.id) as changed:
        changed.data["x"] = 2
    with pytest.raises(SessionConflict, match="expected version 1, but it is version 2 now"):
        chats.delete(session.id, expected_version=1)
    assert chats.existing(session.id).data == {"x": 2}
    assert chats.delete(session.id, expected_version=2)


def test_a_page_that_begins_at_a_position(chats: SessionManager) -> None:
    """The position of the last record of a page leads on as the record itself does."""
    first, second = sorted(chats.create().id for _ in range(2))
    position = SessionQuery(order_by="id").position(chats.existing(first).record)
    assert [record.id for record in chats.find(order_by="id", after=position)] == [second]


@pytest.fixture(autouse=True)
def _close(store: SessionStore) -> Iterator[None]:
    yield
    store.close()
