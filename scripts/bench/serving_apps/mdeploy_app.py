"""The model under mdeploy."""

from typing import Any

import model

from mdeploy.serving.handler import Handler, Request


class Bench(Handler):
    path = "/predict"
    max_batch_size = model.MAX_BATCH

    def init(self, device: str) -> None:
        model.tell(0)

    def preprocess(self, request: Request) -> Any:
        return request.body if model.RAW else request.json()

    def forward(self, batch: list[Any]) -> list[Any]:
        return model.run(batch)
