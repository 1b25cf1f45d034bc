"""A record as a line of JSON, as backups and archives have it."""

from __future__ import annotations

import json
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from typing import Any

from .exceptions import SerializationError
from .records import JSON, SessionRecord
from .serializers import DAMAGED, record_of

_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
#: Not ``json.loads``, which guesses the encoding of each line.
_decode = json.JSONDecoder().decode


def dump_record(record: SessionRecord, **more: JSON) -> bytes:
    """A record as a line of JSON: its id first, its data in base64, and *more* fields at the end."""
    fields = {
        "id": record.id,
        "user_id": record.user_id,
        "tenant_id": record.tenant_id,
        "tags": sorted(record.tags),
        "metadata": dict(record.metadata),
        "data": b2a_base64(record.data, newline=False).decode(),
        "created_at": record.created_at,
        "accessed_at": record.accessed_at,
        "expires_at": record.expires_at,
        "ended_at": record.ended_at,
        "end_reason": record.end_reason,
        "version": record.version,
        **more,
    }
    return _encode(fields).encode() + b"\n"


def load_record(line: bytes, *, version: int | None = None) -> SessionRecord:
    """The record of a line, as this *version* of it if one is given. Raises ``SerializationError`` for any other line."""
    return load_line(line, version=version)[0]


def load_line(line: bytes, *, version: int | None = None) -> tuple[SessionRecord, Mapping[str, Any]]:
    """The record of a line as ``load_record`` reads it, and all fields of the line."""
    try:
        fields = _decode(line.decode("utf-8", "surrogatepass"))
        record = record_of(
            fields["id"],
            fields["user_id"],
            fields["tenant_id"],
            fields["tags"],
            fields["metadata"],
            a2b_base64(fields["data"]),
            fields["created_at"],
            fields["accessed_at"],
            fields["expires_at"],
            fields["ended_at"],
            fields["end_reason"],
            fields["version"] if version is None else version,
        )
    except DAMAGED as error:
        raise SerializationError(f"the line is no session record: {type(error).__name__}: {error}") from error
    return record, fields
