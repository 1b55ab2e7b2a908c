"""From token ids to what a model makes of each text: all texts in one row, or padded to the longest.

Both give the same: float32 [n, k], vectors that are not normalised yet, or the raw scores of a cross-encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mdeploy.apps.embed import attention, rows
from mdeploy.apps.embed.attention import Segments
from mdeploy.apps.embed.checkpoint import Pooling
from mdeploy.apps.embed.heads import Head
from mdeploy.apps.embed.pooling import pool
from mdeploy.apps.embed.rows import Texts


class Forward(Protocol):
    """One way to ask a model."""

    name: str

    def pooled(self, texts: Texts) -> torch.Tensor:
        """Float32 [n, hidden size]."""

    def __call__(self, texts: Texts) -> torch.Tensor:
        """Float32 [n, k] on the device."""


class Transformer:
    """A model of transformers without its head, and what it wants to be told of its tokens."""

    def __init__(self, model: Any, pooling: Pooling, head: Head | None = None) -> None:
        self.model, self.pooling, self.head = model, pooling, head
        self.base: Callable[..., Any] = model if head is None else head.base
        self.device: torch.device = model.device
        inner = model if head is None else head.base
        known = inspect.signature(inner.forward).parameters
        embeddings: Any = getattr(inner, "embeddings", None)
        self.takes_positions = "position_ids" in known
        kinds = getattr(model.config, "type_vocab_size", None)
        self.takes_types = "token_type_ids" in known and kinds is not None  # GPT-2 takes words for types
        self._types = int(kinds or 0)
        shifts = hasattr(embeddings, "create_position_ids_from_inputs_embeds")
        self.first_position = int(embeddings.padding_idx) + 1 if shifts else 0
        """RoBERTa and its kin count positions from the one after the padding's."""

    def on_device(self, values: NDArray[Any]) -> torch.Tensor:
        """A numpy array where the model is; the copy does not hold up what the GPU does meanwhile."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def types(self, texts: Texts) -> rows.Ints:
        """Of each token, as far as this model knows any."""
        return rows.types(texts) if self._types > 1 else np.zeros(texts.tokens, np.int64)

    def odd_positions(self, texts: Texts) -> rows.Ints | None:
        """Of each token, where a user wrote the padding's: RoBERTa and its kin leave it out when they count."""
        padding = self.first_position - 1
        if padding < 0 or not (texts.ids == padding).any():
            return None
        return rows.places(texts, padding) + padding

    def finish(self, pooled: torch.Tensor) -> torch.Tensor:
        """What comes after pooling."""
        return pooled if self.head is None else self.head(pooled)


class Packed:
    """One row for all texts of a batch, and not one token of padding."""

    name = "packed"

    def __init__(self, transformer: Transformer) -> None:
        self._of = transformer

    def pooled(self, texts: Texts) -> torch.Tensor:
        """See Forward."""
        of = self._of
        spare = attention.spare_tokens(texts.tokens) if of.device.type == "cpu" else 0
        segments = Segments(texts.lengths.tolist(), of.device, spare)
        ids = np.pad(texts.ids, (0, spare))
        odd = of.odd_positions(texts)
        usual = segments.positions + of.first_position if odd is None else of.on_device(np.pad(odd, (0, spare)))[None]
        told = {"input_ids": of.on_device(ids)[None], "position_ids": usual}
        if of.takes_types:
            told["token_type_ids"] = of.on_device(np.pad(of.types(texts), (0, spare)))[None]
        with attention.packed(segments):
            hidden = of.base(**told).last_hidden_state[0]
        return pool(hidden, segments, of.pooling)

    def __call__(self, texts: Texts) -> torch.Tensor:
        """See Forward."""
        return self._of.finish(self.pooled(texts))


class Padded:
    """A row for each text, all as long as the longest; for models that cannot be packed."""

    name = "padded"

    def __init__(self, transformer: Transformer, pad: int) -> None:
        self._of, self._pad = transformer, pad

    def pooled(self, texts: Texts) -> torch.Tensor:
        """See Forward."""
        of = self._of
        longest = int(texts.lengths.max())
        width = longest + -longest % 16 if of.device.type == "cpu" else longest  # few widths, as in `spare_tokens`
        place = np.arange(width)
        real = place[None] < texts.lengths[:, None]
        told = {"input_ids": self._spread(texts.ids, real, self._pad), "attention_mask": of.on_device(real.astype(int))}
        if of.takes_positions:
            usual = np.broadcast_to(np.minimum(place, longest - 1), real.shape) + of.first_position
            odd = of.odd_positions(texts)
            told["position_ids"] = of.on_device(usual) if odd is None else self._spread(odd, real, 0)
        if of.takes_types:
            told["token_type_ids"] = self._spread(of.types(texts), real, 0)
        hidden = of.base(**told).last_hidden_state
        kept = hidden[of.on_device(real)]
        return pool(kept, Segments(texts.lengths.tolist(), of.device), of.pooling)

    def _spread(self, values: rows.Ints, real: Any, gap: int) -> torch.Tensor:
        spread = np.full(real.shape, gap, np.int64)
        spread[real] = values
        return self._of.on_device(spread)

    def __call__(self, texts: Texts) -> torch.Tensor:
        """See Forward."""
        return self._of.finish(self.pooled(texts))


class Single:
    """One text at a time, told no more than it must be: what transformers itself makes of it, to compare with."""

    name = "single"

    def __init__(self, transformer: Transformer) -> None:
        self._of = transformer

    def pooled(self, texts: Texts) -> torch.Tensor:
        """See Forward."""
        of, results = self._of, []
        for one in rows.cut(texts, 0):
            hidden = of.base(**self._told(one)).last_hidden_state[0]
            results.append(pool(hidden, Segments([one.tokens], of.device), of.pooling))
        return torch.cat(results)

    def repeated(self, texts: Texts, copies: int) -> torch.Tensor:
        """As `pooled`, from so many copies of a text at once: another shape, and still no padding."""
        of, results = self._of, []
        for one in rows.cut(texts, 0):
            told = {name: value.expand(copies, -1) for name, value in self._told(one).items()}
            hidden = of.base(**told).last_hidden_state[-1]
            results.append(pool(hidden, Segments([one.tokens], of.device), of.pooling))
        return torch.cat(results)

    def __call__(self, texts: Texts) -> torch.Tensor:
        """See Forward."""
        of = self._of
        if of.head is None:
            return self.pooled(texts)
        return torch.cat([of.model(**self._told(one)).logits.float() for one in rows.cut(texts, 0)])

    def _told(self, one: Texts) -> dict[str, torch.Tensor]:
        told = {"input_ids": self._of.on_device(one.ids)[None]}
        if self._of.takes_types and one.seconds.any():
            told["token_type_ids"] = self._of.on_device(self._of.types(one))[None]
        return told
