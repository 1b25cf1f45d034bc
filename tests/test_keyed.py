"""Keys: the application's own names for sessions, one active session of each name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.synchronize import Barrier

import pytest

from flask_persist_session import (
    Change,
    SessionConflict,
    SessionLimitReached,
    SessionManager,
    SessionNotFound,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoredSession,
    open_store,
)
from flask_persist_session.stored import Owner
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.web import PROCESSES


def chats_on(store: SessionStore, clock: Callable[[], float] | None = None, **options: object) -> SessionManager:
    if clock is not None:
        options["clock"] = clock
    return SessionManager(store.namespace("chat"), namespace="chat", keep_data=True, **options)  # type: ignore[arg-type]


@pytest.fixture
def chats(store: SessionStore, clock: Clock) -> SessionManager:
    return chats_on(store, clock, idle_timeout=lambda: 600.0, renew_interval=0.0)


def test_a_key_leads_to_the_same_session_again(chats: SessionManager) -> None:
    """The first call creates, the next goes on."""
    first = chats.resume_or_create(key="thread-1", user_id="ada", data={"step": 1})
    again = chats.resume_or_create(key="thread-1", user_id="ada", data={"step": 9})
    assert (first.new, again.new, again.id, again.data) == (True, False, first.id, {"step": 1})


def test_one_session_per_user_has_the_empty_key(chats: SessionManager) -> None:
    """Where each user has one session, it needs no name."""
    ada, bob = (chats.resume_or_create(key="", user_id=user) for user in ("ada", "bob"))
    assert ada.id != bob.id
    assert chats.resume_or_create(key="", user_id="ada").id == ada.id


def test_the_same_key_of_two_owners_names_two_sessions(chats: SessionManager) -> None:
    """Nobody gets at another's session by guessing its name."""
    owners = [("ada", None), ("bob", None), ("ada", "acme"), (None, None), (None, "acme")]
    made = [chats.resume_or_create(key="k", user_id=user, tenant_id=tenant) for user, tenant in owners]
    assert len({session.id for session in made}) == len(owners)
    assert all(session.new for session in made)


def test_parts_of_a_name_cannot_be_moved_between_user_and_key(store: SessionStore) -> None:
    """User "a", key "bc" and user "ab", key "c" are two names."""
    chats = chats_on(store)
    assert chats.key_id("bc", Owner("a")) != chats.key_id("c", Owner("ab"))
    assert chats.key_id('"]', Owner("a")) != chats.key_id("", Owner('a"]'))


def test_the_same_key_in_two_namespaces_names_two_sessions(store: SessionStore) -> None:
    """The namespace is part of the name."""
    jobs = SessionManager(store.namespace("jobs"), namespace="jobs")
    assert jobs.key_id("k", Owner("ada")) != chats_on(store).key_id("k", Owner("ada"))


def test_no_token_opens_a_session_with_a_key(chats: SessionManager) -> None:
    """Its id is made of a name, and nothing leads from a secret to it."""
    assert chats.create(key="k", user_id="ada").token is None


def test_creating_under_a_key_in_use_is_a_conflict(chats: SessionManager) -> None:
    """Whoever wants a new one for sure learns that there is one, and that stays as it is."""
    first = chats.create({"step": 1}, key="k", user_id="ada")
    with pytest.raises(SessionConflict, match="active already"):
        chats.create({"step": 2}, key="k", user_id="ada")
    found = chats.get(first.id)
    assert found is not None
    assert found.data == {"step": 1}


@pytest.mark.parametrize("key", [7, b"k", "a\0b", "x" * 600, "\ud800"])
def test_what_is_no_key_is_told(chats: SessionManager, key: object) -> None:
    """A key is text that every store could keep."""
    with pytest.raises(ValueError, match="key"):
        chats.create(key=key)  # type: ignore[arg-type]


def test_an_id_and_a_key_together_are_refused(chats: SessionManager) -> None:
    """Which of the two would count nobody could guess."""
    with pytest.raises(ValueError, match="not by both"):
        chats.resume_or_create("000" + "0" * 64, key="k")


def test_an_unknown_id_makes_a_new_session(chats: SessionManager) -> None:
    """Whoever comes with an id that is gone, or somebody else's, gets a session of their own."""
    other = chats.create(user_id="bob")
    for wanted in (other.id, "000" + "0" * 64, "what?", None):
        made = chats.resume_or_create(wanted, user_id="ada")
        assert made.new
        assert made.id != wanted
    assert not chats.resume_or_create(other.id, user_id="bob").new


@pytest.mark.parametrize("end", ["end", "expire", "delete"])
def test_a_key_is_free_again_once_its_session_has_ended(chats: SessionManager, clock: Clock, end: str) -> None:
    """What has ended stays so: the next one is new, and starts from nothing."""
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    {"end": chats.end, "expire": lambda _: clock.advance(601), "delete": chats.delete}[end](first.id)
    second = chats.resume_or_create(key="k", user_id="ada")
    assert second.new
    assert second.data == {}
    assert second.version > first.version


@pytest.mark.parametrize("end", ["end", "expire"])
def test_what_ended_under_a_key_is_kept_beside_the_new_one(chats: SessionManager, clock: Clock, end: str) -> None:
    """An operator and the archive find it, under an id of its own."""
    first = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    chats.end(first.id, "closed") if end == "end" else clock.advance(601)
    second = chats.resume_or_create(key="k", user_id="ada")
    [old] = [record for record in chats.find(user_id="ada") if record.id != second.id]
    assert chats.state(old) != "active"
    assert chats.decode(old) == {"step": 1}
    assert chats.get(old.id) is None


def test_whoever_still_has_the_old_session_does_not_change_the_new_one(chats: SessionManager) -> None:
    """A save that was under way while the key was used anew comes to nothing."""
    late = chats.resume_or_create(key="k", user_id="ada", data={"step": 1})
    chats.end(late.id)
    chats.resume_or_create(key="k", user_id="ada", data={"step": 5})
    late.data["step"] = 2
    assert chats.save(late) == "discarded"
    assert chats.resume_or_create(key="k", user_id="ada").data == {"step": 5}


def anew(chats: SessionManager, session: StoredSession) -> StoredSession:
    """End a session, and use its key once more."""
    chats.end(session.id)
    return chats.resume_or_create(key="k", user_id="ada", data={"new": True})


@pytest.mark.parametrize("version", [None, 1])
def test_an_edit_during_which_the_key_was_used_anew_says_so(chats: SessionManager, version: int | None) -> None:
    """The session that was to be changed has ended, and the other one stays as it is."""
    first = chats.resume_or_create(key="k", user_id="ada")

    def edit() -> None:
        with chats.edit(first.id, expected_version=version) as session:
            session.data["late"] = True
            anew(chats, first)

    with pytest.raises(SessionNotFound, match="it has ended, and its key leads to another now"):
        edit()
    assert chats.existing(first.id).data == {"new": True}


@pytest.mark.parametrize(("how", "error"), [("edit", SessionNotFound), ("transaction", SessionConflict)])
def test_whoever_holds_a_session_beyond_its_time_does_not_change_the_next_one(
    chats: SessionManager, clock: Clock, how: str, error: type[Exception]
) -> None:
    """A cleanup has removed it, so the next one of its key has the same version."""
    first = chats.resume_or_create(key="k", user_id="ada", data={"old": True})

    def use_anew() -> None:
        clock.advance(601)
        chats.cleanup()
        assert chats.resume_or_create(key="k", user_id="ada", data={"new": True}).version == first.version

    def edit() -> None:
        with chats.edit(first.id) as session:
            session.data["late"] = True
            use_anew()

    def transact() -> None:
        with chats.transaction() as together:
            together.get(first.id).data["late"] = True
            use_anew()

    with pytest.raises(error):
        {"edit": edit, "transaction": transact}[how]()
    assert chats.existing(first.id).data == {"new": True}


def test_deleting_leaves_the_history_of_the_next_session_of_a_key(
    chats: SessionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody uses the key anew just when the session is deleted, and goes on talking."""
    first = chats.resume_or_create(key="k", user_id="ada")
    chats.history(first.id).append({"role": "user", "content": "old"})
    save = chats.store.save

    def save_and_use_anew(record: SessionRecord, *, expected: int) -> None:
        save(record, expected=expected)
        monkeypatch.undo()
        chats.history(anew(chats, first).id).append({"role": "user", "content": "new"})

    monkeypatch.setattr(chats.store, "save", save_and_use_anew)
    assert chats.delete(first.id)
    assert [entry.content for entry in chats.history(first.id)] == ["new"]


def test_clearing_a_history_leaves_that_of_the_next_session_of_a_key(chats: SessionManager) -> None:
    """It is not the one that was appended to."""
    first = chats.resume_or_create(key="k", user_id="ada")
    old = chats.history(first.id)
    old.append({"role": "user", "content": "old"})
    chats.history(anew(chats, first).id).append({"role": "user", "content": "new"})
    assert not old.clear()
    assert [entry.content for entry in chats.history(first.id)] == ["new"]


def test_a_key_from_a_clock_that_was_ahead_can_be_used(store: SessionStore, clock: Clock) -> None:
    """The next session of it begins now: one that seems to begin in ten days would be the first to go at a cap."""
    chats = chats_on(store, clock, max_per_user=2, absolute_timeout=1000.0)
    clock.advance(10 * 86400)
    chats.end(chats.create(key="k", user_id="ada").id)
    clock.advance(-10 * 86400)
    for _ in range(2):
        chats.create(user_id="ada")
        clock.advance(1)
    again = chats.resume_or_create(key="k", user_id="ada")
    assert chats.existing(again.id).created_at == clock()


def test_changing_many_leaves_the_next_session_of_a_key(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the one that was found."""
    first = chats.resume_or_create(key="k", user_id="ada", tags=["old"])
    save_many = chats.store.save_many

    def use_anew_and_save(changes: Sequence[Change]) -> list[bool]:
        anew(chats, first)
        return save_many(changes)

    monkeypatch.setattr(chats.store, "save_many", use_anew_and_save)
    assert chats.update_many(SessionQuery(tags=frozenset(["old"])), data={"changed": True}) == 0
    assert chats.existing(first.id).data == {"new": True}


def test_refusing_a_session_that_others_go_on_with_keeps_what_they_stored(
    store: SessionStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds it by its key before it is refused has stored something: it ends, and is not deleted."""
    chats = chats_on(store, clock, max_per_user=1, cap_policy="reject")
    chats.create(user_id="ada")
    clock.advance(1)
    save = chats.store.save

    def save_and_go_on(record: SessionRecord, *, expected: int) -> None:
        save(record, expected=expected)
        monkeypatch.undo()
        with chats.edit(record.id) as session:
            session.data["said"] = 1

    monkeypatch.setattr(chats.store, "save", save_and_go_on)
    with pytest.raises(SessionLimitReached):
        chats.create(key="k", user_id="ada")
    [refused] = chats.find(active=False)
    assert (refused.end_reason, chats.decode(refused)) == ("rejected", {"said": 1})


def test_a_cap_does_not_end_the_next_session_of_a_key(
    store: SessionStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest is to go; by the time it would, it has ended, and its key leads to the newest."""
    chats = chats_on(store, clock, max_per_user=1)
    first = chats.create(key="k", user_id="ada")
    clock.advance(1)
    save = chats.store.save

    def use_anew_and_save(record: SessionRecord, *, expected: int) -> None:
        if record.ended_at is not None:
            monkeypatch.undo()
            clock.advance(1)
            anew(chats, first)
        save(record, expected=expected)

    monkeypatch.setattr(chats.store, "save", use_anew_and_save)
    chats.create(user_id="ada")
    assert chats.existing(first.id).data == {"new": True}


def test_a_session_that_cannot_be_read_does_not_keep_its_key(chats: SessionManager) -> None:
    """Its user goes on with a new one, and the old one is kept aside with what it has."""
    first = chats.resume_or_create(key="k", user_id="ada")
    damaged = replace(first.record, data=b"\xff", version=2)
    chats.store.save(damaged, expected=1)
    second = chats.resume_or_create(key="k", user_id="ada")
    assert (second.new, second.data) == (True, {})
    [old] = [record for record in chats.find(user_id="ada") if record.id != second.id]
    assert (old.data, old.end_reason) == (b"\xff", "overwritten")


def test_going_on_by_a_key_costs_one_operation(clock: Clock) -> None:
    """The id is made of the name, so nothing is looked up."""
    store = CountingStore(open_store("memory://"))
    chats = SessionManager(store, namespace="chat", clock=clock)
    chats.resume_or_create(key="k", user_id="ada")
    store.operations.clear()
    chats.resume_or_create(key="k", user_id="ada")
    assert store.operations == {"get": 1}


def test_many_threads_get_one_session(chats: SessionManager) -> None:
    """However many ask for a name at once, one creates it and the others go on with that."""
    with ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda _: chats.resume_or_create(key="k", user_id="ada"), range(24)))
    assert len({session.id for session in got}) == 1
    assert sum(session.new for session in got) == 1


def _resume(url: str, barrier: Barrier, rounds: int, outcome: object) -> None:
    store = open_store(url)
    chats = chats_on(store)
    for number in range(rounds):
        barrier.wait()
        session = chats.resume_or_create(key=f"k{number}", user_id="ada")
        outcome.put((number, session.id, session.new))  # type: ignore[attr-defined]
    store.close()


def test_many_processes_get_one_session(shared_url: str) -> None:
    """The same holds among processes, for a name that is free and for one whose session has ended."""
    rounds, workers = 6, 4
    store = open_store(shared_url)
    chats = chats_on(store)
    for number in range(0, rounds, 2):
        chats.end(chats.create({"old": True}, key=f"k{number}", user_id="ada").id)
    barrier, outcome = PROCESSES.Barrier(workers), PROCESSES.Queue()
    started = [PROCESSES.Process(target=_resume, args=(shared_url, barrier, rounds, outcome)) for _ in range(workers)]
    for process in started:
        process.start()
    got = [outcome.get(timeout=60) for _ in range(rounds * workers)]
    for process in started:
        process.join()
    for number in range(rounds):
        mine = [(session_id, new) for round_, session_id, new in got if round_ == number]
        assert len({session_id for session_id, _ in mine}) == 1
        assert sum(new for _, new in mine) == 1
    assert len([record for record in chats.find(user_id="ada") if record.ended_at is not None]) == rounds // 2
    store.close()
