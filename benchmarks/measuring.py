"""Timing in rounds: everything is measured once per round, in an order shuffled anew, so that noise hits all alike."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

#: Seconds that one candidate's requests take per round, and between how many requests that may be.
_BATCH_SECONDS = 0.012
_FEWEST, _MOST = 5, 80


@dataclass(frozen=True)
class Task:
    """Something to be timed under a name; *prepare* comes before each batch and is not timed."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object]


#: Microseconds per call of each task, one figure per round.
Samples: TypeAlias = Mapping[str, Sequence[float]]


def measure(tasks: Sequence[Task], rounds: int, order: random.Random, title: str) -> Samples:
    """Time the tasks in *rounds* rounds."""
    numbers = {task.name: _calls_per_batch(task) for task in tasks}
    samples: dict[str, list[float]] = {task.name: [] for task in tasks}
    for number in range(1, rounds + 1):
        progress(f"{title}: round {number} of {rounds}")
        gc.collect()
        for task in order.sample(tasks, len(tasks)):
            samples[task.name].append(_time_batch(task, numbers[task.name]))
    progress("")
    return samples


def _calls_per_batch(task: Task) -> int:
    _time_batch(task, _FEWEST)  # connections, caches and compiled statements
    once = _time_batch(task, _FEWEST) / 1e6
    return max(_FEWEST, min(_MOST, round(_BATCH_SECONDS / once)))


def _time_batch(task: Task, calls: int) -> float:
    """Microseconds per call. The garbage collector waits: it would charge one task with what another left."""
    task.prepare()
    call = task.call
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls * 1e6
    finally:
        gc.enable()


def ratio(samples: Samples, one: str, other: str) -> float:
    """How many times *other* takes *one*: the median of the rounds' ratios."""
    return median(a / b for a, b in zip(samples[one], samples[other], strict=True))


def ratio_of_added(samples: Samples, one: str, other: str, base: str) -> float:
    """How many times what *other* takes beyond *base* takes *one* beyond it: the ratio of the medians of the differences.

    Not the median of ratios: the difference of two noisy figures can come near 0 in a round.
    """
    return added(samples, one, base) / added(samples, other, base)


def added(samples: Samples, one: str, base: str) -> float:
    """Microseconds that *one* takes beyond *base*: the median of the rounds' differences."""
    return median(a - b for a, b in zip(samples[one], samples[base], strict=True))


def progress(text: str) -> None:
    """Say on a terminal how far it is; nowhere else."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
