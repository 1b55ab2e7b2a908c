"""What the edge does for every route, its own and those of an app, as clients see it."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from fastapi import FastAPI

from tests.fakes.served import Served, answers, everything, serving
from tests.support import until

KEY = {"authorization": "Bearer sk-one"}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("edge")
    index = directory / "index.html"
    index.write_text("<h1>你好</h1>")
    (directory / "app.py").write_text("secret = 1")
    with serving(directory, cors=["https://a.example"], index=index) as edge:
        yield edge


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("guarded")
    keys = directory / "keys"
    keys.write_text("sk-one\n\nsk-two\n")
    with serving(directory, keys=keys) as edge:
        yield edge


def _error(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return response.status_code, error["type"], error["code"]


# answers


def test_a_handler_gets_the_request_and_its_answer_goes_out(edge: Served) -> None:
    response = edge.ask("POST", "/echo", content=b"hello", headers={"x-request-id": "mine-1.2_3"})
    assert (response.status_code, response.content) == (200, b"hello")
    assert (response.headers["x-request-id"], response.headers["server"]) == ("mine-1.2_3", "mdeploy")
    assert edge.ask("POST", "/also", content=b"hello").content == b"hello"


@pytest.mark.parametrize("odd", ["", "a b", "x" * 65, "é", "a\tb"])
def test_a_request_id_that_is_not_sane_is_replaced(edge: Served, odd: str) -> None:
    found = edge.ask("GET", "/echo", headers={"x-request-id": odd.encode()}).headers["x-request-id"]
    assert found != odd
    assert found.isascii()


def test_head_and_options(edge: Served) -> None:
    head = edge.ask("HEAD", "/echo")
    assert (head.status_code, head.content) == (200, b"")
    options = edge.ask("OPTIONS", "/echo")
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/nowhere", (404, "not_found_error", "not_found")),
        ("GET", "/echo/", (404, "not_found_error", "not_found")),
        ("DELETE", "/echo", (405, "invalid_request_error", "method_not_allowed")),
        ("GET", "/fails", (405, "invalid_request_error", "method_not_allowed")),
        ("DELETE", "/typed", (405, "invalid_request_error", "method_not_allowed")),
        ("POST", "/fails", (500, "server_error", "internal_error")),
        ("POST", "/full", (503, "server_error", "overloaded")),
        ("GET", "/typed?number=x", (422, "invalid_request_error", "invalid_input")),
        ("GET", "/teapot", (418, "invalid_request_error", "teapot")),
        ("GET", "/crash", (500, "server_error", "internal_error")),
    ],
)
def test_errors_have_one_shape(edge: Served, method: str, path: str, expected: Any) -> None:
    assert _error(edge.ask(method, path)) == expected


def test_what_broke_stands_in_the_log_and_not_in_the_answer(edge: Served) -> None:
    assert "secret" not in edge.ask("GET", "/crash").text
    assert "RuntimeError: secret detail" in edge.log.read_text()


def test_overload_says_when_to_come_back(edge: Served) -> None:
    assert edge.ask("POST", "/full").headers["retry-after"] == "2"
    assert edge.ask("POST", "/echo", headers={"content-encoding": "gzip"}, content=b"x").status_code == 415
    assert edge.ask("DELETE", "/echo").headers["allow"] == "GET, HEAD, OPTIONS, POST"


def test_forms_reach_a_handler(edge: Served) -> None:
    files = {"image": ("猫.jpg", b"\xff\xd8" * 9, "image/jpeg"), "text": ("a.txt", b"")}
    found = edge.ask("POST", "/form", data={"a": ["1", "2"], "b": "你"}, files=files).json()
    assert found["form"] == [["a", "2"], ["b", "你"]]
    assert found["files"] == [["image", "猫.jpg", "image/jpeg", 18], ["text", "a.txt", "text/plain", 0]]
    found = edge.ask("POST", "/form", data={"a": "x y&z=%", "b": ""}).json()
    assert found["form"] == [["a", "x y&z=%"], ["b", ""]]


def test_json_that_calls_itself_a_form_stays_what_it_is(edge: Served) -> None:
    text = json.dumps(["a&b"] * 2000).encode()
    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert edge.ask("POST", "/form", content=text, headers=kind).json() == {"form": [], "files": [], "body": len(text)}


def test_routes_of_an_app_ask_handlers_too(edge: Served) -> None:
    response = edge.ask("POST", "/own", content=b"12345", headers={"x-request-id": "own-1"})
    assert response.json() == {"length": 5}
    assert edge.line("own-1")["handler"] == "echo"


# streams


def test_events_are_streamed(edge: Served) -> None:
    response = edge.ask("GET", "/stream?n=2")
    assert response.text == "data: 0\n\ndata: 1\n\n"
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"


def test_a_stream_that_fails_says_so(edge: Served) -> None:
    *events, last = edge.ask("GET", "/broken?n=2").text.strip().split("\n\n")
    assert events == ["data: 0", "data: 1"]
    kind, _, data = last.partition("\n")
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"] == "the model fell over"


def test_bytes_that_break_off_are_seen_to_be_not_whole(edge: Served) -> None:
    assert edge.ask("GET", "/raw?n=3").content == b"0;1;2;"
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        edge.ask("GET", "/rawbroken?n=3", headers={"x-request-id": "cut-1"})
    assert edge.line("cut-1")["status"] == 500


# keys


@pytest.mark.parametrize(
    "path", ["/echo", "/own", "/ready", "/metrics", "/docs", "/openapi.json", "/nowhere", "/docs-assets/x"]
)
@pytest.mark.parametrize("given", [None, "Bearer sk-three", "Bearer sk-on", "Bearer", "sk-one", "Bearer sk-one sk-two"])
def test_nothing_is_told_without_a_key(guarded: Served, path: str, given: str | None) -> None:
    response = guarded.ask("POST", path, headers={"authorization": given} if given is not None else {})
    assert _error(response) == (401, "authentication_error", "invalid_api_key")
    assert "Bearer" in response.headers["www-authenticate"]


@pytest.mark.parametrize("given", ["Bearer sk-one", "Bearer sk-two", "bearer  sk-one"])
def test_each_key_opens(guarded: Served, given: str) -> None:
    assert guarded.ask("POST", "/echo", content=b"x", headers={"authorization": given}).content == b"x"


def test_health_and_the_page_need_no_key(guarded: Served) -> None:
    assert guarded.ask("GET", "/health").status_code == 200
    assert guarded.ask("GET", "/").status_code == 307


def test_a_browser_may_read_the_documentation_with_the_key_as_password(guarded: Served) -> None:
    basic = {"authorization": "Basic " + base64.b64encode(b"me:sk-one").decode()}
    assert guarded.ask("GET", "/docs", headers=basic).status_code == 200
    assert guarded.ask("GET", "/openapi.json", headers=basic).status_code == 200
    assert guarded.ask("POST", "/echo", headers=basic).status_code == 401
    assert guarded.ask("GET", "/docs", headers={"authorization": "Basic !!"}).status_code == 401


def test_keys_are_never_logged(guarded: Served) -> None:
    headers = {**KEY, "x-request-id": "quiet-1"}
    guarded.ask("POST", "/echo?key=sk-one", headers=headers)
    guarded.ask("POST", "/own?key=sk-one", headers={"authorization": "Bearer sk-wrong"})
    assert guarded.line("quiet-1")["path"] == "/echo"
    assert "sk-" not in guarded.log.read_text()


def test_keys_are_read_again(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-one\n")
    with serving(tmp_path, keys=keys) as edge:
        keys.write_text("sk-new\n")
        edge.process.send_signal(signal.SIGHUP)
        until(lambda: edge.ask("GET", "/echo", headers={"authorization": "Bearer sk-new"}).status_code == 200)
        assert edge.ask("GET", "/echo", headers=KEY).status_code == 401


# pages of other origins, the page, the documentation


def test_pages_of_allowed_origins_may_ask(edge: Served) -> None:
    wish = {"origin": "https://a.example", "access-control-request-method": "POST"}
    wish["access-control-request-headers"] = "authorization, content-type"
    response = edge.ask("OPTIONS", "/echo", headers=wish)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "authorization" in response.headers["access-control-allow-headers"]
    for path in ("/echo", "/nowhere", "/typed?number=1"):
        response = edge.ask("GET", path, headers={"origin": "https://a.example"})
        assert response.headers["access-control-allow-origin"] == "https://a.example"


def test_pages_of_others_may_not(edge: Served, guarded: Served) -> None:
    wish = {"origin": "https://b.example", "access-control-request-method": "POST"}
    assert edge.ask("OPTIONS", "/echo", headers=wish).status_code == 400
    assert (
        "access-control-allow-origin" not in edge.ask("GET", "/echo", headers={"origin": "https://b.example"}).headers
    )
    assert guarded.ask("OPTIONS", "/echo", headers=wish).status_code == 401


def test_the_page_is_served_and_nothing_beside_it(edge: Served) -> None:
    response = edge.ask("GET", "/")
    assert (response.text, response.headers["content-type"]) == ("<h1>你好</h1>", "text/html; charset=utf-8")
    for path in ("/app.py", "/index.html", "/../app.py", "/%2e%2e/app.py", "/docs-assets/../../app.py"):
        assert edge.ask("GET", path).status_code == 404


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_documentation_needs_no_internet(edge: Served, page: str) -> None:
    text = edge.ask("GET", page).text
    assert "https://" not in text.replace("https://fastapi.tiangolo.com", "")
    names = [part.split('"')[0] for part in text.split('"./docs-assets/')[1:]]
    assert names
    assert [edge.ask("GET", f"/docs-assets/{name}").status_code for name in names] == [200] * len(names)


def test_the_document_tells_of_handlers_and_routes(edge: Served, guarded: Served) -> None:
    document = edge.ask("GET", "/openapi.json").json()
    post = document["paths"]["/echo"]["post"]
    assert (post["summary"], post["description"], post["x-mdeploy-handler"]) == ("Echo.", "More of it.", "echo")
    assert post["requestBody"]["content"]["application/json"]["example"] == {"text": "hi"}
    assert base64.b64decode(post["x-mdeploy-example"]["body_base64"]) == b'{"text": "hi"}'
    assert {"/also", "/own", "/health", "/ready", "/metrics"} < set(document["paths"])
    assert {"400", "408", "413", "415", "431", "500", "503", "504"} < set(post["responses"])
    assert "401" not in post["responses"]
    document = guarded.ask("GET", "/openapi.json", headers=KEY).json()
    assert document["paths"]["/own"]["post"]["security"] == [{"bearer": []}]
    assert "401" in document["paths"]["/own"]["post"]["responses"]
    assert "security" not in document["paths"]["/health"]["get"]


# how it is


def test_health_and_readiness(edge: Served) -> None:
    for method in ("GET", "POST"):
        health = edge.ask(method, "/health").json()
        assert health["status"] == "ok"
        assert health["handlers"]["echo"]["workers"][0]["state"] == "ready"
        assert edge.ask(method, "/ready").json()["handlers"]["echo"] == {"ready": True}


def test_readiness_asks_once_and_remembers(tmp_path: Path) -> None:
    with serving(tmp_path, access_log=False) as edge:
        askers = [threading.Thread(target=edge.raw, args=(b"GET /ready HTTP/1.0\r\n\r\n",)) for _ in range(8)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert edge.ask("GET", "/ready").status_code == 200
        assert edge.seen("echo")["submitted"] == 1


def test_metrics_count_what_happened(edge: Served) -> None:
    edge.ask("POST", "/echo")
    edge.ask("GET", "/stream?n=7")
    edge.ask("GET", "/made/up/by/a/client")
    text = edge.ask("GET", "/metrics").text
    for line in (
        'mdeploy_requests_total{handler="echo",method="POST",status="200"}',
        'mdeploy_requests_total{handler="",method="GET",status="404"}',
        'mdeploy_request_seconds_bucket{handler="echo",le="0.001"}',
        'mdeploy_queue_length{handler="echo"} 0.0',
        'mdeploy_workers{handler="echo",state="ready"} 1.0',
        'mdeploy_inference_total{handler="stream"}',
        "process_resident_memory_bytes",
    ):
        assert f"\n{line}" in text
    assert "made" not in text


def test_the_access_log_is_one_line_of_json_a_request(edge: Served) -> None:
    edge.ask("POST", "/echo?token=abc", content=b"hello", headers={"x-request-id": "log-1"})
    edge.ask("GET", '/"odd\\path', headers={"x-request-id": "log-2"})
    line = edge.line("log-1")
    assert set(line) == {
        *("time", "id", "method", "path", "status", "ms", "bytes_in", "bytes_out", "client", "handler", "wait_ms")
    }
    assert (line["method"], line["path"], line["status"], line["handler"]) == ("POST", "/echo", 200, "echo")
    assert (line["bytes_in"], line["bytes_out"], line["client"]) == (5, 5, "127.0.0.1")
    assert edge.line("log-2")["status"] == 404
    assert not any(line["path"] == "/health" for line in edge.lines())


# the end


def test_what_is_in_flight_is_answered_before_the_end(tmp_path: Path) -> None:
    with serving(tmp_path) as edge, edge.connect() as client, edge.connect():
        client.sendall(b"GET /slow?s=3 HTTP/1.1\r\nHost: x\r\nX-Request-Id: last-1\r\n\r\n")
        until(lambda: edge.seen("slow")["submitted"] == 1)
        edge.process.terminate()
        [answer] = answers(everything(client))
        assert (answer.status, answer.body, answer.headers["connection"]) == (200, b'"done"', "close")
        assert edge.process.wait(10) == 0
        assert edge.line("last-1")["status"] == 200


def test_what_takes_too_long_is_told_at_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, drain_s=0.2) as edge, edge.connect() as client, edge.connect() as stream:
        client.sendall(b"GET /slow?s=60 HTTP/1.1\r\nHost: x\r\n\r\n")
        stream.sendall(b"GET /stream?n=1000000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: edge.seen("slow")["submitted"] == 1)
        edge.process.terminate()
        [answer] = answers(everything(client))
        assert (answer.status, answer.error["code"]) == (503, "stopping")
        assert edge.process.wait(10) == 0


def test_a_port_that_is_taken_is_told(edge: Served) -> None:
    from mdeploy.errors import ConfigError
    from mdeploy.serving import httpd

    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{edge.port}: Address already in use"):
        httpd.bind("127.0.0.1", edge.port)


def test_of_two_that_bound_a_port_before_either_listened_one_is_told() -> None:
    from mdeploy.errors import ConfigError
    from mdeploy.serving import httpd

    with httpd.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with httpd.bind("127.0.0.1", port) as second:
            first.listen()
            waiting = httpd.serve(FastAPI(), second, httpd.ServerOptions(), asyncio.Event())
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
                uvloop.run(waiting)


def test_an_idle_edge_sleeps(edge: Served) -> None:
    """No timer ticks: no context switch that the process asked for."""

    def switches() -> int:
        text = Path(f"/proc/{edge.process.pid}/status").read_text()
        return int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    def rests() -> bool:
        before = switches()
        time.sleep(1)
        return switches() - before <= 1

    until(rests)
