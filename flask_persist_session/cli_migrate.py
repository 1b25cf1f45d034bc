"""``flask sessions migrate``: brings the sessions of one store into another."""

from __future__ import annotations

import click

from . import terminal
from .cli import extension, sessions_cli
from .records import SessionQuery

#: So many of the sessions that are not alike are named.
_NAMED = 5


@sessions_cli.command()
@click.option("--to", "url", metavar="URL", help="Copy all sessions there, while the application goes on here.")
def migrate(url: str | None) -> None:
    """Copy all sessions to another store, or move the rest over from PERSIST_SESSION_MIGRATE_FROM.

    With --to what is there already is brought up to date, so run it again until nothing is left to copy. A sample is
    compared at the end. Without it, sessions that no request has moved yet are moved from the store that
    PERSIST_SESSION_MIGRATE_FROM names.
    """
    try:
        if url is None:
            _move_rest()
        else:
            _copy_to(url)
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: nothing is lost or half done; run it again for the rest") from None


def _move_rest() -> None:
    with terminal.progress("moving") as advance:
        moved = extension().move_rest(progress=advance)
    click.echo(f"moved {moved:,} sessions; PERSIST_SESSION_MIGRATE_FROM can go once no process writes to the old store")


def _copy_to(url: str) -> None:
    sessions = extension()
    with terminal.progress("copying", sessions.store.count(SessionQuery())) as advance:
        report = sessions.migrate(url, progress=advance)
    parts = f"{report.updated:,} updated, {report.present:,} there already, {report.expired:,} expired and left behind"
    entries = f" with {report.entries:,} entries" if report.entries else ""
    click.echo(f"copied {report.copied:,} sessions{entries} ({parts})")
    if report.only_there:
        number = f"{report.only_there:,} active session" + (" is" if report.only_there == 1 else "s are")
        click.echo(f"{number} only there: of its own, or ended here and cleaned up since an earlier copy")
    if report.different:
        named = ", ".join(report.different[:_NAMED])
        raise click.ClickException(
            f"{len(report.different):,} of {report.compared:,} compared sessions are not alike: {named}; run it again"
        )
    click.echo(f"compared {report.compared:,} sessions with their copies: all alike")
