"""Requests of one session that run side by side, in every order that matters; each order is forced, none is hoped for.

A request is a function of the session. Where it is a generator, it stops at each ``yield`` until the test lets it go on.
"""

from __future__ import annotations

import gc
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import pytest
from flask import Flask, request, session
from werkzeug.http import parse_cookie

from flask_persist_session import (
    PersistSession,
    Session,
    SessionDiscarded,
    SessionManager,
    SessionRecord,
    SessionStore,
    open_store,
    session_discarded,
)
from tests.conftest import Clock
from tests.servers import DEADLINE
from tests.web import PROCESSES

Steps: TypeAlias = Callable[[Session], Iterator[None]]
MakeApp: TypeAlias = Callable[..., Flask]

PARALLEL = 16


@dataclass(frozen=True)
class Reply:
    """What a browser gets: the new value of its cookie, "" if it is to be deleted, ``None`` if it stays as it was."""

    cookie: str | None


class Interrupted(SessionStore):
    """Another store, in which the test acts just before one of its operations."""

    def __init__(self, url: str) -> None:
        self._store = open_store(url)
        self._countdown = 0
        self._interrupt: Callable[[], object] | None = None

    def before_operation(self, number: int, interrupt: Callable[[], object]) -> None:
        """Call *interrupt* before the operation of that number from now on, 1 being the next."""
        self._countdown, self._interrupt = number, interrupt

    def done(self) -> bool:
        """Whether there was such an operation; if there was not, there will not be one."""
        done = self._interrupt is None
        self._interrupt = None
        return done

    def _count(self) -> None:
        self._countdown -= 1
        if self._countdown == 0 and self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            interrupt()

    def get(self, session_id: str) -> SessionRecord | None:
        self._count()
        return self._store.get(session_id)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        self._count()
        self._store.save(record, expected=expected)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        self._count()
        return self._store.delete(session_id, expected=expected)

    def scan(self) -> Iterator[SessionRecord]:
        return self._store.scan()

    def close(self) -> None:
        self._store.close()


class Web:
    """An application of which the test says in each request what it does."""

    def __init__(self, app: Flask, store: Interrupted, clock: Clock) -> None:
        self.app, self.store, self.clock = app, store, clock
        self.manager = manager_on(app)
        self.manager.clock = clock
        self.discarded: list[SessionDiscarded] = []
        session_discarded.connect(self._note_discarded, app)
        app.add_url_rule("/", view_func=self._view)

    def _note_discarded(self, sender: object, event: SessionDiscarded) -> None:
        self.discarded.append(event)

    def _view(self) -> str:
        request.environ["tests.act"](session._get_current_object())  # type: ignore[attr-defined]
        return ""

    def visit(self, act: Callable[[Session], object], cookie: str | None = None) -> Reply:
        """A request that does *act*."""
        headers = {} if cookie is None else {"Cookie": f"session={cookie}"}
        client = self.app.test_client(use_cookies=False)
        response = client.get("/", headers=headers, environ_overrides={"tests.act": act})
        assert response.status_code == 200
        sent = response.headers.get("Set-Cookie")
        return Reply(None if sent is None else parse_cookie(sent.partition(";")[0])["session"])

    def sign_in(self) -> str:
        """The cookie of a new session in which somebody is signed in."""
        cookie = self.visit(lambda session: session.update(user="ada", log=["begin"], other=[])).cookie
        assert cookie
        return cookie

    def data(self, cookie: str | None) -> dict[str, Any]:
        """What a request with that cookie finds in its session."""
        found: dict[str, Any] = {}
        self.visit(found.update, cookie)
        return found

    def session_id(self, cookie: str) -> str:
        """The id of the session that a cookie opens."""
        ids: list[str | None] = []
        self.visit(lambda session: ids.append(session.id), cookie)
        assert ids[0]
        return ids[0]

    def live(self) -> int:
        """How many sessions are not closed."""
        return self.manager.stats().active

    def forget_all(self) -> None:
        """Delete every session."""
        for record in list(self.store.scan()):
            self.manager.delete(record.id)

    @contextmanager
    def stopped(self, steps: Steps, cookie: str) -> Iterator[Future[Reply]]:
        """A request that has come to its ``yield`` and goes on only after the block."""
        stopped, released = threading.Event(), threading.Event()

        def pause() -> None:
            stopped.set()
            assert released.wait(DEADLINE)

        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(self.visit, stopping(steps, pause), cookie)
            try:
                assert stopped.wait(DEADLINE)
                yield reply
            finally:
                released.set()

    def side_by_side(self, requests: Sequence[Steps], cookie: str) -> list[Reply]:
        """Requests each of which passes its ``yield`` only when all have come to theirs."""
        barrier = threading.Barrier(len(requests))
        acts = [stopping(steps, lambda: barrier.wait(DEADLINE)) for steps in requests]
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda act: self.visit(act, cookie), acts))


def stopping(steps: Steps, pause: Callable[[], object]) -> Callable[[Session], None]:
    """The request *steps*, calling *pause* at each ``yield``."""

    def act(session: Session) -> None:
        for _ in steps(session):
            pause()

    return act


@pytest.fixture
def web(make_app: MakeApp, store_url: str, clock: Clock) -> Web:
    store = Interrupted(store_url)
    return Web(make_app(store=store), store, clock)


# Requests -------------------------------------------------------------------------------------------------------------


def read(session: Session) -> Iterator[None]:
    assert session["user"]
    yield


def read_nested(session: Session) -> Iterator[None]:
    assert session["log"]
    yield


def write(session: Session) -> Iterator[None]:
    assert session["user"]
    yield
    session["late"] = True


def append(session: Session) -> Iterator[None]:
    log = session["log"]
    yield
    log.append("late")


def write_and_save(session: Session) -> Iterator[None]:
    assert session["user"]
    yield
    session["late"] = True
    session.save()


def regenerate(session: Session) -> Iterator[None]:
    assert session["user"]
    yield
    session.regenerate()


def force(session: Session) -> Iterator[None]:
    """What Flask-Principal does in each request."""
    assert session["user"]
    yield
    session.modified = True


def writer_of(key: str, value: object) -> Steps:
    def write(session: Session) -> Iterator[None]:
        assert session["user"]
        yield
        session[key] = value

    return write


READERS = [read, read_nested]
WRITERS = [write, append, write_and_save, regenerate]


# Ways to end a session ------------------------------------------------------------------------------------------------


def end_by_clear(web: Web, cookie: str) -> None:
    assert web.visit(lambda session: session.clear(), cookie).cookie == ""


def end_by_flush(web: Web, cookie: str) -> None:
    assert web.visit(lambda session: session.flush(), cookie).cookie == ""


def end_by_popping_every_key(web: Web, cookie: str) -> None:
    assert web.visit(lambda session: [session.pop(key) for key in list(session)], cookie).cookie == ""


def end_by_clear_with_a_farewell(web: Web, cookie: str) -> None:
    def log_out(session: Session) -> None:
        session.clear()
        session["farewell"] = "See you."

    assert web.data(web.visit(log_out, cookie).cookie) == {"farewell": "See you."}


def end_from_outside(web: Web, cookie: str) -> None:
    assert web.manager.end(web.session_id(cookie))


def delete_from_outside(web: Web, cookie: str) -> None:
    assert web.manager.delete(web.session_id(cookie))


ENDINGS = [
    end_by_clear,
    end_by_flush,
    end_by_popping_every_key,
    end_by_clear_with_a_farewell,
    end_from_outside,
    delete_from_outside,
]


# No lost update -------------------------------------------------------------------------------------------------------


def test_keys_set_side_by_side_all_survive(web: Web) -> None:
    """Sixteen requests that all loaded the session before any saved it, each setting another key: all keys are there."""
    cookie = web.sign_in()
    web.side_by_side([writer_of(f"key {number}", number) for number in range(PARALLEL)], cookie)
    data = web.data(cookie)
    assert {key: data.get(key) for key in data if key.startswith("key")} == {f"key {n}": n for n in range(PARALLEL)}
    assert data["user"] == "ada"


def test_appends_to_lists_side_by_side_all_survive(web: Web) -> None:
    """Changes inside nested values of different keys, made side by side, all survive without ``modified``."""
    lists = [f"list {number}" for number in range(PARALLEL)]
    cookie = web.visit(lambda session: session.update({key: {"items": [0]} for key in lists})).cookie
    assert cookie

    def appender(key: str) -> Steps:
        def append(session: Session) -> Iterator[None]:
            items = session[key]["items"]
            yield
            items.append(1)

        return append

    web.side_by_side([appender(key) for key in lists], cookie)
    assert web.data(cookie) == {key: {"items": [0, 1]} for key in lists}


def test_of_one_key_some_written_value_stays(web: Web) -> None:
    """Of values written to one key side by side one stays, whole, and the other keys are as they were."""
    cookie = web.sign_in()
    values = [[number] * 100 for number in range(PARALLEL)]
    web.side_by_side([writer_of("contested", value) for value in values], cookie)
    data = web.data(cookie)
    assert data.pop("contested") in values
    assert data == {"user": "ada", "log": ["begin"], "other": []}


def test_of_one_key_the_last_writer_wins(web: Web) -> None:
    """Of two writers of one key the one that saves last wins, though the other loaded the session later."""
    cookie = web.sign_in()
    with web.stopped(writer_of("contested", "saved last"), cookie):
        web.visit(lambda session: session.update(contested="saved first"), cookie)
    assert web.data(cookie)["contested"] == "saved last"


def test_a_removed_key_stays_removed(web: Web) -> None:
    """A key that one request removed is not brought back by slow ones that saw it and changed something else."""
    cookie = web.sign_in()
    for steps in (write, append, write_and_save):
        with web.stopped(steps, cookie):
            web.visit(lambda session: session.pop("user"), cookie)
        assert "user" not in web.data(cookie)
        web.visit(lambda session: session.update(user="ada"), cookie)


def test_a_save_interrupted_at_any_operation_is_merged(web: Web) -> None:
    """Another request may save before whichever store operation of a saving one: both changes survive."""
    for number in range(1, 100):
        cookie = web.sign_in()
        web.store.before_operation(number, lambda: web.visit(lambda session: session.update(theirs=1), cookie))  # noqa: B023
        web.visit(lambda session: session.update(mine=1), cookie)
        if not web.store.done():
            break
        assert {"mine", "theirs", "user"} <= web.data(cookie).keys()
    assert number > 2


@pytest.mark.parametrize("steps", [write, regenerate])
def test_a_request_among_busy_ones_gets_through(web: Web, steps: Steps) -> None:
    """A request that saves or regenerates while others save without a pause is not starved by them."""
    cookie = web.sign_in()
    session_id = web.session_id(cookie)
    stop, saved = threading.Event(), threading.Event()

    def keep_saving() -> None:
        number = 0
        while not stop.is_set() and (stored := web.manager.get(session_id)):
            number += 1
            stored.data["busy"] = number
            web.manager.save(stored)
            saved.set()

    def pause() -> None:
        for _ in range(2):  # the first may have been saved before this request loaded the session
            saved.clear()
            assert saved.wait(DEADLINE)

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(keep_saving)
        try:
            cookie = web.visit(stopping(steps, pause), cookie).cookie or cookie
        finally:
            stop.set()
        busy.result()
    assert web.data(cookie)["busy"] > 1


# What has ended stays ended -------------------------------------------------------------------------------------------


def assert_ended(web: Web, *cookies: str | None) -> None:
    """None of the cookies opens a session in which somebody is signed in, and no such session is left anywhere."""
    for cookie in filter(None, cookies):
        assert not web.data(cookie).keys() & {"user", "log", "late"}
    for record in web.store.scan():
        found = web.manager.get(record.id)
        assert found is None or found.data.keys() <= {"farewell"}


@pytest.mark.parametrize("end", ENDINGS)
def test_a_slow_request_revives_nothing(web: Web, end: Callable[[Web, str], None]) -> None:
    """Whatever a slow request does, a session that ended meanwhile stays ended, and it sets no cookie.

    This holds whether or not a renewal is due. A change that the request made is dropped, and said to be.
    """
    for steps, later in itertools.product(READERS + WRITERS, (0, 3600)):
        cookie = web.sign_in()
        session_id = web.session_id(cookie)
        web.clock.advance(later)
        with web.stopped(steps, cookie) as reply:
            end(web, cookie)
            web.discarded.clear()
        assert reply.result().cookie is None
        assert_ended(web, cookie, reply.result().cookie)
        assert [event.session_id for event in web.discarded] == [session_id] * (steps in WRITERS)


@pytest.mark.parametrize("end", ENDINGS)
def test_an_ending_at_any_operation_stays_one(web: Web, end: Callable[[Web, str], None]) -> None:
    """A session may end before any store operation with which another request goes on after loading it: it stays ended.

    All of those requests have a renewal due, with which the reading ones go on.
    """
    for steps in READERS + WRITERS:
        for number in range(2, 100):
            cookie = web.sign_in()
            web.clock.advance(3600)
            web.store.before_operation(number, lambda: end(web, cookie))  # noqa: B023
            reply = web.visit(stopping(steps, int), cookie)
            if not web.store.done():
                break
            assert reply.cookie is None
            assert_ended(web, cookie)
        assert number > 2
        web.forget_all()


@pytest.mark.parametrize("steps", READERS + WRITERS)
def test_a_slow_request_revives_nothing_regenerated(web: Web, steps: Steps) -> None:
    """A slow request under the old token changes nothing of a regenerated session, and does not touch the new cookie."""
    old = web.sign_in()
    web.clock.advance(3600)
    with web.stopped(steps, old) as reply:
        new = web.visit(lambda session: session.regenerate(), old).cookie
        assert new
    assert reply.result().cookie is None
    assert web.data(old) == {}
    assert web.data(new) == {"user": "ada", "log": ["begin"], "other": []}
    assert web.live() == 1
    assert [event.reason for event in web.discarded] == ["regenerated"] * (steps in WRITERS)


@pytest.mark.parametrize("end", [*ENDINGS, lambda web, cookie: web.visit(Session.regenerate, cookie)])
def test_a_renewal_that_needs_no_write_revives_nothing(web: Web, end: Callable[[Web, str], None]) -> None:
    """A cookie is not sent again for a session that ended meanwhile, though another request had just renewed it."""
    for steps, later in [(force, 0), (force, 3600), (read, 3600)]:
        cookie = web.sign_in()
        web.clock.advance(later)
        web.visit(lambda session: None, cookie)
        with web.stopped(steps, cookie) as reply:
            end(web, cookie)
        assert reply.result().cookie is None


def test_a_renewal_revives_nothing(web: Web) -> None:
    """A renewal that is due meets a logout between loading and saving: the session stays ended, no cookie is set."""
    cookie = web.sign_in()
    web.clock.advance(3600)
    web.store.before_operation(2, lambda: end_by_clear(web, cookie))
    reply = web.visit(lambda session: None, cookie)
    assert web.store.done()
    assert reply.cookie is None
    assert_ended(web, cookie)


# Regenerating ---------------------------------------------------------------------------------------------------------


def test_regenerating_takes_along_what_was_saved(web: Web) -> None:
    """What others save under the old token, before whichever store operation of regenerating, is in the new session."""
    for number in range(1, 100):
        old = web.sign_in()
        acts = [lambda session: session.update(key=1), lambda session: session["log"].append("theirs")]
        web.store.before_operation(number, lambda: [web.visit(act, old) for act in acts])  # noqa: B023
        new = web.visit(lambda session: session.regenerate(), old).cookie
        if not web.store.done():
            break
        assert web.data(new) == {"user": "ada", "log": ["begin", "theirs"], "other": [], "key": 1}
        assert web.data(old) == {}
    assert number > 2


def test_regenerating_and_writing_side_by_side_lose_nothing(web: Web) -> None:
    """A write under the old token is in the new session, or else it is said to have been dropped."""
    old = web.sign_in()
    writers = [writer_of(f"key {number}", number) for number in range(PARALLEL - 1)]
    [new, *_] = web.side_by_side([regenerate, *writers], old)
    kept = {key for key in web.data(new.cookie) if key.startswith("key")}
    assert len(kept) + len(web.discarded) == len(writers)
    assert web.data(old) == {}


def test_regenerating_twice_leaves_one_session(web: Web) -> None:
    """Of two requests that regenerate a session side by side one gets the new token, and one session is left."""
    old = web.sign_in()
    cookies = [reply.cookie for reply in web.side_by_side([regenerate, regenerate], old)]
    [new] = filter(None, cookies)
    assert web.data(new) == {"user": "ada", "log": ["begin"], "other": []}
    assert web.data(old) == {}
    assert web.live() == 1


def test_regenerating_at_any_operation_of_the_other_leaves_one_session(web: Web) -> None:
    """Regenerating may happen before whichever store operation of regenerating: one session is left."""
    for number in range(1, 100):
        web.forget_all()
        old = web.sign_in()
        cookies: list[str | None] = []

        def renew() -> None:
            cookies.append(web.visit(lambda session: session.regenerate(), old).cookie)  # noqa: B023

        web.store.before_operation(number, renew)
        renew()
        if not web.store.done():
            break
        [new] = filter(None, cookies)
        assert web.data(new)["user"] == "ada"
        assert web.live() == 1
    assert number > 2


# Threads --------------------------------------------------------------------------------------------------------------


def test_a_thread_that_ends_closes_its_connection(store: SessionStore) -> None:
    """What a thread opened is closed when it ends, and not left to the garbage collector, of which drivers warn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=store.get, args=("0" * 67,))
        thread.start()
        thread.join()
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# Several processes ----------------------------------------------------------------------------------------------------


def manager_on(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def change_in_a_process(url: str, session_id: str, key: str, test: Connection) -> None:
    """Load a session, set a key when the test says so, and tell what came of it."""
    app = Flask("other process")
    app.config.update(SECRET_KEY="a secret for tests", PERSIST_SESSION_STORE=url)
    PersistSession(app)
    manager = manager_on(app)
    session = manager.get(session_id)
    assert session is not None
    test.send("loaded")
    test.recv()
    session.data[key] = True
    test.send(manager.save(session))


def outcomes_in_processes(url: str, session_id: str, keys: list[str], meanwhile: Callable[[], object]) -> list[str]:
    """What comes of setting each of the keys in a process of its own, with *meanwhile* after all loaded the session."""
    pipes = [PROCESSES.Pipe() for _ in keys]
    processes = [
        PROCESSES.Process(target=change_in_a_process, args=(url, session_id, key, theirs))
        for key, (_, theirs) in zip(keys, pipes, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        assert [receive(ours) for ours, _ in pipes] == ["loaded"] * len(keys)
        meanwhile()
        for ours, _ in pipes:
            ours.send("go on")
        return [receive(ours) for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            for end in pipe:
                end.close()


def receive(pipe: Connection) -> str:
    assert pipe.poll(DEADLINE)
    return str(pipe.recv())


def test_processes_lose_nothing_of_one_session(make_app: MakeApp, shared_url: str) -> None:
    """Eight processes that all loaded a session before any saved it, each setting another key: all keys are there."""
    manager = manager_on(make_app(store=shared_url))
    made = manager.create({"user": "ada"})
    keys = [f"key {number}" for number in range(8)]
    assert outcomes_in_processes(shared_url, made.id, keys, lambda: None) == ["saved"] * 8
    found = manager.get(made.id)
    assert found is not None
    assert found.data == {"user": "ada", **dict.fromkeys(keys, True)}


def test_a_slow_process_revives_nothing(make_app: MakeApp, shared_url: str) -> None:
    """A session that ended while another process was changing it stays ended."""
    manager = manager_on(make_app(store=shared_url))
    for end in (manager.end, manager.delete):
        made = manager.create({"user": "ada"})
        assert outcomes_in_processes(shared_url, made.id, ["late"], lambda: end(made.id)) == ["discarded"]  # noqa: B023
        assert manager.get(made.id) is None
    assert manager.stats().active == 0
