"""A worker of a modelserve script: our app for one class on one device, and the heartbeats that bring it requests.

The process that the start script started stays what it was, so that old stop scripts find and end it; the app is its
child and ends with it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

from mdeploy.compat import modelserve, token
from mdeploy.errors import ConfigError
from mdeploy.serving.auth import KEYS_VARIABLE
from mdeploy.serving.options import AppOptions
from mdeploy.supervise import processes

BEAT_S = 2.0
_POLL_S = 0.2
_TIMEOUT_S = 5.0
_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Joining:
    """A worker as its command line describes it. `name` is its handler's; `device` goes to `init` word for word."""

    script: Path
    class_name: str
    name: str
    host: str
    port: int
    device: str
    controller: str
    address: str
    token_file: Path


def run(worker: Joining, say: Callable[[str], None]) -> int:
    """Serve until the app ends or a signal comes; returns the exit status. Raises ConfigError for a wrong token."""
    ended = threading.Event()
    previous = {number: signal.signal(number, _setter(ended)) for number in (signal.SIGTERM, signal.SIGINT)}
    app = _start(worker)
    try:
        _beat(worker, app, ended, say)
    finally:
        with contextlib.suppress(ConfigError):
            _tell(worker, "leaving")
        status = _stop(app)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0 if ended.is_set() else status or 1


def _setter(event: threading.Event) -> Callable[[int, FrameType | None], None]:
    return lambda number, frame: event.set()


def _start(worker: Joining) -> subprocess.Popen[bytes]:
    options = AppOptions(
        service=worker.name,
        host=worker.host,
        port=worker.port,
        handlers=(f"{worker.script}:{worker.class_name}",),
        paths=(str(worker.script.parent),),
        devices=(_pool_device(worker.device, os.environ.get("CUDA_VISIBLE_DEVICES")),),
        workers_per_device=1,
        drain_s=_DRAIN_S,
    )
    env = {
        **os.environ,
        KEYS_VARIABLE: str(worker.token_file),
        modelserve.DEVICE_VARIABLE: worker.device,
        modelserve.VISIBLE_VARIABLE: os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    command = [sys.executable, "-m", "mdeploy.apps", "app", *options.argv()]
    return subprocess.Popen(command, env=env, preexec_fn=processes.die_with_parent(signal.SIGTERM))


def _pool_device(asked: str, visible: str | None) -> str:
    """The GPU that a device of modelserve means, as our pool names it; cpu for what is no GPU."""
    number = asked.removeprefix("cuda").lstrip(":") or "0"
    if not number.isdecimal():
        return "cpu"
    shown = [word.strip() for word in (visible or "").split(",") if word.strip()]
    if not shown:
        return number
    chosen = shown[int(number)] if int(number) < len(shown) else number
    return chosen if chosen.isdecimal() else number


def _beat(worker: Joining, app: subprocess.Popen[bytes], ended: threading.Event, say: Callable[[str], None]) -> None:
    """Tell the controller every two seconds that we are there, once the model has been loaded."""
    told = ""
    while not ended.is_set() and app.poll() is None:
        healthy = _is_healthy(worker)
        news = _tell(worker, "ready") if healthy else told
        if news != told:
            say(news or f"{worker.name} has joined {worker.controller}")
        told = news
        ended.wait(BEAT_S if healthy else _POLL_S)


def _is_healthy(worker: Joining) -> bool:
    host = "127.0.0.1" if worker.host in ("0.0.0.0", "::", "localhost") else worker.host
    try:
        return _ask(f"http://{f'[{host}]' if ':' in host else host}:{worker.port}", "GET", "/health")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _tell(worker: Joining, state: str) -> str:
    """Tell the controller; returns what stands in the way, nothing where it listened. Raises ConfigError."""
    document = {"address": worker.address, "name": worker.name, "state": state}
    try:
        status, text = _ask(worker.controller, "POST", "/workers", document, token.read(worker.token_file))
    except (OSError, http.client.HTTPException) as error:
        return f"the controller at {worker.controller} cannot be reached ({error}); trying on"
    if status == 200:
        return ""
    if state == "ready" and status in (400, 401, 404, 405):
        raise ConfigError(f"{worker.controller} does not take this worker: {text}", hint=_hint(status))
    return f"the controller at {worker.controller} answers {status}; trying on"


def _hint(status: int) -> str:
    if status == 401:
        return f"copy the controller's token here and name its file in {token.VARIABLE}"
    return "--controller-addr must be the address of `… --controller`, --name one of its models"


def _ask(url: str, method: str, path: str, document: object = None, bearer: str = "") -> tuple[int, str]:
    """Status and message of an answer; no proxy is asked. Raises OSError and HTTPException."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {bearer}"} if bearer else {})
    try:
        connection.request(method, path, None if document is None else json.dumps(document), headers)
        response = connection.getresponse()
        return response.status, _message(response.read(65536))
    except TimeoutError as error:
        raise OSError(f"no answer within {_TIMEOUT_S:g} s") from error
    finally:
        connection.close()


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _stop(app: subprocess.Popen[bytes]) -> int:
    """End the app and wait: it finishes what it is at, which takes no longer than its drain time."""
    if app.poll() is None:
        app.terminate()
    try:
        return app.wait(_DRAIN_S + 15)
    except subprocess.TimeoutExpired:
        app.kill()
        return app.wait()
