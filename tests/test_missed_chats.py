"""Promises of sessions of the application's own and their histories that the other tests take for granted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from flask_persist_session import (
    SerializationError,
    SessionConflict,
    SessionManager,
    SessionNotFound,
    SessionStore,
    StoredSession,
    open_store,
    session_corrupt,
    session_expired,
)
from flask_persist_session.ending import EndingReport
from tests.conftest import Clock

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
