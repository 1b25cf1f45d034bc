"""All policy of sessions: lifetime, saving with merging, regenerating, ending, cleaning up. No store knows any of it.

A manager serves the sessions of one namespace on one store, inside and outside of requests.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, TypeAlias

from . import tokens
from .exceptions import SerializationError, SessionConflict, SessionTooLarge, StoreError
from .records import JSON, Deletion, SessionQuery, SessionRecord, State, StoreStats, is_session_id
from .serializers import Codec, dump_metadata
from .signals import (
    SessionConflicted,
    SessionCorrupt,
    SessionDiscarded,
    session_conflict,
    session_corrupt,
    session_discarded,
)
from .stores.base import SessionStore

log = logging.getLogger("flask_persist_session")

Outcome: TypeAlias = Literal["unchanged", "saved", "deleted", "discarded", "failed"]

#: Seconds for which a regenerated session is remembered, so that requests under way with the old token store nothing.
REGENERATED_GRACE = 30.0
#: How often a save is merged and tried again. Each conflict means that another save succeeded, so this is only reached
#: by more simultaneous writers of one session than that.
_ATTEMPTS = 200
_LONGEST_PAUSE = 0.05
_BATCH = 500


@dataclass(slots=True, eq=False)
class StoredSession:
    """A session as it is in the store, with its data decoded. Change *data* and hand it to ``SessionManager.save``."""

    record: SessionRecord
    data: dict[str, Any] = field(repr=False)
    state: State = "active"
    token: str | None = field(default=None, repr=False)
    """The secret that opens it; known only right after ``create`` and ``regenerate``."""

    @property
    def id(self) -> str:
        """Public id; it opens nothing."""
        return self.record.id

    @property
    def user_id(self) -> str | None:
        """The user whose session this is."""
        return self.record.user_id

    @property
    def tenant_id(self) -> str | None:
        """The tenant within which the session lives."""
        return self.record.tenant_id

    @property
    def created_at(self) -> float:
        """Seconds since the epoch at which the session, or its user's signing in, began."""
        return self.record.created_at

    @property
    def accessed_at(self) -> float:
        """Seconds since the epoch of the last save or renewal."""
        return self.record.accessed_at

    @property
    def expires_at(self) -> float:
        """Seconds since the epoch at which the session expires unless it is renewed."""
        return self.record.expires_at

    @property
    def version(self) -> int:
        """1 on creation, one more with each save."""
        return self.record.version

    @property
    def end_reason(self) -> str | None:
        """Why the session is closed, ``"expired"`` included; ``None`` while it is active."""
        return "expired" if self.state == "expired" else self.record.end_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupReport:
    """What a cleanup removed, or with *dry_run* would remove: sessions that had expired, ended, or were idle too long."""

    expired: int = 0
    ended: int = 0
    idle: int = 0
    dry_run: bool = False

    @property
    def removed(self) -> int:
        """All of them together."""
        return self.expired + self.ended + self.idle


class SessionManager:
    """Creates, loads, saves and ends the sessions of one namespace.

    :param store: where the records are kept.
    :param codec: how session data becomes bytes.
    :param idle_timeout: returns the seconds after its last request at which a session expires.
    :param absolute_timeout: seconds after creation or sign-in at which it expires whatever happens; ``None``: never.
    :param renew_interval: seconds between two renewals of a session.
    :param keep_ended: seconds for which an ended session is remembered with its reason.
    :param max_bytes: largest encoded payload.
    :param clock: returns the current time in seconds since the epoch.
    :param sender: sender of the signals; the manager itself if not given.
    """

    def __init__(
        self,
        store: SessionStore,
        codec: Codec | None = None,
        *,
        idle_timeout: Callable[[], float] = lambda: 31 * 86400.0,
        absolute_timeout: float | None = None,
        renew_interval: float = 60.0,
        keep_ended: float = 86400.0,
        max_bytes: int = 1024 * 1024,
        clock: Callable[[], float] = time.time,
        sender: object = None,
    ) -> None:
        self.store = store
        self.clock = clock
        self.renew_interval = renew_interval
        self._codec = codec or Codec()
        self._idle_timeout = idle_timeout
        self._absolute_timeout = absolute_timeout
        self._keep_ended = keep_ended
        self._max_bytes = max_bytes
        self._sender = sender or self

    # Creating and loading ---------------------------------------------------------------------------------------------

    def create(
        self,
        data: dict[str, Any] | None = None,
        *,
        user_id: str | None = None,
        tenant_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        tags: Iterable[str] = (),
    ) -> StoredSession:
        """Store a new session with a new token and return it.

        *user_id* and *tenant_id* are kept as ``str``: 7 and "7" are the same user. *metadata* is JSON that can be
        searched, *tags* are labels.

        Raises ``SerializationError`` naming the key path of a value that cannot be stored, or if *metadata* is no
        JSON, ``SessionTooLarge``, ``StoreError``, ``ValueError`` for tags, a user or a tenant that no store can keep.
        """
        dump_metadata(metadata or {})
        labels = [tags] if isinstance(tags, str) else list(tags)
        if isinstance(tags, str) or not all(isinstance(tag, str) for tag in labels):
            raise ValueError(f"tags are {tags!r}; allowed is a list or set of str")
        return self._create(
            {} if data is None else data,
            created_at=self.clock(),
            user_id=None if user_id is None else str(user_id),
            tenant_id=None if tenant_id is None else str(tenant_id),
            metadata=metadata or {},
            tags=frozenset(labels),
        )

    def _create(
        self,
        data: dict[str, Any],
        *,
        created_at: float,
        user_id: str | None,
        tenant_id: str | None,
        metadata: Mapping[str, JSON],
        tags: frozenset[str],
    ) -> StoredSession:
        token = tokens.make_token(tokens.shard_of(user_id))
        now = self.clock()
        record = SessionRecord(
            id=tokens.session_id(token),
            user_id=user_id,
            tenant_id=tenant_id,
            tags=tags,
            metadata=metadata,
            data=self._encode(data),
            created_at=created_at,
            accessed_at=now,
            expires_at=self._expiry(created_at, now),
            ended_at=None,
            end_reason=None,
            version=1,
        )
        try:
            self.store.save(record, expected=0)
        except SessionConflict:
            # Nobody else has this id: a driver that lost the answer to a save sent it once more.
            if self.store.get(record.id) != record:
                raise
        return StoredSession(record, data, token=token)

    def _create_like(self, record: SessionRecord, data: dict[str, Any], created_at: float) -> StoredSession:
        """A new session of the same user, tenant, tags and metadata."""
        return self._create(
            data,
            created_at=created_at,
            user_id=record.user_id,
            tenant_id=record.tenant_id,
            metadata=record.metadata,
            tags=record.tags,
        )

    def load(self, session_id: str) -> StoredSession | None:
        """Return the session in whatever state it is, closed ones without data; ``None`` if there is none.

        One that ended is there for as long as its reason is kept.

        A record that cannot be read is reported (log, ``session_corrupt``) and treated as missing; it stays where it
        is. Raises ``StoreError``.
        """
        if not is_session_id(session_id):
            return None
        try:
            record = self.store.get(session_id)
            if record is None:
                return None
            state = self._state(record)
            if state == "ended" and self.clock() >= record.expires_at:
                return None  # its reason was kept long enough
            return StoredSession(record, self._codec.decode(record.data) if state == "active" else {}, state)
        except SerializationError as error:
            self._report_corrupt(session_id, error)
            return None

    def get(self, session_id: str) -> StoredSession | None:
        """Return the session if it is active, otherwise ``None``. Raises ``StoreError``."""
        session = self.load(session_id)
        return session if session is not None and session.state == "active" else None

    def _state(self, record: SessionRecord) -> State:
        now = self.clock()
        state = record.state(now)
        # A timeout that was shortened counts at once, not only from the next renewal.
        if state == "active" and now >= self._deadline(record.created_at):
            return "expired"
        return state

    def _deadline(self, created_at: float) -> float:
        return math.inf if self._absolute_timeout is None else created_at + self._absolute_timeout

    def _expiry(self, created_at: float, now: float) -> float:
        # Requests within an interval do not renew, so one interval is added: the last of them still gets a whole
        # lifetime.
        return min(now + self._idle_timeout() + self.renew_interval, self._deadline(created_at))

    def _report_corrupt(self, session_id: str, error: SerializationError) -> None:
        log.error("session %s cannot be read and is treated as missing: %s", session_id, error)
        session_corrupt.send(self._sender, event=SessionCorrupt(session_id=session_id, error=str(error)))

    # Saving -----------------------------------------------------------------------------------------------------------

    def save(self, session: StoredSession, *, renew: bool = False, delete_empty: bool = False) -> Outcome:
        """Store what was changed, merged with what others changed meanwhile.

        Keys that were changed here win, all others are taken as they are in the store now. With *renew* the session is
        renewed even if nothing was changed, with *delete_empty* it is deleted if nothing is left in it. A session that
        has ended or gone meanwhile stays so: the change is ``"discarded"`` and ``session_discarded`` sent.

        Raises ``SerializationError`` naming the key path of a value that cannot be stored, ``SessionTooLarge``,
        ``SessionConflict`` after too many tries, ``StoreError``. Whatever is raised, the stored state is as it was.
        """
        payload = self._encode(session.data)
        if self._codec.unchanged(payload, session.record.data):
            return self.renew(session) if renew else "unchanged"
        return self._merge_and_save(session, payload, renew, delete_empty)

    def renew(self, session: StoredSession) -> Outcome:
        """Move the session's expiry forward, leaving its data as it was loaded.

        ``"unchanged"`` if somebody else saved or ended it at this moment, ``"failed"`` if the store did: nothing is lost
        by renewing later. Nothing is written, but ``"saved"`` is the answer, if another request has just renewed it.
        """
        record = session.record
        if self._expiry(record.created_at, self.clock()) - record.expires_at < self.renew_interval:
            return "saved"
        try:
            session.record = self._write(session.record, session.record.data, renew=True)
        except SessionConflict:
            # A save moved its expiry as well, and what has ended must not be renewed.
            return "unchanged"
        except StoreError as error:
            log.warning("session %s could not be renewed: %s", session.id, error)
            return "failed"
        return "saved"

    def _write(self, record: SessionRecord, payload: bytes, *, renew: bool = False) -> SessionRecord:
        """Save *payload* over *record* and move its times, forward only.

        The expiry moves if the last move is an interval ago, or with *renew*: until then it is late enough, and a store
        that need not touch its index of expiry saves in two thirds of the time.
        """
        now = self.clock()
        expires_at = max(record.expires_at, self._expiry(record.created_at, now))
        due = renew or expires_at - record.expires_at >= self.renew_interval
        changed = replace(
            record,
            data=payload,
            accessed_at=max(record.accessed_at, now),
            expires_at=expires_at if due else record.expires_at,
            version=record.version + 1,
        )
        self.store.save(changed, expected=record.version)
        return changed

    def _merge_and_save(self, session: StoredSession, payload: bytes, renew: bool, delete_empty: bool) -> Outcome:
        base, record = session.record.data, session.record
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if delete_empty and not session.data:
                    self._delete_version(record)
                    return "deleted"
                session.record = self._write(record, payload, renew=renew)
                return "saved"
            except SessionConflict:
                session_conflict.send(self._sender, event=SessionConflicted(session_id=record.id, attempt=attempt))
            _pause(attempt)
            current = self._current(record.id)
            if current is None:
                return "discarded"
            session.data = self._merge(base, session.data, current)
            base, record, payload = current.record.data, current.record, self._encode(session.data)
            if payload == record.data:
                session.record = record
                return "saved"
        raise _too_many(record.id, "saved")

    def _delete_version(self, record: SessionRecord) -> None:
        if not self.store.delete(record.id, expected=record.version):
            raise SessionConflict(f"session {record.id} was changed meanwhile")

    def _current(self, session_id: str) -> StoredSession | None:
        """The session as it is now, if it is still active; otherwise say that a change is discarded.

        Whoever asks has met a conflict and paused: between this look and the next try there is no time to lose.
        """
        current = self.load(session_id)
        if current is not None and current.state == "active":
            return current
        self.discard(session_id, current.end_reason if current else None)
        return None

    def discard(self, session_id: str, reason: str | None) -> None:
        """Say that a change to a session was dropped because it had ended for *reason*."""
        session_discarded.send(self._sender, event=SessionDiscarded(session_id=session_id, reason=reason))

    def _merge(self, base: bytes, mine: dict[str, Any], theirs: StoredSession) -> dict[str, Any]:
        """Their data with the keys that *mine* changed against *base*; all by their encoded form, so that types count."""
        before, merged = self._codec.decode(base), theirs.data
        for key in before.keys() | mine.keys():
            if key not in mine:
                merged.pop(key, None)
            elif key not in before or self._codec.encode({key: mine[key]}) != self._codec.encode({key: before[key]}):
                merged[key] = mine[key]
        return merged

    def _encode(self, data: dict[str, Any]) -> bytes:
        payload = self._codec.encode(data)
        if len(payload) > self._max_bytes:
            largest = ", ".join(f"{key!r}: {size:,}" for key, size in islice(self._codec.sizes(data).items(), 3))
            raise SessionTooLarge(
                f"the session takes {len(payload):,} bytes, PERSIST_SESSION_MAX_BYTES allows {self._max_bytes:,}; "
                f"its largest keys are {largest}"
            )
        return payload

    # Regenerating and ending ------------------------------------------------------------------------------------------

    def regenerate(self, session: StoredSession) -> StoredSession | None:
        """Move the session's data to a new token and end the old one; ``None`` if it has ended meanwhile.

        What others change under the old token until it ends is taken along. The absolute timeout goes on counting.
        Raises as ``save`` does; then the old session is as it was.
        """
        # The new session is stored first: whoever fails between the two steps leaves the old one as it was.
        moved = self._create_like(session.record, session.data, session.record.created_at)
        ended = False
        try:
            ended = self._end_moved(session.record, moved)
        finally:
            if not ended:
                with suppress(StoreError):  # nobody has its token, and it expires
                    self.store.delete(moved.id)
        return moved if ended else None

    def _end_moved(self, record: SessionRecord, moved: StoredSession) -> bool:
        """End the old session of *moved*, taking along what was changed there; ``False`` if it ended by other means."""
        base = record.data
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._close(record, "regenerated")
                return True
            except SessionConflict:
                _pause(attempt)
            current = self._current(record.id)
            if current is None:
                return False
            moved.data = self._merge(base, moved.data, current)
            moved.record = self._write(moved.record, self._encode(moved.data))
            base, record = current.record.data, current.record
        raise _too_many(record.id, "regenerated")

    def restart(self, session: StoredSession, data: dict[str, Any]) -> StoredSession | None:
        """Store *data* as a new session under a new token and end the old one, taking nothing else along.

        ``None`` if the old one has ended meanwhile: the data may come from it, and what has ended stays so. Raises as
        ``create`` does; then the old session is as it was.
        """
        fresh = self.create(data)
        goes_on = False
        try:
            goes_on = self._end(session.id, "regenerated") or self._was_regenerated(session.id)
        finally:
            if not goes_on:
                with suppress(StoreError):  # nobody has its token, and it expires
                    self.store.delete(fresh.id)
        return fresh if goes_on else None

    def _was_regenerated(self, session_id: str) -> bool:
        """Whether somebody else was faster in moving on, as in a form that was sent twice; otherwise it has ended."""
        closed = self.load(session_id)
        reason = closed.end_reason if closed else None
        if reason != "regenerated":
            self.discard(session_id, reason)
        return reason == "regenerated"

    def flush(self, session: StoredSession) -> Outcome:
        """Delete the session with its data, whatever others change in it meanwhile: its user has signed out.

        ``"deleted"``, or ``"discarded"`` if it has ended otherwise, whose reason then stays. Raises ``StoreError``.
        """
        record = session.record
        for attempt in range(1, _ATTEMPTS + 1):
            if self.store.delete(record.id, expected=record.version):
                return "deleted"
            _pause(attempt)
            current = self._current(record.id)
            if current is None:
                return "discarded"
            record = current.record
        raise _too_many(record.id, "flushed")

    def end(self, session_id: str, reason: str = "ended") -> bool:
        """Close the session for good: its data goes, its reason is kept for ``PERSIST_SESSION_KEEP_ENDED`` seconds.

        Says whether it was active until now; one that cannot be read is reported and was not. Raises ``StoreError``,
        ``ValueError`` for the reason ``"regenerated"``,
        which says that the session goes on under another token.
        """
        if reason == "regenerated":
            raise ValueError('only regenerating ends a session with the reason "regenerated"; choose another one')
        return self._end(session_id, reason)

    def _end(self, session_id: str, reason: str) -> bool:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                record = self.store.get(session_id)
            except SerializationError as error:
                self._report_corrupt(session_id, error)
                return False
            if record is None or self._state(record) != "active":
                return False
            try:
                self._close(record, reason)
                return True
            except SessionConflict:
                _pause(attempt)
        raise _too_many(session_id, "ended")

    def _close(self, record: SessionRecord, reason: str) -> None:
        now = self.clock()
        keep = REGENERATED_GRACE if reason == "regenerated" else self._keep_ended
        ended = replace(
            record, data=b"", ended_at=now, end_reason=reason, expires_at=now + keep, version=record.version + 1
        )
        self.store.save(ended, expected=record.version)

    def delete(self, session_id: str) -> bool:
        """Remove the session without a trace; say whether it was there. Raises ``StoreError``."""
        return is_session_id(session_id) and self.store.delete(session_id)

    # The whole store --------------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """Figures of all sessions. Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``."""
        return self.store.stats(now=self.clock())

    def cleanup(self, *, older_than: float | None = None, dry_run: bool = False) -> CleanupReport:
        """Remove what has expired and ended sessions that were kept long enough, in batches.

        *older_than* (seconds): also remove active sessions whose last request is longer ago; one interval is added,
        within which requests are not noted. *dry_run*: only count.
        Removed is exactly the version that was seen: a session renewed meanwhile stays.
        Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``.
        """
        now = self.clock()
        # A session expires at expires_at, and the query excludes its bound.
        queries = [SessionQuery(expires_before=math.nextafter(now, math.inf))]
        if older_than is not None:
            queries.append(SessionQuery(state="active", now=now, accessed_before=now - older_than - self.renew_interval))
        counts: dict[State, int] = {"expired": 0, "ended": 0, "active": 0}
        for query in queries:
            for batch in _batches(self.store.find(query)):
                removed = [True] * len(batch) if dry_run else self._remove(batch)
                for record, gone in zip(batch, removed, strict=True):
                    counts[record.state(now)] += gone
        return CleanupReport(expired=counts["expired"], ended=counts["ended"], idle=counts["active"], dry_run=dry_run)

    def _remove(self, records: list[SessionRecord]) -> list[bool]:
        return self.store.delete_many([Deletion(id=record.id, expected=record.version) for record in records])


def _batches(records: Iterator[SessionRecord]) -> Iterator[list[SessionRecord]]:
    while batch := list(islice(records, _BATCH)):
        yield batch


def _too_many(session_id: str, what: str) -> SessionConflict:
    return SessionConflict(f"session {session_id} was changed by others {_ATTEMPTS} times while it was being {what}")


def _pause(attempt: int) -> None:
    # Full jitter: simultaneous writers must not meet again in step.
    time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.0005 * 2 ** min(attempt, 10))))
