"""What an embedding service is told when it starts: a value, and the words of a command line that carry it.

What every app has (address, devices, limits) is in AppOptions, whose words go on the same command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mdeploy.serving import options
from mdeploy.serving.options import AppOptions

TokenIds = Literal["reject", "model"]


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """One embedding service; None leaves a value to the model.

    `model` is its directory, `names` are what clients may call it, the first is what we call it. `dimensions` is the
    size of a vector where a request does not say. `dtype` is auto, float32, bfloat16 or float16. `batch_tokens` is
    the token budget of a batch, measured at start where it is None. `attention` is auto, packed or padded.
    `token_ids` says whether token ids are taken for the model's own. `instruction` is put before queries of models
    that want one, in place of the model's. `max_inputs` are texts in one request.
    """

    app: AppOptions
    model: str
    names: tuple[str, ...]
    dimensions: int | None = None
    dtype: str = "auto"
    batch_tokens: int | None = None
    max_length: int | None = None
    attention: Literal["auto", "packed", "padded"] = "auto"
    compile: bool = False
    truncate: bool = False
    token_ids: TokenIds = "reject"
    instruction: str | None = None
    max_inputs: int = 2048

    def argv(self) -> tuple[str, ...]:
        """The words after `python -m mdeploy.apps embed`; what has its default is left out."""
        return (*self.app.argv(), *_words(self))


def parse(argv: Sequence[str]) -> EmbedOptions:
    """The inverse of `EmbedOptions.argv`. Ends the program with status 2 for words it does not know."""
    found, rest = _parser().parse_known_args(list(argv))
    own = vars(found)
    return EmbedOptions(app=options.parse(rest), **{**own, "names": tuple(own["names"])})


_VALUES: Mapping[str, tuple[str, type]] = {
    "model": ("--model", str),
    "dimensions": ("--dimensions", int),
    "dtype": ("--dtype", str),
    "batch_tokens": ("--batch-tokens", int),
    "max_length": ("--max-length", int),
    "attention": ("--attention", str),
    "token_ids": ("--token-ids", str),
    "instruction": ("--instruction", str),
    "max_inputs": ("--max-inputs", int),
}
_FLAGS = {"compile": "--compile", "truncate": "--truncate"}
_DEFAULTS: Mapping[str, Any] = {
    "dtype": "auto",
    "attention": "auto",
    "token_ids": "reject",
    "max_inputs": 2048,
}


def _words(own: EmbedOptions) -> Iterator[str]:
    for name, (flag, _) in _VALUES.items():
        value = getattr(own, name)
        if value != _DEFAULTS.get(name):
            yield f"{flag}={value}"
    yield from (f"--called={name}" for name in own.names)
    yield from (flag for name, flag in _FLAGS.items() if getattr(own, name))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mdeploy.apps embed", allow_abbrev=False, add_help=False)
    for name, (flag, kind) in _VALUES.items():
        parser.add_argument(flag, dest=name, type=kind, default=_DEFAULTS.get(name), required=name == "model")
    parser.add_argument("--called", dest="names", action="append", required=True)
    for name, flag in _FLAGS.items():
        parser.add_argument(flag, dest=name, action="store_true")
    return parser
