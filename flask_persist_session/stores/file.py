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
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

from ..exceptions import ConfigError, SerializationError, StoreError, StoreUnavailable
from ..records import SessionQuery, SessionRecord, is_session_id
from ..serializers import pack_record, unpack_record
from ..tokens import SHARDS, shard_of
from . import Location, flag
from .base import SessionStore, check_save, conflict, log_unreadable, order_and_cut

_SUFFIX = ".session"
#: A file is rewritten once it is larger than this and than so many times its newest frame. A rewrite costs as much as
#: some fifty appends.
_SMALLEST_REWRITE = 64 * 1024
_REWRITE_FACTOR = 8
#: How much of the end of a file is read at once: most frames fit.
_TAIL = 8192
#: Errors of the disk that pass, at least when somebody makes room or frees a handle.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})


def open_location(location: Location, namespace: str) -> FileStore:
    """``file:///absolute/path`` or ``file:relative``; ``fsync=1`` makes each save survive a power cut."""
    if location.url.netloc:
        raise ConfigError(f"{location} names a host; write file:///absolute/path or file:relative/path")
    options = location.read_options(fsync=flag)
    return FileStore(location.path(location.url.path), namespace, **options)


class FileStore(SessionStore):
    """Keeps each session in a file of its own.

    :param root: the directory, made if it is missing.
    :param namespace: which of the sessions kept there.
    :param fsync: wait until each save is on the disk. Without it a save survives the end of the process, but not a
        power cut.

    Raises ``ConfigError`` if the directory cannot be made or written.
    """

    def __init__(self, root: str, namespace: str = "web", *, fsync: bool = False) -> None:
        self._folder = os.path.join(root, namespace)
        self._fsync = fsync
        self._holder = secrets.token_hex(16)
        try:
            _make_directory(self._folder)
        except OSError as error:
            raise ConfigError(f"the session directory {root} cannot be made: {error.strerror}") from error
        if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"the session directory {self._folder} cannot be written by this user")

    # The contract -----------------------------------------------------------------------------------------------------

    def get(self, session_id: str) -> SessionRecord | None:
        if not is_session_id(session_id):
            return None
        try:
            frame = _read(self._path(session_id))
        except OSError as error:
            raise _failure(error) from error
        return None if frame is None else unpack_record(frame.record)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        frame = _frame(record.version, pack_record(record))
        try:
            with _Locked(self._path(record.id), create=expected == 0) as file:
                if not file.has_version(expected):
                    raise conflict(record.id, expected)
                if expected == 0:
                    self._index(record)
                self._append(file, frame)
        except OSError as error:
            raise _failure(error) from error

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        if not is_session_id(session_id):
            return False
        path = self._path(session_id)
        try:
            with _Locked(path, create=False) as file:
                if not file.exists or (expected is not None and not file.has_version(expected)):
                    return False
                os.unlink(path)
                self._unindex(file.last)
                return file.corrupt or file.last is not None
        except OSError as error:
            raise _failure(error) from error

    def scan(self) -> Iterator[SessionRecord]:
        for shard in range(SHARDS):
            yield from self._records(_names(os.path.join(self._folder, f"{shard:03x}"), _SUFFIX))

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        if query.ids is not None:
            records = self._records(iter(sorted(query.ids)))
        elif query.user_id is not None:
            records = self._records(self._ids_of_user(query.user_id))
        else:
            records = self.scan()
        return order_and_cut((record for record in records if query.matches(record)), query)

    def lease(self, name: str, seconds: float) -> bool:
        path = os.path.join(self._folder, "leases", name)
        holder = f"{os.getpid()}:{self._holder}"
        try:
            with _Locked(path, create=True) as file:
                until, _, present = os.pread(file.handle, 200, 0).decode().partition(" ")
                if until and present != holder and time.time() < float(until):
                    return False
                os.ftruncate(file.handle, 0)
                _write(file.handle, f"{time.time() + seconds} {holder}".encode(), 0)
                return seconds > 0
        except OSError as error:
            raise _failure(error) from error

    # Files ------------------------------------------------------------------------------------------------------------

    def _path(self, session_id: str) -> str:
        return f"{self._folder}/{session_id[:3]}/{session_id}{_SUFFIX}"

    def _append(self, file: _Locked, frame: bytes) -> None:
        end = file.last.end if file.last else 0
        if end + len(frame) > max(_SMALLEST_REWRITE, _REWRITE_FACTOR * len(frame)):
            self._rewrite(file.path, frame)
            return
        if end < file.size:
            os.ftruncate(file.handle, end)  # what a writer left that was stopped in the middle
        try:
            _write(file.handle, frame, end)
            if self._fsync:
                os.fsync(file.handle)
        except OSError:
            # Half a frame would be cut off by the next save anyway; this gives back the room at once.
            os.ftruncate(file.handle, end)
            raise
        if self._fsync and end == 0:
            _sync_directory(os.path.dirname(file.path))

    def _rewrite(self, path: str, frame: bytes) -> None:
        # Only the holder of the lock writes this name, so what it finds there was left by a crash.
        temporary = f"{path}.tmp"
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
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

    def _unindex(self, last: _Frame | None) -> None:
        if last is None:
            return
        record = unpack_record(last.record)
        if record.user_id is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._entry(record))

    def _entry(self, record: SessionRecord) -> str:
        return os.path.join(self._folder, record.id[:3], "users", _hash(record.user_id or ""), record.id)

    def _ids_of_user(self, user_id: str) -> Iterator[str]:
        return _names(os.path.join(self._folder, shard_of(user_id), "users", _hash(user_id)), "")

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

_HEADER = struct.Struct("<IIQ")  # length of the record, CRC-32 of version and record, version
_TRAILER = struct.Struct("<I")  # length of the record
_AROUND = _HEADER.size + _TRAILER.size


class _Frame(NamedTuple):
    version: int
    record: bytes
    end: int
    """Offset in the file at which the next frame starts."""


def _frame(version: int, record: bytes) -> bytes:
    return _HEADER.pack(len(record), _checksum(version, record), version) + record + _TRAILER.pack(len(record))


def _checksum(version: int, record: bytes) -> int:
    return zlib.crc32(record, version & 0xFFFFFFFF)


def _frame_at(content: bytes, start: int, length: int, offset: int) -> _Frame | None:
    """The frame in *content*, which begins at *offset* in its file, if it is intact."""
    end = start + length + _AROUND
    if start < 0 or length == 0 or end > len(content):
        return None
    written, checksum, version = _HEADER.unpack_from(content, start)
    record = content[start + _HEADER.size : end - _TRAILER.size]
    if written != length or checksum != _checksum(version, record):
        return None
    return _Frame(version, record, offset + end)


def _last_frame(handle: int, size: int) -> _Frame | None:
    """The last intact frame of a file; ``None`` in a file whose first save was never finished.

    Raises ``SerializationError`` if there are frames and none is intact.
    """
    for tail in (_TAIL, size):
        offset = max(0, size - tail)
        content = _read_range(handle, size - offset, offset)
        if len(content) >= _AROUND:
            (length,) = _TRAILER.unpack_from(content, len(content) - _TRAILER.size)
            frame = _frame_at(content, len(content) - length - _AROUND, length, offset)
            if frame is not None:
                return frame
    return _last_before_torn_tail(content)


def _last_before_torn_tail(content: bytes) -> _Frame | None:
    last, start = None, 0
    while start + _HEADER.size <= len(content):
        (length, _, _) = _HEADER.unpack_from(content, start)
        last = _frame_at(content, start, length, 0) or last
        start += length + _AROUND
    if last is None and 0 < start <= len(content):
        raise SerializationError("the file has no intact frame")
    return last


class _Locked:
    """A session's file, locked for this thread alone while it is entered; it may not exist."""

    def __init__(self, path: str, *, create: bool) -> None:
        self.path = path
        self.handle = -1
        self.size = 0
        self._flags = os.O_RDWR | (os.O_CREAT if create else 0)

    def __enter__(self) -> _Locked:
        while True:
            try:
                self.handle = _open(self.path, self._flags)
            except FileNotFoundError:
                return self
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX)
                found = os.fstat(self.handle)
            except OSError:
                os.close(self.handle)
                raise
            # Whoever held the lock before may have removed or replaced the file: then this is a lock on nothing.
            if found.st_nlink:
                self.size = found.st_size
                return self
            self.__exit__()

    def __exit__(self, *error: object) -> None:
        if self.exists:
            # Closing is not enough: a process forked meanwhile has the same open file and would keep the lock for good.
            fcntl.flock(self.handle, fcntl.LOCK_UN)
            os.close(self.handle)
            self.handle = -1

    @property
    def exists(self) -> bool:
        return self.handle != -1

    @cached_property
    def last(self) -> _Frame | None:
        """The last intact frame; ``None`` as well if the file is corrupt."""
        try:
            return _last_frame(self.handle, self.size) if self.exists else None
        except SerializationError:
            self.corrupt = True
            return None

    corrupt = False

    def has_version(self, expected: int) -> bool:
        """Whether the newest record is of version *expected*; 0: whether there is none."""
        version = self.last.version if self.last else 0
        return self.exists and version == expected and not self.corrupt


# Calls of the operating system ----------------------------------------------------------------------------------------


def _failure(error: OSError) -> StoreError:
    kind = StoreUnavailable if error.errno in _PASSING else StoreError
    return kind(f"the session file {error.filename or ''} failed: {error.strerror}")


def _open(path: str, flags: int) -> int:
    """Open a file, making its directory if it is to be created."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    _make_directory(os.path.dirname(path))
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _make_directory(path: str) -> None:
    """Make a directory and those above it, each for this user alone; ``os.makedirs`` would do so for the last only."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_directory(os.path.dirname(path))
        _make_directory(path)


def _read(path: str) -> _Frame | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _last_frame(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)


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
