"""The pages of the conversations, and the forms that change them."""

import secrets

from flask import Blueprint, jsonify, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue

from flask_persist_session import StoredSession

from ..answers import problem_of, under_way
from ..chat import SHOWN, Refused, current_chat
from ..forms import guard, one_line, problem_with, see, wants_json

LONGEST_MESSAGE = 4000
LONGEST_TITLE = 80
LONGEST_SEARCH = 200
FOUND = 50
#: Seconds for which a form waits for the answer, so that the page that follows has a quick one already.
PATIENCE = 1.5

conversations = guard(Blueprint("conversations", __name__))


@conversations.get("/")
def start() -> ResponseReturnValue:
    """Go on with the newest conversation, or show that there is none."""
    newest = current_chat().newest(session["user_id"])
    if newest and not request.args:
        return see(".show", conversation_id=newest.id)
    return render_template("start.html", **side_bar())


@conversations.post("/conversations")
def begin() -> ResponseReturnValue:
    """Begin a conversation."""
    key = one_line(request.form.get("key", ""))[:64] or secrets.token_urlsafe(12)
    return see(".show", conversation_id=current_chat().begin(session["user_id"], key).id)


@conversations.get("/conversations/<conversation_id>")
def show(conversation_id: str) -> ResponseReturnValue:
    """Show the latest entries, or those before a number, and what is found in the dialogue."""
    return show_conversation(mine(conversation_id))


@conversations.post("/conversations/<conversation_id>/messages")
def send(conversation_id: str) -> ResponseReturnValue:
    """Store a message and start the answer."""
    conversation, chat = mine(conversation_id), current_chat()
    text = "\n".join(request.form.get("message", "").strip().splitlines())
    if problem := problem_with(text, "message", LONGEST_MESSAGE):
        return refuse(conversation, text, problem, 422)
    try:
        seq = chat.say(conversation, text, request.form.get("key", "")[:64])
    except Refused as refused:
        return refuse(conversation, text, str(refused), 409)
    if wants_json():
        return jsonify(seq=seq, role="user", content=text), 202
    chat.answers.wait(conversation.id, seq, PATIENCE)
    return redirect(url_for(".show", conversation_id=conversation.id, _anchor="composer"), 303)


@conversations.post("/conversations/<conversation_id>/again")
def try_again(conversation_id: str) -> ResponseReturnValue:
    """Start the answer that failed once more."""
    conversation, chat = mine(conversation_id), current_chat()
    chat.answers.try_again(conversation.id)
    if wants_json():
        return jsonify({}), 202
    chat.answers.wait(conversation.id, chat.sessions.history(conversation.id).count(), PATIENCE)
    return see(".show", conversation_id=conversation.id)


@conversations.post("/conversations/<conversation_id>/title")
def rename(conversation_id: str) -> ResponseReturnValue:
    """Give it another title."""
    conversation, title = mine(conversation_id), one_line(request.form.get("title", ""))
    if problem := problem_with(title, "title", LONGEST_TITLE):
        return show_conversation(conversation, title=title, title_problem=problem), 422
    current_chat().rename(conversation.id, title)
    return see(".show", conversation_id=conversation.id)


@conversations.route("/conversations/<conversation_id>/end", methods=["GET", "POST"])
def end(conversation_id: str) -> ResponseReturnValue:
    """Ask whether to end it, and do so."""
    conversation = mine(conversation_id)
    if request.method == "GET":
        return render_template("end.html", conversation=conversation, **side_bar())
    current_chat().sessions.end(conversation.id)
    return see(".start")


def mine(conversation_id: str) -> StoredSession:
    """Return a conversation of the user. Raises ``SessionNotFound``, which becomes a 404, also for one of somebody else."""
    return current_chat().of(session["user_id"], conversation_id)


def refuse(conversation: StoredSession, text: str, problem: str, status: int) -> ResponseReturnValue:
    """Tell why a message was not taken, which is left in its field."""
    if wants_json():
        return jsonify(problem=problem), status
    return show_conversation(conversation, draft=text, problem=problem), status


def show_conversation(conversation: StoredSession, **values: str) -> str:
    """Render a conversation; *values* are what was refused, and why."""
    chat = current_chat()
    history = chat.sessions.history(conversation.id)
    before = request.args.get("before", type=int)
    entries = history.page(before=before, limit=SHOWN)
    last = entries[-1].seq if entries else 0
    waiting = before is None and bool(entries) and entries[-1].role == "user"
    if waiting and chat.answers.is_due(conversation, last):
        chat.answers.start(conversation.id)  # by whoever was killed in the middle of it
    words = one_line(request.args.get("find", ""))[:LONGEST_SEARCH]
    return render_template(
        "conversation.html",
        conversation=conversation,
        entries=entries,
        last=last,
        before=before,
        failure=problem_of(conversation, last) if waiting else "",
        waiting=waiting,
        so_far=under_way(conversation, last).get("text", ""),
        find=words,
        # The search of a history looks at the roles as well, which nobody means.
        found=[hit for hit in history.search(words, limit=FOUND) if words.casefold() in str(hit.content).casefold()]
        if words
        else [],
        **values,
        **side_bar(),
    )


def side_bar() -> dict[str, object]:
    """Return what the side bar shows: the conversations, those with a text in their title, a page of them."""
    text = one_line(request.args.get("q", ""))[:LONGEST_SEARCH]
    listed = current_chat().list(session["user_id"], text, request.args.get("behind"))
    return {"listed": listed, "q": text}
