"""From the hidden states of a row of texts to one vector for each: always in float32."""

from __future__ import annotations

import torch

from mdeploy.apps.embed.attention import Segments
from mdeploy.apps.embed.checkpoint import Pooling


def pool(hidden: torch.Tensor, segments: Segments, how: Pooling) -> torch.Tensor:
    """[T, dim] of any kind to float32 [n, dim]."""
    count = segments.count
    if how == "mean":
        lengths = segments.bounds.diff().long()
        # `unsafe` leaves out a check of the lengths that waits for the GPU
        return torch.segment_reduce(hidden.float(), "mean", lengths=lengths, unsafe=True)[:count]
    return hidden[(segments.last if how == "last" else segments.first)[:count]].float()
