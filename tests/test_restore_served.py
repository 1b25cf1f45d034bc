"""A restore while gunicorn serves: what browsers see of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from flask_persist_session import Deletion, RestoreReport, SessionManager, SessionQuery, open_store
from flask_persist_session.backup import Strategy, back_up, restore
from tests.conftest import SHARED_STORES
from tests.servers import wait_until
from tests.web import Gunicorn

ROOT = Path(__file__).parent.parent
VISITORS = 3
BEFORE = [0, 1, 2]
#: Sessions that are in the backup and not in the store any more: several batches.
LOST = 900


@pytest.fixture(params=SHARED_STORES)
def url(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> str:
    return new_url(request.param)


@pytest.fixture
def server(url: str, tmp_path: Path) -> Iterator[Gunicorn]:
    environment = {"FLASK_SECRET_KEY": "for tests only", "FLASK_PERSIST_SESSION_STORE": url}
    options = ("--workers", "2", "--threads", "3", "--pythonpath", str(ROOT))
    gunicorn = Gunicorn(tmp_path, "tests.race_app:create_app()", *options, **environment)
    gunicorn.start()
    yield gunicorn
    gunicorn.stop()


class Visitor:
    """A browser that appends to a list in its session, one number after the other."""

    def __init__(self, server: Gunicorn) -> None:
        self._browser = server.browser()
        self.appended = 0
        for _ in BEFORE:
            self.append()

    def append(self) -> None:
        answer = self._browser.post("/append", key="numbers", number=str(self.appended))
        assert answer.status == 200, answer.text
        self.appended += 1

    def append_until(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.append()

    @property
    def numbers(self) -> list[int]:
        answer = self._browser.get("/")
        assert answer.status == 200, answer.text
        return list(answer.json()["session"].get("numbers", []))


def reached_by(visitor: Visitor, goal: int) -> bool:
    return visitor.appended >= goal


def restored_while_appending(
    manager: SessionManager, path: str, strategy: Strategy, visitors: list[Visitor]
) -> RestoreReport:
    """Restore while all *visitors* append; each of them does so after each batch too."""

    def go_on(_count: int) -> None:
        goals = [visitor.appended + 2 for visitor in visitors]
        wait_until(lambda: all(map(reached_by, visitors, goals)), "requests of all visitors during the restore")

    stop = threading.Event()
    with ThreadPoolExecutor(len(visitors)) as pool:
        appending = [pool.submit(visitor.append_until, stop) for visitor in visitors]
        try:
            report = restore({"web": manager}, path, strategy=strategy, started=go_on, progress=go_on)
        finally:
            stop.set()
        for future in appending:
            future.result()
    return report


@pytest.mark.parametrize("strategy", ["skip", pytest.param("newer", marks=pytest.mark.soak), "overwrite"])
def test_requests_go_on_during_a_restore(url: str, server: Gunicorn, strategy: Strategy, tmp_path: Path) -> None:
    """No request fails or loses its change, lost sessions come back, and one that was revoked since does not."""
    with closing(open_store(url)) as store:
        manager = SessionManager(store)
        revoked = Visitor(server)
        # Each worker has made a session as well.
        [gone] = [record.id for record in manager.find() if "numbers" in manager.decode(record)]
        visitors = [Visitor(server) for _ in range(VISITORS)]
        lost = [manager.create({"n": number}).id for number in range(LOST)]
        path = back_up({"web": manager}, str(tmp_path / "backups"), now=manager.clock()).path
        manager.revoke(gone)
        store.delete_many([Deletion(id=session_id) for session_id in lost])
        report = restored_while_appending(manager, path, strategy, visitors)
        assert (report.restored, report.failed) == (LOST, 0)
        assert store.count(SessionQuery(ids=frozenset(lost[:100]))) == 100
    assert revoked.numbers == []
    for visitor in visitors:
        check(visitor, strategy)


def check(visitor: Visitor, strategy: Strategy) -> None:
    """Everything is there, but for what ``overwrite`` put back to the state of the backup."""
    numbers, everything = visitor.numbers, list(range(visitor.appended))
    if strategy == "overwrite":
        assert numbers[: len(BEFORE)] == BEFORE
        assert numbers[len(BEFORE) :] == everything[-(len(numbers) - len(BEFORE)) :]
        assert len(numbers) > len(BEFORE)
    else:
        assert numbers == everything
