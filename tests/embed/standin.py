"""An embedding service whose vectors are hashes of the token ids: everything is real but the model.

    python -m tests.embed.standin WORDS      the words of `python -m mdeploy.apps embed`

While the file `hold` exists in the directory STANDIN, no batch is answered; `seen` there has a line for each batch:
how many texts each piece of it has. A text with the token id of STANDIN_POISON fails.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from mdeploy.apps.embed import work
from mdeploy.serving.handler import Handler, HTTPError, Request

DIM = 64
BUDGET = 256


def vector(ids: Any, dim: int = DIM) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What the stand-in answers for these token ids."""
    seed = zlib.crc32(array("I", ids).tobytes())
    row = np.random.default_rng(seed).standard_normal(DIM)[: dim or DIM]
    found: np.ndarray[Any, np.dtype[np.float32]] = (row / np.linalg.norm(row)).astype(np.float32)
    return found


def score(ids: Any, second: int) -> float:
    """What it answers for a pair: how many tokens of the second text are in the first."""
    first = set(ids[1 : second - 1])
    return float(sum(each in first for each in ids[second:-1]) - 1)


class Embedder(Handler):
    """Takes and answers what the real one does."""

    name = "embed"
    max_batch_size = 1024
    max_batch_cost = float(BUDGET)
    queue_size = 100_000
    timeout = 30
    example = Request(body=work.pack([work.Tokens((1, 2, 3))]))

    def init(self, device: str) -> None:
        self._place = Path(os.environ["STANDIN"])
        self._poison = int(os.environ.get("STANDIN_POISON", -1))
        self._scores = "STANDIN_SCORES" in os.environ
        self.facts = {"device": device, "dtype": "float32", "tokens_per_s": 10_000}

    def preprocess(self, request: Request) -> work.Work:
        return work.unpack(request.buffer)

    def cost(self, item: work.Work) -> float:
        return item.tokens

    def forward(self, batch: list[work.Work]) -> list[Any]:
        with (self._place / "seen").open("a") as seen:
            print(*(len(item.texts) for item in batch), file=seen)
        while (self._place / "hold").exists():
            time.sleep(0.005)
        return [self._answer(item) for item in batch]

    def _answer(self, item: work.Work) -> Any:
        if any(self._poison in text.ids for text in item.texts):
            return HTTPError(500, "the model gave no vector", code="bad_vector")
        if self._scores:
            return np.array([score(text.ids, text.second) for text in item.texts], np.float32)
        return np.stack([vector(text.ids, item.dim) for text in item.texts])

    def postprocess(self, output: Any) -> bytes:
        if isinstance(output, HTTPError):
            raise output
        return bytes(output.tobytes())


if __name__ == "__main__":
    from mdeploy.apps import app
    from mdeploy.apps.embed import options, service

    told = options.parse(sys.argv[1:])
    sys.exit(app.main(told.app, service.kind(told, f"{__file__}:Embedder")))
