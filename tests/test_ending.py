"""What has ended is handed to the application: at least once, by one worker at a time, until its handler returns."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
from cachelib import SimpleCache
from flask import Flask, current_app

from flask_persist_session import (
    ConfigError,
    EndingReport,
    PersistSession,
    SessionManager,
    SessionStore,
    StoredSession,
    UnsupportedByStore,
    open_store,
    session_ended,
    session_expired,
)
from flask_persist_session import ending as ending_module
from flask_persist_session.ending import pause_after
from flask_persist_session.sweeper import Sweeper
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.servers import wait_until
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]
KEEP = 3600.0
IDLE = 600.0


def chats_on(store: SessionStore, clock: Callable[[], float], **options: Any) -> SessionManager:
    given = {"idle_timeout": lambda: IDLE, "renew_interval": 0.0, "keep_ended": KEEP, **options}
    return SessionManager(store.namespace("chat"), namespace="chat", keep_data=True, clock=clock, **given)


class Handler:
    """Notes what it is given, and fails so many times before it returns."""

    def __init__(self, failures: int = 0, result: Any = "a summary") -> None:
        self.got: list[StoredSession] = []
        self.failures = failures
        self.result = result

    def __call__(self, session: StoredSession) -> Any:
        self.got.append(session)
        if len(self.got) <= self.failures:
            raise RuntimeError(f"cannot sum up {session.data}")
        return self.result


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def chats(store: SessionStore, clock: Clock, handler: Handler) -> SessionManager:
    return chats_on(store, clock, on_end=handler)


def say(chats: SessionManager, session: StoredSession, count: int) -> None:
    chats.history(session.id).append(*({"role": "user", "content": f"line {n}"} for n in range(count)))


def due_again(chats: SessionManager, clock: Clock) -> float:
    """Seconds until the one session there is comes up again."""
    [record] = chats.find()
    return record.expires_at - clock()


# What is handed over --------------------------------------------------------------------------------------------------


def test_what_has_ended_is_handed_over_at_the_next_cleanup(chats: SessionManager, handler: Handler) -> None:
    """The handler is given the session as it was, with the reason of its end; ending itself calls nothing."""
    chat = chats.create({"step": 1}, user_id="ada", metadata={"title": "Trip"}, tags=["x"])
    chats.end(chat.id, "closed")
    assert handler.got == []
    assert chats.cleanup().endings == EndingReport(processed=1)
    [got] = handler.got
    assert (got.id, got.data, got.user_id, got.end_reason, got.state) == (chat.id, {"step": 1}, "ada", "closed", "ended")
    assert (got.metadata["title"], got.tags) == ("Trip", {"x"})


def test_an_idle_one_is_handed_over_once_it_has_expired(chats: SessionManager, handler: Handler, clock: Clock) -> None:
    """It ends by that, with the reason "expired", which is told once."""
    chat = chats.create({"step": 1})
    clock.advance(IDLE - 1)
    chats.cleanup()
    assert handler.got == []
    clock.advance(2)
    told: list[Any] = []

    def hear(_sender: object, event: Any) -> None:
        told.append(event.session_id)

    with session_expired.connected_to(hear):
        chats.cleanup()
        clock.advance(KEEP + 1)
        chats.cleanup()
    assert [got.end_reason for got in handler.got] == ["expired"]
    assert told == [chat.id]


def test_a_session_renewed_meanwhile_is_not_handed_over(store: SessionStore, clock: Clock, handler: Handler) -> None:
    """Between its listing and its turn somebody went on with it: it goes on."""

    def went_on(session: StoredSession) -> None:
        handler(session)
        clock.now -= 2  # so that the other one can still be renewed
        for record in list(chats.find()):
            if record.ended_at is None:
                chats.refresh(record.id)
        clock.now += 2

    chats = chats_on(store, clock, on_end=went_on)
    for _ in range(2):
        chats.create({"step": 1})
    clock.advance(IDLE + 1)
    assert chats.process_ended() == EndingReport(processed=1)
    assert len(handler.got) == 1
    assert len(list(chats.find(state="active"))) == 1


@pytest.mark.parametrize("reason", ["ended", "revoked", "logout"])
def test_the_reason_of_the_end_does_not_matter(chats: SessionManager, handler: Handler, reason: str) -> None:
    """Whatever ended it, it is handed over."""
    chats.end(chats.create({"a": 1}).id, reason)
    chats.process_ended()
    assert [got.end_reason for got in handler.got] == [reason]


def test_a_session_ended_in_a_transaction_is_handed_over(new_url: Callable[[str], str], clock: Clock) -> None:
    """So is one of the user's that are revoked."""
    handler = Handler()
    chats = chats_on(open_store(new_url("memory")), clock, on_end=handler)
    first, second = chats.create({"a": 1}, user_id="ada"), chats.create({"a": 2}, user_id="ada")
    try:
        with chats.transaction() as together:
            together.end(first.id)
    except UnsupportedByStore:
        chats.end(first.id)
    chats.revoke_user("ada")
    chats.process_ended()
    assert {got.id for got in handler.got} == {first.id, second.id}


def test_what_was_deleted_is_not_handed_over(chats: SessionManager, handler: Handler, clock: Clock) -> None:
    """There is nothing left to be summed up, and it goes in its time."""
    chats.delete(chats.create({"a": 1}).id)
    clock.advance(KEEP + 1)
    assert chats.cleanup().ended == 1
    assert handler.got == []


def test_what_waits_can_be_deleted(chats: SessionManager, handler: Handler) -> None:
    """Whoever wants a dialogue gone need not wait for a handler that may fail for ever."""
    chat = chats.create({"a": 1})
    chats.end(chat.id)
    assert chats.delete(chat.id)
    chats.process_ended()
    assert handler.got == []


def test_a_session_without_data_is_handed_over(chats: SessionManager, handler: Handler) -> None:
    """One that was never given any has not been deleted."""
    chats.end(chats.create().id)
    chats.process_ended()
    assert [got.data for got in handler.got] == [{}]


def test_the_handler_reads_the_history(store: SessionStore, clock: Clock) -> None:
    """All of it is there, and nothing can be added."""
    read: list[str] = []
    chats = chats_on(store, clock, on_end=lambda session: read.extend(entry.content for entry in chats.history(session.id)))
    chat = chats.create()
    say(chats, chat, 3)
    chats.end(chat.id)
    chats.process_ended()
    assert read == ["line 0", "line 1", "line 2"]


@pytest.mark.parametrize(("entries", "called"), [(0, 0), (3, 0), (4, 1), (5, 1)])
def test_short_dialogues_are_marked_without_a_call(
    store: SessionStore, clock: Clock, handler: Handler, entries: int, called: int
) -> None:
    """With fewer entries than ``min_entries`` there is nothing to sum up, but the session counts as processed."""
    chats = chats_on(store, clock, on_end=handler, min_entries=4)
    chat = chats.create({"a": 1})
    if entries:
        say(chats, chat, entries)
    chats.end(chat.id)
    assert chats.process_ended() == EndingReport(processed=called, short=1 - called)
    [record] = chats.find(processed=True)
    assert len(handler.got) == called
    assert ("summary" in record.metadata) is bool(called)
    assert chats.process_ended() == EndingReport()


def test_another_age_hands_over_what_was_idle_so_long(chats: SessionManager, handler: Handler, clock: Clock) -> None:
    """``cleanup(older_than=…)`` removes no session that was not processed: it ends as "idle", and is kept."""
    chat = chats.create({"a": 1})
    clock.advance(300)
    fresh = chats.create({"a": 2})
    heard: list[Any] = []

    def hear(_sender: object, event: Any) -> None:
        heard.append((event.session_id, event.reason))

    with session_ended.connected_to(hear):
        report = chats.cleanup(older_than=200)
    assert (report.removed, report.endings.processed) == (0, 1)
    assert [(got.id, got.end_reason) for got in handler.got] == [(chat.id, "idle")]
    assert heard == [(chat.id, "idle")]
    assert chats.get(fresh.id) is not None


def test_a_dry_run_calls_nothing(chats: SessionManager, handler: Handler) -> None:
    """Only counting changes nothing."""
    chats.end(chats.create().id)
    report = chats.cleanup(dry_run=True)
    assert (report.removed, handler.got) == (0, [])


def test_a_manager_without_a_handler_has_nothing_to_process(store: SessionStore, clock: Clock) -> None:
    """What ends there is removed in its time, as ever."""
    chats = chats_on(store, clock)
    chats.end(chats.create().id)
    assert chats.process_ended() == EndingReport()
    clock.advance(KEEP + 1)
    assert chats.cleanup().ended == 1


def test_a_tenant_processes_its_own(store: SessionStore, clock: Clock, handler: Handler) -> None:
    """The manager of a tenant hands over none of another's."""
    chats = chats_on(store, clock, on_end=handler)
    for tenant in "acme", "other":
        chats.end(chats.create(tenant_id=tenant).id)
    assert chats.for_tenant("acme").process_ended() == EndingReport(processed=1)
    assert [got.tenant_id for got in handler.got] == ["acme"]


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", ["in short", {"topics": ["a", 1], "mood": None}, 7])
def test_what_the_handler_returns_is_kept_as_summary(
    chats: SessionManager, handler: Handler, clock: Clock, result: Any
) -> None:
    """Together with the time, for as long as ended sessions are kept from then on; then the session goes."""
    handler.result = result
    chat = chats.create({"step": 1}, metadata={"title": "Trip"})
    chats.end(chat.id)
    clock.advance(3 * KEEP)
    chats.process_ended()
    kept = chats.load(chat.id)
    assert kept is not None
    assert kept.metadata == {"title": "Trip", "summary": result, "processed_at": clock()}
    assert (kept.data, kept.end_reason) == ({"step": 1}, "ended")
    clock.advance(KEEP - 1)
    assert chats.cleanup().removed == 0
    clock.advance(2)
    assert chats.cleanup().removed == 1
    assert len(handler.got) == 1


def test_a_handler_that_returns_nothing_leaves_no_summary(chats: SessionManager, handler: Handler) -> None:
    """Only that it was processed, and when."""
    handler.result = None
    chats.end(chats.create().id)
    chats.process_ended()
    [record] = chats.find(processed=True)
    assert set(record.metadata) == {"processed_at"}


def test_a_session_that_waits_reads_as_ended(chats: SessionManager, clock: Clock) -> None:
    """However long it waits: with its reason and its data, for requests, lists and people."""
    chat = chats.create({"step": 1})
    chats.end(chat.id, "closed")
    clock.advance(100 * KEEP)
    waiting = chats.load(chat.id)
    assert waiting is not None
    assert (waiting.state, waiting.end_reason, waiting.data) == ("ended", "closed", {"step": 1})
    assert chats.state(waiting.record) == "ended"
    assert not chats.is_over(waiting.record)
    details = chats.inspect(chat.id)
    assert (details.state, details.awaits) == ("ended", True)


def test_lists_tell_what_is_processed(chats: SessionManager, clock: Clock) -> None:
    """``processed=False`` are those to come: waiting, idle, active; not those that were deleted."""
    done = chats.create()
    chats.end(done.id)
    chats.process_ended()
    waiting, active, deleted = (chats.create() for _ in range(3))
    chats.end(waiting.id)
    chats.delete(deleted.id)
    assert {record.id for record in chats.find(processed=True)} == {done.id}
    assert {record.id for record in chats.find(processed=False)} == {waiting.id, active.id}
    assert [record.id for record in chats.find(active=False, processed=False)] == [waiting.id]


def test_metadata_of_the_application_cannot_pass_for_a_mark(chats: SessionManager, handler: Handler, clock: Clock) -> None:
    """A session whose metadata happened to have "processed_at" is handed over all the same."""
    metadata: Any = {"processed_at": 1, "end_attempts": "many"}
    chats.end(chats.create(metadata=metadata).id)
    chats.create(metadata=metadata)
    clock.advance(IDLE + 1)
    assert chats.process_ended() == EndingReport(processed=2)


def test_metadata_of_the_application_cannot_pass_for_a_summary(chats: SessionManager, handler: Handler) -> None:
    """What a session had under "summary" is not taken for what the handler said of it, not even if that said nothing."""
    handler.result = None
    session = chats.create(metadata={"summary": "a very satisfied customer"})
    chats.end(session.id)
    assert chats.process_ended() == EndingReport(processed=1)
    ended = chats.load(session.id)
    assert ended is not None
    assert "summary" not in ended.metadata


def test_the_archive_gets_it_after_it_was_processed(store: SessionStore, clock: Clock, handler: Handler) -> None:
    """With its summary."""
    archived: list[Any] = []
    chats = chats_on(store, clock, on_end=handler, archive=lambda records, now: archived.extend(records))
    chats.end(chats.create().id)
    chats.cleanup()
    assert archived == []
    clock.advance(KEEP + 1)
    chats.cleanup()
    assert [record.metadata["summary"] for record in archived] == ["a summary"]


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_handler_that_fails_is_called_again_after_growing_pauses(
    chats: SessionManager, handler: Handler, clock: Clock
) -> None:
    """Not before its pause has passed, and until it returns; then nothing of the attempts is left."""
    handler.failures = 3
    chats.end(chats.create().id)
    pauses = []
    for attempt in range(1, 4):
        assert chats.process_ended() == EndingReport(failed=1)
        pauses.append(due_again(chats, clock))
        clock.advance(pauses[-1] - 0.001)
        assert chats.process_ended() == EndingReport()
        clock.advance(0.002)
        assert len(handler.got) == attempt
    assert pauses == sorted(pauses)
    assert pauses[2] > pauses[0] * 2
    assert chats.process_ended() == EndingReport(processed=1)
    [record] = chats.find()
    assert set(record.metadata) == {"summary", "processed_at"}


def test_pauses_grow_up_to_some_hours() -> None:
    """Each is longer than the one before, whatever the chance, until the longest; no number of attempts is too large."""
    for attempt in range(1, 8):
        assert pause_after(attempt) < pause_after(attempt + 1) or attempt > 8
    assert pause_after(10**6) <= 8 * 3600


def test_the_log_tells_of_a_failure_without_what_was_said(
    chats: SessionManager, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """The id, the kind of error and the place; not its message."""
    handler.failures = 1
    chat = chats.create({"words": "to nobody else"})
    chats.end(chat.id)
    chats.process_ended()
    [entry] = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    text = entry.getMessage()
    assert chat.id in text
    assert "RuntimeError" in text
    assert "test_ending.py" in text
    assert "to nobody else" not in caplog.text


@pytest.mark.parametrize("result", [object(), {"a": b"bytes"}, {1, 2}])
def test_a_result_that_is_no_json_counts_as_a_failure(chats: SessionManager, handler: Handler, result: Any) -> None:
    """It cannot be kept, so the session is not done with."""
    handler.result = result
    chats.end(chats.create().id)
    assert chats.process_ended() == EndingReport(failed=1)


def test_one_failure_does_not_keep_others_from_their_turn(chats: SessionManager, handler: Handler) -> None:
    """The run goes on with the next session."""
    handler.failures = 1
    for _ in range(3):
        chats.end(chats.create().id)
    assert chats.process_ended() == EndingReport(processed=2, failed=1)


def test_a_session_that_was_never_processed_is_never_removed(chats: SessionManager, handler: Handler, clock: Clock) -> None:
    """Neither by its age nor by another one that is asked for."""
    handler.failures = 10**6
    chats.create({"idle": True})
    chats.end(chats.create({"ended": True}).id)
    for _ in range(10):
        clock.advance(50 * KEEP)
        assert chats.cleanup(older_than=1).removed == 0
    assert len(list(chats.find(processed=False))) == 2


def test_a_handler_that_takes_long_keeps_its_session(
    store: SessionStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it runs, nobody else is given the session meanwhile."""
    monkeypatch.setattr(ending_module, "_BEAT", 0.001)
    calls: list[str] = []

    def slow(session: StoredSession) -> str:
        calls.append(session.id)
        for _ in range(5):
            clock.advance(40)
            wait_until(lambda: due_again(chats, clock) > 40, "the next beat")
            assert chats.process_ended() == EndingReport()
        return "done"

    chats = chats_on(store, clock, on_end=slow)
    chats.end(chats.create().id)
    assert chats.process_ended() == EndingReport(processed=1)
    assert len(calls) == 1
    assert [thread.name for thread in threading.enumerate() if thread.name == "session-ending"] == []


def test_nothing_is_left_of_what_a_stop_interrupts(chats: SessionManager, handler: Handler) -> None:
    """A process that is to end finishes the session at hand, and leaves the others due."""
    for _ in range(3):
        chats.end(chats.create().id)
    assert chats.process_ended(stop=lambda: len(handler.got) == 1) == EndingReport(processed=1)
    assert chats.process_ended() == EndingReport(processed=2)


def test_redis_does_not_remove_by_itself_what_waits(new_url: Callable[[str], str], clock: Clock, handler: Handler) -> None:
    """Where nobody cleans up for months, sessions that have ended or expired are still there to be processed."""
    store: Any = open_store(new_url("redis"))
    chats = chats_on(store, clock, on_end=handler)
    for chat in chats.create(), chats.create():
        say(chats, chat, 1)
    chats.end(chat.id)
    keys = [key for key in store._client.scan_iter(f"{store._prefix_of_all}*") if b":s:" in key or b":h:" in key]
    assert len(keys) == 4
    assert all(store._client.ttl(key) > 9 * 365 * 86400 for key in keys)
    store.close()


def test_handing_over_costs_two_saves(clock: Clock, handler: Handler) -> None:
    """One listing for all, and for each session one save to take it and one to keep its summary; none is read again."""
    store = CountingStore(open_store("memory://"))
    chats = SessionManager(store, namespace="chat", keep_data=True, clock=clock, on_end=handler)
    for _ in range(10):
        chats.end(chats.create().id)
    store.operations.clear()
    assert chats.process_ended().processed == 10
    assert store.operations == {"find": 1, "save": 20}


def test_redis_keeps_what_waits_after_a_migration(make_app: MakeApp, new_url: Callable[[str], str]) -> None:
    """The server that sessions are copied to gets as much time as the one from which they come."""
    app, url = make_app(PERSIST_SESSION_STORE="memory://"), new_url("redis")
    sessions = PersistSession()
    with app.app_context():
        chats = sessions.namespace("chat", on_end=lambda _: None)
        chat = chats.create()
        chats.end(chat.id)
        sessions.migrate(url)
    store: Any = open_store(url)
    [key] = [key for key in store._client.scan_iter(f"*{chat.id}*") if b":s:" in key]
    assert store._client.ttl(key) > 9 * 365 * 86400
    store.close()


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["end", "expire"])
def test_what_ended_under_a_key_is_processed_beside_the_new_one(
    chats: SessionManager, handler: Handler, clock: Clock, how: str
) -> None:
    """With its history, under the id that it has now; the new one is left alone."""
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    say(chats, first, 3)
    chats.end(first.id) if how == "end" else clock.advance(IDLE + 1)
    second = chats.resume_or_create(key="k", user_id="ada")
    clock.advance(61)  # for the copying
    assert chats.process_ended() == EndingReport(processed=1)
    [got] = handler.got
    assert got.id != second.id
    assert (got.data, chats.history(got.id).count()) == ({"step": 1}, 3)
    assert chats.get(second.id) is not None


def test_an_idle_one_does_not_come_alive_beside_the_new_one(chats: SessionManager, clock: Clock) -> None:
    """While its history is copied it has ended already."""
    chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    clock.advance(IDLE + 1)
    second = chats.resume_or_create(key="k", user_id="ada")
    assert [record.id for record in chats.find(state="active")] == [second.id]


def test_a_key_used_anew_while_the_handler_runs(store: SessionStore, clock: Clock) -> None:
    """What the handler returns then is dropped, the new session is untouched, and the old one comes up once more."""
    got: list[str] = []

    def handler(session: StoredSession) -> str:
        got.append(session.id)
        if len(got) == 1:
            chats.resume_or_create(key="k", user_id="ada", data={"step": 2})
        return "a summary"

    chats = chats_on(store, clock, on_end=handler)
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    chats.end(first.id)
    assert chats.process_ended() == EndingReport()
    new = chats.get(first.id)
    assert new is not None
    assert (new.data, new.metadata) == ({"step": 2}, {})
    clock.advance(100)
    assert chats.process_ended() == EndingReport(processed=1)
    assert got[1] != first.id
    assert chats.look_up(got[1]).metadata["summary"] == "a summary"


@pytest.mark.parametrize("read", [lambda history: history.latest(), list, lambda history: history.count()])
def test_a_handler_never_reads_another_dialogue(
    store: SessionStore, clock: Clock, handler: Handler, read: Callable[[Any], object]
) -> None:
    """Where its session's key is used anew while it runs, the history of the session that it was given is there no more."""
    got: list[list[str]] = []

    def reading(session: StoredSession) -> None:
        if not got:
            got.append([])
            say(chats, chats.resume_or_create(key="k"), 5)
        read(chats.history(session))
        got.append([entry.content for entry in chats.history(session)])

    chats = chats_on(store, clock, on_end=reading)
    first = chats.resume_or_create(key="k")
    say(chats, first, 2)
    chats.end(first.id)
    assert chats.process_ended() == EndingReport(failed=1)
    clock.advance(100)
    assert chats.process_ended() == EndingReport(processed=1)
    assert got == [[], ["line 0", "line 1"]]


def test_what_a_crash_left_of_a_copy_gives_way(chats: SessionManager, handler: Handler, clock: Clock) -> None:
    """A copy without its history, even one that was processed, is no reason to hand the whole over to nobody."""
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    say(chats, first, 3)
    chats.end(first.id)
    chats._set_aside(chats.look_up(first.id))
    [torn] = [record for record in chats.find() if record.id != first.id]
    chats.store.history.delete(torn.id)
    chats.store.save(chats._lifetime.processed(torn, {"summary": "of nothing"}), expected=torn.version)
    chats.resume_or_create(key="k", user_id="ada")
    clock.advance(100)
    chats.process_ended()
    assert [(got.id, chats.history(got.id).count()) for got in handler.got] == [(torn.id, 3)]


# Setting up -----------------------------------------------------------------------------------------------------------


def test_the_handler_runs_within_the_context_of_its_application(make_app: MakeApp) -> None:
    """In the background too: the sweeper calls it where there is no request."""
    seen: list[str] = []
    app = make_app()
    chats = PersistSession().namespace("chat", app=app, on_end=lambda session: seen.append(current_app.name))
    chats.end(chats.create().id)
    Sweeper({"chat": chats}, 600).sweep()
    assert seen == ["tested"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_end": "summarize"}, "on_end of the namespace 'chat'"),
        ({"on_end": print, "min_entries": -1}, "min_entries of the namespace 'chat'"),
        ({"min_entries": 4}, "goes with on_end"),
    ],
)
def test_a_wrong_option_is_named(make_app: MakeApp, options: dict[str, Any], message: str) -> None:
    """The error says which."""
    with pytest.raises(ConfigError, match=message):
        PersistSession().namespace("chat", app=make_app(), **options)


def test_a_store_that_cannot_list_cannot_hand_over(make_app: MakeApp) -> None:
    """Nobody could find what has ended."""
    app = make_app(SimpleCache())
    with pytest.raises(ConfigError, match="on_end of the namespace 'chat'"):
        PersistSession().namespace("chat", app=app, on_end=print)


def test_show_tells_the_summary(make_app: MakeApp) -> None:
    """And before that, that the session waits."""
    app = make_app()
    chats = PersistSession().namespace("chat", app=app, on_end=lambda session: {"topic": "trips"})
    chat = chats.create(metadata={"title": "Trip"})
    chats.end(chat.id)
    runner = app.test_cli_runner()
    before = runner.invoke(args=["sessions", "show", "--namespace", "chat", chat.id]).output
    assert "until on_end has had it" in before
    assert "on_end: 1 processed, 0 too short, 0 failed" in runner.invoke(args=["sessions", "cleanup"]).output
    after = runner.invoke(args=["sessions", "show", "--namespace", "chat", chat.id]).output
    assert 'summary   {"topic": "trips"}' in after
    assert "processed " in after
    assert 'metadata  {"title": "Trip"}' in after


# Processes ------------------------------------------------------------------------------------------------------------


def _work(url: str, barrier: Barrier, rounds: int, outcome: Any) -> None:
    store = open_store(url)

    def handler(session: StoredSession) -> str:
        outcome.put(session.id)
        return "done"

    chats = chats_on(store, time.time, on_end=handler)
    for _ in range(rounds):
        barrier.wait()
        chats.process_ended()
        barrier.wait()
    outcome.put(None)
    store.close()


def test_two_workers_share_the_work(shared_url: str) -> None:
    """Of many sessions each is handed over once, whoever comes first."""
    store = open_store(shared_url)
    chats = chats_on(store, time.time, on_end=print)
    rounds, each = 3, 20
    barrier, outcome = PROCESSES.Barrier(3), PROCESSES.Queue()
    workers = [PROCESSES.Process(target=_work, args=(shared_url, barrier, rounds, outcome)) for _ in range(2)]
    for worker in workers:
        worker.start()
    expected = []
    for _ in range(rounds):
        expected += [chat.id for chat in (chats.create() for _ in range(each)) if chats.end(chat.id)]
        barrier.wait()
        barrier.wait()
    got, ended = [], 0
    while ended < len(workers):
        item = outcome.get(timeout=60)
        got += [item] if item else []
        ended += item is None
    for worker in workers:
        worker.join()
    assert sorted(got) == sorted(expected)
    assert len(list(chats.find(processed=True))) == rounds * each
    store.close()


def _die(url: str, where: str) -> None:
    def handler(session: StoredSession) -> str:
        if where == "in the handler":
            os.kill(os.getpid(), signal.SIGKILL)
        return "lost"

    chats = chats_on(open_store(url), time.time, on_end=handler)
    if where == "before the summary":
        chats._mark = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment, return-value]
    chats.process_ended()


@pytest.fixture(params=["in the handler", "before the summary"])
def killed(request: pytest.FixtureRequest, shared_url: str) -> Iterator[SessionStore]:
    """A store with one session, whose worker was killed at this point."""
    store = open_store(shared_url)
    chats = chats_on(store, time.time, on_end=print)
    chat = chats.create({"step": 1})
    say(chats, chat, 2)
    chats.end(chat.id)
    worker = PROCESSES.Process(target=_die, args=(shared_url, request.param))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    yield store
    store.close()


def test_a_worker_that_is_killed_leaves_the_session_to_the_next(killed: SessionStore, handler: Handler) -> None:
    """Nobody is given it at once, another one after the pause; so each is handed over at least once."""
    clock = Clock(time.time())
    chats = chats_on(killed, clock, on_end=handler)
    assert chats.process_ended() == EndingReport()
    clock.advance(80)
    assert chats.process_ended() == EndingReport(processed=1)
    assert [(got.data, chats.history(got.id).count()) for got in handler.got] == [({"step": 1}, 2)]
