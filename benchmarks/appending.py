"""``python -m benchmarks.appending``: what a history costs, short and long."""

from __future__ import annotations

import argparse
import gc
import random
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

from benchmarks.measuring import Samples
from benchmarks.places import Places
from flask_persist_session import HistoryLog, SessionStore, open_store
from flask_persist_session.testing import make_record

KINDS = ("memory", "file", "sqlite", "redis", "postgresql")
SHORT = 10
#: Others that have histories too, so that no table or server holds the measured ones alone.
OTHERS = 20
#: What must be reached: how many times what it costs with a short history it may cost with a long one.
MOST = 1.1
_DATA = b'{"role": "user", "content": "' + b"word " * 80 + b'", "metadata": {}}'


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.appending", description=__doc__)
    parser.add_argument("--rounds", type=int, default=500, help="rounds, each of which measures everything once (500)")
    parser.add_argument("--long", type=int, default=10_000, help="entries of the long history (10000)")
    parser.add_argument("--only", choices=KINDS, action="append", help="repeatable; all unless given")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of the order of measuring")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    print(f"Histories of {SHORT} and of {options.long:,} entries of {len(_DATA)} bytes each.")
    print(f"Medians of {options.rounds} rounds, seed {options.seed}: µs with the short one, times that with the long.\n")
    print(f"{'store':<12}{''.join(f'{name:>21}' for name in OPERATIONS)}")
    with Places() as places:
        for kind in options.only or KINDS:
            samples = measured(open_store(places.new_url(kind)), options)
            print(f"{kind:<12}{''.join(cells(samples))}", flush=True)
    print(f"\nTo reach: at most {MOST} for an append and for the newest entries.")


def cells(samples: Samples) -> Iterator[str]:
    for name in OPERATIONS:
        short, long = (median(samples[f"{name}, {length}"]) for length in ("short", "long"))
        yield f"{short:>13.1f}{long / short:>8.3f}"


def measured(store: SessionStore, options: argparse.Namespace) -> Samples:
    """Microseconds of each operation with each history, one figure a round."""
    order = random.Random(options.seed)
    for number in range(1, 1 + OTHERS):
        session(store, number, 200)
    long = session(store, 0, options.long)
    samples: dict[str, list[float]] = {f"{name}, {length}": [] for name in OPERATIONS for length in ("short", "long")}
    for number in range(1 + OTHERS, 1 + OTHERS + options.rounds):
        # Another short one each time: one that is cleared and filled again leaves room that others do not find.
        histories = {"short": session(store, number, SHORT), "long": long}
        gc.collect()
        for name, length in order.sample(
            [(name, length) for name in OPERATIONS for length in histories], 2 * len(OPERATIONS)
        ):
            samples[f"{name}, {length}"].append(timed(partial(OPERATIONS[name], store.history, histories[length])))
    return {name: taken[len(taken) // 10 :] for name, taken in samples.items()}  # without the first, which warm up


def timed(operation: Callable[[], object]) -> float:
    start = time.perf_counter()
    operation()
    return (time.perf_counter() - start) * 1e6


def session(store: SessionStore, number: int, entries: int) -> str:
    """A new session with so many entries, two to a turn."""
    record = make_record(number, user_id=None)
    store.save(record, expected=0)
    fill(store.history, record.id, entries)
    return record.id


def fill(log: HistoryLog, session_id: str, entries: int) -> None:
    for _ in range(entries // 2):
        log.append(session_id, [_DATA, _DATA], created_at=1.0)


def _append(log: HistoryLog, session_id: str) -> None:
    log.append(session_id, [_DATA, _DATA], created_at=1.0)


def _append_with_key(log: HistoryLog, session_id: str) -> None:
    log.append(session_id, [_DATA, _DATA], created_at=1.0, key=secrets.token_hex(8))


def _read_newest(log: HistoryLog, session_id: str) -> None:
    log.read(session_id, limit=SHORT, newest=True)


def _read_page(log: HistoryLog, session_id: str) -> None:
    log.read(session_id, before=SHORT // 2, limit=SHORT, newest=True)


def _count(log: HistoryLog, session_id: str) -> None:
    log.count(session_id)


OPERATIONS: dict[str, Callable[[HistoryLog, str], None]] = {
    "append": _append,
    "append with a key": _append_with_key,
    "newest 10": _read_newest,
    "first page": _read_page,
    "count": _count,
}

if __name__ == "__main__":
    main(arguments())
