"""A service as it is inside a container: its words, variables and paths, apart from who runs the container.

What changes on the way from a host into a container, and nothing else does:

| on the host | in the container |
|---|---|
| the engine's or mdeploy's interpreter | `python3` of the image |
| the address it listens on | 0.0.0.0, at the same port; the host's address is where the port is published |
| the model's directory | /models/NAME, read-only |
| other files that its words and variables name | /data/NAME, read-only |
| directories with an app's code | /app/code, /app/code2 …, copied into the image |
| the key file | /run/secrets/…, handed over at run time, in no image |
| GPUs 2 and 3 | the container's only ones, there 0 and 1 |
| HOME, caches | /cache, the one place that can be written to beside /tmp |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from mdeploy.specs import Limits, Probe, RestartPolicy

Image = Literal["vllm-cuda", "vllm-cpu", "app", "embed"]

CACHE = "/cache"
SECRETS = "/run/secrets"
USER = 10001
"""Who runs in a container: nobody the machine knows."""

_STOP_MARGIN_S = 15
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Tree:
    """A file or directory of the host: as the words name it, where it really is, and where the container has it."""

    named: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Key:
    """A secret: the variable it is for, its file on the host and that file's owner.

    A variable that ends in `_FILE` is told the path, any other the first key in the file.
    """

    variable: str
    file: str
    owner: tuple[int, int]

    @property
    def path(self) -> str:
        """Where the container finds it."""
        return f"{SECRETS}/{PurePosixPath(self.file).name}"

    @property
    def by_path(self) -> bool:
        """True where the program reads the file itself."""
        return self.variable.endswith("_FILE")


@dataclass(frozen=True, slots=True)
class Workload:
    """One service in a container. `host` and `port` are where the host publishes it, `version` is its image's."""

    name: str
    kind: str
    image: Image
    version: str
    words: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int
    probe: Probe
    gpus: tuple[int, ...] = ()
    cores: int = 0
    trees: tuple[Tree, ...] = ()
    code: tuple[Tree, ...] = ()
    key: Key | None = None
    limits: Limits = field(default_factory=Limits)
    restart: RestartPolicy = "on-failure"
    depends_on: tuple[str, ...] = ()

    @property
    def shm_bytes(self) -> int:
        """Room in /dev/shm, where the processes of an engine pass tensors; it takes memory only as it is used."""
        return (2 + 2 * len(self.gpus)) * _GIB

    @property
    def stop_s(self) -> int:
        """What a stop may take: the drain, and some seconds for the engine's own end."""
        return int(self.limits.stop_timeout_s) + _STOP_MARGIN_S


def places(paths: Iterable[tuple[str, str]], model: str, root: str = "/data") -> tuple[Tree, ...]:
    """Where the container has these paths, given as (named, real): the model below /models, others below `root`."""
    found: list[Tree] = []
    for named, source in sorted(paths):
        if any(named == tree.named or named.startswith(f"{tree.named}/") for tree in found):
            continue
        base = re.sub(r"[^A-Za-z0-9._-]", "-", PurePosixPath(named).name) or "data"
        parent = "/models" if named == model else root
        taken = {tree.target for tree in found}
        target = next(t for t in (f"{parent}/{base}{n or ''}" for n in range(len(found) + 1)) if t not in taken)
        found.append(Tree(named, source, target))
    return tuple(found)


def moved(text: str, trees: Iterable[Tree]) -> str:
    """A word or value with the paths of the host replaced by those of the container."""
    for tree in sorted(trees, key=lambda tree: -len(tree.named)):
        at = rf"(?<![\w./~-]){re.escape(tree.named)}(?=$|[/:,;=\s\"'])"
        text = re.sub(at, lambda _, new=tree.target: new, text)  # type: ignore[misc]
    return text


def listening(words: Sequence[str]) -> tuple[str, ...]:
    """The words with the address replaced by every address of the container."""
    found = [re.sub(r"^--host=.*", "--host=0.0.0.0", word, flags=re.DOTALL) for word in words]
    for at, word in enumerate(found[:-1]):
        if word == "--host":
            found[at + 1] = "0.0.0.0"
    return tuple(found)


def environment(work: Workload) -> dict[str, str]:
    """Variables in the container; devices are counted from 0 there, and a user without a name needs one."""
    env = {name: value for name, value in work.env.items() if not name.startswith("CUDA_")}
    env |= {"HOME": CACHE, "XDG_CACHE_HOME": CACHE, "USER": "mdeploy", "PYTHONUNBUFFERED": "1"}
    if work.gpus:
        env["NVIDIA_DRIVER_CAPABILITIES"] = "compute,utility"
    if work.key and work.key.by_path:
        env[work.key.variable] = work.key.path
    return env


def command(work: Workload) -> tuple[str, ...]:
    """The main process. A key that has to be in a variable gets there in the container: no manifest holds it."""
    if work.key is None or work.key.by_path:
        return work.words
    read = f'{work.key.variable}="$(grep -m 1 . {work.key.path})" && export {work.key.variable} && exec "$@"'
    return ("sh", "-c", read, "sh", *work.words)


def question(work: Workload, path: str, body: str, timeout_s: float) -> tuple[str, ...]:
    """A command that succeeds where the service really answers; it runs in the container."""
    url = f"http://127.0.0.1:{work.port}{path}"
    return ("python3", "-c", _ASK, url, body, f"{timeout_s:g}", *([work.key.path] if work.key else []))


_ASK = """import sys, urllib.request as http
url, body, seconds, *keys = sys.argv[1:]
headers = {"Content-Type": "application/json"}
for key in keys:
    headers["Authorization"] = "Bearer " + open(key).read().split()[0]
ask = http.Request(url, body.encode() or None, headers)
http.build_opener(http.ProxyHandler({})).open(ask, timeout=float(seconds)).read()
"""
