"""What is true of a service, read from /proc and its port alone: it shares no code with the product.

Whatever has the service's MDEPLOY_HOME in its environment belongs to it; what also has an
MDEPLOY_RUN_ID belongs to a run of its engine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC, SHM = Path("/proc"), Path("/dev/shm")
_LISTEN = "0A"  # include/net/tcp_states.h


@dataclass(frozen=True)
class Process:
    """One process, zombies included; `run` is its MDEPLOY_RUN_ID, `temporary` its TMPDIR."""

    pid: int
    parent: int
    state: str
    argv: tuple[str, ...]
    run: str = ""
    temporary: str = ""

    @property
    def is_supervisor(self) -> bool:
        return self.argv[1:4] == ("-m", "mdeploy", "run")

    @property
    def is_guard(self) -> bool:
        return not self.run and any(word.endswith("guard.py") for word in self.argv[:5])

    @property
    def is_stopped(self) -> bool:
        return self.state in ("T", "t")

    def __str__(self) -> str:
        command = " ".join(" ".join(self.argv).split())[:80]
        return f"{self.pid}({self.state}, parent {self.parent}, run {self.run[:6] or '-'}): {command}"


@dataclass(frozen=True)
class Scene:
    """The processes of one home at one moment."""

    supervisors: tuple[Process, ...]
    guards: tuple[Process, ...]
    engines: tuple[Process, ...]
    zombies: tuple[Process, ...]

    @property
    def all(self) -> tuple[Process, ...]:
        return (*self.supervisors, *self.guards, *self.engines)

    @property
    def runs(self) -> set[str]:
        return {process.run for process in self.engines}

    @property
    def servers(self) -> tuple[Process, ...]:
        """Main processes of engines: those the supervisor itself has started."""
        parents = {process.pid for process in self.supervisors}
        return tuple(process for process in self.engines if process.parent in parents)

    @property
    def stopped(self) -> tuple[Process, ...]:
        return tuple(process for process in self.all if process.is_stopped)

    def __str__(self) -> str:
        return "; ".join(map(str, (*self.all, *self.zombies))) or "no process"


def scene(home: Path) -> Scene:
    """Look at all of /proc."""
    needle = f"MDEPLOY_HOME={home}".encode()
    found: list[Process] = []
    dead: list[Process] = []
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (process := _process(int(entry.name), needle)):
            (dead if process.state in ("Z", "X") else found).append(process)
    engines = tuple(p for p in found if p.run)
    supervisors = tuple(p for p in found if p.is_supervisor and not p.run)
    guards = tuple(p for p in found if p.is_guard)
    ours = {process.pid for process in (*engines, *supervisors, *guards)}
    return Scene(supervisors, guards, engines, tuple(p for p in dead if p.parent in ours))


def _process(pid: int, needle: bytes) -> Process | None:
    """The process if it is of the home, or if it is a zombie: those have no environment any more."""
    place = PROC / str(pid)
    try:
        state, parent = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        if state in ("Z", "X"):
            return Process(pid, int(parent), state, (f"[{(place / 'comm').read_text().strip()}]",))
        environment = (place / "environ").read_bytes().split(b"\0")
        if needle not in environment:
            return None
        argv = (place / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:  # gone meanwhile, or somebody else's
        return None
    values = dict(pair.decode(errors="replace").split("=", 1) for pair in environment if b"=" in pair)
    return Process(pid, int(parent), state, tuple(argv), values.get("MDEPLOY_RUN_ID", ""), values.get("TMPDIR", ""))


def exists(pid: int) -> bool:
    """True for a process that is there and no zombie."""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def listeners(port: int, pids: Iterable[int]) -> tuple[set[int], bool]:
    """Which of these processes listen on a port, and whether anybody does."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    return {pid for pid in pids if sockets & set(_open_files(pid))}, bool(sockets)


def _open_files(pid: int) -> Iterable[str]:
    with contextlib.suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(link.readlink())


def answers(port: int, model: str, timeout_s: float) -> bool:
    """True where a real request to the port is answered with a completion."""
    body = json.dumps({"model": model, "prompt": "Hi", "max_tokens": 1, "temperature": 0})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status == 200 and bool(json.loads(response.read())["choices"])
    except (OSError, http.client.HTTPException, ValueError, LookupError):
        return False
    finally:
        connection.close()


def segments() -> dict[str, int]:
    """Files in /dev/shm by name, with their inodes."""
    found = {}
    for path in SHM.iterdir():
        with contextlib.suppress(OSError):
            found[path.name] = path.lstat().st_ino
    return found


def used_segments(pids: Iterable[int]) -> set[int]:
    """Inodes in /dev/shm that processes have mapped or open."""
    used = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in (PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
                if f" {SHM}/" in line:
                    used.add(int(line.split(maxsplit=5)[4]))
        with contextlib.suppress(OSError):
            for link in (PROC / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(link.readlink()).startswith(f"{SHM}/"):
                        used.add(link.stat().st_ino)
    return used


def everybody() -> list[int]:
    """All pids."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
