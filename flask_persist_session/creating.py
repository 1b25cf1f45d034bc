"""Creates sessions by hand and goes on with them, by their id or the name that the application has for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from . import tokens
from .exceptions import SerializationError, SessionConflict, SessionNotFound, UnsupportedByStore
from .lifecycle import Lifecycle, Retry, labels, missing
from .records import JSON, SessionRecord
from .stored import Owner, StoredSession
from .stores.base import NAME_LIMITS, is_name
from .stores.history import copy_history

#: The end reason of a session that a restore replaces, and of what stands for one whose history is not yet complete.
OVERWRITTEN, RESTORING = "overwritten", "restoring"
#: Seconds within which a history is copied.
_COPYING = 60.0


class Creating(Lifecycle):
    """Creates sessions and goes on with them; see ``SessionManager``."""

    def create(
        self,
        data: dict[str, Any] | None = None,
        *,
        user_id: object = None,
        tenant_id: object = None,
        metadata: Mapping[str, JSON] | None = None,
        tags: Iterable[str] = (),
        lifetime: float | None = None,
        key: str | None = None,
    ) -> StoredSession:
        """Store a new session with a new token and return it.

        *user_id* and *tenant_id* are kept as ``str``: 7 and "7" are the same user. *metadata* is JSON that can be
        searched, *tags* are labels. *lifetime* is this session's own idle timeout in seconds, kept in its metadata.
        With *key*, the application's own name for it among the sessions of its user, it has no token.

        Raises ``SerializationError`` naming the key path of a value that cannot be stored, or if *metadata* is no
        JSON, ``SessionTooLarge``, ``SessionLimitReached`` if the user has too many and the policy is to refuse or
        the store is full, ``SessionConflict`` if the user has a session of that *key*, ``StoreError``, ``ValueError`` for
        tags, a user or a tenant that no store can keep.
        """
        owner = self._owner(user_id, tenant_id)
        draft = self._draft(
            {} if data is None else data,
            owner,
            self._description(metadata, lifetime),
            labels(tags),
            key_id=None if key is None else self.key_id(key, owner),
        )
        self._store_cap.admit()
        created = self._put(draft) if key is None else self._put_under_key(draft)
        self._store_cap.count()
        with ExitStack() as undo:
            undo.callback(self._take_back, created)
            self._user_cap.admit(created.record)
            undo.pop_all()
        self._announcer.created(created.record)
        self._user_cap.evict(created.record)
        return created

    def existing(self, session_id: str) -> StoredSession:
        """The active session of that id. Raises ``SessionNotFound``, saying why there is none; ``StoreError``."""
        session = self.load(session_id)
        if session is None or session.state != "active":
            raise missing(session_id, session)
        return session

    def resume(self, session_id: str, *, user_id: object = None, tenant_id: object = None) -> StoredSession:
        """Go on with an active session of just this user in just this tenant (``None``: of nobody, in none), and renew it.

        Raises ``SessionNotFound`` if there is none, with the same words for one of somebody else; ``StoreError``,
        ``ValueError`` for what is no user or tenant.
        """
        session, owner = self.get(session_id), self._owner(user_id, tenant_id)
        if session is None or Owner(session.user_id, session.tenant_id) != owner:
            raise SessionNotFound(f"no active session {session_id} of this user", missing=session is None)
        return self._renewed(session)

    def resume_or_create(
        self,
        session_id: str | None = None,
        *,
        key: str | None = None,
        user_id: object = None,
        tenant_id: object = None,
        data: dict[str, Any] | None = None,
        metadata: Mapping[str, JSON] | None = None,
        tags: Iterable[str] = (),
        lifetime: float | None = None,
    ) -> StoredSession:
        """Go on with a session of this user, or create one; its ``new`` says which.

        It is named by its *session_id*, or by *key*, the application's own name for it: then there is one active session of
        that name, however many processes ask at once. What ended or expired under that name stays so, under another id
        for as long as its kind is kept. *data* and what follows are those of a new session, see ``create``.

        Raises as ``create`` does, ``ValueError`` if both *session_id* and *key* are given.
        """
        if session_id is not None and key is not None:
            raise ValueError("resume_or_create goes by a session_id or by a key, not by both")
        wanted = session_id if key is None else self.key_id(key, self._owner(user_id, tenant_id))
        retry = Retry(wanted or "", "resumed")
        while True:
            with suppress(SessionNotFound):
                if wanted is not None:
                    return self.resume(wanted, user_id=user_id, tenant_id=tenant_id)
            with suppress(*([] if key is None else [SessionConflict])):
                return self.create(
                    data,
                    user_id=user_id,
                    tenant_id=tenant_id,
                    metadata=metadata,
                    tags=tags,
                    lifetime=lifetime,
                    key=key,
                )
            retry.pause()  # somebody else has just created it

    def _renewed(self, session: StoredSession) -> StoredSession:
        if not self._lifetime.is_fresh(session.record):
            self.renew(session)
        return session

    # Keys -------------------------------------------------------------------------------------------------------------

    def key_id(self, key: str, owner: Owner) -> str:
        """The id of the session that *owner* calls *key*. Raises ``ValueError`` for what is no key."""
        if not isinstance(key, str) or not is_name(key):
            raise ValueError(f"a key of a session is text, {NAME_LIMITS}; {key!r:.80} is none")
        return tokens.keyed_id(self.namespace, owner.tenant_id, owner.user_id, key)

    def _put_under_key(self, draft: StoredSession) -> StoredSession:
        """Store *draft* under its id, where one may have ended. Raises ``SessionConflict`` if one is active."""
        retry = Retry(draft.id, "created")
        while True:
            draft.record = self._free(draft.record)
            with suppress(SessionConflict):
                # Not as what nobody else saves just so: another process may do that at the same moment, and is not new.
                self.store.save(draft.record, expected=0)
                return draft
            retry.pause()

    def _free(self, new: SessionRecord) -> SessionRecord:
        """Move what ended under the id of *new* to another; returns *new*, which counts on from there and begins later.

        So whoever still has the old one cannot take it for the new one. Raises ``SessionConflict`` if it is active.
        """
        try:
            old = self.store.get(new.id)
        except SerializationError as error:
            self._report_corrupt(new.id, error)
            # Its id says that it is of this tenant; the record cannot any more.
            self._whole_store.delete(new.id)
            return new
        if old is None:
            return new
        if self._lifetime.state(old) == "active":
            if self._is_readable(old):
                raise in_use(new.id)
            self.make_way(old)  # what cannot be read costs that one session, and not its key for good
            return replace(new, version=old.version + 2, created_at=self._lifetime.beginning_after(old))
        if old.end_reason == RESTORING and self.clock() < (old.ended_at or 0.0) + _COPYING:
            # The entries that are on their way must not get into another dialogue.
            raise SessionConflict(f"session {new.id} is just being restored")
        if old.data:
            self._set_aside(old)
        self.store.delete(new.id, expected=old.version)
        return replace(new, version=old.version + 1, created_at=self._lifetime.beginning_after(old))

    def _is_readable(self, record: SessionRecord) -> bool:
        try:
            self._codec.decode(record.data)
        except SerializationError:
            return False
        return True

    def make_way(self, record: SessionRecord) -> None:
        """Free the id of an active session for another state of it, or another session.

        In a namespace of the application's own it goes to another id, ended, with its history; else it is removed. Raises
        ``SessionConflict`` if it was changed, ``StoreError``.
        """
        if self._lifetime.keep_data and record.ended_at is None:
            ended = self._lifetime.ended(record, OVERWRITTEN)
            self.store.save(ended, expected=record.version)  # from now on nothing is appended
            record = ended
        if self._lifetime.keep_data and record.data:
            self._set_aside(record)
        if not self.store.delete(record.id, expected=record.version):
            raise SessionConflict(f"session {record.id} was changed while it was being replaced")

    def _set_aside(self, record: SessionRecord) -> None:
        """Keep a copy of what ended under the id of a key, with its history.

        Under an id that is the same for all who do so at once, or once more after a crash: what that left behind gives way.
        """
        aside = replace(record, id=tokens.set_aside_id(record.id, record.created_at))
        if self._lifetime.awaits(aside):
            if aside.ended_at is None:
                aside = self._lifetime.ended(aside, "expired")
                self._announcer.expired(record)
            # Its handler must not see a part of the history.
            aside = replace(aside, expires_at=max(aside.expires_at, self.clock() + _COPYING))
        with suppress(SessionConflict):
            left = self.store.get(aside.id)
            version = left.version + 1 if left else aside.version
            self.store.save(replace(aside, version=version), expected=left.version if left else 0)
        with suppress(UnsupportedByStore):
            log = self.store.history
            copy_history(log, log, record.id, to=aside.id, same=lambda: self._stored(record) is not None)


def in_use(session_id: str) -> SessionConflict:
    """The error for a new session whose key leads to an active one."""
    return SessionConflict(f"session {session_id} is active already under this key")
