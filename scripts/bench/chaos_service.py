"""The service under test as its user sees it: the command line, the files, and looks from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_scan as scan

from tests.fakes import vllm_env
from tests.support import DEMO_MODEL, tiny_model

MDEPLOY = str(Path(sys.executable).parent / "mdeploy")
NAME = "s"
_OWN_SHM = "CHAOS_OWN_SHM" in os.environ

Row = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """What is true at one moment: the processes, and whether one of them answers a real request."""

    scene: scan.Scene
    answers: bool

    def __str__(self) -> str:
        return f"{'answers' if self.answers else 'does not answer'}; {self.scene}"


@dataclass
class Service:
    """One detached service in a home of its own, whose temporary directory is known too."""

    place: Path
    port: int
    model: Path
    options: tuple[str, ...]
    patience_s: float
    request_s: float
    segments: set[int] = field(default_factory=set)
    before: dict[str, int] = field(default_factory=scan.segments)
    told: set[str] = field(default_factory=set)

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def temporary(self) -> Path:
        return self.place / "t"

    @property
    def files(self) -> Path:
        return self.home / "services" / NAME

    def environment(self) -> dict[str, str]:
        """The caller's, without what would lead the command line elsewhere."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MDEPLOY_", "FAKE_", "VLLM_", "CHAOS_"))}
        return {**kept, "MDEPLOY_HOME": str(self.home), "TMPDIR": str(self.temporary)}

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start one command line."""
        return subprocess.Popen(
            [MDEPLOY, *words],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of one command line, which must not take for ever."""
        with self.begin(*words) as process:
            try:
                out, err = process.communicate(timeout=2 * self.patience_s + 60)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                return -1, out, f"{err}\nmdeploy {' '.join(words)} did not end"
        return process.returncode, out, err

    def must(self, *words: str) -> str:
        """Stdout of a command line that has to succeed. Raises RuntimeError."""
        code, out, err = self.run(*words)
        if code != 0:
            raise RuntimeError(f"mdeploy {' '.join(words)}: {code}\n{err}")
        return out

    def serve(self, *more: str) -> str:
        """Start the service for the first time, or with --dry-run only show it."""
        words = ("serve", "llm", str(self.model), "--name", NAME, "--port", str(self.port))
        return self.must(*words, *self.options, *more)

    def ps(self) -> Row | str:
        """The service's row of `ps --json`, or why there is none."""
        code, out, err = self.run("ps", "--json")
        try:
            return next(dict(row) for row in json.loads(out)["services"] if row["name"] == NAME)
        except (ValueError, LookupError, StopIteration):
            return f"ps ended with {code}: {out}{err}"

    def look(self) -> Look:
        """What is true now."""
        scene = scan.scene(self.home)
        pids = [process.pid for process in scene.engines]
        self.segments |= scan.used_segments(pids)
        if not scan.listeners(self.port, pids)[0]:
            return Look(scene, answers=False)
        answered = scan.answers(self.port, NAME, self.request_s)
        still = [process.pid for process in scan.scene(self.home).engines]
        return Look(scene, answered and bool(scan.listeners(self.port, still)[0]))

    def leaks(self) -> list[str]:
        """What is left of runs that are over, and was not told of before."""
        scene = scan.scene(self.home)
        current = {process.run for process in scene.servers}
        found = [f"old process {process}" for process in scene.engines if process.run not in current]
        found += [f"zombie {process}" for process in scene.zombies]
        found += [f"one more supervisor {process}" for process in scene.supervisors[1:]]
        found += [f"one more guard {process}" for process in scene.guards[1:]]
        owners, taken = scan.listeners(self.port, [process.pid for process in scene.engines])
        if taken and not owners:
            found.append(f"port {self.port} is held")
        used = scan.used_segments(scan.everybody())
        for name, inode in scan.segments().items():
            if self.before.get(name) != inode and inode not in used and (_OWN_SHM or inode in self.segments):
                found.append(f"/dev/shm/{name}")
        own = {process.temporary for process in scene.engines}
        found += [str(path) for path in self.temporary.iterdir() if str(path) not in own]
        return [leak for leak in found if leak not in self.told]

    def evidence(self) -> str:
        """What a reader of a violation wants to see first."""
        parts = [f"scan: {self.look()}"]
        for name in ("state.json", "supervisor.log"):
            path = self.files / name
            parts.append(f"{name}: {path.read_text(errors='replace')[-600:] if path.exists() else 'is not there'}")
        log = self.run("logs", NAME, "-n", "12", "-t")
        return "\n  ".join([*parts, "log:", *log[1].splitlines(), *log[2].splitlines()])

    def close(self) -> None:
        """Stop it, and whatever a violation has left."""
        self.run("stop", "--all")
        deadline = time.monotonic() + 10
        while (left := scan.scene(self.home).all) and time.monotonic() < deadline:
            for process in left:
                kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)


@contextlib.contextmanager
def stand_in() -> Iterator[Service]:
    """A home with the stand-in engine. Nothing is served yet; whatever is served is gone at the end."""
    with _place() as place:
        model = tiny_model(place / "org" / "tiny")
        service = Service(place, free_port(), model, (), patience_s=60, request_s=1.0)
        service.must("engines", "install", "vllm", "--python", str(vllm_env.make(place / "engine")))
        with contextlib.closing(service):
            yield service


@contextlib.contextmanager
def real_vllm(engines_home: Path | None, *options: str) -> Iterator[Service]:
    """The same with real vLLM, taken from another home or installed, and the demo model."""
    with _place() as place:
        service = Service(place, free_port(), DEMO_MODEL, options, patience_s=240, request_s=3.0)
        if engines_home:
            (service.home / "engines").symlink_to(engines_home.resolve() / "engines")
        else:
            service.must("engines", "install", "vllm")
        with contextlib.closing(service):
            yield service


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """A short path: vLLM puts sockets below it, and a socket's path has 107 bytes at most."""
    place = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    for name in ("home", "t"):
        (place / name).mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def free_port() -> int:
    """A port nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
