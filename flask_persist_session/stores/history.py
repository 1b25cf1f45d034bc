"""The contract of a log of entries per session, and what its implementations share.

What holds for every method: entries are bytes that nobody looks into, expiry is not judged, no driver's error leaves a
log, and one object may be used by many threads at once and after a fork by both processes. A store that can do that
returns its log as ``SessionStore.history``; ``flask_persist_session.testing.HistoryLogContract`` checks each sentence.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

from ..exceptions import SerializationError, SessionConflict, SessionNotFound, SessionTooLarge
from ..records import LAST_MOMENT, LogEntry

#: How many characters an idempotency key may have.
LONGEST_KEY = 512
#: For how many of the latest appends of a session their keys are remembered, at least.
REMEMBERED = 256
#: The largest number that every database can compare with.
_LAST_SEQ = 2**63 - 1
_DIGEST_SIZE = 16
#: So many entries are restored in one step, so that others need not wait for all of a long history.
RESTORED_AT_ONCE = 500


class HistoryLog(ABC):
    """Keeps an append-only log of entries for each session of a store.

    The entries of a session are numbered from 1 on without gaps, so the number of the last one is how many there are.
    Ending a session leaves its history; deleting the session removes it.
    """

    @abstractmethod
    def append(
        self,
        session_id: str,
        entries: Sequence[bytes],
        *,
        created_at: float,
        expected_seq: int | None = None,
        key: str | None = None,
        most: int | None = None,
        began: float | None = None,
    ) -> int:
        """Store all *entries* behind the last one, or none of them; return the number of the last one there is then.

        Indivisible among all processes: those who append at the same moment do so one after the other, and nobody reads a
        part of it. When this returns, every process sees the entries, and they survive the end of this process; when it
        raises, the history is as before. Whether the session has expired is not judged. Of an empty sequence nothing is
        stored or remembered; what is checked is the same.

        :param created_at: of all of them, in seconds since the epoch.
        :param expected_seq: how many entries there must be now.
        :param key: text of up to ``LONGEST_KEY`` characters that names this append, to make repeating it safe: if one of
            this session with that key has succeeded, nothing is stored and what it returned is returned again, whatever
            *expected_seq* and *most* say. The keys of at least the latest ``REMEMBERED`` appends are remembered, until
            ``delete``.
        :param most: how many entries the history may have.
        :param began: when the session that is meant was created: an id that is made of a key can be that of a later one.

        Raises, in this order: ``ValueError`` for a key or time that not every store keeps, ``TypeError`` for an entry that
        is not ``bytes``; ``SessionNotFound`` if there is no record of that id, as of a malformed one, its
        ``created_at`` is another than *began*, or it has ended, which is checked in the same step as everything;
        ``SessionConflict`` if there are more or fewer entries than *expected_seq*; ``SessionTooLarge`` if there would be
        more than *most*. Also ``SerializationError`` for a damaged record, ``StoreUnavailable``, ``StoreError``.
        """

    @abstractmethod
    def read(
        self,
        session_id: str,
        *,
        after: int = 0,
        before: int | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> list[LogEntry]:
        """Return the entries whose numbers are greater than *after* and less than *before*, in ascending order.

        With *limit* at most so many: the first of them, or with *newest* the last. Numbers that no entry has are fine. Of
        a session without entries, a missing one or a malformed id there are none; of an ended one all. What it costs
        depends on the entries returned, not on the length of the history.

        Raises ``SerializationError``, naming session and number, for an entry that is damaged; others can still be read.
        ``ValueError`` for a negative *limit*; ``StoreUnavailable``, ``StoreError``.
        """

    @abstractmethod
    def count(self, session_id: str) -> int:
        """Return how many entries there are, which is the number of the last one; 0 if there is no such session.

        Raises ``StoreUnavailable``, ``StoreError``.
        """

    @abstractmethod
    def delete(self, session_id: str, *, began: float | None = None) -> bool:
        """Remove all entries and forget their keys, whether or not the session has ended; say whether there were any.

        The session stays, and the next entry has the number 1. Missing and malformed ids: ``False``.

        :param began: when the session that is meant was created. If the ``created_at`` of its record is another, or there
            is no record, nothing is removed and the answer is ``False``; that is checked in the same step.

        Raises ``SerializationError`` if *began* cannot be compared because the record is damaged; ``StoreUnavailable``,
        ``StoreError``.
        """

    @abstractmethod
    def restore(self, session_id: str, entries: Sequence[LogEntry]) -> int:
        """Bring over entries of another log as they are, also into an ended session; return how many were stored.

        Those whose numbers are taken are skipped without being compared, so repeating it is safe. Keys are not brought
        over. When it raises, a beginning of *entries* may have been stored; so much nobody sees a gap.

        Raises ``SessionNotFound`` if there is no record of that id; ``ValueError`` if *entries* are not numbered in
        ascending order without gaps, or leave one behind those that are there; ``StoreUnavailable``, ``StoreError``.
        """


# What the implementations share ---------------------------------------------------------------------------------------


def digest_of(key: str | None) -> bytes | None:
    """What is kept of an idempotency key. Raises ``ValueError`` for one that is too long, or no text."""
    if key is None:
        return None
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        encoded = b"\0"
    if len(key) > LONGEST_KEY or b"\0" in encoded:
        raise ValueError(f"the key {key[:40]!r} is not at most {LONGEST_KEY} characters of Unicode, without NUL")
    return hashlib.sha256(encoded).digest()[:_DIGEST_SIZE]


def check_entries(entries: Sequence[bytes], created_at: float) -> None:
    """Refuse what no log may append, as ``append`` says."""
    if not abs(created_at) < LAST_MOMENT:
        raise ValueError(f"created_at is {created_at!r} and no moment up to the year 9000, in seconds since the epoch")
    for entry in entries:
        if not isinstance(entry, bytes):
            raise TypeError(f"an entry of a history is bytes, not {type(entry).__name__}")


def check_room(session_id: str, last: int, count: int, expected_seq: int | None, most: int | None) -> None:
    """Whether so many entries may be appended to *last*. Raises ``SessionConflict``, ``SessionTooLarge``."""
    if expected_seq is not None and expected_seq != last:
        raise SessionConflict(
            f"the history of session {session_id} has {last} entries, not {expected_seq}: it was appended to or cleared"
        )
    if most is not None and last + count > most:
        raise SessionTooLarge(
            f"the history of session {session_id} has {last} entries and {count} more would make it longer than the "
            f"{most} that are allowed; nothing was stored"
        )


def check_restored(entries: Sequence[LogEntry]) -> None:
    """Raises ``ValueError`` if *entries* are no consecutive part of a log."""
    check_entries([entry.data for entry in entries], max((abs(entry.created_at) for entry in entries), default=0.0))
    if any(entry.seq != before.seq + 1 for before, entry in pairwise(entries)) or (entries and entries[0].seq < 1):
        raise ValueError("the entries to be restored are not numbered in ascending order without gaps, from 1 on")


def behind(session_id: str, last: int, entries: Sequence[LogEntry]) -> Sequence[LogEntry]:
    """Those of *entries* that are not there yet. Raises ``ValueError`` if they would leave a gap."""
    if entries and entries[0].seq > last + 1:
        raise ValueError(
            f"the history of session {session_id} has {last} entries: to restore it from number {entries[0].seq} on would "
            "leave a gap"
        )
    return entries[last + 1 - entries[0].seq :] if entries else entries


def no_session(session_id: str, *, ended: bool = False) -> SessionNotFound:
    """The error of an append to what is no live session."""
    what = f"session {session_id} has ended" if ended else f"there is no session {session_id[:67]!r}"
    return SessionNotFound(f"{what}: nothing was added to its history", missing=not ended)


def check_began(session_id: str, created_at: float, began: float | None) -> None:
    """Raises ``SessionNotFound`` if what was created at *created_at* is another session than the one that *began* then."""
    if began not in (None, created_at):
        raise another_session(session_id)


def another_session(session_id: str) -> SessionNotFound:
    """The error of an append that means an earlier session of the same id."""
    return SessionNotFound(f"session {session_id} has ended, and its key leads to another now: nothing was added to it")


def span(after: int, before: int | None, limit: int | None) -> tuple[int, int]:
    """The first and the last number of what is to be read, both included. Raises ``ValueError`` for a negative limit."""
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}, it cannot be negative")
    last = _LAST_SEQ if before is None else max(0, min(before - 1, _LAST_SEQ))
    return min(max(after, 0), _LAST_SEQ - 1) + 1, 0 if limit == 0 else last


def within(first: int, last: int, limit: int | None, newest: bool) -> tuple[int, int]:
    """The part of a span that is within the limit, where there is an entry for every number."""
    if limit is None:
        return first, last
    return (max(first, last - limit + 1), last) if newest else (first, min(last, first + limit - 1))


def log_entry(session_id: str, seq: int, created_at: object, data: object) -> LogEntry:
    """An entry of what is stored. Raises ``SerializationError`` if that is none."""
    if not isinstance(created_at, float) or not isinstance(data, bytes):
        raise damaged(session_id, seq)
    return LogEntry(seq=seq, data=data, created_at=created_at)


def damaged(session_id: str, seq: int) -> SerializationError:
    """The error of an entry that cannot be read."""
    return SerializationError(f"entry {seq} of the history of session {session_id} is damaged; others can be read")


def copy_history(
    source: HistoryLog,
    target: HistoryLog,
    session_id: str,
    *,
    to: str | None = None,
    same: Callable[[], bool] = lambda: True,
) -> int:
    """Bring the entries of *source* into *target*, a part at a time; return how many there were.

    :param to: the id of the session that gets them, if that is another one.
    :param same: whether a part that was read belongs to the session that is meant; nothing is copied from there on.

    Raises as ``read`` and ``restore`` do.
    """
    to = to or session_id
    last = target.count(to)
    while (part := source.read(session_id, after=last, limit=RESTORED_AT_ONCE)) and same():
        target.restore(to, part)
        last = part[-1].seq
    return last
