"""Changes sessions by their id, outside of requests: one, many alike, several or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeAlias

from .cleanup import batches
from .creating import Creating
from .exceptions import SerializationError, SessionConflict
from .lifecycle import Metadata, Retry, check_reason, labels, missing, other_version
from .records import Change, SessionQuery, SessionRecord
from .serializers import dump_metadata
from .stored import Redescribed, StoredSession

Ending: TypeAlias = Literal["ended", "had ended", "missing"]


class Editing(Creating):
    """Changes sessions by their id; see ``SessionManager``."""

    @contextmanager
    def edit(self, session_id: str, expected_version: int | None = None) -> Iterator[StoredSession]:
        """A session to be changed within a ``with``; its ``data``, ``metadata`` and ``tags`` are stored at the end.

        What others change meanwhile is merged. With *expected_version* nothing is: the session must have just that version
        at the beginning, and at most be renewed until the end. If the block raises, nothing is stored.

        Raises ``SessionNotFound`` if the session is not active, at the beginning or at the end, ``SessionConflict`` if it
        has another version, and what ``save`` raises.
        """
        session = self.existing(session_id)
        if expected_version not in (None, session.version):
            raise other_version(session_id, expected_version, session.version)
        yield session
        if expected_version is not None:
            self._save_unmerged(session)
        elif self.save(session) == "discarded":
            raise missing(session_id, self.load(session_id))

    def _save_unmerged(self, session: StoredSession) -> None:
        retry = Retry(session.id, "edited")
        while True:
            with suppress(SessionConflict):
                changed = self._changed(session)
                if changed is None:
                    return
                self.store.save(changed, expected=session.version)
                break
            retry.pause()
            self._go_on_from_renewal(session)
        session.replace_record(changed)
        self._announcer.saved(changed)

    def _go_on_from_renewal(self, session: StoredSession) -> None:
        """Have *session* be at the version that is stored now, if it was only renewed since. Raises as ``edit``."""
        now = self.existing(session.id)
        if now.created_at != session.created_at:
            raise missing(session.id, now)
        if _content(now.record) != _content(session.record):
            raise other_version(session.id, session.version, now.version)
        session.record = now.record

    def _changed(self, session: StoredSession) -> SessionRecord | None:
        """The next version of *session*, ``None`` if it was not changed."""
        plain, redescribed = self._plain(session.data), session.redescribed()
        if redescribed is None and self._codec.unchanged(plain, session.record.data):
            return None
        return self._next_version(session.record, self._codec.seal(plain), redescribed=redescribed)

    # Time -------------------------------------------------------------------------------------------------------------

    def extend(self, session_id: str, seconds: float) -> float:
        """Let a session expire so many seconds later than it would; returns when: seconds since the epoch.

        Its absolute timeout stays. Raises ``ValueError`` for no positive number, ``SessionNotFound`` if it is not active,
        ``StoreError``.
        """
        if not (isinstance(seconds, int | float) and 0 < seconds < float("inf")):
            raise ValueError(f"a session cannot be extended by {seconds!r} seconds; give more than 0")
        return self._reschedule(session_id, "extended", lambda record: self._lifetime.extended(record, seconds))

    def refresh(self, session_id: str) -> float:
        """Renew a session as a request would; returns when it expires now: seconds since the epoch.

        Raises ``SessionNotFound`` if it is not active, ``StoreError``.
        """
        return self._reschedule(
            session_id, "refreshed", lambda record: self._lifetime.saved(record, record.data, renew=True)
        )

    def _reschedule(self, session_id: str, what: str, next_version: Callable[[SessionRecord], SessionRecord]) -> float:
        retry = Retry(session_id, what)
        while True:
            record = self.existing(session_id).record
            changed = next_version(record)
            with suppress(SessionConflict):
                self.store.save(changed, expected=record.version)
                return self._lifetime.judged(changed).expires_at
            retry.pause()

    # Many -------------------------------------------------------------------------------------------------------------

    def update_many(
        self,
        query: SessionQuery,
        *,
        data: Mapping[str, Any] | None = None,
        metadata: Metadata | None = None,
        add_tags: Iterable[str] = (),
        remove_tags: Iterable[str] = (),
    ) -> int:
        """Set keys of the data and of the metadata, add and remove tags, of all active sessions that *query* finds.

        Each is changed on its own, merged with what others change meanwhile; one that ends meanwhile is left. Returns how
        many were changed. It can be interrupted and repeated.

        Raises as ``save`` does, ``UnsupportedByStore`` where the store cannot list, ``ValueError`` for what are no tags.
        """
        redescribed = Redescribed(metadata=dict(metadata or {}), add_tags=labels(add_tags), remove_tags=labels(remove_tags))
        found = batches(self.store.find(query))
        return sum(self._update_batch(batch, dict(data or {}), redescribed) for batch in found)

    def _update_batch(self, records: Sequence[SessionRecord], data: dict[str, Any], redescribed: Redescribed) -> int:
        changes = []
        for record in records:
            if self._lifetime.state(record) == "active":
                changed = self._updated(record, data, redescribed)
                changes += [Change(record=changed, expected=record.version)] if changed else []
        updated = 0
        for change, saved in zip(changes, self.store.save_many(changes), strict=True):
            if saved:
                self._announcer.saved(change.record)
            updated += saved or self._update(change.record, data, redescribed)
        return updated

    def _updated(self, record: SessionRecord, data: dict[str, Any], redescribed: Redescribed) -> SessionRecord | None:
        """The next version of *record*; ``None`` if there is nothing to change in it, or it cannot be read."""
        payload = record.data
        if data:
            try:
                plain = self._plain({**self._codec.decode(payload), **data})
            except SerializationError as error:
                self._report_corrupt(record.id, error)
                return None
            payload = payload if self._codec.unchanged(plain, payload) else self._codec.seal(plain)
        if payload is record.data and redescribed.applied(record) == record:
            return None
        return self._next_version(record, payload, redescribed=redescribed)

    def _update(self, found: SessionRecord, data: dict[str, Any], redescribed: Redescribed) -> bool:
        """Change one that others have changed since it was found; ``False`` if it has ended, whatever its key leads to."""
        session = self.get(found.id)
        if session is None or session.created_at != found.created_at:
            return False
        session.data.update(data)
        described = redescribed.applied(session.record)
        session.metadata.update(described.metadata)
        session.tags.update(redescribed.add_tags)
        session.tags.difference_update(redescribed.remove_tags)
        return self.save(session) == "saved"

    def end_many(self, session_ids: Iterable[str], reason: str = "ended") -> dict[str, Ending]:
        """End sessions as ``end`` does, and say of each id what became of it.

        ``"ended"``: it was active until now; ``"had ended"``: before, or it had expired; ``"missing"``: there is none that
        can be read. Raises as ``end`` does, and ``ValueError`` for a text in place of a list; what was ended until then is.
        """
        check_reason(reason)
        if isinstance(session_ids, str):
            raise ValueError(f"session_ids is the text {session_ids!r:.80}; allowed is a list or set of ids")
        return {session_id: self._end_one(session_id, reason) for session_id in dict.fromkeys(session_ids)}

    def _end_one(self, session_id: str, reason: str) -> Ending:
        if self._end(session_id, reason):
            return "ended"
        return "missing" if self.load(session_id) is None else "had ended"


def _content(record: SessionRecord) -> tuple[object, ...]:
    """What a renewal leaves as it is."""
    return record.data, record.tags, dump_metadata(record.metadata)
