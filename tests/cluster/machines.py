"""Two machines on one: network namespaces with a cable between them, each with a home of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import Result, until

SMALL = ("--cpus", "2", "--object-store-mib", "80")


@dataclass(frozen=True)
class Machine:
    """One namespace; commands in it are those of a user there."""

    namespace: str
    ip: str
    home: Path

    def mdeploy(self, *args: str | Path, **env: str) -> Result:
        done = subprocess.run(
            self._command(sys.executable, "-m", "mdeploy", *map(str, args)),
            input="",
            capture_output=True,
            text=True,
            timeout=180,
            env={**os.environ, "MDEPLOY_HOME": str(self.home), **env},
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def python(self, code: str, *args: str, timeout: float = 120) -> Any:
        """What a program prints there, as JSON."""
        done = subprocess.run(
            self._command(sys.executable, "-c", code, *args),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def service(self, name: str) -> dict[str, Any] | None:
        found = self.mdeploy("ps", "--json").json["services"]
        return next((one for one in found if one["name"] == name), None)

    def log(self, name: str) -> str:
        return (self.home / "services" / name / "log").read_text()

    def pids(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]

    def kill_everything(self) -> None:
        """As if the power was cut: nobody ends in order, and no supervisor starts anything again."""
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def cable(self, state: str) -> None:
        ip("-n", self.namespace, "link", "set", "cable", state)

    def _command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *words]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two(directory: Path) -> Iterator[tuple[Machine, Machine]]:
    """Machines that see each other and nothing else; nothing of them is left at the end."""
    prefix = f"mdt{os.getpid()}"
    machines = tuple(Machine(f"{prefix}{n}", f"10.83.7.{n}", directory / f"home{n}") for n in (1, 2))
    try:
        for machine in machines:
            ip("netns", "add", machine.namespace)
        ends = [f"{prefix}-{n}" for n in (1, 2)]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for machine, end in zip(machines, ends, strict=True):
            _plug_in(machine, end)
        yield machines[0], machines[1]
    finally:
        for machine in machines:
            if Path(f"/run/netns/{machine.namespace}").exists():
                machine.kill_everything()
                ip("netns", "del", machine.namespace)


def _plug_in(machine: Machine, end: str) -> None:
    ip("link", "set", end, "netns", machine.namespace)
    ip("-n", machine.namespace, "link", "set", end, "name", "cable")
    ip("-n", machine.namespace, "addr", "add", f"{machine.ip}/24", "dev", "cable")
    for device in ("lo", "cable"):
        ip("-n", machine.namespace, "link", "set", device, "up")


_LOAD = """
import http.client, json, sys, threading, time
port, threads, stop = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
import os
right, wrong, pids, lock = 0, [], set(), threading.Lock()
def run(number):
    global right
    count = 0
    while not os.path.exists(stop):
        count += 1
        text = f"{number}-{count}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", "/echo", json.dumps({"text": text}), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            found = json.loads(reply.read())
            with lock:
                if reply.status == 200 and found["text"] == text:
                    right += 1
                    pids.add(found["pid"])
                else:
                    wrong.append([reply.status, found])
        except OSError as error:
            with lock:
                wrong.append([0, repr(error)])
        finally:
            connection.close()
        with open(stop + ".count", "w") as file:
            file.write(str(right))
threads = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
[t.start() for t in threads]
[t.join() for t in threads]
print(json.dumps({"right": right, "wrong": wrong, "pids": sorted(pids)}))
"""


@dataclass
class Load:
    """Clients that ask for echoes of texts nobody else asks for, until they are told to stop."""

    machine: Machine
    port: int
    flag: Path
    threads: int = 8
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def __enter__(self) -> Load:
        words = [sys.executable, "-c", _LOAD, str(self.port), str(self.threads), str(self.flag)]
        self._process = subprocess.Popen(self.machine._command(*words), stdout=subprocess.PIPE, text=True)
        self.answered(20)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def answered(self, more: int) -> None:
        """Wait until so many more were answered."""
        before = self._count()
        until(lambda: self._count() >= before + more, 60, f"{more} more answers")

    def _count(self) -> int:
        file = self.flag.with_name(f"{self.flag.name}.count")
        return int((file.read_text() if file.exists() else "") or 0)

    def result(self) -> dict[str, Any]:
        """Stop, and what came of it."""
        assert self._process is not None
        self.flag.touch()
        out, _ = self._process.communicate(timeout=90)
        return dict(json.loads(out))
