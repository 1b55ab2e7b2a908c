"""What systemd itself says of our unit files, asked before one of them is where systemd reads it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from mdeploy.errors import ConfigError
from mdeploy.systemd.transaction import Step, Undo
from mdeploy.systemd.units import Target, UnitFile

HIGHEST_EXPOSURE = 2.0
"""On systemd-analyze's scale from 0 (safe) to 10; a unit without a sandbox has 9.6."""

_OFFLINE_SINCE = 250


def verify(target: Target, files: Sequence[UnitFile], unit: str) -> Step:
    """`systemd-analyze verify`. It exits with 0 over keys it does not know, so any line it prints is an error."""
    scope = ["--user"] if target.scope == "user" else []
    only = ["--recursive-errors=no"] if target.version >= _OFFLINE_SINCE else []

    def take() -> Undo | None:
        said = _ask(["verify", "--man=no", *scope, *only], target, files, unit)
        complaints = "; ".join(dict.fromkeys(line.strip() for line in said.stderr.splitlines() if line.strip()))
        if complaints or said.returncode != 0:
            raise ConfigError(f"systemd does not take the unit of {unit}: {complaints or said.stdout}")
        return None

    return Step(" ".join(["systemd-analyze", "verify", *scope, unit]), take)


def security(target: Target, files: Sequence[UnitFile], unit: str) -> Step | None:
    """`systemd-analyze security` must not exceed what we promise; None where this systemd cannot tell."""
    if target.scope == "user" or target.version < _OFFLINE_SINCE:
        return None
    words = ["security", "--offline=true", f"--threshold={HIGHEST_EXPOSURE * 10:.0f}", "--no-pager"]

    def take() -> Undo | None:
        said = _ask(words, target, files, unit)
        if said.returncode != 0:
            raise ConfigError(f"{unit}: {said.stdout.strip().splitlines()[-1:] or said.stderr.strip()}")
        return None

    return Step(" ".join(["systemd-analyze", *words, unit]), take)


def exposure(target: Target, files: Sequence[UnitFile], unit: str) -> float:
    """The exposure of a unit, as `systemd-analyze security` counts it."""
    said = _ask(["security", "--offline=true", "--no-pager"], target, files, unit).stdout
    found = re.search(r"exposure level for \S+: (\d+\.\d+)", said)
    if found is None:
        raise ConfigError(f"systemd-analyze does not judge {unit}: {said.strip()[-200:]}")
    return float(found[1])


def _ask(
    words: Sequence[str], target: Target, files: Sequence[UnitFile], unit: str
) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze over copies of the files; they are found before those that are installed."""
    with tempfile.TemporaryDirectory(prefix="mdeploy-units-") as stage:
        for file in _units(target, files):
            path = Path(stage) / Path(file.path).relative_to(target.directory)
            path.parent.mkdir(exist_ok=True)
            path.write_text(file.content)
        command = ["systemd-analyze", *words, f"{stage}/{unit}"]
        env = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_LOG_LEVEL": "notice"}
        env.setdefault("XDG_RUNTIME_DIR", stage)  # asked for with --user, and not used
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def _units(target: Target, files: Iterable[UnitFile]) -> Iterable[UnitFile]:
    return (file for file in files if Path(file.path).is_relative_to(target.directory))
