"""Backs up the sessions of live stores into an archive, and restores them from one."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar

from . import archive as backup_archive
from . import monthly_archive
from .archive import ArchiveWriter, Manifest, Progress, silent
from .backup_files import drafting, is_archive_name, opened, rotate
from .creating import OVERWRITTEN, RESTORING
from .exceptions import BackupError, SerializationError, SessionConflict, SessionNotFound, UnsupportedByStore
from .lifecycle import WEB
from .manager import SessionManager
from .monthly_archive import Contents, is_monthly_archive
from .record_lines import HISTORY, RecordLine, cut_off, dump_history, facts_of, load_history, load_line
from .records import Change, SessionQuery, SessionRecord
from .stores.base import SessionStore, check_save
from .stores.history import HistoryLog
from .version import __version__

Managers: TypeAlias = Mapping[str, SessionManager]
_T = TypeVar("_T")
Strategy: TypeAlias = Literal["skip", "overwrite", "newer"]

STRATEGIES = ("skip", "overwrite", "newer")
#: How many records are restored at once, and about how many bytes of lines. A store that has one lock for all is locked
#: meanwhile, for some 10 to 15 ms.
_BATCH = 600
_BATCH_BYTES = 2 * 1024 * 1024
#: Seconds that reading keeps the interpreter at most, and for which it then leaves it to whoever waits. By itself it would
#: be taken away after 5 ms (``sys.getswitchinterval``), and the thread that writes waits for it after each answer, with
#: what it has locked.
_TURN, _MOMENT = 0.0005, 0.0001
#: So many objects at most a release of Python keeps from the garbage collector itself.
_FROZEN_BY_PYTHON = 1000
#: After how many more objects it looks at the young ones; by default after 700, which a batch has several times.
_YOUNG_OBJECTS = 20_000
#: Within so many bytes at the end of a record's line stands how many entries its history has.
_SAYS_ENTRIES = 100
_STEP = 1000
_ATTEMPTS = 50
_REASONS = 10
#: Seconds after which what stands for a session is removed if nobody goes on with restoring its history.
_PATIENCE = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupReport:
    """What a backup wrote."""

    path: str
    created_at: float
    """Seconds since the epoch at which it began."""
    bytes: int
    """Size of the archive."""
    active: int = 0
    expired: int = 0
    """Expired ones, and ended ones whose reason has been kept long enough; only if they were asked for."""
    ended: int = 0
    """Ended ones, without data, so that a restore knows of their end."""
    entries: int = 0
    """Entries of their histories."""
    left_out: int = 0
    """Sessions too large for an archive, which are missing in it."""
    removed: tuple[str, ...] = ()
    """Paths of older archives that made room."""

    @property
    def sessions(self) -> int:
        """How many sessions the archive has."""
        return self.active + self.expired + self.ended


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What a restore did, or with *dry_run* would do, with each session of an archive."""

    restored: int = 0
    """Sessions that were missing and are there again."""
    overwritten: int = 0
    """Live ones that were replaced."""
    skipped: int = 0
    """Live ones that stayed as they were."""
    ended: int = 0
    """Sessions that ended after the backup, and stay so."""
    expired: int = 0
    """Sessions whose time was up, in the archive or in the store."""
    failed: int = 0
    entries: int = 0
    """Entries of the histories that came back with their sessions."""
    reasons: tuple[str, ...] = ()
    """Why sessions failed, of the first ten."""
    dry_run: bool = False

    @property
    def sessions(self) -> int:
        """How many sessions the archive has."""
        return self.restored + self.overwritten + self.skipped + self.ended + self.expired + self.failed


# Backing up -----------------------------------------------------------------------------------------------------------


def back_up(
    managers: Managers,
    place: str,
    *,
    now: float,
    user_id: object = None,
    tenant_id: object = None,
    tags: Iterable[str] = (),
    include_expired: bool = False,
    keep: int | None = None,
    progress: Progress = silent,
) -> BackupReport:
    """Write the sessions of *managers*, by namespace, to an archive in the directory *place*, or of that name.

    Of a store that can, it has the sessions of one moment, while others write on. *progress* is told how many more
    sessions were read. For the rest see ``PersistSession.backup``.
    """
    if keep is not None and (keep < 1 or is_archive_name(place)):
        raise ValueError(f"keep is {keep!r}; allowed is 1 or more, for backups in a directory")
    query = SessionQuery(
        user_id=None if user_id is None else str(user_id),
        tenant_id=None if tenant_id is None else str(tenant_id),
        tags=frozenset([tags] if isinstance(tags, str) else tags),
    )
    filters = {
        "user_id": query.user_id,
        "tenant_id": query.tenant_id,
        "tags": sorted(query.tags),
        "include_expired": include_expired,
    }
    run, part = _Backup(query, include_expired, progress), query != SessionQuery()
    try:
        with drafting(place, now, part=part) as draft:
            run.write(managers, draft.file, now, filters)
        size = os.path.getsize(draft.path)
        latest = max(now, _first(managers).clock())
        removed = () if keep is None else rotate(os.path.dirname(draft.path), keep, latest, part=part)
    except OSError as error:
        raise BackupError(f"the backup cannot be written to {place}: {error.strerror or error}") from error
    total = sum(run.counts.values(), Counter())
    return BackupReport(
        path=draft.path,
        created_at=now,
        bytes=size,
        entries=run.entries,
        left_out=run.left_out,
        removed=removed,
        **dict(total),
    )


def _first(managers: Managers) -> SessionManager:
    return next(iter(managers.values()))


class _Backup:
    def __init__(self, query: SessionQuery, include_expired: bool, progress: Progress) -> None:
        self._query = query
        self._everything = query == SessionQuery()
        self._include_expired = include_expired
        self._progress = progress
        self.counts: dict[str, Counter[str]] = {}
        self.left_out = self.entries = 0

    def write(self, managers: Managers, file: BinaryIO, now: float, filters: Mapping[str, object]) -> None:
        with closing(ArchiveWriter(file, created_at=now)) as archive:
            for namespace, manager in managers.items():
                archive.start(namespace)
                self.counts[namespace] = self._add_all(archive, manager)
            archive.complete(
                package=__version__,
                stores={namespace: type(manager.store).__name__ for namespace, manager in managers.items()},
                filters=filters,
                counts={namespace: dict(counts) for namespace, counts in self.counts.items()},
            )

    def _add_all(self, archive: ArchiveWriter, manager: SessionManager) -> Counter[str]:
        counts: Counter[str] = Counter()
        history = manager.history_log()
        for number, record in enumerate(manager.store.snapshot(), 1):
            if number % _STEP == 0:
                self._progress(_STEP)
            state = manager.state(record)
            if manager.is_over(record) and not self._include_expired:
                continue
            if not (self._everything or self._query.matches(record)):
                continue
            facts = facts_of(history, record.id) if history else {}
            if not archive.add(record, **facts):
                self.left_out += 1
                continue
            counts[state] += 1
            if history and facts:
                self._add_history(archive, manager.store, history, record, facts["entries"])
        return counts

    def _add_history(
        self, archive: ArchiveWriter, store: SessionStore, history: HistoryLog, record: SessionRecord, count: Any
    ) -> None:
        def is_same() -> bool:
            # Where a key was used anew meanwhile, what is there is the history of another session.
            current = store.get(record.id)
            return current is not None and current.created_at == record.created_at

        for line in dump_history(history, record.id, count, same=is_same):
            if not archive.add_line(line):
                archive.add_line(cut_off(record.id))
                break
        self.entries += count


# Restoring ------------------------------------------------------------------------------------------------------------


def restore(
    managers: Managers,
    path: str,
    *,
    strategy: Strategy = "skip",
    dry_run: bool = False,
    sign_out: bool = False,
    verified: Progress = silent,
    started: Progress = silent,
    progress: Progress = silent,
) -> RestoreReport:
    """Bring back the sessions of the archive *path*, once the whole of it is verified.

    *verified* is told how many more sessions were verified, then *started* how many the archive has, then *progress* how
    many more were looked at. For the rest see ``PersistSession.restore``.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; allowed is one of {', '.join(STRATEGIES)}")
    try:
        with opened(path) as file, _collecting_little():
            contents = _verify(file, verified, _first(managers).clock())
            _check_namespaces(contents, managers)
            started(contents.records)
            at_once = min(manager.store.writers for manager in managers.values())
            with ThreadPoolExecutor(at_once, "session-restore") as writers:
                run = _Restore(writers, at_once, strategy, dry_run, sign_out)
                for namespace, batch in _batches(_sessions(_read_lines(file, contents))):
                    if done := run.restore(managers[namespace], batch):
                        progress(done)
                if done := run.finish():
                    progress(done)
            return run.report()
    except FileNotFoundError as error:
        raise BackupError(f"there is no archive {path}") from error


@contextmanager
def _collecting_little() -> Iterator[None]:
    """Meanwhile the garbage collector looks at nothing that was there before, and less often at what is new.

    A look at all that an application consists of takes some 50 ms, in which no thread can go on; others would wait for
    what one of them has locked.
    """
    young, *older = gc.get_threshold()  # before the look: where another restore has not frozen, it has not set them either
    if gc.get_freeze_count() > _FROZEN_BY_PYTHON:  # by the application, or another restore
        yield
        return
    gc.freeze()
    gc.set_threshold(young and max(young, _YOUNG_OBJECTS), *older)  # 0: the application does without
    try:
        yield
    finally:
        gc.set_threshold(young, *older)
        gc.unfreeze()


def _verify(file: BinaryIO, progress: Progress, now: float) -> Manifest | Contents:
    """What a backup, or an archive of removed sessions, has."""
    if is_monthly_archive(file):
        return monthly_archive.verify(file, progress, now=now)
    return backup_archive.verify(file, progress)


def _read_lines(file: BinaryIO, contents: Manifest | Contents) -> Iterator[tuple[str, list[bytes]]]:
    if isinstance(contents, Contents):
        return monthly_archive.read_lines(file, contents)
    file.seek(0)
    return backup_archive.read_lines(file, contents)


def _check_namespaces(contents: Manifest | Contents, managers: Managers) -> None:
    unknown = [namespace for namespace in contents.counts if namespace not in managers]
    if unknown:
        raise BackupError(f"it has sessions of {', '.join(unknown)}, and this application has only {', '.join(managers)}")


@dataclass(slots=True)
class _Archived:
    """A line of a record, and the lines of its history, which are to be read before the next record is."""

    namespace: str
    line: bytes
    history: Iterator[bytes]
    has_history: bool


def _sessions(members: Iterator[tuple[str, list[bytes]]]) -> Iterator[_Archived]:
    lines = ((namespace, line) for namespace, content in members for line in content)
    following = next(lines, None)

    def history() -> Iterator[bytes]:
        nonlocal following
        while following is not None and following[1].startswith(HISTORY):
            line = following[1]
            following = next(lines, None)
            yield line

    while following is not None:
        namespace, line = following
        following = next(lines, None)
        has_lines = following is not None and following[1].startswith(HISTORY)
        rest = history() if has_lines else iter(())
        # Those that say they have one count as well: where a crash cut it off, its lines are missing.
        yield _Archived(namespace, line, rest, has_lines or b'"entries":' in line[-_SAYS_ENTRIES:])
        for _ in rest:  # of one that is not restored
            pass


def _batches(sessions: Iterator[_Archived]) -> Iterator[tuple[str, list[_Archived]]]:
    """Sessions of one namespace: some without history, or one with."""
    batch, size = list[_Archived](), 0
    for session in sessions:
        is_full = len(batch) >= _BATCH or size + len(session.line) > _BATCH_BYTES
        if batch and (is_full or session.has_history or session.namespace != batch[0].namespace):
            yield batch[0].namespace, batch
            batch, size = [], 0
        batch.append(session)
        size += len(session.line)
        if session.has_history:
            yield session.namespace, batch
            batch, size = [], 0
    if batch:
        yield batch[0].namespace, batch


def _in_turns(items: Iterable[_T]) -> Iterator[_T]:
    """The same items; while they are looked at, other threads get their turn now and then."""
    ends = time.perf_counter() + _TURN
    for item in items:
        yield item
        if time.perf_counter() > ends:
            time.sleep(_MOMENT)
            ends = time.perf_counter() + _TURN


class _Dialogue:
    """The history of a record, as an archive has it."""

    __slots__ = ("_last_at", "_lines", "_record_id", "count")

    def __init__(self, fields: RecordLine, lines: Iterator[bytes]) -> None:
        self.count = fields.entries
        self._last_at = fields.last_entry_at
        self._lines = lines
        self._record_id = fields.id

    def is_in(self, history: HistoryLog) -> bool:
        """Whether it is what *history* has, no more and no less."""
        if history.count(self._record_id) != self.count:
            return False
        last = history.read(self._record_id, limit=1, newest=True)
        return not last or last[0].created_at == self._last_at

    def put_into(self, history: HistoryLog) -> int:
        """Append it; returns the number of entries.

        Raises ``SessionConflict`` if others interfere, ``SerializationError`` if the archive has not all of it.
        """
        last = 0
        for line in self._lines:
            session_id, entries = load_history(line)
            if session_id != self._record_id:
                raise SerializationError("the archive has entries of another session in its history")
            if not entries:
                return last
            try:
                history.restore(session_id, entries)
            except (SessionNotFound, ValueError) as error:
                raise SessionConflict(f"it was changed while its history was restored: {error}") from error
            last = entries[-1].seq
        if last < self.count:
            raise SerializationError(f"the archive has {last:,} of the {self.count:,} entries of its history")
        return last


class _Restore:
    """Restores batches of lines and counts what becomes of them."""

    def __init__(self, writers: Executor, at_once: int, strategy: Strategy, dry_run: bool, sign_out: bool) -> None:
        self._writers = writers
        self._at_once = at_once
        self._under_way = deque[tuple[frozenset[str], Callable[[], int]]]()
        self._strategy = strategy
        self._dry_run = dry_run
        self._sign_out = sign_out
        self._counts: Counter[str] = Counter()
        self._reasons: list[str] = []

    def report(self) -> RestoreReport:
        return RestoreReport(**self._counts, reasons=tuple(self._reasons), dry_run=self._dry_run)

    def restore(self, manager: SessionManager, batch: list[_Archived]) -> int:
        """Restore a batch, while the caller reads the next one; returns of how many sessions nothing is left to do."""
        wanted = list(self._wanted(manager, _in_turns(batch)))
        if self._dry_run or batch[0].has_history:
            done = self.finish()
            self._settle(manager, wanted)
            return done + len(batch)
        ids = frozenset(record.id for record, _ in wanted)
        # A session may be twice in an archive: its lines count in their order.
        is_alone = all(ids.isdisjoint(others) for others, _ in self._under_way)
        done = self.finish(but=self._at_once - 1 if is_alone else 0)
        changes = [Change(record=record, expected=0) for record, _ in wanted]
        creating = self._writers.submit(manager.store.save_many, changes)
        self._under_way.append((ids, partial(self._complete, manager, wanted, creating, len(batch))))
        return done

    def finish(self, *, but: int = 0) -> int:
        """Do what is left of all batches *but* the last ones; returns of how many sessions. Raises ``StoreError``."""
        done = 0
        while len(self._under_way) > but:
            _, complete = self._under_way.popleft()
            done += complete()
        return done

    def _complete(
        self,
        manager: SessionManager,
        wanted: list[tuple[SessionRecord, _Dialogue]],
        creating: Future[list[bool]],
        size: int,
    ) -> int:
        try:
            saved = creating.result()
        except ValueError:  # no store may save one of them, so none was saved; each by itself says which
            saved = [False] * len(wanted)
        self._counts["restored"] += sum(saved)
        self._settle(manager, [one for one, was_missing in zip(wanted, saved, strict=True) if not was_missing])
        return size

    def _settle(self, manager: SessionManager, present: list[tuple[SessionRecord, _Dialogue]]) -> None:
        """Do with each what the strategy says of those that are there already, or have a history."""
        live = _live(manager, [record for record, _ in present])
        for record, dialogue in present:
            try:
                self._counts[self._reconcile(manager, record, dialogue, live.get(record.id))] += 1
            except (SerializationError, SessionConflict, UnsupportedByStore, ValueError) as error:
                self._fail(record.id, error)

    def _wanted(self, manager: SessionManager, batch: Iterable[_Archived]) -> Iterator[tuple[SessionRecord, _Dialogue]]:
        """The records that are to be there again, with their histories."""
        for archived in batch:
            try:
                record, fields = load_line(archived.line, version=1)
                if manager.is_over(record):
                    self._counts["expired"] += 1
                    continue
                # Nobody is signed in by a session of the application's own, and without its user nobody would find it.
                if self._sign_out and manager.namespace == WEB:
                    record = manager.without_user(record)
                dialogue = _Dialogue(fields, archived.history)
                if dialogue.count and not archived.has_history:
                    raise SerializationError(f"the archive has none of the {dialogue.count:,} entries of its history")
            except (SerializationError, ValueError, TypeError) as error:
                self._fail(_id_in(archived.line), error)
            else:
                yield record, dialogue

    def _fail(self, name: str, error: Exception) -> None:
        self._counts["failed"] += 1
        if len(self._reasons) < _REASONS:
            self._reasons.append(f"{name}: {error}")

    def _reconcile(
        self, manager: SessionManager, record: SessionRecord, dialogue: _Dialogue, live: SessionRecord | None
    ) -> str:
        """Settle a record of which the store has, or had, another version; says under which count it falls."""
        check_save(record, 0)
        for _ in range(_ATTEMPTS):
            live = live or manager.store.get(record.id)
            fate = self._fate(manager, record, live)
            if fate not in ("restored", "overwritten") or self._dry_run:
                return fate
            entries = _put(manager, record, dialogue, live)
            if entries is not None:
                self._counts["entries"] += entries
                return fate
            live = None
        raise SessionConflict(f"it was changed by others {_ATTEMPTS} times meanwhile")

    def _fate(self, manager: SessionManager, record: SessionRecord, live: SessionRecord | None) -> str:
        if live is None or live.end_reason == RESTORING:
            return "restored"
        if live.end_reason == OVERWRITTEN:
            return "overwritten"  # by a restore that was stopped in the middle
        if live.ended_at is not None:
            return "ended"
        if manager.state(live) == "expired":
            return "expired"
        if self._strategy == "overwrite" or (self._strategy == "newer" and record.accessed_at > live.accessed_at):
            return "overwritten"
        return "skipped"


def _live(manager: SessionManager, records: list[SessionRecord]) -> dict[str, SessionRecord]:
    """What the store has under the ids of *records*, at a time where it can."""
    if not records:
        return {}
    with suppress(UnsupportedByStore):
        ids = frozenset(record.id for record in records)
        return {record.id: record for record in manager.store.find(SessionQuery(ids=ids))}
    return {}


def _put(manager: SessionManager, record: SessionRecord, dialogue: _Dialogue, live: SessionRecord | None) -> int | None:
    """Store *record* in place of *live*, with its history; returns how many entries of that were stored.

    ``None`` if somebody else was faster. Raises ``SessionConflict`` if somebody interferes later.
    """
    store, history = manager.store, manager.history_log()
    into = store.history if dialogue.count else None  # raises if there are none
    try:
        if live is not None and _is_same(record, live) and (history is None or dialogue.is_in(history)):
            store.save(replace(record, version=live.version + 1), expected=live.version)
            return 0
        if live is not None:
            manager.make_way(live)
        if into is None:
            store.save(record, expected=0)
            return 0
        draft = _draft(record, manager.clock())
        store.save(draft, expected=0)
    except SessionConflict:
        return None
    entries = dialogue.put_into(into)
    store.save(replace(record, version=draft.version + 1), expected=draft.version)
    return entries


def _is_same(record: SessionRecord, live: SessionRecord) -> bool:
    # Those never change under one id.
    return live.end_reason != OVERWRITTEN and (live.user_id, live.tenant_id, live.created_at) == (
        record.user_id,
        record.tenant_id,
        record.created_at,
    )


def _draft(record: SessionRecord, now: float) -> SessionRecord:
    """What stands for *record* until its history is complete: ended, so that nobody appends, and without data."""
    return replace(record, data=b"", ended_at=now, end_reason=RESTORING, expires_at=now + _PATIENCE, version=1)


def _id_in(line: bytes) -> str:
    """What names a line that is no record."""
    return f"line {line[:80].decode('utf-8', 'replace')!r}"
