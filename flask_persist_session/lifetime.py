"""When a session expires, is renewed and has ended: the rules of time, as functions from record to record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .config import LONGEST
from .records import JSON, SessionRecord, State

#: Seconds for which a regenerated session is remembered, so that requests under way with the old token store nothing.
REGENERATED_GRACE = 30.0
#: A record whose last request lies so many seconds in the future was written by a clock that was wrong.
_CLOCK_SLACK = 3600.0
#: Where the metadata keeps a session's own idle timeout, in seconds.
LIFETIME = "lifetime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """How long the sessions of one namespace live. All durations are seconds; see ``SessionManager``."""

    clock: Callable[[], float]
    idle_timeout: Callable[[], float]
    absolute_timeout: float | None
    renew_interval: float
    keep_ended: float

    def state(self, record: SessionRecord) -> State:
        """The state of *record* now. A timeout that was shortened counts at once, not only from the next renewal."""
        now = self.clock()
        state = record.state(now)
        return "expired" if state == "active" and now >= self._deadline(record.created_at) else state

    def expiry(self, created_at: float, metadata: Mapping[str, JSON]) -> float:
        """When a session expires that has a request now.

        Requests within an interval do not renew, so one interval is added: the last of them still gets a whole
        lifetime.
        """
        own = metadata.get(LIFETIME)
        lifetime = float(own) if isinstance(own, (int, float)) else self.idle_timeout()
        return min(self.clock() + lifetime + self.renew_interval, self._deadline(created_at))

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

    def ended(self, record: SessionRecord, reason: str) -> SessionRecord:
        """The last version of *record*: without data, kept for as long as its *reason* is of interest."""
        now = self.clock()
        keep = REGENERATED_GRACE if reason == "regenerated" else self.keep_ended
        return replace(record, data=b"", ended_at=now, end_reason=reason, expires_at=now + keep, version=record.version + 1)

    def is_remembered(self, record: SessionRecord) -> bool:
        """Whether requests that come with an ended *record* are still to be told."""
        if record.end_reason == "regenerated" and record.ended_at is not None:
            return self.clock() < record.ended_at + REGENERATED_GRACE
        return self.clock() < record.expires_at

    def _deadline(self, created_at: float) -> float:
        return math.inf if self.absolute_timeout is None else created_at + self.absolute_timeout

    def _is_ahead(self, record: SessionRecord) -> bool:
        return record.accessed_at - self.clock() > _CLOCK_SLACK


def check_lifetime(seconds: float) -> float:
    """*seconds*, if a session can live so long. Raises ``ValueError`` otherwise."""
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"a lifetime of {seconds!r} seconds is not possible; allowed is more than 0, up to 100 years")
    return float(seconds)
