"""Looks sessions up for people: by the beginning of an id, in whatever state, with what is in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .exceptions import SerializationError, SessionNotFound
from .lifetime import Lifetime
from .records import SessionQuery, SessionRecord, State, is_id_prefix, is_session_id
from .serializers import Codec
from .stores.base import SessionStore

#: How many digits an abbreviated id must have: fewer would name another session tomorrow.
SHORTEST_ID = 8


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


class Lookup:
    """Finds sessions of one store; see ``SessionManager.look_up`` and ``inspect``."""

    def __init__(self, store: SessionStore, codec: Codec, lifetime: Lifetime) -> None:
        self._store = store
        self._codec = codec
        self._lifetime = lifetime

    def record(self, session_id: str) -> SessionRecord:
        """The record of an id or the beginning of one, judged now."""
        whole = session_id if is_session_id(session_id) else self._complete(session_id)
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
            data = {} if state == "ended" else self._codec.decode(record.data)
        except SerializationError as error:
            raise SerializationError(
                f"the data of session {record.id} cannot be read: {error}. Its user goes on with a new session; set "
                "PERSIST_SESSION_SERIALIZER and SECRET_KEY as they were when it was stored, or revoke it"
            ) from error
        return SessionDetails(record=record, state=state, data=data, sizes=self._codec.sizes(data))

    def _complete(self, beginning: str) -> str:
        if len(beginning) < SHORTEST_ID or not is_id_prefix(beginning):
            # Not repeated as a whole: a token may have been given instead of an id.
            cut = "…" if len(beginning) > SHORTEST_ID else ""
            raise SessionNotFound(
                f"{beginning[:SHORTEST_ID]!r}{cut} is no session id: give its 67 lower-case hex digits, or at least the "
                f"first {SHORTEST_ID} of them"
            )
        found = [record.id for record in self._store.find(SessionQuery(id_prefix=beginning, limit=2))]
        if len(found) > 1:
            raise SessionNotFound(
                f"{beginning} begins the ids of several sessions: give more digits of {' or '.join(found)}"
            )
        if not found:
            raise self._missing(beginning)
        return found[0]

    def _missing(self, session_id: str) -> SessionNotFound:
        message = (
            f"no session {session_id}: it never existed, or was removed by a cleanup, which "
            f"takes expired sessions at once and ended ones after {self._lifetime.keep_ended:,.0f} seconds "
            "(PERSIST_SESSION_KEEP_ENDED)"
        )
        return SessionNotFound(message, missing=True)
