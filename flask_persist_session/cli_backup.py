"""``flask sessions backup``, ``backups`` and ``restore``: thin commands over the extension."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import click

from . import terminal
from .archive import Progress, silent
from .backup import STRATEGIES, BackupReport, RestoreReport, Strategy
from .backup_files import BackupFile
from .cli import check_given, extension, sessions_cli
from .exceptions import StoreError
from .records import SessionQuery


def check_place(context: click.Context, argument: click.Parameter, value: str | None) -> str | None:
    """A path. An empty one comes from a variable that is not set, and would be the directory that cron happens to be in."""
    if value == "":
        raise click.BadParameter("it is empty; is a variable not set?", context, argument)
    return value


@sessions_cli.command()
@click.argument("path", required=False, metavar="[PATH]", callback=check_place)
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
        lines.append(f"removed {len(report.removed):,} older archive{'' if len(report.removed) == 1 else 's'}")
    return "\n".join(lines)


@sessions_cli.command()
@click.argument("directory", required=False, metavar="[DIRECTORY]", callback=check_place)
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects for programs.")
def backups(directory: str | None, as_json: bool) -> None:
    """List the archives of a directory, and verify each as a whole; the exit status is 1 if one does not verify."""
    found: list[BackupFile] = []
    try:
        with terminal.progress("verifying") as advance:
            # One by one: those that were verified before an interruption are listed.
            for file in extension().backups(directory, progress=advance):
                found.append(file)
    except KeyboardInterrupt:
        if not as_json:
            _echo_files(found, as_json)
        raise terminal.Interrupted("interrupted: the other archives were not verified; run it again") from None
    _echo_files(found, as_json)
    if not found and not as_json:
        click.echo(f"no backups in {directory or 'PERSIST_SESSION_BACKUP_DIR'}", err=True)
    if any(file.error for file in found):
        sys.exit(1)


def _echo_files(files: list[BackupFile], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([_facts(file) for file in files]))
    else:
        for file in files:
            click.echo(_line(file))


def _line(file: BackupFile) -> str:
    size, age = terminal.size(file.bytes), _age(time.time() - file.created_at)
    counted = f"{file.manifest.records:>10,} sessions" if file.manifest else f"{'':>10} broken  "
    verdict = "verified" if file.error is None else terminal.one_line(file.error)
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
        _confirm(f"Restore the sessions of {file}?")
    bars = _Bars()
    try:
        with bars:
            report = extension().restore(
                file,
                strategy=strategy,
                dry_run=dry_run,
                sign_out=sign_out,
                verified=bars.verified,
                started=bars.start,
                progress=bars.advance,
            )
    except (KeyboardInterrupt, StoreError) as error:
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{terminal.one_line(str(error))}; stopped"
        left = "nothing was changed" if dry_run else "what it restored is complete"
        problem = f"{what} after {bars.done:,} sessions: {left}; run it again for the rest"
        raise (terminal.Interrupted if isinstance(error, KeyboardInterrupt) else click.ClickException)(problem) from None
    click.echo(json.dumps(asdict(report)) if as_json else _told(report))
    if report.failed:
        sys.exit(1)


def _confirm(question: str) -> None:
    try:
        click.confirm(question, abort=True, err=True)
    except click.Abort:
        raise click.ClickException(
            "nothing was restored; where there is no terminal to ask on, confirm with --yes"
        ) from None


def _told(report: RestoreReport) -> str:
    verb = "would restore" if report.dry_run else "restored"
    lines = [
        f"{verb} {report.restored:,} of {report.sessions:,} sessions; {report.overwritten:,} overwritten, "
        f"{report.skipped:,} skipped, {report.ended:,} ended since, {report.expired:,} expired, {report.failed:,} failed"
    ]
    if report.entries:
        lines.append(f"with them {report.entries:,} entries of their histories")
    return "\n".join([*lines, *(f"failed: {terminal.one_line(reason)}" for reason in report.reasons)])


# Progress -------------------------------------------------------------------------------------------------------------


class _Bars(ExitStack):
    """A bar while an archive is verified, then another one, whose length is known by then, while it is restored."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0
        self.verified = self.enter_context(terminal.progress("verifying"))
        self._update: Progress = silent

    def start(self, length: int) -> None:
        self.close()
        self._update = self.enter_context(terminal.progress("restoring", length))

    def advance(self, count: int) -> None:
        self.done += count
        self._update(count)
