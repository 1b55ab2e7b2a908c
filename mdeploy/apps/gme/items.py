"""What clients send as one input: a text, a picture, or both, in the shapes that are in use.

    "a text"
    {"text": "…", "image": "data:image/png;base64,…"}                        either of them, or both
    {"type": "image_url", "image_url": {"url": "data:…"}}                    a part as OpenAI's chat has it
    {"role": "user", "content": [{"type": "text", "text": "…"}, {…}]}        or an array of parts
    {"messages": [{"role": "system", …}, {"role": "user", …}]}               the system's words are the instruction

Pictures travel as data: URIs. Nothing is ever fetched and no file opened: whoever can name an address to a server can
ask it for what only that server sees (vLLM's CVE-2025-6242).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdeploy.apps.embed import fields
from mdeploy.serving.handler import Buffer

_DATA_HEAD = 256
"""Characters in which the comma of a data: URI must come."""

_SHAPES = 'a text, {"text": …}, {"image": "data:…"} or both'

_TOKEN_IDS = (
    "is made of token ids, which this model does not take: send texts"
    " (LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)"
)


@dataclass(frozen=True, slots=True)
class Upload:
    """A picture as it came: base64 is decoded where the picture is, not in the edge."""

    data: Buffer
    is_base64: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One input: a text that is not empty, a picture, or both; its own instruction where it has one."""

    text: str = ""
    image: Upload | None = None
    instruction: str | None = None


def parse(value: Any, param: str) -> Item:
    """One element of a request's `input`. Raises HTTPError 400 that names the place."""
    if isinstance(value, str):
        return _whole(Item(value), param)
    if isinstance(value, dict):
        return _object(value, param)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _parts(value, param)
    if isinstance(value, list) and value and type(value[0]) is int:
        fields.wrong(param, _TOKEN_IDS, "token_ids_not_supported")
    return fields.wrong(param, f"is {fields.kind(value)}, expected is {_SHAPES}", "invalid_type")


def _conversation(messages: Any, param: str) -> Item:
    """One input as the messages of a chat: what the user says, and a system's message as the instruction."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        fields.wrong(param, "is no array of messages", "invalid_type")
    roles = [each.get("role") for each in messages]
    if roles not in (["user"], ["system", "user"]):
        fields.wrong(param, "may be one message of the user, and one of the system before it")
    item = _object(messages[-1], f"{param}[{len(messages) - 1}]")
    if len(messages) == 1:
        return item
    told = _object(messages[0], f"{param}[0]")
    if told.image is not None:
        fields.wrong(f"{param}[0]", "has an image: the system says in words what to do")
    return Item(item.text, item.image, told.text)


def _object(value: Mapping[str, Any], param: str) -> Item:
    if "type" in value:
        return _parts([value], param)
    if "messages" in value:
        _only(value, ("messages",), param)
        return _conversation(value["messages"], f"{param}.messages")
    if "content" in value:
        _only(value, ("role", "content"), param)
        content = value["content"]
        return _parts(content, f"{param}.content") if isinstance(content, list) else parse(content, f"{param}.content")
    _only(value, ("text", "image"), param)
    text, image = value.get("text"), value.get("image")
    found = "" if text is None else _text(text, f"{param}.text")
    return _whole(Item(found, None if image is None else _image(image, f"{param}.image")), param)


def _parts(parts: Sequence[Any], param: str) -> Item:
    """Parts of a chat's message; texts are joined as Qwen2-VL's own template does it, with nothing between."""
    texts, images = [], []
    for index, part in enumerate(parts):
        where = f"{param}[{index}]" if len(parts) > 1 else param
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), f"{where}.text"))
        elif kind == "image_url":
            images.append(_image(part.get("image_url"), f"{where}.image_url"))
        else:
            fields.wrong(where, 'is no part of type "text" or "image_url"', "invalid_type")
    if len(images) > 1:
        fields.wrong(param, f"has {len(images)} images, an input has one at most: send each as an input of its own")
    return _whole(Item("".join(texts), images[0] if images else None), param)


def _whole(item: Item, param: str) -> Item:
    if not item.text and item.image is None:
        fields.wrong(param, "has neither text nor image", "empty_input")
    return item


def _only(value: Mapping[str, Any], known: Sequence[str], param: str) -> None:
    others = sorted(value.keys() - set(known))
    if others:
        fields.wrong(param, f"has the field {others[0][:40]!r}; expected is {_SHAPES}", "invalid_value")


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        fields.wrong(param, f"is {fields.kind(value)}, a string is expected", "invalid_type")
    return value


def _image(value: Any, param: str) -> Upload:
    """A data: URI, plain or as the `url` of an object."""
    if isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str):
        fields.wrong(param, f"is {fields.kind(value)}, a data: URI is expected", "invalid_type")
    head, comma, _ = value[:_DATA_HEAD].partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        text = "is no data: URI: images travel as data:image/png;base64,…; addresses and paths are not fetched"
        fields.wrong(param, text, "invalid_image")
    try:
        return Upload(memoryview(value.encode("ascii"))[len(head) + 1 :], is_base64=True)
    except UnicodeEncodeError:
        fields.wrong(param, "is no base64 after the comma", "invalid_image")
