"""Looks after a directory of session files while the application goes on.

Whatever is removed or changed, the lock of the session that it belongs to is held, as whoever writes there does. Where
there is no file to lock yet, an empty one is made for as long as it takes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Literal, TypeAlias

from ..exceptions import SerializationError
from ..records import Finding, Improvement, SessionRecord, is_session_id
from ..tokens import SHARDS
from . import make_directory
from .file_history import HISTORY, TURNS, agrees, check_history
from .file_transactions import FOLDER, SUFFIX, UNFINISHED, ids_in_marker, left_over, settle
from .frames import (
    NO_FILE,
    SAFELY,
    Frame,
    counts,
    failure,
    is_unfinished,
    last_frame,
    lock,
    name_of_user,
    open_file,
    read_last,
    read_range,
    record_in,
    rewrite,
    unlock,
)

#: Seconds for which something must have been as it is before it is no more what somebody is in the middle of.
_SETTLED = 1.0
#: What is in the directory of a namespace besides the shards.
_OTHERS = frozenset({"leases", "notes", "damaged", FOLDER})
_TRANSACTION = re.compile(rf"[0-9a-f]{{32}}({re.escape(UNFINISHED)})?", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
#: What file systems give out; a file takes whole ones.
_BLOCK = 4096
_REWRITE = "a file that it was writing anew"

Seen: TypeAlias = Callable[[SessionRecord], object]
_Again: TypeAlias = Callable[[], "Iterator[Finding]"]


class FileCheck:
    """One check of the directory of a namespace; see ``SessionStore.check``."""

    def __init__(self, folder: str, timeout: float, *, repair: bool, seen: Seen) -> None:
        self._folder = folder
        self._timeout = timeout
        self._repair = repair
        self._seen = seen
        self._user = os.geteuid()
        #: What is looked at again once it has settled, and the time from which on.
        self._suspects: deque[tuple[float, _Again]] = deque()

    def run(self) -> Iterator[Finding]:
        try:
            yield from self._top()
            for shard in range(SHARDS):
                yield from self._shard(os.path.join(self._folder, f"{shard:03x}"), f"{shard:03x}")
                yield from self._settled(time.monotonic())
            yield from self._transactions()
            while self._suspects:
                time.sleep(max(0.0, self._suspects[0][0] - time.monotonic()))
                yield from self._settled(time.monotonic())
        except OSError as error:
            raise failure(error) from error

    def _settled(self, now: float) -> Iterator[Finding]:
        while self._suspects and self._suspects[0][0] <= now:
            yield from self._suspects.popleft()[1]()

    def _look_again(self, look: _Again) -> None:
        self._suspects.append((time.monotonic() + _SETTLED, look))

    # Directories ------------------------------------------------------------------------------------------------------

    def _top(self) -> Iterator[Finding]:
        yield from self._mode(self._folder, 0o700)
        for entry in _entries(self._folder):
            if entry.name in _OTHERS:
                yield from self._mode(entry.path, 0o700)
                for file in _entries(entry.path):
                    yield from self._mode(file.path, 0o600)
            elif not _is_shard(entry):
                yield _foreign(entry.path)

    def _shard(self, folder: str, shard: str) -> Iterator[Finding]:
        entries = list(_entries(folder))
        if entries:
            yield from self._mode(folder, 0o700)
        users: dict[str, str | None] = {}
        for entry in entries:
            name = entry.name.removesuffix(SUFFIX)
            if entry.name.endswith(SUFFIX) and is_session_id(name) and name[:3] == shard:
                yield from self._session(entry.path, name, users)
            elif is_session_id(entry.name.removesuffix(f"{SUFFIX}.tmp")):
                yield from self._temporary(entry.path)
            elif _is_of_history(entry.name, shard):
                yield from self._history(entry.path)
            elif not (entry.name == "users" and entry.is_dir(follow_symlinks=False)):
                yield _foreign(entry.path)
        yield from self._index(os.path.join(folder, "users"), users)

    def _mode(self, path: str, wanted: int) -> Iterator[Finding]:
        """Whether a file or directory is this user's alone."""
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        if stat.S_ISLNK(found.st_mode):
            yield _foreign(path)
        elif found.st_uid != self._user:
            text = f"it belongs to user {found.st_uid}, not to {self._user}: give it back with chown"
            yield Finding(kind="mode", where=path, text=text)
        elif found.st_mode & 0o077:
            text = f"others may use it: its mode is {stat.S_IMODE(found.st_mode):04o} and should be {wanted:04o}"
            yield Finding(kind="mode", where=path, text=text, repaired=self._repair and _set_mode(path, wanted))

    # Sessions ---------------------------------------------------------------------------------------------------------

    def _session(self, path: str, session_id: str, users: dict[str, str | None]) -> Iterator[Finding]:
        """What is wrong with the file of a session; notes in *users* in whose index it has to be, by its hash."""
        users[session_id] = None
        if not _is_file(path):
            yield from [_foreign(path)] if os.path.lexists(path) else ()
            return
        yield from self._mode(path, 0o600)
        try:
            frame = _frame_at_end(path)
            if frame is None or frame.transaction:
                damage = list(self._under_lock(path, partial(self._unsettled, path)))
                if frame is None and not damage:
                    look = partial(self._under_lock, path, partial(self._damaged, path, session_id))
                    if os.path.getsize(path) == 0:
                        # Whoever makes the file has it open a moment before it is locked.
                        self._look_again(look)
                        return
                    damage = list(look())
                yield from damage
                if any(finding.kind != "torn" for finding in damage):
                    return
                frame = read_last(path, self._timeout)
            record = None if frame is None else record_in(frame, session_id)
        except FileNotFoundError:
            return  # removed meanwhile
        except PermissionError:
            yield Finding(kind="mode", where=path, text="this user may not read it")
            return
        except SerializationError as error:
            yield Finding(kind="record", where=session_id, text=f"{path} cannot be read and stays: {error}")
            return
        if record is not None:
            self._seen(record)
            yield from self._entry_of(record, path, users)

    def _unsettled(self, path: str, handle: int, size: int) -> Finding | None:
        """What a transaction left at the end of a file whose process was stopped."""
        frame = left_over(handle, size)
        if frame is None:
            return None
        text = f"it ends with version {frame.version} of a transaction that was "
        text += "committed, which counts" if counts(path, frame, size) else "not committed, which does not count"
        if self._repair:
            settle(path, handle, size, frame, sync=True)
        return Finding(kind="torn", where=path, text=text, repaired=self._repair)

    def _damaged(self, path: str, session_id: str, handle: int, size: int) -> Finding | None:
        """What is wrong with a file that did not end with an intact frame a moment ago."""
        last, content = last_frame(handle, size), read_range(handle, size, 0)
        if last is not None:
            return None if last.end == size else self._torn(path, handle, content, last)
        if is_unfinished(content):
            return self._leftover(path, "a session that was never saved")
        place = f"a repair moves {path} out of the way"
        if self._repair:
            place = f"its file is {self._put_aside(path, content)} now"
            os.unlink(path)
        text = f"no state of it is intact, so it is lost unless a backup has it; {place}"
        return Finding(kind="record", where=session_id, text=text, repaired=self._repair)

    def _torn(self, path: str, handle: int, content: bytes, last: Frame) -> Finding:
        tail = content[last.end :]
        text = f"its last {len(tail):,} bytes are no whole state of the session; the last one is version {last.version}"
        if self._repair:
            # Half a frame is what a process leaves that is stopped. Anything else somebody may want to look at.
            text += "" if is_unfinished(tail) else f"; the file as it was is {self._put_aside(path, content)}"
            os.ftruncate(handle, last.end)
        return Finding(kind="torn", where=path, text=text, repaired=self._repair)

    def _put_aside(self, path: str, content: bytes) -> str:
        """Keep a copy of what is damaged, for people to look at; returns where."""
        folder = os.path.join(self._folder, "damaged")
        make_directory(folder)
        aside = os.path.join(folder, f"{os.path.basename(path)}.{time.time_ns()}")
        rewrite(aside, content, sync=True)
        return aside

    def _leftover(self, path: str, what: str) -> Finding | None:
        """Something that nobody misses; the caller holds the lock of its session."""
        if not os.path.lexists(path):
            return None
        if self._repair:
            os.unlink(path)
        return Finding(kind="leftover", where=path, text=f"a process that was stopped left {what}", repaired=self._repair)

    def _temporary(self, path: str) -> Iterator[Finding]:
        """The file of a rewrite: left over if nobody is writing it, which only the holder of the lock does."""
        session = path.removesuffix(".tmp")
        if _is_file(session):
            yield from self._under_lock(session, lambda *_: self._leftover(path, _REWRITE))
        else:
            self._look_again(partial(self._lonely, path, session, _REWRITE))

    def _history(self, path: str) -> Iterator[Finding]:
        """A file of a history, which is left over if its session has no file, or may end within an entry."""
        yield from self._mode(path, 0o600)
        session = path.rpartition(".")[0] + SUFFIX
        if not os.path.lexists(session):
            self._look_again(partial(self._lonely, path, session, "a part of the history of a session that is gone"))
        elif path.endswith(HISTORY) and not agrees(session):
            yield from self._under_lock(session, lambda *_: self._torn_history(path, session))

    def _torn_history(self, path: str, session: str) -> Finding | None:
        text = check_history(session, repair=self._repair)
        return None if text is None else Finding(kind="torn", where=path, text=text, repaired=self._repair)

    # Transactions -----------------------------------------------------------------------------------------------------

    def _transactions(self) -> Iterator[Finding]:
        for entry in _entries(os.path.join(self._folder, FOLDER)):
            if _TRANSACTION.fullmatch(entry.name):
                self._look_again(partial(self._transaction, entry.path))
            else:
                yield _foreign(entry.path)

    def _transaction(self, path: str) -> Iterator[Finding]:
        """Something of a transaction that was there a while ago. Whoever is at work holds the locks until it is gone."""
        if path.endswith(UNFINISHED):
            yield from self._under_lock(path, lambda *_: self._leftover(path, "a transaction that it did not commit"))
            return
        unsettled: list[Finding] = []
        for session_id in ids_in_marker(path):
            session = os.path.join(self._folder, session_id[:3], f"{session_id}{SUFFIX}")
            if _is_file(session):
                unsettled += self._under_lock(session, partial(self._unsettled, session))
        if self._repair:
            yield from unsettled
        if any(finding.kind == "record" for finding in unsettled):
            return  # somebody has one of them locked
        yield from filter(None, [self._leftover(path, "a transaction that it committed")])

    # The index of users -----------------------------------------------------------------------------------------------

    def _entry_of(self, record: SessionRecord, path: str, users: dict[str, str | None]) -> Iterator[Finding]:
        """Whether a session is in the index of its user."""
        if record.user_id is None:
            return
        user = users[record.id] = name_of_user(record.user_id)
        entry = os.path.join(os.path.dirname(path), "users", user, record.id)
        if not os.path.lexists(entry):
            yield from self._under_lock(path, partial(self._missing, entry))

    def _missing(self, entry: str, *_: int) -> Finding | None:
        """An entry that was missing a moment ago, when its session may have been on its way out."""
        if os.path.lexists(entry):
            return None
        if self._repair:
            os.close(open_file(entry, os.O_WRONLY | os.O_CREAT))
        text = "it is not in the index of its user, so to list and to end the user's sessions leaves it out"
        return Finding(kind="index", where=os.path.basename(entry), text=text, repaired=self._repair)

    def _index(self, folder: str, users: dict[str, str | None]) -> Iterator[Finding]:
        """The entries of a shard, of which *users* says to which user each session belongs."""
        yield from self._mode(folder, 0o700)
        for user in _entries(folder):
            if not (_HASH.fullmatch(user.name) and user.is_dir(follow_symlinks=False)):
                yield _foreign(user.path)
                continue
            yield from self._mode(user.path, 0o700)
            for entry in _entries(user.path):
                yield from self._entry(entry, users.get(entry.name) == user.name)

    def _entry(self, entry: os.DirEntry[str], expected: bool) -> Iterator[Finding]:
        if not is_session_id(entry.name):
            yield _foreign(entry.path)
            return
        yield from self._mode(entry.path, 0o600)
        if not expected:
            self._look_again(partial(self._stray, entry.path))

    def _stray(self, entry: str) -> Iterator[Finding]:
        """An entry of the index that led to no session of its user a while ago."""
        session_id = os.path.basename(entry)
        session = os.path.join(self._folder, session_id[:3], f"{session_id}{SUFFIX}")
        if _is_file(session):
            yield from self._under_lock(session, partial(self._mistaken, entry))
        else:
            yield from self._lonely(entry, session, "an entry of the index that leads to no session", "index")

    def _mistaken(self, entry: str, handle: int, size: int) -> Finding | None:
        """An entry of the index of a user whose session it is not."""
        folder, session_id = os.path.split(entry)
        frame = last_frame(handle, size)
        with suppress(SerializationError):  # then whose it is cannot be known
            record = None if frame is None else record_in(frame, session_id)
            if record is not None and os.path.lexists(entry):
                return self._unless_of(record.user_id, folder, entry)
        return None

    def _unless_of(self, user_id: str | None, folder: str, entry: str) -> Finding | None:
        if user_id is not None and name_of_user(user_id) == os.path.basename(folder):
            return None
        if self._repair:
            os.unlink(entry)
        text = "the index has it under another user than its own"
        return Finding(kind="index", where=entry, text=text, repaired=self._repair)

    # What belongs to a session without a file -------------------------------------------------------------------------

    def _lonely(
        self, path: str, session: str, what: str, kind: Literal["index", "leftover"] = "leftover"
    ) -> Iterator[Finding]:
        """Something that belongs to a session that had no file a while ago."""
        if os.path.lexists(session) or not os.path.lexists(path):
            return
        repaired = self._repair and self._remove_lonely(path, session)
        if repaired or not self._repair:
            text = f"a process that was stopped left {what}"
            yield Finding(kind=kind, where=path, text=text, repaired=repaired)

    def _remove_lonely(self, path: str, session: str) -> bool:
        """Remove it unless the session comes into being at this moment; say whether it was removed."""
        handle, size = lock(session, self._timeout, create=True)
        try:
            if not is_unfinished(read_range(handle, size, 0)):
                return False
            with suppress(FileNotFoundError):
                os.unlink(path)
            os.unlink(session)
            return True
        finally:
            unlock(handle)

    def _under_lock(self, path: str, look: Callable[[int, int], Finding | None]) -> Iterator[Finding]:
        """What *look* finds, given the handle and size of a session's file that nobody else changes meanwhile."""
        try:
            handle, size = lock(path, self._timeout, create=False)
        except TimeoutError:
            yield Finding(kind="record", where=path, text=f"somebody has had it locked for more than {self._timeout:g} s")
            return
        try:
            finding = None if handle == NO_FILE else look(handle, size)
        finally:
            unlock(handle)
        if finding is not None:
            yield finding


# Tidying up -----------------------------------------------------------------------------------------------------------


def compact(folder: str, timeout: float, *, sync: bool) -> Iterator[Improvement]:
    """Rewrite files that hold states no longer needed, and remove directories of users without sessions."""
    files, directories = [], []
    try:
        for shard in filter(_is_shard, _entries(folder)):
            files += [_compacted(entry.path, timeout, sync) for entry in _entries(shard.path) if _is_session(entry)]
            users = os.path.join(shard.path, "users")
            directories += [_removed_if_empty(user.path) for user in list(_entries(users))]
    except OSError as error:
        raise failure(error) from error
    for text, freed in (
        ("rewrote {:,} files that held earlier states of their sessions", files),
        ("removed {:,} directories of users without sessions", directories),
    ):
        if any(freed):
            yield Improvement(text=text.format(sum(map(bool, freed))), freed=sum(freed))


def _compacted(path: str, timeout: float, sync: bool) -> int:
    """Rewrite a file if that gives back at least one block; returns how many bytes it gave back."""
    handle, size = lock(path, timeout, create=False)
    try:
        last = None if handle == NO_FILE or size <= _BLOCK else last_frame(handle, size)
        if last is None or last.transaction or last.end != size or _blocks(last.size) == _blocks(size):
            return 0
        rewrite(path, read_range(handle, last.size, last.end - last.size), sync=sync)
        # The new file is not asked: the lock is that of the old one, and who has removed the session meanwhile may do so.
        return (_blocks(size) - _blocks(last.size)) * _BLOCK
    finally:
        unlock(handle)


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _removed_if_empty(path: str) -> int:
    """Remove a directory if nothing is in it; whoever is about to put something there makes it anew."""
    try:
        taken = os.lstat(path).st_blocks * 512
        os.rmdir(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
            return 0
        raise
    return taken


# Looking --------------------------------------------------------------------------------------------------------------


def _frame_at_end(path: str) -> Frame | None:
    """The intact frame with which a file ends, if it does."""
    handle = os.open(path, os.O_RDONLY | SAFELY)
    try:
        size = os.fstat(handle).st_size
        frame = last_frame(handle, size)
    finally:
        os.close(handle)
    return frame if frame is not None and frame.end == size else None


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """What is in a directory; nothing if it is none, or gone."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries


def _is_shard(entry: os.DirEntry[str]) -> bool:
    return bool(re.fullmatch(r"[0-3][0-9a-f]{2}", entry.name, re.ASCII)) and entry.is_dir(follow_symlinks=False)


def _is_of_history(name: str, shard: str) -> bool:
    session_id, dot, kind = name.rpartition(".")
    return is_session_id(session_id) and session_id[:3] == shard and dot + kind in (HISTORY, TURNS)


def _is_session(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False)


def _is_file(path: str) -> bool:
    """Whether there is a plain file, which can be opened and locked."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _set_mode(path: str, mode: int) -> bool:
    """Set the mode of what is no link; say whether it is still there."""
    try:
        handle = os.open(path, os.O_RDONLY | SAFELY)
    except FileNotFoundError:
        return False
    try:
        os.fchmod(handle, mode)
    finally:
        os.close(handle)
    return True


def _foreign(path: str) -> Finding:
    return Finding(kind="foreign", where=path, text="it does not belong here, and stays; nothing of the store reads it")
