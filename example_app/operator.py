"""A page for those who look after the server: figures, health, the newest sessions, backups. It changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from flask import Blueprint, abort, current_app, render_template, session

from flask_persist_session import PersistSession, SessionRecord, StoreStats, UnsupportedByStore

from .forms import guard

NEWEST = 10

operator = guard(Blueprint("operator", __name__))


@dataclass(frozen=True, slots=True)
class Namespace:
    """What the page shows of the sessions of one kind; *problem* if they cannot be listed."""

    name: str
    stats: StoreStats | None
    newest: Sequence[tuple[SessionRecord, str]]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Archive:
    """A backup, by its file alone: to verify it, it would have to be read as a whole."""

    name: str
    size: int
    made_at: float


@operator.get("/operator")
def show() -> str:
    """Show how the sessions are, to admins."""
    if not is_admin():
        abort(403, "This page is for the operators of this server (CHAT_ADMINS).")
    return render_template(
        "operator.html",
        namespaces=[look_at(name) for name in PersistSession().managers],
        health=PersistSession().health(),
        archives=archives(),
    )


def is_admin() -> bool:
    """Tell whether the user is among those that ``CHAT_ADMINS`` names."""
    return session.get("user_id") in names(current_app.config["CHAT_ADMINS"])


def names(setting: str | Sequence[str]) -> list[str]:
    """Return the names in a setting: a list, or text with commas, as an environment variable has it."""
    if not isinstance(setting, str):
        return list(setting)
    return [name.strip() for name in setting.split(",") if name.strip()]


def look_at(name: str) -> Namespace:
    """Return what is to be shown of a namespace."""
    manager = PersistSession().managers[name]
    try:
        newest = [(record, manager.state(record)) for record in manager.find(order_by="-created_at", limit=NEWEST)]
        return Namespace(name, manager.stats(), newest)
    except UnsupportedByStore as error:
        return Namespace(name, None, [], str(error))


def archives() -> list[Archive]:
    """Return the backups, newest first."""
    folder = Path(current_app.instance_path) / (PersistSession().config.backup_dir or "backups")
    files = [(path.name, path.stat()) for path in folder.glob("*.tar.gz")]
    return sorted((Archive(name, stat.st_size, stat.st_mtime) for name, stat in files), key=lambda made: -made.made_at)


def moment(seconds: float | None) -> str:
    """Write a time as people read it."""
    return "never" if seconds is None else f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
