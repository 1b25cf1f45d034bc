"""The application for tests of responses in the wrong order: requests stop in the view until they are let go."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from flask import Flask, flash, request, session

from flask_persist_session import PersistSession
from tests.conftest import TickingClock
from tests.servers import DEADLINE


class Gate:
    """A place where one request waits until another opens it."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.open.wait(DEADLINE)


def refill() -> None:
    kept = dict(session)
    session.clear()
    session.update(kept)


def clear_with_a_farewell() -> None:
    session.clear()
    flash("See you.")


def sign_in() -> None:
    session["user_id"] = "Ada"


def sign_in_after_clearing() -> None:
    session.clear()
    session["user_id"] = "Ada"


ACTS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "read": lambda: dict(session),
    "write": lambda: session.update(late=True),
    "write the same": lambda: session.update(cart=["apple"]),
    "append": lambda: session.get("cart", []).append("late"),
    "flash": lambda: flash("late"),
    "mark": lambda: setattr(session, "modified", True),
    "save": lambda: (session.update(late=True), session.save()),  # type: ignore[attr-defined]
    "pop": lambda: session.pop("cart", None),
    "clear": lambda: session.clear(),
    "clear with a farewell": clear_with_a_farewell,
    "refill": refill,
    "sign out": lambda: session.pop("user_id", None),
    "unbind": lambda: session.unbind(),  # type: ignore[attr-defined]
    "regenerate": lambda: session.regenerate(),  # type: ignore[attr-defined]
    "sign in": sign_in,
    "sign in after clearing": sign_in_after_clearing,
    "bind": lambda: session.bind("Ada"),  # type: ignore[attr-defined]
    "sign in as another": lambda: session.update(user_id="Bob"),
}


def create_app() -> Flask:
    """Make the application from the environment."""
    app = Flask(__name__)
    app.config.from_prefixed_env()
    app.config["PERSIST_SESSION_USER_KEY"] = "user_id"
    sessions, clock = PersistSession(app), TickingClock()
    with app.app_context():
        sessions.manager.clock = clock
    gates: defaultdict[str, Gate] = defaultdict(Gate)
    making = threading.Lock()

    def gate(name: str) -> Gate:
        with making:
            return gates[name]

    @app.get("/")
    def show() -> dict[str, Any]:
        return {"data": dict(session), "user_id": session.user_id}  # type: ignore[attr-defined]

    @app.get("/act/<act>")
    def do(act: str) -> str:
        """Do it at once, or, with the argument ``gate``, after passing it; with ``look``, look at the session before."""
        if "look" in request.args:
            dict(session)
        if "gate" in request.args:
            gate(request.args["gate"]).pass_through()
        ACTS[act]()
        return ""

    @app.get("/reached/<name>")
    def reached(name: str) -> str:
        """Answer when a request waits at the gate."""
        assert gate(name).reached.wait(DEADLINE)
        return ""

    @app.get("/open/<name>")
    def open_gate(name: str) -> str:
        gate(name).open.set()
        return ""

    @app.get("/advance/<int:seconds>")
    def advance(seconds: int) -> str:
        clock.advance(seconds)
        return ""

    return app
