"""Models that are pooled by their last token: every text must end with the special token they were trained with."""

from __future__ import annotations

from mdeploy.apps.embed import modules
from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.errors import ConfigError

_TEXTS = ("a", "What is the capital of France?")


def check_endings(checkpoint: Checkpoint) -> None:
    """Raises ConfigError where the tokenizer does not append that token: the vectors would be wrong without a sign."""
    if checkpoint.kind != "embedder" or checkpoint.pooling != "last":
        return
    from tokenizers import Tokenizer

    file = checkpoint.path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    added = modules.values(file).get("added_tokens") or ()
    special = {token["id"] for token in added if token.get("special")}
    ends = {tokenizer.encode(text).ids[-1] for text in _TEXTS}
    if len(ends) != 1 or not ends <= special:
        why = "its vector is that of the last token, so every vector would be wrong"
        raise ConfigError(
            f"{file} does not end texts with a special token, and this model is pooled by it: {why}",
            hint="take tokenizer.json from the model's own repository: mdeploy download ID",
        )
