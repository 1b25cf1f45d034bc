"""All policy of sessions, of one namespace on one store, inside and outside of requests. No store knows any of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from itertools import islice
from typing import Any

from .adopting import Adopting
from .cleanup import Cleanup, CleanupReport
from .ending import Ending
from .exceptions import UnsupportedByStore
from .history import History, decode_entry
from .lifecycle import WEB, labels
from .lifetime import is_processed
from .lookup import SessionDetails
from .record_lines import LATEST
from .records import LogEntry, Position, SessionQuery, SessionRecord, State, StoreStats
from .revoking import Revoking
from .stored import StoredSession
from .stores.base import SessionStore
from .stores.history import HistoryLog
from .transaction import Transacting


class SessionManager(Adopting, Revoking, Transacting, Ending):
    """Creates, loads, saves and ends the sessions of one namespace.

    :param store: where the records are kept.
    :param codec: how session data becomes bytes.
    :param namespace: which of the sessions kept there; ``web`` for those behind ``flask.session``.
    :param idle_timeout: returns the seconds after its last request at which a session expires.
    :param absolute_timeout: seconds after creation or sign-in at which it expires whatever happens; ``None``: never.
    :param renew_interval: seconds between two renewals of a session.
    :param keep_ended: seconds for which an ended session is remembered with its reason.
    :param keep_data: whether ended sessions keep their data as long; else it goes at once.
    :param max_bytes: largest encoded payload, largest metadata, and largest encoded entry of a history.
    :param max_entries: how many entries a history may have; 0: any number.
    :param user_key: the key of the session data under which an application keeps its user; ``None``: none.
    :param max_per_user: how many active sessions a user may have within a tenant; 0: any number.
    :param cap_policy: what a sign-in beyond that does: ``evict_oldest`` ends the oldest, ``reject`` refuses it.
    :param max_sessions: how many sessions the store may keep, in whatever state; 0: any number.
    :param archive: is given the sessions that a cleanup is about to remove, and the moment at which it began; if it raises,
        they stay. ``None``: they are removed without.
    :param on_end: is given each session that has ended or expired, with its data, before it may be removed; what it
        returns, JSON, is kept as ``summary`` in the metadata. ``None``: nobody is.
    :param min_entries: only sessions with so many entries in their history.
    :param clock: returns the current time in seconds since the epoch.
    :param sender: sender of the signals; the manager itself if not given.
    """

    # Looking ----------------------------------------------------------------------------------------------------------

    def look_up(self, session_id: str) -> SessionRecord:
        """The record of a session in whatever state, by its id or the beginning of it, 8 digits or more.

        Its expiry heeds an absolute timeout that was shortened since. Raises ``SessionNotFound`` if there is none or more
        than one, ``SerializationError`` if it cannot be read, ``UnsupportedByStore`` for the beginning of an id where the
        store cannot list, ``StoreError``.
        """
        return self._lookup.record(session_id)

    def inspect(self, session: str | SessionRecord, *, entries: int = 0, latest: Sequence[LogEntry] = ()) -> SessionDetails:
        """All that is known of a session in whatever state, for people who look.

        *session* is its id, the beginning of it, or a record that is in the store no more, such as that of an archive;
        *entries* says how many its history had, and *latest* are the last of them. Changes and reports nothing. Raises as
        ``look_up`` does, ``SerializationError`` also for data and entries that cannot be read.
        """
        record = self._lookup.record(session) if isinstance(session, str) else session
        if isinstance(session, str) and (log := self.history_log()):
            entries, latest = log.count(record.id), log.read(record.id, limit=LATEST, newest=True)
        decoded = tuple(decode_entry(self._codec, record.id, entry) for entry in latest)
        return replace(self._lookup.details(record), entries=entries, latest=decoded)

    def judge(self, record: SessionRecord) -> SessionRecord:
        """*record*, as ``find`` gave it, with the expiry that counts now, as ``look_up`` gives it."""
        return self._lifetime.judged(record)

    def find(
        self,
        *,
        ids: Iterable[str] | None = None,
        user_id: object = None,
        tenant_id: object = None,
        tags: Iterable[str] = (),
        state: State | None = None,
        active: bool | None = None,
        created_after: float | None = None,
        created_before: float | None = None,
        accessed_after: float | None = None,
        accessed_before: float | None = None,
        expires_after: float | None = None,
        expires_before: float | None = None,
        text: str | None = None,
        has_history: bool | None = None,
        processed: bool | None = None,
        order_by: str | None = None,
        after: SessionRecord | Position | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> Iterator[SessionRecord]:
        """Yield the records of sessions, a few at a time; ``None`` and empty conditions match everything.

        The conditions are those of ``SessionQuery``; *state* is judged now, and *active* says whether it is ``"active"``.
        *has_history*: whether anything was appended; that costs a look at each. *processed*: whether ``on_end`` has had the
        session; ``False`` are those that it is to have, once they have ended. *after* is the last record of the page
        before, or its position: the next ones in the order are found at the cost of the first.

        Raises ``ValueError`` for an order that is none, *after* without one, and what are no tags; ``UnsupportedByStore``
        where the store cannot list, or has no history, ``StoreError``.
        """
        if active:
            state = "active"
        if state == "active" and (since := self._lifetime.active_since()) is not None:
            created_after = since if created_after is None else max(since, created_after)
        if after is not None and order_by is None:
            raise ValueError("after= is the last record of the page before in an order; give order_by= as well")
        judged_here = active is False or has_history is not None or processed is not None
        query = SessionQuery(
            ids=None if ids is None else frozenset(ids),
            user_id=None if user_id is None else str(user_id),
            tenant_id=None if tenant_id is None else str(tenant_id),
            tags=labels(tags),
            state=state,
            now=self.clock(),
            created_after=created_after,
            created_before=created_before,
            accessed_after=accessed_after,
            accessed_before=accessed_before,
            expires_after=expires_after,
            expires_before=expires_before,
            text=text,
            order_by=order_by,
            limit=limit,
            offset=offset,
        )
        if after is not None:
            query = replace(query, after=query.position(after) if isinstance(after, SessionRecord) else after)
        if not judged_here:
            return self.store.find(query)
        found = self.store.find(replace(query, limit=None, offset=0))
        matching = (record for record in found if self._matches(record, active, has_history, processed))
        return islice(matching, offset, None if limit is None else offset + limit)

    def _matches(
        self, record: SessionRecord, active: bool | None, has_history: bool | None, processed: bool | None
    ) -> bool:
        if active is not None and active != (self._lifetime.state(record) == "active"):
            return False
        if processed is not None and not (is_processed(record) if processed else self._lifetime.awaits(record)):
            return False
        return has_history is None or has_history == bool(self.store.history.count(record.id))

    def history(self, session: str | StoredSession | SessionRecord) -> History:
        """The history of a session, whatever its state; nothing is looked up yet.

        Of an id it is the one that is there under this id. Of a session, or its record, it is that of just this one: where
        its key was used anew since, reading and appending raise ``SessionNotFound``; each reading costs a look at the
        session.

        Raises ``UnsupportedByStore`` where the store keeps none, or for the sessions behind ``flask.session``: their id
        changes at sign-in.
        """
        if self.namespace == WEB:
            raise UnsupportedByStore(
                "the sessions behind flask.session get another id at sign-in, so they have no history; keep it in a "
                'session of a namespace of yours: sessions.namespace("chat")'
            )
        meant = session.record if isinstance(session, StoredSession) else session
        session_id = meant.id if isinstance(meant, SessionRecord) else str(meant)
        return History(
            session_id,
            self.store.history,
            self._codec,
            clock=lambda: self.clock(),
            session=self.existing,
            began=meant.created_at if isinstance(meant, SessionRecord) else None,
            renewed=self._renewed,
            is_there=(lambda: not isinstance(meant, SessionRecord) or self._stored(meant) is not None),
            max_entries=self._max_entries,
            max_bytes=self._max_bytes,
        )

    def history_log(self) -> HistoryLog | None:
        """Where the store keeps the histories of these sessions, ``None`` if there are none."""
        return history_of(self.store, self.namespace)

    def for_tenant(self, tenant_id: object) -> SessionManager:
        """A manager that has this tenant's sessions alone: what others have is missing for it, whatever it is asked.

        What it creates is within the tenant. Raises ``ValueError`` for what is no tenant, or another one than its own.
        """
        owner = self._owner(None, tenant_id)
        if owner.tenant_id is None:
            raise ValueError("for_tenant needs a tenant; None is none, and would match the sessions of all")
        bound = copy(self)
        bound._bind_to(owner.tenant_id, lambda: self.clock())
        return bound

    def stats(self) -> StoreStats:
        """Figures of all sessions. Raises ``UnsupportedByStore`` where the store cannot list, ``StoreError``."""
        return self.store.stats(now=self.clock())

    def decode(self, record: SessionRecord) -> dict[str, Any]:
        """The data in a record; empty for one that ended without. Raises ``SerializationError`` if it cannot be read."""
        return self._codec.decode(record.data) if record.ended_at is None or record.data else {}

    def state(self, record: SessionRecord) -> State:
        """How the session of *record* stands now; ``"expired"`` for all that a cleanup would remove."""
        return "expired" if self._lifetime.is_over(record) else self._lifetime.state(record)

    def is_over(self, record: SessionRecord) -> bool:
        """Whether a cleanup would remove *record* now: its time is up, and ``on_end``, if there is one, has had it."""
        return self._lifetime.is_over(record)

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
        meanwhile stays. If there is an archive, each batch is in it before it is removed. In a namespace with ``on_end``
        nothing goes that this has not had, and what is due for it is handed over at the end, see ``process_ended``.

        Raises ``ValueError`` for an *older_than* that is no number, ``UnsupportedByStore`` where the store cannot list,
        ``StoreError``, ``BackupError`` if the archive cannot be written, which removes nothing of the batch, and what a
        receiver raises.
        """
        now = self.clock()
        run = Cleanup(self.store, self._announcer, now, deliver, self._archive, self._lifetime.awaits)
        report = run.run(self._cleanup_queries(now, older_than), dry_run=dry_run, stop=stop)
        if dry_run:
            return report
        return replace(report, endings=self.process_ended(older_than=older_than, deliver=deliver, stop=stop))


def history_of(store: SessionStore, namespace: str) -> HistoryLog | None:
    """The histories in the *store* of a namespace, ``None`` if it has none."""
    if namespace != WEB:
        with suppress(UnsupportedByStore):
            return store.history
    return None
