"""The variables that embedding servers were configured by before mdeploy, from the environment or a .env file.

API_KEY, PORT, MODEL_PATH, DEVICE, EMBEDDING_DIMENSION, BATCH_SIZE, LOG_LEVEL, CUDA_VISIBLE_DEVICES, GME_MODEL_DIR:
plain names, so they count only for `mdeploy serve embed` and `mdeploy serve gme`. Flags win over them, and so do the
variables and settings of mdeploy itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mdeploy import gpus, settings
from mdeploy.errors import ConfigError
from mdeploy.settings import Setting, Settings

NAMES = (
    "API_KEY",
    "PORT",
    "MODEL_PATH",
    "DEVICE",
    "EMBEDDING_DIMENSION",
    "BATCH_SIZE",
    "LOG_LEVEL",
    "CUDA_VISIBLE_DEVICES",
)
Devices = tuple[int, ...] | Literal["all", "none"] | None

_GME = "GME_MODEL_DIR"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_QUIET = ("WARNING", "WARN", "ERROR", "CRITICAL", "FATAL")
_LEVELS = ("TRACE", "DEBUG", "INFO", *_QUIET)


@dataclass(frozen=True, slots=True)
class Variables:
    """What they say; None where they do not. `gpus` is as in EmbedWish, `told` are lines for the user."""

    settings: Settings
    port: int | None = None
    model: str | None = None
    root: str | None = None
    gpus: Devices = None
    gpu_count: int | None = None
    dimensions: int | None = None
    access_log: bool = True
    told: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Flags:
    """Which of them the command line overrides, by what it has in their place."""

    port: bool
    model: bool
    gpus: bool
    dimensions: bool


def read(loaded: Settings, kind: str, flags: Flags, cwd: Path | None = None) -> Variables:
    """What they say to a service of this kind. Raises ConfigError that names a variable which makes no sense."""
    found = settings.named((*NAMES, *((_GME,) if kind == "gme" else ())), cwd=cwd)
    in_root = _GME in found
    os.environ.pop("API_KEY", None)  # no process that we start needs it, used or not
    used = {name: value for name, value in found.items() if not _is_overridden(name, loaded, flags, in_root=in_root)}
    _show_devices(used)
    shown = _shown(used)
    wished, count = _device(used.get("DEVICE"))
    return Variables(
        settings=_with_key(loaded, used.get("API_KEY")),
        port=_number("PORT", used.get("PORT"), 65535),
        model=_text(used.get("MODEL_PATH")),
        root=_text(used.get(_GME)),
        gpus=wished,
        gpu_count=count,
        dimensions=_number("EMBEDDING_DIMENSION", used.get("EMBEDDING_DIMENSION"), 65536),
        access_log=_logs_access(used.get("LOG_LEVEL")),
        told=(*([f"from {shown}"] if shown else []), *_not_used(used)),
    )


def _is_overridden(name: str, loaded: Settings, flags: Flags, *, in_root: bool) -> bool:
    return {
        "API_KEY": loaded.get("api_key") is not None,
        "PORT": flags.port or loaded.get("port") is not None,
        "MODEL_PATH": flags.model or in_root,
        "DEVICE": flags.gpus,
        "EMBEDDING_DIMENSION": flags.dimensions,
    }.get(name, False)


def _shown(used: Mapping[str, Setting]) -> str:
    """Which are used and where they are from; the values are nobody's business, one is a key."""
    places = {place: [n for n, s in used.items() if s.origin == place and n != "BATCH_SIZE"] for place in _PLACES}
    return "; ".join(f"{place}: {', '.join(names)}" for place, names in places.items() if names)


_PLACES = ("environment", ".env")


def _not_used(used: Mapping[str, Setting]) -> tuple[str, ...]:
    if "BATCH_SIZE" not in used:
        return ()
    return ("BATCH_SIZE is not used: batches are filled by tokens, as many as are quickest (--batch-tokens)",)


def _with_key(loaded: Settings, key: Setting | None) -> Settings:
    """The settings with the key, which the service then finds where every other key comes from."""
    if key is None:
        return loaded
    return replace(loaded, values={**loaded.values, "api_key": Setting(key.value, f"{key.origin} API_KEY")})


def _show_devices(used: Mapping[str, Setting]) -> None:
    """A .env counts for the devices as the environment does: whatever chooses one looks there."""
    if _VISIBLE in used:
        os.environ[_VISIBLE] = used[_VISIBLE].value or ""


def _device(setting: Setting | None) -> tuple[Devices, int | None]:
    """`cpu`, `cuda`, `cuda:1` or `auto`; as in PyTorch the number counts the visible devices."""
    text = (_text(setting) or "auto").strip().lower()
    if text in ("auto", "cpu"):
        return ("none" if text == "cpu" else None), None
    match = re.fullmatch(r"(?:cuda|gpu)(?::([0-9]{1,4}))?", text)
    if match is None:
        raise _wrong("DEVICE", setting, "auto, cpu, cuda, or cuda:NUMBER")
    if match[1] is None:
        return None, 1
    visible = gpus.visible(gpus.probe(), os.environ.get(_VISIBLE))
    number = int(match[1])
    if number >= len(visible):
        raise _wrong("DEVICE", setting, f"this machine shows {len(visible)} GPUs, counted from 0")
    return (visible[number].index,), None


def _number(name: str, setting: Setting | None, most: int) -> int | None:
    text = _text(setting)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()) or not 1 <= int(text) <= most:
        raise _wrong(name, setting, f"a number from 1 to {most}")
    return int(text)


def _logs_access(setting: Setting | None) -> bool:
    level = (_text(setting) or "INFO").strip().upper()
    if level not in _LEVELS:
        raise _wrong("LOG_LEVEL", setting, "DEBUG, INFO, WARNING or ERROR")
    return level not in _QUIET


def _text(setting: Setting | None) -> str | None:
    return setting.value if setting else None


def _wrong(name: str, setting: Setting | None, expected: str) -> ConfigError:
    where = "environment" if setting is None else setting.origin
    return ConfigError(f"{name}={_text(setting)!r} ({where}): {expected}", hint=f"mend it, or unset {name}")
