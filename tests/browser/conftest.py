"""What the tests in a browser share: one Chromium, one server, and people with devices of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.chromium import NoChromium, running
from tests.browser.people import OPERATORS, Devices
from tests.chatting import copy_of_example
from tests.servers import DEADLINE
from tests.web import Gunicorn

expect.set_options(timeout=DEADLINE * 1000)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """The browser; each device of each test has a context of its own in it."""
    try:
        with running() as browser:
            yield browser
    except NoChromium as problem:
        # What CI does not run, nobody runs.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(problem))


def serve(folder: Path, pace: str) -> Iterator[Gunicorn]:
    """Serve the example as its README says, to users of two devices at most."""
    server = copy_of_example(
        folder,
        *("--workers", "2", "--threads", "12"),
        FLASK_PERSIST_SESSION_MAX_PER_USER="2",
        FLASK_CHAT_ADMINS=",".join(OPERATORS),
        FLASK_CHAT_PACE=pace,
        FLASK_CHAT_STALE="2",
        FLASK_CHAT_STREAMS="8",
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """The example with quick answers, for all tests, of which each has users of its own."""
    yield from serve(tmp_path_factory.mktemp("chat"), pace="0.02")


@pytest.fixture(scope="package")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """The example with answers that take a few seconds, so that there is a middle of them."""
    yield from serve(tmp_path_factory.mktemp("slow"), pace="0.4")


@pytest.fixture
def devices(chromium: Browser, server: Gunicorn) -> Iterator[Devices]:
    """Makes devices; fails when a page of one complained or asked for something elsewhere."""
    with Devices(chromium, server) as made:
        yield made


@pytest.fixture
def slow_devices(chromium: Browser, slow_server: Gunicorn) -> Iterator[Devices]:
    """Makes devices at the slow server."""
    with Devices(chromium, slow_server) as made:
        yield made
