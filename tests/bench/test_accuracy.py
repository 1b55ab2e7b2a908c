from __future__ import annotations

import json
import subprocess

import pytest

from tests.support import REPO

pytestmark = pytest.mark.alone


def test_the_script_compares_report_and_truth() -> None:
    """A short run; how large the errors are is for the script's reader."""
    command = [str(REPO / "scripts/bench/accuracy"), "--streams", "64", "--repetitions", "1", "--chunks", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cell = json.loads(done.stdout.splitlines()[-1])["64"]
    figures = ("ttft_p50", "ttft_p99", "inter_chunk_p50", "inter_chunk_p99")
    assert all(cell[f"{name}_error_ms"] >= 0 for name in figures)
