"""The answers of the example are written once, by one process at a time, whatever happens to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask import Flask

from example_app import create_app
from example_app.answers import Answers, Outcome
from example_app.assistant import AssistantError, Message
from example_app.chat import Chat, Refused
from flask_persist_session import SessionNotFound, StoredSession
from tests.conftest import Clock

STALE = 8.0


class Scripted:
    """An assistant that says what the test wants, and keeps what it was shown."""

    name = "scripted"

    def __init__(self, *pieces: str, before: Callable[[], object] = lambda: None) -> None:
        self._pieces = pieces
        self._before = before
        self.shown: list[Sequence[Message]] = []

    def answer(self, dialogue: Sequence[Message]) -> Iterator[str]:
        self.shown.append(dialogue)
        self._before()
        yield from self._pieces


def fail(words: str) -> Callable[[], object]:
    """What an assistant does that cannot answer."""

    def failing() -> None:
        raise AssistantError(words)

    return failing


@pytest.fixture
def app() -> Flask:
    """The example, with a store of its own."""
    return create_app({"PERSIST_SESSION_STORE": "memory://", "SECRET_KEY": "k", "CHAT_PACE": 0, "OPENAI_API_KEY": ""})


@pytest.fixture
def chat(app: Flask, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """The conversations of the example, in which nothing is answered but by the test, under a clock of the test's own."""
    chat: Chat = app.extensions["chat"]
    monkeypatch.setattr(chat.sessions, "clock", Clock())
    monkeypatch.setattr(chat.answers, "start", lambda conversation_id: None)
    return chat


@pytest.fixture
def talk(chat: Chat) -> StoredSession:
    """A conversation in which something was said that waits for its answer, as entry 2."""
    conversation = chat.begin("Ada", "first")
    chat.say(conversation, "bicycle", "form 1")
    return chat.of("Ada", conversation.id)


def said(chat: Chat, conversation: StoredSession) -> list[tuple[str, str]]:
    """The dialogue without the greeting."""
    return [(entry.role, entry.content) for entry in chat.sessions.history(conversation.id)][1:]


def answers(chat: Chat, assistant: Scripted) -> Answers:
    """What another process with that assistant would be."""
    return Answers(chat.sessions, assistant, STALE)


def test_an_answer_is_appended_whole(chat: Chat, talk: StoredSession) -> None:
    """The pieces become one entry behind the turn that they answer."""
    answers(chat, Scripted("Well", ", ", "sure.")).write(talk.id)
    assert said(chat, talk) == [("user", "bicycle"), ("assistant", "Well, sure.")]


def test_nothing_is_answered_twice(chat: Chat, talk: StoredSession) -> None:
    """Where the assistant has spoken last, nobody asks it."""
    answers(chat, Scripted("Once.")).write(talk.id)
    again = Scripted("Twice.")
    answers(chat, again).write(talk.id)
    assert again.shown == []
    assert len(said(chat, talk)) == 2


def test_two_processes_answer_once(chat: Chat, talk: StoredSession) -> None:
    """While one writes the answer, the others leave it alone."""
    asked, go_on = threading.Event(), threading.Event()
    slow = Scripted("Slowly.", before=lambda: (asked.set(), go_on.wait(10)))
    other = Scripted("Quickly.")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(answers(chat, slow).write, talk.id)
        assert asked.wait(10)
        answers(chat, other).write(talk.id)
        go_on.set()
        writing.result()
    assert other.shown == []
    assert said(chat, talk)[1:] == [("assistant", "Slowly.")]


def test_of_many_that_begin_at_once_one_answers(chat: Chat, talk: StoredSession) -> None:
    """However many processes see at the same moment that an answer is due, one of them asks the assistant."""
    together = threading.Barrier(8)
    assistants = [Scripted("An answer.") for _ in range(8)]

    def write(assistant: Scripted) -> None:
        together.wait(10)
        answers(chat, assistant).write(talk.id)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, assistants))
    assert sum(len(assistant.shown) for assistant in assistants) == 1
    assert len(said(chat, talk)) == 2


def test_the_answer_of_a_process_that_is_no_more_is_begun_anew(chat: Chat, talk: StoredSession) -> None:
    """A claim of which nothing was heard for a while is taken over, and whoever had it stores nothing any more."""
    asked, go_on = threading.Event(), threading.Event()
    stuck = Scripted("Too late.", before=lambda: (asked.set(), go_on.wait(10)))
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(Answers(chat.sessions, stuck, 1000).write, talk.id)
        assert asked.wait(10)
        chat.sessions.clock.advance(STALE - 1)  # type: ignore[attr-defined]
        answers(chat, Scripted("Too early.")).write(talk.id)
        chat.sessions.clock.advance(2)  # type: ignore[attr-defined]
        answers(chat, Scripted("Anew.")).write(talk.id)
        go_on.set()
        writing.result()
    assert said(chat, talk)[1:] == [("assistant", "Anew.")]


def test_a_turn_that_nobody_has_claimed_is_answered(chat: Chat, talk: StoredSession) -> None:
    """Whoever was killed between storing the turn and beginning the answer is stood in for by the next request."""
    assert chat.answers.is_due(talk, 2)
    chat.answers.write(talk.id)
    assert said(chat, talk)[1] == ("assistant", "So far: bicycle. Which brand is it?")


def test_an_error_is_told_and_stored_as_no_answer(chat: Chat, talk: StoredSession) -> None:
    """What the assistant says of its failure is told to the user, and the dialogue is as before."""
    answers(chat, Scripted(before=fail("Too busy."))).write(talk.id)
    assert chat.answers.outcome(talk.id, 2) == Outcome(problem="Too busy.")
    assert said(chat, talk) == [("user", "bicycle")]
    assert not chat.answers.is_due(chat.of("Ada", talk.id), 2)


def test_silence_is_no_answer(chat: Chat, talk: StoredSession) -> None:
    """An assistant that says nothing has failed."""
    answers(chat, Scripted(" ", "\n")).write(talk.id)
    assert "nothing to say" in (chat.answers.outcome(talk.id, 2).problem or "")


def test_a_defect_of_the_assistant_is_told_as_well(chat: Chat, talk: StoredSession) -> None:
    """An error that nobody foresaw goes to whoever started it, and the user can try again."""
    with pytest.raises(ZeroDivisionError):
        answers(chat, Scripted(before=lambda: 1 // 0)).write(talk.id)
    assert chat.answers.outcome(talk.id, 2) == Outcome(problem="The assistant failed. Please try again.")


def test_trying_again_answers(chat: Chat, talk: StoredSession) -> None:
    """After a failure, the same turn can be answered."""
    answers(chat, Scripted(before=fail("Too busy."))).write(talk.id)
    chat.answers.try_again(talk.id)
    answers(chat, Scripted("Now.")).write(talk.id)
    assert chat.answers.outcome(talk.id, 2) == Outcome(answer="Now.")


def test_after_a_failure_one_can_say_something_else(chat: Chat, talk: StoredSession) -> None:
    """A turn that got no answer does not keep its user from another."""
    answers(chat, Scripted(before=fail("Too busy."))).write(talk.id)
    assert chat.say(chat.of("Ada", talk.id), "a table", "form 2") == 3


def test_a_message_that_was_passed_over_has_no_answer(chat: Chat, talk: StoredSession) -> None:
    """Whoever asks what became of it is not given what was said next."""
    answers(chat, Scripted(before=fail("Too busy."))).write(talk.id)
    chat.say(chat.of("Ada", talk.id), "a table", "form 2")
    answers(chat, Scripted("Fine.")).write(talk.id)
    assert "got no answer" in (chat.answers.outcome(talk.id, 2).problem or "")
    assert chat.answers.outcome(talk.id, 3) == Outcome(answer="Fine.")


def test_a_change_at_the_same_moment_does_not_keep_it_from_being_answered(
    chat: Chat, talk: StoredSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the conversation is renamed while the answer is claimed, it is claimed again."""
    is_due = chat.answers.is_due
    renamed: list[str] = []

    def renaming(conversation: StoredSession, seq: int) -> bool:
        if not renamed:
            renamed.append("Bicycle")
            chat.rename(talk.id, "Bicycle")
        return is_due(conversation, seq)

    monkeypatch.setattr(chat.answers, "is_due", renaming)
    chat.answers.write(talk.id)
    assert len(said(chat, talk)) == 2
    assert chat.of("Ada", talk.id).metadata["title"] == "Bicycle"


def test_what_does_not_fit_is_told(app: Flask, chat: Chat) -> None:
    """Neither a message nor an answer beyond the limit of a history is stored, and neither is tried for ever."""
    app = create_app({**app.config, "PERSIST_SESSION_MAX_ENTRIES": 2})
    full: Chat = app.extensions["chat"]
    talk = full.begin("Ada", "first")
    assert "too long" in (full.answers.wait(talk.id, full.say(talk, "bicycle", "form 1"), 10).problem or "")
    with pytest.raises(Refused, match="as long as it can get"):
        full.say(full.of("Ada", talk.id), "a table", "form 2")


def test_only_one_message_waits_for_an_answer(chat: Chat, talk: StoredSession) -> None:
    """Another message, before the answer to the last one is there, is refused in words and not stored."""
    with pytest.raises(Refused, match="still writing"):
        chat.say(talk, "and a table", "form 2")
    assert said(chat, talk) == [("user", "bicycle")]


def test_the_same_form_counts_once(chat: Chat, talk: StoredSession) -> None:
    """A form that is sent again, before and after the answer, is the same entry."""
    assert chat.say(talk, "bicycle", "form 1") == 2
    answers(chat, Scripted("Fine.")).write(talk.id)
    assert chat.say(talk, "bicycle", "form 1") == 2
    assert len(said(chat, talk)) == 2


def test_an_old_form_with_another_text_is_another_message(chat: Chat, talk: StoredSession) -> None:
    """Whoever goes back and sends the form with another text loses nothing."""
    answers(chat, Scripted("Fine.")).write(talk.id)
    assert chat.say(talk, "a table", "form 1") == 4


def test_the_assistant_is_shown_the_latest_twenty(chat: Chat, talk: StoredSession) -> None:
    """However long the dialogue, the assistant sees its end."""
    history = chat.sessions.history(talk.id)
    history.append(*({"role": role, "content": str(n)} for n in range(30) for role in ("assistant", "user")))
    scripted = Scripted("Fine.")
    answers(chat, scripted).write(talk.id)
    (shown,) = scripted.shown
    assert [message["content"] for message in shown] == [str(n // 2) for n in range(40, 60)]


def test_an_ended_conversation_gets_no_answer(chat: Chat, talk: StoredSession) -> None:
    """What was being written when the conversation ended is not stored."""
    answers(chat, Scripted("Too late.", before=lambda: chat.sessions.end(talk.id))).write(talk.id)
    assert said(chat, talk) == [("user", "bicycle")]
    with pytest.raises(SessionNotFound):
        chat.answers.outcome(talk.id, 2)


def test_a_long_answer_that_comes_at_once_is_noted_seldom(chat: Chat, talk: StoredSession) -> None:
    """The cost of an answer goes by the time that it takes, not by the number of its pieces."""
    before = chat.of("Ada", talk.id).version
    answers(chat, Scripted(*["word "] * 10_000)).write(talk.id)
    assert len(said(chat, talk)[1][1]) == 50_000
    # Claimed and finished are two; the others take 0.15 seconds each, and a machine is not that slow.
    assert chat.of("Ada", talk.id).version - before < 100


def test_what_there_is_so_far_is_noted_while_the_assistant_thinks(chat: Chat, talk: StoredSession) -> None:
    """A slow assistant shows its first words before the others, and that it is alive."""
    seen: list[object] = []

    def slowly() -> Iterator[str]:
        yield "Well"
        while not seen:
            noted = (chat.of("Ada", talk.id).data.get("answer") or {}).get("text")
            seen.extend([noted] if noted else [])
        yield "."

    scripted = Scripted()
    scripted.answer = lambda dialogue: slowly()  # type: ignore[method-assign]
    Answers(chat.sessions, scripted, 0.2).write(talk.id)
    assert seen == ["Well"]


def test_the_first_message_gives_the_title(chat: Chat) -> None:
    """A conversation without a title is named after what was said first, shortened."""
    conversation = chat.begin("Ada", "first")
    chat.say(conversation, "x" * 100, "form 1")
    chat.answers.write(conversation.id)
    assert chat.of("Ada", conversation.id).metadata["title"] == "x" * 59 + "…"


def test_figures_are_kept(chat: Chat, talk: StoredSession) -> None:
    """The session counts queries and errors, and knows the last of each, shortened."""
    answers(chat, Scripted(before=fail("Too busy."))).write(talk.id)
    chat.answers.try_again(talk.id)
    answers(chat, Scripted("y" * 1000)).write(talk.id)
    session = chat.of("Ada", talk.id)
    assert (session.metadata["query_count"], session.metadata["error_count"]) == (2, 1)
    assert (session.metadata["agent"], session.metadata["execution_time"]) == ("scripted", 0.0)
    assert (session.data["last_query"], session.data["last_error"]) == ("bicycle", "Too busy.")
    assert session.data["last_response"] == "y" * 499 + "…"
