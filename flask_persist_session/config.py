"""The settings: read from ``app.config`` once, checked in one place, kept in one frozen value."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from .envelope import COMPRESSIONS, key_bytes, open_cipher, open_compression
from .exceptions import ConfigError
from .serializers import SERIALIZERS

if TYPE_CHECKING:
    from .stores.base import SessionStore

PREFIX = "PERSIST_SESSION_"
CapPolicy: TypeAlias = Literal["evict_oldest", "reject"]
_POLICIES = ("evict_oldest", "reject")
#: The longest duration, 100 years in seconds: later moments have no date.
LONGEST = 100 * 365 * 86400.0
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one application; each field is the key ``PERSIST_SESSION_`` and its name in capitals.

    Durations are seconds here; in ``app.config`` they may also be a ``timedelta`` or text such as ``"30m"``.
    """

    store: str | SessionStore | Any = field(default="sqlite:///sessions.db", repr=False)
    """URL of the store, or a ``SessionStore`` or ``cachelib`` cache object."""
    migrate_from: str | SessionStore | Any | None = field(default=None, repr=False)
    """The store that was used until now: what is missing in ``store`` is looked for there and moved over."""
    serializer: str = "msgpack"
    """What writes session data: ``msgpack``, ``json`` or ``pickle``. All but ``pickle`` are always read."""
    compress: str | None = None
    """How session data and entries of histories are compressed: ``zlib`` or ``zstd``; ``None``: not at all."""
    encryption_keys: tuple[str | bytes, ...] = field(default=(), repr=False)
    """Keys that encrypt session data and entries of histories: the first one encrypts, all of them decrypt."""
    idle_timeout: float | None = None
    """Seconds after its last request at which a session expires; ``None``: the app's ``PERMANENT_SESSION_LIFETIME``."""
    absolute_timeout: float | None = None
    """Seconds after sign-in at which a session expires whatever happens; ``None``: never."""
    renew_interval: float = 60.0
    """Seconds between two renewals of the same session; 0: each request renews, as Flask does."""
    keep_ended: float = 86400.0
    """Seconds for which a session that was ended is remembered, so that its user can be told why."""
    user_key: str | None = "_user_id"
    """Key of the session under which the application keeps its user (``"_user_id"`` is Flask-Login's): when its value
    changes, the session is bound to that user under a new token. ``None``: only ``session.bind`` does so."""
    max_per_user: int = 0
    """How many active sessions a user may have; 0: any number."""
    cap_policy: CapPolicy = "evict_oldest"
    """What a sign-in beyond that does: ``evict_oldest`` ends the oldest session, ``reject`` refuses the new one."""
    max_sessions: int = 0
    """About how many sessions the store may keep, expired and ended ones until they are cleaned up included; 0: any
    number. Beyond that no new one is made."""
    track_devices: bool = False
    """Note the IP address and the user agent of sign-in and of the last renewal in the metadata of each session."""
    max_bytes: int = 1024 * 1024
    """Largest session, and largest entry of a history, in bytes as encoded, before they are compressed."""
    max_entries: int = 100_000
    """How many entries a history may have; 0: any number."""
    cleanup_interval: float = 600.0
    """Seconds between two cleanups in the background; 0: none."""
    backup_dir: str | None = None
    """Directory of backups; relative ones start in the instance folder. ``None``: ``backups`` there."""
    backup_interval: float = 0.0
    """Seconds between two backups that are made in the background; 0: none."""
    backup_keep: int = 7
    """How many archives stay in the directory after a backup in the background; 0: all."""
    archive_dir: str | None = None
    """Directory of archives, to which cleanups add sessions before they remove them; relative ones start in the instance
    folder. ``None``: they are removed without."""
    no_store: bool = False
    """Add ``Cache-Control: no-store`` to responses that used the session and have no ``Cache-Control`` of their own."""
    upgrade_from: tuple[str, ...] = field(default=(), repr=False)
    """Whose sessions are taken over: ``flask`` for Flask's own cookie, ``flask-session+`` and the URL of its store."""
    enabled: bool = True
    """``False`` leaves the application with Flask's own cookie session."""

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Config:
        """Read and check the settings of ``app.config``.

        Raises ``ConfigError``, naming the key, its value and what is allowed, for the first that is unknown or wrong.
        """
        given = {key: value for key, value in settings.items() if key.startswith(PREFIX)}
        known = {PREFIX + field.name.upper(): field.name for field in fields(cls)}
        values = {}
        for key, value in given.items():
            if key not in known:
                raise ConfigError(_unknown(key, list(known)))
            values[known[key]] = _CHECKS[known[key]](key, value)
        return cls(**values)


def checked(name: str, value: Any, source: str) -> Any:
    """*value* as the setting *name* takes it. Raises ``ConfigError``, which calls it *source*."""
    return _CHECKS[name](source, value)


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(known)}"
    return f"{key} is not a setting of Flask-Persist-Session; {hint}"


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``"90"``, ``"45s"``, ``"30m"``, ``"24h"``, ``"7d"`` or ``"2w"``.

    Raises ``ValueError`` for anything else.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number and s, m, h, d or w, such as 30m or 24h")
    return float(match[1]) * _UNITS[match[2]]


def _duration(key: str, value: Any) -> float:
    allowed = 'a number of seconds from 0 to 100 years, a timedelta, or text such as "30m", "24h" or "7d"'
    try:
        seconds = parse_duration(value) if isinstance(value, str) else _seconds(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(key, value, allowed) from None
    if not 0 <= seconds <= LONGEST:
        raise _wrong(key, value, allowed)
    return seconds


def _seconds(value: Any) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _timeout(key: str, value: Any) -> float | None:
    if value is None:
        return None
    seconds = _duration(key, value)
    if seconds == 0:
        raise _wrong(key, value, "a duration of more than 0 seconds, or None")
    return seconds


def _size(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(key, value, "a whole number of bytes, at least 1")
    return value


def _count(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(key, value, "a whole number, 0 for no limit")
    return value


def _key(key: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise _wrong(key, value, "the name of a key of the session, or None")
    return value


def _policy(key: str, value: Any) -> CapPolicy:
    if value not in _POLICIES:
        raise _wrong(key, value, f"one of {', '.join(_POLICIES)}")
    return cast(CapPolicy, value)


def _directory(key: str, value: Any) -> str | None:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise _wrong(key, value, "the path of a directory, or None")
    return path


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, "True or False (true or false in the environment)")
    return value


def _serializer(key: str, value: Any) -> str:
    if value not in SERIALIZERS:
        raise _wrong(key, value, f"one of {', '.join(SERIALIZERS)}")
    return str(value)


def _compression(key: str, value: Any) -> str | None:
    if value is None:
        return None
    if value not in COMPRESSIONS:
        raise _wrong(key, value, f"one of {', '.join(COMPRESSIONS)}, or None")
    with _named(key):
        open_compression(value)
    return str(value)


def _encryption_keys(key: str, value: Any) -> tuple[str | bytes, ...]:
    """None of the messages has a value: they are secret."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f'{key} is a {type(value).__name__}; allowed is a list of keys, the current one first: ["…"]')
    for index, text in enumerate(value):
        with _named(f"{key}[{index}]"):
            open_cipher(key_bytes(text))
    return tuple(value)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Say in a ``ConfigError`` which setting it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error.__cause__


def _store(key: str, value: Any) -> Any:
    if value is None or value == "":
        raise _wrong(key, value, 'a URL such as "sqlite:///sessions.db", or a store object')
    return value


def _origins(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple)) or not all(map(_is_text, value)):
        # Without the value, which may contain a password.
        raise ConfigError(f'{key} is not a list of texts; write ["flask"] or ["flask-session+redis://localhost:6379/0"]')
    return tuple(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _wrong(key: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{key} is {value!r}; allowed is {allowed}")


_CHECKS = {
    "store": _store,
    "migrate_from": _store,
    "serializer": _serializer,
    "compress": _compression,
    "encryption_keys": _encryption_keys,
    "idle_timeout": _timeout,
    "absolute_timeout": _timeout,
    "renew_interval": _duration,
    "keep_ended": _duration,
    "user_key": _key,
    "max_per_user": _count,
    "cap_policy": _policy,
    "max_sessions": _count,
    "track_devices": _flag,
    "max_bytes": _size,
    "max_entries": _count,
    "cleanup_interval": _duration,
    "backup_dir": _directory,
    "backup_interval": _duration,
    "backup_keep": _count,
    "archive_dir": _directory,
    "no_store": _flag,
    "upgrade_from": _origins,
    "enabled": _flag,
}
