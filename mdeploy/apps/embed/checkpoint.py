"""What the files of an embedding model say of it: read by the command line, the edge and the workers alike.

Nothing is loaded, and nothing but the standard library is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mdeploy.apps.embed import modules, tensors
from mdeploy.errors import ConfigError

Pooling = Literal["last", "mean", "cls"]
Kind = Literal["embedder", "cross-encoder", "gme"]
Activation = Literal["sigmoid", "identity"]

TASK = "Given a web search query, retrieve relevant passages that answer the query"
"""The instruction that Qwen3-Embedding's own files put before a query."""

_QUERY = "Instruct: {task}\nQuery:{query}"
_DECODERS = ("qwen2", "qwen3", "mistral", "llama", "ministral", "gemma", "phi3", "olmo2")
_OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "mpnet")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory, understood.

    `architecture` is the first of config.json. `dim` is the size of a whole vector, `smallest` the least that it may
    be cut to (None: not at all, the model was not trained for it). `max_length` counts special tokens too. `prompts`
    are put before texts, by name; `default_prompt` is the name of the one that every text gets. `query_prompt` is
    what Qwen3-Embedding wants before queries, with {task} where the instruction goes and {query} where the text;
    None for models without one. `instruction` is the usual task. `activation` makes a cross-encoder's raw score the
    one that clients see. `model_type` and `vocabulary` are config.json's.
    """

    path: Path
    kind: Kind
    architecture: str
    pooling: Pooling
    dim: int
    max_length: int
    weight_bytes: int
    smallest: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    query_prompt: str | None = None
    instruction: str | None = None
    dtype: str = "float32"
    parameters: int = 0
    model_type: str = ""
    vocabulary: int = 0
    activation: Activation = "sigmoid"


def read(path: Path) -> Checkpoint:
    """Raises ConfigError that names the file and what is wrong with it, or what of it is not supported."""
    config = modules.values(path / "config.json")
    text = _text(config)
    architecture = _architecture(path, config)
    kind = _kind(path, architecture, config)
    _check_code(path, kind, config)
    _check_tokenizer(path)
    parts = modules.read(path) if kind == "embedder" else modules.Modules()
    weights = tensors.measure(path)
    model_type = str(config.get("model_type") or text.get("model_type") or "")
    pooling = parts.pooling or _usual_pooling(kind, model_type)
    own = modules.values(path / modules.PROMPTS, missing_ok=True) if kind == "embedder" else {}
    prompts, default = _prompts(path, own)
    wants_task = kind == "embedder" and model_type.startswith("qwen3") and pooling == "last"
    return Checkpoint(
        path=path,
        kind=kind,
        architecture=architecture,
        pooling=pooling,
        dim=1 if kind == "cross-encoder" else _size(path, text, ("hidden_size", "d_model", "dim")),
        max_length=_max_length(path, model_type, text, parts.max_length),
        weight_bytes=weights.bytes,
        smallest=32 if wants_task else _smallest(path, config, own),
        prompts=prompts,
        default_prompt=default,
        query_prompt=_QUERY if wants_task else None,
        instruction=TASK if wants_task else None,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"),
        parameters=weights.parameters,
        model_type=model_type,
        vocabulary=_size(path, text, ("vocab_size",)),
        activation=_activation(path, config),
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part: newer files of models with several towers nest it."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _architecture(path: Path, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise ConfigError(f"{path / 'config.json'} names no architecture: this is no model that transformers saved")


def _kind(path: Path, architecture: str, config: Mapping[str, Any]) -> Kind:
    if "Qwen2VL" in architecture or config.get("model_type") == "qwen2_vl":
        return "gme"
    if not architecture.endswith("ForSequenceClassification"):
        return "embedder"
    names = config.get("id2label")
    labels = config.get("num_labels") or (len(names) if isinstance(names, dict) and names else 2)  # Transformers' usual
    if labels == 1:
        return "cross-encoder"
    raise ConfigError(f"{path} is a classifier of {labels} labels ({architecture}); a reranker has one")


def _check_code(path: Path, kind: Kind, config: Mapping[str, Any]) -> None:
    """GME's own code is known to compute what transformers' classes do; of others nobody can say."""
    if config.get("auto_map") and kind != "gme":
        why = "it is never run, and transformers' class for the same type may compute something else"
        raise ConfigError(f"{path / 'config.json'}: the model brings code of its own (auto_map); {why}")


def _usual_pooling(kind: Kind, model_type: str) -> Pooling:
    """What a model without files of sentence-transformers is pooled by."""
    if kind == "cross-encoder":
        return "cls"
    return "last" if kind == "gme" or model_type.startswith(_DECODERS) else "mean"


def _activation(path: Path, config: Mapping[str, Any]) -> Activation:
    """What sentence-transformers wrote into config.json; without a word from it one label gets a sigmoid."""
    newer = config.get("sentence_transformers")
    named = newer.get("activation_fn") if isinstance(newer, dict) else None
    named = named or config.get("sbert_ce_default_activation_function") or "Sigmoid"
    known: Mapping[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "identity"}
    name = str(named).rpartition(".")[2]
    if name in known:
        return known[name]
    raise ConfigError(f"{path / 'config.json'}: the activation {named} is not supported; Sigmoid and Identity are")


def _check_tokenizer(path: Path) -> None:
    file = path / "tokenizer.json"
    if not file.is_file():
        save = f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        how = f'python -c "from transformers import AutoTokenizer as A; {save.replace("AutoTokenizer", "A")}"'
        raise ConfigError(f"{file} is missing: {how} writes it, where transformers is installed", hint=how)
    modules.values(file)


def _prompts(path: Path, own: Mapping[str, Any]) -> tuple[Mapping[str, str], str | None]:
    prompts = own.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ConfigError(f"{path / modules.PROMPTS}: `prompts` is no table of texts")
    default = own.get("default_prompt_name")
    if default is not None and default not in list(prompts):
        raise ConfigError(f"{path / modules.PROMPTS}: no prompt is called {default!r}, which is to be the default")
    return prompts, default


def _smallest(path: Path, *found: Mapping[str, Any]) -> int | None:
    """The least size that a model says it was trained to be cut to (Matryoshka)."""
    sizes = next((one["matryoshka_dimensions"] for one in found if one.get("matryoshka_dimensions")), None)
    if sizes is None:
        return None
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ConfigError(f"{path}: `matryoshka_dimensions` is no list of sizes: {sizes!r}")
    return int(min(sizes))


def _max_length(path: Path, model_type: str, text: Mapping[str, Any], own: int | None) -> int:
    """Tokens of the longest text: what the model's files say, and never more positions than it has."""
    positions = _size(path, text, ("max_position_embeddings", "n_positions"))
    if model_type in _OFFSET:  # their positions begin after the padding's
        padding = text.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    written = modules.values(path / "tokenizer_config.json", missing_ok=True).get("model_max_length")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):  # one long text would turn the vectors of all others
        positions = min(positions, _size(path, {**rope, **text}, ("original_max_position_embeddings",)))
    limits: Iterable[Any] = (positions, own, written)
    return int(min(limit for limit in limits if isinstance(limit, (int, float)) and limit > 0))


def _size(path: Path, config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = next((config[name] for name in names if name in config), None)
    if isinstance(value, int) and value > 0:
        return value
    raise ConfigError(f"{path / 'config.json'}: {names[0]} is {json.dumps(value)}, a positive number is expected")
