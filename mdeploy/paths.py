"""Where mdeploy keeps its own things. Models are not here: they stay in the ModelScope cache.

HOME/                        $MDEPLOY_HOME
├── config.yaml              optional settings
├── services/
│   ├── .planning .applying  locks: one plans GPUs and ports, one applies a file at a time
│   ├── .claims/NAME         the GPUs and port of a service that is about to start
│   └── NAME/                one directory a service, 0700; under a unit root:GROUP 1775
│       ├── spec.json        what to run (ServiceSpec)
│       ├── state.json       what runs (ServiceRecord), replaced atomically
│       ├── lock             held by the supervisor for as long as it lives
│       ├── shm.json         shared memory of the run, to be cleared after it
│       ├── forbidden        the supervisor that was killed and must not be succeeded
│       ├── log, log.1 …     output of the engine, rotated by size
│       ├── supervisor.log   what a detached supervisor itself has to say
│       └── revisions/       what was applied, one JSON file each, 0700
├── secrets/NAME.api-key     0600, one key a line, the first is the one in use
├── engines/NAME/            one environment an engine; engine.json is written last
└── bench/                   results
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mdeploy.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Paths:
    """The disk tree under one home directory."""

    home: Path

    @property
    def config(self) -> Path:
        """Settings file of this home."""
        return self.home / "config.yaml"

    @property
    def services(self) -> Path:
        """Parent of all service directories."""
        return self.home / "services"

    @property
    def secrets(self) -> Path:
        """Private values, one a file."""
        return self.home / "secrets"

    @property
    def engines(self) -> Path:
        """Parent of all engine environments."""
        return self.home / "engines"

    def service(self, name: str) -> Path:
        """Directory of one service."""
        return self.services / name


def expand(path: str | Path, base: Path | None = None) -> Path:
    """An absolute path with a leading ~ resolved; a relative one starts at `base`, else where we are.

    Raises ConfigError for a user that does not exist.
    """
    try:
        full = Path(path).expanduser()
        return (base / full if base else full).absolute()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such user", hint="write the path out") from error


def default_home(env: Mapping[str, str]) -> Path:
    """Root's state belongs to the machine, everybody else's to the user (XDG base directories)."""
    if os.geteuid() == 0:
        return Path("/var/lib/mdeploy")
    state = env.get("XDG_STATE_HOME") or str(expand(env.get("HOME", "~")) / ".local" / "state")
    return Path(state) / "mdeploy"
