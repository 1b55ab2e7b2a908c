"""From the hidden states of a row of texts to one vector of norm 1 for each: always in float32."""

from __future__ import annotations

import torch

from mdeploy.apps.embed.attention import Segments
from mdeploy.apps.embed.checkpoint import Pooling


def pool(hidden: torch.Tensor, segments: Segments, how: Pooling) -> torch.Tensor:
    """[T, dim] of any kind to float32 [n, dim]."""
    count = segments.count
    if how == "mean":
        lengths = segments.bounds.diff().long()
        return torch.segment_reduce(hidden.float(), "mean", lengths=lengths)[:count]
    return hidden[(segments.last if how == "last" else segments.first)[:count]].float()


def normalized(vectors: torch.Tensor) -> torch.Tensor:
    """Each row of [n, dim] with norm 1; a row that has no direction (zeros, NaN, infinities) becomes NaN."""
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
