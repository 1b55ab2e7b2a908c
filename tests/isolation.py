"""A network and a /dev/shm of its own for each process of a parallel run, so that tests cannot meet each other there.

Many of them take the first free port from 8000, or look for what a service left in /dev/shm.
"""

from __future__ import annotations

import ctypes
import os
import subprocess

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000  # unshare(2)
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18  # mount(2)


def isolate() -> None:
    """Leave the machine's network and mounts for namespaces of this process and its children. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET))
    _checked(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _checked(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777"))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
