"""One request through a class, as a worker runs it: loaded by its spec, described, prepared, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mdeploy.serving import load
from mdeploy.serving.handler import Request
from mdeploy.serving.info import HandlerInfo, Reply
from mdeploy.serving.runner import Answered, Runner


class Asked:
    """A handler of a file, ready to be asked."""

    def __init__(self, spec: str | Path, device: str = "cpu") -> None:
        (cls,) = load.handlers(str(spec))
        self.info: HandlerInfo = load.describe(cls)
        self.handler: Any = cls()
        self.handler.init(device)
        self._runner = Runner(self.handler, self.info)

    def batch(self, *requests: Request) -> list[Reply]:
        replies: dict[int, Reply] = {}
        for event in self._runner.run(requests):
            assert isinstance(event, Answered), event
            replies.update(event.replies)
        return [replies[index] for index in range(len(requests))]

    def __call__(self, request: Request) -> Reply:
        return self.batch(request)[0]

    def json(self, body: Any) -> Reply:
        return self(posted(body))


def posted(body: Any) -> Request:
    return Request(headers=((b"content-type", b"application/json"),), body=json.dumps(body).encode())
