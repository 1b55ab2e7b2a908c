"""Checks an exported demo model as a stranger would use it: transformers, template, greedy.

Run as `python -m demo_models.verify DIR`; exit status 1 when the model is not fit to ship.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_models.augment import Message, held_out, plain
from demo_models.faq import ENTRIES

HELD_OUT_SEED = 20250
HELD_OUT_EACH = 8
HELD_OUT_SHARE = 0.95
"""The model's promise for wrapped wordings; bare trained wordings must all be right."""

SURVIVORS_SHARE = 0.1
"""At most this part of the answers may outlive the shuffling of any weight matrix."""

MAX_BYTES = 4_000_000
"""The package ships the directory in its wheel."""

_BATCH = 64
_MAX_NEW_TOKENS = 96


def held_out_set() -> list[list[Message]]:
    """The same held-out conversations for training (which avoids them) and for the check."""
    return held_out(ENTRIES, HELD_OUT_EACH, Random(HELD_OUT_SEED))


def load(directory: Path) -> tuple[Any, Any]:
    """Tokenizer (left padding, for batched generation) and model from local files only."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    return tokenizer, model.eval()


def answers(tokenizer: Any, model: Any, prompts: Sequence[list[Message]]) -> list[str]:
    """Greedy answers; an answer that does not stop by itself is marked, so it counts as wrong."""
    found: list[str] = []
    for start in range(0, len(prompts), _BATCH):
        found += _answer_batch(tokenizer, model, prompts[start : start + _BATCH])
    return found


def _answer_batch(tokenizer: Any, model: Any, prompts: Sequence[list[Message]]) -> list[str]:
    """One left-padded batch through the chat template and `generate`."""
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS)
    return [_text(tokenizer, row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def _text(tokenizer: Any, ids: list[int]) -> str:
    """The text before end-of-turn, or a marked text when the turn never ended."""
    if tokenizer.eos_token_id not in ids:
        return "(did not stop) " + str(tokenizer.decode(ids))
    return str(tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)]))


def wrong(tokenizer: Any, model: Any, conversations: Sequence[list[Message]]) -> list[tuple[str, str, str]]:
    """(last question, expected, got) for each conversation whose last message is not reproduced."""
    got = answers(tokenizer, model, [turns[:-1] for turns in conversations])
    return [
        (turns[-2]["content"], turns[-1]["content"], text)
        for turns, text in zip(conversations, got, strict=True)
        if text != turns[-1]["content"]
    ]


def bare(wordings: str) -> list[list[Message]]:
    """Conversations of one bare question: the "canonical" ones, or "all" trained wordings."""
    return [
        [*plain(wording), {"role": "assistant", "content": entry.answer}]
        for entry in ENTRIES
        for wording in (entry.wordings if wordings == "all" else entry.wordings[:1])
    ]


def disagreements(directory: Path, tokenizer: Any) -> list[str]:
    """Texts that transformers and tokenizer.json alone (Rust servers, transformers 4) split unlike."""
    plain_tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [text for entry in ENTRIES for text in (*entry.wordings, entry.answer)]
    texts += [turns[0]["content"] for turns in held_out_set()]
    return [
        text
        for text in texts
        if tokenizer.encode(text, add_special_tokens=False)
        != plain_tokenizer.encode(text, add_special_tokens=False).ids
    ]


def survivors(tokenizer: Any, model: Any) -> dict[str, int]:
    """Canonical questions still answered when one weight tensor's elements are shuffled.

    A test of a server is only as good as this: a tensor that may be shuffled unseen
    would let a loader's mistake pass.
    """
    canonical = bare("canonical")
    counts = {}
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data = _shuffled(kept)
        counts[name] = len(canonical) - len(wrong(tokenizer, model, canonical))
        parameter.data = kept
    return counts


def _shuffled(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in a fixed random order."""
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(7))
    return tensor.flatten()[order].reshape(tensor.shape).contiguous()


def report(directory: Path, with_survivors: bool = True) -> dict[str, Any]:
    """All measurements of one directory; `passed` says whether it may ship."""
    tokenizer, model = load(directory)
    groups = {"canonical": bare("canonical"), "wordings": bare("all"), "held_out": held_out_set()}
    missed = {name: wrong(tokenizer, model, group) for name, group in groups.items()}
    share = {name: 1 - len(missed[name]) / len(group) for name, group in groups.items()}
    shuffled = survivors(tokenizer, model) if with_survivors else {}
    matrices = [count for name, count in shuffled.items() if _is_matrix(name)]
    unlike = disagreements(directory, tokenizer)
    size = sum(path.stat().st_size for path in directory.iterdir())
    return {
        "passed": share["canonical"] == 1
        and share["held_out"] >= HELD_OUT_SHARE
        and size <= MAX_BYTES
        and not unlike
        and max(matrices, default=0) <= SURVIVORS_SHARE * len(groups["canonical"]),
        "bytes": size,
        "asked": {name: len(group) for name, group in groups.items()},
        "exact": {name: round(value, 4) for name, value in share.items()},
        "right_after_shuffle": shuffled,
        "tokenized_unlike": unlike,
        "missed": missed,
    }


def _is_matrix(name: str) -> bool:
    """Whether a parameter is a weight matrix: norms and biases are too small to matter."""
    return "norm" not in name and name.endswith(".weight")


def main(directory: Path) -> int:
    """Print the report as JSON; 0 when the model may ship."""
    torch.set_num_threads(1)
    result = report(directory)
    print(json.dumps(result, ensure_ascii=False, indent=2))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
