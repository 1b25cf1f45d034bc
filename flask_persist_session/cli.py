"""``flask sessions …``: thin commands over the manager."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import click
from flask import current_app
from flask.cli import AppGroup

from . import describe, terminal
from .config import parse_duration
from .exceptions import PersistSessionError, SerializationError, SessionNotFound
from .lifecycle import WEB
from .records import SessionRecord, State

if TYPE_CHECKING:
    from .extension import PersistSession
    from .lookup import SessionDetails
    from .manager import SessionManager
    from .monthly_archive import ArchivedSession

_NAMESPACE = "flask_persist_session.namespace"
#: So many users a question names.
_NAMED = 5
#: How many tenants, and tags, the table of the statistics has.
_MOST_ROWS = 10


class _SessionsGroup(AppGroup):
    """Tells errors of the settings and the store in one line, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PersistSessionError as error:
            raise click.ClickException(terminal.one_line(str(error))) from error


def _age(text: str) -> float:
    """Seconds of a duration with its unit: 7 might be meant as days, and would sign nearly everybody out."""
    try:
        age = parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if age and text.strip()[-1].isdigit():
        raise click.BadParameter(f"{text!r} has no unit; write a number and s, m, h, d or w, such as 90m, 24h or 7d")
    return age


def check_given(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """The id of a user or tenant. Nobody has an empty one: it comes from a variable that is not set."""
    if value == "":
        raise click.BadParameter("it is empty, and no id is; is a variable not set?", context, option)
    return value


@click.group("sessions", cls=_SessionsGroup)
def sessions_cli() -> None:
    """Look after the sessions that the application keeps on the server.

    Where a command takes an ID, its first 8 digits or more will do, if no other session has them.
    """


def _remember_namespace(context: click.Context, option: click.Parameter, value: str) -> None:
    context.meta[_NAMESPACE] = value


#: Gives a command the option that decides which manager it is about.
in_namespace = click.option(
    "--namespace",
    metavar="NAME",
    default=WEB,
    callback=_remember_namespace,
    expose_value=False,
    help="Sessions of this namespace of the application's own, not those of flask.session.",
)


# Looking --------------------------------------------------------------------------------------------------------------


@sessions_cli.command("list")
@in_namespace
@click.option("--user", metavar="USER", callback=check_given, help="Only sessions of this user.")
@click.option("--tenant", metavar="TENANT", callback=check_given, help="Only sessions within this tenant.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Only sessions with this tag; can be repeated.")
@click.option("--state", type=click.Choice(["active", "expired", "ended"]), help="Only sessions in this state.")
@click.option(
    "--sort",
    type=click.Choice(["created", "accessed", "expires"]),
    help="Latest first by this time; created if not given, but with --limit 0 in no order.",
)
@click.option("--reverse", is_flag=True, help="Earliest first.")
@click.option(
    "--limit", type=click.IntRange(min=0), default=50, show_default=True, metavar="N", help="At most N; 0 shows all."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line for programs, without the data.")
def list_sessions(
    user: str | None,
    tenant: str | None,
    tags: tuple[str, ...],
    state: State | None,
    sort: str | None,
    reverse: bool,
    limit: int,
    as_json: bool,
) -> None:
    """List sessions: whose they are, their state and times."""
    manager = _manager()
    # All at once need no order, and only without one does every store give them a few at a time.
    key = sort or ("created" if limit or reverse else None)
    found = manager.find(
        user_id=user,
        tenant_id=tenant,
        tags=tags,
        state=state,
        order_by=key and f"{'' if reverse else '-'}{key}_at",
        limit=limit + 1 if limit else None,
    )
    records = map(manager.judge, found)
    shown = islice(records, limit or None)
    now = manager.clock()
    lines = (
        describe.json_lines(shown, now)
        if as_json
        else terminal.table(describe.columns(now), shown, terminal.terminal_width())
    )
    empty = True
    for line in lines:
        click.echo(line)
        empty = False
    if empty:
        click.echo("no such sessions" if user or tenant or tags or state else "no sessions", err=True)
    elif next(records, None) is not None:
        click.echo("… and more; --limit 0 shows all", err=True)


@sessions_cli.command()
@in_namespace
@click.argument("session_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for programs.")
def show(session_id: str, as_json: bool) -> None:
    """Show everything known of a session, with the data in it.

    The data belongs to the session's user and may be secret: mind who looks on, and where the output goes.
    """
    manager = _manager()
    now = manager.clock()
    details, archived = _find(session_id)
    if as_json:
        known = describe.archived_as_json(archived) if archived else describe.as_json(details.record, details.state)
        more = {"data": details.data, "sizes": details.sizes, "entries": details.entries}
        latest = [asdict(entry) for entry in details.latest]
        click.echo(json.dumps({**known, **terminal.plain({**more, "latest": latest})}))
        return
    facts = (
        describe.archived_facts(archived, now) if archived else describe.facts(details.record, now, awaits=details.awaits)
    )
    for label, value in (*facts, *describe.history_facts(details)):
        click.echo(f"{label:<9} {value}")
    for key, size in details.sizes.items():
        click.echo(f"\n{terminal.escape(repr(key))}: {terminal.size(size)}")
        for line in terminal.pretty(details.data[key], terminal.terminal_width() - 2):
            click.echo(f"  {line}")
    for entry in details.latest:
        click.echo(f"\n{describe.entry_heading(entry, now)}")
        for line in terminal.pretty(entry.content, terminal.terminal_width() - 2):
            click.echo(f"  {line}")


@sessions_cli.command()
@in_namespace
@click.argument("session_id", metavar="ID")
def why(session_id: str) -> None:
    """Say whether a session is active and until when, or why it ended and when."""
    details, archived = _find(session_id)
    now = _manager().clock()
    fate = describe.archived_fate(archived, now) if archived else describe.fate(details.record, now)
    click.echo(f"session {details.record.id} of {terminal.owner(details.record)} {fate}")


def _find(session_id: str) -> tuple[SessionDetails, ArchivedSession | None]:
    """All that is known of a session, and whether that is from an archive, because the store has it no more."""
    manager = _manager()
    try:
        return manager.inspect(session_id), None
    except SessionNotFound as error:
        archived = _search_archives(session_id) if error.missing else None
        if archived is None:
            raise _pointing_elsewhere(error, session_id) from None
        return manager.inspect(archived.record, entries=archived.entries, latest=archived.latest), archived


def _pointing_elsewhere(error: SessionNotFound, session_id: str) -> SessionNotFound:
    """*error* with the namespaces that have a session of that id, if there are any."""
    names = [name for name, manager in extension().managers.items() if error.missing and _has(manager, session_id)]
    if not names:
        return error
    hints = " or ".join(f"--namespace {name}" for name in names)
    return SessionNotFound(f"no session {session_id.strip()} here, but there is one with {hints}", missing=True)


def _has(manager: SessionManager, session_id: str) -> bool:
    try:
        manager.look_up(session_id)
    except SessionNotFound:
        return False
    except SerializationError:
        return True  # the command with this namespace tells why it cannot be read
    return True


def _search_archives(beginning: str) -> ArchivedSession | None:
    archive = extension().archive
    if archive is None:
        return None
    try:
        with terminal.progress("searching the archives", archive.size()) as advance:
            return archive.search(beginning, advance)
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: the archives were not searched to the end; run it again") from None


@sessions_cli.command()
@in_namespace
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
        ("size", terminal.size(figures.bytes)),
        ("oldest", terminal.moment(figures.oldest)),
        ("newest", terminal.moment(figures.newest)),
    ):
        click.echo(f"{label:<9} {value:>12}")
    _echo_largest("tenants", figures.tenants)
    _echo_largest("tags", figures.tags)


# Ending and removing --------------------------------------------------------------------------------------------------


@sessions_cli.command()
@in_namespace
@click.argument("session_ids", metavar="[ID]...", nargs=-1)
@click.option("--user", metavar="USER", callback=check_given, help="All sessions of this user.")
@click.option("--tenant", metavar="TENANT", callback=check_given, help="With --user: only those within this tenant.")
@click.option("--all", "everybody", is_flag=True, help="All sessions of everybody.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def revoke(session_ids: tuple[str, ...], user: str | None, tenant: str | None, everybody: bool, yes: bool) -> None:
    """End sessions: their users are signed out, and the next request of each reads the reason "revoked"."""
    if tenant is not None and user is None:
        raise click.UsageError("--tenant goes with --user; a whole tenant cannot be revoked at once")
    if bool(session_ids) + (user is not None) + everybody != 1:
        raise click.UsageError("give either ids, or --user, or --all")
    manager = _manager()
    if everybody:
        _revoke_all(manager, yes)
    elif user is not None:
        _revoke_user(manager, user, tenant, yes)
    else:
        _revoke_ids(manager, session_ids, yes)


def _revoke_ids(manager: SessionManager, session_ids: tuple[str, ...], yes: bool) -> None:
    found: dict[str, SessionRecord] = {}
    unknown = 0
    for session_id in session_ids:
        try:
            record = manager.look_up(session_id)
        except (SessionNotFound, SerializationError) as error:
            told = _pointing_elsewhere(error, session_id) if isinstance(error, SessionNotFound) else error
            click.echo(f"Error: {terminal.one_line(str(told))}", err=True)
            unknown += 1
        else:
            found[record.id] = record
    if found:
        _confirm(f"Revoke {len(found):,} session{'s' if len(found) > 1 else ''} of {_owners(found.values())}?", yes)
        ended = sum(manager.revoke(session_id) for session_id in found)
        idle = len(found) - ended
        click.echo(f"revoked {_count(ended)}" + (f"; {idle:,} had ended or expired before" if idle else ""))
    if unknown:
        raise click.exceptions.Exit(1)


def _revoke_user(manager: SessionManager, user: str, tenant: str | None, yes: bool) -> None:
    active = sum(1 for _ in manager.find(user_id=user, tenant_id=tenant, state="active"))
    where = "" if tenant is None else f" of tenant {tenant!r}"
    if not active:
        raise click.ClickException(f"user {user!r}{where} has no active session; the id is what `list` shows under USER")
    _confirm(f"Revoke {_count(active)} of user {user!r}{where}?", yes)
    click.echo(f"revoked {_count(manager.revoke_user(user, tenant))}")


def _revoke_all(manager: SessionManager, yes: bool) -> None:
    active = manager.stats().active
    _confirm(f"Revoke {_count(active)}, those of all users and visitors of {current_app.name!r}?", yes)
    try:
        with terminal.progress("revoking", active) as advance:
            ended = manager.revoke_all(on_batch=advance)
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: what was revoked stays so; run it again for the rest") from None
    click.echo(f"revoked {_count(ended)}")


@sessions_cli.command()
@click.option("--dry-run", is_flag=True, help="Only count what would be removed.")
@click.option(
    "--older-than",
    type=_age,
    metavar="DURATION",
    help="Also remove active sessions without a request for so long and a renewal interval, such as 90m, 24h or 7d.",
)
@click.option(
    "--namespace",
    "only",
    metavar="NAME",
    help="Only sessions of this namespace; if not given, of all, but --older-than counts for those of flask.session.",
)
def cleanup(dry_run: bool, older_than: float | None, only: str | None) -> None:
    """Remove sessions that have expired, and ended ones that were kept long enough."""
    managers = extension().managers if only is None else {only: _manager_of(only)}
    try:
        for name, manager in managers.items():
            # Who signs people out after a day of rest does not mean their dialogues of last week.
            age = older_than if name == (only or WEB) else None
            _clean_up(name, manager, age, dry_run)
    except KeyboardInterrupt:
        raise terminal.Interrupted("interrupted: what was removed is gone; run it again for the rest") from None


def _clean_up(name: str, manager: SessionManager, older_than: float | None, dry_run: bool) -> None:
    report = manager.cleanup(older_than=older_than, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    parts = f"{report.expired:,} expired, {report.ended:,} ended, {report.idle:,} idle"
    noun = "session" if report.removed == 1 else "sessions"
    click.echo(f"{verb} {report.removed:,} {noun}{'' if name == WEB else f' of {name}'} ({parts})")
    endings = report.endings
    if endings.processed or endings.short or endings.failed:
        click.echo(f"  on_end: {endings.processed:,} processed, {endings.short:,} too short, {endings.failed:,} failed")


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.ClickException("nothing was revoked: there is no terminal to ask on, so confirm with --yes")
    click.confirm(question, abort=True, err=True)


def _count(number: int) -> str:
    return f"{number:,} active session{'' if number == 1 else 's'}"


def _owners(records: Iterable[SessionRecord]) -> str:
    owners = list(dict.fromkeys(map(terminal.owner, records)))
    more = f" and {len(owners) - _NAMED:,} others" if len(owners) > _NAMED else ""
    return ", ".join(owners[:_NAMED]) + more


def extension() -> PersistSession:
    """The extension, for the application that the command is for."""
    from .extension import PersistSession

    return PersistSession()


def _manager() -> SessionManager:
    return _manager_of(click.get_current_context().meta.get(_NAMESPACE, WEB))


def _manager_of(name: str) -> SessionManager:
    managers = extension().managers
    if name not in managers:
        raise click.ClickException(f"the application has no namespace {name!r}; it has {', '.join(managers)}")
    return managers[name]


def _echo_largest(title: str, counts: Mapping[str, int]) -> None:
    """A table of the largest counts, nothing if there are none."""
    if not counts:
        return
    click.echo(f"\n{title}")
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_ROWS]
    for name, count in largest:
        click.echo(f"{count:>12,}  {terminal.name(name)}")
    if len(counts) > len(largest):
        click.echo(f"and {len(counts) - len(largest):,} more")
