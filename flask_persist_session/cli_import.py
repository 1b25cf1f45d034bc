"""``flask sessions import``: brings over the sessions of Flask-Session."""

from __future__ import annotations

import sys
from typing import Any

import click

from .cli import sessions_cli
from .upgrade import ImportReport

_INTERRUPTED = 130


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
@click.pass_context
def import_command(context: click.Context, urls: tuple[str, ...], dry_run: bool, delete: bool) -> None:
    """Import all sessions of Flask-Session at once; their users stay signed in."""
    try:
        report = _import(urls, dry_run, delete)
    except KeyboardInterrupt:
        click.echo("Interrupted; what was imported is kept. Run the command again for the others.", err=True)
        context.exit(_INTERRUPTED)
    verb = "would import" if dry_run else "imported"
    parts = f"{report.already_there:,} already there, {report.expired:,} expired, {report.unreadable:,} unreadable"
    click.echo(f"{verb} {report.imported:,} sessions ({parts})")


def _import(urls: tuple[str, ...], dry_run: bool, delete: bool) -> ImportReport:
    from .extension import PersistSession

    # How many there are is not known before all of them were looked at.
    bar: Any = click.progressbar(
        (_ for _ in ()), label="sessions", show_pos=True, hidden=not sys.stderr.isatty(), file=sys.stderr
    )
    with bar:
        return PersistSession().import_sessions(urls, dry_run=dry_run, delete=delete, progress=bar.update)
