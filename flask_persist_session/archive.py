"""The archive of a backup: a gzip'd tar that ``tar -tzf`` lists, with the records as JSON Lines and a manifest.

::

    web/records-000001.jsonl    a namespace, some MB of records: one JSON object a line, the data in base64, and after
                                each the lines of its history, if it has one
    web/records-000002.jsonl
    manifest.json               format, time, counts, and of each member its SHA-256, size and number of records

The manifest comes last, so an archive that was cut off has none. Nothing is ever extracted to the disk, and reading is
bounded whatever an archive says of itself. What is written holds ids, no tokens: it signs nobody in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeAlias, TypeVar

from .exceptions import BackupError
from .record_lines import HISTORY, dump_record
from .records import JSON, SessionRecord
from .serializers import DAMAGED

FORMAT = 1
MANIFEST = "manifest.json"
#: A member is closed when it has grown to this; a record that is larger has one of its own.
_MEMBER_BYTES = 2 * 1024 * 1024
#: No member is larger. With it a session may have some 47 MB, and what reads an archive needs so much memory at most.
LARGEST_MEMBER = 64 * 1024 * 1024
#: A manifest may have so many bytes, and so many more for each member before it, of which it needs some 200: in memory JSON
#: can be thirty times as large.
_MANIFEST_BYTES = 256 * 1024
_MANIFEST_BYTES_A_MEMBER = 256
_MEMBER_NAME = re.compile(r"([a-z0-9_]{1,40})/records-(\d{6,9})\.jsonl", re.ASCII)
#: What a newer release might put beside the records: read on to its manifest, which says so.
_OTHER_NAME = re.compile(r"[a-z0-9_]{1,40}/[a-z]{1,40}-\d{6,9}\.jsonl", re.ASCII)
_BLOCK = 512
_READ_BYTES = 256 * 1024
_GZIP = 31
_LEVEL = 1
_T = TypeVar("_T")
#: Is told how many more records were looked at.
Progress: TypeAlias = Callable[[int], object]


def silent(count: int) -> None:
    """Tell nobody of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an archive says of itself."""

    format: int
    created_at: float
    """Seconds since the epoch."""
    package: str
    """The release of this package that wrote it."""
    stores: Mapping[str, str]
    """The kind of store of each namespace."""
    filters: Mapping[str, Any]
    """Which sessions were asked for."""
    counts: Mapping[str, Mapping[str, int]]
    """How many records of each state each namespace has."""
    members: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """``sha256``, ``bytes`` and ``records`` of each member, in their order."""

    @property
    def records(self) -> int:
        """How many records the archive has."""
        return sum(sum(states.values()) for states in self.counts.values())


def fastest_zlib() -> Any:
    """The module that compresses archives: ``isal_zlib``, which takes less than half the time for it, or ``zlib``.

    What one writes the other reads. ``isal`` is an extra, for it is not made for every machine.
    """
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    return isal_zlib


# Writing --------------------------------------------------------------------------------------------------------------


class ArchiveWriter:
    """Writes an archive to an open file; leaving the context without an error writes the manifest, which completes it.

    Hashing and compressing run in a thread of their own, a member behind.
    """

    def __init__(self, file: BinaryIO, *, created_at: float) -> None:
        self._file = file
        self._created_at = created_at
        self._gzip = fastest_zlib().compressobj(_LEVEL, wbits=_GZIP)
        self._thread = ThreadPoolExecutor(1, "session-archive")
        self._pending: Future[None] | None = None
        self._members: dict[str, dict[str, Any]] = {}
        self._namespace = ""
        self._number = self._size = 0
        self._lines: list[bytes] = []

    def start(self, namespace: str) -> None:
        """What is added from now on belongs to this namespace."""
        self._flush()
        self._namespace, self._number = namespace, 0

    def add(self, record: SessionRecord, **more: JSON) -> bool:
        """Add a record with *more* fields, unless it is too large for an archive; say whether it was added."""
        return self.add_line(dump_record(record, **more))

    def add_line(self, line: bytes) -> bool:
        """Add a line of the history of the record that was added last; say whether it was, as ``add`` does."""
        if len(line) > LARGEST_MEMBER:
            return False
        if self._size + len(line) > _MEMBER_BYTES:
            self._flush()
        self._lines.append(line)
        self._size += len(line)
        return True

    def complete(self, **facts: Any) -> None:
        """Write the manifest, of *facts* about the records, and the end of the archive."""
        self._flush()
        self._wait()
        manifest = Manifest(format=FORMAT, created_at=self._created_at, members=self._members, **facts)
        text = json.dumps(asdict(manifest), indent=1).encode()
        self._write(self._header(MANIFEST, len(text)) + _padded(text) + bytes(2 * _BLOCK))
        self._file.write(self._gzip.flush())

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self._thread.shutdown()

    def _flush(self) -> None:
        if self._lines:
            self._wait()
            self._number += 1
            name = f"{self._namespace}/records-{self._number:06}.jsonl"
            self._pending = self._thread.submit(self._write_member, name, self._lines)
            self._lines, self._size = [], 0

    def _wait(self) -> None:
        """Wait for the member before, and raise what went wrong with it: there is one at a time in memory."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write_member(self, name: str, lines: list[bytes]) -> None:
        # In large pieces: after each the thread waits for its turn in the interpreter, some milliseconds.
        content = b"".join(lines)
        digest = hashlib.sha256(content).hexdigest()
        self._members[name] = {"sha256": digest, "bytes": len(content), "records": count_records(content)}
        self._write(self._header(name, len(content)) + _padded(content))

    def _write(self, content: bytes) -> None:
        self._file.write(self._gzip.compress(content))

    def _header(self, name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = size, int(self._created_at), 0o600
        return info.tobuf(tarfile.USTAR_FORMAT)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % _BLOCK)


# Reading --------------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file of an archive."""

    name: str
    content: bytes

    @property
    def namespace(self) -> str:
        """Whose records these are."""
        return self.name.partition("/")[0]


def verify(file: BinaryIO, progress: Progress = silent) -> Manifest:
    """Read the whole archive and compare it with its manifest, which is returned; *progress* is told of records.

    Raises ``BackupError`` for an archive that is broken, cut off, of a newer release, or none.
    """
    found: dict[str, dict[str, Any]] = {}
    for member in ahead(read_members(file)):
        if member.name == MANIFEST:
            return _checked(_parse(member.content), found)
        if not member.content.endswith(b"\n"):
            raise BackupError(f"its member {member.name} ends within a line")
        digest = hashlib.sha256(member.content).hexdigest()
        records = count_records(member.content)
        found[member.name] = {"sha256": digest, "bytes": len(member.content), "records": records}
        progress(records)
    raise BackupError("it has no manifest")


def count_records(content: bytes) -> int:
    """How many of the lines are records; others are of histories."""
    # In JSON there is no line end within a line.
    return content.count(b"\n") - content.count(b"\n" + HISTORY) - content.startswith(HISTORY)


def read_lines(file: BinaryIO, manifest: Manifest) -> Iterator[tuple[str, list[bytes]]]:
    """The lines of each member of a verified archive, with its namespace.

    Raises ``BackupError`` if the file was changed since.
    """
    return ahead(_lines_as_verified(file, manifest))


def _lines_as_verified(file: BinaryIO, manifest: Manifest) -> Iterator[tuple[str, list[bytes]]]:
    for member in read_members(file):
        if member.name != MANIFEST:
            facts = manifest.members.get(member.name, {})
            if hashlib.sha256(member.content).hexdigest() != facts.get("sha256"):
                raise BackupError("it was changed while it was being read")
            yield member.namespace, member.content.split(b"\n")[:-1]


def _checked(manifest: Manifest, found: Mapping[str, Mapping[str, Any]]) -> Manifest:
    if list(manifest.members) != list(found):
        raise BackupError("its members are not those that its manifest lists")
    records: Counter[str] = Counter()
    for name, facts in manifest.members.items():
        if facts != found[name]:
            raise BackupError(f"its member {name} is not the one that was written: size, count or checksum differ")
        if not _MEMBER_NAME.fullmatch(name):
            raise BackupError(f"it has the unknown member {name}")
        records[name.partition("/")[0]] += facts["records"]
    counted = Counter({namespace: sum(states.values()) for namespace, states in manifest.counts.items()})
    if +records != +counted:
        raise BackupError("its counts are not those of its records")
    return manifest


def _parse(content: bytes) -> Manifest:
    try:
        values = json.loads(content)
        version = values["format"]
        if type(version) is int and version > FORMAT:
            raise BackupError(
                f"it has format {version}, and this release reads formats up to {FORMAT}; use the release that made it"
            )
        if version != FORMAT or not _is_manifest(values):
            raise BackupError("its manifest is not one of this package")
        return Manifest(**values)
    except DAMAGED as error:
        raise BackupError(f"its manifest cannot be read: {error}") from error


def _is_manifest(values: Any) -> bool:
    return (
        type(values["created_at"]) in (float, int)
        and type(values["package"]) is str
        and all(type(values[name]) is dict for name in ("stores", "filters", "counts", "members"))
        and all(type(number) is int and number >= 0 for states in values["counts"].values() for number in states.values())
    )


def read_members(file: BinaryIO) -> Iterator[Member]:
    """The members of an archive in their order, the manifest last. Raises ``BackupError`` for anything unexpected."""
    stream, seen = _Inflated(file), set[str]()
    try:
        while True:
            name, size = _read_header(stream.read(_BLOCK), _MANIFEST_BYTES + _MANIFEST_BYTES_A_MEMBER * len(seen))
            if name in seen:
                raise BackupError(f"it has the member {name} twice")
            seen.add(name)
            content = stream.read(size)
            stream.read(-size % _BLOCK)
            if name == MANIFEST:
                stream.expect_end()
            yield Member(name, content)
            if name == MANIFEST:
                return
    except (stream.error, tarfile.HeaderError) as error:
        raise BackupError(f"it is damaged, or no archive of this package: {error}") from error


def _read_header(block: bytes, largest_manifest: int) -> tuple[str, int]:
    # Not by opening it with tarfile: that reads extended headers and names of any length into memory.
    info = tarfile.TarInfo.frombuf(block, "ascii", "backslashreplace")
    if not info.isreg() or info.type != tarfile.REGTYPE or info.linkname:
        raise BackupError(f"its member {info.name!r:.100} is no plain file; such an archive is not of this package")
    if info.name != MANIFEST and not _OTHER_NAME.fullmatch(info.name):
        raise BackupError(f"its member {info.name!r:.100} has a name that no archive of this package has")
    largest = largest_manifest if info.name == MANIFEST else LARGEST_MEMBER
    if not 0 <= info.size <= largest:
        raise BackupError(f"its member {info.name} says to have {info.size:,} bytes, {largest:,} are possible")
    return info.name, info.size


class _Inflated:
    """What a gzip file contains, a bounded piece at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        module = fastest_zlib()
        self._gzip = module.decompressobj(_GZIP)
        self.error: type[Exception] = module.error
        """What is raised if it is no gzip, or a damaged one."""

    def read(self, size: int) -> bytes:
        """Just so many bytes. Raises ``BackupError`` if there are fewer, ``error`` if it is no gzip."""
        content = self._read_up_to(size)
        if len(content) < size:
            raise BackupError("it is cut off")
        return content

    def _read_up_to(self, size: int) -> bytes:
        pieces, missing = [], size
        while missing and not self._gzip.eof:
            source = self._gzip.unconsumed_tail or self._file.read(_READ_BYTES)
            pieces.append(self._gzip.decompress(source, missing))
            missing -= len(pieces[-1])
            if not source and not pieces[-1]:
                raise BackupError("it is cut off")
        return b"".join(pieces)

    def expect_end(self) -> None:
        """Raise ``BackupError`` unless what comes is the end of a tar: two blocks of zeros, and some to fill a record."""
        most = 2 * _BLOCK + tarfile.RECORDSIZE
        rest = self._read_up_to(most + 1)  # one byte more, for then the checksum of gzip is read too
        if len(rest) < 2 * _BLOCK:
            raise BackupError("it is cut off")
        if len(rest) > most or rest.strip(b"\0") or self._gzip.unused_data or self._file.read(1):
            raise BackupError("something follows its manifest")


def ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, of which a thread of its own fetches the next one while this one is looked at."""
    fetch = partial(next, items, None)
    with ThreadPoolExecutor(1, "session-archive") as thread:
        pending = thread.submit(fetch)
        while (item := pending.result()) is not None:
            pending = thread.submit(fetch)
            yield item


def is_still(path: str, handle: int) -> bool:
    """Whether *path* names the open file of *handle*, which somebody may have removed or replaced meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
