"""A secret key that outlives the server, for whoever has set none."""

import os
import secrets
import tempfile
from pathlib import Path


def lasting_secret_key(folder: Path) -> str:
    """Return the secret key kept in ``folder``, made on first use and the same for every process."""
    path = folder / "secret_key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        publish_once(path, secrets.token_urlsafe(32))
    return path.read_text(encoding="ascii")


def publish_once(path: Path, text: str) -> None:
    """Create a private file with its whole text at once, or leave the one that is already there."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        # A link never replaces a file, a rename does: of two workers starting at once the second
        # would then go on with a key that the first has already signed cookies against.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)
