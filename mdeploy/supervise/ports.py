"""Ports: whether one can be taken, and whether it is really ours that answers on it."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable

from mdeploy.errors import ConfigError


class PortTakenError(ConfigError):
    """The address cannot be listened on now; who has it may go."""


def check_port(host: str, port: int) -> None:
    """Bind once and let go. Raises PortTakenError where the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise PortTakenError(f"cannot listen on {host}:{port}: {reason}", hint=_hint(port, error)) from error


def _hint(port: int, error: Exception) -> str:
    if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
        return "--host takes an address of this machine (ip address), or 0.0.0.0 for all of them"
    if isinstance(error, PermissionError):
        return "take a --port from 1024 on, or act as root"
    return f"take another --port, or see who has it: ss -ltnp 'sport = :{port}'"


def listens(pids: Iterable[int], port: int) -> bool:
    """True where one of these processes accepts TCP connections on `port`."""
    import psutil

    for pid in pids:
        with contextlib.suppress(psutil.Error):
            sockets = psutil.Process(pid).net_connections("tcp")
            if any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets):
                return True
    return False
