"""The answers of the example stream: to many at once, to several tabs, past dropped connections and killed servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from tests.chatting import Event, Listener, Person, copy_of_example, messages_in, token_in
from tests.web import Gunicorn

MANY = 50
TURNS = ("bicycle", "Trek", "FX 2")

Start = Callable[..., Gunicorn]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the example on two workers with 32 threads each; keyword arguments are environment variables."""
    started = []

    def start(**environment: str) -> Gunicorn:
        options = ("--workers", "2", "--worker-class", "gthread", "--threads", "32")
        started.append(copy_of_example(tmp_path, *options, **environment))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        server.stop()


def entries(heard: list[Event]) -> list[tuple[int, str, str]]:
    """What a stream told of the dialogue."""
    return [(event.data["seq"], event.data["role"], event.data["content"]) for event in heard if event.kind == "entry"]


def pieced_together(heard: list[Event]) -> dict[int, str]:
    """The longest text of each answer that was seen while it was written, by the number of the entry it answers."""
    seen: dict[int, str] = {}
    for event in heard:
        if event.kind == "piece":
            to, start = event.data["to"], event.data["start"]
            assert start <= len(seen.get(to, "")), "a piece is missing"
            seen[to] = seen.get(to, "")[:start] + event.data["text"]
    return seen


def begin(server: Gunicorn, number: int) -> tuple[Person, str]:
    """Somebody, and the path of a conversation of theirs."""
    person = Person(server, f"user {number}")
    return person, person.begin()


def talk(person: Person, path: str, number: int) -> Listener:
    """Say all turns, each when the answer to the one before is there."""
    listener = person.listen(path, patience=60)
    stream = listener.events()
    for turn, text in enumerate(TURNS, start=1):
        person.insist(path, f"{text} {number}", f"turn {turn}")
        while (event := next(stream)).kind != "entry" or event.data["seq"] < 2 * turn + 1:
            pass
    stream.close()
    return listener


@pytest.mark.parametrize("store", ["sqlite", pytest.param("redis", marks=pytest.mark.soak)])
def test_fifty_conversations_stream_at_once(start: Start, store: str, new_url: Callable[[str], str]) -> None:
    """Two workers with 32 threads serve 50 people who talk and listen at once, and each hears everything in order."""
    server = start(FLASK_PERSIST_SESSION_STORE=new_url(store), FLASK_CHAT_PACE="0.05")
    with ThreadPoolExecutor(MANY) as pool:
        listeners = list(pool.map(lambda number: talk(*begin(server, number), number), range(MANY)))
    for number, listener in enumerate(listeners):
        heard_everything(listener, number)
        for to, text in pieced_together(listener.heard).items():
            assert entries(listener.heard)[to][2].startswith(text)
    assert any(pieced_together(listener.heard) for listener in listeners)


def heard_everything(listener: Listener, number: int) -> None:
    """Each turn and each answer came once and in order."""
    told = entries(listener.heard)
    assert [seq for seq, _, _ in told] == [1, 2, 3, 4, 5, 6, 7]
    assert [text for _, role, text in told if role == "user"] == [f"{turn} {number}" for turn in TURNS]
    assert told[-1][2] == f"So far: Trek {number} FX 2 {number} bicycle {number}. Which year is it from?"


def test_killed_workers_lose_and_repeat_nothing(start: Start, new_url: Callable[[str], str]) -> None:
    """While workers are killed again and again, each message and each answer of ten conversations is there, and once."""
    server = start(FLASK_PERSIST_SESSION_STORE=new_url("sqlite"), FLASK_CHAT_PACE="0.1", FLASK_CHAT_STALE="1")
    with ThreadPoolExecutor(10) as pool:
        talks = [pool.submit(talk, *begin(server, number), number) for number in range(10)]
        for _ in range(3):
            wait(talks, timeout=2)
            server.kill_worker(server.workers()[0])
        for number, listener in enumerate(talks):
            heard_everything(listener.result(), number)


def test_a_dropped_connection_picks_up(start: Start) -> None:
    """Whoever comes back is told what was said meanwhile, and nothing that was told before."""
    person = Person(start(), "Ada")
    path = person.begin()
    first = person.listen(path)
    first.next("entry", seq=1)
    person.say(path, "bicycle", "1")
    again = person.listen(path, last=first.last)
    again.next("entry", seq=3)
    assert [seq for seq, _, _ in entries(again.heard)] == [2, 3]


def test_two_tabs_on_two_servers_stay_in_step(tmp_path: Path, new_url: Callable[[str], str]) -> None:
    """Servers that share nothing but the store show the same dialogue, the answer included while it is being written."""
    shared = {"FLASK_PERSIST_SESSION_STORE": new_url("redis"), "FLASK_SECRET_KEY": "shared", "FLASK_CHAT_PACE": "0.2"}
    servers = [copy_of_example(tmp_path / name, "--threads", "8", **shared) for name in ("one", "other")]
    try:
        for server in servers:
            server.start()
        person = Person(servers[0], "Ada")
        path = person.begin()
        there = Listener(servers[1].port, path, dict(person.browser.cookies))
        stream = there.events()
        next(stream)
        person.say(path, "bicycle", "1")
        while next(stream).data.get("seq") != 3:
            pass
        stream.close()
        assert [text for _, role, text in entries(there.heard) if role == "user"] == ["bicycle"]
        assert pieced_together(there.heard)[2].startswith("So far:")
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("store", ["sqlite", pytest.param("file", marks=pytest.mark.soak), "redis"])
def test_an_answer_outlives_the_server(start: Start, store: str, new_url: Callable[[str], str]) -> None:
    """A server killed in the middle of an answer gives it once it runs again, whole and once, to those who come back."""
    server = start(FLASK_PERSIST_SESSION_STORE=new_url(store), FLASK_CHAT_PACE="0.5", FLASK_CHAT_STALE="1")
    person = Person(server, "Ada")
    path = person.begin()
    person.say(path, "bicycle", "1")
    listener = person.listen(path)
    assert listener.next("piece", to=2)["text"]
    server.kill()
    server.start()
    assert listener.next("entry", seq=3)["content"] == "So far: bicycle. Which brand is it?"
    back = Person(server, "Ada", person.browser.cookies)
    assert len(messages_in(back.browser.get(path).text)) == 3


def test_signing_out_elsewhere_ends_the_stream(start: Start) -> None:
    """Whoever is signed out on another device is told so in words where they listen."""
    server = start()
    here, there = Person(server, "Ada"), Person(server, "Ada")
    path = here.begin()
    listener = here.listen(path)
    listener.next("entry", seq=1)
    page = there.browser.get("/devices").text
    key = page.split('name="form_key" value="')[1].split('"')[0]
    there.browser.post("/devices/sign-out-others", form_key=key, csrf_token=token_in(page))
    words = "You were signed out here: this session was ended from elsewhere."
    assert listener.next("signed-out")["words"] == words


def test_an_ended_conversation_ends_its_streams(start: Start) -> None:
    """Those who listen are told that the conversation has ended, and an answer that was being written is not stored."""
    person = Person(start(FLASK_CHAT_PACE="0.5"), "Ada")
    path = person.begin()
    person.say(path, "bicycle", "1")
    listener = person.listen(path)
    listener.next("piece", to=2)
    assert person.browser.post(f"{path}/end", csrf_token=person.token).status == 303
    listener.next("ended")
    assert [seq for seq, _, _ in entries(listener.heard)] == [1, 2]


def test_a_message_sent_many_times_at_once_is_stored_once(start: Start) -> None:
    """However often a form is sent at the same moment, there is one message and one answer."""
    server = start()
    person = Person(server, "Ada")
    path = person.begin()
    hands = [Person(server, "Ada", person.browser.cookies) for _ in range(8)]
    for hand in hands:
        hand.token = person.token
    with ThreadPoolExecutor(len(hands)) as pool:
        answers = list(pool.map(lambda hand: hand.say(path, "bicycle", "the same"), hands))
    assert {answer.status for answer in answers} == {303}
    listener = person.listen(path)
    listener.next("entry", seq=3)
    assert [role for _, role, _ in entries(listener.heard)] == ["assistant", "user", "assistant"]
    assert len(messages_in(person.browser.get(path).text)) == 3
