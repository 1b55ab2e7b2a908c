"""What the processes of a system cost, and who else was on the server's core meanwhile: the audit of a figure."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]
TOKEN = "BENCH_RUN"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")

# what stands in the words of a process -> what it does
_ROLES = (
    ("serving/bootstrap.py", "worker"),
    ("mdeploy.apps", "edge"),
    ("-m mdeploy", "supervisor"),
    ("VLLM::Worker", "worker"),
    ("VLLM::EngineCore", "engine"),
)


def of(token: str) -> dict[int, str]:
    """All processes of a system, those with its token and their descendants: pid -> what it does."""
    found = {process for process in psutil.process_iter() if _has(process.pid, f"{TOKEN}={token}")}
    for process in tuple(found):
        with contextlib.suppress(psutil.Error):
            found.update(process.children(recursive=True))
    return {process.pid: _role(process) for process in found}


def _has(pid: int, text: str) -> bool:
    try:
        return text.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _role(process: psutil.Process) -> str:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return "gone"
    return next((role for part, role in _ROLES if part in words), "server")


def rss(pids: dict[int, str]) -> Counter[str]:
    """Bytes of resident memory by what the processes do."""
    found = Counter[str]()
    for pid, role in pids.items():
        with contextlib.suppress(OSError):
            found[role] += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


@dataclass(frozen=True)
class Spent:
    """Seconds of CPU: of a system's processes by what they do, of us, of the whole server core and stolen from it."""

    roles: dict[str, float]
    client: float
    core: float
    stolen: float

    def since(self, before: Spent) -> Spent:
        """What was added."""
        roles = {role: seconds - before.roles.get(role, 0.0) for role, seconds in self.roles.items()}
        return Spent(roles, self.client - before.client, self.core - before.core, self.stolen - before.stolen)

    @property
    def foreign(self) -> float:
        """Of the server's core: what others took of it."""
        return max(0.0, self.core - sum(self.roles.values()))


def spent(pids: dict[int, str]) -> Spent:
    """What was spent until now; a process that has gone counts no more."""
    roles: dict[str, float] = defaultdict(float)
    for pid, role in pids.items():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            roles[role] += (int(fields[11]) + int(fields[12])) * _TICK_S
    return Spent(roles, sum(os.times()[:2]), *_core())


def _core() -> tuple[float, float]:
    lines = Path("/proc/stat").read_text().splitlines()
    fields = next(line.split() for line in lines if line.startswith(f"cpu{SERVER_CORE} "))
    user, nice, system, _, _, irq, softirq, steal = (int(field) * _TICK_S for field in fields[1:9])
    return user + nice + system + irq + softirq, steal


@contextlib.contextmanager
def ended(token: str) -> Iterator[None]:
    """Whatever has the token is ended at the end: asked, and killed where it does not listen."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = [psutil.Process(pid) for pid in of(token) if psutil.pid_exists(pid)]
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            if not psutil.wait_procs(left, timeout=15)[1]:
                break
