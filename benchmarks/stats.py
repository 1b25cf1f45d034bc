"""``python -m benchmarks.stats``: what the statistics of a whole store take, few sessions against many."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.places import Places
from flask_persist_session import Change, open_store
from flask_persist_session.records import SessionRecord
from flask_persist_session.tokens import make_token, session_id, shard_of

KINDS = ("sqlite", "redis", "postgresql", "file")
FEW = 10_000
#: What must be reached: seconds at a million sessions, and how many times the memory of asking for 10,000.
MOST_SECONDS, MOST_MEMORY = 2.0, 1.1
_AT_ONCE = 5_000
_USERS = 50_000
_TENANTS = (None, "acme", "globex", "initech")
_TAGS = ("web", "mobile", "beta", "vip", "eu", "us")
_DAY = 86400.0


@dataclass(frozen=True)
class Figures:
    """What a process of its own measured when it asked: median and longest seconds, peak memory in MB."""

    sessions: int
    seconds: float
    longest: float
    memory: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.stats", description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000, help="how many sessions the large store has")
    parser.add_argument("--only", choices=KINDS, action="append", help="repeatable; sqlite and redis unless given")
    parser.add_argument("--repeat", type=int, default=5, help="how often is asked, after once that is not timed")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the sessions")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    print(f"Statistics: {options.repeat} times each; seed {options.seed}\n")
    print(f"{'store':<12}{'sessions':>12}{'median s':>10}{'longest s':>11}{'peak MB':>9}  reached")
    with Places() as places:
        for kind in options.only or ("sqlite", "redis"):
            url = places.new_url(kind)
            first = None
            for number in sorted({min(FEW, options.sessions), options.sessions}):
                fill(url, number - (first.sessions if first else 0), options.seed + number)
                figures = ask_in_a_process(url, options.repeat)
                if figures.sessions != number:
                    raise RuntimeError(f"{kind} counted {figures.sessions} of {number} sessions")
                first = first or figures
                print(line(kind, figures, first), flush=True)
    print(f"\nTo reach: {MOST_SECONDS} s, and at most {MOST_MEMORY} times the memory of the first line of the store.")


def line(kind: str, figures: Figures, first: Figures) -> str:
    reached = figures.seconds < MOST_SECONDS and figures.memory <= first.memory * MOST_MEMORY
    return (
        f"{kind:<12}{figures.sessions:>12,}{figures.seconds:>10.3f}{figures.longest:>11.3f}{figures.memory:>9.1f}"
        f"  {'yes' if reached else 'NO'}"
    )


def fill(url: str, number: int, seed: int) -> None:
    """Add so many sessions, and say on standard error how far it is."""
    with_timeout = f"{url}{'&' if '?' in url else '?'}timeout=60"
    store = open_store(with_timeout)
    changes = (Change(record=record, expected=0) for record in records(number, random.Random(seed)))
    stored = 0
    while batch := list(itertools.islice(changes, _AT_ONCE)):
        if not all(store.save_many(batch)):
            raise RuntimeError("a session was there already")
        stored += len(batch)
        print(f"\r{url.partition(':')[0]}: stored {stored:,} of {number:,} sessions", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    store.close()


def records(number: int, chance: random.Random) -> Iterator[SessionRecord]:
    """Sessions with 1 kB of data of 50,000 users and of visitors, a tenth ended, some expired since the last sweep."""
    now = time.time()
    for _ in range(number):
        user = chance.randrange(_USERS)
        user_id = f"user {user}" if chance.random() < 0.9 else None
        accessed_at = now - chance.uniform(0, 10 * _DAY)
        ended = chance.random() < 0.1
        yield SessionRecord(
            id=session_id(make_token(shard_of(user_id))),
            user_id=user_id,
            tenant_id=_TENANTS[user % len(_TENANTS)],
            tags=frozenset(chance.sample(_TAGS, chance.randrange(4))),
            metadata={"device": "Firefox on Linux"},
            data=chance.randbytes(1000),
            created_at=accessed_at - chance.uniform(0, 20 * _DAY),
            accessed_at=accessed_at,
            expires_at=accessed_at + 9 * _DAY,
            ended_at=accessed_at if ended else None,
            end_reason="logout" if ended else None,
            version=1,
        )


def ask_in_a_process(url: str, repeat: int) -> Figures:
    """The figures of a new process, whose memory nothing else has grown."""
    command = [sys.executable, "-m", "benchmarks.asking", url, str(repeat)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Figures(**json.loads(answer))


if __name__ == "__main__":
    main(arguments())
