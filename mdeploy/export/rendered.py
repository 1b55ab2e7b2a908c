"""What a renderer returns: files that somebody else writes."""

from __future__ import annotations

from dataclasses import dataclass, field

MARK = "# Written by `mdeploy export "
"""How every text of ours begins: a file that begins otherwise is never replaced."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A file to be written: its name, its text or bytes, its mode. What may be a secret is not shown."""

    name: str
    content: str | bytes = field(repr=False)
    mode: int = 0o644
