"""One machine of a Ray cluster as a service of ours: `python -m mdeploy.apps.cluster`, run by `mdeploy run`.

It starts Ray, keeps its output readable, tells the supervisor over HTTP on loopback how the machine is, and ends
all of it on SIGTERM. Services on the cluster are processes of their own; it does not know them.
"""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType

from mdeploy.errors import ConfigError, ExitCode, MdeployError
from mdeploy.serving import cluster_node
from mdeploy.serving.cluster_gcs import Head
from mdeploy.serving.cluster_node import NodeOptions

_ENDING_S = 5.0
_PATIENCE_S = 10.0
"""How long whoever asks how the machine is may take to say so."""

_LONGEST_DIRECTORY = 40
"""Ray puts sockets 66 bytes further down, and a socket's path may have 107 bytes (unix(7))."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_STAMP = re.compile(r"^\S+ \S+\s+(INFO|SUCC)\s")
_NOISE = re.compile(r"Failed to determine local IP|Remaining processes will be killed|----- (BEGIN|END) ")
_MEANINGS = (
    (r"IsAlive = 0|marked as dead|marked dead", "the head lost sight of this machine and gave it up"),
    (r"Failed to connect to GCS|GCS.*(unavailable|disconnect)", "the head does not answer"),
    (r"gcs_server \[exit|Address already in use", "its head process ended"),
)
"""What Ray's last words come down to; the first that is found wins."""


def main(argv: Sequence[str]) -> int:
    """Be one machine of a cluster until told to end; returns the exit status."""
    options = cluster_node.parse(argv)
    try:
        return _Node(options, cluster_node.take_token()).run()
    except MdeployError as error:
        print(f"mdeploy-app: error: {error.message}", flush=True)
        return int(error.exit_code)


class _Node:
    """Ray on this machine: one child of ours with everything of Ray below it."""

    def __init__(self, options: NodeOptions, token: str) -> None:
        self._options, self._token = options, token
        self._head = Head(options.address, token)
        self._words: collections.deque[str] = collections.deque(maxlen=20)
        self._stopping = False
        self._cluster = ""
        self._ray: subprocess.Popen[str] | None = None

    def run(self) -> int:
        temporary = _temporary()
        if not self._options.is_head:
            check_versions(self._head)
        server = _serve(self)
        print("mdeploy-app: starting Ray", flush=True)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self._ray = subprocess.Popen(
            self._options.ray_argv(temporary),
            env={**os.environ, **cluster_node.environment(self._token)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._pass_on(self._ray)
        status = self._ray.wait()
        server.shutdown()
        return 0 if self._stopping else self._ended(status)

    def _pass_on(self, ray: subprocess.Popen[str]) -> None:
        """Ray's own words until it ends, without its advice: it names commands that are not ours."""
        assert ray.stdout is not None
        for line in ray.stdout:
            text = _COLOURS.sub("", line).rstrip()
            if text and not _STAMP.match(text) and not _NOISE.search(text):
                self._words.append(text)
                print(text, flush=True)

    def _ended(self, status: int) -> int:
        words = "\n".join(self._words)
        meant = (meaning for pattern, meaning in _MEANINGS if re.search(pattern, words))
        said = next(meant, self._words[-1] if self._words else "it said nothing")
        print(f"mdeploy-app: error: Ray ended with status {status}: {said}", flush=True)
        return ExitCode.FAILURE

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ray ends its processes at SIGTERM; what it leaves is the supervisor's to end."""
        self._stopping = True
        if self._ray is not None and self._ray.poll() is None:
            self._ray.terminate()
            timer = threading.Timer(_ENDING_S, self._ray.kill)
            timer.daemon = True
            timer.start()

    # how it is

    def problem(self) -> str:
        """What is wrong with this machine's part of the cluster, empty where nothing is."""
        if self._ray is None or self._ray.poll() is not None:
            return "Ray does not run"
        try:
            self._check_same_head()
            mine = [node for node in self._head.nodes() if node.ip == self._options.ip and node.is_alive]
        except MdeployError as error:
            return error.message
        return "" if mine else "the head does not know this machine"

    def _check_same_head(self) -> None:
        """A head that began anew knows nothing of our Ray, which would look for the old one for a minute."""
        found = self._head.cluster_id()
        self._cluster = self._cluster or found
        if found != self._cluster and self._ray is not None:
            self._words.append("its head began anew")
            self._ray.terminate()


def _temporary() -> str:
    directory = tempfile.gettempdir()
    if len(directory) > _LONGEST_DIRECTORY:
        raise ConfigError(f"TMPDIR is too long for Ray's sockets: {directory}", hint="set TMPDIR to a shorter one")
    return str(Path(directory) / "ray")


def check_versions(head: Head) -> None:
    """Raise ConfigError where the head runs another Ray or Python: their messages do not fit."""
    import ray

    theirs = head.versions()
    ours = (ray.__version__, ".".join(map(str, sys.version_info[:3])))
    if theirs.ray != ours[0]:
        text = f"the head runs Ray {theirs.ray}, this machine {ours[0]}"
        raise ConfigError(text, hint=f"pip install 'ray[serve]=={theirs.ray}'")
    if theirs.python.split(".")[:2] != ours[1].split(".")[:2]:
        text = f"the head runs Python {theirs.python}, this machine {ours[1]}"
        raise ConfigError(text, hint="install mdeploy with the same Python on all machines")


def _serve(node: _Node) -> ThreadingHTTPServer:
    """GET and POST on any path: 200 where the machine is a live part of the cluster, else 503 with the reason.

    Raises ConfigError where something else listens on its port.
    """

    class Answer(BaseHTTPRequestHandler):
        timeout = _PATIENCE_S

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            problem = node.problem()
            body = json.dumps({"status": problem or "ok"}).encode()
            self.send_response(503 if problem else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 the base class's own spelling

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the base class's own name
            """Say nothing: the supervisor asks every two seconds."""

    port = node._options.http_port
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Answer)
    except OSError as error:
        raise ConfigError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
