"""Ports: whether one can be taken, and whether it is really ours that answers on it."""

from __future__ import annotations

import contextlib
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
            hint = f"take another --port, or see who has it: ss -ltnp 'sport = :{port}'"
            raise PortTakenError(f"cannot listen on {host}:{port}: {reason}", hint=hint) from error


def listens(pids: Iterable[int], port: int) -> bool:
    """True where one of these processes accepts TCP connections on `port`."""
    import psutil

    for pid in pids:
        with contextlib.suppress(psutil.Error):
            sockets = psutil.Process(pid).net_connections("tcp")
            if any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets):
                return True
    return False
