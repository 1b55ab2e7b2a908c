"""Starts `tests.fakes.edge` in a process of its own and talks to it, over raw sockets where clients misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support import free_port, listens, until


@dataclass(frozen=True)
class Answer:
    """What came over a socket until it ended or the answer was whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


@dataclass(frozen=True)
class Served:
    """A running edge."""

    port: int
    client: httpx.Client
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, **words: Any) -> httpx.Response:
        return self.client.request(method, self.url + path, **words)

    def seen(self, name: str) -> dict[str, int]:
        """What reached a handler."""
        found: dict[str, int] = self.ask("GET", "/seen").json()[name]
        return found

    def exchange(self, client: socket.socket, text: bytes) -> Answer:
        """One request and its answer on a connection that stays open."""
        client.sendall(text)
        received = b""
        while True:
            chunk = client.recv(1 << 20)
            assert chunk, received[:1000]
            received += chunk
            head, _, body = received.partition(b"\r\n\r\n")
            size = re.search(rb"content-length: (\d+)", head)
            if size and len(body) >= int(size[1]):
                return answers(received)[0]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def raw(self, *parts: bytes) -> list[Answer]:
        """Send bytes on one connection and read whatever comes back until the server closes it."""
        with self.connect() as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for part in parts:
                    client.sendall(part)
            return answers(everything(client))

    def lines(self) -> list[dict[str, Any]]:
        """The access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def line(self, id_: str) -> dict[str, Any]:
        """The line of one request, once it is written."""
        found: dict[str, Any] = until(
            lambda: next((line for line in self.lines() if line["id"] == id_), None), what=f"the log line of {id_}"
        )
        return found

    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def serving(directory: Path, **document: Any) -> Iterator[Served]:
    """An edge with these options; it must end by itself when it is told to."""
    port = free_port()
    log = directory / f"edge-{port}.log"
    with log.open("wb") as out:
        words = [sys.executable, "-m", "tests.fakes.edge", json.dumps({"port": port, **document}, default=str)]
        process = subprocess.Popen(words, stdout=out, stderr=out, cwd=Path(__file__).parents[2])
    try:
        until(lambda: listens(port) or process.poll() is not None, what="the edge listens")
        assert process.poll() is None, log.read_text()
        with httpx.Client(trust_env=False, verify=False, timeout=30) as client:
            yield Served(port, client, process, log)
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def everything(client: socket.socket) -> bytes:
    """All bytes until the other side closes."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(1 << 16):
            received += chunk
    return bytes(received)


def answers(text: bytes) -> list[Answer]:
    """Answers with a content length, one after the other."""
    found = []
    while text:
        head, _, text = text.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        status, size = int(first.split()[1]), int(headers.get("content-length", "0"))
        found.append(Answer(status, headers, text[:size]))
        text = text[size:]
    return [each for each in found if each.status != 100]
