"""What the tests of taking over sessions share: one application, with the sessions of others and then with ours."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from cachelib import FileSystemCache
from flask import Flask, flash, get_flashed_messages, session
from flask.testing import FlaskClient
from flask_login import LoginManager, UserMixin, current_user, login_user, logout_user
from flask_session import Session
from flask_sqlalchemy import SQLAlchemy

MakeApp = Callable[..., Flask]
SECRET = "a secret for tests"
ORIGINS = ("redis", "file", "cachelib", "sqlite", "postgresql", "mysql", "memcached")
_numbers = itertools.count(1)


class User(UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


def add_views(app: Flask) -> Flask:  # noqa: C901
    """The application that is served, whoever keeps its sessions; it signs users in with Flask-Login."""
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

    @app.get("/clear")
    def clear() -> str:
        session.clear()
        return "cleared"

    @app.get("/me")
    def me() -> str:
        return str(current_user.id) if current_user.is_authenticated else "nobody"

    @app.get("/put/<key>/<value>")
    def put(key: str, value: str) -> str:
        session[key] = value
        return "put"

    @app.get("/data")
    def data() -> dict[str, Any]:
        return {"data": {key: session[key] for key in session if not key.startswith("_")}, "permanent": session.permanent}

    @app.get("/flash/<text>")
    def flash_text(text: str) -> str:
        flash(text, "news")
        return "flashed"

    @app.get("/flashes")
    def flashes() -> list[Any]:
        return get_flashed_messages(with_categories=True)

    @app.get("/permanent")
    def permanent() -> str:
        session.permanent = True
        return "permanent"

    @app.get("/untouched")
    def untouched() -> str:
        return "untouched"

    return app


def cookie_of(client: FlaskClient) -> str:
    """The value of the session cookie that a client has; empty if it has none."""
    cookie = client.get_cookie("session")
    return "" if cookie is None else cookie.value


def with_cookie(app: Flask, value: str) -> FlaskClient:
    """A client of *app* that comes with a session cookie."""
    client = app.test_client()
    client.set_cookie("session", value)
    return client


@dataclass
class Former:
    """An application on Flask-Session, and the URL under which ours finds its sessions."""

    app: Flask
    url: str
    client: FlaskClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.app.test_client()


def former_app(request: pytest.FixtureRequest, tmp_path: Path, kind: str, **settings: Any) -> Former:
    """The application with Flask-Session on a store of *kind*; *settings* are those of Flask-Session."""
    app = Flask("tested", instance_path=str(tmp_path))
    prefix = f"session{os.getpid()}x{next(_numbers)}:"
    app.config.update(SECRET_KEY=SECRET, TESTING=True, SESSION_KEY_PREFIX=prefix, **settings)
    url = _SETTERS[kind](request, tmp_path, app)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Session(app)
    query = f"prefix={prefix}" + ("&signed=1" if settings.get("SESSION_USE_SIGNER") else "")
    return Former(add_views(app), f"flask-session+{url}{'&' if '?' in url else '?'}{query}")


def _on_redis(request: pytest.FixtureRequest, tmp_path: Path, app: Flask) -> str:
    server = request.getfixturevalue("redis_server")
    app.config.update(SESSION_TYPE="redis", SESSION_REDIS=redis.Redis.from_url(server.url))
    return str(server.url)


def _in_files(request: pytest.FixtureRequest, tmp_path: Path, app: Flask) -> str:
    app.config.update(SESSION_TYPE="filesystem", SESSION_FILE_DIR=str(tmp_path / "old"))
    return f"file://{tmp_path}/old?pickle=1"


def _in_cachelib(request: pytest.FixtureRequest, tmp_path: Path, app: Flask) -> str:
    app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=FileSystemCache(str(tmp_path / "old"), threshold=500))
    return f"file://{tmp_path}/old?pickle=1"


def _in_sqlite(request: pytest.FixtureRequest, tmp_path: Path, app: Flask) -> str:
    _use_sqlalchemy(app, f"sqlite:///{tmp_path}/old.db")
    return f"sqlite:///{tmp_path}/old.db"


def _in_postgresql(request: pytest.FixtureRequest, tmp_path: Path, app: Flask) -> str:
    url = str(request.getfixturevalue("new_url")("postgresql"))
    _use_sqlalchemy(app, url.replace("postgresql:", "postgresql+psycopg:"))
    return url


def _in_mysql(request: pytest.FixtureRequest, tmp_path: Path, app: Flask) -> str:
    url = str(request.getfixturevalue("new_url")("mysql"))
    _use_sqlalchemy(app, url.replace("mysql:", "mysql+pymysql:").replace("?socket=", "?unix_socket="))
    return url


def _use_sqlalchemy(app: Flask, url: str) -> None:
    from sqlalchemy.pool import NullPool

    app.config.update(SQLALCHEMY_DATABASE_URI=url, SQLALCHEMY_ENGINE_OPTIONS={"poolclass": NullPool})
    app.config.update(SESSION_TYPE="sqlalchemy", SESSION_SQLALCHEMY=SQLAlchemy(app))


def _in_memcached(request: pytest.FixtureRequest, tmp_path: Path, app: Flask) -> str:
    from pymemcache import Client

    server = request.getfixturevalue("memcached_server")
    client = Client(("127.0.0.1", server.port), default_noreply=False)
    request.addfinalizer(client.close)
    app.config.update(SESSION_TYPE="memcached", SESSION_MEMCACHED=client)
    return f"memcached://127.0.0.1:{server.port}"


_SETTERS = {
    "redis": _on_redis,
    "file": _in_files,
    "cachelib": _in_cachelib,
    "sqlite": _in_sqlite,
    "postgresql": _in_postgresql,
    "mysql": _in_mysql,
    "memcached": _in_memcached,
}
