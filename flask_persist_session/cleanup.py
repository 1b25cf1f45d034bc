"""Removes sessions that have expired and ended ones that were kept long enough, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import filterfalse, islice
from typing import TypeAlias

from .announcer import Announcer
from .exceptions import UnsupportedByStore
from .records import Deletion, SessionQuery, SessionRecord, State
from .stores.base import SessionStore

#: Puts sessions where they are kept after their removal, at a moment in seconds since the epoch.
Archive: TypeAlias = Callable[[list[SessionRecord], float], object]

_BATCH = 500
#: The note in the store of when it was cleaned up last.
NOTE = "cleanup"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndingReport:
    """What became of sessions that had ended, or expired, in a namespace with ``on_end``."""

    processed: int = 0
    """Their handler has returned."""
    short: int = 0
    """They had fewer entries than ``min_entries``, and need no handler."""
    failed: int = 0
    """Their handler raised an exception; it is called again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupReport:
    """What a cleanup removed, or with *dry_run* would remove: sessions that had expired, ended, or were idle too long.

    *endings* is what became of those that went to ``on_end`` instead.
    """

    expired: int = 0
    ended: int = 0
    idle: int = 0
    dry_run: bool = False
    endings: EndingReport = EndingReport()

    @property
    def removed(self) -> int:
        """All of them together."""
        return self.expired + self.ended + self.idle


class Cleanup:
    """One run over a store; see ``SessionManager.cleanup``.

    :param now: the moment at which everything is judged, in seconds since the epoch.
    :param deliver: calls what sends an event, in its own way.
    :param archive: is given each batch and *now* before the batch is removed; nothing of it is removed if this raises.
    :param stays: whether a record stays, whatever its time.
    """

    def __init__(
        self,
        store: SessionStore,
        announcer: Announcer,
        now: float,
        deliver: Callable[[Callable[[], object]], object],
        archive: Archive | None = None,
        stays: Callable[[SessionRecord], bool] = lambda _: False,
    ) -> None:
        self._store = store
        self._announcer = announcer
        self._now = now
        self._deliver = deliver
        self._archive = archive
        self._stays = stays

    def run(self, queries: Iterable[SessionQuery], *, dry_run: bool, stop: Callable[[], bool]) -> CleanupReport:
        """Remove what *queries* find, or with *dry_run* only count."""
        counts: dict[State, int] = {"expired": 0, "ended": 0, "active": 0}
        for query in queries:
            for batch in batches(filterfalse(self._stays, self._store.find(query))):
                if stop():
                    break
                for record in batch if dry_run else self._remove(batch):
                    counts[record.state(self._now)] += 1
                    if not dry_run:
                        self._deliver(partial(self._announce, record))
        report = CleanupReport(expired=counts["expired"], ended=counts["ended"], idle=counts["active"], dry_run=dry_run)
        if not dry_run:
            self._note(stop)
            sums = {"expired": report.expired, "ended": report.ended, "idle": report.idle}
            self._deliver(partial(self._announcer.cleaned_up, **sums))
        return report

    def _note(self, stop: Callable[[], bool]) -> None:
        """Let everybody know when all was cleaned up last."""
        if not stop():
            with suppress(UnsupportedByStore):
                self._store.note(NOTE, self._now)

    def _remove(self, records: list[SessionRecord]) -> list[SessionRecord]:
        """Archive and remove just these versions; returns those that were removed."""
        if self._archive is not None:
            self._archive(records, self._now)
        gone = self._store.delete_many([Deletion(id=record.id, expected=record.version) for record in records])
        return [record for record, removed in zip(records, gone, strict=True) if removed]

    def _announce(self, record: SessionRecord) -> None:
        state = record.state(self._now)
        if state == "expired":
            self._announcer.expired(record)
        elif state == "active":
            self._announcer.ended(record, "idle")


def batches(records: Iterator[SessionRecord]) -> Iterator[list[SessionRecord]]:
    """*records* in lists of at most 500."""
    while batch := list(islice(records, _BATCH)):
        yield batch
