"""What the commands say of a session: a row of a table, facts, words, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from . import terminal
from .lifetime import ATTEMPTS, PROCESSED, SUMMARY
from .lookup import SessionDetails
from .monthly_archive import ArchivedSession
from .records import JSON, HistoryEntry, SessionRecord, State
from .session import LAST_SEEN, SIGN_IN

#: So many digits of an id a narrow table shows; the chance that any two of a million sessions share them is 1 %.
SHOWN_DIGITS = 12
#: What the metadata has of devices, which is long.
_DEVICES = (SIGN_IN, LAST_SEEN)
#: What it has of the handler of ended sessions.
_PROCESSING = (SUMMARY, PROCESSED, ATTEMPTS)
#: Why a session ended, for reasons that this package gives.
_REASONS = {
    "revoked": "somebody ended it from outside: an operator or the application",
    "regenerated": "it goes on under another id, as when its user signs in or out",
    "evicted": "its user signed in more often than PERSIST_SESSION_MAX_PER_USER allows, and it was the oldest",
    "rejected": "its user had as many sessions as PERSIST_SESSION_MAX_PER_USER allows",
    "ended": "the application ended it",
    "logout": "its user signed out: the application cleared it",
    "emptied": "the application removed all that was in it",
    "deleted": "somebody deleted it with manager.delete",
}


def columns(now: float) -> list[terminal.Column]:
    """The columns of a list of sessions."""
    column = terminal.Column
    return [
        column("ID", lambda record: record.id, narrowest=SHOWN_DIGITS, mark=""),
        column("STATE", lambda record: _state(record, now), narrowest=15),
        column("USER", lambda record: _name(record.user_id), narrowest=12),
        column("TENANT", lambda record: _name(record.tenant_id), rank=4, narrowest=8),
        column("TAGS", lambda record: _tags(record), rank=5, narrowest=8),
        column("CREATED", lambda record: terminal.relative(record.created_at, now), rank=3),
        column("ACCESSED", lambda record: terminal.relative(record.accessed_at, now), rank=2),
        column("EXPIRES", lambda record: "" if record.ended_at else terminal.relative(record.expires_at, now), rank=1),
        column("SIZE", lambda record: terminal.size(len(record.data)), rank=6),
    ]


def _state(record: SessionRecord, now: float) -> str:
    state = record.state(now)
    return f"{state} ({terminal.escape(record.end_reason or '')})" if state == "ended" else state


def _name(given: str | None) -> str:
    return "" if given is None else terminal.name(given)


def _tags(record: SessionRecord) -> str:
    return ", ".join(map(terminal.name, sorted(record.tags)))


def json_lines(records: Iterator[SessionRecord], now: float) -> Iterator[str]:
    """A list of sessions as lines of JSON."""
    return (json.dumps(as_json(record, record.state(now))) for record in records)


def as_json(record: SessionRecord, state: State) -> dict[str, Any]:
    """What JSON tells of a session; times in seconds since the epoch."""
    return {
        "id": record.id,
        "state": state,
        "user_id": record.user_id,
        "tenant_id": record.tenant_id,
        "tags": sorted(record.tags),
        "metadata": record.metadata,
        "created_at": record.created_at,
        "accessed_at": record.accessed_at,
        "expires_at": record.expires_at,
        "ended_at": record.ended_at,
        "end_reason": record.end_reason,
        "version": record.version,
        "bytes": len(record.data),
    }


def facts(record: SessionRecord, now: float, *, awaits: bool = False) -> Iterator[tuple[str, str]]:
    """What is known of a session, each with a label; *awaits*: it stays until ``on_end`` has had it."""
    yield "session", record.id
    yield "state", _state(record, now)
    yield "user", _name(record.user_id) or "none"
    yield "tenant", _name(record.tenant_id) or "none"
    yield "tags", _tags(record) or "none"
    yield "created", terminal.both(record.created_at, now)
    yield "accessed", terminal.both(record.accessed_at, now)
    if record.ended_at is None:
        yield "expires", terminal.both(record.expires_at, now)
    else:
        yield "ended", terminal.both(record.ended_at, now)
        yield "kept", "until on_end has had it" if awaits else f"until {terminal.both(record.expires_at, now)}"
    yield from _processing(record, now)
    yield "version", f"{record.version:,}"
    yield from ((key, _json(record.metadata[key])) for key in _DEVICES if key in record.metadata)
    told = (*_DEVICES, *(_PROCESSING if record.ended_at is not None else ()))
    others = {key: value for key, value in record.metadata.items() if key not in told}
    yield "metadata", _json(others or None)
    yield "size", terminal.size(len(record.data))


def _processing(record: SessionRecord, now: float) -> Iterator[tuple[str, str]]:
    """What came of ``on_end`` for a session that has ended, each with a label."""
    if record.ended_at is None:
        return
    attempts, moment = record.metadata.get(ATTEMPTS), record.metadata.get(PROCESSED)
    if isinstance(attempts, int):
        yield "attempts", f"{attempts:,}, next at {terminal.both(record.expires_at, now)}"
    if isinstance(moment, (int, float)):
        yield "processed", terminal.both(moment, now)
    if SUMMARY in record.metadata:
        yield "summary", _json(record.metadata[SUMMARY])


def _json(value: JSON) -> str:
    return "none" if value is None else terminal.escape(json.dumps(value, ensure_ascii=False))


def history_facts(details: SessionDetails) -> Iterator[tuple[str, str]]:
    """What is known of the history of a session, each with a label; nothing if it has none."""
    if details.entries:
        shown = len(details.latest)
        yield "entries", f"{details.entries:,}" + (f", the last {shown} of which follow" if shown < details.entries else "")


def entry_heading(entry: HistoryEntry, now: float) -> str:
    """What is above the content of an entry."""
    return f"{entry.seq:,} {terminal.escape(entry.role)}, {terminal.both(entry.created_at, now)}"


def fate(record: SessionRecord, now: float) -> str:
    """What became of a session, to follow its name."""
    expiry = terminal.both(record.expires_at, now)
    state = record.state(now)
    if state == "active":
        return f"is active until {expiry}, or longer if a request renews it"
    if state == "expired":
        return f"expired at {expiry}; its last change or renewal was at {terminal.both(record.accessed_at, now)}"
    meaning = _REASONS.get(record.end_reason or "", "a reason that the application gave")
    reason = terminal.escape(record.end_reason or "")
    return f'ended at {terminal.both(record.ended_at or now, now)} with the reason "{reason}": {meaning}'


# Sessions that are in an archive only ---------------------------------------------------------------------------------


def archived_as_json(archived: ArchivedSession) -> dict[str, Any]:
    """What JSON tells of an archived session: its state when it was archived, and where it is."""
    known = as_json(archived.record, archived.record.state(archived.archived_at))
    return {**known, "archived_at": archived.archived_at, "archive": archived.path}


def archived_facts(archived: ArchivedSession, now: float) -> Iterator[tuple[str, str]]:
    """What is known of an archived session, each with a label."""
    yield "archived", f"{terminal.both(archived.archived_at, now)}, in {terminal.escape(archived.path)}"
    for label, value in facts(archived.record, now):
        yield label, "removed as idle" if label == "state" and _was_idle(archived) else value


def archived_fate(archived: ArchivedSession, now: float) -> str:
    """What became of an archived session, to follow its name."""
    removed = f"removed from the store at {terminal.both(archived.archived_at, now)}"
    if _was_idle(archived):
        last = terminal.both(archived.record.accessed_at, now)
        return f"was idle and {removed}; its last change or renewal was at {last}"
    return f"{fate(archived.record, now)}; {removed}"


def _was_idle(archived: ArchivedSession) -> bool:
    return archived.record.state(archived.archived_at) == "active"
