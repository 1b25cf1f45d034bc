"""Whose a session is: it gets a new token when its user signs in or out, and the old one opens nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Literal

from .exceptions import SerializationError, SessionConflict
from .lifecycle import WEB, Lifecycle, Metadata, Retry
from .records import SessionRecord
from .stored import NOBODY, Owner, StoredSession


class Users(Lifecycle):
    """Binds sessions to users; see ``SessionManager``."""

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
        if self.namespace != WEB:
            raise ValueError("only the sessions behind flask.session get new tokens; others keep their id, key and history")
        before = session.record
        moved = self._put(self._draft(session.data, owner, {**before.metadata, **metadata}, before.tags, created_at))
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
        retry = Retry(record.id, "regenerated")
        while True:
            with suppress(SessionConflict):
                self._close(record, "regenerated")
                return True
            retry.pause()
            current = self.get(record.id)
            if current is None:
                return False
            moved.data = self._merge(base, moved.data, current)
            moved.record = self._write(self._next_version(moved.record, self._encode(moved.data)))
            base, record = current.record.data, current.record

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

    # The user in the data ---------------------------------------------------------------------------------------------

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
