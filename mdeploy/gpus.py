"""The GPUs of this machine, asked of nvidia-smi: no CUDA library is ever loaded here."""

from __future__ import annotations

import subprocess

from mdeploy.errors import DoesNotFitError
from mdeploy.specs import Gpu

_QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total,memory.free",
    "--format=csv,noheader,nounits",
)


def probe(timeout_s: float = 15.0) -> tuple[Gpu, ...]:
    """All GPUs nvidia-smi lists; empty where the command does not exist.

    Raises DoesNotFitError where it exists but fails: a broken driver must not look like a
    machine without GPUs.
    """
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        return ()
    except subprocess.TimeoutExpired as error:
        raise _broken(f"did not answer within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
        raise _broken(lines[-1])
    return tuple(_parse(line) for line in done.stdout.splitlines() if line.strip())


def answers() -> bool:
    """True where nvidia-smi lists at least one GPU."""
    try:
        return bool(probe())
    except DoesNotFitError:
        return False


def _parse(line: str) -> Gpu:
    try:
        index, uuid, name, total, free = (cell.strip() for cell in line.split(","))
        return Gpu(int(index), uuid, name, int(total), int(free))
    except ValueError as error:
        raise _broken(f"printed {line!r}") from error


def _broken(what: str) -> DoesNotFitError:
    return DoesNotFitError(f"nvidia-smi is installed but {what}", hint="run nvidia-smi and mend the driver first")
