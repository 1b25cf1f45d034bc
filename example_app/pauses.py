"""Waiting: for a generator that may be slow, and for news in a store."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Event


def with_pauses(pieces: Iterator[str], longest: float) -> Iterator[str]:
    """Yield what *pieces* yields, and "" whenever nothing has come for *longest* seconds.

    It is asked in a thread of its own. What it raises is raised here; where nobody wants to hear more, it is closed.
    """
    arrived: SimpleQueue[str | None] = SimpleQueue()
    unwanted = Event()

    def ask() -> None:
        for piece in pieces:
            arrived.put(piece)
            if unwanted.is_set():
                break

    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask)
        asked.add_done_callback(lambda _: arrived.put(None))
        try:
            while (piece := _next(arrived, longest)) is not None:
                yield piece
        finally:
            unwanted.set()
        asked.result()


def _next(arrived: "SimpleQueue[str | None]", longest: float) -> str | None:
    try:
        return arrived.get(timeout=longest)
    except Empty:
        return ""
