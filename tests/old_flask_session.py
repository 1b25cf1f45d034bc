"""Signs a user in with whichever Flask-Session is first on the path; prints its version and the cookie.

Run by the tests of taking over as a program of its own: the first argument is a JSON object of settings.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import version
from typing import Any

from flask import Flask, session


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    app = Flask("tested")
    app.config.update(settings, SECRET_KEY="a secret for tests")
    if "REDIS" in settings:
        import redis

        app.config["SESSION_REDIS"] = redis.Redis.from_url(settings["REDIS"])
    if "SQLALCHEMY_DATABASE_URI" in settings:
        from flask_sqlalchemy import SQLAlchemy

        app.config["SESSION_SQLALCHEMY"] = SQLAlchemy(app)
    from flask_session import Session

    warnings.simplefilter("ignore")
    Session(app)
    if "SQLALCHEMY_DATABASE_URI" in settings:
        with app.app_context():
            app.config["SESSION_SQLALCHEMY"].create_all()

    @app.get("/")
    def sign_in() -> str:
        session.update(_user_id="Ada", color="blue")
        return "in"

    client = app.test_client()
    client.get("/")
    cookie = client.get_cookie("session")
    assert cookie is not None
    print(json.dumps([version("flask-session"), cookie.value]))


main()
