"""Who holds what: a claim is worth as much as the process that made it."""

from __future__ import annotations

import dataclasses
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from mdeploy import reservations
from mdeploy.errors import ConfigError, DoesNotFitError
from mdeploy.paths import Paths
from mdeploy.reservations import Holder, Neighbours
from mdeploy.specs import GpuPlan, Probe, ServiceSpec
from mdeploy.supervise.state import ServiceFiles
from tests.support import free_port

PLAN = GpuPlan("cuda", (0, 1), 2, None, None, None)
SPEC = ServiceSpec(
    "s", "llm", ("/bin/true",), {}, "/", "127.0.0.1", 8000, Probe("/health", "/v1", {"a": 1}), "m", plan=PLAN
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "h")


def _claim_elsewhere(paths: Paths) -> None:
    """Claim in a process that ends at once."""
    code = (
        "import sys, pathlib; from tests.test_reservations import SPEC; from mdeploy import reservations;"
        "from mdeploy.paths import Paths; reservations.claim(Paths(pathlib.Path(sys.argv[1])), SPEC)"
    )
    subprocess.run([sys.executable, "-c", code, str(paths.home)], cwd=Path(__file__).parent.parent, check=True)


def test_a_claim_holds_until_it_is_let_go(paths: Paths) -> None:
    with reservations.starting(paths, SPEC):
        assert reservations.neighbours(paths).gpus == {0: "s (being started)", 1: "s (being started)"}
        assert reservations.neighbours(paths).ports == {8000}
        assert reservations.neighbours(paths, but=["s"]) == Neighbours()
    assert reservations.neighbours(paths) == Neighbours()


def test_a_claim_ends_with_its_process(paths: Paths) -> None:
    _claim_elsewhere(paths)
    assert list((paths.services / ".claims").iterdir())
    assert reservations.neighbours(paths) == Neighbours()


def test_a_claim_of_a_process_that_is_gone_is_not_let_go_by_another(paths: Paths) -> None:
    _claim_elsewhere(paths)
    reservations.release(paths, "s")
    assert list((paths.services / ".claims").iterdir())


def test_damaged_claims_and_specs_claim_nothing(paths: Paths) -> None:
    reservations.claim(paths, SPEC)
    (paths.services / ".claims" / "s").write_text("{")
    paths.service("d").mkdir()
    (paths.service("d") / "spec.json").write_text("{")
    assert reservations.neighbours(paths) == Neighbours()


def test_a_running_service_holds_all_and_a_stopped_one_its_port(paths: Paths) -> None:
    files = ServiceFiles(paths, "s")
    files.write_spec(SPEC)
    assert reservations.neighbours(paths) == Neighbours((Holder("s", "stopped", port=8000),))
    with files.locked():
        assert reservations.neighbours(paths).gpus == {0: "s (running)", 1: "s (running)"}


def test_a_device_that_was_given_away_is_refused_unless_a_user_named_it() -> None:
    other = Holder("o", "running", gpus=(1,))
    with pytest.raises(DoesNotFitError, match=r"GPU 1 belongs to o \(running\) by now"):
        reservations.check(SPEC, Neighbours((other,)))
    named = dataclasses.replace(SPEC, plan=dataclasses.replace(PLAN, named=True))
    reservations.check(named, Neighbours((other,)))
    reservations.check(SPEC, Neighbours((dataclasses.replace(other, named=True),)))
    reservations.check(dataclasses.replace(SPEC, plan=None), Neighbours((other,)))


def test_ports_of_others_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_port()
    monkeypatch.setattr(reservations, "FIRST_PORT", first)
    taken = Neighbours((Holder("o", "stopped", port=first),))
    assert reservations.free_port("127.0.0.1", taken) > first
    everything = Neighbours(tuple(Holder("o", "stopped", port=first + i) for i in range(100)))
    with pytest.raises(ConfigError, match="belong to services"):
        reservations.free_port("127.0.0.1", everything)


def test_the_lock_keeps_two_planners_apart(paths: Paths) -> None:
    with reservations.locked(paths), (paths.services / ".planning").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (paths.services / ".planning").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
