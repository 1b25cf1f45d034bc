"""Hands what has ended to the application: each session at least once, by one worker at a time, until its handler returns.

The queue is the order of expiry that every store keeps. A session that ends is due at once, an idle one when it expires.
Whoever takes one lets it be due again later in the same step, so that a worker that dies leaves it to the next, and nobody
else takes it meanwhile. What the handler returned makes it due once more: to be removed.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import TypeAlias

from .cleanup import EndingReport
from .exceptions import SessionConflict, StoreError
from .lifecycle import Lifecycle, Retry
from .lifetime import ATTEMPTS, SUMMARY
from .records import JSON, SessionQuery, SessionRecord
from .serializers import dump_metadata
from .stored import StoredSession

log = logging.getLogger("flask_persist_session")

#: Is given a session that has ended; what it returns becomes the summary.
Handler: TypeAlias = Callable[[StoredSession], JSON]
Deliver: TypeAlias = Callable[[Callable[[], object]], object]

#: Seconds until a session is due again whose handler has failed once; each further failure doubles them, up to this.
_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 6 * 3600.0
#: Of each pause so much at least and at most: sessions that failed together must not come back together.
_JITTER = (0.75, 1.25)
#: Every so many seconds a worker whose handler is still running puts the pause off; three may be missed.
_BEAT = 15.0


def pause_after(attempt: int) -> float:
    """Seconds until a session is due again that was taken for the attempt of that number, 1 for the first."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt - 1, 30)) * random.uniform(*_JITTER)


class Ending(Lifecycle):
    """Hands over what has ended; see ``SessionManager``."""

    def process_ended(
        self,
        *,
        older_than: float | None = None,
        deliver: Deliver = lambda send: send(),
        stop: Callable[[], bool] = lambda: False,
    ) -> EndingReport:
        """Give each session that has ended, or expired, to the handler ``on_end`` of the namespace, one after the other.

        A cleanup does so too; this is for those who want it sooner, or in workers of their own, of which any number may
        share the work. *older_than* (seconds): active sessions as well whose last request is longer ago, as in ``cleanup``.
        *deliver* calls what sends an event. *stop* is asked between sessions. An exception of the handler is logged, and
        the session is due again after a pause that grows.

        Raises ``StoreError``, ``UnsupportedByStore``, and what a receiver raises.
        """
        outcomes = Counter[str]()
        if self._on_end is not None:
            for record in self._due(older_than):
                if stop():
                    break
                outcomes[self._process(record, self._on_end, deliver)] += 1
        return EndingReport(processed=outcomes["processed"], short=outcomes["short"], failed=outcomes["failed"])

    def _due(self, older_than: float | None) -> Iterator[SessionRecord]:
        now = self.clock()
        for query in self._cleanup_queries(now, older_than):
            yield from filter(self._lifetime.awaits, self.store.find(query))

    def _cleanup_queries(self, now: float, older_than: float | None) -> Iterator[SessionQuery]:
        """What finds all that a cleanup at *now* is about."""
        if older_than is not None and not (isinstance(older_than, int | float) and older_than >= 0):
            raise ValueError(f"older_than is {older_than!r}; allowed is a number of seconds from 0")
        # A session expires at expires_at, and the query excludes its bound.
        yield SessionQuery(expires_before=math.nextafter(now, math.inf))
        if older_than is not None:
            yield SessionQuery(state="active", now=now, accessed_before=now - older_than - self.renew_interval)

    def _process(self, record: SessionRecord, handler: Handler, deliver: Deliver) -> str:
        """Have one session handled; says what came of it: ``"processed"``, ``"short"``, ``"failed"``, or ``"missed"`` if
        somebody else has taken or renewed it."""
        taken = self._take(record, deliver)
        if taken is None:
            return "missed"
        # Nothing can be appended any more, so this is how many there will ever be.
        if self._min_entries and self.store.history.count(taken.id) < self._min_entries:
            return "short" if self._mark(taken, {}) else "missed"
        attempt = _Attempt(taken)
        summary: dict[str, JSON] = {}
        with _Beating(lambda: self._put_off(taken)), attempt:
            summary = self._handled(taken, handler)
        if attempt.failed:
            return "failed"
        return "processed" if self._mark(taken, summary) else "missed"

    def _take(self, record: SessionRecord, deliver: Deliver) -> SessionRecord | None:
        """Let it be due again later, and end it if it has not ended; ``None`` if it was changed since it was listed."""
        idle = record.ended_at is None
        reason = "idle" if self._lifetime.state(record) == "active" else "expired"
        ended = self._lifetime.ended(record, reason) if idle else replace(record, version=record.version + 1)
        before = ended.metadata.get(ATTEMPTS)
        attempt = before + 1 if isinstance(before, int) else 1
        taken = self._later(replace(ended, metadata={**ended.metadata, ATTEMPTS: attempt}))
        try:
            self.store.save(taken, expected=record.version)
        except SessionConflict:
            return None
        if idle:
            tell = self._announcer.expired if reason == "expired" else lambda it: self._announcer.ended(it, reason)
            deliver(lambda: tell(record))
        return taken

    def _later(self, record: SessionRecord) -> SessionRecord:
        attempt = record.metadata[ATTEMPTS]
        assert isinstance(attempt, int)
        return replace(record, expires_at=self.clock() + pause_after(attempt))

    def _handled(self, record: SessionRecord, handler: Handler) -> dict[str, JSON]:
        """What is kept of the session's handler: nothing if it returned ``None``."""
        result = handler(StoredSession(record, self._codec.decode(record.data), "ended"))
        summary: dict[str, JSON] = {} if result is None else {SUMMARY: result}
        dump_metadata(summary)  # raises for what is no JSON
        return summary

    def _put_off(self, taken: SessionRecord) -> None:
        """Let *taken* be due later, unless somebody else has it by now."""
        with suppress(SessionConflict):
            current = self._still(taken)
            if current is not None and current.metadata.get(ATTEMPTS) == taken.metadata[ATTEMPTS]:
                self.store.save(self._later(replace(current, version=current.version + 1)), expected=current.version)

    def _mark(self, taken: SessionRecord, summary: Mapping[str, JSON]) -> bool:
        """Note that it was processed, and remember it from now on; ``False`` if somebody else has, or it is gone."""
        record: SessionRecord | None = taken
        retry = Retry(taken.id, "processed")
        while record is not None:
            with suppress(SessionConflict):
                self.store.save(self._lifetime.processed(record, summary), expected=record.version)
                return True
            retry.pause()
            record = self._still(taken)
        return False

    def _still(self, taken: SessionRecord) -> SessionRecord | None:
        """What has become of *taken*, if that is still to be processed.

        Where its key was used anew, what is there now is another session, which began later; the one that ended is due
        under another id.
        """
        current = self._stored(taken)
        return current if current is not None and self._lifetime.awaits(current) else None


class _Attempt(AbstractContextManager[None]):
    """The boundary to a handler of the application: what goes wrong in it is logged, with no word of what was said."""

    def __init__(self, record: SessionRecord) -> None:
        self.failed = False
        self._record = record

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failed = True
        # The message of an exception may repeat what it stumbled over.
        lines = "".join(traceback.format_tb(error.__traceback__))
        log.error(
            "the on_end handler failed for session %s in attempt %s and is called again later: %s\n%s",
            self._record.id,
            self._record.metadata[ATTEMPTS],
            type(error).__name__,
            lines,
        )
        return True


class _Beating(AbstractContextManager[None]):
    """Calls *beat* every now and then, in a thread of its own, for as long as the block runs."""

    def __init__(self, beat: Callable[[], object]) -> None:
        self._beat = beat
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="session-ending", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_BEAT):
            try:
                self._beat()
            except StoreError as error:
                log.warning("a session whose on_end handler is running may be handled twice: %s", error)
