"""mdeploy: from a ModelScope id to a measured, supervised service on your own machines.

Authors of handlers import from here: `from mdeploy import Handler, HTTPError, Request, Response, File`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdeploy.serving.handler import File as File
    from mdeploy.serving.handler import Handler as Handler
    from mdeploy.serving.handler import HTTPError as HTTPError
    from mdeploy.serving.handler import Request as Request
    from mdeploy.serving.handler import Response as Response

__version__ = "0.1.0"

_FOR_AUTHORS = ("File", "HTTPError", "Handler", "Request", "Response")


def __getattr__(name: str) -> Any:
    """The contract of handlers, imported when it is asked for: the command line does without."""
    if name not in _FOR_AUTHORS:
        raise AttributeError(f"module 'mdeploy' has no attribute {name!r}")
    from mdeploy.serving import handler

    return getattr(handler, name)
