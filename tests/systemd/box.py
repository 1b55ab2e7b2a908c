"""A booted `scripts/systemd-box`: a real systemd to install units into, to crash and to reboot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import REPO, Result, until

SCRIPT = REPO / "scripts/systemd-box"
HOME = "/var/lib/mdeploy"
ENGINE, MODEL = "/opt/fake-vllm", "/srv/models/org/tiny"

# Units wait ten seconds before they start again; here a fraction of one.
_SCALED_DOWN = "[Service]\nRestartSec=200ms\n"

_PREPARE = f"""
import pathlib
from tests.fakes import vllm_env
from tests.support import tiny_model
vllm_env.make(pathlib.Path({ENGINE!r}))
tiny_model(pathlib.Path({MODEL!r}))
"""


class Box:
    """Commands in a booted system; all of it is gone when the process that booted it is."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._process = subprocess.Popen(
            [SCRIPT, "boot", state, "--ro", REPO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ready()

    def _ready(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the box did not boot"

    def command(self, *words: str | Path, **env: str) -> list[str]:
        """What runs a command in the box from outside."""
        variables = [f"{name}={value}" for name, value in env.items()]
        return [str(word) for word in (SCRIPT, "exec", self._state, "env", *variables, *words)]

    def run(self, *words: str | Path, timeout: float = 60, **env: str) -> Result:
        """Run a command as root, with nothing in its environment but the usual and `env`."""
        command = self.command(*words, **env)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str | Path, **env: str) -> str:
        """Run a command that must succeed; returns what it printed."""
        result = self.run(*words, timeout=60, **env)
        assert result.code == 0, f"{words}: {result.stdout}{result.stderr}"
        return result.stdout

    def mdeploy(self, *words: str | Path, user: str | None = None, timeout: float = 60, **env: str) -> Result:
        """Run our command line, as root or as another user."""
        command = (sys.executable, "-m", "mdeploy", *words)
        if user is None:
            return self.run(*command, timeout=timeout, **env)
        # env in between: setpriv itself still has root's rights when it looks for a program
        become = ("setpriv", "--reuid", user, "--regid", user, "--init-groups", "env")
        with self.open_root():
            return self.run(*become, *command, timeout=timeout, **{"HOME": f"/home/{user}", **env})

    def python(self, code: str, *words: str) -> str:
        """Run Python as root in the box; modules of the tests can be imported."""
        return self.ok(sys.executable, "-c", code, *words, PYTHONPATH=str(REPO))

    def prepare(self) -> None:
        """Stand-in engine, tiny model, two users, short pauses; nothing of what this machine has installed for root."""
        self.ok("rm", "-rf", HOME)
        self.python(_PREPARE)
        for user in ("alice", "bob"):
            self.ok("useradd", "--create-home", user)
        self.write("/etc/systemd/system/mdeploy@.service.d/90-test.conf", _SCALED_DOWN)
        result = self.mdeploy("engines", "install", "vllm", "--python", f"{ENGINE}/bin/python")
        assert result.code == 0, result.stderr

    def write(self, path: str, text: str) -> None:
        """Write a file and have systemd read it where it is one of its own."""
        self.python(_WRITE, path, text)
        if "/systemd/" in path:
            self.ok("systemctl", "daemon-reload")

    def install(self, name: str, **entry: Any) -> dict[str, Any]:
        """A service with the stand-in engine, as a unit that is ready; `entry` is as in mdeploy.yaml."""
        result = self.mdeploy("install-systemd", "--file", self.file(**{name: entry}), "--json")
        assert result.code == 0, result.stdout + result.stderr
        return dict(result.json["services"][0])

    def file(self, **services: dict[str, Any]) -> str:
        """An mdeploy.yaml with these services; the tiny model is the default one."""
        entries = {name: {"kind": "llm", "model": MODEL, **entry} for name, entry in services.items()}
        self.write("/srv/mdeploy.yaml", json.dumps({"version": 1, "services": entries}))
        return "/srv/mdeploy.yaml"

    def engine_env(self, name: str, **env: str) -> None:
        """Set variables of a unit, which its engine inherits: the stand-in's modes."""
        if env:
            lines = [f"Environment={variable}={value}" for variable, value in env.items()]
            self.override(name, *lines)

    def override(self, name: str, *lines: str) -> None:
        """Settings of one unit that win over ours."""
        path = f"/etc/systemd/system/mdeploy@{name}.service.d/60-test.conf"
        self.write(path, "\n".join(["[Service]", *lines]) + "\n")

    def ps(self, name: str, **how: Any) -> dict[str, Any] | None:
        """One service as `ps --json` shows it."""
        services = self.mdeploy("ps", "--json", **how).json["services"]
        return next((s for s in services if s["name"] == name), None)

    def state(self, name: str, home: str = HOME) -> dict[str, Any]:
        """The record of a service, as it is on the disk."""
        return dict(json.loads(self.ok("cat", f"{home}/services/{name}/state.json")))

    def ready(self, name: str, after: str = "", seconds: float = 30) -> dict[str, Any]:
        """Wait until a run other than `after` is ready, and systemd knows; returns its record."""

        def look() -> dict[str, Any] | None:
            result = self.run("cat", f"{HOME}/services/{name}/state.json")
            record = dict(json.loads(result.stdout)) if result.code == 0 else {}
            is_new = record.get("run_id") not in (None, after) and record["phase"] == "ready"
            return record if is_new and self.shows(name, "ActiveState") == "active" else None

        return dict(until(look, seconds, f"{name} is ready"))

    def shows(self, name: str, key: str) -> str:
        """One property of a unit."""
        return self.ok("systemctl", "show", "--value", "--property", key, f"mdeploy@{name}").strip()

    def processes(self, run_id: str) -> list[int]:
        """Pids of a run, found by its marker; in the box's own numbers."""
        listing = self.run("grep", "-lsa", f"MDEPLOY_RUN_ID={run_id}", "-r", "/proc", "--include=environ")
        return sorted({int(p.split("/")[2]) for p in listing.stdout.split() if p.split("/")[2].isdigit()})

    def ask(self, port: int, key: str = "", model: str = "tiny") -> int:
        """The status of one real request, made inside."""
        return int(self.python(_REQUEST, str(port), key, model))

    @contextmanager
    def open_root(self) -> Iterator[None]:
        """Let ordinary users reach an interpreter that lies in root's home, as developers' do."""
        mode = self.ok("stat", "--format=%a", "/root").strip()
        self.ok("chmod", "755", "/root")
        try:
            yield
        finally:
            self.ok("chmod", mode, "/root")

    def reboot(self) -> None:
        """An orderly reboot: services are stopped, memory is lost, the disk is kept."""
        self.run("systemctl", "reboot")
        self._ready()

    def cut_power(self) -> None:
        """A reboot nobody had time to prepare for."""
        self._process.send_signal(signal.SIGUSR1)
        self._ready()

    def clean(self) -> None:
        """Take out whatever was installed, served or written for units since the box was prepared."""
        traces = {
            f"{HOME}/services/*/spec.json": ("stop", "--all"),
            "/etc/systemd/system/mdeploy@*.d/50-*": ("uninstall-systemd", "--all"),
        }
        for trace, command in traces.items():
            if self.run("sh", "-c", f"ls {trace}").code == 0:
                result = self.mdeploy(*command)
                assert result.code == 0, result.stderr
        self.ok("sh", "-c", f"rm -rf {HOME}/services {HOME}/secrets /etc/systemd/system/mdeploy@?*.service.d")
        self.ok("systemctl", "daemon-reload")

    def close(self) -> None:
        """Power off for good."""
        self._process.communicate(timeout=30)


_WRITE = """
import pathlib, sys
path = pathlib.Path(sys.argv[1])
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(sys.argv[2])
"""

_REQUEST = """
import json, sys, urllib.error, urllib.request
url = f"http://127.0.0.1:{sys.argv[1]}/v1/completions"
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + sys.argv[2]}
body = json.dumps({"model": sys.argv[3], "prompt": "Hi", "max_tokens": 1}).encode()
try:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as answer:
        assert json.load(answer)["choices"]
        print(answer.status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


@contextmanager
def booted(state: Path) -> Iterator[Box]:
    """A prepared box, powered off at the end."""
    assert os.geteuid() == 0
    box = Box(state)
    try:
        box.prepare()
        yield box
    finally:
        box.close()
