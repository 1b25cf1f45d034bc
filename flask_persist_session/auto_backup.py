"""A background thread that makes backups: one in each process, of which one at a time does the work."""

from __future__ import annotations

import logging
import os
import time

from .announcer import Announcer
from .backup import BackupReport, Managers, back_up
from .backup_files import newest_before
from .sweeper import Recurring, deliver

log = logging.getLogger("flask_persist_session")

_LEASE = "backup"
#: How often it is looked whether a backup is due, as a part of the interval, and in seconds at most.
_LOOKS = 10
_LONGEST_PAUSE = 60.0
#: For so many seconds nobody else backs up, unless the backup is done before.
_LONGEST_LEASE = 3600.0


class AutomaticBackup(Recurring):
    """Makes a backup in *directory* once the newest one there is *interval* seconds old, and keeps *keep* of them.

    So the time counts on when processes are started anew, and a backup that was made by hand counts as well.
    """

    name = "session-backup"
    failure = "the backup of sessions failed; it is tried again"

    def __init__(self, managers: Managers, announcer: Announcer, directory: str, interval: float, keep: int) -> None:
        super().__init__(min(interval / _LOOKS, _LONGEST_PAUSE))
        self._managers = managers
        self._announcer = announcer
        self._directory = directory
        self._between = interval
        self._keep = keep or None
        self._leader = next(iter(managers.values()))

    def turn(self) -> BackupReport | None:
        """Back up if it is due and this process is the one to do it.

        Raises ``BackupError``, ``StoreError``, ``UnsupportedByStore``.
        """
        if not self._is_due() or not self._leader.store.lease(_LEASE, min(self._between, _LONGEST_LEASE)):
            return None
        try:
            # Somebody may have made one before giving up the lease.
            return self._back_up() if self._is_due() else None
        finally:
            self._leader.store.lease(_LEASE, 0)

    def _is_due(self) -> bool:
        now = self._leader.clock()
        newest = newest_before(self._directory, now)
        return newest is None or now - newest >= self._between

    def _back_up(self) -> BackupReport:
        started = time.monotonic()
        report = back_up(self._managers, os.path.join(self._directory, ""), now=self._leader.clock(), keep=self._keep)
        log.info("backed up %d sessions to %s in %.1f s", report.sessions, report.path, time.monotonic() - started)
        deliver(lambda: self._announcer.backed_up(path=report.path, sessions=report.sessions, size=report.bytes))
        return report
