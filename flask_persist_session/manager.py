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
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeAlias

from blinker import Signal

from . import signals, tokens
from .config import LONGEST, CapPolicy
from .exceptions import SerializationError, SessionConflict, SessionLimitReached, SessionTooLarge, StoreError
from .records import JSON, Deletion, SessionQuery, SessionRecord, State, StoreStats, is_session_id
from .serializers import Codec, dump_metadata
from .stores.base import SessionStore

log = logging.getLogger("flask_persist_session")

Outcome: TypeAlias = Literal["unchanged", "saved", "deleted", "discarded", "failed"]

#: Seconds for which a regenerated session is remembered, so that requests under way with the old token store nothing.
REGENERATED_GRACE = 30.0
#: How often a save is merged and tried again. Each conflict means that another save succeeded, so this is only reached
#: by more simultaneous writers of one session than that.
_ATTEMPTS = 200
_LONGEST_PAUSE = 0.05
#: A record whose last request lies so many seconds in the future was written by a clock that was wrong.
_CLOCK_SLACK = 3600.0
#: Where the metadata keeps a session's own idle timeout, in seconds.
LIFETIME = "lifetime"
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


#: What is no id: its text is the same for many users, or another one whenever something in it changes.
_NO_IDS = (bool, float, bytes, list, tuple, dict, set, frozenset)


def _id_text(value: object) -> str:
    if isinstance(value, _NO_IDS):
        raise ValueError(f"a {type(value).__name__} is no id of a user or tenant; allowed is text, a whole number, a UUID")
    if value == "":
        raise ValueError("the id of a user or tenant is empty; nobody is None")
    return str(value)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose session it is: a user within a tenant, both as ``str``; ``NOBODY`` for a visitor."""

    user_id: str | None = None
    tenant_id: str | None = None

    @classmethod
    def of(cls, user_id: object, tenant_id: object = None) -> Owner:
        """An owner of any ids: 7 and "7" are the same user, ``None`` is nobody. Raises ``ValueError`` for what is no id."""
        if user_id is None:
            return NOBODY
        return cls(_id_text(user_id), None if tenant_id is None else _id_text(tenant_id))


NOBODY = Owner()


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
    :param user_key: the key of the session data under which an application keeps its user; ``None``: none.
    :param max_per_user: how many active sessions a user may have within a tenant; 0: any number.
    :param cap_policy: what a sign-in beyond that does: ``evict_oldest`` ends the oldest, ``reject`` refuses it.
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
        user_key: str | None = None,
        max_per_user: int = 0,
        cap_policy: CapPolicy = "evict_oldest",
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
        self._user_key = user_key
        self._max_per_user = max_per_user
        self._cap_policy = cap_policy
        self._sender = sender or self

    # Creating and loading ---------------------------------------------------------------------------------------------

    def create(
        self,
        data: dict[str, Any] | None = None,
        *,
        user_id: str | None = None,
        tenant_id: str | None = None,
        metadata: Mapping[str, JSON] | None = None,
        tags: Iterable[str] = (),
        lifetime: float | None = None,
    ) -> StoredSession:
        """Store a new session with a new token and return it.

        *user_id* and *tenant_id* are kept as ``str``: 7 and "7" are the same user. *metadata* is JSON that can be
        searched, *tags* are labels. *lifetime* is this session's own idle timeout in seconds, kept in its metadata.

        Raises ``SerializationError`` naming the key path of a value that cannot be stored, or if *metadata* is no
        JSON, ``SessionTooLarge``, ``SessionLimitReached`` if the user has too many and the policy is to refuse,
        ``StoreError``, ``ValueError`` for tags, a user or a tenant that no store can keep.
        """
        described = dict(metadata or {})
        if lifetime is not None:
            described[LIFETIME] = _positive(lifetime)
        dump_metadata(described)
        labels = [tags] if isinstance(tags, str) else list(tags)
        if isinstance(tags, str) or not all(isinstance(tag, str) for tag in labels):
            raise ValueError(f"tags are {tags!r}; allowed is a list or set of str")
        created = self._create(
            {} if data is None else data,
            created_at=self.clock(),
            user_id=None if user_id is None else str(user_id),
            tenant_id=None if tenant_id is None else str(tenant_id),
            metadata=described,
            tags=frozenset(labels),
        )
        self._admit(created.record)
        self._announce(created.record)
        self._evict(created.record)
        return created

    def _announce(self, record: SessionRecord) -> None:
        """Send the events of a new session."""
        event = signals.SessionCreated(session_id=record.id, user_id=record.user_id, tenant_id=record.tenant_id)
        self._send(signals.session_created, event)
        self._announce_owner(record)

    def _announce_owner(self, record: SessionRecord) -> None:
        if record.user_id is not None:
            event = signals.SessionBound(session_id=record.id, user_id=record.user_id, tenant_id=record.tenant_id)
            self._send(signals.session_bound, event)

    def _send(self, signal: Signal, event: object) -> None:
        signal.send(self._sender, event=event)

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
            expires_at=self._expiry(created_at, metadata, now),
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

    def _create_like(self, record: SessionRecord, data: dict[str, Any], owner: Owner, created_at: float) -> StoredSession:
        """A new session of the same tags and metadata."""
        return self._create(
            data,
            created_at=created_at,
            user_id=owner.user_id,
            tenant_id=owner.tenant_id,
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

    def _expiry(self, created_at: float, metadata: Mapping[str, JSON], now: float) -> float:
        own = metadata.get(LIFETIME)
        lifetime = float(own) if isinstance(own, (int, float)) else self._idle_timeout()
        # Requests within an interval do not renew, so one interval is added: the last of them still gets a whole
        # lifetime.
        return min(now + lifetime + self.renew_interval, self._deadline(created_at))

    def _report_corrupt(self, session_id: str, error: SerializationError) -> None:
        log.error("session %s cannot be read and is treated as missing: %s", session_id, error)
        self._send(signals.session_corrupt, signals.SessionCorrupt(session_id=session_id, error=str(error)))

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
        record, now = session.record, self.clock()
        wrong = record.accessed_at - now > _CLOCK_SLACK
        late = self._expiry(record.created_at, record.metadata, now) - record.expires_at >= self.renew_interval
        try:
            if not wrong and not late:
                # It may have moved to another token since it was loaded, and then its cookie must not come back.
                return "saved" if self.get(record.id) else "unchanged"
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

        Forward only, but for a record from a clock that was far ahead and has been set back since: left as it is, it
        would never expire. The expiry moves if the last move is an interval ago, or with *renew*: until then it is late
        enough, and a store that need not touch its index of expiry saves in two thirds of the time.
        """
        now = self.clock()
        expires_at = self._expiry(record.created_at, record.metadata, now)
        ahead = record.accessed_at - now > _CLOCK_SLACK
        if not ahead:
            expires_at = max(record.expires_at, expires_at)
        due = renew or ahead or expires_at - record.expires_at >= self.renew_interval
        changed = replace(
            record,
            data=payload,
            accessed_at=now if ahead else max(record.accessed_at, now),
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
            except SessionConflict:
                self._send(signals.session_conflict, signals.SessionConflicted(session_id=record.id, attempt=attempt))
            else:
                if signals.session_saved.receivers:  # each change comes by here
                    event = signals.SessionSaved(session_id=record.id, version=session.record.version)
                    self._send(signals.session_saved, event)
                return "saved"
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
        self._send(signals.session_deleted, signals.SessionDeleted(session_id=record.id))

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
        self._send(signals.session_discarded, signals.SessionDiscarded(session_id=session_id, reason=reason))

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
        record = session.record
        return self._move(session, Owner(record.user_id, record.tenant_id), record.created_at)

    def bind(self, session: StoredSession, owner: Owner) -> StoredSession | None:
        """Move the session's data to a new token as the session of *owner*; ``None`` if it has ended meanwhile.

        The user has signed in (or out, for ``NOBODY``): the absolute timeout starts anew, and the cap of the owner's
        sessions is applied. Raises as ``regenerate`` does, and ``SessionLimitReached`` if the policy is to refuse.
        """
        return self._move(session, owner, self.clock())

    def _move(self, session: StoredSession, owner: Owner, created_at: float) -> StoredSession | None:
        # The new session is stored first: whoever fails between the two steps leaves the old one as it was.
        moved = self._create_like(session.record, session.data, owner, created_at)
        ended = False
        try:
            self._admit(moved.record, replaced=session.id)
            ended = self._end_moved(session.record, moved)
        finally:
            if not ended:
                with suppress(StoreError):  # nobody has its token, and it expires
                    self.store.delete(moved.id)
        if not ended:
            return None
        self._send(signals.session_regenerated, signals.SessionRegenerated(session_id=moved.id, old_id=session.id))
        self._announce_change_of_owner(session.record, moved.record)
        self._evict(moved.record)
        return moved

    def _announce_change_of_owner(self, before: SessionRecord, after: SessionRecord) -> None:
        if (before.user_id, before.tenant_id) == (after.user_id, after.tenant_id):
            return
        self._announce_owner(after)
        if after.user_id is None and before.user_id is not None:
            event = signals.SessionUnbound(session_id=after.id, user_id=before.user_id, tenant_id=before.tenant_id)
            self._send(signals.session_unbound, event)

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

    def restart(self, session: StoredSession, data: dict[str, Any], owner: Owner = NOBODY) -> StoredSession | None:
        """Store *data* as a new session of *owner* under a new token and end the old one, taking nothing else along.

        ``None`` if the old one has ended meanwhile: the data may come from it, and what has ended stays so. Raises as
        ``create`` does; then the old session is as it was.
        """
        fresh = self._create(
            data,
            created_at=self.clock(),
            user_id=owner.user_id,
            tenant_id=owner.tenant_id,
            metadata={},
            tags=frozenset(),
        )
        goes_on = False
        try:
            self._admit(fresh.record, replaced=session.id)
            goes_on = self._end(session.id, "regenerated") or self._sent_twice(session, owner)
        finally:
            if not goes_on:
                with suppress(StoreError):  # nobody has its token, and it expires
                    self.store.delete(fresh.id)
        if not goes_on:
            return None
        self._announce(fresh.record)
        self._evict(fresh.record)
        return fresh

    def _sent_twice(self, session: StoredSession, owner: Owner) -> bool:
        """Whether this is a sign-in whose form was sent twice, and the other sending was faster.

        Otherwise the session has ended or moved on without this request, whose change is dropped: a slow one must not
        take the place of a newer sign-in.
        """
        closed = self.load(session.id)
        reason = closed.end_reason if closed else None
        signs_in = owner not in (NOBODY, Owner(session.user_id, session.tenant_id))
        if reason == "regenerated" and signs_in:
            return True
        self.discard(session.id, reason)
        return False

    def flush(self, session: StoredSession) -> Outcome:
        """Delete the session with its data, whatever others change in it meanwhile: its user has signed out.

        ``"deleted"``, or ``"discarded"`` if it has ended otherwise, whose reason then stays. Raises ``StoreError``.
        """
        record = session.record
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._delete_version(record)
            except SessionConflict:
                _pause(attempt)
            else:
                return "deleted"
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
            except SessionConflict:
                _pause(attempt)
            else:
                event = signals.SessionEnded(session_id=session_id, user_id=record.user_id, reason=reason)
                self._send(signals.session_ended, event)
                return True
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
        deleted = is_session_id(session_id) and self.store.delete(session_id)
        if deleted:
            self._send(signals.session_deleted, signals.SessionDeleted(session_id=session_id))
        return deleted

    # Users ------------------------------------------------------------------------------------------------------------

    def user_value(self, data: Mapping[str, Any]) -> str | None:
        """The user that the application keeps in its session data, as ``str``; ``None`` for nobody, as for ``""``."""
        value = self._kept_user(data)
        return None if value is None else str(value)

    def owner_in(self, data: Mapping[str, Any]) -> Owner:
        """Whose session one with *data* is. Raises ``SerializationError`` if what stands under the user key is no id."""
        try:
            return Owner.of(self._kept_user(data))
        except ValueError as error:
            raise SerializationError(
                f"session[{self._user_key!r}], where PERSIST_SESSION_USER_KEY says that the user is: {error}"
            ) from None

    def _kept_user(self, data: Mapping[str, Any]) -> Any:
        value = data.get(self._user_key) if self._user_key is not None else None
        # Applications empty the field to sign out; the visitors of all of them are not one user.
        return None if value == "" else value

    def find(
        self,
        *,
        user_id: object = None,
        tenant_id: object = None,
        tags: Iterable[str] = (),
        state: State | None = None,
        created_after: float | None = None,
        created_before: float | None = None,
        accessed_after: float | None = None,
        accessed_before: float | None = None,
        text: str | None = None,
        order_by: str | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> Iterator[SessionRecord]:
        """Yield the records of sessions, a few at a time; ``None`` and empty conditions match everything.

        The conditions are those of ``SessionQuery``; *state* is judged now. Raises ``ValueError`` for an order that is
        none, ``UnsupportedByStore`` where the store cannot list, ``StoreError``.
        """
        return self.store.find(
            SessionQuery(
                user_id=None if user_id is None else str(user_id),
                tenant_id=None if tenant_id is None else str(tenant_id),
                tags=frozenset(tags),
                state=state,
                now=self.clock(),
                created_after=created_after,
                created_before=created_before,
                accessed_after=accessed_after,
                accessed_before=accessed_before,
                text=text,
                order_by=order_by,
                limit=limit,
                offset=offset,
            )
        )

    def revoke(self, session_id: str) -> bool:
        """End the session from outside, with the reason ``"revoked"``; say whether it was active. Raises as ``end``."""
        return self.end(session_id, "revoked")

    def revoke_user(self, user_id: object, tenant_id: object = None, *, except_id: str | None = None) -> int:
        """End all active sessions of a user, of every tenant if none is given, except one; say how many there were.

        Raises ``StoreError``, ``UnsupportedByStore`` where the store cannot list, ``ValueError`` for a user that is none:
        for ``None``, too, which would be everybody.
        """
        owner = Owner.of(user_id, tenant_id)
        if owner is NOBODY:
            raise ValueError("revoke_user needs a user; None is nobody, and would match the sessions of everybody")
        query = SessionQuery(user_id=owner.user_id, tenant_id=owner.tenant_id, state="active", now=self.clock())
        ids = [record.id for record in self.store.find(query) if record.id != except_id]
        return sum(self.revoke(session_id) for session_id in ids)

    # Every sign-in stores first and looks then, in an order that is the same for all: the last of many at once sees them
    # all, so exactly as many as allowed are left.

    def _admit(self, record: SessionRecord, *, replaced: str | None = None) -> None:
        """With the policy ``reject``: take back *record*, just stored in place of *replaced*, if it exceeds the cap.

        Raises ``SessionLimitReached`` then. Other sessions beyond the cap were let in by sign-ins at the same moment.
        """
        if self._cap_policy != "reject":
            return
        surplus = [other for other in self._live(record) if other.id != replaced][self._max_per_user :]
        for other in surplus:
            if other.id != record.id:
                self._end(other.id, "rejected")
        if any(other.id == record.id for other in surplus):
            self.store.delete(record.id)
            raise SessionLimitReached(
                f"the user {record.user_id!r} has {self._max_per_user} sessions, and PERSIST_SESSION_MAX_PER_USER "
                "allows no more; end one of them first"
            )

    def _evict(self, record: SessionRecord) -> None:
        """With the policy ``evict_oldest``: end what exceeds the cap now that *record* is there."""
        if self._cap_policy == "evict_oldest":
            for other in self._live(record)[: -self._max_per_user]:
                self._end(other.id, "evicted")

    def _live(self, record: SessionRecord) -> list[SessionRecord]:
        """The active sessions of the user of *record*, oldest first; none if there is no cap or no user."""
        if self._max_per_user == 0 or record.user_id is None:
            return []
        query = SessionQuery(user_id=record.user_id, state="active", now=self.clock())
        live = [other for other in self.store.find(query) if other.tenant_id == record.tenant_id]
        return sorted(live, key=lambda other: (other.created_at, other.id))

    # The whole store --------------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """Figures of all sessions. Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``."""
        return self.store.stats(now=self.clock())

    def cleanup(
        self,
        *,
        older_than: float | None = None,
        dry_run: bool = False,
        deliver: Callable[[Callable[[], object]], object] = lambda send: send(),
        stop: Callable[[], bool] = lambda: False,
    ) -> CleanupReport:
        """Remove what has expired and ended sessions that were kept long enough, in batches.

        *older_than* (seconds): also remove active sessions whose last request is longer ago; one interval is added,
        within which requests are not noted. *dry_run*: only count. *deliver* calls what sends an event, and may do so
        in its own way. *stop* is asked between batches. Removed is exactly the version that was seen: a session renewed
        meanwhile stays.

        Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``, and what a receiver raises.
        """
        now = self.clock()
        # A session expires at expires_at, and the query excludes its bound.
        queries = [SessionQuery(expires_before=math.nextafter(now, math.inf))]
        if older_than is not None:
            queries.append(SessionQuery(state="active", now=now, accessed_before=now - older_than - self.renew_interval))
        counts: dict[State, int] = {"expired": 0, "ended": 0, "active": 0}
        for query in queries:
            for batch in _batches(self.store.find(query)):
                if stop():
                    break
                for record in batch if dry_run else self._remove(batch):
                    counts[record.state(now)] += 1
                    if not dry_run:
                        deliver(partial(self._announce_removal, record, now))
        report = CleanupReport(expired=counts["expired"], ended=counts["ended"], idle=counts["active"], dry_run=dry_run)
        if not dry_run:
            event = signals.SessionsCleanedUp(expired=report.expired, ended=report.ended, idle=report.idle)
            deliver(partial(self._send, signals.sessions_cleaned_up, event))
        return report

    def _remove(self, records: list[SessionRecord]) -> list[SessionRecord]:
        """Remove just these versions; returns those that were removed."""
        gone = self.store.delete_many([Deletion(id=record.id, expected=record.version) for record in records])
        return [record for record, removed in zip(records, gone, strict=True) if removed]

    def _announce_removal(self, record: SessionRecord, now: float) -> None:
        state = record.state(now)
        if state == "expired":
            event = signals.SessionExpired(session_id=record.id, user_id=record.user_id, expires_at=record.expires_at)
            self._send(signals.session_expired, event)
        elif state == "active":
            idle = signals.SessionEnded(session_id=record.id, user_id=record.user_id, reason="idle")
            self._send(signals.session_ended, idle)


def _batches(records: Iterator[SessionRecord]) -> Iterator[list[SessionRecord]]:
    while batch := list(islice(records, _BATCH)):
        yield batch


def _positive(seconds: float) -> float:
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"a lifetime of {seconds!r} seconds is not possible; allowed is more than 0, up to 100 years")
    return float(seconds)


def _too_many(session_id: str, what: str) -> SessionConflict:
    return SessionConflict(f"session {session_id} was changed by others {_ATTEMPTS} times while it was being {what}")


def _pause(attempt: int) -> None:
    # Full jitter: simultaneous writers must not meet again in step.
    time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.0005 * 2 ** min(attempt, 10))))
