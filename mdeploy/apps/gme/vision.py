"""Attention of the vision tower over all pictures of a batch at once.

transformers asks it picture by picture, and waits for the GPU in every layer to learn how large each of them is.
"""

from __future__ import annotations

from typing import Any

import torch

from mdeploy.apps.embed import attention


class Attentions:
    """Those of a tower, as transformers has them or as ours."""

    def __init__(self, visual: Any) -> None:
        self._found = [(block, block.attn, _Attention(block.attn)) for block in visual.blocks]

    def use(self, *, packed: bool) -> None:
        """From now on; ours must be asked within `attention.packed`, whose segments are patches of pictures."""
        for block, plain, ours in self._found:
            block.attn = ours if packed else plain


class _Attention(torch.nn.Module):  # type: ignore[misc] # torch has no types here
    """VisionAttention of Qwen2-VL with its own weights."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self._plain = plain

    def forward(
        self, states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **others: Any
    ) -> Any:
        """[patches, width] to the same."""
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision as turned

        plain = self._plain
        query, key, value = plain.qkv(states).unflatten(-1, (3, plain.num_heads, -1)).unbind(1)
        query, key = turned(query, key, *position_embeddings)
        seen = attention.attend(query, key, value, float(plain.scaling), causal=False)
        return plain.proj(seen.flatten(1))
