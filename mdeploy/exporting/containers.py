"""`mdeploy export compose|kubernetes`: services become workloads, with every path they need found on this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import ipaddress
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import mdeploy
from mdeploy import fleet, recipes
from mdeploy.engines import store as engine_store
from mdeploy.errors import ConfigError, NotFoundError, UsageError
from mdeploy.export import compose, dockerfile, kubernetes, wheel
from mdeploy.export.kubernetes import Target
from mdeploy.export.rendered import Rendered
from mdeploy.export.workload import Key, Tree, Workload, listening, moved, places
from mdeploy.exporting import known
from mdeploy.paths import Paths
from mdeploy.serving.handler import MODEL_VARIABLE
from mdeploy.serving.options import AppOptions
from mdeploy.settings import Settings
from mdeploy.specs import Engine, Say, ServiceSpec

_NOT_DATA = ("/dev", "/proc", "/sys", "/bin", "/sbin", "/lib", "/lib64", "/usr")
_PATH = re.compile(r"(?:^|(?<=[=:,;\"'\s]))/[^:,;=\"'\s]+")


def of_names(settings: Settings, names: Collection[str], file: Path | None, say: Say) -> tuple[Workload, ...]:
    """The services named, or those of a file, as workloads. Raises UsageError for neither."""
    if file is not None:
        listener = fleet.Listener(say, None, lambda status: None)
        specs = [step.spec for step in fleet.preview(settings, file, names, listener)]
    elif names:
        specs = [known.spec_of(settings, name) for name in dict.fromkeys(names)]
    else:
        raise UsageError("name services, or a file of them: --file mdeploy.yaml", hint="mdeploy ps lists them")
    return tuple(workload(settings, spec, say) for spec in specs)


def compose_files(works: Sequence[Workload], say: Say) -> tuple[Rendered, ...]:
    """The compose file, its Dockerfiles, and mdeploy's own wheel where an image needs it."""
    for work in works:
        if work.key and work.key.owner[0] == 0:
            say(f"{work.name}: root owns its key, so its container runs as root, without any capability")
    return (*compose.render(works), *_wheel(works))


def kubernetes_files(works: Sequence[Workload], target: Target, say: Say, *, insecure: bool) -> tuple[Rendered, ...]:
    """Manifests, Dockerfiles and the wheel. Raises UsageError for a service that every pod could use unasked."""
    files = kubernetes.render(works, target)
    for work in works:
        if work.key is None and not insecure:
            hint = f"mdeploy keys add {work.name}, or say --insecure"
            raise UsageError(f"every pod of the cluster could use {work.name}: it asks for no key", hint=hint)
        if work.key:
            say(f"its key, once: {kubernetes.secret_command(work, target)}")
        for source, name in kubernetes.in_claim(work) if target.claim else ():
            say(f"the volume of {target.claim} has to hold {source} as {name}")
    return (*files, *(() if target.image else _wheel(works)))


def workload(settings: Settings, spec: ServiceSpec, say: Say) -> Workload:
    """A service as it will be in a container. Raises what keeps it from being one."""
    known.check_kind(spec)
    key = _key(spec, say)
    if spec.is_vllm:
        return _llm(settings, spec, key)
    return _app(spec, key, say) if spec.kind == "app" else _embed(spec, key)


def _llm(settings: Settings, spec: ServiceSpec, key: Key | None) -> Workload:
    plan = spec.plan
    if plan is None or "serve" not in spec.argv:
        hint = f"serve it again: mdeploy serve {spec.kind} … --name {spec.name}"
        raise ConfigError(f"{spec.name} has no plan", hint=hint)
    engine = _engine(settings, spec)
    words = spec.argv[1:]
    model = spec.argv[spec.argv.index("serve") + 1]
    trees = places([(path, _real(path)) for path in {model, *_data(spec, words)}], model)
    return Workload(
        name=spec.name,
        kind="llm",
        image="vllm-cuda" if plan.device == "cuda" else "vllm-cpu",
        version=engine.version.partition("+")[0],
        words=("python3", *(moved(word, trees) for word in listening(words))),
        env={name: moved(value, trees) for name, value in spec.env.items()},
        host=_published(spec),
        port=spec.port,
        probe=spec.probe,
        gpus=plan.indices if plan.device == "cuda" else (),
        cores=(plan.threads or 1) * plan.tp if plan.device == "cpu" else 0,
        trees=trees,
        key=key,
        limits=spec.limits,
        restart=spec.restart,
        depends_on=spec.depends_on,
    )


def _engine(settings: Settings, spec: ServiceSpec) -> Engine:
    engines = engine_store.listing(settings.paths.engines)
    found = next((engine for engine in engines if engine.python == spec.argv[0]), None)
    if found is None:
        hint = "mdeploy engines install vllm, then serve it again"
        raise NotFoundError(f"the engine of {spec.name} is gone: {spec.argv[0]}", hint=hint)
    return found


def _app(spec: ServiceSpec, key: Key | None, say: Say) -> Workload:
    options = known.app_options(spec)
    if options.cluster is not None:
        raise UsageError(f"{spec.name} runs in a cluster of Ray's, which is no container", hint="mdeploy export nginx")
    if options.python:
        say(f"{spec.name}: {options.python} stays here; list its packages in a requirements.txt beside the code")
    files = [handler.rpartition(":")[0] or handler for handler in options.handlers if handler.startswith("/")]
    code = _code(spec, [*(str(Path(file).parent) for file in files), *options.paths])
    for tree in code:
        _tell_hidden(spec, tree, say)
    model = spec.env.get(MODEL_VARIABLE, "")
    named = {path for path in _data(spec, ()) if not _is_below(path, [tree.named for tree in code])}
    trees = places([(path, _real(path)) for path in named], model)
    inside = dataclasses.replace(
        _inside(options),
        handlers=tuple(moved(handler, code) for handler in options.handlers),
        paths=tuple(moved(path, code) for path in options.paths),
    )
    return Workload(
        name=spec.name,
        kind="app",
        image="app",
        version=mdeploy.__version__,
        words=("python3", "-m", "mdeploy.apps", "app", *inside.argv()),
        env={name: moved(value, (*trees, *code)) for name, value in spec.env.items()},
        host=_published(spec),
        port=spec.port,
        probe=spec.probe,
        gpus=_gpus(options),
        trees=trees,
        code=code,
        key=key,
        limits=spec.limits,
        restart=spec.restart,
        depends_on=spec.depends_on,
    )


def _embed(spec: ServiceSpec, key: Key | None) -> Workload:
    options = known.embed_options(spec)
    trees = places([(path, _real(path)) for path in {options.model, *_data(spec, ())}], options.model)
    inside = dataclasses.replace(options, app=_inside(options.app), model=moved(options.model, trees))
    return Workload(
        name=spec.name,
        kind=spec.kind,
        image="embed",
        version=mdeploy.__version__,
        words=("python3", "-m", "mdeploy.apps", spec.kind, *inside.argv()),
        env={name: moved(value, trees) for name, value in spec.env.items()},
        host=_published(spec),
        port=spec.port,
        probe=spec.probe,
        gpus=_gpus(options.app),
        trees=trees,
        key=key,
        limits=spec.limits,
        restart=spec.restart,
        depends_on=spec.depends_on,
    )


def _gpus(options: AppOptions) -> tuple[int, ...]:
    return tuple(int(device) for device in options.devices if device != "cpu")


def _inside(options: AppOptions) -> AppOptions:
    """What an app of the host is told in a container, where its devices are the only ones, counted from 0."""
    devices = tuple(str(number) for number, _ in enumerate(_gpus(options))) or options.devices
    return dataclasses.replace(options, host="0.0.0.0", python="", reload=False, devices=devices)


# paths


def _data(spec: ServiceSpec, words: Sequence[str]) -> Iterator[str]:
    """Every path of this machine among the words and variables of a service."""
    values = [part for value in spec.env.values() for part in value.split(os.pathsep)]
    but = (*_NOT_DATA, spec.cwd, *spec.secrets.values())
    for text in (*words, *values):
        whole = text.partition("=")[2] if text.startswith("--") else text
        for path in {whole, *_PATH.findall(text)}:
            is_data = path.startswith("/") and path != "/" and not _is_below(path, but)
            if is_data and os.path.exists(path):  # noqa: PTH110 any text
                yield path.rstrip("/")


def _is_below(path: str, trees: Collection[str]) -> bool:
    return any(path == tree or path.startswith(f"{tree}/") for tree in trees)


def _real(path: str) -> str:
    """The path without links. Raises ConfigError for a tree that links lead out of: they would end in nothing."""
    real = os.path.realpath(path)
    for directory, names, files in os.walk(real):
        for name in (*names, *files):
            at = Path(directory, name)
            if at.is_symlink() and not _is_below(os.path.realpath(at), [real]):
                hint = f"copy it: cp -rL {path} ELSEWHERE, and serve that"
                raise ConfigError(f"{at} leads out of {path}: a container has no such file", hint=hint)
    return real


def _code(spec: ServiceSpec, directories: Sequence[str]) -> tuple[Tree, ...]:
    """Where an image has the directories of an app. Raises ConfigError for one that holds more than code."""
    outermost = [d for d in dict.fromkeys(directories) if not _is_below(d, [o for o in directories if o != d])]
    for directory in outermost:
        if Path(directory) in {Path("/"), Path("/tmp"), Path.home(), *Path.home().parents}:
            hint = "put it into a directory of its own, and serve it from there"
            raise ConfigError(f"{spec.name}: its image would hold all of {directory}", hint=hint)
    return tuple(
        Tree(directory, os.path.realpath(directory), f"/app/code{number if number > 1 else ''}")
        for number, directory in enumerate(outermost, 1)
    )


def _tell_hidden(spec: ServiceSpec, tree: Tree, say: Say) -> None:
    """An image takes a directory whole, .env and .git too, unless a .dockerignore in it says otherwise."""
    hidden = sorted(path.name for path in Path(tree.source).glob(".*"))
    if hidden and ".dockerignore" not in hidden:
        shown = ", ".join(hidden[:5]) + (" …" if len(hidden) > 5 else "")
        say(f"{spec.name}: its image would hold {shown} of {tree.named}; a .dockerignore there keeps them out")


# addresses and keys


def _published(spec: ServiceSpec) -> str:
    host = {"": "0.0.0.0", "localhost": "127.0.0.1"}.get(spec.host, spec.host)
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        hint = f"serve it on an address: --host 127.0.0.1 --name {spec.name}"
        raise UsageError(f"{spec.name} listens on {host}: a container is published on an address", hint=hint) from None


def _key(spec: ServiceSpec, say: Say) -> Key | None:
    if len(spec.secrets) > 1:
        raise ConfigError(f"{spec.name} has several secrets: {', '.join(spec.secrets)}", hint="one can be exported")
    for variable, name in spec.secrets.items():
        file = Path(name)
        if file.exists():
            return Key(variable, name, (file.stat().st_uid, file.stat().st_gid))
        say(f"{spec.name}: {file} is not there yet; mdeploy up makes it")
        return Key(variable, name, (os.geteuid(), os.getegid()))
    return None


# the wheel


def _wheel(works: Sequence[Workload]) -> tuple[Rendered, ...]:
    if not any(dockerfile.needs_wheel(work) for work in works):
        return ()
    package = Path(mdeploy.__file__).parent
    files = {f"mdeploy/{path.relative_to(package)}": path.read_bytes() for path in _files(package)}
    shipped = recipes.directories(Paths(Path("/")), Path("/"))[-1]
    files |= {f"mdeploy/_recipes/{path.relative_to(shipped)}": path.read_bytes() for path in _files(shipped)}
    known_as = importlib.metadata.distribution("mdeploy")
    metadata, entries = known_as.read_text("METADATA"), known_as.read_text("entry_points.txt")
    if not metadata or not entries:
        raise ConfigError("the installation of mdeploy is damaged: it has no metadata", hint="install mdeploy again")
    content = wheel.pack(mdeploy.__version__, files, metadata, entries)
    return (Rendered(f"{dockerfile.WHEELS}/{wheel.name_of(mdeploy.__version__)}", content),)


def _files(root: Path) -> list[Path]:
    found = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path for path in found if not path.name.startswith("."))
