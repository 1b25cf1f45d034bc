"""Processes of the benchmarks: work in one of its own, and one that makes requests meanwhile."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from flask_persist_session import SessionManager, open_store

#: New interpreters: a forked one would count the memory of its parent.
_processes = get_context("spawn")

Delays: TypeAlias = Sequence[float]


def in_process(work: Callable[..., Any], *given: Any) -> Any:
    """What *work* returns in a process of its own. Raises ``EOFError`` if it fails there."""
    ours, theirs = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_answer, args=(theirs, work, given))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _answer(answers: Connection, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    answers.send(work(*given))


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Requests:
    """Has another process make requests while the context lasts.

    :param url: the store.
    :param ids: of its sessions, which are changed one after the other; they have a ``"counter"``.
    :param between: seconds between two requests, as they come from outside.
    """

    #: The milliseconds that each took, once the context is left.
    delays: Delays = ()

    def __init__(self, url: str, ids: Sequence[str], *, between: float) -> None:
        self._ours, theirs = _processes.Pipe()
        self._process = _processes.Process(target=_make_requests, args=(url, ids, between, theirs))
        self._process.start()
        self._ours.recv()

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.send("stop")
        self.delays = self._ours.recv()
        self._process.join()


def _make_requests(url: str, ids: Sequence[str], between: float, orders: Connection) -> None:
    """Make requests until told to stop; then send the milliseconds of each."""
    manager, turn = SessionManager(open_store(url)), itertools.cycle(ids)
    _request(manager, next(turn))  # the first one connects
    orders.send("ready")
    delays = []
    while not orders.poll():
        start = time.perf_counter()
        _request(manager, next(turn))
        delays.append((time.perf_counter() - start) * 1000)
        time.sleep(between)
    orders.recv()
    orders.send(delays)


def _request(manager: SessionManager, identity: str) -> None:
    """What a request costs that changes its session."""
    session = manager.get(identity)
    if session is None:
        raise RuntimeError(f"the live session {identity} is missing")
    session.data["counter"] += 1
    manager.save(session)
