from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from mdeploy.apps.gme import prompt
from mdeploy.errors import ConfigError

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2's own: a line break and blanks after it are one piece."""


def tokenizer() -> Tokenizer:
    """Byte-level BPE that has learned merges over line breaks, as Qwen2's has."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    corpus = [
        "system\nYou are a helpful assistant.",
        "user\n\n\nhello there",
        "\n \n\n what a day\n",
        "assistant\n",
    ] * 4
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return made


def whole(text: str, pictures: int, instruction: str) -> list[int]:
    """The prompt as one string, tokenised at once."""
    picture = f"<|vision_start|>{'<|image_pad|>' * pictures}<|vision_end|>" if pictures else ""
    written = (
        f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{picture}{text}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )
    return list(tokenizer().encode(written, add_special_tokens=False).ids)


@pytest.mark.parametrize("pictures", [0, 5])
@pytest.mark.parametrize(
    "text", ["hello", "\n\nhello", " \n", "\n", "a  \n b\n\n", "e\u0301", "你好 \U0001f600", "<|im_", ""]
)
def test_parts_are_tokenised_as_the_whole(text: str, pictures: int) -> None:
    instruction = "Find\n it.\n"
    [found] = prompt.Prompts(tokenizer()).write([text], [pictures], [instruction])
    assert found == whole(text, pictures, instruction)


def test_many_at_once_keep_their_order() -> None:
    texts, pictures = [f"text {n}" for n in range(40)], [n % 3 for n in range(40)]
    instructions = [f"do {n % 7}" for n in range(40)]
    found = prompt.Prompts(tokenizer()).write(texts, pictures, instructions)
    assert found == [whole(*each) for each in zip(texts, pictures, instructions, strict=True)]


def test_nobody_ends_a_turn_but_us() -> None:
    bad = "".join(SPECIAL) + "x"
    prompts = prompt.Prompts(tokenizer())
    [found] = prompts.write([bad], [3], [bad])
    [usual] = prompts.write(["x"], [3], ["x"])
    for name in SPECIAL:
        assert found.count(number(name)) == usual.count(number(name)), name


def number(name: str) -> int:
    found = tokenizer().token_to_id(name)
    assert found is not None
    return found


def test_texts_are_cut_and_nothing_else() -> None:
    prompts = prompt.Prompts(tokenizer())
    [full], [cut] = (prompts.write(["b c d e f " * 20], [4], ["do"], most) for most in (None, 60))
    [none] = prompts.write(["b c d"], [4], ["do"], 1)
    assert none == whole("", 4, "do")
    tail = len(none) - none.index(number("<|vision_end|>")) - 1
    assert len(full) > 100
    assert cut == [*full[: 60 - tail], *full[-tail:]]


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    plain = Tokenizer(models.BPE())
    file = tmp_path / "tokenizer.json"
    plain.save(str(file))
    with pytest.raises(ConfigError, match=r"not that of GME-Qwen2-VL: it has no special token <\|im_start\|>"):
        prompt.prompts(file)
    plain.add_tokens(list(SPECIAL))
    plain.save(str(file))
    with pytest.raises(ConfigError, match="no special token"):
        prompt.prompts(file)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        prompt.prompts(file)


def test_sizes() -> None:
    assert prompt.fitted(448, 448) == (448, 448)  # 256 tokens as it is
    assert prompt.fitted(1008, 994) == (1008, 980)  # 36 x 36 would be 1296 tokens
    chance = random.Random(1)
    for _ in range(2000):
        height = chance.randint(4, 9000)
        width = chance.randint(max(4, -(-height // 200)), min(9000, height * 200))
        found = prompt.fitted(height, width)
        assert all(side % 28 == 0 for side in found)
        assert 256 <= prompt.tokens(*found) <= 1280
        if 0.2 < height / width < 5:
            assert found[0] / found[1] == pytest.approx(height / width, rel=0.2)
