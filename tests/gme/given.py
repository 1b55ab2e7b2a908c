"""Inputs that are compared with transformers: text, the size of a picture, instruction."""

from __future__ import annotations

from mdeploy.apps.gme.prompt import INSTRUCTION

Given = tuple[str, tuple[int, int] | None, str]

INPUTS: list[Given] = [
    ("a red square", None, INSTRUCTION),
    ("", (640, 480), INSTRUCTION),
    ("what is this?", (100, 800), "Find an image that matches the given text."),
    ("\n\n  spaces, Ünïcödé 你好 and 123\n", None, "Judge"),
    ("x" * 70, (31, 29), INSTRUCTION),
    ("", (2600, 900), INSTRUCTION),
    ("short", None, INSTRUCTION),
]
