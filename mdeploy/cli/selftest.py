"""`mdeploy selftest`: ask a running embedding service whether its vectors are right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import options, output
from mdeploy.cli.embed import ModelName, Target_, find
from mdeploy.errors import ConfigError, InvalidResultError, UsageError

if TYPE_CHECKING:
    from mdeploy.embedding.client import Client
    from mdeploy.embedding.golden import Golden


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("selftest")(selftest)


def selftest(
    target: Target_,
    golden: Annotated[
        Path | None, typer.Option("--golden", metavar="FILE", help="Golden vectors. Without it: the recipe's.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Write golden vectors as the service gives them now."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, metavar="S", help="Longest time one request may take.")] = 120.0,
    model: ModelName = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Check the answers of an embedding service.

    The same text gives the same vector whatever is in the same batch or asked at the same time,
    vectors have norm 1, are cut as the model allows, order is kept, paraphrases are closer than
    strangers; and they are those of the reference, where golden vectors are known for the model.

    Exit status 6 means that a check failed. A warning does not count.
    """
    from mdeploy.embedding import selftest as checks
    from mdeploy.embedding.client import Client

    server = find(target, model)
    with Client(server, connections=checks.AT_ONCE, timeout_s=timeout) as client:
        known = _golden(client, golden)
        if record is not None:
            _record(client, known, record, as_json=as_json)
            return
        found = tuple(checks.run(client, known))
        name = client.model()
    rows = [(check.status, check.name, check.detail) for check in found]
    document = {
        "model": name,
        "checks": [{"name": check.name, "status": check.status, "detail": check.detail} for check in found],
    }
    output.emit(document, as_json=as_json, human=lambda: output.table(("", name, ""), rows))
    failed = [check.name for check in found if check.status == "failed"]
    if failed and not as_json:
        raise InvalidResultError(f"failed: {'; '.join(failed)}")
    if failed:
        raise typer.Exit(InvalidResultError.exit_code)


def _golden(client: Client, file: Path | None) -> Golden | None:
    """What was named, else what the model's recipe names."""
    from mdeploy import recipes, settings
    from mdeploy.embedding import golden

    if file is None:
        where = recipes.directories(settings.load().paths, Path.cwd())
        file = recipes.golden(client.model(), where)
    return golden.read(file) if file else None


def _record(client: Client, known: Golden | None, file: Path, *, as_json: bool) -> None:
    from mdeploy.embedding import golden, selftest

    if file.exists():
        raise UsageError(f"{file} is there already", hint=f"rm {file}")
    made = selftest.record(client, known)
    try:
        file.write_bytes(golden.render(made))
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    document = {"model": made.model, "output": str(file), "items": len(made.items)}
    output.emit(document, as_json=as_json, human=lambda: f"{file}: {len(made.items)} vectors of {made.model}")
