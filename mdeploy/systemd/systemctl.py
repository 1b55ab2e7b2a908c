"""Talking to a systemd, the system's or a user's, through its own command: what it says becomes one error."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mdeploy.errors import MdeployError, UnavailableError
from mdeploy.systemd.units import Scope

_REFUSED = ("Access denied", "authentication required", "Permission denied", "not authorized")
_UNREACHABLE = ("Failed to connect to bus", "Host is down", "has not been booted with systemd")


@dataclass(frozen=True, slots=True)
class Shown:
    """What `systemctl show` says of a unit, as far as we need it.

    `main_pid` is that of the running main process, else of the last one. `has_job` tells of a start
    or stop that has not happened yet, because something else comes first.
    """

    active: str
    sub: str
    result: str
    main_pid: int
    exit_status: int
    has_job: bool

    @property
    def is_over(self) -> bool:
        """True where it does not run, and systemd will not start it by itself."""
        return self.active in ("failed", "inactive") and not self.has_job


@dataclass(frozen=True, slots=True)
class Systemctl:
    """The systemd of one scope."""

    scope: Scope

    @property
    def command(self) -> tuple[str, ...]:
        """How a person would call it."""
        return ("systemctl", "--user") if self.scope == "user" else ("systemctl",)

    def environment(self) -> dict[str, str]:
        """A user's systemd is found through XDG_RUNTIME_DIR, which sudo, cron and ssh may leave out."""
        env = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
        if self.scope == "user":
            env.setdefault("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
        return env

    def run(self, *words: str) -> str:
        """Run one verb and return what it printed. Raises MdeployError with systemd's own last line."""
        done = self._call(words)
        if done.returncode != 0:
            raise self._failed(words, done.stderr)
        return done.stdout

    def asks(self, *words: str) -> str:
        """The one word that `is-enabled` and `is-active` print, whatever their exit status says."""
        return self._call(words).stdout.strip()

    def show(self, unit: str) -> Shown:
        """The state of a unit."""
        wanted = "ActiveState,SubState,Result,MainPID,ExecMainPID,ExecMainStatus,Job"
        said = self.run("show", f"--property={wanted}", unit)
        found: Mapping[str, str] = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        pid = int(found.get("MainPID", "0")) or int(found.get("ExecMainPID", "0"))
        status = int(found.get("ExecMainStatus", "0"))
        has_job = found.get("Job", "0") not in ("", "0")
        return Shown(found["ActiveState"], found["SubState"], found.get("Result", ""), pid, status, has_job)

    def _call(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        command = [*self.command, "--no-ask-password", *words]
        try:
            return subprocess.run(  # in a session of its own: a Ctrl-C is ours to act upon
                command,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise UnavailableError("there is no systemctl on this machine", hint="mdeploy serve llm -d") from error

    def _failed(self, words: Sequence[str], said: str) -> MdeployError:
        lines = [line for line in said.strip().splitlines() if line]
        what = f"{' '.join([*self.command, *words])}: {lines[0] if lines else 'it failed'}"
        if any(text in said for text in _REFUSED):
            return MdeployError(what, hint="only root may do that: call mdeploy with sudo")
        if any(text in said for text in _UNREACHABLE) and self.scope == "user":
            return UnavailableError(
                what, hint=f"log in, or have it run always: loginctl enable-linger {_user()} (as root)"
            )
        return MdeployError(what, hint=" ".join([*self.command, "status", *words[1:]]))


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
