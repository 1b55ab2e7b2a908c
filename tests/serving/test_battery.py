"""Input that no client should send, through a whole service with a key: statuses are right and no worker dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.served import HANDLERS, Service, served
from tests.support import until

KEY = "battery-key"
HANDLER_NAMES = ("repeat", "anything", "words", "count")


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("battery")
    with served(place, HANDLERS / "declared.py", "--max-body", "8MiB", key=KEY) as service:
        before = _pids(service)
        yield service
        assert _pids(service) == before
        assert service.ask("/repeat", {"text": "a"}).json() == {"text": "a"}


def _pids(service: Service) -> list[set[int]]:
    return [service.pids(name) for name in HANDLER_NAMES]


def _head(*lines: str, key: bool = True) -> bytes:
    auth = [f"Authorization: Bearer {KEY}"] if key else []
    return "\r\n".join([lines[0], "Host: t", *lines[1:], *auth, "", ""]).encode()


def _status(service: Service, data: bytes, *, then: bytes = b"", half_close: bool = False) -> int:
    """The status of the first answer to raw bytes; 0 where the connection ends without one."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as sock:
        try:
            sock.sendall(data)
            if then:
                sock.sendall(then)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            got = sock.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            return 0
    return int(got.split(b" ", 2)[1]) if got.startswith(b"HTTP/") else 0


def _post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    return _head(f"POST {path} HTTP/1.1", f"Content-Type: {kind}", f"Content-Length: {len(body)}") + body


def test_schemathesis_finds_nothing(battery: Service, tmp_path: Path) -> None:
    """Positive and negative bodies, headers and methods against what /openapi.json declares."""
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), "run", f"http://127.0.0.1:{battery.port}/openapi.json"),
        *("-H", f"Authorization: Bearer {KEY}", "--seed", "1", "--max-examples", "25", "--no-color"),
        *("--generation-database", "none", "--request-timeout", "20"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path, env=_plain(), check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def _plain() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}


@pytest.mark.parametrize(
    ("name", "data", "statuses"),
    [
        ("no JSON", _post("/repeat", b"{"), {400, 422}),
        ("empty body", _post("/repeat", b""), {400, 422}),
        ("wrong shape", _post("/repeat", b'{"text": 1}'), {422}),
        ("no UTF-8", _post("/repeat", b'{"text": "\xff\xfe"}'), {400, 422}),
        ("deep", _post("/anything", b"[" * 100_000 + b"]" * 100_000), {400, 422}),
        ("a number of a million digits", _post("/anything", b"1" * 1_000_000), {400, 422}),
        ("NaN", _post("/anything", b"NaN"), {200, 400}),
        ("lone surrogate", _post("/repeat", b'{"text": "\\ud800"}'), {200, 400, 422, 500}),
        ("multipart without a boundary", _post("/anything", b"--x\r\n", "multipart/form-data"), {400}),
        ("multipart cut off", _post("/anything", b"--x\r\nContent-Di", "multipart/form-data; boundary=x"), {400}),
        ("multipart of nothing", _post("/anything", b"", "multipart/form-data; boundary=x"), {400}),
        ("other encoding", _head("POST /repeat HTTP/1.1", "Content-Encoding: br", "Content-Length: 1") + b"x", {415}),
        ("wrong method", _head("DELETE /repeat HTTP/1.1"), {405}),
        ("no such path", _head("POST /../etc/passwd HTTP/1.1", "Content-Length: 0"), {404}),
        ("no key", _head("POST /repeat HTTP/1.1", "Content-Length: 0", key=False), {401}),
        ("wrong key", _head("POST /repeat HTTP/1.1", "Authorization: Bearer nope", key=False), {401}),
        ("too large, announced", _head("POST /repeat HTTP/1.1", "Content-Length: 99999999999"), {413}),
        ("length that is none", _head("POST /repeat HTTP/1.1", "Content-Length: many"), {400}),
        ("two lengths", _head("POST /repeat HTTP/1.1", "Content-Length: 3", "Content-Length: 4") + b"{}..", {400}),
        ("length and chunks", _head("POST /repeat HTTP/1.1", "Content-Length: 3", "Transfer-Encoding: chunked"), {400}),
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00" * 10, {0, 400}),
        ("header flood", _head("GET /health HTTP/1.1", *(f"X-{i}: {'y' * 100}" for i in range(5000))), {431}),
        ("one long header", _head("GET /health HTTP/1.1", "X-Long: " + "y" * 1_000_000), {431}),
        ("long path", _head(f"GET /{'a' * 200_000} HTTP/1.1"), {404, 414, 431}),
    ],
)
def test_bad_requests_get_a_clear_status(battery: Service, name: str, data: bytes, statuses: set[int]) -> None:
    assert _status(battery, data) in statuses, name


def test_a_million_items_of_json_are_taken(battery: Service) -> None:
    body = json.dumps(list(range(1_000_000))).encode()
    answer = battery.ask("/anything", content=body, headers={"Content-Type": "application/json"})
    assert answer.json() == {"kind": "list"}


def test_a_chunked_body_ends_at_the_limit(battery: Service) -> None:
    head = _head("POST /anything HTTP/1.1", "Transfer-Encoding: chunked")
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert _status(battery, head, then=piece * 200) in (413, 0)
    assert battery.ask("/anything", [1]).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /rep",
        _head("POST /repeat HTTP/1.1", "Content-Length: 100"),
        _head("POST /repeat HTTP/1.1", "Content-Length: 100") + b'{"text": ',
        _head("POST /repeat HTTP/1.1", "Transfer-Encoding: chunked") + b"5\r\nabc",
        _head("POST /x HTTP/1.1", "Content-Type: multipart/form-data; boundary=b", "Content-Length: 99") + b"--b\r\n",
        _post("/repeat", b'{"text": "a"}'),
        _post("/words", b'{"text": "a b c d"}'),
    ],
)
def test_clients_may_leave_in_every_phase(battery: Service, data: bytes) -> None:
    for _ in range(20):
        sock = socket.create_connection(("127.0.0.1", battery.port), timeout=10)
        sock.sendall(data)
        sock.close()
    until(lambda: battery.ask("/anything", [1]).status_code == 200)
    until(lambda: _in_flight(battery) == 0, what="nothing is under way")


def _in_flight(service: Service) -> int:
    return sum(h["queued"] + h["in_flight"] for h in service.health()["handlers"].values())


def test_requests_on_one_connection_are_answered_in_order(battery: Service) -> None:
    with socket.create_connection(("127.0.0.1", battery.port), timeout=30) as sock:
        sock.sendall(b"".join(_post("/repeat", json.dumps({"text": f"<{i}>"}).encode()) for i in range(10)))
        got = b""
        deadline = time.monotonic() + 30
        while got.count(b'"text"') < 10 and time.monotonic() < deadline:
            got += sock.recv(65536)
    assert [got.index(b"<%d>" % i) for i in range(10)] == sorted(got.index(b"<%d>" % i) for i in range(10))


def test_a_crowd_of_connections_is_borne(battery: Service) -> None:
    crowd = [socket.create_connection(("127.0.0.1", battery.port), timeout=30) for _ in range(500)]
    assert battery.ask("/repeat", {"text": "a"}).status_code == 200
    for sock in crowd:
        sock.close()


def test_errors_have_one_shape_and_an_id(battery: Service) -> None:
    for answer in (battery.ask("/nope"), battery.ask("/repeat", {}), battery.ask("/repeat", method="PUT")):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


def test_only_health_is_open_without_a_key(battery: Service) -> None:
    without = {"Authorization": ""}
    assert battery.ask("/health", method="GET", headers=without).status_code == 200
    for path in ("/repeat", "/metrics", "/ready", "/openapi.json", "/docs"):
        assert battery.ask(path, method="GET", headers=without).status_code == 401, path
