"""Between Flask and the manager: reads the token from the cookie, stores the session, writes the cookie."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

from flask.sessions import SessionInterface, SessionMixin

from .exceptions import PersistSessionError
from .session import CookieTask, Session
from .tokens import TokenSigner, claimed_time

if TYPE_CHECKING:
    from flask import Flask, Request, Response

    from .manager import SessionManager

#: A browser sends several cookies of one name if they were set for several paths or domains; so many are looked at.
_MOST_COOKIES = 4


class PersistSessionInterface(SessionInterface):
    """Flask's session interface for one manager.

    :param manager: the manager of the application's web sessions.
    :param no_store: add ``Cache-Control: no-store`` to responses that used the session and say nothing else.
    """

    def __init__(self, manager: SessionManager, *, no_store: bool = False) -> None:
        self.manager = manager
        self._no_store = no_store
        self._signer: tuple[tuple[str | bytes, ...], TokenSigner] | None = None

    def open_session(self, app: Flask, request: Request) -> SessionMixin | None:
        """Keep the request for later; ``None`` (Flask's null session) without a secret key."""
        if not app.secret_key:
            return None
        return _RequestSession(self, app, request)

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Store the session, then tell the browser; what cannot be stored is never answered as a success."""
        assert isinstance(session, _RequestSession)
        due = self._renewal_is_due(app, session)
        try:
            task = session.finish(renew=due)
        except PersistSessionError as error:
            # Flask would answer 500 to whatever is raised from here. Errors that have a handler get its answer, as
            # they do when a view raises them.
            _answer(app, response, error)
            return
        if session.accessed:
            response.vary.add("Cookie")
            if self._no_store and "Cache-Control" not in response.headers:
                response.cache_control.no_store = True
        self._write_cookie(app, session, response, task)

    # The token --------------------------------------------------------------------------------------------------------

    def read_token(self, app: Flask, values: list[str]) -> str | None:
        """The first token among the cookie *values* that this application signed."""
        signer = self._signer_of(app)
        for value in values[:_MOST_COOKIES]:
            token = signer.verify(value)
            if token is not None:
                return token
        return None

    def _signer_of(self, app: Flask) -> TokenSigner:
        # The application may rotate its keys at any time.
        keys = secret_keys(app)
        if self._signer is None or self._signer[0] != keys:
            self._signer = keys, TokenSigner(keys, self.manager.clock)
        return self._signer[1]

    def _renewal_is_due(self, app: Flask, session: _RequestSession) -> bool:
        """Whether the cookie claims a renewal longer ago than the interval; costs no signature check and no store."""
        if not app.config["SESSION_REFRESH_EACH_REQUEST"] and not session.modified:
            return False
        times = [time for value in session.cookie_values()[:_MOST_COOKIES] if (time := claimed_time(value)) is not None]
        return bool(times) and self.manager.clock() - max(times) >= self.manager.renew_interval

    # The cookie -------------------------------------------------------------------------------------------------------

    def _write_cookie(self, app: Flask, session: _RequestSession, response: Response, task: CookieTask) -> None:
        if task == "renew" and self.manager.renew_interval == 0 and not session.permanent:
            return  # Flask sends an unchanged cookie again only for permanent sessions
        if task in ("set", "renew"):
            response.set_cookie(
                self.get_cookie_name(app),
                self._signer_of(app).sign(session.token),
                expires=self.get_expiration_time(app, session),
                httponly=self.get_cookie_httponly(app),
                domain=self.get_cookie_domain(app),
                path=self.get_cookie_path(app),
                secure=self.get_cookie_secure(app),
                partitioned=self.get_cookie_partitioned(app),
                samesite=self.get_cookie_samesite(app),
            )
            response.vary.add("Cookie")
        elif task == "delete":
            # A __Host- cookie is only deleted by a header with the attributes that it was set with.
            response.delete_cookie(
                self.get_cookie_name(app),
                httponly=self.get_cookie_httponly(app),
                domain=self.get_cookie_domain(app),
                path=self.get_cookie_path(app),
                secure=self.get_cookie_secure(app),
                partitioned=self.get_cookie_partitioned(app),
                samesite=self.get_cookie_samesite(app),
            )
            response.vary.add("Cookie")

    def get_expiration_time(self, app: Flask, session: SessionMixin) -> datetime | None:
        """When a permanent session's cookie expires: together with the session. ``None`` for the browser's session."""
        if not session.permanent or not isinstance(session, Session) or session.expires_at is None:
            return None
        return datetime.fromtimestamp(session.expires_at, timezone.utc)


class _RequestSession(Session):
    """The session of one Flask request."""

    def __init__(self, interface: PersistSessionInterface, app: Flask, request: Request) -> None:
        super().__init__(interface.manager, lambda: interface.read_token(app, self.cookie_values()))
        self._name = interface.get_cookie_name(app)
        self._request = request

    def cookie_values(self) -> list[str]:
        """The values of all cookies that have the session cookie's name."""
        return self._request.cookies.getlist(self._name)


def secret_keys(app: Flask) -> tuple[str | bytes, ...]:
    """The application's secret keys, the current one last."""
    return (*(app.config["SECRET_KEY_FALLBACKS"] or ()), *((app.secret_key,) if app.secret_key else ()))


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
    response.headers.update(answer.headers)
    response.status = answer.status
    response.response = answer.response
    response.direct_passthrough = answer.direct_passthrough
