"""The unit's own time limits, scaled down: a start that takes long lives through its, a frozen supervisor does not."""

from __future__ import annotations

from tests.support import until
from tests.systemd.box import Box


def test_a_frozen_supervisor_is_replaced_by_the_watchdog(box: Box) -> None:
    box.override("w", "WatchdogSec=3s")
    before = box.install("w", port=8010)
    first = box.state("w")["run_id"]
    box.ok("kill", "-STOP", str(before["pid"]))
    box.ready("w", after=first)
    assert box.ask(8010) == 200
    assert box.processes(first) == []


def test_a_start_longer_than_the_units_limit(box: Box) -> None:
    """TimeoutStartSec is four seconds here and the load takes six: the supervisor asks for more time."""
    box.install("slow", port=8011)
    box.override("slow", "TimeoutStartSec=4s", "Environment=FAKE_VLLM_LOADS=/srv/loads")
    box.ok("systemctl", "stop", "mdeploy@slow")
    box.write("/srv/loads", "")
    box.ok("systemctl", "start", "--no-block", "mdeploy@slow")
    until(lambda: _started_s(box, "slow") > 6.0, 30, "longer than the limit")
    assert box.shows("slow", "ActiveState") == "activating"
    assert (box.ps("slow") or {})["phase"] == "starting"
    box.ok("rm", "/srv/loads")
    box.ready("slow")
    assert box.shows("slow", "NRestarts") == "0"
    assert box.ask(8011) == 200


def _started_s(box: Box, name: str) -> float:
    """Seconds since the main process was started, by the machine's own clock."""
    began = int(box.shows(name, "ExecMainStartTimestampMonotonic") or 0)
    now = float(box.ok("cat", "/proc/uptime").split()[0])
    return now - began / 1e6 if began else 0.0
