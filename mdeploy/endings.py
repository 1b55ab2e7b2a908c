"""How a process ended, in words that follow its name: `the engine was killed by SIGKILL`."""

from __future__ import annotations

import signal


def ending(status: int) -> str:
    """Words for an exit status as `subprocess` has it: negative for the number of a signal."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
