"""All policy of sessions: creating, saving with merging, regenerating, ending. No store knows any of it.

A manager serves the sessions of one namespace on one store, inside and outside of requests.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeAlias

from . import tokens
from .announcer import Announcer
from .caps import StoreCap, UserCap
from .cleanup import Archive, Cleanup, CleanupReport, batches
from .config import CapPolicy
from .exceptions import SerializationError, SessionConflict, SessionTooLarge, StoreError
from .lifetime import LIFETIME, Lifetime, check_lifetime
from .lookup import Lookup, SessionDetails
from .records import JSON, Change, SessionQuery, SessionRecord, State, StoreStats, is_session_id
from .serializers import Codec, dump_metadata
from .stored import NOBODY, Foreign, Owner, StoredSession
from .stores.base import SessionStore

log = logging.getLogger("flask_persist_session")

Outcome: TypeAlias = Literal["unchanged", "saved", "deleted", "discarded", "failed"]
Metadata: TypeAlias = Mapping[str, JSON]

#: How often a save is merged and tried again. Each conflict means that another save succeeded, so this is only reached
#: by more simultaneous writers of one session than that.
_ATTEMPTS = 200
_LONGEST_PAUSE = 0.05


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
    :param max_sessions: how many sessions the store may keep, in whatever state; 0: any number.
    :param archive: is given the sessions that a cleanup is about to remove, and the moment at which it began; if it raises,
        they stay. ``None``: they are removed without.
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
        max_sessions: int = 0,
        archive: Archive | None = None,
        clock: Callable[[], float] = time.time,
        sender: object = None,
    ) -> None:
        self.store = store
        self.clock = clock
        self._codec = codec or Codec()
        self._max_bytes = max_bytes
        self._user_key = user_key
        self._archive = archive
        self._announcer = Announcer(sender or self)
        self._lifetime = Lifetime(
            clock=lambda: self.clock(),
            idle_timeout=idle_timeout,
            absolute_timeout=absolute_timeout,
            renew_interval=renew_interval,
            keep_ended=keep_ended,
        )
        self._user_cap = UserCap(store, self._lifetime, self._end_as_read, most=max_per_user, policy=cap_policy)
        self._store_cap = StoreCap(store, lambda: self.clock(), most=max_sessions)
        self._lookup = Lookup(store, self._codec, self._lifetime)

    @property
    def renew_interval(self) -> float:
        """Seconds between two renewals of a session."""
        return self._lifetime.renew_interval

    def is_due(self, renewed_at: float) -> bool:
        """Whether a session that was renewed then (seconds since the epoch) is to be renewed by a request now."""
        return self._lifetime.is_due(renewed_at)

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
        JSON, ``SessionTooLarge``, ``SessionLimitReached`` if the user has too many and the policy is to refuse or
        the store is full, ``StoreError``, ``ValueError`` for tags, a user or a tenant that no store can keep.
        """
        described = dict(metadata or {})
        if lifetime is not None:
            described[LIFETIME] = lifetime
        labels = [tags] if isinstance(tags, str) else list(tags)
        if isinstance(tags, str) or not all(isinstance(tag, str) for tag in labels):
            raise ValueError(f"tags are {tags!r}; allowed is a list or set of str")
        owner = Owner.of(user_id, tenant_id) if user_id is not None else Owner.within(tenant_id)
        self._store_cap.admit()
        created = self._create({} if data is None else data, owner, described, frozenset(labels))
        self._store_cap.count()
        with ExitStack() as undo:
            undo.callback(self._take_back, created)
            self._user_cap.admit(created.record)
            undo.pop_all()
        self._announcer.created(created.record)
        self._user_cap.evict(created.record)
        return created

    def _take_back(self, new: StoredSession) -> None:
        """Delete *new*, whose token nobody has yet; a store that fails now leaves it to expire."""
        with suppress(StoreError):
            self.store.delete(new.id)

    def _create(
        self,
        data: dict[str, Any],
        owner: Owner,
        metadata: Metadata,
        tags: frozenset[str] = frozenset(),
        created_at: float | None = None,
    ) -> StoredSession:
        dump_metadata(metadata)
        if LIFETIME in metadata:
            check_lifetime(metadata[LIFETIME])
        token, now = tokens.make_token(tokens.shard_of(owner.user_id)), self.clock()
        began = now if created_at is None else created_at
        record = SessionRecord(
            id=tokens.session_id(token),
            user_id=owner.user_id,
            tenant_id=owner.tenant_id,
            tags=tags,
            metadata=metadata,
            data=self._encode(data),
            created_at=began,
            accessed_at=now,
            expires_at=self._lifetime.expiry(began, metadata),
            ended_at=None,
            end_reason=None,
            version=1,
        )
        self._save_own(record, expected=0)
        return StoredSession(record, data, token=token)

    def _save_own(self, record: SessionRecord, *, expected: int) -> None:
        """Save what nobody else saves just so: a driver that lost the answer to a save may have sent it once more."""
        try:
            self.store.save(record, expected=expected)
        except SessionConflict:
            if self.store.get(record.id) != record:
                raise

    def load(self, session_id: str) -> StoredSession | None:
        """Return the session in whatever state it is, closed ones without data; ``None`` if there is none.

        One that ended is there for as long as its reason is kept.

        A record that cannot be read is reported (log, ``session_corrupt``) and treated as missing; it stays where it
        is. Raises ``StoreError``.
        """
        return self.probe(session_id)[1] if is_session_id(session_id) else None

    def probe(self, session_id: str) -> tuple[bool, StoredSession | None]:
        """Whether there is a record of that id, be it forgotten or unreadable, and what ``load`` makes of it."""
        try:
            record = self.store.get(session_id)
            if record is None:
                return False, None
            state = self._lifetime.state(record)
            if state == "ended" and not self._lifetime.is_remembered(record):
                return True, None
            return True, StoredSession(record, self._codec.decode(record.data) if state == "active" else {}, state)
        except SerializationError as error:
            self._report_corrupt(session_id, error)
            return True, None

    def get(self, session_id: str) -> StoredSession | None:
        """Return the session if it is active, otherwise ``None``. Raises ``StoreError``."""
        session = self.load(session_id)
        return session if session is not None and session.state == "active" else None

    def look_up(self, session_id: str) -> SessionRecord:
        """The record of a session in whatever state, by its id or the beginning of it, 8 digits or more.

        Its expiry heeds an absolute timeout that was shortened since. Raises ``SessionNotFound`` if there is none or more
        than one, ``SerializationError`` if it cannot be read, ``UnsupportedByStore`` for the beginning of an id where the
        store cannot list, ``StoreError``.
        """
        return self._lookup.record(session_id)

    def inspect(self, session: str | SessionRecord) -> SessionDetails:
        """All that is known of a session in whatever state, for people who look.

        *session* is its id, the beginning of it, or a record that is in the store no more, such as that of an archive.
        Changes and reports nothing. Raises as ``look_up`` does, ``SerializationError`` also for data that cannot be read.
        """
        return self._lookup.details(self._lookup.record(session) if isinstance(session, str) else session)

    def judge(self, record: SessionRecord) -> SessionRecord:
        """*record*, as ``find`` gave it, with the expiry that counts now, as ``look_up`` gives it."""
        return self._lifetime.judged(record)

    def _report_corrupt(self, session_id: str, error: SerializationError) -> None:
        log.error("session %s cannot be read and is treated as missing: %s", session_id, error)
        self._announcer.corrupt(session_id, error)

    # Saving -----------------------------------------------------------------------------------------------------------

    def save(
        self, session: StoredSession, *, renew: bool = False, delete_empty: bool = False, metadata: Metadata | None = None
    ) -> Outcome:
        """Store what was changed, merged with what others changed meanwhile.

        Keys that were changed here win, all others are taken as they are in the store now. With *renew* the session is
        renewed even if nothing was changed, with *delete_empty* it is deleted if nothing is left in it. *metadata* is
        added to the session's own when it is renewed. A session that has ended or gone meanwhile stays so: the change is
        ``"discarded"`` and ``session_discarded`` sent.

        Raises ``SerializationError`` naming the key path of a value that cannot be stored, ``SessionTooLarge``,
        ``SessionConflict`` after too many tries, ``StoreError``. Whatever is raised, the stored state is as it was.
        """
        payload = self._encode(session.data)
        if self._codec.unchanged(payload, session.record.data):
            return self.renew(session, metadata=metadata) if renew else "unchanged"
        write = partial(self._write, renew=renew, metadata=metadata)
        return self._merge_and_save(session, payload, write, delete_empty)

    def renew(self, session: StoredSession, *, metadata: Metadata | None = None) -> Outcome:
        """Move the session's expiry forward, leaving its data as it was loaded.

        ``"unchanged"`` if somebody else saved or ended it at this moment, ``"failed"`` if the store did: nothing is lost
        by renewing later. Nothing is written, but ``"saved"`` is the answer, if another request has just renewed it.
        """
        try:
            if self._lifetime.is_fresh(session.record):
                # It may have moved to another token since it was loaded, and then its cookie must not come back.
                return "saved" if self.get(session.id) else "unchanged"
            session.record = self._write(session.record, session.record.data, renew=True, metadata=metadata)
        except SessionConflict:
            # A save moved its expiry as well, and what has ended must not be renewed.
            return "unchanged"
        except StoreError as error:
            log.warning("session %s could not be renewed: %s", session.id, error)
            return "failed"
        return "saved"

    def _write(
        self, record: SessionRecord, payload: bytes, *, renew: bool = False, metadata: Metadata | None = None
    ) -> SessionRecord:
        changed = self._lifetime.saved(record, payload, renew=renew, metadata=metadata)
        self.store.save(changed, expected=record.version)
        return changed

    def _merge_and_save(
        self,
        session: StoredSession,
        payload: bytes,
        write: Callable[[SessionRecord, bytes], SessionRecord],
        delete_empty: bool,
    ) -> Outcome:
        base, record = session.record.data, session.record
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if delete_empty and not session.data:
                    self._delete_version(record, "emptied")
                    return "deleted"
                session.record = write(record, payload)
            except SessionConflict:
                self._announcer.conflict(record.id, attempt)
            else:
                self._announcer.saved(session.record)
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

    def _delete_version(self, record: SessionRecord, reason: str) -> None:
        self._close(record, reason, forget=True)
        self._announcer.deleted(record.id, record.user_id)

    def _current(self, session_id: str) -> StoredSession | None:
        """The session as it is now, if it is still active; otherwise say that a change is discarded.

        Whoever asks has met a conflict and paused: between this look and the next try there is no time to lose.
        """
        current = self.load(session_id)
        if current is not None and current.state == "active":
            return current
        self.discard(session_id, current.end_reason if current else None)
        return None

    def is_in_grace(self, session: StoredSession) -> bool:
        """Whether a request that comes with this ended session may be a late one, and must not start another session."""
        return self._lifetime.is_in_grace(session.record)

    def discard(self, session_id: str, reason: str | None) -> None:
        """Say that a change to a session was dropped because it had ended for *reason*."""
        self._announcer.discarded(session_id, reason)

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

    def regenerate(self, session: StoredSession, *, metadata: Metadata | None = None) -> StoredSession | None:
        """Move the session's data to a new token and end the old one; ``None`` if it has ended meanwhile.

        What others change under the old token until it ends is taken along, *metadata* is added to the session's own.
        The absolute timeout goes on counting. Raises as ``save`` does; then the old session is as it was.
        """
        owner = Owner(session.user_id, session.tenant_id)
        return self._move(session, owner, metadata or {}, created_at=session.created_at)

    def bind(self, session: StoredSession, owner: Owner, *, metadata: Metadata | None = None) -> StoredSession | None:
        """Move the session's data to a new token as the session of *owner*; ``None`` if it has ended meanwhile.

        The user has signed in (or out, for ``NOBODY``): the absolute timeout starts anew, and the cap of the owner's
        sessions is applied. Raises as ``regenerate`` does, and ``SessionLimitReached`` if the policy is to refuse.
        """
        return self._move(session, owner, metadata or {})

    def _move(
        self, session: StoredSession, owner: Owner, metadata: Metadata, created_at: float | None = None
    ) -> StoredSession | None:
        before = session.record
        moved = self._create(session.data, owner, {**before.metadata, **metadata}, before.tags, created_at)
        # A session that goes on as the same user's takes nobody's place.
        signs_in = owner != Owner(before.user_id, before.tenant_id)
        ending = self._put_in_place(moved, before, lambda: self._end_moved(before, moved), signs_in)
        if ending is None:
            return None
        if ending == "ended":
            self._announcer.moved(before, moved.record)
        else:
            self._announcer.created(moved.record)
        if signs_in:
            self._user_cap.evict(moved.record)
        return moved

    def _put_in_place(
        self, new: StoredSession, old: SessionRecord, end_old: Callable[[], bool], signs_in: bool
    ) -> Literal["ended", "sent twice"] | None:
        """End the old session now that *new* is stored; take *new* back if that cannot be (``None``).

        In this order whoever fails before the old session has ended leaves it as it was. A sign-in whose form was sent
        twice goes on beside the one that was faster: nobody knows which of the two answers the browser takes.
        """
        ending: Literal["ended", "sent twice"] | None
        with ExitStack() as undo:
            undo.callback(self._take_back, new)
            if signs_in:
                self._user_cap.admit(new.record, replaced=old.id)
            ending = "ended" if end_old() else "sent twice" if self._is_sent_twice(old, new.record) else None
            if ending is not None:
                undo.pop_all()
        return ending

    def _end_moved(self, record: SessionRecord, moved: StoredSession) -> bool:
        """End the old session of *moved*, taking along what was changed there; ``False`` if it ended by other means."""
        base = record.data
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._close(record, "regenerated")
                return True
            except SessionConflict:
                _pause(attempt)
            current = self.get(record.id)
            if current is None:
                return False
            moved.data = self._merge(base, moved.data, current)
            moved.record = self._write(moved.record, self._encode(moved.data))
            base, record = current.record.data, current.record
        raise _too_many(record.id, "regenerated")

    def restart(
        self,
        session: StoredSession,
        data: dict[str, Any],
        owner: Owner = NOBODY,
        *,
        metadata: Metadata | None = None,
    ) -> StoredSession | None:
        """Store *data* as a new session of *owner* under a new token and end the old one, taking nothing else along.

        ``None`` if the old one has ended meanwhile: the data may come from it, and what has ended stays so. Raises as
        ``create`` does; then the old session is as it was.
        """
        fresh = self._create(data, owner, metadata or {})
        if not self._put_in_place(fresh, session.record, lambda: self._end(session.id, "regenerated"), True):
            return None
        self._announcer.created(fresh.record)
        self._user_cap.evict(fresh.record)
        return fresh

    def _is_sent_twice(self, old: SessionRecord, new: SessionRecord) -> bool:
        """Whether this is a sign-in, and another one has just moved the same session on.

        Otherwise the session has ended or moved on without this request, whose change is dropped: a slow one must not
        take the place of a newer sign-in.
        """
        closed = self.load(old.id)
        reason = closed.end_reason if closed else None
        # A user's session may have moved on because its user signed out, and a visitor's only by signing in.
        if reason == "regenerated" and old.user_id is None and new.user_id is not None:
            return True
        self.discard(old.id, reason)
        return False

    def flush(self, session: StoredSession) -> Outcome:
        """Delete the session with its data, whatever others change in it meanwhile: its user has signed out.

        ``"deleted"``, or ``"discarded"`` if it has ended otherwise, whose reason then stays. Raises ``StoreError``.
        """
        record = session.record
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._delete_version(record, "logout")
            except SessionConflict:
                _pause(attempt)
            else:
                return "deleted"
            current = self._current(record.id)
            if current is None:
                return "discarded"
            record = current.record
        raise _too_many(record.id, "flushed")

    # Taking over sessions of another kind ----------------------------------------------------------------------------

    def adopt(
        self, foreign: Foreign, data: dict[str, Any], owner: Owner, *, metadata: Metadata | None = None
    ) -> StoredSession | None:
        """Store *data* of a session of another kind as a new session of *owner*; ``None`` if somebody was faster.

        From then on what the foreign session is known by opens nothing any more, for as long as it could be taken for
        valid, and it is forgotten where it was. Raises as ``create`` does; then it is as it was.
        """
        self._store_cap.admit()
        fresh = self._create(data, owner, metadata or {})
        self._store_cap.count()
        with ExitStack() as undo:
            undo.callback(self._take_back, fresh)
            self._user_cap.admit(fresh.record)
            if not self._retire(foreign, "regenerated"):
                return None
            undo.pop_all()
        self._announcer.created(fresh.record)
        self._user_cap.evict(fresh.record)
        return fresh

    def end_foreign(self, foreign: Foreign) -> bool:
        """End a session of another kind for good: its user has signed out. ``False`` if somebody was faster.

        Raises ``StoreError``.
        """
        return self._retire(foreign, "logout")

    def _tombstone(self, foreign: Foreign, reason: str) -> SessionRecord:
        record = self._nobodys(foreign.id, b"", foreign.valid_until, foreign.version)
        ended = self._lifetime.ended(record, reason)
        return replace(ended, expires_at=max(ended.expires_at, foreign.valid_until))

    def _nobodys(self, session_id: str, payload: bytes, expires_at: float, version: int) -> SessionRecord:
        now = self.clock()
        return SessionRecord(
            id=session_id,
            user_id=None,
            tenant_id=None,
            tags=frozenset(),
            metadata={},
            data=payload,
            created_at=now,
            accessed_at=now,
            expires_at=expires_at,
            ended_at=None,
            end_reason=None,
            version=version,
        )

    def _retire(self, foreign: Foreign, reason: str) -> bool:
        try:
            self._save_own(self._tombstone(foreign, reason), expected=foreign.version)
        except SessionConflict:
            return False
        foreign.forget()
        return True

    def storable(self, data: dict[str, Any]) -> bytes:
        """The payload of *data*. Raises ``SerializationError`` and ``SessionTooLarge`` for what cannot be stored."""
        self.owner_in(data)
        return self._encode(data)

    def imported(self, session_id: str, data: dict[str, Any], expires_at: float) -> SessionRecord:
        """A record of a session of another kind, nobody's until its user comes and it is adopted.

        *expires_at*: until when it was valid there, in seconds since the epoch. Raises as ``storable`` does.
        """
        return self._nobodys(session_id, self.storable(data), expires_at, 1)

    def end(self, session_id: str, reason: str = "ended") -> bool:
        """Close the session for good: its data goes, its reason is kept for ``PERSIST_SESSION_KEEP_ENDED`` seconds.

        Says whether it was active until now; one that cannot be read is reported and was not. Raises ``StoreError``, and
        ``ValueError`` for the reason ``"regenerated"``, which says that the session goes on under another token.
        """
        if reason == "regenerated":
            raise ValueError('only regenerating ends a session with the reason "regenerated"; choose another one')
        return self._end(session_id, reason)

    def _end_as_read(self, record: SessionRecord, reason: str) -> bool:
        """End the active session of *record*, which is not read again if it has not changed since."""
        try:
            self._close(record, reason)
        except SessionConflict:
            return self._end(record.id, reason)
        self._announcer.ended(record, reason)
        return True

    def _end(self, session_id: str, reason: str) -> bool:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                record = self.store.get(session_id)
            except SerializationError as error:
                self._report_corrupt(session_id, error)
                return False
            if record is None or record.ended_at is not None:
                return False
            # One that has expired ends too: the clock may be wrong, and set right later.
            active = self._lifetime.state(record) == "active"
            if reason == "regenerated" and not active:
                return False
            try:
                self._close(record, reason)
            except SessionConflict:
                _pause(attempt)
            else:
                if active:
                    self._announcer.ended(record, reason)
                return active
        raise _too_many(session_id, "ended")

    def _close(self, record: SessionRecord, reason: str, *, forget: bool = False) -> None:
        self._save_own(self._lifetime.ended(record, reason, forget=forget), expected=record.version)

    def delete(self, session_id: str) -> bool:
        """Remove the session with all that it has; say whether it was there and had not ended.

        Only its id, its user and the reason ``"deleted"`` are kept for ``PERSIST_SESSION_KEEP_ENDED`` seconds. A record
        that cannot be read is removed without a trace. Raises ``StoreError``.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                record = self.store.get(session_id)
            except SerializationError:
                deleted = self.store.delete(session_id)
                if deleted:
                    self._announcer.deleted(session_id, None)
                return deleted
            if record is None or record.ended_at is not None:
                return False
            try:
                self._delete_version(record, "deleted")
            except SessionConflict:
                _pause(attempt)
            else:
                return True
        raise _too_many(session_id, "deleted")

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

    def forget_user(self, data: dict[str, Any]) -> None:
        """Remove from session data the user that the application keeps in it."""
        if self._user_key is not None:
            data.pop(self._user_key, None)

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
        if state == "active" and (since := self._lifetime.active_since()) is not None:
            created_after = since if created_after is None else max(since, created_after)
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
        return self._revoke_matching(SessionQuery(user_id=owner.user_id, tenant_id=owner.tenant_id), except_id)

    def revoke_others(self, session: StoredSession) -> int:
        """End all active sessions of the user of *session* within its tenant, but this one; say how many there were.

        Raises ``StoreError``, ``UnsupportedByStore`` where the store cannot list, ``ValueError`` for nobody's session.
        """
        if session.user_id is None:
            raise ValueError(f"session {session.id} is nobody's, so there are no others of its user")
        query = SessionQuery(user_id=session.user_id, tenant_id=session.tenant_id)
        return self._revoke_matching(query, session.id, only_without_tenant=session.tenant_id is None)

    def _revoke_matching(self, query: SessionQuery, except_id: str | None, *, only_without_tenant: bool = False) -> int:
        seen, revoked = {except_id}, 0
        for _attempt in range(_ATTEMPTS):
            # One that gets a new token between being listed and being ended goes on under another id; it was stored before
            # the old one ended, so a listing that begins after that has it.
            fresh = [
                record
                for record in self.store.find(query)
                if record.id not in seen
                and record.end_reason in (None, "regenerated")
                and not (only_without_tenant and record.tenant_id is not None)
            ]
            if not fresh:
                return revoked
            seen |= {record.id for record in fresh}
            revoked += sum(self.revoke(record.id) for record in fresh if record.ended_at is None)
        raise _still_moving()

    # The whole store --------------------------------------------------------------------------------------------------

    def revoke_all(self, *, on_batch: Callable[[int], object] = lambda _: None) -> int:
        """End every active session, in batches, with the reason ``"revoked"``; say how many there were.

        *on_batch* is called with the number that each batch ended. Sessions that begin meanwhile may or may not be among
        them; one that is given a new token meanwhile is. It can be interrupted at any time and called again.

        Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``, and what a receiver raises.
        """
        began, total = self.clock(), 0
        moved: set[str] = set()
        for _attempt in range(_ATTEMPTS):
            ended, moving = self._revoke_found(began, on_batch)
            total += ended
            # One that moves on meanwhile may go to where the listing has been already.
            if not ended and moving <= moved:
                return total
            moved |= moving
        raise _still_moving()

    def _revoke_found(self, began: float, on_batch: Callable[[int], object]) -> tuple[int, set[str]]:
        """One pass: how many sessions it ended, and the ids of those that had moved on since *began*."""
        total, moved = 0, set()
        for batch in batches(self.store.find(SessionQuery(created_before=math.nextafter(began, math.inf)))):
            active = [record for record in batch if self._lifetime.state(record) == "active"]
            ended = self._revoke_batch(active) if active else 0
            moved |= {r.id for r in batch if r.end_reason == "regenerated" and (r.ended_at or 0.0) >= began}
            on_batch(ended)
            total += ended
        return total, moved

    def _revoke_batch(self, records: list[SessionRecord]) -> int:
        """End these; returns how many were still active."""
        changes = [Change(record=self._lifetime.ended(record, "revoked"), expected=record.version) for record in records]
        ended = 0
        for record, saved in zip(records, self.store.save_many(changes), strict=True):
            if saved:
                self._announcer.ended(record, "revoked")
            # Whatever was changed meanwhile is ended on its own, which tries again.
            ended += saved or self.revoke(record.id)
        return ended

    def state(self, record: SessionRecord) -> State:
        """How the session of *record* stands now; ``"expired"`` for all that a cleanup would remove."""
        state = self._lifetime.state(record)
        return "expired" if state == "ended" and self.clock() >= record.expires_at else state

    def without_user(self, record: SessionRecord) -> SessionRecord:
        """*record* as that of a visitor: what it keeps stays, but for the value under ``PERSIST_SESSION_USER_KEY``.

        Raises ``SerializationError`` if it cannot be read.
        """
        payload = record.data
        if payload and self._user_key is not None:
            data = self._codec.decode(payload)
            if data.pop(self._user_key, None) is not None:
                payload = self._codec.encode(data)
        return replace(record, user_id=None, tenant_id=None, data=payload)

    def stats(self) -> StoreStats:
        """Figures of all sessions. Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``."""
        return self.store.stats(now=self.clock())

    def decode(self, record: SessionRecord) -> dict[str, Any]:
        """The data in a record; empty for one that has ended. Raises ``SerializationError`` if it cannot be read."""
        return self._codec.decode(record.data) if record.ended_at is None else {}

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
        meanwhile stays. If there is an archive, each batch is in it before it is removed.

        Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``, ``BackupError`` if the archive cannot be
        written, which removes nothing of the batch, and what a receiver raises.
        """
        now = self.clock()
        idle_since = None if older_than is None else now - older_than - self.renew_interval
        run = Cleanup(self.store, self._announcer, now, deliver, self._archive)
        return run.run(idle_since=idle_since, dry_run=dry_run, stop=stop)


def _too_many(session_id: str, what: str) -> SessionConflict:
    return SessionConflict(f"session {session_id} was changed by others {_ATTEMPTS} times while it was being {what}")


def _still_moving() -> SessionConflict:
    return SessionConflict(f"sessions moved to new tokens {_ATTEMPTS} times while they were being revoked; try again")


def _pause(attempt: int) -> None:
    # Full jitter: simultaneous writers must not meet again in step.
    time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.0005 * 2 ** min(attempt, 10))))
