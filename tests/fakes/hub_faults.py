"""A hub with something wrong: forwards to a real mirror and breaks the answers it is told to break.

    python hub_faults.py UPSTREAM --fault KIND [--on TEXT] [--times N]

prints its address on stdout. `--on` limits the fault to requests whose target holds TEXT, `--times`
to the first N of them. What was asked is at /_log. Kinds:

    status=CODE    an error in the hub's JSON        html          a page of somebody else's
    null           a listing with Files null         evil=PATH     a listing with one more file, at PATH
    short          half a file, announced as whole   drop          half a file, then the line is cut
    drop=BYTES     so many bytes, then a cut         corrupt       one bit flipped
    whole          Range is ignored                  hang          no answer
    stall=BYTES    so many bytes, then silence       redirect=URL  302 to another host
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Front(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(options.upstream)
        self.kind, _, self.value = options.fault.partition("=")
        self.on = options.on
        self.left = options.times
        self.log: list[dict[str, Any]] = []
        self.never = threading.Event()
        self.lock = threading.Lock()

    def breaks(self, target: str) -> bool:
        with self.lock:
            if self.on not in target or self.left == 0:
                return False
            self.left -= 1
            return True

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the play."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Front

    def do_GET(self) -> None:
        if self.path == "/_log":
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(self.server.log).encode())
            return
        headers = {name: self.headers[name] for name in ("Range", "Authorization", "Cookie") if name in self.headers}
        self.server.log.append({"target": self.path, "headers": headers})
        broken = self.server.breaks(self.path)
        if broken and self.server.kind == "whole":
            headers.pop("Range", None)
        status, reply, body = self.fetch(headers)
        if broken:
            getattr(self, f"do_{self.server.kind}")(status, reply, body)
        else:
            self.answer(status, reply, body)

    def fetch(self, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream.netloc, timeout=30)
        connection.request("GET", self.path, headers=headers)
        reply = connection.getresponse()
        body = reply.read()
        connection.close()
        return reply.status, dict(reply.getheaders()), body

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, length: int | None = None, close: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name not in ("Content-Length", "Server", "Date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = close

    def do_status(self, *_: object) -> None:
        body = {"Code": int(self.server.value), "Message": "broken on purpose", "Success": False, "Data": {}}
        self.answer(int(self.server.value), {"Content-Type": "application/json"}, json.dumps(body).encode())

    def do_html(self, *_: object) -> None:
        self.answer(200, {"Content-Type": "text/html"}, b"<html>Please log in to the wifi</html>")

    def do_null(self, status: int, headers: dict[str, str], body: bytes) -> None:
        document = json.loads(body)
        document["Data"]["Files"] = None
        self.answer(status, headers, json.dumps(document).encode())

    def do_evil(self, status: int, headers: dict[str, str], body: bytes) -> None:
        document = json.loads(body)
        document["Data"]["Files"].append({"Path": self.server.value, "Type": "blob", "Size": 1, "Sha256": "0" * 64})
        self.answer(status, headers, json.dumps(document).encode())

    def do_redirect(self, *_: object) -> None:
        self.answer(302, {"Location": self.server.value + self.path}, b"")

    def do_short(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.answer(status, headers, body[: len(body) // 2])

    def do_drop(self, status: int, headers: dict[str, str], body: bytes) -> None:
        count = int(self.server.value or len(body) // 2)
        self.answer(status, headers, body[:count], length=len(body), close=True)

    def do_corrupt(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.answer(status, headers, body[:-1] + bytes([body[-1] ^ 1]))

    def do_whole(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.answer(status, headers, body)

    def do_hang(self, *_: object) -> None:
        self.server.never.wait()

    def do_stall(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.answer(status, headers, body[: int(self.server.value)], length=len(body))
        self.server.never.wait()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream")
    parser.add_argument("--fault", required=True)
    parser.add_argument("--on", default="")
    parser.add_argument("--times", type=int, default=-1)
    front = Front(parser.parse_args())
    print(f"http://127.0.0.1:{front.server_address[1]}", flush=True)
    front.serve_forever()


if __name__ == "__main__":
    main()
