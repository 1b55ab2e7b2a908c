"""The text of our units, and what systemd itself says of it.

`python -m tests.systemd.test_units` writes the golden files anew.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mdeploy.errors import ConfigError
from mdeploy.specs import GpuPlan, Limits, Probe, ServiceSpec
from mdeploy.systemd import gate, units
from mdeploy.systemd.transaction import Step
from mdeploy.systemd.units import Program, Resident, Target, UnitFile
from tests.support import REPO

GOLDEN = REPO / "tests/golden/systemd"
NASTY = """/data/two words/$HOME/%i/"q"/it's/a\\b/模型"""

CPU = ServiceSpec(
    name="chat.v1-a",
    kind="llm",
    argv=("/opt/engines/vllm/bin/python", "-m", "vllm", "serve", "/srv/models/m"),
    env={},
    cwd="/var/lib/mdeploy/services/chat.v1-a",
    host="127.0.0.1",
    port=8000,
    probe=Probe("/health", "/v1/completions", {}),
    model="m",
)
GPU = dataclasses.replace(
    CPU,
    name="big",
    plan=GpuPlan("cuda", (0, 1), 2, 0.9, None, None),
    secrets={"VLLM_API_KEY": "/var/lib/mdeploy/secrets/big.api-key"},
    limits=Limits(stop_timeout_s=120),
    restart="never",
    reloads=True,
    depends_on=("embed", "chat.v1-a"),
)
ODD = dataclasses.replace(CPU, name="odd", secrets={"K": f"{NASTY}/secrets/odd.api-key"})

SYSTEM = Target("system", units.SYSTEM_UNITS, 252)
USER = Target("user", Path("/home/alice/.config/systemd/user"), 252)
PROGRAM = Program("/opt/mdeploy/bin/python", ("/opt/mdeploy",))


def _render(target: Target, program: Program, resident: Resident) -> tuple[UnitFile, ...]:
    gpu = [units.gpu_unit(target, "/usr/bin/nvidia-modprobe", (0, 1))] if resident.on_gpus else []
    machine = [units.sysusers(), units.tmpfiles(), *gpu] if target.scope == "system" else []
    return (*machine, units.template(target), units.dropin(target, program, resident))


CASES = {
    "cpu": _render(SYSTEM, PROGRAM, Resident(CPU, "/var/lib/mdeploy", mounts=("/srv/models/m",))),
    "gpu": _render(
        dataclasses.replace(SYSTEM, version=254),
        PROGRAM,
        Resident(GPU, "/var/lib/mdeploy", "alice", mounts=("/srv/models/m",), groups=("video",)),
    ),
    "nasty": _render(
        SYSTEM,
        Program(f"{NASTY}/bin/python"),
        Resident(ODD, NASTY, binds=(f"/home/bob{NASTY}", "/root/.pyenv"), mounts=(f"{NASTY}/models",)),
    ),
    "user": _render(USER, PROGRAM, Resident(GPU, "/home/alice/.local/state/mdeploy", "alice")),
}


def _text(files: Sequence[UnitFile]) -> str:
    return "\n".join(f"### {file.path} {file.mode:04o}\n{file.content}" for file in files)


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_the_golden_one(case: str) -> None:
    assert _text(CASES[case]) == (GOLDEN / f"{case}.txt").read_text()


def test_newer_keys_only_where_systemd_knows_them() -> None:
    old = _text(_render(dataclasses.replace(SYSTEM, version=245), PROGRAM, Resident(CPU, "/var/lib/mdeploy")))
    assert "ProtectProc" not in old
    assert "ProtectProc=invisible\n" in _text(CASES["cpu"])
    assert "RestartSteps" not in _text(CASES["cpu"])
    assert "RestartSteps=4\nRestartMaxDelaySec=2min\n" in _text(CASES["gpu"])


def test_each_service_keeps_the_mdeploy_that_installed_it() -> None:
    """A machine may have several: the last one to install must not run the services of all, nor take them along."""
    other = _render(SYSTEM, Program("/opt/other/bin/python"), Resident(CPU, "/srv/other"))
    assert other[-2] == CASES["cpu"][-2]
    assert "\nExecStart=\nExecStart=/opt/other/bin/python -m mdeploy run %i" in other[-1].content


def test_only_the_user_made_for_services_is_cleared_of_shared_memory() -> None:
    assert "\nRemoveIPC=yes\n" in CASES["cpu"][-2].content
    assert "RemoveIPC" not in CASES["cpu"][-1].content
    assert "\nRemoveIPC=no\n" in CASES["gpu"][-1].content


def test_a_reload_reads_keys_again_where_they_are_not_copies() -> None:
    assert "ExecReload" not in _text(CASES["gpu"])
    assert "ExecReload=/bin/kill -HUP $MAINPID\n" in _text(CASES["user"])


# what systemd says


def _real(case: str, program: str) -> tuple[UnitFile, ...]:
    """The files of a case with a program that exists: systemd looks."""
    target = dataclasses.replace(USER if case == "user" else SYSTEM, version=_version())
    specs = {"cpu": CPU, "gpu": GPU, "nasty": ODD, "user": GPU}
    home, user = NASTY if case == "nasty" else "/var/lib/mdeploy", "alice" if case == "gpu" else units.DEFAULT_USER
    resident = Resident(specs[case], home, user, binds=("/root/.x",))
    files = _render(target, Program(program), resident)
    return tuple(
        dataclasses.replace(f, content=f.content.replace("/usr/bin/nvidia-modprobe", "/bin/true")) for f in files
    )


def _version() -> int:
    return int(subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1])


def _take(step: Step | None) -> None:
    assert step is not None
    assert step.take() is None


def _unit(files: Sequence[UnitFile]) -> str:
    return next(Path(file.path).parent.name for file in files if file.path.endswith(".conf") and ".d/50" in file.path)[
        :-2
    ]


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


@needs_systemd
@pytest.mark.parametrize("case", CASES)
def test_systemd_has_nothing_to_say_against_them(case: str, tmp_path: Path) -> None:
    program = tmp_path / NASTY.strip("/") / "python" if case == "nasty" else Path(sys.executable)
    if case == "nasty":
        program.parent.mkdir(parents=True)
        program.symlink_to(sys.executable)
    files = _real(case, str(program))
    target = USER if case == "user" else SYSTEM
    _take(gate.verify(dataclasses.replace(target, version=_version()), files, _unit(files)))


@needs_systemd
@pytest.mark.parametrize("case", ["cpu", "gpu", "nasty"])
def test_the_exposure_is_what_we_promise(case: str) -> None:
    files = _real(case, sys.executable)
    score = gate.exposure(SYSTEM, files, _unit(files))
    print(f"exposure of {case}: {score}")
    assert score <= gate.HIGHEST_EXPOSURE
    _take(gate.security(dataclasses.replace(SYSTEM, version=_version()), files, _unit(files)))


@needs_systemd
def test_a_key_systemd_does_not_know_is_an_error() -> None:
    files = _real("cpu", sys.executable)
    worse = [dataclasses.replace(f, content=f.content.replace("[Service]", "[Service]\nRestartStepz=4")) for f in files]
    with pytest.raises(ConfigError, match=r"Unknown key.*RestartStepz"):
        _take(gate.verify(dataclasses.replace(SYSTEM, version=_version()), worse, _unit(files)))


@needs_systemd
def test_a_weaker_sandbox_does_not_pass() -> None:
    files = _real("cpu", sys.executable)
    worse = [
        dataclasses.replace(f, content=f.content.replace("ProtectSystem=strict", "ProtectSystem=no")) for f in files
    ]
    with pytest.raises(ConfigError, match="exposure"):
        _take(gate.security(dataclasses.replace(SYSTEM, version=_version()), worse, _unit(files)))


# the way back


@pytest.mark.parametrize("case", CASES)
def test_a_dropin_tells_what_it_is_for(case: str, tmp_path: Path) -> None:
    file = CASES[case][-1]
    path = tmp_path / Path(file.path).parent.name / units.DROPIN
    path.parent.mkdir()
    path.write_text(file.content)
    found = units.read_dropin(path)
    assert found is not None
    assert units.unit_name(found.service) == _unit(CASES[case])
    assert found.home == {"nasty": NASTY, "user": "/home/alice/.local/state/mdeploy"}.get(case, "/var/lib/mdeploy")
    assert found.credentials == {"gpu": {"big.api-key"}, "nasty": {"odd.api-key"}}.get(case, set())


def test_somebody_elses_dropin_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "mdeploy@x.service.d" / units.DROPIN
    path.parent.mkdir()
    for text in ("", "[Service]\nService={}\n", 'Service={"home": 1}', "Service={"):
        path.write_text(text)
        assert units.read_dropin(path) is None


if __name__ == "__main__":
    for name, files in CASES.items():
        (GOLDEN / f"{name}.txt").write_text(_text(files))
