"""The page "Your devices": users see where they are signed in, and sign out there."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from flask import (
    Blueprint,
    Response,
    abort,
    current_app,
    make_response,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.typing import ResponseReturnValue
from itsdangerous import Signer, want_bytes

from ..config import PREFIX
from ..exceptions import ConfigError, UnsupportedByStore
from ..extension import PersistSession
from ..interface import secret_keys
from ..records import SessionRecord
from ..session import LAST_SEEN, SIGN_IN, Session

try:
    from ua_parser import parse
except ImportError as error:
    raise ImportError("the page of devices needs ua-parser: pip install 'flask-persist-session[devices]'") from error

TEMPLATE = "persist_session/devices.html"
_SALT = "flask-persist-session.devices"
#: What the library adds to the name of a browser that also runs elsewhere.
_VARIANT = re.compile(r"\b(?:Mobile|iOS)\b")
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60))


def devices_blueprint(
    name: str = "devices",
    *,
    login_url: str | Callable[[], str] | None = None,
    on_sign_out: Callable[[], object] | None = None,
) -> Blueprint:
    """A blueprint with one page, on which signed-in users see their active sessions and end them::

        app.register_blueprint(devices_blueprint(login_url="/login"), url_prefix="/account/devices")

    Its page is ``persist_session/devices.html``, which the application may replace by a template of its own of that
    name. It shows browsers and addresses if ``PERSIST_SESSION_TRACK_DEVICES`` is on, and times otherwise.

    :param name: name of the blueprint, for ``url_for("devices.page")``.
    :param login_url: where visitors are sent who are not signed in, or a function that returns it. ``None``: they get a
        403, and who signs out this very device is sent to the root of the application.
    :param on_sign_out: called when a user signs out this very device, after its session was emptied, for what the
        application has to do besides; ``flask_login.logout_user`` forgets its remember-me cookie.
    """
    page = _Page(login_url, on_sign_out)
    blueprint = Blueprint(name, __name__, url_prefix="/devices", template_folder="templates", static_folder="static")
    blueprint.add_url_rule("", "page", page.show)
    blueprint.add_url_rule("/sign-out", "sign_out", page.sign_out, methods=["POST"])
    blueprint.add_url_rule("/sign-out-others", "sign_out_others", page.sign_out_others, methods=["POST"])
    blueprint.register_error_handler(UnsupportedByStore, _answer_unsupported)
    return blueprint


@dataclass(frozen=True, slots=True)
class Visit:
    """A moment at which a session was used, and by what."""

    at: datetime
    ip: str | None
    browser: str | None
    system: str | None

    @property
    def device(self) -> str:
        """Browser and system in words."""
        browser = self.browser or "Unknown browser"
        return f"{browser} on {self.system}" if self.system else browser


@dataclass(frozen=True, slots=True)
class Device:
    """What the page shows of one session."""

    session_id: str
    here: bool
    """Whether it is the session that the page is shown to."""
    signed_in: Visit
    last_seen: Visit
    seen_ago: str
    """How long ago that was, in words, as exactly as renewals tell."""


class _Page:
    """The views of the blueprint."""

    def __init__(self, login_url: str | Callable[[], str] | None, on_sign_out: Callable[[], object] | None) -> None:
        self._login_url = login_url
        self._on_sign_out = on_sign_out

    def show(self) -> Response:
        """Show the user's sessions, this one first, then the one that was used last."""
        current = self._signed_in()
        devices = [_describe(record, current) for record in _sessions_like(current)]
        devices.sort(key=lambda device: not device.here)
        return _render(devices=devices, form_key=_signer().get_signature(_id(current)).decode())

    def sign_out(self) -> ResponseReturnValue:
        """End one session of the user, which may be this one; a 404 for anybody else's."""
        current = self._accepted()
        session_id = request.form.get("session_id", "")
        if session_id == current.id:
            return self._sign_out_here(current)
        manager = PersistSession().manager
        found = manager.load(session_id)  # one that has just ended is no error: the form was sent twice
        if found is None or (found.user_id, found.tenant_id) != (current.user_id, current.tenant_id):
            abort(404, "You have no such session.")
        manager.revoke(found.id)
        return _redirect_back()

    def sign_out_others(self) -> ResponseReturnValue:
        """End all sessions of the user but this one."""
        current = self._accepted()
        current.revoke_others()
        return _redirect_back()

    def _sign_out_here(self, current: Session) -> ResponseReturnValue:
        current.clear()
        if self._on_sign_out is not None:
            self._on_sign_out()
        return redirect(self._find_login_url() or f"{request.root_path}/", 303)

    def _find_login_url(self) -> str | None:
        return self._login_url() if callable(self._login_url) else self._login_url

    def _signed_in(self) -> Session:
        """The session of this request, if it is a user's; other visitors are sent away."""
        current = session._get_current_object()  # type: ignore[attr-defined]
        if not isinstance(current, Session):
            if current_app.config.get(f"{PREFIX}ENABLED") is False:
                raise UnsupportedByStore(f"{PREFIX}ENABLED is False, and sessions in Flask's cookie cannot be listed")
            raise ConfigError("the page of devices needs server-side sessions: call PersistSession(app), set SECRET_KEY")
        if current.user_id is None:
            url = self._find_login_url()
            if url is None:
                abort(403, "Please sign in first.")
            abort(redirect(url, 303))
        return current

    def _accepted(self) -> Session:
        """The same for a form, which must come from the page as it was shown to this session."""
        current = self._signed_in()
        if not _signer().verify_signature(_id(current), request.form.get("form_key", "")):
            abort(400, "This form is out of date. Please open the page again.")
        return current


def _id(current: Session) -> bytes:
    return str(current.id).encode()


def _signer() -> Signer:
    """Makes the key of the page's forms, from the session's id.

    A form of another site does not know it, and it changes whenever the session's token does: what somebody saw who
    planted a session is worth nothing after sign-in. After the OWASP cheat sheet on cross-site request forgery, HMAC-based
    tokens; unlike a key that is kept in the session, it costs no write.
    """
    keys = [want_bytes(key) for key in secret_keys(current_app)]
    return Signer(keys, salt=_SALT, key_derivation="hmac", digest_method=hashlib.sha256)


def _sessions_like(current: Session) -> Iterator[SessionRecord]:
    """The active sessions of the user within the tenant."""
    found = PersistSession().manager.find(
        user_id=current.user_id, tenant_id=current.tenant_id, state="active", order_by="-accessed_at"
    )
    return (record for record in found if record.tenant_id == current.tenant_id)  # to find, no tenant is any tenant


def _redirect_back() -> ResponseReturnValue:
    return redirect(url_for(".page", done="1"), 303)


def _render(status: int = 200, **values: Any) -> Response:
    response = make_response(render_template(TEMPLATE, done="done" in request.args, **values), status)
    response.cache_control.no_store = True
    response.headers["X-Frame-Options"] = "DENY"  # nobody is to be lured into pressing its buttons
    return response


def _answer_unsupported(error: UnsupportedByStore) -> Response:
    current_app.logger.error("the devices of a user cannot be shown: %s", error)
    return _render(501, devices=None)


def _describe(record: SessionRecord, current: Session) -> Device:
    manager = PersistSession().manager
    here = record.id == current.id
    return Device(
        session_id=record.id,
        here=here,
        signed_in=_visit(record.metadata.get(SIGN_IN), record.created_at),
        last_seen=_visit(record.metadata.get(LAST_SEEN), record.accessed_at),
        seen_ago="now" if here else _ago(manager.clock() - record.accessed_at, manager.renew_interval),
    )


def _visit(noted: Any, at: float) -> Visit:
    """Of what the metadata has, which is nothing for sessions from before devices were tracked."""
    known = noted if isinstance(noted, Mapping) else {}
    browser, system = _in_words(str(known.get("user_agent") or ""))
    return Visit(datetime.fromtimestamp(at, timezone.utc), known.get("ip"), browser, system)


def _in_words(user_agent: str) -> tuple[str | None, str | None]:
    """Names of the browser and of the system as their users know them."""
    found = parse(user_agent)
    browser = " ".join(_VARIANT.sub("", found.user_agent.family).split()) if found.user_agent else None
    system = found.os.family.replace("Mac OS X", "macOS") if found.os else None
    if found.device and found.device.family in ("iPhone", "iPad"):
        system = found.device.family
    return browser or None, system


def _ago(seconds: float, interval: float) -> str:
    """How long ago in words; requests less than *interval* apart are not all noted."""
    least = max(60.0, interval)
    if seconds < least:
        return f"in the last {_count(least).removeprefix('1 ')}"
    return f"{_count(seconds)} ago"


def _count(seconds: float) -> str:
    unit, length = next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])
    count = math.floor(seconds / length)
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
