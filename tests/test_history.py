"""The history of a session through the manager: what an entry is, renewal, conflicts, endings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flask_persist_session import (
    HistoryConflict,
    HistoryEntry,
    HistoryLog,
    SerializationError,
    SessionManager,
    SessionNotFound,
    SessionStore,
    SessionTooLarge,
    StoredSession,
    open_store,
)
from tests.conftest import Clock
from tests.counting import CountingStore


@pytest.fixture
def chats(store: SessionStore, clock: Clock) -> Iterator[SessionManager]:
    yield SessionManager(
        store.namespace("chat"),
        namespace="chat",
        keep_data=True,
        clock=clock,
        idle_timeout=lambda: 600.0,
        renew_interval=60.0,
        max_entries=50,
        max_bytes=1000,
    )
    store.close()


@pytest.fixture
def chat(chats: SessionManager) -> StoredSession:
    return chats.create(user_id="ada")


def said(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def contents(entries: list[HistoryEntry]) -> list[Any]:
    return [entry.content for entry in entries]


def test_what_is_appended_comes_back_with_its_number_and_time(
    chats: SessionManager, chat: StoredSession, clock: Clock
) -> None:
    """Role, content and metadata as they were, with their exact types."""
    history = chats.history(chat.id)
    assert history.append(said("Hello"), said({"parts": [1, (2,)]}, "assistant", metadata={"tokens": 7})) == 2
    assert history.latest() == [
        HistoryEntry(seq=1, role="user", content="Hello", metadata={}, created_at=clock()),
        HistoryEntry(seq=2, role="assistant", content={"parts": [1, (2,)]}, metadata={"tokens": 7}, created_at=clock()),
    ]


def test_pages_go_backwards_from_the_end(chats: SessionManager, chat: StoredSession) -> None:
    """Each is in the order of what was said."""
    history = chats.history(chat.id)
    history.append(*(said(number) for number in range(1, 8)))
    assert contents(history.latest(3)) == [5, 6, 7]
    assert contents(history.page(limit=3)) == [5, 6, 7]
    assert contents(history.page(before=5, limit=3)) == [2, 3, 4]
    assert contents(history.page(before=2, limit=3)) == [1]
    assert history.page(before=1) == []


def test_what_came_after_an_entry_is_had_by_its_number(chats: SessionManager, chat: StoredSession) -> None:
    """So whoever was cut off goes on where it stopped."""
    history = chats.history(chat.id)
    history.append(*(said(number) for number in range(1, 6)))
    assert contents(history.after(3)) == [4, 5]
    assert contents(history.after(0, limit=2)) == [1, 2]
    assert history.after(5) == []
    assert contents(list(history)) == [1, 2, 3, 4, 5]


def test_a_search_finds_the_latest_that_mention_a_text(chats: SessionManager, chat: StoredSession) -> None:
    """In content and metadata, ignoring case; not in the role, nor in what is no text."""
    history = chats.history(chat.id)
    history.append(
        said("Hello Ada"),
        said(42),
        said({"x": ["ADA again"]}),
        said("no", metadata={"to": "ada"}),
        said("Adam"),
        said("x", "ada"),
    )
    assert [entry.seq for entry in history.search("ada")] == [1, 3, 4, 5]
    assert [entry.seq for entry in history.search("ada", limit=2)] == [4, 5]
    assert [entry.seq for entry in history.search("ada", before=4)] == [1, 3]
    assert history.search("42") == []


def test_a_search_goes_through_more_than_one_page(store: SessionStore, clock: Clock) -> None:
    """The first entry of a long history is found too."""
    chats = SessionManager(store, namespace="chat", clock=clock)
    history = chats.history(chats.create().id)
    history.append(said("needle"), *(said("hay") for _ in range(1100)))
    assert [entry.seq for entry in history.search("needle")] == [1]
    assert len(list(history)) == 1101


def test_appending_renews_the_session(chats: SessionManager, chat: StoredSession, clock: Clock) -> None:
    """A dialogue that goes on does not expire."""
    clock.advance(300)
    chats.history(chat.id).append(said("Hello"))
    assert chats.existing(chat.id).expires_at == clock() + 660


def test_appending_costs_a_look_and_a_write(clock: Clock) -> None:
    """The session is renewed at most once per interval, so most entries cost two operations."""
    store = CountingStore(open_store("memory://"))
    chats = SessionManager(store, namespace="chat", clock=clock, renew_interval=60.0)
    history = chats.history(chats.create().id)
    store.operations.clear()
    history.append(said("Hello"))
    assert store.operations == {"get": 1}  # and one of the history
    clock.advance(60)
    store.operations.clear()
    history.append(said("Hello"))
    assert store.operations == {"get": 1, "save": 1}


@pytest.mark.parametrize("end", ["end", "expire", "delete", "never was"])
def test_nothing_is_appended_to_what_is_not_active(
    chats: SessionManager, chat: StoredSession, clock: Clock, end: str
) -> None:
    """An answer that is still streaming after its user has signed out stops at its next append."""
    history = chats.history(chat.id if end != "never was" else "000" + "0" * 64)
    if end != "never was":
        history.append(said("Hello"))
    {"end": chats.end, "expire": lambda _: clock.advance(700), "delete": chats.delete, "never was": str}[end](chat.id)
    with pytest.raises(SessionNotFound):
        history.append(said("more"))
    assert history.count() == (1 if end in ("end", "expire") else 0)


def test_the_history_of_what_has_ended_can_be_read(chats: SessionManager, chat: StoredSession) -> None:
    """Until the session is removed."""
    history = chats.history(chat.id)
    history.append(said("Hello"))
    chats.end(chat.id)
    assert contents(history.latest()) == ["Hello"]


def test_deleting_a_session_deletes_its_history(chats: SessionManager, chat: StoredSession) -> None:
    """Nothing of the dialogue is left."""
    history = chats.history(chat.id)
    history.append(said("Hello"))
    chats.delete(chat.id)
    assert chats.store.history.read(chat.id) == []


@pytest.mark.parametrize("expected", [True, 1.0, "1"])
def test_an_expected_number_that_is_none_is_told(chats: SessionManager, chat: StoredSession, expected: Any) -> None:
    """No store may take it for a number, or for none."""
    history = chats.history(chat.id)
    history.append(said("Hello"))
    with pytest.raises(ValueError, match="expected_seq"):
        history.append(said("more"), expected_seq=expected)
    assert history.count() == 1


def test_what_has_ended_can_be_deleted_as_well(chats: SessionManager) -> None:
    """Its data, metadata, tags and history go at once, and only once; who looks is told that it was deleted."""
    ended = chats.create({"secret": 1}, user_id="ada", metadata={"title": "Trip"}, tags=["x"])
    chats.history(ended.id).append(said("Hello"))
    chats.end(ended.id)
    assert (chats.delete(ended.id), chats.delete(ended.id)) == (True, False)
    left = chats.store.get(ended.id)
    assert left is not None
    assert (left.end_reason, left.data, left.metadata, left.tags) == ("deleted", b"", {}, frozenset())
    assert chats.store.history.count(ended.id) == 0


def test_a_cleanup_removes_the_history_too(chats: SessionManager, chat: StoredSession, clock: Clock) -> None:
    """With the session that had expired."""
    chats.history(chat.id).append(said("Hello"))
    clock.advance(700)
    assert chats.cleanup().expired == 1
    assert chats.store.history.read(chat.id) == []


def test_a_stream_of_before_does_not_go_on_in_the_next_session_of_its_key(chats: SessionManager, clock: Clock) -> None:
    """The key leads to another session by now."""
    first = chats.resume_or_create(key="k", user_id="ada")
    history = chats.history(first.id)
    history.append(said("Hello"))
    chats.end(first.id)
    second = chats.resume_or_create(key="k", user_id="ada")
    assert second.id == first.id
    with pytest.raises(SessionNotFound, match="key"):
        history.append(said("late"))
    assert chats.history(second.id).latest() == []


@pytest.fixture
def used_anew(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Lets another process end a session and use its key anew, just before the store does something to its history."""

    def arrange(session_id: str, operation: str) -> None:
        log_class = type(chats.store.history)
        write = getattr(log_class, operation)

        def meanwhile(log: HistoryLog, *arguments: Any, **options: Any) -> Any:
            monkeypatch.undo()
            chats.end(session_id)
            later = chats.resume_or_create(key="k", user_id="ada")
            assert (later.id, later.new) == (session_id, True)
            if operation == "delete":
                chats.history(later).append(said("new"))
            return write(log, *arguments, **options)

        monkeypatch.setattr(log_class, operation, meanwhile)

    return arrange


def test_a_key_that_is_used_anew_while_an_entry_is_on_its_way(
    chats: SessionManager, used_anew: Callable[[str, str], None]
) -> None:
    """Between the look at the session and the append: the late entry is in no history, and the next one begins empty."""
    first = chats.resume_or_create(key="k", user_id="ada")
    history = chats.history(first.id)
    history.append(said("Hello"))
    used_anew(first.id, "append")
    with pytest.raises(SessionNotFound, match="key"):
        history.append(said("late"))
    assert chats.history(first.id).latest() == []
    [old] = [record.id for record in chats.find(user_id="ada") if record.id != first.id]
    assert contents(chats.history(old).latest()) == ["Hello"]


def test_a_key_that_is_used_anew_while_the_first_entry_is_on_its_way(
    chats: SessionManager, used_anew: Callable[[str, str], None]
) -> None:
    """The session that was looked at is the one that is meant, by its id alone too."""
    first = chats.resume_or_create(key="k", user_id="ada")
    used_anew(first.id, "append")
    with pytest.raises(SessionNotFound, match="key"):
        chats.history(first.id).append(said("late"))
    assert chats.history(first.id).latest() == []


def test_a_key_that_is_used_anew_while_its_history_is_cleared(
    chats: SessionManager, used_anew: Callable[[str, str], None]
) -> None:
    """What is said in the next session of that key stays."""
    first = chats.resume_or_create(key="k", user_id="ada")
    history = chats.history(first.id)
    history.append(said("Hello"))
    used_anew(first.id, "delete")
    assert history.clear() is False
    assert contents(chats.history(first.id).latest()) == ["new"]


def test_a_key_that_is_used_anew_while_its_session_is_deleted(
    chats: SessionManager, used_anew: Callable[[str, str], None]
) -> None:
    """Between its ending and the removal of its history: the next session of that key keeps its own."""
    first = chats.resume_or_create(key="k", user_id="ada")
    chats.history(first.id).append(said("Hello"))
    used_anew(first.id, "delete")
    assert chats.delete(first.id)
    assert contents(chats.history(first.id).latest()) == ["new"]


@pytest.mark.parametrize("do", ["append", "clear"])
def test_the_history_of_a_session_is_not_that_of_the_next_one_of_its_key(chats: SessionManager, do: str) -> None:
    """Also where it is used for the first time when its session has ended and its key was used anew."""
    first = chats.resume_or_create(key="k", user_id="ada")
    history = chats.history(first)
    chats.end(first.id)
    chats.history(chats.resume_or_create(key="k", user_id="ada")).append(said("new"))
    if do == "append":
        with pytest.raises(SessionNotFound, match="key"):
            history.append(said("late"))
    else:
        assert history.clear() is False
    assert contents(chats.history(first.id).latest()) == ["new"]


def test_a_record_of_a_list_leads_to_its_history(chats: SessionManager) -> None:
    """As a session does: to what was said in this one, and not in the next one of its key."""
    first = chats.resume_or_create(key="k", user_id="ada")
    [listed] = chats.find(user_id="ada")
    history = chats.history(listed)
    history.append(said("Hello"))
    assert contents(chats.history(listed).latest()) == ["Hello"]
    chats.end(first.id)
    chats.resume_or_create(key="k", user_id="ada")
    with pytest.raises(SessionNotFound, match="key"):
        history.latest()


def test_what_was_said_under_a_key_is_kept_with_the_session_that_ended(chats: SessionManager) -> None:
    """The next session of that key starts from nothing, and the old dialogue can be read."""
    first = chats.resume_or_create(key="k", user_id="ada")
    chats.history(first.id).append(*(said(number) for number in range(3)))
    chats.end(first.id)
    second = chats.resume_or_create(key="k", user_id="ada")
    [old] = [record.id for record in chats.find(user_id="ada") if record.id != second.id]
    assert contents(chats.history(old).latest()) == [0, 1, 2]
    assert chats.history(second.id).count() == 0


def test_an_append_that_expects_the_last_entry_is_stored(chats: SessionManager, chat: StoredSession) -> None:
    """Whoever has seen all may go on."""
    history = chats.history(chat.id)
    assert history.append(said("a"), expected_seq=0) == 1
    assert history.append(said("b"), expected_seq=1) == 2


def test_a_conflict_carries_what_was_missed(chats: SessionManager, chat: StoredSession) -> None:
    """So a second tab can show it at once, and ask anew."""
    history = chats.history(chat.id)
    history.append(*(said(number) for number in range(1, 4)))
    with pytest.raises(HistoryConflict) as conflict:
        history.append(said("mine"), expected_seq=1)
    assert contents(list(conflict.value.missed)) == [2, 3]
    assert history.count() == 3


def test_a_retried_append_stores_once(chats: SessionManager, chat: StoredSession) -> None:
    """The same key, the same answer, whatever was said in between."""
    history = chats.history(chat.id)
    assert history.append(said("Hello"), idempotency_key="form-1", expected_seq=0) == 1
    history.append(said("other"))
    assert history.append(said("Hello"), idempotency_key="form-1", expected_seq=0) == 1
    assert contents(history.latest()) == ["Hello", "other"]


def test_a_history_has_at_most_so_many_entries(chats: SessionManager, chat: StoredSession) -> None:
    """A turn that does not fit as a whole is not stored at all, and nothing that is there goes."""
    history = chats.history(chat.id)
    history.append(*(said(number) for number in range(49)))
    with pytest.raises(SessionTooLarge, match="50"):
        history.append(said("a"), said("b"))
    assert history.append(said("a")) == 50


def test_an_entry_has_at_most_so_many_bytes(chats: SessionManager, chat: StoredSession) -> None:
    """The error says how many it takes, and nothing of the turn is stored."""
    history = chats.history(chat.id)
    with pytest.raises(SessionTooLarge, match="max_bytes"):
        history.append(said("short"), said("x" * 2000))
    assert history.count() == 0


@pytest.mark.parametrize(
    "entry",
    [
        "Hello",
        {"role": "user"},
        {"content": "Hello"},
        {"role": "", "content": "Hello"},
        {"role": 7, "content": "Hello"},
        {"role": "user", "content": "Hello", "meta": {}},
        {"role": "user", "content": "Hello", "metadata": "x"},
    ],
)
def test_what_is_no_entry_is_told(chats: SessionManager, chat: StoredSession, entry: Any) -> None:
    """A mistake in a name does not lose a part of what was said."""
    with pytest.raises(ValueError, match="entry"):
        chats.history(chat.id).append(entry)
    assert chats.history(chat.id).count() == 0


def test_nothing_cannot_be_appended(chats: SessionManager, chat: StoredSession) -> None:
    """A turn has at least one entry."""
    with pytest.raises(ValueError, match="at least one"):
        chats.history(chat.id).append()


def test_what_cannot_be_stored_is_named(chats: SessionManager, chat: StoredSession) -> None:
    """By its place in the entry."""
    with pytest.raises(SerializationError, match="content"):
        chats.history(chat.id).append(said({"x": object()}))


def test_clearing_starts_from_one_again(chats: SessionManager, chat: StoredSession) -> None:
    """The session goes on without what was said."""
    history = chats.history(chat.id)
    history.append(said("a"), said("b"))
    assert history.clear()
    assert not history.clear()
    assert history.append(said("c")) == 1


def test_sessions_are_found_by_whether_they_have_a_history(chats: SessionManager, chat: StoredSession) -> None:
    """Limits count what is found."""
    silent = [chats.create(user_id="ada") for _ in range(2)]
    chats.history(chat.id).append(said("Hello"))
    assert [record.id for record in chats.find(has_history=True)] == [chat.id]
    assert {record.id for record in chats.find(has_history=False)} == {session.id for session in silent}
    assert len(list(chats.find(has_history=False, limit=1))) == 1


def test_sessions_are_found_by_whether_they_are_active(chats: SessionManager, chat: StoredSession) -> None:
    """``active=False`` is all that is expired or ended."""
    ended = chats.create()
    chats.end(ended.id)
    assert [record.id for record in chats.find(active=True)] == [chat.id]
    assert [record.id for record in chats.find(active=False)] == [ended.id]
    assert list(chats.find(active=False, offset=1)) == []


def test_pages_of_a_list_follow_each_other(chats: SessionManager, clock: Clock) -> None:
    """Each begins behind the last record of the one before, whatever is created meanwhile."""
    made = []
    for _ in range(5):
        clock.advance(1)
        made.append(chats.create(user_id="ada").id)
    first = list(chats.find(user_id="ada", order_by="-created_at", limit=2))
    clock.advance(1)
    chats.create(user_id="ada")
    second = list(chats.find(user_id="ada", order_by="-created_at", after=first[-1], limit=2))
    assert [record.id for record in first + second] == made[:0:-1]
    with pytest.raises(ValueError, match="order_by"):
        chats.find(after=first[-1])


def test_an_entry_that_cannot_be_read_is_named(chats: SessionManager, chat: StoredSession) -> None:
    """By its session and number, and the session itself is as it was."""
    chats.store.history.append(chat.id, [b"\xff not an entry"], created_at=1.0)
    with pytest.raises(SerializationError, match=f"entry 1 of the history of {chat.id}"):
        chats.history(chat.id).latest()
    assert chats.get(chat.id) is not None
