"""Looks sessions up for people: by the beginning of an id, in whatever state, with what is in them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .exceptions import SerializationError, SessionNotFound, UnsupportedByStore
from .lifetime import Lifetime
from .records import HistoryEntry, SessionQuery, SessionRecord, State, is_id_prefix, is_session_id
from .serializers import Codec
from .stores.base import SessionStore

#: How many digits an abbreviated id must have: fewer would name another session tomorrow.
SHORTEST_ID = 8
_DIGITS = re.compile(rf"[0-9a-f]{{{SHORTEST_ID},67}}", re.ASCII)
_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionDetails:
    """All that is known of one session; see ``SessionManager.inspect``."""

    record: SessionRecord
    """As it is stored, but for ``expires_at``, which heeds an absolute timeout that was shortened since."""
    state: State
    data: dict[str, Any] = field(repr=False)
    """The decoded payload, of expired sessions too; ended ones have none."""
    sizes: dict[str, int]
    """The encoded bytes of each key of the data, largest first."""
    awaits: bool = False
    """Whether it stays until the handler ``on_end`` of its namespace has had it."""
    entries: int = 0
    """How many entries its history has."""
    latest: tuple[HistoryEntry, ...] = field(default=(), repr=False)
    """The last few of them."""


class Lookup:
    """Finds sessions of one store; see ``SessionManager.look_up`` and ``inspect``."""

    def __init__(self, store: SessionStore, codec: Codec, lifetime: Lifetime) -> None:
        self._store = store
        self._codec = codec
        self._lifetime = lifetime

    def record(self, session_id: str) -> SessionRecord:
        """The record of an id or the beginning of one, as people copy it, judged now."""
        given = session_id.strip()
        whole = given.lower() if is_session_id(given.lower()) else self._complete(given)
        try:
            record = self._store.get(whole)
        except SerializationError as error:
            raise SerializationError(
                f"session {whole} cannot be read: {error}. Its user goes on with a new session; restore the record from a "
                "backup, or remove it with manager.delete(id)"
            ) from error
        if record is None:
            raise self._missing(whole)
        return self._lifetime.judged(record)

    def details(self, record: SessionRecord) -> SessionDetails:
        """*record* with its data decoded."""
        state = self._lifetime.state(record)
        try:
            data = {} if state == "ended" and not record.data else self._codec.decode(record.data)
        except SerializationError as error:
            raise SerializationError(
                f"the data of session {record.id} cannot be read: {error}. Its user goes on with a new session; set "
                "PERSIST_SESSION_SERIALIZER, SECRET_KEY and PERSIST_SESSION_ENCRYPTION_KEYS as they were when it was "
                "stored, or revoke it"
            ) from error
        return SessionDetails(
            record=record, state=state, data=data, sizes=self._codec.sizes(data), awaits=self._lifetime.awaits(record)
        )

    def _complete(self, given: str) -> str:
        beginning = given.lower()
        if not _DIGITS.fullmatch(beginning):
            # Not repeated as a whole: a token may have been given instead of an id.
            cut = "…" if len(given) > SHORTEST_ID else ""
            raise SessionNotFound(
                f"{given[:SHORTEST_ID]!r}{cut} is no session id: give its 67 hex digits, or at least the first "
                f"{SHORTEST_ID} of them"
            )
        found = self._beginning_with(beginning) if is_id_prefix(beginning) else []
        if len(found) > 1:
            raise SessionNotFound(
                f"{beginning} begins the ids of several sessions: give more digits of {' or '.join(found)}"
            )
        if not found:
            raise self._missing(beginning)
        return found[0]

    def _beginning_with(self, prefix: str) -> list[str]:
        try:
            return [record.id for record in self._store.find(SessionQuery(id_prefix=prefix, limit=2))]
        except UnsupportedByStore as error:
            raise UnsupportedByStore(f"give the whole id, all 67 digits: {error}") from error

    def _missing(self, session_id: str) -> SessionNotFound:
        message = (
            f"no session {session_id}: it never existed, or was removed by a cleanup, which "
            f"takes expired sessions at once and ended ones after {_in_words(self._lifetime.keep_ended)} "
            "(PERSIST_SESSION_KEEP_ENDED)"
        )
        return SessionNotFound(message, missing=True)


def _in_words(seconds: float) -> str:
    """A duration of the settings, in the largest unit in which it is a whole number of 2 or more."""
    whole = ((unit, length) for unit, length in _UNITS if seconds >= 2 * length and seconds % length == 0)
    unit, length = next(whole, ("seconds", 1))
    return f"{seconds / length:,.0f} {unit}"
