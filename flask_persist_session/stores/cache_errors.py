"""What the drivers of cachelib's caches raise when their server cannot be reached."""

from __future__ import annotations

import sys

#: Looked up among the modules that are loaded anyway.
_DRIVER_ERRORS = (
    ("redis", "RedisError"),
    ("valkey", "ValkeyError"),
    ("pymongo.errors", "PyMongoError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("pylibmc", "Error"),
    ("pymemcache.exceptions", "MemcacheError"),
)


def driver_errors() -> tuple[type[Exception], ...]:
    """The errors of all drivers that are loaded, and ``OSError``."""
    loaded = ((sys.modules.get(module), name) for module, name in _DRIVER_ERRORS)
    return (OSError, *(getattr(module, name) for module, name in loaded if module is not None))
