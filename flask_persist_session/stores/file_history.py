"""The histories of the sessions of a file store: two files beside that of the session.

``<id>.history`` is a sequence of turns, one for each append, each with a description of every entry, so that a few of many
are read without the others. ``<id>.turns`` says in 52 bytes a turn where each one is, which entries it has and under which
key it was appended: the place of an entry is found by bisection, a key among the last ones in one read. It holds nothing
that the history does not, and is made anew from that where the two do not agree, as after a crash between their writes.

Who writes holds the lock of the session. Who reads does without, and takes it only where the files do not agree.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from ..exceptions import SerializationError, SessionNotFound
from ..records import LogEntry, SessionRecord, is_session_id
from .frames import (
    NO_FILE,
    SAFELY,
    failure,
    is_unfinished,
    last_frame,
    read_range,
    record_in,
    remove_if_there,
    sync_directory,
    unlock,
    write_at,
)
from .history import (
    REMEMBERED,
    RESTORED_AT_ONCE,
    HistoryLog,
    behind,
    check_began,
    check_entries,
    check_restored,
    check_room,
    damaged,
    digest_of,
    no_session,
    span,
    within,
)

Found = TypeVar("Found")

HISTORY, TURNS = ".history", ".turns"
_SESSION = ".session"
_NO_KEY = bytes(16)
_NO_TURNS = "what says where its entries are does not fit it, and is made anew by a repair or the next append"

# A turn: this header, a description of each entry, the entries.
_MAGIC = b"\x93TRN"
_HEADER = struct.Struct("<4sQQI16sI")  # magic, length of the turn, first number, how many entries, key, CRC-32 of these
_ENTRY = struct.Struct("<QQdI")  # where it starts and ends in the turn, its time, CRC-32 of number, these and the entry
_SEAL = struct.Struct("<QQQd")
_PLACE = struct.Struct("<QQQQ16sI")  # of a turn: start, end, first number, last number, key, CRC-32 of these
_CRC = struct.Struct("<I")


class _Turn(NamedTuple):
    start: int
    end: int
    first: int
    last: int
    digest: bytes

    def placed(self) -> bytes:
        return _sealed(_PLACE, *self)


class _Disagreement(Exception):
    """The two files do not say the same: somebody is just writing, or was stopped while doing so."""


class FileHistory(HistoryLog):
    """Keeps the entries of a session beside its file.

    :param path_of: the file of a session, by id.
    :param lock_file: locks it, which ends then in a frame that counts of itself; see ``FileStore``.
    :param sync: wait until each append is on the disk.
    """

    def __init__(self, path_of: Callable[[str], str], lock_file: Callable[..., tuple[int, int]], *, sync: bool) -> None:
        self._path_of = path_of
        self._lock_file = lock_file
        self._sync = sync

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
        digest = digest_of(key)
        check_entries(entries, created_at)
        with self._changing(session_id, ended=False, began=began) as files:
            if digest is not None and (known := files.number_of(digest)):
                return known
            last = files.last_seq
            check_room(session_id, last, len(entries), expected_seq, most)
            numbered = [LogEntry(seq=seq, data=data, created_at=created_at) for seq, data in enumerate(entries, last + 1)]
            files.append(numbered, digest or _NO_KEY)
            return last + len(entries)

    def read(
        self,
        session_id: str,
        *,
        after: int = 0,
        before: int | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> list[LogEntry]:
        first, last = span(after, before, limit)

        def wanted(files: _Files) -> list[LogEntry]:
            return list(files.entries(session_id, *within(first, min(last, files.last_seq), limit, newest)))

        return self._look(session_id, wanted, [])

    def count(self, session_id: str) -> int:
        return self._look(session_id, lambda files: files.last_seq, 0)

    def delete(self, session_id: str, *, began: float | None = None) -> bool:
        if not is_session_id(session_id):
            return False
        with self._locked(session_id) as (path, handle, size):
            if handle == NO_FILE or not _is_meant(session_id, handle, size, began):
                return False
            there = False
            with suppress(FileNotFoundError), _opened(path) as files:
                files.mend()
                there = files.last_seq > 0
            remove_history(path)
            return there

    def restore(self, session_id: str, entries: Sequence[LogEntry]) -> int:
        check_restored(entries)
        with self._changing(session_id, ended=True) as files:
            missing = behind(session_id, files.last_seq, entries)
            for start in range(0, len(missing), RESTORED_AT_ONCE):
                files.append(missing[start : start + RESTORED_AT_ONCE], _NO_KEY)
            return len(missing)

    # Locking ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, session_id: str) -> Iterator[tuple[str, int, int]]:
        """The path, handle and size of the file of a session that nobody else changes meanwhile."""
        path = self._path_of(session_id)
        try:
            handle, size = self._lock_file(path, create=False)
            try:
                yield path, handle, size
            finally:
                unlock(handle)
        except OSError as error:
            raise failure(error) from error

    @contextmanager
    def _changing(self, session_id: str, *, ended: bool, began: float | None = None) -> Iterator[_Files]:
        """The files of a history, made if need be, while nobody else changes them or the session.

        Raises ``SessionNotFound`` if there is no session, not the one that *began* then, or it has *ended* and must not
        have.
        """
        if not is_session_id(session_id):
            raise no_session(session_id)
        with self._locked(session_id) as (path, handle, size):
            record = _record(session_id, handle, size)
            check_began(session_id, record.created_at, began)
            if record.ended_at is not None and not ended:
                raise no_session(session_id, ended=True)
            with _opened(path, create=True, sync=self._sync) as files:
                files.mend()
                yield files

    def _look(self, session_id: str, look: Callable[[_Files], Found], nothing: Found) -> Found:
        """What *look* finds in the files of a history, or *nothing* if there are none."""
        if not is_session_id(session_id):
            return nothing
        try:
            with _opened(self._path_of(session_id), mode=os.O_RDONLY) as files:
                files.must_agree()
                return look(files)
        except FileNotFoundError:
            return nothing
        except _Disagreement:
            return self._look_again(session_id, look, nothing)
        except OSError as error:
            raise failure(error) from error

    def _look_again(self, session_id: str, look: Callable[[_Files], Found], nothing: Found) -> Found:
        """The same while nobody writes, so that the files can be brought to agree."""
        with self._locked(session_id) as (path, handle, _):
            if handle == NO_FILE:
                return nothing
            try:
                with _opened(path) as files:
                    return files.after_mending(look)
            except FileNotFoundError:
                return nothing


def _record(session_id: str, handle: int, size: int) -> SessionRecord:
    """What a locked file ends in. Raises ``SessionNotFound`` if there is no session in it."""
    last = None if handle == NO_FILE else last_frame(handle, size)
    if last is not None:
        return record_in(last, session_id)
    if handle != NO_FILE and not is_unfinished(read_range(handle, size, 0)):
        raise SerializationError(f"the file of session {session_id} has no intact frame")
    raise no_session(session_id)


def _is_meant(session_id: str, handle: int, size: int, began: float | None) -> bool:
    """Whether the session in a locked file is the one that *began* then."""
    if began is None:
        return True
    with suppress(SessionNotFound):
        return _record(session_id, handle, size).created_at == began
    return False


def remove_history(path: str) -> None:
    """Remove the history of the session with the file *path*; the caller holds its lock."""
    history = path.removesuffix(_SESSION) + HISTORY
    if os.access(history, os.F_OK):  # where there is none, there are no turns of it
        # In this order, so that a history is never met with the turns of an earlier one.
        for file in (path.removesuffix(_SESSION) + TURNS, history):
            remove_if_there(file)


def agrees(path: str) -> bool:
    """Whether the history of the session with the file *path* and its turns agree, or there is none.

    If they do not, somebody may just be writing.
    """
    try:
        with _opened(path, mode=os.O_RDONLY) as files:
            files.must_agree()
    except _Disagreement:
        return False
    except FileNotFoundError:
        pass
    return True


def check_history(path: str, *, repair: bool) -> str | None:
    """In what the files of a history do not agree, if they do not; *repair* makes them. The caller holds the lock."""
    try:
        with _opened(path, mode=os.O_RDWR if repair else os.O_RDONLY) as files:
            found = files.disagreement()
            if repair:
                files.mend()
            return found
    except _Disagreement:
        return _NO_TURNS
    except FileNotFoundError:
        return None


# The files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str, *, mode: int = os.O_RDWR, create: bool = False, sync: bool = False) -> Iterator[_Files]:
    """The files of the history of the session with the file *path*.

    Raises ``FileNotFoundError`` if there is no history; ``_Disagreement`` if it was removed while they were opened.
    """
    base = path.removesuffix(_SESSION)
    history = os.open(base + HISTORY, mode | SAFELY | (os.O_CREAT if create else 0), 0o600)
    try:
        # What the turns of a history are missing can be made by who may write.
        turns = _open_turns(base + TURNS, mode)
        try:
            if not os.path.samestat(os.fstat(history), os.stat(base + HISTORY)):
                raise _Disagreement
            yield _Files(base, history, turns, sync=sync)
        finally:
            os.close(turns)
    finally:
        os.close(history)


def _open_turns(path: str, mode: int) -> int:
    if mode == os.O_RDWR:
        return os.open(path, mode | os.O_CREAT | SAFELY, 0o600)
    try:
        return os.open(path, mode | SAFELY)
    except FileNotFoundError:
        raise _Disagreement from None


class _Files:
    """A history and its turns, open."""

    def __init__(self, base: str, history: int, turns: int, *, sync: bool) -> None:
        self._base = base
        self._history = history
        self._turns = turns
        self._sync = sync
        # In this order: whoever writes does so first to the history.
        self._size = os.fstat(history).st_size
        self._count, self._rest = divmod(os.fstat(turns).st_size, _PLACE.size)

    @property
    def last_seq(self) -> int:
        return self._turn(self._count - 1).last if self._count else 0

    def number_of(self, digest: bytes) -> int | None:
        """The number that the append with a key returned, if that is one of the last ones."""
        first = max(0, self._count - REMEMBERED)
        places = read_range(self._turns, (self._count - first) * _PLACE.size, first * _PLACE.size)
        found = places.rfind(digest)
        if found < 0:
            return None
        with suppress(_Disagreement):
            turn = self._turn(first + found // _PLACE.size)
            return turn.last if turn.digest == digest else None
        self._make_turns()
        return self.number_of(digest)

    def entries(self, session_id: str, first: int, last: int) -> Iterator[LogEntry]:
        if first > last:
            return
        number = self._number_of_turn(first)
        for turn in self._turns_from(number, last - first + 1):
            yield from self._entries_of(session_id, turn, max(first, turn.first), min(last, turn.last))
            if turn.last >= last:
                return

    def append(self, entries: Sequence[LogEntry], digest: bytes) -> None:
        """Add a turn. What fails leaves the files as they were."""
        if not entries:
            return
        content = _packed(entries, digest)
        turn = _Turn(self._size, self._size + len(content), entries[0].seq, entries[-1].seq, digest)
        try:
            write_at(self._history, content, turn.start)
            if self._sync:
                os.fsync(self._history)
            write_at(self._turns, turn.placed(), self._count * _PLACE.size)
        except OSError:
            os.ftruncate(self._history, self._size)
            os.ftruncate(self._turns, self._count * _PLACE.size)
            raise
        if self._sync and self._size == 0:
            sync_directory(os.path.dirname(self._base))
        self._size, self._count = turn.end, self._count + 1

    # Agreement --------------------------------------------------------------------------------------------------------

    def must_agree(self) -> None:
        """Raises ``_Disagreement`` unless the turns end where the history does."""
        end = self._turn(self._count - 1).end if self._count else 0
        if self._rest or end != self._size:
            raise _Disagreement

    def mend(self) -> None:
        """Make the turns anew unless they agree with the history; the caller holds the lock."""
        try:
            self.must_agree()
        except _Disagreement:
            self._make_turns()

    def after_mending(self, look: Callable[[_Files], Found]) -> Found:
        """What *look* finds, with the turns made anew if it does not get through."""
        try:
            self.must_agree()
            return look(self)
        except _Disagreement:
            self._make_turns()
            return look(self)

    def disagreement(self) -> str | None:
        """In what the history and its turns do not agree, if they do not; the caller holds the lock."""
        try:
            self.must_agree()
        except _Disagreement:
            turns = self._whole_turns()
            torn = self._size - (turns[-1].end if turns else 0)
            return f"its last {torn:,} bytes are of an append that was stopped, and do not count" if torn else _NO_TURNS
        return None

    def _whole_turns(self) -> list[_Turn]:
        """The turns of the history without what a writer left at the end that was stopped in the middle."""
        content = read_range(self._history, self._size, 0)
        turns = list(_turns_in(content))
        while turns and not _is_whole(content, turns[-1]):
            turns.pop()
        return turns

    def _make_turns(self) -> None:
        turns = self._whole_turns()
        self._size = turns[-1].end if turns else 0
        self._count, self._rest = len(turns), 0
        os.ftruncate(self._history, self._size)
        os.ftruncate(self._turns, 0)
        write_at(self._turns, b"".join(turn.placed() for turn in turns), 0)

    # Places -----------------------------------------------------------------------------------------------------------

    def _turn(self, number: int) -> _Turn:
        return _turn_in(os.pread(self._turns, _PLACE.size, number * _PLACE.size))

    def _turns_from(self, number: int, most: int) -> Iterator[_Turn]:
        size = min(most, self._count - number) * _PLACE.size
        places = read_range(self._turns, size, number * _PLACE.size)
        if len(places) < size:
            raise _Disagreement
        for start in range(0, size, _PLACE.size):
            yield _turn_in(places[start : start + _PLACE.size])

    def _number_of_turn(self, seq: int) -> int:
        # Each turn has an entry at least, which leaves few turns for one near the end.
        lowest, highest = max(0, self._count - 1 - (self.last_seq - seq)), min(self._count, seq)
        return lowest + bisect_left(range(lowest, highest), seq, key=lambda number: self._turn(number).last)

    def _entries_of(self, session_id: str, turn: _Turn, first: int, last: int) -> Iterator[LogEntry]:
        place = turn.start + _HEADER.size + (first - turn.first) * _ENTRY.size
        size = (last - first + 1) * _ENTRY.size
        described = read_range(self._history, size, place)
        if len(described) < size:
            raise damaged(session_id, first)
        entries = list(enumerate(_ENTRY.iter_unpack(described), first))
        for seq, (start, end, *_) in entries:
            if not start <= end <= turn.end - turn.start:
                raise damaged(session_id, seq)
        lowest, highest = min(start for _, (start, *_) in entries), max(end for _, (_, end, *_) in entries)
        block = read_range(self._history, highest - lowest, turn.start + lowest)
        for seq, (start, end, created_at, checksum) in entries:
            data = block[start - lowest : end - lowest]
            if checksum != _checksum(seq, start, end, created_at, data):
                raise damaged(session_id, seq)
            yield LogEntry(seq=seq, data=data, created_at=created_at)


# Bytes ----------------------------------------------------------------------------------------------------------------


def _sealed(layout: struct.Struct, *values: object) -> bytes:
    """*values* with their checksum behind them."""
    packed = layout.pack(*values, 0)[: -_CRC.size]
    return packed + _CRC.pack(zlib.crc32(packed))


def _unsealed(layout: struct.Struct, packed: bytes) -> tuple[int, ...] | None:
    """The values without the checksum; ``None`` if that does not fit."""
    if len(packed) < layout.size:
        return None
    *values, checksum = layout.unpack(packed)
    return tuple(values) if checksum == zlib.crc32(packed[: -_CRC.size]) else None


def _turn_in(packed: bytes) -> _Turn:
    values: tuple[Any, ...] | None = _unsealed(_PLACE, packed)
    if values is None:
        raise _Disagreement
    return _Turn(*values)


def _checksum(seq: int, start: int, end: int, created_at: float, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(_SEAL.pack(seq, start, end, created_at)))


def _packed(entries: Sequence[LogEntry], digest: bytes) -> bytes:
    """A turn of *entries*."""
    start = _HEADER.size + len(entries) * _ENTRY.size
    described = []
    for entry in entries:
        end = start + len(entry.data)
        checksum = _checksum(entry.seq, start, end, entry.created_at, entry.data)
        described.append(_ENTRY.pack(start, end, entry.created_at, checksum))
        start = end
    header = _sealed(_HEADER, _MAGIC, start, entries[0].seq, len(entries), digest)
    return b"".join((header, *described, *(entry.data for entry in entries)))


def _turns_in(content: bytes) -> Iterator[_Turn]:
    """The turns of a history as their headers tell. What has lost its own is one turn with all numbers missing there."""
    start, seq = 0, 1
    while (turn := _next_turn(content, start, seq)) is not None:
        if turn.first > seq:
            yield _Turn(start, turn.start, seq, turn.first - 1, _NO_KEY)
        yield turn
        start, seq = turn.end, turn.last + 1


def _next_turn(content: bytes, start: int, seq: int) -> _Turn | None:
    """The first turn from *start* on whose header is intact, which ends within *content* and goes on from *seq*."""
    expected = start
    while (start := content.find(_MAGIC, start)) >= 0:
        values: tuple[Any, ...] | None = _unsealed(_HEADER, content[start : start + _HEADER.size])
        if values is not None:
            _, size, first, count, digest = values
            if first >= seq and count and start + size <= len(content):
                return _Turn(start, start + size, first, first + count - 1, digest)
            if start == expected:
                return None  # its writer was stopped; what somebody said in it may look like a turn, and is none
        start += 1
    return None


def _is_whole(content: bytes, turn: _Turn) -> bool:
    place = turn.start + _HEADER.size
    if len(content) < place + (turn.last + 1 - turn.first) * _ENTRY.size:
        return False
    for seq in range(turn.first, turn.last + 1):
        start, end, created_at, checksum = _ENTRY.unpack_from(content, place + (seq - turn.first) * _ENTRY.size)
        data = content[turn.start + start : turn.start + end]
        if checksum != _checksum(seq, start, end, created_at, data):
            return False
    return True
