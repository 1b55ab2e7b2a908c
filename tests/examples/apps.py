"""The examples' classes without a server, and pictures to ask them about."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from mdeploy.serving.handler import File, Request
from tests import support

EXAMPLES = support.REPO / "recipes/examples"


def module(example: str) -> ModuleType:
    """The app.py of an example."""
    name = f"example_{example.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / example / "app.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def canvas(width: int, height: int, *boxes: tuple[str, tuple[int, int, int, int]]) -> Image.Image:
    """A grey image with rectangles (colour, (x1, y1, x2, y2)), the right and lower edges excluded."""
    image = Image.new("RGB", (width, height), (90, 90, 90))
    for colour, box in boxes:
        image.paste(colour, box)
    return image


def asking(image: Image.Image | bytes, query: str = "") -> Request:
    """A request with the image as the file of a form."""
    data = image if isinstance(image, bytes) else png(image)
    return Request(query=query.encode(), files=[File("image", "x.png", "image/png", data)])


def alone(handler: Any, request: Request) -> Any:
    """What one request is answered without company."""
    return handler.postprocess(handler.forward([handler.preprocess(request)])[0])


def together(handler: Any, requests: list[Request]) -> list[Any]:
    """What they are answered as one batch."""
    outputs = handler.forward([handler.preprocess(request) for request in requests])
    return [handler.postprocess(output) for output in outputs]


def started(example: str, name: str, model: Path, monkeypatch: Any) -> Any:
    """A handler of an example that has its model."""
    monkeypatch.setenv("MDEPLOY_MODEL_DIR", str(model))
    handler = getattr(module(example), name)()
    handler.init("cpu")
    return handler
