"""When things happened: kernel receive times, a watch for clock steps, a timer finer than a millisecond.

The kernel stamps a segment when it arrives, so a busy reader cannot make the server look slow.
Its stamps are CLOCK_REALTIME; send times are taken from the same clock just before `send`, and
`StepWatch` tells whether that clock was moved meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time

# asm-generic/socket.h: SO_TIMESTAMPNS_OLD, also the type of its control message (a struct timespec)
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@ll")
_CONTROL_BYTES = socket.CMSG_SPACE(_TIMESPEC.size)
_SECOND = 1_000_000_000
_TFD_TIMER_ABSTIME = 1


def stamp_receives(sock: socket.socket) -> bool:
    """Ask the kernel to stamp what arrives; False where it cannot."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True


def receive(sock: socket.socket, size: int) -> tuple[bytes, int]:
    """Read once: the data, and the arrival of its last segment in Unix ns, 0 where the kernel gave none.

    When segments merged before the read only the last one's stamp survives.
    Raises BlockingIOError when there is nothing, OSError when the connection broke.
    """
    data, control, _, _ = sock.recvmsg(size, _CONTROL_BYTES)
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(payload) == _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack(payload)
            return data, seconds * _SECOND + nanoseconds
    return data, 0


class StepWatch:
    """Notices that CLOCK_REALTIME was set while we measured with it."""

    def __init__(self) -> None:
        self._offset = _offset_ns()
        self.worst_ns = 0

    def check(self) -> None:
        """Compare with the last look; NTP's slew (500 ppm at most) stays far below a millisecond a tick."""
        offset = _offset_ns()
        self.worst_ns = max(self.worst_ns, abs(offset - self._offset))
        self._offset = offset


def _offset_ns() -> int:
    """REALTIME minus MONOTONIC, from the tightest of a few brackets: a preempted look would lie."""
    width, offset = 1 << 62, 0
    for _ in range(5):
        before = time.monotonic_ns()
        real = time.time_ns()
        after = time.monotonic_ns()
        if after - before < width:
            width, offset = after - before, real - (before + after) // 2
        if width < 20_000:
            break
    return offset


class Timer:
    """A timerfd on CLOCK_REALTIME: `epoll.poll` rounds its timeout to milliseconds, this does not.

    Python has os.timerfd_create only from 3.13 on, hence the C library.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        self.fd = int(self._libc.timerfd_create(time.CLOCK_REALTIME, flags))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._spec = (ctypes.c_long * 4)()
        self._armed = 0

    def arm(self, at_ns: int) -> None:
        """Make `fd` readable at `at_ns` (Unix ns), at once when that has passed."""
        if at_ns == self._armed:
            return
        self._armed = at_ns
        self._spec[2], self._spec[3] = divmod(at_ns, _SECOND)
        if self._libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def clear(self) -> None:
        """Take note of an expiry, so that `fd` is quiet until armed again."""
        self._armed = 0
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)
