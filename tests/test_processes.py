"""Stores under several processes: gunicorn's workers, processes that start at once, processes killed while they save."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from flask_persist_session import Change, Deletion, SessionConflict, SessionRecord, open_store
from flask_persist_session.testing import following, make_record
from tests.conftest import SHARED_STORES
from tests.servers import DEADLINE, wait_until
from tests.web import PROCESSES, Browser, Gunicorn

KINDS = ("sqlite", "file", "redis")
ROOT = Path(__file__).parent.parent
RECORD = SessionRecord(
    id="3fa" + "0" * 64,
    user_id=None,
    tenant_id=None,
    tags=frozenset(),
    metadata={},
    data=b"",
    created_at=1.7e9,
    accessed_at=1.7e9,
    expires_at=1.8e9,
    ended_at=None,
    end_reason=None,
    version=1,
)


def payload(version: int) -> bytes:
    """What the record holds in a version: long enough to be written in pieces, and all of one kind."""
    return version.to_bytes(4, "big") * 800


# Workers of gunicorn --------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def serve(
    request: pytest.FixtureRequest, tmp_path: Path, new_url: Callable[[str], str]
) -> Iterator[Callable[..., Gunicorn]]:
    """Starts gunicorn with options on a new store, of each kind in turn."""
    servers = []

    def start(*options: str) -> Gunicorn:
        environment = {"FLASK_SECRET_KEY": "for tests only", "FLASK_PERSIST_SESSION_STORE": new_url(request.param)}
        options = (*options, "--pythonpath", str(ROOT))
        servers.append(Gunicorn(tmp_path, "tests.race_app:create_app()", *options, **environment))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def append(browser: Browser, key: str, number: int) -> int:
    """Append to the list of a key of the session, and tell the pid of the worker that did."""
    answer = browser.post("/append", key=key, number=str(number))
    assert answer.status == 200, answer.text
    return int(answer.json()["pid"])


def appended(browser: Browser) -> dict[str, list[int]]:
    """The lists in the session."""
    return dict(browser.get("/").json()["session"])


def append_in_parallel(browsers: list[Browser], workers: int) -> None:
    """Have the browsers of one session append, each to a list of its own, and check that nothing was lost.

    They go on until each of so many workers has answered.
    """
    begin = threading.Barrier(len(browsers))
    pids: set[int] = set()

    def work(key: str, browser: Browser) -> int:
        begin.wait(DEADLINE)
        for number in range(1000):
            if number >= 6 and len(pids) >= workers:
                return number
            pids.add(append(browser, key, number))
        raise AssertionError(f"all requests went to {pids}")

    names = [str(number) for number in range(len(browsers))]
    with ThreadPoolExecutor(len(browsers)) as pool:
        counts = pool.map(work, names, browsers)
        expected = {name: list(range(count)) for name, count in zip(names, counts, strict=True)}
    assert appended(browsers[0]) == {"start": [0], **expected}
    assert len(pids) == workers


def assert_quiet(server: Gunicorn) -> None:
    """Nothing went wrong in any of its processes."""
    assert not re.search("error|traceback|warning", server.log(), re.IGNORECASE), server.log()


@pytest.mark.parametrize("trouble", ["warn", "print"])
def test_trouble_of_a_worker_is_seen(serve: Callable[..., Gunicorn], trouble: str) -> None:
    """What a worker warns of or prints is in the log at once, for the tests that want none there."""
    server = serve("--workers", "1")
    server.browser().get(f"/trouble/{trouble}")
    with pytest.raises(AssertionError):
        assert_quiet(server)


def test_workers_share_a_session(serve: Callable[..., Gunicorn]) -> None:
    """What one worker stores the others read in the next request, and change in their turn."""
    server = serve("--workers", "3", "--threads", "2")
    first = server.browser()
    # A connection stays with the worker that took it.
    workers = {append(first, "start", 0): first}

    def complete() -> bool:
        browser = server.browser(first.cookies)
        workers.setdefault(browser.get("/").json()["pid"], browser)
        return len(workers) == 3

    wait_until(complete, "an answer of each worker")
    for number, (pid, browser) in enumerate(workers.items(), start=1):
        assert append(browser, "start", number) == pid
        for other in workers.values():
            assert appended(other) == {"start": list(range(number + 1))}


@pytest.mark.parametrize("serve", SHARED_STORES, indirect=True)
def test_preloaded_workers_use_connections_of_their_own(serve: Callable[..., Gunicorn]) -> None:
    """A store that was used before the fork works in every worker under parallel load, and nothing is in the log."""
    # Workers without threads: they serve in the thread that had the connection before the fork.
    server = serve("--workers", "4", "--preload")
    first = server.browser()
    append(first, "start", 0)
    append_in_parallel([server.browser(first.cookies) for _ in range(8)], workers=4)
    assert_quiet(server)


def test_threads_of_a_worker_share_a_session(serve: Callable[..., Gunicorn]) -> None:
    """Eight threads of one process lose nothing of one session."""
    server = serve("--workers", "1", "--threads", "8")
    first = server.browser()
    append(first, "start", 0)
    append_in_parallel([server.browser(first.cookies) for _ in range(8)], workers=1)
    assert_quiet(server)


def test_a_killed_worker_loses_nothing_acknowledged(serve: Callable[..., Gunicorn]) -> None:
    """Whatever a worker has answered is there after it was killed in the middle of parallel requests."""
    server = serve("--workers", "2", "--threads", "4")
    first = server.browser()
    append(first, "start", 0)
    acknowledged: dict[str, list[int]] = {str(key): [] for key in range(6)}
    pids: list[int] = []
    stop = threading.Event()

    def work(key: str) -> None:
        browser, number = server.browser(first.cookies), 0
        while not stop.is_set():
            number += 1
            try:
                pids.append(append(browser, key, number))
            except (OSError, HTTPException):
                continue  # its worker was killed: nobody knows whether this one was stored
            acknowledged[key].append(number)

    with ThreadPoolExecutor(6) as pool:
        work_done = pool.map(work, acknowledged)
        try:
            for _ in range(3):
                enough = len(pids) + 30
                wait_until(lambda enough=enough: len(pids) >= enough, "requests")  # type: ignore[misc]
                server.kill_worker(pids[-1])
        finally:
            stop.set()
        list(work_done)

    stored = appended(server.browser(first.cookies))
    assert len(set(pids)) > 1
    for key, numbers in acknowledged.items():
        assert set(numbers) <= set(stored[key])
        assert stored[key] == sorted(set(stored[key]))


# Processes that start at once -----------------------------------------------------------------------------------------


def create_a_record(urls: list[str], number: int, start: Barrier) -> None:
    """Be one of several processes that are the first to use each of several stores."""
    for url in urls:
        start.wait(DEADLINE)
        store = open_store(url)
        store.save(replace(RECORD, id=f"{number:067x}"), expected=0)
        store.close()


def run_at_once(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """Run *target* with each of the arguments, and a barrier for all, in a process of its own; none may fail."""
    start = PROCESSES.Barrier(len(arguments))
    processes = [PROCESSES.Process(target=target, args=(*these, start)) for these in arguments]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(DEADLINE)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_processes_make_a_database_at_once(new_url: Callable[[str], str]) -> None:
    """Eight processes that come at once to a SQLite file that is not there yet all store their session in it."""
    urls = [new_url("sqlite") for _ in range(10)]
    run_at_once(create_a_record, [(urls, number) for number in range(8)])
    for url in urls:
        store = open_store(url)
        assert sorted(int(record.id, 16) for record in store.scan()) == list(range(8))
        store.close()


def save_in_turn(url: str, times: int, start: Barrier) -> None:
    """Save so many versions, in competition with other processes."""
    store = open_store(url)
    start.wait(DEADLINE)
    while times:
        record = store.get(RECORD.id)
        assert record is not None
        version = record.version + 1
        with suppress(SessionConflict):
            store.save(replace(record, data=payload(version), version=version), expected=record.version)
            times -= 1
    store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_processes_never_save_over_one_version_twice(kind: str, new_url: Callable[[str], str]) -> None:
    """Of several processes that save over the same version one succeeds, so there are as many versions as saves."""
    url = new_url(kind)
    store = open_store(url)
    store.save(RECORD, expected=0)
    run_at_once(save_in_turn, [(url, 400)] * 4)
    found = store.get(RECORD.id)
    assert found is not None
    assert found.version == 1 + 4 * 400
    assert found.data == payload(found.version)
    store.close()


def change_many(url: str, forwards: bool, start: Barrier) -> None:
    """Save and then delete the same sessions again and again, in an order of its own."""
    store = open_store(url)
    records = [make_record(number, user_id=None) for number in range(200)][:: 1 if forwards else -1]
    start.wait(DEADLINE)
    for _ in range(10):
        store.save_many([Change(record=record, expected=0) for record in records])
        store.save_many([Change(record=following(record), expected=1) for record in records])
        store.delete_many([Deletion(id=record.id) for record in records])
    store.close()


def test_processes_that_change_many_do_not_wait_for_each_other(shared_url: str) -> None:
    """Two processes that change the same sessions, one from the first and one from the last, both come to an end."""
    run_at_once(change_many, [(shared_url, True), (shared_url, False)])


def create_many(url: str, first: int, told: str, start: Barrier) -> None:
    """Create sessions at once, and write down how many were created."""
    store = open_store(url)
    records = [make_record(number, user_id=None, data=told.encode()) for number in range(first, first + 400)]
    start.wait(DEADLINE)
    outcomes = store.save_many([Change(record=record, expected=0) for record in records])
    Path(told).write_text(" ".join(record.id for record, done in zip(records, outcomes, strict=True) if done))
    store.close()


def test_processes_create_many_at_once(shared_url: str, tmp_path: Path) -> None:
    """Of several processes that create the same sessions each session is created by one, whose data it has."""
    told = [str(tmp_path / name) for name in ("a", "b", "c")]
    run_at_once(create_many, [(shared_url, 200 * number, path) for number, path in enumerate(told)])
    created = {session_id: path for path in told for session_id in Path(path).read_text().split()}
    assert sum(len(Path(path).read_text().split()) for path in told) == len(created) == 800
    store = open_store(shared_url)
    assert {record.id: record.data.decode() for record in store.scan()} == created
    store.close()


# Processes killed while they save -------------------------------------------------------------------------------------


def save_until_killed(url: str, acknowledge: Connection) -> None:
    """Save one version after the other, and tell of each that it was saved."""
    store = open_store(url)
    while True:
        record = store.get(RECORD.id)
        assert record is not None
        version = record.version + 1
        store.save(replace(record, data=payload(version), version=version), expected=record.version)
        acknowledge.send(version)


@pytest.mark.parametrize("saves", [300, pytest.param(20_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_writer_loses_nothing_acknowledged(kind: str, saves: int, new_url: Callable[[str], str]) -> None:
    """A process killed at any moment of a save leaves the last version that was acknowledged, or the one under way."""
    seed = random.randrange(2**32)
    print("seed", seed)
    kills = random.Random(seed)
    url = new_url(kind)
    store = open_store(url)
    store.save(replace(RECORD, data=payload(1)), expected=0)
    version = 1
    while version < saves:
        ours, theirs = PROCESSES.Pipe(duplex=False)
        writer = PROCESSES.Process(target=save_until_killed, args=(url, theirs))
        try:
            writer.start()
            theirs.close()
            for _ in range(kills.randint(1, 90)):
                assert ours.poll(DEADLINE)
                version = ours.recv()
        finally:
            writer.kill()
            writer.join()
        version = last_of(ours, version)
        found = store.get(RECORD.id)
        assert found is not None
        assert found.version in (version, version + 1)
        assert found.data == payload(found.version)
        version = found.version
    with pytest.raises(SessionConflict):
        store.save(replace(RECORD, version=version), expected=version - 1)
    store.save(replace(RECORD, version=version + 1), expected=version)
    assert [record.version for record in store.scan()] == [version + 1]
    store.close()


def last_of(pipe: Connection, last: int) -> int:
    """The last number in a pipe whose writer has gone, or *last* if there is none."""
    with pipe:
        while True:
            try:
                last = pipe.recv()
            except EOFError:
                return last
