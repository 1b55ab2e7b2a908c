"""Talking to systemd in its own protocol, sd_notify(3): readiness, status, more time, signs of life.

Outside systemd there is no NOTIFY_SOCKET, and every call does nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

_EXTEND_S, _EXTEND_EVERY_S = 60.0, 10.0
"""What a call for more time asks for, and how often it is repeated."""

_PATIENCE_S = 1.0
"""How long a busy service manager may hold us up for what it must not miss."""


class Notifier:
    """Sends states to the service manager that started us."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._address = env.get("NOTIFY_SOCKET", "")
        for_us = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._fed_every_s = float(env.get("WATCHDOG_USEC", 0)) / 4e6 if for_us else 0.0
        self._fed = self._extended = float("-inf")
        self._owed: tuple[str, ...] = ()
        self._status = ""

    def ready(self, status: str) -> None:
        """The service answers; also ends a reload."""
        self._send("READY=1", f"STATUS={status}", must=True)

    def status(self, text: str) -> None:
        """A line for `systemctl status`, sent when it changes."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def more_time(self) -> None:
        """A start or stop that makes progress must not run into the unit's own limit."""
        now = time.monotonic()
        if now - self._extended >= _EXTEND_EVERY_S:
            self._extended = now
            self._send(f"EXTEND_TIMEOUT_USEC={int(_EXTEND_S * 1e6)}")

    def alive(self) -> None:
        """Feed the unit's watchdog, where it has one; say again what could not be said."""
        if self._owed:
            self._send(*self._owed, must=True)
        now = time.monotonic()
        if self._fed_every_s and now - self._fed >= self._fed_every_s:
            self._fed = now
            self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", must=True)

    def stopping(self) -> None:
        """The service goes down because it was asked to."""
        self._send("STOPPING=1")

    def _send(self, *lines: str, must: bool = False) -> None:
        """Say something; what a manager that is busy or gone does not take is lost, or (`must`) owed."""
        if not self._address:
            return
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        text = "\n".join(line.replace("\n", " ") for line in lines)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(_PATIENCE_S if must else 0.0)
                channel.sendto(text.encode(), name)
        except OSError:
            self._owed = lines if must else self._owed
        else:
            self._owed = () if must else self._owed
