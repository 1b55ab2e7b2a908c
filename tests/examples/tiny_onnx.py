"""Tiny ONNX models with the inputs, outputs and shapes of the real ones, and something to say about a picture.

The classifier is a linear map of the mean colour. The detectors find saturated colour: every cell of 32 x 32 pixels
is a candidate as large as itself, "any object" is how colourful it is, and its class is its colour: red is class 0
(person), green 1 (bicycle), blue 2 (car).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CELL, CLASSES = 32, 80


def write(directory: Path) -> None:
    """Write all of them."""
    models = {
        "resnet": resnet(),
        "resnet-of-one": resnet(batch=1),
        "yolo-zoo": zoo(),
        "yolo-ultralytics": ultralytics(),
        "yolo-anchor-free": ultralytics(anchor_free=True, batch=1),
    }
    for name, model in models.items():
        onnx.checker.check_model(model)
        (directory / name).mkdir()
        onnx.save(model, str(directory / name / "model.onnx"))
    names = {str(i): f"thing {i}" for i in range(1000)}
    (directory / "resnet" / "config.json").write_text(json.dumps({"id2label": names}))


def resnet(batch: int | str = "batch_size") -> Any:
    """Input pixel_values (N, 3, 224, 224), output logits (N, 1000): as microsoft/resnet-18 is exported."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixel_values"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [batch, 3, 224, 224])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 1000])]
    return _model(nodes, inputs, outputs, {"weight": resnet_weight()})


def resnet_weight() -> Any:
    """Shape (3, 1000)."""
    return np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)


def ultralytics(size: int = 640, batch: int | str = "batch", anchor_free: bool = False) -> Any:
    """Input images (N, 3, S, S), output output0: (N, M, 85) of x, y, w, h, object, classes, or (N, 84, M)."""
    nodes, constants = _cells("images", size)
    boxes = np.concatenate([_centres(size), np.full((_count(size), 2), CELL, np.float32)], axis=1)[None]
    nodes += [
        helper.make_node("Mul", ["object", "zero4"], ["object0"]),
        helper.make_node("Add", ["object0", "boxes"], ["boxes_n"]),
    ]
    constants |= {"boxes": boxes, "zero4": np.zeros((1, 1, 4), np.float32)}
    if anchor_free:
        nodes += [
            helper.make_node("Mul", ["object", "classes"], ["scores"]),
            helper.make_node("Concat", ["boxes_n", "scores"], ["rows"], axis=2),
            helper.make_node("Transpose", ["rows"], ["output0"], perm=[0, 2, 1]),
        ]
        shape = [batch, 4 + CLASSES, _count(size)]
    else:
        nodes.append(helper.make_node("Concat", ["boxes_n", "object", "classes"], ["output0"], axis=2))
        shape = [batch, _count(size), 5 + CLASSES]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])]
    outputs = [helper.make_tensor_value_info("output0", TensorProto.FLOAT, shape)]
    model = _model(nodes, inputs, outputs, constants)
    names = {i: f"thing {i}" for i in range(CLASSES)}
    helper.set_model_props(model, {"names": str(names)})
    return model


def zoo(size: int = 416) -> Any:
    """The Model Zoo's: boxes are scaled back in the graph, by image_shape, as keras-yolo3 does it."""
    nodes, constants = _cells("input_1", size)
    centres = _centres(size)[:, ::-1]
    constants |= {
        "low": (centres - CELL / 2)[None].astype(np.float32),
        "high": (centres + CELL / 2)[None].astype(np.float32),
        "size": np.array([size], np.float32),
        "two": np.array([2], np.float32),
        "most": np.array([20], np.int64),
        "iou": np.array([0.45], np.float32),
        "least": np.array([0.3], np.float32),
    }
    nodes += [
        helper.make_node("Div", ["size", "image_shape"], ["ratios"]),
        helper.make_node("ReduceMin", ["ratios"], ["ratio"], keepdims=1),
        helper.make_node("Mul", ["image_shape", "ratio"], ["exact"]),
        helper.make_node("Round", ["exact"], ["scaled"]),
        helper.make_node("Sub", ["size", "scaled"], ["grey"]),
        helper.make_node("Div", ["grey", "two"], ["offset"]),
        helper.make_node("Div", ["image_shape", "scaled"], ["back"]),
        helper.make_node("Sub", ["low", "offset"], ["low0"]),
        helper.make_node("Mul", ["low0", "back"], ["low1"]),
        helper.make_node("Sub", ["high", "offset"], ["high0"]),
        helper.make_node("Mul", ["high0", "back"], ["high1"]),
        helper.make_node("Concat", ["low1", "high1"], [ZOO_OUTPUTS[0]], axis=2),
        helper.make_node("Mul", ["object", "classes"], ["rows"]),
        helper.make_node("Transpose", ["rows"], [ZOO_OUTPUTS[1]], perm=[0, 2, 1]),
        helper.make_node("NonMaxSuppression", [*ZOO_OUTPUTS[:2], "most", "iou", "least"], ["chosen"]),
        helper.make_node("Cast", ["chosen"], [ZOO_OUTPUTS[2]], to=TensorProto.INT32),
    ]
    inputs = [
        helper.make_tensor_value_info("input_1", TensorProto.FLOAT, ["unk__576", 3, "unk__577", "unk__578"]),
        helper.make_tensor_value_info("image_shape", TensorProto.FLOAT, ["unk__579", 2]),
    ]
    outputs = [
        helper.make_tensor_value_info(ZOO_OUTPUTS[0], TensorProto.FLOAT, [1, "unk__580", 4]),
        helper.make_tensor_value_info(ZOO_OUTPUTS[1], TensorProto.FLOAT, [1, CLASSES, "unk__581"]),
        helper.make_tensor_value_info(ZOO_OUTPUTS[2], TensorProto.INT32, ["unk__582", 3]),
    ]
    return _model(nodes, inputs, outputs, constants)


ZOO_OUTPUTS = ["yolonms_layer_1/ExpandDims_1:0", "yolonms_layer_1/ExpandDims_3:0", "yolonms_layer_1/concat_2:0"]


def _cells(pixels: str, size: int) -> tuple[list[Any], dict[str, Any]]:
    """Nodes that make object (N, M, 1) and classes (N, M, 80) of pixels (N, 3, S, S)."""
    constants = {
        "rows_of_3": np.array([0, 3, _count(size)], np.int64),
        "eye": np.eye(3, CLASSES, dtype=np.float32)[None],
    }
    nodes = [
        helper.make_node("AveragePool", [pixels], ["pooled"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Reshape", ["pooled", "rows_of_3"], ["by_colour"]),
        helper.make_node("Transpose", ["by_colour"], ["colours"], perm=[0, 2, 1]),
        helper.make_node("ReduceMax", ["colours"], ["brightest"], axes=[2], keepdims=1),
        helper.make_node("ReduceMin", ["colours"], ["darkest"], axes=[2], keepdims=1),
        helper.make_node("Sub", ["brightest", "darkest"], ["object"]),
        helper.make_node("MatMul", ["colours", "eye"], ["classes"]),
    ]
    return nodes, constants


def _centres(size: int) -> Any:
    places = np.arange(size // CELL) * CELL + CELL / 2
    rows, columns = np.meshgrid(places, places, indexing="ij")
    return np.stack([columns, rows], axis=-1).reshape(-1, 2).astype(np.float32)


def _count(size: int) -> int:
    return (size // CELL) ** 2


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any]) -> Any:
    fixed = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, fixed)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8)
