from __future__ import annotations

import pytest

from mdeploy.errors import UsageError
from mdeploy.hub import refs


@pytest.mark.parametrize(
    ("text", "revision", "expected"),
    [
        ("Qwen/Qwen3-0.6B", None, "Qwen/Qwen3-0.6B"),
        ("  iic/a_b.c  ", None, "iic/a_b.c"),
        ("a/b@v1.0", None, "a/b@v1.0"),
        ("a/b", "feature/x", "a/b@feature/x"),
        ("a/b@v1", "v1", "a/b@v1"),
        ("a/b", "master", "a/b"),
        ("https://modelscope.cn/models/Qwen/Qwen3-0.6B", None, "Qwen/Qwen3-0.6B"),
        ("https://www.modelscope.cn/models/Qwen/Qwen3-0.6B/files?x=1", None, "Qwen/Qwen3-0.6B"),
    ],
)
def test_accepts(text: str, revision: str | None, expected: str) -> None:
    assert str(refs.parse(text, revision)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Qwen",
        "/",
        "a/",
        "/b",
        "a/b/c",
        "../etc",
        "a/..",
        "./a/b",
        "a b/c",
        "a/b c",
        "a/-b",
        "-a/b",
        ".a/b",
        "a/b\0c",
        "a/模型",
        "a/b@",
        "a/b@..",
        "a/b@../x",
        "a/b@x//y",
        "a/b@-x",
        "a/b@/x",
        "https://example.com/models/a/b",
        "https://modelscope.cn/datasets/a/b",
        "https://[bad/models/a/b",
        "a/" + "b" * 300,
        "~/model",
    ],
)
def test_refuses_with_a_way_out(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        refs.parse(text, None)
    assert caught.value.hint


def test_two_revisions() -> None:
    with pytest.raises(UsageError, match="two revisions"):
        refs.parse("a/b@v1", "v2")
