"""People at their devices, as the tests see them: what they do on a page, and what must not happen there."""

from __future__ import annotations

import itertools
import re
from types import TracebackType
from typing import Any

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, expect

from tests.servers import DEADLINE
from tests.web import Gunicorn

DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
SMALLEST: dict[str, Any] = {**PHONE, "viewport": {"width": 320, "height": 568}}
OPERATORS = [f"Olga the {number}" for number in range(1, 100)]
_numbers = itertools.count(1)


class Devices:
    """Makes devices, and watches what their pages complain about and ask for."""

    def __init__(self, browser: Browser, server: Gunicorn) -> None:
        self.server = server
        self.address = f"http://127.0.0.1:{server.port}"
        self.complaints: list[str] = []
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self._number = next(_numbers)

    def __enter__(self) -> Devices:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for context in self._contexts:
            context.close()
        if error is None:
            self.check()

    def check(self) -> None:
        """Fail if a page complained, or asked for something elsewhere."""
        assert self.complaints == []

    def new(self, **options: Any) -> Page:
        """A page on another device: a context with cookies of its own."""
        context = self._browser.new_context(base_url=self.address, **{**DESKTOP, **options})
        context.set_default_timeout(DEADLINE * 1000)
        context.on("console", self._heard)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.on("request", self._asked)
        self._contexts.append(context)
        return context.new_page()

    def of(self, name: str, **options: Any) -> Page:
        """A page on another device, where somebody has signed in, whom other tests do not know."""
        page = self.new(**options)
        sign_in(page, self.full(name))
        return page

    def full(self, name: str) -> str:
        """The name of somebody whom other tests do not know; Olga is an operator."""
        return f"{name} the {self._number}"

    def forgive(self, pattern: str) -> None:
        """Drop the complaints that a test is about."""
        self.complaints = [words for words in self.complaints if not re.search(pattern, words)]

    def _heard(self, message: ConsoleMessage) -> None:
        # Refusals by the Content-Security-Policy are errors of the console, too.
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _asked(self, request: Request) -> None:
        if not request.url.startswith(f"{self.address}/"):
            self.complaints.append(f"asked for {request.url}")


def sign_in(page: Page, name: str) -> None:
    page.goto("/sign-in")
    page.get_by_role("textbox", name="Your name").fill(name)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()


def begin(page: Page) -> None:
    """Begin a conversation."""
    if is_narrow(page):
        page.get_by_role("button", name="Show conversations").click()
    page.get_by_role("button", name="New conversation").click()
    expect(answers(page)).to_contain_text(["What would you like to sell?"])
    page.wait_for_load_state()  # with its script, before a test takes the server away


def is_narrow(page: Page) -> bool:
    """Whether the side bar has to be opened."""
    return page.viewport_size is not None and page.viewport_size["width"] < 768


def say(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message").fill(text)
    page.get_by_role("button", name="Send").click()


def dialogue(page: Page) -> Locator:
    """All messages that are complete."""
    return page.get_by_role("log", name="Messages").locator("li:not(.pending) p")


def answers(page: Page) -> Locator:
    """The assistant's messages that are complete."""
    return page.get_by_role("log", name="Messages").locator("li.assistant:not(.pending) p")


def growing(page: Page) -> Locator:
    """The answer that is being written."""
    return page.locator("li.assistant.pending p")


def mark(page: Page) -> None:
    """Leave a mark that a reload would wipe out."""
    page.evaluate("window.marked = true")


def is_marked(page: Page) -> bool:
    return bool(page.evaluate("window.marked === true"))
