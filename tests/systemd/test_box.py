"""The boot script of these tests: it leaves nothing behind, however it ends, and a reboot is one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import until
from tests.systemd.box import SCRIPT, Box

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can boot a systemd in namespaces")


def _left(text: str) -> list[str]:
    """Processes whose command line or mounts mention `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text in (entry / "cmdline").read_text() + (entry / "mounts").read_text():
                    found.append(entry.name)
            except OSError:
                continue
    return found


def test_one_command_and_its_exit_status(tmp_path: Path) -> None:
    words = [str(SCRIPT), "run", "--ro", str(tmp_path), "--", "sh", "-c", "systemctl is-system-running; exit 7"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "running\n"), done.stderr


def test_only_the_directories_of_dead_boxes_are_removed(tmp_path: Path) -> None:
    """A box makes its cgroup an instant before it enters it: until then only its number says that it lives."""
    root = next(path for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")) if path.is_dir())
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    alive, gone = root / f"systemd-box-{os.getpid()}", root / f"systemd-box-{dead.pid}"
    alive.mkdir()
    gone.mkdir()
    try:
        done = subprocess.run([SCRIPT, "run", "--", "true"], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
        assert (done.returncode, alive.is_dir(), gone.is_dir()) == (0, True, False)
        assert list(tmp_path.iterdir()) == []
    finally:
        alive.rmdir()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_box_leaves_no_process_and_no_mount(tmp_path: Path, sig: signal.Signals) -> None:
    state = tmp_path / "state"
    with subprocess.Popen([SCRIPT, "boot", state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as boot:
        assert boot.stdout is not None
        assert boot.stdout.readline() == "ready\n"
        assert len(_left(str(state))) > 2
        boot.send_signal(sig)
        boot.wait(30)
    until(lambda: _left(str(state)) == [], 10, "nothing is left")
    gone = subprocess.run([SCRIPT, "exec", state, "true"], capture_output=True, text=True, check=False)
    assert gone.returncode == 1
    assert "systemd-box: " in gone.stderr


def test_the_end_of_stdin_is_the_end_of_the_box(tmp_path: Path) -> None:
    box = Box(tmp_path / "state")
    assert box.ok("systemctl", "is-system-running") == "running\n"
    box.close()
    assert _left(str(tmp_path / "state")) == []


def test_the_disk_outlasts_a_boot_and_memory_does_not(tmp_path: Path) -> None:
    box = Box(tmp_path / "state")
    for again in (box.reboot, box.cut_power):
        box.write("/var/lib/kept", "x")
        box.write("/run/lost", "x")
        box.ok("touch", "/tmp/lost", "/dev/shm/lost")
        again()
        assert box.ok("cat", "/var/lib/kept") == "x"
        assert [box.run("ls", path).code for path in ("/run/lost", "/tmp/lost", "/dev/shm/lost")] == [2, 2, 2]
    box.run("systemctl", "poweroff")
    box.close()
    assert not Path("/var/lib/kept").exists()
