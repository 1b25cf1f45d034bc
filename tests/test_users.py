"""Users: sign-in that changes the token with and without code, caps, revocation, on every store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from cachelib import SimpleCache
from flask import Flask, session
from flask_login import LoginManager, UserMixin, current_user, login_user, logout_user

from flask_persist_session import (
    ConfigError,
    SerializationError,
    Session,
    SessionLimitReached,
    SessionManager,
    SessionQuery,
    SessionRecord,
    SessionStore,
    StoreUnavailable,
    open_store,
)
from flask_persist_session.stored import NOBODY, Owner
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.web import PROCESSES

MakeApp = Callable[..., Flask]


class User(UserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


def add_views(app: Flask) -> None:
    LoginManager(app).user_loader(User)

    @app.get("/login/<name>")
    def login(name: str) -> str:
        login_user(User(name))
        return ""

    @app.get("/logout")
    def logout() -> str:
        logout_user()
        return ""

    @app.get("/me")
    def me() -> str:
        return str(getattr(current_user, "id", None))

    @app.get("/set/<key>/<value>")
    def put(key: str, value: str) -> str:
        session[key] = value
        return ""

    @app.get("/pop/<key>")
    def pop(key: str) -> str:
        session.pop(key, None)
        return ""

    @app.get("/tutorial/<name>")
    def tutorial(name: str) -> str:
        session.clear()
        session["user_id"] = name
        return ""

    @app.get("/bind/<name>")
    def bind(name: str) -> str:
        session.bind(name, request_tenant())  # type: ignore[attr-defined]
        return ""

    @app.get("/unbind")
    def unbind() -> str:
        session.unbind()  # type: ignore[attr-defined]
        return ""

    @app.get("/info")
    def info() -> dict[str, Any]:
        names = ("id", "user_id", "tenant_id", "end_reason", "new")
        return {name: getattr(session, name) for name in names} | {"keys": sorted(session)}


def request_tenant() -> str | None:
    from flask import request

    return request.args.get("tenant")


@pytest.fixture
def app(make_app: MakeApp, store_url: str) -> Flask:
    app = make_app(store_url, PERSIST_SESSION_MAX_PER_USER=3)
    add_views(app)
    return app


def manager_of(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def token_of(client: Any) -> str:
    return str(client.get_cookie("session").value)


def with_token(app: Flask, token: str) -> Any:
    client = app.test_client()
    client.set_cookie("session", token)
    return client


# Binding --------------------------------------------------------------------------------------------------------------


def test_an_unchanged_flask_login_application_gets_a_new_token_at_sign_in(app: Flask) -> None:
    """Signing in and out each change the token, the data stays, and the old tokens open nothing."""
    client = app.test_client()
    client.get("/set/cart/apple")
    visitor = token_of(client)
    client.get("/login/Ada")
    member = token_of(client)
    info = client.get("/info").json
    assert (client.get("/me").text, info["user_id"], "cart" in info["keys"]) == ("Ada", "Ada", True)
    client.get("/logout")
    assert len({visitor, member, token_of(client)}) == 3
    assert client.get("/info").json["user_id"] is None
    for old in (visitor, member):
        assert with_token(app, old).get("/info").json["keys"] == []


def test_the_sessions_of_a_flask_login_user_are_listed(app: Flask) -> None:
    """What signed in without any code of ours is found under its user."""
    for _ in range(2):
        app.test_client().get("/login/Ada")
    app.test_client().get("/login/Bob")
    found = list(manager_of(app).store.find(SessionQuery(user_id="Ada", state="active", now=manager_of(app).clock())))
    assert [record.user_id for record in found] == ["Ada", "Ada"]


def test_a_key_of_the_application_binds_as_well(make_app: MakeApp) -> None:
    """``session["user_id"] = …`` signs in when ``USER_KEY`` names the key, also after ``session.clear()``."""
    app = make_app(PERSIST_SESSION_USER_KEY="user_id")
    add_views(app)
    client = app.test_client()
    client.get("/set/cart/apple")
    before = token_of(client)
    client.get("/set/user_id/7")
    assert (client.get("/info").json["user_id"], token_of(client) != before) == ("7", True)
    client.get("/tutorial/8")
    assert client.get("/info").json["user_id"] == "8"
    client.get("/pop/user_id")
    assert client.get("/info").json["new"] is True


def test_without_a_user_key_only_bind_signs_in(make_app: MakeApp) -> None:
    """With ``USER_KEY = None`` the data says nothing about the user."""
    app = make_app(PERSIST_SESSION_USER_KEY=None)
    add_views(app)
    client = app.test_client()
    client.get("/login/Ada")
    assert client.get("/info").json["user_id"] is None


def test_bind_and_unbind(app: Flask) -> None:
    """``session.bind`` gives the session a user and tenant under a new token, ``unbind`` takes them away."""
    client = app.test_client()
    client.get("/set/cart/apple")
    tokens = [token_of(client)]
    client.get("/bind/7?tenant=acme")
    tokens.append(token_of(client))
    info = client.get("/info").json
    assert (info["user_id"], info["tenant_id"], info["keys"]) == ("7", "acme", ["cart"])
    client.get("/bind/7?tenant=acme")
    tokens.append(token_of(client))
    client.get("/unbind")
    tokens.append(token_of(client))
    info = client.get("/info").json
    assert (info["user_id"], info["tenant_id"], info["keys"]) == (None, None, ["cart"])
    assert len(set(tokens)) == 4
    assert all(with_token(app, old).get("/info").json["keys"] == [] for old in tokens[:-1])


def test_a_bound_session_stays_bound(app: Flask) -> None:
    """Later requests that do not touch the user leave the session as it is, with its token."""
    client = app.test_client()
    client.get("/bind/7")
    token = token_of(client)
    client.get("/set/a/1")
    assert (client.get("/info").json["user_id"], token_of(client)) == ("7", token)


def test_bind_without_data_stores_a_session(app: Flask) -> None:
    """Signing in a visitor who has no session yet makes one."""
    client = app.test_client()
    client.get("/bind/Ada")
    assert client.get("/info").json["user_id"] == "Ada"


def test_bind_needs_a_user(app: Flask) -> None:
    """``bind(None)`` is a mistake and says what to call instead."""
    with app.test_request_context(), pytest.raises(ValueError, match=r"unbind\(\)"):
        session.bind(None)  # type: ignore[attr-defined]


def test_signing_in_starts_the_absolute_timeout_anew(store: SessionStore, clock: Clock) -> None:
    """The timeout counts from sign-in, not from the visitor's first request."""
    manager = SessionManager(store, clock=clock, absolute_timeout=100)
    visitor = manager.create({"a": 1})
    clock.advance(99)
    member = manager.bind(visitor, Owner("Ada"))
    assert member is not None
    clock.advance(99)
    assert manager.get(member.id) is not None


def test_a_slow_request_does_not_sign_in_a_session_that_has_ended(store: SessionStore) -> None:
    """Binding a session that was ended meanwhile leaves nothing behind."""
    manager = SessionManager(store)
    visitor = manager.create({"a": 1})
    manager.end(visitor.id)
    assert manager.bind(visitor, Owner("Ada")) is None
    assert manager.store.count(SessionQuery(user_id="Ada")) == 0


# Every way to put a user into the session ------------------------------------------------------------------------------


Act = Callable[[Session], object]


class Desk:
    """One browser of an application that keeps its user under ``user_id``; the test says what each request does."""

    def __init__(self, app: Flask) -> None:
        self.app, self._acts = app, list[Act]()
        app.add_url_rule("/", view_func=self._view)
        self.client = app.test_client()

    def _view(self) -> str:
        self._acts.pop()(session._get_current_object())  # type: ignore[attr-defined]
        return ""

    def visit(self, act: Act, client: Any = None) -> None:
        self._acts.append(act)
        assert (client or self.client).get("/").status_code == 200

    def fails(self, act: Act) -> None:
        self._acts.append(act)
        self.client.get("/")

    def token(self) -> str:
        return token_of(self.client)

    def seen(self, client: Any = None) -> dict[str, Any]:
        """What the next request finds: the data, and whose session it is."""
        found: dict[str, Any] = {}
        self.visit(lambda session: found.update(session, whose=(session.user_id, session.tenant_id)), client)
        return found


@pytest.fixture
def desk(make_app: MakeApp) -> Desk:
    return Desk(make_app(PERSIST_SESSION_USER_KEY="user_id", PERSIST_SESSION_MAX_PER_USER=2))


def visitor(session: Session) -> None:
    session["cart"] = ["apple"]


def member(session: Session) -> None:
    session.update(user_id="Ada", cart=["apple"])


def tenants_member(session: Session) -> None:
    session.bind("Ada", "acme")


def one_after_another(*acts: Act) -> Act:
    return lambda session: [act(session) for act in acts]


def put(user: object) -> Act:
    return lambda session: session.update(user_id=user)


def put_in_place(session: Session) -> None:
    session |= {"user_id": "Bob"}


def pop(session: Session) -> None:
    session.pop("user_id")


def save(session: Session) -> None:
    session.save()


@pytest.mark.parametrize(
    ("before", "act", "whose"),
    [
        (visitor, put("Bob"), "Bob"),
        (visitor, lambda session: session.setdefault("user_id", "Bob"), "Bob"),
        (visitor, put_in_place, "Bob"),
        (visitor, one_after_another(put("Cy"), put("Bob")), "Bob"),
        (visitor, one_after_another(put("Cy"), pop, put("Bob")), "Bob"),
        (visitor, one_after_another(put("Cy"), save, put("Bob")), "Bob"),
        (visitor, one_after_another(put("Bob"), save, pop), None),
        (visitor, one_after_another(Session.clear, put("Bob")), "Bob"),
        (visitor, one_after_another(put("Bob"), Session.regenerate), "Bob"),
        (member, put("Bob"), "Bob"),
        (member, put_in_place, "Bob"),
        (member, one_after_another(Session.clear, put("Bob")), "Bob"),
        (member, one_after_another(Session.clear, put("Ada")), "Ada"),
        (member, one_after_another(Session.flush, visitor), None),
        (member, pop, None),
        (member, lambda session: session.__delitem__("user_id"), None),
        (member, put(None), None),
        (member, put(""), None),
        (member, lambda session: [session.popitem() for _ in range(2)] and visitor(session), None),
        (tenants_member, put("Bob"), "Bob"),
        (tenants_member, Session.unbind, None),
    ],
)
def test_every_change_of_the_user_is_noticed(desk: Desk, before: Act, act: Act, whose: str | None) -> None:
    """However the user gets in, goes or becomes another, the session is that user's or nobody's, under a new token."""
    desk.visit(before)
    old = desk.token()
    desk.visit(act)
    new = desk.token()
    assert new != old
    assert desk.seen()["whose"] == (whose, None)
    desk.client.set_cookie("session", old)
    assert desk.seen() == {"whose": (None, None)}


@pytest.mark.parametrize(
    ("before", "act", "whose"),
    [
        (visitor, one_after_another(put("Ada"), pop), None),
        (visitor, put(None), None),
        (visitor, put(""), None),
        (visitor, lambda session: session["cart"].append("pear"), None),
        (visitor, lambda session: session.update(user={"user_id": "Bob"}), None),
        (member, one_after_another(pop, put("Ada")), "Ada"),
        (member, put("Ada"), "Ada"),
        (member, lambda session: session.setdefault("user_id", "Bob"), "Ada"),
        (put("7"), put(7), "7"),
    ],
)
def test_no_change_of_the_user_is_none(desk: Desk, before: Act, act: Act, whose: str | None) -> None:
    """Whoever is there after the request as before keeps the token, whatever was tried in between."""
    desk.visit(before)
    token = desk.token()
    desk.visit(act)
    assert (desk.seen()["whose"], desk.token()) == ((whose, None), token)


def test_the_test_client_signs_in(desk: Desk) -> None:
    """A ``session_transaction`` of a test signs in and out like a request."""
    with desk.client.session_transaction() as planted:
        planted["user_id"] = "Ada"
    tokens = [desk.token()]
    assert desk.seen()["whose"] == ("Ada", None)
    with desk.client.session_transaction() as planted:
        planted["user_id"] = "Bob"
    tokens.append(desk.token())
    assert desk.seen()["whose"] == ("Bob", None)
    with desk.client.session_transaction() as planted:
        planted.pop("user_id")
        planted["cart"] = ["apple"]
    assert desk.seen()["whose"] == (None, None)
    assert len({*tokens, desk.token()}) == 3


def test_what_the_application_binds_counts_more_than_the_key(desk: Desk) -> None:
    """``bind`` wins over the key of the same request, and later requests leave it so."""
    desk.visit(one_after_another(put("Ada"), lambda session: session.bind(7, "acme")))
    assert desk.seen() == {"user_id": "Ada", "whose": ("7", "acme")}
    desk.visit(visitor)
    assert desk.seen()["whose"] == ("7", "acme")


def test_visitors_with_an_empty_user_are_not_one_user(desk: Desk) -> None:
    """The cap does not count sessions whose user is an empty text: nobody is evicted."""
    browsers = [desk.app.test_client() for _ in range(4)]
    for browser in browsers:
        desk.visit(put(""), browser)
    assert [desk.seen(browser) for browser in browsers] == [{"user_id": "", "whose": (None, None)}] * 4


@pytest.mark.parametrize("wrong", [True, False, 7.5, b"7", ["Ada"], ("Ada",), {"id": 7}, {7}])
def test_what_is_no_id_signs_nobody_in(desk: Desk, wrong: object) -> None:
    """A truth value is the same for all users, and a list or dict changes with what is in it: an error names the key."""
    desk.visit(visitor)
    token = desk.token()
    with pytest.raises(SerializationError, match=r"session\['user_id'\].*PERSIST_SESSION_USER_KEY.* is no id"):
        desk.fails(put(wrong))
    assert (desk.seen(), desk.token()) == ({"cart": ["apple"], "whose": (None, None)}, token)
    with pytest.raises(ValueError, match="is no id"):
        desk.fails(lambda session: session.bind(wrong))
    assert manager_of(desk.app).stats().active == 1


def test_signing_out_is_not_taken_back_by_modified(desk: Desk) -> None:
    """``modified = False`` after ``unbind()`` does not keep the user signed in."""

    def sign_out(session: Session) -> None:
        session.unbind()
        session.modified = False

    desk.visit(tenants_member)
    desk.visit(sign_out)
    assert desk.seen()["whose"] == (None, None)


# Caps -----------------------------------------------------------------------------------------------------------------


def test_a_sign_in_beyond_the_cap_ends_the_oldest(app: Flask) -> None:
    """The newest three stay; the evicted browser reads why in its next request, and can sign in again."""
    clients = [app.test_client() for _ in range(4)]
    for client in clients:
        client.get("/login/Ada")
    assert [client.get("/me").text for client in clients] == ["None", "Ada", "Ada", "Ada"]
    assert clients[0].get("/info").json["end_reason"] == "evicted"
    clients[0].get("/login/Ada")
    assert [client.get("/me").text for client in clients] == ["Ada", "None", "Ada", "Ada"]


def test_signing_in_again_in_the_same_browser_evicts_nobody(app: Flask) -> None:
    """The session that is signed in anew does not count against itself."""
    clients = [app.test_client() for _ in range(3)]
    for client in clients:
        client.get("/bind/Ada")
    for _ in range(5):
        clients[1].get("/bind/Ada")
    assert [client.get("/info").json["user_id"] for client in clients] == ["Ada"] * 3


def test_the_cap_is_per_user_and_tenant(app: Flask) -> None:
    """Another user, and the same one within another tenant, have caps of their own."""
    first = app.test_client()
    first.get("/bind/Ada")
    for other in ("/bind/Bob", "/bind/Ada?tenant=acme"):
        for _ in range(4):
            app.test_client().get(other)
    assert first.get("/info").json["user_id"] == "Ada"


def test_a_refused_sign_in_is_a_409(make_app: MakeApp, store_url: str) -> None:
    """With the policy ``reject`` a sign-in beyond the cap answers 409 and leaves everything as it was."""
    app = make_app(store_url, PERSIST_SESSION_MAX_PER_USER=1, PERSIST_SESSION_CAP_POLICY="reject")
    add_views(app)
    first, second = app.test_client(), app.test_client()
    first.get("/login/Ada")
    second.get("/set/cart/apple")
    for path in ("/login/Ada", "/bind/Ada"):
        response = second.get(path)
        assert (response.status_code, response.headers.getlist("Set-Cookie")) == (409, [])
    assert second.get("/info").json["keys"] == ["cart"]
    assert first.get("/me").text == "Ada"
    first.get("/bind/Ada")
    assert first.get("/info").json["user_id"] == "Ada"
    first.get("/logout")
    assert second.get("/login/Ada").status_code == 200


def test_the_operations_of_a_sign_in(make_app: MakeApp, store_url: str) -> None:
    """With a cap of 10 a sign-in costs four operations: get, two saves, one look at the user's sessions."""
    counting = CountingStore(open_store(store_url))
    app = make_app(counting, PERSIST_SESSION_MAX_PER_USER=10)
    add_views(app)
    client = app.test_client()
    client.get("/set/a/1")
    counting.operations.clear()
    client.get("/login/Ada")
    assert counting.operations == {"get": 1, "save": 2, "find": 1}


def test_the_operations_of_a_sign_in_that_evicts(make_app: MakeApp, store_url: str) -> None:
    """The session that has to go is ended as it was listed: that costs one save more."""
    counting = CountingStore(open_store(store_url))
    app = make_app(counting, PERSIST_SESSION_MAX_PER_USER=2)
    add_views(app)
    for _ in range(3):
        client = app.test_client()
        client.get("/set/a/1")
        counting.operations.clear()
        client.get("/login/Ada")
    assert counting.operations == {"get": 1, "save": 3, "find": 1}


def sign_in(url: str, policy: Any, start: Any, outcome: Any) -> None:
    """Twenty sign-ins of one user at once, in threads of this process."""
    store = open_store(url)
    manager = SessionManager(store, max_per_user=5, cap_policy=policy)
    together = threading.Barrier(20)
    start.wait()

    def once() -> None:
        together.wait()
        with suppress(SessionLimitReached):
            manager.create({"a": 1}, user_id="Ada")

    with ThreadPoolExecutor(20) as pool:
        for done in [pool.submit(once) for _ in range(20)]:
            done.result()
    store.close()
    outcome.put("done")


@pytest.mark.parametrize("policy", ["evict_oldest", "reject"])
def test_parallel_sign_ins_leave_exactly_the_cap(shared_url: str, policy: Any) -> None:
    """Three processes times twenty sign-ins of one user at once leave exactly as many sessions as are allowed."""
    start, outcome = PROCESSES.Barrier(3), PROCESSES.Queue()
    processes = [PROCESSES.Process(target=sign_in, args=(shared_url, policy, start, outcome)) for _ in range(3)]
    try:
        for process in processes:
            process.start()
        assert [outcome.get(timeout=60) for _ in processes] == ["done"] * 3
    finally:
        for process in processes:
            process.kill()
            process.join()
    store = open_store(shared_url)
    assert store.count(SessionQuery(user_id="Ada", state="active", now=SessionManager(store).clock())) == 5
    store.close()


# Revoking -------------------------------------------------------------------------------------------------------------


def test_a_revoked_session_says_so(app: Flask) -> None:
    """Its next request reads the reason, and what it then puts in starts a new session."""
    client = app.test_client()
    client.get("/login/Ada")
    assert manager_of(app).revoke(client.get("/info").json["id"]) is True
    assert client.get("/info").json["end_reason"] == "revoked"
    client.get("/set/a/1")
    assert client.get("/info").json["keys"] == ["a"]


def test_signing_out_everywhere_else(app: Flask) -> None:
    """``revoke_user`` ends all sessions of a user but one, and nobody else's."""
    here, there, bob = (app.test_client() for _ in range(3))
    here.get("/login/Ada")
    there.get("/login/Ada")
    bob.get("/login/Bob")
    assert manager_of(app).revoke_user("Ada", except_id=here.get("/info").json["id"]) == 1
    assert [client.get("/me").text for client in (here, there, bob)] == ["Ada", "None", "Bob"]
    assert manager_of(app).revoke_user("Ada") == 1
    assert here.get("/me").text == "None"


def test_revoking_within_a_tenant(store: SessionStore) -> None:
    """With a tenant, only its sessions of the user are ended."""
    manager = SessionManager(store)
    ids = {tenant: manager.create(user_id=7, tenant_id=tenant).id for tenant in ("a", "b")}  # type: ignore[arg-type]
    assert manager.revoke_user("7", "a") == 1
    assert manager.get(ids["a"]) is None
    assert manager.get(ids["b"]) is not None


@pytest.mark.parametrize("wrong", [None, "", True, ["Ada"]])
def test_revoking_nobody_is_a_mistake(store: SessionStore, wrong: object) -> None:
    """What names no user ends nothing, and above all not the sessions of everybody."""
    manager = SessionManager(store)
    manager.create(user_id="Ada")
    manager.create()
    with pytest.raises(ValueError, match="user"):
        manager.revoke_user(wrong)
    assert manager.stats().active == 2


def test_nobody_is_one() -> None:
    """An owner of no user is nobody, whatever the tenant."""
    assert Owner.of(None, "acme") is NOBODY


@pytest.mark.parametrize(
    ("setting", "value"),
    [("USER_KEY", ""), ("USER_KEY", 7), ("MAX_PER_USER", -1), ("MAX_PER_USER", True), ("CAP_POLICY", "newest")],
)
def test_wrong_settings_are_named(make_app: MakeApp, setting: str, value: object) -> None:
    """A wrong setting raises with its key, its value and what is allowed."""
    with pytest.raises(ConfigError, match=f"PERSIST_SESSION_{setting} is {value!r}; allowed is"):
        make_app(**{f"PERSIST_SESSION_{setting}": value})


def test_revoking_a_user_reaches_a_session_that_is_just_moving(store: SessionStore) -> None:
    """A session that gets a new token between being listed and being ended is ended under its new id."""
    manager = SessionManager(store)
    created = manager.create({"a": 1}, user_id="Ada")
    find = store.find

    def find_and_move(query: SessionQuery) -> Iterator[SessionRecord]:
        found = list(find(query))
        store.find = find  # type: ignore[method-assign]
        manager.regenerate(created)
        return iter(found)

    store.find = find_and_move  # type: ignore[method-assign]
    assert manager.revoke_user("Ada") == 1
    assert list(manager.find(user_id="Ada", state="active")) == []


@pytest.mark.parametrize("setting", ["PERSIST_SESSION_MAX_PER_USER", "PERSIST_SESSION_MAX_SESSIONS"])
def test_a_cap_needs_a_store_that_can_list(make_app: MakeApp, setting: str) -> None:
    """A cap on a store that cannot list its sessions is refused at the start, naming the setting and the reason."""
    with pytest.raises(ConfigError, match=f"{setting} needs a store that can list its sessions: .*cachelib"):
        make_app(SimpleCache(), **{setting: 2})


def test_a_store_that_fails_at_the_limit_signs_nobody_out(store: SessionStore) -> None:
    """The new session is there already when the others are listed: the sign-in stands, and the next one limits."""
    manager = SessionManager(store, max_per_user=1)
    manager.create({"a": 1}, user_id="Ada")
    visitor, find = manager.create({"a": 2}), store.find

    def fail(query: SessionQuery) -> Iterator[SessionRecord]:
        store.find = find  # type: ignore[method-assign]
        raise StoreUnavailable("gone for a moment")

    store.find = fail  # type: ignore[method-assign]
    bound = manager.bind(visitor, Owner("Ada"))
    assert bound is not None
    assert manager.get(bound.id) is not None
    last = manager.create({"a": 3}, user_id="Ada")
    assert [record.id for record in manager.find(user_id="Ada", state="active")] == [last.id]
