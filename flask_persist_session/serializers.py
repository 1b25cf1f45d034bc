"""Turning session data into bytes and back with exact types, and the envelope that says how it was done.

Three serializers: ``msgpack`` (the default; C speed), ``json`` (readable) and ``pickle`` (opt-in, signed). The first two
share one table of the types that go beyond JSON, so they store the same values. The same data always gives the same
bytes, and encoding what was decoded gives the bytes back: that is how a change, even a nested one, is noticed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import ormsgpack
from itsdangerous import Signer, want_bytes
from markupsafe import Markup

from .envelope import Envelope
from .exceptions import SerializationError
from .records import FIRST_MOMENT, JSON, LAST_MOMENT, SessionRecord, is_session_id

_Type: TypeAlias = type
_Convert: TypeAlias = Callable[[Any, int], Any]

#: How deep values may be nested. ormsgpack stops at 255 and Python's own stack is near; this leaves room for both.
MAX_DEPTH = 100


# Types beyond JSON ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """How values of one exact type are kept: as a plain value (str, bytes or list) under a number and a tag."""

    type: _Type
    number: int
    """MessagePack extension type; never reuse one."""
    tag: str
    """Key of the one-item object that holds it in JSON; where Flask's session has a tag for the type, it is the same."""
    plain: _Type
    """What ``dump`` gives and ``load`` takes; anything else is damage, such as a size that a ``bytearray`` would take."""
    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]
    unordered: bool = False
    """Iteration order depends on how a set was built; only sorted by their bytes do equal sets give equal bytes."""


def _dump_datetime(value: datetime) -> list[Any]:
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _dump_zone(value.tzinfo, value.utcoffset())]


def _load_datetime(plain: list[Any]) -> datetime:
    stamp, fold, zone = plain
    return datetime.fromisoformat(stamp).replace(tzinfo=_load_zone(zone), fold=fold)


def _dump_time(value: time) -> list[Any]:
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _dump_zone(value.tzinfo, value.utcoffset())]


def _load_time(plain: list[Any]) -> time:
    stamp, fold, zone = plain
    return time.fromisoformat(stamp).replace(tzinfo=_load_zone(zone), fold=fold)


def _dump_zone(zone: tzinfo | None, offset: timedelta | None) -> str | list[int] | None:
    if zone is None:
        return None
    if isinstance(zone, ZoneInfo) and zone.key:
        return zone.key
    if offset is None:
        raise ValueError(f"the time zone {zone!r} has no offset from UTC")
    return _dump_timedelta(offset)


def _load_zone(plain: str | list[int] | None) -> tzinfo | None:
    if plain is None:
        return None
    if isinstance(plain, str):
        return ZoneInfo(plain)
    offset = _load_timedelta(plain)
    return timezone(offset) if offset else timezone.utc


def _dump_timedelta(value: timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _load_timedelta(plain: list[int]) -> timedelta:
    return timedelta(*plain)


def _pairs(value: Mapping[Any, Any]) -> list[list[Any]]:
    return [[key, item] for key, item in value.items()]


def _dump_surrogates(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def _load_surrogates(plain: bytes) -> str:
    return plain.decode("utf-8", "surrogatepass")


_DICT = _Kind(dict, 12, " k", list, _pairs, dict)  # a dict with a key that is no str
_STR = _Kind(str, 13, " s8", bytes, _dump_surrogates, _load_surrogates)  # a str that UTF-8 does not allow
# An int beyond 64 bits, in hexadecimal: Python limits the length of decimal ones.
_INT = _Kind(int, 14, " i", str, hex, lambda plain: int(plain, 16))
_KINDS = (
    _Kind(tuple, 1, " t", list, list, tuple),
    _Kind(set, 2, " set", list, list, set, unordered=True),
    _Kind(frozenset, 3, " fs", list, list, frozenset, unordered=True),
    _Kind(datetime, 4, " dt", list, _dump_datetime, _load_datetime),
    _Kind(date, 5, " da", str, date.isoformat, date.fromisoformat),
    _Kind(time, 6, " ti", list, _dump_time, _load_time),
    _Kind(timedelta, 7, " td", list, _dump_timedelta, _load_timedelta),
    _Kind(UUID, 8, " u", str, lambda value: value.hex, UUID),
    _Kind(Decimal, 9, " dec", str, str, Decimal),
    _Kind(Markup, 10, " m", str, str.__str__, Markup),
    _Kind(bytearray, 11, " ba", bytes, bytes, bytearray),
    _Kind(OrderedDict, 15, " od", list, _pairs, OrderedDict),
    _Kind(deque, 16, " dq", list, lambda value: [value.maxlen, list(value)], lambda plain: deque(plain[1], plain[0])),
)
_BY_TYPE = {kind.type: kind for kind in _KINDS}
_BY_NUMBER = {kind.number: kind for kind in (*_KINDS, _DICT, _STR, _INT)}
_BY_TAG = {kind.tag: kind for kind in (*_KINDS, _DICT, _STR, _INT)}
_SCALARS = frozenset({type(None), bool, float, bytes})


class _Unstorable(Exception):
    """A value has no exact form; collects the keys that lead to it on its way up."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path: list[str] = []


def _why_not(value: object) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    bases = [base for base in kind.__mro__[1:] if base in _BY_TYPE or base in (str, int, float, list, dict, bytes)]
    if bases:
        return f"{name} would come back as {bases[0].__name__}; store {bases[0].__name__}(value) or its parts instead"
    return f"{name} has no stored form; store its parts as str, int, list or dict instead, or its key in your database"


# MessagePack ----------------------------------------------------------------------------------------------------------

_OPTIONS = (
    ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)


#: Extensions within extensions cost Python's stack; beyond so many of them ``_exact`` takes over, which counts depth.
_FAST_NESTING = 12


class _Packer:
    """Packs at C speed what ormsgpack keeps exactly; what it does not goes through ``_exact``, with the same bytes."""

    __slots__ = ("_nesting",)

    def __init__(self) -> None:
        self._nesting = 0

    def pack(self, value: Any) -> bytes:
        """Raises ``TypeError`` for what only ``_exact`` can pack, or nothing can."""
        packed = ormsgpack.packb(value, self._extension, _OPTIONS)
        # ormsgpack writes bytearray as bytes without asking. Binary data is rare, so look for its markers: where none
        # of the three bytes occurs there is none, and a false alarm only costs the slower way.
        if b"\xc4" in packed or b"\xc5" in packed or b"\xc6" in packed:
            raise TypeError
        return packed

    def _extension(self, value: Any) -> ormsgpack.Ext:
        kind = _INT if type(value) is int else _BY_TYPE.get(type(value))
        if kind is None or self._nesting >= _FAST_NESTING:
            raise TypeError
        self._nesting += 1
        plain = kind.dump(value)
        packed = _array(self.pack(item) for item in plain) if kind.unordered else self.pack(plain)
        self._nesting -= 1
        return ormsgpack.Ext(kind.number, packed)


def _array(packed: Iterable[bytes]) -> bytes:
    """An array of items that are packed already, sorted by their bytes."""
    items = sorted(packed)
    count = len(items)
    if count < 16:
        header = bytes([0x90 | count])
    elif count < 2**16:
        header = b"\xdc" + count.to_bytes(2, "big")
    else:
        header = b"\xdd" + count.to_bytes(4, "big")
    return b"".join((header, *items))


def _pack(value: Any) -> bytes:
    try:
        return _Packer().pack(value)
    except TypeError:
        return ormsgpack.packb(_exact(value), None, _OPTIONS)


def _exact(value: Any, depth: int = 0) -> Any:
    """A copy of *value* that ormsgpack packs without loss. Raises ``_Unstorable`` with the path to what has no form."""
    _check_depth(depth)
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is str:
        return value if _is_utf8(value) else _exact_extension(_STR, value, depth)
    if kind is int:
        return value if -(2**63) <= value < 2**64 else _exact_extension(_INT, value, depth)
    if kind is list:
        return [_at(index, _exact, item, depth) for index, item in enumerate(value)]
    if kind is dict:
        if all(type(key) is str and _is_utf8(key) for key in value):
            return {key: _at(key, _exact, item, depth) for key, item in value.items()}
        return _exact_extension(_DICT, value, depth)
    return _exact_extension(_kind_of(value), value, depth)


def _exact_extension(kind: _Kind, value: Any, depth: int) -> ormsgpack.Ext:
    plain = _plain(kind, value, _exact, depth)
    if kind.unordered:
        packed = _array(ormsgpack.packb(item, None, _OPTIONS) for item in plain)
    else:
        packed = ormsgpack.packb(plain, None, _OPTIONS)
    return ormsgpack.Ext(kind.number, packed)


def _unpack(packed: bytes | memoryview) -> Any:
    return ormsgpack.unpackb(packed, ext_hook=_load_extension)


def unpack_plain(packed: bytes) -> Any:
    """What MessagePack of others holds, times included. Raises ``ValueError`` for what is none."""
    return ormsgpack.unpackb(packed, option=ormsgpack.OPT_NON_STR_KEYS | ormsgpack.OPT_DATETIME_AS_TIMESTAMP_EXT)


def _load_extension(number: int, packed: bytes) -> Any:
    kind = _BY_NUMBER.get(number)
    if kind is None:
        raise ValueError(f"unknown extension type {number}")
    return _load(kind, _unpack(packed))


def _load(kind: _Kind, plain: Any) -> Any:
    if type(plain) is not kind.plain:
        raise TypeError(f"{kind.type.__name__} is kept as {kind.plain.__name__} and not as {type(plain).__name__}")
    return kind.load(plain)


# JSON -----------------------------------------------------------------------------------------------------------------


def _tagged(value: Any, depth: int = 0) -> Any:
    """A copy of *value* of JSON's types only. Raises ``_Unstorable`` with the path to what has no form."""
    _check_depth(depth)
    kind = type(value)
    if kind is bytes:
        return {" b": b64encode(value).decode("ascii")}
    if kind in _SCALARS:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {_INT.tag: _INT.dump(value)}
    if kind is str:
        return value if _is_utf8(value) else {_STR.tag: _tagged(_STR.dump(value), depth)}
    if kind is list:
        return [_at(index, _tagged, item, depth) for index, item in enumerate(value)]
    if kind is dict:
        return _tagged_dict(value, depth)
    special = _kind_of(value)
    plain = _plain(special, value, _tagged, depth)
    return {special.tag: sorted(plain, key=_to_json) if special.unordered else plain}


def _tagged_dict(value: dict[Any, Any], depth: int) -> Any:
    if not all(type(key) is str and _is_utf8(key) for key in value):
        return {_DICT.tag: _plain(_DICT, value, _tagged, depth)}
    tagged = {key: _at(key, _tagged, item, depth) for key, item in value.items()}
    # A dict that looks like a tag is kept inside one.
    return {" di": tagged} if len(value) == 1 and next(iter(value)).startswith(" ") else tagged


def _to_json(tagged: Any) -> str:
    return json.dumps(tagged, ensure_ascii=False, separators=(",", ":"))


def _untagged(value: Any) -> Any:
    if type(value) is list:
        return [_untagged(item) for item in value]
    if type(value) is not dict:
        return value
    if len(value) == 1:
        [(tag, plain)] = value.items()
        if tag == " b":
            return b64decode(plain, validate=True)
        if tag == " di":
            return {key: _untagged(item) for key, item in plain.items()}
        if tag in _BY_TAG:
            return _load(_BY_TAG[tag], _untagged(plain))
        if tag.startswith(" "):
            raise ValueError(f"unknown tag {tag!r}")
    return {key: _untagged(item) for key, item in value.items()}


# What both share ------------------------------------------------------------------------------------------------------


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _Unstorable(f"values are nested more than {MAX_DEPTH} deep, or contain themselves")


def _kind_of(value: object) -> _Kind:
    kind = _BY_TYPE.get(type(value))
    if kind is None:
        raise _Unstorable(_why_not(value))
    return kind


def _plain(kind: _Kind, value: Any, convert: _Convert, depth: int) -> Any:
    """What *kind* makes of *value*, itself converted; the keys of a dict lead to its items."""
    if isinstance(value, dict):
        return [[_at(key, convert, part, depth) for part in pair] for pair in value.items() for key in pair[:1]]
    try:
        plain = kind.dump(value)
    except (TypeError, ValueError) as error:
        raise _Unstorable(str(error)) from error
    if kind.type in (tuple, set, frozenset):
        return [_at(index, convert, item, depth) for index, item in enumerate(plain)]
    if isinstance(value, deque):
        return [value.maxlen, [_at(index, convert, item, depth) for index, item in enumerate(value)]]
    return convert(plain, depth + 1)


def _at(key: object, convert: _Convert, item: Any, depth: int) -> Any:
    try:
        return convert(item, depth + 1)
    except _Unstorable as error:
        error.path.insert(0, f"[{key!r}]")
        raise


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# Serializers ----------------------------------------------------------------------------------------------------------


class Serializer(ABC):
    """Session data to bytes and back."""

    #: The number of the serializer in the envelope; never reuse one.
    number: int
    #: Whether encoding what was decoded gives the same bytes again.
    canonical: bool = True

    @abstractmethod
    def dumps(self, data: dict[str, Any]) -> bytes:
        """Raises ``SerializationError`` naming the key path of what cannot be stored."""

    @abstractmethod
    def loads(self, payload: memoryview) -> Any:
        """Raises ``SerializationError`` saying what is wrong with the payload."""


class MsgpackSerializer(Serializer):
    """MessagePack through ormsgpack; exact types, C speed."""

    number = 1

    def dumps(self, data: dict[str, Any]) -> bytes:
        try:
            return _pack(data)
        except _Unstorable as error:
            raise _unstorable(error) from error.__cause__

    def loads(self, payload: memoryview) -> Any:
        try:
            return _unpack(payload)
        except DAMAGED as error:
            raise SerializationError(f"the payload is no MessagePack of this package: {error}") from error


class JSONSerializer(Serializer):
    """JSON that a person can read, with types beyond JSON tagged as Flask's session does."""

    number = 2

    def dumps(self, data: dict[str, Any]) -> bytes:
        try:
            return _to_json(_tagged(data)).encode()
        except _Unstorable as error:
            raise _unstorable(error) from error.__cause__

    def loads(self, payload: memoryview) -> Any:
        try:
            return _untagged(json.loads(bytes(payload)))
        except DAMAGED as error:
            raise SerializationError(f"the payload is no JSON of this package: {error}") from error


class PickleSerializer(Serializer):
    """Pickle, signed with the application's secret keys: whoever can write the store could otherwise run code.

    *keys* returns the secret keys, oldest first: the last one signs, all of them verify.
    """

    number = 3
    canonical = False

    def __init__(self, keys: Callable[[], Sequence[str | bytes]]) -> None:
        self._keys = keys

    def dumps(self, data: dict[str, Any]) -> bytes:
        try:
            pickled = pickle.dumps(data, protocol=pickle.HIGHEST_PROTOCOL)
        except _UNPICKLABLE as error:
            raise SerializationError(f"session{_unpicklable_path(data)} cannot be pickled: {error}") from error
        return self._signer().get_signature(pickled) + b"." + pickled

    def loads(self, payload: memoryview) -> Any:
        signature, _, pickled = bytes(payload).partition(b".")
        if not self._signer().verify_signature(pickled, signature):
            raise SerializationError("the pickled payload is not signed by this application's secret keys")
        try:
            return pickle.loads(pickled)
        except (*DAMAGED, pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError) as error:
            raise SerializationError(f"the pickled payload cannot be loaded: {error}") from error

    def _signer(self) -> Signer:
        keys = [want_bytes(key) for key in self._keys()]
        return Signer(keys, salt="flask-persist-session.pickle", key_derivation="hmac", digest_method=hashlib.sha256)


#: What decoding damaged input may raise.
DAMAGED = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
_UNPICKLABLE = (pickle.PicklingError, AttributeError, RecursionError, TypeError, ValueError)


#: A longer key path is cut: it belongs to a value that contains itself.
_LONGEST_PATH = 12


def _unstorable(error: _Unstorable) -> SerializationError:
    path = error.path[:_LONGEST_PATH] + ["…"] * (len(error.path) > _LONGEST_PATH)
    return SerializationError(f"session{''.join(path)} cannot be stored: {error}")


def _unpicklable_path(value: object) -> str:
    """The keys that lead to the innermost item that cannot be pickled."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        try:
            pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
        except RecursionError:
            return f"[{key!r}]"
        except _UNPICKLABLE:
            return f"[{key!r}]{_unpicklable_path(item)}"
    return ""


# Envelope -------------------------------------------------------------------------------------------------------------

SERIALIZERS = ("msgpack", "json", "pickle")
_HIGHEST_PLAIN = 0x0F


class Codec:
    """Session data to a payload and back, in an envelope of one leading byte that says how to read the rest.

    The low four bits are the serializer's number, the high four those of *envelope*, which compresses and encrypts. Data
    that is only encoded, with high bits of zero, is called plain: plain forms can be compared, payloads cannot, because
    encryption makes another one each time.

    *serializer* is one of ``SERIALIZERS`` and writes; what ``msgpack`` and ``json`` wrote is read always, so changing
    the setting loses no session, pickle only where it is configured. *keys* returns the secret keys that sign pickles.
    """

    def __init__(
        self,
        serializer: str = "msgpack",
        *,
        keys: Callable[[], Sequence[str | bytes]] = tuple,
        envelope: Envelope | None = None,
    ) -> None:
        msgpack, readable, pickled = MsgpackSerializer(), JSONSerializer(), PickleSerializer(keys)
        self._writer: Serializer = dict(zip(SERIALIZERS, (msgpack, readable, pickled), strict=True))[serializer]
        self._prefix = bytes([self._writer.number])
        self._readers = {reader.number: reader for reader in (msgpack, readable, self._writer)}
        self._envelope = envelope or Envelope()

    def encode(self, data: dict[str, Any]) -> bytes:
        """The payload for *data*. Raises ``SerializationError`` naming the key path of what cannot be stored."""
        return self.seal(self.plain(data))

    def plain(self, data: dict[str, Any]) -> bytes:
        """The plain form of *data*. Raises as ``encode`` does."""
        return self._prefix + self._writer.dumps(data)

    def seal(self, plain: bytes) -> bytes:
        """The payload for data in its plain form."""
        return self._envelope.seal(plain)

    def decode(self, payload: bytes) -> dict[str, Any]:
        """The data of a payload. Raises ``SerializationError`` for one that is damaged, unknown or no mapping."""
        if not payload:
            raise SerializationError("the payload is empty")
        reader = self._readers.get(payload[0])
        if reader is None and payload[0] > _HIGHEST_PLAIN:
            payload = self._envelope.open(payload)
            reader = self._readers.get(payload[0])
        if reader is None:
            hint = '; set PERSIST_SESSION_SERIALIZER = "pickle" to read it' if payload[0] == 3 else ""
            raise SerializationError(f"the payload's envelope 0x{payload[0]:02x} is unknown{hint}")
        data = reader.loads(memoryview(payload)[1:])
        if type(data) is not dict:
            raise SerializationError(f"the payload holds a {type(data).__name__} and not a mapping")
        return data

    def unchanged(self, plain: bytes, stored: bytes) -> bool:
        """Whether the *plain* form of data just encoded holds what the *stored* payload held when it was decoded."""
        if stored and stored[0] > _HIGHEST_PLAIN:
            stored = self._envelope.open(stored)
        if plain == stored:
            return True
        if self._writer.canonical and stored[:1] == self._prefix:
            return False
        # Written by another serializer, or by one whose bytes vary: compare with what the same data gives today.
        return plain == self.plain(self.decode(stored))

    def sizes(self, data: Mapping[str, Any]) -> dict[str, int]:
        """The bytes that each top-level key takes in the plain form, largest first."""
        sizes = {key: len(self._writer.dumps({key: value})) for key, value in data.items()}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))


# Records --------------------------------------------------------------------------------------------------------------


def values_of(record: SessionRecord) -> tuple[Any, ...]:
    """What ``record_of`` makes the record of again: its fields in their order, tags and metadata as text."""
    return (
        record.id,
        record.user_id,
        record.tenant_id,
        dump_tags(record.tags),
        dump_metadata(record.metadata),
        record.data,
        record.created_at,
        record.accessed_at,
        record.expires_at,
        record.ended_at,
        record.end_reason,
        record.version,
    )


def pack_record(record: SessionRecord) -> bytes:
    """A whole record as bytes, for stores that keep one value per session."""
    return ormsgpack.packb(values_of(record))


def unpack_record(packed: bytes | memoryview) -> SessionRecord:
    """The record that ``pack_record`` packed. Raises ``SerializationError`` for anything else."""
    try:
        fields = ormsgpack.unpackb(packed)
        return record_of(*fields)
    except DAMAGED as error:
        raise SerializationError(f"this is no session record: {error}") from error


def unpack_user(packed: bytes | memoryview) -> str | None:
    """The user id alone of a record that ``pack_record`` packed. Raises ``SerializationError`` for anything else."""
    try:
        user_id = ormsgpack.unpackb(packed)[1]
    except DAMAGED as error:
        raise SerializationError(f"this is no session record: {error}") from error
    if not (user_id is None or type(user_id) is str):
        raise SerializationError("this is no session record: its user is no text")
    return user_id


def record_of(
    session_id: str,
    user_id: str | None,
    tenant_id: str | None,
    tags: str | list[str],
    metadata: str | dict[str, JSON],
    data: bytes,
    created_at: float,
    accessed_at: float,
    expires_at: float,
    ended_at: float | None,
    end_reason: str | None,
    version: int,
) -> SessionRecord:
    """A record of its fields in the order of ``SessionRecord``, tags and metadata as JSON or what was read of it.

    Raises ``TypeError`` or ``ValueError`` if a field is damaged: not every store keeps types apart.
    """
    if not (
        type(data) is bytes
        and type(version) is int
        and 0 < version < _MOST
        and type(session_id) is str
        and is_session_id(session_id)
        and (user_id is None or _is_text(user_id))
        and (tenant_id is None or _is_text(tenant_id))
        and (end_reason is None or _is_text(end_reason))
        and (type(tags) is not str or _is_text(tags))
        and (type(metadata) is not str or _is_text(metadata))
        and type(created_at) in _NUMBERS
        and type(accessed_at) in _NUMBERS
        and type(expires_at) in _NUMBERS
        and (ended_at is None or (type(ended_at) in _NUMBERS and FIRST_MOMENT <= ended_at < LAST_MOMENT))
        and FIRST_MOMENT <= created_at < LAST_MOMENT
        and FIRST_MOMENT <= accessed_at < LAST_MOMENT
        and FIRST_MOMENT <= expires_at < LAST_MOMENT
    ):
        raise TypeError("a field is of the wrong type or out of range")
    return SessionRecord(
        id=session_id,
        user_id=user_id,
        tenant_id=tenant_id,
        tags=load_tags(tags),
        metadata=load_metadata(metadata),
        data=data,
        created_at=created_at,
        accessed_at=accessed_at,
        expires_at=expires_at,
        ended_at=ended_at,
        end_reason=end_reason,
        version=version,
    )


def _is_text(value: object) -> bool:
    """Whether it is text; SQLite keeps whatever bytes somebody calls so."""
    return type(value) is str and (value.isascii() or _is_utf8(value))


_NUMBERS = (float, int)
#: Integers below are exact as floating point numbers too, as in a script of Redis.
_MOST = 2**53
_NO_TAGS: frozenset[str] = frozenset()
# NaN and infinity are no JSON: other programs could not read what they are in.
_metadata_text = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
#: Of what consists of these, with texts as keys, msgspec writes the same in a fifth of the time. It also takes what is no
#: JSON.
_PLAIN = frozenset({str, int, bool, type(None)})
_TEXT = frozenset({str})
_plain_text = msgspec.json.Encoder().encode


def dump_tags(tags: frozenset[str]) -> str:
    """Tags as text: a sorted JSON list, empty for none."""
    return json.dumps(sorted(tags)) if tags else ""


def load_tags(text: str | list[str]) -> frozenset[str]:
    """The tags of ``dump_tags``, or of its list. Raises ``ValueError`` or ``TypeError`` for anything else."""
    if not text:
        return _NO_TAGS
    tags = frozenset(json.loads(text) if type(text) is str else text)
    if not all(type(tag) is str for tag in tags):
        raise TypeError("a tag is no text")
    return tags


def dump_metadata(metadata: Mapping[str, JSON]) -> str:
    """Metadata as text: JSON, empty for none. Raises ``SerializationError`` if it is no JSON."""
    if not metadata:
        return ""
    try:
        return _json_of(dict(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise SerializationError(f"metadata must be JSON (str, int, float, bool, None, list, dict): {error}") from error


def _json_of(metadata: dict[str, JSON]) -> str:
    if _TEXT.issuperset(map(type, metadata)) and _PLAIN.issuperset(map(type, metadata.values())):
        try:
            return _plain_text(metadata).decode()
        except UnicodeEncodeError:  # half a character, which a text of Python may have
            pass
    return _metadata_text(metadata)


def load_metadata(text: str | dict[str, JSON]) -> dict[str, JSON]:
    """The metadata of ``dump_metadata``, or of its mapping. Raises ``ValueError`` for anything else."""
    metadata = json.loads(text) if text and type(text) is str else text or {}
    if type(metadata) is not dict:
        raise ValueError("metadata is no JSON object")
    return metadata
