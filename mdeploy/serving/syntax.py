"""Looks at a user's handlers without running them. Started by the user's own interpreter as a script, on its own:
it imports the standard library only, prints one line of JSON and knows nothing of mdeploy.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def look(wanted: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with each of `files` (paths), and which of `modules` (top-level names) are not to be found."""
    sys.path[:0] = wanted["paths"]
    files = {path: _look_at(path) for path in wanted["files"]}
    return {"files": files, "missing": [name for name in wanted["modules"] if not _is_there(name)]}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # __main__ has none
        return False


def _look_at(path: str) -> dict[str, Any]:
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
        compile(tree, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        return {"error": error.msg, "line": error.lineno or 0}
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # not ours to read, null bytes, endless nesting
        return {"error": str(error) or "it is nested too deeply", "line": 0}
    names = _names(tree)
    return {"names": sorted(names), "open": "*" in names}


def _names(tree: ast.Module) -> set[str]:
    """Every name the module could bind: what is not among them is a slip of the user's fingers."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


if __name__ == "__main__":
    print(json.dumps(look(json.loads(sys.argv[-1]))))  # noqa: T201 its parent reads it
