"""Clients of Redis servers, from the URL of a store: for one server, for a cluster, and for servers that Sentinel watches.

A client waits for a connection and for each answer for a time that is bounded, and sends again only what it may.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, unquote, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from ..exceptions import ConfigError
from . import Location, flag, number, seconds, servers_in
from .base import after_fork
from .redis_cluster import UNBOUNDED, connect_cluster

_Readers = dict[str, Callable[[str], Any]]
_TLS: _Readers = {"ssl_ca_certs": str, "ssl_certfile": str, "ssl_keyfile": str}
#: They name each other by addresses, which are seldom in a certificate.
_TLS_OF_MANY: _Readers = {"ssl_check_hostname": flag}
_OWN: dict[str, _Readers] = {
    "": {"db": number},
    "cluster": {},
    "sentinel": {"sentinel_username": str, "sentinel_password": str},
}


class Clients(ABC):
    """Gives each thread of each process the client that it may use.

    :param connect: makes a connected client.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._start()
        after_fork(self._leave_to_parent)

    @abstractmethod
    def __call__(self) -> Any:
        """The client for this thread, connected at its first use."""

    @abstractmethod
    def close(self) -> None:
        """Close what this thread uses; whoever goes on gets a new one."""

    @abstractmethod
    def renew(self) -> None:
        """Have the next use find its server anew, because this one is not what it was."""

    @abstractmethod
    def _start(self) -> None:
        """Begin without a client."""

    @abstractmethod
    def _held(self) -> object:
        """What must not be collected in a child process."""

    def _leave_to_parent(self) -> None:
        _inherited.append(self._held())
        self._start()


#: Clients of the parent process: closing them here could disturb it, so they are kept from being collected.
_inherited: list[object] = []


class ClientPerThread(Clients):
    """Makes a client with one connection for each thread; taking one from a pool costs a tenth of a command."""

    def _start(self) -> None:
        self._own = threading.local()

    def _held(self) -> object:
        return self._own

    def __call__(self) -> Any:
        try:
            return self._own.client
        except AttributeError:
            self._own.client = client = self._connect()
            return client

    def close(self) -> None:
        """Close the connection of this thread, which gets a new one when it goes on. Those of others close with them."""
        client = self._own.__dict__.pop("client", None)
        if client is not None:
            client.close()

    def renew(self) -> None:
        self.close()


class SharedClient(Clients):
    """Makes one client for all threads, which has pools of connections and knows where the servers are."""

    def _start(self) -> None:
        self._client: Any = None
        self._lock = threading.Lock()

    def _held(self) -> object:
        return self._client

    def __call__(self) -> Any:
        return self._client or self._connected()

    def _connected(self) -> Any:
        # Without the lock: where no server answers, threads would wait for each other's waiting.
        client = self._connect()
        with self._lock:
            first = self._client = self._client or client
        if first is not client:
            client.close()
        return first

    def close(self) -> None:
        """Close the connections of all threads, which get new ones when they go on."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def renew(self) -> None:
        # Not closed: others may be in the middle of a command.
        self._client = None


def read_location(location: Location, **more: Callable[[str], Any]) -> tuple[Clients, dict[str, Any]]:
    """How to reach the servers that *location* names, and the options that are read by *more*. Raises ``ConfigError``."""
    transport, _, kind = location.scheme.partition("+")
    check, prepare = {
        "": (_check_single, _single),
        "cluster": (_check_cluster, _cluster),
        "sentinel": (_check_sentinel, _sentinel),
    }[kind]
    check(location)
    secure = transport == "rediss"
    readers = {"timeout": seconds, **_OWN[kind], **(_TLS if secure else {}), **(_TLS_OF_MANY if secure and kind else {})}
    given = location.read_options(**readers, **more)
    options = {name: value for name, value in given.items() if name in readers}
    wait = options.pop("timeout", 2.0)
    if secure:
        options.setdefault("ssl_check_hostname", True)
    clients = prepare(location, {"socket_timeout": wait, "socket_connect_timeout": wait, **options})
    return clients, {name: value for name, value in given.items() if name in more}


# One server -----------------------------------------------------------------------------------------------------------


def _check_single(location: Location) -> None:
    if location.scheme == "unix":
        if location.url.netloc.rpartition("@")[2] or not location.url.path.startswith("/"):
            raise ConfigError(f"{location} names no socket; write unix:///path/to/socket")
    elif not location.url.netloc or not re.fullmatch(r"(/\d*)?", location.url.path, re.ASCII):
        raise ConfigError(f"{location} does not fit; write {location.scheme}://host:6379/0, with the database's number")


def _single(location: Location, options: dict[str, Any]) -> Clients:
    def connect() -> redis.Redis:
        return _Single.from_url(_url(location.url), retry=Retry(NoBackoff(), 0), single_connection_client=True, **options)

    return ClientPerThread(connect)


class _Single(redis.Redis):
    """Sends once what changes something, and what does not once more on a connection that the server closed meanwhile.

    What was done the first time, and only its answer was lost, would be done twice. So before a script is sent, it looks
    whether the connection is still there, as pools do; with each command that would cost some microseconds.
    """

    def execute_command(self, *args: Any, **options: Any) -> Any:
        execute: Any = super().execute_command
        if args[0] in ("EVAL", "EVALSHA"):
            self._leave_closed_connection()
            return execute(*args, **options)
        try:
            return execute(*args, **options)
        except redis.ConnectionError:  # not after a timeout, to bound the wait
            return execute(*args, **options)

    def _leave_closed_connection(self) -> None:
        connection: Any = self.connection
        if connection is not None:
            connection.connect()  # unless it is
            try:
                connection.can_read()
            except redis.ConnectionError:
                connection.disconnect()


def _url(url: SplitResult) -> str:
    # urlunsplit leaves out the slashes before an empty host, and the client wants them.
    return urlunsplit(url) if url.scheme != "unix" else f"unix://{url.netloc}{url.path}"


# A cluster ------------------------------------------------------------------------------------------------------------


def _check_cluster(location: Location) -> None:
    if location.url.path not in ("", "/", "/0"):
        raise ConfigError(f"{location} names a database, and a cluster has none but 0; write {location.scheme}://host:6379")
    _check_servers(location, f"{location.scheme}://host:6379,other:6379")


def _cluster(location: Location, options: dict[str, Any]) -> Clients:
    if redis.VERSION < (7, 4):  # whose client of a cluster fails in ways of its own when a node does
        raise ConfigError(f"{location} needs version 7.4 or later of the package redis; pip install --upgrade redis")
    nodes = servers_in(location.url, default_port=6379)
    given = {**_credentials(location.url), **_with_tls(location, options)}
    return SharedClient(lambda: connect_cluster(nodes, given))


# Sentinel -------------------------------------------------------------------------------------------------------------


def _check_sentinel(location: Location) -> None:
    example = f"{location.scheme}://host:26379,other:26379/service/0"
    if not re.fullmatch(r"/[^/]+(/\d*)?", location.url.path, re.ASCII):
        raise ConfigError(f"{location} names no service that Sentinel watches; write {example}, with the database's number")
    _check_servers(location, example)


def _sentinel(location: Location, options: dict[str, Any]) -> Clients:
    sentinels = servers_in(location.url, default_port=26379)
    service, _, database = location.url.path[1:].partition("/")
    names = {"sentinel_username": "username", "sentinel_password": "password"}
    credentials = {names[option]: options.pop(option) for option in tuple(options) if option in names}
    # A connection is looked at before it is used, so one that was closed needs no second attempt; and what was sent to a
    # primary that failed must not be sent to the next one, which may have it already.
    shared = {**_with_tls(location, options), "retry": Retry(NoBackoff(), 0)}

    def connect() -> redis.Redis:
        new_sentinels: Any = _Sentinels
        watching = new_sentinels(
            sentinels,
            sentinel_kwargs={**shared, **credentials},
            **shared,
            **_credentials(location.url),
            db=int(database or 0),
            max_connections=UNBOUNDED,
        )
        return watching.master_for(unquote(service), redis_class=_Primary)  # type: ignore[no-any-return]

    return SharedClient(connect)


class _Sentinels(Sentinel):
    """Asks first the one that answered the last time, and says what went wrong without the settings of the connection."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        reasons = []
        is_up: Any = self.check_master_state
        for sentinel in self.sentinels:
            try:
                services: Any = sentinel.sentinel_masters()
            except redis.RedisError as error:
                reasons.append(str(error))
                continue
            state = services.get(service_name)
            if state and is_up(state, service_name):
                # A new list, for other threads may be going through the old one.
                self.sentinels = [sentinel, *(other for other in self.sentinels if other is not sentinel)]
                return state["ip"], state["port"]
            reasons.append("it is down" if state else f"there is no service {service_name!r}")
        raise MasterNotFoundError(f"no Sentinel knows where it is: {'; '.join(reasons)}")


class _Primary(redis.Redis):
    def close(self) -> None:
        super().close()
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            sentinel.close()


# What both share ------------------------------------------------------------------------------------------------------


def _check_servers(location: Location, example: str) -> None:
    credentials, _, _ = location.url.netloc.rpartition("@")
    if "@" in credentials:
        raise ConfigError(
            f"{location} has more than one @ before its servers; write the user and the password once, before the first "
            "of them, and an @ in a password as %40"
        )
    if not all(host for host, _ in servers_in(location.url, default_port=0)):
        raise ConfigError(f"{location} lacks the name of a server; write {example}")


def _credentials(url: SplitResult) -> dict[str, str]:
    given = {"username": url.username, "password": url.password}
    return {name: unquote(value) for name, value in given.items() if value}


def _with_tls(location: Location, options: dict[str, Any]) -> dict[str, Any]:
    return {"ssl": True, **options} if location.scheme.startswith("rediss") else options
