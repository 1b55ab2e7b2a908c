"""What each process of a parallel run has of its own, so that tests cannot meet: network, /dev/shm, temporary files.

Many of them take the first free port from 8000, or look for what a service left behind.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000  # unshare(2)
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18  # mount(2)


def isolate() -> None:
    """Leave the machine's network, mounts and temporary directory for own ones, children too. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET))
    _checked(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _checked(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777"))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    own = tempfile.mkdtemp(prefix="t-")  # short: a path of a socket has 107 bytes
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = own


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
