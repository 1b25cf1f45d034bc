"""Pages: signing in, the dialogue, and the forms that change it."""

import hmac
import secrets

from flask import Blueprint, Response, abort, current_app, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue

from .assistant import Assistant, ListingAssistant, Message

LONGEST_NAME = 40
LONGEST_MESSAGE = 1000
KEPT_MESSAGES = 200

pages = Blueprint("pages", __name__)
assistant: Assistant = ListingAssistant()


@pages.before_request
def guard() -> ResponseReturnValue | None:
    """Send visitors to the sign-in page, and refuse forms that did not come from one of our pages."""
    if request.endpoint != "pages.sign_in" and "user_id" not in session:
        return see("sign_in")
    if request.method == "POST" and not has_csrf_token():
        abort(400, "This form is out of date, or your browser did not send its cookie. Please try again.")
    return None


@pages.after_request
def keep_private(response: Response) -> Response:
    """Let no cache keep a dialogue: after signing out, "back" must not show it."""
    response.headers["Cache-Control"] = "no-store"
    return response


@pages.get("/")
def chat() -> ResponseReturnValue:
    """Show the dialogue."""
    return show_chat()


@pages.route("/sign-in", methods=["GET", "POST"])
def sign_in() -> ResponseReturnValue:
    """Ask for a name and begin a dialogue."""
    if request.method == "GET":
        return see("chat") if "user_id" in session else show_sign_in()
    name = one_line(request.form.get("name", ""))
    if problem := problem_with(name, "name", LONGEST_NAME):
        return show_sign_in(name, problem), 422
    session.clear()
    session["user_id"] = name
    begin_dialogue()
    return see("chat")


@pages.post("/messages")
def send() -> ResponseReturnValue:
    """Add a message to the dialogue, and the assistant's reply."""
    text = request.form.get("message", "").strip()
    if problem := problem_with(text, "message", LONGEST_MESSAGE):
        return show_chat(text, problem), 422
    dialogue: list[Message] = session["dialogue"]
    dialogue.append({"role": "user", "content": text})
    dialogue.append({"role": "assistant", "content": assistant.reply(dialogue)})
    del dialogue[:-KEPT_MESSAGES]
    return see("chat")


@pages.post("/start-over")
def start_over() -> ResponseReturnValue:
    """Drop the dialogue and begin another."""
    begin_dialogue()
    return see("chat")


@pages.post("/sign-out")
def sign_out() -> ResponseReturnValue:
    """Forget everything."""
    session.clear()
    return see("sign_in")


@pages.app_template_global()
def csrf_token() -> str:
    """Return the session's token, which every form sends along."""
    token: str = session.setdefault("csrf_token", secrets.token_urlsafe(32))
    return token


def has_csrf_token() -> bool:
    """Tell whether the form carries the session's token."""
    expected: str = session.get("csrf_token", "")
    # As bytes, because compare_digest raises on text that is not ASCII.
    return expected != "" and hmac.compare_digest(request.form.get("csrf_token", "").encode(), expected.encode())


def begin_dialogue() -> None:
    """Let the assistant open a new dialogue."""
    session["dialogue"] = [{"role": "assistant", "content": assistant.reply([])}]


def see(page: str) -> ResponseReturnValue:
    """Redirect to a page, so that reloading it never sends a form twice."""
    return redirect(url_for(f"pages.{page}"), 303)


def show_chat(draft: str = "", problem: str = "") -> str:
    """Render the dialogue, with a refused message left in its field."""
    return render_template("chat.html", draft=draft, problem=problem)


def show_sign_in(name: str = "", problem: str = "") -> str:
    """Render the sign-in form, with a refused name left in its field."""
    return render_template("sign_in.html", name=name, problem=problem, notice=why_signed_out())


def why_signed_out() -> str:
    """Tell in words why the session that the browser came with is closed; nothing if it is not."""
    limit = current_app.config["PERSIST_SESSION_MAX_PER_USER"]
    allowed = "one session is" if limit == 1 else f"{limit} sessions are"
    notices = {
        "evicted": f"You were signed out here: you signed in on another device, and only {allowed} allowed at once.",
        "revoked": "You were signed out here: this session was ended from elsewhere.",
        # Not "you were signed out": visitors' sessions expire as well.
        "expired": "Your last session here has expired. Please sign in.",
    }
    # Flask's own session, with PERSIST_SESSION_ENABLED=false, knows no reasons.
    return notices.get(getattr(session, "end_reason", None) or "", "")


def one_line(text: str) -> str:
    """Return the text without line breaks and without characters that cannot be seen."""
    return "".join(filter(str.isprintable, " ".join(text.split()))).strip()


def problem_with(text: str, what: str, longest: int) -> str:
    """Tell in words why the text cannot be taken; nothing if it can."""
    if not text:
        return f"Please enter a {what}."
    if len(text) > longest:
        return f"This {what} has {len(text):,} characters; {longest:,} are the most."
    return ""
