"""``python -m benchmarks.signing_in``: what a sign-in costs, with a cap of 10 sessions per user."""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median

from flask import Flask, session
from flask.testing import FlaskClient

from benchmarks.places import Places
from benchmarks.runs import commands_of
from flask_persist_session import PersistSession, open_store
from tests.counting import CountingStore

KINDS = ("memory", "file", "sqlite", "redis", "postgresql")
CAP = 10
#: What must be reached: store operations, and round trips on Redis.
MOST_OPERATIONS, MOST_ROUND_TRIPS = 4, 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.signing_in", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="sign-ins that are timed (300)")
    parser.add_argument("--only", choices=KINDS, action="append", help="repeatable; all unless given")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    print(f"A visitor with a session signs in; a user may have {CAP}. Medians of {options.rounds} sign-ins.\n")
    print(f"{'store':<12}{'operations':>12}{'evicting':>10}{'round trips':>13}{'evicting':>10}{'µs':>8}")
    with Places() as places:
        for kind in options.only or KINDS:
            print(line(places, kind, options.rounds), flush=True)
    print(
        f"\nTo reach: {MOST_OPERATIONS} operations, {MOST_ROUND_TRIPS} round trips. Evicting: one session has to go for it."
    )


def line(places: Places, kind: str, rounds: int) -> str:
    store = CountingStore(open_store(places.new_url(kind)))
    app = application(store)
    visitor(app).get("/sign-in/Bob")  # a Redis server is given each script once
    first = counted(places, app, store, kind)
    for _ in range(CAP - 1):
        visitor(app).get("/sign-in/Ada")
    evicting = counted(places, app, store, kind)
    figures = f"{first[0]:>12}{evicting[0]:>10}{first[1]:>13}{evicting[1]:>10}"
    return f"{kind:<12}{figures}{timed(app, rounds):>8.0f}"


def counted(places: Places, app: Flask, store: CountingStore, kind: str) -> tuple[int, str]:
    """The operations of one sign-in, and on Redis its round trips."""
    client = visitor(app)
    store.operations.clear()
    sign_in = partial(client.get, "/sign-in/Ada")
    trips = ""
    if kind == "redis":
        trips = str(commands_of(places.redis, sign_in))
    else:
        sign_in()
    return sum(store.operations.values()), trips


def application(store: CountingStore) -> Flask:
    app = Flask("benchmarked")
    app.config.update(
        SECRET_KEY="for benchmarks only",
        PERSIST_SESSION_STORE=store,
        PERSIST_SESSION_USER_KEY="user_id",
        PERSIST_SESSION_MAX_PER_USER=CAP,
        PERSIST_SESSION_CLEANUP_INTERVAL=0,
    )
    PersistSession(app)
    app.add_url_rule("/", "visit", lambda: str(session.setdefault("cart", ["apple"])))
    app.add_url_rule("/sign-in/<user>", "sign_in", lambda user: session.update(user_id=user) or "")
    return app


def visitor(app: Flask) -> FlaskClient:
    client = app.test_client()
    client.get("/")
    return client


def timed(app: Flask, rounds: int) -> float:
    taken = []
    for number in range(rounds):
        client = visitor(app)
        start = time.perf_counter()
        client.get(f"/sign-in/user{number % 20}")
        taken.append(time.perf_counter() - start)
    return median(taken) * 1e6


if __name__ == "__main__":
    main(arguments())
