"""Serve the page of a folder and its state on the loopback interface, to this machine's browsers alone.

It answers GET and HEAD of two addresses, `/` and `/state`, and reads no file by a name that a request gives. A request for
another host is refused: a page elsewhere may let its own name point here (DNS rebinding). No other page may read the answers.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.report._pages import environment
from pytest_lmeval.watching._folder import Folder

HOST = "127.0.0.1"
IDLE = 30  # seconds after which a connection without a request is closed
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingHTTPServer):
    """Serves a folder. Raises ArgumentError for a port that cannot be had."""

    daemon_threads, block_on_close = True, False  # Ctrl-C waits for no browser
    allow_reuse_address = os.name != "nt"  # there, it would share a port that is in use

    def __init__(self, folder: Folder, port: int) -> None:
        self.folder = folder
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            used = error.errno == errno.EADDRINUSE
            why = "is in use" if used else f"cannot be had ({error.strerror or error})"
            raise ArgumentError(f"port {port} of {HOST} {why}. Name another with --port, or 0 for any that is free.") from error

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}/"

    def serves(self, host: str | None) -> bool:
        """Whether a request's `Host` is this server, and not another name that was made to point here."""
        name, _, port = (host or "").lower().partition(":")
        return name in (HOST, "localhost") and (port or "80") == str(self.port)

    def server_bind(self) -> None:
        """Bind without looking up the name of this machine, as HTTPServer does: a resolver may be slow."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(self.allow_reuse_address))
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = HOST, self.port

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle of an answer is no error."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    timeout = IDLE
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lmeval", ""

    def do_GET(self) -> None:
        if not self.server.serves(self.headers.get("Host")):
            self._refuse(HTTPStatus.FORBIDDEN, f"this page is served at {self.server.address} and under no other name")
        elif self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and self.path != "/":
            self._refuse(HTTPStatus.FORBIDDEN, "other pages may not read this one")
        elif self.path == "/":
            nonce = secrets.token_urlsafe(16)
            page = environment().get_template("watch.html").render(nonce=nonce)
            self._answer("text/html", page, {"Content-Security-Policy": POLICY.format(nonce=nonce)})
        elif self.path == "/state":
            self._answer("application/json", json.dumps(self.server.folder.state(), allow_nan=False))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there are two addresses here: / and /state")

    do_HEAD = do_GET  # noqa: N815 - `_answer` leaves the body out

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._answer("text/plain", f"{why}\n", status=status)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no GET or HEAD, and what is no request."""
        unknown = code == HTTPStatus.NOT_IMPLEMENTED  # what http.server says of another method
        status = HTTPStatus.METHOD_NOT_ALLOWED if unknown else HTTPStatus(code)
        self.close_connection = True
        self._answer("text/plain", f"{status.phrase}\n", {"Connection": "close", "Allow": "GET, HEAD"}, status)

    def _answer(self, kind: str, text: str, headers: dict[str, str] | None = None, status: HTTPStatus = HTTPStatus.OK) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        for name, value in {**HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in http.server
        """Nothing: a line each second says nothing."""
