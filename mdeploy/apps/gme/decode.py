"""Pictures from strangers, decoded in processes of their own.

A picture that crashes its decoder, hangs or eats memory ends a process that knows nothing and holds nothing: neither
the edge nor the worker on the GPU notices, and another decoder takes its place.
"""

from __future__ import annotations

import base64
import resource
from pathlib import Path

from PIL import Image

from mdeploy.apps.gme import prompt, work
from mdeploy.serving import images
from mdeploy.serving.handler import Buffer, File, Handler, HTTPError, Request

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
MIN_SIDE = 4
MEMORY_BYTES = 2 << 30
"""Address space of a decoder beyond what it starts with: 50 megapixels of WEBP with transparency take 1 GiB."""


class Decode(Handler):
    """Turn an uploaded picture into the pixels that the model takes."""

    name = "decode"
    methods = ("POST",)
    timeout = 20
    queue_size = 1024
    example = Request(body=images.plain())

    def init(self, device: str) -> None:
        """Bound what this process may take."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))

    def inference(self, request: Request) -> bytes:
        """Height, width and RGB of the picture in the body, upright and scaled (see `work`)."""
        image = images.decode(
            File("image", "", "", _plain(request)),
            MAX_PIXELS,
            formats=FORMATS,
            min_side=MIN_SIDE,
            max_aspect=prompt.MAX_ASPECT,
        )
        height, width = prompt.fitted(image.height, image.width)
        # the filter of Qwen2-VL's own processor
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        return work.pack_picture(height, width, scaled.tobytes())


def _plain(request: Request) -> Buffer:
    """The picture as bytes. Raises HTTPError 400 for what is no base64."""
    if request.headers.get("content-transfer-encoding") != "base64":
        return request.buffer
    try:
        return base64.b64decode(request.buffer, validate=True)
    except ValueError as error:
        raise HTTPError(400, f"the image is no base64: {error}", code="invalid_image") from error
