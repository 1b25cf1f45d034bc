"""Writing the answers: in the background, by one process at a time, and by another where that one was killed.

A turn of the user that is the last entry of a history waits for its answer. Whoever answers it claims it first, in the
data of the session under the version that was seen, so two never begin on the same; while it is written, what there is so
far is noted there, at growing intervals. A claim that was not noted anew for a while (``CHAT_STALE``) is that of a process
which is no more: the next request begins the answer anew. The whole answer is appended as the entry that follows the turn
or not at all, so it can neither be there twice nor come too late.

The pieces are in the session and not in the history, because a history keeps what it was given: a piece per entry would
stay for ever. And as a session is saved as a whole, the intervals grow with the answer, so that the cost stays bounded.
"""

import logging
import secrets
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flask_persist_session import SessionConflict, SessionManager, SessionNotFound, SessionTooLarge, StoredSession

from .assistant import Assistant, AssistantError, Message
from .pauses import with_pauses

log = logging.getLogger(__name__)

CONTEXT = 20
FIRST_NOTE = 0.15
NOTE_GROWTH = 1.15
AT_ONCE = 32
UNTITLED = "New conversation"
TITLE = 60
KEPT = 500
PASSED_OVER = "This message got no answer, and the dialogue has gone on."
TOO_LONG = "The answer is too long for this conversation. Please begin a new one."
FAILED = "The assistant failed. Please try again."


class Overtaken(Exception):
    """Somebody else is answering, or has answered."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of the user that we have claimed to answer."""

    conversation_id: str
    seq: int
    text: str
    by: str
    began: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a turn: the *answer*, or the *problem* there was with it; neither, if it is still being written."""

    answer: str | None = None
    problem: str | None = None


def under_way(conversation: StoredSession, seq: int) -> dict[str, Any]:
    """What is noted of the answer to the entry of that number; empty if nothing is."""
    noted = conversation.data.get("answer") or {}
    return noted if noted.get("to") == seq else {}


def problem_of(conversation: StoredSession, seq: int) -> str:
    """Why the entry of that number got no answer; "" if it has one, or will have."""
    return str(under_way(conversation, seq).get("problem", ""))


class Answers:
    """Answers what users say, at most ``AT_ONCE`` at a time in this process.

    :param stale: seconds after which an answer of which nothing was noted is begun anew; something is, four times as often.
    """

    def __init__(self, sessions: SessionManager, assistant: Assistant, stale: float) -> None:
        self._sessions = sessions
        self._assistant = assistant
        self._stale = stale
        self._beat = stale / 4
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="answer")
        self._queued: set[str] = set()
        self._lock = threading.Lock()

    def start(self, conversation_id: str) -> None:
        """Answer in the background what waits for an answer there, unless somebody does."""
        with self._lock:
            if conversation_id in self._queued:
                return
            self._queued.add(conversation_id)
        self._pool.submit(self._run, conversation_id).add_done_callback(_report)

    def _run(self, conversation_id: str) -> None:
        # Before looking: what is said after that look is queued again.
        with self._lock:
            self._queued.discard(conversation_id)
        self.write(conversation_id)

    def is_due(self, conversation: StoredSession, seq: int) -> bool:
        """Whether nobody answers the entry of that number, and it should be."""
        noted = under_way(conversation, seq)
        return "problem" not in noted and noted.get("at", 0) + self._stale < self._sessions.clock()

    def try_again(self, conversation_id: str) -> None:
        """Forget that the last answer failed, and start it."""
        with self._sessions.edit(conversation_id) as conversation:
            if "problem" in (conversation.data.get("answer") or {}):
                del conversation.data["answer"]
        self.start(conversation_id)

    def wait(self, conversation_id: str, seq: int, seconds: float) -> Outcome:
        """Wait for the answer to the entry of that number. Raises ``SessionNotFound`` once the conversation has ended."""
        until, pause = time.monotonic() + seconds, 0.01
        while True:
            outcome = self.outcome(conversation_id, seq)
            if outcome != Outcome() or time.monotonic() > until:
                return outcome
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    def outcome(self, conversation_id: str, seq: int) -> Outcome:
        """What has become of the entry of that number until now, which is answered anew where its process was killed.

        Raises ``SessionNotFound`` as ``wait`` does.
        """
        conversation = self._sessions.existing(conversation_id)
        if problem := problem_of(conversation, seq):
            return Outcome(problem=problem)
        if under_way(conversation, seq) and not self.is_due(conversation, seq):
            return Outcome()  # the answer may be there, but not yet the figures of it
        entries = self._sessions.history(conversation_id).after(seq, limit=1)
        if not entries:
            self.start(conversation_id)
            return Outcome()
        if entries[0].role == "user":
            return Outcome(problem=PASSED_OVER)
        return Outcome(answer=str(entries[0].content))

    def write(self, conversation_id: str) -> None:
        """Answer what waits for an answer there, unless somebody does."""
        turn = self._claim(conversation_id)
        if turn is None:
            return
        problem = FAILED
        try:
            answer = self._generate(turn)
            problem = ""
            self._finish(turn, answer)
        except AssistantError as error:
            problem = str(error)
        except SessionTooLarge:
            problem = TOO_LONG
        except (Overtaken, SessionNotFound):
            problem = ""
        finally:
            if problem:
                self._give_up(turn, problem)

    def _claim(self, conversation_id: str) -> Turn | None:
        while True:
            conversation = self._sessions.get(conversation_id)
            last = self._sessions.history(conversation_id).latest(1)
            if conversation is None or not last or last[0].role != "user" or not self.is_due(conversation, last[0].seq):
                return None
            turn = Turn(conversation_id, last[0].seq, str(last[0].content), secrets.token_hex(8), self._sessions.clock())
            with suppress(SessionConflict, SessionNotFound):  # claimed by somebody else, renamed, ended: look again
                self._note_claim(turn, conversation.version)
                return turn

    def _note_claim(self, turn: Turn, version: int) -> None:
        with self._sessions.edit(turn.conversation_id, expected_version=version) as conversation:
            conversation.data["answer"] = {"to": turn.seq, "by": turn.by, "at": turn.began, "text": ""}
            if conversation.metadata.get("title") == UNTITLED:
                conversation.metadata["title"] = shortened(turn.text, TITLE)

    def _generate(self, turn: Turn) -> str:
        text, noted, pause = "", time.monotonic(), FIRST_NOTE
        for piece in with_pauses(self._assistant.answer(self._context(turn)), self._beat):
            text += piece
            if time.monotonic() - noted >= pause or not piece:
                self._note(turn, text)
                noted, pause = time.monotonic(), min(pause * NOTE_GROWTH, self._beat)
        if not text.strip():
            raise AssistantError("The assistant had nothing to say. Please try again.")
        return text

    def _context(self, turn: Turn) -> list[Message]:
        entries = self._sessions.history(turn.conversation_id).latest(CONTEXT)
        return [Message(role="user" if entry.role == "user" else "assistant", content=entry.content) for entry in entries]

    def _note(self, turn: Turn, text: str) -> None:
        with self._sessions.edit(turn.conversation_id) as conversation:
            self._check(turn, conversation)
            conversation.data["answer"] = {"to": turn.seq, "by": turn.by, "at": self._sessions.clock(), "text": text}

    def _check(self, turn: Turn, conversation: StoredSession) -> None:
        if under_way(conversation, turn.seq).get("by") != turn.by:
            raise Overtaken

    def _finish(self, turn: Turn, answer: str) -> None:
        entry = {"role": "assistant", "content": answer, "metadata": {"agent": self._assistant.name}}
        try:
            self._sessions.history(turn.conversation_id).append(
                entry, expected_seq=turn.seq, idempotency_key=f"answer to {turn.seq}"
            )
        except SessionConflict as error:
            raise Overtaken from error
        with self._sessions.edit(turn.conversation_id) as conversation:
            self._check(turn, conversation)
            del conversation.data["answer"]
            self._count(turn, conversation)
            conversation.data["last_response"] = shortened(answer, KEPT)

    def _give_up(self, turn: Turn, problem: str) -> None:
        with suppress(SessionNotFound), self._sessions.edit(turn.conversation_id) as conversation:
            if under_way(conversation, turn.seq).get("by") == turn.by:
                conversation.data["answer"] = {"to": turn.seq, "by": turn.by, "problem": problem}
                self._count(turn, conversation)
                conversation.data["last_error"] = problem
                conversation.metadata["error_count"] = _number(conversation.metadata.get("error_count")) + 1

    def _count(self, turn: Turn, conversation: StoredSession) -> None:
        """Keep the figures where lists can show them, and what was said where only its owner can read it."""
        metadata = conversation.metadata
        metadata.setdefault("error_count", 0)
        metadata["agent"] = self._assistant.name
        metadata["query_count"] = _number(metadata.get("query_count")) + 1
        metadata["execution_time"] = round(self._sessions.clock() - turn.began, 3)
        conversation.data["last_query"] = shortened(turn.text, KEPT)


def _report(done: "Future[None]") -> None:
    if error := done.exception():
        log.error("an answer could not be written", exc_info=error)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def shortened(text: str, longest: int) -> str:
    """Return the text, cut where it is too long."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
