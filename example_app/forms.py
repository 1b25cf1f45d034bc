"""What the forms of all pages have in common: the token against forgery, and what may be in a field."""

import hmac
import secrets
from collections.abc import Mapping

from flask import Blueprint, Response, abort, jsonify, redirect, request, session, url_for
from flask.typing import ResponseReturnValue


def wants_json() -> bool:
    """Tell whether the request comes from our script, which shows a problem in place, and not from a form."""
    return request.accept_mimetypes.best == "application/json"


def see(endpoint: str, **values: object) -> ResponseReturnValue:
    """Redirect to a page, so that reloading it never sends a form twice."""
    return redirect(url_for(endpoint, **values), 303)  # type: ignore[arg-type]


def for_users_only() -> ResponseReturnValue | None:
    """Send visitors to the sign-in page, and refuse forms that did not come from one of our pages."""
    if "user_id" not in session:
        if wants_json():
            return jsonify(problem="You are not signed in here any more.", sign_in=url_for("signing.sign_in")), 401
        return see("signing.sign_in")
    check_token()
    return None


def check_token() -> None:
    """Refuse forms that did not come from one of our pages."""
    if request.method == "POST" and not has_csrf_token():
        abort(400, "This form is out of date, or your browser did not send its cookie. Please try again.")


def csrf_token() -> str:
    """Return the session's token, which every form sends along."""
    token: str = session.setdefault("csrf_token", secrets.token_urlsafe(32))
    return token


def has_csrf_token() -> bool:
    """Tell whether the form carries the session's token."""
    expected: str = session.get("csrf_token", "")
    # As bytes, because compare_digest raises on text that is not ASCII.
    return expected != "" and hmac.compare_digest(request.form.get("csrf_token", "").encode(), expected.encode())


def form_key() -> str:
    """Return a name for one form, so that sending it twice counts once."""
    return secrets.token_urlsafe(12)


def keep_private(response: Response) -> Response:
    """Let no cache keep a dialogue: after signing out, "back" must not show it."""
    response.headers["Cache-Control"] = "no-store"
    return response


def guard(blueprint: Blueprint) -> Blueprint:
    """Open the pages of a blueprint to users only, and keep them out of caches."""
    blueprint.before_request(for_users_only)
    blueprint.after_request(keep_private)
    return blueprint


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


TEMPLATE_GLOBALS: Mapping[str, object] = {"csrf_token": csrf_token, "form_key": form_key}
