"""The example application, through Flask's test client."""

import ast
import html
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

import example_app
import flask_persist_session
from example_app import create_app
from example_app.secret_key import lasting_secret_key
from flask_persist_session import ConfigError, SessionManager
from tests.chatting import messages_in, token_in
from tests.conftest import Clock


@pytest.fixture
def app() -> Flask:
    """The example with a store of its own."""
    return create_app(
        {
            "PERSIST_SESSION_STORE": "memory://",
            "TESTING": True,
            "SECRET_KEY": "for tests only",
            "CHAT_PACE": 0,
            "CHAT_ADMINS": "Grace, Edsger",
            "OPENAI_API_KEY": "",
        }
    )


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A visitor who has not signed in."""
    return app.test_client()


@pytest.fixture
def ada(client: FlaskClient) -> FlaskClient:
    """Somebody who has signed in."""
    post(client, "/sign-in", name="Ada")
    return client


@pytest.fixture
def talk(ada: FlaskClient) -> str:
    """The path of a conversation of hers."""
    return begin(ada)


def post(client: FlaskClient, path: str, **fields: str) -> TestResponse:
    """Send a form as the page in front of the user would, and follow the redirect."""
    token = token_in(client.get("/", follow_redirects=True).text)
    return client.post(path, data={"csrf_token": token, **fields}, follow_redirects=True)


def begin(client: FlaskClient, key: str = "first") -> str:
    """Begin a conversation; returns the path of its page."""
    return post(client, "/conversations", key=key).request.path


def say(client: FlaskClient, path: str, text: str) -> TestResponse:
    """Send the form of a conversation's page, and return the page with the answer."""
    page = client.get(path).text
    key = re.search(r'name="key" value="([^"]+)">\s*<label for="message"', page)
    assert key
    return post(client, f"{path}/messages", key=key[1], message=text)


def titles_in(page: TestResponse) -> list[str]:
    """The titles in the side bar."""
    side = page.text.split('aria-label="Conversations" popover>')[1].split("</nav>")[0]
    return [html.unescape(title) for title in re.findall(r"<li><a [^>]*>([^<]*)</a>", side)]


def test_asks_visitors_to_sign_in(client: FlaskClient) -> None:
    """Without a name there is no dialogue, only the way to the sign-in page."""
    response = client.get("/")
    assert response.status_code == 303
    assert response.location == "/sign-in"


@pytest.mark.parametrize("path", ["/conversations", "/conversations/abc/messages", "/conversations/abc/end", "/sign-out"])
def test_sends_a_visitors_form_to_sign_in(client: FlaskClient, path: str) -> None:
    """A form sent after the session has gone leads to the sign-in page."""
    assert client.post(path).location == "/sign-in"


def test_tells_the_script_of_a_visitor(client: FlaskClient) -> None:
    """A script that sends a message after the session has gone is told so, and where to sign in."""
    answer = client.post("/conversations/abc/messages", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json and answer.json["sign_in"]) == (401, "/sign-in")


def test_signs_in(client: FlaskClient) -> None:
    """A name is all it takes to get to one's conversations, of which there is none yet."""
    page = post(client, "/sign-in", name="  Ada\n Lovelace ")
    assert page.request.path == "/"
    assert "Ada Lovelace" in page.text
    assert titles_in(page) == []


def test_signing_in_starts_a_clean_session(client: FlaskClient) -> None:
    """Nothing of the session before signing in is left after it, its form token included."""
    with client.session_transaction() as session:
        session["basket"] = "planted"
    before = token_in(client.get("/sign-in").text)
    after = token_in(post(client, "/sign-in", name="Ada").text)
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


def test_begins_with_a_greeting(ada: FlaskClient, talk: str) -> None:
    """A new conversation has the assistant's first words, and no title yet."""
    page = ada.get(talk)
    assert [text[:6] for text in messages_in(page.text)] == ["Hello!"]
    assert titles_in(page) == ["New conversation"]


def test_beginning_twice_by_a_double_click_begins_one(ada: FlaskClient) -> None:
    """The same form sent again leads to the same conversation."""
    assert begin(ada, "one form") == begin(ada, "one form")
    assert begin(ada, "another") != begin(ada, "one form")


def test_talks_without_a_script(ada: FlaskClient, talk: str) -> None:
    """By forms and whole pages alone, one gets to the finished listing."""
    for text in ("bicycle", "Trek", "FX 2", "2019", "€ 250"):
        page = say(ada, talk, text)
    messages = messages_in(page.text)
    assert len(messages) == 11
    assert "For sale: Trek FX 2 bicycle, 2019, € 250" in messages[-1]


def test_redirects_after_a_message(ada: FlaskClient, talk: str) -> None:
    """Reloading the page does not send the message again."""
    token = token_in(ada.get(talk).text)
    response = ada.post(f"{talk}/messages", data={"csrf_token": token, "key": "1", "message": "bicycle"})
    assert response.status_code == 303
    assert response.location == f"{talk}#composer"


def test_a_form_sent_twice_is_stored_once(ada: FlaskClient, talk: str) -> None:
    """A double click is one message."""
    for _ in range(2):
        page = post(ada, f"{talk}/messages", key="the same", message="bicycle")
    assert len(messages_in(page.text)) == 3


def test_tells_a_script_what_was_stored(ada: FlaskClient, talk: str) -> None:
    """A script gets the entry with its number at once, and the answer by the stream."""
    form = {"csrf_token": token_in(ada.get(talk).text), "key": "1", "message": " bicycle\r\nfor two "}
    answer = ada.post(f"{talk}/messages", data=form, headers={"Accept": "application/json"})
    assert answer.status_code == 202
    assert answer.json == {"seq": 2, "role": "user", "content": "bicycle\nfor two"}


def test_the_dialogue_is_a_history(ada: FlaskClient, talk: str) -> None:
    """The session behind the cookie holds the user and small things; the dialogue is the history of a chat session."""
    say(ada, talk, "bicycle")
    with ada.session_transaction() as session:
        assert set(session) == {"user_id", "csrf_token"}
    history = chats_of(ada.application).history(talk.rpartition("/")[2])
    assert [(entry.role, entry.content) for entry in history][1] == ("user", "bicycle")


@pytest.mark.parametrize("text", ["", " \n ", "x" * 4001])
def test_refuses_a_bad_message(ada: FlaskClient, talk: str, text: str) -> None:
    """An empty or long message is refused in words and does not get into the dialogue."""
    response = say(ada, talk, text)
    assert response.status_code == 422
    assert re.search(r'id="message-problem" role="alert">[^<]+message', response.text)
    assert len(messages_in(ada.get(talk).text)) == 1


def test_keeps_a_refused_message(ada: FlaskClient, talk: str) -> None:
    """What was too long stays in its field to be shortened."""
    assert f">{'x' * 4001}</textarea>" in say(ada, talk, "x" * 4001).text


def test_refuses_a_huge_form(ada: FlaskClient, talk: str) -> None:
    """A form beyond all measure is refused with a page in words."""
    response = say(ada, talk, "x" * 100_000)
    assert response.status_code == 413
    assert "<h1>" in response.text


def test_escapes_messages_and_titles(ada: FlaskClient, talk: str) -> None:
    """Markup in a message, which becomes the title, is shown, not obeyed."""
    page = say(ada, talk, "<script>alert(1)</script>")
    assert "<script>alert" not in page.text
    assert "&lt;script&gt;" in page.text


def test_shows_the_end_of_a_long_dialogue(ada: FlaskClient, talk: str) -> None:
    """A page has the latest fifty entries, and a link leads to those before."""
    history = chats_of(ada.application).history(talk.rpartition("/")[2])
    history.append(*({"role": "assistant", "content": f"number {n}"} for n in range(2, 101)))
    assert messages_in(ada.get(talk).text) == [f"number {n}" for n in range(51, 101)]
    assert f'<a href="{talk}?before=51">Earlier messages</a>' in ada.get(talk).text
    assert messages_in(ada.get(f"{talk}?before=51").text)[1:] == [f"number {n}" for n in range(2, 51)]


def test_finds_messages(ada: FlaskClient, talk: str) -> None:
    """The search in a conversation lists what contains the words, with links to the places, and not who said it."""
    say(ada, talk, "A bicycle, used by a user")
    page = ada.get(f"{talk}?find=USED").text
    assert "1 message with" not in page
    assert "2 messages with “USED”" in page  # the assistant repeats it
    assert re.search(rf'href="{talk}\?before=12#entry-2">You: A bicycle', page)
    assert "No messages with “assistant”" in ada.get(f"{talk}?find=assistant").text


def test_lists_the_newest_first(ada: FlaskClient) -> None:
    """The side bar begins with the conversation that was begun last, and marks the open one."""
    for title in ("one", "two", "three"):
        path = begin(ada, title)
        post(ada, f"{path}/title", title=title)
    page = ada.get(path)
    assert titles_in(page) == ["three", "two", "one"]
    assert page.text.count('aria-current="page"') == 1


def test_the_list_has_pages(ada: FlaskClient) -> None:
    """Twenty conversations are on a page, and a link leads to the others, each once."""
    for number in range(23):
        chats_of(ada.application).create(user_id="Ada", metadata={"title": str(number)})
    page = ada.get("/?q=")
    seen = titles_in(page)
    assert len(seen) == 20
    link = re.search(r'href="([^"]+)">Older conversations', page.text)
    assert link
    assert seen + titles_in(ada.get(html.unescape(link[1]))) == [str(number) for number in range(22, -1, -1)]


def test_searches_titles(ada: FlaskClient) -> None:
    """The search in the side bar looks at titles alone, ignoring case, and says what it found nothing for."""
    for title in ("Bicycle", "Oak table"):
        post(ada, f"{begin(ada, title)}/title", title=title)
    assert titles_in(ada.get("/?q=OAK")) == ["Oak table"]
    page = ada.get("/?q=Ada")  # the user's name
    assert titles_in(page) == []
    assert "No conversation with “Ada”" in " ".join(page.text.split())


def test_renames(ada: FlaskClient, talk: str) -> None:
    """A conversation keeps the title that it was given, whatever is said first."""
    post(ada, f"{talk}/title", title=" For  the\nattic ")
    say(ada, talk, "bicycle")
    assert titles_in(ada.get(talk)) == ["For the attic"]


@pytest.mark.parametrize("title", ["", " ", "x" * 81])
def test_refuses_a_bad_title(ada: FlaskClient, talk: str, title: str) -> None:
    """An empty or long title is refused in words beside its field."""
    page = post(ada, f"{talk}/title", title=title)
    assert page.status_code == 422
    assert re.search(r'id="title-problem" role="alert">[^<]+title', page.text)


def test_asks_before_ending(ada: FlaskClient, talk: str) -> None:
    """The link leads to a question; the answer ends the conversation, which leaves the list and cannot be opened."""
    assert "End “New conversation”?" in ada.get(f"{talk}/end").text
    assert len(titles_in(ada.get(talk))) == 1
    assert titles_in(post(ada, f"{talk}/end")) == []
    assert ada.get(talk).status_code == 404


def test_too_many_conversations_end_the_oldest(app: Flask) -> None:
    """The setting says how many a user may have; one more ends the one that was begun first."""
    app = create_app({**app.config, "CHAT_MAX_CONVERSATIONS": 2})
    client = app.test_client()
    post(client, "/sign-in", name="Ada")
    paths = [begin(client, key) for key in "abc"]
    assert [client.get(path).status_code for path in paths] == [404, 200, 200]


@pytest.mark.parametrize("what", ["", "/events", "/end", "?find=x"])
def test_conversations_are_their_users_own(app: Flask, ada: FlaskClient, talk: str, what: str) -> None:
    """Whoever has the address of somebody else's conversation reads nothing of it, and cannot tell it from none."""
    say(ada, talk, "my secret bicycle")
    bob = app.test_client()
    post(bob, "/sign-in", name="Bob")
    theirs, none = bob.get(talk + what), bob.get(f"/conversations/{'0' * 67}{what}")
    assert (theirs.status_code, theirs.text) == (none.status_code, none.text)
    assert "bicycle" not in theirs.text
    assert "There is no such conversation, or it has ended." in theirs.text


@pytest.mark.parametrize("path", ["messages", "again", "title", "end"])
def test_nobody_changes_somebody_elses(app: Flask, ada: FlaskClient, talk: str, path: str) -> None:
    """A form for somebody else's conversation is refused."""
    bob = app.test_client()
    post(bob, "/sign-in", name="Bob")
    assert post(bob, f"{talk}/{path}", message="x", title="x").status_code == 404
    assert titles_in(ada.get(talk)) == ["New conversation"]


def test_a_page_goes_on_with_an_answer_that_was_cut_off(ada: FlaskClient, talk: str) -> None:
    """A turn whose answer was lost with its server is answered when the page is opened, script or not."""
    chats_of(ada.application).history(talk.rpartition("/")[2]).append({"role": "user", "content": "bicycle"})
    assert '<noscript><meta http-equiv="refresh"' in ada.get(talk).text
    ada.application.extensions["chat"].answers.wait(talk.rpartition("/")[2], 2, 10)
    assert messages_in(ada.get(talk).text)[-1] == "So far: bicycle. Which brand is it?"


def test_without_a_seat_a_stream_tells_what_there_is(app: Flask) -> None:
    """Where a process has no thread to spare, the browser is told what is new and when to come back."""
    app = create_app({**app.config, "CHAT_STREAMS": 0})
    client = app.test_client()
    post(client, "/sign-in", name="Ada")
    talk = begin(client)
    say(client, talk, "bicycle")
    whole = client.get(f"{talk}/events").text
    assert whole.startswith("retry: 2000")
    assert re.findall(r"^id: (\d+)$", whole, re.MULTILINE) == ["1", "2", "3"]
    assert re.findall(r"^id: (\d+)$", client.get(f"{talk}/events?after=2").text, re.MULTILINE) == ["3"]
    behind = client.get(f"{talk}/events?after=1", headers={"Last-Event-ID": "3"}).text
    assert "event: entry" not in behind


@pytest.mark.parametrize("number", ["9" * 5000, "-1", "٣", "x", "1.5", ""])
def test_a_stream_from_no_number_begins_at_the_beginning(app: Flask, number: str) -> None:
    """What is no number of an entry is taken for none."""
    app = create_app({**app.config, "CHAT_STREAMS": 0})
    client = app.test_client()
    post(client, "/sign-in", name="Ada")
    assert re.findall(r"^id: (\d+)$", client.get(f"{begin(client)}/events?after={number}").text, re.MULTILINE) == ["1"]


@pytest.mark.parametrize(
    "query", ["before=-1", "before=0", "before=x", "before=" + "9" * 100, "behind=x", "q=%00", "find=%25"]
)
def test_odd_addresses_are_no_errors(ada: FlaskClient, talk: str, query: str) -> None:
    """Whatever stands behind the question mark, there is a page."""
    assert ada.get(f"{talk}?{query}").status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [("CHAT_API_KEYS", "key"), ("CHAT_API_KEYS", {"": "Ada"}), ("CHAT_API_KEYS", {"key": 7}), ("CHAT_STALE", "soon")],
)
def test_a_wrong_setting_is_told_at_the_start(app: Flask, name: str, value: object) -> None:
    """A setting that cannot be used is an error that names it."""
    with pytest.raises(ConfigError, match=name):
        create_app({**app.config, name: value})


def test_a_stream_without_a_user_says_why(client: FlaskClient) -> None:
    """A visitor's stream is one event that tells so, because a script cannot see where a redirect leads."""
    answer = client.get("/conversations/abc/events")
    assert answer.mimetype == "text/event-stream"
    assert "event: signed-out" in answer.text


def test_signs_out(ada: FlaskClient) -> None:
    """After signing out the dialogue has gone."""
    assert post(ada, "/sign-out").request.path == "/sign-in"
    assert ada.get("/").location == "/sign-in"


def manager_of(app: Flask) -> SessionManager:
    """Return the manager of the example's sessions."""
    manager = app.extensions["persist_session"].manager
    assert isinstance(manager, SessionManager)
    return manager


def chats_of(app: Flask) -> SessionManager:
    """Return the manager of the example's conversations."""
    manager = app.extensions["chat"].sessions
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


def test_conversations_outlive_signing_out(ada: FlaskClient, talk: str) -> None:
    """Whoever signs in again finds what was said before."""
    say(ada, talk, "bicycle")
    post(ada, "/sign-out")
    post(ada, "/sign-in", name="Ada")
    assert len(messages_in(ada.get(talk).text)) == 3


def test_devices_are_shown(ada: FlaskClient) -> None:
    """The page of devices lists where one is signed in, within the layout of the example."""
    page = ada.get("/devices", headers={"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Firefox/140.0"}).text
    assert page.count("This device") == 1
    assert 'aria-label="Account"' in page


def test_operators_see_how_it_is(client: FlaskClient) -> None:
    """An admin has a page with the figures of both kinds of sessions, their health and the backups."""
    post(client, "/sign-in", name="Grace")
    begin(client)
    page = client.get("/operator").text
    assert "All is well." in page
    assert "Sessions “web”" in page
    assert "Sessions “chat”" in page
    assert "sessions backup" in page
    assert 'href="/operator"' in client.get("/devices").text


def test_operators_see_backups(app: Flask, tmp_path: Path) -> None:
    """The page lists the archives of the backup folder."""
    app = create_app({**app.config, "PERSIST_SESSION_BACKUP_DIR": str(tmp_path)})
    client = app.test_client()
    post(client, "/sign-in", name="Edsger")
    assert app.test_cli_runner().invoke(args=["sessions", "backup"]).exit_code == 0
    (archive,) = tmp_path.iterdir()
    assert archive.name in client.get("/operator").text


def test_the_operators_page_is_for_admins(ada: FlaskClient, client: FlaskClient) -> None:
    """Others are refused, and see no link to it."""
    assert ada.get("/operator").status_code == 403
    assert 'href="/operator"' not in ada.get("/devices").text


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
    page = ada.post("/conversations/abc/messages", data={"message": "bicycle"}, follow_redirects=True)
    assert notice_in(page) == "You were signed out here: this session was ended from elsewhere."


def test_an_expired_session_is_told_of(ada: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes back too late learns that the session has expired."""
    monkeypatch.setattr(manager_of(ada.application), "clock", Clock(time.time() + 400 * 86400))
    assert notice_in(ada.get("/", follow_redirects=True)) == "Your last session here has expired. Please sign in."


@pytest.mark.parametrize("token", ["", "wrong", "grüße"])
@pytest.mark.parametrize("path", ["messages", "again", "title", "end"])
def test_refuses_a_form_without_the_token(ada: FlaskClient, talk: str, path: str, token: str) -> None:
    """A form that another site made changes nothing."""
    response = ada.post(f"{talk}/{path}", data={"csrf_token": token, "message": "stolen", "title": "stolen"})
    assert response.status_code == 400
    assert len(messages_in(ada.get(talk).text)) == 1
    assert titles_in(ada.get(talk)) == ["New conversation"]


@pytest.mark.parametrize("path", ["/conversations", "/sign-out"])
def test_begins_and_signs_out_by_its_own_forms_alone(ada: FlaskClient, path: str) -> None:
    """Another site can neither begin a conversation nor sign a user out."""
    assert ada.post(path).status_code == 400
    assert titles_in(ada.get("/")) == []


def test_refuses_a_sign_in_without_the_token(client: FlaskClient) -> None:
    """Another site cannot sign a visitor in under a name of its choice."""
    assert client.post("/sign-in", data={"name": "Mallory"}).status_code == 400
    assert client.get("/").location == "/sign-in"


@pytest.mark.parametrize("path", ["", "/messages", "/again", "/title", "/end"])
def test_changes_nothing_on_get(ada: FlaskClient, talk: str, path: str) -> None:
    """A link followed from elsewhere neither says anything nor ends a conversation."""
    assert ada.get(talk + path).status_code in (200, 405)
    assert len(messages_in(ada.get(talk).text)) == 1


@pytest.mark.parametrize("path", ["/sign-in", "/", "/static/style.css", "/no-such-page"])
def test_sends_strict_headers(client: FlaskClient, path: str) -> None:
    """Every response forbids foreign content, sniffing and telling other sites where one came from."""
    with client.get(path) as response:
        headers = response.headers
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"


@pytest.mark.parametrize("path", ["/", "/devices", "/operator", "/sign-in", "conversation", "conversation/end", "/nothing"])
def test_has_nothing_inline_and_nothing_from_elsewhere(app: Flask, path: str) -> None:
    """No page has a script or style of its own, which the policy would block, nor loads anything from another host."""
    client = app.test_client()
    if path != "/sign-in":
        post(client, "/sign-in", name="Grace")
        path = path.replace("conversation", begin(client))
    page = client.get(path).text if path == "/sign-in" else client.get(path, follow_redirects=True).text
    assert not re.search(r"<style|<script(?![^>]*src=)| style=| on\w+=", page)
    assert not re.search(r'(?:src|href|action)="(?!/|#|\?)', page)


def test_pages_are_not_cached(ada: FlaskClient, talk: str) -> None:
    """No cache keeps a dialogue."""
    for path in ("/", talk, f"{talk}/end", "/devices"):
        assert ada.get(path).headers["Cache-Control"] == "no-store"


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


def test_imports_public_names_alone() -> None:
    """The example is an application as any other: of the package it knows what is documented."""
    imported: set[tuple[str, str]] = set()
    for file in Path(example_app.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flask_persist_session"):
                imported |= {(str(node.module), alias.name) for alias in node.names}
    public = {("flask_persist_session", name) for name in flask_persist_session.__all__}
    assert imported - public == {("flask_persist_session.web.devices", "devices_blueprint")}
