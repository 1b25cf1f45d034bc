"""How a session of one namespace lives: created, loaded, saved with merging, renewed, ended, deleted."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeAlias

from . import tokens
from .announcer import Announcer
from .caps import StoreCap, UserCap
from .cleanup import Archive
from .config import PREFIX, CapPolicy
from .exceptions import (
    SerializationError,
    SessionConflict,
    SessionNotFound,
    SessionTooLarge,
    StoreError,
    UnsupportedByStore,
)
from .lifetime import LIFETIME, Lifetime, check_lifetime
from .lookup import Lookup
from .records import JSON, SessionRecord, is_session_id
from .serializers import Codec, dump_metadata
from .stored import ANOTHER, Owner, Redescribed, StoredSession
from .stores.base import SessionStore
from .stores.tenant import TenantStore

log = logging.getLogger("flask_persist_session")

Outcome: TypeAlias = Literal["unchanged", "saved", "deleted", "discarded", "failed"]
Metadata: TypeAlias = Mapping[str, JSON]

#: The namespace of the sessions behind ``flask.session``.
WEB = "web"
#: How often a save is merged and tried again. Each conflict means that another save succeeded, so this is only reached
#: by more simultaneous writers of one session than that.
ATTEMPTS = 200
_LONGEST_PAUSE = 0.05
#: For so many seconds a session waits for ``on_end`` in a store that removes by itself what nobody cleans up.
_PATIENCE = 10 * 365 * 86400.0


class Lifecycle:
    """Creates, loads, saves and ends sessions; see ``SessionManager``, which adds what concerns users and lists."""

    def __init__(
        self,
        store: SessionStore,
        codec: Codec | None = None,
        *,
        namespace: str = WEB,
        idle_timeout: Callable[[], float] = lambda: 31 * 86400.0,
        absolute_timeout: float | None = None,
        renew_interval: float = 60.0,
        keep_ended: float = 86400.0,
        keep_data: bool = False,
        max_bytes: int = 1024 * 1024,
        max_entries: int = 0,
        user_key: str | None = None,
        max_per_user: int = 0,
        cap_policy: CapPolicy = "evict_oldest",
        max_sessions: int = 0,
        archive: Archive | None = None,
        on_end: Callable[[StoredSession], JSON] | None = None,
        min_entries: int = 0,
        clock: Callable[[], float] = time.time,
        sender: object = None,
    ) -> None:
        self.store = self._whole_store = store
        self.clock = clock
        self.namespace = namespace
        self._tenant_id: str | None = None
        self._codec = codec or Codec()
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._user_key = user_key
        self._archive = archive
        self._on_end = on_end
        self._min_entries = min_entries
        if on_end is not None:
            store.scan()  # reads nothing yet, but raises for a store that cannot list
            _ = min_entries and store.history
            store.margin = _PATIENCE
        self._announcer = Announcer(sender or self)
        self._lifetime = Lifetime(
            clock=lambda: self.clock(),
            idle_timeout=idle_timeout,
            absolute_timeout=absolute_timeout,
            renew_interval=renew_interval,
            keep_ended=keep_ended,
            keep_data=keep_data,
            hands_over=on_end is not None,
        )
        self._user_cap = UserCap(
            store, self._lifetime, self._end_as_read, most=max_per_user, policy=cap_policy, name=self._limit("max_per_user")
        )
        self._store_cap = StoreCap(store, lambda: self.clock(), most=max_sessions, name=self._limit("max_sessions"))
        self._lookup = Lookup(store, self._codec, self._lifetime)

    def _limit(self, name: str) -> str:
        """What a limit is called where it is set."""
        return f"{PREFIX}{name.upper()}" if self.namespace == WEB else f"{name} of the namespace {self.namespace!r}"

    def _bind_to(self, tenant_id: str, clock: Callable[[], float]) -> None:
        """Have nothing but what is of a tenant, from now on. Caps count within a tenant anyway."""
        self._tenant_id = tenant_id
        self.clock = clock
        self.store = TenantStore(self.store, tenant_id)
        self._lookup = Lookup(self.store, self._codec, self._lifetime)

    @property
    def renew_interval(self) -> float:
        """Seconds between two renewals of a session."""
        return self._lifetime.renew_interval

    def is_due(self, renewed_at: float) -> bool:
        """Whether a session that was renewed then (seconds since the epoch) is to be renewed by a request now."""
        return self._lifetime.is_due(renewed_at)

    # Creating and loading ---------------------------------------------------------------------------------------------

    def _owner(self, user_id: object, tenant_id: object) -> Owner:
        if self._tenant_id is not None:
            if tenant_id is not None and str(tenant_id) != self._tenant_id:
                raise ValueError(f"this manager is that of the tenant {self._tenant_id!r}, and knows no {tenant_id!r}")
            tenant_id = self._tenant_id
        return Owner.within(tenant_id) if user_id is None else Owner.of(user_id, tenant_id)

    def _description(self, metadata: Metadata | None, lifetime: float | None) -> Metadata:
        described = dict(metadata or {})
        if lifetime is not None:
            described[LIFETIME] = lifetime
        return described

    def _check_metadata(self, metadata: Metadata) -> None:
        if LIFETIME in metadata:
            check_lifetime(metadata[LIFETIME])
        size = len(dump_metadata(metadata))
        if size > self._max_bytes:
            raise SessionTooLarge(
                f"the metadata take {size:,} bytes, {self._limit('max_bytes')} allows {self._max_bytes:,}; "
                "keep there only what lists show"
            )

    def _take_back(self, new: StoredSession) -> None:
        """Delete *new*, whose token nobody has yet; a store that fails now leaves it to expire.

        Others may go by its key already. What they have stored is not deleted, but ends.
        """
        with suppress(StoreError):
            if not self.store.delete(new.id, expected=new.version if new.token is None else None):
                self._end_as_read(new.record, "rejected")

    def _draft(
        self,
        data: dict[str, Any],
        owner: Owner,
        metadata: Metadata,
        tags: frozenset[str] = frozenset(),
        created_at: float | None = None,
        key_id: str | None = None,
    ) -> StoredSession:
        """A new session that is not stored yet: with a token, or under an id that stands for a key."""
        self._check_metadata(metadata)
        token = None if key_id else tokens.make_token(tokens.shard_of(owner.user_id))
        now = self.clock()
        began = now if created_at is None else created_at
        record = SessionRecord(
            id=tokens.session_id(token) if token else key_id or "",
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
        return StoredSession(record, data, token=token, new=True)

    def _put(self, draft: StoredSession) -> StoredSession:
        self._save_own(draft.record, expected=0)
        return draft

    def _create(
        self, data: dict[str, Any], owner: Owner, metadata: Metadata, tags: frozenset[str] = frozenset()
    ) -> StoredSession:
        return self._put(self._draft(data, owner, metadata, tags))

    def _save_own(self, record: SessionRecord, *, expected: int) -> None:
        """Save what nobody else saves just so: a driver that lost the answer to a save may have sent it once more."""
        try:
            self.store.save(record, expected=expected)
        except SessionConflict:
            if self.store.get(record.id) != record:
                raise

    def load(self, session_id: str) -> StoredSession | None:
        """Return the session in whatever state it is; ``None`` if there is none.

        Closed ones are without data, but in a namespace of the application's own. One that ended is there for as long as
        its reason is kept.

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
            readable = state == "active" or (self._lifetime.keep_data and record.data)
            return True, StoredSession(record, self._codec.decode(record.data) if readable else {}, state)
        except SerializationError as error:
            self._report_corrupt(session_id, error)
            return True, None

    def get(self, session_id: str) -> StoredSession | None:
        """Return the session if it is active, otherwise ``None``. Raises ``StoreError``."""
        session = self.load(session_id)
        return session if session is not None and session.state == "active" else None

    def _report_corrupt(self, session_id: str, error: SerializationError) -> None:
        log.error("session %s cannot be read and is treated as missing: %s", session_id, error)
        self._announcer.corrupt(session_id, error)

    # Saving -----------------------------------------------------------------------------------------------------------

    def save(
        self, session: StoredSession, *, renew: bool = False, delete_empty: bool = False, metadata: Metadata | None = None
    ) -> Outcome:
        """Store what was changed, merged with what others changed meanwhile.

        Keys that were changed here win, all others are taken as they are in the store now. With *renew* the session is
        renewed even if nothing was changed, with *delete_empty* it is deleted if nothing is left in it. What was changed in
        ``session.metadata`` and ``session.tags`` is merged likewise. *metadata* is
        added to the session's own when it is renewed. A session that has ended or gone meanwhile stays so: the change is
        ``"discarded"`` and ``session_discarded`` sent.

        Raises ``SerializationError`` naming the key path of a value that cannot be stored, ``SessionTooLarge``,
        ``SessionConflict`` after too many tries, ``StoreError``. Whatever is raised, the stored state is as it was.
        """
        plain, redescribed = self._plain(session.data), session.redescribed()
        if redescribed is None and self._codec.unchanged(plain, session.record.data):
            return self.renew(session, metadata=metadata) if renew else "unchanged"
        next_version = partial(self._next_version, renew=renew, metadata=metadata, redescribed=redescribed)
        return self._merge_and_save(session, self._codec.seal(plain), next_version, delete_empty)

    def renew(self, session: StoredSession, *, metadata: Metadata | None = None) -> Outcome:
        """Move the session's expiry forward, leaving its data as it was loaded.

        ``"unchanged"`` if somebody else saved or ended it at this moment, ``"failed"`` if the store did: nothing is lost
        by renewing later. Nothing is written, but ``"saved"`` is the answer, if another request has just renewed it.
        """
        try:
            if self._lifetime.is_fresh(session.record):
                # It may have moved to another token since it was loaded, and then its cookie must not come back.
                return "saved" if self.get(session.id) else "unchanged"
            renewed = self._next_version(session.record, session.record.data, renew=True, metadata=metadata)
            session.replace_record(self._write(renewed))
        except SessionConflict:
            # A save moved its expiry as well, and what has ended must not be renewed.
            return "unchanged"
        except StoreError as error:
            log.warning("session %s could not be renewed: %s", session.id, error)
            return "failed"
        return "saved"

    def _write(self, changed: SessionRecord) -> SessionRecord:
        """Save the next version of a record, and return it."""
        self.store.save(changed, expected=changed.version - 1)
        return changed

    def _next_version(
        self,
        record: SessionRecord,
        payload: bytes,
        *,
        renew: bool = False,
        metadata: Metadata | None = None,
        redescribed: Redescribed | None = None,
    ) -> SessionRecord:
        if self._lifetime.state(record) != "active" and self._stored(record) is None:
            # Its version need not tell: once a cleanup has removed a session, the next one of its key counts from 1.
            raise SessionConflict(f"session {record.id} is not active: it was removed, or its key leads to another now")
        changed = self._lifetime.saved(record, payload, renew=renew, metadata=metadata)
        if redescribed is None:
            return changed
        changed = redescribed.applied(changed)
        self._check_metadata(changed.metadata)
        labels(changed.tags)
        return changed

    def _stored(self, record: SessionRecord) -> SessionRecord | None:
        """What is stored of the session of *record* by now. What a key that was used anew leads to is another session."""
        current = self.store.get(record.id)
        return current if current is not None and current.created_at == record.created_at else None

    def _merge_and_save(
        self,
        session: StoredSession,
        payload: bytes,
        next_version: Callable[[SessionRecord, bytes], SessionRecord],
        delete_empty: bool,
    ) -> Outcome:
        base, record = session.record.data, session.record
        retry = Retry(record.id, "saved")
        while True:
            try:
                if delete_empty and not session.data:
                    self._delete_version(record, "emptied")
                    return "deleted"
                session.replace_record(self._write(next_version(record, payload)))
            except SessionConflict:
                self._announcer.conflict(record.id, retry.attempt)
            else:
                self._announcer.saved(session.record)
                return "saved"
            retry.pause()
            current = self._current(record)
            if current is None:
                return "discarded"
            session.data = self._merge(base, session.data, current)
            base, record, plain = current.record.data, current.record, self._plain(session.data)
            if session.redescribed() is None and self._codec.unchanged(plain, base):
                session.replace_record(record)
                return "saved"
            payload = self._codec.seal(plain)

    def _delete_version(self, record: SessionRecord, reason: str) -> None:
        self._close(record, reason, forget=True)
        self._forget_history(record)
        self._announcer.deleted(record.id, record.user_id)

    def _forget_history(self, record: SessionRecord) -> None:
        """Remove the history of a session that was deleted. If this comes to nothing, it goes with the record.

        Where its key was used anew meanwhile, it has gone already, and what is there is the history of another session.
        """
        if self.namespace != WEB:
            with suppress(UnsupportedByStore):
                self.store.history.delete(record.id, began=record.created_at)

    def _current(self, record: SessionRecord) -> StoredSession | None:
        """The session of *record* as it is now, if it is still active; otherwise say that a change is discarded.

        Another one that goes by the same key by now is not it, and began later. Whoever asks has met a conflict and paused:
        between this look and the next try there is no time to lose.
        """
        current = self.load(record.id)
        if current is not None and current.state == "active" and current.created_at == record.created_at:
            return current
        self.discard(record.id, current.end_reason if current else None)
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
            elif key not in before or self._codec.plain({key: mine[key]}) != self._codec.plain({key: before[key]}):
                merged[key] = mine[key]
        return merged

    def _encode(self, data: dict[str, Any]) -> bytes:
        return self._codec.seal(self._plain(data))

    def _plain(self, data: dict[str, Any]) -> bytes:
        plain = self._codec.plain(data)
        if len(plain) > self._max_bytes:
            largest = ", ".join(f"{key!r}: {size:,}" for key, size in islice(self._codec.sizes(data).items(), 3))
            raise SessionTooLarge(
                f"the session takes {len(plain):,} bytes, {self._limit('max_bytes')} allows {self._max_bytes:,}; "
                f"its largest keys are {largest}"
            )
        return plain

    # Ending -----------------------------------------------------------------------------------------------------------

    def flush(self, session: StoredSession) -> Outcome:
        """Delete the session with its data, whatever others change in it meanwhile: its user has signed out.

        ``"deleted"``, or ``"discarded"`` if it has ended otherwise, whose reason then stays. Raises ``StoreError``.
        """
        record, retry = session.record, Retry(session.id, "flushed")
        while True:
            with suppress(SessionConflict):
                self._delete_version(record, "logout")
                return "deleted"
            retry.pause()
            current = self._current(record)
            if current is None:
                return "discarded"
            record = current.record

    def end(self, session_id: str, reason: str = "ended") -> bool:
        """Close the session for good: its data goes, its reason is kept for ``PERSIST_SESSION_KEEP_ENDED`` seconds.

        Says whether it was active until now; one that cannot be read is reported and was not. Raises ``StoreError``, and
        ``ValueError`` for the reason ``"regenerated"``, which says that the session goes on under another token.
        """
        check_reason(reason)
        return self._end(session_id, reason)

    def _end_as_read(self, record: SessionRecord, reason: str) -> bool:
        """End the active session of *record*, which is not read again if it has not changed since."""
        try:
            self._close(record, reason)
        except SessionConflict:
            return self._end(record.id, reason, record.created_at)
        self._announcer.ended(record, reason)
        return True

    def _end(self, session_id: str, reason: str, began: float | None = None) -> bool:
        """What ``end`` does, to the session that began then, or else to the one that is met first under that id."""
        retry = Retry(session_id, "ended")
        while True:
            try:
                record = self.store.get(session_id)
            except SerializationError as error:
                self._report_corrupt(session_id, error)
                return False
            if record is None or record.ended_at is not None or began not in (None, record.created_at):
                return False
            began = record.created_at
            # One that has expired ends too: the clock may be wrong, and set right later.
            active = self._lifetime.state(record) == "active"
            if reason == "regenerated" and not active:
                return False
            with suppress(SessionConflict):
                self._close(record, reason)
                if active:
                    self._announcer.ended(record, reason)
                return active
            retry.pause()

    def _close(self, record: SessionRecord, reason: str, *, forget: bool = False) -> None:
        self._save_own(self._lifetime.ended(record, reason, forget=forget), expected=record.version)

    def delete(self, session_id: str, expected_version: int | None = None) -> bool:
        """Remove the session with all that it has; say whether there was something to remove.

        Of one that has ended there is in a namespace of the application's own, where it keeps its data. Only its id, its
        user and the reason ``"deleted"`` are kept for ``PERSIST_SESSION_KEEP_ENDED`` seconds. A record
        that cannot be read is removed without a trace, unless an *expected_version* is given: then the session is removed
        if it has just that version. Raises ``SessionConflict`` if it has another, ``StoreError``.
        """
        retry = Retry(session_id, "deleted")
        while True:
            try:
                record = self.store.get(session_id)
            except SerializationError:
                if expected_version is not None:
                    raise
                deleted = self.store.delete(session_id)
                if deleted:
                    self._announcer.deleted(session_id, None)
                return deleted
            if record is None or (record.ended_at is not None and not record.data):
                return False
            if expected_version not in (None, record.version):
                raise other_version(session_id, expected_version, record.version)
            with suppress(SessionConflict):
                self._delete_version(record, "deleted")
                return True
            retry.pause()


def check_reason(reason: str) -> None:
    """Raises ``ValueError`` for a reason that says more than that a session was ended."""
    if reason == "regenerated":
        raise ValueError('only regenerating ends a session with the reason "regenerated"; choose another one')


def missing(session_id: str, closed: StoredSession | None) -> SessionNotFound:
    """The error for a session that is not active: *closed*, or none."""
    if closed is None:
        why = "it never existed, or was removed since"
    elif closed.state == "active":
        why = ANOTHER
    else:
        why = f"it has ended ({closed.end_reason})"
    return SessionNotFound(f"no active session {session_id}: {why}", missing=closed is None)


def other_version(session_id: str, expected: int | None, found: int) -> SessionConflict:
    """The error for a session that has another version than it should."""
    return SessionConflict(f"session {session_id}: expected version {expected}, but it is version {found} now")


def labels(tags: Iterable[str]) -> frozenset[str]:
    """*tags* as they are stored. Raises ``ValueError`` for what are none."""
    given = [tags] if isinstance(tags, str) else list(tags)
    if isinstance(tags, str) or not all(isinstance(tag, str) for tag in given):
        raise ValueError(f"tags are {tags!r}; allowed is a list or set of str")
    return frozenset(given)


class Retry:
    """Counts the attempts to do *what* to a session, and pauses between them."""

    def __init__(self, session_id: str, what: str) -> None:
        self.attempt = 1
        self._session_id = session_id
        self._what = what

    def pause(self) -> None:
        """Wait a moment before the next attempt. Raises ``SessionConflict`` if there were too many."""
        if self.attempt >= ATTEMPTS:
            raise SessionConflict(
                f"session {self._session_id} was changed by others {ATTEMPTS} times while it was being {self._what}"
            )
        # Full jitter: simultaneous writers must not meet again in step.
        time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.0005 * 2 ** min(self.attempt, 10))))
        self.attempt += 1
