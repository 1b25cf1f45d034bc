"""Kills processes at random moments of what they do."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from typing import Any

import pytest

from flask_persist_session import SessionStore
from tests.servers import DEADLINE
from tests.web import PROCESSES

#: How often.
MANY = [pytest.param(5, id="a few"), pytest.param(50, id="fifty", marks=pytest.mark.soak)]


def killed_runs(target: Callable[..., object], *given: str, times: int) -> Iterator[bool]:
    """Run *target* in processes that are killed at random moments; tells of each whether it was."""
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    longest = timed(target, *given)
    for _ in range(times):
        process, ready = _started(target, given)
        try:
            assert ready.wait(DEADLINE)
            process.join(chance.uniform(0, longest))
        finally:
            process.kill()
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        yield process.exitcode != 0


def _started(target: Callable[..., object], given: tuple[str, ...]) -> tuple[Any, Event]:
    """A process, and what is set when it begins with *target*."""
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=_after_signal, args=(target, given, ready))
    process.start()
    return process, ready


def _after_signal(target: Callable[..., object], given: tuple[str, ...], ready: Event) -> None:
    ready.set()
    target(*given)


def timed(target: Callable[..., object], *given: str) -> float:
    """How many seconds a whole run takes, without the start of its process."""
    process, ready = _started(target, given)
    assert ready.wait(DEADLINE)
    start = time.perf_counter()
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - start


def assert_whole(store: SessionStore) -> None:
    """A check finds nothing but what it can repair, and then nothing at all."""
    assert [finding for finding in store.check(repair=True) if not finding.repaired] == []
    assert list(store.check(repair=False)) == []
