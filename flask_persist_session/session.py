"""``Session``, the mapping behind ``flask.session``: loads on first use and notices every change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

from flask.sessions import SessionMixin

from .exceptions import StoreError
from .lifecycle import Metadata, Outcome
from .manager import SessionManager
from .records import JSON
from .stored import NOBODY, Foreign, Owner, StoredSession
from .tokens import session_id

log = logging.getLogger("flask_persist_session")

#: Values of these types cannot change in place, so handing one out needs no look at the end whether it changed.
_IMMUTABLE = frozenset({type(None), bool, int, float, str, bytes})

CookieTask: TypeAlias = Literal["keep", "set", "renew", "delete"]
"""What the response's cookie needs: nothing, a (new) token, the same token with a new time, or to go."""
Renewal: TypeAlias = Literal["no", "if changed", "yes"]
"""Whether it is time to renew the session: not yet, only if it is saved anyway, or in any case."""
DeviceNote: TypeAlias = dict[str, JSON]
"""Where a request comes from: its ``ip`` and ``user_agent``, each ``None`` if it is not known."""

#: Under what the metadata keeps the device of the sign-in and that of the last renewal.
SIGN_IN = "sign_in"
LAST_SEEN = "last_seen"


class Session(SessionMixin):
    """The session of one request: a mutable mapping that is loaded from the store when it is first touched.

    :param manager: the manager of its namespace.
    :param read_token: returns the verified token that the request carries, or ``None``; called at most once.
    :param describe_device: returns what is to be noted of the device that sends the request; ``None``: nothing is.
    :param find_foreign: called if there is none: returns a session of another kind that the request came with, or one of
        ours that is closed and stood for such a one, or ``None``.
    """

    def __init__(
        self,
        manager: SessionManager,
        read_token: Callable[[], str | None],
        describe_device: Callable[[], DeviceNote] | None = None,
        find_foreign: Callable[[], Foreign | StoredSession | None] = lambda: None,
    ) -> None:
        self._manager = manager
        self._read_token = read_token
        self._describe_device = describe_device
        self._find_foreign = find_foreign
        self._data: dict[str, Any] | None = None
        self._stored: StoredSession | None = None
        self._closed: StoredSession | None = None
        self._foreign: Foreign | None = None  # what the session is to be taken over from
        self._token: str | None = None
        self._cookie: CookieTask = "keep"
        self._changed = False  # a key was set or removed
        self._exposed = False  # a value that can change in place was handed out
        self._forced: bool | None = None  # what the application said through ``modified``
        self._cleared = False
        self._regenerate = False
        self._owner: Owner | None = None  # whom the application bound it to
        self._user_value: Any = None  # what stood under the user key when it was loaded
        self._frozen = False  # the session has ended: this request stores nothing any more
        self._failure: StoreError | None = None  # why it could not be loaded
        self.renewal_failed = False
        self.answered = False  # the view has returned: what is left reads the session, but must not fail on it

    # Loading ----------------------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        """Whether the store has been asked for the session."""
        return self._data is not None

    def _load(self) -> dict[str, Any]:
        if self._data is None:
            token = self._read_token()
            try:
                found = self._find_foreign() if token is None else self._manager.load(session_id(token))
            except StoreError as error:
                # Whoever answers the error may look at the session too, and must not wait for the store again.
                self._failure, self._data = error, {}
                if not self.answered:
                    raise
                log.warning("a session could not be loaded, and so could not be renewed: %s", error)
                self.renewal_failed = True
                return self._data
            self._open(found, token)
            origin = self._stored or self._foreign
            self._data = {} if origin is None else origin.data
        return self._data

    def _open(self, found: Foreign | StoredSession | None, token: str | None) -> None:
        if isinstance(found, Foreign):
            self._foreign = found  # its user becomes the owner when it is stored, as on signing in
        elif found is None or found.state == "active":
            self._stored, self._token = found, token
            self._user_value = None if found is None else self._manager.user_value(found.data)
        else:
            self._closed = found
            self._frozen = self._manager.is_in_grace(found)

    # The mapping ------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        value = self._load()[key]
        if type(value) not in _IMMUTABLE:
            self._exposed = True
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value of *key*, or *default*."""
        value = self._load().get(key, default)
        if type(value) not in _IMMUTABLE:
            self._exposed = True
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._load()[key] = value
        if type(value) not in _IMMUTABLE:
            self._exposed = True  # whoever put it in can change it after a save
        self._note_change()

    def __delitem__(self, key: str) -> None:
        del self._load()[key]
        self._note_change()

    def __ior__(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Session:
        self.update(other)
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())

    def __contains__(self, key: object) -> bool:
        return key in self._load()

    def clear(self) -> None:
        """Remove everything: the session ends when it is saved, and what is put in afterwards starts a new one."""
        self._load().clear()
        self._cleared = True
        self._note_change()

    def copy(self) -> dict[str, Any]:
        """A shallow copy as a dict."""
        self._exposed = True
        return dict(self._load())

    def __repr__(self) -> str:
        if not self.loaded:
            return "<Session, not loaded>"
        return f"<Session {self.id or 'new'}, keys {sorted(map(str, self._load()))}>"

    def _note_change(self) -> None:
        self._changed = True
        if self._forced is False:
            self._forced = None

    # What is known of it ----------------------------------------------------------------------------------------------

    @property
    def modified(self) -> bool:
        """Whether a key was set or removed. Set it to ``True`` to have the session saved and renewed in any case, to
        ``False`` to have nothing saved unless another key is set or removed afterwards. Changes inside nested values
        are noticed without it.
        """
        return self._changed if self._forced is None else self._forced

    @modified.setter
    def modified(self, value: bool) -> None:
        self._load()
        protected = self._cleared or self._regenerate or self._owner is not None
        if value or not protected:  # what protects the user is not taken back by accident
            self._forced = bool(value)

    @property
    def id(self) -> str | None:
        """Public id of the stored session; ``None`` until a new one is saved."""
        self._load()
        return self._stored.id if self._stored else None

    @property
    def new(self) -> bool:  # type: ignore[override]
        """Whether the request came without a live session."""
        self._load()
        return self._stored is None and self._foreign is None

    @property
    def user_id(self) -> str | None:
        """The user whose session this is."""
        self._load()
        if self._foreign is not None:
            return self._manager.user_value(self._foreign.data)
        return self._stored.user_id if self._stored else None

    @property
    def tenant_id(self) -> str | None:
        """The tenant within which the session lives."""
        self._load()
        return self._stored.tenant_id if self._stored else None

    @property
    def created_at(self) -> float | None:
        """Seconds since the epoch at which the session began; ``None`` until a new one is saved."""
        self._load()
        return self._stored.created_at if self._stored else None

    @property
    def expires_at(self) -> float | None:
        """Seconds since the epoch at which the session expires unless it is renewed; ``None`` until it is saved."""
        self._load()
        return self._stored.expires_at if self._stored else None

    @property
    def end_reason(self) -> str | None:
        """Why the session that the request came with is closed (``"expired"``, ``"revoked"`` …), ``None`` if it is not."""
        self._load()
        return self._closed.end_reason if self._closed else None

    # Changing it as a whole -------------------------------------------------------------------------------------------

    def regenerate(self) -> None:
        """Give the session a new token and id when it is saved; its data stays, the old token opens nothing any more.

        Do so whenever rights change (OWASP ASVS 5.0, 7.2.4).
        """
        self._load()
        self._regenerate = True
        if self._forced is False:
            self._forced = None

    def bind(self, user_id: object, tenant_id: object = None) -> None:
        """Make it the session of a user when it is saved, under a new token: the user has signed in.

        *user_id* and *tenant_id* are kept as ``str``. The old token opens nothing any more, the absolute timeout starts
        anew and the cap of the user's sessions is applied. Raises ``ValueError`` if *user_id* is ``None`` or no id, such
        as ``True`` or a list.
        """
        if user_id is None:
            raise ValueError("bind needs a user; unbind() makes it nobody's session")
        self._load()
        self._owner = Owner.of(user_id, tenant_id)
        self._forced = None if self._forced is False else self._forced

    def unbind(self) -> None:
        """Make it nobody's session when it is saved, under a new token: the user has signed out, the data stays."""
        self._manager.forget_user(self._load())
        self._owner = NOBODY
        self._forced = None if self._forced is False else self._forced

    def revoke_others(self) -> int:
        """Sign the session's user out everywhere else, within its tenant; say how many sessions that were.

        Raises ``ValueError`` for nobody's session, ``StoreError``, ``UnsupportedByStore`` where the store cannot list.
        """
        self._load()
        if self._stored is None:
            raise ValueError("the session is not stored yet, so it is nobody's")
        return self._manager.revoke_others(self._stored)

    def _new_owner(self, data: dict[str, Any]) -> Owner | None:
        """Whose session it becomes; ``None`` if that has not changed."""
        if self._owner is not None:
            return self._owner
        value = self._manager.user_value(data)
        return None if value == self._user_value and not self._cleared else self._manager.owner_in(data)

    def flush(self) -> None:
        """Remove everything and delete the session when it is saved; what is put in afterwards starts a new one."""
        self.clear()

    def save(self) -> None:
        """Store the session now, not at the end of the request: for bodies that stream after the headers have left.

        A new session still needs a response whose headers can carry its cookie.

        Raises ``SerializationError``, ``SessionTooLarge``, ``SessionConflict``, ``StoreError``; the stored state is
        then as it was.
        """
        self.finish("no")

    def finish(self, renewal: Renewal) -> tuple[CookieTask, str | None]:
        """Store what is to be stored; with *renewal* ``"yes"`` even an untouched session is renewed.

        Returns what the cookie needs since the session was opened, and the token to put into it. Raises as ``save``
        does.
        """
        if self.loaded or renewal == "yes":
            self._store(self._load(), renewal)
        return self._cookie, self._token

    @property
    def live(self) -> bool:
        """Whether there is an active session in the store."""
        return self._stored is not None

    def _store(self, data: dict[str, Any], renewal: Renewal) -> None:
        owner = self._new_owner(data)
        asked = self._regenerate or owner is not None
        wanted = self._changed or self._exposed or asked if self._forced is None else self._forced
        if self._failure is not None or (self._frozen and not self._signs_in_again(owner)):
            self._drop_changes()
        elif self._foreign is not None:
            self._take_over(self._foreign, data, owner or NOBODY)
        elif self._stored is None:
            self._store_new(data, wanted, owner or NOBODY)
        elif wanted and self._changed and not data and (self._cleared or not self._is_users(self._stored, owner)):
            self._delete(self._stored)
        elif wanted and self._cleared:
            noted = self._noted(owner)
            self._adopt(self._manager.restart(self._stored, data, owner or NOBODY, metadata=noted))
        elif wanted and owner is not None:
            self._adopt(self._manager.bind(self._stored, owner, metadata=self._noted(owner)))
        elif wanted and self._regenerate:
            self._adopt(self._manager.regenerate(self._stored, metadata=self._noted()))
        elif wanted:
            self._save(self._stored, renewal)
        elif renewal == "yes":
            self._finish_save(self._manager.renew(self._stored, metadata=self._noted()), "renew")
        self._changed, self._forced, self._cleared, self._regenerate, self._owner = False, None, False, False, None
        self._user_value = self._manager.user_value(data)

    def _is_users(self, stored: StoredSession, new_owner: Owner | None) -> bool:
        """Whether it is a user's once it is stored: then that is what it keeps, be it empty or not."""
        return (stored.user_id if new_owner is None else new_owner.user_id) is not None

    def _signs_in_again(self, owner: Owner | None) -> bool:
        """Whether a visitor signs in whose session moved before: by a form that was sent twice, whose first answer with
        the new token the browser may never have seen."""
        visitor = self._closed is not None and self._closed.end_reason == "regenerated" and self._closed.user_id is None
        return visitor and owner is not None and owner is not NOBODY

    def _noted(self, owner: Owner | None = None) -> Metadata | None:
        """What to note of the device in the session's metadata, as its *owner* signs in (or out) or without that."""
        if self._describe_device is None:
            return None
        device = self._describe_device()
        noted: dict[str, JSON] = {LAST_SEEN: device}
        if owner is not None and owner.user_id is not None:
            noted[SIGN_IN] = device
        elif owner is not None and self._stored is not None and not self._cleared:
            noted[SIGN_IN] = None  # the metadata goes along, and is no longer that of a user
        return noted

    def _drop_changes(self) -> None:
        if self._changed and self._failure is not None:
            raise self._failure
        if self._changed and self._closed is not None:
            self._manager.discard(self._closed.id, self._closed.end_reason)

    def _take_over(self, foreign: Foreign, data: dict[str, Any], owner: Owner) -> None:
        if data:
            self._adopt(self._manager.adopt(foreign, data, owner, metadata=self._noted(owner)))
        else:
            self._frozen = not self._manager.end_foreign(foreign)
            self._cookie = "keep" if self._frozen else "delete"
        if self._frozen and self._changed:
            self._manager.discard(foreign.id, "regenerated")
        self._foreign = None

    def _store_new(self, data: dict[str, Any], wanted: bool, owner: Owner) -> None:
        if wanted and (data or owner is not NOBODY):
            noted = self._noted(owner)
            self._adopt(self._manager.create(data, user_id=owner.user_id, tenant_id=owner.tenant_id, metadata=noted))
        elif self._forced or (wanted and self._changed):
            self._cookie = "delete"

    def _delete(self, stored: StoredSession) -> None:
        # What was cleared is signed out, whatever others put in meanwhile. What lost its last key is only empty if
        # they did not.
        outcome = self._manager.flush(stored) if self._cleared else self._manager.save(stored, delete_empty=True)
        self._finish_save(outcome, "keep")
        self._data = stored.data
        if outcome == "deleted":
            self._stored, self._token, self._cookie = None, None, "delete"

    def _adopt(self, stored: StoredSession | None) -> None:
        """Go on under a new token, or store nothing any more if the session ended meanwhile."""
        self._frozen = stored is None
        if stored is not None:
            self._stored, self._data, self._token, self._cookie = stored, stored.data, stored.token, "set"

    def _save(self, stored: StoredSession, renewal: Renewal) -> None:
        forced = self._forced is True
        changed = self._changed or forced
        noted = self._noted() if forced or renewal != "no" else None
        outcome = self._manager.save(stored, renew=forced or renewal == "yes", metadata=noted)
        self._data = stored.data
        if renewal == "no" and not forced:
            self._finish_save(outcome, "keep")
        else:
            self._finish_save(outcome, "set" if changed else "renew")

    def _finish_save(self, outcome: Outcome, task: CookieTask) -> None:
        self._frozen = outcome == "discarded"
        self.renewal_failed = outcome == "failed"
        if outcome == "saved" and self._cookie != "set":
            self._cookie = task
