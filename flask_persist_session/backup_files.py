"""The files of backups: how they are named and put in place, which there are, and which make room for newer ones."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from typing import BinaryIO, NamedTuple

from .archive import Manifest, Progress, is_still, silent, verify
from .exceptions import BackupError
from .stores import make_directory
from .stores.frames import SAFELY, sync_directory

_NAME = re.compile(r"sessions_backup_(\d{8}-\d{6})(-part)?(?:-(\d{1,6}))?\.tar\.gz", re.ASCII)
_FORM = "%Y%m%d-%H%M%S"
_ENDINGS = (".tar.gz", ".tgz")
_UNFINISHED = ".unfinished-sessions-backup"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupFile:
    """An archive in a directory of backups."""

    path: str
    created_at: float
    """Seconds since the epoch, as its name says."""
    bytes: int
    manifest: Manifest | None
    """What it says of itself, if it verifies."""
    error: str | None
    """Why it does not verify."""


def is_archive_name(place: str) -> bool:
    """Whether *place* names an archive, and not the directory for one."""
    return place.endswith(_ENDINGS) and not os.path.isdir(place)


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    """An archive that is being written: the open file, and where it will be once it is complete."""

    file: BinaryIO
    path: str


@contextmanager
def drafting(place: str, now: float, *, part: bool) -> Iterator[Draft]:
    """Write an archive under another name; it gets its own when the context is left without an error.

    *place* is a directory, in which the archive is named after *now* and whether it has only a *part* of the sessions, or
    the archive's own name. The file is for this user alone, and on the disk before it has its name. Raises
    ``BackupError`` if *place* is taken, ``OSError``.
    """
    directory = os.path.dirname(os.path.abspath(place)) if is_archive_name(place) else os.path.abspath(place)
    make_directory(directory)
    _remove_abandoned(directory)
    draft = _reserve(place) if is_archive_name(place) else _reserve_in(directory, now, part)
    with draft.file:
        try:
            yield draft
            draft.file.flush()
            os.fsync(draft.file.fileno())
            os.rename(_unfinished(draft.path), draft.path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(_unfinished(draft.path))
            raise
    sync_directory(directory)


def _unfinished(path: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}{_UNFINISHED}")


def _reserve_in(directory: str, now: float, part: bool) -> Draft:
    stamp = datetime.fromtimestamp(now, timezone.utc).strftime(_FORM) + ("-part" if part else "")
    for number in count(1):
        suffix = f"-{number}" if number > 1 else ""
        draft = _take(os.path.join(directory, f"sessions_backup_{stamp}{suffix}.tar.gz"))
        if draft is not None:
            return draft
    raise AssertionError("unreachable")


def _reserve(path: str) -> Draft:
    draft = _take(os.path.abspath(path))
    if draft is None:
        raise BackupError(f"{path} is there already, or another backup is writing it; choose another name")
    return draft


def _take(path: str) -> Draft | None:
    """The draft of *path*, if nobody has this name or is about to: who has the unfinished file, locked, may rename it."""
    unfinished = _unfinished(path)
    try:
        handle = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    file = os.fdopen(handle, "wb")
    # Between the two calls somebody might take it for abandoned.
    if not _lock(handle) or not is_still(unfinished, handle):
        file.close()
        return None
    if os.path.lexists(path):
        os.unlink(unfinished)
        file.close()
        return None
    return Draft(file, path)


def _remove_abandoned(directory: str) -> None:
    """Remove what backups left that were killed; those under way hold a lock on theirs."""
    for name in os.listdir(directory):
        if name.startswith(".") and name.endswith(_UNFINISHED):
            path = os.path.join(directory, name)
            # What is no file of ours, and may be somebody's trap, is left alone.
            if _is_plain(path):
                with suppress(FileNotFoundError), os.fdopen(os.open(path, os.O_RDONLY | SAFELY), "rb") as file:
                    if _lock(file.fileno()) and is_still(path, file.fileno()):
                        os.unlink(path)


def _is_plain(path: str) -> bool:
    """Whether *path* is a file itself: no directory, link or pipe, whatever its name."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# Which there are ------------------------------------------------------------------------------------------------------


class _Archive(NamedTuple):
    """What the name of an archive says."""

    moment: float
    number: int
    is_part: bool
    path: str


def _archives(directory: str) -> list[_Archive]:
    """Each archive that has a name of ours, oldest first."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BackupError(f"the directory of backups {directory} cannot be read: {error.strerror}") from error
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        moment = _moment(match[1]) if match else None
        if match and moment is not None:
            found.append(_Archive(moment, int(match[3] or 1), match[2] is not None, os.path.join(directory, name)))
    return sorted(found)


def _moment(stamp: str) -> float | None:
    try:
        return datetime.strptime(stamp, _FORM).replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None


def newest_before(directory: str, now: float) -> float | None:
    """When the newest archive of *directory* was made, in seconds since the epoch.

    Those from the future do not count, nor those of a part of the sessions.
    """
    found = (archive for archive in reversed(_archives(directory)) if archive.moment <= now and not archive.is_part)
    return next((archive.moment for archive in found if _is_plain(archive.path)), None)


def rotate(directory: str, keep: int, now: float, *, part: bool) -> tuple[str, ...]:
    """Remove all archives of all sessions, or all of a *part* of them, but the newest *keep*; returns their paths.

    Archives from the future stay, and do not count: they were made before the clock was set back, and would otherwise
    push out each new one.
    """
    found = (archive for archive in _archives(directory) if archive.moment <= now and archive.is_part is part)
    past = [archive.path for archive in found if _is_plain(archive.path)]
    surplus = past[: max(0, len(past) - keep)]
    for path in surplus:
        with suppress(FileNotFoundError):  # somebody else rotates too
            os.unlink(path)
    return tuple(surplus)


def backups_in(directory: str, progress: Progress = silent) -> Iterator[BackupFile]:
    """Each archive of *directory* that has a name of ours, oldest first, read and verified as a whole."""
    for moment, _, _, path in _archives(directory):
        manifest, error = None, None
        try:
            size = os.lstat(path).st_size
            with opened(path) as file:
                manifest = verify(file, progress)
        except FileNotFoundError:
            continue  # rotated away meanwhile
        except BackupError as problem:
            error = str(problem)
        yield BackupFile(path=path, created_at=moment, bytes=size, manifest=manifest, error=error)


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The archive for reading; what goes wrong is a ``BackupError`` that names it. ``FileNotFoundError`` is left."""
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise BackupError("it is no plain file")
        with open(path, "rb") as file:
            yield file
    except BackupError as error:
        raise BackupError(f"the archive {path} is refused: {error}") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BackupError(f"the archive {path} cannot be read: {error.strerror}") from error
