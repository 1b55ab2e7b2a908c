"""What many tests need: the command line as a user runs it, conditions with deadlines, tiny models."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
DEMO_MODEL = REPO / "mdeploy/assets/models/demo/mdeploy-faq"


@dataclass(frozen=True)
class Result:
    """One finished command."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def mdeploy(*args: str | Path, timeout: float = 120, cwd: Path | None = None, **env: str) -> Result:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mdeploy", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **env},
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@contextmanager
def running(*args: str | Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """The command line in the background; it is gone at the end, whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mdeploy", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def until(condition: Callable[[], Any], seconds: float = 30, what: str = "") -> Any:
    """Wait for a condition and return its value; fail with `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what or condition}")


def ps(name: str) -> dict[str, Any] | None:
    """One service as `ps --json` shows it."""
    services = mdeploy("ps", "--json").json["services"]
    return next((s for s in services if s["name"] == name), None)


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """True where something accepts connections on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes_with(text: str) -> list[int]:
    """Pids whose environment holds `text`, zombies excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if text.encode() in (entry / "environ").read_bytes() and " Z " not in (entry / "stat").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def tiny_model(path: Path, **config: Any) -> Path:
    """A model directory that mdeploy can read facts from; far too small for a real engine."""
    path.mkdir(parents=True)
    base = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps({**base, **config}))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    write_safetensors(path / "model.safetensors", {"w": 64})
    return path


def write_safetensors(path: Path, tensors: dict[str, int]) -> None:
    """A valid file of uint8 tensors with these sizes in bytes."""
    header, offset = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def copy_model(source: Path, target: Path) -> Path:
    """A private copy of a model directory."""
    shutil.copytree(source, target)
    return target
