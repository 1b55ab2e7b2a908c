from __future__ import annotations

import json
import subprocess

import pytest

from tests.support import REPO

pytestmark = pytest.mark.alone


def test_the_script_loads_and_breaks_a_service_of_ours() -> None:
    """A short run without peers; what is fast enough is for the script's reader."""
    command = [str(REPO / "scripts/bench/serving"), "--systems", "mdeploy", "--measures", "echo", "open", "crash"]
    command += ["--rounds", "1", "--seconds", "1", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["echo"]["mdeploy"]["rps"] > 0
    assert result["open"]["mdeploy"]["1_failed"] == {}
    crash = result["crash"]["mdeploy"]
    assert (crash["kills_survived"], crash["failed"], crash["wrong"]) == ("1/1", 0, 0)
