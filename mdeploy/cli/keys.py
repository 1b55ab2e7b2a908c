"""`mdeploy keys`: who may use a service. A key is printed once, when it is made, and read from nowhere but stdin."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mdeploy.cli import options, output
from mdeploy.errors import UsageError

if TYPE_CHECKING:
    from mdeploy.keys import Change, Listener, ServiceKeys

_MOST_BYTES = 1 << 16

Name = Annotated[str, typer.Argument(help="Service, as `mdeploy ps` names it.")]
Stdin = Annotated[bool, typer.Option("--stdin", help="Read the key from stdin instead of making one.")]
# A key typed as an argument is in the shell's history already; Typer's message would repeat it.
_SURPLUS = {"allow_extra_args": True}


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="API keys of services.", no_args_is_help=True, rich_markup_mode=None)
    group.command("add", context_settings=_SURPLUS)(add)
    group.command("ls")(ls)
    group.command("rotate", context_settings=_SURPLUS)(rotate)
    group.command("rm")(rm)
    app.add_typer(group, name="keys")


def add(context: typer.Context, name: Name, stdin: Stdin = False) -> None:
    """Give a service a key; print the one that was made.

    A running service without a key is started again with it. Where the
    engine can have several, this is one more: it is reloaded, or as a unit
    of systemd started again. vLLM takes one.
    """
    from mdeploy import keys, settings

    given = _given(name, context.args, stdin)
    _tell(keys.add(settings.load(), name, given, _listener()), given)


def ls(
    name: Annotated[str | None, typer.Argument(help="Service. [default: all]")] = None,
    as_json: options.JsonFlag = False,
) -> None:
    """List services and the fingerprints of their keys.

    A fingerprint is the beginning of the key's SHA-256: printf %s KEY | sha256sum
    """
    from mdeploy import keys, settings

    found = keys.listing(settings.load(), name)
    output.emit({"keys": [_row(each) for each in found]}, as_json=as_json, human=lambda: _table(found))


def rotate(
    context: typer.Context,
    name: Name,
    stdin: Stdin = False,
    no_restart: Annotated[bool, typer.Option("--no-restart", help="Let it come into force at the next start.")] = False,
) -> None:
    """Replace all keys of a service by one new one; print the one that was made.

    A running service is started again with it, or told to reload where it
    can. If that fails or is interrupted, the old key comes back. To give
    clients time where an engine can have several: keys add, tell them,
    keys rm --old.
    """
    from mdeploy import keys, settings

    given = _given(name, context.args, stdin)
    _tell(keys.rotate(settings.load(), name, given, _listener(), restart=not no_restart), given)


def rm(
    name: Name,
    old: Annotated[bool, typer.Option("--old", help="Only the keys before the newest.")] = False,
) -> None:
    """Remove the keys of a service: it is open then.

    A running service is started again without them. Refused where it listens
    for other machines; --old leaves the newest key, and is not.
    """
    from mdeploy import keys, settings

    _tell(keys.remove(settings.load(), name, _listener(), old=old), None)


def _listener() -> Listener:
    from mdeploy.cli.launching import Progress
    from mdeploy.keys import Listener

    return Listener(Progress(), output.say)


def _given(name: str, surplus: list[str], stdin: bool) -> str | None:
    """The key the user hands over, if any. Raises UsageError for one on the command line, or for none on stdin."""
    if surplus:
        hint = f"mdeploy keys rotate {name} --stdin < FILE"
        raise UsageError("a key on the command line can be seen by everybody on this machine", hint=hint)
    if not stdin:
        return None
    from mdeploy import keys

    text = _typed(name) if sys.stdin.isatty() else sys.stdin.buffer.read(_MOST_BYTES).decode(errors="replace")
    if not text.strip():
        raise UsageError("stdin holds no key", hint="leave out --stdin, and one is made")
    return keys.check(text.rstrip("\r\n"))


def _typed(name: str) -> str:
    import getpass

    return getpass.getpass(f"key of {name}: ")


def _tell(change: Change, given: str | None) -> None:
    """The new key on stdout, and on stderr what became of the service."""
    how = {
        "restarted": "it was started again and is ready",
        "reloaded": "it was reloaded and answers",
        "at the next start": "that comes into force at the next start",
    }
    what = "a new key" if change.key else "one key" if change.keys else "no key any more"
    output.say(f"{change.service} has {what}; {how[change.effect]}")
    if change.key and not given:
        output.emit({}, as_json=False, human=lambda: str(change.key))
        output.say("it is shown only this once")


def _row(found: ServiceKeys) -> dict[str, object]:
    return {
        "service": found.service,
        "required": found.required,
        "keys": len(found.fingerprints),
        "fingerprints": list(found.fingerprints),
        "since": found.since,
    }


def _table(found: tuple[ServiceKeys, ...]) -> str:
    if not found:
        return "no services; start one: mdeploy serve llm -d"
    import time

    now = time.time()
    rows = [
        (
            each.service,
            str(len(each.fingerprints)) if each.fingerprints else "file is gone" if each.required else "none: open",
            " ".join(each.fingerprints) or "-",
            output.human_seconds(max(0.0, now - each.since)) if each.since is not None else "-",
        )
        for each in found
    ]
    return output.table(("SERVICE", "KEYS", "FINGERPRINTS", "AGE"), rows)
