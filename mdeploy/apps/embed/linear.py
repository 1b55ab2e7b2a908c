"""Matrix products of a model on a CPU in bfloat16, a tenth quicker: weights in the order that oneDNN wants them.

Plain torch puts them into that order at every call. The operations are those that torch.compile puts into its own
code for CPUs; they are not public, so a torch that lacks them, or a model that changes by them, goes on without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

_LEAST_SIZE = 32  # of a side: below that there is nothing to gain
_MOST_BYTES = 2 << 30  # both kinds of weights are in memory for a moment, and a larger model is nothing for a CPU


@dataclass(frozen=True, slots=True)
class Swap:
    """A layer, where it is, and what takes its place."""

    parent: Any
    name: str
    plain: Any
    packed: Any


def swaps(model: Any) -> tuple[Swap, ...]:
    """What can be replaced in a model; nothing where this torch, CPU or type of number cannot do it."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or model.get_memory_footprint() > _MOST_BYTES:
        return ()
    try:
        return tuple(_found(model))
    except (RuntimeError, AttributeError):  # an operation that is missing is either, by the version of torch
        return ()


def use(found: tuple[Swap, ...], *, packed: bool) -> None:
    """Put the packed layers into their places, or the plain ones back."""
    for swap in found:
        setattr(swap.parent, swap.name, swap.packed if packed else swap.plain)


def _found(model: Any) -> Iterator[Swap]:
    """Linear layers, and the GELU that follows one in BERT and its kin: oneDNN computes both at once."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if not isinstance(layer, torch.nn.Linear) or min(layer.weight.shape) < _LEAST_SIZE:
                continue
            after = getattr(parent, "intermediate_act_fn", None)
            with_gelu = name == "dense" and type(after).__name__ == "GELUActivation"
            yield Swap(parent, name, layer, _Linear(layer, "gelu" if with_gelu else "none"))
            if with_gelu:
                yield Swap(parent, "intermediate_act_fn", after, torch.nn.Identity())


class _Linear(torch.nn.Module):  # type: ignore[misc] # torch has no types here
    """A linear layer, and an activation after it."""

    def __init__(self, layer: Any, then: str) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._then = then

    def forward(self, given: torch.Tensor) -> Any:
        return torch.ops.mkldnn._linear_pointwise(given, self._weight, self._bias, self._then, [], "none")
