"""The command line of modelserve scripts: one process with --controller, and one with --worker for each GPU.

    python app.py --controller --port 8888
    python app.py --worker --port 8880 --name custom --device cuda:0
                  --controller-addr http://localhost:8888 --worker-addr http://localhost:8880

The controller is our edge; requests go to the workers that joined. A worker is our app for one class. New services
need neither: `mdeploy serve app app.py` does the same with one command.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mdeploy import settings
from mdeploy.compat import address, token
from mdeploy.errors import ConfigError, MdeployError, UsageError


def main(apis: Mapping[str, type], argv: Sequence[str] | None = None) -> None:
    """Run one command line and end the program with its status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(_run(apis, words))
    except MdeployError as error:
        say(f"error: {error.message}")
        if error.hint:
            say(f"hint: {error.hint}")
        sys.exit(int(error.exit_code))


def say(text: str) -> None:
    """One line to whoever looks at the log of this process."""
    sys.stderr.write(f"mdeploy: {text}\n")
    sys.stderr.flush()


def _run(apis: Mapping[str, type], words: Sequence[str]) -> int:
    script = _script()
    options = _parser(script).parse_args(words)
    if not apis:
        raise UsageError(f"{script.name} has no class with @api", hint='write @api(name="custom") above the class')
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ConfigError(
            "this environment lacks the HTTP server", hint=f"{sys.executable} -m pip install 'mdeploy[serve]'"
        )
    found = settings.load(flags={"host": options.host})
    secret = token.file(os.environ, found.paths)
    if options.controller:
        return _controller(options, apis, script, found.require("host"), secret)
    return _worker(options, apis, script, secret)


def _script() -> Path:
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        raise UsageError(
            "runserver_with_args() must be called by a script", hint="python app.py --controller --port 8888"
        )
    return Path(file).resolve()


def _parser(script: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python {script.name}", allow_abbrev=False)
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--controller", action="store_true", help="answer clients, share requests out to workers")
    role.add_argument("--worker", action="store_true", help="run a model on one device and join a controller")
    parser.add_argument("--port", type=_port, required=True)
    parser.add_argument("--host", help="address to listen on [default: MDEPLOY_HOST or 127.0.0.1]")
    parser.add_argument("--name", help="worker: the model's name in @api")
    parser.add_argument("--device", help="worker: what init(device) gets, such as cuda:0 or 0")
    parser.add_argument("--controller-addr", metavar="URL", type=_url, help="worker: where the controller is")
    parser.add_argument("--worker-addr", metavar="URL", type=_url, help="worker: where the controller finds it")
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="controller: whose pages may ask")
    parser.add_argument("--insecure", action="store_true", help="controller: no key on any address")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port (1 to 65535)")
    return int(text)


def _url(text: str) -> str:
    """An address like http://HOST:PORT, without a slash at the end."""
    try:
        return address.checked(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _controller(options: argparse.Namespace, apis: Mapping[str, type], script: Path, host: str, secret: Path) -> int:
    from mdeploy.compat import controller
    from mdeploy.serving.auth import KEYS_VARIABLE, Keys

    keys = Keys(Path(os.environ[KEYS_VARIABLE])) if os.environ.get(KEYS_VARIABLE) else Keys()
    if not (keys.required or options.insecure or address.is_loopback(host)):
        hint = f"name a file with keys in {KEYS_VARIABLE}, or add --insecure"
        raise ConfigError(f"the controller would answer everybody on {host}, without a key", hint=hint)
    page = script.with_name("index.html")
    terms = controller.Terms(host, options.port, page if page.is_file() else None, tuple(options.cors))
    return controller.run(terms, apis, keys, token.read(secret), say)


def _worker(options: argparse.Namespace, apis: Mapping[str, type], script: Path, secret: Path) -> int:
    from mdeploy.compat import agent

    name = (options.name or (next(iter(apis)) if len(apis) == 1 else "")).strip("/")
    if name not in apis:
        raise UsageError(f"--name {name!r} is no model of {script.name}", hint=f"it has {', '.join(sorted(apis))}")
    if options.device is None or options.controller_addr is None:
        raise UsageError("a worker needs --device and --controller-addr", hint=f"python {script.name} --help")
    own = options.worker_addr or f"http://127.0.0.1:{options.port}"
    host = options.host or _listening_for(urlsplit(own).hostname or "")
    model: Any = apis[name]
    joining = agent.Joining(
        script=script,
        class_name=model.__qualname__,
        name=model.__mdeploy_handler__.name,
        host=host,
        port=options.port,
        device=options.device,
        controller=options.controller_addr,
        address=own,
        token_file=secret,
    )
    return agent.run(joining, say)


def _listening_for(host: str) -> str:
    """Where a worker listens that is to be found at `host`."""
    if address.is_loopback(host):
        return "::1" if ":" in host else "127.0.0.1"
    return "::" if ":" in host else "0.0.0.0"
