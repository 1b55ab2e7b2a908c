"""State files: atomic, and never believed when nobody keeps them true."""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mdeploy.errors import ConfigError, UsageError
from mdeploy.paths import Paths
from mdeploy.specs import Probe, ServiceRecord, ServiceSpec
from mdeploy.supervise import processes, state
from mdeploy.supervise.state import ServiceFiles
from tests.support import processes_with, until

SPEC = ServiceSpec("s", "llm", ("/bin/true",), {}, "/", "127.0.0.1", 8000, Probe("/health", "/v1", {"a": 1}), "m")


def _record(**changes: object) -> ServiceRecord:
    base = ServiceRecord("s", "run", 1, 1.0, processes.boot_id(), "detached", "ready", 100.0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> ServiceFiles:
    made = ServiceFiles(Paths(tmp_path / "h"), "s")
    made.write_spec(SPEC)
    return made


def test_what_is_written_is_read(files: ServiceFiles) -> None:
    files.write_record(_record())
    assert (files.spec(), files.record()) == (SPEC, _record())
    assert files.directory.stat().st_mode & 0o777 == 0o700


def test_a_record_without_a_supervisor_is_not_believed(files: ServiceFiles) -> None:
    files.write_record(_record())
    now = state.status(files)
    assert (now.phase, now.pid, now.error) == ("failed", None, "its supervisor was killed")
    with files.locked():
        assert state.status(files).phase == "ready"


def test_a_reboot_is_noticed(files: ServiceFiles) -> None:
    files.write_record(_record(boot_id="another"))
    assert state.status(files).error == "the machine was restarted"


def test_a_stopped_service_stays_stopped(files: ServiceFiles) -> None:
    files.write_record(_record(phase="stopped", boot_id="another"))
    assert (state.status(files).phase, state.status(files).error) == ("stopped", None)


def test_damaged_files_are_told_of(files: ServiceFiles) -> None:
    (files.directory / "state.json").write_text("{")
    assert state.status(files).phase == "stopped"
    (files.directory / "spec.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"spec\.json"):
        files.spec()


def test_a_full_disk_keeps_the_old_state(files: ServiceFiles) -> None:
    files.write_record(_record())
    code = (
        "import sys; from pathlib import Path\n"
        "from mdeploy.errors import ConfigError; from mdeploy.supervise import state\n"
        "try: state.write_atomically(Path(sys.argv[1]), b'x' * 100000)\n"
        "except ConfigError as error: print(error.message)"
    )

    def no_room() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    path = files.directory / "state.json"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=no_room, check=True
    )
    assert "cannot write" in done.stdout
    assert files.record() == _record()
    assert [p.name for p in files.directory.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", ".x", "a b", "é", "x" * 64, "a\n"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(UsageError):
        state.check_name(name)


def test_a_marked_process_is_found_in_a_session_of_its_own_and_swept() -> None:
    run_id = f"test-{os.getpid()}"
    env = {**os.environ, **processes.marker_environment(run_id)}
    sleeper = "subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=subprocess.DEVNULL)"
    code = f"import subprocess; {sleeper}; print(1, flush=True)"
    subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True)
    assert len(processes.marked(run_id)) == 1
    assert processes.marked(run_id[:-1]) == ()
    assert processes.sweep(run_id) == ()
    assert processes.marked(run_id) == ()


def _is_gone(mark: str) -> bool:
    return processes_with(mark) == []


def test_a_child_is_ended_whenever_its_parent_dies() -> None:
    """The parent handles the signal itself, as a supervisor does: its child must not swallow it before exec."""
    code = (
        "import os, signal, subprocess, sys\n"
        "from mdeploy.supervise import processes\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "arm = processes.die_with_parent()\n"
        "def dying():\n"
        "    if sys.argv[1] == 'before': os.kill(os.getppid(), signal.SIGKILL); os.read(gone, 1)\n"
        "    arm()\n"
        "    if sys.argv[1] == 'after': os.kill(os.getppid(), signal.SIGKILL); signal.pause()\n"
        "gone, held = os.pipe()\n"
        "os.set_inheritable(gone, False)\n"
        "subprocess.Popen(['sleep', '1000'], preexec_fn=lambda: (os.close(held), dying()))\n"
    )
    for moment in ("before", "after"):
        env = {**os.environ, "MDEPLOY_TEST_CHILD": f"{os.getpid()}-{moment}"}
        subprocess.run([sys.executable, "-c", code, moment], env=env, check=False)
        mark = f"MDEPLOY_TEST_CHILD={env['MDEPLOY_TEST_CHILD']}"
        until(functools.partial(_is_gone, mark), 10)


def test_a_reused_pid_is_another_process() -> None:
    created = processes.created(os.getpid())
    assert created is not None
    assert processes.is_same(os.getpid(), created)
    assert not processes.is_same(os.getpid(), created - 1)
    assert processes.created(2**22 + 1) is None
