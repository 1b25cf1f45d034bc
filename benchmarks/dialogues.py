"""``python -m benchmarks.dialogues``: what ``manager.history(id)`` costs in a short and in a long dialogue."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

from benchmarks.appending import KINDS, MOST, SHORT
from benchmarks.places import Places
from flask_persist_session import History, SessionManager, open_store

_TEXT = "word " * 80
#: So many entries are appended to the short one before it is made anew.
_GROWTH = 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.dialogues", description=__doc__)
    parser.add_argument("--rounds", type=int, default=500, help="rounds, each of which measures everything once (500)")
    parser.add_argument("--long", type=int, default=10_000, help="entries of the long dialogue (10000)")
    parser.add_argument("--only", choices=KINDS, action="append", help="repeatable; all unless given")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    print(f"Dialogues of {SHORT} and of {options.long:,} entries; medians of {options.rounds} rounds, µs\n")
    print(f"{'store':<12}{'append':>22}{f'latest({SHORT})':>22}")
    with Places() as places:
        for kind in options.only or KINDS:
            store = open_store(places.new_url(kind)).namespace("chat")
            chats = SessionManager(store, namespace="chat", keep_data=True)
            short, long = (dialogue(chats, size) for size in (SHORT, options.long))
            print(
                f"{kind:<12}{compared(append, short, long, options.rounds)}{compared(latest, short, long, options.rounds)}"
            )
            store.close()
    print(f"\nTo reach: at most {MOST}.")


def entry() -> dict[str, object]:
    return {"role": "user", "content": _TEXT}


def dialogue(chats: SessionManager, size: int) -> History:
    history = chats.history(chats.create().id)
    fill(history, size)
    return history


def fill(history: History, size: int) -> None:
    # One at a time, as they are appended while measuring: a file keeps a turn of several in one piece.
    for _ in range(size):
        history.append(entry())


def compared(operation: Callable[[History], object], short: History, long: History, rounds: int) -> str:
    """The medians with both, measured in turn, and how many times the one the other is."""
    taken: dict[int, list[float]] = {0: [], 1: []}
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            history = (short, long)[which]
            started = time.perf_counter()
            operation(history)
            taken[which].append(time.perf_counter() - started)
        if number % _GROWTH == 0:
            short.clear()
            fill(short, SHORT)
    one, other = (median(taken[which]) * 1e6 for which in (0, 1))
    return f"{one:>8.1f}{other:>8.1f}{other / one:>6.2f}"


def append(history: History) -> object:
    return history.append(entry())


def latest(history: History) -> object:
    return history.latest(SHORT)


if __name__ == "__main__":
    main(arguments())
