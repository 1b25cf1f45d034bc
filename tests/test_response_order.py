"""Responses that arrive in the wrong order, over HTTP: a slow request never takes the cookie of a newer sign-in away."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED_STORES
from tests.order_app import ACTS
from tests.web import Browser, Gunicorn

ROOT = Path(__file__).parent.parent
#: What comes when is not the store's: one is enough, and make soak has them all.
KINDS = ["sqlite", *(pytest.param(kind, marks=pytest.mark.soak) for kind in SHARED_STORES if kind != "sqlite")]
SIGN_INS = ("sign in", "sign in after clearing", "bind")
#: What changes the user by itself, and so is no slow request but a second sign-in.
SLOW = [act for act in ACTS if act not in (*SIGN_INS, "sign in as another")]
_numbers = itertools.count(1)


class Site:
    """The application, served by one process with threads, and browsers whose requests can be held in the view."""

    def __init__(self, server: Gunicorn) -> None:
        self._server = server
        self._control = server.browser()

    def advance(self, seconds: int) -> None:
        self._ask(self._control, f"/advance/{seconds}")

    def browser(self, cookies: dict[str, str] | None = None) -> Browser:
        return self._server.browser(cookies)

    def visit(self, act: str, browser: Browser, query: str = "") -> None:
        self._ask(browser, f"/act/{act.replace(' ', '%20')}?{query}")

    def seen(self, browser: Browser) -> dict[str, Any]:
        """What the next request of the browser finds."""
        return dict(self._ask(browser, "/").json())

    @contextmanager
    def held(self, act: str, browser: Browser, query: str = "") -> Iterator[None]:
        """A request that has come to its view, and goes on to its answer only after the block."""
        gate = str(next(_numbers))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.visit, act, browser, f"gate={gate}&{query}")
            try:
                self._ask(self._control, f"/reached/{gate}")
                yield
            finally:
                self._ask(self._control, f"/open/{gate}")
            answer.result()

    def _ask(self, browser: Browser, path: str) -> Any:
        answer = browser.get(path)
        assert answer.status == 200, f"{path}: {answer.text}\n{self._server.log()}"
        return answer


@pytest.fixture
def serve(tmp_path: Path, new_url: Callable[[str], str]) -> Iterator[Callable[..., Site]]:
    """Starts the application on a new store of a kind; keyword arguments are settings."""
    servers = []

    def start(kind: str, **settings: str) -> Site:
        environment = {f"FLASK_PERSIST_SESSION_{name}": value for name, value in settings.items()}
        environment |= {"FLASK_SECRET_KEY": "for tests only", "FLASK_PERSIST_SESSION_STORE": new_url(kind)}
        options = ("--threads", "6", "--pythonpath", str(ROOT))
        servers.append(Gunicorn(tmp_path, "tests.order_app:create_app()", *options, **environment))
        servers[-1].start()
        return Site(servers[-1])

    yield start
    for server in servers:
        server.stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["write the same", "sign in as another"])
@pytest.mark.parametrize("sign_in", [*SIGN_INS, "regenerate"])
def test_a_slow_request_does_not_take_the_new_cookie_away(
    serve: Callable[..., Site], kind: str, before: str, sign_in: str
) -> None:
    """Whatever a request under the old token does, answered after the sign-in it neither revives nor replaces anything.

    Whether it looked at the session before the sign-in or only after it, and whether a renewal was due or had just been
    made by another request.
    """
    site = serve(kind)
    for act, look, late, renewed in itertools.product(SLOW, ("look", ""), (0, 3600), (False, True)):
        slow = site.browser()
        site.visit(before, slow)
        site.visit("write the same", slow)
        old = dict(slow.cookies)
        site.advance(late)
        if renewed:
            site.visit("nothing", site.browser(old))
        fast = site.browser(old)
        with site.held(act, slow, look):
            site.visit(sign_in, fast)
            assert fast.cookies != old
            signed_in = site.seen(site.browser(fast.cookies))
            # Both are tabs of one browser: the answer of the sign-in has arrived, that of the slow request comes now.
            slow.cookies = dict(fast.cookies)
        assert slow.cookies == fast.cookies, (act, look, late, renewed)
        assert site.seen(slow) == signed_in, (act, look, late, renewed)
        assert site.seen(site.browser(old)) == {"data": {}, "user_id": None}, (act, look, late, renewed)
        for browser in (slow, fast):
            browser.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign_in", SIGN_INS)
@pytest.mark.parametrize("before", ["nothing", "write the same", "sign in as another"])
def test_a_form_sent_twice_signs_in(serve: Callable[..., Site], kind: str, sign_in: str, before: str) -> None:
    """Of two sign-ins at once, whichever response comes last, the browser has a cookie that opens a live session."""
    site = serve(kind, MAX_PER_USER="2")
    for look in ("look", ""):
        site.advance(1)  # what is older is evicted first
        first, second = site.browser(), site.browser()
        site.visit(before, first)
        old = dict(first.cookies)
        second.cookies = dict(old)
        with site.held(sign_in, first, look), site.held(sign_in, second, look):
            pass
        answered = [browser.cookies for browser in (first, second) if browser.cookies != old]
        assert answered
        for cookies in answered:
            assert site.seen(site.browser(cookies))["user_id"] == "Ada", look
