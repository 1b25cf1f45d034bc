"""When a session expires, is renewed and has ended: the rules of time, as functions from record to record."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .config import LONGEST
from .records import JSON, SessionRecord, State

#: Seconds for which requests that were under way when their session was regenerated or signed out store nothing.
GRACE = 30.0
#: Why a session ended whose user went on, or away, without it.
_LEFT = ("regenerated", "logout")
#: A record whose last request lies so many seconds in the future was written by a clock that was wrong.
_CLOCK_SLACK = 3600.0
#: Where the metadata keeps a session's own idle timeout, in seconds.
LIFETIME = "lifetime"
#: Where it keeps what the handler of ended sessions returned, when that was (seconds since the epoch), and until then how
#: often it was called.
SUMMARY, PROCESSED, ATTEMPTS = "summary", "processed_at", "end_attempts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """How long the sessions of one namespace live. All durations are seconds; see ``SessionManager``."""

    clock: Callable[[], float]
    idle_timeout: Callable[[], float]
    absolute_timeout: float | None
    renew_interval: float
    keep_ended: float
    keep_data: bool = False
    """Whether ended sessions keep their data for as long as their reason: nobody gets in by it."""
    hands_over: bool = False
    """Whether a handler is to have what has ended before it may go."""

    def state(self, record: SessionRecord) -> State:
        """The state of *record* now. A timeout that was shortened counts at once, not only from the next renewal."""
        now = self.clock()
        state = record.state(now)
        return "expired" if state == "active" and now >= self._deadline(record.created_at) else state

    def judged(self, record: SessionRecord) -> SessionRecord:
        """*record* with the expiry that counts now: a timeout that was shortened may come before the one stored."""
        deadline = self._deadline(record.created_at)
        sooner = record.ended_at is None and deadline < record.expires_at
        return replace(record, expires_at=deadline) if sooner else record

    def expiry(self, created_at: float, metadata: Mapping[str, JSON]) -> float:
        """When a session expires that has a request now.

        Requests within an interval do not renew, so one interval is added: the last of them still gets a whole
        lifetime.
        """
        own = metadata.get(LIFETIME)
        lifetime = float(own) if isinstance(own, (int, float)) else self.idle_timeout()
        return min(self.clock() + lifetime + self.renew_interval, self._deadline(created_at))

    def is_due(self, renewed_at: float) -> bool:
        """Whether a session that was renewed then is to be renewed by a request now.

        Also if that lies in the future: the clock was wrong then, and what it wrote must not last for ever.
        """
        now = self.clock()
        # Compared only: a cookie may claim a number that is no time.
        return renewed_at <= now - self.renew_interval or renewed_at > now + _CLOCK_SLACK

    def is_fresh(self, record: SessionRecord) -> bool:
        """Whether *record* was renewed less than an interval ago."""
        return not self._is_ahead(record) and (
            self.expiry(record.created_at, record.metadata) - record.expires_at < self.renew_interval
        )

    def saved(
        self, record: SessionRecord, payload: bytes, *, renew: bool = False, metadata: Mapping[str, JSON] | None = None
    ) -> SessionRecord:
        """The next version of *record*, with *payload*; *metadata* is added to its own when it is renewed.

        Times move forward only, but for a record from a clock that was far ahead and has been set back since: left as
        it is, it would never expire. The expiry moves if the last move is an interval ago, or with *renew*: until then
        it is late enough, and a store that need not touch its index of expiry saves in two thirds of the time.
        """
        now, ahead = self.clock(), self._is_ahead(record)
        expires_at = self.expiry(record.created_at, record.metadata)
        if not ahead:
            expires_at = max(record.expires_at, expires_at)
        due = renew or ahead or expires_at - record.expires_at >= self.renew_interval
        return replace(
            record,
            data=payload,
            metadata={**record.metadata, **metadata} if due and metadata else record.metadata,
            accessed_at=now if ahead else max(record.accessed_at, now),
            expires_at=expires_at if due else record.expires_at,
            version=record.version + 1,
        )

    def extended(self, record: SessionRecord, seconds: float) -> SessionRecord:
        """The next version of *record*, which expires so many seconds later, but not beyond the absolute timeout."""
        expires_at = min(max(record.expires_at, self.clock()) + seconds, self._deadline(record.created_at))
        return replace(record, expires_at=max(record.expires_at, expires_at), version=record.version + 1)

    def ended(self, record: SessionRecord, reason: str, *, forget: bool = False) -> SessionRecord:
        """The last version of *record*: without data, and with *forget* without tags and metadata, kept for a while.

        So whoever comes with it can be told why, and neither a request under way nor an older backup brings it back. Its
        last access is told up to a second too early.
        """
        now = self.clock()
        keep = max(self.keep_ended, GRACE) if reason in _LEFT else self.keep_ended
        closed = replace(
            record,
            data=record.data if self.keep_data and not forget else b"",
            # Those that the application has under these names say nothing of its handler.
            metadata={key: value for key, value in record.metadata.items() if key not in (PROCESSED, ATTEMPTS)},
            # Tells this ending from any other at the same moment: whoever had to send it twice knows it again.
            accessed_at=record.accessed_at - random.random(),
            ended_at=now,
            end_reason=reason,
            expires_at=now + keep,
            version=record.version + 1,
        )
        if self.awaits(closed):
            return replace(closed, expires_at=now)
        return replace(closed, tags=frozenset(), metadata={}) if forget else closed

    def awaits(self, record: SessionRecord) -> bool:
        """Whether a handler is to have the session of *record*, once it has ended, before it may go."""
        if not self.hands_over or not record.data:  # without data is what was deleted
            return False
        return record.end_reason != "regenerated" and not is_processed(record)

    def processed(self, record: SessionRecord, summary: Mapping[str, JSON]) -> SessionRecord:
        """The next version of an ended *record* that its handler has had; it is remembered from now on."""
        now = self.clock()
        # A summary that is there already is not of the handler, but of whoever could set the metadata.
        metadata = {key: value for key, value in record.metadata.items() if key not in (ATTEMPTS, SUMMARY)}
        return replace(
            record,
            metadata={**metadata, **summary, PROCESSED: now},
            expires_at=now + self.keep_ended,
            version=record.version + 1,
        )

    def is_over(self, record: SessionRecord) -> bool:
        """Whether a cleanup removes *record* now."""
        state = self.state(record)
        return state != "active" and not self.awaits(record) and (state == "expired" or self.clock() >= record.expires_at)

    def is_remembered(self, record: SessionRecord) -> bool:
        """Whether requests that come with an ended *record* are still to be told."""
        if record.end_reason == "regenerated":
            return self.is_in_grace(record)
        return self.awaits(record) or self.clock() < record.expires_at

    def is_in_grace(self, record: SessionRecord) -> bool:
        """Whether requests that come with an ended *record* may have been under way when its user went on without it.

        The user has a new token, or has signed out: such a request must not start another session, whose cookie would
        replace or follow that of the user's last request.
        """
        left = record.end_reason in _LEFT and record.ended_at is not None
        return left and self.clock() < (record.ended_at or 0.0) + GRACE

    def seniority(self, record: SessionRecord) -> tuple[float, str]:
        """Orders the sessions of a user, the oldest first. One of a clock that was ahead is not the newest for long."""
        ahead = record.created_at - self.clock() > _CLOCK_SLACK
        return -math.inf if ahead else record.created_at, record.id

    def beginning_after(self, record: SessionRecord) -> float:
        """When a session begins that follows *record* under its key: later, by which the two are told apart.

        One of a clock that was ahead must not make all that follow as old as it seems.
        """
        now = self.clock()
        ahead = record.created_at - now > _CLOCK_SLACK
        return now if ahead else max(now, math.nextafter(record.created_at, math.inf))

    def active_since(self) -> float | None:
        """Sessions that began earlier have reached the absolute timeout, in seconds since the epoch."""
        return None if self.absolute_timeout is None else math.nextafter(self.clock() - self.absolute_timeout, math.inf)

    def _deadline(self, created_at: float) -> float:
        return math.inf if self.absolute_timeout is None else created_at + self.absolute_timeout

    def _is_ahead(self, record: SessionRecord) -> bool:
        return record.accessed_at - self.clock() > _CLOCK_SLACK


def is_processed(record: SessionRecord) -> bool:
    """Whether the handler of ended sessions has had the session of *record*, or it was too short for it."""
    return record.ended_at is not None and PROCESSED in record.metadata


def check_lifetime(seconds: object) -> None:
    """Raises ``ValueError`` if a session cannot live for so many seconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= LONGEST:
        raise ValueError(f"a lifetime of {seconds!r} seconds is not possible; allowed is more than 0, up to 100 years")
