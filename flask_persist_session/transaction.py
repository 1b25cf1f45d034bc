"""Changes of several sessions that are stored together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .editing import Editing
from .lifecycle import check_reason, labels
from .records import JSON, Change
from .stored import StoredSession


class Transaction:
    """What is to be stored together; see ``SessionManager.transaction``."""

    def __init__(self, load: Callable[[str], StoredSession], draft: Callable[..., StoredSession]) -> None:
        self._load = load
        self._draft = draft
        self.sessions: dict[str, StoredSession] = {}
        """The sessions that were asked for, by their id."""
        self.created: list[StoredSession] = []
        """Those that are to be created."""
        self.reasons: dict[str, str] = {}
        """Why sessions are to be ended, by their id; ``"deleted"`` if they are to be deleted."""

    def get(self, session_id: str) -> StoredSession:
        """An active session, whose data, metadata and tags may be changed. Raises ``SessionNotFound``, ``StoreError``."""
        if session_id not in self.sessions:
            self.sessions[session_id] = self._load(session_id)
        return self.sessions[session_id]

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
        """A session that is to be created; arguments and errors are those of ``SessionManager.create``."""
        session = self._draft(
            data, user_id=user_id, tenant_id=tenant_id, metadata=metadata, tags=tags, lifetime=lifetime, key=key
        )
        self.created.append(session)
        return session

    def end(self, session_id: str, reason: str = "ended") -> None:
        """End an active session, with what was changed in it.

        Raises ``SessionNotFound``, ``StoreError``, ``ValueError`` as ``SessionManager.end``.
        """
        check_reason(reason)
        self.reasons[self.get(session_id).id] = reason

    def delete(self, session_id: str) -> None:
        """Delete an active session. Raises ``SessionNotFound``, ``StoreError``."""
        self.reasons[self.get(session_id).id] = "deleted"


class Transacting(Editing):
    """Stores changes of several sessions together; see ``SessionManager``."""

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Several sessions to be changed within a ``with``, all of which are stored at the end, or none.

        None if the block raises, if one of those that are changed was changed by others since ``get``, or if the process
        ends in the middle. What was only read may have been changed by others.

        Raises ``SessionConflict`` in that case: run the block once more. Also what ``save`` raises for what cannot be kept,
        ``UnsupportedByStore`` where the store cannot, ``SessionLimitReached`` if the store is full, ``ValueError`` for a
        session of a user if ``max_per_user`` is to refuse sign-ins: that can only be decided after storing.
        """
        run = Transaction(self.existing, self._draft_in_transaction)
        yield run
        for _session in run.created:
            self._store_cap.admit()
        edited = [(session, changed) for session, changed in self._edited(run) if changed.version > session.version]
        ended = [session for session_id, session in run.sessions.items() if session_id in run.reasons]
        changes = [
            *(Change(record=changed, expected=session.version) for session, changed in edited),
            *(self._ending(session, run.reasons[session.id]) for session in ended),
            *(Change(record=session.record, expected=0) for session in run.created),
        ]
        if changes:
            self.store.transaction(changes)
        for session, changed in edited:
            session.replace_record(changed)
            self._announcer.saved(changed)
        for session in ended:
            self._tell_ended(session, run.reasons[session.id])
        for session in run.created:
            self._store_cap.count()
            self._announcer.created(session.record)
            self._user_cap.evict(session.record)

    def _draft_in_transaction(
        self,
        data: dict[str, Any] | None,
        *,
        user_id: object,
        tenant_id: object,
        metadata: Mapping[str, JSON] | None,
        tags: Iterable[str],
        lifetime: float | None,
        key: str | None,
    ) -> StoredSession:
        owner = self._owner(user_id, tenant_id)
        self._user_cap.check_undecided(owner.user_id)
        key_id = None if key is None else self.key_id(key, owner)
        draft = self._draft(data or {}, owner, self._description(metadata, lifetime), labels(tags), key_id=key_id)
        if key_id is not None:
            draft.record = self._free(draft.record)
        return draft

    def _edited(self, run: Transaction) -> Iterator[tuple[StoredSession, Any]]:
        for session in run.sessions.values():
            if session.id not in run.reasons:
                yield session, self._changed(session) or session.record

    def _ending(self, session: StoredSession, reason: str) -> Change:
        forget = reason == "deleted"
        last = session.record if forget else self._changed(session) or session.record
        ended = self._lifetime.ended(replace(last, version=session.version), reason, forget=forget)
        return Change(record=ended, expected=session.version)

    def _tell_ended(self, session: StoredSession, reason: str) -> None:
        if reason == "deleted":
            self._forget_history(session.id)
            self._announcer.deleted(session.id, session.user_id)
        else:
            self._announcer.ended(session.record, reason)
