"""What the tests of `up` share: a file of services to write and change, and how to read what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support import Result, mdeploy


def write(path: Path, **services: str) -> Path:
    """An mdeploy.yaml with these services, each a flow mapping without its braces."""
    lines = [f"  {name}: {{{entry}}}" for name, entry in services.items()]
    path.write_text("\n".join(["version: 1", "services:", *lines, ""]))
    return path


def actions(result: Result) -> dict[str, str]:
    """What `up --json` did with each service."""
    return {one["name"]: one["action"] for one in result.json["services"]}


def up(*args: str, **env: str) -> Result:
    """`up --json` that must succeed."""
    result = mdeploy("up", "--json", *args, **env)  # type: ignore[arg-type]
    assert result.code == 0, result.stderr
    return result


def state(home: Path, name: str) -> dict[str, Any]:
    """The record of a service."""
    return dict(json.loads((home / "services" / name / "state.json").read_text()))


def spec(home: Path, name: str) -> dict[str, Any]:
    """The spec of a service."""
    return dict(json.loads((home / "services" / name / "spec.json").read_text()))
