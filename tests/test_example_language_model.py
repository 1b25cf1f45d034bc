"""The example with a language model, against a server that speaks the protocol."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from example_app import create_app
from example_app.answers import Outcome
from example_app.assistant import AssistantError, ListingAssistant, Message
from example_app.language_model import LanguageModel
from tests.completions import CompletionsServer, Reply

DIALOGUE: list[Message] = [
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is a session?"},
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompletionsServer]:
    """A server, at which the environment points."""
    server = CompletionsServer()
    monkeypatch.setenv("OPENAI_API_KEY", "secret key of the test")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_MODEL", "small-model")
    yield server
    server.stop()


@pytest.fixture
def model(server: CompletionsServer) -> LanguageModel:
    """The assistant, which does not try again by itself, so that a test of an error does not wait."""
    model = LanguageModel("secret key of the test", "small-model", timeout=10)
    model._client = model._client.with_options(max_retries=0)
    return model


def test_greets_without_asking(model: LanguageModel, server: CompletionsServer) -> None:
    """The greeting costs nothing."""
    assert "".join(model.answer([])).startswith("Hello!")
    assert server.asked == []


def test_passes_the_pieces_on(model: LanguageModel, server: CompletionsServer) -> None:
    """What comes piece by piece is yielded piece by piece, each when it is there and not at the end."""
    first_read = threading.Event()
    server.reply = Reply(("A ", "session", "."), before=lambda number: number == 0 or first_read.wait(10))
    pieces = model.answer(DIALOGUE)
    assert next(pieces) == "A "
    first_read.set()
    assert list(pieces) == ["session", "."]


def test_asks_as_the_protocol_has_it(model: LanguageModel, server: CompletionsServer) -> None:
    """The dialogue goes out with its roles, behind an instruction, with model and key."""
    server.reply = Reply(("A session.",))
    list(model.answer(DIALOGUE))
    (asked,) = server.asked
    assert (asked["model"], asked["stream"]) == ("small-model", True)
    assert [message["role"] for message in asked["messages"]] == ["system", "assistant", "user"]
    assert asked["messages"][1:] == DIALOGUE
    assert server.keys == ["Bearer secret key of the test"]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(status=401), "does not accept the key"),
        (Reply(status=403), "does not accept the key"),
        (Reply(status=404), "does not know the model"),
        (Reply(status=429), "too much to do"),
        (Reply(status=500), "the error 500"),
        (Reply(("A ses",), cut=True, finish=False, ending=""), "cannot be reached"),
        (Reply(("A ses",), finish=False), "broke off"),
        (Reply(("A ses",), finish=False, ending=""), "broke off"),
        (Reply(("A ses",), finish=False, ending='{"error": {"message": "overloaded"}}'), "could not answer"),
        (Reply(("A ses",), finish=False, ending="{no JSON"), "something else"),
    ],
)
def test_tells_errors_in_words(model: LanguageModel, server: CompletionsServer, reply: Reply, words: str) -> None:
    """Whatever goes wrong, at the beginning or in the middle, the user is told in words, without the key."""
    server.reply = reply
    with pytest.raises(AssistantError, match=words) as caught:
        list(model.answer(DIALOGUE))
    assert "secret key" not in str(caught.value)


def test_a_server_that_is_down(model: LanguageModel, server: CompletionsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server, the user is told that it cannot be reached."""
    monkeypatch.setattr(model, "_client", model._client.with_options(base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(AssistantError, match="cannot be reached"):
        list(model.answer(DIALOGUE))


def test_a_server_that_says_nothing(model: LanguageModel, server: CompletionsServer) -> None:
    """Whoever does not answer in time is given up."""
    go_on = threading.Event()
    server.reply = Reply(("late",), before=lambda number: go_on.wait(10))
    model._client = model._client.with_options(timeout=0.1)
    try:
        with pytest.raises(AssistantError, match="in time"):
            list(model.answer(DIALOGUE))
    finally:
        go_on.set()


def test_the_environment_switches_it_on(server: CompletionsServer) -> None:
    """With the usual variables, the chat is answered by the model, and the whole dialogue is in the history."""
    server.reply = Reply(("A ", "session."))
    app = create_app({"PERSIST_SESSION_STORE": "memory://", "SECRET_KEY": "k"})
    chat = app.extensions["chat"]
    conversation = chat.begin("Ada", "first")
    seq = chat.say(conversation, "What is a session?", "form")
    assert chat.answers.wait(conversation.id, seq, 10) == Outcome(answer="A session.")
    assert chat.of("Ada", conversation.id).metadata["agent"] == "small-model"
    assert server.asked[0]["messages"][-1] == {"role": "user", "content": "What is a session?"}


def test_an_answer_that_broke_off_is_not_stored(server: CompletionsServer) -> None:
    """Half an answer is none: it is told, and the next try begins anew."""
    server.reply = Reply(("A ses",), finish=False)
    app = create_app({"PERSIST_SESSION_STORE": "memory://", "SECRET_KEY": "k"})
    chat = app.extensions["chat"]
    conversation = chat.begin("Ada", "first")
    seq = chat.say(conversation, "What is a session?", "form")
    assert "broke off" in chat.answers.wait(conversation.id, seq, 10).problem
    assert chat.sessions.history(conversation.id).count() == seq
    server.reply = Reply(("A session.",))
    chat.answers.try_again(conversation.id)
    assert chat.answers.wait(conversation.id, seq, 10) == Outcome(answer="A session.")


def test_without_a_key_the_listing_assistant_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example needs no model."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    app = create_app({"PERSIST_SESSION_STORE": "memory://", "SECRET_KEY": "k"})
    assert isinstance(app.extensions["chat"].assistant, ListingAssistant)
