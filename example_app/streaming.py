"""What happens in a conversation, told to its pages as it happens: server-sent events.

The store is all that the workers share, so a stream looks there again and again: soon after something has happened, then
less and less often, at most once a second. A look is one read of the conversation's session; its history is read when the
session has changed, and once in a while besides. Which events there are is written in README.md.
"""

import json
import logging
import re
import time
from collections.abc import Iterator
from threading import Semaphore

from flask import Blueprint, Flask, Response, current_app, request, session
from flask.typing import ResponseReturnValue

from flask_persist_session import SessionNotFound, StoredSession, StoreUnavailable

from .answers import under_way
from .chat import Chat, current_chat, title_of
from .forms import keep_private
from .views.signing import end_reason, why_signed_out

log = logging.getLogger(__name__)

SHORTEST = 0.05
LONGEST = 1.0
GROWTH = 1.4
HISTORY_EVERY = 2.0
SIGN_IN_EVERY = 1.5
LIFE = 300.0
SILENCE = 10.0
BATCH = 100
ENDED = "There is no such conversation, or it has ended."

streams = Blueprint("streaming", __name__)
streams.after_request(keep_private)


def event(kind: str, number: int | None = None, **fields: object) -> str:
    """Return an event as it is sent; *number* is what the browser sends back where it picks up."""
    numbered = f"id: {number}\n" if number is not None else ""
    return f"{numbered}event: {kind}\ndata: {json.dumps(fields)}\n\n"


@streams.get("/conversations/<conversation_id>/events")
def events(conversation_id: str) -> ResponseReturnValue:
    """Tell what is behind the entry that the page, or the browser that lost its connection, has last."""
    if "user_id" not in session:
        words = why_signed_out(end_reason()) or "You are not signed in here any more."
        return as_stream(iter([event("signed-out", words=words)]))
    chat = current_chat()
    try:
        conversation = chat.of(session["user_id"], conversation_id)
    except SessionNotFound:  # told as an event, because a browser does not show a script why there is no stream
        return as_stream(iter([event("ended", words=ENDED)]))
    # The header is newer: it is what the browser got by the stream that began at this address.
    after = request.headers.get("Last-Event-ID") or request.args.get("after", "")
    seq = int(after) if re.fullmatch("[0-9]{1,15}", after) else 0
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    stream = Stream(app, chat, conversation.id, getattr(session, "id", None), seq)
    return as_stream(in_turn(stream, app.extensions["chat_streams"]))


def as_stream(body: Iterator[str]) -> Response:
    """Answer with events, which no proxy is to hold back."""
    return Response(body, mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})


def in_turn(stream: "Stream", seats: Semaphore) -> Iterator[str]:
    """Let a stream last only while this process has a seat for it, because each takes one of its threads.

    Without a seat it tells what there is and ends; the browser comes back by itself, which is slower, but works.
    """
    if not seats.acquire(blocking=False):
        yield "retry: 2000\n\n"
        yield from stream.look()
        return
    try:
        yield "retry: 500\n\n"
        yield from stream.events()
    except StoreUnavailable as error:  # the status has left already; the browser comes back, and is told 503
        log.warning("a stream ended because the store cannot be reached: %s", error)
    finally:
        seats.release()


class Stream:
    """Tells one page of one conversation what happens, from behind the entry number *seq*."""

    def __init__(self, app: Flask, chat: Chat, conversation_id: str, web_id: str | None, seq: int) -> None:
        self._app = app
        self._chat = chat
        self._history = chat.sessions.history(conversation_id)
        self._conversation_id = conversation_id
        self._web_id = web_id
        self._seq = seq
        self._waiting = True  # whether the last entry that we know of may be one that waits for an answer
        self._version = 0
        self._title = ""
        self._sent = ""
        self._problem = ""
        self._over = False
        self._history_read = self._sign_in_checked = self._spoke = 0.0

    def events(self) -> Iterator[str]:
        """Tell what happens, until the user has signed out, the conversation has ended, or for ``LIFE`` seconds."""
        ends, pause = time.monotonic() + LIFE, SHORTEST
        while not self._over and time.monotonic() < ends:
            news = list(self.look())
            yield from news or self._sign_of_life()
            pause = SHORTEST if news else min(pause * GROWTH, LONGEST)
            if not self._over:
                time.sleep(pause)

    def look(self) -> Iterator[str]:
        """Look once, and tell what is new."""
        self._spoke = self._spoke or time.monotonic()
        told = [*self._sign_in(), *([] if self._over else self._conversation())]
        if told:
            self._spoke = time.monotonic()
        yield from told

    def _sign_of_life(self) -> Iterator[str]:
        """Without it, a connection that nobody listens to any more would go unnoticed."""
        if time.monotonic() - self._spoke > SILENCE:
            self._spoke = time.monotonic()
            yield ": still here\n\n"

    def _sign_in(self) -> Iterator[str]:
        if time.monotonic() - self._sign_in_checked < SIGN_IN_EVERY or self._web_id is None:
            return
        self._sign_in_checked = time.monotonic()
        web = self._chat.web.load(self._web_id)
        if web is None or web.state != "active":
            self._over = True
            reason = "" if web is None else web.end_reason or ""
            if reason != "regenerated":  # signed in anew: the browser comes back with another cookie
                with self._app.app_context():
                    words = why_signed_out(reason) or "You have signed out."
                yield event("signed-out", words=words)

    def _conversation(self) -> Iterator[str]:
        conversation = self._chat.sessions.load(self._conversation_id)
        if conversation is None or conversation.state != "active":
            self._over = True
            yield event("ended", words=ENDED)
            return
        if conversation.version != self._version or time.monotonic() - self._history_read > HISTORY_EVERY:
            self._version, self._history_read = conversation.version, time.monotonic()
            yield from self._entries()
        yield from self._renamed(conversation)
        if self._waiting:
            yield from self._answer(conversation)

    def _entries(self) -> Iterator[str]:
        while entries := self._history.after(self._seq, limit=BATCH):
            for entry in entries:
                yield event("entry", entry.seq, seq=entry.seq, role=entry.role, content=entry.content)
            self._seq, self._waiting = entries[-1].seq, entries[-1].role == "user"
            self._sent = self._problem = ""
            if len(entries) < BATCH:
                return

    def _renamed(self, conversation: StoredSession) -> Iterator[str]:
        title = title_of(conversation.record)
        if self._title != title:
            self._title = title
            yield event("title", title=title)

    def _answer(self, conversation: StoredSession) -> Iterator[str]:
        noted = under_way(conversation, self._seq)
        if self._chat.answers.is_due(conversation, self._seq):
            self._chat.answers.start(self._conversation_id)
        text, problem = noted.get("text", ""), noted.get("problem", "")
        if problem != self._problem:
            self._problem = problem
            yield event("problem", to=self._seq, words=problem)
        if text != self._sent:
            start = len(self._sent) if text.startswith(self._sent) else 0
            self._sent = text
            yield event("piece", to=self._seq, start=start, text=text[start:])
