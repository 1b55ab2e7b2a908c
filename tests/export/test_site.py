"""What one site does to requests, in a real nginx in front of servers that tell what reached them."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mdeploy.errors import UsageError
from mdeploy.export import address, nginx
from mdeploy.export.nginx import Guard, Site, Tls
from tests.export import cases, lab
from tests.support import free_port

NASTY_KEY = r"""sk-$HOME;{}"\x41'#Aa"""


@contextmanager
def served(directory: Path, *, servers: int = 1, are_up: bool = True, **changes: object) -> Iterator[int]:
    """Servers s0, s1 … behind nginx; yields its port."""
    port, ports = free_port(), [free_port() for _ in range(servers)]
    upstream = tuple(address.server(f"127.0.0.1:{one}") for one in ports)
    site = Site("echo", "app", upstream, (address.listen(f"127.0.0.1:{port}"),), key_file=str(directory / "site.key"))
    site = dataclasses.replace(site, **changes)  # type: ignore[arg-type]
    (directory / "site.conf").write_text(nginx.render(site))
    if site.guard != "pass":
        (directory / "site.key").write_text(nginx.render_keys(site))
    with ExitStack() as stack:
        for number, one in enumerate(ports if are_up else ()):
            stack.enter_context(lab.echo(lab.HERE, "127.0.0.1", one, f"s{number}"))
        stack.enter_context(lab.nginx(lab.HERE, directory / "nginx", directory / "site.conf"))
        yield port


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with served(tmp_path, max_body_bytes=200_000) as found:
        yield found


def test_requests_and_answers_pass_with_their_headers(port: int) -> None:
    body = os.urandom(150_000)
    answer = lab.ask(port, "POST", "/x?a=%2F", body, X_Request_Id="my-id.1", X_Forwarded_For="1.2.3.4")
    assert (answer.status, answer.headers["x-request-id"]) == (200, "my-id.1")
    assert answer.json["sha256"] == hashlib.sha256(body).hexdigest()
    assert answer.json["path"] == "/x?a=%2F"
    seen = answer.json["headers"]
    assert isinstance(seen, dict)
    assert (seen["X-Request-Id"], seen["X-Forwarded-Proto"]) == ("my-id.1", "http")
    assert seen["X-Forwarded-For"] == "1.2.3.4, 127.0.0.1"
    made = lab.ask(port, X_Request_Id="two words").headers["x-request-id"]
    assert len(made) == 32
    upgraded = lab.ask(port, "GET", "/x", Upgrade="websocket", Connection="Upgrade").json["headers"]
    assert isinstance(upgraded, dict)
    assert (upgraded["Upgrade"], upgraded["Connection"]) == ("websocket", "upgrade")


def test_errors_of_nginx_have_the_shape_of_the_services(port: int) -> None:
    too_large = lab.ask(port, "POST", "/x", bytes(200_001))
    assert (too_large.status, too_large.json["error"]["code"]) == (413, "body_too_large")  # type: ignore[index]
    assert lab.ask(port, "GET", "/metrics").json["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_no_server_at_all(tmp_path: Path) -> None:
    with served(tmp_path, are_up=False) as port:
        answer = lab.ask(port)
    assert (answer.status, answer.headers["retry-after"]) == (502, "5")
    assert answer.json["error"]["type"] == "server_error"  # type: ignore[index]


def test_streams_arrive_event_by_event(port: int, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", f"/v1/stream?gate={gate}", b"x", {"Accept-Encoding": "gzip"})
    response = connection.getresponse()
    assert b'"number": 0' in response.readline()
    gate.touch()
    assert b'"number": 2' in response.read()
    connection.close()


def test_an_overloaded_server_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    with served(tmp_path, servers=2) as port:
        for _ in range(8):
            busy = lab.ask(port, "POST", "/v1/busy", b"x")
            assert (busy.status, busy.headers["retry-after"]) == (503, "7")
        assert {lab.ask(port).json["server"] for _ in range(8)} == {"s0", "s1"}


def test_a_request_that_kills_engines_is_tried_twice_at_most(tmp_path: Path) -> None:
    with served(tmp_path, servers=4, kind="llm") as port:
        before = {lab.ask(port).json["server"] for _ in range(16)}
        assert lab.ask(port, "POST", "/v1/die", b"x").status == 502
        after = {lab.ask(port).json["server"] for _ in range(16)}
    assert (len(before), len(after)) == (4, 2)


@pytest.mark.parametrize("kind", ["llm", "app"])
def test_nginx_asks_for_the_keys(tmp_path: Path, kind: str) -> None:
    with served(tmp_path, guard="ask", keys=("sk-Aa", NASTY_KEY), kind=kind) as port:
        for path in ("/v1/x", "/v1/stream"):
            refused = lab.ask(port, "POST", path, b"x")
            assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json["error"]["code"] == "invalid_api_key"  # type: ignore[index]
        for wrong in ("sk-aa", "sk-Aax", "xsk-Aa", "sk-", NASTY_KEY.replace("\\x41", "A"), NASTY_KEY.lower()):
            assert lab.ask(port, Authorization=f"Bearer {wrong}").status == 401
        for right in ("Bearer sk-Aa", f"Bearer {NASTY_KEY}", "bearer sk-Aa"):
            assert lab.ask(port, Authorization=right).status == 200
        assert lab.ask(port, "OPTIONS").status == 501  # the server's own answer
        assert lab.ask(port, "GET", "/health").status == 200
        assert lab.ask(port, "GET", "/").status == (404 if kind == "llm" else 200)


def test_nginx_adds_the_key(tmp_path: Path) -> None:
    with served(tmp_path, guard="add", keys=(NASTY_KEY,)) as port:
        for theirs in ("", "Bearer other"):
            seen = lab.ask(port, Authorization=theirs).json["headers"]
            assert isinstance(seen, dict)
            assert seen["Authorization"] == f"Bearer {NASTY_KEY}"


@pytest.mark.parametrize("path", ["/pause", "/v1/../pause", "/v1/..%2fpause", "//pause", "/tokenize", "/docs"])
def test_controls_of_the_engine_stay_inside(tmp_path: Path, path: str) -> None:
    with served(tmp_path, kind="llm") as port:
        assert lab.ask(port, "POST", path).status == 404
        assert lab.ask(port, "POST", "/v1/chat/completions").status == 200


def test_nginx_reads_everything_there_is(tmp_path: Path) -> None:
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=x"
    files = {name: str(tmp_path / f"two words {name}.pem") for name in ("certificate", "key")}
    subprocess.run(
        [*make.split(), "-out", files["certificate"], "-keyout", files["key"]], check=True, capture_output=True
    )
    local = tuple(map(address.server, ("127.0.0.1:1", "[::1]:2", "localhost:3", f"unix:{tmp_path}/a.sock")))
    guards: tuple[Guard, ...] = ("pass", "ask", "add")
    for number, guard in enumerate(guards):
        key_file = str(tmp_path / f"{number}.key")
        site = dataclasses.replace(
            cases.FULL_SITE, service=f"Chat-{number}", servers=local, tls=Tls(**files), guard=guard, key_file=key_file
        )
        (tmp_path / f"{number}.conf").write_text(nginx.render(site))
        Path(key_file).write_text(nginx.render_keys(site))
    inner = f"access_log off; include {tmp_path}/[0-9].conf;"
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ {inner} }}")
    words: list[str | Path] = [lab.NGINX, "-t", "-p", tmp_path, "-c", tmp_path / "nginx.conf"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # three sites of the same names on the same addresses; nothing else may be wrong with them
    assert all("conflicting server name" in line for line in done.stderr.splitlines() if "[warn]" in line)


def test_unix_sockets_on_both_sides(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in.sock", tmp_path / "out.sock"
    site = Site("u", "app", (address.server(f"unix:{inside}"),), (address.listen(f"unix:{outside}"),))
    (tmp_path / "site.conf").write_text(nginx.render(site))
    with socket.socket(socket.AF_UNIX) as server, lab.nginx(lab.HERE, tmp_path / "nginx", tmp_path / "site.conf"):
        server.bind(str(inside))
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(outside))
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            accepted, _ = server.accept()
            with accepted:
                assert accepted.recv(65536).startswith(b"GET / HTTP/1.1\r\n")
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                assert client.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "changes",
    [
        {"servers": ()},
        {"servers": (address.server("a:1"), address.server("A:1"))},
        {"names": ("a b",)},
        {"names": ("a;",)},
        {"tls": Tls("/a$b", "/k")},
        {"key_file": "/a\nb"},
        {"key_file": "/a[1]/b"},
    ],
)
def test_values_that_nginx_would_read_as_something_else(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        nginx.render(dataclasses.replace(cases.PLAIN_SITE, **changes))  # type: ignore[arg-type]


def test_two_services_never_share_an_upstream() -> None:
    names = ("chat", "Chat", "chat.v1", "chat-v1", "chat_v1", "CHAT")
    assert len({dataclasses.replace(cases.PLAIN_SITE, service=name).id for name in names}) == len(names)
