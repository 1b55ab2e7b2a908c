"""Handles and YAML files written for easy-serve, as our workers run them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from mdeploy.compat import easyserve
from mdeploy.errors import ConfigError, NotFoundError
from mdeploy.serving import load
from tests.compat.asking import Asked, posted

# Both follow the handles of easy-serve's README: it has users write them into a handle.py with a base and a registry of
# its own, and each step gets the task, changes it and returns it.
OWN_BASE = """
import base64
from abc import ABCMeta, abstractmethod


class ClassRegistry:
    def __init__(self):
        self.class_dict = {}

    def reg(self):
        def decorator(cls):
            self.class_dict[cls.__name__] = cls
            return cls
        return decorator


registry = ClassRegistry()


class BaseHandle(metaclass=ABCMeta):
    @abstractmethod
    def preprocess(self, data): ...
    @abstractmethod
    def forward(self, data): ...
    @abstractmethod
    def postprocess(self, data): ...
    @abstractmethod
    def __call__(self, data): ...


"""
IMPORTED = "import base64\nfrom mdeploy.compat.easyserve import BaseHandle, registry\n\n\n"
HANDLE = '''
@registry.reg()
class ClassifyHandle(BaseHandle):
    """Names the brightest channel."""

    def __init__(self, gpu):
        self.device_id = int(gpu)
        self.names = ["red", "green", "blue"]

    def preprocess(self, data):
        data["task_info"]["img"] = list(base64.b64decode(data["task_info"]["img"]))
        return data

    def forward(self, data):
        pixels = data["task_info"].pop("img")
        data["task_info"]["result"] = [sum(pixels[channel::3]) for channel in range(3)]
        return data

    def postprocess(self, data):
        sums = data["task_info"]["result"]
        data["task_info"]["result"] = self.names[sums.index(max(sums))]
        return data

    def __call__(self, data):
        return self.postprocess(self.forward(self.preprocess(data)))
'''
BLUE = {"img": base64.b64encode(bytes([1, 2, 3] * 4)).decode()}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("head", [OWN_BASE, IMPORTED], ids=["own base", "imports changed"])
def test_a_handle_answers_predict(tmp_path: Path, head: str) -> None:
    file = write(tmp_path / "classify.py", head + HANDLE)
    ask = Asked(f"{file}:ClassifyHandle", "cuda:0")
    assert (ask.info.path, ask.info.methods, ask.info.max_batch_size) == ("/predict", ("POST",), 1)
    assert (ask.info.doc, ask.info.source) == ("Names the brightest channel.", str(file))
    assert ask.handler.handle.device_id == 0
    first, second = (json.loads(bytes(ask.json(BLUE).body)) for _ in range(2))
    assert first["task_info"] == {"result": "blue"}
    assert first["task_id"].isdecimal()
    assert first["task_id"] != second["task_id"]


def test_bad_input_fails_alone(tmp_path: Path) -> None:
    ask = Asked(f"{write(tmp_path / 'classify2.py', IMPORTED + HANDLE)}:ClassifyHandle")
    empty, wrong = posted(BLUE), posted({"img": 5})
    empty.buffer = b"{"
    assert [reply.status for reply in ask.batch(empty, wrong, posted(BLUE))] == [400, 500, 200]


def test_a_file_of_marked_handles_needs_no_class_name(tmp_path: Path) -> None:
    text = IMPORTED + HANDLE + "\n\nclass Louder(ClassifyHandle):\n    pass\n"
    found = load.handlers(str(write(tmp_path / "marked.py", text)))
    assert [cls.__name__ for cls in found] == ["ClassifyHandle", "Louder"]
    assert found[0] is not found[1]


BATCHED = """
from mdeploy.compat.easyserve import Handle


class Doubler(Handle):
    max_batch_size = 8

    def preprocess(self, data):
        return data["task_info"]["n"]

    def forward(self, batch):
        assert isinstance(batch, list)
        return [(n * 2, len(batch)) for n in batch]

    def postprocess(self, output):
        return {"doubled": output[0], "batch": output[1]}
"""


def test_batches_where_the_class_says_so(tmp_path: Path) -> None:
    ask = Asked(write(tmp_path / "doubler.py", BATCHED))
    assert ask.info.max_batch_size == 8
    replies = ask.batch(*[posted({"n": n}) for n in range(3)])
    assert [json.loads(bytes(reply.body)) for reply in replies] == [{"doubled": n * 2, "batch": 3} for n in range(3)]
    alone = Asked(
        write(
            tmp_path / "single.py",
            BATCHED.replace("    max_batch_size = 8\n", "")
            .replace("assert isinstance(batch, list)", "batch = [batch]")
            .replace("return [(n * 2, len(batch)) for n in batch]", "return batch[0] * 2, 1"),
        )
    )
    assert alone.info.max_batch_size == 1
    assert json.loads(bytes(alone.json({"n": 4}).body)) == {"doubled": 8, "batch": 1}


@pytest.mark.parametrize("size", ["0", "'8'", "1.5"])
def test_a_batch_size_that_is_none_is_told(tmp_path: Path, size: str) -> None:
    file = write(tmp_path / "sized.py", BATCHED.replace("max_batch_size = 8", f"max_batch_size = {size}"))
    with pytest.raises(load.LoadError, match="max_batch_size"):
        Asked(file)


def test_only_call_is_enough_and_nothing_is_told_as_a_mistake(tmp_path: Path) -> None:
    file = write(
        tmp_path / "called.py",
        "class H:\n    def __init__(self, gpu): pass\n    def __call__(self, data): return data.get('x')\n",
    )
    reply = Asked(f"{file}:H").json({})
    assert (reply.status, reply.code) == (500, "no_result")


def test_what_is_no_handle_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "nothing.py", OWN_BASE + "class Plain:\n    pass\n")
    for name in ("Plain", "BaseHandle", "registry"):
        with pytest.raises(load.LoadError):
            load.handlers(f"{file}:{name}")


# the YAML


def checkout(tmp_path: Path, yaml: str = 'GPUs: "0,1"\nProcessPerGPU: 2\nHandle: ClassifyHandle\n') -> Path:
    """easy-serve's own layout: configs/NAME.yaml, src/handle.py."""
    write(tmp_path / "src/handle.py", OWN_BASE + HANDLE)
    return write(tmp_path / "configs/old.yaml", yaml)


def test_an_old_yaml_in_its_checkout(tmp_path: Path) -> None:
    config = easyserve.read_config(checkout(tmp_path))
    source = tmp_path / "src"
    assert config == easyserve.Config((f"{source}/handle.py:ClassifyHandle",), (str(source),), ("0", "1"), 2, 9876, ())
    assert json.loads(bytes(Asked(config.handlers[0]).json(BLUE).body))["task_info"] == {"result": "blue"}


@pytest.mark.parametrize(
    ("handle", "file"),
    [
        ("handle.ClassifyHandle", "configs/handle.py"),
        ("models.classify.ClassifyHandle", "models/classify.py"),
        ("models.classify:ClassifyHandle", "models/classify.py"),
        ("models/classify.py:ClassifyHandle", "models/classify.py"),
        ("./mine.py:ClassifyHandle", "mine.py"),
        ("ClassifyHandle", "handle.py"),
    ],
)
def test_where_a_handle_may_be(tmp_path: Path, handle: str, file: str) -> None:
    write(tmp_path / file, OWN_BASE + HANDLE)
    yaml = write(tmp_path / "configs/old.yaml", f"Handle: {handle}\n")
    assert easyserve.read_config(yaml).handlers == (f"{tmp_path / file}:ClassifyHandle",)


def test_numbers_lists_ports_and_unknown_keys(tmp_path: Path) -> None:
    config = easyserve.read_config(checkout(tmp_path, "GPUs: [1, 3]\nhandle: ClassifyHandle\nPort: 9000\nlog: debug\n"))
    assert (config.gpus, config.workers_per_gpu, config.port, config.ignored) == (("1", "3"), 1, 9000, ("log",))
    for gpus, expected in (("0", ("0",)), ('""', ()), ("cpu", ()), ('"0, 2"', ("0", "2"))):
        yaml = checkout(tmp_path, f"GPUs: {gpus}\nHandle: ClassifyHandle\n")
        assert easyserve.read_config(yaml).gpus == expected


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("- 1\n", "has no keys"),
        ("GPUs: [\n", "cannot be read"),
        ("GPUs: '0'\n", "Handle must name a class"),
        ("GPUs: 'a'\nHandle: ClassifyHandle\n", "GPUs: 'a' must be numbers"),
        ("GPUs: '0,0'\nHandle: ClassifyHandle\n", "each once"),
        ("ProcessPerGPU: '2'\nHandle: ClassifyHandle\n", "ProcessPerGPU: '2' must be a whole number"),
        ("ProcessPerGPU: 0\nHandle: ClassifyHandle\n", "from 1 to 256"),
        ("Port: 70000\nHandle: ClassifyHandle\n", "Port"),
    ],
)
def test_mistakes_in_a_yaml_are_told(tmp_path: Path, yaml: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        easyserve.read_config(checkout(tmp_path, yaml))
    assert says in caught.value.message
    assert caught.value.hint


def test_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no file"):
        easyserve.read_config(tmp_path / "none.yaml")
    with pytest.raises(NotFoundError, match="no class Other in"):
        easyserve.read_config(checkout(tmp_path, "Handle: Other\n"))
