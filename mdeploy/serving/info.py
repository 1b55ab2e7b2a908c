"""What a handler says of itself to the edge, which never imports a user's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mdeploy.serving.handler import Buffer, Request, sendable

BOUNDS: Mapping[str, tuple[float, float]] = {
    "max_batch_size": (1, 100_000),
    "max_wait_ms": (0, 60_000),
    "timeout": (0.001, 86_400),
    "queue_size": (1, 1_000_000),
    "workers_per_device": (1, 256),
}
"""The least and the most a number of a handler may be, whoever sets it: the class, a recipe or the command line."""

WHOLE = ("max_batch_size", "queue_size", "workers_per_device")


@dataclass(frozen=True, slots=True)
class HandlerInfo:
    """One handler with its defaults and overrides applied. Schemas are JSON Schema, times as named.

    `source` is the file its class is in. `example` is a request ready to be asked. `aliases` are further paths.
    `facts` are known once a worker is ready.
    """

    name: str
    path: str
    aliases: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("GET", "POST")
    max_batch_size: int = 1
    max_batch_cost: float | None = None
    max_wait_ms: float = 0.0
    timeout: float = 60.0
    queue_size: int = 256
    workers_per_device: int = 1
    example: Request | None = None
    body: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None
    responses: Mapping[int, str] = field(default_factory=dict)
    streamed_as: Literal["sse", "raw"] = "sse"
    streams: bool = False
    doc: str = ""
    source: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, or the head of a streamed one. `code` and `message` are set for errors (status >= 400)."""

    status: int
    media_type: str
    body: Buffer = b""
    headers: tuple[tuple[str, str], ...] = ()
    code: str = ""
    message: str = ""

    def __reduce__(self) -> Any:
        body = sendable(self.body)
        return Reply, (self.status, self.media_type, body, self.headers, self.code, self.message)


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker as /health and /metrics show it. Memory in bytes, 0 where no GPU is used."""

    pid: int
    device: str
    generation: int
    state: Literal["starting", "ready", "busy", "stopped", "retiring"]
    requests: int = 0
    gpu_memory_bytes: int = 0
