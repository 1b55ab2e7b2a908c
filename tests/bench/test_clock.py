from __future__ import annotations

import select
import socket
import time

import pytest

from mdeploy.bench.clock import StepWatch, Timer, receive, stamp_receives
from tests.support import until


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.socket()
        stamp_receives(client)
        client.connect(listener.getsockname())
        return client, listener.accept()[0]


def test_the_kernel_stamps_between_send_and_read() -> None:
    client, server = pair()
    with client, server:
        client.settimeout(30)

        def stamped() -> int:
            before = time.time_ns()
            server.send(b"x")
            data, at_ns = receive(client, 10)
            assert data == b"x"
            assert at_ns == 0 or before <= at_ns <= time.time_ns()
            return at_ns

        # The kernel switches stamping on in the background, after the first socket asked for it.
        until(stamped, what="a stamp")


def test_a_socket_without_stamps_gives_zero() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.send(b"x")
        assert receive(left, 10) == (b"x", 0)


def test_nothing_to_read_and_the_end() -> None:
    client, server = pair()
    with client:
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            receive(client, 10)
        server.close()
        client.setblocking(True)
        assert receive(client, 10) == (b"", 0)


def test_a_quiet_clock_shows_no_step() -> None:
    watch = StepWatch()
    watch._offset -= 5_000_000_000  # as if the clock had been set by five seconds
    watch.check()
    assert watch.worst_ns == pytest.approx(5_000_000_000, abs=500_000_000)


def test_the_timer_never_fires_early() -> None:
    timer = Timer()
    try:
        due = time.time_ns() + 3_300_000
        timer.arm(due)
        assert select.select([timer.fd], [], [], 10)[0]
        assert time.time_ns() >= due
        timer.clear()
        assert not select.select([timer.fd], [], [], 0)[0]
        timer.arm(1)  # long past: at once
        assert select.select([timer.fd], [], [], 10)[0]
    finally:
        timer.close()
