"""``python -m benchmarks.sweeping``: how fast expired sessions are removed, and what that does to requests meanwhile.

Each part runs in a process of its own: one fills the store, one sweeps, one makes requests on live sessions all the time.
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

from benchmarks.measuring import progress
from benchmarks.places import Places
from benchmarks.processes import Delays, Requests, in_process, peak
from flask_persist_session import Change, SessionManager, SessionRecord, open_store
from flask_persist_session.tokens import make_token, session_id, shard_of

KINDS = ("sqlite", "file", "redis", "postgresql")
LIVE = 1000
#: Seconds between two requests, as they come from outside.
_BETWEEN = 0.001
_FILL_AT_ONCE = 1000


@dataclass(frozen=True)
class Round:
    """What one sweep was like: sessions a second, and the milliseconds that requests took meanwhile and afterwards."""

    rate: float
    sweeping: Delays
    quiet: Delays


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.sweeping", description="Removing expired sessions, with requests.")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind of store; repeatable")
    parser.add_argument("--sessions", type=int, default=100_000, help="expired sessions of a round (100000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each a sweep and as many seconds without (3)")
    parser.add_argument("--memory", type=int, action="append", metavar="NUMBER", help="peak memory at so many; repeatable")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    with Places() as places:
        for kind in options.only or KINDS:
            if options.sessions:
                show_rounds(kind, options.sessions, measure_rounds(places.new_url(kind), options))
            for number in options.memory or ():
                show_memory(kind, number, *measure_memory(places.new_url(kind), number))


def measure_rounds(url: str, options: argparse.Namespace) -> list[Round]:
    """Sweep *url* in rounds, with requests from another process."""
    live = in_process(fill, url, LIVE, False)
    rounds = []
    for number in range(1, options.rounds + 1):
        progress(f"round {number} of {options.rounds}: filling")
        in_process(fill, url, options.sessions, True)
        os.sync()  # what filling left to be written must not be written while it is measured
        progress(f"round {number} of {options.rounds}: sweeping")
        with Requests(url, live, between=_BETWEEN) as sweeping:
            removed, seconds, _ = in_process(sweep, url)
        os.sync()
        progress(f"round {number} of {options.rounds}: the same requests without a sweep")
        with Requests(url, live, between=_BETWEEN) as quiet:
            time.sleep(seconds)
        rounds.append(Round(removed / seconds, sweeping.delays, quiet.delays))
        if removed != options.sessions:
            raise RuntimeError(f"{removed:,} sessions were removed instead of {options.sessions:,}")
    progress("")
    return rounds


def measure_memory(url: str, number: int) -> tuple[int, int]:
    """The peak memory, in bytes, of a process that lists *number* expired sessions and of one that removes them."""
    progress(f"{number:,} sessions: filling")
    in_process(fill, url, number, True)
    progress(f"{number:,} sessions: listing and sweeping")
    listed, listing = in_process(list_all, url)
    removed, _, sweeping = in_process(sweep, url)
    if not number == listed == removed:
        raise RuntimeError(f"{listed:,} sessions were listed and {removed:,} removed instead of {number:,}")
    progress("")
    return listing, sweeping


# What the processes do ------------------------------------------------------------------------------------------------


def fill(url: str, number: int, expired: bool) -> list[str]:
    """Store so many sessions of 1 kB; returns the ids of live ones."""
    store = open_store(url)
    record = SessionManager(store).create({"text": "x" * 1000, "counter": 0}).record
    store.delete(record.id)
    records = _records(record, number, -40 * 86400.0 if expired else 0.0)
    ids = []
    while batch := [Change(record=item, expected=0) for item in itertools.islice(records, _FILL_AT_ONCE)]:
        store.save_many(batch)
        ids += [] if expired else [change.record.id for change in batch]
    return ids


def _records(like: SessionRecord, number: int, shift: float) -> Iterator[SessionRecord]:
    """Sessions begun one after the other within a day, whose last requests came within half an hour.

    Every second one is nobody's, the others are those of users with three devices each.
    """
    chance = random.Random(number)
    for index in range(number):
        user_id = None if index % 2 else f"user {index // 6}"
        token = make_token(shard_of(user_id))
        began = like.created_at + shift - 86400 * (number - index) / number
        accessed = began + chance.uniform(0, 1800)
        yield replace(
            like,
            id=session_id(token),
            user_id=user_id,
            created_at=began,
            accessed_at=accessed,
            expires_at=accessed + 31 * 86400,
        )


def sweep(url: str) -> tuple[int, float, int]:
    """How many sessions a cleanup removed, in how many seconds, with how many bytes of memory at most."""
    manager = SessionManager(open_store(url))
    start = time.perf_counter()
    removed = manager.cleanup().removed
    return removed, time.perf_counter() - start, peak()


def list_all(url: str) -> tuple[int, int]:
    """How many sessions there are, and with how many bytes of memory at most they were listed."""
    return sum(1 for _ in SessionManager(open_store(url)).find()), peak()


# Figures --------------------------------------------------------------------------------------------------------------


def show_rounds(kind: str, sessions: int, rounds: Sequence[Round]) -> None:
    print(f"\n{kind}: {sessions:,} expired sessions of 1 kB, {LIVE:,} live ones; milliseconds of a request that saves")
    print(f"{'':8}{'removed/s':>10}   {'while sweeping':>22}{'p99':>8}{'worst':>8}   {'without':>14}{'p99':>8}{'worst':>8}")
    for number, item in enumerate(rounds, 1):
        figures = [_figures(item.sweeping, 22), _figures(item.quiet, 14)]
        print(f"{number:>8}{item.rate:>10,.0f}   {'   '.join(figures)}")
    sys.stdout.flush()


def _figures(delays: Delays, width: int) -> str:
    ordered = sorted(delays)
    p99 = ordered[len(ordered) * 99 // 100]
    return f"{f'{len(ordered):,} requests':>{width}}{p99:>8.2f}{ordered[-1]:>8.2f}"


def show_memory(kind: str, number: int, listing: int, sweeping: int) -> None:
    print(f"{kind}: {number:>9,} sessions: peak of listing {listing / 1e6:.1f} MB, of sweeping {sweeping / 1e6:.1f} MB")
    sys.stdout.flush()


if __name__ == "__main__":
    main(arguments())
