"""Promises of sessions of the application's own and their histories that the other tests take for granted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

import pytest
from flask import Flask

from flask_persist_session import (
    Change,
    ConfigError,
    HistoryConflict,
    LogEntry,
    PersistSession,
    SerializationError,
    SessionConflict,
    SessionLimitReached,
    SessionManager,
    SessionNotFound,
    SessionQuery,
    SessionStore,
    SessionTooLarge,
    StoredSession,
    StoreError,
    open_store,
    session_corrupt,
    session_created,
    session_ended,
    session_expired,
    session_saved,
)
from flask_persist_session import ending as ending_module
from flask_persist_session.ending import EndingReport, pause_after
from flask_persist_session.migrate import Migration
from flask_persist_session.sweeper import Sweeper
from flask_persist_session.testing import make_record
from tests.conftest import Clock
from tests.servers import wait_until

MakeApp = Callable[..., Flask]
IDLE = 600.0


@pytest.fixture
def memory() -> SessionStore:
    return open_store("memory://")


def chats_on(store: SessionStore, clock: Callable[[], float], **options: Any) -> SessionManager:
    given = {"idle_timeout": lambda: IDLE, "renew_interval": 0.0, "keep_ended": 3600.0, **options}
    return SessionManager(store.namespace("chat"), namespace="chat", keep_data=True, clock=clock, **given)


@pytest.fixture
def chats(memory: SessionStore, clock: Clock) -> SessionManager:
    return chats_on(memory, clock)


def say(chats: SessionManager, session: StoredSession, *contents: Any) -> None:
    chats.history(session.id).append(*({"role": "user", "content": content} for content in contents))


def said(chats: SessionManager, session_id: str) -> list[Any]:
    return [entry.content for entry in chats.history(session_id)]


def meanwhile(monkeypatch: pytest.MonkeyPatch, where: object, name: str, act: Callable[[], object]) -> None:
    """Have *act* happen just before the next call of a method, as somebody else may do at that moment."""
    call = getattr(where, name)

    def then(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        act()
        return call(*arguments, **options)

    monkeypatch.setattr(where, name, then)


@contextmanager
def heard(signal: Any, sender: object) -> Iterator[list[Any]]:
    """The events of a signal."""
    events: list[Any] = []

    def hear(_sender: object, event: Any) -> None:
        events.append(event)

    with signal.connected_to(hear, sender):
        yield events


# Keys -----------------------------------------------------------------------------------------------------------------


def test_whoever_goes_on_or_creates_says_what_the_new_one_is_like(chats: SessionManager, clock: Clock) -> None:
    """Metadata, tags and lifetime are those of the session that is created."""
    made = chats.resume_or_create(key="k", user_id="ada", metadata={"title": "Trip"}, tags=["x"], lifetime=60)
    assert (made.metadata, made.tags) == ({"title": "Trip", "lifetime": 60}, {"x"})
    assert made.expires_at == clock() + 60


def test_two_who_create_the_same_at_the_same_moment(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though their sessions do not differ in anything, only one of them is told that it is new."""
    others: list[StoredSession] = []
    meanwhile(monkeypatch, chats.store, "save", lambda: others.append(chats.resume_or_create(key="k", user_id="ada")))
    mine = chats.resume_or_create(key="k", user_id="ada")
    assert [others[0].new, mine.new] == [True, False]
    assert mine.id == others[0].id


def test_a_key_that_somebody_else_uses_anew_at_this_moment(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making room for the next session of a key does not remove the one that is there by then."""
    chats.end(chats.resume_or_create(key="k", user_id="ada", data={"step": 1}).id)
    act = lambda: chats.resume_or_create(key="k", user_id="ada", data={"step": 2})  # noqa: E731
    meanwhile(monkeypatch, chats.store, "delete", act)
    mine = chats.resume_or_create(key="k", user_id="ada", data={"step": 3})
    assert (mine.new, mine.data) == (False, {"step": 2})


def test_nothing_of_what_was_deleted_under_a_key_is_kept(chats: SessionManager) -> None:
    """Not even a record without data, when the key is used anew."""
    chats.delete(chats.resume_or_create(key="k", user_id="ada", data={"step": 1}).id)
    new = chats.resume_or_create(key="k", user_id="ada")
    assert [record.id for record in chats.find()] == [new.id]


def test_a_key_is_not_lost_to_a_record_that_cannot_be_read(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged session costs itself, and is reported; its user goes on under the same name."""
    old = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    get = chats.store.get

    def damaged(session_id: str) -> Any:
        found = get(session_id)
        if found is not None and found.created_at == old.created_at and found.data == old.record.data:
            raise SerializationError("damaged")
        return found

    monkeypatch.setattr(chats.store, "get", damaged)
    with heard(session_corrupt, chats) as events:
        new = chats.create({"step": 2}, key="k", user_id="ada")
    assert [event.session_id for event in events] == [old.id]
    assert (new.id, chats.existing(new.id).data) == (old.id, {"step": 2})


def test_a_long_history_is_kept_whole_when_its_key_is_used_anew(chats: SessionManager) -> None:
    """However many steps copying takes."""
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    say(chats, first, *range(1201))
    chats.end(first.id)
    new = chats.resume_or_create(key="k", user_id="ada")
    [old] = [record.id for record in chats.find() if record.id != new.id]
    assert said(chats, old) == list(range(1201))


def test_what_the_next_session_of_a_key_is_told_is_not_copied_to_the_last(
    chats: SessionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is late in keeping what ended leaves out what belongs to the session that has begun since."""
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    say(chats, first, "old")
    chats.end(first.id)
    read = chats.store.history.read

    def late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        say(chats, chats.resume_or_create(key="k", user_id="ada"), "new", "and newer")
        return read(*arguments, **options)

    monkeypatch.setattr(chats.store.history, "read", late)
    new = chats.resume_or_create(key="k", user_id="ada")
    [old] = [record.id for record in chats.find() if record.id != new.id]
    assert (said(chats, old), said(chats, new.id)) == (["old"], ["new", "and newer"])


def test_what_ends_with_its_key_is_handed_over_only_when_it_is_copied(memory: SessionStore, clock: Clock) -> None:
    """A worker that looks while the history is on its way is not given a part of it."""
    seen: list[list[Any]] = []
    chats = chats_on(memory, clock, on_end=lambda session: seen.append(said(chats, session.id)))
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    say(chats, first, "one", "two")
    chats.end(first.id)
    restore = chats.store.history.restore
    looked: list[EndingReport] = []

    def slow(session_id: str, entries: Any) -> int:
        looked.append(chats.process_ended())
        return restore(session_id, entries)

    chats.store.history.restore = slow  # type: ignore[method-assign]
    chats.resume_or_create(key="k", user_id="ada")
    clock.advance(61)
    chats.process_ended()
    assert looked
    assert seen[-1] == ["one", "two"]
    assert [] not in seen


def test_that_a_session_expired_is_told_when_its_key_is_used_anew(memory: SessionStore, clock: Clock) -> None:
    """Once: here it ends, and what processes it later does not say so again."""
    chats = chats_on(memory, clock, on_end=lambda session: None)
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    clock.advance(IDLE + 1)
    with heard(session_expired, chats) as events:
        chats.resume_or_create(key="k", user_id="ada")
        clock.advance(100)
        assert chats.process_ended() == EndingReport(processed=1)
    assert [event.session_id for event in events] == [first.id]


# Making way -----------------------------------------------------------------------------------------------------------


def test_nothing_is_appended_to_a_session_that_makes_way(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its history is being copied it has ended, so that no answer is stored to what is removed then."""
    chat = chats.create({"step": 1}, user_id="ada")
    say(chats, chat, "one")
    refused: list[Exception] = []

    def answer() -> None:
        try:
            say(chats, chat, "late")
        except SessionNotFound as error:
            refused.append(error)

    meanwhile(monkeypatch, chats.store.history, "read", answer)
    chats.make_way(chats.look_up(chat.id))
    assert len(refused) == 1
    [old] = chats.find()
    assert said(chats, old.id) == ["one"]


def test_a_session_that_was_changed_meanwhile_does_not_make_way(chats: SessionManager) -> None:
    """What is removed is what was seen, and nothing else."""
    chat = chats.create({"step": 1}, user_id="ada")
    chats.end(chat.id)
    seen = chats.look_up(chat.id)
    chats.store.save(replace(seen, metadata={"summary": "new"}, version=seen.version + 1), expected=seen.version)
    with pytest.raises(SessionConflict):
        chats.make_way(seen)
    assert chats.look_up(chat.id).metadata == {"summary": "new"}


# Editing --------------------------------------------------------------------------------------------------------------


def test_a_change_within_a_value_of_the_metadata_is_noticed(chats: SessionManager) -> None:
    """As it is in the data."""
    chat = chats.create(metadata={"topics": ["trips"], "of": {"a": 1}})
    with chats.edit(chat.id) as session:
        session.metadata["topics"].append("food")  # type: ignore[union-attr]
        session.metadata["of"]["a"] = 2  # type: ignore[index, call-overload]
    assert chats.existing(chat.id).metadata == {"topics": ["trips", "food"], "of": {"a": 2}}


def test_an_edit_of_a_version_is_told_of(chats: SessionManager) -> None:
    """As any other save."""
    chat = chats.create({"a": 1})
    with heard(session_saved, chats) as events, chats.edit(chat.id, expected_version=1) as session:
        session.data["a"] = 2
    assert [event.session_id for event in events] == [chat.id]


def test_an_edit_of_a_version_that_ends_meanwhile_is_told(chats: SessionManager) -> None:
    """Not as a conflict, after which it could be tried again, but as what it is."""
    chat = chats.create({"a": 1})

    def attempt() -> None:
        with chats.edit(chat.id, expected_version=1) as session:
            session.data["a"] = 2
            chats.end(chat.id, "closed")

    with pytest.raises(SessionNotFound, match="closed"):
        attempt()


@pytest.mark.parametrize("move", ["extend", "refresh"])
def test_moving_the_expiry_takes_others_into_account(
    chats: SessionManager, clock: Clock, monkeypatch: pytest.MonkeyPatch, move: str
) -> None:
    """What somebody else saves at this moment is kept, and the expiry moves all the same."""
    chat = chats.create({"a": 1})
    clock.advance(10)

    def change() -> None:
        with chats.edit(chat.id) as session:
            session.data["a"] = 2

    meanwhile(monkeypatch, chats.store, "save", change)
    moved = chats.extend(chat.id, 500) if move == "extend" else chats.refresh(chat.id)
    assert moved == chats.look_up(chat.id).expires_at == chat.expires_at + (510 if move == "extend" else 10)
    assert chats.existing(chat.id).data == {"a": 2}


def test_the_answer_of_extending_is_when_it_really_expires(memory: SessionStore, clock: Clock) -> None:
    """Where an absolute timeout was set since, that counts, and not what is stored."""
    chat = chats_on(memory, clock, idle_timeout=lambda: 5000.0).create()
    chats = chats_on(memory, clock, idle_timeout=lambda: 5000.0, absolute_timeout=1000.0)
    assert chats.extend(chat.id, 60) == chat.created_at + 1000


@pytest.mark.parametrize("seen", [1, 2])
def test_a_session_is_deleted_in_the_version_that_was_seen(chats: SessionManager, seen: int) -> None:
    """In another one it stays."""
    chat = chats.create({"a": 1})
    with chats.edit(chat.id) as session:
        session.data["a"] = 2
    if seen == 2:
        assert chats.delete(chat.id, expected_version=2)
        assert chats.get(chat.id) is None
        return
    with pytest.raises(SessionConflict, match="expected version 1, but it is version 2"):
        chats.delete(chat.id, expected_version=1)
    assert chats.existing(chat.id).data == {"a": 2}


def test_what_cannot_be_read_is_not_deleted_as_a_version(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can know whether it is that version."""
    chat = chats.create({"a": 1})

    def damaged(_: str) -> Any:
        raise SerializationError("damaged")

    monkeypatch.setattr(chats.store, "get", damaged)
    with pytest.raises(SerializationError):
        chats.delete(chat.id, expected_version=1)
    monkeypatch.undo()
    assert chats.get(chat.id) is not None


# Many -----------------------------------------------------------------------------------------------------------------


def test_a_bulk_change_leaves_what_has_expired(chats: SessionManager, clock: Clock) -> None:
    """Though it is still in the store."""
    expired = chats.create()
    clock.advance(IDLE + 1)
    assert chats.update_many(SessionQuery(), add_tags=["x"]) == 0
    assert chats.look_up(expired.id).tags == frozenset()


def test_a_bulk_change_is_told_of(chats: SessionManager) -> None:
    """One event for each session that was changed."""
    made = {chats.create({"a": number}).id for number in range(3)}
    chats.create({"b": 1})
    with heard(session_saved, chats) as events:
        chats.update_many(SessionQuery(), data={"b": 1})
    assert {event.session_id for event in events} == made


def test_a_bulk_change_goes_on_behind_a_damaged_session(chats: SessionManager) -> None:
    """That costs itself, and is reported."""
    made = [chats.create({"a": number}) for number in range(3)]
    chats.store.save(replace(made[1].record, data=b"\xff", version=2), expected=1)
    with heard(session_corrupt, chats) as events:
        assert chats.update_many(SessionQuery(), data={"b": 1}) == 2
    assert [event.session_id for event in events] == [made[1].id]
    assert [chats.existing(made[number].id).data for number in (0, 2)] == [{"a": 0, "b": 1}, {"a": 2, "b": 1}]


def test_all_parts_of_a_bulk_change_are_merged(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata and both kinds of tags too, where somebody else changes a session at this moment."""
    chat = chats.create({"a": 1}, metadata={"m": 1}, tags=["old", "kept"])

    def change() -> None:
        with chats.edit(chat.id) as session:
            session.metadata["n"] = 2
            session.tags.add("more")

    meanwhile(monkeypatch, chats.store, "save_many", change)
    done = chats.update_many(SessionQuery(), metadata={"k": "v"}, add_tags=["new"], remove_tags=["old"])
    found = chats.existing(chat.id)
    assert (done, found.metadata) == (1, {"m": 1, "n": 2, "k": "v"})
    assert found.tags == {"kept", "more", "new"}


@pytest.mark.parametrize("what", ["ended", "done by another"])
def test_what_a_bulk_change_did_not_change_is_not_counted(
    chats: SessionManager, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Because it ended at this moment, or because somebody else made the same change."""
    chat = chats.create({"a": 1})

    def change() -> None:
        if what == "ended":
            chats.end(chat.id)
        else:
            chats.update_many(SessionQuery(), add_tags=["x"])

    meanwhile(monkeypatch, chats.store, "save_many", change)
    assert chats.update_many(SessionQuery(), add_tags=["x"]) == 0


# Together -------------------------------------------------------------------------------------------------------------


def test_what_a_transaction_creates_is_as_it_was_described(chats: SessionManager, clock: Clock) -> None:
    """Under its key, within its tenant, with its metadata and lifetime; and it is told of."""
    with heard(session_created, chats) as events, chats.transaction() as together:
        made = together.create({"a": 1}, user_id=7, tenant_id="acme", metadata={"m": 1}, tags=["x"], lifetime=60, key="k")
    found = chats.resume_or_create(key="k", user_id="7", tenant_id="acme")
    assert (found.new, found.id, found.data) == (False, made.id, {"a": 1})
    assert (found.metadata, found.tags, found.expires_at) == ({"m": 1, "lifetime": 60}, {"x"}, clock() + 60)
    assert [event.session_id for event in events] == [made.id]


@pytest.mark.parametrize("state", ["active", "ended"])
def test_a_transaction_creates_under_a_key_that_is_free(chats: SessionManager, state: str) -> None:
    """What has ended under it is kept beside; an active session is a conflict, and stays as it is."""
    old = chats.create({"step": 1}, key="k", user_id="ada")
    if state == "active":
        with pytest.raises(SessionConflict, match="active already"), chats.transaction() as together:
            together.create({"step": 2}, key="k", user_id="ada")
        assert chats.existing(old.id).data == {"step": 1}
        return
    chats.end(old.id)
    with chats.transaction() as together:
        together.create({"step": 2}, key="k", user_id="ada")
    assert chats.existing(old.id).data == {"step": 2}
    assert [chats.decode(record) for record in chats.find(state="ended")] == [{"step": 1}]


def test_what_a_transaction_deletes_leaves_nothing(chats: SessionManager) -> None:
    """Neither data nor description nor history."""
    chat = chats.create({"a": 1}, metadata={"title": "Trip"}, tags=["x"])
    say(chats, chat, "one")
    with chats.transaction() as together:
        together.delete(chat.id)
    record = chats.look_up(chat.id)
    assert (record.data, record.metadata, record.tags) == (b"", {}, frozenset())
    assert chats.store.history.count(chat.id) == 0


def test_a_transaction_does_not_end_a_session_that_was_changed_meanwhile(chats: SessionManager) -> None:
    """Whoever ended it on account of what it said has not seen all."""
    chat, other = chats.create({"n": 1}), chats.create({"n": 1})

    def attempt(end: str) -> None:
        with chats.transaction() as together:
            together.get(other.id).data["n"] = 5
            getattr(together, end)(chat.id)
            with chats.edit(chat.id) as session:
                session.data["n"] += 1

    for end in "end", "delete":
        with pytest.raises(SessionConflict, match=chat.id):
            attempt(end)
    assert (chats.existing(chat.id).data, chats.existing(other.id).data) == ({"n": 3}, {"n": 1})


def test_what_a_transaction_only_reads_may_change(chats: SessionManager) -> None:
    """It is no conflict, and keeps what others stored."""
    read, changed = chats.create({"n": 1}), chats.create()
    with chats.transaction() as together:
        together.get(changed.id).data["sum"] = together.get(read.id).data["n"]
        with chats.edit(read.id) as session:
            session.data["n"] = 2
    assert (chats.existing(read.id).data, chats.existing(changed.id).data) == ({"n": 2}, {"sum": 1})


def test_a_transaction_ends_no_session_as_regenerated(chats: SessionManager) -> None:
    """That reason says that it goes on under another token."""
    chat = chats.create()
    with pytest.raises(ValueError, match="regenerated"), chats.transaction() as together:
        together.end(chat.id, "regenerated")
    assert chats.get(chat.id) is not None


def test_a_session_of_a_transaction_can_be_gone_on_with(chats: SessionManager) -> None:
    """It is the version that was stored, and its next change is none of others."""
    chat = chats.create({"n": 1})
    with chats.transaction() as together:
        session = together.get(chat.id)
        session.data["n"] = 2
        session.metadata["m"] = 1
    assert (session.version, session.redescribed()) == (2, None)
    assert chats.save(session) == "unchanged"


def test_what_transactions_create_counts_for_the_limit_of_the_store(memory: SessionStore, clock: Clock) -> None:
    """Without the store being counted each time."""
    chats = chats_on(memory, clock, max_sessions=2)
    for _ in range(2):
        with chats.transaction() as together:
            together.create()
    with pytest.raises(SessionLimitReached):
        chats.create()


def test_a_tenants_transaction_creates_within_it(chats: SessionManager) -> None:
    """Nobody need say so, and nobody can say otherwise."""
    acme = chats.for_tenant("acme")
    with acme.transaction() as together:
        made = together.create(user_id="ada")
        with pytest.raises(ValueError, match="knows no 'other'"):
            together.create(tenant_id="other")
    assert chats.existing(made.id).tenant_id == "acme"


def test_after_an_edit_its_metadata_are_those_that_were_stored(chats: SessionManager) -> None:
    """Merged with what others changed meanwhile."""
    chat = chats.create(metadata={"a": 1})
    with chats.edit(chat.id) as session:
        session.metadata["b"] = 2
        with chats.edit(chat.id) as other:
            other.metadata["c"] = 3
            other.tags.add("x")
    assert (session.metadata, session.tags) == ({"a": 1, "b": 2, "c": 3}, {"x"})
    assert session.redescribed() is None


def test_nobody_sees_a_half_of_a_transaction_in_memory(memory: SessionStore) -> None:
    """Who looks while it is being stored waits until all of it is."""
    records = [make_record(number) for number in range(2)]
    memory.transaction([Change(record=record, expected=0) for record in records])
    seen: list[list[int]] = []

    class Looking(dict[str, Any]):
        """Metadata while the copying of which somebody else reads all sessions."""

        def __deepcopy__(self, _: object) -> dict[str, Any]:
            reader = Thread(target=lambda: seen.append([memory.get(record.id).version for record in records]))  # type: ignore[union-attr]
            reader.start()
            reader.join(0.2)  # it waits, or is done at once
            readers.append(reader)
            return dict(self)

    readers: list[Thread] = []
    changes = [replace(record, version=2, metadata=Looking(a=1)) for record in records]
    memory.transaction([Change(record=record, expected=1) for record in changes])
    for reader in readers:
        reader.join()
    assert seen
    assert all(versions in ([1, 1], [2, 2]) for versions in seen)


def test_what_a_transaction_stored_is_out_of_reach(memory: SessionStore) -> None:
    """Who goes on changing the metadata that were handed over changes nothing in the store."""
    metadata: dict[str, Any] = {"topics": ["trips"]}
    record = make_record(metadata=metadata)
    memory.transaction([Change(record=record, expected=0)])
    metadata["topics"].append("food")
    found = memory.get(record.id)
    assert found is not None
    assert found.metadata == {"topics": ["trips"]}


# Histories ------------------------------------------------------------------------------------------------------------


def test_an_entry_may_have_just_so_many_bytes(memory: SessionStore, clock: Clock) -> None:
    """One more is too many."""
    entry = {"role": "user", "content": "x" * 50}
    probe = chats_on(memory, clock)
    sample = probe.create()
    probe.history(sample.id).append(entry)
    [stored] = memory.namespace("chat").history.read(sample.id)
    for max_bytes in len(stored.data), len(stored.data) - 1:
        chats = chats_on(memory, clock, max_bytes=max_bytes)
        history = chats.history(chats.create().id)
        if max_bytes == len(stored.data):
            assert history.append(entry) == 1
        else:
            with pytest.raises(SessionTooLarge, match="max_bytes"):
                history.append(entry)


def test_a_conflict_does_not_carry_a_whole_dialogue(chats: SessionManager) -> None:
    """Whoever missed more than a hundred entries gets the first of them, from which to read on."""
    chat = chats.create()
    say(chats, chat, *range(1, 250))
    with pytest.raises(HistoryConflict) as conflict:
        chats.history(chat.id).append({"role": "user", "content": "mine"}, expected_seq=20)
    assert [entry.seq for entry in conflict.value.missed] == list(range(21, 121))


def test_a_search_leaves_nothing_out_between_its_pages(chats: SessionManager) -> None:
    """Every entry of a long history is looked at, once."""
    chat = chats.create()
    say(chats, chat, *(f"needle {number}" for number in range(1, 1203)))
    found = chats.history(chat.id).search("needle", limit=2000)
    assert [entry.seq for entry in found] == list(range(1, 1203))


def test_what_can_be_decoded_but_is_no_entry_is_named(chats: SessionManager) -> None:
    """As damage is, and not by an error of Python."""
    chat = chats.create({"no": "entry"})
    chats.store.history.append(chat.id, [chat.record.data], created_at=1.0)
    with pytest.raises(SerializationError, match=f"entry 1 of the history of {chat.id}"):
        chats.history(chat.id).latest()


def test_the_latest_256_appends_can_be_repeated(store: SessionStore, clock: Clock) -> None:
    """Of more that had a key, at least these are remembered, with what each of them was answered."""
    chats = chats_on(store, clock, renew_interval=60.0)
    history = chats.history(chats.create().id)

    def append(number: int) -> int:
        return history.append({"role": "user", "content": number}, idempotency_key=f"form {number}")

    assert [append(number) for number in range(1, 301)] == list(range(1, 301))
    assert [append(number) for number in range(45, 301)] == list(range(45, 301))
    assert history.count() == 300


def test_a_long_history_is_migrated_whole(memory: SessionStore, clock: Clock) -> None:
    """However many steps it takes, nothing is left out between them."""
    chats, target = chats_on(memory, clock), open_store("memory://")
    chat = chats.create()
    say(chats, chat, *range(1, 1202))
    Migration(chats.store, target.namespace("chat"), clock).run()
    moved = chats_on(target, clock)
    assert said(moved, chat.id) == list(range(1, 1202))


# Endings --------------------------------------------------------------------------------------------------------------


def test_that_a_session_ended_is_not_told_again_when_it_is_handed_over(memory: SessionStore, clock: Clock) -> None:
    """It was told when it ended, however often its handler is called."""

    def fails(_: StoredSession) -> None:
        raise RuntimeError

    chats = chats_on(memory, clock, on_end=fails)
    with heard(session_ended, chats) as ended, heard(session_expired, chats) as expired:
        chats.end(chats.create().id, "closed")
        for _ in range(2):
            assert chats.process_ended() == EndingReport(failed=1)
            clock.advance(1000)
    assert ([event.reason for event in ended], expired) == (["closed"], [])


def test_a_receiver_that_fails_does_not_keep_a_session_from_its_handler(memory: SessionStore, clock: Clock) -> None:
    """In the background what receivers raise is logged, and the session that has expired is handed over all the same."""
    got: list[str] = []

    def handler(session: StoredSession) -> None:
        got.append(session.id)

    def fails(_sender: object, event: Any) -> None:
        raise RuntimeError("a receiver")

    chats = chats_on(memory, clock, on_end=handler)
    chat = chats.create()
    sweeper = Sweeper({"chat": chats}, 600)
    clock.advance(250)  # less than a clock that was set
    chats.store.save(replace(chat.record, expires_at=clock(), version=2), expected=1)
    with session_expired.connected_to(fails, chats):
        assert sweeper.sweep()
    assert got == [chat.id]


def test_a_summary_that_somebody_else_kept_stays(memory: SessionStore, clock: Clock) -> None:
    """A worker that was given up for dead and comes back late changes nothing."""

    def late(_: StoredSession) -> str:
        clock.advance(100)
        assert other.process_ended() == EndingReport(processed=1)
        return "too late"

    other = chats_on(memory, clock, on_end=lambda session: "in time")
    chats = chats_on(memory, clock, on_end=late)
    chat = chats.create()
    chats.end(chat.id)
    assert chats.process_ended() == EndingReport()
    assert chats.look_up(chat.id).metadata["summary"] == "in time"


def test_a_worker_puts_off_only_what_it_still_has(memory: SessionStore, clock: Clock) -> None:
    """Not what another one has taken since, whose pause that would change."""
    chats = chats_on(memory, clock, on_end=lambda session: None)
    chat = chats.create()
    chats.end(chat.id)
    taken = chats._take(chats.look_up(chat.id), lambda send: send())
    clock.advance(100)
    again = chats._take(chats.look_up(chat.id), lambda send: send())
    assert taken is not None
    clock.advance(1)
    chats._put_off(taken)
    assert chats.look_up(chat.id) == again


def test_a_handler_that_is_interrupted_is_not_a_failure(memory: SessionStore, clock: Clock) -> None:
    """Ctrl-C ends the process; the session is due again."""

    def interrupted(_: StoredSession) -> None:
        raise KeyboardInterrupt

    chats = chats_on(memory, clock, on_end=interrupted)
    chats.end(chats.create().id)
    with pytest.raises(KeyboardInterrupt):
        chats.process_ended()
    clock.advance(100)
    assert chats_on(memory, clock, on_end=lambda session: None).process_ended() == EndingReport(processed=1)


def test_a_store_that_fails_while_a_handler_runs(
    memory: SessionStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That the session could not be put off is logged, and tried again; the handler goes on."""
    monkeypatch.setattr(ending_module, "_BEAT", 0.001)
    get, failed = memory.namespace("chat").get, Event()

    def failing(session_id: str) -> Any:
        if current_thread().name == "session-ending" and not failed.is_set():
            failed.set()
            raise StoreError("away for a moment")
        return get(session_id)

    def slow(session: StoredSession) -> str:
        monkeypatch.setattr(chats.store, "get", failing)
        assert failed.wait(30)
        before = get(session.id)
        wait_until(lambda: get(session.id) != before, "the next beat")
        return "done"

    chats = chats_on(memory, clock, on_end=slow)
    chats.end(chats.create().id)
    assert chats.process_ended() == EndingReport(processed=1)
    assert "may be handled twice: away for a moment" in caplog.text


# Namespaces -----------------------------------------------------------------------------------------------------------


def test_a_namespace_does_as_its_options_say(make_app: MakeApp, clock: Clock) -> None:
    """Each option is that of these sessions, whatever the settings have for others."""
    app = make_app(PERSIST_SESSION_MAX_PER_USER=1, PERSIST_SESSION_MAX_ENTRIES=3)
    chats = PersistSession().namespace(
        "chat",
        app=app,
        idle_timeout=500,
        absolute_timeout="1000s",
        renew_interval=0,
        keep_ended="50s",
        max_per_user=2,
        cap_policy="reject",
        max_bytes=500,
        max_entries=2,
    )
    chats.clock = clock
    first, _ = (chats.create(user_id="ada") for _ in range(2))
    clock.advance(1)
    with pytest.raises(SessionLimitReached):
        chats.create(user_id="ada")
    with pytest.raises(SessionTooLarge):
        chats.create({"a": "x" * 600})
    with pytest.raises(SessionTooLarge):
        say(chats, first, 1, 2, 3)
    assert chats.extend(first.id, 9000) == first.created_at + 1000
    chats.end(first.id)
    assert chats.look_up(first.id).expires_at == clock() + 50


def test_a_namespace_does_as_the_settings_say_otherwise(make_app: MakeApp, clock: Clock) -> None:
    """But for the cap, which is about signing in: conversations are not limited unless it is said."""
    app = make_app(
        PERSIST_SESSION_MAX_PER_USER=1,
        PERSIST_SESSION_MAX_ENTRIES=3,
        PERSIST_SESSION_IDLE_TIMEOUT=500,
        PERSIST_SESSION_ABSOLUTE_TIMEOUT=1000,
        PERSIST_SESSION_RENEW_INTERVAL=0,
        PERSIST_SESSION_KEEP_ENDED=50,
        PERSIST_SESSION_MAX_BYTES=500,
    )
    chats = PersistSession().namespace("chat", app=app)
    chats.clock = clock
    first, second = (chats.create(user_id="ada") for _ in range(2))
    assert None not in (chats.get(first.id), chats.get(second.id))
    assert second.expires_at == clock() + 500
    with pytest.raises(SessionTooLarge):
        chats.create({"a": "x" * 600})
    with pytest.raises(SessionTooLarge):
        say(chats, first, 1, 2, 3, 4)
    assert chats.extend(first.id, 9000) == first.created_at + 1000
    chats.end(first.id)
    assert chats.look_up(first.id).expires_at == clock() + 50


def test_short_dialogues_are_those_of_the_option(make_app: MakeApp) -> None:
    """``min_entries`` of a namespace is heeded, and ``on_end`` of one is not that of another."""
    app, got = make_app(), list[str]()
    chats = PersistSession().namespace("chat", app=app, on_end=lambda session: got.append(session.id), min_entries=2)
    jobs = PersistSession().namespace("jobs", app=app)
    made = [chats.create() for _ in range(2)]
    say(chats, made[1], "one", "two")
    for chat in made:
        chats.end(chat.id)
    jobs.end(jobs.create().id)
    assert chats.process_ended() == EndingReport(processed=1, short=1)
    assert jobs.process_ended() == EndingReport()
    assert got == [made[1].id]


def test_a_namespace_whose_setting_up_failed_can_be_set_up(make_app: MakeApp) -> None:
    """The options that were refused are not those that count."""
    app = make_app()
    with pytest.raises(ConfigError, match="goes with on_end"):
        PersistSession().namespace("chat", app=app, min_entries=4)
    chats = PersistSession().namespace("chat", app=app, max_per_user=3)
    assert PersistSession().namespace("chat", app=app) is chats


def test_entries_cannot_be_counted_where_there_are_no_histories(make_app: MakeApp) -> None:
    """A store without them is told at once, and not when the first session ends."""

    class Plain(type(open_store("memory://"))):  # type: ignore[misc]
        history = SessionStore.history

        def namespace(self, name: str) -> SessionStore:
            return Plain(name)

    app = make_app(Plain())
    with pytest.raises(ConfigError, match="min_entries of the namespace 'chat'"):
        PersistSession().namespace("chat", app=app, on_end=print, min_entries=1)
    PersistSession().namespace("chat", app=app, on_end=print)


def test_namespaces_that_come_later_are_swept(make_app: MakeApp, clock: Clock) -> None:
    """What works in the background knows of all there are when it starts a run."""
    app = make_app(PERSIST_SESSION_CLEANUP_INTERVAL=600)
    state: Any = app.extensions["persist_session"]
    chats = PersistSession().namespace("chat", app=app)
    chats.create(lifetime=1)
    chats.clock = Clock(chats.clock() + 200)
    with app.app_context():
        assert state.sweeper.sweep()
    assert chats.stats().total == 0


# Sweeping -------------------------------------------------------------------------------------------------------------


def test_each_namespace_is_swept_by_whoever_holds_its_lease(memory: SessionStore, clock: Clock) -> None:
    """A process cleans up what is its own, and leaves what another one holds."""
    managers = {name: SessionManager(memory.namespace(name), namespace=name, clock=clock) for name in ("one", "two")}
    for manager in managers.values():
        manager.create(lifetime=1)
    clock.advance(200)
    asked: list[tuple[str, str]] = []

    def leasing(name: str) -> Callable[[str, float], bool]:
        def lease(what: str, seconds: float) -> bool:
            asked.append((name, what))
            return name == "two"

        return lease

    for name, manager in managers.items():
        manager.store.lease = leasing(name)  # type: ignore[method-assign]
    assert Sweeper(managers, 600).sweep()
    assert [manager.stats().total for manager in managers.values()] == [1, 0]
    assert asked == [("one", "sweep"), ("two", "sweep")]


def test_a_tenants_history_has_all_that_a_history_has(chats: SessionManager, clock: Clock) -> None:
    """Pages, expected numbers, idempotency keys and limits hold there too."""
    acme = chats_on(chats.store, clock, max_entries=4).for_tenant("acme")
    chat = acme.create()
    history = acme.history(chat.id)
    for content in "a", "b", "c", "a":
        history.append({"role": "user", "content": content}, idempotency_key=content)
    assert history.count() == 3
    with pytest.raises(HistoryConflict) as conflict:
        history.append({"role": "user", "content": "d"}, expected_seq=2)
    assert [entry.content for entry in conflict.value.missed] == ["c"]
    assert [entry.content for entry in history.page(before=3, limit=1)] == ["b"]
    assert [entry.content for entry in history.after(1)] == ["b", "c"]
    with pytest.raises(SessionTooLarge):
        say(acme, chat, "d", "e")


def test_a_tenant_does_not_restore_into_the_history_of_another(chats: SessionManager) -> None:
    """Whatever is in it already."""
    theirs = chats.create(tenant_id="other")
    entries = [LogEntry(seq=1, data=b"x", created_at=1.0)]
    with pytest.raises(SessionNotFound):
        chats.for_tenant("acme").store.history.restore(theirs.id, entries)
    assert chats.store.history.count(theirs.id) == 0


def test_a_tenant_removes_the_version_that_it_saw(chats: SessionManager) -> None:
    """And no later one."""
    acme = chats.for_tenant("acme")
    chat = acme.create({"a": 1})
    acme.refresh(chat.id)
    assert not acme.store.delete(chat.id, expected=1)
    assert acme.get(chat.id) is not None
    assert acme.store.delete(chat.id, expected=2)


def test_a_tenant_does_not_remove_what_cannot_be_read(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can know whose it was."""
    theirs = chats.create(tenant_id="other")
    acme = chats.for_tenant("acme")
    get = chats.store.get

    def damaged(session_id: str) -> Any:
        raise SerializationError("damaged")

    monkeypatch.setattr(chats.store, "get", damaged)
    assert not acme.delete(theirs.id)
    assert get(theirs.id) is not None


# The background -------------------------------------------------------------------------------------------------------


def test_what_is_idle_is_handed_over_one_interval_later(memory: SessionStore, clock: Clock) -> None:
    """Within it requests are not noted, and might be a moment ago."""
    chats = chats_on(memory, clock, on_end=lambda session: None, renew_interval=60.0)
    chats.create()
    clock.advance(259)
    assert chats.process_ended(older_than=200) == EndingReport()
    clock.advance(2)
    assert chats.process_ended(older_than=200) == EndingReport(processed=1)


def test_sessions_that_failed_together_do_not_come_back_together() -> None:
    """The pauses of a hundred are not the same."""
    assert len({pause_after(1) for _ in range(100)}) > 50


def test_namespaces_that_come_later_are_in_the_automatic_backup(make_app: MakeApp, tmp_path: Path) -> None:
    """It backs up all that there are when it is due."""
    app = make_app(PERSIST_SESSION_BACKUP_INTERVAL=3600, PERSIST_SESSION_BACKUP_DIR=str(tmp_path / "backups"))
    chats = PersistSession().namespace("chat", app=app)
    chats.create({"a": 1})
    report = app.extensions["persist_session"].automatic_backup.turn()
    assert report.sessions == 1


def test_a_namespace_that_cannot_be_swept_does_not_keep_others_from_it(
    memory: SessionStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its trouble lasts, what has ended elsewhere is removed and handed over; the error goes on."""
    managers = {name: SessionManager(memory.namespace(name), namespace=name, clock=clock) for name in ("one", "two")}
    for manager in managers.values():
        manager.create(lifetime=1)
    clock.advance(200)

    def broken(_: object) -> Any:
        raise StoreError("the index of one is damaged")

    monkeypatch.setattr(managers["one"].store, "find", broken)
    with pytest.raises(StoreError, match="the index of one"):
        Sweeper(managers, 600).sweep()
    assert [manager.stats().total for manager in managers.values()] == [1, 0]
