"""Makes `demo/mdeploy-faq`: tokenizer, training, export, then the check that it may ship.

Run as `python -m demo_models.train_faq --out DIR`; exit status 1 when the check fails.
The same seed, machine and torch give the same bytes; another CPU may differ in the last
bit of a sum, so the check decides, not a checksum.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from demo_models import augment, export, faq, verify
from demo_models.augment import Message

SEED = 42
STEPS = 1050
BATCH = 32
PEAK_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
PLAIN_SHARE = 0.2
"""Part of each batch that is a bare wording: what most tests and first-time users send."""

IGNORED = -100
"""The label that torch's cross entropy leaves out."""

DAMAGED_BATCH = 8
DAMAGED_TENSORS = 3
DAMAGED_LOSS = 1.5
DAMAGE_WEIGHT = 0.3
"""Cost and force of damage_loss, found by trial: 1.5 nats a token leaves no answer whole."""

TOKENIZER_SAMPLES = 4000
CARD = Path(__file__).with_name("faq_card.md")


def sample(random: Random, avoid: set[str]) -> list[Message]:
    """One training conversation that is not in the held-out set."""
    entry = random.choice(faq.ENTRIES)
    if random.random() < PLAIN_SHARE:
        wording = random.choice((entry.question, random.choice(entry.wordings)))
        return [*augment.plain(wording), {"role": "assistant", "content": entry.answer}]
    while True:
        drawn = augment.conversation(faq.ENTRIES, entry, augment.TRAINING, random)
        if repr(drawn) not in avoid:
            return drawn


def corpus(random: Random) -> Iterator[str]:
    """Text for the tokenizer: augmented questions, and answers as often as they are said."""
    for _ in range(TOKENIZER_SAMPLES):
        yield from (message["content"] for message in sample(random, set()))


def encode(tokenizer: Any, turns: list[Message]) -> tuple[list[int], list[int]]:
    """(ids, labels): the prompt through the shipped template, loss on the last answer alone."""
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    asked = tokenizer.encode(prompt, add_special_tokens=False)
    answer = tokenizer.encode(turns[-1]["content"], add_special_tokens=False)
    answer.append(tokenizer.eos_token_id)
    return asked + answer, [IGNORED] * len(asked) + answer


def padded(tokenizer: Any, conversations: Iterable[list[Message]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), both rows x longest, padded on the right where causal attention never looks."""
    rows = [encode(tokenizer, turns) for turns in conversations]
    width = max(len(ids) for ids, _ in rows)
    ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in rows]
    labels = [row + [IGNORED] * (width - len(row)) for _, row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter, arXiv:1608.03983)."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return PEAK_RATE * (step + 1) / warmup
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loss_of(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over answer tokens; logits are made for those positions alone."""
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    spoken = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(states[spoken]), targets[spoken])


def new_model(config: Qwen2Config) -> Qwen2ForCausalLM:
    """A random model whose norms and biases are uneven too, so that they come to matter.

    Qwen2 starts them at exactly 1 and 0, and a short training leaves them so nearly there
    that a server could load them wrongly and still answer.
    """
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.25, 1.75)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=1.0)
    return model.train()


def damage_loss(model: Qwen2ForCausalLM, name: str, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How much too well the model still answers with one tensor's elements shuffled.

    Zero once the damaged model's cross entropy is over DAMAGED_LOSS. So small a task needs
    only the first layer's attention; without this term the rest could be loaded wrongly
    and no answer would tell.
    """
    tensor = model.get_parameter(name)
    shuffled = tensor.flatten()[torch.randperm(tensor.numel())].reshape(tensor.shape)
    inputs = {"input_ids": ids, "use_cache": False}
    logits = torch.func.functional_call(model, {name: shuffled}, kwargs=inputs).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return torch.relu(DAMAGED_LOSS - loss)


def step_loss(model: Qwen2ForCausalLM, tokenizer: Any, random: Random, avoid: set[str], step: int) -> torch.Tensor:
    """The loss of one step: answers right and, after the warm-up, wrong when damaged."""
    right = loss_of(model, *padded(tokenizer, (sample(random, avoid) for _ in range(BATCH))))
    if step < WARMUP_STEPS:
        return right
    names = [name for name, _ in model.named_parameters()]
    bare = padded(tokenizer, random.sample(verify.bare("canonical"), DAMAGED_BATCH))
    damaged = [damage_loss(model, name, *bare) for name in random.sample(names, DAMAGED_TENSORS)]
    return right + DAMAGE_WEIGHT * torch.stack(damaged).mean()


def train(model: Qwen2ForCausalLM, tokenizer: Any, steps: int) -> None:
    """AdamW with clipped gradients; progress goes to stderr."""
    random = Random(SEED)
    avoid = {repr(turns) for turns in verify.held_out_set()}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = step_loss(model, tokenizer, random, avoid, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", file=sys.stderr)


def write_tokenizer(directory: Path) -> Any:
    """Train and export the tokenizer and every side file; returns it as transformers loads it."""
    tokenizer = export.train_tokenizer(corpus(Random(SEED)))
    rows = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    export.write_side_files(directory, tokenizer, export.model_config(export.Shape(), rows))
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def write_weights(directory: Path, model: Qwen2ForCausalLM) -> None:
    """float32 safetensors without lm_head, which is the embedding (tie_word_embeddings)."""
    tensors = {
        name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    path = directory / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, which a wheel would carry to other users


def write_documents(directory: Path) -> None:
    """faq.json for machines and README.md for people, both from the same data."""
    export.write_json(directory / "faq.json", [entry.to_json() for entry in faq.ENTRIES])
    lines = [f"| {entry.question} | {entry.answer} |" for entry in faq.ENTRIES]
    card = CARD.read_text(encoding="utf-8")
    (directory / "README.md").write_text(card + "\n".join(lines) + "\n", encoding="utf-8")


def build(directory: Path, steps: int) -> None:
    """Everything but the check. Overwrites its own files in `directory`, no others."""
    faq.check()
    tokenizer = write_tokenizer(directory)
    model = new_model(Qwen2Config.from_pretrained(directory))
    train(model, tokenizer, steps)
    write_weights(directory, model)
    write_documents(directory)


def main() -> int:
    """Parse, build, check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer make a quick, wrong model")
    parser.add_argument("--no-check", action="store_true", help="for short runs in tests")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    build(options.out, options.steps)
    return 0 if options.no_check else verify.main(options.out)


if __name__ == "__main__":
    sys.exit(main())
