"""Brings all sessions of one store, with their histories, into another while the application goes on.

It copies them, or moves over what is left.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice

from .archive import Progress, silent
from .exceptions import SerializationError, SessionConflict, UnsupportedByStore
from .lifetime import is_processed
from .records import Change, SessionQuery, SessionRecord
from .stores.base import SessionStore, check_save
from .stores.history import copy_history
from .stores.migrating import MigratingStore

log = logging.getLogger("flask_persist_session")

_BATCH = 200
#: So many sessions are compared at the end, chosen at random among all.
SAMPLE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """What a migration did: how many sessions were *copied*, *updated* because the source had a later state, *present*
    in the target as they are, and left behind because they had *expired*. *compared* sessions were read again from both
    stores at the end; *different* are the ids of those that are not alike, of those with damaged histories, and of those
    that no store takes, such as a row of SQL whose user somebody changed.
    *only_there* sessions are active in the target and unknown to the source: they began there, or ended here and were
    cleaned up since an earlier copy."""

    copied: int = 0
    updated: int = 0
    present: int = 0
    expired: int = 0
    compared: int = 0
    entries: int = 0
    """Entries of histories that the target has now."""
    different: tuple[str, ...] = ()
    only_there: int = 0

    @property
    def transferred(self) -> int:
        """How many sessions of the source are in the target now."""
        return self.copied + self.updated + self.present


class Migration:
    """One copying of *source* into *target*; see ``run``.

    :param clock: returns the current time in seconds since the epoch.
    :param progress: called with the number of sessions that have been dealt with since the last call.
    :param is_over: whether a record is left behind, because the next cleanup would remove it.
    :param margin: seconds within which what happens to a session need not count as used.
    :param with_history: whether the sessions may have histories, which come along.
    """

    def __init__(
        self,
        source: SessionStore,
        target: SessionStore,
        clock: Callable[[], float],
        progress: Progress = silent,
        *,
        is_over: Callable[[SessionRecord], bool] | None = None,
        margin: float = 60.0,
        with_history: bool = True,
    ) -> None:
        self._source = source
        self._target = target
        self._clock = clock
        self._progress = progress
        self._is_over = is_over or (lambda record: clock() >= record.expires_at)
        self._margin = margin
        self._with_history = with_history
        self._counts: Counter[str] = Counter()
        self._sample: list[str] = []
        self._seen = 0
        #: Ids of sessions that no store takes, and of those whose histories could not be read to the end.
        self._damaged: dict[str, None] = {}

    def run(self) -> MigrationReport:
        """Copy everything, then what has changed meanwhile, then compare a sample.

        It can be interrupted at any point and repeated: what is there already is left alone or brought up to date, and
        what has ended in either store stays ended. Raises ``StoreError``, ``UnsupportedByStore`` where the source
        cannot list.
        """
        started = self._clock()
        self._copy(self._source.scan())
        # What ends does not count as used, so it is asked for by itself.
        self._copy(self._source.find(SessionQuery(accessed_after=started - self._margin)), again=True)
        self._copy(self._source.find(SessionQuery(state="ended", now=started)), again=True)
        compared, different = self._compare()
        return MigrationReport(
            **self._counts,
            compared=compared,
            different=(*different, *self._damaged),
            only_there=self._count_only_there(),
        )

    def _copy(self, records: Iterator[SessionRecord], *, again: bool = False) -> None:
        while batch := list(islice(records, _BATCH)):
            lasting = [record for record in batch if not self._is_over(record)]
            wanted = list(filter(self._can_be_saved, lasting))
            saved = self._target.save_many([Change(record=record, expected=0) for record in wanted])
            for record, is_new in zip(wanted, saved, strict=True):
                self._note(record, "copied" if is_new else self._update(record), again)
                if self._with_history:
                    self._copy_readable_history(record.id)
            if not again:
                self._counts["expired"] += len(batch) - len(lasting)
                self._progress(len(batch))

    def _can_be_saved(self, record: SessionRecord) -> bool:
        try:
            check_save(record, 0)
        except ValueError as error:
            log.warning("a session was not copied: %s", error)
            self._damaged[record.id] = None
            return False
        return True

    def _copy_readable_history(self, session_id: str) -> None:
        try:
            self._copy_history(session_id)
        except SerializationError as error:
            log.warning("the history of session %s was not copied to its end: %s", session_id, error)
            self._damaged[session_id] = None

    def _copy_history(self, session_id: str) -> None:
        """Copy what the target is missing of a history. Raises ``UnsupportedByStore`` if it keeps none."""
        try:
            source = self._source.history
        except UnsupportedByStore:
            return
        if not source.count(session_id):
            return
        target = self._target.history
        before = 0
        for last in target.read(session_id, limit=1, newest=True):
            before = last.seq
            if source.read(session_id, after=last.seq - 1, limit=1) != [last]:
                return  # it goes on there in another way
        self._counts["entries"] += copy_history(source, target, session_id) - before

    def _note(self, record: SessionRecord, outcome: str, again: bool) -> None:
        if again and outcome == "present":
            return  # counted when it was met first
        self._counts[outcome] += 1
        # Reservoir sampling (Vitter's algorithm R): each session is as likely to be in the sample as any other.
        self._seen += 1
        if len(self._sample) < SAMPLE:
            self._sample.append(record.id)
        elif (place := random.randrange(self._seen)) < SAMPLE:
            self._sample[place] = record.id

    def _update(self, record: SessionRecord) -> str:
        """Bring a session that the target has already up to date; say what it took."""
        there = self._target.get(record.id)
        if there is None or not (_is_later(record, there) if there.ended_at is None else _is_done_since(record, there)):
            return "present"
        try:
            self._target.save(replace(record, version=there.version + 1), expected=there.version)
        except SessionConflict:
            return "present"  # it is in use there, so what it has is newer
        return "updated"

    def _compare(self) -> tuple[int, tuple[str, ...]]:
        """How many were compared, and which of them are not alike although neither has changed since."""
        compared, different = 0, []
        for session_id in self._sample:
            here, there = self._source.get(session_id), self._target.get(session_id)
            if here is None or self._is_over(here):
                continue  # gone meanwhile
            compared += 1
            if there is None or not (_alike(here, there) or _is_later(here, there) or _is_later(there, here)):
                different.append(session_id)
        return compared, tuple(different)

    def _count_only_there(self) -> int:
        count = 0
        with suppress(UnsupportedByStore):  # a target that cannot list
            active = self._target.find(SessionQuery(state="active", now=self._clock()))
            while ids := frozenset(record.id for record in islice(active, _BATCH)):
                count += len(ids) - self._source.count(SessionQuery(ids=ids))
        return count


def added_up(reports: Iterable[MigrationReport]) -> MigrationReport:
    """One report of several namespaces."""
    sums, different = Counter[str](), list[str]()
    for report in reports:
        sums.update({field.name: getattr(report, field.name) for field in fields(report) if field.name != "different"})
        different += report.different
    return MigrationReport(**sums, different=tuple(different))


def _is_later(record: SessionRecord, than: SessionRecord) -> bool:
    """Whether *record* is a later state of the session."""
    if (record.ended_at is None) != (than.ended_at is None):
        return record.ended_at is not None
    return (record.accessed_at, record.version) > (than.accessed_at, than.version)


def _is_done_since(record: SessionRecord, there: SessionRecord) -> bool:
    """Whether the handler of ended sessions has had it, in the state in which it is *there*."""
    return is_processed(record) and not is_processed(there) and record.ended_at == there.ended_at


def _alike(record: SessionRecord, other: SessionRecord) -> bool:
    return replace(record, version=1) == replace(other, version=1)


def move_rest(store: MigratingStore, progress: Progress = silent) -> int:
    """Move all sessions over that are still in the old store; see ``PersistSession.move_rest``."""
    moved = 0
    for record in store.old.scan():
        moved += store.move(record.id) is not None
        progress(1)
    return moved
