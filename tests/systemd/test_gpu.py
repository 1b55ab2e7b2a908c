"""A service on GPUs: its device policy, the nodes it may open, and the unit that makes them at boot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.box import MODEL, Box

_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0")
_MODPROBE = "/usr/sbin/nvidia-modprobe"

_CUDA = """
import pathlib
from tests.fakes import nvidia_smi, vllm_env
vllm_env.make(pathlib.Path("/opt/fake-cuda"), "0.32.0")
nvidia_smi.make(pathlib.Path("/opt/fake-driver"))
pathlib.Path("/usr/local/bin/nvidia-smi").symlink_to("/opt/fake-driver/nvidia-smi")
"""


@pytest.fixture
def gpus(box: Box) -> Iterator[Box]:
    """Stand-ins for the driver: nvidia-smi, and device nodes that lead nowhere."""
    box.python(_CUDA)
    for node in _NODES:
        box.ok("mknod", "-m", "600", node, "c", "1", "3")
    adopted = box.mdeploy("engines", "install", "vllm", "--python", "/opt/fake-cuda/bin/python")
    assert adopted.code == 0, adopted.stderr
    yield box
    box.clean()
    box.ok("rm", "-rf", *_NODES, _MODPROBE, "/usr/local/bin/nvidia-smi", "/opt/fake-cuda", "/opt/fake-driver")
    assert box.mdeploy("engines", "rm", adopted.stdout.split()[0]).code == 0


def test_nodes_that_are_closed_or_missing_are_found(gpus: Box) -> None:
    gpus.ok("rm", "/dev/nvidia-uvm")
    result = gpus.mdeploy("install-systemd", "--file", gpus.file(s={"gpus": [1]}))
    assert result.code == 78
    assert "s: /dev/nvidia-uvm do not exist" in result.stderr
    assert "install nvidia-modprobe" in result.stderr
    assert "s: mdeploy may not open /dev/nvidiactl" in result.stderr
    assert "fix: chmod a+rw /dev/nvidiactl" in result.stderr


def test_a_service_on_a_gpu(gpus: Box) -> None:
    gpus.write(_MODPROBE, '#!/bin/sh\necho "$@" >>/run/modprobed\n')
    gpus.ok("chmod", "755", _MODPROBE)
    gpus.ok("groupadd", "--force", "gpu-users")
    for node in _NODES:
        gpus.ok("chgrp", "gpu-users", node)
        gpus.ok("chmod", "660", node)
    service = gpus.install("s", gpus=[1])
    unit = gpus.ok("systemctl", "cat", "mdeploy@s")
    assert "DevicePolicy=closed\n" in unit
    assert "DeviceAllow=char-nvidia* rw\n" in unit
    assert "SupplementaryGroups=gpu-users\n" in unit
    assert gpus.ok("cat", "/run/modprobed") == "-u -c 0\n"
    assert gpus.ok("systemctl", "is-active", "mdeploy-gpu").strip() == "active"
    environ = gpus.ok("cat", f"/proc/{gpus.state('s')['engine_pid']}/environ").split("\0")
    assert "CUDA_VISIBLE_DEVICES=1" in environ
    assert service["phase"] == "ready"
    assert gpus.mdeploy("uninstall-systemd", "s").code == 0
    assert gpus.run("ls", "/etc/systemd/system/mdeploy-gpu.service").code != 0


def test_a_service_on_the_cpu_gets_no_device(box: Box) -> None:
    result = box.mdeploy("install-systemd", "--dry-run", "--file", box.file(s={"model": MODEL}))
    assert "DevicePolicy=closed\n" in result.stdout
    assert "DeviceAllow" not in result.stdout
    assert "mdeploy-gpu.service (" not in result.stdout
