"""Other extensions that live in the session go on working: Flask-Login and Flask-WTF, the real ones."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from flask import Flask, render_template_string, session
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user, logout_user
from flask_wtf import CSRFProtect

MakeApp = Callable[..., Flask]


class User(UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


@pytest.fixture
def app(make_app: MakeApp, store_url: str) -> Flask:
    app = make_app(store_url)
    manager = LoginManager(app)
    manager.user_loader(User)

    @app.get("/login/<name>")
    def login(name: str) -> str:
        login_user(User(name))
        return "in"

    @app.get("/logout")
    def logout() -> str:
        logout_user()
        return "out"

    @app.get("/me")
    @login_required
    def me() -> str:
        return str(current_user.id)

    return app


def test_a_flask_login_user_stays_signed_in_until_signing_out(app: Flask) -> None:
    """Signing in, being recognised and signing out work as with Flask's cookie, on every store."""
    client = app.test_client()
    assert client.get("/me").status_code == 401
    client.get("/login/Ada")
    assert [client.get("/me").text for _ in range(2)] == ["Ada", "Ada"]
    client.get("/logout")
    assert client.get("/me").status_code == 401


def test_a_signed_in_user_survives_a_restart(app: Flask, make_app: MakeApp) -> None:
    """Another process with the same store and key knows the user."""
    client = app.test_client()
    client.get("/login/Ada")
    restarted = make_app(app.extensions["persist_session"].store)
    restarted.add_url_rule("/id", view_func=lambda: repr(session.get("_user_id")))
    other = restarted.test_client()
    other.set_cookie("session", client.get_cookie("session").value)  # type: ignore[union-attr]
    assert other.get("/id").text == "'Ada'"


def test_flask_wtf_keeps_its_csrf_token_in_the_session(make_app: MakeApp) -> None:
    """A form with the token of its page is accepted, one without is refused."""
    app = make_app()
    CSRFProtect(app)

    @app.route("/form", methods=["GET", "POST"])
    def form() -> str:
        return render_template_string("<input name=csrf_token value={{ csrf_token() }}>")

    client = app.test_client()
    match = re.search(r"value=([\w.-]+)", client.get("/form").text)
    assert match is not None
    assert client.post("/form", data={"csrf_token": match[1]}).status_code == 200
    assert client.post("/form").status_code == 400
