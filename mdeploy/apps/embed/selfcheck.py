"""Which way a model can be asked: found out at start, by comparing with one text at a time."""

from __future__ import annotations

import numpy as np
import torch

from mdeploy.apps.embed import attention, linear
from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.apps.embed.forward import Forward, Packed, Padded, Single, Transformer
from mdeploy.apps.embed.loading import say
from mdeploy.apps.embed.rows import Texts
from mdeploy.serving.load import LoadError

_LENGTHS = (5, 17, 2, 33, 64, 9, 17, 100)
_LEAST = {torch.float32: 0.9999}
_LEAST_HALF = 0.999
_FLOOR = 0.98
_SCORES_APART = 0.02
"""Of a score's own size, in float32; five times that in half precision."""

_LONGEST_WINDOW = 1024  # a text longer than the window shows whether it is heeded, while it is cheap to ask


def chosen(transformer: Transformer, checkpoint: Checkpoint, asked: str, *, prepack: bool = True) -> Forward:
    """Packed where it agrees with one text at a time, padded else. Raises LoadError where neither does.

    `asked` is auto, packed or padded. `prepack` lets `linear` replace layers, if they give the same.
    """
    check = _Check(transformer, sample(transformer, checkpoint))
    padded = Padded(transformer, _pad(transformer))
    if prepack:
        _prepack(transformer, check, padded)
    if asked != "padded":
        why = _obstacle(transformer) or check.packed(padded)
        if not why:
            return Packed(transformer)
        if asked == "packed":
            raise LoadError(f"{checkpoint.path} cannot be packed: {why}; --attention auto pads its texts")
        say(f"texts are padded, which is slower: {why}")
        _set(transformer, "sdpa")
    why = check.why_not(padded)
    if why:
        raise LoadError(f"{checkpoint.architecture} gives other results in a batch than alone: {why}")
    return padded


def _prepack(transformer: Transformer, check: _Check, padded: Forward) -> None:
    found = linear.swaps(transformer.model)
    linear.use(found, packed=True)
    try:
        why = check.why_not(padded) if found else ""
    except RuntimeError as error:  # an operation that is not public may change its words
        why = str(error)
    if why:
        linear.use(found, packed=False)


def sample(transformer: Transformer, checkpoint: Checkpoint) -> Texts:
    """Texts of random words and several lengths, always the same; pairs for a cross-encoder."""
    window = getattr(transformer.model.config, "sliding_window", None) or 0
    longer = (window + window // 2,) if 0 < window <= _LONGEST_WINDOW else ()
    lengths = np.minimum(np.array([*_LENGTHS, *longer]), checkpoint.max_length)
    words = np.random.default_rng(7).integers(5, max(6, checkpoint.vocabulary), int(lengths.sum()))
    words[words == _pad(transformer)] = 5
    seconds = lengths // 2 if checkpoint.kind == "cross-encoder" else np.zeros_like(lengths)
    return Texts(lengths, seconds, words)


def _pad(transformer: Transformer) -> int:
    pad = getattr(transformer.model.config, "pad_token_id", None)
    return int(pad) if isinstance(pad, int) and pad >= 0 else 0


def _obstacle(transformer: Transformer) -> str:
    """Why it is no use to try, if it is none."""
    model = transformer.model
    if not attention.can_pack(str(model.device), model.dtype):
        return f"no kernel for {str(model.dtype).removeprefix('torch.')} on this device packs them"
    if not transformer.takes_positions:
        return f"{type(model).__name__} takes no positions"
    attention.register()
    _set(transformer, attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        return f"the attention of {type(model).__name__} cannot be replaced"
    return ""


def _set(transformer: Transformer, name: str) -> None:
    model = transformer.model
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)


class _Check:
    """One text at a time as the measure; taken before any attention is replaced.

    Raises LoadError for a model that gives no numbers even so.
    """

    def __init__(self, transformer: Transformer, texts: Texts) -> None:
        self._of, self._texts = transformer, texts
        single = Single(transformer)
        self._pooled = single.pooled(texts)
        self._results = single(texts) if transformer.head else self._pooled
        if not (self._pooled.isfinite().all() and self._results.isfinite().all()):
            kind = str(transformer.model.dtype).removeprefix("torch.")
            why = "its weights are broken" if kind == "float32" else f"broken weights, or {kind} is too small for it"
            raise LoadError(f"{type(transformer.model).__name__} gives NaN or infinity for simple texts: {why}")

    def packed(self, padded: Forward) -> str:
        """Why packed is not good enough, if so.

        Half precision is noisy in deep models: packed may be three times as far from single texts as padded is.
        """
        try:
            why = self.why_not(Packed(self._of))
        except (attention.UnsupportedError, TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if not why or self._of.model.dtype == torch.float32:
            return why
        _set(self._of, "sdpa")
        noise = 1 - self._worst(padded)
        _set(self._of, attention.NAME)
        worst = self._worst(Packed(self._of))
        return "" if worst >= _FLOOR and 1 - worst <= 3 * noise else why

    def why_not(self, forward: Forward) -> str:
        """What is wrong with what it gives, if anything."""
        worst, least = self._worst(forward), _LEAST.get(self._of.model.dtype, _LEAST_HALF)
        if not worst >= least:  # NaN too
            return f"{forward.name} and single vectors have cosine {worst:.5f}, {least} is expected"
        if self._of.head is None:
            return ""
        apart = (forward(self._texts) - self._results).abs() / (1 + self._results.abs())
        allowed = _SCORES_APART * (1 if self._of.model.dtype == torch.float32 else 5)
        if not apart.max() <= allowed:
            return f"{forward.name} and single scores are {float(apart.max()):.4f} apart, {allowed} is allowed"
        return ""

    def _worst(self, forward: Forward) -> float:
        return float(torch.cosine_similarity(forward.pooled(self._texts), self._pooled).min())
