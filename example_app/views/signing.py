"""Signing in by a name, and out."""

from flask import Blueprint, current_app, render_template, request, session
from flask.typing import ResponseReturnValue

from ..forms import check_token, for_users_only, keep_private, one_line, problem_with, see

LONGEST_NAME = 40

signing = Blueprint("signing", __name__)
signing.after_request(keep_private)


@signing.before_request
def guard() -> ResponseReturnValue | None:
    """Let everybody sign in, and users sign out, by our own forms."""
    if request.endpoint == "signing.sign_out":
        return for_users_only()
    check_token()
    return None


@signing.route("/sign-in", methods=["GET", "POST"])
def sign_in() -> ResponseReturnValue:
    """Ask for a name, and begin a session under it."""
    if request.method == "GET":
        return see("conversations.start") if "user_id" in session else show_sign_in()
    name = one_line(request.form.get("name", ""))
    if problem := problem_with(name, "name", LONGEST_NAME):
        return show_sign_in(name, problem), 422
    session.clear()
    session["user_id"] = name
    return see("conversations.start")


@signing.post("/sign-out")
def sign_out() -> ResponseReturnValue:
    """Forget who it was; the conversations stay."""
    session.clear()
    return see("signing.sign_in")


def show_sign_in(name: str = "", problem: str = "") -> str:
    """Render the sign-in form, with a refused name left in its field."""
    return render_template("sign_in.html", name=name, problem=problem, notice=why_signed_out(end_reason()))


def end_reason() -> str:
    """Return why the session that the browser came with is closed, "" if it is not."""
    return getattr(session, "end_reason", None) or ""


def why_signed_out(reason: str) -> str:
    """Tell in words why a session was closed, unless its user did so just here."""
    limit = current_app.config["PERSIST_SESSION_MAX_PER_USER"]
    allowed = "one session is" if limit == 1 else f"{limit} sessions are"
    notices = {
        "evicted": f"You were signed out here: you signed in on another device, and only {allowed} allowed at once.",
        "revoked": "You were signed out here: this session was ended from elsewhere.",
        # Not "you were signed out": visitors' sessions expire as well.
        "expired": "Your last session here has expired. Please sign in.",
    }
    return notices.get(reason, "")
