"""`mdeploy demo`: the whole way in a minute, with a model shipped inside, real vLLM, no GPU and no internet."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import output
from mdeploy.errors import MdeployError

if TYPE_CHECKING:
    from mdeploy.settings import Settings
    from mdeploy.specs import ServiceStatus

_MODEL = "demo/mdeploy-faq"
_SHIPPED = Path(__file__).parent.parent / "assets" / "models"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    seconds: Annotated[float, typer.Option("--seconds", min=1, max=600, help="How long the load test runs.")] = 10,
) -> None:
    """Run the main job once, on a tiny shipped model.

    Mirror, download, serve, ask, bench, stop.
    Needs an engine (mdeploy engines install vllm). Everything happens in a temporary directory
    and is stopped and removed at the end, also when something fails.
    """
    from mdeploy import settings

    real = settings.load()
    question, expected = _first_question()
    with tempfile.TemporaryDirectory(prefix="mdeploy-demo-") as place, _mirror() as endpoint:
        loaded = _settings_in(Path(place), real, endpoint)
        _download(loaded)
        with _service(loaded) as status:
            _ask(status, question, expected)
            _bench(loaded, status, seconds)
    output.say("stopped and removed; nothing is left running")


def _first_question() -> tuple[str, str]:
    faq = json.loads((_SHIPPED / _MODEL / "faq.json").read_text(encoding="utf-8"))
    return faq[0]["question"], faq[0]["answer"]


@contextlib.contextmanager
def _mirror() -> Iterator[str]:
    from mdeploy.hub.mirror import create_server

    server = create_server(_SHIPPED, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    _step(f"mdeploy mirror {_SHIPPED}", f"a hub on {endpoint}")
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def _settings_in(place: Path, real: Settings, endpoint: str) -> Settings:
    """A home and a cache of the demo's own; only the engines are the real ones."""
    from mdeploy import settings

    (place / "home").mkdir()
    (place / "home" / "engines").symlink_to(real.paths.engines)
    flags = {"home": str(place / "home"), "cache_dir": str(place / "cache"), "endpoint": endpoint}
    return settings.load(flags={**flags, "engine": real.get("engine")}, env={}, cwd=place)


def _download(loaded: Settings) -> None:
    from mdeploy import weights
    from mdeploy.hub import refs

    _step(f"mdeploy download {_MODEL}", "through the modelscope SDK")
    model = weights.download(loaded, refs.parse(_MODEL, None))
    output.say(f"  {model.files} files, {output.human_bytes(model.bytes)}, into {model.path}")


@contextlib.contextmanager
def _service(loaded: Settings) -> Iterator[ServiceStatus]:
    from mdeploy import prepare, prepare_llm, services
    from mdeploy.cli.launching import Progress
    from mdeploy.drafts import Terms
    from mdeploy.resolve import Wanted

    _step(f"mdeploy serve llm {_MODEL} -d", "vLLM under our supervisor")
    request = prepare_llm.LlmRequest(Wanted(_MODEL), terms=Terms(name="demo"))
    spec = prepare.prepare(loaded, request, dry_run=False, progress=None, say=output.say)
    try:
        yield services.launch(loaded, spec.name, Progress())
    finally:
        services.stop_service(loaded, spec.name)


def _ask(status: ServiceStatus, question: str, expected: str) -> None:
    _step(f"curl {status.spec.url}/v1/chat/completions", f"“{question}”")
    answer = ""
    for piece in _stream(status, question):
        answer += piece
        typer.echo(piece, nl=False)
    typer.echo()
    if answer.strip() != expected:
        raise MdeployError(f"the model answered wrongly; it should have said: {expected}", hint="report this, please")


def _stream(status: ServiceStatus, question: str) -> Iterator[str]:
    """The answer, piece by piece, as server-sent events bring it."""
    import httpx

    try:
        yield from _events(status, question)
    except (httpx.HTTPError, ValueError, LookupError) as error:
        hint = f"mdeploy logs {status.spec.name}"
        raise MdeployError(f"the service gave no proper answer: {error!r}", hint=hint) from error


def _events(status: ServiceStatus, question: str) -> Iterator[str]:
    import httpx

    body = {
        "model": status.spec.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
    }
    url = f"{status.spec.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data and data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice["delta"].get("content") or ""


def _bench(loaded: Settings, status: ServiceStatus, seconds: float) -> None:
    from mdeploy import bench, services
    from mdeploy.bench import report
    from mdeploy.bench.types import BenchOptions

    asked = BenchOptions(concurrency=4, duration_s=seconds, input_tokens=64, output_tokens=32)
    name = status.spec.name
    _step(f"mdeploy bench {name} -c 4 -d {seconds:g} --input-tokens 64 --output-tokens 32", "closed loop, streaming")
    result = bench.run(services.bench_target(loaded, name), asked)
    typer.echo(report.human(result))
    if result.requests.completed == 0:
        raise MdeployError("no request of the load test was completed", hint=f"by error: {result.requests.by_error}")


def _step(command: str, what: str) -> None:
    output.say(f"\n$ {command}   # {what}")
