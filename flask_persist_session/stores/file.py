"""Sessions in files: one per session, to which each save appends a frame.

A file is a sequence of frames, the last intact one counts. So a save is one small append, which costs a fraction of
writing a second file and renaming it, and a torn tail falls back to the state before. A frame has its length at both
ends: reading starts at the end of the file and costs the same however many frames there are. A file that has grown to
several times its record is rewritten through a temporary file and a rename.

Layout below the root, directories 0700 and files 0600::

    web/                            the namespace
        3fa/                        the shard
            3fa09c….session         a session
            3fa09c….history         its history, if it has one
            3fa09c….turns           where each turn of the history is
            users/5e88…/3fa09c…     its entry in the index of its user: an empty file
        leases/sweep                a lease
        notes/cleanup               a note
        transactions/9be1…          a transaction that is being settled
        damaged/3fa09c….session…    what a repair found and could not use
"""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

from ..exceptions import ConfigError, SerializationError
from ..records import Change, Deletion, Finding, Improvement, SessionQuery, SessionRecord, is_session_id
from ..serializers import pack_record
from ..tokens import SHARDS, shard_of
from . import Location, flag, make_directory, seconds
from .base import (
    SessionStore,
    check_namespace,
    check_save,
    check_transaction,
    conflict,
    cut,
    ignore,
    in_order,
    lease_holder,
    log_unreadable,
    moment_in,
    order_and_cut,
    shards_of,
)
from .file_history import FileHistory, remove_history
from .file_transactions import SUFFIX, Files, FileTransaction, left_over, remove, settle
from .file_upkeep import FileCheck, compact
from .frames import (
    NO_FILE,
    Frame,
    end_of_version,
    failure,
    framed,
    holds_another,
    last_frame,
    lock,
    name_of_user,
    open_file,
    read_last,
    record_in,
    release,
    rewrite,
    sync_directory,
    unlock,
    write_at,
)

#: A file is rewritten once it is larger than this and than so many times its newest frame. A rewrite costs as much as
#: some fifty appends.
_SMALLEST_REWRITE = 64 * 1024
_REWRITE_FACTOR = 8
#: So many threads close removed files, so many each time, and so many times are waited for at most, with their handles
#: open: closing gives back the room, which is mostly waiting for the file system. All else takes a processor; more
#: threads for that would only wait for each other.
_THREADS = 8
_CLOSED_AT_ONCE = 10
_MOST_CLOSING = 12


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
        self._root = root
        self._namespace = namespace
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
            frame = read_last(self._path(session_id), self._timeout)
        except OSError as error:
            raise failure(error) from error
        return None if frame is None else record_in(frame, session_id)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        packed = pack_record(record)
        path = self._path(record.id)
        try:
            handle, size = self._lock(path, create=expected == 0)
            try:
                end = end_of_version(handle, size, expected)
                if end is None:
                    raise conflict(record.id, expected)
                if end < size:
                    os.ftruncate(handle, end)  # what a writer left that was stopped in the middle
                self._put(path, handle, end, record, packed)
            finally:
                unlock(handle)
        except OSError as error:
            raise failure(error) from error

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        handle = self._remove(session_id, expected)
        return _close([handle]) > 0

    def delete_many(self, deletions: Sequence[Deletion]) -> list[bool]:
        removed, closing = list[bool](), deque[Future[int]]()
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(deletions), _CLOSED_AT_ONCE):
                part = deletions[start : start + _CLOSED_AT_ONCE]
                handles = [self._remove(deletion.id, deletion.expected) for deletion in part]
                removed += [handle != NO_FILE for handle in handles]
                closing.append(pool.submit(_close, handles))
                if len(closing) > _MOST_CLOSING:
                    closing.popleft().result()
        for future in closing:
            future.result()
        return removed

    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        check_transaction(changes)
        try:
            files = Files(self._lock, self._index, self._put)
            FileTransaction(files, self._folder, self._timeout, sync=self._fsync).run(changes)
        except OSError as error:
            raise failure(error) from error

    def scan(self) -> Iterator[SessionRecord]:
        for shard in range(SHARDS):
            yield from self._records(self._ids_in(shard))

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        arrange = order_and_cut
        if query.ids is not None:
            records = self._records(iter(sorted(query.ids)))
        elif query.user_id is not None:
            records = self._records(self._ids_of_user(query.user_id))
        elif query.id_prefix is not None:
            prefix = query.id_prefix
            records = self._records(name for name in self._ids_in(int(prefix[:3], 16)) if name.startswith(prefix))
        else:
            ids = (in_order(self._ids_in(shard), query) for shard in shards_of(query))
            records = self._records(chain.from_iterable(ids))
            arrange = cut if query.by_id else order_and_cut
        return arrange((record for record in records if query.matches(record)), query)

    def count(self, query: SessionQuery) -> int:
        if query != SessionQuery():
            return super().count(query)
        return sum(1 for shard in range(SHARDS) for _ in self._ids_in(shard))

    def lease(self, name: str, seconds: float) -> bool:
        path = os.path.join(self._folder, "leases", name)
        holder = lease_holder(self._holder)
        try:
            handle, _ = lock(path, self._timeout, create=True)
            try:
                until, _, present = os.pread(handle, 200, 0).decode("ascii", "replace").partition(" ")
                if present != holder and time.time() < (moment_in(until) or 0.0):
                    return False
                os.ftruncate(handle, 0)
                write_at(handle, f"{time.time() + seconds} {holder}".encode(), 0)
                return seconds > 0
            finally:
                unlock(handle)
        except OSError as error:
            raise failure(error) from error

    def namespace(self, name: str) -> FileStore:
        check_namespace(name)
        if name == self._namespace:
            return self
        return FileStore(self._root, name, fsync=self._fsync, timeout=self._timeout)

    @property
    def history(self) -> FileHistory:
        return FileHistory(self._path, self._lock, sync=self._fsync)

    def check(self, *, repair: bool, seen: Callable[[SessionRecord], object] = ignore) -> Iterator[Finding]:
        return FileCheck(self._folder, self._timeout, repair=repair, seen=seen).run()

    def optimize(self, *, full: bool = False) -> Iterator[Improvement]:
        return compact(self._folder, self._timeout, sync=self._fsync)

    def note(self, name: str, moment: float) -> None:
        path = os.path.join(self._folder, "notes", name)
        try:
            handle, _ = lock(path, self._timeout, create=True)
            try:
                # As a new file, so that there is a note at any moment, and that a full disk is noticed.
                rewrite(path, repr(moment).encode(), sync=self._fsync)
            finally:
                unlock(handle)
        except OSError as error:
            raise failure(error) from error

    def noted(self, name: str) -> float | None:
        try:
            with open(os.path.join(self._folder, "notes", name), encoding="ascii", errors="replace") as file:
                return moment_in(file.read(100))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise failure(error) from error

    # Files ------------------------------------------------------------------------------------------------------------

    def _remove(self, session_id: str, expected: int | None) -> int:
        """Remove a session; returns the handle of its file, to be closed, or ``NO_FILE`` if it was not removed."""
        if not is_session_id(session_id):
            return NO_FILE
        path = self._path(session_id)
        try:
            handle, last = self._lock_last(path)
            removed = False
            try:
                if handle != NO_FILE and expected in (None, last and last.version):
                    remove(path, last, sync=False)
                    removed = True
            finally:
                (release if removed else unlock)(handle)
        except OSError as error:
            raise failure(error) from error
        return handle if removed else NO_FILE

    def _path(self, session_id: str) -> str:
        return f"{self._folder}/{session_id[:3]}/{session_id}{SUFFIX}"

    def _lock(self, path: str, *, create: bool) -> tuple[int, int]:
        """Lock the file of a session; what a transaction left in it that was stopped is settled first."""
        while True:
            handle, size = lock(path, self._timeout, create=create)
            try:
                left = None if handle == NO_FILE else left_over(handle, size)
                if left is None:
                    return handle, size
                settle(path, handle, size, left, sync=self._fsync)
            except OSError:
                unlock(handle)
                raise
            unlock(handle)

    def _lock_last(self, path: str) -> tuple[int, Frame | None]:
        """Lock the file of a session, if there is one; also returns its last frame, which was read once if it is plain."""
        handle, size = lock(path, self._timeout, create=False)
        last = None if handle == NO_FILE else last_frame(handle, size)
        if last is None or not last.transaction:
            return handle, last
        unlock(handle)
        handle, size = self._lock(path, create=False)
        return handle, None if handle == NO_FILE else last_frame(handle, size)

    def _put(self, path: str, handle: int, end: int, record: SessionRecord, packed: bytes) -> None:
        """Write *record* behind *end*; the caller holds the lock. What fails leaves the file as it was."""
        frame = framed(record.version, packed)
        try:
            if end == 0:
                remove_history(path)  # of a session of that id that somebody removed without it
                self._index(record)
            if record.ended_at is not None or holds_another(packed, record.id):
                # Of an ended one nothing before may stay: its data is to go, and a damaged tail must not bring it back
                # to life. What looks like two records in one must not be there in part.
                rewrite(path, frame, sync=self._fsync)
            else:
                self._append(path, handle, end, frame)
        except OSError:
            # Half a frame would be cut off by the next save anyway; this gives back the room at once.
            os.ftruncate(handle, end)
            if end == 0:
                os.unlink(path)
            raise
        if self._fsync and end == 0:
            sync_directory(os.path.dirname(path))

    def _append(self, path: str, handle: int, end: int, frame: bytes) -> None:
        if end + len(frame) > max(_SMALLEST_REWRITE, _REWRITE_FACTOR * len(frame)):
            rewrite(path, frame, sync=self._fsync)
            return
        write_at(handle, frame, end)
        if self._fsync:
            os.fsync(handle)

    # The index of users -----------------------------------------------------------------------------------------------

    # An entry is made before its session and removed after it, so a crash leaves at most an entry that leads nowhere.

    def _index(self, record: SessionRecord) -> None:
        if record.user_id is not None:
            os.close(open_file(self._entry(record.id, record.user_id), os.O_WRONLY | os.O_CREAT))

    def _entry(self, session_id: str, user_id: str) -> str:
        return f"{self._folder}/{session_id[:3]}/users/{name_of_user(user_id)}/{session_id}"

    def _ids_of_user(self, user_id: str) -> Iterator[str]:
        return _names(os.path.join(self._folder, shard_of(user_id), "users", name_of_user(user_id)), "")

    def _ids_in(self, shard: int) -> Iterator[str]:
        return _names(os.path.join(self._folder, f"{shard:03x}"), SUFFIX)

    def _records(self, ids: Iterator[str]) -> Iterator[SessionRecord]:
        for session_id in ids:
            try:
                record = self.get(session_id)
            except SerializationError as error:
                log_unreadable(session_id, error)
                continue
            if record is not None:
                yield record


def _close(handles: Sequence[int]) -> int:
    """Close files; returns how many there were."""
    opened = [handle for handle in handles if handle != NO_FILE]
    for handle in opened:
        os.close(handle)
    return len(opened)


def _names(folder: str, suffix: str) -> Iterator[str]:
    """The names with *suffix* of files in *folder*, without it; none if there is no such folder.

    What is no file is foreign, as a check says, and must not keep everybody from listing, backing up and cleaning up.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(suffix)
                if entry.name.endswith(suffix) and is_session_id(name) and entry.is_file(follow_symlinks=False):
                    yield name
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise failure(error) from error
