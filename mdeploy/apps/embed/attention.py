"""Attention over texts that stand one behind the other in a single row, without any padding.

transformers lets a model's attention be replaced by name. Ours sees all texts of a batch as one row of T tokens and
attends within each of them: by one call of `varlen_attn` on a GPU, by a call for each length on a CPU. No mask is
registered for that name, and then transformers makes none.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

NAME = "mdeploy_packed"
"""What the attention is called among those of transformers."""

_UNKNOWN = ("position_bias", "softcap", "s_aux", "head_mask")
"""What attention may be asked for beyond what ours does."""


class UnsupportedError(Exception):
    """This model asks more of its attention than ours can do: its texts must be padded."""


class Segments:
    """Where each text begins in a row: `lengths` are the texts', in their order, on `device`.

    `spare` tokens follow the last text and mean nothing; `count` is the number of texts without them. Made once for
    a batch, used by every layer.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", spare: int = 0) -> None:
        self.lengths = [*lengths, spare] if spare else list(lengths)
        self.count, self._spare = len(lengths), spare
        self.total, self.longest = sum(self.lengths), max(self.lengths)
        self.device = torch.device(device)
        ends = list(itertools.accumulate(self.lengths))
        self.bounds = torch.tensor([0, *ends], dtype=torch.int32).to(self.device, non_blocking=True)
        runs = [(length, len(list(same))) for length, same in itertools.groupby(self.lengths)]
        self.shapes = [(count, length) for length, count in runs]
        self.sizes = [length * count for length, count in runs]

    @functools.cached_property
    def positions(self) -> torch.Tensor:
        """Place of each token in its text, int64 [1, T]; 0 for spare ones."""
        lengths = torch.tensor(self.lengths)
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        places = torch.arange(self.total) - starts
        places[self.total - self._spare :] = 0
        return places.unsqueeze(0).to(self.device, non_blocking=True)

    @functools.cached_property
    def first(self) -> torch.Tensor:
        """Place of each text's first token in the row, [n]."""
        return self.bounds[:-1].long()

    @functools.cached_property
    def last(self) -> torch.Tensor:
        """Place of each text's last token in the row, [n]."""
        return self.bounds[1:].long() - 1


def spare_tokens(total: int) -> int:
    """How many tokens make a row of `total` one of few lengths: oneDNN keeps code, about 1 MB, for each length.

    At most a 32nd of a long row, 15 tokens of a short one.
    """
    step = 16 if total <= 256 else max(32, 1 << (total - 1).bit_length() - 6)
    return -total % step


_now: Segments | None = None


@contextlib.contextmanager
def packed(segments: Segments) -> Iterator[None]:
    """A forward inside sees these texts in its row."""
    global _now
    _now = segments
    try:
        yield
    finally:
        _now = None


def register() -> None:
    """Make NAME known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for rows without padding."""
    if not device.startswith("cuda"):
        return True
    major, _ = torch.cuda.get_device_capability(device)
    return _varlen() is not None and dtype in (torch.bfloat16, torch.float16) and major >= 8


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: [1, heads, T, size] in, [1, T, heads, size] out; key and value may have fewer heads."""
    unknown = [name for name in _UNKNOWN if others.get(name) is not None]
    if unknown or attention_mask is not None or query.shape[0] != 1:
        raise UnsupportedError(f"{type(module).__name__} wants {', '.join(unknown) or 'a mask'}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    ours: Callable[..., torch.Tensor] = _compiled_attend if torch.compiler.is_compiling() else attend
    return ours(*rows, float(scale), causal, int(sliding_window or 0)).unsqueeze(0), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool, window: int = 0
) -> torch.Tensor:
    """[T, heads, size] to the same; a token sees those less than `window` away, all of its text where that is 0."""
    assert _now is not None, "a packed forward outside of `packed`"
    if query.device.type == "cuda":
        return _on_gpu(_now, query, key, value, scale, causal, window)
    return _on_cpu(_now, query, key, value, scale, causal, window)


_compiled_attend = torch.library.custom_op(
    "mdeploy::packed_attention",
    lambda *given: attend(*given).contiguous(),
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, float scale, bool causal, int window) -> Tensor",
)
"""`attend` as torch.compile shall see it: one operation whose inside, and whose texts, it need not know."""

_compiled_attend.register_fake(lambda query, key, value, *rest: query.new_empty((*query.shape[:2], value.shape[2])))


# on a CPU


def _on_cpu(
    segments: Segments, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scale: float, causal: bool, window: int,
) -> torch.Tensor:  # fmt: skip
    """One call for each run of texts of equal length."""
    parts = []
    grouped = query.shape[1] != key.shape[1]
    split = (tensor.split(segments.sizes) for tensor in (query, key, value))
    for (count, length), *rows in zip(segments.shapes, *split, strict=True):
        q, k, v = (row.unflatten(0, (count, length)).transpose(1, 2) for row in rows)
        mask = _band(length, window, causal, q) if 0 < window < length else None
        out = functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal and mask is None and length > 1, scale=scale, enable_gqa=grouped
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _band(length: int, window: int, causal: bool, like: torch.Tensor) -> torch.Tensor:
    """True where a token is less than `window` away, [length, length]."""
    place = torch.arange(length, device=like.device)
    away = place[:, None] - place[None, :]
    return (away < window) & (away >= 0 if causal else away > -window)


# on a GPU


def _on_gpu(
    segments: Segments, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scale: float, causal: bool, window: int,
) -> torch.Tensor:  # fmt: skip
    varlen = _varlen()
    assert varlen is not None, "can_pack was not asked"
    left = window - 1 if window else -1
    right = 0 if causal else left
    return varlen(query, key, value, segments.bounds, segments.longest, scale, (left, right))


@functools.cache
def _varlen() -> Callable[..., torch.Tensor] | None:
    """torch's own attention for rows without padding, whatever this version of torch calls its options."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters

    def call(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
        scale: float, window: tuple[int, int],
    ) -> torch.Tensor:  # fmt: skip
        options: dict[str, Any] = {}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        if "scale" in known:
            options["scale"] = scale
        else:
            query = query * (scale * query.shape[-1] ** 0.5)
        if "window_size" in known:
            options["window_size"] = window
        elif window in ((-1, 0), (-1, -1)):
            options["is_causal"] = window == (-1, 0)
        else:
            raise UnsupportedError("this torch has no sliding window without padding; torch 2.11 has")
        rows = (each.contiguous() for each in (query, key, value))
        return varlen_attn(*rows, bounds, bounds, longest, longest, **options)

    return call
