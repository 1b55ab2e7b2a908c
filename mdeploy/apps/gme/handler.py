"""The worker of GME on its GPU: prompts and pixels in, float32 rows out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from mdeploy.apps.embed import calibration, checkpoint, loading
from mdeploy.apps.embed.encoder import free_memory, is_out_of_memory, normalized
from mdeploy.apps.embed.loading import Settings, say
from mdeploy.apps.embed.rows import Texts
from mdeploy.apps.gme import encoder, prompt, work
from mdeploy.apps.gme.encoder import Encoder
from mdeploy.apps.gme.model import Model
from mdeploy.apps.gme.work import Input, Work
from mdeploy.errors import ConfigError
from mdeploy.serving.handler import Handler, HTTPError, Request
from mdeploy.serving.load import LoadError

Floats = NDArray[np.float32]

_SEARCH_S = {"cpu": 3.0, "cuda": 10.0}


class Embedder(Handler):
    """Qwen2-VL as GME trained it."""

    name = "gme"
    max_batch_size = 1024
    queue_size = 100_000  # the edge counts tokens
    example: ClassVar[bytes] = work.pack([Input(range(10, 18))])

    def init(self, device: str) -> None:
        """Load, choose the way to ask, measure. Raises LoadError."""
        settings = loading.settings()
        try:
            self.checkpoint = checkpoint.read(self.model_dir)
        except ConfigError as error:
            raise LoadError(error.message) from error
        if self.checkpoint.kind != "gme":
            raise LoadError(f"{self.model_dir} is no GME-Qwen2-VL: its architecture is {self.checkpoint.architecture}")
        if settings.compile:
            say("--compile does nothing for GME: pictures have too many shapes")
        self._load(settings, device)
        measured = self._measured(settings, device)
        free_memory()  # other workers on the same GPU may need it
        self.encoder.budget = self.max_batch_cost = measured.budget
        self.facts = {
            "model": self.checkpoint.path.name,
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "dtype": str(self.encoder.model.dtype).removeprefix("torch."),
            "dim": self.checkpoint.dim,
            "attention": self.encoder.model.way,
            "batch_tokens": measured.budget,
            "tokens_per_s": round(measured.rate, 1),
        }
        say(f"{self.encoder.model.way}, {measured.budget} tokens a batch: {measured.rate:.0f} tokens/s of pictures")

    def _load(self, settings: Settings, device: str) -> None:
        dtype, why = loading.dtype_for(device, settings.dtype)
        say(f"loading {self.checkpoint.path.name} in {str(dtype).removeprefix('torch.')} ({why})")
        began = time.monotonic()
        loaded = loading.load(self.checkpoint, device, dtype)
        say(f"loaded in {time.monotonic() - began:.1f} s, checking it")
        self.image_token = int(loaded.config.image_token_id)
        model = Model(loaded, self.checkpoint.path)
        encoder.choose(model, self.image_token, settings.attention)
        self.encoder = Encoder(model, 0)
        self.limit = min(settings.max_length or self.checkpoint.max_length, self.checkpoint.max_length)

    # how much at once

    def _measured(self, settings: Settings, device: str) -> calibration.Measured:
        """The budget by texts, which need the larger batches; the rate by pictures, which take longer."""
        kind = device.partition(":")[0]
        budgets: Sequence[int] = calibration.GPU_BUDGETS if kind == "cuda" else calibration.CPU_BUDGETS
        if settings.batch_tokens:
            budgets = (settings.batch_tokens,)
        say("measuring how many tokens go into a batch")

        def ask(texts: Texts, budget: int) -> None:
            self._ask(texts, budget, halves=settings.batch_tokens is not None)

        best = calibration.calibrate(ask, budgets, self.limit, _SEARCH_S.get(kind, 3.0))
        return self._with_pictures(best, all_of_it=kind == "cuda")

    def _ask(self, texts: Texts, budget: int, *, halves: bool) -> None:
        ends = np.cumsum(texts.lengths)
        inputs = [Input(texts.ids[end - size : end].tolist()) for end, size in zip(ends, texts.lengths, strict=True)]
        self.encoder.budget = budget
        self.encoder.encode(inputs, halves=halves)

    def _with_pictures(self, best: calibration.Measured, *, all_of_it: bool) -> calibration.Measured:
        """Less where as many tokens of pictures are too much for the device; a CPU shows its rate with one picture."""
        picture = encoder.noise(np.random.default_rng(0), 16, 16)
        one = Input([self.image_token] * prompt.MIN_TOKENS, picture)
        budget = best.budget
        while True:
            inputs = [one] * (max(1, budget // prompt.MIN_TOKENS) if all_of_it else 1)
            try:
                with torch.inference_mode():
                    self.encoder.model.pooled(inputs).cpu()
                    began = time.perf_counter()
                    self.encoder.model.pooled(inputs).cpu()
                rate = len(inputs) * prompt.MIN_TOKENS / (time.perf_counter() - began)
                return calibration.Measured(budget, min(best.rate, rate))
            except (RuntimeError, MemoryError) as error:
                if len(inputs) == 1 or not is_out_of_memory(error):
                    raise
            free_memory()
            budget //= 2

    # work

    def preprocess(self, request: Request) -> Work:
        """Bytes to arrays. ValueError for ids and lengths that would break the device for all that follow."""
        found = work.unpack(request.buffer)
        if not found.inputs:
            raise ValueError("no inputs")
        if found.dim > self.checkpoint.dim:
            raise ValueError(f"{found.dim} dimensions, the model has {self.checkpoint.dim}")
        for each in found.inputs:
            self._check(each)
        return found

    def _check(self, each: Input) -> None:
        ids, picture = np.asarray(each.ids), each.picture
        if not 1 <= len(ids) <= self.limit:
            raise ValueError(f"a prompt of {len(ids)} tokens, the model takes 1 to {self.limit}")
        if ids.max() >= self.checkpoint.vocabulary:
            raise ValueError(f"token id {ids.max()}: the model knows those below {self.checkpoint.vocabulary}")
        expected = 0 if picture is None else prompt.tokens(picture.height, picture.width)
        found = int((ids == self.image_token).sum())
        if found != expected:
            raise ValueError(f"a prompt with {found} image tokens has a picture of {expected}")

    def cost(self, item: Work) -> float:
        """Tokens of texts and pictures."""
        return float(item.tokens)

    def forward(self, batch: list[Work]) -> Sequence[Floats | HTTPError]:
        """All inputs of all requests at once; a request with an input that has no vector fails alone."""
        found = self.encoder.encode([each for one in batch for each in one.inputs])
        results: list[Floats | HTTPError] = []
        start = 0
        for one in batch:
            end = start + len(one.inputs)
            results.append(_sound(normalized(found[start:end], one.dim)))
            start = end
        return results

    def postprocess(self, output: Floats) -> Any:
        """Raw rows."""
        return output.tobytes()


def _sound(vectors: Floats) -> Floats | HTTPError:
    good = np.isfinite(vectors).all(axis=1)
    if good.all():
        return vectors
    text = f"the model gives no vector for input {int(good.argmin())}: its numbers overflow"
    return HTTPError(500, text, code="bad_vector")
