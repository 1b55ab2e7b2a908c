"""What is in the picture: ResNet-18 as ONNX, the five most likely of the 1000 classes of ImageNet.

    image -> shorter side to 256 -> 224 x 224 from its middle -> (rgb - mean) / std -> logits -> softmax -> top 5

Any classifier with one input (N, 3, H, W) and one output (N, classes) will do. `config.json` of the model names the
classes (`id2label`), `preprocessor_config.json` its mean, standard deviation and filter.
"""

import json
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mdeploy import Handler, HTTPError, Request
from mdeploy.serving import images, onnxmodel

SIZE, RESIZED = 224, 256
MOST_ELONGATED = 64
"""Scaled to 256 pixels on its shorter side, an image of 1 x 40000 pixels would be a giant."""


class Item(NamedTuple):
    """One image as the model takes it, and how many classes its sender asked for."""

    pixels: Any
    top: int


class Classifier(Handler):
    """Classify an image: a multipart form with a file `image`, or the image as the body. `?top=5` classes, 1 to 100."""

    name = "classify"
    max_batch_size = 32
    methods = ("POST",)
    example = Request(headers=[(b"content-type", b"image/png")], body=images.plain())
    responses = images.RESPONSES

    def init(self, device: str) -> None:
        """Open the model; refuse one that is no image classifier."""
        file = onnxmodel.find(self.model_dir)
        self.session = onnxmodel.open_session(file, device)
        self.input, self.batch = _input_of(self.session, file.name)
        settings = _json(self.model_dir / "preprocessor_config.json")
        self.mean = np.array(settings.get("image_mean", (0.485, 0.456, 0.406)), np.float32)
        self.std = np.array(settings.get("image_std", (0.229, 0.224, 0.225)), np.float32)
        self.filter = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR))
        self.labels = _json(self.model_dir / "config.json").get("id2label", {})

    def preprocess(self, request: Request) -> Item:
        """The middle of the image, normalised. Shape (3, 224, 224)."""
        top = _top(request.query.get("top", "5"))
        image = middle(images.decode(images.upload(request)), self.filter)
        pixels = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        return Item(pixels.transpose(2, 0, 1), top)

    def forward(self, batch: list[Item]) -> list[tuple[Any, int]]:
        """Logits of each image; a model exported for batches of one is asked once for each."""
        pixels = np.stack([item.pixels for item in batch])
        parts = [pixels[i : i + self.batch] for i in range(0, len(batch), self.batch)] if self.batch else [pixels]
        logits = np.concatenate([self.session.run(None, {self.input: part})[0] for part in parts])
        return [(row, item.top) for row, item in zip(logits, batch, strict=True)]

    def postprocess(self, output: tuple[Any, int]) -> dict[str, Any]:
        """The most likely classes, best first."""
        logits, top = output
        scores = softmax(logits)
        best = np.argsort(-scores, kind="stable")[:top]
        return {"classes": [{"index": int(i), "label": self._label(int(i)), "score": float(scores[i])} for i in best]}

    def _label(self, index: int) -> str:
        return str(self.labels.get(str(index), index))


def middle(image: Image.Image, resample: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """Resize(256) and CenterCrop(224) of torchvision: what ImageNet classifiers are evaluated with.

    Raises HTTPError 400 for an image more than 64 times as long as it is wide.
    """
    short, long = sorted(image.size)
    if long > MOST_ELONGATED * short:
        text = f"an image of {image.width} x {image.height} pixels is too elongated, at most {MOST_ELONGATED} to 1"
        raise HTTPError(400, text, code="invalid_image")
    width, height = (RESIZED * side // short for side in image.size)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    return image.resize((width, height), resample).crop((left, top, left + SIZE, top + SIZE))


def softmax(logits: Any) -> Any:
    """Probabilities of one row of logits."""
    grown = np.exp(logits.astype(np.float64) - logits.max())
    return grown / grown.sum()


def _top(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= 100):
        raise HTTPError(400, f"top={text[:20]!r} must be a number from 1 to 100", code="invalid_parameter")
    return int(text)


def _input_of(session: Any, file: str) -> tuple[str, int]:
    """Name of the image input, and the batch size the model was exported for (0: any)."""
    inputs = session.get_inputs()
    shapes = {one.name: one.shape for one in inputs}
    batch, *image = inputs[0].shape if len(inputs) == 1 else [0]
    fits = len(image) == 3 and image[0] == 3 and all(isinstance(n, str) or n in (None, SIZE) for n in image[1:])
    if not fits or len(session.get_outputs()[0].shape) != 2:
        outputs = {one.name: one.shape for one in session.get_outputs()}
        raise ValueError(
            f"{file} is no classifier with an input (N, 3, {SIZE}, {SIZE}) and an output (N, classes): "
            f"inputs {shapes}, outputs {outputs}"
        )
    return inputs[0].name, batch if isinstance(batch, int) else 0


def _json(path: Any) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
