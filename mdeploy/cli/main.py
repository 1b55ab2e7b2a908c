"""Builds the command line and turns every error into one message and one exit code.

Only the module of the verb in use is imported: `mdeploy ps` must not pay for the other verbs.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from mdeploy import __version__
from mdeploy.cli import output
from mdeploy.errors import ConfigError, ExitCode, MdeployError, UsageError

_STDOUT_IS_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)

# verb -> module that registers it, in the order `--help` lists them
VERBS = {
    "demo": "demo",
    "download": "download",
    "mirror": "mirror",
    "engines": "engines",
    "serve": "serve",
    "init": "init",
    "run": "run",
    "ps": "ps",
    "logs": "logs",
    "stop": "stop",
    "restart": "stop",
    "up": "fleet",
    "down": "fleet",
    "diff": "fleet",
    "rollback": "fleet",
    "keys": "keys",
    "install-systemd": "systemd",
    "uninstall-systemd": "systemd",
    "bench": "bench",
    "embed": "embed",
    "selftest": "selftest",
    "cluster": "cluster",
    "export": "export",
}


def run(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit code and never raises for a user's mistake."""
    ours, engines = _split(argv)
    as_json = "--json" in ours
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, _terminated)
    try:
        _check_words(ours)
        code = _build(ours)(args=list(ours), obj=tuple(engines), prog_name="mdeploy", standalone_mode=False)
    except MdeployError as error:
        return output.fail(error, as_json=as_json)
    except typer.TyperException as error:
        return _misused(error, as_json=as_json)
    except Terminated as signalled:
        return 128 + signalled.number
    except (KeyboardInterrupt, typer.Abort):
        output.say("interrupted")
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # `mdeploy logs | head`
        _forget_stdout()
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _no_io(error, as_json=as_json)
    return code if isinstance(code, int) else ExitCode.OK


def _build(argv: Sequence[str]) -> typer.Typer:
    app = typer.Typer(
        name="mdeploy",
        help="Download, plan, serve, supervise and measure ModelScope models on your own GPU machines.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: quicker, pipes well, and keeps [default: …] as it is written
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    known = VERBS.get(argv[0]) if argv else None
    for module in [known] if known else dict.fromkeys(VERBS.values()):
        importlib.import_module(f"mdeploy.cli.{module}").register(app)
    return app


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda wanted: _print_version(wanted),
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    """Options that stand before the verb."""
    gc.enable()  # everything is imported; see __main__


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mdeploy {__version__}")
        raise typer.Exit


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Our words and, of `serve`, the engine's after --; Typer would take the latter for positionals."""
    if argv[:1] == ["serve"] and "--" in argv:
        at = list(argv).index("--")
        return argv[:at], argv[at + 1 :]
    return argv, ()


def _check_words(words: Sequence[str]) -> None:
    """An empty word is a shell variable that was never set; bytes that are no text end in no JSON."""
    if "" in words:
        raise UsageError("an argument is empty", hint="is a variable of the shell not set?")
    if any("\udc80" <= char <= "\udcff" for word in words for char in word):
        raise UsageError("an argument is not valid UTF-8", hint="rename the file or set LC_ALL=C.UTF-8")


class Terminated(BaseException):
    """SIGTERM unwinds like Ctrl-C, so that whatever cleans up at one cleans up at the other.

    No KeyboardInterrupt: Typer would turn that into an exit code of its own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


def _misused(error: typer.TyperException, *, as_json: bool) -> int:
    text = error.format_message()
    if text.startswith("Usage:"):  # no command given: the help is the message
        output.say(text)
        return ExitCode.USAGE
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "mdeploy"
    return output.fail(UsageError(text, hint=f"{command} --help"), as_json=as_json)


def _no_io(error: OSError, *, as_json: bool) -> int:
    if error.filename is None and error.errno in _STDOUT_IS_LOST:
        _forget_stdout()
        return output.fail(MdeployError(f"standard output: {error.strerror}"), as_json=False)
    if error.errno == errno.ENOENT and error.filename is None:  # getcwd()
        gone = ConfigError("the current directory does not exist any more", hint="cd to one that does")
        return output.fail(gone, as_json=as_json)
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return output.fail(MdeployError(what), as_json=as_json)


def _forget_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
