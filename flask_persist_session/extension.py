"""``PersistSession``: puts the sessions of a Flask application into a store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from flask import Flask, Response, current_app
from werkzeug.exceptions import Conflict, ServiceUnavailable

from .cli import sessions_cli
from .config import LONGEST, PREFIX, Config
from .exceptions import ConfigError, SessionLimitReached, StoreUnavailable, UnsupportedByStore
from .interface import PersistSessionInterface, secret_keys
from .manager import SessionManager
from .monthly_archive import MonthlyArchive
from .serializers import Codec
from .stores import open_store
from .stores.base import SessionStore
from .sweeper import Sweeper

_KEY = "persist_session"
_RETRY_AFTER = 5


@dataclass(frozen=True, slots=True)
class _State:
    """What the extension keeps per application."""

    config: Config
    store: SessionStore
    manager: SessionManager
    sweeper: Sweeper | None
    archive: MonthlyArchive | None


class PersistSession:
    """Server-side sessions for Flask::

        app = Flask(__name__)
        app.secret_key = "…"
        PersistSession(app)

    One object serves any number of applications; what belongs to one of them is kept there.
    """

    def __init__(self, app: Flask | None = None) -> None:
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
        try:
            store = open_store(config.store, base_path=app.instance_path)
        except ConfigError as error:
            raise ConfigError(f"{PREFIX}STORE: {error}") from error
        _check_lists(config, store)
        archive = _open_archive(config, app.instance_path)
        manager = SessionManager(
            store,
            Codec(config.serializer, keys=lambda: secret_keys(app)),
            idle_timeout=lambda: config.idle_timeout or min(LONGEST, app.permanent_session_lifetime.total_seconds()),
            absolute_timeout=config.absolute_timeout,
            renew_interval=config.renew_interval,
            keep_ended=config.keep_ended,
            max_bytes=config.max_bytes,
            user_key=config.user_key,
            max_per_user=config.max_per_user,
            cap_policy=config.cap_policy,
            max_sessions=config.max_sessions,
            archive=partial(archive.add, "web") if archive else None,
            sender=app,
        )
        sweeper = Sweeper(manager, config.cleanup_interval) if config.cleanup_interval else None
        app.extensions[_KEY] = _State(config, store, manager, sweeper, archive)
        app.session_interface = PersistSessionInterface(
            manager,
            no_store=config.no_store,
            track_devices=config.track_devices,
            on_request=sweeper.start if sweeper else None,
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
    def store(self) -> SessionStore:
        """The store of the current application's web sessions. Raises as ``manager`` does."""
        return _state().store

    @property
    def config(self) -> Config:
        """The settings of the current application. Raises as ``manager`` does."""
        return _state().config

    @property
    def archive(self) -> MonthlyArchive | None:
        """The archives of sessions that cleanups removed; ``None`` without ``PERSIST_SESSION_ARCHIVE_DIR``. Raises as
        ``manager`` does."""
        return _state().archive


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


def _state() -> _State:
    state = current_app.extensions.get(_KEY)
    if state is None:
        raise ConfigError(
            f"the application {current_app.name!r} has no server-side sessions: call PersistSession(app) or "
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
