"""Namespaces: sessions of the application's own, without a cookie, beside those of ``flask.session``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cachelib import SimpleCache
from flask import Flask, session

from flask_persist_session import (
    ConfigError,
    PersistSession,
    SessionLimitReached,
    SessionManager,
    SessionNotFound,
    SessionStore,
    SessionTooLarge,
    UnsupportedByStore,
    open_store,
    session_created,
)
from flask_persist_session.interface import secret_keys
from flask_persist_session.stored import Owner
from flask_persist_session.sweeper import Sweeper
from flask_persist_session.tokens import TokenSigner
from tests.conftest import Clock

MakeApp = Callable[..., Flask]


@pytest.fixture
def app(make_app: MakeApp, store_url: str) -> Flask:
    return make_app(store_url)


def test_a_namespace_is_set_up_once_and_had_by_its_name(app: Flask) -> None:
    """The first call decides; later ones need the name alone."""
    sessions = PersistSession()
    chats = sessions.namespace("chat", app=app, idle_timeout="30m")
    with app.app_context():
        assert sessions.namespace("chat") is chats
        assert sessions.managers == {"web": sessions.manager, "chat": chats}


def test_sessions_of_a_namespace_are_not_among_those_of_the_cookie(app: Flask) -> None:
    """Each namespace has its own records."""
    sessions = PersistSession()
    with app.app_context():
        chats = sessions.namespace("chat")
        made = chats.create({"step": 1}, user_id=7)
        assert chats.get(made.id) is not None
        assert sessions.manager.get(made.id) is None
        assert list(sessions.manager.find()) == []


def test_an_extension_made_with_its_application_needs_no_context(tmp_path: Path) -> None:
    """Scripts and workers make a namespace where they make the application."""
    app = Flask("tested", instance_path=str(tmp_path))
    app.config.update(SECRET_KEY="a secret for tests", PERSIST_SESSION_STORE="memory://")
    chats = PersistSession(app).namespace("chat")
    assert chats.create({"a": 1}).data == {"a": 1}


def test_without_an_application_there_is_no_namespace() -> None:
    """Outside of a context nobody knows whose it would be."""
    with pytest.raises(RuntimeError, match="application context"):
        PersistSession().namespace("chat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"idle_timeout": "soon"}, "idle_timeout of the namespace 'chat'"),
        ({"max_per_user": -1}, "max_per_user of the namespace 'chat'"),
        ({"cap_policy": "ask"}, "cap_policy of the namespace 'chat'"),
        ({"max_entries": 1.5}, "max_entries of the namespace 'chat'"),
    ],
)
def test_a_wrong_option_is_named(make_app: MakeApp, options: dict[str, object], message: str) -> None:
    """The error names the option, the namespace and what is allowed, and nothing is set up."""
    app = make_app()
    with app.app_context():
        with pytest.raises(ConfigError, match=message):
            PersistSession().namespace("chat", **options)  # type: ignore[arg-type]
        assert set(PersistSession().managers) == {"web"}


def test_a_namespace_is_not_set_up_twice_with_other_options(make_app: MakeApp) -> None:
    """Two parts of an application that disagree are told."""
    with make_app().app_context():
        PersistSession().namespace("chat", max_per_user=3)
        with pytest.raises(ConfigError, match="max_per_user"):
            PersistSession().namespace("chat", max_per_user=4)
        assert PersistSession().namespace("chat", max_per_user=3) is PersistSession().namespace("chat")


@pytest.mark.parametrize("name", ["", "Chat", "a-b", "a" * 41, "../web"])
def test_a_wrong_name_is_told(make_app: MakeApp, name: str) -> None:
    """A name becomes part of paths, tables and keys."""
    with make_app().app_context():
        with pytest.raises(ConfigError, match="namespace"):
            PersistSession().namespace(name)
        assert set(PersistSession().managers) == {"web"}


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        ({"max_sessions": 1}, SessionLimitReached),
        ({"max_per_user": 1, "cap_policy": "reject"}, SessionLimitReached),
        ({"max_bytes": 200}, SessionTooLarge),
    ],
    ids=str,
)
def test_a_limit_of_a_namespace_is_its_own(make_app: MakeApp, limit: dict[str, Any], error: type[Exception]) -> None:
    """What exceeds it is told by its name, and the sessions of the cookie have others."""
    sessions = PersistSession()
    with make_app().app_context():
        chats = sessions.namespace("chat", **limit)
        chats.create(user_id="ada")
        with pytest.raises(error, match=f"{next(iter(limit))} of the namespace 'chat'"):
            chats.create({"a": "x" * 300}, user_id="ada")
        for _ in range(2):
            sessions.manager.create({"a": "x" * 300}, user_id="ada")


def test_metadata_beyond_the_limit_of_a_namespace_name_it(make_app: MakeApp) -> None:
    """Metadata have the limit of the data, by the name that it has where it is set."""
    with make_app().app_context():
        chats = PersistSession().namespace("chat", max_bytes=200)
        with pytest.raises(SessionTooLarge, match="max_bytes of the namespace 'chat' allows 200"):
            chats.create(metadata={"title": "x" * 300})


def test_the_namespace_of_the_cookie_takes_no_options(make_app: MakeApp) -> None:
    """Its options are the settings."""
    with make_app().app_context():
        assert PersistSession().namespace("web") is PersistSession().manager
        with pytest.raises(ConfigError, match="settings"):
            PersistSession().namespace("web", max_per_user=1)


def test_a_namespace_has_a_cap_of_its_own(make_app: MakeApp, store_url: str) -> None:
    """Sessions of the cookie and chats are counted apart."""
    app = make_app(store_url, PERSIST_SESSION_MAX_PER_USER=1)
    with app.app_context():
        chats = PersistSession().namespace("chat", max_per_user=2)
        PersistSession().manager.create(user_id="ada")
        made = [chats.create(user_id="ada") for _ in range(3)]
        assert sum(chats.get(chat.id) is not None for chat in made) == 2
        assert PersistSession().manager.stats().active == 1


def test_a_cap_needs_a_store_that_can_list(make_app: MakeApp) -> None:
    """A limit that nobody could hold is refused at once."""
    with make_app(SimpleCache()).app_context():
        with pytest.raises(ConfigError, match="max_per_user of the namespace 'chat'"):
            PersistSession().namespace("chat", max_per_user=2)
        PersistSession().namespace("chat")  # without a limit it can be


def test_a_namespace_has_its_own_timeout(make_app: MakeApp, clock: Clock) -> None:
    """A conversation may expire after half an hour though signing in lasts for days."""
    with make_app().app_context():
        chats = PersistSession().namespace("chat", idle_timeout="30m", renew_interval=0)
        chats.clock = clock
        chat = chats.create()
        clock.advance(30 * 60 - 1)
        assert chats.get(chat.id) is not None
        clock.advance(1)
        assert chats.get(chat.id) is None


def test_a_session_of_a_namespace_keeps_its_data_when_it_ends(app: Flask) -> None:
    """Nobody gets in by a conversation, and it can still be read."""
    with app.app_context():
        chats = PersistSession().namespace("chat")
        chat = chats.create({"step": 1}, metadata={"title": "Trip"})
        chats.end(chat.id, "closed")
        closed = chats.load(chat.id)
        assert closed is not None
        assert (closed.state, closed.end_reason, closed.data) == ("ended", "closed", {"step": 1})
        assert chats.get(chat.id) is None
        assert chats.inspect(chat.id).data == {"step": 1}


def test_deleting_takes_the_data_of_a_namespace_too(app: Flask) -> None:
    """What was deleted is nowhere."""
    with app.app_context():
        chats = PersistSession().namespace("chat")
        chat = chats.create({"step": 1}, metadata={"title": "Trip"}, tags=["x"])
        assert chats.delete(chat.id)
        record = chats.look_up(chat.id)
        assert (record.data, record.metadata, record.tags) == (b"", {}, frozenset())


def test_what_has_ended_can_still_be_deleted(app: Flask) -> None:
    """Whoever wants a conversation gone is not told that it has ended already."""
    with app.app_context():
        chats = PersistSession().namespace("chat")
        chat = chats.create({"step": 1}, metadata={"title": "Trip"})
        chats.history(chat.id).append({"role": "user", "content": "Hello"})
        chats.end(chat.id)
        assert chats.delete(chat.id)
        record = chats.look_up(chat.id)
        assert (record.data, record.metadata, chats.store.history.count(chat.id)) == (b"", {}, 0)
        assert not chats.delete(chat.id)


def test_a_session_of_a_namespace_keeps_its_id(app: Flask) -> None:
    """A new token would leave its key and its history behind."""
    with app.app_context():
        chats = PersistSession().namespace("chat")
        chat = chats.create({"step": 1})
        for move in (lambda: chats.regenerate(chat), lambda: chats.bind(chat, Owner("ada"))):
            with pytest.raises(ValueError, match=r"only the sessions behind flask\.session"):
                move()
        assert chats.get(chat.id) is not None


def test_sessions_of_the_cookie_keep_no_data_when_they_end(app: Flask) -> None:
    """What a request in flight comes with may not lead to what its user left."""
    with app.app_context():
        manager = PersistSession().manager
        made = manager.create({"step": 1})
        manager.end(made.id)
        assert manager.look_up(made.id).data == b""


def test_the_sweeper_cleans_up_every_namespace(make_app: MakeApp, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """One thread looks after all, and says of which it removed how many."""
    with make_app().app_context(), caplog.at_level(logging.INFO, "flask_persist_session"):
        managers = {"web": PersistSession().manager, "chat": PersistSession().namespace("chat")}
        for manager in managers.values():
            manager.clock = clock
            manager.create(lifetime=60)
        clock.advance(250)
        assert Sweeper(managers, 600).sweep()
        assert [manager.stats().total for manager in managers.values()] == [0, 0]
    assert "cleaned up sessions of chat" in caplog.text


def test_a_token_does_not_open_a_session_of_a_namespace(make_app: MakeApp) -> None:
    """The cookie leads to sessions of its own namespace alone."""
    app = make_app()

    @app.get("/")
    def index() -> str:
        return f"{session.get('step')}"

    with app.app_context():
        chat = PersistSession().namespace("chat").create({"step": 1})
    assert chat.token is not None
    client = app.test_client()
    client.set_cookie("session", TokenSigner(secret_keys(app), time.time).sign(chat.token))
    assert client.get("/").text == "None"


def test_signals_of_a_namespace_have_the_application_as_sender(app: Flask) -> None:
    """Whoever listens to an application hears of all its sessions."""
    heard: list[object] = []

    def note(sender: object, event: object) -> None:
        heard.append(sender)

    with app.app_context(), session_created.connected_to(note, sender=app):
        PersistSession().namespace("chat").create()
    assert heard == [app]


def test_a_store_object_without_namespaces_is_told(make_app: MakeApp) -> None:
    """The error says what the store lacks."""

    class One(type(open_store("memory://"))):  # type: ignore[misc]
        namespace = SessionStore.namespace

    with make_app(One()).app_context(), pytest.raises(UnsupportedByStore, match="One has one namespace only"):
        PersistSession().namespace("chat")


def test_a_manager_of_the_cookie_keeps_no_history(make_app: MakeApp) -> None:
    """Its sessions change their id at sign-in, so their history would stay behind."""
    with make_app().app_context():
        manager = PersistSession().manager
        with pytest.raises(UnsupportedByStore, match="namespace"):
            manager.history(manager.create().id)


def test_a_session_is_resumed_by_its_user_only(app: Flask) -> None:
    """Whose it is not learns no more than of an id that never was."""
    with app.app_context():
        chats = PersistSession().namespace("chat")
        chat = chats.create({"step": 1}, user_id=7, tenant_id="acme")
        assert chats.resume(chat.id, user_id="7", tenant_id="acme").data == {"step": 1}
        for user, tenant in (("8", "acme"), ("7", "other"), ("7", None), (None, None)):
            with pytest.raises(SessionNotFound) as refused:
                chats.resume(chat.id, user_id=user, tenant_id=tenant)
            with pytest.raises(SessionNotFound) as unknown:
                chats.resume("000" + "0" * 64, user_id=user, tenant_id=tenant)
            assert str(refused.value).replace(chat.id, "") == str(unknown.value).replace("000" + "0" * 64, "")


def test_resuming_renews(make_app: MakeApp, clock: Clock) -> None:
    """A conversation that is gone on with lives on."""
    with make_app().app_context():
        chats: SessionManager = PersistSession().namespace("chat", idle_timeout=600, renew_interval=60)
        chats.clock = clock
        chat = chats.create()
        clock.advance(500)
        assert chats.resume(chat.id).expires_at == clock() + 660
