"""The example application as its README starts it: several processes, killed in the middle of a dialogue."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import example_app
from tests.web import Browser, Gunicorn

SQLITE_IN_THE_INSTANCE_FOLDER = "no setting at all"


@pytest.fixture(params=[SQLITE_IN_THE_INSTANCE_FOLDER, "file", "redis"])
def server(request: pytest.FixtureRequest, tmp_path: Path, new_url: Callable[[str], str]) -> Iterator[Gunicorn]:
    """A copy of the example, so that its instance folder, with the secret key, is the test's own."""
    shutil.copytree(Path(example_app.__file__).parent, tmp_path / "example_app")
    environment = {}
    if request.param != SQLITE_IN_THE_INSTANCE_FOLDER:
        environment["FLASK_PERSIST_SESSION_STORE"] = new_url(request.param)
    server = Gunicorn(tmp_path, "example_app:create_app()", "--workers", "2", "--threads", "2", **environment)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def send(browser: Browser, path: str, **form: str) -> None:
    """Send a form with the token of the page in front of the user."""
    page = browser.get("/sign-in" if path == "/sign-in" else "/")
    token = re.search(r'name="csrf_token" value="([^"]+)"', page.text)
    assert token, page.text
    assert browser.post(path, csrf_token=token[1], **form).status == 303


def test_a_dialogue_outlives_the_server(server: Gunicorn, tmp_path: Path) -> None:
    """A server killed in the middle of a dialogue and started again goes on with it, earlier answers included."""
    ada = server.browser()
    send(ada, "/sign-in", name="Ada")
    for answer in ("bicycle", "Trek", "FX 2"):
        send(ada, "/messages", message=answer)

    server.kill()
    server.start()

    back = server.browser(ada.cookies)
    for answer in ("2019", "€ 250"):
        send(back, "/messages", message=answer)
    page = html.unescape(back.get("/").text)
    assert len(re.findall(r'<li class="(?:user|assistant)">', page)) == 11
    assert "For sale: Trek FX 2 bicycle, 2019, € 250" in page
    assert (tmp_path / "instance" / "secret_key").exists()
