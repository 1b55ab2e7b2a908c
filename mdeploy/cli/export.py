"""`mdeploy export nginx|compose|kubernetes`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import output
from mdeploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mdeploy.export.nginx import Guard
    from mdeploy.export.rendered import Rendered

Names = Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Services, as `mdeploy ps` names them.")]
File = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Services of this mdeploy.yaml.")]
Directory = Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write everything there.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A service, as `mdeploy ps` names it.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="Write what other programs need to serve in front of, or instead of, mdeploy.",
        no_args_is_help=True,
    )
    group.command("nginx")(nginx)
    group.command("compose")(compose)
    group.command("kubernetes")(kubernetes)
    app.add_typer(group, name="export")


def nginx(
    name: Name,
    servers: Annotated[
        list[str] | None,
        typer.Option("--server", metavar="HOST:PORT|NAME", help="A further server, or service of this machine."),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", metavar="[HOST:]PORT", help="Where nginx listens. [default: 80, with TLS 443]"),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option("--server-name", metavar="N", help="Host name clients use. [default: any]")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate chain (PEM).")
    ] = None,
    key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key (PEM).")] = None,
    ask: Annotated[
        bool, typer.Option("--key-from-service", help="nginx itself asks clients for the service's keys.")
    ] = False,
    add: Annotated[bool, typer.Option("--add-key", help="nginx adds the service's key; clients need none.")] = False,
    only_servers: Annotated[
        bool, typer.Option("--only-servers", help="Leave the service itself out: nginx runs elsewhere.")
    ] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let everybody in who reaches nginx.")] = False,
    file: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it there.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Have nginx -t read it first, where there is nginx.")] = False,
) -> None:
    """Put nginx in front of a service and its replicas on other machines.

    A server that dies loses no request: it is sent to another one. Without -o the site goes to
    stdout. Keys are in no file unless asked for, and then in one of their own that only root reads.
    """
    from mdeploy import settings
    from mdeploy.export import nginx as renderer
    from mdeploy.exporting import front

    request = front.Request(
        service=name,
        servers=tuple(servers or ()),
        listen=tuple(listen or ()),
        names=tuple(names or ()),
        certificate=certificate,
        key=key,
        guard=_guard(ask=ask, add=add),
        only_servers=only_servers,
        insecure=insecure,
        output=file,
    )
    site = front.site(settings.load(), request, output.say)
    if check:
        front.check(site, output.say)
    if file is None:
        typer.echo(renderer.render(site), nl=False)
        return
    for path in front.write(site, file):
        output.say(f"wrote {path}")
    output.say("next: nginx -t && nginx -s reload")


def _guard(*, ask: bool, add: bool) -> Guard:
    if ask and add:
        raise UsageError("--key-from-service and --add-key exclude each other")
    return "ask" if ask else "add" if add else "pass"


def compose(names: Names = None, file: File = None, directory: Directory = None) -> None:
    """Run services in containers with docker compose.

    With -o: compose.yaml, the Dockerfiles it builds from, and mdeploy itself for the images that
    need it; else only compose.yaml, on stdout. Models and keys stay where they are on this machine.
    """
    from mdeploy import settings
    from mdeploy.export import compose as renderer
    from mdeploy.exporting import containers

    works = containers.of_names(settings.load(), names or (), file, output.say)
    files = containers.compose_files(works, output.say)
    _deliver(
        files, directory, next(str(f.content) for f in files if f.name == renderer.FILE), "docker compose up -d --build"
    )


def kubernetes(
    names: Names = None,
    file: File = None,
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", metavar="N", help="Namespace.")] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="IMAGE", help="Image of your own. [default: vLLM's, or one to build]"),
    ] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, max=1000, metavar="N", help="Pods of each.")] = 1,
    claim: Annotated[
        str | None,
        typer.Option("--claim", metavar="PVC", help="Claim that holds the models. [default: the node's directories]"),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Services without a key may be exported.")] = False,
    directory: Directory = None,
) -> None:
    """Run services in a cluster of Kubernetes: Deployment, Service, probes, and a disruption budget for several pods.

    A key is taken from a Secret, which you make from its file; the command is shown. With -o also
    Dockerfiles, for images nobody publishes; else only the manifests, on stdout.
    """
    from mdeploy import settings
    from mdeploy.export import kubernetes as renderer
    from mdeploy.exporting import containers

    works = containers.of_names(settings.load(), names or (), file, output.say)
    target = renderer.Target(namespace, image, replicas, claim)
    files = containers.kubernetes_files(works, target, output.say, insecure=insecure)
    _deliver(files, directory, renderer.one_stream(files), "kubectl apply -f DIR")


def _deliver(files: Iterable[Rendered], directory: Path | None, main: str, following: str) -> None:
    """Everything into the directory, or the main text onto stdout."""
    from mdeploy.exporting import writing
    from mdeploy.paths import expand

    if directory is None:
        typer.echo(main, nl=False)
        others = [file.name for file in files if not file.name.endswith(".yaml")]
        if others:
            output.say(f"with -o DIR also: {', '.join(others)}")
        return
    for path in writing.write(files, expand(directory)):
        output.say(f"wrote {path}")
    output.say(f"next: cd {shlex.quote(str(directory))} && {following.replace('DIR', '.')}")
