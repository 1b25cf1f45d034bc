"""Records, and the entries of their histories, as lines of JSON, as backups and archives have them."""

from __future__ import annotations

import json
import logging
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from .exceptions import SerializationError
from .records import JSON, LogEntry, SessionRecord
from .serializers import DAMAGED, record_of
from .stores.history import HistoryLog

log = logging.getLogger("flask_persist_session")

#: How a line of a history begins; no line of a record does.
HISTORY = b'{"of":"'
#: So many entries of a history are shown.
LATEST = 5
#: So many entries are read at once, and about so many bytes of them are in a line.
_PAGE = 100
_LINE_BYTES = 256 * 1024


def _base64(value: object) -> str:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return b2a_base64(value, newline=False).decode()


#: Bytes are written in base64. What both write is read alike; msgspec takes a fifth of the time.
_encode_any = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_base64).encode
_encode_fast = msgspec.json.Encoder().encode


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


#: Not ``json.loads``, which guesses the encoding of each line, and takes NaN for a number.
_decode = json.JSONDecoder(parse_constant=_no_number).decode


class RecordLine(msgspec.Struct, gc=False):
    """The fields of a line of a record, of which the last ones may be missing."""

    id: str
    user_id: str | None
    tenant_id: str | None
    tags: list[str]
    metadata: dict[str, Any]
    data: bytes
    created_at: float | int
    accessed_at: float | int
    expires_at: float | int
    ended_at: float | int | None
    end_reason: str | None
    version: int
    entries: int = 0
    """How many its history has."""
    last_entry_at: float | int | None = None
    namespace: str | None = None
    archived_at: float | int | None = None


#: A third of the time that the JSON of Python takes, data included.
_decode_line = msgspec.json.Decoder(RecordLine).decode


def dump_record(record: SessionRecord, **more: JSON) -> bytes:
    """A record as a line of JSON: its id first, its data in base64, and *more* fields at the end."""
    fields = {
        "id": record.id,
        "user_id": record.user_id,
        "tenant_id": record.tenant_id,
        "tags": sorted(record.tags),
        "metadata": dict(record.metadata),
        "data": record.data,
        "created_at": record.created_at,
        "accessed_at": record.accessed_at,
        "expires_at": record.expires_at,
        "ended_at": record.ended_at,
        "end_reason": record.end_reason,
        "version": record.version,
        **more,
    }
    return _line_of(fields)


def _line_of(fields: dict[str, Any]) -> bytes:
    try:
        return _encode_fast(fields) + b"\n"
    except (TypeError, ValueError):  # half a character, which a text of Python may have; a type made of one of JSON
        return _encode_any(fields).encode() + b"\n"


def load_record(line: bytes, *, version: int | None = None) -> SessionRecord:
    """The record of a line, as this *version* of it if one is given. Raises ``SerializationError`` for any other line."""
    return load_line(line, version=version)[0]


def load_line(line: bytes, *, version: int | None = None) -> tuple[SessionRecord, RecordLine]:
    """The record of a line as ``load_record`` reads it, and all fields of the line."""
    try:
        fields = _fields_of(line)
        record = record_of(
            fields.id,
            fields.user_id,
            fields.tenant_id,
            fields.tags,
            fields.metadata,
            fields.data,
            fields.created_at,
            fields.accessed_at,
            fields.expires_at,
            fields.ended_at,
            fields.end_reason,
            fields.version if version is None else version,
        )
    except DAMAGED as error:
        raise SerializationError(f"the line is no session record: {error}") from error
    return record, fields


def _fields_of(line: bytes) -> RecordLine:
    try:
        return _decode_line(line)
    except ValueError:  # also for half a character outside of the basic plane, which a text of Python may have
        return msgspec.convert(_decode(line.decode("utf-8", "surrogatepass")), RecordLine)


# Histories ------------------------------------------------------------------------------------------------------------


def facts_of(history: HistoryLog, session_id: str) -> dict[str, JSON]:
    """What the line of a record says of the history that follows: how many entries, and when the last one was appended."""
    count = history.count(session_id)
    if not count:
        return {}
    last = _readable(history, session_id, count - 1, count)
    return {"entries": count, "last_entry_at": last[0].created_at if last else None}


def dump_history(
    history: HistoryLog, session_id: str, count: int, *, same: Callable[[], bool] = lambda: True, **more: JSON
) -> Iterator[bytes]:
    """The first *count* entries as lines, a few at a time in memory, each line with *more* fields at the end.

    It is cut off before an entry that is damaged, which is logged, and where *same* says that it is not the session's any
    more.
    """
    last = 0
    while last < count:
        page = _readable(history, session_id, last, count)
        if not page or not same():
            yield cut_off(session_id, **more)
            return
        for part in _parts(page):
            entries = [[entry.created_at, entry.data] for entry in part]
            yield _line_of({"of": session_id, "seq": part[0].seq, "entries": entries, **more})
        last = page[-1].seq


def cut_off(session_id: str, **more: JSON) -> bytes:
    """A line that says that the history ends here, though there were more entries."""
    return _line_of({"of": session_id, "seq": 0, "entries": [], **more})


def _readable(history: HistoryLog, session_id: str, after: int, count: int) -> list[LogEntry]:
    for limit in (_PAGE, 1):  # one by one up to one that is damaged
        try:
            return history.read(session_id, after=after, before=count + 1, limit=limit)
        except SerializationError as error:
            problem = error
    log.error("the history of session %s is left out from entry %d on: %s", session_id, after + 1, problem)
    return []


def _parts(entries: Sequence[LogEntry]) -> Iterator[list[LogEntry]]:
    part, size = list[LogEntry](), 0
    for entry in entries:
        if part and size + len(entry.data) > _LINE_BYTES:
            yield part
            part, size = [], 0
        part.append(entry)
        size += len(entry.data)
    yield part


def load_history(line: bytes) -> tuple[str, list[LogEntry]]:
    """The id of the session and the entries of a line: none if the history is cut off there.

    Raises ``SerializationError`` for any other line.
    """
    try:
        fields = json.loads(line)
        first, session_id = fields["seq"], fields["of"]
        entries = [
            LogEntry(seq=first + place, data=a2b_base64(data), created_at=float(created_at))
            for place, (created_at, data) in enumerate(fields["entries"])
        ]
    except DAMAGED as error:
        raise SerializationError(f"the line is no part of a history: {type(error).__name__}: {error}") from error
    return str(session_id), entries
