"""After a flood of connections: hand memory back. Python's cycles and malloc's arenas keep it otherwise."""

from __future__ import annotations

import asyncio
import ctypes
import gc

_FLOOD = 500
"""Connections at once from which there is anything worth handing back."""

_OVER = 10
"""A flood is over when so many times fewer connections are open than at its height."""

_CALM_S = 1.0


class Tide:
    """Watches how many connections are open. Nothing runs while nothing falls."""

    def __init__(self) -> None:
        self._peak = 0
        self._libc = ctypes.CDLL(None)

    def rose(self, connections: int) -> None:
        """One more is open."""
        self._peak = max(self._peak, connections)

    def fell(self, connections: int) -> None:
        """One less."""
        if self._peak >= _FLOOD and connections * _OVER <= self._peak:
            self._peak = 0
            asyncio.get_running_loop().call_later(_CALM_S, self._tidy)

    def _tidy(self) -> None:
        gc.collect()
        trim = getattr(self._libc, "malloc_trim", None)  # glibc's; musl hands back by itself
        if trim is not None:
            trim(0)
