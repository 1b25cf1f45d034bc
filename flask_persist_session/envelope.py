"""What is done to encoded data before it is stored, compression and encryption, and how it is undone.

A payload begins with one byte: its low four bits name the serializer, the next two the compression, one says that the rest
is encrypted. So each payload says itself how to read it, whatever the settings are by then. Encrypted, the byte is followed
by the id of the key (8 bytes), the nonce (12), and AES-256-GCM's text and tag (16), which cover the byte too.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import zlib
from abc import ABC, abstractmethod
from base64 import urlsafe_b64decode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .exceptions import ConfigError, SerializationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

#: The bit of encrypted payloads, and the bits of compressed ones; one that none of these knows is of a newer version.
_ENCRYPTED, _COMPRESSED, _UNKNOWN = 0x40, 0x30, 0x80
#: Smaller payloads are not compressed: it would spare less than 200 bytes.
SMALLEST_COMPRESSED = 512
#: Larger payloads are neither compressed nor decompressed, so that few bytes cannot become a full memory.
LARGEST_COMPRESSED = 64 * 1024 * 1024


# Compression ----------------------------------------------------------------------------------------------------------


class Compression(ABC):
    """A way to make bytes fewer."""

    #: Its bits of the leading byte; never reuse them.
    bits: int

    @abstractmethod
    def compress(self, content: bytes) -> bytes:
        """*content*, compressed. Any number of threads may call it."""

    @abstractmethod
    def decompress(self, compressed: bytes) -> bytes:
        """What was compressed. Raises ``SerializationError`` for damage, and beyond ``LARGEST_COMPRESSED``."""


class _Zlib(Compression):
    bits = 0x10

    def compress(self, content: bytes) -> bytes:
        return zlib.compress(content)

    def decompress(self, compressed: bytes) -> bytes:
        try:
            return _inflated(zlib.decompressobj(), compressed)
        except zlib.error as error:
            raise SerializationError(f"the compressed payload is damaged: {error}") from error


class _Zstandard(Compression):
    """Zstandard through the package of that name."""

    bits = 0x20

    def __init__(self) -> None:
        self._zstd: Any = importlib.import_module("zstandard")

    def compress(self, content: bytes) -> bytes:
        # A compressor of its own each time: one cannot be shared by threads.
        packed: bytes = self._zstd.ZstdCompressor().compress(content)
        return packed

    def decompress(self, compressed: bytes) -> bytes:
        try:
            _check_announced(self._zstd.get_frame_parameters(compressed).content_size)
            content: bytes = self._zstd.ZstdDecompressor().decompress(compressed, allow_extra_data=False)
        except self._zstd.ZstdError as error:
            raise SerializationError(f"the compressed payload is damaged: {error}") from error
        return content


class _StandardZstandard(Compression):
    """Zstandard of Python 3.14's own library."""

    bits = _Zstandard.bits

    def __init__(self) -> None:
        self._zstd: Any = importlib.import_module("compression.zstd")

    def compress(self, content: bytes) -> bytes:
        packed: bytes = self._zstd.compress(content)
        return packed

    def decompress(self, compressed: bytes) -> bytes:
        try:
            _check_announced(self._zstd.get_frame_info(compressed).decompressed_size)
            return _inflated(self._zstd.ZstdDecompressor(), compressed)
        except self._zstd.ZstdError as error:
            raise SerializationError(f"the compressed payload is damaged: {error}") from error


def _inflated(decompressor: Any, compressed: bytes) -> bytes:
    """All of *compressed*, by a decompressor of the standard library. Raises ``SerializationError`` if it is not whole."""
    content: bytes = decompressor.decompress(compressed, LARGEST_COMPRESSED + 1)
    if len(content) > LARGEST_COMPRESSED:
        raise _too_large()
    if not decompressor.eof or decompressor.unused_data:
        raise SerializationError("the compressed payload is damaged: it is cut off, or something follows it")
    return content


def _check_announced(size: int | None) -> None:
    """Refuse what is too large before any memory is taken; what does not say its size (-1 or ``None``) is not ours."""
    if size is None or not 0 <= size <= LARGEST_COMPRESSED:
        raise _too_large()


def _too_large() -> SerializationError:
    return SerializationError(f"the compressed payload is damaged: it would take more than {LARGEST_COMPRESSED:,} bytes")


COMPRESSIONS = ("zlib", "zstd")
_ZSTD_MISSING = 'zstd is not installed: pip install "Flask-Persist-Session[zstd]"'


def open_compression(name: str) -> Compression:
    """The one of ``COMPRESSIONS`` that is called *name*. Raises ``ConfigError`` saying what to install for it."""
    if name == "zlib":
        return _Zlib()
    for kind in _StandardZstandard, _Zstandard:
        try:
            return kind()
        except ImportError:
            continue
    raise ConfigError(_ZSTD_MISSING)


# Encryption -----------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"[A-Za-z0-9_-]{43}=?", re.ASCII)
_NO_KEY = (
    "this is no key: 32 random bytes in base64url. Make one with: "
    'python -c "import secrets; print(secrets.token_urlsafe(32))"'
)
#: Less than one in 10²⁴ random keys has fewer different bytes; those made by hand, such as 43 times A, have.
_FEWEST_BYTES = 12
_ID, _NONCE, _TAG = 8, 12, 16


def key_bytes(text: object) -> bytes:
    """The 32 bytes of a key that ``secrets.token_urlsafe(32)`` or ``Fernet.generate_key()`` has made.

    Raises ``ConfigError`` for what is no key, without saying what it is: that is secret, and so is what is nearly a key.
    """
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if not isinstance(text, str) or not _KEY.fullmatch(text):
        raise ConfigError(_NO_KEY)
    key = urlsafe_b64decode(text[:43] + "=")
    if len(set(key)) < _FEWEST_BYTES:
        raise ConfigError(_NO_KEY)
    return key


def open_cipher(key: bytes) -> AESGCM:
    """AES-256-GCM with a key of 32 bytes. Raises ``ConfigError`` saying what to install for it."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ConfigError('cryptography is not installed: pip install "Flask-Persist-Session[encryption]"') from error
    return AESGCM(key)


class _Key:
    """Encrypts payloads, and decrypts those that it has encrypted."""

    def __init__(self, key: bytes) -> None:
        self.id = hashlib.sha256(b"flask-persist-session.key-id\n" + key).digest()[:_ID]
        self._cipher = open_cipher(key)

    def encrypt(self, payload: bytes) -> bytes:
        kind, nonce = bytes([payload[0] | _ENCRYPTED]), os.urandom(_NONCE)
        return kind + self.id + nonce + self._cipher.encrypt(nonce, payload[1:], kind)

    def decrypt(self, payload: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        kind, start = payload[:1], 1 + _ID
        try:
            rest = self._cipher.decrypt(payload[start : start + _NONCE], payload[start + _NONCE :], kind)
        except InvalidTag as error:
            raise SerializationError("the encrypted payload was changed since it was stored") from error
        return bytes([kind[0] & ~_ENCRYPTED]) + rest


# Both -----------------------------------------------------------------------------------------------------------------


class Envelope:
    """Compresses and encrypts payloads as the settings want, and opens those that were made with other settings.

    *compress* is one of ``COMPRESSIONS`` or ``None``, *keys* are as in the setting: the first one encrypts, all decrypt.
    Raises ``ConfigError`` for what is no key, and for what is not installed.
    """

    def __init__(self, compress: str | None = None, keys: Sequence[str | bytes] = ()) -> None:
        self._compression = open_compression(compress) if compress else None
        #: By their bits, each opened when it is first met: to look for a missing module takes longer than its work.
        self._compressions = {one.bits: one for one in [self._compression] if one}
        ring = [_Key(key_bytes(key)) for key in keys]
        self._current = ring[0] if ring else None
        self._keys = {key.id: key for key in ring}

    def seal(self, plain: bytes) -> bytes:
        """What is stored of *plain*: a leading byte with the serializer's number, and encoded data."""
        payload = plain
        if self._compression and SMALLEST_COMPRESSED <= len(plain) <= LARGEST_COMPRESSED:
            smaller = self._compression.compress(plain[1:])
            if len(smaller) < len(plain) - 1:
                payload = bytes([plain[0] | self._compression.bits]) + smaller
        return self._current.encrypt(payload) if self._current else payload

    def open(self, payload: bytes) -> bytes:
        """What was sealed. Raises ``SerializationError`` for damage, a key that is not there, and unknown envelopes."""
        if payload[0] & _UNKNOWN or payload[0] & _COMPRESSED == _COMPRESSED:
            raise SerializationError(f"the payload's envelope 0x{payload[0]:02x} is unknown")
        if payload[0] & _ENCRYPTED:
            payload = self._decrypted(payload)
        bits = payload[0] & _COMPRESSED
        return payload if not bits else bytes([payload[0] & ~bits]) + self._compression_of(bits).decompress(payload[1:])

    def _decrypted(self, payload: bytes) -> bytes:
        if len(payload) < 1 + _ID + _NONCE + _TAG:
            raise SerializationError("the encrypted payload is cut off")
        key_id = payload[1 : 1 + _ID]
        key = self._keys.get(key_id)
        if key is None:
            raise SerializationError(
                f"the payload is encrypted with the key of id {key_id.hex()}, which is missing in "
                "PERSIST_SESSION_ENCRYPTION_KEYS"
            )
        return key.decrypt(payload)

    def _compression_of(self, bits: int) -> Compression:
        if bits not in self._compressions:
            try:
                self._compressions[bits] = open_compression("zlib" if bits == _Zlib.bits else "zstd")
            except ConfigError as error:
                raise SerializationError(f"the payload cannot be decompressed: {error}") from error
        return self._compressions[bits]
