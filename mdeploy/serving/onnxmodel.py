"""ONNX files for handlers: found in a model directory, opened on the device that a worker was given.

Handlers of ONNX models import it, in whatever interpreter they run in; onnxruntime is needed once a session is
opened. It knows no model: names and shapes of inputs and outputs are the handler's own affair.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_USUAL = ("model.onnx", "onnx/model.onnx")


def find(directory: Path) -> Path:
    """The ONNX file of a model: model.onnx, onnx/model.onnx, or the only one there is.

    Raises FileNotFoundError that says what was found instead.
    """
    for name in _USUAL:
        if (directory / name).is_file():
            return directory / name
    found = sorted(directory.rglob("*.onnx"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(path.relative_to(directory)) for path in found) or "none"
    raise FileNotFoundError(f"{directory} must have model.onnx, onnx/model.onnx or one .onnx file; it has {names}")


def open_session(file: Path, device: str) -> Any:
    """An onnxruntime.InferenceSession on `device` (cuda:0, cpu).

    Raises RuntimeError where CUDA was asked for and cannot be had: onnxruntime itself would go on, slowly, on the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # It does not look at the variable itself; unset, each worker would take every core.
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    if not device.startswith("cuda"):
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    wanted = "CUDAExecutionProvider"
    if wanted in onnxruntime.get_available_providers():
        device_id = int(device.partition(":")[2] or 0)
        providers = [(wanted, {"device_id": device_id}), "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        if session.get_providers()[0] == wanted:
            return session
    raise RuntimeError(
        f"onnxruntime in {sys.executable} cannot use CUDA (it has {', '.join(onnxruntime.get_available_providers())}): "
        f"install onnxruntime-gpu there, with the CUDA and cuDNN it was built for, or serve with --gpus none"
    )
