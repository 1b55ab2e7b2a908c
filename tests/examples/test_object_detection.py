from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from mdeploy.serving.handler import HTTPError
from tests.examples import apps, tiny_onnx

EXPORTS = {"yolo-zoo": 416, "yolo-ultralytics": 640, "yolo-anchor-free": 640}


@pytest.fixture(scope="module")
def app() -> Any:
    return apps.module("object-detection")


@pytest.fixture(params=list(EXPORTS))
def detector(request: pytest.FixtureRequest, onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = apps.started("object-detection", "Detector", onnx_models / request.param, monkeypatch)
    assert found.export.size == EXPORTS[request.param]
    return found


def cells(size: int, width: int, height: int) -> tuple[float, float, float]:
    """Scale into the square, and the grey to the left and on top, from the definition."""
    scale = size / max(width, height)
    return scale, (size - width * scale) / 2, (size - height * scale) / 2


@pytest.mark.parametrize(("width", "height"), [(832, 416), (416, 832), (1280, 960), (208, 208)])
def test_boxes_are_where_the_objects_are(width: int, height: int, detector: Any) -> None:
    """One cell of the grid is filled exactly, so that its box is known exactly, in pixels of the image."""
    scale, left, top = cells(detector.export.size, width, height)
    column, row = 7, 6
    box = [(column * 32 - left) / scale, (row * 32 - top) / scale, (column * 32 + 32 - left) / scale]
    box.append((row * 32 + 32 - top) / scale)
    image = apps.canvas(width, height, ("red", tuple(round(side) for side in box)))  # type: ignore[arg-type]
    found = apps.alone(detector, apps.asking(image))
    assert (found["width"], found["height"]) == (width, height)
    (only,) = found["detections"]
    assert only["label"] in ("person", "thing 0")
    assert only["box"] == pytest.approx(box, abs=1.5 / scale)
    assert 0.9 < only["score"] <= 1


def test_alone_and_together(detector: Any) -> None:
    pictures = [
        apps.canvas(416, 416, ("red", (0, 0, 208, 416)), ("blue", (300, 0, 416, 100))),
        apps.canvas(640, 200, (("lime"), (500, 20, 640, 200))),
        apps.canvas(50, 333),
        Image.new("RGB", (1, 1), "blue"),
    ]
    requests = [apps.asking(image, "score=0.4") for image in pictures]
    alone = [apps.alone(detector, request) for request in requests]
    assert apps.together(detector, requests) == alone
    labels = [{one["label"] for one in answer["detections"]} for answer in alone]
    assert [len(found) for found in labels] == [2, 1, 0, 1]
    for image, answer in zip(pictures, alone, strict=True):
        for x1, y1, x2, y2 in (one["box"] for one in answer["detections"]):
            assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height


def test_threshold_of_the_request(onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = apps.started("object-detection", "Detector", onnx_models / "yolo-zoo", monkeypatch)
    # Half as strong: under the threshold built into the Model Zoo's graph too, 0.3.
    image = apps.canvas(416, 416, ((140, 20, 20), (32, 32, 64, 64)))  # type: ignore[arg-type]
    counts = [len(apps.alone(detector, apps.asking(image, f"score={s}"))["detections"]) for s in ("0.2", "0.3", "0")]
    assert counts[:2] == [1, 0]
    assert 1 <= counts[2] <= 300


@pytest.mark.parametrize("query", ["score=2", "score=-0.1", "score=nan", "iou=inf", "iou=x", "score="])
def test_wrong_numbers(query: str, detector: Any) -> None:
    with pytest.raises(HTTPError) as caught:
        detector.preprocess(apps.asking(apps.canvas(9, 9), query))
    assert (caught.value.status, caught.value.code) == (400, "invalid_parameter")


@pytest.mark.parametrize(("width", "height"), [(600, 300), (123, 457), (416, 416), (5, 3000), (3000, 5), (1, 1)])
def test_letterbox(width: int, height: int, app: Any) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))
    square, frame = app.letterbox(image, 416, 114)
    assert square.size == (416, 416)
    assert max(frame.scaled_width, frame.scaled_height) == 416
    inside = (frame.left, frame.top, frame.left + frame.scaled_width, frame.top + frame.scaled_height)
    expected = image.resize((frame.scaled_width, frame.scaled_height), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(square.crop(inside)), np.asarray(expected))
    outside = np.ones((416, 416), bool)
    outside[inside[1] : inside[3], inside[0] : inside[2]] = False
    assert (np.asarray(square)[outside] == 114).all()
    assert abs(frame.left - (416 - inside[2])) <= 1 and abs(frame.top - (416 - inside[3])) <= 1
    corners = np.array([inside, (frame.left, frame.top, frame.left, frame.top)], np.float32)
    assert app.unboxed(corners, frame) == pytest.approx(np.array([[0, 0, width, height], [0, 0, 0, 0]]), abs=0.01)


def reference(boxes: Any, scores: Any, least: float, iou: float) -> set[tuple[int, int]]:
    """Suppression as it is defined: for every class, the best of those left, until none is."""
    kept = set()
    for label in range(scores.shape[1]):
        left = [i for i in range(len(boxes)) if scores[i, label] >= least]
        while left:
            best = max(left, key=lambda i: scores[i, label])
            kept.add((best, label))
            left = [i for i in left if i != best and shared(boxes[best], boxes[i]) <= iou]
    return kept


def shared(a: Any, b: Any) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return float(both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both))


@pytest.mark.parametrize("seed", range(12))
def test_suppression_is_that_of_the_definition(seed: int, app: Any) -> None:
    chance = np.random.default_rng(seed)
    corner = chance.uniform(0, 60, (60, 2))
    boxes = np.concatenate([corner, corner + chance.uniform(5, 40, (60, 2))], axis=1)
    scores = chance.permutation(60 * 4).reshape(60, 4) / (60 * 4)
    least, iou = chance.uniform(0.1, 0.8), chance.uniform(0.1, 0.9)
    found = app.detect(boxes, scores, least, iou)
    places = {(int(np.nonzero((boxes == box).all(1))[0][0]), label) for box, label, _ in found}
    assert places == reference(boxes, scores, least, iou)
    assert [score for *_, score in found] == sorted((score for *_, score in found), reverse=True)


def test_suppression_is_that_of_onnxruntime(app: Any) -> None:
    """Its operator is an implementation by somebody else."""
    import onnxruntime

    names, shapes = ("boxes", "scores", "most", "iou", "least"), ([1, 90, 4], [1, 3, 90], [1], [1], [1])
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info(*one) for one in zip(names, kinds, shapes, strict=True)]
    output = helper.make_tensor_value_info("chosen", TensorProto.INT64, ["n", 3])
    node = helper.make_node("NonMaxSuppression", list(names), ["chosen"])
    graph = helper.make_graph([node], "nms", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8)
    chance = np.random.default_rng(5)
    corner = chance.uniform(0, 100, (90, 2)).astype(np.float32)
    boxes = np.concatenate([corner, corner + chance.uniform(5, 50, (90, 2)).astype(np.float32)], axis=1)
    scores = chance.uniform(size=(90, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = (boxes[None], scores.T[None], np.array([90]), np.array([0.45], np.float32), np.array([0.3], np.float32))
    chosen = session.run(None, dict(zip(names, fed, strict=True)))[0]
    expected = {(int(place), int(label)) for _, label, place in chosen}
    found = app.detect(boxes, scores, 0.3, 0.45)
    assert {(int(np.nonzero((boxes == box).all(1))[0][0]), label) for box, label, _ in found} == expected


def test_boxes_of_different_classes_may_overlap_and_empty_ones_do_no_harm(app: Any) -> None:
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 9], [3, 3, 3, 3], [5, 5, 2, 2]], np.float32)
    scores = np.array([[0.9, 0.0], [0.1, 0.8], [0.7, 0.0], [np.nan, 0.6]], np.float32)
    found = [(label, round(score, 1)) for _, label, score in app.detect(boxes, scores, 0.5, 0.0)]
    assert found == [(0, 0.9), (1, 0.8), (0, 0.7), (1, 0.6)]
    assert app.detect(boxes[:0], scores[:0], 0.5, 0.5) == []


def test_a_threshold_of_nothing_is_bounded(app: Any) -> None:
    chance = np.random.default_rng(6)
    corner = chance.uniform(0, 400, (10_647, 2))
    boxes = np.concatenate([corner, corner + 1], axis=1)
    found = app.detect(boxes, chance.uniform(size=(10_647, 80)), 0.0, 1.0)
    assert len(found) == app.MOST_BOXES


def test_what_is_no_detector_is_refused_at_the_start(
    onnx_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"neither the ONNX Model Zoo's YOLOv3 .* it has inputs {'pixel_values'"):
        apps.started("object-detection", "Detector", onnx_models / "resnet", monkeypatch)
    renamed = onnx.load(str(onnx_models / "yolo-zoo/model.onnx"))
    renamed.graph.input[1].name = "im_shape"
    for node in renamed.graph.node:
        node.input[:] = ["im_shape" if name == "image_shape" else name for name in node.input]
    onnx.save(renamed, str(tmp_path / "model.onnx"))
    with pytest.raises(ValueError, match="im_shape"):
        apps.started("object-detection", "Detector", tmp_path, monkeypatch)


def test_names_of_the_classes(onnx_models: Path, monkeypatch: pytest.MonkeyPatch, app: Any) -> None:
    assert len(app.COCO) == len(set(app.COCO)) == tiny_onnx.CLASSES
    zoo = apps.started("object-detection", "Detector", onnx_models / "yolo-zoo", monkeypatch)
    assert zoo.labels[0] == "person" and zoo.labels[79] == "toothbrush"
