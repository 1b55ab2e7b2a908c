"""What this machine has that units depend on, looked up once; everything after works on the answer."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BOOTED = Path("/run/systemd/system")  # sd_booted(3)
_GPUS = Path("/proc/driver/nvidia/gpus")
_ADMIN_PATHS = f"{os.defpath}:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Host:
    """`booted` tells whether systemd is the init; `version` is 0 where there is no systemd at all.

    `gpu_minors` are the numbers of /dev/nvidiaN, `device_groups` own GPU nodes that only they may open.
    """

    booted: bool
    version: int
    nvidia_modprobe: str | None = None
    gpu_minors: tuple[int, ...] = ()
    device_groups: tuple[str, ...] = ()


def look() -> Host:
    """The machine as it is now."""
    return Host(
        booted=_BOOTED.is_dir(),
        version=_version(),
        nvidia_modprobe=shutil.which("nvidia-modprobe", path=_ADMIN_PATHS),
        gpu_minors=tuple(sorted(_minors())),
        device_groups=tuple(sorted(set(_groups()))),
    )


def _version() -> int:
    """`systemd 252 (252.38-1~deb12u1)` is 252; a release candidate counts as its release."""
    try:
        said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    found = re.match(r"systemd (\d+)", said)
    return int(found[1]) if found else 0


def _minors() -> Iterator[int]:
    for path in _GPUS.glob("*/information"):
        found = re.search(r"Device Minor:\s*(\d+)", path.read_text())
        if found:
            yield int(found[1])


def _groups() -> Iterator[str]:
    for node in Path("/dev").glob("nvidia*"):
        seen = node.stat()
        if (
            stat.S_ISCHR(seen.st_mode)
            and not seen.st_mode & stat.S_IWOTH
            and seen.st_mode & stat.S_IWGRP
            and seen.st_gid
        ):
            with contextlib.suppress(KeyError):  # systemd takes no group without a name
                yield grp.getgrgid(seen.st_gid).gr_name
