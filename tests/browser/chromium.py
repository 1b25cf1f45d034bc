"""A Chromium for the tests: the one that Playwright brings, or else one of this machine.

``python -m tests.browser.chromium`` looks for one, and gets one where there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Error, Playwright, sync_playwright

from tests.packages import install, run

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
#: Playwright's own program needs the second one, which a small system may lack.
PACKAGES = ("chromium", "libatomic1")
HOW = (
    "Get one with “.venv/bin/playwright install --with-deps chromium”, or with the package chromium of the system"
    f" (“apt-get install {' '.join(PACKAGES)}”), and run the tests again."
)
#: No name leads out of this machine, whatever a page asks for and the browser itself would like to know.
ARGUMENTS = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-sync", "--no-first-run")


class NoChromium(Exception):
    """There is none here that starts; the text tells what was tried, and what to do."""


@contextmanager
def running() -> Iterator[Browser]:
    """A running Chromium: Playwright's own, or the first one on ``PATH`` that starts. Raises ``NoChromium``."""
    # Asked in a process of its own, because here it would end in an error that says nothing.
    asked = subprocess.run([sys.executable, "-m", "playwright", "--version"], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise NoChromium(f"Playwright itself does not start: {asked.stderr.strip()}\n{HOW}")
    with sync_playwright() as playwright:
        browser = start(playwright)
        yield browser
        browser.close()


def start(playwright: Playwright) -> Browser:
    """Start the first Chromium that starts. Raises ``NoChromium``."""
    tried = []
    for program in (None, *filter(None, map(shutil.which, PROGRAMS))):
        try:
            return playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        except Error as error:
            tried.append(f"{program or 'the one of Playwright'}: {str(error).strip().splitlines()[0]}")
    raise NoChromium("\n".join(["There is no Chromium here that starts.", *tried, HOW]))


def version() -> str:
    """The version of the Chromium that the tests get. Raises ``NoChromium``."""
    with running() as browser:
        return browser.version


def download() -> None:
    """Let Playwright download its Chromium, which needs its download servers."""
    run(sys.executable, "-m", "playwright", "install", "chromium")


def install_package() -> None:
    """Install the system's package, where that needs nobody's leave."""
    install(*PACKAGES)


def get() -> str:
    """Find a Chromium, or get one; returns its version. Raises ``NoChromium``."""
    ways: tuple[Callable[[], None], ...] = (download, install_package)
    for way in ways:
        try:
            return version()
        except NoChromium:
            way()
    return version()


def main() -> int:
    """Say what there is; without any, fail only in CI, because elsewhere the other tests are worth running."""
    try:
        print(f"The tests in a browser use Chromium {get()}.")
    except NoChromium as problem:
        print(problem, file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
