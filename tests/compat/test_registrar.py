"""Who may join a controller, and what it says to those who may not."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mdeploy.compat import registrar, token
from mdeploy.compat.fleet import Fleet
from mdeploy.errors import ConfigError
from mdeploy.paths import Paths

GOOD = {"address": "http://w:1/", "name": "custom", "state": "ready"}


def ask(
    fleet: Fleet, body: bytes, bearer: bytes = b"Bearer secret", method: str = "POST", path: str = "/workers"
) -> Any:
    """Status and document, and how often the checker was called."""
    sent: list[Any] = []
    calls: list[int] = []

    async def edge(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    app = registrar.Registrar(edge, fleet, ("custom",), "secret", lambda: calls.append(1))
    scope = {"type": "http", "path": path, "method": method, "headers": [(b"authorization", bearer)]}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), len(calls)


def test_a_worker_joins_beats_and_leaves() -> None:
    fleet = Fleet(time.monotonic)
    assert ask(fleet, json.dumps(GOOD).encode()) == (200, {"workers": 1}, 1)
    (worker,) = fleet.of("custom")
    assert worker.address == "http://w:1"
    fleet.checked(worker, is_healthy=True)
    assert ask(fleet, json.dumps(GOOD).encode()) == (200, {"workers": 1}, 0)
    assert ask(fleet, json.dumps({**GOOD, "state": "leaving"}).encode()) == (200, {"workers": 0}, 0)


@pytest.mark.parametrize("bearer", [b"", b"Bearer ", b"Bearer wrong", b"Basic secret", b"secret", b"Bearer secret2"])
def test_nobody_joins_without_the_token(bearer: bytes) -> None:
    fleet = Fleet(time.monotonic)
    status, document, _ = ask(fleet, json.dumps(GOOD).encode(), bearer)
    assert (status, document["error"]["code"], len(fleet)) == (401, "invalid_api_key", 0)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b"[" * 10_000, 400),
        (json.dumps({**GOOD, "name": "other"}).encode(), 400),
        (json.dumps({**GOOD, "state": "odd"}).encode(), 400),
        (json.dumps({**GOOD, "address": "file:///etc/passwd"}).encode(), 400),
        (json.dumps({**GOOD, "address": 5}).encode(), 400),
        (b"x" * 20_000, 413),
    ],
)
def test_messages_that_are_none(body: bytes, status: int) -> None:
    fleet = Fleet(time.monotonic)
    found, document, _ = ask(fleet, body)
    assert (found, len(fleet)) == (status, 0)
    assert document["error"]["message"]


def test_other_methods_and_paths() -> None:
    fleet = Fleet(time.monotonic)
    assert ask(fleet, b"", method="GET")[0] == 405
    assert ask(fleet, b"", path="/custom")[0] == 299


# the token


def test_all_who_start_at_once_find_one_token(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from mdeploy.compat import token; from mdeploy.paths import Paths\n"
    code += "print(token.read(token.file({}, Paths(Path(sys.argv[1])))))"
    words = [sys.executable, "-c", code, str(tmp_path / "home")]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert len({process.communicate()[0] for process in started}) == 1
    secrets = tmp_path / "home/secrets"
    assert [path.name for path in secrets.iterdir()] == ["modelserve.token"]
    assert stat.S_IMODE((secrets / "modelserve.token").stat().st_mode) == 0o600
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [(None, 0, "cannot read"), ("", 0o600, "must hold one token"), ("short", 0o600, "must hold one token"),
     ("a" * 40, 0o644, "everybody may read"), ("a" * 40 + " b", 0o600, "must hold one"), ("ü" * 40, 0o600, "no text")],
)  # fmt: skip
def test_a_token_file_that_will_not_do(tmp_path: Path, text: str | None, mode: int, says: str) -> None:
    path = tmp_path / "token"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=says):
        token.file({token.VARIABLE: str(path)}, Paths(tmp_path / "home"))
    assert not (tmp_path / "home").exists()
