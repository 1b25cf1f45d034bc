"""``flask sessions import``: all sessions of Flask-Session at once, counted, repeatable."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from flask import Flask

from flask_persist_session import ConfigError, PersistSession, UnsupportedByStore, origins, upgrade
from flask_persist_session.upgrade import Import
from tests.servers import RedisServer, free_port
from tests.taken_over import ORIGINS, SECRET, Former, add_views, cookie_of, former_app, with_cookie
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]
LISTED = tuple(kind for kind in ORIGINS if kind != "memcached")


@pytest.fixture
def make_former(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Former]:
    return lambda kind, **settings: former_app(request, tmp_path, kind, **settings)


def sign_in(former: Former, *names: str) -> list[str]:
    """The cookies of users who signed in."""
    cookies = []
    for name in names:
        client = former.app.test_client()
        client.get(f"/login/{name}")
        cookies.append(cookie_of(client))
    return cookies


def run(app: Flask, *arguments: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["sessions", "import", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("kind", LISTED)
def test_imported_users_stay_signed_in(make_former: Callable[..., Former], make_app: MakeApp, kind: str) -> None:
    """Nobody's until their next request, which binds them under a new cookie; the old one opens nothing afterwards."""
    former = make_former(kind)
    cookies = sign_in(former, "Ada", "Bob")
    app = add_views(make_app(PERSIST_SESSION_UPGRADE_FROM=[former.url]))
    manager = app.extensions["persist_session"].manager
    assert run(app) == (0, "imported 2 sessions (0 already there, 0 expired, 0 unreadable)\n")
    assert [record.user_id for record in manager.find(state="active")] == [None, None]
    for cookie, name in zip(cookies, ("Ada", "Bob"), strict=True):
        client = with_cookie(app, cookie)
        assert [client.get("/me").text for _ in range(2)] == [name, name]
        assert with_cookie(app, cookie).get("/me").text == "nobody"
        assert with_cookie(former.app, cookie).get("/me").text == "nobody"
    assert sorted(record.user_id for record in manager.find(state="active")) == ["Ada", "Bob"]


@pytest.mark.parametrize("kind", LISTED)
def test_an_import_can_be_repeated(make_former: Callable[..., Former], make_app: MakeApp, kind: str) -> None:
    """What is there already is counted and left, also what was taken over or signed out meanwhile."""
    former = make_former(kind)
    first, _ = sign_in(former, "Ada", "Bob")
    app = add_views(make_app(PERSIST_SESSION_UPGRADE_FROM=[former.url]))
    run(app)
    sign_in(former, "Eve")
    assert run(app, "--dry-run") == (0, "would import 1 sessions (2 already there, 0 expired, 0 unreadable)\n")
    assert run(app) == (0, "imported 1 sessions (2 already there, 0 expired, 0 unreadable)\n")
    with_cookie(app, first).get("/clear")
    run(app)
    assert with_cookie(app, first).get("/me").text == "nobody"


def test_cookies_beside_a_store_are_passed_over(make_former: Callable[..., Former], make_app: MakeApp) -> None:
    """Who takes over from both imports the store, as there is nothing to be imported of cookies."""
    former = make_former("redis")
    sign_in(former, "Ada")
    app = make_app(PERSIST_SESSION_UPGRADE_FROM=["flask", former.url])
    assert run(app) == (0, "imported 1 sessions (0 already there, 0 expired, 0 unreadable)\n")


def test_an_old_server_that_is_down_is_told(make_app: MakeApp) -> None:
    """In one line, with status 1."""
    status, output = run(make_app(), "--from", f"flask-session+redis://127.0.0.1:{free_port()}/0?timeout=0.2")
    assert (status, output.count("\n"), "cannot be listed" in output) == (1, 1, True)


@pytest.mark.parametrize("kind", LISTED)
def test_delete_removes_what_is_here(make_former: Callable[..., Former], make_app: MakeApp, kind: str) -> None:
    """With ``--delete`` the old store is empty afterwards, and without it nothing is removed there."""
    former = make_former(kind)
    [cookie] = sign_in(former, "Ada")
    app = add_views(make_app(PERSIST_SESSION_UPGRADE_FROM=[former.url]))
    run(app)
    assert with_cookie(former.app, cookie).get("/me").text == "Ada"
    assert run(app, "--delete")[0] == 0
    assert with_cookie(former.app, cookie).get("/me").text == "nobody"
    assert run(app) == (0, "imported 0 sessions (0 already there, 0 expired, 0 unreadable)\n")
    assert with_cookie(app, cookie).get("/me").text == "Ada"


def test_what_cannot_be_read_is_counted_and_stays(make_former: Callable[..., Former], make_app: MakeApp) -> None:
    """Also with ``--delete``."""
    former = make_former("redis")
    client, prefix = former.app.config["SESSION_REDIS"], former.app.config["SESSION_KEY_PREFIX"]
    client.set(f"{prefix}bad", b"\xc1")
    sign_in(former, "Ada")
    app = make_app(PERSIST_SESSION_UPGRADE_FROM=[former.url])
    assert run(app, "--delete") == (0, "imported 1 sessions (0 already there, 0 expired, 1 unreadable)\n")
    assert client.keys(f"{prefix}*") == [f"{prefix}bad".encode()]


@pytest.mark.parametrize("kind", ["redis", "sqlite", "postgresql", "mysql"])
def test_pages_of_many_sessions_are_all_imported(
    make_former: Callable[..., Former], make_app: MakeApp, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are of them, and whether or not the last one is full."""
    monkeypatch.setattr(origins, "_PAGE", 2)
    former = make_former(kind)
    sign_in(former, "Ada", "Bob", "Eve", "Joe")
    for number, name in enumerate(["Kim", "Lea"]):
        report = run(make_app(PERSIST_SESSION_UPGRADE_FROM=[former.url]))[1]
        assert report == f"imported {4 + number} sessions (0 already there, 0 expired, 0 unreadable)\n"
        sign_in(former, name)


@pytest.mark.parametrize("kind", ["redis", "sqlite"])
def test_sessions_of_another_application_are_left_alone(
    make_former: Callable[..., Former], make_app: MakeApp, kind: str
) -> None:
    """They are in the same place under another prefix."""
    former, other = make_former(kind), make_former(kind)
    sign_in(former, "Ada")
    [cookie] = sign_in(other, "Bob")
    assert run(make_app(PERSIST_SESSION_UPGRADE_FROM=[former.url]), "--delete")[1].startswith("imported 1 sessions")
    assert with_cookie(other.app, cookie).get("/me").text == "Bob"


def test_a_prefix_is_no_pattern(make_app: MakeApp, redis_server: RedisServer) -> None:
    """What its characters mean to the server is not meant."""
    client, start = redis_server.client(), f"p{os.getpid()}"
    for prefix in "a*[b]?", "axb?", "a-bc", "a*b?", "a*[b]c":
        client.set(f"{start}{prefix}:x", b'{"_user_id": "Ada"}')
    url = f"flask-session+{redis_server.url}?prefix={quote(start + 'a*[b]?:')}"
    assert run(make_app(PERSIST_SESSION_UPGRADE_FROM=[url]), "--delete")[1].startswith("imported 1 sessions")
    left = {key.decode().removeprefix(start) for key in client.keys(f"{start}*")}
    assert left == {"axb?:x", "a-bc:x", "a*b?:x", "a*[b]c:x"}
    client.delete(*client.keys(f"{start}*"))


def test_other_files_in_the_directory_are_left_alone(
    make_former: Callable[..., Former], make_app: MakeApp, tmp_path: Path
) -> None:
    """Only what is named as a session is one."""
    former = make_former("file")
    sign_in(former, "Ada")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    (tmp_path / "old" / f"{'0' * 64}.tmp").write_text("half")
    report = run(make_app(PERSIST_SESSION_UPGRADE_FROM=[former.url]), "--delete")[1]
    assert report == "imported 1 sessions (0 already there, 0 expired, 0 unreadable)\n"
    assert (tmp_path / "old" / "notes.txt").read_text() == "mine"


def test_a_url_can_be_given_instead_of_the_setting(make_former: Callable[..., Former], make_app: MakeApp) -> None:
    """And repeatedly."""
    former = make_former("sqlite")
    sign_in(former, "Ada")
    assert run(make_app(), "--from", former.url, "--from", former.url)[1].startswith("imported 1 sessions (1 already there")


def test_what_cannot_be_listed_says_so(make_app: MakeApp) -> None:
    """Flask's cookies are in the browsers, and memcached does not list."""
    for url in "flask", "flask-session+memcached://127.0.0.1":
        status, output = run(make_app(), "--from", url)
        assert (status, "cannot be listed" in output) == (1, True)
    assert run(make_app())[0] == 1


def test_an_interrupted_import_says_what_to_do_and_goes_on(
    make_former: Callable[..., Former], make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends with status 130; repeated, it imports the others."""
    former = make_former("redis")
    sign_in(former, "Ada", "Bob", "Eve")
    app = make_app(PERSIST_SESSION_UPGRADE_FROM=[former.url])
    take = Import._prepare

    def interrupt(self: Import, *arguments: Any) -> Any:
        monkeypatch.setattr(Import, "_prepare", take)
        raise KeyboardInterrupt

    monkeypatch.setattr(Import, "_prepare", interrupt)
    status, output = run(app)
    assert (status, "run it again" in output) == (130, True)
    assert run(app)[1].startswith("imported 3 sessions")


def test_an_import_in_code(make_former: Callable[..., Former], make_app: MakeApp) -> None:
    """``sessions.import_sessions`` returns the counts and tells its progress."""
    former = make_former("redis")
    sign_in(former, "Ada", "Bob")
    app, steps = make_app(), list[int]()
    with app.app_context():
        report = PersistSession().import_sessions([former.url], progress=steps.append)
        assert (report.imported, report.already_there, sum(steps)) == (2, 0, 2)
        with pytest.raises(ConfigError, match="UPGRADE_FROM"):
            PersistSession().import_sessions()
        with pytest.raises(UnsupportedByStore, match="as their users come"):
            PersistSession().import_sessions(["flask"])


def import_and_die(store: str, url: str) -> None:
    upgrade._BATCH = 1
    app = Flask("tested")
    app.config.update(SECRET_KEY=SECRET, PERSIST_SESSION_STORE=store, PERSIST_SESSION_CLEANUP_INTERVAL=0)
    sessions = PersistSession(app)
    done: list[int] = []

    def progress(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with app.app_context():
        sessions.import_sessions([url], delete=True, progress=progress)


def test_an_import_that_is_killed_can_be_repeated(
    make_former: Callable[..., Former], make_app: MakeApp, shared_url: str
) -> None:
    """Killed in the middle while it also deletes, it has lost nobody; the next run brings the others."""
    former = make_former("redis")
    names = ["Ada", "Bob", "Eve"]
    cookies = sign_in(former, *names)
    worker = PROCESSES.Process(target=import_and_die, args=(shared_url, former.url))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    app = add_views(make_app(shared_url, PERSIST_SESSION_UPGRADE_FROM=[former.url]))
    assert run(app, "--delete") == (0, "imported 1 sessions (0 already there, 0 expired, 0 unreadable)\n")
    assert [with_cookie(app, cookie).get("/me").text for cookie in cookies] == names
