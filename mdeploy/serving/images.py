"""Pictures from strangers: what a handler needs to take an uploaded image without harm.

Handlers of images import it, in whatever interpreter they run in; nothing but the standard library is needed until
a picture is decoded (Pillow). It knows nothing of models: no sizes to scale to, no normalisation.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import TYPE_CHECKING

from mdeploy.serving.handler import File, HTTPError, Request

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 40_000_000
"""Some 120 MB once decoded; the largest phone cameras make 50 to 200 million, all others less than this."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What browsers show. Pillow knows dozens more, some of which start other programs (EPS)."""

RESPONSES = {413: "the image has too many pixels", 415: "no image, or of a format that is not supported"}
"""For a handler's `responses`."""


def upload(request: Request, field: str = "image") -> File:
    """The picture of a request: a file of a multipart form, or the whole body.

    Raises HTTPError 400 where there is none and 415 for JSON and other text.
    """
    if field in request.files:
        return request.files[field]
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent == "multipart/form-data":
        found = ", ".join(sorted({*request.files, *request.form})) or "nothing"
        raise HTTPError(400, f"the form has no file {field!r} (it has: {found})", code="missing_image")
    if sent not in ("", "application/octet-stream") and not sent.startswith("image/"):
        wanted = f"a multipart form with a file {field!r}, or the image as the body"
        raise HTTPError(415, f"expected {wanted}, not {sent}", code="unsupported_media_type")
    return File(field, "", sent, request.buffer)


def decode(
    file: File,
    max_pixels: int = MAX_PIXELS,
    *,
    formats: tuple[str, ...] = FORMATS,
    min_side: int = 1,
    max_aspect: float = math.inf,
) -> Image.Image:
    """The upright RGB image in a file, transparent parts white, the first frame where there are several.

    Size and format are checked before any pixel is decoded; `max_aspect` is the longer side over the shorter.
    Raises HTTPError: 400 for an empty or damaged file or one of another shape, 413 for more than `max_pixels` or more
    memory than this process may have, 415 for what is no image of `formats`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not len(file.buffer):
        raise HTTPError(400, "the image is empty", code="missing_image")
    try:
        image = Image.open(file.open(), formats=formats)
        _check_size(image.size, max_pixels)
        _check_shape(image.size, min_side, max_aspect)
        ImageOps.exif_transpose(image, in_place=True)  # a copy would double the memory
        return _rgb(image)
    except HTTPError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise HTTPError(413, f"the image has more than {max_pixels} pixels", code="image_too_large") from error
    except MemoryError as error:
        raise HTTPError(413, "the image takes too much memory to decode", code="image_too_large") from error
    except UnidentifiedImageError as error:
        text = f"this is no image; supported are {', '.join(formats)}"
        raise HTTPError(415, text, code="unsupported_media_type") from error
    # Decoders of damaged files raise nearly everything: SyntaxError, struct.error, EOFError, IndexError …
    except Exception as error:
        raise HTTPError(400, f"the image is damaged: {error}", code="invalid_image") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        text = f"the image has {width} x {height} pixels, at most {max_pixels} are taken"
        raise HTTPError(413, text, code="image_too_large")
    if not width * height:
        raise HTTPError(400, f"the image has {width} x {height} pixels", code="invalid_image")


def _check_shape(size: tuple[int, int], min_side: int, max_aspect: float) -> None:
    shown = f"the image has {size[0]} x {size[1]} pixels"
    if min(size) < min_side:
        raise HTTPError(400, f"{shown}: each side needs at least {min_side}", code="invalid_image")
    if max(size) > min(size) * max_aspect:
        text = f"{shown}: the longer side may be {max_aspect:g} times the shorter one at most"
        raise HTTPError(400, text, code="invalid_image")


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits a pixel: plain conversion would cut off everything above 255.
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def plain(width: int = 64, height: int = 64, colour: tuple[int, int, int] = (128, 128, 128)) -> bytes:
    """A PNG of one colour: an `example` for handlers of images, made without Pillow."""
    rows = (b"\0" + bytes(colour) * width) * height
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in (*parts, (b"IEND", b"")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
