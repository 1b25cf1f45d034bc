"""Many first requests at once, and processes that die in the middle: one takes over, nobody is signed out."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from threading import Barrier as ThreadBarrier
from typing import Any

import pytest
from flask import Flask

from flask_persist_session import PersistSession, StoreUnavailable, open_store
from flask_persist_session.records import SessionRecord
from flask_persist_session.stores.base import SessionStore
from tests.servers import RedisServer
from tests.taken_over import SECRET, add_views, cookie_of, with_cookie
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]
COUNT = 4


def old_session(server: RedisServer, name: str) -> str:
    """A session of Flask-Session in *server*; returns the URL under which it is found."""
    prefix = f"race{os.getpid()}{name}:"
    server.client().set(f"{prefix}zzz", json.dumps({"_user_id": "Ada", "_fresh": True}), ex=3600)
    return f"flask-session+{server.url}?prefix={prefix}"


def take_over(store: str, origin: str, start: Barrier, answers: Any) -> None:
    app = Flask("tested")
    app.config.update(SECRET_KEY=SECRET, PERSIST_SESSION_STORE=store, PERSIST_SESSION_UPGRADE_FROM=[origin])
    app.config["PERSIST_SESSION_CLEANUP_INTERVAL"] = 0
    PersistSession(add_views(app))

    @app.before_request
    def wait() -> None:
        start.wait(30)

    client = with_cookie(app, "zzz")
    answers.put((client.get("/me").text, cookie_of(client)))


def test_of_many_processes_one_takes_over(shared_url: str, redis_server: RedisServer) -> None:
    """Exactly one new cookie; the others leave the browser's cookie alone, and one session is left in the store."""
    origin, start, answers = old_session(redis_server, "many"), PROCESSES.Barrier(COUNT), PROCESSES.Queue()
    arguments = (shared_url, origin, start, answers)
    workers = [PROCESSES.Process(target=take_over, args=arguments) for _ in range(COUNT)]
    for worker in workers:
        worker.start()
    got = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert {text for text, _ in got} <= {"Ada", "nobody"}
    assert len([cookie for _, cookie in got if cookie not in ("", "zzz")]) == 1
    store = open_store(shared_url)
    assert sorted(record.end_reason or "" for record in store.scan()) == ["", "regenerated"]
    store.close()


def test_of_many_threads_that_have_all_read_it_one_takes_over(
    make_app: MakeApp, store_url: str, redis_server: RedisServer
) -> None:
    """All views run with the user's data; one wins when they end, and the others' new sessions are taken back."""
    app = add_views(make_app(store_url, PERSIST_SESSION_UPGRADE_FROM=[old_session(redis_server, "read")]))
    everybody_has_read = ThreadBarrier(COUNT)

    @app.after_request
    def meet(response: Any) -> Any:
        everybody_has_read.wait(30)
        return response

    def request(_: int) -> tuple[str, str]:
        client = with_cookie(app, "zzz")
        return client.get("/me").text, cookie_of(client)

    with ThreadPoolExecutor(COUNT) as pool:
        got = list(pool.map(request, range(COUNT)))
    assert [text for text, _ in got] == ["Ada"] * COUNT
    new = [cookie for _, cookie in got if cookie != "zzz"]
    assert len(new) == 1
    assert app.extensions["persist_session"].manager.stats().active == 1
    app.after_request_funcs.clear()
    assert with_cookie(app, new[0]).get("/me").text == "Ada"


def die_at_the_second_save(store: str, origin: str) -> None:
    class Dying(type(open_store(store))):  # type: ignore[misc]
        def save(self, record: SessionRecord, *, expected: int) -> None:
            if record.end_reason is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            super().save(record, expected=expected)

    app = Flask("tested")
    app.config.update(SECRET_KEY=SECRET, PERSIST_SESSION_STORE=store, PERSIST_SESSION_UPGRADE_FROM=[origin])
    app.config["PERSIST_SESSION_CLEANUP_INTERVAL"] = 0
    PersistSession(add_views(app))
    app.extensions["persist_session"].store.__class__ = Dying
    with_cookie(app, "zzz").get("/me")


def test_a_process_that_dies_in_the_middle_loses_nothing(
    shared_url: str, make_app: MakeApp, redis_server: RedisServer
) -> None:
    """Killed after the new session was stored, before the old one was ended: the next request takes over."""
    origin = old_session(redis_server, "dies")
    worker = PROCESSES.Process(target=die_at_the_second_save, args=(shared_url, origin))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    app = add_views(make_app(shared_url, PERSIST_SESSION_UPGRADE_FROM=[origin]))
    client = with_cookie(app, "zzz")
    assert [client.get("/me").text for _ in range(2)] == ["Ada", "Ada"]


def test_a_store_of_ours_that_fails_in_the_middle_loses_nothing(
    make_app: MakeApp, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 503 leaves the old session and its cookie as they were."""
    app = add_views(make_app(PERSIST_SESSION_UPGRADE_FROM=[old_session(redis_server, "fails")]))
    store: SessionStore = app.extensions["persist_session"].store
    client = with_cookie(app, "zzz")

    def fail(record: SessionRecord, *, expected: int) -> None:
        raise StoreUnavailable("down")

    with monkeypatch.context() as patched:
        patched.setattr(store, "save", fail)
        response = client.get("/me")
        assert (response.status_code, cookie_of(client)) == (503, "zzz")
    assert client.get("/me").text == "Ada"
