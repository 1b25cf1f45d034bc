"""Conversations: each is a session of its user in the namespace "chat", and its dialogue is the history of that session."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from flask import Flask, current_app

from flask_persist_session import (
    ConfigError,
    PersistSession,
    SessionConflict,
    SessionRecord,
    SessionTooLarge,
    StoredSession,
)

from .answers import UNTITLED, Answers, problem_of
from .assistant import Assistant, ListingAssistant

LISTED = 20
SHOWN = 50
_KEY = "chat"


class Refused(Exception):
    """A message that is not taken, such as one sent while the answer to the one before is being written; why, in words."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a longer list; *more* is the id of the last record if there are others behind it."""

    records: list[SessionRecord]
    more: str | None


class Chat:
    """The conversations of all users, and what answers in them."""

    def __init__(self, app: Flask, sessions: PersistSession, assistant: Assistant) -> None:
        self.web = sessions.manager
        # What is to happen when a conversation ends, such as a summary of it, is the place for on_end=.
        self.sessions = sessions.namespace("chat", app=app, max_per_user=app.config["CHAT_MAX_CONVERSATIONS"])
        self.assistant = assistant
        self.answers = Answers(self.sessions, assistant, app.config["CHAT_STALE"])

    def begin(self, user_id: str, form_key: str) -> StoredSession:
        """Begin a conversation with the assistant's greeting; the same form sent twice begins one."""
        conversation = self.sessions.resume_or_create(key=f"form {form_key}", user_id=user_id, metadata={"title": UNTITLED})
        greeting = {"role": "assistant", "content": "".join(self.assistant.answer([]))}
        self.sessions.history(conversation.id).append(greeting, idempotency_key="greeting")
        return conversation

    def of(self, user_id: str, conversation_id: str) -> StoredSession:
        """The active conversation of that id, renewed. Raises ``SessionNotFound`` also for one of somebody else."""
        return self.sessions.resume(conversation_id, user_id=user_id)

    def list(self, user_id: str, text: str = "", behind: str | None = None) -> Page:
        """The user's active conversations with *text* in the title, newest first, from behind that id."""
        last = self.sessions.load(behind) if behind else None  # which may have ended since
        found = self.sessions.find(
            user_id=user_id,
            active=True,
            text=text or None,
            order_by="-created_at",
            after=last.record if last and last.user_id == user_id else None,
        )
        # The search of the store also looks at the user's name, which is in none of the titles.
        titled = [*islice((record for record in found if text.casefold() in title_of(record).casefold()), LISTED + 1)]
        return Page(titled[:LISTED], titled[LISTED - 1].id if len(titled) > LISTED else None)

    def newest(self, user_id: str) -> SessionRecord | None:
        """The user's newest active conversation."""
        found = self.sessions.find(user_id=user_id, active=True, order_by="-created_at", limit=1)
        return next(iter(found), None)

    def rename(self, conversation_id: str, title: str) -> None:
        """Give a conversation another title. Raises ``SessionNotFound`` once it has ended."""
        with self.sessions.edit(conversation_id) as conversation:
            conversation.metadata["title"] = title

    def say(
        self, conversation: StoredSession, text: str, form_key: str, metadata: Mapping[str, object] | None = None
    ) -> int:
        """Store the user's turn and start the answer; returns the number of the entry.

        The same text of the same form is stored once. Raises ``Refused``, ``SessionNotFound`` once it has ended.
        """
        history = self.sessions.history(conversation.id)
        last = next(iter(history.latest(1)), None)
        seq = last.seq if last else 0
        waiting = last is not None and last.role == "user" and not problem_of(conversation, seq)
        # With the text, because whoever goes back, changes it and sends the old form again means another message.
        key = hashlib.sha256(f"{form_key} {text}".encode()).hexdigest()
        try:
            # Behind a turn that waits for its answer none but that very turn is welcome, of which the key is known.
            turn = {"role": "user", "content": text, "metadata": metadata}
            seq = history.append(turn, expected_seq=seq - waiting, idempotency_key=key)
        except SessionConflict as error:
            raise Refused("The assistant is still writing. Please wait for its answer.") from error
        except SessionTooLarge as error:
            raise Refused("This conversation is as long as it can get. Please begin a new one.") from error
        self.answers.start(conversation.id)
        return seq


def title_of(record: SessionRecord) -> str:
    """The title of a conversation."""
    return str(record.metadata.get("title") or UNTITLED)


def set_up_chat(app: Flask, sessions: PersistSession) -> None:
    """Give *app* its chat."""
    check_settings(app)
    with app.app_context():
        app.extensions[_KEY] = Chat(app, sessions, assistant_for(app))
    app.add_template_filter(title_of, "title_of")


def check_settings(app: Flask) -> None:
    """Refuse settings that would only fail, or open something, later. Raises ``ConfigError``."""
    keys = app.config["CHAT_API_KEYS"]
    if not isinstance(keys, Mapping) or not all(isinstance(part, str) and part for pair in keys.items() for part in pair):
        raise ConfigError('CHAT_API_KEYS is no mapping of keys to users; give a JSON object such as {"a long key": "Ada"}')
    for name in ("CHAT_PACE", "CHAT_STREAMS", "CHAT_STALE"):
        value = app.config[name]
        if not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"{name} is {value!r}; allowed is a number that is not negative")


def assistant_for(app: Flask) -> Assistant:
    """The assistant that the settings choose: a language model if there is a key for one."""
    if not app.config["OPENAI_API_KEY"]:
        return ListingAssistant(pace=app.config["CHAT_PACE"])
    from .language_model import LanguageModel  # only those who want it need the library

    return LanguageModel(app.config["OPENAI_API_KEY"], app.config["OPENAI_MODEL"])


def current_chat() -> Chat:
    """The chat of the current application."""
    chat = current_app.extensions[_KEY]
    assert isinstance(chat, Chat)
    return chat
