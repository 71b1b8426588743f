"""A proxy before an S3 server that counts what passes and, when asked, spoils a share of it.

Faults are drawn from a seeded generator: connections reset before the request reaches the server or
after (the answer is lost, the work is done), 503 answers, slow ones, and bodies cut short.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = {"reset before": 0.025, "reset after": 0.025, "503": 0.05, "slow": 0.05, "cut": 0.05}
"""Share of requests by fault: 5 % resets (half of them after the work was done), and so on."""

_SLOW_SECONDS = 0.5
# Of the connection, not of the message (RFC 9110, section 7.6.1), or set anew.
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"}
_BUSY = b"<?xml version='1.0'?><Error><Code>ServiceUnavailable</Code></Error>"


class Proxy(ThreadingHTTPServer):
    """Passes requests on to one server, spoiling some."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str, shares: Mapping[str, float], seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        parts = urlsplit(target)
        self.target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.shares = shares
        self.faults: Counter[str] = Counter()
        """How often each fault was made."""
        self.requests = 0
        self.received: Counter[str] = Counter()
        """{path of an object: bytes of it that GET answers carried}."""
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def url(self) -> str:
        """Where clients find the proxy."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str:
        """The fault of the next request, "" for none."""
        with self._lock:
            self.requests += 1
            at = self._random.random()
            for name, share in self.shares.items():
                at -= share
                if at < 0:
                    self.faults[name] += 1
                    return name
        return ""

    def count(self, path: str, size: int) -> None:
        """Note the bytes of one GET's answer."""
        with self._lock:
            self.received[path] += size

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw()
        if fault == "reset before":
            return self._reset()
        if fault == "503":
            return self._answer(503, {"Content-Type": "application/xml"}, _BUSY)
        if fault == "slow":
            time.sleep(_SLOW_SECONDS)
        status, headers, data = self._ask(body)
        if fault == "reset after":
            return self._reset()
        if self.command == "GET":
            self.server.count(urlsplit(self.path).path, len(data))
        return self._answer(status, headers, data, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(http.client.HTTPConnection(*self.server.target)) as upstream:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def _answer(
        self, status: int, headers: Mapping[str, str], data: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP and name.lower() != "content-length":
                self.send_header(name, value)
        length = next((v for n, v in headers.items() if n.lower() == "content-length"), len(data))
        if self.command != "HEAD":
            length = len(data)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        # No lingering: the client sees its connection reset, not closed.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@contextlib.contextmanager
def proxy(target: str, shares: Mapping[str, float] | None = None, seed: int = 0) -> Iterator[Proxy]:
    """A running proxy before `target` (a URL); without `shares` it only counts."""
    server = Proxy(target, shares or {}, seed)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
