"""`python -m mdeploy.apps KIND …`: the main process of an app service."""

from __future__ import annotations

import importlib
import signal
import sys

from mdeploy.errors import ExitCode, MdeployError

_KINDS = {
    "app": ("mdeploy.serving.options", "mdeploy.apps.app"),
    "embed": ("mdeploy.apps.embed.options", "mdeploy.apps.embed.service"),
    "gme": ("mdeploy.apps.embed.options", "mdeploy.apps.gme.service"),
}
"""Who reads the words of a kind (`parse`), and who serves it (`main`)."""


def main(words: list[str]) -> int:
    """Serve until told to end; returns the exit status."""
    kind = words[0] if words else ""
    if kind not in _KINDS:
        print(f"mdeploy-app: error: no app {kind!r}: there are {', '.join(_KINDS)}", file=sys.stderr)
        return ExitCode.USAGE
    for early in (signal.SIGHUP, signal.SIGUSR1):  # they would end us until there is somebody to heed them
        signal.signal(early, signal.SIG_IGN)
    options, service = map(importlib.import_module, _KINDS[kind])
    try:
        return int(service.main(options.parse(words[1:])))
    except MdeployError as error:
        from mdeploy.apps.app import say

        say(f"error: {error.message}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
