"""Sessions in files: one per session, to which each save appends a frame.

A file is a sequence of frames, the last intact one counts. So a save is one small append, which costs a fraction of
writing a second file and renaming it, and a torn tail falls back to the state before. A frame has its length at both
ends: reading starts at the end of the file and costs the same however many frames there are. A file that has grown to
several times its record is rewritten through a temporary file and a rename.

Layout below the root, directories 0700 and files 0600::

    web/                            the namespace
        3fa/                        the shard
            3fa09c….session         a session
            users/5e88…/3fa09c…     its entry in the index of its user: an empty file
        leases/sweep                a lease
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import random
import secrets
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

from ..exceptions import ConfigError, SerializationError, StoreError, StoreUnavailable
from ..records import Deletion, SessionQuery, SessionRecord, is_session_id
from ..serializers import pack_record, unpack_record
from ..tokens import SHARDS, shard_of
from . import Location, flag, make_directory, seconds
from .base import SessionStore, check_save, conflict, log_unreadable, order_and_cut, that_of

_SUFFIX = ".session"
#: A file is rewritten once it is larger than this and than so many times its newest frame. A rewrite costs as much as
#: some fifty appends.
_SMALLEST_REWRITE = 64 * 1024
_REWRITE_FACTOR = 8
#: Seconds for which an empty file may be one that is just being created.
_BIRTH = 0.25
#: How much of the end of a file is read at once: most frames fit.
_TAIL = 8192
#: So many threads remove files together: freeing the room of one is mostly waiting for the file system.
_THREADS = 4
_FEWEST_PER_THREAD = 20
#: Errors of the disk that pass, at least when somebody makes room or frees a handle.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})


def open_location(location: Location, namespace: str) -> FileStore:
    """``file:///absolute/path`` or ``file:relative``.

    Options: ``fsync`` (1 makes each save survive a power cut), ``timeout`` (seconds to wait for another writer, 5).
    """
    if location.url.netloc:
        raise ConfigError(f"{location} names a host; write file:///absolute/path or file:relative/path")
    if not location.url.path.strip("/"):
        raise ConfigError(f"{location} names no directory; write file:///absolute/path or file:relative/path")
    options = location.read_options(fsync=flag, timeout=seconds)
    return FileStore(location.path(location.url.path), namespace, **options)


class FileStore(SessionStore):
    """Keeps each session in a file of its own.

    :param root: the directory, made if it is missing.
    :param namespace: which of the sessions kept there.
    :param fsync: wait until each save is on the disk. Without it a save survives the end of the process, but not a
        power cut.
    :param timeout: seconds to wait for another writer of the same session.

    Raises ``ConfigError`` if the directory cannot be made or written.
    """

    def __init__(self, root: str, namespace: str = "web", *, fsync: bool = False, timeout: float = 5.0) -> None:
        self._folder = os.path.join(root, namespace)
        self._fsync = fsync
        self._timeout = timeout
        self._holder = secrets.token_hex(16)
        try:
            make_directory(self._folder)
        except OSError as error:
            raise ConfigError(f"the session directory {root} cannot be made: {error.strerror}") from error
        if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"the session directory {self._folder} cannot be written by this user")
        found = os.stat(self._folder)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise ConfigError(
                f"the session directory {self._folder} belongs to somebody else or can be written by others, who could "
                "put files of theirs in it; make it this user's alone (mode 0700)"
            )

    # The contract -----------------------------------------------------------------------------------------------------

    def get(self, session_id: str) -> SessionRecord | None:
        if not is_session_id(session_id):
            return None
        try:
            frame = _read(self._path(session_id), self._timeout)
        except OSError as error:
            raise _failure(error) from error
        return None if frame is None else _record_of(frame, session_id)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        frame = _frame(record.version, pack_record(record))
        path = self._path(record.id)
        try:
            if expected == 0:
                self._index(record)
            handle, size = _lock(path, self._timeout, create=expected == 0)
            try:
                end = _end_of_version(handle, size, expected)
                if end is None:
                    raise conflict(record.id, expected)
                if end < size:
                    os.ftruncate(handle, end)  # what a writer left that was stopped in the middle
                if record.ended_at is not None:
                    # Nothing before may stay: its data is to go, and a damaged tail must not bring it back to life.
                    self._rewrite(path, frame)
                else:
                    self._append(path, handle, end, frame)
            finally:
                _unlock(handle)
        except OSError as error:
            raise _failure(error) from error

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        if not is_session_id(session_id):
            return False
        path = self._path(session_id)
        try:
            handle, size = _lock(path, self._timeout, create=False)
            try:
                last = None if handle == _NO_FILE else _last_frame(handle, size)
                if handle == _NO_FILE or expected not in (None, last and last.version):
                    return False
                os.unlink(path)
                with suppress(FileNotFoundError):
                    os.unlink(f"{path}.tmp")  # of a rewrite that was stopped
                self._unindex(session_id, last)
                return True
            finally:
                _unlock(handle)
        except OSError as error:
            raise _failure(error) from error

    def delete_many(self, deletions: Sequence[Deletion]) -> list[bool]:
        size = max(_FEWEST_PER_THREAD, math.ceil(len(deletions) / _THREADS))
        parts = [deletions[start : start + size] for start in range(0, len(deletions), size)]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(chain.from_iterable(pool.map(super().delete_many, parts)))

    def scan(self) -> Iterator[SessionRecord]:
        for shard in range(SHARDS):
            yield from self._records(self._ids_in(shard))

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        if query.ids is not None:
            records = self._records(iter(sorted(query.ids)))
        elif query.user_id is not None:
            records = self._records(self._ids_of_user(query.user_id))
        elif query.id_prefix is not None:
            prefix = query.id_prefix
            records = self._records(name for name in self._ids_in(int(prefix[:3], 16)) if name.startswith(prefix))
        else:
            records = self.scan()
        return order_and_cut((record for record in records if query.matches(record)), query)

    def count(self, query: SessionQuery) -> int:
        if query != SessionQuery():
            return super().count(query)
        return sum(1 for shard in range(SHARDS) for _ in self._ids_in(shard))

    def lease(self, name: str, seconds: float) -> bool:
        path = os.path.join(self._folder, "leases", name)
        holder = f"{os.getpid()}:{self._holder}"
        try:
            handle, _ = _lock(path, self._timeout, create=True)
            try:
                until, _, present = os.pread(handle, 200, 0).decode("ascii", "replace").partition(" ")
                if present != holder and time.time() < _moment(until):
                    return False
                os.ftruncate(handle, 0)
                _write(handle, f"{time.time() + seconds} {holder}".encode(), 0)
                return seconds > 0
            finally:
                _unlock(handle)
        except OSError as error:
            raise _failure(error) from error

    # Files ------------------------------------------------------------------------------------------------------------

    def _path(self, session_id: str) -> str:
        return f"{self._folder}/{session_id[:3]}/{session_id}{_SUFFIX}"

    def _append(self, path: str, handle: int, end: int, frame: bytes) -> None:
        if end + len(frame) > max(_SMALLEST_REWRITE, _REWRITE_FACTOR * len(frame)):
            self._rewrite(path, frame)
            return
        try:
            _write(handle, frame, end)
            if self._fsync:
                os.fsync(handle)
        except OSError:
            # Half a frame would be cut off by the next save anyway; this gives back the room at once.
            os.ftruncate(handle, end)
            if end == 0:
                os.unlink(path)
            raise
        if self._fsync and end == 0:
            _sync_directory(os.path.dirname(path))

    def _rewrite(self, path: str, frame: bytes) -> None:
        # Only the holder of the lock writes this name, so what it finds there was left by a crash.
        temporary = f"{path}.tmp"
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _SAFELY, 0o600)
        try:
            _write(handle, frame, 0)
            if self._fsync:
                os.fsync(handle)
        except OSError:
            os.unlink(temporary)
            raise
        finally:
            os.close(handle)
        os.rename(temporary, path)
        if self._fsync:
            _sync_directory(os.path.dirname(path))

    # The index of users -----------------------------------------------------------------------------------------------

    # An entry is made before its session and removed after it, so a crash leaves at most an entry that leads nowhere.

    def _index(self, record: SessionRecord) -> None:
        if record.user_id is not None:
            os.close(_open(self._entry(record), os.O_WRONLY | os.O_CREAT))

    def _unindex(self, session_id: str, last: _Frame | None) -> None:
        if last is None:
            return
        try:
            record = _record_of(last, session_id)
        except SerializationError:
            return  # whose it was cannot be known any more
        if record.user_id is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._entry(record))

    def _entry(self, record: SessionRecord) -> str:
        return os.path.join(self._folder, record.id[:3], "users", _hash(record.user_id or ""), record.id)

    def _ids_of_user(self, user_id: str) -> Iterator[str]:
        return _names(os.path.join(self._folder, shard_of(user_id), "users", _hash(user_id)), "")

    def _ids_in(self, shard: int) -> Iterator[str]:
        return _names(os.path.join(self._folder, f"{shard:03x}"), _SUFFIX)

    def _records(self, ids: Iterator[str]) -> Iterator[SessionRecord]:
        for session_id in ids:
            try:
                record = self.get(session_id)
            except SerializationError as error:
                log_unreadable(session_id, error)
                continue
            if record is not None:
                yield record


# Frames ---------------------------------------------------------------------------------------------------------------

_HEADER = struct.Struct("<IQII")  # length of the record, version, CRC-32 of these two, CRC-32 of the record
_SIGNED = struct.Struct("<IQ")
_CHECKSUMS = struct.Struct("<II")
_TRAILER = struct.Struct("<I")  # length of the record
_AROUND = _HEADER.size + _TRAILER.size


class _Frame(NamedTuple):
    version: int
    record: memoryview
    end: int
    """Offset in the file at which the next frame starts."""


def _frame(version: int, record: bytes) -> bytes:
    signed = _SIGNED.pack(len(record), version)
    checksums = _CHECKSUMS.pack(zlib.crc32(signed), zlib.crc32(record))
    return b"".join((signed, checksums, record, _TRAILER.pack(len(record))))


def _header_at(content: bytes, start: int) -> tuple[int, int, int] | None:
    """Length, version and checksum of the record whose frame starts there, if its header is intact."""
    if start < 0 or start + _HEADER.size > len(content):
        return None
    length, version, of_header, of_record = _HEADER.unpack_from(content, start)
    intact = of_header == zlib.crc32(content[start : start + _SIGNED.size])
    return (length, version, of_record) if intact else None


def _frame_at(content: bytes, start: int, offset: int) -> _Frame | None:
    """The frame that starts there in *content*, which begins at *offset* in its file, if it is intact."""
    header = _header_at(content, start)
    if header is None:
        return None
    length, version, checksum = header
    end = start + length + _AROUND
    record = memoryview(content)[start + _HEADER.size : end - _TRAILER.size]
    if end > len(content) or checksum != zlib.crc32(record):
        return None
    return _Frame(version, record, offset + end)


def _last_frame(handle: int, size: int) -> _Frame | None:
    """The last intact frame of a file, ``None`` if there is none."""
    offset = max(0, size - _TAIL)
    content = _read_range(handle, size - offset, offset)
    if len(content) >= _AROUND:
        (length,) = _TRAILER.unpack_from(content, len(content) - _TRAILER.size)
        missing = length + _AROUND - len(content)
        if 0 < missing <= offset:  # the frame is longer than the tail that was read
            offset -= missing
            content = _read_range(handle, missing, offset) + content
        frame = _frame_at(content, len(content) - length - _AROUND, offset)
        if frame is not None and frame.end == size:
            return frame
    return _last_before_torn_tail(_read_range(handle, size, 0))


def _last_before_torn_tail(content: bytes) -> _Frame | None:
    last, start = None, 0
    while (header := _header_at(content, start)) is not None:
        last = _frame_at(content, start, 0) or last
        start += header[0] + _AROUND
    return last


def _record_of(frame: _Frame, session_id: str) -> SessionRecord:
    record = that_of(unpack_record(frame.record), session_id)
    if record.version != frame.version:
        raise SerializationError("the version of the frame is not that of its record")
    return record


def _moment(text: str) -> float:
    """The time in a lease; long ago for what is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _is_unfinished(content: bytes) -> bool:
    """Whether a file ends within its first frame, as it does when its writer was stopped: nothing was ever saved."""
    header = _header_at(content, 0)
    return len(content) < _HEADER.size if header is None else len(content) < header[0] + _AROUND


def _end_of_version(handle: int, size: int, expected: int) -> int | None:
    """Where the next frame goes if the newest intact record is of version *expected*, otherwise ``None``.

    Version 0 is a file in which nothing was ever saved, not even anything that is damaged now.
    """
    if handle == _NO_FILE:
        return None
    if expected and _version_at_end(handle, size) == expected:
        return size  # whether the record is intact need not be known to write another one behind it
    last = _last_frame(handle, size)
    if last is not None:
        return last.end if last.version == expected else None
    return 0 if expected == 0 and _is_unfinished(_read_range(handle, size, 0)) else None


def _version_at_end(handle: int, size: int) -> int | None:
    """The version in the header of the frame that ends with the file, if there is such a frame."""
    if size < _AROUND:
        return None
    (length,) = _TRAILER.unpack(os.pread(handle, _TRAILER.size, size - _TRAILER.size))
    start = size - length - _AROUND
    header = _header_at(os.pread(handle, _HEADER.size, start), 0) if start >= 0 else None
    return header[1] if header and header[0] == length else None


# Locks ----------------------------------------------------------------------------------------------------------------

_NO_FILE = -1
#: Neither follow a link nor wait for the other end of a pipe that somebody put in place of a file.
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def _lock(path: str, timeout: float, *, create: bool) -> tuple[int, int]:
    """Open a file, made if need be with *create*, and lock it for this thread alone until ``_unlock``.

    Returns its handle and size; ``_NO_FILE`` and 0 if there is none. Raises ``TimeoutError`` if somebody else has held
    it for *timeout* seconds.
    """
    while True:
        try:
            handle = _open(path, os.O_RDWR | (os.O_CREAT if create else 0))
        except FileNotFoundError:
            return _NO_FILE, 0
        try:
            waited = _wait_for_lock(handle, path, timeout)
            found = os.fstat(handle)
            # Whoever held the lock before may have removed or replaced the file: then this is a lock on nothing.
            if found.st_nlink and not (waited and _is_replaced(path, found)):
                return handle, found.st_size
        except OSError:
            os.close(handle)
            raise
        _unlock(handle)


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


def _unlock(handle: int) -> None:
    if handle != _NO_FILE:
        # Closing is not enough: a process forked meanwhile has the same open file and would keep the lock for good.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


# Calls of the operating system ----------------------------------------------------------------------------------------


def _failure(error: OSError) -> StoreError:
    kind = StoreUnavailable if error.errno in _PASSING else StoreError
    return kind(f"the session file {error.filename or ''} failed: {error.strerror}")


def _open(path: str, flags: int) -> int:
    """Open a file, making its directory if it is to be created."""
    try:
        return os.open(path, flags | _SAFELY, 0o600)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    make_directory(os.path.dirname(path))
    return os.open(path, flags | _SAFELY, 0o600)


def _read(path: str, timeout: float) -> _Frame | None:
    """The last intact frame of a session's file; ``None`` if there is no file.

    Raises ``SerializationError`` if there is a file without an intact frame.
    """
    try:
        handle = os.open(path, os.O_RDONLY | _SAFELY)
    except FileNotFoundError:
        return None
    try:
        frame = _last_frame(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)
    return frame or _read_locked(path, timeout)


def _read_locked(path: str, timeout: float) -> _Frame | None:
    """The same once nobody writes any more: a file without an intact frame may be about to get its first."""
    end = time.monotonic() + _BIRTH
    while True:
        handle, size = _lock(path, timeout, create=False)
        try:
            frame = None if handle == _NO_FILE else _last_frame(handle, size)
        finally:
            _unlock(handle)
        if frame is not None or handle == _NO_FILE:
            return frame
        if size or time.monotonic() > end:
            raise SerializationError(f"the file {path} has no intact frame")
        time.sleep(random.uniform(0, 0.002))  # it was made a moment ago, and its writer has not got the lock yet


def _read_range(handle: int, size: int, offset: int) -> bytes:
    content = os.pread(handle, size, offset)
    while len(content) < size and (more := os.pread(handle, size - len(content), offset + len(content))):
        content += more
    return content


def _write(handle: int, content: bytes, offset: int) -> None:
    written = 0
    while written < len(content):  # a nearly full disk takes a part, and raises at the next call
        written += os.pwrite(handle, content[written:], offset + written)


def _sync_directory(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(folder: str, suffix: str) -> Iterator[str]:
    """The names with *suffix* in *folder*, without it; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(suffix)
                if entry.name.endswith(suffix) and is_session_id(name):
                    yield name
    except FileNotFoundError:
        return
    except OSError as error:
        raise _failure(error) from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
