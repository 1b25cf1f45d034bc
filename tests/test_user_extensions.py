"""Sign-in by the real Flask-Security, Flask-Principal and Flask-Login, and by hand; the applications know nothing of us."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import peewee
import pytest
from flask import Flask, current_app, g, redirect, request, session, url_for
from flask.testing import FlaskClient
from flask_login import LoginManager, login_required, login_user
from flask_login import UserMixin as LoginUserMixin
from flask_principal import AnonymousIdentity, Identity, Principal, identity_changed
from flask_security import PeeweeUserDatastore, RoleMixin, Security, UserMixin, auth_required, current_user, hash_password

from flask_persist_session import SessionManager, open_store
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]
CAP = 2


def manager_of(app: Flask) -> SessionManager:
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def token_of(client: FlaskClient) -> str:
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


def active(app: Flask, user_id: str) -> list[str]:
    """The ids of a user's sessions, as the manager lists them."""
    return [record.id for record in manager_of(app).find(user_id=user_id, state="active")]


def add_pages(app: Flask) -> None:
    @app.get("/cart")
    def cart() -> str:
        session["cart"] = ["apple"]
        return ""

    @app.get("/data")
    def data() -> dict[str, Any]:
        return {"keys": sorted(session), "user_id": session.user_id, "id": session.id}  # type: ignore[attr-defined]


def opens_nothing(app: Flask, token: str) -> bool:
    client = app.test_client()
    client.set_cookie("session", token)
    return client.get("/data").json == {"keys": [], "user_id": None, "id": None}


# Flask-Security -------------------------------------------------------------------------------------------------------


@pytest.fixture
def users() -> Iterator[PeeweeUserDatastore]:
    """Flask-Security's users, in a database of their own."""
    database = peewee.SqliteDatabase(":memory:")

    class Table(peewee.Model):  # type: ignore[misc]
        class Meta:
            database: Any

    Table._meta.database = database

    class Role(RoleMixin, Table):  # type: ignore[misc]
        name = peewee.TextField(unique=True)

    class User(UserMixin, Table):  # type: ignore[misc]
        email = peewee.TextField(unique=True)
        password = peewee.TextField()
        active = peewee.BooleanField(default=True)
        fs_uniquifier = peewee.TextField(unique=True)

    class UserRole(Table):
        user = peewee.ForeignKeyField(User, backref="roles")
        role = peewee.ForeignKeyField(Role)

    models = [Role, User, UserRole]
    with database.bind_ctx(models), database.connection_context():
        database.create_tables(models)
        yield PeeweeUserDatastore(database, User, Role, UserRole)


@pytest.fixture
def secured(make_app: MakeApp, store_url: str, users: PeeweeUserDatastore) -> Flask:
    """An application that signs in with Flask-Security's own pages, with a cap of two sessions."""
    app = make_app(
        store_url,
        PERSIST_SESSION_MAX_PER_USER=CAP,
        SECURITY_PASSWORD_SALT="for tests only",
        SECURITY_PASSWORD_HASH="plaintext",
        SECURITY_PASSWORD_SCHEMES=["plaintext"],
        SECURITY_EMAIL_VALIDATOR_ARGS={"check_deliverability": False},
    )
    Security(app, users)
    add_pages(app)

    @app.get("/me")
    @auth_required("session")  # type: ignore[untyped-decorator]
    def me() -> str:
        return str(current_user.email)

    with app.app_context():
        users.create_user(email="ada@example.com", password=hash_password("correct horse"))
    return app


def security_sign_in(client: FlaskClient, **form: str) -> None:
    """Fill in Flask-Security's form."""
    found = re.search(r'name="csrf_token"[^>]*value="([^"]+)"', client.get("/login").text)
    assert found
    form |= {"csrf_token": found[1], "email": "ada@example.com", "password": "correct horse"}
    assert client.post("/login", data=form).status_code == 302


def test_flask_security_gets_a_new_token_at_sign_in_and_out(secured: Flask) -> None:
    """Both change the token, the visitor's data stays, and the old tokens open nothing."""
    client = secured.test_client()
    client.get("/cart")
    tokens = [token_of(client)]
    security_sign_in(client)
    tokens.append(token_of(client))
    assert client.get("/me").text == "ada@example.com"
    assert "cart" in client.get("/data").json["keys"]  # type: ignore[index]
    assert client.post("/logout").status_code == 302
    assert client.get("/data").json["user_id"] is None  # type: ignore[index]
    assert token_of(client) not in tokens
    assert len(set(tokens)) == 2
    assert all(opens_nothing(secured, token) for token in tokens)


def test_flask_security_users_are_listed_by_their_uniquifier(secured: Flask, users: PeeweeUserDatastore) -> None:
    """``find`` lists a user's sessions under what Flask-Security hands to Flask-Login: ``fs_uniquifier``, not the id."""
    clients = [secured.test_client() for _ in range(CAP)]
    for client in clients:
        security_sign_in(client)
    ada = users.find_user(email="ada@example.com")
    assert sorted(active(secured, ada.fs_uniquifier)) == sorted(client.get("/data").json["id"] for client in clients)  # type: ignore[index]
    assert active(secured, str(ada.id)) == []


def test_the_cap_holds_for_flask_security(secured: Flask, users: PeeweeUserDatastore) -> None:
    """A third device signs out the first."""
    clients = [secured.test_client() for _ in range(CAP + 1)]
    for client in clients:
        security_sign_in(client)
    assert [client.get("/me").status_code for client in clients] == [302, 200, 200]
    assert len(active(secured, users.find_user(email="ada@example.com").fs_uniquifier)) == CAP


def test_a_revoked_flask_security_user_comes_back_by_the_remember_cookie(
    secured: Flask, users: PeeweeUserDatastore
) -> None:
    """Revoking ends sessions; "remember me" is a second key, which a new ``fs_uniquifier`` takes away."""
    client = secured.test_client()
    security_sign_in(client, remember="y")
    ada = users.find_user(email="ada@example.com")
    manager_of(secured).revoke_user(ada.fs_uniquifier)
    assert client.get("/me").text == "ada@example.com"

    manager_of(secured).revoke_user(ada.fs_uniquifier)
    with secured.app_context():
        users.set_uniquifier(ada)
    assert client.get("/me").status_code == 302


# Flask-Principal ------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_principal(make_app: MakeApp, store_url: str) -> Flask:
    """An application that keeps its user in the session by Flask-Principal alone, with a cap of two sessions."""
    app = make_app(
        CountingStore(open_store(store_url)),
        PERSIST_SESSION_USER_KEY="identity.id",
        PERSIST_SESSION_MAX_PER_USER=CAP,
    )
    Principal(app)
    add_pages(app)

    @app.get("/sign-in/<name>")
    def sign_in(name: str) -> str:
        identity_changed.send(current_app._get_current_object(), identity=Identity(name))  # type: ignore[attr-defined]
        return ""

    @app.get("/sign-out")
    def sign_out() -> str:
        identity_changed.send(current_app._get_current_object(), identity=AnonymousIdentity())  # type: ignore[attr-defined]
        return ""

    @app.get("/me")
    def me() -> str:
        return str(g.identity.id)

    return app


def test_flask_principal_gets_a_new_token_at_sign_in_and_out(with_principal: Flask) -> None:
    """Both change the token, the visitor's data stays, and the old tokens open nothing."""
    client = with_principal.test_client()
    client.get("/cart")
    tokens = [token_of(client)]
    client.get("/sign-in/Ada")
    tokens.append(token_of(client))
    data = client.get("/data").json
    assert data is not None
    assert (client.get("/me").text, data["user_id"], "cart" in data["keys"]) == ("Ada", "Ada", True)
    client.get("/sign-out")
    assert client.get("/me").text == "None"
    assert client.get("/data").json["user_id"] is None  # type: ignore[index]
    assert token_of(client) not in tokens
    assert len(set(tokens)) == 2
    assert all(opens_nothing(with_principal, token) for token in tokens)


def test_flask_principal_users_are_listed_and_limited(with_principal: Flask) -> None:
    """Sessions are found under the identity's id, and a third device signs out the first."""
    clients = [with_principal.test_client() for _ in range(CAP + 1)]
    for client in clients:
        client.get("/sign-in/Ada")
    assert [client.get("/me").text for client in clients] == ["None", "Ada", "Ada"]
    expected = sorted(client.get("/data").json["id"] for client in clients[1:])  # type: ignore[index]
    assert sorted(active(with_principal, "Ada")) == expected


def test_flask_principal_marks_each_request_and_writes_nothing(with_principal: Flask) -> None:
    """It puts the same identity in with ``modified = True`` at every request: looked at twice, not written."""
    client = with_principal.test_client()
    client.get("/sign-in/Ada")
    store = manager_of(with_principal).store
    assert isinstance(store, CountingStore)
    store.operations.clear()
    client.get("/me")
    assert store.operations == {"get": 2}


# Flask-Login ----------------------------------------------------------------------------------------------------------


class Member(LoginUserMixin):
    def __init__(self, name: str) -> None:
        self.id = name


def test_a_remember_cookie_signs_in_again(make_app: MakeApp) -> None:
    """After revocation Flask-Login's "remember me" signs in with no password: a new session, bound and listed."""
    app = make_app()
    LoginManager(app).user_loader(Member)
    add_pages(app)

    @app.get("/sign-in")
    def sign_in() -> str:
        login_user(Member("Ada"), remember=True)
        return ""

    @app.get("/me")
    def me() -> str:
        return str(getattr(current_user, "id", None))

    client = app.test_client()
    client.get("/sign-in")
    revoked = active(app, "Ada")
    manager_of(app).revoke_user("Ada")
    assert client.get("/me").text == "Ada"
    assert len(active(app, "Ada")) == 1
    assert active(app, "Ada") != revoked


@pytest.fixture
def guarded(make_app: MakeApp) -> tuple[Flask, LoginManager]:
    """An application whose only page needs a sign-in, and whose login page tells why the last session ended."""
    app = make_app()
    login_manager = LoginManager(app)
    login_manager.user_loader(Member)
    login_manager.login_view = "login"

    @app.get("/sign-in")
    def sign_in() -> str:
        login_user(Member("Ada"))
        return ""

    @app.get("/account")
    @login_required  # type: ignore[untyped-decorator]
    def account() -> str:
        return "Ada's"

    @app.get("/login")
    def login() -> str:
        return f"{request.args.get('reason')}, {session.end_reason}"  # type: ignore[attr-defined]

    return app, login_manager


def reason_after_revocation(app: Flask) -> str:
    """What the login page says to a user whose session was revoked."""
    client = app.test_client()
    client.get("/sign-in")
    manager_of(app).revoke_user("Ada")
    return client.get("/account", follow_redirects=True).text


def test_the_message_of_flask_login_hides_why_a_session_ended(guarded: tuple[Flask, LoginManager]) -> None:
    """It is flashed, which begins a session whose cookie takes the place of the one that was revoked."""
    app, _ = guarded
    assert reason_after_revocation(app) == "None, None"


def test_an_unauthorized_handler_passes_on_why_a_session_ended(guarded: tuple[Flask, LoginManager]) -> None:
    """It reads the reason in the request that came with the revoked session."""
    app, login_manager = guarded

    @login_manager.unauthorized_handler  # type: ignore[untyped-decorator]
    def send_to_login() -> Any:
        return redirect(url_for("login", reason=session.end_reason))  # type: ignore[attr-defined]

    assert reason_after_revocation(app) == "revoked, revoked"


def test_without_its_message_flask_login_leaves_the_reason(guarded: tuple[Flask, LoginManager]) -> None:
    """Nothing is put into the session, so the login page reads the reason itself."""
    app, login_manager = guarded
    login_manager.login_message = None
    assert reason_after_revocation(app) == "None, revoked"


def test_login_user_over_another_user_keeps_the_data(guarded: tuple[Flask, LoginManager]) -> None:
    """The session becomes Bob's with what Ada put in; her session has ended."""
    app, _ = guarded
    add_pages(app)

    @app.get("/switch")
    def switch() -> str:
        login_user(Member("Bob"))
        return ""

    client = app.test_client()
    for path in ("/sign-in", "/cart", "/switch"):
        client.get(path)
    data = client.get("/data").json
    assert data is not None
    assert (data["user_id"], "cart" in data["keys"]) == ("Bob", True)
    assert active(app, "Ada") == []


# By hand --------------------------------------------------------------------------------------------------------------


def test_a_hand_written_sign_in_is_listed_and_limited(make_app: MakeApp, store_url: str) -> None:
    """``session["user_id"] = …`` is all the application does: new token, listed under the user, two devices at most."""
    app = make_app(store_url, PERSIST_SESSION_USER_KEY="user_id", PERSIST_SESSION_MAX_PER_USER=CAP)
    add_pages(app)

    @app.get("/sign-in/<int:number>")
    def sign_in(number: int) -> str:
        session["user_id"] = number
        return ""

    clients = [app.test_client() for _ in range(CAP + 1)]
    for client in clients:
        client.get("/cart")
        visitor = token_of(client)
        client.get("/sign-in/7")
        assert token_of(client) != visitor
        assert opens_nothing(app, visitor)
    seen = [client.get("/data").json for client in clients]
    assert [data["user_id"] for data in seen if data] == [None, "7", "7"]
    assert sorted(active(app, "7")) == sorted(data["id"] for data in seen[1:] if data)
