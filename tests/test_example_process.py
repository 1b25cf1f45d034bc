"""The example application as its README starts it: several processes, killed in the middle of a dialogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chatting import Person, copy_of_example, messages_in
from tests.web import Gunicorn

SQLITE_IN_THE_INSTANCE_FOLDER = "no setting at all"


@pytest.fixture(params=[SQLITE_IN_THE_INSTANCE_FOLDER, pytest.param("file", marks=pytest.mark.soak), "redis"])
def server(request: pytest.FixtureRequest, tmp_path: Path, new_url: Callable[[str], str]) -> Iterator[Gunicorn]:
    """The example on two workers."""
    environment = {}
    if request.param != SQLITE_IN_THE_INSTANCE_FOLDER:
        environment["FLASK_PERSIST_SESSION_STORE"] = new_url(request.param)
    server = copy_of_example(tmp_path, "--workers", "2", "--threads", "4", **environment)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_a_dialogue_outlives_the_server(server: Gunicorn, tmp_path: Path) -> None:
    """A server killed in the middle of a dialogue and started again goes on with it, earlier answers included."""
    ada = Person(server, "Ada")
    path = ada.begin()
    for answer in ("bicycle", "Trek", "FX 2"):
        assert ada.say(path, answer, answer).status == 303

    server.kill()
    server.start()

    back = Person(server, "Ada", ada.browser.cookies)
    back.token = ada.token
    for answer in ("2019", "€ 250"):
        assert back.say(path, answer, answer).status == 303
    messages = messages_in(back.browser.get(path).text)
    assert len(messages) == 11
    assert "For sale: Trek FX 2 bicycle, 2019, € 250" in messages[-1]
    assert (tmp_path / "instance" / "secret_key").exists()
