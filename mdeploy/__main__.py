"""`python -m mdeploy` and the `mdeploy` entry point are the same program."""

import gc
import sys

gc.disable()  # Start-up makes a hundred thousand objects and no garbage; `cli.main` turns it on again.

from mdeploy.cli.main import run  # noqa: E402


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
