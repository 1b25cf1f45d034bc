"""A web chat whose whole dialogue lives in the session."""

import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flask import Flask, Response, render_template
from werkzeug.exceptions import HTTPException

from flask_persist_session import PersistSession

from .views import pages

DEFAULTS = {
    "SESSION_COOKIE_HTTPONLY": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
    "MAX_CONTENT_LENGTH": 64 * 1024,
    "PERSIST_SESSION_USER_KEY": "user_id",
    "PERSIST_SESSION_MAX_PER_USER": 5,
}

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def create_app(config: Mapping[str, object] | None = None) -> Flask:
    """Make the application: defaults, then the environment (``FLASK_…``), then ``config``."""
    app = Flask(__name__)
    app.config.from_mapping(DEFAULTS)
    app.config.from_prefixed_env()
    app.config.from_mapping(config)
    if not app.config["SECRET_KEY"]:
        app.config["SECRET_KEY"] = lasting_secret_key(Path(app.instance_path))
    PersistSession(app)
    app.register_blueprint(pages)
    app.register_error_handler(HTTPException, show_error)
    app.after_request(add_security_headers)
    return app


def lasting_secret_key(folder: Path) -> str:
    """Return the secret key kept in ``folder``, made on first use and the same for every process."""
    path = folder / "secret_key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        publish_once(path, secrets.token_urlsafe(32))
    return path.read_text(encoding="ascii")


def publish_once(path: Path, text: str) -> None:
    """Create a private file with its whole text at once, or leave the one that is already there."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        # A link never replaces a file, a rename does: of two workers starting at once the second
        # would then go on with a key that the first has already signed cookies against.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)


def show_error(error: HTTPException) -> Response:
    """Answer an HTTP error with a page in words, keeping its status and headers (``Retry-After``)."""
    page = render_template("error.html", error=error)
    response = Response(page, status=error.code)
    response.headers.extend((name, value) for name, value in error.get_headers() if name.lower() != "content-type")
    return response


def add_security_headers(response: Response) -> Response:
    """Let pages load only what this application serves, and tell other sites nothing."""
    response.headers.update(SECURITY_HEADERS)
    return response
