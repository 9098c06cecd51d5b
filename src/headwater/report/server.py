"""A live page for the browsers of this machine: it reads, and nothing else.

    GET /?token=TOKEN                            the page
    GET /queries?search=&wrong=&from=&count=     what is listed
    GET /query?id=ID&k=  or  ?at=PLACE&k=        one case (`Live.query`)
    GET /row?id=ID&k=    or  ?at=PLACE&k=        one train row (`Live.row`)

There are no other paths, and none of them is a file's. Anybody on this machine, and any page that a browser here has
open, can reach a port of 127.0.0.1; so each question has to show the token that the printed address has, and to name
this very host: a name that was bound to 127.0.0.1 elsewhere (DNS rebinding) is another one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from headwater.errors import HeadwaterError, InvalidSetting
from headwater.report.live import MOST_QUERIES, MOST_ROWS, Kind, Live, NoSuchRow
from headwater.report.page import policy

HOST = "127.0.0.1"
LONGEST = 2048
"""Characters of a path with its question."""
WORDS = 200
"""Characters that can be searched for."""
PATIENCE = 10.0
"""Seconds that a question may take to arrive, and each piece of an answer to be taken."""
AT_ONCE = 16
"""Connections; those beyond are told to come again. Their work is done one after the other."""
TOKEN = "X-Headwater-Token"
FIELDS = {
    "/": (),
    "/queries": ("search", "wrong", "from", "count"),
    "/query": ("id", "at", "k"),
    "/row": ("id", "at", "k"),
}
"""What may be asked, by path; anywhere also the token."""
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
NOT_A_PAGE = "default-src 'none'; frame-ancestors 'none'"


class Refused(Exception):
    """A question that is not answered. status: HTTP's."""

    def __init__(self, status: int, said: str):
        super().__init__(said)
        self.status = status


class Server(ThreadingHTTPServer):
    """Listens from the beginning; `serve_forever` answers. Errors: InvalidSetting for a port that is not to be had."""

    daemon_threads = True
    request_queue_size = 2 * AT_ONCE
    allow_reuse_address = os.name != "nt"  # there it lets two listen at one port

    def __init__(self, live: Live, port: int = 0):
        """port: 0 for any that is free."""
        self.live, self.token = live, secrets.token_urlsafe(24)
        self.waiting: dict[Any, float] = {}
        """Connections whose question is not there yet, and since when."""
        self.turn = threading.Lock()
        """Of whoever reads scores or a user's data set: one after the other."""
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise InvalidSetting(f"Nobody can listen at port {port} of {HOST}: {error.strerror or error}.") from error

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server what this machine is called
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    @property
    def address(self) -> str:
        """For a browser."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"

    @property
    def hosts(self) -> set[str]:
        """How a question may call this server."""
        names = {HOST, "localhost"}
        return {f"{name}:{self.server_port}" for name in names} | (names if self.server_port == 80 else set())

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            with suppress(OSError):
                request.settimeout(1)
                request.sendall(b"HTTP/1.0 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        self.waiting[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread was to be had
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.waiting.pop(request, None)
            self._slots.release()

    def service_actions(self) -> None:
        """Ends connections that say nothing, or a letter now and then: each read by itself is in time."""
        for connection, since in dict(self.waiting).items():
            if time.monotonic() - since > PATIENCE:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()  # else: who asked has gone


class Handler(BaseHTTPRequestHandler):
    """One question of a connection, then it is closed."""

    server: Server
    timeout = PATIENCE
    server_version, sys_version = "headwater", ""

    def do_GET(self) -> None:
        self.server.waiting.pop(self.connection, None)
        try:
            kind, content = self._answer()
        except Refused as refused:
            self.send_error(refused.status, str(refused))
        except NoSuchRow as error:
            self.send_error(404, str(error))
        except (HeadwaterError, OSError) as error:
            self.send_error(500, str(error))
        except (Exception, SystemExit) as error:
            # A user's own data set or function, in most cases: they want to see where.
            traceback.print_exc()
            self.send_error(500, f"{type(error).__name__}: {error}")
        else:
            self._send(200, kind, content)

    def do_HEAD(self) -> None:
        self.do_GET()

    # The question -----------------------------------------------------------------------------------------------------

    def _answer(self) -> tuple[str, bytes]:
        """Kind and content."""
        if len(self.path) > LONGEST:
            raise Refused(414, f"The address has {len(self.path)} characters; {LONGEST} are read.")
        self._check_host()
        path, _, question = self.path.partition("?")
        fields = _fields(question)
        given = self.headers.get(TOKEN, fields.pop("token", ""))
        if not secrets.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode()):
            raise Refused(403, "The token is missing or another one: open the address that `headwater serve` printed.")
        if path not in FIELDS:
            raise Refused(404, "There is nothing at this path.")
        unknown = [name for name in fields if name not in FIELDS[path]]
        if unknown:
            raise Refused(400, f"{path} has no field {unknown[0]!r}; it has {', '.join(FIELDS[path]) or 'none'}.")
        live = self.server.live
        with self.server.turn:
            self._check_there()
            if path == "/":
                return "text/html", live.page(self.server.token).encode()
            found = _queries(live, fields) if path == "/queries" else _case(live, path, fields)
        return "application/json", json.dumps(found, separators=(",", ":"), allow_nan=False).encode()

    def _check_host(self) -> None:
        names = [name.lower() for name in self.headers.get_all("Host", [])]
        if len(names) != 1 or names[0] not in self.server.hosts:
            raise Refused(403, f"This server is called {HOST}:{self.server.server_port}, and answers to no other name.")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in self.server.hosts}:
            raise Refused(403, "A page of another server asks.")

    def _check_there(self) -> None:
        """Who typed on has closed the connection meanwhile: nothing is read for nobody."""
        self.connection.settimeout(0)
        try:
            gone = self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:  # nothing more is said, as it should be
            gone = False
        finally:
            self.connection.settimeout(PATIENCE)
        if gone:
            raise Refused(408, "Whoever asked has gone.")

    # The answer -------------------------------------------------------------------------------------------------------

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """In words, also where the standard library finds a question that is none."""
        if code == 501:  # a method that this class does not have
            code, message = 405, "This server answers GET and HEAD alone: it only reads."
        said = message or self.responses.get(code, ("", ""))[0]
        self._send(code, "application/json", json.dumps({"error": said}).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _policy() if kind == "text/html" else NOT_A_PAGE)
        for name, value in SAFE.items():
            self.send_header(name, value)
        if status == 405:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: a terminal shows where the server is, and errors of a user's own code."""


def _policy() -> str:
    return f"{policy(live=True)}; frame-ancestors 'none'"


# Fields ---------------------------------------------------------------------------------------------------------------


def _fields(question: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(question, keep_blank_values=True, errors="strict", max_num_fields=10)
    except ValueError as error:  # not UTF-8, among others
        raise Refused(400, f"The question cannot be read: {error}.") from error
    if len(dict(pairs)) < len(pairs):
        raise Refused(400, "A field is there twice.")
    return dict(pairs)


def _number(fields: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = fields.get(name, "")
    if not text:
        return default
    if not re.fullmatch("[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise Refused(400, f"{name} is {text[:40]!r}; expected a number from {least} to {most}.")
    return int(text)


def _queries(live: Live, fields: Mapping[str, str]) -> dict[str, Any]:
    search = fields.get("search", "")
    if len(search) > WORDS:
        raise Refused(400, f"{len(search)} characters are searched for; expected at most {WORDS}.")
    wrong = _number(fields, "wrong", 0, 0, 1) == 1
    start = _number(fields, "from", 0, 0, 10**12)
    return live.queries(search, wrong, start, _number(fields, "count", 50, 1, MOST_QUERIES))


def _case(live: Live, path: str, fields: Mapping[str, str]) -> dict[str, Any]:
    kind: Kind = "query" if path == "/query" else "row"
    answer: Callable[[int, int], dict[str, Any]] = live.query if kind == "query" else live.row
    if ("id" in fields) == ("at" in fields):
        raise Refused(400, f"{path} takes one of id and at.")
    k = _number(fields, "k", min(live.known.k, MOST_ROWS), 1, MOST_ROWS)
    if "id" in fields:
        return answer(live.place_of(kind, fields["id"]), k)
    return answer(live.checked_place(kind, _number(fields, "at", 0, 0, 10**12)), k)
