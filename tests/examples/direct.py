"""Asks a handler's class without any server, in an interpreter that has what it needs; JSON in, JSON out.

    PYTHON direct.py < [{"app": FILE.py, "class": NAME, "model": DIRECTORY, "requests": [...]}]

Every request is answered on its own and as part of one batch of all; `reference` is what the model's own library
says, where a request has it.
"""

import base64
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from mdeploy.serving.handler import File, HTTPError, Request


def request(sent: dict[str, Any]) -> Request:
    if "json" in sent:
        return Request(body=json.dumps(sent["json"]).encode())
    image = base64.b64decode(sent["image"])
    return Request(form=list(sent.get("form", {}).items()), files=[File("image", "x.png", "image/png", image)])


def answers(job: dict[str, Any]) -> list[dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("app_" + job["class"], job["app"])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ["MDEPLOY_MODEL_DIR"] = job["model"]
    handler = getattr(module, job["class"])()
    handler.init("cpu")
    items, found = [], []
    for sent in job["requests"]:
        try:
            item = handler.preprocess(request(sent))
        except HTTPError as error:
            found.append({"error": [error.status, error.message]})
            continue
        found.append({"single": handler.postprocess(handler.forward([item])[0]), "cost": handler.cost(item)})
        found[-1]["reference"] = REFERENCES[job["class"]](handler, sent, item)
        items.append((len(found) - 1, item))
    for (place, _), output in zip(items, handler.forward([item for _, item in items]), strict=True):
        found[place]["batched"] = handler.postprocess(output)
    return found


def t5(handler: Any, sent: dict[str, Any], item: Any) -> str:
    """The text as the model card has it made."""
    asked = {**sent["json"]}
    tokens = handler.tokenizer(asked.pop("text"), return_tensors="pt").input_ids
    row = handler.model.generate(tokens, **{"max_new_tokens": 64, **asked})[0]
    return str(handler.tokenizer.decode(row, skip_special_tokens=True))


def blip(handler: Any, sent: dict[str, Any], item: Any) -> Any:
    """The caption as the model card has it made, and how far our pixels are from the library's."""
    import numpy as np
    from PIL import Image
    from transformers import BlipImageProcessorPil

    image = Image.open(io.BytesIO(base64.b64decode(sent["image"])))
    side = {"height": handler.side, "width": handler.side}
    pixels = BlipImageProcessorPil(size=side)(image, return_tensors="pt").pixel_values
    asked = {**sent.get("form", {})}
    text = handler.tokenizer(asked.pop("prompt"), return_tensors="pt").input_ids if "prompt" in asked else None
    row = handler.model.generate(
        pixels, input_ids=text, **{"max_new_tokens": 30, **{k: int(v) for k, v in asked.items()}}
    )
    distance = float(np.abs(item.pixels - pixels[0].numpy()).max())
    return [handler.tokenizer.decode(row[0], skip_special_tokens=True), distance]


REFERENCES = {"TextToText": t5, "Captioner": blip}

if __name__ == "__main__":
    said = json.dumps([answers(job) for job in json.load(sys.stdin)])
    sys.stdout.write(said)
