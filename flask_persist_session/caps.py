"""How many sessions there may be: of one user, and in the whole store."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from threading import Lock

from .config import CapPolicy
from .exceptions import SessionLimitReached, StoreError
from .lifetime import Lifetime
from .records import SessionQuery, SessionRecord
from .stores.base import SessionStore

log = logging.getLogger("flask_persist_session")

#: Seconds between two counts of a whole store, at least, and as a multiple of the time that a count takes.
_SHORTEST_PAUSE = 5.0
_PAUSE_FACTOR = 100


class UserCap:
    """Lets a user have so many active sessions within a tenant.

    Every sign-in stores first and looks then, in an order that is the same for all: the last of many at once sees them
    all, so exactly as many as allowed are left.

    :param lifetime: tells the time and which sessions are active.
    :param most: how many; 0: any number.
    :param policy: what a sign-in beyond that does: ``evict_oldest`` ends the oldest, ``reject`` refuses it.
    :param end: ends the session of a record that was just read, for a reason.
    :param name: what the cap is called where it is set.

    Raises ``UnsupportedByStore`` if there is a cap and the store cannot list.
    """

    def __init__(
        self,
        store: SessionStore,
        lifetime: Lifetime,
        end: Callable[[SessionRecord, str], object],
        *,
        most: int,
        policy: CapPolicy,
        name: str,
    ) -> None:
        if most:
            store.scan()  # reads nothing yet, but raises for a store that cannot list
        self._store = store
        self._lifetime = lifetime
        self._end = end
        self._most = most
        self._policy = policy
        self._name = name

    def admit(self, record: SessionRecord, *, replaced: str | None = None) -> None:
        """With the policy ``reject``: refuse *record*, just stored in place of *replaced*, if it exceeds the cap.

        Raises ``SessionLimitReached`` then; the caller takes it back. Others beyond the cap that began later are ended:
        their sign-ins looked before all were there. What was there before stays.
        """
        if self._policy != "reject" or self._most == 0 or record.user_id is None:
            return
        live = [other for other in self._live(record) if other.id != replaced]
        age = self._lifetime.seniority
        for surplus in live[self._most :]:
            if age(surplus) > age(record):
                self._end(surplus, "rejected")
        if record.id not in {other.id for other in live[: self._most]}:  # another sign-in may have rejected it already
            raise SessionLimitReached(
                f"the user {record.user_id!r} has {self._most} sessions, and {self._name} allows no more; end one of them "
                "first"
            )

    def check_undecided(self, user_id: str | None) -> None:
        """Refuse to create a session of *user_id* together with other changes, if only ``admit`` can decide about it."""
        if self._policy == "reject" and self._most and user_id is not None:
            raise ValueError(
                'a transaction cannot create sessions of users where they are limited by the policy "reject": whether one '
                "is too many is decided when all are stored; create it before"
            )

    def evict(self, record: SessionRecord) -> None:
        """With the policy ``evict_oldest``: end what exceeds the cap now that *record* is there.

        A store that fails now is logged: the old session has ended already, so an error would sign the user out. The next
        sign-in ends what is too much.
        """
        if self._policy != "evict_oldest":
            return
        try:
            for other in self._live(record)[: -self._most]:
                self._end(other, "evicted")
        except StoreError as error:
            log.warning("the sessions of a user could not be limited at a sign-in: %s", error)

    def _live(self, record: SessionRecord) -> list[SessionRecord]:
        """The active sessions of the user of *record*, oldest first; none if there is no cap or no user."""
        if self._most == 0 or record.user_id is None:
            return []
        query = SessionQuery(user_id=record.user_id, state="active", now=self._lifetime.clock())
        found = (other for other in self._store.find(query) if other.tenant_id == record.tenant_id)
        live = [other for other in found if self._lifetime.state(other) == "active"]
        return sorted(live, key=self._lifetime.seniority)


class StoreCap:
    """Lets a store keep about so many sessions, in whatever state.

    Counting a large store takes time, so it is done now and then; in between each process adds what it creates.

    :param most: how many; 0: any number.
    :param name: what the cap is called where it is set.
    """

    def __init__(self, store: SessionStore, clock: Callable[[], float], *, most: int, name: str) -> None:
        if most:
            store.scan()  # reads nothing yet, but raises for a store that cannot list
        self._store = store
        self._clock = clock
        self._most = most
        self._name = name
        self._known = 0
        self._counted_at = -math.inf
        self._pause = _SHORTEST_PAUSE
        self._counting = Lock()

    def admit(self, count: int = 1) -> None:
        """Raises ``SessionLimitReached`` if the store has no room for so many sessions that are about to be created."""
        if self._most == 0 or count == 0:
            return
        # Also when the clock was set back. Whoever meets another thread counting goes by what is known.
        if abs(self._clock() - self._counted_at) >= self._pause and self._counting.acquire(blocking=False):
            try:
                self._count()
            finally:
                self._counting.release()
        if self._known + count > self._most:
            raise SessionLimitReached(
                f"the store has {self._known:,} sessions, and {self._name} is {self._most:,}; clean up, or allow more",
                scope="store",
            )

    def count(self) -> None:
        """Note that a session was created."""
        self._known += 1

    def _count(self) -> None:
        started = time.monotonic()
        self._known = self._store.count(SessionQuery())
        self._pause = max(_SHORTEST_PAUSE, _PAUSE_FACTOR * (time.monotonic() - started))
        self._counted_at = self._clock()
