"""``flask sessions …``: thin commands over the manager."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click
from flask.cli import AppGroup

from .config import parse_duration
from .exceptions import PersistSessionError

if TYPE_CHECKING:
    from .manager import SessionManager


#: How many tenants, and tags, the table of the statistics has.
_MOST_ROWS = 10


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
    """Show how many sessions there are, of which users, tenants and tags, and how large."""
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
        ("size", _size(figures.bytes)),
        ("oldest", _moment(figures.oldest)),
        ("newest", _moment(figures.newest)),
    ):
        click.echo(f"{label:<9} {value:>12}")
    _echo_largest("tenants", figures.tenants)
    _echo_largest("tags", figures.tags)


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


def _manager() -> SessionManager:
    from .extension import PersistSession

    return PersistSession().manager


def _echo_largest(title: str, counts: Mapping[str, int]) -> None:
    """A table of the largest counts, nothing if there are none."""
    if not counts:
        return
    click.echo(f"\n{title}")
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_ROWS]
    for name, count in largest:
        # An empty name would not be seen, and one with control characters could do something to the terminal.
        shown = name if name.isprintable() and name.strip() else repr(name)
        click.echo(f"{count:>12,}  {shown}")
    if len(counts) > len(largest):
        click.echo(f"and {len(counts) - len(largest):,} more")


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
