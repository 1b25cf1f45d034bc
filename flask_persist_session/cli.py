"""``flask sessions …``: thin commands over the manager."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click
from flask.cli import AppGroup

from .config import parse_duration
from .exceptions import PersistSessionError

if TYPE_CHECKING:
    from .extension import PersistSession
    from .manager import SessionManager


class _SessionsGroup(AppGroup):
    """Tells errors of the settings and the store in one line, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PersistSessionError as error:
            raise click.ClickException(str(error)) from error


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.group("sessions", cls=_SessionsGroup)
def sessions_cli() -> None:
    """Look after the sessions that the application keeps on the server."""


@sessions_cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for programs.")
def stats(as_json: bool) -> None:
    """Show how many sessions there are, of how many users, and how large."""
    figures = _manager().stats()
    if as_json:
        click.echo(json.dumps(asdict(figures)))
        return
    for label, value in (
        ("sessions", f"{figures.total:,}"),
        ("active", f"{figures.active:,}"),
        ("expired", f"{figures.expired:,}"),
        ("ended", f"{figures.ended:,}"),
        ("users", f"{figures.users:,}"),
        ("size", describe_size(figures.bytes)),
        ("oldest", describe_moment(figures.oldest)),
        ("newest", describe_moment(figures.newest)),
    ):
        click.echo(f"{label:<9} {value:>12}")


@sessions_cli.command()
@click.option("--dry-run", is_flag=True, help="Only count what would be removed.")
@click.option(
    "--older-than",
    type=_duration,
    metavar="DURATION",
    help="Also remove active sessions without a request for so long, such as 90m, 24h or 7d.",
)
def cleanup(dry_run: bool, older_than: float | None) -> None:
    """Remove sessions that have expired, and ended ones that were kept long enough."""
    report = _manager().cleanup(older_than=older_than, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    parts = f"{report.expired:,} expired, {report.ended:,} ended, {report.idle:,} idle"
    click.echo(f"{verb} {report.removed:,} sessions ({parts})")


def extension() -> PersistSession:
    """The extension, for the current application."""
    from .extension import PersistSession

    return PersistSession()


def _manager() -> SessionManager:
    return extension().manager


def describe_size(count: int) -> str:
    """So many bytes in the unit that suits."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def describe_moment(seconds: float | None) -> str:
    """A moment in seconds since the epoch as a date in UTC."""
    if seconds is None:
        return "none"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
