"""``flask sessions backup``, ``backups`` and ``restore``: thin commands over the extension."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from . import terminal
from .archive import silent
from .backup import STRATEGIES, BackupReport, RestoreReport, Strategy
from .backup_files import BackupFile
from .cli import check_given, extension, sessions_cli
from .exceptions import StoreError
from .records import SessionQuery


@sessions_cli.command()
@click.argument("path", required=False, metavar="[PATH]")
@click.option("--user", metavar="ID", callback=check_given, help="Only the sessions of this user.")
@click.option("--tenant", metavar="ID", callback=check_given, help="Only the sessions of this tenant.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Only sessions with this tag; repeatable, then with all.")
@click.option("--include-expired", is_flag=True, help="Also sessions that the next cleanup removes.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Then remove all but the newest N archives of the directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for programs.")
def backup(
    path: str | None,
    user: str | None,
    tenant: str | None,
    tags: tuple[str, ...],
    include_expired: bool,
    keep: int | None,
    as_json: bool,
) -> None:
    """Write the sessions to an archive, while the application goes on.

    PATH is a directory or the name of an archive; without it, PERSIST_SESSION_BACKUP_DIR.
    """
    sessions = extension()
    try:
        with terminal.progress("backing up", sessions.store.count(SessionQuery())) as progress:
            report = sessions.backup(
                path,
                user_id=user,
                tenant_id=tenant,
                tags=tags,
                include_expired=include_expired,
                keep=keep,
                progress=progress,
            )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: no archive was written; run it again") from None
    click.echo(json.dumps(asdict(report)) if as_json else _described(report))


def _described(report: BackupReport) -> str:
    lines = [
        f"backed up {report.sessions:,} sessions ({report.active:,} active, {report.expired:,} expired, "
        f"{report.ended:,} ended) to {report.path}, {terminal.size(report.bytes)}"
    ]
    if report.entries:
        lines.append(f"with them {report.entries:,} entries of their histories")
    if report.left_out:
        lines.append(f"left out {report.left_out:,} sessions that are too large for an archive")
    if report.removed:
        lines.append(f"removed {len(report.removed):,} older archives")
    return "\n".join(lines)


@sessions_cli.command()
@click.argument("directory", required=False, metavar="[DIRECTORY]")
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects for programs.")
def backups(directory: str | None, as_json: bool) -> None:
    """List the archives of a directory, and verify each as a whole; the exit status is 1 if one does not verify."""
    found = []
    try:
        for file in extension().backups(directory):
            found.append(file)
            if not as_json:
                click.echo(_line(file))
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: the other archives were not verified; run it again") from None
    if as_json:
        click.echo(json.dumps([_facts(file) for file in found]))
    if any(file.error for file in found):
        sys.exit(1)


def _line(file: BackupFile) -> str:
    size, age = terminal.size(file.bytes), _age(time.time() - file.created_at)
    counted = f"{file.manifest.records:>10,} sessions" if file.manifest else f"{'':>10} broken  "
    verdict = "verified" if file.error is None else file.error
    return f"{terminal.moment(file.created_at)}  {age:>10} {counted}  {size:>9}  {file.path}: {verdict}"


def _facts(file: BackupFile) -> dict[str, Any]:
    manifest = file.manifest
    return {
        "path": file.path,
        "created_at": file.created_at,
        "bytes": file.bytes,
        "sessions": manifest.records if manifest else None,
        "counts": manifest.counts if manifest else None,
        "filters": manifest.filters if manifest else None,
        "verified": file.error is None,
        "error": file.error,
    }


def _age(seconds: float) -> str:
    if seconds < 0:
        return "future"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@sessions_cli.command()
@click.argument("file")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="skip",
    show_default=True,
    help="What becomes of sessions that are there: left, replaced, or replaced if the archive has a later request.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing, only count.")
@click.option("--sign-out", is_flag=True, help="Restore the data, but let nobody be signed in by it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for programs.")
def restore(file: str, strategy: Strategy, dry_run: bool, sign_out: bool, yes: bool, as_json: bool) -> None:
    """Bring back the sessions of the archive FILE, while the application goes on."""
    if not (yes or dry_run):
        click.confirm(f"Restore the sessions of {file}?", abort=True, err=True)
    bar = _LateBar("restoring")
    try:
        with bar:
            report = extension().restore(
                file, strategy=strategy, dry_run=dry_run, sign_out=sign_out, started=bar.start, progress=bar.advance
            )
    except (KeyboardInterrupt, StoreError) as error:
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{terminal.one_line(str(error))}; stopped"
        left = "nothing was changed" if dry_run else "what it restored is complete"
        problem = f"{what} after {bar.done:,} sessions: {left}; run it again for the rest"
        raise (terminal.Interrupted if isinstance(error, KeyboardInterrupt) else click.ClickException)(problem) from None
    click.echo(json.dumps(asdict(report)) if as_json else _told(report))
    if report.failed:
        sys.exit(1)


def _told(report: RestoreReport) -> str:
    verb = "would restore" if report.dry_run else "restored"
    lines = [
        f"{verb} {report.restored:,} of {report.sessions:,} sessions; {report.overwritten:,} overwritten, "
        f"{report.skipped:,} skipped, {report.ended:,} ended since, {report.expired:,} expired, {report.failed:,} failed"
    ]
    if report.entries:
        lines.append(f"with them {report.entries:,} entries of their histories")
    return "\n".join([*lines, *(f"failed: {reason}" for reason in report.reasons)])


# Progress -------------------------------------------------------------------------------------------------------------


class _LateBar:
    """A progress bar whose length is known only after a while."""

    def __init__(self, label: str) -> None:
        self.done = 0
        self._label = label
        self._update: Callable[[int], object] = silent
        self._bar: Any = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def start(self, length: int) -> None:
        self._bar = terminal.progress(self._label, length)
        self._update = self._bar.__enter__()

    def advance(self, count: int) -> None:
        self.done += count
        self._update(count)
