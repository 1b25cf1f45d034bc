"""What the package must reach, and whether it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.candidates import (
    BARE,
    COOKIE,
    OURS,
    THEIRS_FILE,
    THEIRS_REDIS,
    THEIRS_SQLITE,
    THEIRS_SQLITE_WAL,
    VIEWS,
    View,
)
from benchmarks.measuring import Samples, ratio, ratio_of_added
from benchmarks.runs import FEW, SCALING_STORES, SCALING_VIEWS, Comparison, label, scaling_label


@dataclass(frozen=True)
class Verdict:
    """One target: what is measured, the most it may be, and what it was, by payload size or by store."""

    text: str
    limit: float
    measured: Mapping[str, float]

    @property
    def reached(self) -> bool:
        return max(self.measured.values()) <= self.limit


#: What a comparison measured of a target, ``None`` where it did not measure what that needs.
_Measure = Callable[[Comparison], float | None]


def judge(comparisons: Sequence[Comparison], scaled: Mapping[str, Samples], many: int) -> list[Verdict]:
    """All targets for which there are figures."""
    verdicts = [
        Verdict(text, limit, {f"{item.size:,} B": figure for item in comparisons if (figure := find(item)) is not None})
        for text, limit, find in _TARGETS
    ]
    verdicts += [Verdict(f"{view}, {many:,} sessions : {FEW}", 1.2, _growth(scaled, view, many)) for view in SCALING_VIEWS]
    return [verdict for verdict in verdicts if verdict.measured]


def _growth(scaled: Mapping[str, Samples], view: View, many: int) -> dict[str, float]:
    return {
        kind: ratio(scaled[kind], scaling_label(kind, view, many), scaling_label(kind, view, FEW))
        for kind in SCALING_STORES
        if kind in scaled
    }


def _ours(item: Comparison) -> list[str]:
    return [name for name in item.names if name.startswith(OURS)]


def _most_untouched_operations(item: Comparison) -> float | None:
    return max((item.operations[name][VIEWS.index("untouched")] for name in _ours(item)), default=None)


def _worst_untouched(item: Comparison) -> float | None:
    there = label(COOKIE, "untouched")
    return max((ratio(item.samples, label(name, "untouched"), there) for name in _ours(item)), default=None)


def _round_trips(view: View) -> _Measure:
    def find(item: Comparison) -> float | None:
        counted = item.round_trips.get(OURS + "redis")
        return None if counted is None else counted[VIEWS.index(view)]

    return find


def _total(view: View, ours: str, theirs: str) -> _Measure:
    def find(item: Comparison) -> float | None:
        if not {ours, theirs} <= set(item.names):
            return None
        return ratio(item.samples, label(ours, view), label(theirs, view))

    return find


def _added(view: View, ours: str, theirs: str) -> _Measure:
    def find(item: Comparison) -> float | None:
        if not {ours, theirs} <= set(item.names):
            return None
        return ratio_of_added(item.samples, label(ours, view), label(theirs, view), label(BARE, "untouched"))

    return find


_REDIS, _FILE, _SQLITE = OURS + "redis", OURS + "file", OURS + "sqlite"
_TARGETS: tuple[tuple[str, float, _Measure], ...] = (
    ("untouched, any store: operations", 0, _most_untouched_operations),
    ("untouched, slowest store : cookie session", 1.05, _worst_untouched),
    ("read, Redis: round trips", 1, _round_trips("read")),
    ("read, Redis : Flask-Session", 0.8, _total("read", _REDIS, THEIRS_REDIS)),
    ("change, Redis: round trips", 2, _round_trips("change")),
    ("change, Redis : Flask-Session", 1.05, _total("change", _REDIS, THEIRS_REDIS)),
    ("read adds, SQLite : Flask-Session", 1 / 15, _added("read", _SQLITE, THEIRS_SQLITE)),
    ("change adds, SQLite : Flask-Session", 1 / 10, _added("change", _SQLITE, THEIRS_SQLITE)),
    ("read adds, SQLite : Flask-Session WAL", 1 / 15, _added("read", _SQLITE, THEIRS_SQLITE_WAL)),
    ("change adds, SQLite : Flask-Session WAL", 1 / 10, _added("change", _SQLITE, THEIRS_SQLITE_WAL)),
    ("read adds, file : Flask-Session", 1 / 4, _added("read", _FILE, THEIRS_FILE)),
    ("change adds, file : Flask-Session", 1 / 3, _added("change", _FILE, THEIRS_FILE)),
)
