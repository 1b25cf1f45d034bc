"""``python -m benchmarks.backing_up``: a backup and a restore of many sessions, with requests of another process.

Each part runs in a process of its own: one fills the store, one backs up and one restores, each with its peak of memory,
and one makes requests on live sessions all the time, of which the slowest counts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import redis

from benchmarks.measuring import progress
from benchmarks.places import Places
from benchmarks.processes import Delays, Requests, in_process, peak
from flask_persist_session import Change, SessionManager, SessionRecord, open_store
from flask_persist_session.backup import back_up, restore
from flask_persist_session.tokens import make_token, session_id, shard_of

KINDS = ("sqlite", "redis")
LIVE = 1000
#: Seconds between two requests.
_BETWEEN = 0.002
_FILL_AT_ONCE = 1000


@dataclass(frozen=True)
class Result:
    """What a step was like: its seconds, its peak of memory in bytes, and the milliseconds of each request meanwhile."""

    name: str
    seconds: float
    memory: int
    delays: Delays


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.backing_up", description="A backup and a restore, with requests.")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind of store; repeatable")
    parser.add_argument("--sessions", type=int, default=1_000_000, help="sessions of 1 kB (1000000)")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    with Places() as places:
        for kind in options.only or KINDS:
            show(kind, options.sessions, list(measure(places, kind, options.sessions)))


def measure(places: Places, kind: str, number: int) -> Iterator[Result]:
    """Back up a full store, then restore into an empty one; both have live sessions of which requests come."""
    full, empty, folder = places.new_url(kind), places.new_url(kind), str(places.new_folder())
    progress(f"{kind}: filling")
    in_process(fill, full, number)
    for name, url, work, given in (
        ("backup", full, make_backup, (full, folder)),
        ("restore", empty, restore_backup, (empty, folder)),
    ):
        live = in_process(fill, url, LIVE)
        os.sync()  # what filling left to be written must not be written while it is measured
        progress(f"{kind}: {name}")
        with Requests(url, live, between=_BETWEEN) as requests:
            done, seconds, memory = in_process(work, *given)
        if done < number:
            raise RuntimeError(f"{done:,} sessions instead of {number:,}")
        yield Result(name, seconds, memory, requests.delays)
        with Requests(url, live, between=_BETWEEN) as requests:
            time.sleep(min(10, seconds))
        yield Result("… without", 0, 0, requests.delays)
        if kind == "redis" and name == "backup":
            with redis.Redis(port=places.redis.port, socket_timeout=60) as client:
                client.flushdb()  # room for the other million
                client.ping()  # the server goes on with it after its answer


# What the processes do ------------------------------------------------------------------------------------------------


def fill(url: str, number: int) -> list[str]:
    """Store so many sessions of 1 kB, of text that compresses badly; returns the ids of the first thousand."""
    store = open_store(url)
    manager = SessionManager(store)
    record = manager.create({"counter": 0}).record
    store.delete(record.id)
    records, ids = _records(manager, record, number), []
    while batch := [Change(record=item, expected=0) for item in itertools.islice(records, _FILL_AT_ONCE)]:
        if not all(store.save_many(batch)):
            raise RuntimeError("a session was there already")
        ids += [change.record.id for change in batch] if len(ids) < LIVE else []
    return ids


def _records(manager: SessionManager, like: SessionRecord, number: int) -> Iterator[SessionRecord]:
    """Sessions begun within a day, every second one nobody's, the others of users with three devices each."""
    chance = random.Random()
    for index in range(number):
        user_id = None if index % 2 else f"user {index // 6}"
        began = like.created_at - chance.uniform(0, 86400)
        yield replace(
            like,
            id=session_id(make_token(shard_of(user_id))),
            user_id=user_id,
            metadata={"device": "Firefox on Linux"},
            data=like.data[:1] + b"\x82\xa7counter\x00\xa4text\xda\x03\xd4" + chance.randbytes(490).hex().encode(),
            created_at=began,
            accessed_at=began,
            expires_at=began + 31 * 86400,
        )


def make_backup(url: str, folder: str) -> tuple[int, float, int]:
    """How many sessions were backed up, in how many seconds, with how many bytes of memory at most."""
    manager, start = SessionManager(open_store(url)), time.perf_counter()
    report = back_up({"web": manager}, folder, now=time.time())
    return report.sessions, time.perf_counter() - start, peak()


def restore_backup(url: str, folder: str) -> tuple[int, float, int]:
    """The same for a restore."""
    manager, start = SessionManager(open_store(url)), time.perf_counter()
    [name] = os.listdir(folder)
    report = restore({"web": manager}, os.path.join(folder, name))
    return report.restored, time.perf_counter() - start, peak()


def show(kind: str, sessions: int, results: Sequence[Result]) -> None:
    print(f"\n{kind}: {sessions:,} sessions of 1 kB; milliseconds of a request that changes another session")
    print(f"{'':12}{'seconds':>8}{'memory':>10}{'requests':>10}{'median':>8}{'p99':>8}{'p99.9':>8}{'worst':>8}")
    for result in results:
        ordered = sorted(result.delays)
        shares = [ordered[int((len(ordered) - 1) * share)] for share in (0.5, 0.99, 0.999, 1)]
        figures = f"{result.seconds:>8.1f}{f'{result.memory / 1e6:.0f} MB':>10}" if result.seconds else " " * 18
        print(f"{result.name:12}{figures}{len(ordered):>10,}" + "".join(f"{figure:>8.2f}" for figure in shares))
    sys.stdout.flush()


if __name__ == "__main__":
    main(arguments())
