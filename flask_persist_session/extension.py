"""``PersistSession``: puts the sessions of a Flask application into a store."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from flask import Flask, Response, current_app, has_app_context
from werkzeug.exceptions import Conflict, ServiceUnavailable

from . import cli_backup, cli_import, cli_migrate, cli_upkeep, upkeep  # noqa: F401  the first register their commands
from .announcer import Announcer
from .archive import Progress, silent
from .auto_backup import AutomaticBackup
from .backup import BackupReport, RestoreReport, Strategy, back_up, restore
from .backup_files import BackupFile, backups_in, newest_before
from .cli import sessions_cli
from .config import LONGEST, PREFIX, CapPolicy, Config, checked
from .ending import Handler
from .envelope import Envelope
from .exceptions import ConfigError, SessionLimitReached, StoreUnavailable, UnsupportedByStore
from .interface import PersistSessionInterface, secret_keys
from .lifecycle import WEB
from .manager import SessionManager, history_of
from .migrate import Migration, MigrationReport, added_up, move_rest
from .monthly_archive import MonthlyArchive
from .origins import FlaskCookie, Origin, open_origin
from .records import JSON, Improvement, SessionRecord
from .serializers import Codec
from .stored import StoredSession
from .stores import open_store
from .stores.base import SessionStore
from .stores.migrating import MigratingStore
from .sweeper import Sweeper
from .upgrade import ImportReport, TakeOver, import_all
from .upkeep import BackupPlan, CheckReport, Health

_KEY = "persist_session"
_RETRY_AFTER = 5


@dataclass(frozen=True, slots=True)
class _Common:
    """What the managers of all namespaces of an application have in common."""

    config: Config
    codec: Codec
    archive: MonthlyArchive | None
    app: Flask

    def idle_timeout(self) -> float:
        """Seconds; also read anew each time, because the application may set its own later."""
        return self.config.idle_timeout or min(LONGEST, self.app.permanent_session_lifetime.total_seconds())

    @staticmethod
    def _add_to_archive(
        archive: MonthlyArchive, namespace: str, store: SessionStore, records: list[SessionRecord], now: float
    ) -> None:
        archive.add(namespace, records, now, history=history_of(store, namespace))

    def manager(self, store: SessionStore, namespace: str, **options: Any) -> SessionManager:
        """The manager of a namespace; what *options* do not say is as the settings have it."""
        config = self.config
        common: dict[str, Any] = {
            "idle_timeout": self.idle_timeout,
            "absolute_timeout": config.absolute_timeout,
            "renew_interval": config.renew_interval,
            "keep_ended": config.keep_ended,
            "max_bytes": config.max_bytes,
            "max_entries": config.max_entries,
            "cap_policy": config.cap_policy,
        }
        archive = partial(self._add_to_archive, self.archive, namespace, store) if self.archive else None
        return SessionManager(
            store, self.codec, namespace=namespace, archive=archive, sender=self.app, **(common | options)
        )


@dataclass(frozen=True, slots=True)
class _State:
    """What the extension keeps per application."""

    config: Config
    store: SessionStore
    manager: SessionManager
    managers: dict[str, SessionManager]
    """The manager of each namespace."""
    common: _Common
    options: dict[str, dict[str, object]]
    """With what each namespace of the application's own was set up."""
    sweeper: Sweeper | None
    origins: list[Origin]
    announcer: Announcer
    backup_dir: str
    automatic_backup: AutomaticBackup | None
    archive: MonthlyArchive | None
    setting_up: threading.Lock = field(default_factory=threading.Lock)

    def start_threads(self) -> None:
        """Start the threads of this process that work in the background. Called by each request."""
        for thread in self.sweeper, self.automatic_backup:
            if thread is not None:
                thread.start()


class PersistSession:
    """Server-side sessions for Flask::

        app = Flask(__name__)
        app.secret_key = "…"
        PersistSession(app)

    One object serves any number of applications; what belongs to one of them is kept there.
    """

    def __init__(self, app: Flask | None = None) -> None:
        self._app = app
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the settings of *app* and take over its sessions.

        With ``PERSIST_SESSION_ENABLED = False`` only the settings are checked. Raises ``ConfigError`` naming the
        setting that is wrong, or if *app* has the extension already.
        """
        if _KEY in app.extensions:
            raise ConfigError(f"PersistSession is already set up for the application {app.name!r}; call it once")
        config = Config.from_mapping(app.config)
        if not config.enabled:
            return
        secret_keys(app)  # wrong ones are told now
        store = _open(app, config.store, "STORE")
        if config.migrate_from is not None:
            _refuse_same(config.migrate_from, config.store, f"{PREFIX}MIGRATE_FROM")
            store = MigratingStore(store, _open(app, config.migrate_from, "MIGRATE_FROM"))
        _check_lists(config, store)
        archive = _open_archive(config, app.instance_path)
        envelope = Envelope(config.compress, config.encryption_keys)
        codec = Codec(config.serializer, keys=lambda: secret_keys(app), envelope=envelope)
        common = _Common(config, codec, archive, app)
        manager = common.manager(
            store,
            WEB,
            user_key=config.user_key,
            max_per_user=config.max_per_user,
            max_sessions=config.max_sessions,
        )
        managers = {WEB: manager}
        sweeper = Sweeper(managers, config.cleanup_interval) if config.cleanup_interval else None
        origins = _open_origins(app, manager, config.upgrade_from, f"{PREFIX}UPGRADE_FROM")
        announcer, folder = Announcer(app), os.path.join(app.instance_path, config.backup_dir or "backups")
        backups = (
            AutomaticBackup(managers, announcer, folder, config.backup_interval, config.backup_keep)
            if config.backup_interval
            else None
        )
        state = _State(config, store, manager, managers, common, {}, sweeper, origins, announcer, folder, backups, archive)
        app.extensions[_KEY] = state
        app.session_interface = PersistSessionInterface(
            manager,
            no_store=config.no_store,
            track_devices=config.track_devices,
            on_request=state.start_threads if sweeper or backups else None,
            find_foreign=TakeOver(manager, origins).find if origins else None,
        )
        for kind, handler in ((StoreUnavailable, _answer_unavailable), (SessionLimitReached, _answer_limit)):
            if kind not in app.error_handler_spec[None][None]:
                app.register_error_handler(kind, handler)
        app.cli.add_command(sessions_cli)

    @property
    def manager(self) -> SessionManager:
        """The manager of the current application's web sessions.

        Raises ``RuntimeError`` outside of an application context, ``ConfigError`` if the application lacks the
        extension or has it switched off.
        """
        return _state().manager

    @property
    def managers(self) -> Mapping[str, SessionManager]:
        """The managers of all namespaces of the current application, by their names; ``"web"`` is that of
        ``flask.session``. Raises as ``manager`` does."""
        return dict(_state().managers)

    @property
    def store(self) -> SessionStore:
        """The store of the current application's web sessions. Raises as ``manager`` does."""
        return _state().store

    def namespace(
        self,
        name: str,
        *,
        app: Flask | None = None,
        idle_timeout: float | timedelta | str | None = None,
        absolute_timeout: float | timedelta | str | None = None,
        renew_interval: float | timedelta | str | None = None,
        keep_ended: float | timedelta | str | None = None,
        max_per_user: int | None = None,
        max_sessions: int | None = None,
        cap_policy: CapPolicy | None = None,
        max_bytes: int | None = None,
        max_entries: int | None = None,
        on_end: Handler | None = None,
        min_entries: int | None = None,
    ) -> SessionManager:
        """The manager of sessions of the application's own, beside those of ``flask.session``: chats, jobs, carts.

        They are in the same store, have no cookie, keep their data when they end, and may have a history. The first call
        sets them up, best where the application is made, so that backups and cleanups know of them in every process;
        later ones need the name alone. The options are those settings, for these sessions; what is not given is as the
        settings have it, but for ``max_per_user`` and ``max_sessions``, which are 0.

        :param name: of the namespace: 1 to 40 lower-case letters, digits and underscores.
        :param app: the application; not given: the current one, or the one that this object was made with.
        :param on_end: a function that is given each session of the namespace, a ``StoredSession``, once it has ended or
            expired, but not if it was deleted: at least once, by one worker at a time, within the context of the
            application, after a pause again if it raises. What it returns, text, other JSON or ``None``, is kept as
            ``summary`` in the session's metadata for ``keep_ended``. Until then the session is not removed.
        :param min_entries: only sessions whose history has so many entries; 0, which is the default: all.

        Raises ``ConfigError`` for a name or an option that is wrong, and options other than those of the first call;
        ``UnsupportedByStore`` for a store that has one namespace only; otherwise as ``manager`` does.
        """
        given = {
            "idle_timeout": idle_timeout,
            "absolute_timeout": absolute_timeout,
            "renew_interval": renew_interval,
            "keep_ended": keep_ended,
            "max_per_user": max_per_user,
            "max_sessions": max_sessions,
            "cap_policy": cap_policy,
            "max_bytes": max_bytes,
            "max_entries": max_entries,
            "on_end": on_end,
            "min_entries": min_entries,
        }
        options = {
            key: _checked_option(key, value, f"{key} of the namespace {name!r}")
            for key, value in given.items()
            if value is not None
        }
        return _namespace(_state(app or (None if has_app_context() else self._app)), name, options)

    def import_sessions(
        self,
        urls: Sequence[str] = (),
        *,
        dry_run: bool = False,
        delete: bool = False,
        progress: Progress = silent,
    ) -> ImportReport:
        """Import all sessions of the Flask-Session stores at *urls*, or of those in ``PERSIST_SESSION_UPGRADE_FROM``.

        Flask's own cookies are in no store: an entry ``"flask"`` beside others is passed over.
        Each is nobody's until its user comes with the old cookie. *dry_run*: only count. *delete*: remove each where it
        was, once it is here. *progress* is called with the number of sessions looked at since the last call.

        Raises ``ConfigError`` for a URL that is wrong or if there is none, ``UnsupportedByStore`` for sessions that cannot
        be listed, ``StoreError``; what was imported until then is kept. Also raises as ``manager`` does.
        """
        state = _state()
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        origins = _open_origins(app, state.manager, urls, "import") if urls else state.origins
        origins = [origin for origin in origins if origin.kind != FlaskCookie.kind] or origins
        if not origins:
            raise ConfigError(f"nothing to import from: give a URL, or set {PREFIX}UPGRADE_FROM")
        return import_all(state.manager, origins, dry_run=dry_run, delete=delete, progress=progress)

    def migrate(self, to: str | SessionStore, *, progress: Progress = silent) -> MigrationReport:
        """Copy all sessions to the store *to* (a URL or a store), while the application goes on using its own.

        What is there already is brought up to date; what has ended in either store stays ended. A sample of the copies is
        compared at the end. *progress* is called with the number of sessions dealt with since the last call. It can be
        interrupted and repeated. To switch with nobody signed out, set ``PERSIST_SESSION_MIGRATE_FROM``.

        Raises ``ConfigError`` for a URL that is wrong, ``UnsupportedByStore`` where the sessions
        cannot be listed, ``StoreError``; what was copied until then is kept. Also raises as ``manager`` does.
        """
        state = _state()
        _refuse_same(to, state.config.store, "migrate")
        target = _open(current_app, to, "migrate")
        try:
            return added_up([_migration(manager, target, progress).run() for manager in state.managers.values()])
        finally:
            if target is not to:
                target.close()

    def move_rest(self, *, progress: Progress = silent) -> int:
        """Move the sessions over that are still in the store that ``PERSIST_SESSION_MIGRATE_FROM`` names; say how many.

        Raises ``ConfigError`` if the setting names none, ``UnsupportedByStore`` where that store cannot list,
        ``StoreError``; what was moved until then is. Also raises as ``manager`` does.
        """
        stores = [manager.store for manager in _state().managers.values()]
        if not isinstance(stores[0], MigratingStore):
            raise ConfigError(f"nothing to move from: give a store to copy to, or set {PREFIX}MIGRATE_FROM")
        return sum(move_rest(store, progress) for store in stores if isinstance(store, MigratingStore))

    @property
    def config(self) -> Config:
        """The settings of the current application. Raises as ``manager`` does."""
        return _state().config

    @property
    def archive(self) -> MonthlyArchive | None:
        """The archives of sessions that cleanups removed; ``None`` without ``PERSIST_SESSION_ARCHIVE_DIR``. Raises as
        ``manager`` does."""
        return _state().archive

    def check(self, *, repair: bool = False, progress: Progress = silent) -> CheckReport:
        """Look at everything in the store; see ``upkeep.check``. Raises as ``manager`` does, too."""
        return upkeep.check(_state().managers, repair=repair, progress=progress)

    def optimize(self, *, full: bool = False) -> tuple[Improvement, ...]:
        """Give back room; see ``upkeep.optimize``. Raises as ``manager`` does, too."""
        return upkeep.optimize(_state().managers, full=full)

    def health(self) -> Health:
        """Whether the store works; see ``upkeep.health``. Raises as ``manager`` does."""
        state = _state()
        plan = BackupPlan(newest=partial(newest_before, state.backup_dir), interval=state.config.backup_interval)
        return upkeep.health(state.managers, cleanup_interval=state.config.cleanup_interval, backups=plan)

    def backup(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        user_id: object = None,
        tenant_id: object = None,
        tags: Iterable[str] = (),
        include_expired: bool = False,
        keep: int | None = None,
        progress: Progress = silent,
    ) -> BackupReport:
        """Write all sessions, or those of a user, tenant and with all *tags*, to an archive while others go on.

        :param path: a directory, made if it is missing, in which the archive is named after the time; or the archive's
            own name, which ends in ``.tar.gz`` or ``.tgz`` and must be free. Not given: ``PERSIST_SESSION_BACKUP_DIR``.
        :param include_expired: also what the next cleanup removes.
        :param keep: remove all but the newest so many archives of the directory, once the new one is complete; only for
            backups of all sessions.
        :param progress: is told every now and then how many more sessions were read.

        Sends ``backup_created``. Raises ``BackupError`` if the archive cannot be written, ``UnsupportedByStore`` where
        the store cannot list, ``StoreError``, ``ValueError`` for a wrong *keep*; then there is no archive.
        """
        state = _state()
        report = back_up(
            state.managers,
            os.fspath(path) if path is not None else os.path.join(state.backup_dir, ""),
            now=state.manager.clock(),
            user_id=user_id,
            tenant_id=tenant_id,
            tags=tags,
            include_expired=include_expired,
            keep=keep,
            progress=progress,
        )
        state.announcer.backed_up(path=report.path, sessions=report.sessions, size=report.bytes)
        return report

    def backups(
        self, directory: str | os.PathLike[str] | None = None, *, progress: Progress = silent
    ) -> Iterator[BackupFile]:
        """Yield each archive of a directory, oldest first, once it is read and verified as a whole.

        *directory* is ``PERSIST_SESSION_BACKUP_DIR`` if not given. *progress* is told every now and then how many more
        sessions were verified. Raises ``BackupError`` if the directory cannot be read.
        """
        return backups_in(os.fspath(directory) if directory is not None else _state().backup_dir, progress)

    def restore(
        self,
        path: str | os.PathLike[str],
        *,
        strategy: Strategy = "skip",
        dry_run: bool = False,
        sign_out: bool = False,
        verified: Progress = silent,
        started: Progress = silent,
        progress: Progress = silent,
    ) -> RestoreReport:
        """Bring back the sessions of an archive, from whichever kind of store it comes, while others go on.

        What has ended in the store since stays ended, and what has expired is not brought back.

        :param strategy: what happens to a session that is there: ``"skip"`` leaves it, ``"overwrite"`` replaces it,
            ``"newer"`` replaces it if the archive has a later request of it.
        :param dry_run: change nothing, only count.
        :param sign_out: restore the data without the user, so that nobody is signed in by it.
        :param verified: is told every now and then how many more sessions of the archive were verified.
        :param started: is told how many sessions the archive has, once it is verified.
        :param progress: is told every now and then how many more sessions were looked at.

        A session that cannot be restored is counted with the reason. Raises ``BackupError`` for an archive that is
        broken, cut off, of a newer release or none, before anything is written; ``StoreError``, after which some of the
        sessions are restored and a repeat goes on; ``ValueError`` for an unknown strategy.
        """
        return restore(
            _state().managers,
            os.fspath(path),
            strategy=strategy,
            dry_run=dry_run,
            sign_out=sign_out,
            verified=verified,
            started=started,
            progress=progress,
        )


def _migration(manager: SessionManager, target: SessionStore, progress: Progress) -> Migration:
    to = target if manager.namespace == WEB else target.namespace(manager.namespace)
    to.margin = manager.store.margin  # what waits for on_end there must not go by itself either
    return Migration(
        manager.store,
        to,
        lambda: manager.clock(),
        progress,
        is_over=manager.is_over,
        margin=manager.renew_interval,
        with_history=manager.history_log() is not None,
    )


def _open(app: Flask, store: str | SessionStore | object, source: str) -> SessionStore:
    try:
        return open_store(store, base_path=app.instance_path)
    except ConfigError as error:
        raise ConfigError(f"{PREFIX if source.isupper() else ''}{source}: {error}") from error


def _refuse_same(other: object, store: object, source: str) -> None:
    """Moving to where it is would end by removing what has ended there, and with it the memory of its end."""
    if other == store:
        raise ConfigError(f"{source} names the store that {PREFIX}STORE is; name the other one")


def _open_archive(config: Config, base_path: str) -> MonthlyArchive | None:
    if config.archive_dir is None:
        return None
    directory = os.path.join(base_path, config.archive_dir)
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise ConfigError(f"{PREFIX}ARCHIVE_DIR is {config.archive_dir!r}, and {directory} is there and no directory")
    return MonthlyArchive(directory)


def _check_lists(config: Config, store: SessionStore) -> None:
    """Refuse settings of which nothing would come with a store that cannot list."""
    wanted = {"MAX_PER_USER": config.max_per_user, "MAX_SESSIONS": config.max_sessions, "ARCHIVE_DIR": config.archive_dir}
    setting = next((name for name, value in wanted.items() if value), None)
    if setting is None:
        return
    try:
        store.scan()  # nothing is read yet
    except UnsupportedByStore as error:
        raise ConfigError(f"{PREFIX}{setting} needs a store that can list its sessions: {error}") from error


def _open_origins(app: Flask, manager: SessionManager, urls: Sequence[str], source: str) -> list[Origin]:
    try:
        return [open_origin(app, url, lambda: secret_keys(app), lambda: manager.clock()) for url in urls]
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _checked_option(key: str, value: object, source: str) -> Any:
    """An option of a namespace. Raises ``ConfigError``, which calls it *source*."""
    if key == "on_end" and not callable(value):
        raise ConfigError(f"{source} is {value!r:.80}; allowed is a function that is given the session that has ended")
    return value if key == "on_end" else checked("max_entries" if key == "min_entries" else key, value, source)


def _namespace(state: _State, name: str, options: dict[str, Any]) -> SessionManager:
    if name == WEB:
        if options:
            raise ConfigError(f"{WEB!r} is the namespace of flask.session, whose options are the settings")
        return state.manager
    with state.setting_up:
        known = state.options.setdefault(name, options)
        if options and options != known:
            raise ConfigError(f"the namespace {name!r} was set up with {known or 'no options'}; now it is {options}")
        if name not in state.managers:
            try:
                state.managers[name] = _set_up(state, name, dict(options))
            finally:
                if name not in state.managers:
                    del state.options[name]
        return state.managers[name]


def _set_up(state: _State, name: str, options: dict[str, Any]) -> SessionManager:
    if "idle_timeout" in options:
        seconds = options["idle_timeout"]
        options["idle_timeout"] = lambda: seconds
    if handler := options.pop("on_end", None):
        options["on_end"] = partial(_call_in_context, state.common.app, handler)
    elif options.get("min_entries"):
        raise ConfigError(f"min_entries of the namespace {name!r} goes with on_end, which is not given")
    try:
        return state.common.manager(state.store.namespace(name), name, keep_data=True, **options)
    except UnsupportedByStore as error:
        wanted = " and ".join(key for key in ("max_per_user", "max_sessions", "on_end", "min_entries") if options.get(key))
        if wanted:
            raise ConfigError(f"{wanted} of the namespace {name!r} needs what the store cannot do: {error}") from error
        raise


def _call_in_context(app: Flask, handler: Handler, session: StoredSession) -> JSON:
    with app.app_context():
        return handler(session)


def _state(app: Flask | None = None) -> _State:
    app = app or current_app
    state = app.extensions.get(_KEY)
    if state is None:
        raise ConfigError(
            f"the application {app.name!r} has no server-side sessions: call PersistSession(app) or "
            "init_app(app), and leave PERSIST_SESSION_ENABLED on"
        )
    assert isinstance(state, _State)
    return state


def _answer_unavailable(error: StoreUnavailable) -> Response:
    current_app.logger.error("the session store is unavailable: %s", error)
    return _unavailable("The session store cannot be reached. Please try again shortly.")


def _answer_limit(error: SessionLimitReached) -> Response:
    if error.scope == "store":
        current_app.logger.error("no new session: %s", error)
        return _unavailable("The server has too many sessions. Please try again later.")
    answer = current_app.handle_http_exception(Conflict("You are signed in too often. Sign out elsewhere first."))
    return current_app.make_response(answer)


def _unavailable(text: str) -> Response:
    answer = current_app.handle_http_exception(ServiceUnavailable(text, retry_after=_RETRY_AFTER))
    response = current_app.make_response(answer)
    if response.status_code == ServiceUnavailable.code:  # also from a page of the application's own
        response.headers.setdefault("Retry-After", str(_RETRY_AFTER))
    return response
