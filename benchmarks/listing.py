"""``python -m benchmarks.listing``: what a page of a list costs, of one user's sessions and of all."""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.measuring import Task, measure, progress, ratio
from benchmarks.places import Places
from flask_persist_session import Change, SessionManager, SessionQuery, SessionRecord, SessionStore, open_store
from flask_persist_session.tokens import make_token, session_id, shard_of

KINDS = ("sqlite", "file", "redis", "postgresql")
PAGE = 20
LATE = 1000
OF_USER, FIRST, LATER = "a user's latest", "page 1 by id", f"page {LATE:,} by id"
_FILL_AT_ONCE = 1000
_DAY = 86400.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.listing", description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000, help="sessions of all users together (1000000)")
    parser.add_argument("--own", type=int, default=300, help="sessions of the user whose are listed (300)")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind of store; repeatable")
    parser.add_argument("--rounds", type=int, default=100, help="rounds, each of which measures everything once (100)")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    print(f"{options.sessions:,} chat sessions of 1 kB, {options.own:,} of them one user's, 9 of 10 of those active.")
    print(f"Milliseconds for {PAGE} of them: the user's active, latest first; all by id. {options.rounds} rounds.\n")
    print(f"{'store':<12}{OF_USER:>17}{'p99':>8}{FIRST:>15}{LATER:>18}{'ratio':>8}")
    with Places() as places:
        for kind in options.only or KINDS:
            print(line(kind, open_store(places.new_url(kind), namespace="chat"), options), flush=True)


def line(kind: str, store: SessionStore, options: argparse.Namespace) -> str:
    fill(store, options.sessions, options.own)
    first = SessionQuery(order_by="id", limit=PAGE)
    *_, last = store.find(replace(first, limit=(LATE - 1) * PAGE))
    queries = {
        OF_USER: SessionQuery(user_id="Ada", state="active", now=time.time(), order_by="-accessed_at", limit=PAGE),
        FIRST: first,
        LATER: replace(first, after=first.position(last)),
    }
    tasks = [Task(name, partial(listed, store, query), lambda: None) for name, query in queries.items()]
    samples = measure(tasks, options.rounds, random.Random(options.rounds), kind)
    milliseconds = {name: sorted(figure / 1000 for figure in figures) for name, figures in samples.items()}
    user, one, thousand = (milliseconds[name][len(milliseconds[name]) // 2] for name in queries)
    worst = milliseconds[OF_USER][len(milliseconds[OF_USER]) * 99 // 100]
    store.close()
    return f"{kind:<12}{user:>17.2f}{worst:>8.2f}{one:>15.2f}{thousand:>18.2f}{ratio(samples, LATER, FIRST):>8.2f}"


def listed(store: SessionStore, query: SessionQuery) -> None:
    if len(list(store.find(query))) != PAGE:
        raise RuntimeError(f"less than {PAGE} sessions were found by {query}")


def fill(store: SessionStore, number: int, own: int) -> None:
    """Store so many sessions, *own* of them spread among those of others."""
    like = SessionManager(store).create({"text": "x" * 1000}).record
    store.delete(like.id)
    records = _records(like, number, own)
    for done in itertools.count(0, _FILL_AT_ONCE):
        batch = [Change(record=record, expected=0) for record in itertools.islice(records, _FILL_AT_ONCE)]
        if not batch:
            return
        store.save_many(batch)
        progress(f"filling: {done:,} of {number:,}")


def _records(like: SessionRecord, number: int, own: int) -> Iterator[SessionRecord]:
    chance = random.Random(number)
    for index in range(number):
        user_id = "Ada" if index % (number // own) == 0 else f"user {index // 20}"
        accessed = like.accessed_at - chance.uniform(0, 30 * _DAY)
        expires = accessed + (365 * _DAY if chance.random() < 0.9 else 0)
        yield replace(
            like,
            id=session_id(make_token(shard_of(user_id))),
            user_id=user_id,
            created_at=accessed - 600,
            accessed_at=accessed,
            expires_at=expires,
        )


if __name__ == "__main__":
    main(arguments())
