"""The stores, and ``open_store``, which opens one by its URL."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ..exceptions import ConfigError
from .base import SessionStore, check_namespace

_MODULES = {
    "memory": "memory",
    "file": "file",
    "sqlite": "sql",
    "postgresql": "sql",
    "mysql": "sql",
    "mariadb": "sql",
    "redis": "redis",
    "rediss": "redis",
    "unix": "redis",
    "redis+cluster": "redis",
    "rediss+cluster": "redis",
    "redis+sentinel": "redis",
    "rediss+sentinel": "redis",
}
#: How the scheme of a URL ends that names several servers.
_OF_MANY = ("+cluster", "+sentinel")


@dataclass(frozen=True, slots=True)
class Location:
    """A store URL taken apart: the URL without its query, its options, and where relative paths start."""

    url: SplitResult
    options: Mapping[str, str]
    base_path: str

    @property
    def scheme(self) -> str:
        """What stands before the colon, in lower case."""
        return self.url.scheme

    def path(self, text: str) -> str:
        """An absolute path of *text*, which starts at the base path if it is relative."""
        path = os.path.abspath(os.path.join(self.base_path, unquote(text)))
        if "\0" in path:
            raise ConfigError(f"{self} has a NUL character in its path")
        return path

    def read_options(self, **readers: Callable[[str], Any]) -> dict[str, Any]:
        """The options, each read by the reader of its name. Raises ``ConfigError`` for one that is unknown or wrong."""
        values = {}
        for name, text in self.options.items():
            if name not in readers:
                allowed = ", ".join(readers) or "none"
                raise ConfigError(f"{self} has the unknown option {name!r}; allowed is {allowed}")
            try:
                values[name] = readers[name](text)
            except ValueError as error:
                raise ConfigError(f"{self} has the option {name}={text!r}: {error}") from error
        return values

    def __str__(self) -> str:
        return redacted(self.url)


def open_store(url: str | SessionStore | object, *, namespace: str = "web", base_path: str = ".") -> SessionStore:
    """The store that *url* names; nothing is connected yet.

    :param url: such as ``sqlite:///sessions.db``, ``file:///var/lib/sessions``, ``redis://localhost:6379/0`` or
        ``memory://``, with options as query parameters. A ``SessionStore`` is returned as it is, a ``cachelib`` cache
        is adapted.
    :param namespace: which of the sessions kept there; up to 40 lower-case letters, digits and underscores.
    :param base_path: directory in which relative paths start.

    Raises ``ConfigError`` for a URL, option or path that cannot work, naming it.
    """
    if isinstance(url, SessionStore):
        return url
    if not isinstance(url, str):
        from .cachelib import CachelibStore

        return CachelibStore.adapt(url, namespace)
    check_namespace(namespace)
    location = take_apart(url, base_path)
    module = import_module(f".{_MODULES[location.scheme]}", __name__)
    store = module.open_location(location, namespace)
    assert isinstance(store, SessionStore)
    return store


def take_apart(url: str, base_path: str, schemes: Collection[str] = tuple(_MODULES)) -> Location:
    """The parts of a URL of one of *schemes*; messages quote nothing of it that may be secret. Raises ``ConfigError``."""
    try:
        parts = urlsplit(url)
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        if parts.scheme.endswith(_OF_MANY):
            servers_in(parts, default_port=0)
        else:
            parts.port  # noqa: B018  raises if it is no number
    except ValueError:
        # Not with the error's own words: they may quote a part of a password that was not escaped.
        raise ConfigError(
            f"the store URL {_hidden(url)!r} cannot be read: the port must be a number up to 65535, and characters such "
            "as / # ? @ in a password must be percent-encoded"
        ) from None
    if not parts.scheme and not parts.netloc and parts.path and "@" not in parts.path:
        raise ConfigError(_no_url(parts.path))
    if parts.scheme not in schemes:
        near = difflib.get_close_matches(parts.scheme, schemes, n=1)
        hint = f"did you mean {near[0]}:? Allowed" if near else "allowed"
        known = ", ".join(f"{scheme}:" for scheme in schemes)
        raise ConfigError(f"the store URL {redacted(parts)!r} has an unknown scheme; {hint} are {known}")
    _check_hosts(parts)
    options = dict(given)
    if len(options) < len(given):
        raise ConfigError(f"the store URL {redacted(parts)!r} has an option twice")
    return Location(parts._replace(query=""), options, base_path)


def _check_hosts(url: SplitResult) -> None:
    """Refuse what no resolver takes; to be told so when it connects is no error that a driver expects."""
    try:
        for host in filter(None, [place.hostname for place in _places(url)]):
            host.encode("idna")
    except ValueError:
        raise ConfigError(
            f"the store URL {redacted(url)!r} has a server whose name has an empty part or one of more than 63 letters"
        ) from None


def servers_in(url: SplitResult, default_port: int) -> list[tuple[str, int]]:
    """Host and port of each server in a URL that names several. Raises ``ValueError`` for a port that is no number."""
    return [(place.hostname or "", place.port or default_port) for place in _places(url)]


def _places(url: SplitResult) -> list[SplitResult]:
    """The servers of a URL, each as one of its own, without user and password."""
    return [urlsplit(f"//{place}") for place in url.netloc.rpartition("@")[2].split(",")]


def _no_url(path: str) -> str:
    slashes = "//" if path.startswith("/") else ""
    return (
        f"the store {path!r} is a path and no URL; write file:{slashes}{path} for a directory of files, or "
        f"sqlite:///{path} for a database"
    )


def make_directory(path: str) -> None:
    """Make a directory and those above it, each for this user alone; ``os.makedirs`` would do so for the last only."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directory(os.path.dirname(path))
        with suppress(FileExistsError):  # somebody else was faster
            os.mkdir(path, 0o700)


def redacted(url: SplitResult) -> str:
    """The URL without its password and query, for messages."""
    # urlunsplit leaves out slashes before nothing, and those of a path that starts with two.
    netloc = f"//{url.netloc}" if url.netloc or url.path.startswith("/") else ""
    return _hidden(f"{url.scheme}:{netloc}{url.path}")


def _hidden(url: str) -> str:
    """The URL without whatever stands before its last @, query included."""
    scheme, colon, rest = url.partition(":")
    place = rest.lstrip("/")
    slashes = rest[: len(rest) - len(place)]
    _, at, place = place.rpartition("@")
    return f"{scheme}{colon}{slashes}{'***@' if at else ''}{place.partition('?')[0]}"


def flag(text: str) -> bool:
    """Read an option that is 0 or 1. Raises ``ValueError`` for anything else."""
    if text not in ("0", "1"):
        raise ValueError("allowed is 0 or 1")
    return text == "1"


def number(text: str) -> int:
    """Read an option that is a whole number. Raises ``ValueError`` for anything else."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("allowed is a whole number")
    return int(text)


def seconds(text: str) -> float:
    """Read an option that is a number of seconds above 0. Raises ``ValueError`` for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise ValueError("allowed is a number of seconds above 0, up to a day")
    return value
