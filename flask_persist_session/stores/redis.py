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

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, compress, islice
from typing import Any

import redis

from ..exceptions import ConfigError, SerializationError, StoreError, StoreUnavailable, UnsupportedByStore
from ..records import Change, Deletion, Finding, SessionQuery, SessionRecord, StoreStats, is_session_id
from ..serializers import pack_record, unpack_record
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
from .redis_history import RedisHistory
from .redis_scripts import (
    CREATE,
    DELETE,
    HISTORY_SCRIPTS,
    LEASE,
    OPEN,
    PAGE_OF_USER,
    PRUNE,
    SAVE,
    STATS,
    TRANSACTION,
    Call,
    Script,
    Step,
    at_once,
    call_of,
    facts_of,
    parts,
    together,
    with_all_keys,
)
from .redis_upkeep import RedisCheck

#: For so many seconds after its expiry a key is there for sure: its own time to live ends a margin later.
_SURE = SessionStore.margin // 2
_PAGE = 200
#: What a server answers, also from within a script, that may be otherwise soon.
_PASSING = (
    *("READONLY", "OOM ", "MISCONF", "LOADING", "BUSY ", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN"),
    *("non local key", "cluster is down"),
)
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
#: How many changes are sent before the answers are read, and how many bytes.
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

    Raises ``ConfigError`` for a prefix with braces.
    """

    def __init__(
        self, client: Any, namespace: str = "web", *, prefix: str = "persist", name: str = "the Redis server"
    ) -> None:
        if "{" in prefix or "}" in prefix:
            raise ConfigError(
                f"the prefix {prefix!r} of the keys in Redis has braces, by which a cluster tells what is kept together; "
                "use a prefix without"
            )
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
            if _is_wrong_type(error):
                raise SerializationError("the key does not hold a hash") from error
            raise self._failure(error) from error
        record = _record(found)
        return None if record is None else that_of(record, session_id)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        try:
            saved = self._run(SAVE if expected else CREATE, self._save_arguments(record))
        except redis.RedisError as error:
            raise self._failure(error) from error
        if not saved:
            raise conflict(record.id, expected)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        if not is_session_id(session_id):
            return False
        with self._errors():
            return bool(self._run(DELETE, self._delete_arguments(session_id, expected)))

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

    def _transact(self, steps: Sequence[Step]) -> int:
        """Run the transaction; returns which of the steps, counted from 1, is in conflict, 0 if none is."""
        with self._errors():
            try:
                return int(self._run(TRANSACTION, together(steps)))
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
            return bool(self._run(LEASE, (1, f"{self._prefix}:lease:{name}", holder, milliseconds)))

    def namespace(self, name: str) -> RedisStore:
        check_namespace(name)
        if name == self._namespace:
            return self
        return RedisStore(self._shared_client, name, prefix=self._prefix_of_all, name=self._name)

    @property
    def history(self) -> RedisHistory:
        # Not kept: a store that is part of a circle is not closed by its last user letting go of it.
        return RedisHistory(lambda: self._client, self._run, HISTORY_SCRIPTS, self._errors, self._key)

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
        return 1, self._key(record.id), record.version, pack_record(record), facts_of(record), lifetime

    def _delete_arguments(self, session_id: str, expected: int | None) -> tuple[Any, ...]:
        return 1, self._key(session_id), "" if expected is None else expected

    def _step(self, change: Change | Deletion) -> Step:
        if isinstance(change, Deletion):
            _, key, *given = self._delete_arguments(change.id, change.expected)
            return Step("d", change.id[:3], key, (*given, "", "", ""), 0)
        record = change.record
        _, key, *given = self._save_arguments(record)
        return Step("s" if change.expected else "c", record.id[:3], key, (*given,), len(record.data))

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
            found = self._run(OPEN, (1, index))
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
            found = self._run(PAGE_OF_USER, (1, index, *bounds, value and repr(float(value)), session_id, tenant))
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
                _raise_all_but_wrong_types(answers)
            for session_id, found in zip(page, answers, strict=True):
                if found == [None, None]:
                    if index_of is None:
                        continue
                    # The key's own time to live took it, which no script notices. The indexes follow now.
                    with self._errors():
                        self._run(PRUNE, (2, self._key(session_id), index_of(session_id)))
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
                    pipeline.execute_command("EVAL", STATS.text, 1, self._expiry_key(shard), repr(now), _SURE)
                answers = pipeline.execute()
            for shard, sums in zip(shards, answers, strict=True):
                yield add_up(self._records_of(shard), now) if sums is None else _stats(sums)

    def _records_of(self, shard: str) -> Iterator[SessionRecord]:
        with self._errors():
            ids = self._client.zrange(self._expiry_key(shard), 0, -1)
        return self._records(_ids_in(ids), self._expiry_key_of)

    # Scripts ----------------------------------------------------------------------------------------------------------

    def _run(self, script: Script, arguments: tuple[Any, ...]) -> Any:
        client = self._client
        given = with_all_keys(script, arguments) if isinstance(client, ClusterClient) else arguments
        # Sent directly, because the script objects of the client cost a tenth more.
        try:
            return client.execute_command("EVALSHA", script.sha, *given)
        except redis.exceptions.NoScriptError:
            return client.execute_command("EVAL", script.text, *given)

    def _run_each(self, steps: Sequence[Step]) -> list[bool]:
        """Whether each step was done."""
        outcomes: list[bool] = []
        for part in parts(steps, _STEPS_SENT, _BYTES_SENT):
            with self._errors():
                outcomes += chain.from_iterable(map(_outcomes, self._answers(list(self._calls(part)))))
        return outcomes

    def _calls(self, steps: Iterable[Step]) -> Iterator[Call]:
        if not isinstance(self._client, ClusterClient):
            yield from map(call_of, at_once(steps))
            return
        # One by one, for each to be refused whole while its keys move to another node.
        for step in steps:
            script, arguments = call_of([step])
            yield script, with_all_keys(script, arguments)

    def _answers(self, calls: Sequence[Call]) -> Iterator[Any]:
        """What the scripts answer, or what is wrong with their keys."""
        with self._client.pipeline(transaction=False) as pipeline:
            sent = set[Script]()
            for script, arguments in calls:
                # The text comes once, for the server keeps it: it is as long as most records.
                name, source = ("EVALSHA", script.sha) if script in sent else ("EVAL", script.text)
                sent.add(script)
                pipeline.execute_command(name, source, *arguments)
            answers = pipeline.execute(raise_on_error=False)
        for (script, arguments), answer in zip(calls, answers, strict=True):
            if isinstance(answer, redis.exceptions.NoScriptError):  # the server has lost it
                yield self._client.execute_command("EVAL", script.text, *arguments)
            elif isinstance(answer, redis.RedisError) and (not isinstance(answer, redis.ResponseError) or _passes(answer)):
                raise answer
            else:
                yield answer

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
        if _passes(error):
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
        run = Script(script)
        given = [(1, *(_bytes(part) if isinstance(part, str) else part for part in call)) for call in calls]
        with self._store._errors():
            return list(self._store._answers([(run, arguments) for arguments in given])) if given else []

    def read(self, packed: Any, version: Any) -> SessionRecord | None:
        return _record([packed, version])

    def reindexing(self, record: SessionRecord) -> tuple[Any, ...]:
        return facts_of(record), _lifetime(record, self._store.margin)


def _passes(error: redis.RedisError) -> bool:
    """Whether the server may answer otherwise soon."""
    return isinstance(error, _PASSING_ERRORS) or any(word in str(error) for word in _PASSING)


def _raise_all_but_wrong_types(answers: Iterable[Any]) -> None:
    """Raise what is wrong with the server: no session that it does not give now is damaged, or none, therefore."""
    for answer in answers:
        if isinstance(answer, redis.RedisError) and not _is_wrong_type(answer):
            raise answer


def _is_wrong_type(error: redis.RedisError) -> bool:
    return str(error).startswith("WRONGTYPE")


def _outcomes(answer: Any) -> list[bool]:
    """What a script says of each of its steps. Raises what is wrong with any."""
    outcomes = answer if isinstance(answer, list) else [answer]
    for outcome in outcomes:
        if isinstance(outcome, redis.RedisError):
            raise outcome
    return list(map(bool, outcomes))


def _text(key: bytes) -> str:
    """A key or member as text, whatever bytes it has; ``_bytes`` turns it back."""
    return key.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


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
