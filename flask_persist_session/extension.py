"""``PersistSession``: puts the sessions of a Flask application into a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flask import Flask, Response, current_app
from werkzeug.exceptions import Conflict, ServiceUnavailable

from . import cli_upkeep, upkeep  # noqa: F401  registers its commands
from .cli import sessions_cli
from .config import LONGEST, PREFIX, Config
from .exceptions import ConfigError, SessionLimitReached, StoreUnavailable, UnsupportedByStore
from .interface import PersistSessionInterface, secret_keys
from .manager import SessionManager
from .records import Improvement
from .serializers import Codec
from .stores import open_store
from .stores.base import SessionStore
from .sweeper import Sweeper
from .upkeep import BackupPlan, CheckReport, Health

_KEY = "persist_session"
_RETRY_AFTER = 5


@dataclass(frozen=True, slots=True)
class _State:
    """What the extension keeps per application."""

    config: Config
    store: SessionStore
    manager: SessionManager
    sweeper: Sweeper | None


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
        _check_caps(config, store)
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
            sender=app,
        )
        sweeper = Sweeper(manager, config.cleanup_interval) if config.cleanup_interval else None
        app.extensions[_KEY] = _State(config, store, manager, sweeper)
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

    def check(self, *, repair: bool = False, progress: Callable[[int], object] = lambda _: None) -> CheckReport:
        """Look at everything in the store; see ``upkeep.check``. Raises as ``manager`` does, too."""
        return upkeep.check(_managers(), repair=repair, progress=progress)

    def optimize(self, *, full: bool = False) -> tuple[Improvement, ...]:
        """Give back room; see ``upkeep.optimize``. Raises as ``manager`` does, too."""
        return upkeep.optimize(_managers(), full=full)

    def health(self) -> Health:
        """Whether the store works; see ``upkeep.health``. Raises as ``manager`` does."""
        return upkeep.health(_managers(), cleanup_interval=self.config.cleanup_interval, backups=_backup_plan())


def _managers() -> upkeep.Managers:
    return {"web": _state().manager}


def _backup_plan() -> BackupPlan | None:
    """Automatic backups, which this release does not have."""
    return None


def _check_caps(config: Config, store: SessionStore) -> None:
    cap = "MAX_PER_USER" if config.max_per_user else "MAX_SESSIONS" if config.max_sessions else None
    if cap is None:
        return
    try:
        store.scan()  # nothing is read yet
    except UnsupportedByStore as error:
        raise ConfigError(f"{PREFIX}{cap} needs a store that can list its sessions: {error}") from error


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
