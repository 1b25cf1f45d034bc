"""The application that the tests with processes serve: it shows and changes the session, and tells which process did."""

from __future__ import annotations

import os
import sys
import warnings

from flask import Flask, request, session

from flask_persist_session import PersistSession


def create_app() -> Flask:
    """Make the application from the environment, and use its store at once: with ``--preload``, before the fork."""
    app = Flask(__name__)
    app.config.from_prefixed_env()
    sessions = PersistSession(app)
    with app.app_context():
        made = sessions.manager.create({"made by": os.getpid()})
        assert sessions.manager.get(made.id) is not None
        assert sessions.manager.stats().total > 0

    @app.get("/")
    def show() -> dict[str, object]:
        return {"pid": os.getpid(), "session": dict(session)}

    @app.post("/append")
    def append() -> dict[str, object]:
        """Append a number to the list of a key."""
        session.setdefault(request.form["key"], []).append(int(request.form["number"]))
        return {"pid": os.getpid()}

    @app.get("/trouble/<kind>")
    def trouble(kind: str) -> str:
        """Warn of something, or print it."""
        if kind == "warn":
            warnings.warn("there is trouble", stacklevel=1)
        else:
            print("an error", file=sys.stderr)
        return kind

    return app
