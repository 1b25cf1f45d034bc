"""A server that speaks the protocol of streamed chat completions, as the documentation of that protocol has it."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DONE = "[DONE]"


@dataclass
class Reply:
    """How the server answers a request: with a *status*, or with pieces and what is sent after them."""

    pieces: tuple[str, ...] = ()
    status: int = 200
    finish: bool = True
    ending: str = DONE
    cut: bool = False
    """Whether the connection is closed in the middle."""
    before: Callable[[int], object] = lambda number: None
    """Called before each piece."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HTTPServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        completions = self.server.completions
        completions.asked.append(body)
        completions.keys.append(self.headers["Authorization"])
        known = self.path == "/v1/chat/completions" and body["stream"] is True
        status = completions.reply.status if known else 404
        if status == 200:
            self._stream(completions.reply, body["model"])
        else:
            self._refuse(status)

    def _refuse(self, status: int) -> None:
        body = json.dumps({"error": {"message": "refused", "type": "some_error", "code": None}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, reply: Reply, model: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in _events(reply, model):
            self._chunk(f"data: {event}\n\n".encode())
        if reply.cut:
            self.close_connection = True
        else:
            self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


class _HTTPServer(ThreadingHTTPServer):
    completions: CompletionsServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up in the middle of an answer is what some tests are about.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class CompletionsServer:
    """Answers with *reply*; keeps what it was *asked*, and with which *keys*."""

    def __init__(self) -> None:
        self.reply = Reply()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self._server = _HTTPServer(("127.0.0.1", 0), _Handler)
        self._server.completions = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        """What ``OPENAI_BASE_URL`` is to be."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def stop(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _events(reply: Reply, model: str) -> Iterator[str]:
    yield completion(model, {"role": "assistant", "content": ""})
    for number, piece in enumerate(reply.pieces):
        reply.before(number)
        yield completion(model, {"content": piece})
    if reply.finish:
        yield completion(model, {}, finish="stop")
    if reply.ending:
        yield reply.ending


def completion(model: str, delta: dict[str, str], finish: str | None = None) -> str:
    """One event of the stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return json.dumps(
        {"id": "c1", "object": "chat.completion.chunk", "created": 1700000000, "model": model, "choices": [choice]}
    )
