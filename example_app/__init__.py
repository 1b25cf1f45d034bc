"""A web chat: many conversations per user, answers that stream, all of it in server-side sessions."""

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Semaphore

from flask import Flask, Response, jsonify, render_template, request
from werkzeug.exceptions import HTTPException, NotFound

from flask_persist_session import PersistSession, SessionNotFound
from flask_persist_session.web.devices import devices_blueprint

from .chat import set_up_chat
from .forms import TEMPLATE_GLOBALS, wants_json
from .operator import is_admin, moment, operator
from .programs import programs
from .secret_key import lasting_secret_key
from .streaming import streams
from .views.conversations import conversations
from .views.signing import signing

DEFAULTS: dict[str, object] = {
    "SESSION_COOKIE_HTTPONLY": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
    "MAX_CONTENT_LENGTH": 64 * 1024,
    "PERSIST_SESSION_USER_KEY": "user_id",
    "PERSIST_SESSION_MAX_PER_USER": 5,
    "PERSIST_SESSION_TRACK_DEVICES": True,
    "CHAT_MAX_CONVERSATIONS": 50,
    "CHAT_PACE": 0.03,
    "CHAT_STREAMS": 28,
    "CHAT_STALE": 8.0,
    "CHAT_ADMINS": [],
    "CHAT_API_KEYS": {},
    "OPENAI_API_KEY": "",
    "OPENAI_MODEL": "gpt-4o-mini",
}
OTHERS_SETTINGS = ("OPENAI_API_KEY", "OPENAI_MODEL")
"""Settings that have no FLASK_ before their names in the environment, because other programs share them."""

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
    app.config.from_mapping({name: os.environ[name] for name in OTHERS_SETTINGS if name in os.environ})
    app.config.from_mapping(config)
    if not app.config["SECRET_KEY"]:
        app.config["SECRET_KEY"] = lasting_secret_key(Path(app.instance_path))
    set_up_chat(app, PersistSession(app))
    app.extensions["chat_streams"] = Semaphore(app.config["CHAT_STREAMS"])
    app.jinja_env.globals.update(TEMPLATE_GLOBALS, is_admin=is_admin)
    app.add_template_filter(moment)
    for blueprint in (signing, conversations, streams, programs, operator):
        app.register_blueprint(blueprint)
    app.register_blueprint(devices_blueprint(login_url="/sign-in"))
    app.register_error_handler(HTTPException, show_error)
    app.register_error_handler(SessionNotFound, show_missing)
    app.after_request(add_security_headers)
    return app


def show_error(error: HTTPException) -> Response:
    """Answer an HTTP error in words, as a page or to a script as JSON, keeping its status and headers (``Retry-After``)."""
    if wants_json() or request.is_json:
        response = jsonify(problem=error.description or error.name)
    else:
        response = Response(render_template("error.html", error=error))
    response.status_code = error.code or 500
    response.headers.extend((name, value) for name, value in error.get_headers() if name.lower() != "content-type")
    return response


def show_missing(error: SessionNotFound) -> Response:
    """Answer what is not there, is somebody else's or has ended, all alike."""
    return show_error(NotFound("There is no such conversation, or it has ended."))


def add_security_headers(response: Response) -> Response:
    """Let pages load only what this application serves, and tell other sites nothing."""
    response.headers.update(SECURITY_HEADERS)
    return response
