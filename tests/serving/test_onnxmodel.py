from __future__ import annotations

from pathlib import Path

import pytest

from mdeploy.serving import onnxmodel
from tests.examples import tiny_onnx


def test_find(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it has none$"):
        onnxmodel.find(tmp_path)
    (tmp_path / "deep").mkdir()
    only = tmp_path / "deep/yolov3-12.onnx"
    only.touch()
    assert onnxmodel.find(tmp_path) == only
    (tmp_path / "other.onnx").touch()
    with pytest.raises(FileNotFoundError, match=r"it has deep/yolov3-12.onnx, other.onnx$"):
        onnxmodel.find(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").touch()
    assert onnxmodel.find(tmp_path) == tmp_path / "onnx/model.onnx"


def test_a_gpu_that_cannot_be_used_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    file = tmp_path / "model.onnx"
    onnx.save(tiny_onnx.resnet(), str(file))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    session = onnxmodel.open_session(file, "cpu")
    assert session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(RuntimeError, match="install onnxruntime-gpu there"):
        onnxmodel.open_session(file, "cuda:0")
