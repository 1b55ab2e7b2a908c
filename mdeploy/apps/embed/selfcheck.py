"""Which way a model can be asked: found out at start, by comparing with one text at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mdeploy.apps.embed import attention, linear
from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.apps.embed.forward import Forward, Packed, Padded, Single, Transformer
from mdeploy.apps.embed.loading import say
from mdeploy.apps.embed.rows import Texts
from mdeploy.serving.load import LoadError

_LENGTHS = (5, 17, 2, 33, 64, 9, 17, 100)
_LEAST, _LEAST_HALF = 0.9999, 0.999
_FLOOR = 0.98
_NOISE, _COPIES, _COPIES_CPU = 4, 8, 4
"""Half precision is noisy in deep models: a batch may be so many times as far from single texts as copies of them are.

On a GPU the sums of a product depend on how many rows it has: there are more copies there, and they cost nothing.
"""

_SCORES_APART = 0.02
"""Of a score's own size, in float32; five times that in half precision."""

_FAILURES = (TypeError, ValueError, AttributeError)
"""What models raise that want other things than texts."""

_LONGEST_WINDOW = 1024  # a text longer than the window shows whether it is heeded, while it is cheap to ask


def chosen(transformer: Transformer, checkpoint: Checkpoint, asked: str, *, prepack: bool = True) -> Forward:
    """Packed where it agrees with one text at a time, padded else. Raises LoadError where neither does.

    `asked` is auto, packed or padded. `prepack` lets `linear` replace layers, if they give the same.
    """
    check = _Check(transformer, sample(transformer, checkpoint))
    usual = transformer.model.config._attn_implementation
    padded = Padded(transformer, _pad(transformer))
    if prepack:
        _prepack(transformer, check, padded)
    if asked != "padded":
        why = _obstacle(transformer) or check.why_not(Packed(transformer))
        if not why:
            return Packed(transformer)
        if asked == "packed":
            raise LoadError(f"{checkpoint.path} cannot be packed: {why}; --attention auto pads its texts")
        say(f"texts are padded, which is slower: {why}")
        _set(transformer, usual)
    why = check.why_not(padded)
    if why:
        raise LoadError(f"{checkpoint.architecture} gives other results in a batch than alone: {why}")
    return padded


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the worst of some vectors, [n, k]."""
    return float(torch.cosine_similarity(found, expected).min())


def least(dtype: torch.dtype, repeated: Callable[[int], torch.Tensor], alone: torch.Tensor) -> float:
    """The cosine that is good enough between texts in a batch and the same texts `alone`.

    `repeated` gives their vectors where each is asked as so many copies at once, by transformers itself and without
    padding: what differs there is noise alone.
    """
    if dtype == torch.float32:
        return _LEAST
    with sdpa_kernel(SDPBackend.MATH):  # attention by other sums, as a batch has products of other shapes
        copies = repeated(_COPIES if alone.is_cuda else _COPIES_CPU)
    return max(_FLOOR, min(_LEAST_HALF, 1 - _NOISE * (1 - cosine(copies, alone))))


def check_same(dtype: torch.dtype, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises ValueError where a compiled model computes something else; it rounds elsewhere than the plain one."""
    worst = cosine(found, expected)
    if not worst >= (_LEAST if dtype == torch.float32 else _FLOOR):
        raise ValueError(f"compiled and plain vectors have cosine {worst:.5f}")


def _prepack(transformer: Transformer, check: _Check, padded: Forward) -> None:
    found = linear.swaps(transformer.model)
    linear.use(found, packed=True)
    if found and check.why_not(padded):  # an operation that is not public may compute, or want, something else
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
        try:
            self._pooled = single.pooled(texts)
            self._results = single(texts) if transformer.head else self._pooled
        except _FAILURES as error:
            what = "scores of pairs" if transformer.head else "vectors of texts"
            raise LoadError(f"{type(transformer.model).__name__} gives no {what}: {_said(error)}") from error
        if not (self._pooled.isfinite().all() and self._results.isfinite().all()):
            kind = str(transformer.model.dtype).removeprefix("torch.")
            why = (
                "its weights are broken"
                if kind == "float32"
                else f"broken weights, or {kind} is too small for it: try --dtype float32"
            )
            raise LoadError(f"{type(transformer.model).__name__} gives NaN or infinity for simple texts: {why}")
        self._least = least(transformer.model.dtype, lambda copies: single.repeated(texts, copies), self._pooled)

    def why_not(self, forward: Forward) -> str:
        """What is wrong with what it gives, if anything."""
        try:
            return self._difference(forward)
        except (attention.UnsupportedError, *_FAILURES, RuntimeError, IndexError) as error:
            return _said(error)

    def _difference(self, forward: Forward) -> str:
        worst = cosine(forward.pooled(self._texts), self._pooled)
        if not worst >= self._least:  # NaN too
            return f"{forward.name} and single vectors have cosine {worst:.5f}, {self._least:.4g} is expected"
        if self._of.head is None:
            return ""
        apart = (forward(self._texts) - self._results).abs() / (1 + self._results.abs())
        allowed = _SCORES_APART * (1 if self._of.model.dtype == torch.float32 else 5)
        if not apart.max() <= allowed:
            return f"{forward.name} and single scores are {float(apart.max()):.4f} apart, {allowed} is allowed"
        return ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
