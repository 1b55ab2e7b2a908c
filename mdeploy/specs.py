"""The frozen values that flow between packages.

Planners return them, launchers consume them, renderers print them; nobody changes one.
They know nothing of files, processes or the command line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

SCHEMA = 1
"""Version of every JSON document we write; it grows only when a key changes its meaning."""

Phase = Literal["starting", "ready", "unhealthy", "stopping", "stopped", "failed"]
Manager = Literal["foreground", "detached", "systemd"]
RestartPolicy = Literal["always", "on-failure", "never"]

Say = Callable[[str], None]
"""Takes one line of progress; packages hand lines over, they never print."""

T = TypeVar("T")


def to_json(value: Any) -> bytes:
    """A dataclass as indented JSON with a stable key order."""
    import orjson

    # sorted: sets have no JSON of their own
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE, default=sorted)


def from_json(cls: type[T], data: bytes) -> T:
    """The inverse of `to_json`, checked; raises ValueError for a document of another shape."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls).validate_json(data)


def fingerprint(value: Any) -> str:
    """What tells two values apart: the first 8 hex digits of the SHA-256 of their JSON."""
    return hashlib.sha256(to_json(value)).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model on a hub: `owner/name` at a revision (branch, tag or commit)."""

    id: str
    revision: str = "master"
    hub: str = "modelscope"

    def __str__(self) -> str:
        return self.id if self.revision == "master" else f"{self.id}@{self.revision}"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A complete model on this disk."""

    ref: ModelRef
    path: str
    commit: str | None
    files: int
    bytes: int
    fetched_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint says of itself, read from config.json and tensor headers, nothing loaded."""

    architecture: str
    dtype: str
    weight_bytes: int
    layers: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    max_len: int | None
    chat_template: bool


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as nvidia-smi lists it; memory in MiB."""

    index: int
    uuid: str
    name: str
    total_mib: int
    free_mib: int


@dataclass(frozen=True, slots=True)
class LlmOptions:
    """What the user asked of an LLM service; None means no wish. `gpu_count` is for any GPUs, `gpus` for these."""

    tp: int | None = None
    gpus: tuple[int, ...] | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: str | None = None
    dtype: str | None = None
    extra: tuple[str, ...] = ()
    gpu_count: int | None = None


@dataclass(frozen=True, slots=True)
class AppWish:
    """What the user asked of an app; None leaves it to the recipe, then to the handler's class.

    `handlers` and `paths` are as resolved against where they were written; `gpus` are these devices, `all` or
    `none`, `gpu_count` any so many. `timeout` is in seconds. `config` has keys of this class for single handlers.
    """

    handlers: tuple[str, ...] | None = None
    python: str | None = None
    paths: tuple[str, ...] | None = None
    gpus: tuple[int, ...] | Literal["all", "none"] | None = None
    gpu_count: int | None = None
    workers_per_gpu: int | None = None
    batch: int | None = None
    batch_cost: float | None = None
    max_wait_ms: float | None = None
    timeout: float | None = None
    queue: int | None = None
    max_body: int | None = None
    cors: tuple[str, ...] | None = None
    config: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class EmbedWish:
    """What the user asked of an embedding service; None leaves it to the recipe, then to the model.

    `gpus`, `gpu_count` and units are as in AppWish, `args` are vLLM's. What goes with which backend is in wishes.py.
    """

    backend: str | None = None
    gpus: tuple[int, ...] | Literal["all", "none"] | None = None
    gpu_count: int | None = None
    dtype: str | None = None
    max_length: int | None = None
    workers_per_gpu: int | None = None
    dimensions: int | None = None
    batch_tokens: int | None = None
    attention: str | None = None
    compile: bool | None = None
    truncate: bool | None = None
    token_ids: str | None = None
    instruction: str | None = None
    timeout: float | None = None
    max_body: int | None = None
    cors: tuple[str, ...] | None = None
    python: str | None = None
    tp: int | None = None
    engine: str | None = None
    args: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """Where and how large an engine runs; `reasons` says why, one sentence each.

    `util` is a share of GPU memory; `kv_cache_bytes` and `threads` (of one rank) are set on a CPU.
    `named` says that the user chose the devices, so sharing them is the user's business.
    """

    device: Literal["cpu", "cuda"]
    indices: tuple[int, ...]
    tp: int
    util: float | None
    max_len: str | None
    dtype: str | None
    kv_cache_bytes: int | None = None
    threads: int | None = None
    named: bool = False
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults for one model, from `recipes/<org>/<model>.yaml`."""

    kind: Literal["llm"]
    model: str
    revision: str = "master"
    description: str = ""
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EmbedRecipe:
    """Defaults for one embedding model or reranker, named as in EmbedWish; `golden` is a file with vectors of it."""

    kind: Literal["embed", "gme"]
    model: str
    revision: str = "master"
    description: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    backend: Literal["mdeploy", "vllm"] | None = None
    gpus: str | int | tuple[int, ...] | None = None
    dtype: str | None = None
    max_length: int | None = None
    workers_per_gpu: int | None = None
    dimensions: int | None = None
    batch_tokens: int | None = None
    attention: str | None = None
    compile: bool | None = None
    truncate: bool | None = None
    token_ids: str | None = None
    instruction: str | None = None
    timeout: float | None = None
    max_body: str | int | None = None
    cors: str | tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    golden: str | None = None


ModelRecipe = Recipe | EmbedRecipe


@dataclass(frozen=True, slots=True)
class AppRecipe:
    """How an app is served, as its file says it; the keys are those of `AppWish`. Paths start at the file."""

    kind: Literal["app"]
    handler: str | tuple[str, ...]
    model: str | None = None
    revision: str | None = None
    description: str = ""
    python: str | None = None
    path: str | tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    gpus: str | int | tuple[int, ...] | None = None
    workers_per_gpu: int | None = None
    batch: int | None = None
    batch_cost: float | None = None
    max_wait_ms: float | None = None
    timeout: float | None = None
    queue: int | None = None
    max_body: str | int | None = None
    cors: str | tuple[str, ...] = ()
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Probe:
    """How to know that a service works: a cheap path, and a request that must really be answered.

    `bearer` names the secret (a key of ServiceSpec.secrets) that the service asks its clients for.
    `work_metrics` begin the lines of /metrics that change whenever the engine gets on with requests.
    """

    health_path: str
    request_path: str
    request_body: Mapping[str, Any]
    timeout_s: float = 30.0
    bearer: str | None = None
    work_metrics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines of a service, in seconds, and what its log may take on the disk.

    `stop_timeout_s` is what requests in flight get to finish. `health_timeout_s` is the deadline of
    one cheap question. A real request is asked every `answer_interval_s`; one that gets no answer
    for `hang_timeout_s`, while nothing else is answered either, proves a hung engine. The log has
    `log_files` rotated files of `log_bytes` beside the live one.
    """

    start_timeout_s: float = 1800.0
    stop_timeout_s: float = 30.0
    health_interval_s: float = 2.0
    health_timeout_s: float = 10.0
    answer_interval_s: float = 20.0
    hang_timeout_s: float = 60.0
    log_bytes: int = 64 << 20
    log_files: int = 3


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """Everything needed to run a service; every way of starting one consumes this and nothing else.

    `env` is added to a clean copy of the caller's environment. `secrets` maps an environment
    variable of the engine to the file its value is in: a value itself never enters a spec.
    `source` is what the user typed as the model. `reloads` says that the engine reads its keys again
    on SIGHUP. `depends_on` names services that must be ready first.
    """

    name: str
    kind: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    host: str
    port: int
    probe: Probe
    model: str
    source: str = ""
    plan: GpuPlan | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    restart: RestartPolicy = "on-failure"
    reloads: bool = False
    depends_on: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Base URL a client on this machine uses; a wildcard address is reached by loopback."""
        return f"http://{_client_host(self.host)}:{self.port}"

    @property
    def is_vllm(self) -> bool:
        """Whether vLLM itself answers clients; otherwise an edge of ours does."""
        return "vllm.entrypoints.cli.main" in self.argv


def _client_host(host: str) -> str:
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """What a supervisor last wrote about its service. `since` is Unix time in seconds.

    (pid, pid_created, boot_id) name one process for ever: a reused pid or a reboot is noticed.
    `scratch` is the run's own directory for temporary files and sockets. `failures` are the Unix
    times of the ends nobody asked for, as far back as the give-up rule looks.
    """

    name: str
    run_id: str
    pid: int
    pid_created: float
    boot_id: str
    manager: Manager
    phase: Phase
    since: float
    scratch: str = ""
    restarts: int = 0
    failures: tuple[float, ...] = ()
    engine_pid: int | None = None
    detail: str = ""
    error: str | None = None
    hint: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why an engine ended, in a user's words; `permanent` where trying again cannot help."""

    cause: str
    hint: str
    exit_code: int
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What is true now: a record checked against locks and processes. Never stored."""

    spec: ServiceSpec
    phase: Phase
    pid: int | None
    since: float
    restarts: int = 0
    detail: str = ""
    error: str | None = None
    hint: str = ""
    exit_code: int = 0
    manager: Manager | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """An environment that holds an engine. `managed` ones are ours to remove, adopted ones are not."""

    name: str
    engine: str
    version: str
    variant: Literal["cpu", "cuda"]
    python: str
    managed: bool
    bytes: int = 0
