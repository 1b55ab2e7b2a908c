"""Talking to systemd in its own protocol, sd_notify(3): readiness, status, more time, signs of life.

Outside systemd there is no NOTIFY_SOCKET, and every call does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

_EXTEND_S = 60.0
"""What each call for more time asks for; it is repeated long before that is over."""


class Notifier:
    """Sends states to the service manager that started us."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._address = env.get("NOTIFY_SOCKET", "")
        for_us = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog = bool(env.get("WATCHDOG_USEC")) and for_us
        self._status = ""

    def ready(self, status: str) -> None:
        """The service answers; also ends a reload."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """A line for `systemctl status`, sent when it changes."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def more_time(self) -> None:
        """A start or stop that makes progress must not run into the unit's own limit."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(_EXTEND_S * 1e6)}")

    def alive(self) -> None:
        """Feed the unit's watchdog, where it has one."""
        if self._watchdog:
            self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The service goes down because it was asked to."""
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        text = "\n".join(line.replace("\n", " ") for line in lines)
        # A manager that is busy or gone must not hold up the service it manages.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            channel.sendto(text.encode(), name)
