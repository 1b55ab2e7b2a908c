"""Classes that do what a request tells them to, and write down what they were asked: see tests/serving/served.py."""
# ruff: noqa: RUF012 as users write it

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mdeploy.serving.handler import Handler, HTTPError, Request, Response

PLACE = Path(os.environ.get("LAB", "."))


def note(file: str, text: object) -> None:
    """One line more in a file of the test's."""
    with (PLACE / file).open("a") as out:
        out.write(f"{text}\n")


def computing(items: int) -> None:
    """How many items this worker is at now."""
    (PLACE / f"worker-{os.getpid()}").write_text(str(items))


class Echo(Handler):
    """Batches that take a while. `do` says what else happens to an item."""

    path = "/echo"
    max_batch_size = 4
    timeout = 3
    example = {"n": 0}

    def init(self, device: str) -> None:
        note("init", os.getpid())

    def forward(self, batch: list[Any]) -> Sequence[Any]:
        computing(len(batch))
        note("batches", len(batch))
        for item in batch:
            note("seen", item["n"])
            act(item.get("do"))
        time.sleep(max(item.get("sleep", 0) for item in batch))
        computing(0)
        return batch


def act(do: str | None) -> None:
    """The faults a model can have."""
    if do == "die":
        note("deaths", os.getpid())
        os._exit(9)
    if do == "hang":
        time.sleep(3600)
    if do == "raise":
        raise RuntimeError("this item is broken")


class Small(Handler):
    """Runs out of memory with more than two items; an item may be bad in every place there is."""

    path = "/small"
    max_batch_size = 8
    errors = {KeyError: 404}
    responses = {409: "taken"}

    def preprocess(self, request: Request) -> Any:
        item = request.json()
        if item.get("bad") == "preprocess":
            raise ValueError("it has no shape")
        return item

    def forward(self, batch: list[Any]) -> Sequence[Any]:
        note("sizes", len(batch))
        while any(item.get("gate") for item in batch) and not (PLACE / "open").exists():
            time.sleep(0.01)
        if len(batch) > 2:
            raise MemoryError(f"{len(batch)} items")
        if any(item.get("bad") == "forward" for item in batch):
            raise RuntimeError("secret of the model")
        return batch

    def postprocess(self, output: Any) -> Any:
        if output.get("bad") == "postprocess":
            raise HTTPError(409, "it is taken")
        if output.get("bad") == "missing":
            raise KeyError("no such voice")
        return output


class Slow(Handler):
    """One at a time, with little room and little time."""

    path = "/slow"
    timeout = 1.5
    queue_size = 3

    def inference(self, request: Request) -> Any:
        item = request.json()
        note("slow", item["n"])
        time.sleep(item.get("sleep", 0))
        return item


class Events(Handler):
    """A stream of server-sent events; without `count` it goes on until somebody stops it."""

    path = "/events"

    def inference(self, request: Request) -> Iterator[Any]:
        item = request.json()
        try:
            for number in range(item.get("count", 1 << 40)):
                if number == item.get("fail_at"):
                    raise RuntimeError("secret of the stream")
                yield {"number": number}
                time.sleep(item.get("sleep", 0))
        finally:
            note("streams", "ended")


class Raw(Handler):
    """A stream of bytes."""

    path = "/raw"
    streamed_as = "raw"

    def inference(self, request: Request) -> Iterator[bytes]:
        for number in range(4):
            yield bytes([number]) * 1000


class Parcel(Handler):
    """Gives back what it got: the body, or the files of a form."""

    path = "/parcel"
    methods = ("GET", "POST", "PUT")

    def inference(self, request: Request) -> Any:
        if request.files or request.form:
            files = [[f.field, f.name, f.type, len(f.data)] for f in request.files.values()]
            return {"form": dict(request.form), "files": files}
        if request.method == "GET":
            return {"query": dict(request.query), "agent": request.headers.get("x-agent")}
        return Response(request.body, media_type=request.headers.get("content-type"))


class Odd(Handler):
    """Answers with whatever it is told to, sense or none."""

    path = "/odd"

    def inference(self, request: Request) -> Any:
        item = request.json()
        if "value" in item:
            return {"set": {1}, "object": object(), "nan": float("nan"), "bytes": {"a": b"x"}, "none": None}[
                item["value"]
            ]
        media_type, headers = item.get("media_type"), item.get("headers")
        return Response(item.get("body", "x").encode(), item.get("status", 200), media_type, headers)


class Costly(Handler):
    """Counts a batch by the length of its texts; an item without a text has no cost."""

    path = "/costly"
    max_batch_size = 8
    max_batch_cost = 10

    def forward(self, batch: list[Any]) -> Sequence[Any]:
        note("costs", sum(len(item["text"]) for item in batch))
        time.sleep(0.1)
        return [{"text": item["text"]} for item in batch]

    def cost(self, item: Any) -> float:
        return len(item["text"])
