"""A restore reads the next sessions while the store takes the last ones; whatever ends it, nothing is half done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flask_persist_session import Change, RestoreReport, SessionManager, SessionStore, StoreUnavailable, open_store
from flask_persist_session import backup as backup_module
from flask_persist_session.backup import back_up, restore
from flask_persist_session.record_lines import dump_record, load_line
from tests.conftest import Clock
from tests.counting import CountingStore
from tests.servers import DEADLINE, wait_until


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup_module, "_BATCH", 2)


class Watched(CountingStore):
    """Calls ``before`` with the number of each batch of an archive, before it is stored."""

    before: Callable[[int], object] = staticmethod(lambda number: None)
    archived: Sequence[str] = ()

    def save_many(self, changes: Sequence[Change]) -> list[bool]:
        self.operations["save_many"] += 1
        if changes and changes[0].id in self.archived:
            self.before(1 + self.archived.index(changes[0].id) // 2)
        return self.store.save_many(changes)

    def ids(self) -> set[str]:
        return {record.id for record in self.store.scan()}


def chats_on(store: SessionStore, clock: Clock) -> SessionManager:
    return SessionManager(store, namespace="chat", keep_data=True, clock=clock)


@pytest.fixture
def source(clock: Clock) -> SessionManager:
    """Seven sessions, in four batches."""
    chats = chats_on(open_store("memory://"), clock)
    for number in range(7):
        chats.create({"n": number})
    return chats


@pytest.fixture
def path(source: SessionManager, clock: Clock, tmp_path: Path) -> str:
    return back_up({"chat": source}, str(tmp_path), now=clock()).path


@pytest.fixture(params=[1, 2], ids=["one writer", "two writers"])
def target(request: pytest.FixtureRequest, source: SessionManager) -> Watched:
    """An empty store that takes one batch at a time, or two."""
    target = Watched(open_store("memory://"))
    target.archived = [record.id for record in source.store.snapshot()]
    target.writers = request.param
    return target


@pytest.fixture
def chats(target: Watched, clock: Clock) -> SessionManager:
    return chats_on(target, clock)


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("session-restore")]


def _repeated(chats: SessionManager, target: Watched, path: str, already: int) -> None:
    """A repeat brings what is missing, and counts what was there already as that."""
    target.before = lambda number: None  # type: ignore[method-assign]
    report = restore({"chat": chats}, path)
    assert report == RestoreReport(restored=7 - already, skipped=already)
    assert sorted(chats.decode(record)["n"] for record in chats.store.scan()) == list(range(7))


def test_the_next_batch_is_read_while_the_last_is_stored(
    path: str, chats: SessionManager, target: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is not waited for, but for as many batches as it takes at a time."""
    looked_at: list[str] = []
    following_is_read, last_is_begun, at_once = threading.Event(), threading.Event(), target.writers
    is_over = chats.is_over

    def noticed(record: object) -> bool:
        looked_at.append("")
        if len(looked_at) == 2 * at_once + 1:
            following_is_read.set()
        return is_over(record)  # type: ignore[arg-type]

    monkeypatch.setattr(chats, "is_over", noticed)
    missing: list[int] = []

    def wait(number: int) -> None:
        missing.append(2 * (number - 1) - len(target.ids()))
        if number == at_once:
            last_is_begun.set()
        assert number > 1 or (following_is_read.wait(DEADLINE) and last_is_begun.wait(DEADLINE))

    target.before = wait  # type: ignore[method-assign]
    assert restore({"chat": chats}, path).restored == 7
    assert len(missing) == 4
    assert max(missing) == 2 * (at_once - 1)
    assert no_thread_is_left()


def test_progress_tells_of_what_is_stored(path: str, chats: SessionManager, target: Watched) -> None:
    """A batch counts once it is in the store, and each session once."""
    told: list[tuple[int, int]] = []
    restore({"chat": chats}, path, progress=lambda more: told.append((more, len(target.ids()))))
    assert [more for more, _ in told] == ([2, 2, 2, 1] if target.writers == 1 else [2, 2, 3])
    assert all(stored >= sum(more for more, _ in told[: place + 1]) for place, (_, stored) in enumerate(told))


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_store_that_fails_ends_the_restore(path: str, chats: SessionManager, target: Watched, failing: int) -> None:
    """With its error, also from the last batch; what was stored until then is whole, and no batch is begun later."""
    begun = min(failing + target.writers - 1, 4)

    def fail(number: int) -> None:
        if number == failing:
            raise StoreUnavailable("gone")

    target.before = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="gone"):
        restore({"chat": chats}, path)
    assert no_thread_is_left()
    stored = 7 - 2 if failing < begun == 4 else 2 * (begun - 1)
    assert (target.operations["save_many"], len(target.ids())) == (begun, stored)
    _repeated(chats, target, path, stored)


@pytest.mark.parametrize("read", [3, 6])
def test_an_interruption_while_reading(
    path: str, chats: SessionManager, target: Watched, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    """Ctrl-C while the next batch is read: the one that is being stored is stored to its end, and nothing after it."""
    reading = threading.Event()
    is_over, looked_at = chats.is_over, list[object]()

    def interrupted(record: object) -> bool:
        looked_at.append(record)
        if len(looked_at) == read:
            reading.set()
            raise KeyboardInterrupt
        return is_over(record)  # type: ignore[arg-type]

    under_way = (read - 1) // 2
    target.before = lambda number: number < under_way or reading.wait(DEADLINE)  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(chats, "is_over", interrupted)
        with pytest.raises(KeyboardInterrupt):
            restore({"chat": chats}, path)
    assert no_thread_is_left()
    assert len(target.ids()) == 2 * under_way
    _repeated(chats, target, path, 2 * under_way)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_an_interruption_while_the_store_is_waited_for(
    path: str, chats: SessionManager, target: Watched, batch: int
) -> None:
    """A signal while a batch is stored: it is stored to its end, and a repeat settles the rest."""

    def interrupt(number: int) -> None:
        if number == batch:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    target.before = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        restore({"chat": chats}, path)
    wait_until(no_thread_is_left, "the thread that stores")  # the signal may come while that is waited for
    stored = len(target.ids())
    assert stored in (2 * batch, 7)
    _repeated(chats, target, path, stored)


@pytest.mark.parametrize("place", range(8))
def test_a_history_between_batches_without(
    clock: Clock, tmp_path: Path, target: Watched, chats: SessionManager, place: int
) -> None:
    """A session with a history comes by itself, after what was read before it, wherever in the archive it is."""
    source = chats_on(open_store("memory://"), clock)
    for number in range(8):
        made = source.create({"n": number})
        if number == place:
            source.history(made.id).append(*({"role": "user", "content": text} for text in "abc"))
            talked = made.id
    path = back_up({"chat": source}, str(tmp_path), now=clock()).path
    told: list[int] = []
    report = restore({"chat": chats}, path, progress=told.append)
    assert report == RestoreReport(restored=8, entries=3)
    assert sum(told) == 8
    assert [entry.content for entry in chats.history(talked)] == ["a", "b", "c"]
    assert sorted(chats.decode(record)["n"] for record in target.scan()) == list(range(8))
    assert restore({"chat": chats}, path) == RestoreReport(skipped=8)


def test_a_session_that_is_removed_while_its_history_is_restored(
    source: SessionManager,
    chats: SessionManager,
    target: Watched,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It alone fails and says why; the others come back."""
    talked, *_ = (record.id for record in source.store.scan())
    source.history(talked).append({"role": "user", "content": "a"})
    path, load_history = back_up({"chat": source}, str(tmp_path), now=clock()).path, backup_module.load_history

    def removed_meanwhile(line: bytes) -> object:
        target.delete(talked)
        return load_history(line)

    monkeypatch.setattr(backup_module, "load_history", removed_meanwhile)
    report = restore({"chat": chats}, path)
    assert (report.restored, report.failed) == (6, 1)
    assert f"{talked}: it was changed while its history was restored" in report.reasons[0]


def test_each_count_of_several_batches(
    source: SessionManager, path: str, chats: SessionManager, target: Watched, clock: Clock
) -> None:
    """What is there, has ended, expires or is missing counts right, in whichever batch it is."""
    restore({"chat": chats}, path)
    first, second, third, *_, last = (record.id for record in source.store.scan())
    target.delete(first)
    chats.end(second, "revoked")
    target.delete(third)
    chats.end(last, "revoked")
    assert restore({"chat": chats}, path) == RestoreReport(restored=2, ended=2, skipped=3)
    assert restore({"chat": chats}, path, strategy="overwrite") == RestoreReport(overwritten=5, ended=2)
    clock.advance(40 * 86400)
    assert restore({"chat": chats}, path) == RestoreReport(expired=7)


def test_a_session_that_is_twice_in_an_archive(
    path: str, chats: SessionManager, target: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line counts, however long the store takes for it: others of its id wait until it is stored."""
    sessions, twice = backup_module._sessions, list[Any]()

    def repeated(members: Any) -> Any:
        for session in sessions(members):
            if len(twice) == 2:
                other = load_line(twice[0].line)[0]
                yield replace(session, line=dump_record(replace(other, tags=frozenset({"second"}))))
            twice.append(session)
            yield session

    def wait(_: int) -> None:
        if target.operations["save_many"] == 1:
            time.sleep(0.05)  # in which the second batch would be stored, if it were begun

    monkeypatch.setattr(backup_module, "_sessions", repeated)
    target.before = wait  # type: ignore[method-assign]
    report = restore({"chat": chats}, path)
    assert (report.restored, report.skipped) == (7, 1)
    assert not [record for record in target.scan() if record.tags]


def test_a_dry_run_starts_nothing(path: str, chats: SessionManager, target: Watched) -> None:
    """It stores nothing, and counts what would be."""
    told: list[int] = []
    report = restore({"chat": chats}, path, dry_run=True, progress=told.append)
    assert report == RestoreReport(restored=7, dry_run=True)
    assert (target.ids(), told) == (set(), [2, 2, 2, 1])
    assert "save_many" not in target.operations
