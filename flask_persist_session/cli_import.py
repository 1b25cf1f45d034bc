"""``flask sessions import``: brings over the sessions of Flask-Session."""

from __future__ import annotations

import click

from . import terminal
from .cli import extension, sessions_cli


@sessions_cli.command("import")
@click.option(
    "--from",
    "urls",
    multiple=True,
    metavar="URL",
    help="Where they are, instead of PERSIST_SESSION_UPGRADE_FROM; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Only count what would be imported.")
@click.option("--delete", is_flag=True, help="Remove each session where it was, once it is here.")
def import_command(urls: tuple[str, ...], dry_run: bool, delete: bool) -> None:
    """Import all sessions of Flask-Session at once; their users stay signed in."""
    try:
        with terminal.progress("importing") as advance:
            report = extension().import_sessions(urls, dry_run=dry_run, delete=delete, progress=advance)
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: what was imported is kept; run it again for the others") from None
    verb = "would import" if dry_run else "imported"
    parts = f"{report.already_there:,} already there, {report.expired:,} expired, {report.unreadable:,} unreadable"
    click.echo(f"{verb} {report.imported:,} sessions ({parts})")
