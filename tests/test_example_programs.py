"""The example for programs: threads and chats over JSON, for those who have a key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from example_app import create_app
from example_app.answers import Answers
from example_app.assistant import AssistantError, Message
from flask_persist_session import SessionManager

KEYS = {"key of Ada": "Ada", "key of Bob": "Bob", "key for anybody": "*"}


@pytest.fixture
def app() -> Flask:
    """The example, with keys for two users and one for anybody."""
    return create_app(
        {
            "PERSIST_SESSION_STORE": "memory://",
            "SECRET_KEY": "k",
            "CHAT_PACE": 0,
            "CHAT_API_KEYS": KEYS,
            "OPENAI_API_KEY": "",
        }
    )


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A program."""
    return app.test_client()


@pytest.fixture
def chats(app: Flask) -> SessionManager:
    """The manager of the conversations."""
    manager = app.extensions["chat"].sessions
    assert isinstance(manager, SessionManager)
    return manager


def ask(client: FlaskClient, path: str = "/query", key: str = "key of Ada", **body: Any) -> TestResponse:
    """Send a body with a key."""
    return client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})


def test_a_query_begins_a_thread(client: FlaskClient, chats: SessionManager) -> None:
    """Without a thread, a query makes one, and says how to go on with it."""
    answer = ask(client, query="bicycle").get_json()
    assert answer["response"] == "What would you like to sell?"
    session = chats.existing(answer["session_id"])
    assert (session.user_id, answer["user_id"], answer["new"]) == ("Ada", "Ada", True)
    assert ask(client, query="bicycle", thread_id=answer["thread_id"]).get_json()["session_id"] == session.id


def test_a_thread_goes_on(client: FlaskClient) -> None:
    """An unknown thread is made under its name, a known one goes on where it stopped."""
    first, second = (ask(client, query=text, thread_id="t 1").get_json() for text in ("hello", "bicycle"))
    assert (first["new"], second["new"]) == (True, False)
    assert second["response"] == "So far: bicycle. Which brand is it?"
    assert (second["thread_id"], second["query_count"]) == ("t 1", 2)


def test_threads_of_two_users_are_two(client: FlaskClient) -> None:
    """The same name with another's key is another session."""
    ids = {ask(client, key=key, query="hi", thread_id="t").get_json()["session_id"] for key in ("key of Ada", "key of Bob")}
    assert len(ids) == 2


def test_a_session_says_what_was_asked_last(client: FlaskClient, chats: SessionManager) -> None:
    """Figures are in the metadata, texts in the data, what the program gave with them."""
    answer = ask(client, query="bicycle", metadata={"channel": "mail"}, parameters={"top": 3}).get_json()
    session = chats.existing(answer["session_id"])
    assert session.metadata["about"] == {"channel": "mail"}
    assert (session.metadata["query_count"], session.metadata["error_count"]) == (1, 0)
    assert (session.data["last_query"], session.data["last_response"]) == ("bicycle", answer["response"])
    assert chats.history(session.id).latest(2)[0].metadata == {"parameters": {"top": 3}}


def test_a_chat_begins_and_goes_on(client: FlaskClient) -> None:
    """Without a session, a message begins one; with one, it goes on."""
    first = ask(client, "/api/chat/", message="hello").get_json()
    second = ask(client, "/api/chat/", message="bicycle", session_id=first["session_id"]).get_json()
    assert (first["new"], second["new"]) == (True, False)
    assert second["response"] == "So far: bicycle. Which brand is it?"


def test_the_user_sees_what_programs_said(client: FlaskClient, app: Flask) -> None:
    """A thread is one of the user's conversations, named after its first query."""
    ask(client, query="bicycle")
    (record,) = app.extensions["chat"].list("Ada").records
    assert record.metadata["title"] == "bicycle"


@pytest.mark.parametrize("path", ["/query", "/api/chat/"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"X-API-Key": ""}, {"X-API-Key": "schlüssel"}])
def test_without_a_key_it_is_shut(client: FlaskClient, chats: SessionManager, path: str, headers: dict[str, str]) -> None:
    """Whoever has no key is refused before the body is looked at, and nothing is made."""
    answer = client.post(path, data="{", headers=headers)
    assert answer.status_code == 403
    assert "CHAT_API_KEYS" in answer.get_json()["problem"]
    assert list(chats.find()) == []


def test_without_the_setting_nobody_has_a_key(app: Flask) -> None:
    """The paths are shut unless keys are given."""
    app = create_app({**app.config, "CHAT_API_KEYS": {}})
    assert ask(app.test_client(), query="hi").status_code == 403


def test_the_key_may_be_in_a_header_of_its_own(client: FlaskClient) -> None:
    """Programs that cannot send a bearer token send X-API-Key."""
    answer = client.post("/query", json={"query": "hi"}, headers={"X-API-Key": "key of Bob"})
    assert answer.get_json()["user_id"] == "Bob"


def test_a_key_speaks_for_its_user_alone(client: FlaskClient) -> None:
    """Naming another user is refused; naming oneself is fine."""
    assert ask(client, query="hi", user_id="Bob").status_code == 403
    assert ask(client, query="hi", user_id="Ada").status_code == 200


def test_a_key_for_anybody_names_the_user(client: FlaskClient) -> None:
    """A server that speaks for many users says for whom."""
    assert ask(client, key="key for anybody", query="hi").status_code == 422
    assert ask(client, key="key for anybody", query="hi", user_id="Eve").get_json()["user_id"] == "Eve"


def test_a_session_of_somebody_else_is_missing(client: FlaskClient) -> None:
    """Somebody else's session, one that has ended and one that never was look alike."""
    session = ask(client, "/api/chat/", message="hello").get_json()["session_id"]
    ids = (session, "0" * 67, "junk")
    answers = [ask(client, "/api/chat/", "key of Bob", message="x", session_id=name) for name in ids]
    assert {(answer.status_code, answer.text) for answer in answers} == {(404, answers[0].text)}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"query": ""},
        {"query": "  "},
        {"query": 7},
        {"query": "x" * 4001},
        {"query": "x", "thread_id": ""},
        {"query": "x", "thread_id": "a\nb"},
        {"query": "x", "thread_id": "x" * 201},
        {"query": "x", "metadata": []},
        {"query": "x", "unknown": 1},
        [],
    ],
)
def test_a_bad_body_is_refused(client: FlaskClient, chats: SessionManager, body: object) -> None:
    """What is wrong is told with its place, and nothing is made."""
    answer = client.post("/query", json=body, headers={"X-API-Key": "key of Ada"})
    assert answer.status_code == 422
    assert answer.get_json()["details"][0]["msg"]
    assert list(chats.find()) == []


def test_what_is_no_json_is_refused(client: FlaskClient) -> None:
    """A body that cannot be read is the program's error."""
    assert client.post("/query", data="{", headers={"X-API-Key": "key of Ada"}).status_code == 400


def test_a_query_that_is_sent_again_counts_once(client: FlaskClient, chats: SessionManager) -> None:
    """With an Idempotency-Key, a program can repeat what it has no answer to."""
    headers = {"X-API-Key": "key of Ada", "Idempotency-Key": "once"}
    answers = [client.post("/query", json={"query": "hi", "thread_id": "t"}, headers=headers).get_json() for _ in range(2)]
    assert answers[0]["response"] == answers[1]["response"]
    assert chats.history(answers[0]["session_id"]).count() == 2


class Failing:
    """An assistant that cannot."""

    name = "failing"

    def answer(self, dialogue: Sequence[Message]) -> Iterator[str]:
        raise AssistantError("Too busy.")


def test_an_error_of_the_assistant_is_told(client: FlaskClient, app: Flask, chats: SessionManager) -> None:
    """The program gets the words, and the session counts the error."""
    app.extensions["chat"].answers = Answers(chats, Failing(), 8)
    answer = ask(client, query="hi", thread_id="t")
    assert (answer.status_code, answer.get_json()) == (502, {"problem": "Too busy."})
    (record,) = chats.find()
    assert record.metadata["error_count"] == 1
    assert chats.existing(record.id).data["last_error"] == "Too busy."


def test_a_second_message_at_once_is_refused(client: FlaskClient, app: Flask, chats: SessionManager) -> None:
    """While an answer is being written, another query of the thread is a conflict."""
    session = ask(client, query="hi", thread_id="t").get_json()["session_id"]
    app.extensions["chat"].answers.start = lambda conversation_id: None
    chats.history(session).append({"role": "user", "content": "bicycle"})
    assert ask(client, query="a table", thread_id="t").status_code == 409


def test_programs_get_no_cookie(client: FlaskClient) -> None:
    """A key is enough; no session behind a cookie is made."""
    assert "Set-Cookie" not in ask(client, query="hi").headers
