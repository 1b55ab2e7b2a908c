"""Starts a worker in an interpreter that may know nothing of mdeploy: run as a file, never imported.

Only the package `mdeploy` itself becomes visible, from where this file lies. What else is installed beside it stays
hidden: it was built for another interpreter.

    PYTHON bootstrap.py worker FD PARENT_PID JOB      be a worker; JOB is JSON
    PYTHON bootstrap.py list SPEC [PATH…]             print the handlers of a module as JSON
"""

import importlib.util
import json
import sys
from pathlib import Path


def _find_mdeploy() -> None:
    package = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "mdeploy", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mdeploy"] = module
    spec.loader.exec_module(module)


def main(words: list[str]) -> int:
    """Do what the words say; returns the exit status."""
    del sys.path[0]  # our own directory: `handler` and `load` must not be found by a user's imports
    _find_mdeploy()
    from mdeploy.serving import worker

    if words[0] == "worker":
        job = json.loads(words[3])
        return worker.main(int(words[1]), int(words[2]), worker.Job(**{**job, "paths": tuple(job["paths"])}))
    return worker.list_handlers(words[1], tuple(words[2:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
