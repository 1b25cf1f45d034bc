"""Sessions in any ``cachelib`` cache: memcached, DynamoDB, MongoDB, uWSGI and whatever comes.

A cache has no compare-and-set and no listing. Saves are serialised within this process, so a cache that only this
process reaches is as safe as memory; between processes, a save and another change at the very same moment can lose one of
the two, and a save that overlaps a sign-out can undo it. For sessions of several processes prefer the other stores.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cachelib import BaseCache, NullCache, SimpleCache

from ..exceptions import ConfigError, SerializationError, StoreError, StoreUnavailable, UnsupportedByStore
from ..records import Change, Deletion, SessionRecord, is_session_id
from ..serializers import pack_record, unpack_record
from .base import SessionStore, after_fork, cannot_list, check_namespace, check_save, conflict, that_of
from .cache_errors import driver_errors
from .history import HistoryLog

log = logging.getLogger("flask_persist_session")

#: How much later than ``expires_at`` an entry's own time to live ends, in seconds.
_MARGIN = 86400
#: Caches keep times in 32 bits; ten years from now still fit.
_LONGEST = 10 * 365 * 86400
_LOCKS = 64


class CachelibStore(SessionStore):
    """Keeps each session as one entry of a cache.

    :param cache: a ``cachelib`` cache. Its own limits apply: what it evicts is signed out, so give it room
        (``threshold=0`` is no limit for a ``FileSystemCache``; a ``SimpleCache`` needs a large number).
    :param namespace: part of the keys.
    """

    def __init__(self, cache: BaseCache, namespace: str = "web") -> None:
        self._cache = cache
        self._prefix = f"persist:{namespace}:"
        self._family = {namespace: self}
        self._renew_locks()
        after_fork(self._renew_locks)
        # The dict of a SimpleCache is out of reach for other processes, so the lock covers every writer.
        self.atomic = isinstance(cache, SimpleCache)

    @classmethod
    def adapt(cls, cache: Any, namespace: str) -> CachelibStore:
        """The store of a cache given as ``PERSIST_SESSION_STORE``, with a warning if it cannot be safe.

        Raises ``ConfigError`` if it is no ``cachelib`` cache, or one that keeps nothing.
        """
        if not isinstance(cache, BaseCache) or isinstance(cache, NullCache):
            raise ConfigError(
                f"{cache!r:.80} ({type(cache).__name__}) is no store; allowed is a URL, a SessionStore or a cachelib "
                "cache that keeps what it is given; wrap a Redis client as "
                "flask_persist_session.stores.redis.RedisStore(client)"
            )
        store = cls(cache, namespace)
        if not store.atomic:
            log.warning(
                "sessions are kept in a %s, which has no compare-and-set: processes that change one session at the "
                "same moment can lose a change, even a sign-out; SQLite, PostgreSQL, MySQL, Redis and files do not",
                type(cache).__name__,
            )
        return store

    def get(self, session_id: str) -> SessionRecord | None:
        if not is_session_id(session_id):
            return None
        with self._errors():
            packed = self._cache.get(self._prefix + session_id)
        if packed is None:
            return None
        if not isinstance(packed, bytes):
            raise SerializationError(f"the cache entry is a {type(packed).__name__} and no session record")
        return that_of(unpack_record(packed), session_id)

    def save(self, record: SessionRecord, *, expected: int) -> None:
        check_save(record, expected)
        packed = pack_record(record)
        # From the record's own times, so that a clock other than the cache's does no harm.
        lifetime = int(min(_LONGEST, max(0.0, record.expires_at - record.accessed_at))) + _MARGIN
        key = self._prefix + record.id
        with self._lock(record.id), self._errors():
            if expected == 0:
                # The one step that most caches do as a whole; a refusal means that the id is taken.
                if self._cache.add(key, packed, lifetime):
                    return
                if self._cache.has(key):
                    raise conflict(record.id, expected)
                raise StoreError(f"{type(self._cache).__name__} did not store session {record.id}")
            if self._version(record.id) != expected:
                raise conflict(record.id, expected)
            if not self._cache.set(key, packed, lifetime):
                raise StoreError(f"{type(self._cache).__name__} did not store session {record.id}")

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        if not is_session_id(session_id):
            return False
        with self._lock(session_id), self._errors():
            if expected is not None and self._version(session_id) != expected:
                return False
            there = self._cache.has(self._prefix + session_id)
            return bool(self._cache.delete(self._prefix + session_id)) and there

    def scan(self) -> Iterator[SessionRecord]:
        cannot_list(self, "a cachelib cache cannot enumerate its entries, and expires them itself")

    def namespace(self, name: str) -> CachelibStore:
        check_namespace(name)
        child = CachelibStore(self._cache, name)
        # One object per namespace: its locks are what makes a save one step.
        child._family = self._family
        return self._family.setdefault(name, child)

    @property
    def history(self) -> HistoryLog:
        raise UnsupportedByStore(
            "CachelibStore keeps no histories: a cachelib cache cannot append, and two processes that write the whole of "
            "one at the same moment would lose entries"
        )

    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        raise UnsupportedByStore(
            "a cachelib cache changes one entry at a time, so several sessions cannot change together; save them one by "
            "one, or use another store"
        )

    def note(self, name: str, moment: float) -> None:
        with self._errors():
            if not self._cache.set(f"{self._prefix}note:{name}", moment, _LONGEST):
                raise StoreError(f"{type(self._cache).__name__} did not store the note {name}")

    def noted(self, name: str) -> float | None:
        with self._errors():
            moment = self._cache.get(f"{self._prefix}note:{name}")
        return moment if isinstance(moment, float) else None

    def _renew_locks(self) -> None:
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def _lock(self, session_id: str) -> threading.Lock:
        return self._locks[int(session_id[-8:], 16) % _LOCKS]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except driver_errors() as error:
            raise StoreUnavailable(f"the {type(self._cache).__name__} failed: {error}") from error

    def _version(self, session_id: str) -> int | None:
        try:
            record = self.get(session_id)
        except SerializationError:
            return None
        return record.version if record else None
