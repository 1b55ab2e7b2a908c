"""The last step of a cross-encoder on its own: from the state of one token to a score."""

from __future__ import annotations

from typing import Any

import torch

from mdeploy.apps.embed.checkpoint import Pooling


class Head:
    """A classifier whose transformer was asked already.

    The model's own `forward` runs, with something in the transformer's place that hands out the pooled states: so
    every kind of head works, whatever it is made of.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._name = model, model.base_model_prefix
        self.base = getattr(model, self._name)
        self._stand_in = _StandIn(self.base)
        self.pooling = _pooling(model)
        told = model.config.get_text_config()
        if told.pad_token_id is None:  # decoders refuse several texts without one, and here it is never looked for
            told.pad_token_id = 0

    def __call__(self, pooled: torch.Tensor) -> torch.Tensor:
        """Float32 [n, hidden size] to [n, 1]."""
        states = pooled.to(self._model.dtype).unsqueeze(1)
        setattr(self._model, self._name, self._stand_in)
        try:
            return self._model(inputs_embeds=states).logits.float()
        finally:
            setattr(self._model, self._name, self.base)


class _StandIn(torch.nn.Module):  # type: ignore[misc] # torch has no types here
    """Returns what it is given as the last hidden state of texts of one token."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self._pooler = getattr(base, "pooler", None)

    def forward(self, *ids: Any, inputs_embeds: torch.Tensor, **others: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

        pooled = None if self._pooler is None else self._pooler(inputs_embeds)
        return Output(last_hidden_state=inputs_embeds, pooler_output=pooled)


def _pooling(model: Any) -> Pooling:
    """Decoders judge by their last token, encoders by their first, ModernBERT by what its files say."""
    if hasattr(model, "score"):
        return "last"
    return "mean" if getattr(model.config, "classifier_pooling", "cls") == "mean" else "cls"
