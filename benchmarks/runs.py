"""What is measured: requests and floors side by side, store operations, and few sessions against many."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.candidates import BARE, CANDIDATES, COOKIE, VIEWS, Candidate, Tally, View, ours, payload
from benchmarks.floors import floors
from benchmarks.measuring import Samples, Task, measure, progress
from benchmarks.places import Places
from benchmarks.visitors import Visitor
from flask_persist_session import Change, PersistSession, SessionRecord, SessionStore, open_store
from flask_persist_session.tokens import make_token, session_id, shard_of
from tests.servers import RedisServer

SCALING_STORES = ("memory", "file", "sqlite", "redis")
SCALING_VIEWS: tuple[View, ...] = ("read", "change")
#: So many sessions are visited in turn; in the small store there are no others.
FEW = 100
_SCALING_SIZE = 100
_FILL_AT_ONCE = 1000


@dataclass(frozen=True)
class Comparison:
    """What was measured for one payload size."""

    size: int
    names: tuple[str, ...]
    samples: Samples
    operations: dict[str, tuple[int, ...]]
    """Store operations of each view, by candidate."""
    round_trips: dict[str, tuple[int, ...]]
    """Commands that reach the Redis server of each view, by candidate."""


def label(name: str, view: View) -> str:
    """The name under which a candidate's requests are measured."""
    return f"{name} / {view}"


def selected(text: str) -> list[Candidate]:
    """The candidates with *text* in their names, and those that everything is compared with."""
    return [
        candidate for candidate in CANDIDATES if candidate.name in (BARE, COOKIE) or text.lower() in candidate.name.lower()
    ]


def compare(places: Places, candidates: Sequence[Candidate], size: int, rounds: int, order: random.Random) -> Comparison:
    """Measure all candidates and the floors with sessions of *size* bytes."""
    title = f"{size:,} bytes"
    progress(f"{title}: setting up")
    tasks = floors(places, size)
    for candidate in candidates:
        visitor = Visitor(candidate.build(places, None), size)
        tasks += [_request_task(label(candidate.name, view), visitor, view) for view in VIEWS]
    return Comparison(
        size=size,
        names=tuple(candidate.name for candidate in candidates),
        operations={candidate.name: _operations(places, candidate, size) for candidate in candidates},
        round_trips={item.name: _round_trips(places, item, size) for item in candidates if "redis" in item.name.lower()},
        samples=measure(tasks, rounds, order, title),
    )


def _request_task(name: str, visitor: Visitor, view: View) -> Task:
    # A visit before each batch takes over a renewed cookie. Without it, all requests later than the renewal interval
    # would present the old one and be renewed, which happens to no browser.
    return Task(name, partial(visitor.request, f"/{view}"), partial(visitor.visit, f"/{view}"))


# Counting -------------------------------------------------------------------------------------------------------------


def _operations(places: Places, candidate: Candidate, size: int) -> tuple[int, ...]:
    tally = Tally()
    visitor = Visitor(candidate.build(places, tally), size)
    counts = []
    for view in VIEWS:
        visitor.visit(f"/{view}")
        before = tally.count
        visitor.visit(f"/{view}")
        counts.append(tally.count - before)
    return tuple(counts)


def _round_trips(places: Places, candidate: Candidate, size: int) -> tuple[int, ...]:
    visitor = Visitor(candidate.build(places, None), size)
    counts = []
    for view in VIEWS:
        visitor.visit(f"/{view}")
        counts.append(commands_of(places.redis, partial(visitor.visit, f"/{view}")))
    return tuple(counts)


def commands_of(server: RedisServer, call: Callable[[], object]) -> int:
    """How many commands *call* sends, as the server sees them; those that a script runs inside it are no round trips.

    The server's own counters do not serve: they count the commands of scripts too.
    """
    with server.client() as client, client.monitor() as monitor:
        client.ping()  # the greeting of this client's connection is over before anything is counted
        list(_until(monitor, "PING"))
        call()
        client.echo("the end")
        return sum(command["client_type"] != "lua" for command in _until(monitor, "ECHO the end"))


def _until(monitor: Any, last: str) -> Iterator[dict[str, Any]]:
    commands = iter(monitor.next_command, None)
    return itertools.takewhile(lambda command: command["command"] != last, commands)


# Few sessions against many --------------------------------------------------------------------------------------------


def scaling_label(kind: str, view: View, number: int) -> str:
    """The name under which requests on a store with so many sessions are measured."""
    return f"{kind} / {view} / {number:,} sessions"


def scale(places: Places, kind: str, many: int, rounds: int, order: random.Random) -> Samples:
    """Measure requests of 100 sessions on a store that has only these, and on one that has *many*."""
    tasks = []
    for number in (FEW, many):
        progress(f"{kind}: storing {number:,} sessions")
        store = open_store(places.new_url(kind))
        app = ours(store)
        with app.app_context():
            record = PersistSession().manager.create({**payload(_SCALING_SIZE), "counter": 1000}).record
        _fill(store, record, number - FEW)
        store.delete(record.id)
        visitors = [Visitor(app, _SCALING_SIZE) for _ in range(FEW)]
        tasks += [_scaling_task(scaling_label(kind, view, number), visitors, view) for view in SCALING_VIEWS]
    os.sync()  # what filling left to be written must not be written while it is measured
    return measure(tasks, rounds, order, f"{kind}: {FEW:,} against {many:,} sessions")


def _scaling_task(name: str, visitors: Sequence[Visitor], view: View) -> Task:
    turn = itertools.cycle(visitors)
    # No cookie is kept here: this takes less time than the interval after which sessions are renewed.
    return Task(name, lambda: next(turn).request(f"/{view}"), lambda: next(turn).request(f"/{view}"))


def _fill(store: SessionStore, like: SessionRecord, number: int) -> None:
    changes = (Change(record=record, expected=0) for record in _records(like, number))
    while batch := list(itertools.islice(changes, _FILL_AT_ONCE)):
        store.save_many(batch)


def _records(like: SessionRecord, number: int) -> Iterator[SessionRecord]:
    """Sessions of users with three devices each, begun in the last 30 days."""
    chance = random.Random(number)
    lifetime, now = like.expires_at - like.created_at, time.time()
    for index in range(number):
        user_id = f"user {index // 3}"
        began = now - chance.uniform(0, 30 * 86400)
        yield replace(
            like,
            id=session_id(make_token(shard_of(user_id))),
            user_id=user_id,
            created_at=began,
            accessed_at=began,
            expires_at=began + lifetime,
        )
