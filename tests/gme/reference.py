"""Compares our GME with plain transformers; run by an interpreter that has torch and transformers.

    PYTHON reference.py MODEL OUT

Writes JSON: vectors of INPUTS as transformers gives them one at a time, the worst cosine of every other way to ask
with them, and what differs between our prompts and pictures and those of transformers' own processors.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from mdeploy.apps.embed import checkpoint, loading
from mdeploy.apps.gme import encoder, prompt, vision, work
from mdeploy.apps.gme.decode import Decode
from mdeploy.apps.gme.encoder import Encoder
from mdeploy.apps.gme.model import Model
from mdeploy.apps.gme.work import Input
from mdeploy.serving.handler import Request
from mdeploy.serving.load import LoadError
from tests.gme.given import INPUTS
from tests.gme.pictures import encoded, noise

LIMITS = {"min_pixels": prompt.MIN_TOKENS * 28 * 28, "max_pixels": prompt.MAX_TOKENS * 28 * 28}


class Plain:
    """transformers and nothing else."""

    def __init__(self, path: Path) -> None:
        self.model = Qwen2VLModel.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(path, **LIMITS)
        self.image_token = self.model.config.image_token_id
        self.told = [self._told(*given) for given in INPUTS]

    def _told(self, text: str, size: Any, instruction: str) -> tuple[list[int], dict[str, Any]]:
        seen = self.processor(images=[noise(*size)], return_tensors="pt") if size else {}
        count = int(seen["image_grid_thw"].prod()) // 4 if size else 0
        picture = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" if count else ""
        whole = (
            f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{picture}{text}<|im_end|>\n"
            "<|im_start|>assistant\n<|endoftext|>"
        )
        return list(self.tokenizer(whole)["input_ids"]), dict(seen)

    def batch(self, indices: list[int], side: str) -> torch.Tensor:
        longest = max(len(self.told[index][0]) for index in indices)
        ids, mask = torch.zeros((2, len(indices), longest), dtype=torch.long)
        for row, index in enumerate(indices):
            own = torch.tensor(self.told[index][0])
            place = slice(longest - len(own), longest) if side == "left" else slice(0, len(own))
            ids[row, place], mask[row, place] = own, 1
        seen = [self.told[index][1] for index in indices if self.told[index][1]]
        told = {name: torch.cat([one[name] for one in seen]) for name in ("pixel_values", "image_grid_thw") if seen}
        if seen:
            told["mm_token_type_ids"] = (ids == self.image_token).int()
        hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **told).last_hidden_state
        last = mask.cumsum(1).argmax(1) if side == "right" else torch.full((len(indices),), longest - 1)
        return torch.nn.functional.normalize(hidden[torch.arange(len(indices)), last], dim=1)


def ours(path: Path) -> list[Input]:
    prompts = prompt.Prompts(Tokenizer.from_file(str(path / "tokenizer.json")))
    pictures = [
        work.picture(Decode().inference(Request(body=encoded(noise(*size))))) if size else None for _, size, _ in INPUTS
    ]
    sizes = [prompt.tokens(one.height, one.width) if one else 0 for one in pictures]
    ids = prompts.write([text for text, _, _ in INPUTS], sizes, [told for _, _, told in INPUTS])
    body = work.pack([Input(each, picture) for each, picture in zip(ids, pictures, strict=True)])
    return list(work.unpack(body).inputs)


def ways(path: Path, plain: Plain, model: Model, inputs: list[Input]) -> dict[str, torch.Tensor]:
    """Every way to ask for the vectors of INPUTS, the batch in another order too."""
    every = list(range(len(inputs)))
    found = {f"{side}-padded by transformers": plain.batch(every, side) for side in ("left", "right")}
    for way in ("packed", "padded"):
        model.use(way)
        found[way] = torch.from_numpy(Encoder(model, 1e9).encode(inputs))
        found[f"{way}, reversed"] = torch.from_numpy(Encoder(model, 1e9).encode(inputs[::-1])).flip(0)
        found[f"{way}, a small budget"] = torch.from_numpy(Encoder(model, 1500).encode(inputs))
        found[f"{way}, alone"] = torch.cat([model.pooled([each]) for each in inputs])
    found["no memory for two"] = torch.from_numpy(Encoder(Scarce(model), 1e9).encode(inputs))  # type: ignore[arg-type]
    found["as published"] = as_published(path, inputs)
    return {name: torch.nn.functional.normalize(each, dim=1) for name, each in found.items()}


class Scarce:
    """A device that has memory for one input."""

    way = "packed"

    def __init__(self, model: Model) -> None:
        self._model = model

    def pooled(self, inputs: list[Input]) -> torch.Tensor:
        if len(inputs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._model.pooled(inputs)


def choices(model: Model, image_token: int) -> dict[str, str]:
    """What the check at start decides: as things are, where packing goes wrong, where pictures are seen wrongly."""

    def chosen(asked: Any = "auto") -> str:
        try:
            encoder.choose(model, image_token, asked)
        except LoadError as error:
            return str(error)
        return model.way

    found = {"as it is": chosen()}
    with mock.patch.object(model, "_packed", lambda *given: Model._packed(model, *given).roll(1, 1)):
        found["packed is wrong"] = chosen()
        found["packed is asked for"] = chosen("packed")
    with mock.patch.object(vision._Attention, "forward", lambda self, states, **others: states):
        found["pictures are packed wrongly"] = chosen()
    with mock.patch.object(model, "_see", lambda pictures: Model._see(model, pictures).flip(0)):
        found["all is wrong"] = chosen()
    return found


def as_published(path: Path, inputs: list[Input]) -> torch.Tensor:
    """Vectors of the same weights with a config.json like that of GME's own repository, which names code to be run."""
    config = json.loads((path / "config.json").read_text())
    text = {name: value for name, value in config.pop("text_config").items() if name != "model_type"}
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    code = {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL", "AutoConfig": "modeling_gme_qwen2vl.GmeQwen2VLConfig"}
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "gme"
        shutil.copytree(path, copy)
        (copy / "modeling_gme_qwen2vl.py").write_text("raise SystemExit('code of the model was run')")
        changed = {"model_type": "gme_qwen2_vl", "architectures": ["GmeQwen2VL"], "auto_map": code}
        (copy / "config.json").write_text(json.dumps({**text, **config, **changed}))
        loaded = loading.load(checkpoint.read(copy), "cpu", torch.float32)
        return torch.from_numpy(Encoder(Model(loaded, copy), 1e9).encode(inputs))


def sizes_that_differ() -> list[tuple[int, int]]:
    """Among thousands of all shapes."""
    chance = np.random.default_rng(0)
    sides = np.exp(chance.uniform(np.log(4), np.log(9000), (4000, 2))).astype(int).tolist()
    fit = [(h, w) for h, w in sides if max(h, w) <= prompt.MAX_ASPECT * min(h, w)]
    assert len(fit) > 3000
    return [size for size in fit if prompt.fitted(*size) != smart_resize(*size, 28, *LIMITS.values())]


def main(path: Path, out: Path) -> None:
    plain, inputs = Plain(path), ours(path)
    model = Model(Qwen2VLModel.from_pretrained(path, dtype=torch.float32).eval(), path)
    alone = torch.cat([plain.batch([index], "right") for index in range(len(INPUTS))])
    pixels = [
        float((model._normalizer.patches(each.picture) - told["pixel_values"]).abs().max())
        for each, (_, told) in zip(inputs, plain.told, strict=True)
        if each.picture is not None
    ]
    found = {
        "vectors": alone.tolist(),
        "worst": {name: float((each * alone).sum(1).min()) for name, each in ways(path, plain, model, inputs).items()},
        "prompts": [list(each.ids) == ids for each, (ids, _) in zip(inputs, plain.told, strict=True)],
        "pixels": pixels,
        "sizes": sizes_that_differ(),
        "choices": choices(model, plain.image_token),
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
