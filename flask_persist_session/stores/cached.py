"""A store with a cache in front: reading a session that was read lately asks the cache, and not the store.

A cache can get, set, add and delete; it cannot compare and set. So that no slow reader brings back what has ended, each
session has two entries: a *mark* and a *copy* of its record, and a copy counts only under the mark that it bears.

* Whoever misses adds a new random mark, reads the store **then**, and puts the copy there, bearing that mark.
* Whoever writes sets the mark to ``_CLOSED``, both before and after the store is changed: for long before, for a moment
  after. While a session is closed the store is asked and nothing is put into the cache.

A mark is never used twice. A copy that was read before a write bears a mark from before it, and however late it reaches the
cache, nobody looks at it any more. An evicted mark does no harm for the same reason. The writer puts no copy of its own:
of two writers the slower one would put the older record. Closing beforehand covers a writer that is killed, or cut off from
the cache, after the store was changed and before it could tell the cache.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy

from cachelib import BaseCache, NullCache, SimpleCache

from ..exceptions import ConfigError, SerializationError, SessionConflict
from ..records import Change, Deletion, Finding, Improvement, SessionQuery, SessionRecord, StoreStats, is_session_id
from ..serializers import DAMAGED, pack_record, unpack_record
from .base import SessionStore, check_namespace, ignore, that_of
from .cache_errors import driver_errors
from .history import HistoryLog

log = logging.getLogger("flask_persist_session")

#: Memcached takes longer times for moments.
_LONGEST = 30 * 86400
#: Seconds for which a session is read from the store after it was written.
_PAUSE = 5
_CLOSED = b"closed"
_MARK_SIZE = 16
#: Memcached has keys of up to 250 characters, which are neither spaces nor control characters.
_PREFIX = re.compile(r"[!-~]{1,100}")


class CachedStore(SessionStore):
    """Reads through *cache*; whatever is written goes to *store* first, and what the cache has of it counts no more.

    :param cache: a ``cachelib`` cache that all processes share, such as a ``RedisCache``. With a ``SimpleCache``, which
        each process has for itself, what other processes change or end is seen up to *ttl* seconds late; a warning says so.
    :param ttl: seconds for which a record is read from the cache, 1 to 2,592,000 (30 days). It also bounds what is lost by
        a cache that could not be told of a write.
    :param namespace: that of *store*, if it was opened with another one.
    :param prefix: how keys in the cache begin: 1 to 100 printable characters of ASCII, no spaces. Two stores in one cache
        need different ones, otherwise the sessions of one are those of the other.

    Raises ``ConfigError`` for what is no store, no cache, or no such time, namespace or prefix.
    """

    def __init__(
        self,
        store: SessionStore,
        cache: BaseCache,
        *,
        ttl: float = 1800.0,
        namespace: str = "web",
        prefix: str = "persist-cached",
    ) -> None:
        _check(store, cache, ttl, prefix)
        check_namespace(namespace)
        self.store = store
        self.writers = store.writers
        self.atomic = store.atomic
        self._cache = cache
        self._ttl = int(ttl)
        self._namespace = namespace
        self._prefix = prefix
        if isinstance(cache, SimpleCache):
            log.warning(
                "sessions are cached in a SimpleCache, which each process has for itself: what another process changes or "
                "ends, even a sign-out, is seen up to %s seconds late; use a cache that they share, or a short ttl",
                self._ttl,
            )

    @property
    def margin(self) -> float:
        return self.store.margin

    @margin.setter
    def margin(self, seconds: float) -> None:
        self.store.margin = seconds

    def get(self, session_id: str) -> SessionRecord | None:
        if not is_session_id(session_id):
            return None
        mark, record = self._look_up(session_id)
        if record is not None:
            return record
        record = self.store.get(session_id)
        if record is not None and mark is not None:
            with self._reaching():
                # A cache that has no room for it does without.
                self._cache.set(self._copy_key(session_id), mark + pack_record(record), self._ttl)
        return record

    def save(self, record: SessionRecord, *, expected: int) -> None:
        with self._closed([record.id]):
            self.store.save(record, expected=expected)

    def delete(self, session_id: str, *, expected: int | None = None) -> bool:
        with self._closed([session_id]):
            return self.store.delete(session_id, expected=expected)

    def save_many(self, changes: Sequence[Change]) -> list[bool]:
        with self._closed([change.id for change in changes]):
            return self.store.save_many(changes)

    def delete_many(self, deletions: Sequence[Deletion]) -> list[bool]:
        with self._closed([deletion.id for deletion in deletions]):
            return self.store.delete_many(deletions)

    def transaction(self, changes: Sequence[Change | Deletion]) -> None:
        with self._closed([change.id for change in changes]):
            self.store.transaction(changes)

    def scan(self) -> Iterator[SessionRecord]:
        return self.store.scan()

    def snapshot(self) -> Iterator[SessionRecord]:
        return self.store.snapshot()

    def find(self, query: SessionQuery) -> Iterator[SessionRecord]:
        return self.store.find(query)

    def count(self, query: SessionQuery) -> int:
        return self.store.count(query)

    def stats(self, *, now: float) -> StoreStats:
        return self.store.stats(now=now)

    def lease(self, name: str, seconds: float) -> bool:
        return self.store.lease(name, seconds)

    def note(self, name: str, moment: float) -> None:
        self.store.note(name, moment)

    def noted(self, name: str) -> float | None:
        return self.store.noted(name)

    def namespace(self, name: str) -> CachedStore:
        child = copy(self)
        child.store, child._namespace = self.store.namespace(name), name
        return child

    @property
    def history(self) -> HistoryLog:
        return self.store.history

    def check(self, *, repair: bool, seen: Callable[[SessionRecord], object] = ignore) -> Iterator[Finding]:
        return self._noticed(self.store.check(repair=repair, seen=seen))

    def optimize(self, *, full: bool = False) -> Iterator[Improvement]:
        return self.store.optimize(full=full)

    def close(self) -> None:
        self.store.close()

    def _noticed(self, findings: Iterator[Finding]) -> Iterator[Finding]:
        for finding in findings:
            if finding.repaired:
                self._close([finding.where], _PAUSE)
            yield finding

    def _look_up(self, session_id: str) -> tuple[bytes | None, SessionRecord | None]:
        """The mark that a copy has to bear, ``None`` if none is wanted, and the record if there is a copy that counts."""
        keys = self._mark_key(session_id), self._copy_key(session_id)
        with self._reaching():
            try:
                mark, found = self._cache.get_many(*keys)
                if mark == _CLOSED:
                    return None, None
                if mark is None:
                    return self._new_mark(keys[0]), None
                return _checked_mark(mark), _record_in(found, mark, session_id)
            except (*DAMAGED, EOFError, ImportError, SerializationError) as error:
                log.warning("what the cache has of session %s is removed, as it cannot be read: %s", session_id, error)
                self._remove(keys)
        return None, None

    def _new_mark(self, key: str) -> bytes | None:
        mark = os.urandom(_MARK_SIZE)
        if self._cache.add(key, mark, self._ttl):
            return mark
        if self._cache.has(key):
            return None  # somebody else was faster
        # A FileSystemCache adds nothing where an entry has expired.
        self._cache.delete(key)
        return mark if self._cache.add(key, mark, self._ttl) else None

    @contextmanager
    def _closed(self, session_ids: Sequence[str]) -> Iterator[None]:
        """Close the sessions while they are changed. After a failure a database may still be about to: keep them closed."""
        pause = max(self._ttl, _PAUSE)
        self._close(session_ids, pause)
        try:
            yield
            pause = _PAUSE
        except SessionConflict:
            pause = _PAUSE
            raise
        finally:
            self._close(session_ids, pause)

    def _close(self, session_ids: Sequence[str], seconds: int) -> None:
        keys = [self._mark_key(session_id) for session_id in session_ids if is_session_id(session_id)]
        if not keys:
            return
        with self._reaching(f"; {self._danger}"):
            missed = set(keys).difference(self._cache.set_many(dict.fromkeys(keys, _CLOSED), seconds))
            # A full disk refuses what is new, and still removes what is old.
            self._remove(missed)
            if any(self._cache.has(key) for key in missed):
                log.warning("the %s did not store that sessions were changed; %s", type(self._cache).__name__, self._danger)

    @property
    def _danger(self) -> str:
        return f"what it has of the changed sessions may be read for up to {self._ttl} seconds"

    def _remove(self, keys: Collection[str]) -> None:
        for key in keys:
            self._cache.delete(key)

    def _mark_key(self, session_id: str) -> str:
        return f"{self._prefix}:{self._namespace}:mark:{session_id}"

    def _copy_key(self, session_id: str) -> str:
        return f"{self._prefix}:{self._namespace}:copy:{session_id}"

    @contextmanager
    def _reaching(self, consequence: str = "; the store is asked") -> Iterator[None]:
        """Go on without the cache if it cannot be reached, with a line in the log."""
        try:
            yield
        except driver_errors() as error:
            log.warning("the %s failed: %s%s", type(self._cache).__name__, error, consequence)


def _check(store: object, cache: object, ttl: float, prefix: str) -> None:
    if not isinstance(store, SessionStore):
        raise ConfigError(f"CachedStore was given {type(store).__name__} and no store; open one with open_store(url)")
    if not isinstance(cache, BaseCache) or isinstance(cache, NullCache):
        raise ConfigError(f"CachedStore was given {type(cache).__name__}, which is no cachelib cache that keeps anything")
    if type(ttl) not in (int, float) or not 1 <= ttl <= _LONGEST:
        raise ConfigError(f"ttl of CachedStore is {ttl!r:.80}; allowed is a number of seconds from 1 to {_LONGEST}")
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
        raise ConfigError(
            f"prefix of CachedStore is {prefix!r:.80}; allowed is text of 1 to 100 printable ASCII characters, no spaces"
        )


def _checked_mark(mark: object) -> bytes:
    if not isinstance(mark, bytes) or len(mark) != _MARK_SIZE:
        raise SerializationError("its mark is none")
    return mark


def _record_in(found: object, mark: bytes, session_id: str) -> SessionRecord | None:
    """The record of a copy that bears *mark*. Raises ``SerializationError`` if that is damaged."""
    if found is None:
        return None
    if not isinstance(found, bytes):
        raise SerializationError(f"it is a {type(found).__name__}")
    if not found.startswith(mark):
        return None
    return that_of(unpack_record(found[_MARK_SIZE:]), session_id)
