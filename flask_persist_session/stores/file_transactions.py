"""Several session files changed together: all or none, wherever the process is stopped.

Each file gets a frame that bears the name of the transaction and does not count. Then one file of that name, the marker,
comes into being by a rename: that moment all of them count. Each is settled now as any save or deletion is done, by an
ordinary frame behind it or the removal of the file, and then the marker goes. All of it happens under the locks of all the
files, taken in the order of their ids.

Nothing is marked in place: what an ordinary frame follows has been committed, because whoever gets the lock of a file that
ends in a frame of a transaction either settles it, if there is the marker, or cuts it off. A save that does so is as safe
against a stop in the middle as any other, and costs no reader anything. A new file gets its name when its frame is
complete, so that what was never committed reads as missing.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

from ..exceptions import SerializationError
from ..records import Change, Deletion, SessionRecord, is_session_id
from ..serializers import pack_record, unpack_user
from . import make_directory
from .base import conflict
from .file_history import remove_history
from .frames import (
    NO_FILE,
    Frame,
    counts,
    end_of_version,
    ends_plainly,
    framed,
    last_frame,
    lock,
    marker_of,
    name_of_user,
    remove_if_there,
    rewrite,
    sync_directory,
    unlock,
    write_at,
)

log = logging.getLogger("flask_persist_session")

SUFFIX = ".session"
#: The folder of the markers, and how a file is called there that is not complete.
FOLDER = "transactions"
UNFINISHED = ".new"


@dataclass(frozen=True)
class Files:
    """What a transaction needs of the store."""

    lock: Callable[..., tuple[int, int]]
    """Locks the file of a session, which ends then in a frame that counts of itself."""
    index: Callable[[SessionRecord], None]
    """Enters a new session in the index of its user."""
    put: Callable[[str, int, int, SessionRecord, bytes], None]
    """Writes the frame of a record, to the path and locked handle given, at an offset."""


@dataclass
class _Step:
    """A file that is locked, and where the frame of the transaction begins and ends in it."""

    change: Change | Deletion
    path: str
    handle: int
    start: int
    end: int


class FileTransaction:
    """One transaction on the files below *folder*."""

    def __init__(self, files: Files, folder: str, timeout: float, *, sync: bool) -> None:
        self._files = files
        self._folder = folder
        self._timeout = timeout
        self._sync = sync
        self._name = secrets.token_hex(16)
        self._unfinished = os.path.join(folder, FOLDER, self._name + UNFINISHED)
        self._steps: list[_Step] = []
        self._committed = False

    def run(self, changes: Sequence[Change | Deletion]) -> None:
        try:
            for change in sorted(changes, key=attrgetter("id")):
                self._prepare(change)
            if self._steps:
                self._settle(self._commit())
        finally:
            self._leave()

    def _leave(self) -> None:
        try:
            for step in () if self._committed else self._steps:
                self._take_back(step)
        finally:
            for step in self._steps:
                unlock(step.handle)

    # Before the marker ------------------------------------------------------------------------------------------------

    def _prepare(self, change: Change | Deletion) -> None:
        if not is_session_id(change.id):
            if change.expected is not None:
                raise conflict(change.id, change.expected)
            return
        path = os.path.join(self._folder, change.id[:3], f"{change.id}{SUFFIX}")
        version, content = 0, b""
        if isinstance(change, Change):
            version, content = change.record.version, pack_record(change.record)
        frame = framed(version, content, self._name)
        while not self._append(change, path, frame):
            if not isinstance(change, Change) or change.expected:
                if change.expected is not None:
                    raise conflict(change.id, change.expected)
                return  # it is gone already
            if self._create(change, path, frame):
                return

    def _create(self, change: Change, path: str, frame: bytes) -> bool:
        """Make the file of a new session, locked; say whether there was none."""
        handle = self._written(frame)
        try:
            self._files.index(change.record)
            make_directory(os.path.dirname(path))
            os.link(self._unfinished, path)
        except FileExistsError:
            unlock(handle)
            return False
        except OSError:
            unlock(handle)
            raise
        finally:
            os.unlink(self._unfinished)
        self._steps.append(_Step(change, path, handle, 0, len(frame)))
        if self._sync:
            sync_directory(os.path.dirname(path))
        return True

    def _append(self, change: Change | Deletion, path: str, frame: bytes) -> bool:
        """Lock a file that is there and write *frame* to it; say whether there was one."""
        handle, size = self._files.lock(path, create=False)
        if handle == NO_FILE:
            return False
        start = _end_for(change, handle, size)
        if start is None:
            unlock(handle)
            raise conflict(change.id, change.expected)
        self._steps.append(_Step(change, path, handle, start, start + len(frame)))
        if start < size:
            os.ftruncate(handle, start)
        write_at(handle, frame, start)
        if self._sync:
            os.fsync(handle)
        return True

    def _take_back(self, step: _Step) -> None:
        os.ftruncate(step.handle, step.start)
        if step.start == 0:
            os.unlink(step.path)
            if isinstance(step.change, Change):
                unindex(step.path, step.change.record.user_id)

    def _written(self, content: bytes) -> int:
        """A new file with *content*, locked, which is complete but has not its name yet."""
        handle, _ = lock(self._unfinished, self._timeout, create=True)
        try:
            write_at(handle, content, 0)
            if self._sync:
                os.fsync(handle)
        except OSError:
            os.unlink(self._unfinished)
            unlock(handle)
            raise
        return handle

    def _commit(self) -> str:
        """Make the marker, which holds the ids; returns its path."""
        marker = marker_of(self._steps[0].path, self._name)
        handle = self._written("".join(f"{step.change.id}\n" for step in self._steps).encode())
        # Said before it is so: stopped in between, it is nothing that was committed, and nobody takes back what was.
        self._committed = True
        try:
            os.rename(self._unfinished, marker)
        except OSError:
            self._committed = False
            os.unlink(self._unfinished)
            raise
        finally:
            unlock(handle)
        return marker

    # Behind the marker ------------------------------------------------------------------------------------------------

    def _settle(self, marker: str) -> None:
        try:
            if self._sync:
                sync_directory(os.path.dirname(marker))
                sync_directory(self._folder)
            for step in self._steps:
                if isinstance(step.change, Change):
                    record = step.change.record
                    self._files.put(step.path, step.handle, step.end, record, pack_record(record))
                else:
                    remove(step.path, last_frame(step.handle, step.start), sync=self._sync)
            with suppress(FileNotFoundError):  # a check was faster
                os.unlink(marker)
        except OSError as error:
            # All of it counts, by the marker that stays; to say that it failed would be wrong.
            log.warning("a transaction is done, but %s was not settled: %s", marker, error.strerror)


def _end_for(change: Change | Deletion, handle: int, size: int) -> int | None:
    """Where the frame for *change* goes; ``None`` if the version is another one."""
    if isinstance(change, Change):
        return end_of_version(handle, size, change.expected)
    if change.expected is None:
        last = last_frame(handle, size)
        return size if last is None else last.end
    return end_of_version(handle, size, change.expected) if change.expected else None


# What was left by somebody who was stopped ----------------------------------------------------------------------------


def left_over(handle: int, size: int) -> Frame | None:
    """The frame of a transaction with which a file ends, whose lock is held: somebody was stopped in the middle of it."""
    frame = None if ends_plainly(handle, size) else last_frame(handle, size)
    return frame if frame is not None and frame.transaction else None


def settle(path: str, handle: int, size: int, frame: Frame, *, sync: bool) -> None:
    """Do what is left to do for what was left over, or cut it off if it does not count.

    The file may be another one afterwards, or gone.
    """
    if counts(path, frame, size):
        if frame.record:
            rewrite(path, framed(frame.version, bytes(frame.record)), sync=sync)
        else:
            remove(path, last_frame(handle, frame.start), sync=sync)
    elif frame.start:
        os.ftruncate(handle, frame.start)
    else:
        remove(path, frame, sync=False)


def remove(path: str, last: Frame | None, *, sync: bool) -> None:
    """Remove the file of a session whose last frame is *last*, its history, and its entry in the index of its user."""
    # First, so that a crash leaves no history without a session, which another one of that id would inherit.
    remove_history(path)
    os.unlink(path)
    remove_if_there(f"{path}.tmp")  # of a rewrite that was stopped
    with suppress(SerializationError):  # then whose it was cannot be known any more
        if last is not None and last.record:
            unindex(path, unpack_user(last.record))
    if sync:
        sync_directory(os.path.dirname(path))


def unindex(path: str, user_id: str | None) -> None:
    """Remove the entry of the session with the file *path* from the index of its user."""
    if user_id is not None:
        folder, _, name = path.rpartition("/")
        with suppress(FileNotFoundError):
            os.unlink(f"{folder}/users/{name_of_user(user_id)}/{name.removesuffix(SUFFIX)}")


def ids_in_marker(path: str) -> list[str]:
    """The sessions that a transaction changed; none if its marker is gone."""
    with suppress(FileNotFoundError), open(path, encoding="ascii", errors="replace") as file:
        return list(filter(is_session_id, file.read().split("\n")))
    return []
