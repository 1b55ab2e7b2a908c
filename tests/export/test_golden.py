"""The text of everything exported. `python -m tests.export.test_golden` writes the golden files anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from mdeploy.export import compose, kubernetes, nginx
from mdeploy.export.kubernetes import Target
from mdeploy.export.rendered import Rendered
from tests.export import cases
from tests.support import REPO

GOLDEN = REPO / "tests/golden/export"


def _joined(files: Iterable[Rendered]) -> str:
    return "\n".join(f"==== {file.name} ({file.mode:04o})\n{file.content!s}" for file in files)


CASES: Mapping[str, str] = {
    "nginx-plain.conf": nginx.render(cases.PLAIN_SITE),
    "nginx-full.conf": nginx.render(cases.FULL_SITE),
    "nginx-full.key": nginx.render_keys(cases.FULL_SITE),
    "compose.txt": _joined(compose.render(cases.ALL)),
    "kubernetes.txt": _joined(kubernetes.render(cases.ALL, Target())),
    "kubernetes-replicas.txt": _joined(
        kubernetes.render([cases.GPU], Target("ml", "registry.example.org/vllm:1", 3, "models"))
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_text_is_as_it_was(name: str) -> None:
    assert CASES[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_no_key_is_in_a_file_that_is_not_for_keys() -> None:
    assert not any("sk-" in text for name, text in CASES.items() if not name.endswith(".key"))


if __name__ == "__main__":
    for name, text in CASES.items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
