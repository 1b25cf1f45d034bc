"""``flask sessions check``, ``health`` and ``optimize``: thin commands over the extension."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from . import terminal
from .cli import extension, sessions_cli
from .records import SessionQuery

if TYPE_CHECKING:
    from .upkeep import CheckReport, Health


@sessions_cli.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended without losing anything.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for programs.")
def check(repair: bool, as_json: bool) -> None:
    """Look at everything in the store for what is broken; the exit status is 1 if something is left that is.

    The application may go on meanwhile.
    """
    sessions = extension()
    try:
        with terminal.progress("checking", sessions.store.count(SessionQuery())) as advance:
            report = sessions.check(repair=repair, progress=advance)
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: what was repaired stays so, the rest is as it was; run it again") from None
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        _echo_report(report, repair)
    if report.left:
        raise click.exceptions.Exit(1)


def _echo_report(report: CheckReport, repair: bool) -> None:
    for finding in report.findings:
        state = "repaired" if finding.repaired else "found"
        click.echo(f"{state} {finding.kind}: {terminal.escape(finding.where)}: {terminal.escape(finding.text)}")
    if report.found > len(report.findings):
        click.echo(f"… and {report.found - len(report.findings):,} more")
    outcome = f"{report.found:,} found, {report.repaired:,} repaired" if report.found else "nothing is wrong"
    entries = f" with {report.entries:,} entries" if report.entries else ""
    click.echo(f"checked {report.checked:,} session{'' if report.checked == 1 else 's'}{entries}: {outcome}")
    if report.left and not repair:
        click.echo("--repair mends what can be mended without losing anything; make a backup first", err=True)


@sessions_cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for programs.")
def health(as_json: bool) -> None:
    """Say whether the store can be written and read, and is cleaned up; the exit status is 1 if not."""
    found = extension().health()
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        _echo_health(found, extension().manager.clock())
    if not found.healthy:
        raise click.exceptions.Exit(1)


def _echo_health(found: Health, now: float) -> None:
    click.echo("healthy" if found.healthy else "not healthy")
    for issue in found.issues:
        click.echo(f"issue    {terminal.escape(issue)}")
    click.echo(f"write    {_milliseconds(found.write_seconds)}")
    click.echo(f"read     {_milliseconds(found.read_seconds)}")
    for label, moment in (("cleanup", found.last_cleanup), ("backup", found.last_backup)):
        click.echo(f"{label:<8} {'none is known' if moment is None else terminal.both(moment, now)}")


def _milliseconds(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds * 1000:,.1f} ms"


@sessions_cli.command()
@click.option("--full", is_flag=True, help="Also what requests have to wait for: rewrite the whole database.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects for programs.")
def optimize(full: bool, as_json: bool) -> None:
    """Give back room, and bring the statistics of the database up to date."""
    try:
        with terminal.waiting("tidying up"):
            done = extension().optimize(full=full)
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: nothing is lost; run it again to do the rest") from None
    if as_json:
        click.echo(json.dumps([asdict(improvement) for improvement in done]))
        return
    for improvement in done:
        freed = f", {terminal.size(improvement.freed)} freed" if improvement.freed > 0 else ""
        click.echo(f"{terminal.escape(improvement.text)}{freed}")
    if not done:
        click.echo("there was nothing to do")
