from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdeploy.serving import images
from mdeploy.serving.handler import File, HTTPError, Request


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> File:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return File("image", "x", "", file.getvalue())


def error_of(data: bytes, **options: Any) -> HTTPError:
    with pytest.raises(HTTPError) as caught:
        images.decode(File("image", "x", "image/png", data), **options)
    return caught.value


@pytest.mark.parametrize("kind", images.FORMATS)
def test_formats(kind: str) -> None:
    image = Image.new("RGB", (7, 5), (200, 30, 40))
    found = images.decode(encoded(image, kind))
    assert (found.mode, found.size) == ("RGB", (7, 5))
    assert all(abs(a - b) < 8 for a, b in zip(found.getpixel((3, 2)), (200, 30, 40), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "EPS"])
def test_other_formats_are_not_taken(kind: str) -> None:
    assert error_of(encoded(Image.new("RGB", (32, 32)), kind).data).status == 415


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_the_camera_is_undone(orientation: int) -> None:
    upright = Image.new("RGB", (40, 24), "black")
    upright.paste("red", (0, 0, 20, 12))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turn[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = images.decode(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(found), np.asarray(upright))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = Image.new(mode, (6, 6), 40_000) if mode.startswith("I") else Image.new("RGB", (6, 6), "white").convert(mode)
    found = images.decode(encoded(image, kind))
    expected = 40_000 // 257 if mode.startswith("I") else 255
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1


def test_transparent_is_white_whatever_colour_is_hidden() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 2, 4))
    found = images.decode(encoded(image))
    assert found.getpixel((3, 3)) == (255, 255, 255)
    assert found.getpixel((0, 0)) == (0, 0, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert images.decode(encoded(palette, "PNG", transparency=0)).getpixel((1, 1)) == (255, 255, 255)


def test_pixels_are_counted_before_any_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = _png(header, zlib.compress(bytes(1000)))
    error = error_of(bomb)
    assert (error.status, error.code) == (413, "image_too_large")
    assert error_of(_png(struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0), b"x")).status == 413
    assert "7 x 5 pixels, at most 34" in error_of(encoded(Image.new("RGB", (7, 5))).data, max_pixels=34).message
    assert images.decode(encoded(Image.new("RGB", (7, 5))), max_pixels=35).size == (7, 5)


def test_shapes_and_formats_may_be_narrower() -> None:
    line = encoded(Image.new("RGB", (40, 4)))
    assert images.decode(line, min_side=4, max_aspect=10).size == (40, 4)
    assert images.decode(encoded(Image.new("RGB", (4, 40))), max_aspect=10).size == (4, 40)
    small, long = error_of(line.data, min_side=5), error_of(line.data, max_aspect=9.5)
    assert (small.status, long.status) == (400, 400)
    assert "at least 5" in small.message and "9.5 times the shorter" in long.message
    other = error_of(line.data, formats=("JPEG", "WEBP"))
    assert other.status == 415 and "supported are JPEG, WEBP" in other.message


def test_memory_that_a_process_may_not_have_is_no_damage() -> None:
    program = """
import io, resource
from PIL import Image
from mdeploy.serving import images
from mdeploy.serving.handler import File, HTTPError
out = io.BytesIO()
Image.new("L", (6000, 6000)).save(out, "PNG")
most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (60 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    images.decode(File("image", "", "", out.getvalue()))
except HTTPError as error:
    print(error.status, error.code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "413 image_too_large\n", done.stderr


def _png(header: bytes, data: bytes) -> bytes:
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_is_no_image() -> None:
    assert error_of(b"").status == 400
    assert error_of(b"just a text, whatever its name").status == 415
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG").data
    assert error_of(whole[: len(whole) // 2]).code == "invalid_image"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", images.FORMATS)
def test_damaged_files_are_answered(kind: str) -> None:
    chance = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    whole = encoded(Image.effect_noise((24, 24), 50).convert("RGB"), kind, **options).data
    refused = 0
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        try:
            assert images.decode(File("image", "x", "", bytes(broken)), max_pixels=1_000_000).mode == "RGB"
        except HTTPError as error:
            refused += 1
            assert error.status in (400, 413, 415)
    assert refused


def test_upload() -> None:
    data = images.plain()
    for sent in (b"image/png", b"application/octet-stream", b"Image/JPEG; q=1"):
        assert images.upload(Request(headers=[(b"content-type", sent)], body=data)).data == data
    file = File("photo", "a.png", "image/png", data)
    form = [(b"content-type", b"multipart/form-data; boundary=x")]
    assert images.upload(Request(headers=form, files=[file]), "photo") is file
    with pytest.raises(HTTPError, match=r"no file 'image' \(it has: photo, text\)") as caught:
        images.upload(Request(headers=form, files=[file], form=[("text", "x")]))
    assert caught.value.status == 400
    for other in (b"application/json", b"text/plain", b"application/x-www-form-urlencoded"):
        with pytest.raises(HTTPError) as caught:
            images.upload(Request(headers=[(b"content-type", other)], body=b"{}"))
        assert caught.value.status == 415


def test_plain_is_what_it_says() -> None:
    found = Image.open(io.BytesIO(images.plain(5, 3, (1, 2, 3))))
    assert (found.size, found.mode, found.getpixel((4, 2))) == ((5, 3), "RGB", (1, 2, 3))
