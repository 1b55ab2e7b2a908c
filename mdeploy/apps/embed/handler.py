"""The worker of an embedding service: packed token ids in, float32 rows out. Cross-encoders answer scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mdeploy.apps.embed import calibration, loading, rows, selfcheck, work
from mdeploy.apps.embed.checkpoint import Checkpoint, read
from mdeploy.apps.embed.encoder import Encoder, Floats, free_memory, normalized
from mdeploy.apps.embed.endings import check_endings
from mdeploy.apps.embed.forward import Forward, Transformer
from mdeploy.apps.embed.heads import Head
from mdeploy.apps.embed.loading import Settings, say
from mdeploy.apps.embed.rows import Texts
from mdeploy.errors import ConfigError
from mdeploy.serving.handler import Handler, HTTPError, Request
from mdeploy.serving.load import LoadError

_SEARCH_S = {"cpu": 3.0, "cuda": 10.0}


class Embedder(Handler):
    """Any embedding model or cross-encoder that transformers has a class for."""

    name = "embed"
    max_batch_size = 1024
    queue_size = 100_000  # the edge counts tokens
    example: ClassVar[bytes] = work.pack([work.Tokens(range(1, 9))])  # ids that every vocabulary has

    def init(self, device: str) -> None:
        """Load, choose the way to ask, measure. Raises LoadError."""
        settings = loading.settings()
        try:
            self.checkpoint = read(self.model_dir)
            check_endings(self.checkpoint)
        except ConfigError as error:
            raise LoadError(error.message) from error
        transformer = _transformer(self.checkpoint, settings, device)
        if self.checkpoint.kind == "embedder" and not (self.checkpoint.path / "modules.json").is_file():
            say(f"no modules.json: pooled by {self.checkpoint.pooling}, as is usual. Is this an embedding model?")
        self.limit = min(settings.max_length or self.checkpoint.max_length, self.checkpoint.max_length)
        self.encoder = Encoder(_forward(transformer, self.checkpoint, settings), 0)
        measured = self._measured(settings, device)
        free_memory()  # other workers on the same GPU may need it
        self.encoder.budget = self.max_batch_cost = measured.budget
        self.facts = {
            "model": self.checkpoint.path.name,
            "device": _device_name(device),
            "dtype": str(transformer.model.dtype).removeprefix("torch."),
            "dim": self.checkpoint.dim,
            "attention": self.encoder.forward.name,
            "pooling": transformer.pooling,
            "batch_tokens": measured.budget,
            "tokens_per_s": round(measured.rate, 1),
        }
        say(f"{self.encoder.forward.name}, {measured.budget} tokens a batch: {measured.rate:.0f} tokens/s")

    def _measured(self, settings: Settings, device: str) -> calibration.Measured:
        def ask(texts: Texts, budget: int) -> None:
            self.encoder.budget = budget
            self.encoder.encode(texts, halves=settings.batch_tokens is not None)

        kind = device.partition(":")[0]
        budgets: tuple[int, ...] = calibration.GPU_BUDGETS if kind == "cuda" else calibration.CPU_BUDGETS
        if settings.batch_tokens:
            budgets = (settings.batch_tokens,)
        say("measuring how many tokens go into a batch")
        return calibration.calibrate(ask, budgets, self.limit, _SEARCH_S.get(kind, 3.0))

    def preprocess(self, request: Request) -> Texts:
        """Bytes to arrays. ValueError for ids and lengths that would break the device for all that follow."""
        texts = rows.unpack(request.buffer)
        if texts.lengths.max() > self.limit:
            raise ValueError(f"a text of {texts.lengths.max()} tokens, the model takes {self.limit}")
        if texts.ids.max() >= self.checkpoint.vocabulary:
            raise ValueError(f"token id {texts.ids.max()}: the model knows those below {self.checkpoint.vocabulary}")
        if texts.dim > self.checkpoint.dim:
            raise ValueError(f"{texts.dim} dimensions, the model has {self.checkpoint.dim}")
        return texts

    def cost(self, item: Texts) -> float:
        """Tokens."""
        return float(item.tokens)

    def forward(self, batch: list[Texts]) -> Sequence[Floats | HTTPError]:
        """All texts of all requests at once; a request with a text that has no vector fails alone."""
        found = self.encoder.encode(rows.joined(batch))
        if self.checkpoint.kind == "embedder":
            by_dim = {dim: normalized(found, dim) for dim in {one.dim for one in batch}}
        else:
            by_dim = dict.fromkeys((one.dim for one in batch), found)
        ends = np.cumsum([len(one) for one in batch])
        return [_sound(by_dim[one.dim][end - len(one) : end]) for one, end in zip(batch, ends, strict=True)]

    def postprocess(self, output: Floats) -> Any:
        """Raw rows."""
        return output.tobytes()


def _sound(results: Floats) -> Floats | HTTPError:
    if np.isfinite(results).all():
        return results
    return HTTPError(500, "the model gives no vector for one of the texts: its numbers overflow", code="bad_vector")


def _transformer(checkpoint: Checkpoint, settings: Settings, device: str) -> Transformer:
    dtype, why = loading.dtype_for(device, settings.dtype)
    say(f"loading {checkpoint.path.name} in {str(dtype).removeprefix('torch.')} ({why})")
    began = time.monotonic()
    model = loading.load(checkpoint, device, dtype)
    say(f"loaded in {time.monotonic() - began:.1f} s, checking it")
    if checkpoint.kind == "cross-encoder":
        head = Head(model)
        return Transformer(model, head.pooling, head)
    return Transformer(model, checkpoint.pooling)


def _forward(transformer: Transformer, checkpoint: Checkpoint, settings: Settings) -> Forward:
    import torch

    with torch.inference_mode():
        forward = selfcheck.chosen(transformer, checkpoint, settings.attention, prepack=not settings.compile)
        if settings.compile:
            _compile(transformer, forward, selfcheck.sample(transformer, checkpoint))
    return forward


def _compile(transformer: Transformer, forward: Forward, texts: Texts, backend: Any = "inductor") -> None:
    """From now on the transformer goes through torch.compile, if that works and gives the same."""
    plain, expected = transformer.base, forward.pooled(texts)

    def use(fast: Any) -> None:
        transformer.base = fast
        for count in (len(texts), len(texts) // 2):
            found = forward.pooled(rows.taken(texts, np.arange(count)))
            selfcheck.check_same(transformer.model.dtype, found, expected[:count])

    transformer.base = loading.compiled(plain, use, backend)


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
