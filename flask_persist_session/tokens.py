"""Tokens and session ids: making them, deriving one from the other, signing them for the cookie.

A token is the secret in the cookie: a shard of 3 hex digits and 32 random bytes. The session id is public: the same
shard and the SHA-256 of the token. Nobody gets from the id to the token, so whoever reads the store, a backup, a log
or a list cannot open a session (OWASP ASVS 5.0, 7.2.3 asks for 128 bits of entropy; this is 256).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from base64 import urlsafe_b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from itsdangerous import TimestampSigner, want_bytes
from itsdangerous.signer import SigningAlgorithm

SHARDS = 1024
TOKEN_BYTES = 32
#: The longest cookie value that is looked at: a token of 46 characters, the time and the signature, with room to spare.
_LONGEST_VALUE = 200
_SALT = "flask-persist-session.token"


def shard_of(user_id: str | None) -> str:
    """The shard of a user's sessions, always the same, so that one script of a Redis Cluster reaches them together.

    A session of nobody gets a random one.
    """
    if user_id is None:
        return f"{secrets.randbelow(SHARDS):03x}"
    digest = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).digest()
    return f"{int.from_bytes(digest[:2], 'big') % SHARDS:03x}"


def make_token(shard: str) -> str:
    """A new secret token in *shard*."""
    return shard + secrets.token_urlsafe(TOKEN_BYTES)


def session_id(token: str) -> str:
    """The public id of the session that *token* opens."""
    return token[:3] + hashlib.sha256(token.encode()).hexdigest()


def keyed_id(namespace: str, tenant_id: str | None, user_id: str | None, key: str) -> str:
    """The id of the session that a user's application calls *key*: always the same one, and no token opens it.

    The same key of two users, or in two tenants, names two sessions, and nobody gets at another's by guessing.
    """
    digest = hashlib.sha256(json.dumps([namespace, tenant_id, user_id, key]).encode())
    shard = f"{int.from_bytes(digest.digest()[:2], 'big') % SHARDS:03x}" if user_id is None else shard_of(user_id)
    return shard + digest.hexdigest()


def set_aside_id(session_id: str, created_at: float) -> str:
    """The id under which a keyed session that began then is kept once its key is used anew: always the same one."""
    return session_id[:3] + hashlib.sha256(f"{session_id} of {created_at!r}".encode()).hexdigest()


def foreign_id(kind: str, key: str) -> str:
    """The session id for what another kind of session knows by *key*: always the same one, and no token opens it."""
    digest = hashlib.sha256(f"{kind}\n{key}".encode("utf-8", "surrogatepass"))
    return f"{int.from_bytes(digest.digest()[:2], 'big') % SHARDS:03x}{digest.hexdigest()}"


@dataclass(frozen=True, slots=True)
class SignedToken:
    """A token that came with a good signature, and when it was signed, in whole seconds since the epoch."""

    token: str = field(repr=False)
    signed_at: int


class TokenSigner:
    """Signs tokens for the cookie, with the time of the session's last renewal in whole seconds.

    *keys* are secret keys, oldest first: the last one signs, all of them verify. *clock* returns the current time in
    seconds since the epoch.
    """

    def __init__(self, keys: Sequence[str | bytes], clock: Callable[[], float]) -> None:
        self._signer = _ClockedSigner(keys, clock)

    def sign(self, token: str) -> str:
        """The cookie value for *token*, stamped with the current time."""
        return self._signer.sign(token).decode("ascii")

    def verify(self, value: str) -> SignedToken | None:
        """The token in a cookie *value*, or ``None`` for whatever this application did not sign."""
        signed_at = claimed_time(value)
        if signed_at is None:
            return None
        # What unsign does, without its exceptions and dates: this is a tenth of the time that a session adds.
        stamped, _, signature = value.rpartition(".")
        if not self._signer.verify_signature(stamped, signature):
            return None
        return SignedToken(stamped.rpartition(".")[0], signed_at)


class _HMACSHA256(SigningAlgorithm):
    """HMAC-SHA-256 in one call, which takes a third of the time of an ``hmac`` object."""

    def get_signature(self, key: bytes, value: bytes) -> bytes:
        return hmac.digest(key, value, "sha256")


class _ClockedSigner(TimestampSigner):
    def __init__(self, keys: Sequence[str | bytes], clock: Callable[[], float]) -> None:
        super().__init__(
            [want_bytes(key) for key in keys],
            salt=_SALT,
            key_derivation="hmac",
            digest_method=hashlib.sha256,
            algorithm=_HMACSHA256(),
        )
        self._clock = clock
        self._derived: dict[str | bytes | None, bytes] = {}

    def derive_key(self, secret_key: str | bytes | None = None) -> bytes:
        # The base class derives the same key anew for each signature, which is a quarter of the work.
        if secret_key not in self._derived:
            self._derived[secret_key] = super().derive_key(secret_key)
        return self._derived[secret_key]

    def get_timestamp(self) -> int:
        return int(self._clock())


def claimed_time(value: str) -> int | None:
    """The time that a cookie *value* claims, without checking its signature; ``None`` if it claims none.

    This decides only whether it is worth verifying the value, so a forged time gains nothing.
    """
    if len(value) > _LONGEST_VALUE or not value.isascii():
        return None
    stamp = value.split(".")[-2:-1]
    try:
        return int.from_bytes(urlsafe_b64decode(stamp[0] + "=" * (-len(stamp[0]) % 4)), "big") if stamp else None
    except ValueError:
        return None
