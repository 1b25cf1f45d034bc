"""A process that asks a store for its statistics and for nothing else, so that its peak memory is that of asking."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from statistics import median

from flask_persist_session import open_store


def main(url: str, repeat: int) -> None:
    store = open_store(url)
    figures = store.stats(now=time.time())
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        store.stats(now=time.time())
        taken.append(time.perf_counter() - start)
    answer = {"sessions": figures.total, "seconds": median(taken), "longest": max(taken), "memory": peak_memory()}
    print(json.dumps(answer))


def peak_memory() -> float:
    """The largest resident set of this process in MB; ``ru_maxrss`` begins with that of the process that started it."""
    [kilobytes] = re.findall(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024 / 1e6


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
