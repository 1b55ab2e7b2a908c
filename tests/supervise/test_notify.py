"""What systemd hears, on a real socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdeploy.supervise.notify import Notifier


@pytest.fixture(params=["file", "abstract"])
def channel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    address = str(tmp_path / "notify") if request.param == "file" else f"@mdeploy-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if address.startswith("@") else address)
        listener.settimeout(10)
        yield listener, address


def test_every_state(channel: tuple[socket.socket, str]) -> None:
    listener, address = channel
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000000"})
    notifier.status("loading weights 50%\nsecond line")
    notifier.status("loading weights 50%\nsecond line")  # not sent again
    notifier.more_time()
    notifier.ready("ready on x")
    notifier.alive()
    notifier.reloading()
    notifier.stopping()
    heard = [listener.recv(4096).decode().splitlines() for _ in range(6)]
    assert heard[:4] == [
        ["STATUS=loading weights 50% second line"],
        ["EXTEND_TIMEOUT_USEC=60000000"],
        ["READY=1", "STATUS=ready on x"],
        ["WATCHDOG=1"],
    ]
    assert heard[4][0] == "RELOADING=1"
    assert heard[4][1].startswith("MONOTONIC_USEC=")
    assert heard[5] == ["STOPPING=1"]


def test_a_watchdog_that_is_not_ours_is_not_fed(channel: tuple[socket.socket, str]) -> None:
    listener, address = channel
    for env in ({}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}):
        Notifier({"NOTIFY_SOCKET": address, **env}).alive()
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.recv(4096)


def test_outside_systemd_nothing_happens(tmp_path: Path) -> None:
    Notifier({}).ready("x")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready("x")  # a manager that is gone
    assert not (tmp_path / "nobody").exists()
