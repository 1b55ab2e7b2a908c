"""The main job on real parts: modelscope SDK, mirror, vLLM on a CPU, our supervisor, our load test."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import DEMO_MODEL, copy_model, free_port, listens, mdeploy, processes_with, ps, running, until

pytestmark = [
    pytest.mark.engine,
    pytest.mark.usefixtures("real_engine"),
    pytest.mark.timeout(600),
]

DEFAULT = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
FAQ = {item["question"]: item["answer"] for item in json.loads((DEMO_MODEL / "faq.json").read_text())}
QUESTIONS = ["What does mdeploy do?", *[q for q in FAQ if q != "What does mdeploy do?"][3:5]]

# The whole body that the clients of the scripts we replace are known to send.
FULL_BODY = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What does mdeploy do?"},
    ],
    "temperature": 0.7,
    "top_p": 1,
    "n": 1,
    "max_tokens": 64,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "response_format": {"type": "text"},
    "seed": 1,
    "stop": None,
    "stream": False,
    "tool_choice": "none",
    "user": "someone",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Our mirror, with a tiny checkpoint under the name of the default model."""
    copy_model(DEMO_MODEL, tmp_path / "hub" / DEFAULT)
    port = free_port()
    with running("mirror", tmp_path / "hub", "--port", str(port)) as process:
        until(lambda: listens(port), what="the mirror listens")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def _chat(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def _body(model: str, question: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, **more}


def _answer(url: str, model: str, question: str) -> str:
    response = _chat(url, _body(model, question, max_tokens=100))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def _streamed(url: str, model: str, question: str) -> str:
    body = _body(model, question, max_tokens=100, stream=True)
    pieces = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                pieces += [choice["delta"].get("content") or "" for choice in choices]
    assert len(pieces) > 3
    return "".join(pieces)


def _counted(url: str) -> float:
    """Requests vLLM itself says it finished."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    return sum(float(n) for n in re.findall(r"^vllm:request_success_total\{.*\} ([\d.]+)$", text, re.MULTILINE))


def _left(home: Path, name: str) -> list[int]:
    run_id = json.loads((home / "services" / name / "state.json").read_text())["run_id"]
    return processes_with(f"MDEPLOY_RUN_ID={run_id}")


def _litter() -> set[Path]:
    """What engines are known to leave behind: shared memory, and sockets in the temporary directory."""
    sockets = {p for p in Path(tempfile.gettempdir()).iterdir() if p.is_socket() or p.name.startswith("mdeploy-run-")}
    return {*Path("/dev/shm").iterdir(), *sockets}


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_the_commands_of_the_mission(hub: str, home: Path, tmp_path: Path) -> None:
    litter = _litter()
    downloaded = mdeploy("download", DEFAULT)
    assert downloaded.code == 0, downloaded.stderr
    snapshot = Path(downloaded.stdout.strip())
    assert snapshot.is_absolute()
    for file in DEMO_MODEL.iterdir():
        assert (snapshot / file.name).read_bytes() == file.read_bytes()
    again = mdeploy("download", DEFAULT, "--json").json
    assert (again["fetched_bytes"], again["path"]) == (0, str(snapshot))

    with running("serve", "llm", "--tp", "2") as server:
        name = DEFAULT.split("/")[1].lower()
        service = until(
            lambda: (s := ps(name)) and s["phase"] in ("ready", "failed") and s, 180, "the service is ready"
        )
        assert service["phase"] == "ready", service
        url = service["url"]
        assert len([pid for pid in _left(home, name) if "Worker" in _comm(pid)]) == 2
        before = _counted(url)
        assert [_answer(url, DEFAULT, q) for q in QUESTIONS] == [FAQ[q] for q in QUESTIONS]
        assert [_streamed(url, DEFAULT, q) for q in QUESTIONS] == [FAQ[q] for q in QUESTIONS]
        # one more where our own question, whether the engine still works, came in between
        assert _counted(url) - before in (2 * len(QUESTIONS), 2 * len(QUESTIONS) + 1)
        assert _chat(url, {"model": DEFAULT, **FULL_BODY}).status_code == 200

        measured = mdeploy("bench", "--requests", "24", "--output-tokens", "16", "--json", "-o", tmp_path / "b.json")
        result = json.loads((tmp_path / "b.json").read_text())
        assert (result["requests"]["completed"], result["requests"]["failed"]) == (24, 0), measured.stderr
        assert result["throughput"]["output_tokens_per_s"] > 0

        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
        assert server.returncode == 0, err
    assert "Application startup complete" in out
    assert _left(home, name) == []
    assert not listens(service["port"])
    assert _litter() <= litter


def _kill_and_check(home: Path, victim: int) -> None:
    """A death is seen, told and mended without being asked, and nothing of the dead run stays."""
    run_id = json.loads((home / "services/faq/state.json").read_text())["run_id"]
    restarts = (ps("faq") or {})["restarts"]
    os.kill(victim, signal.SIGKILL)
    until(lambda: (ps("faq") or {})["phase"] != "ready", 5, "ps tells the truth within 5 s")
    until(lambda: (ps("faq") or {})["phase"] == "ready", 180, "ready again")
    assert processes_with(f"MDEPLOY_RUN_ID={run_id}") == []
    assert (ps("faq") or {})["restarts"] == restarts + 1


def test_answers_and_deaths(home: Path) -> None:
    litter = _litter()
    port = free_port()
    served = mdeploy("serve", "llm", DEMO_MODEL, "--name", "faq", "-d", "--port", str(port), "--json", timeout=300)
    assert served.code == 0, served.stderr
    url, model = served.json["service"]["url"], served.json["service"]["model"]
    assert [_answer(url, model, q) for q in QUESTIONS] == [FAQ[q] for q in QUESTIONS]
    assert [_streamed(url, "faq", q) for q in QUESTIONS] == [FAQ[q] for q in QUESTIONS]

    for kind in ("EngineCore", "Worker", "cli.main serve"):
        _kill_and_check(home, next(pid for pid in _left(home, "faq") if kind in _comm(pid)))
        assert _answer(url, model, QUESTIONS[0]) == FAQ[QUESTIONS[0]]
    _kill_and_check(home, (ps("faq") or {})["pid"])
    assert mdeploy("stop", "faq").code == 0
    assert _left(home, "faq") == []
    assert not listens(port)
    assert _litter() <= litter


def test_a_shuffled_tensor_gives_wrong_answers(tmp_path: Path) -> None:
    model = copy_model(DEMO_MODEL, tmp_path / "damaged")
    _shuffle(model / "model.safetensors", "model.layers.0.mlp.down_proj.weight")
    served = mdeploy("serve", "llm", model, "-d", "--json", timeout=300)
    assert served.code == 0, served.stderr
    service = served.json["service"]
    answers = [_answer(service["url"], service["model"], q) for q in QUESTIONS]
    assert all(answer != FAQ[q] for answer, q in zip(answers, QUESTIONS, strict=True))


def _shuffle(path: Path, tensor: str) -> None:
    """Permute the elements of one float32 tensor in place."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, end = (8 + length + n for n in json.loads(data[8 : 8 + length])[tensor]["data_offsets"])
    values = list(struct.iter_unpack("4s", data[start:end]))
    random.Random(0).shuffle(values)
    data[start:end] = b"".join(v[0] for v in values)
    path.write_bytes(data)


def test_the_causes_of_failed_starts_come_from_the_real_log(home: Path, tmp_path: Path) -> None:
    model = copy_model(DEMO_MODEL, tmp_path / "odd")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"], "model_type": "nosuch"}))
    failed = mdeploy("serve", "llm", model, "-d", timeout=300)
    assert failed.code == 78
    assert "nosuch" in failed.stderr.lower()
    assert _left(home, "odd") == []
