"""What every request for vectors may say besides its inputs: the model, the size of a vector, prompts, truncation.

Fields we do not know are passed over: OpenAI's clients send several that mean nothing here (`user`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from mdeploy.apps.embed import fields
from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.apps.embed.fields import Body
from mdeploy.apps.embed.inputs import Wish
from mdeploy.apps.embed.options import EmbedOptions
from mdeploy.errors import ConfigError
from mdeploy.serving.handler import HTTPError

_KINDS: dict[str, Any] = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
}
"""What others call the two sides of a search: Cohere, NVIDIA, Voyage."""

_CUTS = {True: True, False: False, "END": True, "NONE": False}


@dataclass(frozen=True, slots=True)
class About:
    """The model as clients know it, and what requests may ask of it. `names` as in `EmbedOptions`."""

    checkpoint: Checkpoint
    names: tuple[str, ...]
    max_length: int
    dimensions: int | None = None
    truncate: bool = False
    max_inputs: int = 2048
    since: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_cross_encoder(self) -> bool:
        """It scores pairs and has no vectors."""
        return self.checkpoint.kind == "cross-encoder"

    def name(self, body: Body) -> str:
        """The name the client uses; ours where it names none. Raises HTTPError 404."""
        name = fields.text(body, "model")
        if name is None:
            return self.names[0]
        self.check_name(name)
        return name

    def check_name(self, name: str) -> None:
        """Raises HTTPError 404 where we are not called so."""
        if name not in self.names:
            text = f"the model {name[:200]!r} does not exist here; this service has {', '.join(self.names)}"
            raise HTTPError(404, text, code="model_not_found", param="model")

    def dim(self, body: Body) -> int:
        """Numbers in a vector, 0 for all. Raises HTTPError 400."""
        asked = fields.whole(body, "dimensions")
        if asked is None:
            return self.dimensions or 0
        problem = unfit(self.checkpoint, asked)
        if problem:
            fields.wrong("dimensions", problem)
        return 0 if asked == self.checkpoint.dim else asked

    def wish(self, body: Body) -> Wish:
        """How the inputs shall be taken. Raises HTTPError 400."""
        kind = fields.choice(body, "input_type", tuple(_KINDS))
        return Wish(
            kind=None if kind is None else _KINDS[kind],
            prompt=fields.text(body, "prompt"),
            prompt_name=fields.text(body, "prompt_name"),
            instruction=fields.text(body, "instruction"),
            room=self.room(body),
        )

    def room(self, body: Body) -> int | None:
        """Tokens that longer inputs are cut to; None where they are refused. Raises HTTPError 400."""
        asked = body.get("truncate_prompt_tokens")
        if asked is not None:
            return self._asked_room(body, asked)
        cuts = body.get("truncate")
        if cuts is None:
            return self.max_length if self.truncate else None
        if not isinstance(cuts, (bool, str)) or cuts not in _CUTS:
            shown = repr(cuts[:40]) if isinstance(cuts, str) else fields.kind(cuts)
            fields.wrong("truncate", f'is {shown}, it may be true, false, "END" or "NONE"')
        return self.max_length if _CUTS[cuts] else None

    def _asked_room(self, body: Body, asked: Any) -> int:
        if asked == -1 and not isinstance(asked, float):
            return self.max_length
        room = fields.whole(body, "truncate_prompt_tokens")
        assert room is not None
        if room > self.max_length:
            fields.wrong("truncate_prompt_tokens", f"is {room}, this model takes at most {self.max_length} tokens")
        return room


def about(options: EmbedOptions, checkpoint: Checkpoint) -> About:
    """Raises ConfigError where the options ask for what the model does not have."""
    longest = options.max_length or checkpoint.max_length
    if longest > checkpoint.max_length:
        raise ConfigError(f"--max-length {longest}: {options.names[0]} takes at most {checkpoint.max_length} tokens")
    dimensions = options.dimensions
    if dimensions is not None:
        problem = unfit(checkpoint, dimensions)
        if problem:
            raise ConfigError(f"--dimensions {problem}")
        dimensions = None if dimensions == checkpoint.dim else dimensions
    return About(checkpoint, options.names, longest, dimensions, options.truncate, options.max_inputs)


def unfit(checkpoint: Checkpoint, dimensions: int) -> str:
    """Why vectors of this size are not to be had, empty where they are."""
    dim, least = checkpoint.dim, checkpoint.smallest
    if dimensions == dim:
        return ""
    if least is None:
        return f"is {dimensions}: vectors of this model have {dim} numbers and it was not trained to be cut shorter"
    if not least <= dimensions <= dim:
        return f"is {dimensions}, this model has {least} to {dim}"
    return ""
