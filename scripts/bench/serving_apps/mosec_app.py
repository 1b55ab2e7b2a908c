"""The model under mosec."""

from typing import Any

import model
from mosec import Server, Worker  # type: ignore[import-not-found]


class Bench(Worker):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        model.tell(0)

    def forward(self, data: Any) -> Any:
        return model.run(data) if model.MAX_BATCH > 1 else model.run([data])[0]


class RawBench(Bench):
    resp_mime_type = "application/octet-stream"

    def deserialize(self, data: Any) -> Any:
        return data

    def serialize(self, data: Any) -> Any:
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(RawBench if model.RAW else Bench, num=model.WORKERS, max_batch_size=model.MAX_BATCH)
    server.run()
