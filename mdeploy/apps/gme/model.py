"""Qwen2-VL as an embedder: texts, pictures and both together in one row without padding, one vector for each.

Native classes of transformers only; the code that GME brings along is never run. Pictures come as raw pixels and are
normalised and cut into patches on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from mdeploy.apps.embed import attention, modules, pooling
from mdeploy.apps.embed.attention import Segments
from mdeploy.apps.gme import vision
from mdeploy.apps.gme.prompt import TILE
from mdeploy.apps.gme.work import Input, Picture

PATCH, MERGE, FRAMES = 14, 2, 2
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Those of CLIP, which Qwen2-VL was trained with."""


class Normalizer:
    """Makes patches of pixels: what Qwen2-VL's image processor does after scaling."""

    def __init__(self, path: Path, device: torch.device | str) -> None:
        """Mean and deviation are those of preprocessor_config.json."""
        settings = modules.values(path / "preprocessor_config.json", missing_ok=True)
        mean = torch.tensor(settings.get("image_mean", _MEAN), device=device)
        std = torch.tensor(settings.get("image_std", _STD), device=device)
        # (pixel / 255 - mean) / std in one multiplication and one addition
        self._scale = (1 / (255 * std)).view(3, 1, 1)
        self._shift = (-mean / std).view(3, 1, 1)
        self._device = device

    def patches(self, picture: Picture) -> torch.Tensor:
        """float32 [patches, 3 * 2 * 14 * 14]: squares of 2 x 2 patches one after the other, each frame twice."""
        rows, columns = picture.height // TILE, picture.width // TILE
        pixels = torch.from_numpy(np.frombuffer(picture.pixels, np.uint8).copy()).to(self._device, non_blocking=True)
        squares = pixels.view(rows, MERGE, PATCH, columns, MERGE, PATCH, 3).permute(0, 3, 1, 4, 6, 2, 5)
        normal = squares.float().mul_(self._scale).add_(self._shift)
        return normal.unsqueeze(5).expand(-1, -1, -1, -1, -1, FRAMES, -1, -1).reshape(rows * columns * MERGE**2, -1)


def positions(inputs: Sequence[Input], image_token: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Time, row and column of every token of a row of prompts, [3, T] (Qwen2-VL's multimodal rotary positions).

    Each prompt begins at 0. Text counts all three on together; a picture that begins at s has time s and rows and
    columns from s on; the text after it begins at s + the larger of rows and columns.
    """
    found = np.empty((3, sum(len(each.ids) for each in inputs)), np.int64)
    start = 0
    for each in inputs:
        end = start + len(each.ids)
        _place(found[:, start:end], each, image_token)
        start = end
    return found


def _place(into: np.ndarray[Any, np.dtype[np.int64]], each: Input, image_token: int) -> None:
    length, picture = len(each.ids), each.picture
    if picture is None:
        into[:] = np.arange(length)
        return
    rows, columns = picture.height // TILE, picture.width // TILE
    first = each.ids.index(image_token)
    after = first + rows * columns
    into[:, :first] = np.arange(first)
    into[0, first:after] = first
    into[1, first:after] = np.repeat(np.arange(rows), columns) + first
    into[2, first:after] = np.tile(np.arange(columns), rows) + first
    into[:, after:] = np.arange(length - after) + first + max(rows, columns)


class Patches(torch.nn.Module):  # type: ignore[misc] # torch has no types here
    """The first layer of the vision tower as the matrix that it is.

    Its kernel is as large as its step, so nothing overlaps; as Conv3d some versions of torch run it many times slower.
    """

    def __init__(self, convolution: torch.nn.Conv3d) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(convolution.weight.flatten(1), requires_grad=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[n, 3 * 2 * 14 * 14] to [n, width of the tower]."""
        return functional.linear(patches.to(self.weight.dtype), self.weight)


class Model:
    """The model on its device, asked with all prompts in one `packed` row, or `padded` to the longest of them."""

    def __init__(self, model: Any, path: Path) -> None:
        """`model` is a Qwen2VLModel in `path`, as transformers loads it."""
        model.visual.patch_embed = Patches(model.visual.patch_embed.proj)
        self._looks = vision.Attentions(model.visual)
        self._model = model
        self._image_token = int(model.config.image_token_id)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.way: Literal["packed", "padded"] = "padded"
        self._normalizer = Normalizer(path, self.device)

    def use(self, way: Literal["packed", "padded"]) -> None:
        """From now on. Pictures see themselves only, whichever it is."""
        attention.register()
        self._model.language_model.set_attn_implementation(attention.NAME if way == "packed" else "sdpa")
        self._looks.use(packed=way == "packed")
        self.way = way

    def pooled(self, inputs: Sequence[Input]) -> torch.Tensor:
        """float32 [n, hidden] on the device: the state of each prompt's last token."""
        lengths = [len(each.ids) for each in inputs]
        fill = self.way == "packed" and self.device.type == "cpu"
        segments = Segments(lengths, self.device, attention.spare_tokens(sum(lengths)) if fill else 0)
        states = self._packed(inputs, segments) if self.way == "packed" else self._padded(inputs, segments)
        return pooling.pool(states, segments, "last")

    def single(self, each: Input, copies: int = 1) -> torch.Tensor:
        """The same for one prompt as transformers itself does it, to compare with; [copies, hidden]."""
        ids = torch.tensor([list(each.ids)] * copies, device=self.device)
        seen: dict[str, torch.Tensor] = {}
        if each.picture is not None:
            seen = {
                "pixel_values": self._normalizer.patches(each.picture).repeat(copies, 1),
                "image_grid_thw": self._grid([each.picture] * copies),
                "mm_token_type_ids": (ids == self._image_token).int(),
            }
        hidden = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **seen)
        last: torch.Tensor = hidden.last_hidden_state[:, -1].float()
        return last

    def _packed(self, inputs: Sequence[Input], segments: Segments) -> torch.Tensor:
        row, places = self._row(inputs)
        spare = segments.total - len(row)
        if spare:
            row, places = functional.pad(row, (0, 0, 0, spare)), functional.pad(places, (0, spare))
        with attention.packed(segments):
            return self._text(row.unsqueeze(0), places.unsqueeze(1), None)[0]

    def _padded(self, inputs: Sequence[Input], segments: Segments) -> torch.Tensor:
        """As a rectangle, padded on the right, where no token sees what comes after it."""
        row, places = self._row(inputs)
        shape = (len(inputs), segments.longest)
        mask = torch.arange(shape[1], device=self.device) < segments.bounds.diff().unsqueeze(1)
        states = row.new_zeros((*shape, row.shape[-1]))
        states[mask] = row
        spread = places.new_zeros((3, *shape))
        spread[:, mask] = places
        return self._text(states, spread, mask.long())[mask]

    def _row(self, inputs: Sequence[Input]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the text model reads, one prompt behind the other: [T, hidden] with the pictures in it, and [3, T]."""
        joined = np.concatenate([np.asarray(each.ids, np.int64) for each in inputs])
        ids = torch.from_numpy(joined).to(self.device, non_blocking=True)
        places = torch.from_numpy(positions(inputs, self._image_token)).to(self.device, non_blocking=True)
        row: torch.Tensor = self._model.get_input_embeddings()(ids)
        pictures = [each.picture for each in inputs if each.picture is not None]
        if pictures:
            row[torch.from_numpy(joined == self._image_token).to(self.device)] = self._see(pictures).to(row.dtype)
        return row, places

    def _see(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """The pictures as the text model reads them, [image tokens, hidden]."""
        patches = torch.cat([self._normalizer.patches(one) for one in pictures])
        sizes = [one.height * one.width // PATCH**2 for one in pictures]
        with attention.packed(Segments(sizes, self.device)):  # heeded where the tower's attention is ours
            seen = self._model.visual(patches, grid_thw=self._grid(pictures))
        found: torch.Tensor = seen if isinstance(seen, torch.Tensor) else seen.pooler_output
        return found

    def _grid(self, pictures: Sequence[Picture]) -> torch.Tensor:
        return torch.tensor([(1, one.height // PATCH, one.width // PATCH) for one in pictures], device=self.device)

    def _text(self, states: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        found: torch.Tensor = self._model.language_model(
            inputs_embeds=states, position_ids=places, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return found
