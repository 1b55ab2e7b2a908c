"""What an input of a request is: a text here, a text and a picture for other models. The API knows no more of it.

Whoever serves another kind of input writes one class with these methods and hands it to `api.Api`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Item = Any
"""One input, its types checked; what it is only its `Inputs` knows."""

Load = Any
"""One input as the workers want it."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How a request wants its inputs taken; None where it does not say.

    `prompt` is put before every text. `room` is the number of tokens, special ones too, that longer inputs are cut
    to; where it is None they are refused.
    """

    kind: Literal["query", "document"] | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    instruction: str | None = None
    room: int | None = None


class Inputs(Protocol):
    """Makes work of what clients send."""

    def parse(self, value: Any, param: str) -> Item:
        """One element of `input`; `param` is its place in the request. Quick. Raises HTTPError 400."""

    async def prepare(self, items: Sequence[Item], wish: Wish, param: str) -> Sequence[Load]:
        """As many loads as items, in their order; `param` is the field they stood in. Raises HTTPError.

        The task is cancelled when the client leaves.
        """

    def tokens(self, load: Load) -> int:
        """What a load costs, and what the client is told that it used."""

    def pack(self, loads: Sequence[Load], dim: int) -> bytes:
        """The body of one piece of work; `dim` as in `work.Work`."""

    def health(self) -> Mapping[str, Any]:
        """What /health says of them: `prompts` (values of `prompt_name`), `has_query` (queries are taken apart)."""


def place(param: str, index: int, count: int) -> str:
    """Where an input stands in its request: `input`, or `input[3]` where there are several."""
    return f"{param}[{index}]" if count > 1 else param
