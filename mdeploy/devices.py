"""Which GPUs a service gets: the ones wished for, or those that nobody has. Values in, values out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mdeploy.errors import DoesNotFitError
from mdeploy.specs import Gpu


def indices(text: str) -> tuple[int, ...] | None:
    """`0,1` as numbers; None for what is no list of GPUs, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,4}", part) for part in parts) or len(set(map(int, parts))) != len(parts):
        return None
    return tuple(map(int, parts))


def check_present(gpus: Sequence[Gpu], wanted: Sequence[int]) -> None:
    """Raise DoesNotFitError for a device that this machine does not have."""
    present = {gpu.index for gpu in gpus}
    missing = [str(index) for index in wanted if index not in present]
    if missing:
        known = ", ".join(map(str, sorted(present))) or "none that nvidia-smi lists"
        raise DoesNotFitError(f"no GPU {', '.join(missing)} on this machine", hint=f"GPUs: {known}")


def choose(
    gpus: Sequence[Gpu], count: int, taken: Mapping[int, str], before: Sequence[int] = ()
) -> tuple[tuple[int, ...], str]:
    """`count` devices that nobody has, and why these: those it had `before`, else those with the most free memory.

    `taken` says which GPUs belong to whom. Raises DoesNotFitError where too few are left.
    """
    free = {gpu.index: gpu for gpu in gpus if gpu.index not in taken}
    if len(before) == count and set(before) <= set(free):
        return tuple(before), "as before"
    if count > len(free):
        whose = ", ".join(f"GPU {gpu.index} belongs to {taken[gpu.index]}" for gpu in gpus if gpu.index in taken)
        first = ",".join(str(gpu.index) for gpu in gpus[:count])
        raise DoesNotFitError(
            f"{count} GPU{'s' if count > 1 else ''} needed, {len(free)} of {len(gpus)} not in use: {whose}",
            hint=f"stop one of them (mdeploy stop NAME), or share on purpose: --gpus {first}",
        )
    roomiest = sorted(free.values(), key=lambda gpu: (-gpu.free_mib, gpu.index))[:count]
    why = "most free memory" + (" of those nobody has" if taken else "")
    return tuple(sorted(gpu.index for gpu in roomiest)), why


def as_wished(wanted: Sequence[int], taken: Mapping[int, str]) -> str:
    """Why these: the user named them, whoever else has them."""
    return "; ".join(
        ["as wished", *(f"GPU {index} also belongs to {taken[index]}" for index in wanted if index in taken)]
    )
