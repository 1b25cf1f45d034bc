"""A Chromium for the tests: the one that Playwright brings, or else one of this machine.

``python -m tests.browser.chromium`` looks for one, and gets one where there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

from playwright.sync_api import Browser, Error, Playwright, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
HOW = (
    "Get one with “.venv/bin/playwright install --with-deps chromium”, or with the package chromium of the system"
    " (“apt-get install chromium”), and run the tests again."
)
#: No name leads out of this machine, whatever a page asks for and the browser itself would like to know.
ARGUMENTS = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-sync", "--no-first-run")


class NoChromium(Exception):
    """There is none here that starts; the text tells what was tried, and what to do."""


def start(playwright: Playwright) -> Browser:
    """Start Playwright's Chromium, or the first one on ``PATH`` that starts. Raises ``NoChromium``."""
    tried = []
    for program in (None, *filter(None, map(shutil.which, PROGRAMS))):
        try:
            return playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        except Error as error:
            tried.append(f"{program or 'the one of Playwright'}: {str(error).strip().splitlines()[0]}")
    raise NoChromium("\n".join(["There is no Chromium here that starts.", *tried, HOW]))


def version() -> str:
    """The version of the Chromium that the tests get. Raises ``NoChromium``."""
    with sync_playwright() as playwright, start(playwright) as browser:
        return browser.version


def download() -> None:
    """Let Playwright download its Chromium, which needs its download servers."""
    run(sys.executable, "-m", "playwright", "install", "chromium")


def install_package() -> None:
    """Install the system's package, where that needs nobody's leave."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print("The system's package is not installed from here: that takes apt-get and root.", flush=True)
        return
    run("apt-get", "update", "--quiet=2")
    run("apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", "chromium")


def run(*command: str) -> None:
    """Run a command, and say so; whether it has helped is seen by looking for a Chromium."""
    print("Getting a Chromium for the tests:", *command, flush=True)
    subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL, check=False)


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
