"""A browser reduced to what the benchmark needs: it signs in, keeps its cookies and sends requests through WSGI."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask
from werkzeug.http import parse_cookie
from werkzeug.test import create_environ


class Visitor:
    """One visitor of *app*, signed in with data of *size* bytes."""

    def __init__(self, app: Flask, size: int) -> None:
        self._app = app.wsgi_app
        self._cookies: dict[str, str] = {}
        self._environs: dict[str, dict[str, Any]] = {}
        self.visit(f"/sign-in?size={size}")

    def visit(self, path: str) -> None:
        """Send a request and keep its cookies, as a browser does; for between the timed ones.

        Raises ``RuntimeError`` unless the answer is 200.
        """
        answered: list[Any] = []

        def start_response(*arguments: Any) -> Callable[[bytes], object]:
            answered.extend(arguments)
            return _write

        _consume(self._app(self._environ(path), start_response))
        status, headers = answered[:2]
        if status != "200 OK":
            raise RuntimeError(f"{path} was answered with {status}")
        cookies = [value.partition(";")[0] for name, value in headers if name == "Set-Cookie"]
        for cookie in cookies:
            self._cookies.update(parse_cookie(cookie))
        if cookies:
            self._environs.clear()
        self._environ(path)  # made now, so that the first timed request need not

    def request(self, path: str) -> None:
        """Send a request as it is timed: the answer is read, nothing is kept."""
        _consume(self._app(self._environ(path), _start_response))

    def _environ(self, path: str) -> dict[str, Any]:
        if path not in self._environs:
            route, _, query = path.partition("?")
            cookie = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
            headers = {"Cookie": cookie} if cookie else {}
            self._environs[path] = create_environ(route, query_string=query, headers=headers)
        return self._environs[path].copy()


def _consume(body: Iterable[bytes]) -> None:
    try:
        for _ in body:
            pass
    finally:
        if hasattr(body, "close"):
            body.close()


def _start_response(status: str, headers: Any, exception: Any = None, /) -> Callable[[bytes], object]:
    if status != "200 OK":
        raise RuntimeError(f"a timed request was answered with {status}")
    return _write


def _write(content: bytes) -> None:
    raise NotImplementedError("Flask never writes this way")
