"""A stand-in for nvidia-smi: three GPUs, the first one nearly full. FAKE_SMI_FAILS breaks its driver."""

from __future__ import annotations

from pathlib import Path

_SCRIPT = """#!/bin/sh
[ -z "$FAKE_SMI_FAILS" ] || { echo "NVIDIA-SMI has failed because it couldn't communicate with the driver"; exit 9; }
echo "0, GPU-aaa, NVIDIA H200, 143771, 1000"
echo "1, GPU-bbb, NVIDIA H200, 143771, 143000"
echo "2, GPU-ccc, NVIDIA H200, 143771, 140000"
"""


def make(directory: Path) -> Path:
    """Write the command; returns the directory that belongs on PATH."""
    directory.mkdir(parents=True)
    command = directory / "nvidia-smi"
    command.write_text(_SCRIPT)
    command.chmod(0o755)
    return directory
