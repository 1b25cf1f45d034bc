"""Packages of the system that tests need, and PyPI does not bring."""

from __future__ import annotations

import os
import shutil
import subprocess


def install(*packages: str) -> None:
    """Install packages of the system, where that needs nobody's leave; whether it has helped is seen by looking."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(f"Not installed from here, for that takes apt-get and root: {' '.join(packages)}.", flush=True)
        return
    run("apt-get", "update", "-qq")
    run("apt-get", "install", "-qq", "--yes", "--no-install-recommends", *packages)


def run(*command: str) -> None:
    """Run a command that gets something for the tests, and say so."""
    print("Getting something for the tests:", *command, flush=True)
    subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL, check=False)
