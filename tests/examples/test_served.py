"""The examples over HTTP, as their READMEs have it."""

from __future__ import annotations

import dataclasses
import shutil
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests import support
from tests.examples import apps, served
from tests.examples.served import Service
from tests.examples.tiny_words import COLOURS, NUMBERS, TASK


@pytest.fixture(scope="package")
def classes(tmp_path_factory: pytest.TempPathFactory, onnx_models: Path) -> Iterator[Service]:
    """The image-classification example: nothing but its recipe, whose model comes from a hub."""
    home, hub = tmp_path_factory.mktemp("classes"), tmp_path_factory.mktemp("hub")
    shutil.copytree(onnx_models / "resnet", hub / "Xenova/resnet-18")
    port = support.free_port()
    with support.running("mirror", hub, "--port", str(port), MDEPLOY_HOME=str(hub / "home")):
        support.until(lambda: support.listens(port))
        at = {"MODELSCOPE_ENDPOINT": f"http://127.0.0.1:{port}", "MODELSCOPE_CACHE": str(home / "cache")}
        with served.example("image-classification", home, **at) as service:
            yield service


@pytest.fixture(scope="package")
def boxes(tmp_path_factory: pytest.TempPathFactory, onnx_models: Path) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("boxes")
    with served.example("object-detection", home, "--model", onnx_models / "yolo-zoo") as service:
        yield service


@pytest.fixture(scope="package")
def texts(tmp_path_factory: pytest.TempPathFactory, torch_python: Path, torch_models: Path) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("texts")
    words = ("--model", torch_models / "t5", "--python", torch_python)
    with served.example("text-to-text", home, *words) as service:
        yield service


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Red, with a blue square on its right."""
    path = tmp_path / "picture.png"
    apps.canvas(832, 416, ("blue", (448, 48, 512, 112))).save(path)
    return path


def bad_pictures() -> dict[str, tuple[int, dict[str, object]]]:
    """What people send, and the status it deserves."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    whole = apps.png(Image.effect_noise((200, 200), 50).convert("RGB"), "JPEG")
    return {
        "no image": (400, {"files": {"photo": ("a.png", whole, "image/png")}}),
        "an empty file": (400, {"files": {"image": ("a.png", b"", "image/png")}}),
        "nothing": (400, {"content": b""}),
        "text as image": (415, {"files": {"image": ("a.png", b"I am a text", "image/png")}}),
        "text as body": (415, {"content": b"I am a text", "headers": {"content-type": "image/jpeg"}}),
        "JSON": (415, {"json": {"image": "aGVsbG8="}}),
        "a bomb": (413, {"files": {"image": ("a.png", bomb, "image/png")}}),
        "half a file": (400, {"files": {"image": ("a.jpg", whole[: len(whole) // 2], "image/jpeg")}}),
        "a text field": (400, {"data": {"image": "cat.jpg"}, "files": {"x": b""}}),
        "one pixel": (200, {"files": {"image": ("a.png", apps.png(Image.new("RGB", (1, 1))), "image/png")}}),
        "sixteen bits": (200, {"content": apps.png(Image.new("I;16", (9, 9), 999))}),
    }


@pytest.fixture(params=["classes", "boxes", pytest.param("captions", marks=pytest.mark.engine)])
def pictures(request: pytest.FixtureRequest) -> tuple[Service, str]:
    """Each service of images, and its path."""
    paths = {"classes": "/classify", "boxes": "/detect", "captions": "/caption"}
    return request.getfixturevalue(request.param), paths[request.param]


def test_bad_pictures_are_answered_and_no_worker_minds(pictures: tuple[Service, str]) -> None:
    service, path = pictures
    before = service.pids()
    cases = bad_pictures()
    with ThreadPoolExecutor(8) as several:
        found = list(several.map(lambda case: service.post(path, **case[1]), cases.values()))
    for (what, (status, _)), answer in zip(cases.items(), found, strict=True):
        assert answer.status_code == status, (what, answer.text)
        if status >= 400:
            assert answer.json()["error"]["message"], what
    assert service.pids() == before


def test_classification(classes: Service, picture: Path, tmp_path: Path) -> None:
    done = classes.query(picture, "--top", "3")
    assert done.returncode == 0, done.stderr
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert len(lines) == 3
    assert all(label.startswith("thing ") for _, label in lines)
    scores = [float(score) for score, _ in lines]
    assert scores == sorted(scores, reverse=True)
    wrong = classes.query(picture, "--top", "0")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("400: ") and "must be a number from 1 to 100" in wrong.stderr
    assert classes.query(tmp_path / "none.jpg").stderr.startswith("cannot read ")
    gone = Service(classes.name, f"http://127.0.0.1:{support.free_port()}", classes.home).query(picture)
    assert gone.returncode == 1 and "is the service up?" in gone.stderr


def test_many_at_once_get_their_own_answer(boxes: Service) -> None:
    """Batches are formed under load; every picture has its square elsewhere."""
    places = [(32 * column, 32 * row) for column in range(1, 12, 2) for row in range(1, 12, 2)]

    def ask(place: tuple[int, int]) -> list[float]:
        x, y = place
        image = apps.canvas(416, 416, ("red", (x, y, x + 32, y + 32)))
        (found,) = boxes.post("/detect", content=apps.png(image)).json()["detections"]
        assert found["label"] == "person"
        return list(found["box"])

    with ThreadPoolExecutor(16) as several:
        found = list(several.map(ask, places))
    assert found == [pytest.approx([x, y, x + 32, y + 32], abs=0.1) for x, y in places]


def test_detection(boxes: Service, picture: Path) -> None:
    done = boxes.query(picture, "--score", "0.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("  ")[1:] for line in done.stdout.splitlines()] == [["car", "448,48 - 512,112"]]
    assert boxes.query(picture, "--score", "1").stdout == ""


@pytest.mark.engine
def test_texts(texts: Service) -> None:
    done = texts.query(TASK + "three")
    assert (done.returncode, done.stdout) == (0, "drei\n"), done.stderr
    assert texts.query(TASK + "four", "--num-beams", "2", "--max-new-tokens", "9").stdout.startswith("vier")
    assert texts.query(TASK + "one", "--num-beams", "0").stderr.startswith("422: ")
    with ThreadPoolExecutor(12) as several:
        asked = [word for word in NUMBERS for _ in range(4)]
        answers = list(several.map(lambda word: texts.post("/generate", json={"text": TASK + word}).json(), asked))
    assert [answer["text"] for answer in answers] == [NUMBERS[word] for word in asked]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("status", "sent"),
    [
        (400, {"content": b"{"}),
        (400, {"content": b""}),
        (400, {"json": {"text": " "}}),
        (400, {"json": {"text": "one " * 2000}}),
        (400, {"content": b'{"text": "half a pair: \\ud83d"}'}),
        (422, {"json": {"text": "a" * 40_000}}),
        (422, {"json": {"text": 5}}),
        (422, {"json": {"txt": "one"}}),
        (422, {"json": {"text": "one", "num_beams": 99}}),
        (422, {"json": {"text": "one", "max_new_tokens": True}}),
        (422, {"json": {"text": "one", "length_penalty": "x"}}),
        (422, {"json": ["one"]}),
        (422, {"json": {"text": "one", "temperature": 1}}),
    ],
)
def test_bad_texts_are_answered(status: int, sent: dict[str, object], texts: Service) -> None:
    before = texts.pids()
    answer = texts.post("/generate", **sent)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert texts.pids() == before


@pytest.mark.engine
def test_captions(captions: Service, tmp_path: Path) -> None:
    for colour, rgb in COLOURS.items():
        file = tmp_path / f"{colour}.jpg"
        Image.new("RGB", (300, 200), rgb).save(file)
        done = captions.query(file)
        assert (done.returncode, done.stdout) == (0, f"a picture of {colour}\n"), done.stderr
    prompted = captions.query(tmp_path / "red.jpg", "--prompt", "a photo of", "--num-beams", "2")
    assert prompted.stdout.startswith("a photo of ")
    stranger = dataclasses.replace(captions, key="").query(tmp_path / "red.jpg")
    assert stranger.returncode == 1 and stranger.stderr.startswith("401: ")
