"""What clients see: every way to send a picture, and everything that is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.embed.served import Service
from tests.gme.pictures import blank, encoded, noise, uri

PICTURE = encoded(noise(300, 200))
FROG = {"text": "a frog", "image": uri(PICTURE)}


def upload(gme: Service, data: bytes, path: str = "/embed/image", **form: str) -> Any:
    return gme.client.post(path, files={"file": ("a.png", data, "image/png")}, data=form)


def row(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["embedding"])


def refused(answer: Any) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return answer.status_code, error["code"], error["param"]


# good ones


def test_every_way_gives_the_same_vectors(gme: Service) -> None:
    both, alone, text = gme.rows([FROG, {"image": uri(PICTURE)}, "a frog"])
    part = {"type": "image_url", "image_url": {"url": uri(PICTURE)}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "a frog"}]}
    chat = gme.post("/v1/embeddings", {"messages": [message]}).json()["data"][0]["embedding"]
    plain = gme.post("/embed/text", {"texts": ["a frog"]}).json()["embeddings"][0]
    raw = gme.client.post("/embed/image", content=PICTURE, headers={"content-type": "image/png"})
    same = [
        (both, gme.rows([message])[0]), (both, chat), (both, row(upload(gme, PICTURE, text="a frog"))),
        (both, row(upload(gme, PICTURE, "/embed/fused", text="a frog"))), (alone, gme.rows([part])[0]),
        (alone, row(upload(gme, PICTURE))), (alone, row(raw)), (text, plain), (text, gme.rows([{"text": "a frog"}])[0]),
    ]  # fmt: skip
    assert min(float(np.dot(one, other)) for one, other in same) > 0.99999
    assert max(both @ alone, both @ text, alone @ text) < 0.999


def test_a_mixed_batch_keeps_its_order(gme: Service) -> None:
    given: list[Any] = []
    for number in range(24):
        image = uri(encoded(noise(80 + 20 * number, 90, seed=number)))
        given.append([f"text {number}", {"image": image}, {"text": f"text {number}", "image": image}][number % 3])
    alone = np.concatenate([gme.rows([each]) for each in given])
    assert (gme.rows(given) * alone).sum(1).min() > 0.99999


def test_instructions_are_of_queries(gme: Service) -> None:
    usual, told = gme.rows([FROG]), gme.rows([FROG], instruction="Find what is green.")
    default = gme.rows([FROG], instruction="You are a helpful assistant.", input_type="query")
    system = {"messages": [{"role": "system", "content": "Find what is green."}, {"role": "user", "content": [
        {"type": "text", "text": "a frog"}, {"type": "image_url", "image_url": {"url": uri(PICTURE)}}]}]}  # fmt: skip
    assert (usual @ default.T).item() > 0.99999 > 0.999 > (usual @ told.T).item()
    assert (told @ gme.rows([system]).T).item() > 0.99999
    uploaded = row(upload(gme, PICTURE, text="a frog", instruction="Find what is green."))
    assert (told @ uploaded).item() > 0.99999


def test_documents_that_are_pictures_are_ranked(gme: Service) -> None:
    documents = ["a frog", {"image": uri(PICTURE)}, FROG]
    answer = gme.post("/v1/rerank", {"query": {"image": uri(PICTURE)}, "documents": documents})
    results = answer.json()["results"]
    assert answer.status_code == 200 and results[0]["index"] == 1
    assert results[0]["relevance_score"] == pytest.approx(1, abs=1e-5)


def test_usage_and_health(gme: Service) -> None:
    answer = gme.post("/v1/embeddings", {"input": ["a frog", {"image": uri(encoded(noise(448, 448)))}]}).json()
    text, health = len("system\nYou are a helpful assistant.\nuser\n\nassistant\n") + 6, gme.health()
    assert answer["usage"] == {"prompt_tokens": 2 * text + len("a frog") + 258, "total_tokens": 2 * text + 6 + 258}
    assert (health["status"], health["model"], health["device"], health["kind"]) == ("ok", "tiny", "cpu", "gme")
    assert set(health["handlers"]) == {"gme", "decode"} and health["images"] is True
    paths = gme.client.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/embed/text", "/embed/image", "/embed/fused", "/v1/rerank"} <= set(paths)


def test_special_tokens_of_users_are_text(gme: Service) -> None:
    rows = gme.rows(["<|image_pad|><|endoftext|>", {"text": "<|image_pad|>", "image": uri(PICTURE)}, "a frog"])
    assert np.isfinite(rows).all()


def test_what_is_too_long_is_refused_or_cut(gme: Service) -> None:
    long = {"input": "x" * 5000}
    assert refused(gme.post("/v1/embeddings", long)) == (400, "context_length_exceeded", "input")
    assert gme.post("/v1/embeddings", {**long, "truncate": True}).json()["usage"]["total_tokens"] == 4096
    small = {"input": ["a", {"image": uri(PICTURE)}], "truncate_prompt_tokens": 200}
    assert refused(gme.post("/v1/embeddings", small)) == (400, "context_length_exceeded", "input[1]")
    assert refused(gme.post("/v1/embeddings", {"input": "x" * 1_000_000}))[0] == 400


# pictures


def stored(orientation: int, turn: Image.Transpose | None) -> bytes:
    """noise(90, 140) as a camera stores it that was held like this."""
    image, exif = noise(90, 140), Image.Exif()
    exif[0x0112] = orientation
    return encoded(image.transpose(turn) if turn is not None else image, exif=exif)


def test_cameras_may_be_held_in_any_way(gme: Service) -> None:
    upright = row(upload(gme, stored(1, None)))
    turned = row(upload(gme, stored(8, Image.Transpose.ROTATE_270)))
    assert upright @ turned > 0.99999
    unheeded = encoded(noise(90, 140).transpose(Image.Transpose.ROTATE_270))
    assert upright @ row(upload(gme, unheeded)) < 0.999


def test_the_first_frame_is_taken_and_transparency_is_white(gme: Service) -> None:
    frames = [noise(60, 60, seed) for seed in (1, 2)]
    moving = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert row(upload(gme, moving)) @ row(upload(gme, encoded(frames[0]))) > 0.99999
    clear = Image.new("RGBA", (60, 60), (255, 0, 0, 0))
    assert row(upload(gme, encoded(clear))) @ row(upload(gme, encoded(Image.new("RGB", (60, 60), "white")))) > 0.99999


def test_the_largest_and_the_longest(gme: Service) -> None:
    for size in ((8, 1600), (7000, 7000)):
        assert np.isfinite(row(upload(gme, blank(*size)))).all()


def saved(kind: str) -> bytes:
    return encoded(Image.new("RGB", (40, 40)), kind)


BAD = {
    "bomb": (blank(13_000, 13_000), 413, "image_too_large"),
    "a little too large": (blank(7100, 7100), 413, "image_too_large"),
    "line": (blank(1, 50_000), 400, "invalid_image"),
    "small": (blank(3, 300), 400, "invalid_image"),
    "elongated": (blank(4, 804), 400, "invalid_image"),
    "EPS": (saved("EPS"), 415, "unsupported_media_type"),
    "GIF": (encoded(noise(9, 9), "GIF", save_all=True, append_images=[noise(9, 9, 1)]), 415, "unsupported_media_type"),
    "TIFF": (saved("TIFF"), 415, "unsupported_media_type"),
    "BMP": (saved("BMP"), 415, "unsupported_media_type"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1'/></svg>", 415, None),
    "truncated": (encoded(noise(400, 400), "JPEG")[:3000], 400, "invalid_image"),
    "empty": (b"", 400, "missing_image"),
    "text": (b"a text", 415, "unsupported_media_type"),
    "50 MB": (bytes(50_000_000), 415, "unsupported_media_type"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(gme: Service, name: str) -> None:
    data, status, code = BAD[name]
    found = refused(upload(gme, data))
    assert found == (status, code or "unsupported_media_type", "file")
    if len(data) < 1_000_000:
        given = {"input": ["a", {"image": uri(data)}]}
        assert refused(gme.post("/v1/embeddings", given)) == (status, code or "unsupported_media_type", "input[1]")


def test_bad_requests(gme: Service) -> None:
    def asked(given: Any, **more: Any) -> tuple[int, str, str | None]:
        return refused(gme.post("/v1/embeddings", {"input": given, **more}))

    assert asked([{"image": "http://127.0.0.1:1/"}]) == (400, "invalid_image", "input.image")
    assert asked(["a", {"image": "file:///etc/passwd"}]) == (400, "invalid_image", "input[1].image")
    assert asked({"image": "data:image/png;base64,!!"}) == (400, "invalid_image", "input")
    assert asked({"image": "data:image/png;base64,"}) == (400, "missing_image", "input")
    assert asked([FROG] * 65) == (400, "too_many_images", "input")
    assert asked([1, 2]) == (400, "token_ids_not_supported", "input")
    assert asked("a", dimensions=32)[0] == 400
    assert asked("a", prompt_name="query") == (400, "unknown_prompt", "prompt_name")
    assert asked("a", instruction="x", input_type="document")[0] == 400
    assert refused(gme.post("/embed/image", {"image": uri(PICTURE)}))[0] == 415
    assert refused(gme.client.post("/embed/image", files={"other": ("a", PICTURE)})) == (400, "missing_image", None)
    assert refused(upload(gme, PICTURE, "/embed/fused")) == (400, "empty_input", "text")
    assert refused(gme.client.post("/embed/image", content=b"", headers={"content-type": "image/png"}))[0] == 400
    too_large = gme.client.post("/embed/image", content=io.BytesIO(bytes(65 << 20)))
    assert refused(too_large)[0] == 413
    assert gme.rows(["a frog"]).shape == (1, 64)
