"""A manager that is bound to a tenant reads, lists, counts and changes nothing of another, whatever it is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from flask_persist_session import (
    Change,
    Deletion,
    PersistSessionError,
    SerializationError,
    SessionConflict,
    SessionManager,
    SessionNotFound,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoredSession,
    UnsupportedByStore,
)
from flask_persist_session.stored import Owner
from flask_persist_session.stores.tenant import TenantStore
from tests.conftest import Clock


@pytest.fixture
def chats(store: SessionStore, clock: Clock) -> Iterator[SessionManager]:
    yield SessionManager(store.namespace("chat"), namespace="chat", keep_data=True, clock=clock)
    store.close()


@pytest.fixture
def acme(chats: SessionManager) -> SessionManager:
    return chats.for_tenant("acme")


@pytest.fixture(params=["other", None])
def theirs(request: pytest.FixtureRequest, chats: SessionManager) -> StoredSession:
    """A session of another tenant, or of none, with a history; its user has the same id as one of ours."""
    session = chats.create({"a": 1}, user_id="ada", tenant_id=request.param, metadata={"title": "Trip"}, tags=["x"])
    chats.history(session.id).append({"role": "user", "content": "secret"})
    return session


def test_what_is_created_is_within_the_tenant(acme: SessionManager) -> None:
    """Nobody need say so each time."""
    assert acme.create(user_id="ada").tenant_id == "acme"
    assert acme.create().tenant_id == "acme"
    assert acme.resume_or_create(key="k", user_id="ada").tenant_id == "acme"


def test_a_key_whose_session_cannot_be_read_is_free_again(chats: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose a damaged record was cannot be known any more, but the key is this tenant's: it leads to a new session."""
    acme = chats.for_tenant("acme")
    damaged = acme.create(user_id="ada", key="k").id
    get, removed = type(chats.store).get, list[str]()

    def get_damaged(store: SessionStore, session_id: str) -> SessionRecord | None:
        if session_id == damaged and store is chats.store and get(store, session_id) and not removed:
            raise SerializationError("the record is damaged")
        return get(store, session_id)

    def delete(session_id: str, **options: int) -> bool:
        removed.append(session_id)
        return original(session_id, **options)

    original = chats.store.delete
    monkeypatch.setattr(chats.store, "delete", delete)
    monkeypatch.setattr(type(chats.store), "get", get_damaged)
    assert acme.resume_or_create(key="k", user_id="ada").new
    assert removed == [damaged]


def test_another_tenant_cannot_be_named(acme: SessionManager) -> None:
    """Whoever names another one has mistaken the manager."""
    for use in (acme.create, acme.resume_or_create):
        with pytest.raises(ValueError, match="'acme', and knows no 'other'"):
            use(user_id="ada", tenant_id="other")
    with pytest.raises(ValueError, match="knows no 'other'"):
        acme.for_tenant("other")


def test_its_own_tenant_may_be_named(acme: SessionManager) -> None:
    """As text or not."""
    mine = acme.create(user_id="ada", tenant_id="acme")
    assert acme.for_tenant("acme").resume(mine.id, user_id="ada", tenant_id="acme").id == mine.id


@pytest.mark.parametrize("tenant", [None, "", 1.5])
def test_a_tenant_must_be_one(chats: SessionManager, tenant: object) -> None:
    """None would match the sessions of all."""
    with pytest.raises(ValueError, match="tenant"):
        chats.for_tenant(tenant)


def test_the_sessions_of_a_tenant_are_those_of_the_namespace(chats: SessionManager, acme: SessionManager) -> None:
    """Both managers work on the same records."""
    mine = acme.create({"a": 1}, user_id="ada")
    with acme.edit(mine.id) as session:
        session.data["a"] = 2
    assert acme.history(mine.id).append({"role": "user", "content": "hello"}) == 1
    assert chats.existing(mine.id).data == {"a": 2}
    assert [record.id for record in acme.find(user_id="ada", active=True)] == [mine.id]
    assert (acme.stats().total, acme.store.count(SessionQuery())) == (1, 1)
    assert acme.end(mine.id)


def test_it_sees_nothing_of_others(acme: SessionManager, theirs: StoredSession) -> None:
    """However it looks: by id, by beginning, in lists, counts, figures, histories."""
    assert acme.get(theirs.id) is None
    assert acme.load(theirs.id) is None
    assert acme.probe(theirs.id) == (False, None)
    for given in (theirs.id, theirs.id[:12]):
        with pytest.raises(SessionNotFound):
            acme.look_up(given)
    for query in (SessionQuery(), SessionQuery(user_id="ada"), SessionQuery(ids=frozenset([theirs.id]))):
        assert list(acme.store.find(query)) == []
        assert acme.store.count(query) == 0
    for tenant in (None, "other", "acme"):
        assert list(acme.find(tenant_id=tenant, user_id="ada")) == []
    assert list(acme.store.scan()) == list(acme.store.snapshot()) == []
    assert acme.stats().total == 0
    history = acme.history(theirs.id)
    assert (history.latest(), history.count(), list(history), history.search("secret")) == ([], 0, [], [])


def _transact(acme: SessionManager, theirs: StoredSession) -> None:
    with acme.transaction() as together:
        together.end(theirs.id)


def _edit(acme: SessionManager, theirs: StoredSession) -> None:
    with acme.edit(theirs.id) as session:
        session.data["a"] = 2


ATTEMPTS: dict[str, Callable[[SessionManager, StoredSession], object]] = {
    "end": lambda acme, theirs: acme.end(theirs.id),
    "revoke": lambda acme, theirs: acme.revoke(theirs.id),
    "revoke user": lambda acme, theirs: acme.revoke_user("ada"),
    "revoke user of the tenant": lambda acme, theirs: acme.revoke_user("ada", theirs.tenant_id),
    "revoke others": lambda acme, theirs: acme.revoke_others(theirs),
    "revoke all": lambda acme, theirs: acme.revoke_all(),
    "delete": lambda acme, theirs: acme.delete(theirs.id),
    "end many": lambda acme, theirs: acme.end_many([theirs.id]),
    "update many": lambda acme, theirs: acme.update_many(SessionQuery(), data={"a": 2}, add_tags=["y"]),
    "edit": _edit,
    "extend": lambda acme, theirs: acme.extend(theirs.id, 60),
    "refresh": lambda acme, theirs: acme.refresh(theirs.id),
    "resume": lambda acme, theirs: acme.resume(theirs.id, user_id="ada"),
    "cleanup": lambda acme, theirs: acme.cleanup(older_than=0),
    "save": lambda acme, theirs: acme.save(replace(theirs, data={"a": 2})),
    "save as ours": lambda acme, theirs: acme.save(
        replace(theirs, record=replace(theirs.record, tenant_id="acme"), data={"a": 2})
    ),
    "renew": lambda acme, theirs: acme.renew(theirs, metadata={"b": 1}),
    "flush": lambda acme, theirs: acme.flush(theirs),
    "bind": lambda acme, theirs: acme.bind(theirs, Owner("eve", "acme")),
    "regenerate": lambda acme, theirs: acme.regenerate(theirs),
    "transaction": _transact,
    "append": lambda acme, theirs: acme.history(theirs.id).append({"role": "user", "content": "x"}),
    "clear": lambda acme, theirs: acme.history(theirs.id).clear(),
    "history of the store": lambda acme, theirs: acme.store.history.append(theirs.id, [b"x"], created_at=1.0),
    "restore a history": lambda acme, theirs: acme.store.history.restore(theirs.id, []),
    "delete a history": lambda acme, theirs: acme.store.history.delete(theirs.id),
    "delete of the store": lambda acme, theirs: acme.store.delete(theirs.id),
    "delete many": lambda acme, theirs: acme.store.delete_many([Deletion(id=theirs.id)]),
    "save many": lambda acme, theirs: acme.store.save_many(
        [Change(record=replace(theirs.record, tenant_id="acme", version=2), expected=1)]
    ),
    "transaction of the store": lambda acme, theirs: acme.store.transaction([Deletion(id=theirs.id)]),
    "check": lambda acme, theirs: list(acme.store.check(repair=True)),
    "note": lambda acme, theirs: acme.store.note("cleanup", 1.0),
}


def test_it_changes_nothing_of_others(chats: SessionManager, acme: SessionManager, theirs: StoredSession) -> None:
    """Whatever is tried comes to nothing or is refused, and their session is as it was."""
    before, said = chats.look_up(theirs.id), list(chats.history(theirs.id))
    for name, attempt in ATTEMPTS.items():
        with contextlib.suppress(PersistSessionError, ValueError):
            attempt(acme, theirs)
        assert chats.look_up(theirs.id) == before, name
        assert list(chats.history(theirs.id)) == said, name
        assert [record.id for record in chats.find()] == [theirs.id], name


def test_the_same_key_is_another_session_in_each_tenant(chats: SessionManager) -> None:
    """Tenants may have users of the same id and call things by the same name."""
    made = [chats.for_tenant(tenant).resume_or_create(key="k", user_id="ada") for tenant in ("acme", "other")]
    assert made[0].id != made[1].id
    assert [chats.for_tenant("acme").get(session.id) is not None for session in made] == [True, False]


def test_an_entry_that_comes_late_is_not_in_the_next_session_of_a_key(acme: SessionManager) -> None:
    """A history that is told when its session began writes to no later one, through a tenant as well."""
    first = acme.resume_or_create(key="k", user_id="ada")
    acme.end(first.id)
    later, log = acme.resume_or_create(key="k", user_id="ada"), acme.store.history
    assert log.append(later.id, [b"new"], created_at=1.0, began=later.created_at) == 1
    with pytest.raises(SessionNotFound):
        log.append(first.id, [b"late"], created_at=1.0, began=first.created_at)
    assert log.delete(first.id, began=first.created_at) is False
    assert log.delete(later.id, began=later.created_at) is True


def test_a_cap_counts_within_a_tenant(store: SessionStore, clock: Clock) -> None:
    """A user of the same id elsewhere takes nobody's place."""
    chats = SessionManager(store, namespace="chat", clock=clock, max_per_user=1)
    acme, other = chats.for_tenant("acme"), chats.for_tenant("other")
    first, elsewhere = acme.create(user_id="ada"), other.create(user_id="ada")
    clock.advance(1)
    second = acme.create(user_id="ada")
    assert [chats.get(session.id) is not None for session in (first, elsewhere, second)] == [False, True, True]


def test_a_cleanup_of_a_tenant_does_not_count_as_one_of_the_store(chats: SessionManager, acme: SessionManager) -> None:
    """Who watches when all was cleaned up last is not misled."""
    acme.cleanup()
    assert chats.store.noted("cleanup") is None


def test_it_has_the_clock_of_its_manager(chats: SessionManager, acme: SessionManager, clock: Clock) -> None:
    """Both agree on what has expired."""
    mine = acme.create(lifetime=60)
    clock.advance(500)
    assert acme.get(mine.id) is None is chats.get(mine.id)


def test_what_concerns_the_whole_store_is_not_to_be_had(acme: SessionManager) -> None:
    """Leases, notes and checks are not those of one tenant."""
    for use in (lambda: acme.store.lease("sweep", 60), lambda: acme.store.noted("cleanup")):
        with pytest.raises(UnsupportedByStore):
            use()


def test_a_record_of_another_tenant_cannot_be_created(acme: SessionManager, chats: SessionManager) -> None:
    """The store behind it refuses what the manager would never ask."""
    record = replace(chats.create(tenant_id="other").record, id="000" + "0" * 64)
    with pytest.raises(ValueError, match="acme"):
        acme.store.save(record, expected=0)
    assert chats.store.get(record.id) is None


def test_a_record_cannot_be_overwritten_as_if_it_were_ours(acme: SessionManager, theirs: StoredSession) -> None:
    """What counts is whose the stored one is, not whose the new one says it is."""
    forged = replace(theirs.record, tenant_id="acme", version=2)
    with pytest.raises(SessionConflict):
        acme.store.save(forged, expected=1)


def test_other_namespaces_of_a_tenant_are_bound_to_it_too(chats: SessionManager) -> None:
    """The store of another namespace keeps the bound."""
    bound = TenantStore(chats.store, "acme").namespace("jobs")
    assert isinstance(bound, TenantStore)
