from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdeploy.serving.handler import HTTPError
from tests.examples import apps, tiny_onnx

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture
def handler(onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return apps.started("image-classification", "Classifier", onnx_models / "resnet", monkeypatch)


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def scaled(pixels: Any, width: int, height: int) -> Any:
    """Bilinear with antialiasing, from its definition: a triangle as wide as the step."""
    rows = weights(pixels.shape[0], height) @ pixels.transpose(2, 0, 1)
    return (rows @ weights(pixels.shape[1], width).T).transpose(1, 2, 0)


def weights(old: int, new: int) -> Any:
    step = old / new
    reach = max(step, 1.0)
    centres = (np.arange(new) + 0.5) * step
    distance = np.abs(np.arange(old)[None] + 0.5 - centres[:, None]) / reach
    found = np.clip(1 - distance, 0, None)
    return found / found.sum(1, keepdims=True)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900), (200, 120), (256, 256), (31, 30)])
def test_preprocessing_is_that_of_torchvision(width: int, height: int, handler: Any) -> None:
    image = noise(width, height, 1)
    # Resize(256): the shorter side exactly, the longer one truncated. CenterCrop(224): the offset rounded.
    short = min(width, height)
    new_width, new_height = (256 if s == short else int(256 * s / short) for s in (width, height))
    whole = scaled(np.asarray(image, np.float64), new_width, new_height)
    left, top = round((new_width - 224) / 2), round((new_height - 224) / 2)
    expected = (whole[top : top + 224, left : left + 224] / 255 - MEAN) / STD
    found = handler.preprocess(apps.asking(image)).pixels
    assert found.shape == (3, 224, 224)
    # Pillow rounds to 8 bits after each direction.
    assert np.abs(found.transpose(1, 2, 0) - expected).max() < 2 / 255 / 0.22


@pytest.mark.parametrize(("width", "height"), [(256, 256), (301, 256), (256, 303), (1000, 256)])
def test_crop_is_exact(width: int, height: int) -> None:
    image = noise(width, height, 2)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    expected = np.asarray(image)[top : top + 224, left : left + 224]
    assert np.array_equal(np.asarray(apps.module("image-classification").middle(image)), expected)


def test_answers_are_right_alone_and_together(handler: Any) -> None:
    pictures = [noise(300, 300, seed) for seed in range(4)] + [apps.canvas(90, 50, ("red", (0, 0, 90, 50)))]
    requests = [apps.asking(image, f"top={top}") for image, top in zip(pictures, (1, 2, 5, 100, 3), strict=True)]
    alone = [apps.alone(handler, request) for request in requests]
    for one, other in zip(alone, apps.together(handler, requests), strict=True):
        assert [c["index"] for c in one["classes"]] == [c["index"] for c in other["classes"]]
        assert [c["score"] for c in one["classes"]] == pytest.approx([c["score"] for c in other["classes"]], rel=1e-4)
    assert [len(answer["classes"]) for answer in alone] == [1, 2, 5, 100, 3]
    for image, answer in zip(pictures, alone, strict=True):
        logits = (
            handler.preprocess(apps.asking(image)).pixels.mean((1, 2), dtype=np.float64) @ tiny_onnx.resnet_weight()
        )
        grown = np.exp(logits)
        expected = np.sort(grown / grown.sum())[::-1]
        best = answer["classes"][0]
        assert best["index"] == int(np.argmax(logits))
        assert best["label"] == f"thing {best['index']}"
        assert [c["score"] for c in answer["classes"]] == pytest.approx(
            list(expected[: len(answer["classes"])]), rel=1e-3
        )


def test_a_model_for_batches_of_one_and_without_labels(onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = apps.started("image-classification", "Classifier", onnx_models / "resnet-of-one", monkeypatch)
    requests = [apps.asking(noise(64, 64, seed), "top=1") for seed in range(3)]
    found = apps.together(handler, requests)
    assert found == [apps.alone(handler, request) for request in requests]
    assert found[0]["classes"][0]["label"] == str(found[0]["classes"][0]["index"])


@pytest.mark.parametrize("top", ["0", "101", "-1", "1.5", "x", "", "²", "1" * 5000])
def test_wrong_numbers(top: str, handler: Any) -> None:
    with pytest.raises(HTTPError) as caught:
        handler.preprocess(apps.asking(noise(8, 8, 0), f"top={top}"))
    assert (caught.value.status, caught.value.code) == (400, "invalid_parameter")
    assert len(caught.value.message) < 100


def test_extreme_shapes(handler: Any) -> None:
    assert apps.alone(handler, apps.asking(noise(1, 1, 0)))["classes"]
    assert apps.alone(handler, apps.asking(noise(64, 1, 0)))["classes"]
    with pytest.raises(HTTPError, match="1 x 30000 pixels is too elongated, at most 64 to 1"):
        handler.preprocess(apps.asking(Image.new("RGB", (1, 30_000))))


def test_another_model_is_refused_at_the_start(onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("yolo-zoo", "yolo-ultralytics"):
        with pytest.raises(ValueError, match=r"model\.onnx is no classifier with an input"):
            apps.started("image-classification", "Classifier", onnx_models / other, monkeypatch)
