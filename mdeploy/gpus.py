"""The GPUs of this machine, asked of nvidia-smi: no CUDA library is ever loaded here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from mdeploy.errors import DoesNotFitError
from mdeploy.specs import Gpu

_QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total,memory.free",
    "--format=csv,noheader,nounits",
)


def probe(timeout_s: float = 15.0) -> tuple[Gpu, ...]:
    """All GPUs nvidia-smi lists; empty where there is no such command.

    Raises DoesNotFitError where it exists but fails: a broken driver must not look like a
    machine without GPUs.
    """
    if shutil.which(_QUERY[0]) is None:
        return ()
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise _broken(f"did not answer within {timeout_s:.0f} s") from error
    except OSError as error:
        raise _broken(f"cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
        raise _broken(lines[-1])
    return tuple(_parse(line) for line in done.stdout.splitlines() if line.strip())


def visible(gpus: Sequence[Gpu], wanted: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES (`wanted`) leaves, by index or UUID; all where it is not set.

    On a shared machine it says which devices are ours. As CUDA does, an entry that names no
    device ends the list.
    """
    if wanted is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for entry in filter(None, (part.strip() for part in wanted.split(","))):
        match = next((g for g in gpus if entry == str(g.index) or g.uuid.startswith(entry)), None)
        if match is None:
            break
        chosen.append(match)
    return tuple(chosen)


def _parse(line: str) -> Gpu:
    try:
        index, uuid, name, total, free = (cell.strip() for cell in line.split(","))
        return Gpu(int(index), uuid, name, _mib(total), _mib(free))
    except ValueError as error:
        raise _broken(f"printed {line!r}") from error


def _mib(cell: str) -> int:
    """Memory in MiB; 0 where the device shares the host's and nvidia-smi says [N/A]."""
    return int(cell) if cell.isdecimal() else 0


def _broken(what: str) -> DoesNotFitError:
    return DoesNotFitError(f"nvidia-smi is installed but {what}", hint="run nvidia-smi and mend the driver first")
