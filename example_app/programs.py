"""For programs: the same conversations over JSON, for those who have a key."""

import hmac
import uuid
from typing import Annotated, Any, TypeVar

from flask import Blueprint, Response, abort, current_app, jsonify, request
from flask.typing import ResponseReturnValue
from pydantic import BaseModel, ConfigDict, JsonValue, StringConstraints, ValidationError
from werkzeug.exceptions import HTTPException

from flask_persist_session import SessionNotFound, StoredSession

from .answers import UNTITLED
from .chat import Refused, current_chat

ANYBODY = "*"
#: Seconds for which a program waits for its answer.
PATIENCE = 120.0

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]
Name = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")
]
Body = TypeVar("Body", bound=BaseModel)

programs = Blueprint("programs", __name__)


class Query(BaseModel):
    """The body of ``POST /query``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: Text
    thread_id: Name | None = None
    user_id: Name | None = None
    metadata: dict[str, JsonValue] = {}
    parameters: dict[str, JsonValue] = {}


class ChatMessage(BaseModel):
    """The body of ``POST /api/chat/``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    message: Text
    session_id: Name | None = None
    user_id: Name | None = None


@programs.post("/query")
def query() -> ResponseReturnValue:
    """Go on with a thread, or begin one, and answer."""
    holder = key_holder()
    body = read(Query)
    user, thread = speaks_for(holder, body.user_id), body.thread_id or str(uuid.uuid4())
    conversation = current_chat().sessions.resume_or_create(
        key=f"thread {thread}", user_id=user, metadata={"title": UNTITLED, "about": dict(body.metadata)}
    )
    return jsonify(thread_id=thread, **answer(conversation, body.query, {"parameters": body.parameters}))


@programs.post("/api/chat/")
def chat() -> ResponseReturnValue:
    """Go on with a session, or begin one, and answer."""
    holder = key_holder()
    body = read(ChatMessage)
    sessions, user = current_chat().sessions, speaks_for(holder, body.user_id)
    if body.session_id is None:
        conversation = sessions.create(user_id=user, metadata={"title": UNTITLED})
    else:
        conversation = sessions.resume(body.session_id, user_id=user)
    return jsonify(answer(conversation, body.message, {}))


def key_holder() -> str:
    """The user whose key the request carries; without one, it is refused."""
    given = (request.authorization.token if request.authorization else None) or request.headers.get("X-API-Key", "")
    keys: dict[str, str] = current_app.config["CHAT_API_KEYS"]
    holder = None
    for key, user in keys.items():  # all of them, so that the time it takes tells nothing
        if hmac.compare_digest(key.encode(), given.encode()):
            holder = user
    if holder is None or not given:
        abort(403, "This needs a key of CHAT_API_KEYS, as “Authorization: Bearer …” or “X-API-Key: …”.")
    return holder


def speaks_for(holder: str, user_id: str | None) -> str:
    """The user whose conversation it is: that of the key, or with a key for anybody the one that is named."""
    if holder == ANYBODY:
        return user_id or abort(422, "This key is for anybody, so the body has to name the user_id.")
    if user_id not in (None, holder):
        abort(403, "This key is for another user.")
    return holder


def read(kind: type[Body]) -> Body:
    """Return the body of the request. Raises ``ValidationError``, which is answered with what is wrong where."""
    return kind.model_validate_json(request.get_data())


def answer(conversation: StoredSession, text: str, metadata: dict[str, Any]) -> dict[str, object]:
    """Say *text* in a conversation, and return the answer with the figures of the session."""
    chat = current_chat()
    key = request.headers.get("Idempotency-Key") or str(uuid.uuid4())
    seq = chat.say(conversation, text, key, metadata)
    outcome = chat.answers.wait(conversation.id, seq, PATIENCE)
    if outcome.problem:
        abort(502, outcome.problem)
    if outcome.answer is None:
        abort(504, "There is no answer yet; ask again with the same Idempotency-Key.")
    figures = chat.sessions.existing(conversation.id)
    return {
        "response": outcome.answer,
        "session_id": conversation.id,
        "user_id": conversation.user_id,
        "new": conversation.new,
        **{name: figures.metadata.get(name) for name in ("agent", "query_count", "error_count", "execution_time")},
    }


@programs.errorhandler(HTTPException)
def show_problem(error: HTTPException) -> Response:
    """Answer an HTTP error as JSON."""
    return _problem(error.code or 500, error.description or error.name)


@programs.errorhandler(ValidationError)
def show_invalid(error: ValidationError) -> Response:
    """Tell what is wrong with the body, and where."""
    # Without what was given, which may be long, and the library's own addresses.
    details = error.errors(include_url=False, include_input=False, include_context=False)
    status = 400 if details[0]["type"] == "json_invalid" else 422
    return _problem(status, "The body is not as it should be.", details=details)


@programs.errorhandler(SessionNotFound)
def show_missing(error: SessionNotFound) -> Response:
    """Answer what is not there, is somebody else's or has ended, all alike."""
    return _problem(404, "There is no such conversation, or it has ended.")


@programs.errorhandler(Refused)
def show_refused(error: Refused) -> Response:
    """Tell why a message is not taken, such as that the answer to another one is being written."""
    return _problem(409, str(error))


def _problem(status: int, words: str, **more: object) -> Response:
    response = jsonify(problem=words, **more)
    response.status_code = status
    return response
