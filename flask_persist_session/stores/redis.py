"""Sessions in Redis 6.2 or later, or any server that speaks like it (Valkey).

A session is a hash of its record and of what the scripts need of it. Each shard has a sorted set of its sessions by
expiry, each user one by creation; one Lua script per write keeps the three together. The shard is the hash tag, so on a
cluster they share a slot::

    persist:web:{3fa}:s:3fa09c…    hash of the session: record, version, expires_at, user_id
    persist:web:{3fa}:expiry       session ids by expires_at
    persist:web:{3fa}:u:…          session ids of one user by created_at
    persist:web:lease:sweep        a lease

The time to live of the keys is a safety net for a store that nobody sweeps; expiry is judged by the manager.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any
from urllib.parse import urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..exceptions import ConfigError, SerializationError, StoreError, StoreUnavailable
from ..records import Change, Deletion, SessionQuery, SessionRecord, is_session_id
from ..serializers import pack_record, unpack_record
from ..tokens import SHARDS, shard_of
from . import Location, number, seconds
from .base import SessionStore, after_fork, can_match, check_save, conflict, log_unreadable, order_and_cut, that_of

#: How much later than ``expires_at`` a key's own time to live ends, in seconds.
_MARGIN = 7 * 86400
_PAGE = 200
#: What a server answers, also from within a script, that may be otherwise soon.
_PASSING = ("READONLY", "OOM ", "MISCONF", "LOADING", "BUSY ", "CLUSTERDOWN", "TRYAGAIN")
_SHARDS_AT_ONCE = 128


def open_location(location: Location, namespace: str) -> RedisStore:
    """``redis://user:password@host:port/db``, ``rediss://…`` with TLS, or ``unix:///path/to/socket``.

    Options: ``timeout`` (seconds to wait for a connection and for an answer, 2), ``prefix`` of the keys (``persist``),
    ``db``, and for TLS ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``.
    """
    if location.scheme == "unix":
        if location.url.netloc.rpartition("@")[2] or not location.url.path.startswith("/"):
            raise ConfigError(f"{location} names no socket; write unix:///path/to/socket")
    elif not location.url.netloc or not re.fullmatch(r"(/\d*)?", location.url.path, re.ASCII):
        raise ConfigError(f"{location} does not fit; write {location.scheme}://host:6379/0, with the database's number")
    tls = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") if location.scheme == "rediss" else ()
    readers: dict[str, Callable[[str], Any]] = {
        "timeout": seconds,
        "prefix": str,
        "db": number,
        **dict.fromkeys(tls, str),
    }
    options = location.read_options(**readers)
    wait, prefix = options.pop("timeout", 2.0), options.pop("prefix", "persist")

    def connect() -> redis.Redis:
        return redis.Redis.from_url(
            urlunsplit(location.url),
            socket_timeout=wait,
            socket_connect_timeout=wait,
            # Once more on a connection that the server closed meanwhile; not after a timeout, to bound the wait.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            single_connection_client=True,
            **({"ssl_check_hostname": True} if location.scheme == "rediss" else {}),
            **options,
        )

    return RedisStore(ClientPerThread(connect), namespace, prefix=prefix, name=f"the Redis server {location}")


class ClientPerThread:
    """Makes a client with one connection for each thread; taking one from a pool costs a tenth of a command.

    :param connect: makes a connected client.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._start()
        after_fork(self._leave_to_parent)

    def _start(self) -> None:
        self._own = threading.local()

    def _leave_to_parent(self) -> None:
        _inherited.append(self._own)
        self._start()

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


#: Clients of the parent process: closing them here could disturb it, so they are kept from being collected.
_inherited: list[object] = []


class RedisStore(SessionStore):
    """Keeps each session in a hash of a Redis server.

    :param client: a ``redis.Redis`` or anything with its methods, with ``decode_responses`` off and timeouts set; or a
        ``ClientPerThread`` of such.
    :param namespace: part of the keys.
    :param prefix: start of the keys.
    :param name: what messages call the server.
    """

    def __init__(
        self, client: Any, namespace: str = "web", *, prefix: str = "persist", name: str = "the Redis server"
    ) -> None:
        self._clients = client if isinstance(client, ClientPerThread) else None
        self._shared_client = client
        self._prefix = f"{prefix}:{namespace}"
        self._name = name
        self._holder = secrets.token_hex(16)

    # The contract -----------------------------------------------------------------------------------------------------

    def get(self, session_id: str) -> SessionRecord | None:
        if not is_session_id(session_id):
            return None
        try:
            found = self._client.execute_command("HMGET", self._key(session_id), "record", "version")
        except redis.RedisError as error:
            if str(error).startswith("WRONGTYPE"):
                raise SerializationError("the key does not hold a hash") from error
            raise self._failure(error) from error
        record = _record(found)
        return None if record is None else that_of(record, session_id)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        try:
            saved = self._run(_SAVE, self._save_arguments(record))
        except redis.RedisError as error:
            raise self._failure(error) from error
        if not saved:
            raise conflict(record.id, expected)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        if not is_session_id(session_id):
            return False
        with self._errors():
            return bool(self._run(_DELETE, self._delete_arguments(session_id, expected)))

    def scan(self) -> Iterator[SessionRecord]:
        return self._records(self._ids("-inf", "+inf"), self._expiry_key_of)

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        if not can_match(query):
            return iter(())
        if query.ids is not None:
            records = self._records(filter(is_session_id, sorted(query.ids)), None)
        elif query.user_id is not None:
            index = self._user_key(shard_of(query.user_id), query.user_id)
            records = self._records(self._ids_of_user(index), lambda _: index)
        else:
            records = self._records(self._ids(*_bounds(query)), self._expiry_key_of)
        return order_and_cut((record for record in records if query.matches(record)), query)

    def count(self, query: SessionQuery) -> int:
        if query != SessionQuery():
            return super().count(query)
        with self._errors(), self._client.pipeline(transaction=False) as pipeline:
            for shard in range(SHARDS):
                pipeline.zcard(self._expiry_key(f"{shard:03x}"))
            return sum(pipeline.execute())

    def save_many(self, changes: Sequence[Change]) -> list[bool]:
        for change in changes:
            check_save(change.record, change.expected)
        return self._run_many(_SAVE, [self._save_arguments(change.record) for change in changes])

    def delete_many(self, deletions: Sequence[Deletion]) -> list[bool]:
        known = [deletion for deletion in deletions if is_session_id(deletion.id)]
        removed = self._run_many(_DELETE, [self._delete_arguments(item.id, item.expected) for item in known])
        outcomes = iter(removed)
        return [is_session_id(deletion.id) and next(outcomes) for deletion in deletions]

    def lease(self, name: str, seconds: float) -> bool:
        holder = f"{os.getpid()}:{self._holder}"
        with self._errors():
            milliseconds = max(0, round(seconds * 1000))
            return bool(self._run(_LEASE, (1, f"{self._prefix}:lease:{name}", holder, milliseconds)))

    def close(self) -> None:
        with self._errors():
            (self._clients or self._shared_client).close()

    @property
    def _client(self) -> Any:
        return self._clients() if self._clients else self._shared_client

    # Keys and arguments -----------------------------------------------------------------------------------------------

    def _key(self, session_id: str) -> str:
        return f"{self._prefix}:{{{session_id[:3]}}}:s:{session_id}"

    def _expiry_key(self, shard: str) -> str:
        return f"{self._prefix}:{{{shard}}}:expiry"

    def _expiry_key_of(self, session_id: str) -> str:
        return self._expiry_key(session_id[:3])

    def _user_key(self, shard: str, user_id: str) -> str:
        return f"{self._prefix}:{{{shard}}}:u:{user_id}"

    def _save_arguments(self, record: SessionRecord) -> tuple[Any, ...]:
        # From the record's own times, so that a clock other than the server's does no harm.
        lifetime = round((max(0.0, record.expires_at - record.accessed_at) + _MARGIN) * 1000)
        arguments = (1, self._key(record.id), record.version, pack_record(record), record.expires_at, lifetime)
        return arguments if record.user_id is None else (*arguments, record.user_id, record.created_at)

    def _delete_arguments(self, session_id: str, expected: int | None) -> tuple[Any, ...]:
        return 1, self._key(session_id), "" if expected is None else expected

    # Listing ----------------------------------------------------------------------------------------------------------

    def _ids(self, lowest: str, highest: str) -> Iterator[str]:
        """The ids whose expiry lies within the bounds, a group of shards at a time."""
        for first in range(0, SHARDS, _SHARDS_AT_ONCE):
            with self._errors(), self._client.pipeline(transaction=False) as pipeline:
                for shard in range(first, first + _SHARDS_AT_ONCE):
                    pipeline.zrangebyscore(self._expiry_key(f"{shard:03x}"), lowest, highest)
                answers = pipeline.execute()
            for ids in answers:
                yield from _ids_in(ids)

    def _ids_of_user(self, index: str) -> list[str]:
        with self._errors():
            return list(_ids_in(self._client.zrange(index, 0, -1)))

    def _records(self, ids: Iterable[str], index_of: Callable[[str], str] | None) -> Iterator[SessionRecord]:
        """The records of *ids*, which were found in the index that *index_of* names, if in any."""
        ids = iter(ids)
        while page := list(islice(ids, _PAGE)):
            with self._errors(), self._client.pipeline(transaction=False) as pipeline:
                for session_id in page:
                    pipeline.hmget(self._key(session_id), "record", "version")
                answers = pipeline.execute(raise_on_error=False)
            for session_id, found in zip(page, answers, strict=True):
                if found == [None, None]:
                    if index_of is None:
                        continue
                    # The key's own time to live took it, which no script notices. The index follows now.
                    with self._errors():
                        self._run(_PRUNE, (2, self._key(session_id), index_of(session_id), session_id))
                    continue
                try:
                    yield from filter(None, [_record(found)])
                except SerializationError as error:
                    log_unreadable(session_id, error)

    # Scripts ----------------------------------------------------------------------------------------------------------

    def _run(self, script: _Script, arguments: tuple[Any, ...]) -> Any:
        # Sent directly, because the script objects of the client cost a tenth more.
        try:
            return self._client.execute_command("EVALSHA", script.sha, *arguments)
        except redis.exceptions.NoScriptError:
            return self._client.execute_command("EVAL", script.text, *arguments)

    def _run_many(self, script: _Script, calls: list[tuple[Any, ...]]) -> list[bool]:
        outcomes: list[bool] = []
        for start in range(0, len(calls), _PAGE):
            part = calls[start : start + _PAGE]
            with self._errors(), self._client.pipeline(transaction=False) as pipeline:
                for number, arguments in enumerate(part):
                    # The text comes once, for the server keeps it: it is as long as most records.
                    name, source = ("EVALSHA", script.sha) if number else ("EVAL", script.text)
                    pipeline.execute_command(name, source, *arguments)
                answers = pipeline.execute(raise_on_error=False)
                outcomes += [bool(self._settled(script, *call)) for call in zip(part, answers, strict=True)]
        return outcomes

    def _settled(self, script: _Script, arguments: tuple[Any, ...], answer: Any) -> Any:
        """The answer to one of many calls, once more if the server, or another node of a cluster, had lost the script."""
        if isinstance(answer, redis.exceptions.NoScriptError):
            return self._run(script, arguments)
        if isinstance(answer, redis.RedisError):
            raise answer
        return answer

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors translated. What runs with each request does without, which saves some microseconds."""
        try:
            yield
        except redis.RedisError as error:
            raise self._failure(error) from error

    def _failure(self, error: redis.RedisError) -> StoreError:
        if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
            return StoreUnavailable(f"{self._name} cannot be reached: {error}")
        if any(word in str(error) for word in _PASSING):
            return StoreUnavailable(f"{self._name} cannot serve at the moment: {error}")
        return StoreError(f"{self._name} failed: {error}")


class _Script:
    def __init__(self, text: str) -> None:
        self.text = text
        # Redis names a script by its SHA-1; nothing is protected by it.
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# The other keys are derived from that of the session: they have its hash tag, so they are in the same slot, and each
# argument less is time saved.

# KEYS: session. ARGV: new version, record, expires_at, time to live in milliseconds; and with a user: user id,
# created_at. Most saves leave the expiry as it is, and then nothing but the hash is touched.
_SAVE = _Script("""
local stored = redis.pcall('HMGET', KEYS[1], 'version', 'expires_at')
if stored.err or (stored[1] or '0') ~= tostring(ARGV[1] - 1) then
  return 0
end
if stored[2] == ARGV[3] then
  redis.call('HSET', KEYS[1], 'version', ARGV[1], 'record', ARGV[2])
  return 1
end
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
local indexes = {shard .. ':expiry'}
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'record', ARGV[2], 'expires_at', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('ZADD', indexes[1], ARGV[3], id)
if ARGV[5] then
  indexes[2] = shard .. ':u:' .. ARGV[5]
  redis.call('HSET', KEYS[1], 'user_id', ARGV[5])
  redis.call('ZADD', indexes[2], ARGV[6], id)
end
for _, index in ipairs(indexes) do
  if redis.call('PTTL', index) < tonumber(ARGV[4]) then
    redis.call('PEXPIRE', index, ARGV[4])
  end
end
return 1
""")

# KEYS: session. ARGV: expected version or nothing. The user is known to the hash alone.
_DELETE = _Script("""
local hash = redis.call('TYPE', KEYS[1]).ok == 'hash'
if ARGV[1] ~= '' and (not hash or redis.call('HGET', KEYS[1], 'version') ~= ARGV[1]) then
  return 0
end
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
local user = hash and redis.call('HGET', KEYS[1], 'user_id')
if user then
  redis.call('ZREM', shard .. ':u:' .. user, id)
end
redis.call('ZREM', shard .. ':expiry', id)
return redis.call('DEL', KEYS[1])
""")

# KEYS: session, an index. ARGV: id.
_PRUNE = _Script("""
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('ZREM', KEYS[2], ARGV[1])
end
return 1
""")

# KEYS: lease. ARGV: holder, milliseconds.
_LEASE = _Script("""
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
if tonumber(ARGV[2]) == 0 then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")


def _record(found: Any) -> SessionRecord | None:
    """The record of a hash, given its fields ``record`` and ``version``; or the error that the server gave instead."""
    if isinstance(found, redis.RedisError):
        raise SerializationError(f"the key does not hold a hash: {found}")
    packed, version = found
    if packed is None and version is None:
        return None
    if packed is None or version is None:
        raise SerializationError("the hash is not complete")
    record = unpack_record(packed)
    if version != str(record.version).encode():
        raise SerializationError("the version of the hash is not that of its record")
    return record


def _ids_in(members: Iterable[bytes]) -> Iterator[str]:
    """The session ids among the members of an index; anything else was put there by somebody else."""
    return filter(is_session_id, (member.decode("ascii", "replace") for member in members))


def _bounds(query: SessionQuery) -> tuple[str, str]:
    lowest = "-inf" if query.expires_after is None else repr(query.expires_after)
    highest = "+inf" if query.expires_before is None else f"({query.expires_before!r}"
    return lowest, highest
