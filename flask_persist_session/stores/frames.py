"""The file of a session: its frames, its lock, and what is asked of the operating system."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import struct
import time
import zlib
from contextlib import suppress
from typing import NamedTuple

from ..exceptions import SerializationError, StoreError, StoreUnavailable
from ..records import SessionRecord
from ..serializers import unpack_record
from . import make_directory
from .base import that_of

#: Seconds for which an empty file may be one that is just being created.
_BIRTH = 0.25
#: How much of the end of a file is read at once: most frames fit.
_TAIL = 8192
#: How often it is tried to make a file in a directory of its own.
_ATTEMPTS = 10
#: Errors of the disk that pass, at least when somebody makes room or frees a handle.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})

#: Set in the version of a frame that counts only as a part of a transaction, whose name comes before its record.
_TENTATIVE = 1 << 63
_NAME_SIZE = 16

# Frames ---------------------------------------------------------------------------------------------------------------

_HEADER = struct.Struct("<IQII")  # length of the record, version, CRC-32 of these two, CRC-32 of the record
_SIGNED = struct.Struct("<IQ")
_CHECKSUMS = struct.Struct("<II")
_TRAILER = struct.Struct("<I")  # length of the record
_AROUND = _HEADER.size + _TRAILER.size
#: How each record begins: twelve fields, of which the first is a text of 67 bytes, its id.
_BEGINNING = b"\x9c\xd9C"
_WHOLE_BEGINNING = len(_BEGINNING) + 67  # with the id


class Frame(NamedTuple):
    version: int
    record: memoryview
    """Empty where a transaction removes the session."""
    start: int
    end: int
    """Offset in the file at which the next frame starts."""
    transaction: str = ""
    """The name of the transaction without which it does not count."""

    @property
    def size(self) -> int:
        """How many bytes of the file it takes."""
        return self.end - self.start


def framed(version: int, record: bytes, transaction: str = "") -> bytes:
    if transaction:
        version, record = version | _TENTATIVE, bytes.fromhex(transaction) + record
    signed = _SIGNED.pack(len(record), version)
    checksums = _CHECKSUMS.pack(zlib.crc32(signed), zlib.crc32(record))
    return b"".join((signed, checksums, record, _TRAILER.pack(len(record))))


def holds_another(record: bytes, session_id: str) -> bool:
    """Whether the data of a record look like a record of the same session.

    They may look like a frame as well. If the process is killed just when it has written that far, they are at the end of
    the file, where the last frame is looked for: a user could make a session what it is not.
    """
    return record.find(_BEGINNING + session_id.encode(), 1) >= 0


def _header_at(content: bytes, start: int) -> tuple[int, int, int] | None:
    """Length, version and checksum of the record whose frame starts there, if its header is intact."""
    if start < 0 or start + _HEADER.size > len(content):
        return None
    length, version, of_header, of_record = _HEADER.unpack_from(content, start)
    intact = of_header == zlib.crc32(content[start : start + _SIGNED.size])
    return (length, version, of_record) if intact else None


def _frame_at(content: bytes, start: int, offset: int) -> Frame | None:
    """The frame that starts there in *content*, which begins at *offset* in its file, if it is intact."""
    header = _header_at(content, start)
    if header is None:
        return None
    length, version, checksum = header
    end = start + length + _AROUND
    record = memoryview(content)[start + _HEADER.size : end - _TRAILER.size]
    if end > len(content) or checksum != zlib.crc32(record):
        return None
    if not version & _TENTATIVE:
        return Frame(version, record, offset + start, offset + end)
    if len(record) < _NAME_SIZE:
        return None
    name = record[:_NAME_SIZE].hex()
    return Frame(version ^ _TENTATIVE, record[_NAME_SIZE:], offset + start, offset + end, name)


def last_frame(handle: int, size: int) -> Frame | None:
    """The last intact frame of a file, ``None`` if there is none."""
    offset = max(0, size - _TAIL)
    content = read_range(handle, size - offset, offset)
    if len(content) >= _AROUND:
        (length,) = _TRAILER.unpack_from(content, len(content) - _TRAILER.size)
        missing = length + _AROUND - len(content)
        if 0 < missing <= offset:  # the frame is longer than the tail that was read
            offset -= missing
            content = read_range(handle, missing, offset) + content
        frame = _frame_at(content, len(content) - length - _AROUND, offset)
        if frame is not None and frame.end == size:
            return frame
    return _last_before_torn_tail(read_range(handle, size, 0))


def _last_before_torn_tail(content: bytes) -> Frame | None:
    last, start = None, 0
    while 0 <= start < len(content):
        header = _header_at(content, start)
        last = _frame_at(content, start, 0) or last
        start = _start_behind_damage(content, start) if header is None else start + header[0] + _AROUND
    return last


def _start_behind_damage(content: bytes, start: int) -> int:
    """Where the frame starts that follows one whose header is damaged; negative if there is none.

    Its record begins as that of each frame of the session does, and nothing else that was appended has these bytes.
    """
    record = start + _HEADER.size
    beginning = content[record : record + _WHOLE_BEGINNING]
    return content.find(beginning, record + 1) - _HEADER.size if beginning.startswith(_BEGINNING) else -1


def record_in(frame: Frame, session_id: str) -> SessionRecord:
    if frame.record[: len(_BEGINNING)] != _BEGINNING:
        raise SerializationError("the record does not begin as one of this package")
    record = that_of(unpack_record(frame.record), session_id)
    if record.version != frame.version:
        raise SerializationError("the version of the frame is not that of its record")
    return record


def is_unfinished(content: bytes) -> bool:
    """Whether a file ends within its first frame, as it does when its writer was stopped: nothing was ever saved."""
    header = _header_at(content, 0)
    return len(content) < _HEADER.size if header is None else len(content) < header[0] + _AROUND


def end_of_version(handle: int, size: int, expected: int) -> int | None:
    """Where the next frame goes if the newest intact record is of version *expected*, otherwise ``None``.

    Version 0 is a file in which nothing was ever saved, not even anything that is damaged now.
    """
    if handle == NO_FILE:
        return None
    if expected and _version_at_end(handle, size) == expected:
        return size  # whether the record is intact need not be known to write another one behind it
    last = last_frame(handle, size)
    if last is not None:
        return last.end if last.version == expected else None
    return 0 if expected == 0 and is_unfinished(read_range(handle, size, 0)) else None


def ends_plainly(handle: int, size: int) -> bool:
    """Whether the file is empty or ends, by its header, with a frame that counts of itself."""
    version = _version_at_end(handle, size)
    return not size or (version is not None and not version & _TENTATIVE)


def _version_at_end(handle: int, size: int) -> int | None:
    """The version in the header of the frame that ends with the file, if there is such a frame, with its mark."""
    if size < _AROUND:
        return None
    (length,) = _TRAILER.unpack(os.pread(handle, _TRAILER.size, size - _TRAILER.size))
    start = size - length - _AROUND
    header = _header_at(os.pread(handle, _HEADER.size, start), 0) if start >= 0 else None
    return header[1] if header and header[0] == length else None


# Locks ----------------------------------------------------------------------------------------------------------------

NO_FILE = -1
#: Neither follow a link nor wait for the other end of a pipe that somebody put in place of a file.
SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def lock(path: str, timeout: float, *, create: bool) -> tuple[int, int]:
    """Open a file, made if need be with *create*, and lock it for this thread alone until ``unlock``.

    Returns its handle and size; ``NO_FILE`` and 0 if there is none. Raises ``TimeoutError`` if somebody else has held
    it for *timeout* seconds.
    """
    while True:
        try:
            handle = open_file(path, os.O_RDWR | (os.O_CREAT if create else 0))
        except FileNotFoundError:
            return NO_FILE, 0
        try:
            waited = _wait_for_lock(handle, path, timeout)
            found = os.fstat(handle)
            # Whoever held the lock before may have removed or replaced the file: then this is a lock on nothing.
            if found.st_nlink and not (waited and _is_replaced(path, found)):
                return handle, found.st_size
        except OSError:
            os.close(handle)
            raise
        unlock(handle)


def _wait_for_lock(handle: int, path: str, timeout: float) -> bool:
    """Take the lock; say whether it had to be waited for."""
    end: float | None = None
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return end is not None
        except BlockingIOError:
            end = end or time.monotonic() + timeout
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, "somebody else has it locked", path) from None
            time.sleep(random.uniform(0, 0.002))


def _is_replaced(path: str, opened: os.stat_result) -> bool:
    """Whether *path* is another file by now; a backup of hard links may have kept the old one alive."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return True
    return (found.st_ino, found.st_dev) != (opened.st_ino, opened.st_dev)


def unlock(handle: int) -> None:
    if handle != NO_FILE:
        release(handle)
        os.close(handle)


def release(handle: int) -> None:
    """Give up the lock of a file that is still to be closed."""
    # Closing is not enough: a process forked meanwhile has the same open file and would keep the lock for good.
    fcntl.flock(handle, fcntl.LOCK_UN)


# Calls of the operating system ----------------------------------------------------------------------------------------


def failure(error: OSError) -> StoreError:
    kind = StoreUnavailable if error.errno in _PASSING else StoreError
    return kind(f"the session file {error.filename or ''} failed: {error.strerror}")


def open_file(path: str, flags: int) -> int:
    """Open a file, making its directory if it is to be created."""
    # More than once, because whoever tidies up may remove the directory while it is empty.
    for left in reversed(range(_ATTEMPTS)):
        try:
            return os.open(path, flags | SAFELY, 0o600)
        except FileNotFoundError:
            if not (flags & os.O_CREAT and left):
                raise
        make_directory(os.path.dirname(path))
    raise AssertionError("unreachable")


def remove_if_there(path: str) -> None:
    """Remove a file that is seldom there, and nobody makes or removes meanwhile: the caller holds a lock."""
    if os.access(path, os.F_OK):  # a third of the time of an error
        with suppress(FileNotFoundError):
            os.unlink(path)


def read_last(path: str, timeout: float) -> Frame | None:
    """The last intact frame that counts of a session's file; ``None`` if there is no session.

    Raises ``SerializationError`` if there is a file without an intact frame.
    """
    doubted = ""
    while True:
        try:
            handle = os.open(path, os.O_RDONLY | SAFELY)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(handle).st_size
            frame = last_frame(handle, size)
            if frame is None:
                return _read_locked(path, timeout)
            # Asked once, because the marker goes as soon as all is settled.
            if counts(path, frame, size):
                return _unless_removed(frame)
            if frame.transaction == doubted:
                return _before(path, handle, frame)
            # It may have been settled since it was read, and is something else by now: once more.
            doubted = frame.transaction
        finally:
            os.close(handle)


def counts(path: str, frame: Frame, size: int) -> bool:
    """Whether a frame that was found last in a session's file counts: of itself, or since its transaction is committed."""
    # Whoever writes behind it has seen that it counts, or has cut it off before.
    return not frame.transaction or frame.end < size or _is_there(marker_of(path, frame.transaction))


def _is_there(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _unless_removed(frame: Frame) -> Frame | None:
    return None if frame.transaction and not frame.record else frame


def _before(path: str, handle: int, frame: Frame) -> Frame | None:
    """What counts in place of a frame that does not; ``None`` if that was to create the session."""
    before = last_frame(handle, frame.start)
    if before is None and frame.start:
        raise SerializationError(f"the file {path} has no intact frame")
    return before


def marker_of(path: str, transaction: str) -> str:
    """The file that is there once a transaction with the session of *path* is committed, until all of it is settled."""
    return os.path.join(os.path.dirname(os.path.dirname(path)), "transactions", transaction)


def _read_locked(path: str, timeout: float) -> Frame | None:
    """The same once nobody writes any more: a file without an intact frame may be about to get its first."""
    end = time.monotonic() + _BIRTH
    while True:
        handle, size = lock(path, timeout, create=False)
        try:
            frame = None if handle == NO_FILE else last_frame(handle, size)
            if frame is not None:
                return _unless_removed(frame) if counts(path, frame, size) else _before(path, handle, frame)
        finally:
            unlock(handle)
        if handle == NO_FILE:
            return None
        if size or time.monotonic() > end:
            raise SerializationError(f"the file {path} has no intact frame")
        time.sleep(random.uniform(0, 0.002))  # it was made a moment ago, and its writer has not got the lock yet


def read_range(handle: int, size: int, offset: int) -> bytes:
    content = os.pread(handle, size, offset)
    while len(content) < size and (more := os.pread(handle, size - len(content), offset + len(content))):
        content += more
    return content


def write_at(handle: int, content: bytes, offset: int) -> None:
    written = 0
    while written < len(content):  # a nearly full disk takes a part, and raises at the next call
        written += os.pwrite(handle, content[written:], offset + written)


def rewrite(path: str, content: bytes, *, sync: bool) -> None:
    """Replace a file by another one in a single step; whoever does so to a session's holds its lock."""
    # Only the holder of the lock writes this name, so what it finds there was left by a crash.
    temporary = f"{path}.tmp"
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | SAFELY, 0o600)
    try:
        write_at(handle, content, 0)
        if sync:
            os.fsync(handle)
    except OSError:
        os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    os.rename(temporary, path)
    if sync:
        sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def name_of_user(user_id: str) -> str:
    """The directory of a user in the index."""
    return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()
