"""A web server of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest


@dataclass
class WebServer:
    """A server in this process: how it answers, and what it was asked."""

    answer: Callable[[str], int]
    """Gives the status for a path."""
    content_type: str = "text/plain"
    port: int = 0
    asked: list[str] = field(default_factory=list)
    """As ``METHOD /path``."""
    tokens: list[str | None] = field(default_factory=list)
    """What each request showed as its ``Authorization``."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def _served(server: WebServer, host: str) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(f"{self.command} {self.path}")
            server.tokens.append(self.headers.get("Authorization"))
            self.send_response(server.answer(self.path))
            self.send_header("Content-Type", server.content_type)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer((host, 0), Handler) as served:
        server.port = served.server_port
        thread = Thread(target=served.serve_forever)
        thread.start()
        try:
            yield
        finally:
            served.shutdown()
            thread.join()


@pytest.fixture
def web_server() -> Iterator[Callable[..., WebServer]]:
    """Starts a server that gives each path its status, on an address of this machine, until the test ends."""
    with ExitStack() as stack:

        def start(
            answer: Callable[[str], int] | int = 200, content_type: str = "text/plain", host: str = "127.0.0.1"
        ) -> WebServer:
            server = WebServer(answer if callable(answer) else lambda path: answer, content_type)
            stack.enter_context(_served(server, host))
            return server

        yield start
