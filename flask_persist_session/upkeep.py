"""Looks after whole stores: finds and mends what is broken, gives back room, says whether all is well."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from .archive import Progress, silent
from .cleanup import NOTE
from .exceptions import BackupError, SerializationError, StoreError, UnsupportedByStore
from .manager import SessionManager
from .records import Finding, Improvement, SessionRecord
from .stores.base import SessionStore
from .tokens import SHARDS

Managers = Mapping[str, SessionManager]
Result = TypeVar("Result")

#: So many findings a report holds; the others are counted.
MOST_FINDINGS = 1000
#: Seconds after which the answer to a probe counts as slow: requests wait as long.
_SLOW = 1.0
#: So many intervals may pass between two cleanups or backups before they count as overdue.
_PATIENCE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a check found: of *checked* sessions that can be read, with so many *entries*, and of all that is around them.

    *found* is how many findings there were, *repaired* how many of them were mended. *findings* are the first thousand.
    """

    checked: int = 0
    found: int = 0
    repaired: int = 0
    entries: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def left(self) -> int:
        """How many findings were not mended."""
        return self.found - self.repaired


class _Check:
    """One check of several stores, which counts as it goes."""

    def __init__(self, repair: bool, progress: Progress) -> None:
        self._repair = repair
        self._progress = progress
        self._checked = self._found = self._repaired = self._entries = 0
        self._findings: list[Finding] = []

    def look_at(self, manager: SessionManager) -> None:
        for finding in manager.store.check(repair=self._repair, seen=partial(self._see, manager)):
            self._note(finding)

    def _see(self, manager: SessionManager, record: SessionRecord) -> None:
        self._checked += 1
        self._progress(1)
        if history := manager.history_log():
            self._entries += history.count(record.id)
        try:
            manager.decode(record)
        except SerializationError as error:
            hint = "it is told as corrupt to its user's next request, unless a setting or a secret key is put back"
            self._note(Finding(kind="data", where=record.id, text=f"the data cannot be read: {error}; {hint}"))

    def _note(self, finding: Finding) -> None:
        self._found += 1
        self._repaired += finding.repaired
        if len(self._findings) < MOST_FINDINGS:
            self._findings.append(finding)

    def report(self) -> CheckReport:
        return CheckReport(
            checked=self._checked,
            found=self._found,
            repaired=self._repaired,
            entries=self._entries,
            findings=tuple(self._findings),
        )


def check(managers: Managers, *, repair: bool = False, progress: Progress = silent) -> CheckReport:
    """Look at everything that is kept, and with *repair* mend what can be mended without losing anything.

    The application may go on meanwhile. *progress* is called with the number of sessions looked at since the last call.

    Raises ``UnsupportedByStore`` where a store cannot list, ``StoreUnavailable``, ``StoreError``.
    """
    run = _Check(repair, progress)
    for manager in managers.values():
        run.look_at(manager)
    return run.report()


def optimize(managers: Managers, *, full: bool = False) -> tuple[Improvement, ...]:
    """Give back room and bring the databases' statistics up to date; with *full* even if requests must wait for it.

    Raises ``StoreUnavailable``, ``StoreError``.
    """
    return tuple(done for manager in managers.values() for done in manager.store.optimize(full=full))


# Health ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether the sessions can be served, and what is wrong if not.

    Times are in seconds, moments in seconds since the epoch; of several namespaces the worst. ``None`` is what could not
    be found out, or has never been.
    """

    healthy: bool
    issues: tuple[str, ...]
    """What is wrong, each in words."""
    write_seconds: float | None
    """How long a write took."""
    read_seconds: float | None
    """How long it took to look for a session."""
    last_cleanup: float | None
    """When expired sessions were removed last."""
    last_backup: float | None
    """When the newest backup was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPlan:
    """What is known of automatic backups: when the newest was made, given the time now, and the seconds between two."""

    newest: Callable[[float], float | None]
    interval: float


def health(
    managers: Managers,
    *,
    cleanup_interval: float = 0.0,
    backups: BackupPlan | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> Health:
    """Write to each store, read from it, and see when it was cleaned up and backed up last.

    What is written is a note, which is no session and in no list; what is read is a session that nobody has.

    :param cleanup_interval: seconds between two cleanups in the background; 0: there are none.
    :param backups: what is known of automatic backups; ``None``: there are none.
    :param timer: seconds that have passed, for the times that things take.
    """
    run = _Examination(timer)
    writes, reads, cleanups = [], [], []
    for name, manager in managers.items():
        now, store = manager.clock(), manager.store
        writes.append(run.time(f"{name}: a write", partial(store.note, "health", now)))
        reads.append(run.time(f"{name}: a read", partial(store.get, _nobodys_id())))
        cleanups.append(run.attempt(name, partial(run.cleanup, name, store, now, cleanup_interval)))
    return Health(
        write_seconds=_worst(max, writes),
        read_seconds=_worst(max, reads),
        last_cleanup=_worst(min, cleanups),
        last_backup=run.backup(backups, next(iter(managers.values())).clock()) if backups else None,
        issues=tuple(dict.fromkeys(run.issues)),
        healthy=not run.issues,
    )


class _Examination:
    """One examination, which notes what is wrong."""

    def __init__(self, timer: Callable[[], float]) -> None:
        self.issues: list[str] = []
        self._timer = timer

    def attempt(self, what: str, function: Callable[[], Result]) -> Result | None:
        """What *function* returns; ``None`` if the store cannot do that, or fails, which is an issue."""
        try:
            return function()
        except UnsupportedByStore:
            return None
        except StoreError as error:
            self.issues.append(f"{what} failed: {error}")
            return None

    def time(self, what: str, function: Callable[[], object]) -> float | None:
        """How many seconds *function* takes."""

        def timed() -> float:
            start = self._timer()
            function()
            return self._timer() - start

        seconds = self.attempt(what, timed)
        if seconds is not None and seconds > _SLOW:
            self.issues.append(f"{what} took {seconds:.1f} s")
        return seconds

    def cleanup(self, name: str, store: SessionStore, now: float, interval: float) -> float | None:
        """When *store* was cleaned up last; an issue if that is too long ago."""
        last = store.noted(NOTE)
        # Where nobody has cleaned up yet, from the first examination on.
        since = last if last is not None else store.noted("examined")
        if since is None:
            store.note("examined", now)
        elif interval and now - since > _PATIENCE * interval and _can_list(store):
            self.issues.append(
                f"{name}: expired sessions were not removed for {now - since:,.0f} s, though "
                f"PERSIST_SESSION_CLEANUP_INTERVAL is {interval:,.0f} s; is the application running?"
            )
        return last

    def backup(self, plan: BackupPlan, now: float) -> float | None:
        """When the newest backup was made; an issue if that is too long ago."""
        try:
            newest = plan.newest(now)
        except BackupError as error:
            self.issues.append(str(error))
            return None
        if plan.interval and (newest is None or now - newest > _PATIENCE * plan.interval):
            age = "there is no backup" if newest is None else f"the newest backup is {now - newest:,.0f} s old"
            self.issues.append(f"{age}, though PERSIST_SESSION_BACKUP_INTERVAL is {plan.interval:,.0f} s")
        return newest


def _can_list(store: SessionStore) -> bool:
    """Whether there is anything to be cleaned up: what cannot be listed expires by itself."""
    with suppress(UnsupportedByStore):
        store.scan()  # nothing is read yet
        return True
    return False


def _nobodys_id() -> str:
    return f"{secrets.randbelow(SHARDS):03x}{secrets.token_hex(32)}"


def _worst(choose: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None
