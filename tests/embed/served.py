"""An embedding service for tests that look at it from outside: the app's own process, without a supervisor."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from mdeploy.apps.embed.options import EmbedOptions
from mdeploy.serving.options import AppOptions
from tests.support import REPO, free_port, listens, until

Rows = np.ndarray[Any, np.dtype[np.float32]]


@dataclass
class Service:
    """One running service; `place` is where its log is, and the files of the stand-in."""

    url: str
    place: Path
    client: httpx.Client

    @property
    def log(self) -> str:
        return (self.place / "log").read_text(errors="replace")

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        """`body` goes as JSON."""
        return self.client.post(path, **({"json": body} if body is not None else {}), **more)

    def rows(self, given: Any, **more: Any) -> Rows:
        """The vectors of these inputs."""
        answer = self.post("/v1/embeddings", {"input": given, "encoding_format": "base64", **more})
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        assert [each["index"] for each in data] == list(range(len(data)))
        return np.stack([np.frombuffer(base64.b64decode(each["embedding"]), np.float32) for each in data])

    def health(self) -> Any:
        return self.client.get("/health").json()

    # of the stand-in

    @contextmanager
    def held(self) -> Iterator[None]:
        """Answer nothing until `go_on`, or the end of the block."""
        (self.place / "hold").touch()
        try:
            yield
        finally:
            self.go_on()

    def go_on(self) -> None:
        """Answer again."""
        (self.place / "hold").unlink(missing_ok=True)

    def seen(self) -> list[list[int]]:
        """The batches that the stand-in got: how many texts each of their pieces had."""
        file = self.place / "seen"
        return [list(map(int, line.split())) for line in file.read_text().splitlines()] if file.exists() else []


@contextmanager
def served(
    place: Path,
    model: Path,
    *,
    module: str = "mdeploy.apps",
    kind: str = "embed",
    python: Path | None = None,
    names: tuple[str, ...] = ("tiny",),
    app: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Service]:
    """`python -m MODULE KIND …` until it answers; `app` are AppOptions, `options` EmbedOptions."""
    place.mkdir(parents=True, exist_ok=True)
    port = free_port()
    of_app = AppOptions("embed", "127.0.0.1", port, (), python=str(python or ""), drain_s=2.0, **(app or {}))
    words = EmbedOptions(of_app, str(model), names, **options).argv()
    of_kind = [kind] if module == "mdeploy.apps" else []
    told = {**os.environ, "STANDIN": str(place), "PYTHONPATH": str(REPO), **(env or {})}
    with (place / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", module, *of_kind, *words], env=told, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    with process, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        service = Service(url, place, client)
        try:
            until(lambda: listens(port) or process.poll() is not None, 90, "the service listens")
            assert process.poll() is None, service.log
            yield service
        finally:
            service.go_on()
            process.terminate()


@contextmanager
def standin(place: Path, model: Path, **more: Any) -> Iterator[Service]:
    """The same with hashes for vectors: there is no torch to wait for."""
    with served(place, model, module="tests.embed.standin", **more) as service:
        yield service
