"""The example application, through Flask's test client."""

import html
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from example_app import create_app, lasting_secret_key
from flask_persist_session import SessionManager


@pytest.fixture
def app() -> Flask:
    """The example with a store of its own."""
    return create_app({"PERSIST_SESSION_STORE": "memory://", "TESTING": True, "SECRET_KEY": "for tests only"})


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A visitor who has not signed in."""
    return app.test_client()


@pytest.fixture
def ada(client: FlaskClient) -> FlaskClient:
    """Somebody who has signed in."""
    post(client, "/sign-in", name="Ada")
    return client


def post(client: FlaskClient, path: str, **fields: str) -> TestResponse:
    """Send a form as the page in front of the user would, and follow the redirect."""
    token = token_in(client.get("/", follow_redirects=True))
    return client.post(path, data={"csrf_token": token, **fields}, follow_redirects=True)


def token_in(response: TestResponse) -> str:
    """Return the token in the forms of a page."""
    found = re.search(r'name="csrf_token" value="([^"]+)"', response.text)
    assert found
    return found[1]


def dialogue_in(response: TestResponse) -> list[str]:
    """Return the messages on a page."""
    return [html.unescape(text) for text in re.findall(r"<p>(.*?)</p></li>", response.text, re.DOTALL)]


def test_asks_visitors_to_sign_in(client: FlaskClient) -> None:
    """Without a name there is no dialogue, only the way to the sign-in page."""
    response = client.get("/")
    assert response.status_code == 303
    assert response.location == "/sign-in"


@pytest.mark.parametrize("path", ["/messages", "/start-over", "/sign-out"])
def test_sends_a_visitors_form_to_sign_in(client: FlaskClient, path: str) -> None:
    """A form sent after the session has gone leads to the sign-in page."""
    assert client.post(path).location == "/sign-in"


def test_signs_in(client: FlaskClient) -> None:
    """A name is all it takes to get to the assistant's greeting."""
    page = post(client, "/sign-in", name="  Ada\n Lovelace ")
    assert page.request.path == "/"
    assert "Ada Lovelace" in page.text
    assert [text[:6] for text in dialogue_in(page)] == ["Hello!"]


def test_signing_in_starts_a_clean_session(client: FlaskClient) -> None:
    """Nothing of the session before signing in is left after it, its form token included."""
    with client.session_transaction() as session:
        session["basket"] = "planted"
    before = token_in(client.get("/sign-in"))
    after = token_in(post(client, "/sign-in", name="Ada"))
    assert before != after
    with client.session_transaction() as session:
        assert session["user_id"] == "Ada"
        assert "basket" not in session


@pytest.mark.parametrize("name", ["", "   ", "\u200b", "x" * 41])
def test_refuses_a_bad_name(client: FlaskClient, name: str) -> None:
    """An empty or long name is refused in words beside its field."""
    response = post(client, "/sign-in", name=name)
    assert response.status_code == 422
    assert re.search(r'id="name-problem" role="alert">[^<]+name', response.text)
    assert 'aria-invalid="true"' in response.text


def test_who_is_signed_in_goes_to_the_dialogue(ada: FlaskClient) -> None:
    """The sign-in page is not for those who have signed in."""
    assert ada.get("/sign-in").location == "/"


def test_talks(ada: FlaskClient) -> None:
    """The whole dialogue is on the page, up to the finished listing."""
    for text in ("bicycle", "Trek", "FX 2", "2019", "€ 250"):
        page = post(ada, "/messages", message=text)
    messages = dialogue_in(page)
    assert len(messages) == 11
    assert "For sale: Trek FX 2 bicycle, 2019, € 250" in messages[-1]


def test_redirects_after_a_message(ada: FlaskClient) -> None:
    """Reloading the page does not send the message again."""
    token = token_in(ada.get("/"))
    response = ada.post("/messages", data={"csrf_token": token, "message": "bicycle"})
    assert response.status_code == 303
    assert response.location == "/"


def test_dialogue_is_in_the_session(ada: FlaskClient) -> None:
    """The session holds the dialogue as plain roles and contents."""
    post(ada, "/messages", message="bicycle")
    with ada.session_transaction() as session:
        assert [message["role"] for message in session["dialogue"]] == ["assistant", "user", "assistant"]
        assert session["dialogue"][1] == {"role": "user", "content": "bicycle"}


@pytest.mark.parametrize("text", ["", " \n ", "x" * 1001])
def test_refuses_a_bad_message(ada: FlaskClient, text: str) -> None:
    """An empty or long message is refused in words and does not get into the dialogue."""
    response = post(ada, "/messages", message=text)
    assert response.status_code == 422
    assert re.search(r'id="message-problem" role="alert">[^<]+message', response.text)
    assert len(dialogue_in(ada.get("/"))) == 1


def test_keeps_a_refused_message(ada: FlaskClient) -> None:
    """What was too long stays in its field to be shortened."""
    assert f'value="{"x" * 1001}"' in post(ada, "/messages", message="x" * 1001).text


def test_refuses_a_huge_form(ada: FlaskClient) -> None:
    """A form beyond all measure is refused with a page in words."""
    response = post(ada, "/messages", message="x" * 100_000)
    assert response.status_code == 413
    assert "<h1>" in response.text


def test_keeps_the_newest_messages(ada: FlaskClient) -> None:
    """The dialogue is bounded, so the session does not grow for ever."""
    with ada.session_transaction() as session:
        session["dialogue"] = [{"role": "user", "content": f"old {number}"} for number in range(200)]
    messages = dialogue_in(post(ada, "/messages", message="bicycle"))
    assert len(messages) == 200
    assert messages[0] == "old 2"
    assert messages[-2] == "bicycle"


def test_escapes_messages(ada: FlaskClient) -> None:
    """Markup in a message is shown, not obeyed."""
    page = post(ada, "/messages", message="<script>alert(1)</script>")
    assert "<script>alert" not in page.text
    assert "&lt;script&gt;" in page.text


def test_starts_over(ada: FlaskClient) -> None:
    """Starting over leaves the greeting and the name."""
    post(ada, "/messages", message="bicycle")
    page = post(ada, "/start-over")
    assert len(dialogue_in(page)) == 1
    assert "Ada" in page.text


def test_signs_out(ada: FlaskClient) -> None:
    """After signing out the dialogue has gone."""
    assert post(ada, "/sign-out").request.path == "/sign-in"
    assert ada.get("/").location == "/sign-in"


def manager_of(app: Flask) -> SessionManager:
    """Return the manager of the example's sessions."""
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def notice_in(page: TestResponse) -> str:
    """Return what a page says to a screen reader about the session before, "" if nothing."""
    found = re.search(r'<p class="notice" id="notice" role="status">([^<]+)</p>', page.text)
    assert ('aria-describedby="notice name-problem"' in page.text) == bool(found)
    return html.unescape(found[1]) if found else ""


def test_signing_in_makes_it_the_users_session(client: FlaskClient) -> None:
    """Though the sign-in clears the session first, it is bound to its user, and what was there before has ended."""
    manager = manager_of(client.application)
    client.get("/sign-in")
    (visitor,) = manager.find()
    cookie = client.get_cookie("session")
    assert cookie is not None
    post(client, "/sign-in", name="Ada")
    (ada,) = manager.find(state="active")
    assert (ada.user_id, [record.id for record in manager.find(user_id="Ada")]) == ("Ada", [ada.id])
    client.set_cookie("session", cookie.value)
    assert client.get("/").location == "/sign-in"
    assert [record.id for record in manager.find(state="ended")] == [visitor.id]


def test_signing_out_ends_the_users_session(ada: FlaskClient) -> None:
    """After signing out no session of the user is active, and the sign-in page gives no reasons."""
    assert notice_in(post(ada, "/sign-out")) == ""
    assert list(manager_of(ada.application).find(user_id="Ada", state="active")) == []


def test_a_new_visitor_is_told_nothing(client: FlaskClient) -> None:
    """Without a session before, and while one lasts, there is no reason to tell."""
    assert notice_in(client.get("/sign-in")) == ""
    assert notice_in(client.get("/sign-in")) == ""


def test_the_oldest_of_too_many_is_told_why(app: Flask) -> None:
    """The sixth browser of a user signs out the first, which reads the reason in words, once, and can sign in again."""
    browsers = [app.test_client() for _ in range(6)]
    for browser in browsers:
        post(browser, "/sign-in", name="Ada")
    assert [browser.get("/").status_code for browser in browsers] == [303, 200, 200, 200, 200, 200]
    assert notice_in(browsers[0].get("/", follow_redirects=True)) == (
        "You were signed out here: you signed in on another device, and only 5 sessions are allowed at once."
    )
    assert notice_in(browsers[0].get("/sign-in")) == ""
    assert "Ada" in post(browsers[0], "/sign-in", name="Ada").text
    assert browsers[1].get("/").status_code == 303


def test_one_session_is_not_plural() -> None:
    """The notice agrees with a limit of one."""
    app = create_app({"PERSIST_SESSION_STORE": "memory://", "SECRET_KEY": "k", "PERSIST_SESSION_MAX_PER_USER": 1})
    browsers = [app.test_client() for _ in range(2)]
    for browser in browsers:
        post(browser, "/sign-in", name="Ada")
    assert notice_in(browsers[0].get("/sign-in")).endswith("and only one session is allowed at once.")


def test_a_form_of_an_ended_session_leads_to_the_reason(ada: FlaskClient) -> None:
    """Whoever was revoked while typing is sent to the sign-in page and told so."""
    manager_of(ada.application).revoke_user("Ada")
    page = ada.post("/messages", data={"message": "bicycle"}, follow_redirects=True)
    assert notice_in(page) == "You were signed out here: this session was ended from elsewhere."


def test_an_expired_session_is_told_of(ada: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes back too late learns that the session has expired."""
    now = time.time() + 400 * 86400
    monkeypatch.setattr(manager_of(ada.application), "clock", lambda: now)
    assert notice_in(ada.get("/", follow_redirects=True)) == "Your last session here has expired. Please sign in."


@pytest.mark.parametrize("token", ["", "wrong", "grüße"])
@pytest.mark.parametrize("path", ["/messages", "/start-over", "/sign-out"])
def test_refuses_a_form_without_the_token(ada: FlaskClient, path: str, token: str) -> None:
    """A form that another site made changes nothing."""
    post(ada, "/messages", message="bicycle")
    response = ada.post(path, data={"csrf_token": token, "message": "stolen"})
    assert response.status_code == 400
    assert len(dialogue_in(ada.get("/"))) == 3


def test_refuses_a_sign_in_without_the_token(client: FlaskClient) -> None:
    """Another site cannot sign a visitor in under a name of its choice."""
    assert client.post("/sign-in", data={"name": "Mallory"}).status_code == 400
    assert client.get("/").location == "/sign-in"


@pytest.mark.parametrize("path", ["/", "/messages", "/start-over", "/sign-out"])
def test_changes_nothing_on_get(ada: FlaskClient, path: str) -> None:
    """A link followed from elsewhere neither signs out nor starts over."""
    assert ada.get(path).status_code in (200, 405)
    assert len(dialogue_in(ada.get("/"))) == 1


@pytest.mark.parametrize("path", ["/sign-in", "/", "/static/style.css", "/no-such-page"])
def test_sends_strict_headers(client: FlaskClient, path: str) -> None:
    """Every response forbids foreign content, sniffing and telling other sites where one came from."""
    with client.get(path) as response:
        headers = response.headers
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"


def test_has_nothing_inline(ada: FlaskClient) -> None:
    """No page has a script or style of its own, which the policy would block."""
    signed_out = ada.application.test_client()
    post(signed_out, "/sign-in", name="Bob")
    manager_of(ada.application).revoke_user("Bob")
    for page in (ada.get("/"), ada.application.test_client().get("/sign-in"), signed_out.get("/sign-in")):
        assert not re.search(r"<style|<script(?![^>]*src=)| style=| on\w+=", page.text)


def test_pages_are_not_cached(ada: FlaskClient) -> None:
    """No cache keeps a dialogue."""
    assert ada.get("/").headers["Cache-Control"] == "no-store"


def test_cookie_is_guarded(client: FlaskClient) -> None:
    """Scripts cannot read the cookie, and other sites' forms do not send it."""
    cookie = client.get("/sign-in").headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie


def test_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables choose the secret key and the store."""
    monkeypatch.setenv("FLASK_SECRET_KEY", "from outside")
    monkeypatch.setenv("FLASK_PERSIST_SESSION_STORE", "memory://")
    app = create_app()
    assert app.config["SECRET_KEY"] == "from outside"
    assert app.config["PERSIST_SESSION_STORE"] == "memory://"


def test_secret_key_lasts(tmp_path: Path) -> None:
    """The key made on the first start is there on the next, readable by its owner only."""
    folder = tmp_path / "instance"
    key = lasting_secret_key(folder)
    assert len(key) >= 32
    assert lasting_secret_key(folder) == key
    assert [file.name for file in folder.iterdir()] == ["secret_key"]
    assert (folder / "secret_key").stat().st_mode & 0o777 == 0o600


def test_workers_agree_on_the_secret_key(tmp_path: Path) -> None:
    """Workers that start at once have the same key."""
    for number in range(20):
        with ThreadPoolExecutor(8) as pool:
            keys = list(pool.map(lasting_secret_key, [tmp_path / str(number)] * 8))
        assert len(set(keys)) == 1
