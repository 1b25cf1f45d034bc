"""Between Flask and the manager: reads the token from the cookie, stores the session, writes the cookie."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from flask import after_this_request, has_request_context
from flask.sessions import SessionInterface, SessionMixin

from .exceptions import ConfigError, PersistSessionError
from .session import CookieTask, DeviceNote, Renewal, Session
from .tokens import SignedToken, TokenSigner, claimed_time, session_id

if TYPE_CHECKING:
    from flask import Flask, Request, Response

    from .manager import SessionManager
    from .stored import Foreign, StoredSession

log = logging.getLogger("flask_persist_session")

#: A browser sends several cookies of one name if they were set for several paths or domains; so many are looked at.
_MOST_COOKIES = 4
#: Seconds without renewals of untouched sessions after the store was not available.
_PAUSE = 5.0
_MOST_DEAD = 4096
#: Characters that are kept of an IP address, which an application may take from a header, and of a user agent.
_LONGEST_IP = 64
_LONGEST_USER_AGENT = 400


class PersistSessionInterface(SessionInterface):
    """Flask's session interface for one manager.

    :param manager: the manager of the application's web sessions.
    :param no_store: add ``Cache-Control: no-store`` to responses that used the session and say nothing else.
    :param track_devices: note in the metadata of sessions from which device the requests come.
    :param on_request: called by each request.
    :param find_foreign: finds a session of another kind by the cookies of a request that has no token.
    """

    def __init__(
        self,
        manager: SessionManager,
        *,
        no_store: bool = False,
        track_devices: bool = False,
        on_request: Callable[[], object] | None = None,
        find_foreign: Callable[[list[str]], Foreign | StoredSession | None] | None = None,
    ) -> None:
        self.manager = manager
        self.find_foreign = find_foreign
        self._track_devices = track_devices
        self._on_request = on_request
        self._no_store = no_store
        self._signer: tuple[tuple[str | bytes, ...], TokenSigner] | None = None
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._no_renewal_before = -math.inf
        self._dead: set[str] = set()

    def open_session(self, app: Flask, request: Request) -> SessionMixin | None:
        """Keep the request for later; ``None`` (Flask's null session) without a secret key."""
        if self._on_request is not None:
            self._on_request()
        if not app.secret_key:
            return None
        presented = _Presented(self, app, request.environ.get("HTTP_COOKIE", ""))
        session = _RequestSession(self.manager, presented, partial(_device, request) if self._track_devices else None)
        if has_request_context():  # not in the test client's session_transaction
            after_this_request(session.note_answer)
        return session

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Store the session, then tell the browser; what cannot be stored is never answered as a success."""
        assert isinstance(session, _RequestSession)
        if session.failed:
            return  # this is the response that reports it
        try:
            task, token = self._finish(app, session)
        except PersistSessionError as error:
            session.failed = True
            if session.accessed:
                response.vary.add("Cookie")
            # Flask would answer 500 to whatever is raised from here. Errors that have a handler get its answer, as
            # they do when a view raises them.
            _answer(app, response, error)
            return
        if session.accessed:
            response.vary.add("Cookie")
        if task == "renew" and (response.cache_control.public or response.cache_control.s_maxage is not None):
            task = "keep"  # a token has no place in a cache for everybody; the next response renews
        if self._no_store and (session.accessed or task != "keep") and "Cache-Control" not in response.headers:
            response.cache_control.no_store = True
        self._write_cookie(app, session, response, task, token)

    def signer(self, app: Flask) -> TokenSigner:
        """Signs with the application's current secret key; it may rotate them at any time."""
        keys = secret_keys(app)
        if self._signer is None or self._signer[0] != keys:
            self._signer = keys, TokenSigner(keys, self.manager.clock)
        return self._signer[1]

    def pattern(self, app: Flask) -> re.Pattern[str]:
        """Finds the values of the session cookie that have the alphabet of a signed token."""
        name = self.get_cookie_name(app)
        if name not in self._patterns:
            self._patterns[name] = re.compile(rf"(?:^|;)\s*{re.escape(name)}=([\w.\-]+)\s*(?=;|$)", re.ASCII)
        return self._patterns[name]

    def _finish(self, app: Flask, session: _RequestSession) -> tuple[CookieTask, str | None]:
        renewal, untouched = self._renewal(app, session), not session.loaded
        order = session.finish(renewal)
        if session.renewal_failed:
            # No request needs to be renewed now, and those that come next must not wait for the store either.
            self._no_renewal_before = self.manager.clock() + _PAUSE
        elif untouched and renewal == "yes" and not session.live:
            self._remember_dead(session.presented.token())
        return order

    def _renewal(self, app: Flask, session: _RequestSession) -> Renewal:
        """Whether the last renewal is longer ago than the interval; without any check while the cookie denies it."""
        now = self.manager.clock()
        if now < self._no_renewal_before:
            return "no"
        if not session.loaded:  # then the cookie has not been verified either
            if not session.presented.claims_to_be_due():
                return "no"
            token = session.presented.token()
            if token is None or session_id(token) in self._dead:
                return "no"
        if not session.presented.is_due():
            return "no"
        return "yes" if app.config["SESSION_REFRESH_EACH_REQUEST"] else "if changed"

    def _remember_dead(self, token: str | None) -> None:
        """Not to look again for a session that has expired, ended or gone: browsers send such a cookie for long."""
        if token is not None:
            if len(self._dead) >= _MOST_DEAD:
                self._dead = set()
            self._dead.add(session_id(token))

    # The cookie -------------------------------------------------------------------------------------------------------

    def _write_cookie(
        self, app: Flask, session: _RequestSession, response: Response, task: CookieTask, token: str | None
    ) -> None:
        if task == "keep":
            return
        if task == "renew" and self.manager.renew_interval == 0 and not session.permanent:
            return  # Flask sends an unchanged cookie again only for permanent sessions
        name = self.get_cookie_name(app)
        # On deleting as on setting: a __Host- cookie is only deleted by a header that carries Secure.
        attributes: dict[str, Any] = {
            "httponly": self.get_cookie_httponly(app),
            "domain": self.get_cookie_domain(app),
            "path": self.get_cookie_path(app),
            "secure": self.get_cookie_secure(app),
            "partitioned": self.get_cookie_partitioned(app),
            "samesite": self.get_cookie_samesite(app),
        }
        if task == "delete":
            response.delete_cookie(name, **attributes)
        elif token is not None:
            expires = self.get_expiration_time(app, session)
            response.set_cookie(name, self.signer(app).sign(token), expires=expires, **attributes)
        response.vary.add("Cookie")

    def get_expiration_time(self, app: Flask, session: SessionMixin) -> datetime | None:
        """When a permanent session's cookie expires: together with the session. ``None`` for the browser's session."""
        if not session.permanent or not isinstance(session, Session) or session.expires_at is None:
            return None
        return datetime.fromtimestamp(session.expires_at, timezone.utc)


class _Presented:
    """The session cookies that a request carries, verified when that is needed, and once."""

    def __init__(self, interface: PersistSessionInterface, app: Flask, header: str) -> None:
        self._interface = interface
        self._app = app
        self._header = header

    @cached_property
    def _values(self) -> list[str]:
        """What may be signed tokens; nothing else of the header is of interest, so it need not be parsed in full."""
        return self._interface.pattern(self._app).findall(self._header)[:_MOST_COOKIES] if self._header else []

    @cached_property
    def _verified(self) -> SignedToken | None:
        """The first that this application signed."""
        signer = self._interface.signer(self._app)
        return next((signed for value in self._values if (signed := signer.verify(value))), None)

    def token(self) -> str | None:
        """The token, if there is a cookie that this application signed."""
        return self._verified.token if self._verified else None

    def find_foreign(self) -> Foreign | StoredSession | None:
        """A session of another kind, if there is a cookie that names one."""
        find = self._interface.find_foreign
        return find(self._values) if find is not None and self._values else None

    def claims_to_be_due(self) -> bool:
        """Whether a cookie claims that its session is to be renewed."""
        is_due = self._interface.manager.is_due
        return any((time := claimed_time(value)) is not None and is_due(time) for value in self._values)

    def is_due(self) -> bool:
        """Whether the session is to be renewed."""
        return self._verified is not None and self._interface.manager.is_due(self._verified.signed_at)


class _RequestSession(Session):
    """The session of one Flask request."""

    def __init__(
        self, manager: SessionManager, presented: _Presented, describe_device: Callable[[], DeviceNote] | None
    ) -> None:
        super().__init__(manager, presented.token, describe_device, presented.find_foreign)
        self.presented = presented
        self.failed = False

    def note_answer(self, response: Response) -> Response:
        """Called first of all that is done after the view. Flask answers 500 to whatever is raised from then on."""
        self.answered = True
        return response


def _device(request: Request) -> DeviceNote:
    """Where *request* comes from, as far as the application trusts its proxies, and with which user agent."""
    return {
        "ip": _printable(request.remote_addr, _LONGEST_IP),
        "user_agent": _printable(request.user_agent.string, _LONGEST_USER_AGENT),
    }


def _printable(text: str | None, longest: int) -> str | None:
    """The beginning of *text*, a space for each character that would do something where it is shown."""
    return "".join(letter if letter.isprintable() else " " for letter in (text or "")[:longest]).strip() or None


def secret_keys(app: Flask) -> tuple[str | bytes, ...]:
    """The application's secret keys, the current one last.

    Raises ``ConfigError`` for fallbacks that are no list of keys: each letter of a text would be taken for one.
    """
    fallbacks = app.config["SECRET_KEY_FALLBACKS"] or ()
    if isinstance(fallbacks, (str, bytes)) or not all(fallbacks):
        raise ConfigError('SECRET_KEY_FALLBACKS is not a list of keys that are not empty; write ["old key"]')
    return (*fallbacks, *((app.secret_key,) if app.secret_key else ()))


#: Headers of a response that describe what it no longer is once an error takes its place.
_REPLACED_HEADERS = (
    "Accept-Ranges",
    "Cache-Control",
    "Content-Disposition",
    "Content-Encoding",
    "Content-Language",
    "Content-Length",
    "Content-Range",
    "Content-Type",
    "ETag",
    "Expires",
    "Last-Modified",
    "Location",
    "Set-Cookie",
)


def _answer(app: Flask, response: Response, error: PersistSessionError) -> None:
    """Turn *response* into the application's answer to *error*. Raises *error* if it has none."""
    answer = app.make_response(app.handle_user_exception(error))
    response.close()
    for name in _REPLACED_HEADERS:
        response.headers.remove(name)
    response.headers["Cache-Control"] = "no-store"
    response.headers.update(answer.headers)
    response.status = answer.status
    response.response = answer.response
    response.direct_passthrough = answer.direct_passthrough
