"""Background threads, one of a kind in each process, of which one at a time does the work: the cleanup of sessions."""

from __future__ import annotations

import atexit
import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack

from .exceptions import UnsupportedByStore
from .lifecycle import WEB
from .manager import SessionManager
from .stores.base import after_fork

log = logging.getLogger("flask_persist_session")

_LEASE = "sweep"
#: A wall clock that moved this much more than the time that has passed was set, and is not trusted for one run.
_LEAP = 300.0


class Recurring(ABC):
    """A background thread that takes its turn every *interval* seconds, give or take a tenth.

    What goes wrong in a turn, receivers of its events included, is logged, and the next turn comes all the same.
    """

    #: What the thread is called, and what a failure of it.
    name: str
    failure: str

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._reset()
        after_fork(self._reset)

    @abstractmethod
    def turn(self) -> object:
        """Do the work once, if this process is the one to do it."""

    def _reset(self) -> None:
        self.running = False
        self._stopping = threading.Event()
        self._starting = threading.Lock()

    def start(self) -> None:
        """Start the thread of this process, unless it runs already. Called by each request, so after a fork too."""
        if self.running:
            return
        with self._starting:
            if self.running or self._stopping.is_set():
                return
            self.running = True
            threading.Thread(target=self._run, name=self.name, daemon=True).start()
            atexit.register(self.stop)

    def stop(self) -> None:
        """Have the thread end after the batch at hand; it is not started again."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval * random.uniform(0.9, 1.1)):
            with _Logged(self.failure):
                self.turn()


class Sweeper(Recurring):
    """Cleans up each of *managers* every *interval* seconds in whichever process holds its lease."""

    name = "session-sweeper"
    failure = "the cleanup of sessions failed; it is tried again"

    def __init__(self, managers: Mapping[str, SessionManager], interval: float) -> None:
        super().__init__(interval)
        self._managers = managers
        self._clocks = self._read_clocks()

    def turn(self) -> bool:
        return self.sweep()

    def sweep(self) -> bool:
        """Clean up once if this process is the one to do it; say whether it was.

        Raises ``StoreError``, ``UnsupportedByStore``.
        """
        # Twice the interval: the holder prolongs it each time, and another process takes over when it has gone.
        mine = [manager for manager in list(self._managers.values()) if manager.store.lease(_LEASE, 2 * self._interval)]
        if not mine or self._clock_was_set():
            return False
        with ExitStack() as all_of_them:  # so that one that fails does not keep the others waiting
            for manager in reversed(mine):
                all_of_them.callback(self._clean_up, manager)
        return True

    def _clean_up(self, manager: SessionManager) -> None:
        started = time.monotonic()
        report = manager.cleanup(deliver=deliver, stop=self._stopping.is_set)
        what = "sessions" if manager.namespace == WEB else f"sessions of {manager.namespace}"
        seconds = time.monotonic() - started
        log.info("cleaned up %s in %.1f s: %d expired, %d ended", what, seconds, report.expired, report.ended)
        if endings := report.endings.processed + report.endings.failed:
            log.info("called on_end for %d %s, %d of which failed", endings, what, report.endings.failed)

    def _clock_was_set(self) -> bool:
        """Whether the wall clock leapt since the last run: by it, every session might seem to have expired."""
        before, self._clocks = self._clocks, self._read_clocks()
        leap = (self._clocks[0] - before[0]) - (self._clocks[1] - before[1])
        if abs(leap) < _LEAP:
            return False
        log.warning("the clock was set by %.0f seconds; sessions are cleaned up at the next run if it stays so", leap)
        return True

    def _read_clocks(self) -> tuple[float, float]:
        return next(iter(self._managers.values())).clock(), time.monotonic()


class _Logged(AbstractContextManager[None]):
    """The boundary of the thread to foreign code, receivers above all: what goes wrong within is logged, and that is it."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, UnsupportedByStore):
            log.info("%s: %s", self._what, error)
        elif error is not None:
            log.error("%s", self._what, exc_info=error)
        return isinstance(error, Exception)


def deliver(send: Callable[[], object]) -> None:
    """Call what sends an event; what its receivers raise is logged."""
    with _Logged("a receiver of a session's event failed"):
        send()
