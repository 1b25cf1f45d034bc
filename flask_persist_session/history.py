"""The history of a session: an append-only log of what was said, such as the dialogue of a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .exceptions import HistoryConflict, SerializationError, SessionConflict, SessionNotFound, SessionTooLarge
from .records import HistoryEntry, LogEntry
from .serializers import Codec
from .stored import ANOTHER, StoredSession
from .stores.history import HistoryLog

#: At most so many entries come with a conflict.
_MISSED = 100
_PAGE = 500
_FIELDS = {"role", "content", "metadata"}


class History:
    """The entries of one session, numbered from 1 without gaps; see ``SessionManager.history``.

    :param session: returns the session if it is active, and raises ``SessionNotFound`` otherwise.
    :param began: when the session that is meant was created; not given: whichever is there at the first append.
    :param renewed: is given the session after something was appended.
    :param is_there: whether what was just read is still of the session that is meant.
    :param max_entries: how many entries there may be; 0: any number.
    :param max_bytes: largest encoded entry.
    """

    def __init__(
        self,
        session_id: str,
        log: HistoryLog,
        codec: Codec,
        *,
        clock: Callable[[], float],
        session: Callable[[str], StoredSession],
        began: float | None,
        renewed: Callable[[StoredSession], object],
        is_there: Callable[[], bool],
        max_entries: int,
        max_bytes: int,
    ) -> None:
        self.session_id = session_id
        self._began = began
        self._log = log
        self._codec = codec
        self._clock = clock
        self._session = session
        self._renewed = renewed
        self._is_there = is_there
        self._max_entries = max_entries
        self._max_bytes = max_bytes

    def append(
        self, *entries: Mapping[str, Any], expected_seq: int | None = None, idempotency_key: str | None = None
    ) -> int:
        """Store entries together or not at all, and renew the session; returns the number of the last one.

        :param entries: mappings with ``role`` (text), ``content`` (anything that a session can hold) and, if wanted,
            ``metadata`` (a mapping).
        :param expected_seq: the number of the entry that must be the last one until now, 0 for an empty history.
        :param idempotency_key: a text that stands for this append: if it is sent again, nothing is stored, and the answer
            is the same. It is remembered for the latest 256 appends at least.

        Raises ``SessionNotFound`` if the session is not active; ``HistoryConflict``, with the entries that were missed;
        ``SessionTooLarge`` beyond ``max_entries`` or ``max_bytes``; ``SerializationError`` naming the key path of
        what cannot be stored; ``ValueError`` for what is no entry; ``UnsupportedByStore``, ``StoreError``.
        """
        encoded = [self._encode(entry) for entry in entries]
        if not encoded:
            raise ValueError("nothing to append: give at least one entry")
        if expected_seq is not None and type(expected_seq) is not int:
            raise ValueError(f"expected_seq is {expected_seq!r:.80}; allowed is the number of an entry, or 0")
        session = self._session(self.session_id)
        if self._began not in (None, session.created_at):
            raise SessionNotFound(f"no active session {self.session_id}: {ANOTHER}")
        self._began = session.created_at
        try:
            seq = self._log.append(
                self.session_id,
                encoded,
                created_at=self._clock(),
                expected_seq=expected_seq,
                key=idempotency_key,
                most=self._max_entries or None,
                began=self._began,
            )
        except SessionConflict as error:
            raise HistoryConflict(str(error), missed=self.after(expected_seq or 0, limit=_MISSED)) from error
        self._renewed(session)
        return seq

    def _encode(self, entry: Mapping[str, Any]) -> bytes:
        if not isinstance(entry, Mapping) or not _FIELDS >= entry.keys() >= {"role", "content"}:
            given = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(f"an entry of a history is a mapping with role, content and, if wanted, metadata; not {given}")
        role, metadata = entry["role"], entry.get("metadata")
        if not isinstance(role, str) or not role:
            raise ValueError(f"the role of an entry is {role!r:.80}; allowed is text such as 'user' or 'assistant'")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise ValueError(f"the metadata of an entry are of type {type(metadata).__name__}; allowed is a mapping")
        plain = self._codec.plain({"role": role, "content": entry["content"], "metadata": dict(metadata or {})})
        if len(plain) > self._max_bytes:
            raise SessionTooLarge(f"an entry takes {len(plain):,} bytes, and max_bytes allows {self._max_bytes:,}")
        return self._codec.seal(plain)

    def latest(self, limit: int = 20) -> list[HistoryEntry]:
        """The last *limit* entries, oldest first."""
        return self._decoded(self._log.read(self.session_id, limit=limit, newest=True))

    def page(self, before: int | None = None, limit: int = 20) -> list[HistoryEntry]:
        """The last *limit* entries before the one of number *before*, oldest first; the last ones of all if not given."""
        return self._decoded(self._log.read(self.session_id, before=before, limit=limit, newest=True))

    def after(self, seq: int, limit: int | None = None) -> list[HistoryEntry]:
        """The first *limit* entries after the one of number *seq*, all if not given, oldest first."""
        return self._decoded(self._log.read(self.session_id, after=seq, limit=limit))

    def search(self, text: str, *, before: int | None = None, limit: int = 20) -> list[HistoryEntry]:
        """The last *limit* entries whose content or metadata contain *text*, ignoring case, oldest first.

        Reads the history from its end until so many are found.
        """
        wanted, found = text.casefold(), list[HistoryEntry]()
        for entry in self._backwards(before):
            if len(found) >= limit:
                break
            if any(wanted in straw.casefold() for straw in _texts([entry.content, entry.metadata])):
                found.append(entry)
        return found[::-1]

    def count(self) -> int:
        """How many entries there are."""
        count = self._log.count(self.session_id)
        self._check_is_there()
        return count

    def _check_is_there(self) -> None:
        # Asked after reading: another session may have taken its key in between.
        if not self._is_there():
            raise SessionNotFound(f"session {self.session_id} is there no more, or its key leads to another now")

    def clear(self) -> bool:
        """Remove all entries; the next one is number 1 again. Says whether there were any.

        Of a session, or its record, and once something was appended here, only those of that session: none, if its key
        leads to another by now.
        """
        return self._log.delete(self.session_id, began=self._began)

    def __iter__(self) -> Iterator[HistoryEntry]:
        """All entries, oldest first, a few at a time in memory."""
        last = 0
        while entries := self.after(last, _PAGE):
            yield from entries
            last = entries[-1].seq

    def _backwards(self, before: int | None) -> Iterator[HistoryEntry]:
        while entries := self.page(before, _PAGE):
            yield from reversed(entries)
            before = entries[0].seq

    def _decoded(self, entries: list[LogEntry]) -> list[HistoryEntry]:
        self._check_is_there()
        return [decode_entry(self._codec, self.session_id, entry) for entry in entries]


def decode_entry(codec: Codec, session_id: str, entry: LogEntry) -> HistoryEntry:
    """An entry of a session as it was appended. Raises ``SerializationError`` if it cannot be read."""
    try:
        fields = codec.decode(entry.data)
        return HistoryEntry(
            seq=entry.seq,
            role=fields["role"],
            content=fields["content"],
            metadata=fields["metadata"],
            created_at=entry.created_at,
        )
    except (SerializationError, KeyError) as error:
        raise SerializationError(f"entry {entry.seq} of the history of {session_id} cannot be read: {error}") from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _texts(item)
