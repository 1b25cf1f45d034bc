"""The figures as text of at most 110 columns, and as JSON."""

from __future__ import annotations

import hashlib
import os
import platform
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import flask_persist_session
from benchmarks.candidates import COOKIE, VIEWS
from benchmarks.floors import FLOORS
from benchmarks.measuring import Samples, ratio
from benchmarks.runs import FEW, SCALING_VIEWS, Comparison, label, scaling_label
from benchmarks.targets import Verdict
from tests.servers import redis_program

_PACKAGES = ("flask", "werkzeug", "peewee", "redis", "hiredis", "ormsgpack", "psycopg", "cachelib")
_THEIR_PACKAGES = ("flask-session", "flask-sqlalchemy", "sqlalchemy", "msgspec")


def comparison_lines(item: Comparison) -> Iterator[str]:
    """One table: a candidate per row."""
    yield f"Sessions of {item.size:,} bytes: microseconds per request, times the cookie session's, store operations"
    yield f"{'':36}" + "".join(f"{view:>11}" for view in VIEWS) + "  " + "".join(f"{view:>11}" for view in VIEWS) + "   ops"
    for name in item.names:
        times = [median(item.samples[label(name, view)]) for view in VIEWS]
        ratios = [ratio(item.samples, label(name, view), label(COOKIE, view)) for view in VIEWS]
        operations = "/".join(map(str, item.operations[name]))
        columns = "".join(f"{time:11.1f}" for time in times) + "  " + "".join(f"{times_:10.2f}x" for times_ in ratios)
        yield f"{name:36}{columns}   {operations}"


def floor_lines(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The bare operations, a payload size per column."""
    yield "The floor: the bare operation, microseconds"
    yield f"{'':36}" + "".join(f"{f'{item.size:,} B':>11}" for item in comparisons)
    for name in FLOORS:
        yield f"{name:36}" + "".join(f"{median(item.samples[name]):11.1f}" for item in comparisons)


def scaling_lines(scaled: Mapping[str, Samples], many: int) -> Iterator[str]:
    """Few sessions against many, a store per row."""
    numbers = (FEW, many)
    yield f"Microseconds per request with {FEW:,} and with {many:,} sessions stored"
    yield f"{'':36}" + "".join(f"{f'{view} {number:,}':>16}" for view in SCALING_VIEWS for number in numbers)
    for kind, samples in scaled.items():
        labels = [scaling_label(kind, view, number) for view in SCALING_VIEWS for number in numbers]
        yield f"{'this, ' + kind:36}" + "".join(f"{median(samples[name]):16.1f}" for name in labels)


def target_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Each target with its figures and whether it is reached."""
    yield "Targets: at most so much; what was measured; reached only if every figure is"
    for verdict in verdicts:
        figures = "  ".join(f"{place} {_figure(number)}" for place, number in verdict.measured.items())
        word = "reached" if verdict.reached else "MISSED"
        yield f"{verdict.text:42}{_figure(verdict.limit):>6}   {figures:50}{word}"


def _figure(number: float) -> str:
    return f"{number:.3f}" if 0 < number < 0.1 else f"{number:.3g}"


def fingerprint() -> str:
    """A short hash of the package's sources: figures belong to the code that was measured, not to a version number."""
    folder = Path(flask_persist_session.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def machine() -> dict[str, str]:
    """What the figures depend on."""
    server = subprocess.run([redis_program(), "--version"], capture_output=True, text=True, check=True).stdout
    facts = {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "CPUs": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "redis-server": next(word[2:] for word in server.split() if word.startswith("v=")),
        "SQLite": sqlite3.sqlite_version,
    }
    return facts | {name: version(name) for name in (*_PACKAGES, *_THEIR_PACKAGES)}


def machine_lines(facts: Mapping[str, str]) -> Iterator[str]:
    """The facts, several to a line."""
    yield "Measured with"
    line = ""
    for name, value in facts.items():
        if len(line) + len(name) + len(value) > 105:
            yield line
            line = ""
        line += f"  {name} {value}"
    yield line


def as_json(
    comparisons: Sequence[Comparison], scaled: Mapping[str, Samples], verdicts: Sequence[Verdict], facts: dict[str, Any]
) -> dict[str, Any]:
    """Everything, with the figure of each round."""
    return {
        "machine": facts,
        "comparisons": [
            {
                "size": item.size,
                "operations": item.operations,
                "round_trips": item.round_trips,
                "microseconds": item.samples,
            }
            for item in comparisons
        ],
        "scaling": scaled,
        "targets": [
            {"text": item.text, "limit": item.limit, "measured": item.measured, "reached": item.reached}
            for item in verdicts
        ],
    }
