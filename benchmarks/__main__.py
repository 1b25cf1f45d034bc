"""``python -m benchmarks``: measure, print the tables."""

from __future__ import annotations

import argparse
import json
import random
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.measuring import Samples
from benchmarks.places import Places
from benchmarks.runs import SCALING_STORES, Comparison, compare, scale, selected
from benchmarks.targets import judge

SIZES = (100, 2_000, 50_000)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description="What a request costs, side by side.")
    parser.add_argument("--quick", action="store_true", help="few rounds and 10,000 instead of 100,000 stored sessions")
    parser.add_argument("--rounds", type=int, help="rounds, each of which measures everything once (60; quick: 8)")
    parser.add_argument("--size", type=int, action="append", help="bytes of payload (100, 2000 and 50000); repeatable")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="candidates with this in their names")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of the order of measuring")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to a file")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    rounds = options.rounds or (8 if options.quick else 60)
    many = 10_000 if options.quick else 100_000
    order = random.Random(options.seed)
    candidates = selected(options.only)
    names = {candidate.name for candidate in candidates}
    comparisons: list[Comparison] = []
    scaled: dict[str, Samples] = {}
    sources = report.fingerprint()
    print(f"Medians of {rounds} rounds; seed {options.seed}; sources of the package {sources}\n")
    with Places() as places:
        for size in options.size or SIZES:
            comparisons.append(compare(places, candidates, size, rounds, order))
            show(report.comparison_lines(comparisons[-1]))
        for kind in SCALING_STORES:
            if f"this, {kind}" in names:
                scaled[kind] = scale(places, kind, many, rounds, order)
    verdicts = judge(comparisons, scaled, many)
    facts = {"sources": sources, **report.machine()}
    show(report.floor_lines(comparisons))
    show(report.scaling_lines(scaled, many))
    show(report.target_lines(verdicts))
    show(report.machine_lines(facts))
    if report.fingerprint() != sources:
        print("The package was edited during the run: these figures are of no one version. Run again.")
    if options.json:
        options.json.write_text(json.dumps(report.as_json(comparisons, scaled, verdicts, facts), indent=1))


def show(lines: Iterator[str]) -> None:
    print("\n".join(lines), end="\n\n", flush=True)


if __name__ == "__main__":
    with warnings.catch_warnings():
        # Flask-Session calls datetime.utcnow.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="flask_session")
        main(arguments())
