"""Archives of sessions that cleanups removed: a file per month, ``sessions_archive_202611.jsonl.gz``.

Each batch is added before it is removed from the store, as members of a gzip file, which ``zcat`` reads one after the
other. As in BGZF, the format of genome data, a member has its own length in the extra field of its header (RFC 1952,
2.3.1.1). So who adds to a file finds its end without decompressing it, and with it a member that a crash cut off.

A line is the record as JSON, as in a backup, with ``namespace`` and ``archived_at``. It holds an id, no token.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import chain
from typing import BinaryIO, NamedTuple, cast

from .archive import LARGEST_MEMBER, Progress, is_still, silent
from .exceptions import BackupError, SerializationError
from .record_lines import HISTORY, LATEST, dump_history, dump_record, facts_of, load_history, load_line
from .records import FIRST_MOMENT, LAST_MOMENT, LogEntry, SessionRecord, is_id_prefix
from .serializers import DAMAGED
from .stores import make_directory
from .stores.frames import SAFELY, sync_directory
from .stores.history import HistoryLog

_NAME = re.compile(r"sessions_archive_\d{6}\.jsonl\.gz", re.ASCII)
#: gzip, deflate, an extra field; no time, unknown system; 8 bytes of extra field, of which "PS" has 4: the length.
_START = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x08\0PS\x04\0"
_LENGTH = struct.Struct("<I")
_TRAILER = struct.Struct("<II")
_HEADER_BYTES = len(_START) + _LENGTH.size
_GZIP, _RAW = 31, -15
#: 6 takes two and a half times as long, for 3 % less on the disk.
_LEVEL = 3
#: A member is closed when it has grown to this; a record that is larger has one of its own.
_MEMBER_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedSession:
    """A session as an archive has it."""

    record: SessionRecord
    """Its last state."""
    namespace: str
    """The namespace it belonged to; ``"web"`` are the sessions of browsers."""
    archived_at: float
    """When the cleanup began that removed it, in seconds since the epoch."""
    path: str
    """The archive that it is in."""
    entries: int = 0
    """How many entries its history has."""
    latest: tuple[LogEntry, ...] = field(default=(), repr=False)
    """The last few of them."""


class MonthlyArchive:
    """The archives in a directory. Any number of processes may add to them at once.

    :param directory: is made, for this user alone, when the first session is archived.
    """

    def __init__(self, directory: str) -> None:
        self._directory = os.path.abspath(directory)
        self._whole: tuple[int, int, int] | None = None

    def add(
        self, namespace: str, records: Iterable[SessionRecord], now: float, *, history: HistoryLog | None = None
    ) -> None:
        """Add *records*, and what *history* has of them, to the archive of the month (UTC) of *now*.

        On return they are on the disk. Raises ``BackupError`` if that is not possible; then none of them is there.
        """
        path = os.path.join(self._directory, f"sessions_archive_{_month(now)}.jsonl.gz")
        try:
            make_directory(self._directory)
            with _locked(path) as handle:
                self._append(handle, path, _dumped(namespace, records, now, history))
        except OSError as error:
            raise BackupError(
                f"the archive {path} cannot be written: {error.strerror or error}. The sessions that were to be archived "
                "stay in the store; see PERSIST_SESSION_ARCHIVE_DIR"
            ) from error

    def _append(self, handle: int, path: str, lines: Iterable[bytes]) -> None:
        start = end = self._cut_off(handle, path)
        try:
            for content in _contents(lines):
                end += _write(handle, _member(content), end)
            os.fsync(handle)
            if start == 0:
                sync_directory(self._directory)
        except BaseException:
            os.ftruncate(handle, start)
            raise
        self._whole = _identity(handle)

    def _cut_off(self, handle: int, path: str) -> int:
        """Remove what a crash left unfinished; returns the length of what is whole, and of the file."""
        if _identity(handle) == self._whole:  # nobody else has added since this process did
            return self._whole[2]
        size = os.fstat(handle).st_size
        end = _end(_members(handle))
        if end < size:
            if not _is_torn(handle, end):
                raise BackupError(
                    f"the archive {path} is damaged at byte {end:,}, or no archive of this package. No session was "
                    "removed; move it to another directory, so that the next cleanup begins a new one"
                )
            os.ftruncate(handle, end)
        return end

    # Looking up -------------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """How many bytes the archives have together. Raises ``BackupError`` if they cannot be read."""
        return sum(os.path.getsize(path) for path in self._paths() if os.path.exists(path))

    def search(self, beginning: str, progress: Progress = silent) -> ArchivedSession | None:
        """The session that was archived last of those whose id is *beginning* or begins so; ``None`` if there is none.

        Everything archived since is decompressed. *progress* is told how many more bytes of the archives were read.

        Raises ``BackupError`` if it was not found and an archive cannot be read, ``ValueError`` if no id begins so.
        """
        if not is_id_prefix(beginning):
            raise ValueError(f"{beginning!r} is not the beginning of a session id: 3 to 67 lower-case hex digits")
        problem: BackupError | None = None
        for path in self._paths():
            try:
                with opened(path) as file:
                    found = _search(file, beginning, progress)
                    if found is not None:
                        archived = _parsed(found[0], path)
                        return replace(archived, latest=_latest(archived, found[1]))
            except BackupError as error:
                problem = problem or error
        if problem is not None:
            raise problem
        return None

    def _paths(self) -> list[str]:
        """The archives, newest month first."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BackupError(f"the directory of archives {self._directory} cannot be read: {error.strerror}") from error
        return [os.path.join(self._directory, name) for name in sorted(names, reverse=True) if _NAME.fullmatch(name)]


def _month(now: float) -> str:
    return f"{datetime.fromtimestamp(now, timezone.utc):%Y%m}"


# Writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(path: str) -> Iterator[int]:
    """The archive, open and locked; made if it is missing."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | SAFELY, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if is_still(path, handle):  # and was not moved away while we waited
                yield handle
                return
        finally:
            os.close(handle)


def _dumped(namespace: str, records: Iterable[SessionRecord], now: float, history: HistoryLog | None) -> Iterator[bytes]:
    for record in records:
        facts = facts_of(history, record.id) if history else {}
        yield dump_record(record, namespace=namespace, archived_at=now, **facts)
        if history and facts:
            yield from dump_history(history, record.id, cast(int, facts["entries"]), namespace=namespace)


def _contents(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, joined to what a member holds each."""
    gathered: list[bytes] = []
    size = 0
    for line in lines:
        if gathered and size + len(line) > _MEMBER_BYTES:
            yield b"".join(gathered)
            gathered, size = [], 0
        gathered.append(line)
        size += len(line)
    if gathered:
        yield b"".join(gathered)


def _member(content: bytes) -> bytes:
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW)
    body = deflate.compress(content) + deflate.flush()
    length = _LENGTH.pack(_HEADER_BYTES + len(body) + _TRAILER.size)
    return b"".join((_START, length, body, _TRAILER.pack(zlib.crc32(content), len(content) & 0xFFFFFFFF)))


def _write(handle: int, content: bytes, at: int) -> int:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(handle, rest, at)
        rest, at = rest[written:], at + written
    return len(content)


def _identity(handle: int) -> tuple[int, int, int]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino, status.st_size


# Reading --------------------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    start: int
    size: int


def _members(handle: int) -> list[_Member]:
    """Where the members are, up to what is no complete one."""
    members, start, size = [], 0, os.fstat(handle).st_size
    while start < size:
        header = os.pread(handle, _HEADER_BYTES, start)
        if len(header) < _HEADER_BYTES or not header.startswith(_START):
            break
        [length] = _LENGTH.unpack_from(header, len(_START))
        if length < _HEADER_BYTES or start + length > size:
            break
        members.append(_Member(start, length))
        start += length
    return members


def _end(members: list[_Member]) -> int:
    return sum(members[-1]) if members else 0


def _is_torn(handle: int, start: int) -> bool:
    """Whether what is there from *start* on, if anything, may be a member that was cut off while it was written."""
    tail = os.pread(handle, 2 * _MEMBER_BYTES, start)
    # Where another member follows, this one was whole once, and its sessions are in no store any more.
    begun = tail.startswith(_START[: len(tail)]) and _START not in tail[1:]
    # Zeros are what some file systems have in a file that grew just before the power went.
    return begun or not tail.strip(b"\0")


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The archive for reading. Raises ``BackupError``, naming it, for whatever goes wrong meanwhile."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except BackupError as error:
        raise BackupError(f"the archive {path} is refused: {error}") from error
    except OSError as error:
        raise BackupError(f"the archive {path} cannot be read: {error.strerror or error}") from error


def _read(file: BinaryIO, member: _Member) -> bytes:
    """What a member holds. Raises ``BackupError`` if it is damaged."""
    if member.size <= LARGEST_MEMBER + _MEMBER_BYTES:
        inflate = zlib.decompressobj(_GZIP)
        try:
            content = inflate.decompress(os.pread(file.fileno(), member.size, member.start), LARGEST_MEMBER + 1)
        except zlib.error as error:
            raise BackupError(f"it is damaged at byte {member.start:,}: {error}") from error
        if len(content) <= LARGEST_MEMBER:
            if not inflate.eof or inflate.unused_data or not content.endswith(b"\n"):
                raise BackupError(f"it is damaged at byte {member.start:,}")
            return content
    raise BackupError(f"its member at byte {member.start:,} has more than {LARGEST_MEMBER:,} bytes; look with zcat")


def _all_members(file: BinaryIO) -> list[_Member]:
    """Where the members are, without one that is being written. Raises ``BackupError`` for a file that is damaged."""
    members = _members(file.fileno())
    if not _is_torn(file.fileno(), _end(members)):
        raise BackupError(f"it is damaged at byte {_end(members):,}, or no archive of this package")
    return members


def _search(file: BinaryIO, beginning: str, progress: Progress) -> tuple[bytes, Iterator[bytes]] | None:
    """The last line of the session's record, and the lines after it."""
    # In JSON there is no line end within a line, so this matches nothing but the first field.
    wanted = b'\n{"id":"' + beginning.encode()
    problem: BackupError | None = None
    members = _all_members(file)
    for number, member in reversed(list(enumerate(members))):
        try:
            content = b"\n" + _read(file, member)
        except BackupError as error:
            problem = problem or error
            continue
        at = content.rfind(wanted) + 1
        if at:
            line, _, rest = content[at:].partition(b"\n")
            following = (line for later in members[number + 1 :] for line in _lines(file, later))
            return line, chain(rest.split(b"\n")[:-1], following)
        progress(member.size)
    if problem is not None:
        raise problem
    return None


def _latest(archived: ArchivedSession, lines: Iterator[bytes]) -> tuple[LogEntry, ...]:
    """The last few entries of its history, with which *lines* begin."""
    latest, last = deque[LogEntry](maxlen=LATEST), 0
    try:
        while last < archived.entries and (line := next(lines, b"")).startswith(HISTORY):
            entries = load_history(line)[1]
            latest.extend(entries)
            last = entries[-1].seq if entries else archived.entries  # it is cut off there
    except SerializationError as error:
        raise BackupError(f"the history of session {archived.record.id} cannot be read: {error}") from error
    return tuple(latest)


def _parsed(line: bytes, path: str) -> ArchivedSession:
    try:
        record, fields = load_line(line)
        archived_at = fields.archived_at
        if archived_at is None or fields.namespace is None:
            raise ValueError("it does not say when it was archived, or of which namespace")
        if not FIRST_MOMENT <= archived_at < LAST_MOMENT:
            raise ValueError("it was archived beyond all dates")
        return ArchivedSession(
            record=record,
            namespace=fields.namespace,
            archived_at=float(archived_at),
            path=path,
            entries=fields.entries,
        )
    except (SerializationError, *DAMAGED) as error:
        raise BackupError(f"it has a line that is no session: {error}") from error


# Restoring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a verified archive has."""

    counts: Mapping[str, int]
    """How many records of each namespace."""
    members: list[_Member] = field(repr=False)
    superseded: frozenset[int] = field(repr=False)
    """Records, counted from 0, of sessions that the archive has in a later state too."""

    @property
    def records(self) -> int:
        """How many records ``read_lines`` gives."""
        return sum(self.counts.values())


def is_monthly_archive(file: BinaryIO) -> bool:
    """Whether a file begins as these archives do."""
    return os.pread(file.fileno(), len(_START), 0) == _START


def verify(file: BinaryIO, progress: Progress = silent, *, now: float) -> Contents:
    """Read the whole of an archive, comparing checksums; *progress* is told of records.

    A session can be in it twice: it was archived, stayed because of a request or a crash at that moment, and ended later.
    Only its last state counts, at least where an earlier one is still active at *now*.

    Raises ``BackupError`` for an archive that is damaged or none.
    """
    members = _all_members(file)
    counts: Counter[str] = Counter()
    active: dict[str, int] = {}
    superseded: set[int] = set()
    records = (line for line in _all_lines(file, members, progress) if not line.startswith(HISTORY))
    for number, line in enumerate(records):
        archived = _parsed(line, file.name)
        record = archived.record
        counts[archived.namespace] += 1
        if record.id in active:
            superseded.add(active.pop(record.id))
            counts[archived.namespace] -= 1
        if record.state(now) == "active":
            active[record.id] = number
    return Contents(counts=dict(counts), members=members, superseded=frozenset(superseded))


def _all_lines(file: BinaryIO, members: list[_Member], progress: Progress) -> Iterator[bytes]:
    for member in members:
        lines = _lines(file, member)
        yield from lines
        progress(len(lines))


def _lines(file: BinaryIO, member: _Member) -> list[bytes]:
    return _read(file, member).split(b"\n")[:-1]


def read_lines(file: BinaryIO, contents: Contents) -> Iterator[tuple[str, list[bytes]]]:
    """The lines of each member of a verified archive, with its namespace.

    Raises ``BackupError`` if it was damaged since.
    """
    number, namespace = -1, ""
    for member in contents.members:
        kept = list[bytes]()
        for line in _lines(file, member):
            if not line.startswith(HISTORY):
                number += 1
                # A member has records of one namespace.
                namespace = namespace if kept else _parsed(line, file.name).namespace
            if number not in contents.superseded:
                kept.append(line)
        yield namespace, kept


def read_archive(path: str, *, now: float) -> Iterator[tuple[str, SessionRecord]]:
    """Yield namespace and record of the sessions of an archive, once the whole of it is verified.

    Raises ``BackupError`` for an archive that is missing, damaged or none, before the first one is yielded.
    """
    with opened(path) as file:
        for namespace, lines in read_lines(file, verify(file, now=now)):
            yield from ((namespace, _parsed(line, path).record) for line in lines if not line.startswith(HISTORY))
