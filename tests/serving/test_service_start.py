"""How a service starts, or says why it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.served import HANDLERS, LAB, Service, served
from tests.support import until

BROKEN = HANDLERS / "broken_start.py"


def _ended(service: Service) -> int:
    return int(service.process.wait(60))


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        ("InInit", "RuntimeError: the weights are not here"),
        ("InExample", "example"),
        ("Neither", "neither inference nor forward"),
        ("Killed", "SIGKILL"),
        ("Missing", "Missing"),
    ],
)
def test_a_class_that_cannot_start_is_told_and_not_tried_again(tmp_path: Path, cls: str, text: str) -> None:
    with served(tmp_path / "s", f"{BROKEN}:{cls}", ready=False) as service:
        assert _ended(service) not in (0, 2)
        assert text in service.log
        assert len(service.noted("init")) <= 1


def test_the_traceback_of_a_failed_init_names_the_users_line(tmp_path: Path) -> None:
    with served(tmp_path / "s", f"{BROKEN}:InInit", ready=False) as service:
        _ended(service)
        assert f'File "{BROKEN}"' in service.log
        assert service.log.count("Traceback") == 1


def test_options_of_a_recipe_reach_the_class(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"kind: app\nhandler: {LAB}:Echo\nworkers_per_gpu: 1\nbatch: 2\ntimeout: 1\nqueue: 50\nenv: {{SOME: value}}\n"
    )
    with served(tmp_path / "s", recipe) as service:
        answers = service.ask_all("/echo", [{"n": i, "sleep": 0.05} for i in range(10)])
        assert {a.status_code for a in answers} == {200}
        assert max(int(size) for size in service.noted("batches")) == 2
        assert len(service.workers("echo")) == 1
        assert service.ask("/echo", {"n": "late", "do": "hang"}).status_code == 504


def test_the_command_line_wins_over_the_class(tmp_path: Path) -> None:
    with served(tmp_path / "s", f"{LAB}:Echo", "--batch", "1", "--workers-per-gpu", "1") as service:
        service.ask_all("/echo", [{"n": i, "sleep": 0.02} for i in range(6)])
        assert {int(size) for size in service.noted("batches")} == {1}


def test_a_file_without_a_class_serves_all_of_its_handlers(tmp_path: Path) -> None:
    with served(tmp_path / "s", HANDLERS / "declared.py") as service:
        assert set(service.health()["handlers"]) == {"repeat", "anything", "words", "count"}
        assert service.ask("/repeat", {"text": "ab", "times": 2}).json() == {"text": "abab"}


def test_a_service_that_is_told_to_end_finishes_what_it_has(tmp_path: Path) -> None:
    with served(tmp_path / "s", f"{LAB}:Echo") as service:
        with service.connect("/echo", {"n": 1, "sleep": 1.0}) as sock:
            until(lambda: service.noted("seen")[-1:] == ["1"], what="the model has it")
            service.process.terminate()
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        assert service.process.wait(30) == 0
