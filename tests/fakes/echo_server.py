"""A server whose answers can be told apart: which process gave them, and for which body.

`python echo_server.py HOST PORT NAME`; a query of `delay=0.2` waits before the first byte, `/v1/stream` sends events
(`gate=FILE`: the first, and the others once there is that file), `/v1/busy` is overloaded, `/v1/die` kills.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class Echo(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 5
    """Hangs up after five idle seconds, as uvicorn does."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(float(parse_qs(url.query).get("delay", ["0"])[0]))
        if url.path == "/v1/stream":
            self._stream(body)
        elif url.path == "/v1/die":
            os._exit(1)
        elif url.path == "/v1/busy":
            self._answer(503, {"server": sys.argv[3]}, {"Retry-After": "7"})
        else:
            self._answer(200, {**_about(body), "path": self.path, "headers": dict(self.headers)}, {})

    do_POST = do_GET  # noqa: N815

    def _answer(self, status: int, document: object, headers: dict[str, str]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "X-Request-Id": "the server's own", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self._send(data)

    def _send(self, data: bytes) -> None:
        """Head and data in one piece: nobody can be killed between the two."""
        head = io.BytesIO()
        wire, self.wfile = self.wfile, head
        self.end_headers()
        self.wfile = wire
        wire.write(head.getvalue() + data)

    def _stream(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        events = [f"data: {json.dumps({**_about(body), 'number': number})}\n\n".encode() for number in range(3)]
        chunks = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
        gate = parse_qs(urlsplit(self.path).query).get("gate")
        self._send(chunks[0] if gate else b"".join(chunks) + b"0\r\n\r\n")
        if gate:  # the rest once the client has made a file, which it does when the first event is there
            while not Path(gate[0]).exists():
                time.sleep(0.01)
            self.wfile.write(b"".join(chunks[1:]) + b"0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


def _about(body: bytes) -> dict[str, object]:
    return {"server": sys.argv[3], "sha256": hashlib.sha256(body).hexdigest()}


class Server(ThreadingHTTPServer):
    """Listens on either family, with room for a burst."""

    daemon_threads = True
    request_queue_size = 256
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no news."""


if __name__ == "__main__":
    server = Server((sys.argv[1], int(sys.argv[2])), Echo)
    print("listens", flush=True)
    server.serve_forever()
