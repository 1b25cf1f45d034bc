"""Coming from older versions of Flask-Session: each is run as it is, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from tests.servers import RedisServer
from tests.taken_over import add_views, with_cookie

MakeApp = Callable[..., Flask]
#: Versions, and whether they sign. With its signer 0.5 gives Werkzeug 3 the cookie as bytes, which fails: there is no
#: such session to come from.
RUNS = [
    ("0.5.0", False),
    *((version, signed) for version in ("0.6.0", "0.7.0", "0.8.0") for signed in (False, True)),
]
SCRIPT = Path(__file__).with_name("old_flask_session.py")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Installs a version of Flask-Session into a directory of its own, once."""
    root = tmp_path_factory.mktemp("flask-session")

    def install(version: str) -> Path:
        target = root / version
        if not target.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
            done = subprocess.run([*command, f"flask-session=={version}"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return target

    return install


def sign_in(folder: Path, settings: dict[str, Any]) -> str:
    """The cookie of Ada, who signed in with the version in *folder*."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    version, cookie = json.loads(done.stdout)
    assert version == folder.name
    return str(cookie)


def settings_and_url(kind: str, tmp_path: Path, server: RedisServer, name: str) -> tuple[dict[str, Any], str]:
    prefix = f"old{os.getpid()}{name}:"
    settings, url = {
        "redis": ({"SESSION_TYPE": "redis", "REDIS": server.url}, server.url),
        "file": ({"SESSION_TYPE": "filesystem", "SESSION_FILE_DIR": f"{tmp_path}/old"}, f"file://{tmp_path}/old"),
        "sqlite": (
            {"SESSION_TYPE": "sqlalchemy", "SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path}/old.db"},
            f"sqlite:///{tmp_path}/old.db",
        ),
    }[kind]
    return {**settings, "SESSION_KEY_PREFIX": prefix}, f"flask-session+{url}?prefix={prefix}"


@pytest.mark.parametrize("kind", ["redis", "file", "sqlite"])
@pytest.mark.parametrize(("version", "signed"), RUNS)
def test_a_user_of_an_older_version_stays_signed_in(
    installed: Callable[[str], Path],
    make_app: MakeApp,
    tmp_path: Path,
    redis_server: RedisServer,
    version: str,
    kind: str,
    signed: bool,
) -> None:
    """Pickle until 0.6, MessagePack since 0.7, files always as pickle; with and without a signer."""
    settings, url = settings_and_url(kind, tmp_path, redis_server, f"{version}{kind}{signed}")
    cookie = sign_in(installed(version), {**settings, "SESSION_USE_SIGNER": signed})
    pickled = kind == "file" or version in ("0.5.0", "0.6.0")
    if pickled and kind != "file":
        without = add_views(make_app(PERSIST_SESSION_UPGRADE_FROM=[url]))
        assert with_cookie(without, cookie).get("/me").text == "nobody"
    app = add_views(make_app(PERSIST_SESSION_UPGRADE_FROM=[url + "&pickle=1" * pickled + "&signed=1" * signed]))
    client = with_cookie(app, cookie)
    assert [client.get("/me").text for _ in range(2)] == ["Ada", "Ada"]
    assert client.get("/data").json == {"data": {"color": "blue"}, "permanent": True}
    assert with_cookie(app, cookie).get("/me").text == "nobody"
