"""`python -m mdeploy.apps KIND …`: the main process of an app service."""

from __future__ import annotations

import signal
import sys

from mdeploy.errors import ExitCode, MdeployError


def main(words: list[str]) -> int:
    """Serve until told to end; returns the exit status."""
    if words[:1] != ["app"]:
        print(f"mdeploy-app: error: no app {words[:1]}", file=sys.stderr)
        return ExitCode.USAGE
    for early in (signal.SIGHUP, signal.SIGUSR1):  # they would end us until there is somebody to heed them
        signal.signal(early, signal.SIG_IGN)
    from mdeploy.apps import app
    from mdeploy.serving import options

    try:
        return app.main(options.parse(words[1:]))
    except MdeployError as error:
        app.say(f"error: {error.message}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
