"""What is where in the picture: YOLOv3 as ONNX, its boxes in pixels of the image that was sent.

    image -> letterbox (scaled whole into a grey square) -> model -> boxes of all candidates -> back to the image
          -> candidates above the threshold -> non-maximum suppression within each class

Two kinds of export are understood, told apart by their inputs and checked when the service starts:

* the ONNX Model Zoo's (yolov3-10, yolov3-12, tiny-yolov3-11): inputs `input_1` and `image_shape`, outputs boxes,
  scores and the choice of a suppression with fixed thresholds, which is not used here. It takes one image at a time.
* Ultralytics' (`export.py --include onnx`, `yolo export format=onnx`): input `images`, one output of decoded heads,
  (N, boxes, 5 + classes) or (N, 4 + classes, boxes). It takes batches, if it was exported with `dynamic`.
"""

import ast
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mdeploy import Handler, HTTPError, Request
from mdeploy.serving import images, onnxmodel

MOST_CANDIDATES, MOST_BOXES = 2000, 300

COCO = Path(__file__).with_name("coco.txt").read_text().splitlines()
"""The 80 classes of COCO, in the order every YOLO trained on it uses."""


class Frame(NamedTuple):
    """How an image was put into the square: its own size, its size there, and the grey to the left and on top."""

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int


class Item(NamedTuple):
    """One image as the model takes it, and what its sender wants to see."""

    pixels: Any
    frame: Frame
    score: float
    iou: float


class Candidates(NamedTuple):
    """All a model said of one image: boxes (n, 4) as x1, y1, x2, y2 in its pixels, scores (n, classes)."""

    boxes: Any
    scores: Any
    item: Item


class Detector(Handler):
    """Find objects: a multipart form with a file `image`, or the image as the body.

    `?score=0.5` is what a box must reach, `?iou=0.45` how much two of one class may overlap.
    """

    name = "detect"
    max_batch_size = 8
    methods = ("POST",)
    example = Request(headers=[(b"content-type", b"image/png")], body=images.plain())
    responses = images.RESPONSES

    def init(self, device: str) -> None:
        """Open the model, find out which export it is, and ask it once."""
        file = onnxmodel.find(self.model_dir)
        session = onnxmodel.open_session(file, device)
        self.export = _export(session, file.name)
        probe = self.preprocess(self.example)
        classes = self.export.run([probe])[0].scores.shape[1]
        self.labels = _labels(session, classes)

    def preprocess(self, request: Request) -> Item:
        """The image in its grey square."""
        score, iou = (_share(request, name, default) for name, default in (("score", 0.5), ("iou", 0.45)))
        image = images.decode(images.upload(request))
        square, frame = letterbox(image, self.export.size, self.export.grey)
        return Item(np.asarray(square, np.float32).transpose(2, 0, 1) / 255, frame, score, iou)

    def forward(self, batch: list[Item]) -> list[Candidates]:
        """What the model says of each image."""
        found: list[Candidates] = self.export.run(batch)
        return found

    def postprocess(self, output: Candidates) -> dict[str, Any]:
        """The boxes that are left, best first; in pixels, from the upper left corner of the image."""
        frame = output.item.frame
        boxes = np.clip(output.boxes, 0, np.array([frame.width, frame.height] * 2, np.float32))
        real = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # not wholly in the grey
        kept = detect(boxes[real], output.scores[real], output.item.score, output.item.iou)
        detections = [
            {"label": self.labels[label], "score": round(score, 4), "box": [round(float(side), 2) for side in box]}
            for box, label, score in kept
        ]
        return {"width": frame.width, "height": frame.height, "detections": detections}


class ZooExport:
    """The ONNX Model Zoo's: its graph scales boxes back itself, and does so for one image at a time."""

    grey = 128

    def __init__(self, session: Any) -> None:
        self.session = session
        by_name = {one.name: one for one in session.get_inputs()}
        self.size = _side(by_name["input_1"].shape, 416)
        self.shape_type = np.float32 if "float" in by_name["image_shape"].type else np.int32
        self.outputs = [one.name for one in session.get_outputs()][:2]

    def run(self, batch: list[Item]) -> list[Candidates]:
        """All candidates of each image."""
        return [self._one(item) for item in batch]

    def _one(self, item: Item) -> Candidates:
        shape = np.array([[item.frame.height, item.frame.width]], self.shape_type)
        boxes, scores = self.session.run(self.outputs, {"input_1": item.pixels[None], "image_shape": shape})
        # Rows of boxes are y1, x1, y2, x2, one of scores for each class.
        return Candidates(boxes[0][:, [1, 0, 3, 2]], scores[0].T, item)


class UltralyticsExport:
    """Ultralytics': decoded heads, in pixels of the square."""

    grey = 114

    def __init__(self, session: Any) -> None:
        self.session = session
        (only,) = session.get_inputs()
        self.input = only.name
        self.size = _side(only.shape, 640)
        self.batch = only.shape[0] if isinstance(only.shape[0], int) else 0

    def run(self, batch: list[Item]) -> list[Candidates]:
        """All candidates of each image."""
        pixels = np.stack([item.pixels for item in batch])
        parts = [pixels[i : i + self.batch] for i in range(0, len(batch), self.batch)] if self.batch else [pixels]
        heads = [head for part in parts for head in self.session.run(None, {self.input: part})[0]]
        return [self._decoded(head, item) for head, item in zip(heads, batch, strict=True)]

    def _decoded(self, head: Any, item: Item) -> Candidates:
        if head.shape[0] < head.shape[1]:
            # (4 + classes, boxes): newer models do not score "any object" on its own.
            return Candidates(unboxed(_corners(head[:4].T), item.frame), head[4:].T, item)
        return Candidates(unboxed(_corners(head[:, :4]), item.frame), head[:, 5:] * head[:, 4:5], item)


def letterbox(image: Image.Image, size: int, grey: int) -> tuple[Image.Image, Frame]:
    """The whole image, as large as it fits, in the middle of a grey square."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    square = Image.new("RGB", (size, size), (grey, grey, grey))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return square, Frame(image.width, image.height, width, height, left, top)


def unboxed(boxes: Any, frame: Frame) -> Any:
    """Boxes of the square as boxes of the image: the inverse of `letterbox`."""
    offset = np.array([frame.left, frame.top] * 2, np.float32)
    scale = np.array([frame.width / frame.scaled_width, frame.height / frame.scaled_height] * 2, np.float32)
    return (boxes - offset) * scale


def detect(boxes: Any, scores: Any, least: float, iou: float) -> list[tuple[Any, int, float]]:
    """Box, class and score of what is left after suppression within each class, best first.

    A box may be of several classes, as YOLOv3 scores each of them on its own. Of very many candidates (a threshold
    near 0) only the best are looked at.
    """
    index, label = np.nonzero(scores >= max(least, 1e-6))
    value = scores[index, label]
    best = np.argsort(-value, kind="stable")[:MOST_CANDIDATES]
    index, label, value = index[best], label[best], value[best]
    kept = suppress(boxes[index].astype(np.float64), label, iou)[:MOST_BOXES]
    return [(boxes[index[i]], int(label[i]), float(value[i])) for i in kept]


def suppress(boxes: Any, labels: Any, iou: float) -> list[int]:
    """Greedy non-maximum suppression of boxes that are sorted by score.

    A box goes if it overlaps one of its own class that stays by more than `iou`.
    """
    left, kept = np.arange(len(boxes)), []
    while len(left):
        first, rest = left[0], left[1:]
        kept.append(int(first))
        same = labels[rest] == labels[first]
        left = rest[~(same & (overlap(boxes[first], boxes[rest]) > iou))]
    return kept


def overlap(box: Any, others: Any) -> Any:
    """Intersection over union of one box with each of others; 0 for boxes without area."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(np.clip(others[:, 2:] - others[:, :2], 0, None), axis=1)
    union = np.prod(np.clip(box[2:] - box[:2], 0, None)) + areas - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _corners(boxes: Any) -> Any:
    middle, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([middle - half, middle + half], axis=1)


def _share(request: Request, name: str, default: float) -> float:
    text = request.query.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise HTTPError(400, f"{name}={text[:20]!r} must be a number from 0 to 1", code="invalid_parameter")
    return value


def _export(session: Any, file: str) -> Any:
    """Which of the two it is. Raises ValueError that shows what the file has."""
    inputs = {one.name: one.shape for one in session.get_inputs()}
    outputs = [one.shape for one in session.get_outputs()]
    if set(inputs) == {"input_1", "image_shape"} and len(outputs) == 3:
        return ZooExport(session)
    if len(inputs) == 1 and len(next(iter(inputs.values()))) == 4 and len(outputs[0]) == 3:
        return UltralyticsExport(session)
    raise ValueError(
        f"{file} is neither the ONNX Model Zoo's YOLOv3 (inputs input_1 and image_shape, three outputs) nor an export "
        f"of Ultralytics (one input (N, 3, H, W), one output of rank 3): it has inputs {inputs}, outputs {outputs}. "
        f"Exports with undecoded heads (three outputs of rank 4 or 5) are not understood"
    )


def _side(shape: list[Any], default: int) -> int:
    """Side of the square that a model takes; models of no fixed size get the one they were trained with."""
    sides = [side for side in shape[2:] if isinstance(side, int)]
    if len(set(sides)) > 1:
        raise ValueError(f"the model takes {shape[3]} x {shape[2]} pixels; only square ones are understood")
    return sides[0] if sides else default


def _labels(session: Any, classes: int) -> list[str]:
    """Names of the classes: those an export of Ultralytics brings along, or COCO's."""
    written = session.get_modelmeta().custom_metadata_map.get("names")
    names = list(ast.literal_eval(written).values()) if written else COCO
    return names if len(names) == classes else [f"class {i}" for i in range(classes)]
