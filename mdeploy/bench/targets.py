"""What differs between endpoints: the request's JSON, and which chunks carry a token.

A chunk is not a token: a server may put several tokens into one, or none (role, finish, usage).
`scan` decides for the common form by a byte search and never says yes wrongly; whatever it does not
recognise is parsed, so another spelling of the same JSON costs time, not truth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mdeploy.bench.types import BenchEndpoint

NONE, REASONING, ANSWER = 0, 1, 2

# A quote inside a JSON string is escaped, so a key with its plain quotes cannot stand in generated text.
_CHAT_ANSWER = re.compile(rb'"content": ?"[^"]').search
_CHAT_REASONING = re.compile(rb'"reasoning(?:_content)?": ?"[^"]').search
_TEXT_ANSWER = re.compile(rb'"text": ?"[^"]').search

TokenKind = Callable[[Mapping[str, Any]], int]


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint of an OpenAI-compatible server; that of plain requests has no tokens to look for."""

    path: str
    scan: Callable[[bytes], int]
    kind: TokenKind
    prompt: Callable[[str], dict[str, Any]]


def for_endpoint(endpoint: BenchEndpoint) -> Target:
    """The rules of one endpoint."""
    return _TARGETS[endpoint]


def _scan_chat(event: bytes) -> int:
    if _CHAT_ANSWER(event):
        return ANSWER
    return REASONING if _CHAT_REASONING(event) else NONE


def _scan_text(event: bytes) -> int:
    return ANSWER if _TEXT_ANSWER(event) else NONE


def _kind_chat(chunk: Mapping[str, Any]) -> int:
    delta = _choice(chunk).get("delta") or {}
    if delta.get("content") or any(_calls(call) for call in delta.get("tool_calls") or ()):
        return ANSWER
    return REASONING if delta.get("reasoning") or delta.get("reasoning_content") else NONE


def _calls(call: Mapping[str, Any]) -> bool:
    function = call.get("function") or {}
    return bool(function.get("name") or function.get("arguments"))


def _kind_text(chunk: Mapping[str, Any]) -> int:
    return ANSWER if _choice(chunk).get("text") else NONE


def _choice(chunk: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = chunk.get("choices") or [{}]
    first = choices[0]
    return first if isinstance(first, dict) else {}


def finished(chunk: Mapping[str, Any]) -> bool:
    """Whether this chunk says why the answer ended."""
    return bool(_choice(chunk).get("finish_reason"))


def error_of(chunk: Mapping[str, Any]) -> str | None:
    """The message of an error sent inside a stream whose status was already 200."""
    error = chunk.get("error")
    if error:
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return str(chunk.get("message", "error")) if chunk.get("object") == "error" else None


def body(target: Target, model: str, text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A streaming request that asks for the server's own token counts."""
    return {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        **options,
        **target.prompt(text),
    }


def _chat_prompt(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def _text_prompt(text: str) -> dict[str, Any]:
    return {"prompt": text}


def _no_prompt(text: str) -> dict[str, Any]:
    raise NotImplementedError("a plain request has no prompt")


def _no_tokens(event: bytes) -> int:
    return NONE


_TARGETS: dict[BenchEndpoint, Target] = {
    "chat": Target("/v1/chat/completions", _scan_chat, _kind_chat, _chat_prompt),
    "completions": Target("/v1/completions", _scan_text, _kind_text, _text_prompt),
    "http": Target("/", _no_tokens, _kind_text, _no_prompt),
}
