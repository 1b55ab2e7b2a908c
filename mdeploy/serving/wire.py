"""Messages between the edge and a worker: one packet each, large buffers beside them in shared memory.

A packet is a pickle (protocol 5) on a SOCK_SEQPACKET socket: the kernel keeps messages apart and delivers them
whole. What is large goes into an anonymous file (memfd) whose descriptor travels with the packet; the reader maps
it, nothing is copied through the socket, and nothing has a name that could be left behind.
"""

from __future__ import annotations

import array
import mmap
import os
import pickle
import socket
from collections.abc import Sequence
from typing import Any

_PACKET = 48 << 10
"""Bytes of one packet at most; a longer message goes into the shared memory whole."""

_MOST_BUFFERS = 1000
_ANCILLARY = socket.CMSG_SPACE(array.array("i").itemsize)


class ClosedError(Exception):
    """The other side is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours, theirs


def send(sock: socket.socket, message: Any) -> None:
    """Send one message. Raises BlockingIOError where a non-blocking socket is full, ClosedError, OSError."""
    packet, fd = pack(message)
    try:
        post(sock, packet, fd)
    finally:
        if fd is not None:
            os.close(fd)


def pack(message: Any) -> tuple[bytes, int | None]:
    """A message as a packet and, where something is large, the shared memory (a descriptor) that goes with it."""
    buffers: list[memoryview] = []

    def beside(buffer: pickle.PickleBuffer) -> bool:
        """Tell pickle (by False) that a buffer is taken care of."""
        if len(buffers) >= _MOST_BUFFERS:
            return True
        buffers.append(buffer.raw())
        return False

    body = pickle.dumps(message, protocol=5, buffer_callback=beside)
    if len(body) <= _PACKET and not buffers:
        return b"\0" + body, None
    parts = [memoryview(body), *buffers]
    sizes = tuple(part.nbytes for part in parts)
    return b"\1" + pickle.dumps(sizes, protocol=5), _share(parts, sum(sizes))


def _share(parts: Sequence[memoryview], size: int) -> int:
    fd = os.memfd_create("mdeploy", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        offset = 0
        for part in parts:
            offset = _write(fd, part, offset)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(fd: int, part: memoryview, offset: int) -> int:
    """Write all of a buffer; returns where the next one starts."""
    while part.nbytes:
        written = os.pwrite(fd, part, offset)
        part, offset = part[written:], offset + written
    return offset


def post(sock: socket.socket, packet: bytes, fd: int | None) -> None:
    """Put a packet on the socket. Raises as `send`; the descriptor stays the caller's."""
    ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    try:
        sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ClosedError from error


def receive(sock: socket.socket) -> Any:
    """The next message; its large buffers are views of shared memory that lives as long as they do.

    Raises BlockingIOError where a non-blocking socket has none, ClosedError at the end.
    """
    try:
        packet, ancillary, _, _ = sock.recvmsg(_PACKET + 1024, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError as error:
        raise ClosedError from error
    if not packet:
        raise ClosedError
    if packet[0] == 0:
        return pickle.loads(memoryview(packet)[1:])
    (fd,) = array.array("i", ancillary[0][2])
    return _mapped(pickle.loads(memoryview(packet)[1:]), fd)


def _mapped(sizes: Sequence[int], fd: int) -> Any:
    try:
        memory = memoryview(mmap.mmap(fd, sum(sizes), mmap.MAP_SHARED | mmap.MAP_POPULATE))
    finally:
        os.close(fd)
    parts, offset = [], 0
    for size in sizes:
        parts.append(memory[offset : offset + size])
        offset += size
    return pickle.loads(parts[0], buffers=parts[1:])
