"""What the tests of the example share: a copy of it under gunicorn, and people who talk to it and listen."""

from __future__ import annotations

import html
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import example_app
from tests.servers import DEADLINE
from tests.web import Answer, Gunicorn


def copy_of_example(folder: Path, *options: str, **environment: str) -> Gunicorn:
    """A server of a copy of the example, so that its instance folder, with the secret key, is the test's own."""
    shutil.copytree(Path(example_app.__file__).parent, folder / "example_app")
    environment = {"OPENAI_API_KEY": "", "FLASK_CHAT_PACE": "0", **environment}
    return Gunicorn(folder, "example_app:create_app()", *options, **environment)


def token_in(page: str) -> str:
    """The token in the forms of a page."""
    found = re.search(r'name="csrf_token" value="([^"]+)"', page)
    assert found, page
    return found[1]


def messages_in(page: str) -> list[str]:
    """The messages on a page."""
    return [html.unescape(text) for text in re.findall(r"<p>(.*?)</p></li>", page, re.DOTALL)]


@dataclass(frozen=True)
class Event:
    """Something that a stream told."""

    kind: str
    data: Any


@dataclass
class Listener:
    """Listens to the stream of a conversation as a browser does: what is lost is picked up behind the last number."""

    port: int
    path: str
    cookies: dict[str, str]
    last: str = "0"
    patience: float = DEADLINE
    connections: int = 0
    heard: list[Event] = field(default_factory=list)

    def events(self, *, once: bool = False) -> Iterator[Event]:
        """What is told, until the test wants no more, or with *once* the connection ends; fails if nothing comes."""
        until = time.monotonic() + self.patience
        while True:
            retry = 0.5
            connection = HTTPConnection("127.0.0.1", self.port, timeout=self.patience)
            try:
                for field_name, value in self._fields(connection):
                    assert time.monotonic() < until, f"nothing came but {self.heard}"
                    if field_name == "retry":
                        retry = int(value) / 1000
                    elif field_name == "event":
                        kind = value
                    elif field_name == "data":
                        self.heard.append(Event(kind, json.loads(value)))
                        yield self.heard[-1]
                        until = time.monotonic() + self.patience
            except (OSError, HTTPException):
                pass  # the server was killed: it comes back
            finally:
                connection.close()
            if once:
                return
            assert time.monotonic() < until, f"nothing came but {self.heard}"
            time.sleep(min(retry, 0.5))

    def _fields(self, connection: HTTPConnection) -> Iterator[tuple[str, str]]:
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        connection.request("GET", f"{self.path}/events", headers={"Cookie": cookie, "Last-Event-ID": self.last})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        self.connections += 1
        while line := response.readline():
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "id":
                self.last = value
            yield name, value

    def next(self, kind: str, **fields: Any) -> Any:
        """The data of the next event of that kind with those fields."""
        for event in self.events():
            if event.kind == kind and fields.items() <= event.data.items():
                return event.data
        raise AssertionError("the stream has ended")  # pragma: no cover


class Person:
    """Somebody at a browser of the example."""

    def __init__(self, server: Gunicorn, name: str, cookies: dict[str, str] | None = None) -> None:
        self.server = server
        self.browser = server.browser(cookies)
        if cookies is None:
            token = token_in(self.browser.get("/sign-in").text)
            assert self.browser.post("/sign-in", csrf_token=token, name=name).status == 303
        self.token = token_in(self.browser.get("/").text) if cookies is None else ""

    def begin(self, key: str = "first") -> str:
        """Begin a conversation; returns the path of its page."""
        answer = self.browser.post("/conversations", csrf_token=self.token, key=key)
        found = re.search(r'href="(/conversations/[0-9a-f]+)"', answer.text)
        assert found, answer
        return found[1]

    def say(self, path: str, text: str, key: str) -> Answer:
        """Send a message."""
        return self.browser.post(f"{path}/messages", csrf_token=self.token, key=key, message=text)

    def insist(self, path: str, text: str, key: str) -> None:
        """Send a message until the server says that it has it, however often its workers are killed meanwhile."""
        until = time.monotonic() + 4 * DEADLINE
        while True:
            try:
                answer = self.say(path, text, key)
            except (OSError, HTTPException):
                assert time.monotonic() < until
                time.sleep(0.1)
            else:
                assert answer.status == 303, answer
                return

    def listen(self, path: str, **options: Any) -> Listener:
        """Listen to a conversation."""
        return Listener(self.server.port, path, dict(self.browser.cookies), **options)
