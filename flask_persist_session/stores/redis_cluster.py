"""What a store needs of the client of a Redis Cluster: errors of one kind, each command sent once, each wait bounded.

The client that comes with the driver sends a command again when its answer was lost, to whichever node has the keys then.
A save that was done the first time would be told as a conflict the second time. And of many commands that a node has not
answered in time it sends each by itself, which takes as many timeouts.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.commands import RedisClusterCommands
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ClusterError,
    RedisClusterException,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.retry import Retry

_Command = tuple[Any, ...]
#: More connections than there are threads; each holds one at a time.
UNBOUNDED = 2**31
#: What the driver says where it could not even connect. If it says it otherwise one day, a command more is not sent again.
_NOT_SENT = " connecting to "
#: Of a node that has not the keys, or not all of them, for they are moving. It has done nothing then.
_ELSEWHERE = (AskError, TryAgainError)  # MovedError is an AskError


def connect_cluster(nodes: Iterable[tuple[str, int]], options: dict[str, Any]) -> ClusterClient:
    """A client of the cluster that one of *nodes* knows. Raises ``redis.RedisError``."""
    with _as_redis_errors():
        new_node: Any = ClusterNode
        cluster = redis.RedisCluster(
            startup_nodes=[new_node(host, port) for host, port in nodes],
            # Where some slots have no node, the server is configured to serve the others or none.
            require_full_coverage=False,
            retry=Retry(NoBackoff(), 0),
            max_connections=UNBOUNDED,
            **options,
        )
    _look_for_nodes_one_at_a_time(cluster.nodes_manager)
    return ClusterClient(cluster)


class _Commands(RedisClusterCommands):
    _event_dispatcher: Any = None  # needed by none of the commands that are used


class ClusterClient(_Commands):
    """The commands of a cluster.

    :param cluster: a ``redis.RedisCluster``, which may send again what it likes; made by ``connect_cluster`` it does not.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """The answer to a command. Raises ``redis.RedisError``, also for what the driver tells in other ways."""
        with _as_redis_errors():
            try:
                return self._cluster.execute_command(*args, **options)
            except redis.ConnectionError as error:
                if _NOT_SENT not in str(error):
                    raise
                # The driver has asked meanwhile who stands in for the node that is gone.
                return self._cluster.execute_command(*args, **options)

    @property
    def primaries(self) -> int:
        """How many nodes share the keys."""
        return len(self._cluster.get_primaries()) or 1

    def pipeline(self, transaction: bool = False) -> ClusterPipeline:
        """Takes commands together to the nodes that have their keys."""
        return ClusterPipeline(self, self._cluster)

    def scan_iter(
        self, match: Any = None, count: int | None = None, _type: str | None = None, **options: Any
    ) -> Iterator[Any]:
        """The keys of all nodes; some twice, and those of a slot perhaps not that moves at the moment."""
        try:
            for node in self._cluster.get_primaries():
                yield from self._cluster.get_redis_connection(node).scan_iter(match, count, _type, **options)
        except (redis.ConnectionError, redis.TimeoutError):
            with _as_redis_errors():
                self._cluster.nodes_manager.initialize()
            raise

    def close(self) -> None:
        """Close the connections to all nodes."""
        self._cluster.close()


class ClusterPipeline(_Commands):
    """Collects commands that have a key each, and asks each node once for all of its own."""

    def __init__(self, client: ClusterClient, cluster: Any) -> None:
        self._client = client
        self._cluster = cluster
        self._commands: list[_Command] = []

    def __enter__(self) -> ClusterPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._commands = []

    def execute_command(self, *args: Any, **_: Any) -> ClusterPipeline:
        """Add a command."""
        self._commands.append(args)
        return self

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """The answers in the order of the commands.

        :param raise_on_error: raise the first error among the answers instead.

        Raises ``redis.RedisError`` where a node does not answer; what others were told may be done then.
        """
        commands, self._commands = self._commands, []
        answers: list[Any] = [None] * len(commands)
        with _as_redis_errors():
            self._ask(commands, range(len(commands)), answers)
        for place, answer in enumerate(answers):
            if isinstance(answer, _ELSEWHERE):
                answers[place] = self._answer_to(commands[place])
        if raise_on_error:
            for answer in answers:
                if isinstance(answer, redis.RedisError):
                    raise answer
        return answers

    def _ask(self, commands: list[_Command], places: Iterable[int], answers: list[Any], *, again: bool = True) -> None:
        texts = _texts_in(commands)
        for node, own in self._by_node(commands, places):
            try:
                found = self._answers_of(node, (commands[place] for place in own), texts)
            except (redis.ConnectionError, redis.TimeoutError) as error:
                self._cluster.nodes_manager.initialize()
                if not again or isinstance(error, redis.TimeoutError) or _NOT_SENT not in str(error):
                    raise
                self._ask(commands, own, answers, again=False)
                continue
            for place, answer in zip(own, found, strict=True):
                answers[place] = answer

    def _by_node(self, commands: list[_Command], places: Iterable[int]) -> list[tuple[Any, list[int]]]:
        found: dict[str, tuple[Any, list[int]]] = {}
        for place in places:
            node = self._node_of(_key_of(commands[place]))
            found.setdefault(node.name, (node, []))[1].append(place)
        return list(found.values())

    def _node_of(self, key: Any) -> Any:
        try:
            return self._cluster.get_node_from_key(key)
        except SlotNotCoveredError:
            self._cluster.nodes_manager.initialize()
            return self._cluster.get_node_from_key(key)

    def _answers_of(self, node: Any, commands: Iterable[_Command], texts: dict[str, str]) -> list[Any]:
        with self._cluster.get_redis_connection(node).pipeline(transaction=False) as pipeline:
            for command in _with_texts(commands, texts):
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def _answer_to(self, command: _Command) -> Any:
        try:
            return self._client.execute_command(*command)
        except redis.ResponseError as error:
            return error


def _key_of(command: _Command) -> Any:
    return command[3] if command[0] in ("EVAL", "EVALSHA") else command[1]


def _with_texts(commands: Iterable[_Command], texts: dict[str, str]) -> Iterator[_Command]:
    """The commands to a node, each script that is in *texts* by its name spelled out at first."""
    unknown = dict(texts)
    for command in commands:
        name, *rest = command
        if name == "EVALSHA" and rest[0] in unknown:
            yield "EVAL", unknown.pop(rest[0]), *rest[1:]
        else:
            if name == "EVAL":
                unknown.pop(_sha(rest[0]), None)
            yield command


def _texts_in(commands: Iterable[_Command]) -> dict[str, str]:
    """The scripts that are spelled out among *commands*, by the name that a server gives them."""
    return {_sha(command[1]): command[1] for command in commands if command[0] == "EVAL"}


@lru_cache(maxsize=64)
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


@contextmanager
def _as_redis_errors() -> Iterator[None]:
    try:
        yield
    except RedisClusterException as error:
        raise redis.ConnectionError(str(error)) from error
    except ClusterDownError:
        raise
    except ClusterError as error:
        # The driver was sent from node to node, and tells how often.
        raise ClusterError("the slot of the session moves from one node to another") from error
    except IndexError as error:
        # How the driver meets a cluster none of whose slots has a node.
        raise redis.ConnectionError("none of its slots has a node") from error


def _look_for_nodes_one_at_a_time(manager: Any) -> None:
    """Where no node answers, let one thread find that out: each would wait until those before it have waited in vain."""
    look: Callable[..., None] = manager.initialize
    looking = threading.Lock()

    def look_unless_another_does(*args: Any, **options: Any) -> None:
        if looking.acquire(blocking=False):
            try:
                look(*args, **options)
            finally:
                looking.release()

    manager.initialize = look_unless_another_does
