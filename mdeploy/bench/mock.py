"""An OpenAI-compatible server that knows the truth: `python -m mdeploy.bench.mock --ttft-ms 50`.

One process, one epoll loop, absolute deadlines from the request's arrival in the kernel. For every
request it keeps when the kernel received it and when it was about to send each token chunk (Unix ns),
and serves that as JSON lines under /truth. It can also fail in the ways servers fail.

    GET /health /v1/models /version /truth      POST /v1/chat/completions /v1/completions /tokenize
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httptools
import orjson

from mdeploy.bench import clock, mock_script
from mdeploy.bench.mock_script import FAULTS, MockOptions, Script, Write
from mdeploy.bench.types import BenchEndpoint

_ENDPOINTS: dict[str, BenchEndpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_STDIN = 0


class _Connection:
    """A client: its parser, its request, what could not be sent yet."""

    def __init__(self, sock: socket.socket, serve: Callable[[_Connection], None]) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.open = True
        self.out = b""
        self.received_ns = 0
        self.truth: dict[str, Any] | None = None
        self._serve = serve
        self._start()

    def _start(self) -> None:
        self.parser: Any = httptools.HttpRequestParser(self)
        self.path = ""
        self.body = b""
        self.headers: dict[bytes, bytes] = {}

    def on_url(self, url: bytes) -> None:
        self.path += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self._serve(self)
        self._start()


class Mock:
    """The server; `port` 0 takes a free one."""

    def __init__(self, options: MockOptions, host: str = "127.0.0.1", port: int = 0) -> None:
        self.options = options
        self._listener = socket.create_server((host, port), backlog=4096)
        self._listener.setblocking(False)
        self.url = f"http://{host}:{self._listener.getsockname()[1]}"
        self._epoll = select.epoll()
        self._timer = clock.Timer()
        self._connections: dict[int, _Connection] = {}
        self._due: list[tuple[int, int, _Connection, Script, int]] = []
        self._order = itertools.count()
        self._truth: list[dict[str, Any]] = []
        self._requests = 0

    def serve(self, *, watch_stdin: bool = False) -> None:
        """Serve until killed, or with `watch_stdin` until stdin closes."""
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._epoll.register(self._timer.fd, select.EPOLLIN)
        if watch_stdin:
            self._epoll.register(_STDIN, select.EPOLLIN)
        while True:
            for fd, mask in self._epoll.poll():
                if fd == _STDIN and watch_stdin:
                    return
                self._on_event(fd, mask)
            self._send_due()

    def _on_event(self, fd: int, mask: int) -> None:
        if fd == self._timer.fd:
            self._timer.clear()
        elif fd == self._listener.fileno():
            self._accept()
        elif fd in self._connections:
            connection = self._connections[fd]
            if mask & select.EPOLLOUT:
                self._write(connection, b"")
            if mask & ~select.EPOLLOUT and connection.open:
                self._read(connection)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            clock.stamp_receives(sock)
            self._connections[sock.fileno()] = _Connection(sock, self._answer)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _read(self, connection: _Connection) -> None:
        try:
            data, at_ns = clock.receive(connection.sock, 1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data, at_ns = b"", 0
        if not data:
            self._close(connection)
            return
        connection.received_ns = at_ns or time.time_ns()
        try:
            connection.parser.feed_data(data)
        except httptools.HttpParserError:
            self._close(connection)

    def _answer(self, connection: _Connection) -> None:
        """A request is complete: answer now, or put its script on the timetable."""
        path = connection.path.split("?")[0]
        if path in _ENDPOINTS:
            self._complete(connection, _ENDPOINTS[path], orjson.loads(connection.body))
        else:
            body = orjson.loads(connection.body) if connection.body else {}
            self._write(connection, self._page(path, body, connection))

    def _page(self, path: str, body: Mapping[str, Any], connection: _Connection) -> bytes:
        if path == "/health":
            return mock_script.plain({})
        if path == "/version":
            return mock_script.plain({"version": "mock"})
        if path == "/truth":
            return mock_script.plain(b"".join(orjson.dumps(row) + b"\n" for row in self._truth))
        if path == "/tokenize" and self.options.tokenize:
            return mock_script.plain({"count": mock_script.count_tokens(body, self.options)})
        if path == "/v1/models":
            models = {"object": "list", "data": [{"id": self.options.model, "object": "model"}]}
            return self._refusal(connection) or mock_script.plain(models)
        return mock_script.failure("404 Not Found", "Not Found")

    def _refusal(self, connection: _Connection) -> bytes:
        key = self.options.api_key
        if key and connection.headers.get(b"authorization") != f"Bearer {key}".encode():
            return mock_script.failure("401 Unauthorized", "Unauthorized")
        return b""

    def _complete(self, connection: _Connection, endpoint: BenchEndpoint, request: Mapping[str, Any]) -> None:
        refusal = self._refusal(connection) or self._bad_request(request)
        if refusal:
            self._write(connection, refusal)
            return
        self._requests += 1
        fault = self.options.fault if mock_script.faulty(self._requests, self.options) else "none"
        script = mock_script.answer(endpoint, request, self.options, fault)
        connection.truth = {
            "number": self._requests,
            "endpoint": endpoint,
            "prompt": mock_script.prompt_text(request)[0][:80],
            "prompt_tokens": script.prompt_tokens,
            "output_tokens": script.output_tokens,
            "fault": fault,
            "received_ns": connection.received_ns,
            "sent_ns": [],
        }
        self._schedule(connection.received_ns, connection, script, 0)

    def _bad_request(self, request: Mapping[str, Any]) -> bytes:
        options = self.options
        if request.get("model") != options.model:
            return mock_script.failure("404 Not Found", f"The model `{request.get('model')}` does not exist.")
        if options.reject_ignore_eos and ("ignore_eos" in request or "min_tokens" in request):
            return mock_script.failure("400 Bad Request", "Unrecognized request argument: ignore_eos")
        return b""

    def _schedule(self, base_ns: int, connection: _Connection, script: Script, step: int) -> None:
        if step < len(script.writes):
            due = base_ns + script.writes[step].after_ns
            heapq.heappush(self._due, (due, next(self._order), connection, script, step))

    def _send_due(self) -> None:
        while self._due and self._due[0][0] <= time.time_ns():
            due, _, connection, script, step = heapq.heappop(self._due)
            if connection.open:
                write = script.writes[step]
                self._send(connection, write)
                self._schedule(due - write.after_ns, connection, script, step + 1)
        if self._due:
            self._timer.arm(self._due[0][0])

    def _send(self, connection: _Connection, write: Write) -> None:
        truth = connection.truth
        if write.tokens and truth is not None:
            truth["sent_ns"].append(time.time_ns())
        self._write(connection, write.data)
        if write.last and truth is not None:
            self._truth.append(truth)
            connection.truth = None
        if write.last == "reset":
            linger = struct.pack("ii", 1, 0)  # closing now sends RST instead of FIN
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if write.last in ("close", "reset"):
            self._close(connection)

    def _write(self, connection: _Connection, data: bytes) -> None:
        out = connection.out + data
        if not connection.open or not out:
            return
        try:
            sent = connection.sock.send(out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(connection)
            return
        had, connection.out = bool(connection.out), out[sent:]
        if had != bool(connection.out):
            mask = select.EPOLLIN | (select.EPOLLOUT if connection.out else 0)
            self._epoll.modify(connection.fd, mask)

    def _close(self, connection: _Connection) -> None:
        if connection.open:
            connection.open = False
            connection.parser = None
            del self._connections[connection.fd]
            connection.sock.close()


def parser() -> argparse.ArgumentParser:
    """The mock's command line."""
    options = argparse.ArgumentParser(prog="python -m mdeploy.bench.mock", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="0 takes a free one")
    add("--ttft-ms", type=float, default=50.0, help="request received to first token")
    add("--itl-ms", type=float, default=20.0, help="between token chunks")
    add("--tokens", type=int, help="answer length [default: the request's max_tokens]")
    add("--tokens-per-chunk", type=int, default=1)
    add("--reasoning", type=int, default=0, help="so many chunks carry reasoning first")
    add("--coalesce", type=int, default=1, help="write so many chunks at once")
    add("--early-role", action="store_true", help="role chunk on arrival, not just before the first token")
    add("--no-usage", dest="usage", action="store_false")
    add("--crlf", action="store_true", help="end events with CRLF CRLF")
    add("--model", default="mock")
    add("--api-key")
    add("--reject-ignore-eos", action="store_true", help="400 for vLLM's extensions")
    add("--no-tokenize", dest="tokenize", action="store_false")
    add("--word-letters", type=int, default=100, help="longer words are several tokens")
    add("--fault", choices=FAULTS, default="none")
    add("--fault-rate", type=float, default=1.0, help="share of the requests that fail")
    add("--fault-after", type=int, default=0, help="so many requests are served well first")
    add("--watch-stdin", action="store_true", help="end when stdin closes")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; the first line on stdout is JSON with the URL."""
    asked = vars(parser().parse_args(argv))
    watch_stdin, host, port = asked.pop("watch_stdin"), asked.pop("host"), asked.pop("port")
    mock = Mock(MockOptions(**asked), host, port)
    sys.stdout.write(orjson.dumps({"url": mock.url, **dataclasses.asdict(mock.options)}).decode() + "\n")
    sys.stdout.flush()
    try:
        mock.serve(watch_stdin=watch_stdin)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
