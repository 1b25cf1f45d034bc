"""Where the sessions of Flask and of Flask-Session are found, and how each of them keeps what it keeps.

Flask keeps the data in its cookie, signed with the secret key. Flask-Session 0.5 to 0.8 has an id in the cookie, which it
may sign, and the data under a prefix and that id: as pickle until 0.6, as MessagePack or JSON since 0.7, and in files
always as pickle.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import peewee as pw
from flask.sessions import SecureCookieSessionInterface
from itsdangerous import BadData, Signer, want_bytes

from .exceptions import ConfigError, SerializationError, StoreUnavailable, UnsupportedByStore
from .serializers import DAMAGED, unpack_plain
from .stores import Location, flag, seconds, take_apart
from .stores.databases import Connect, open_mysql, open_postgresql

if TYPE_CHECKING:
    from flask import Flask

    from .stores.redis_clients import Clients

_PREFIX = "flask-session+"
#: What Flask-Session can use and is not read here: for none of them is there a driver among what this package can use.
_UNREAD_TABLES = frozenset({"mssql", "oracle"})
_UNREAD = _UNREAD_TABLES | {"mongodb", "mongodb+srv", "dynamodb"}
_SCHEMES = ("redis", "rediss", "unix", "file", "sqlite", "postgresql", "mysql", "mariadb", "memcached")
#: A longer cookie is not looked at: browsers refuse those of more than 4 kB.
_LONGEST_COOKIE = 8192
_SID = re.compile(r"[\w-]{1,255}", re.ASCII)
_PAGE = 500

SecretKeys: TypeAlias = Callable[[], Sequence[str | bytes]]


@dataclass(frozen=True, slots=True)
class OldSession:
    """The data of a session, and until when it is valid, in seconds since the epoch."""

    data: dict[str, Any] = field(repr=False)
    expires_at: float


Read: TypeAlias = Callable[[], OldSession | None]


class Origin(ABC):
    """One place where sessions of another kind are.

    A key is what the place knows a session by. Reading raises ``SerializationError`` for what cannot be read, and
    whatever reaches out for a store raises ``StoreUnavailable`` if that fails.
    """

    kind: str
    """Keys of the same kind and text mean the same session."""

    @abstractmethod
    def claims(self, cookie: str) -> Iterator[tuple[str, Read]]:
        """The keys that a cookie may mean, each with what reads its session; nothing if the cookie is none of this kind."""

    def forget(self, key: str) -> None:
        """Remove a session. One that is not there is no error."""

    def sessions(self) -> Iterator[tuple[str, Read]]:
        """All sessions. Raises ``UnsupportedByStore`` where they cannot be listed."""
        raise UnsupportedByStore(f"{self} cannot be listed; its sessions are taken over as their users come")


def open_origin(app: Flask, url: str, secret_keys: SecretKeys, clock: Callable[[], float]) -> Origin:
    """The origin that *url* names: ``flask``, or ``flask-session+`` and the URL of the store that Flask-Session used.

    Raises ``ConfigError`` for a URL, option or path that cannot work, naming it without its password.
    """
    if url == "flask":
        return FlaskCookie(app, clock)
    if not url.startswith(_PREFIX):
        known = ", ".join(f"{_PREFIX}{scheme}:" for scheme in _SCHEMES)
        raise ConfigError(f'an entry is neither "flask" nor begins with one of {known}')
    _check_scheme(url.removeprefix(_PREFIX).partition(":")[0].lower())
    location = take_apart(url.removeprefix(_PREFIX), app.instance_path, _SCHEMES)
    old = _Old(secret_keys, clock, lambda: app.permanent_session_lifetime.total_seconds())
    return _OPENERS[location.scheme](location, old)


def _check_scheme(scheme: str) -> None:
    """Refuse what Flask-Session or SQLAlchemy knows and cannot be read here, saying what to do."""
    dialect, plus, driver = scheme.partition("+")
    if scheme in _UNREAD or dialect in _UNREAD_TABLES:
        copied = "copy its table to SQLite, PostgreSQL or MySQL and name that, or " if dialect in _UNREAD_TABLES else ""
        raise ConfigError(
            f"sessions that Flask-Session keeps in {dialect} cannot be read; "
            f"{copied}leave the entry out: then its users sign in once more"
        )
    if plus and dialect in _SCHEMES:
        raise ConfigError(f"a URL names no driver here: write {_PREFIX}{dialect}: without +{driver}")


# Flask's own cookie ---------------------------------------------------------------------------------------------------


class FlaskCookie(Origin):
    """Flask's signed cookie; the key is what is signed.

    :param app: the application whose secret keys and lifetime count; its own cookie interface is used if it has one.
    """

    kind = "flask"

    def __init__(self, app: Flask, clock: Callable[[], float]) -> None:
        former = app.session_interface
        self._interface = former if isinstance(former, SecureCookieSessionInterface) else SecureCookieSessionInterface()
        self._app = app
        self._clock = clock

    def claims(self, cookie: str) -> Iterator[tuple[str, Read]]:
        """See ``Origin``. The signature is no part of the key: it can be written in several ways."""
        serializer = self._interface.get_signing_serializer(self._app)
        if serializer is None or len(cookie) > _LONGEST_COOKIE:
            return
        try:
            data, signed_at = serializer.loads(cookie, return_timestamp=True)
        except BadData:
            return
        born = signed_at.timestamp()
        lifetime = int(self._app.permanent_session_lifetime.total_seconds())
        if 0 <= int(self._clock()) - born <= lifetime and type(data) is dict:
            yield cookie.rpartition(".")[0], partial(OldSession, data, born + lifetime + 1)

    def __str__(self) -> str:
        return "Flask's own cookie"


# Flask-Session --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What the URL of each store of Flask-Session may say."""

    prefix: str = "session:"
    signed: bool = False
    pickle: bool = False


_COMMON: dict[str, Callable[[str], Any]] = {"prefix": str, "signed": flag, "pickle": flag}


def _options(given: dict[str, Any]) -> _Options:
    return _Options(**{name: value for name, value in given.items() if name in _COMMON})


@dataclass(frozen=True, slots=True)
class _Old:
    """What all of them need of the application."""

    secret_keys: SecretKeys
    clock: Callable[[], float]
    lifetime: Callable[[], float]

    def expiry(self, seconds_left: float) -> float:
        """When something expires that has so many seconds left; what never would does so as if it were new."""
        return self.clock() + (self.lifetime() if seconds_left == math.inf else seconds_left)


class _FlaskSession(Origin):
    kind = "flask-session"
    longest_key = 255

    def __init__(self, location: Location, old: _Old, options: _Options) -> None:
        self._location = location
        self._old = old
        self._options = options

    def claims(self, cookie: str) -> Iterator[tuple[str, Read]]:
        sid = self._sid(cookie)
        if sid is not None and _SID.fullmatch(sid) and len(self._options.prefix + sid) <= self.longest_key:
            for key in self._keys(self._options.prefix + sid):
                yield key, partial(self._read, key)

    def _sid(self, cookie: str) -> str | None:
        if len(cookie) > _LONGEST_COOKIE:
            return None
        sid, dot, signature = cookie.rpartition(".")
        if not dot:
            return None if self._options.signed else cookie
        keys = [want_bytes(key) for key in self._old.secret_keys()]
        signer = Signer(keys, salt="flask-session", key_derivation="hmac")
        return sid if signer.verify_signature(sid, signature) else None

    def _keys(self, name: str) -> list[str]:
        return [name]

    @abstractmethod
    def _read(self, key: str) -> OldSession | None: ...

    def _decode(self, stored: bytes) -> dict[str, Any]:
        return decode(stored, allow_pickle=self._options.pickle)

    def __str__(self) -> str:
        return f"{_PREFIX}{self._location}"


def decode(stored: bytes, *, allow_pickle: bool) -> dict[str, Any]:
    """What Flask-Session stored, in whichever format. Raises ``SerializationError``."""
    # MessagePack has 0x80 for the empty map and nothing after it; a pickle goes on.
    pickled = stored[:1] == pickle.PROTO and len(stored) > 1
    if pickled and not allow_pickle:
        raise SerializationError("it is a pickle; these are read only with the option pickle=1")
    load = _unpickle if pickled else json.loads if stored[:1] == b"{" else unpack_plain
    try:
        data = load(stored)
    except (*DAMAGED, pickle.UnpicklingError, EOFError) as error:
        raise SerializationError(f"it cannot be decoded: {error}") from error
    if type(data) is not dict or not all(isinstance(key, str) for key in data):
        raise SerializationError("it holds no mapping with names")
    return data


#: What a pickle may be made of: values that a session can keep. Nothing of these runs code.
_PLAIN = {
    ("collections", "OrderedDict"),
    ("collections", "deque"),
    ("builtins", "frozenset"),
    ("builtins", "set"),
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "time"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
    ("decimal", "Decimal"),
    ("markupsafe", "Markup"),
    ("uuid", "UUID"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, and only plain values are read")
        return super().find_class(module, name)


def _unpickle(stored: bytes) -> Any:
    return _Unpickler(io.BytesIO(stored)).load()


class _Redis(_FlaskSession):
    def __init__(self, location: Location, old: _Old, options: _Options, clients: Clients) -> None:
        super().__init__(location, old, options)
        self._clients = clients

    @classmethod
    def open(cls, location: Location, old: _Old) -> _Redis:
        if find_spec("redis") is None:
            raise ConfigError(f"{location} needs redis: pip install 'flask-persist-session[redis]'")
        from .stores.redis_clients import read_location

        clients, given = read_location(location, **_COMMON)
        return cls(location, old, _options(given), clients)

    def _read(self, key: str) -> OldSession | None:
        [(_, read)] = self._page([key])
        return read()

    def _page(self, keys: list[str]) -> list[tuple[str, Read]]:
        from redis import RedisError

        try:
            with self._clients().pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.get(key).pttl(key)
                answers = pipeline.execute(raise_on_error=False)
        except RedisError as error:
            raise StoreUnavailable(f"{self} cannot be read: {error}") from error
        pairs = zip(answers[::2], answers[1::2], strict=True)
        return [(key, partial(self._decoded, *pair)) for key, pair in zip(keys, pairs, strict=True)]

    def _decoded(self, stored: Any, milliseconds: Any) -> OldSession | None:
        if stored is None:
            return None
        if not isinstance(stored, bytes) or not isinstance(milliseconds, int):
            raise SerializationError(f"the server answers {stored if isinstance(stored, Exception) else milliseconds}")
        left = math.inf if milliseconds < 0 else milliseconds / 1000
        return OldSession(self._decode(stored), self._old.expiry(left))

    def forget(self, key: str) -> None:
        from redis import RedisError

        try:
            self._clients().delete(key)
        except RedisError as error:
            raise StoreUnavailable(f"{self} cannot be changed: {error}") from error

    def sessions(self) -> Iterator[tuple[str, Read]]:
        from redis import RedisError

        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._options.prefix) + "*"
        names: Iterator[bytes] | None = None
        while True:
            try:
                names = names or self._clients().scan_iter(match=pattern, count=_PAGE)
                keys = [name.decode("utf-8", "replace") for name in islice(names, _PAGE)]
            except RedisError as error:
                raise StoreUnavailable(f"{self} cannot be listed: {error}") from error
            if not keys:
                return
            yield from self._page(keys)


class _Files(_FlaskSession):
    """The directory of a cachelib ``FileSystemCache``; the key is the name of the file, a hash of prefix and id."""

    #: Of newer versions of cachelib, and of older ones.
    _hashes = (hashlib.sha256, partial(hashlib.md5, usedforsecurity=False))
    _name = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}", re.ASCII)

    @classmethod
    def open(cls, location: Location, old: _Old) -> _Files:
        options = _options(location.read_options(**_COMMON))
        place = cls(location, old, options)
        if location.url.netloc or not os.path.isdir(place._directory):
            raise ConfigError(f"{place}: there is no directory {place._directory}; write {_PREFIX}file:///path/to/it")
        if not options.pickle:
            raise ConfigError(
                f"{place}: Flask-Session keeps its files as pickle, which is read only with the option pickle=1; "
                "add it if nobody but the application can write there"
            )
        return place

    @property
    def _directory(self) -> str:
        return self._location.path(self._location.url.path)

    def _keys(self, name: str) -> list[str]:
        return [make(name.encode()).hexdigest() for make in self._hashes]

    def _read(self, key: str) -> OldSession | None:
        try:
            with open(os.path.join(self._directory, key), "rb") as file:
                stored = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreUnavailable(f"{self} cannot be read: {error}") from error
        if len(stored) < 4:
            raise SerializationError("the file is cut off")
        expires_at = struct.unpack("I", stored[:4])[0] or self._old.expiry(math.inf)
        return OldSession(self._decode(stored[4:]), expires_at)

    def forget(self, key: str) -> None:
        try:
            os.remove(os.path.join(self._directory, key))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreUnavailable(f"{self} cannot be changed: {error}") from error

    def sessions(self) -> Iterator[tuple[str, Read]]:
        counters = self._keys("__wz_cache_count")
        try:
            names = [entry.name for entry in os.scandir(self._directory) if self._name.fullmatch(entry.name)]
        except OSError as error:
            raise StoreUnavailable(f"{self} cannot be listed: {error}") from error
        for name in names:
            if name not in counters:
                yield name, partial(self._read, name)


class _Table(_FlaskSession):
    """The table that Flask-Session makes through SQLAlchemy; each use has a connection of its own."""

    def __init__(
        self, location: Location, old: _Old, options: _Options, table: str, connect: Callable[[], pw.Database]
    ) -> None:
        super().__init__(location, old, options)
        self._table = ".".join(f'"{part}"' for part in table.split("."))
        self._connect = connect

    @classmethod
    def open_sqlite(cls, location: Location, old: _Old) -> _Table:
        given: dict[str, Any] = {"table": "sessions", "timeout": 2.0}
        given |= location.read_options(**_COMMON, table=_table_name, timeout=seconds)
        path = location.path(location.url.path.removeprefix("/"))
        if location.url.netloc or not os.path.isfile(path):
            raise ConfigError(f"{_PREFIX}{location}: there is no file {path}; write {_PREFIX}sqlite:////absolute.db")
        # Never makes a file, and leaves its journal as it is: it belongs to the application.
        connect = partial(pw.SqliteDatabase, f"file:{quote(path)}?mode=rw", uri=True, timeout=given["timeout"])
        return cls(location, old, _options(given), given["table"], connect)

    @classmethod
    def open_on_server(
        cls, open_database: Callable[[Location], tuple[str, Connect, float]], location: Location, old: _Old
    ) -> _Table:
        readers = {**_COMMON, "table": _table_name}
        own = {name: text for name, text in location.options.items() if name in readers}
        given = replace(location, options=own).read_options(**readers)
        rest = {name: text for name, text in location.options.items() if name not in own}
        _, connect, _ = open_database(replace(location, options={"timeout": "2", **rest}))
        return cls(location, old, _options(given), given.get("table", "sessions"), connect)

    def _run(self, statement: str, *values: object) -> list[Any]:
        database = self._connect()
        text = statement.replace("TABLE", self._table).replace("?", database.param)
        try:
            with database.connection_context():
                cursor = database.execute_sql(text, values)
                return list(cursor.fetchall()) if cursor.description else []
        except pw.PeeweeException as error:
            raise StoreUnavailable(f"{self} cannot be used: {error}") from error

    def _read(self, key: str) -> OldSession | None:
        # MySQL also finds what differs in case alone.
        for found, stored, expiry in self._run("SELECT session_id, data, expiry FROM TABLE WHERE session_id = ?", key):
            if found == key:
                return self._decoded(stored, expiry)
        return None

    def _decoded(self, stored: Any, expiry: Any) -> OldSession | None:
        if expiry is None:
            return None  # so says Flask-Session too
        try:
            moment = datetime.fromisoformat(expiry) if isinstance(expiry, str) else expiry
            expires_at = moment.replace(tzinfo=timezone.utc).timestamp()
        except (AttributeError, TypeError, ValueError) as error:
            raise SerializationError(f"its expiry {expiry!r} is no time") from error
        if not isinstance(stored, (bytes, memoryview)):
            raise SerializationError("its data are no bytes")
        return OldSession(self._decode(bytes(stored)), expires_at)

    def forget(self, key: str) -> None:
        self._run("DELETE FROM TABLE WHERE session_id = ?", key)

    def sessions(self) -> Iterator[tuple[str, Read]]:
        page = "SELECT session_id, data, expiry FROM TABLE WHERE session_id > ? ORDER BY session_id LIMIT ?"
        last = ""
        while rows := self._run(page, last, _PAGE):
            last = rows[-1][0]
            for key, stored, expiry in rows:
                if key.startswith(self._options.prefix):
                    yield key, partial(self._decoded, stored, expiry)


def _table_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", text, re.ASCII):
        raise ValueError("allowed is the name of a table, with its schema and a dot in front where it has one")
    return text


class _Memcached(_FlaskSession):
    longest_key = 250

    def __init__(self, location: Location, old: _Old, options: _Options, timeout: float) -> None:
        super().__init__(location, old, options)
        self._timeout = timeout

    @classmethod
    def open(cls, location: Location, old: _Old) -> _Memcached:
        if find_spec("pymemcache") is None:
            raise ConfigError(f"{location} needs pymemcache: pip install 'flask-persist-session[memcached]'")
        if not location.url.hostname or location.url.path not in ("", "/"):
            raise ConfigError(f"{location} names no server; write {_PREFIX}memcached://host:11211")
        given = location.read_options(**_COMMON, timeout=seconds)
        return cls(location, old, _options(given), given.get("timeout", 2.0))

    def _call(self, method: str, key: str) -> Any:
        from pymemcache import Client, MemcacheError

        server = (self._location.url.hostname, self._location.url.port or 11211)
        waits = {"connect_timeout": self._timeout, "timeout": self._timeout}
        try:
            # By default it would not wait for the answer to a delete.
            with closing(Client(server, default_noreply=False, **waits)) as client:
                return getattr(client, method)(key)
        except (MemcacheError, OSError) as error:
            raise StoreUnavailable(f"{self} cannot be used: {error}") from error

    def _read(self, key: str) -> OldSession | None:
        stored = self._call("get", key)
        return None if stored is None else OldSession(self._decode(stored), self._old.expiry(math.inf))

    def forget(self, key: str) -> None:
        self._call("delete", key)


_OPENERS: dict[str, Callable[[Location, _Old], Origin]] = {
    "redis": _Redis.open,
    "rediss": _Redis.open,
    "unix": _Redis.open,
    "file": _Files.open,
    "sqlite": _Table.open_sqlite,
    "postgresql": partial(_Table.open_on_server, open_postgresql),
    "mysql": partial(_Table.open_on_server, open_mysql),
    "mariadb": partial(_Table.open_on_server, open_mysql),
    "memcached": _Memcached.open,
}
