"""Sessions in files: one per session, to which each save appends a frame.

A file is a sequence of frames (length, CRC-32, record), the last intact one counts. So a save is one small append, which
costs a fraction of writing a second file and renaming it, and a torn tail falls back to the state before. A file that
has grown to several times its record is rewritten through a temporary file and a rename.

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
from contextlib import contextmanager, suppress
from functools import partial

from ..exceptions import ConfigError, SerializationError, StoreError, StoreUnavailable
from ..records import SessionQuery, SessionRecord, is_session_id
from ..serializers import pack_record, unpack_record
from ..tokens import SHARDS, shard_of
from . import Location, flag
from .base import SessionStore, check_save, conflict, log_unreadable, order_and_cut

_HEADER = struct.Struct("<II")
_SUFFIX = ".session"
#: A file is rewritten once it is larger than this and than so many times its newest frame.
_SMALLEST_REWRITE = 16 * 1024
_REWRITE_FACTOR = 8
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
        with _errors():
            content = _read_file(self._path(session_id))
        return None if content is None else _last_record(content)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        frame = _frame(pack_record(record))
        with _errors(), self._locked(record.id, create=expected == 0) as handle:
            if handle is None:
                raise conflict(record.id, expected)
            content = _read_all(handle)
            if not _has_version(content, expected):
                raise conflict(record.id, expected)
            if expected == 0:
                self._index(record)
            self._append(handle, record.id, content, frame)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        if not is_session_id(session_id):
            return False
        with _errors(), self._locked(session_id, create=False) as handle:
            if handle is None:
                return False
            content = _read_all(handle)
            if expected is not None and not _has_version(content, expected):
                return False
            os.unlink(self._path(session_id))
            self._unindex(content)
            return not _first_frame_is_torn(content)

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
        with _errors():
            handle = _open(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                until, _, present = _read_all(handle).decode().partition(" ")
                if until and present != holder and time.time() < float(until):
                    return False
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{time.time() + seconds} {holder}".encode(), 0)
                return seconds > 0
            finally:
                _unlock_and_close(handle)

    # Files ------------------------------------------------------------------------------------------------------------

    def _path(self, session_id: str) -> str:
        return f"{self._folder}/{session_id[:3]}/{session_id}{_SUFFIX}"

    @contextmanager
    def _locked(self, session_id: str, *, create: bool) -> Iterator[int | None]:
        """The session's file, open and locked for this process and thread alone; ``None`` if there is none."""
        path = self._path(session_id)
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        while True:
            try:
                handle = _open(path, flags)
            except FileNotFoundError:
                yield None
                return
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                # Whoever held the lock before may have removed or replaced the file: then this is a lock on nothing.
                if os.fstat(handle).st_nlink:
                    yield handle
                    return
            finally:
                _unlock_and_close(handle)

    def _append(self, handle: int, session_id: str, content: bytes, frame: bytes) -> None:
        end = _end_of_frames(content)
        if end + len(frame) > max(_SMALLEST_REWRITE, _REWRITE_FACTOR * len(frame)):
            self._rewrite(session_id, frame)
            return
        if end < len(content):
            os.ftruncate(handle, end)  # what a writer left that was stopped in the middle
        try:
            _write(handle, frame, end)
            if self._fsync:
                os.fsync(handle)
        except OSError:
            # Half a frame would be cut off by the next save anyway; this gives back the room at once.
            os.ftruncate(handle, end)
            raise
        if self._fsync and end == 0:
            _sync_directory(os.path.dirname(self._path(session_id)))

    def _rewrite(self, session_id: str, frame: bytes) -> None:
        path = self._path(session_id)
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

    def _unindex(self, content: bytes) -> None:
        try:
            record = _last_record(content)
        except SerializationError:
            return
        if record is not None and record.user_id is not None:
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


def _frame(record: bytes) -> bytes:
    return _HEADER.pack(len(record), zlib.crc32(record)) + record


def _frames(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, end and checksum of each frame that is there in full length, oldest first."""
    start, size = _HEADER.size, len(content)
    while start <= size:
        length, checksum = _HEADER.unpack_from(content, start - _HEADER.size)
        if start + length > size or length == 0:
            return
        yield start, start + length, checksum
        start += length + _HEADER.size


def _intact(content: bytes) -> tuple[int, int] | None:
    """Start and end of the last record whose checksum is right."""
    for start, end, checksum in reversed(list(_frames(content))):
        if zlib.crc32(memoryview(content)[start:end]) == checksum:
            return start, end
    return None


def _end_of_frames(content: bytes) -> int:
    place = _intact(content)
    return place[1] if place else 0


def _last_record(content: bytes) -> SessionRecord | None:
    """The newest intact record; ``None`` in a file whose first save was never finished."""
    place = _intact(content)
    if place is not None:
        return unpack_record(content[place[0] : place[1]])
    if _first_frame_is_torn(content):
        return None
    raise SerializationError("the file has no intact frame")


def _first_frame_is_torn(content: bytes) -> bool:
    """Whether the file ends within its first frame, as it does when its writer was stopped: nothing was ever saved."""
    if len(content) < _HEADER.size:
        return True
    return _HEADER.size + int(_HEADER.unpack_from(content)[0]) > len(content)


def _has_version(content: bytes, expected: int) -> bool:
    try:
        record = _last_record(content)
    except SerializationError:
        return False
    return (record.version if record else 0) == expected


# Calls of the operating system ----------------------------------------------------------------------------------------


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StoreUnavailable if error.errno in _PASSING else StoreError
        raise kind(f"the session file {error.filename or ''} failed: {error.strerror}") from error


def _open(path: str, flags: int) -> int:
    """Open a file, making its directory if it is to be created."""
    opened = partial(os.open, path, flags | os.O_CLOEXEC, 0o600)
    try:
        return opened()
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    _make_directory(os.path.dirname(path))
    return opened()


def _make_directory(path: str) -> None:
    """Make a directory and those above it, each for this user alone; ``os.makedirs`` would do so for the last only."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_directory(os.path.dirname(path))
        _make_directory(path)


def _unlock_and_close(handle: int) -> None:
    # Closing is not enough: a process forked meanwhile has the same open file and would keep the lock for good.
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _read_file(path: str) -> bytes | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _read_all(handle)
    finally:
        os.close(handle)


def _read_all(handle: int) -> bytes:
    size = os.fstat(handle).st_size
    content = os.pread(handle, size, 0)
    while len(content) < size and (more := os.pread(handle, size - len(content), len(content))):
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
    with _errors():
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                name = entry.name.removesuffix(suffix)
                if entry.name.endswith(suffix) and is_session_id(name):
                    yield name


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
