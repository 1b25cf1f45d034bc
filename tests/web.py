"""What the tests with processes share: how these start, a gunicorn of their own, and browsers that talk to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.cookies import SimpleCookie
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from gunicorn.app import wsgiapp

from tests.servers import DEADLINE, wait_until

#: Starts processes that share nothing with the one of the tests but what they are handed, and at once: they are forked
#: from a process that has done nothing but the imports, of what takes long and is used by the tests. Their environment is
#: that of its start.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *("pytest", "hypothesis", "flask.cli", "flask.testing", "flask_login", "flask_session", "flask_sqlalchemy"),
        *("flask_persist_session.testing", "flask_persist_session.web.api", "flask_wtf", "tests.conftest", "tests.web"),
    ]
)


def start_fork_server() -> None:
    """Let the imports begin; else the first process waits for them."""
    forkserver.ensure_running()


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class Browser:
    """Keeps cookies and one connection, which is opened again after an error or ``close``."""

    def __init__(self, port: int, cookies: Mapping[str, str] | None = None, *, patience: float = DEADLINE) -> None:
        self.cookies = dict(cookies or {})
        self._connection = HTTPConnection("127.0.0.1", port, timeout=patience)

    def get(self, path: str) -> Answer:
        return self._send("GET", path, None, {})

    def post(self, path: str, **form: str) -> Answer:
        return self._send("POST", path, urlencode(form), {"Content-Type": "application/x-www-form-urlencoded"})

    def _send(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> Answer:
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        try:
            self._connection.request(method, path, body, {"Cookie": cookie, **headers})
            response = self._connection.getresponse()
            answer = Answer(response.status, response.read().decode())
        except (OSError, HTTPException):
            self.close()
            raise
        for header in response.headers.get_all("Set-Cookie", []):
            for name, morsel in SimpleCookie(header).items():
                if morsel["max-age"] == "0":
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value
        return answer

    def close(self) -> None:
        self._connection.close()


class Gunicorn:
    """A gunicorn that serves *target*, with its workers a process group of its own.

    It inherits a listening socket from the tests, so whoever answers there is this server or one of its workers, a
    browser that comes too early waits, and a server that is started again has the same port.
    """

    def __init__(self, folder: Path, target: str, *options: str, **environment: str) -> None:
        self._folder, self._log = folder, folder / "gunicorn.log"
        self._command = ["gunicorn", "--keep-alive", "60", *options, target]
        # gunicorn's control socket goes to the folder as well.
        self._environment = {"XDG_RUNTIME_DIR": str(folder), **environment}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._port: int = self._socket.getsockname()[1]
        self._process: ForkServerProcess | None = None
        self._browsers: list[Browser] = []

    def start(self) -> None:
        arguments = (self._socket, self._folder, self._log, self._environment, self._command)
        process = PROCESSES.Process(target=_run_gunicorn, args=arguments, daemon=True)
        process.start()
        self._process = process
        wait_until(self._answers, "gunicorn")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.is_alive(), self.log()
        visitor = Browser(self._port, patience=2)
        try:
            return visitor.get("/").status < 500
        except (TimeoutError, ConnectionError):
            return False
        finally:
            visitor.close()

    def kill(self) -> None:
        """End the server and all its workers at once, wherever they are."""
        if self._process is not None:
            assert self._process.pid
            with suppress(ProcessLookupError):  # it has not come to have a group of its own
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
            self._process = None

    def kill_worker(self, pid: int) -> None:
        """End one of its workers at once, wherever it is."""
        assert self._process is not None
        assert pid != self._process.pid == os.getpgid(pid)
        os.kill(pid, signal.SIGKILL)

    def workers(self) -> list[int]:
        """The process ids of its workers."""
        assert self._process is not None
        pid = self._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def stop(self) -> None:
        self.kill()
        self._socket.close()
        for browser in self._browsers:
            browser.close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    def browser(self, cookies: Mapping[str, str] | None = None) -> Browser:
        """A browser, closed with the server."""
        self._browsers.append(Browser(self._port, cookies))
        return self._browsers[-1]

    def log(self) -> str:
        return self._log.read_text()


def _run_gunicorn(
    listening: socket.socket, folder: Path, log: Path, environment: Mapping[str, str], command: list[str]
) -> None:
    handle = listening.detach()
    os.set_inheritable(handle, True)
    os.setsid()
    with log.open("ab") as output:
        take_streams(os.open(os.devnull, os.O_RDONLY), output.fileno())
    os.environ.update(environment)
    # Where it was imported is not where it is to work.
    sys.argv = [*command, "--bind", f"fd://{handle}", "--chdir", str(folder)]
    wsgiapp.run()


def take_streams(given: int, printed: int) -> None:
    """Make these the standard input, and the output and errors, of a process that was forked."""
    for stream, handle in enumerate((given, printed, printed)):
        os.dup2(handle, stream)
    # Line by line, as Python's own: who is killed has printed what was to be printed.
    sys.stdin = open(0)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, errors="backslashreplace") for stream in (1, 2))  # noqa: SIM115
