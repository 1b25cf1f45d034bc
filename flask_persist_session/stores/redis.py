"""Sessions in Redis 6.2 or later, or any server that speaks like it (Valkey).

A session is a hash of its record and of what the scripts need of it. Each shard has a sorted set of its sessions by
expiry and a hash of what statistics need of them, each user a sorted set by creation; one Lua script per write keeps
the four together. The shard is the hash tag, so on a cluster they share a slot::

    persist:web:{3fa}:s:3fa09c…    hash of the session: record, version, facts
    persist:web:{3fa}:expiry       session ids by expires_at
    persist:web:{3fa}:facts        hash: session id to its facts
    persist:web:{3fa}:u:…          session ids of one user by created_at
    persist:web:{3fa}:h:…, :hk:…   the history of a session; see redis_history
    persist:web:lease:sweep        a lease
    persist:web:note:cleanup       a note

The time to live of the keys is a safety net for a store that nobody sweeps; expiry is judged by the manager.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, compress, groupby, islice
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import redis

from ..exceptions import SerializationError, StoreError, StoreUnavailable, UnsupportedByStore
from ..records import Change, Deletion, Finding, SessionQuery, SessionRecord, StoreStats, is_session_id
from ..serializers import dump_tags, pack_record, unpack_record
from ..tokens import SHARDS, shard_of
from . import Location
from .base import (
    SessionStore,
    add_up,
    can_match,
    check_namespace,
    check_save,
    check_transaction,
    combined,
    conflict,
    cut,
    ignore,
    in_order,
    lease_holder,
    log_unreadable,
    moment_in,
    order_and_cut,
    per_tag,
    shards_of,
    that_of,
)
from .redis_clients import Clients, read_location
from .redis_cluster import ClusterClient
from .redis_history import PROLONG, REMOVE, SCRIPTS, RedisHistory
from .redis_upkeep import RedisCheck

#: For so many seconds after its expiry a key is there for sure: its own time to live ends a margin later.
_SURE = SessionStore.margin // 2
_PAGE = 200
#: What a server answers, also from within a script, that may be otherwise soon.
_PASSING = ("READONLY", "OOM ", "MISCONF", "LOADING", "BUSY ", "CLUSTERDOWN", "TRYAGAIN", "non local key")
_PASSING_ERRORS = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterError,
    redis.exceptions.TryAgainError,
)
#: How many bytes the times of a packed record that has not ended stand before its version; and by what a script finds a
#: page of a user's sessions.
_DISTANCES = {"created_at": 29, "accessed_at": 20, "expires_at": 11}
_JUDGED_BY_SERVER = ("user_id", "tenant_id", "state", "order_by", "limit", "offset", "after")
#: How many sessions a script saves or deletes at most, without a pause, with how many bytes of data.
_STEPS_AT_ONCE = 100
_BYTES_AT_ONCE = 256 * 1024
#: How many are sent before the answers are read, and how many bytes.
_STEPS_SENT = 600
_BYTES_SENT = 4 * 1024 * 1024
#: How a cluster, or its client, says that the keys of a script are not on one server.
_OTHER_SLOTS = ("CROSSSLOT", "same key slot", "same slot")
#: How many shards are asked for their ids at once, at most, and so many ids that they should not give many more.
_SHARDS_AT_ONCE = 128
_IDS_AT_ONCE = 4000
#: A server goes through the scripts that came together without a pause: with a million sessions 6 ms for so many.
_SHARDS_ADDED_UP_AT_ONCE = 8


def open_location(location: Location, namespace: str) -> RedisStore:
    """A store of one server, of a cluster, or of servers that Sentinel watches.

    ``redis://user:password@host:port/db`` or ``unix:///path/to/socket``; ``redis+cluster://user:password@host:port,…``;
    ``redis+sentinel://user:password@host:port,…/service/db``. With ``rediss`` instead of ``redis``: with TLS.

    Options: ``timeout`` (seconds to wait for a connection and for an answer, 2), ``prefix`` of the keys (``persist``),
    ``db`` of one server, ``sentinel_username``, ``sentinel_password``, and for TLS ``ssl_ca_certs``, ``ssl_certfile``,
    ``ssl_keyfile``, ``ssl_check_hostname`` of a cluster and of Sentinel.
    """
    clients, options = read_location(location, prefix=str)
    return RedisStore(clients, namespace, prefix=options.get("prefix", "persist"), name=f"{_what(location)} {location}")


def _what(location: Location) -> str:
    kinds = {"": "the Redis server", "cluster": "the Redis cluster", "sentinel": "the Redis primary of"}
    return kinds[location.scheme.partition("+")[2]]


class RedisStore(SessionStore):
    """Keeps each session in a hash of a Redis server.

    :param client: a ``redis.Redis``, a ``redis.RedisCluster`` or anything with their methods, with ``decode_responses``
        off and timeouts set; or ``Clients`` that give such.
    :param namespace: part of the keys.
    :param prefix: start of the keys.
    :param name: what messages call the server.
    """

    def __init__(
        self, client: Any, namespace: str = "web", *, prefix: str = "persist", name: str = "the Redis server"
    ) -> None:
        if isinstance(client, redis.RedisCluster):
            client = ClusterClient(client)
        self._clients = client if isinstance(client, Clients) else None
        self._shared_client = client
        self._namespace = namespace
        self._prefix_of_all = prefix
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
            saved = self._run(_SAVE if expected else _CREATE, self._save_arguments(record))
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
        return self._records(self._ids(SessionQuery()), self._expiry_key_of)

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        if not can_match(query):
            return iter(())
        arrange = order_and_cut
        if query.ids is not None:
            records = self._records(filter(is_session_id, sorted(query.ids)), None)
        elif query.user_id is not None:
            index = self._user_key(shard_of(query.user_id), query.user_id)
            if (page := self._page_of_user(index, query)) is not None:
                return iter(page)
            if query.state in ("active", "expired"):
                records = self._open_of_user(index)
            else:
                records = self._records(self._ids_in_index(index), lambda _: index)
        elif query.id_prefix is not None:
            prefix = query.id_prefix
            ids = self._ids_in_index(self._expiry_key(prefix[:3]))
            records = self._records((name for name in ids if name.startswith(prefix)), self._expiry_key_of)
        else:
            arrange = cut if query.by_id else order_and_cut
            fewest = _PAGE if query.limit is None or not query.by_id else max(1, query.offset + query.limit)
            records = self._records(self._ids(query), self._expiry_key_of, fewest)
        return arrange((record for record in records if query.matches(record)), query)

    def count(self, query: SessionQuery) -> int:
        if query != SessionQuery():
            return super().count(query)
        with self._errors(), self._client.pipeline(transaction=False) as pipeline:
            for shard in range(SHARDS):
                pipeline.zcard(self._expiry_key(f"{shard:03x}"))
            return sum(pipeline.execute())

    def stats(self, *, now: float) -> StoreStats:
        return combined(self._stats_of_shards(now))

    def save_many(self, changes: Sequence[Change]) -> list[bool]:
        for change in changes:
            check_save(change.record, change.expected)
        return self._run_each([self._step(change) for change in changes])

    def delete_many(self, deletions: Sequence[Deletion]) -> list[bool]:
        known = [is_session_id(deletion.id) for deletion in deletions]
        removed = iter(self._run_each([self._step(deletion) for deletion in compress(deletions, known)]))
        return [is_known and next(removed) for is_known in known]

    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        check_transaction(changes)
        steps = []
        for change in changes:
            if isinstance(change, Change) or is_session_id(change.id):
                steps.append(self._step(change))
            elif change.expected is not None:
                raise conflict(change.id, change.expected)
        at = self._transact(steps) if steps else 0
        if at:
            session_id = steps[at - 1].key.rpartition(":")[2]
            raise next(conflict(change.id, change.expected) for change in changes if change.id == session_id)

    def _transact(self, steps: Sequence[_Step]) -> int:
        """Run the transaction; returns which of the steps, counted from 1, is in conflict, 0 if none is."""
        with self._errors():
            try:
                return int(self._run(_TRANSACTION, _together(steps)))
            except redis.RedisError as error:
                if any(reason in str(error) for reason in _OTHER_SLOTS):
                    raise UnsupportedByStore(
                        f"{self._name} is a cluster, where a script reaches the sessions of one shard, that is of one "
                        "user, at a time; save the sessions of several users one by one, or use a single server"
                    ) from error
                raise

    def lease(self, name: str, seconds: float) -> bool:
        holder = lease_holder(self._holder)
        with self._errors():
            milliseconds = max(0, round(seconds * 1000))
            return bool(self._run(_LEASE, (1, f"{self._prefix}:lease:{name}", holder, milliseconds)))

    def namespace(self, name: str) -> RedisStore:
        check_namespace(name)
        if name == self._namespace:
            return self
        return RedisStore(self._shared_client, name, prefix=self._prefix_of_all, name=self._name)

    @property
    def history(self) -> RedisHistory:
        # Not kept: a store that is part of a circle is not closed by its last user letting go of it.
        return RedisHistory(lambda: self._client, self._run, _HISTORY_SCRIPTS, self._errors, self._key)

    def check(self, *, repair: bool, seen: Callable[[SessionRecord], object] = ignore) -> Iterator[Finding]:
        return RedisCheck(_Checked(self), self._prefix, repair=repair, seen=seen).run()

    def note(self, name: str, moment: float) -> None:
        with self._errors():
            self._client.set(f"{self._prefix}:note:{name}", repr(moment))

    def noted(self, name: str) -> float | None:
        with self._errors():
            found = self._client.get(f"{self._prefix}:note:{name}")
        return moment_in((found or b"").decode("ascii", "replace"))

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
        lifetime = _lifetime(record, self.margin)
        return 1, self._key(record.id), record.version, pack_record(record), _facts(record), lifetime

    def _delete_arguments(self, session_id: str, expected: int | None) -> tuple[Any, ...]:
        return 1, self._key(session_id), "" if expected is None else expected

    def _step(self, change: Change | Deletion) -> _Step:
        if isinstance(change, Deletion):
            _, key, *given = self._delete_arguments(change.id, change.expected)
            return _Step(change.id[:3], key, ("delete", *given, "", "", ""), 0)
        _, key, *given = self._save_arguments(change.record)
        return _Step(change.id[:3], key, ("save" if change.expected else "create", *given), len(change.record.data))

    # Listing ----------------------------------------------------------------------------------------------------------

    def _ids(self, query: SessionQuery) -> Iterator[str]:
        """The ids that may match, by expiry and shard; a group of shards at a time, the smaller the more they hold."""
        (lowest, highest), shards, size = _bounds(query), shards_of(query), 1
        while shards:
            with self._errors(), self._client.pipeline(transaction=False) as pipeline:
                for shard in shards[:size]:
                    pipeline.zrangebyscore(self._expiry_key(f"{shard:03x}"), lowest, highest)
                answers = pipeline.execute()
            for ids in answers:
                yield from in_order(_ids_in(ids), query)
            shards = shards[size:]
            fitting = size * _IDS_AT_ONCE // (sum(map(len, answers)) or 1)
            size = max(1, min(fitting, 8 * size, _SHARDS_AT_ONCE))

    def _ids_in_index(self, index: str) -> list[str]:
        with self._errors():
            return list(_ids_in(self._client.zrange(index, 0, -1)))

    def _open_of_user(self, index: str) -> Iterator[SessionRecord]:
        """The records of the sessions in the index of a user that have not ended.

        All as they are at one moment: listed first and read then, one that moves to another id in between would be missed.
        """
        with self._errors():
            found = self._run(_OPEN, (1, index))
        for session_id, *fields in found:
            try:
                yield from filter(None, [_record(fields)])
            except SerializationError as error:
                log_unreadable(session_id.decode("ascii", "replace"), error)

    def _page_of_user(self, index: str, query: SessionQuery) -> list[SessionRecord] | None:
        """What *query* finds, if the server can tell: the data of a user's other sessions need not be sent for a page."""
        order, limit = (query.order_by or "").removeprefix("-"), query.limit
        judged = replace(SessionQuery(now=query.now), **{name: getattr(query, name) for name in _JUDGED_BY_SERVER})
        if query != judged or query.state != "active" or order not in _DISTANCES or not limit:
            return None
        value, session_id = query.after or ("", "")
        tenant = "" if query.tenant_id is None else f":{query.tenant_id}"
        bounds = (repr(query.now), _DISTANCES[order], "-" if query.descending else "", query.offset, limit)
        with self._errors():
            found = self._run(_PAGE_OF_USER, (1, index, *bounds, value and repr(float(value)), session_id, tenant))
        try:
            page = list(filter(None, map(_record, found or ())))
        except SerializationError:
            return None  # the long way leaves it out and fills the page
        return None if found is None or not all(map(query.matches, page)) else page

    def _records(
        self, ids: Iterable[str], index_of: Callable[[str], str] | None, fewest: int = _PAGE
    ) -> Iterator[SessionRecord]:
        """The records of *ids*, which were found in the index that *index_of* names, if in any.

        :param fewest: how many are read at first; more and more, if that was not enough.
        """
        ids, size = iter(ids), min(fewest, _PAGE)
        while page := list(islice(ids, size)):
            size = min(2 * size, _PAGE)
            with self._errors(), self._client.pipeline(transaction=False) as pipeline:
                for session_id in page:
                    pipeline.hmget(self._key(session_id), "record", "version")
                answers = pipeline.execute(raise_on_error=False)
            for session_id, found in zip(page, answers, strict=True):
                if found == [None, None]:
                    if index_of is None:
                        continue
                    # The key's own time to live took it, which no script notices. The indexes follow now.
                    with self._errors():
                        self._run(_PRUNE, (2, self._key(session_id), index_of(session_id)))
                    continue
                try:
                    yield from filter(None, [_record(found)])
                except SerializationError as error:
                    log_unreadable(session_id, error)

    # Statistics -------------------------------------------------------------------------------------------------------

    def _stats_of_shards(self, now: float) -> Iterator[StoreStats]:
        with self._errors():
            at_once = _SHARDS_ADDED_UP_AT_ONCE * getattr(self._client, "primaries", 1)
        for first in range(0, SHARDS, at_once):
            shards = [f"{shard:03x}" for shard in range(first, min(first + at_once, SHARDS))]
            with self._errors(), self._client.pipeline(transaction=False) as pipeline:
                for shard in shards:
                    pipeline.execute_command("EVAL", _STATS.text, 1, self._expiry_key(shard), repr(now), _SURE)
                answers = pipeline.execute()
            for shard, sums in zip(shards, answers, strict=True):
                yield add_up(self._records_of(shard), now) if sums is None else _stats(sums)

    def _records_of(self, shard: str) -> Iterator[SessionRecord]:
        with self._errors():
            ids = self._client.zrange(self._expiry_key(shard), 0, -1)
        return self._records(_ids_in(ids), self._expiry_key_of)

    # Scripts ----------------------------------------------------------------------------------------------------------

    def _run(self, script: _Script, arguments: tuple[Any, ...]) -> Any:
        client = self._client
        given = _with_all_keys(script, arguments) if isinstance(client, ClusterClient) else arguments
        # Sent directly, because the script objects of the client cost a tenth more.
        try:
            return client.execute_command("EVALSHA", script.sha, *given)
        except redis.exceptions.NoScriptError:
            return client.execute_command("EVAL", script.text, *given)

    def _run_each(self, steps: Sequence[_Step]) -> list[bool]:
        """Whether each step was done."""
        outcomes: list[bool] = []
        for part in _parts(steps, _STEPS_SENT, _BYTES_SENT):
            with self._errors():
                outcomes += map(bool, chain.from_iterable(self._answers(list(self._calls(part)))))
        return outcomes

    def _calls(self, steps: Iterable[_Step]) -> Iterator[_Call]:
        if not isinstance(self._client, ClusterClient):
            yield from map(_call, _at_once(steps))
            return
        # One by one, for each to be refused whole while its keys move to another node.
        for step in steps:
            script, arguments = _call([step])
            yield script, _with_all_keys(script, arguments)

    def _answers(self, calls: Sequence[_Call]) -> Iterator[list[Any]]:
        """What each script answers of its steps."""
        with self._client.pipeline(transaction=False) as pipeline:
            sent = set[_Script]()
            for script, arguments in calls:
                # The text comes once, for the server keeps it: it is as long as most records.
                name, source = ("EVALSHA", script.sha) if script in sent else ("EVAL", script.text)
                sent.add(script)
                pipeline.execute_command(name, source, *arguments)
            answers = pipeline.execute(raise_on_error=False)
        for call, answer in zip(calls, answers, strict=True):
            yield self._settled(*call, answer)

    def _settled(self, script: _Script, arguments: tuple[Any, ...], answer: Any) -> list[Any]:
        """The answer to a call, once more if the server has lost the script. Raises what is wrong with any of its steps."""
        if isinstance(answer, redis.exceptions.NoScriptError):
            answer = self._client.execute_command("EVAL", script.text, *arguments)
        outcomes = answer if isinstance(answer, list) else [answer]
        for outcome in outcomes:
            if isinstance(outcome, redis.RedisError):
                raise outcome
        return outcomes

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
        if self._clients and (isinstance(error, redis.exceptions.ReadOnlyError) or "READONLY" in str(error)):
            self._clients.renew()  # another is the primary now
        if isinstance(error, _PASSING_ERRORS) or any(word in str(error) for word in _PASSING):
            return StoreUnavailable(f"{self._name} cannot serve at the moment: {error}")
        return StoreError(f"{self._name} failed: {error}")


class _Checked:
    """What a check needs of the server."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store

    def keys(self, count: int) -> Iterator[str]:
        # What a pattern means by these characters is not meant.
        prefix = re.sub(r"([*?\[\]^\\])", r"\\\1", self._store._prefix)
        with self._store._errors():
            for key in self._store._client.scan_iter(match=f"{prefix}:*", count=count):
                yield _text(key)

    def members(self, key: str, count: int) -> Iterator[str]:
        client = self._store._client
        scan = client.hscan_iter if key.endswith("}:facts") else client.zscan_iter
        with self._store._errors():
            for member, *_ in scan(_bytes(key), count=count):
                yield _text(member)

    def evaluate(self, script: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        run = _Script(script)
        given = [(1, *(_bytes(part) if isinstance(part, str) else part for part in call)) for call in calls]
        with self._store._errors(), self._store._client.pipeline(transaction=False) as pipeline:
            for number, arguments in enumerate(given):
                # The text comes once, for the server keeps it: it is as long as a session.
                pipeline.execute_command(*(("EVALSHA", run.sha) if number else ("EVAL", run.text)), *arguments)
            answers = pipeline.execute(raise_on_error=False) if given else []
            return [self._settled(run, *call) for call in zip(given, answers, strict=True)]

    def _settled(self, script: _Script, arguments: tuple[Any, ...], answer: Any) -> Any:
        """The answer to a call, once more if the server has lost the script; what is wrong with the key is an answer."""
        if isinstance(answer, redis.exceptions.NoScriptError):
            return self._store._run(script, arguments)
        if isinstance(answer, redis.RedisError) and not isinstance(answer, redis.ResponseError):
            raise answer
        return answer

    def read(self, packed: Any, version: Any) -> SessionRecord | None:
        return _record([packed, version])

    def reindexing(self, record: SessionRecord) -> tuple[Any, ...]:
        return _facts(record), _lifetime(record, self._store.margin)


def _text(key: bytes) -> str:
    """A key or member as text, whatever bytes it has; ``_bytes`` turns it back."""
    return key.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


#: A script and its arguments: the number of its keys, the keys, the others.
_Call: TypeAlias = "tuple[_Script, tuple[Any, ...]]"


class _Step(NamedTuple):
    """What a script does with one of several sessions."""

    shard: str
    key: str
    arguments: tuple[Any, ...]
    size: int
    """Bytes of its data."""


def _together(steps: Sequence[_Step]) -> tuple[Any, ...]:
    """The arguments of a script that runs these steps."""
    keys = [step.key for step in steps]
    return len(keys), *keys, *chain.from_iterable(step.arguments for step in steps)


def _call(steps: Sequence[_Step]) -> _Call:
    """The script that runs each of these steps, and its arguments."""
    if len(steps) > 1:
        return _EACH, _together(steps)
    [(_, key, (kind, *arguments), _)] = steps
    return _SCRIPT_OF[kind], (1, key, *arguments)


def _at_once(steps: Iterable[_Step]) -> Iterator[list[_Step]]:
    """Steps that follow each other and are on one server of a cluster, as many as a script may run without a pause."""
    for _, of_shard in groupby(steps, key=attrgetter("shard")):
        yield from _parts(of_shard, _STEPS_AT_ONCE, _BYTES_AT_ONCE)


def _parts(steps: Iterable[_Step], most: int, most_bytes: int) -> Iterator[list[_Step]]:
    """Some steps after the other: at most so many, and of so many bytes if there are more than one."""
    part, size = list[_Step](), 0
    for step in steps:
        if part and (len(part) == most or size + step.size > most_bytes):
            yield part
            part, size = [], 0
        part.append(step)
        size += step.size
    if part:
        yield part


class _Script:
    def __init__(self, text: str) -> None:
        self.text = text
        # Redis names a script by its SHA-1; nothing is protected by it.
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# The other keys are derived from that of the session: they have its hash tag, so they are in the same slot, and each
# argument less is time saved.

# KEYS: session. ARGV: new version, record, facts, time to live in milliseconds. Most saves leave the expiry as it is, and
# then no index is touched; the facts are the same too as long as the data keeps its size.
_SAVING = f"""
local stored = redis.pcall('HMGET', KEYS[1], 'version', 'facts')
if stored.err or stored[1] ~= tostring(ARGV[1] - 1) then
  return 0
end
if stored[2] == ARGV[3] then
  redis.call('HSET', KEYS[1], 'version', ARGV[1], 'record', ARGV[2])
  return 1
end
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'record', ARGV[2], 'facts', ARGV[3])
redis.call('HSET', shard .. ':facts', id, ARGV[3])
if stored[2] and stored[2]:sub(1, 8) == ARGV[3]:sub(1, 8) then
  return 1
end
local expires_at, created_at, _, _, _, user = struct.unpack('<ddI4BHHc0', ARGV[3])
local indexes = {{shard .. ':expiry', shard .. ':facts'}}
redis.call('PEXPIRE', KEYS[1], ARGV[4])
if stored[1] then{PROLONG}else
  {REMOVE}
end
redis.call('ZADD', indexes[1], string.format('%.17g', expires_at), id)
if user ~= '' then
  indexes[3] = shard .. ':u' .. user
  redis.call('ZADD', indexes[3], string.format('%.17g', created_at), id)
end
for _, index in ipairs(indexes) do
  longest[index] = longest[index] or redis.call('PTTL', index)
  if longest[index] < tonumber(ARGV[4]) then
    redis.call('PEXPIRE', index, ARGV[4])
    longest[index] = tonumber(ARGV[4])
  end
end
return 1
"""

# The same for a session that must not be there yet, whatever its version.
_CREATING = _SAVING.replace("stored[1] ~= tostring(ARGV[1] - 1)", "stored[1]", 1)

# The time to live of an index by its key: once one of its sessions was saved, it stays for as long as the script runs.
_LONGEST = "local longest = {}"

_SAVE, _CREATE = _Script(f"{_LONGEST}{_SAVING}"), _Script(f"{_LONGEST}{_CREATING}")

# Takes a session out of everything but its own key; its user is known to the facts alone.
_FORGET = f"""
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
local facts = redis.call('HGET', shard .. ':facts', id) or ''
local intact, _, _, _, _, _, user = pcall(struct.unpack, '<ddI4BHHc0', facts)
if intact then
  redis.call('ZREM', shard .. ':u' .. user, id)
end
redis.call('HDEL', shard .. ':facts', id)
redis.call('ZREM', shard .. ':expiry', id)
{REMOVE}
"""

# KEYS: session. ARGV: expected version or nothing.
_DELETE = _Script(f"""
local hash = redis.call('TYPE', KEYS[1]).ok == 'hash'
if ARGV[1] ~= '' and (not hash or redis.call('HGET', KEYS[1], 'version') ~= ARGV[1]) then
  return 0
end
{_FORGET}
return redis.call('DEL', KEYS[1])
""")

# KEYS: session, the index that led to it.
_PRUNE = _Script(f"""
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
{_FORGET}
redis.call('ZREM', KEYS[2], id)
return 1
""")

# KEYS: the sessions of a shard by expiry. ARGV: now, for how many seconds after its expiry a key is there for sure.
# Answers nothing where the facts may not be those of the sessions: one has none or damaged ones, or its key's own time to
# live ended. To ask each session itself would take seven times as long.
_STATS = _Script("""
local shard = KEYS[1]:match('^(.*):expiry$')
if redis.call('ZCARD', KEYS[1]) ~= redis.call('HLEN', shard .. ':facts') then
  return false
end
local gone_if_before = redis.call('TIME')[1] - ARGV[2]
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', gone_if_before)) do
  if redis.call('EXISTS', shard .. ':s:' .. id) == 0 then
    return false
  end
end
local function pairs_of(counts)
  local flat = {}
  for name, count in pairs(counts) do
    flat[#flat + 1] = name
    flat[#flat + 1] = count
  end
  return flat
end
local function add_up()
  local now, unpack = tonumber(ARGV[1]), struct.unpack
  local total, expired, ended, users, bytes = 0, 0, 0, 0, 0
  local oldest, newest = math.huge, -math.huge
  local owners, tenants, tag_sets = {}, {}, {}
  for _, facts in ipairs(redis.call('HVALS', shard .. ':facts')) do
    local expires_at, created_at, size, has_ended, owner, rest = unpack('<ddI4BHc0', facts)
    local tags = facts:sub(rest)
    total, bytes = total + 1, bytes + size
    if has_ended == 1 then
      ended = ended + 1
    elseif expires_at <= now then
      expired = expired + 1
    end
    if created_at < oldest then oldest = created_at end
    if created_at > newest then newest = created_at end
    owners[owner] = (owners[owner] or 0) + 1
    tag_sets[tags] = (tag_sets[tags] or 0) + 1
  end
  for owner, count in pairs(owners) do
    local user, rest = unpack('<Hc0', owner)
    local tenant = owner:sub(rest)
    tenants[tenant] = (tenants[tenant] or 0) + count
    if user ~= '' then users = users + 1 end
  end
  local times = {string.format('%.17g', oldest), string.format('%.17g', newest)}
  return {total, expired, ended, users, bytes, times, pairs_of(tenants), pairs_of(tag_sets)}
end
local intact, sums = pcall(add_up)
return intact and sums
""")

# KEYS: the index of a user. Whether a session has ended, its facts tell in their 21st byte.
_OPEN = _Script("""
local shard = KEYS[1]:match('^(.-{%x%x%x}):u:')
local open = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local facts = redis.call('HGET', shard .. ':facts', id)
  if not facts or facts:byte(21) ~= 1 then
    local found = redis.pcall('HMGET', shard .. ':s:' .. id, 'record', 'version')
    if not found.err and (found[1] or found[2]) then
      open[#open + 1] = {id, found[1], found[2]}
    end
  end
end
return open
""")

_SCRIPT_OF = {"save": _SAVE, "create": _CREATE, "delete": _DELETE}

# KEYS: sessions. ARGV for each: save, create or delete, and what these scripts are given.
_STEPS = f"""
{_LONGEST}
local scripts = {{}}
scripts.save = function(KEYS, ARGV) {_SAVING} end
scripts.create = function(KEYS, ARGV) {_CREATING} end
scripts.delete = function(KEYS, ARGV) {_DELETE.text} end
local function run(number)
  return scripts[ARGV[number * 5 - 4]]({{KEYS[number]}}, {{unpack(ARGV, number * 5 - 3, number * 5)}})
end
"""

# Runs each of the steps, and answers what each says, or what is wrong with its keys: the others are none the worse for it.
_EACH = _Script(f"""{_STEPS}
local outcomes = {{}}
for number = 1, #KEYS do
  local intact, outcome = pcall(run, number)
  if not intact and type(outcome) == 'string' then outcome = redis.error_reply(outcome) end
  outcomes[number] = outcome
end
return outcomes
""")

# Runs all of the steps or none. Answers the number of the first session in conflict, or 0. Nothing is written before all is
# known to succeed, for there is no way back.
_TRANSACTION = _Script(f"""{_STEPS}
local function has_version(key, kind, given)
  local stored = redis.pcall('HGET', key, 'version')
  if kind == 'create' then return not stored end
  if kind == 'save' then return stored == tostring(given - 1) end
  return given == '' or stored == given
end
for number, key in ipairs(KEYS) do
  local kind, given = ARGV[number * 5 - 4], ARGV[number * 5 - 3]
  if not has_version(key, kind, given) then return number end
  local shard = key:match('^(.*):s:')
  local facts = kind == 'delete' and redis.pcall('HGET', shard .. ':facts', key:match('[^:]*$')) or ARGV[number * 5 - 1]
  if type(facts) == 'table' then return facts end
  local intact, _, _, _, _, _, user = pcall(struct.unpack, '<ddI4BHHc0', facts or '')
  for _, index in ipairs({{shard .. ':expiry', intact and user ~= '' and shard .. ':u' .. user or nil}}) do
    local size = redis.pcall('ZCARD', index)
    if type(size) == 'table' then return size end
  end
  local size = redis.pcall('HLEN', shard .. ':facts')
  if type(size) == 'table' then return size end
end
for number = 1, #KEYS do
  run(number)
end
return 0
""")

# KEYS: the index of a user. ARGV: now, the ordering field as its distance from the version in a packed record, "-" for
# descending, offset, limit, value and id of the last one before or nothing, tenant behind a colon or nothing. Answers the
# active sessions of that page, or nothing if one cannot be judged: a record is read from its end, where the times stand
# before two times nothing (it has not ended) and the version, whose length follows from its value.
_PAGE_OF_USER = _Script("""
local now, distance, descending = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '-'
local shard = KEYS[1]:match('^(.-{%x%x%x}):u:')
local function precedes(one, other)
  if descending then one, other = other, one end
  if one[1] ~= other[1] then return one[1] < other[1] end
  return one[2] < other[2]
end
local function is_active(facts)
  local expires_at, _, _, has_ended, owner = struct.unpack('<ddI4BHc0', facts)
  local _, rest = struct.unpack('<Hc0', owner)
  return has_ended ~= 1 and expires_at > now and (ARGV[8] == '' or owner:sub(rest) == ARGV[8])
end
local function value_in(record, version)
  local number, length = tonumber(version), 1
  if number >= 4294967296 then length = 9
  elseif number >= 65536 then length = 5
  elseif number >= 256 then length = 3
  elseif number >= 128 then length = 2 end
  local start = #record - length + 1 - distance
  assert(record:byte(start) == 203 and record:sub(-length - 2, -length - 1) == '\\192\\192')
  return struct.unpack('>d', record, start + 1)
end
local function active()
  local found, last = {}, ARGV[7] ~= '' and {tonumber(ARGV[6]), ARGV[7]}
  for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if is_active(redis.call('HGET', shard .. ':facts', id)) then
      local stored = redis.call('HMGET', shard .. ':s:' .. id, 'record', 'version')
      local item = {value_in(stored[1], stored[2]), id, stored}
      if not last or precedes(last, item) then found[#found + 1] = item end
    end
  end
  table.sort(found, precedes)
  return found
end
local intact, found = pcall(active)
if not intact then return false end
local page = {}
for number = ARGV[4] + 1, math.min(ARGV[4] + ARGV[5], #found) do
  page[#page + 1] = found[number][3]
end
return page
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

_HISTORY_SCRIPTS = tuple(map(_Script, SCRIPTS))

#: The keys of a shard, beside that of a session, that scripts write, and must not make anew.
_WRITTEN: dict[_Script, tuple[str, ...]] = {
    **dict.fromkeys((_SAVE, _CREATE), ("expiry", "facts")),
    **dict.fromkeys(_HISTORY_SCRIPTS, ("h:{id}", "hk:{id}")),
    _DELETE: ("expiry", "facts", "h:{id}", "hk:{id}"),
}


def _with_all_keys(script: _Script, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a script is given, with the keys named that it derives from its first one.

    While a slot moves to another node of a cluster, a key after the other, a node refuses a script before it begins if it
    has some of the named keys only. The others it would write half, or make anew beside those that are to come.
    """
    number, key, *given = arguments
    shard, _, session_id = key.rpartition(":s:")
    names = [name.format(id=session_id) for name in _WRITTEN.get(script, ())]
    if script in (_SAVE, _CREATE) and (user := _user_in(given[2])):
        names.append(f"u{user}")
    return number + len(names), key, *(f"{shard}:{name}" for name in names), *given


_FACTS = struct.Struct("<ddIBHH")


def _facts(record: SessionRecord) -> bytes:
    """What statistics and indexes need of a record, for the scripts to unpack; its expiry comes first.

    Behind the numbers come the lengths of user and tenant together and of the user; user, tenant, tags. Names have a
    colon before them, to tell the empty one from none.
    """
    user = b"" if record.user_id is None else b":" + record.user_id.encode()
    tenant = b"" if record.tenant_id is None else b":" + record.tenant_id.encode()
    owner_size = 2 + len(user) + len(tenant)
    ended, size = record.ended_at is not None, len(record.data)
    numbers = _FACTS.pack(record.expires_at, record.created_at, size, ended, owner_size, len(user))
    return b"".join((numbers, user, tenant, dump_tags(record.tags).encode()))


def _user_in(facts: bytes) -> str:
    """The user, behind a colon, or nothing."""
    *_, size = _FACTS.unpack_from(facts)
    return facts[_FACTS.size : _FACTS.size + size].decode()


def _lifetime(record: SessionRecord, margin: float) -> int:
    """The time to live of its key in milliseconds."""
    # From the record's own times, so that a clock other than the server's does no harm.
    return round((max(0.0, record.expires_at - record.accessed_at) + margin) * 1000)


def _stats(sums: list[Any]) -> StoreStats:
    """The statistics of a shard from what the script answers."""
    total, expired, ended, users, size, times, tenants, tag_sets = sums
    return StoreStats(
        total=total,
        active=total - expired - ended,
        expired=expired,
        ended=ended,
        users=users,
        bytes=size,
        oldest=float(times[0]) if total else None,
        newest=float(times[1]) if total else None,
        tenants={tenant[1:]: count for tenant, count in _pairs(tenants) if tenant},
        tags=per_tag(_pairs(tag_sets)),
    )


def _pairs(flat: list[Any]) -> Iterator[tuple[str, int]]:
    names = (name.decode("utf-8", "replace") for name in flat[::2])
    return zip(names, flat[1::2], strict=True)


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
