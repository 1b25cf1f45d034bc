"""A stream of the example looks into the store again and again, at a cost that is known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from threading import Semaphore
from typing import Any

import pytest
from flask import Flask

from example_app import answers, create_app, streaming
from example_app.answers import Answers
from example_app.assistant import Message
from example_app.chat import Chat
from example_app.streaming import LIFE, Stream, in_turn
from flask_persist_session import StoredSession, StoreUnavailable


class Time:
    """Stands in for the module of that name: it passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The time of streams and answers."""
    time = Time()
    monkeypatch.setattr(streaming, "time", time)
    monkeypatch.setattr(answers, "time", time)
    return time


@pytest.fixture
def app() -> Flask:
    """The example, with a store of its own."""
    return create_app({"PERSIST_SESSION_STORE": "memory://", "SECRET_KEY": "k", "CHAT_PACE": 0, "OPENAI_API_KEY": ""})


@pytest.fixture
def chat(app: Flask) -> Chat:
    """The conversations of the example."""
    chat: Chat = app.extensions["chat"]
    return chat


@pytest.fixture
def talk(chat: Chat) -> StoredSession:
    """A conversation with nothing but the greeting."""
    return chat.begin("Ada", "first")


@pytest.fixture
def reads(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often something was read: a session of the "web" or the "chat", or a "history"."""
    counted: Counter[str] = Counter()

    def count(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def counting(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, method, counting)

    count(chat.web.store, "get", "web")
    count(chat.sessions.store, "get", "chat")
    count(chat.sessions.store.history, "read", "history")
    return counted


def stream(app: Flask, chat: Chat, conversation: StoredSession, seq: int = 0) -> Stream:
    """A stream for a user who is signed in."""
    return Stream(app, chat, conversation.id, chat.web.create(user_id="Ada").id, seq)


def test_a_look_at_an_idle_conversation_is_one_read(
    app: Flask, chat: Chat, talk: StoredSession, time: Time, reads: Counter[str]
) -> None:
    """After the first look, nothing but the session of the conversation is read."""
    looking = stream(app, chat, talk)
    assert "event: entry" in "".join(looking.look())
    reads.clear()
    for _ in range(10):
        assert list(looking.look()) == []
    assert reads == {"chat": 10}


def test_an_idle_stream_looks_less_and_less_often(
    app: Flask, chat: Chat, talk: StoredSession, time: Time, reads: Counter[str]
) -> None:
    """From twenty times a second down to once; in all its life it reads three times per second at most."""
    told = "".join(stream(app, chat, talk).events())
    assert time.slept[:2] == [streaming.SHORTEST, streaming.SHORTEST * streaming.GROWTH]
    assert time.slept[-1] == streaming.LONGEST
    assert time.now - 1000 < LIFE + 2
    assert reads.total() < 3 * LIFE
    assert told.count(": still here") == pytest.approx(LIFE / streaming.SILENCE, abs=3)


def test_a_stream_looks_often_again_when_something_happens(app: Flask, chat: Chat, talk: StoredSession, time: Time) -> None:
    """News make the next look soon."""
    told = stream(app, chat, talk).events()
    next(piece for piece in told if piece == ": still here\n\n")
    assert time.slept[-1] == streaming.LONGEST
    chat.rename(talk.id, "Bicycle")
    before = len(time.slept)
    assert '"Bicycle"' in next(piece for piece in told if "event: title" in piece)
    next(told)
    assert streaming.SHORTEST in time.slept[before:]


def test_a_long_dialogue_comes_in_parts(
    app: Flask, chat: Chat, talk: StoredSession, time: Time, reads: Counter[str]
) -> None:
    """Whoever was away long is told everything, of which a hundred entries at a time are in memory."""
    chat.sessions.history(talk.id).append(*({"role": "assistant", "content": str(n)} for n in range(2, 251)))
    reads.clear()
    told = "".join(stream(app, chat, talk).look())
    assert re.findall(r"^id: (\d+)$", told, re.MULTILINE) == [str(n) for n in range(1, 251)]
    assert reads["history"] == 3


def test_an_answer_begun_anew_replaces_what_was_shown(
    app: Flask, chat: Chat, talk: StoredSession, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces go on where the last one stopped; where the text is another, it is sent from its beginning."""
    monkeypatch.setattr(chat.answers, "start", lambda conversation_id: None)
    chat.say(talk, "bicycle", "form")
    looking, told = stream(app, chat, talk, seq=2), []
    for text in ("Well", "Well, sure", "No"):
        with chat.sessions.edit(talk.id) as conversation:
            conversation.data["answer"] = {"to": 2, "by": "x", "at": chat.sessions.clock(), "text": text}
        told += [re.sub(r"^.*data: ", "", news, flags=re.DOTALL) for news in looking.look() if "event: piece" in news]
    assert told == [
        '{"to": 2, "start": 0, "text": "Well"}\n\n',
        '{"to": 2, "start": 4, "text": ", sure"}\n\n',
        '{"to": 2, "start": 0, "text": "No"}\n\n',
    ]


class Typing:
    """An assistant that needs 30 seconds for a thousand pieces."""

    name = "typing"

    def __init__(self, time: Time) -> None:
        self._time = time

    def answer(self, dialogue: list[Message]) -> Iterator[str]:
        for _ in range(1000):
            self._time.now += 0.03
            yield "word "


def test_the_cost_of_an_answer_goes_by_its_time(
    chat: Chat, talk: StoredSession, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of 30 seconds is noted at most 30 times, of however many pieces it is made."""
    monkeypatch.setattr(chat.answers, "start", lambda conversation_id: None)
    chat.say(talk, "bicycle", "form")
    before = chat.of("Ada", talk.id).version
    Answers(chat.sessions, Typing(time), 8).write(talk.id)  # type: ignore[arg-type]
    claimed_and_finished = 2
    assert chat.of("Ada", talk.id).version - before <= 30 + claimed_and_finished
    assert chat.sessions.history(talk.id).count() == 3


def test_a_browser_that_leaves_gives_its_seat_back(app: Flask, chat: Chat, talk: StoredSession, time: Time) -> None:
    """A stream that is closed, wherever it is, leaves the thread's seat to others."""
    seats = Semaphore(1)
    told = in_turn(stream(app, chat, talk), seats)
    assert next(told) == "retry: 500\n\n"
    assert not seats.acquire(blocking=False)
    told.close()  # type: ignore[attr-defined]
    assert seats.acquire(blocking=False)


def test_a_store_that_is_down_ends_the_stream(
    app: Flask, chat: Chat, talk: StoredSession, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was told stays told, the seat is given back, and the browser may come again."""
    seats = Semaphore(1)
    told = in_turn(stream(app, chat, talk), seats)
    assert "event: entry" in next(piece for piece in told if "event: " in piece)

    def down(session_id: str) -> None:
        raise StoreUnavailable("no store")

    monkeypatch.setattr(chat.sessions.store, "get", down)
    assert not [piece for piece in told if "event: entry" in piece]
    assert seats.acquire(blocking=False)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("logout", "You have signed out."),
        ("revoked", "You were signed out here: this session was ended from elsewhere."),
        ("evicted", "You were signed out here: you signed in on another device, and only 5 sessions are allowed at once."),
    ],
)
def test_a_stream_says_why_it_was_signed_out(
    app: Flask, chat: Chat, talk: StoredSession, time: Time, reason: str, words: str
) -> None:
    """Soon after the session behind the cookie has ended, the stream tells why, and nothing else any more."""
    web = chat.web.create(user_id="Ada")
    told = Stream(app, chat, talk.id, web.id, 0).events()
    next(told)
    chat.web.end(web.id, reason)
    last = [piece for piece in told if "event: " in piece][-1]
    assert last == f'event: signed-out\ndata: {{"words": "{words}"}}\n\n'
    assert time.now - 1000 < 2 * streaming.SIGN_IN_EVERY
