"""How a class of another system becomes a handler of ours, and how the class tells so itself.

The class stays what it is; `__mdeploy_handler__` on it is the handler that a worker runs. Standard library only.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdeploy.serving.handler import Handler

_TAKEN_OVER = ("timeout", "queue_size", "workers_per_device", "example", "body", "result", "errors", "responses")
_OF_BATCHES = ("max_batch_size", "max_batch_cost", "max_wait_ms")


def handler_for(cls: type, base: type[Handler], **attributes: Any) -> type[Handler]:
    """A handler that runs `cls` (its `__wrapped__`); what the class sets of our attributes is taken over."""
    own = {key: getattr(cls, key) for key in (*_TAKEN_OVER, *_OF_BATCHES) if hasattr(cls, key)}
    names = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (base,), {**own, **names, "__wrapped__": cls, **attributes})


def go_home(cls: type) -> None:
    """Relative paths of old classes start where their start scripts stood: beside the code, or above its src/.

    A service of ours is started elsewhere. Called before the class loads its model.
    """
    try:
        directory = Path(inspect.getfile(cls)).resolve().parent
        os.chdir(directory.parent if directory.name == "src" else directory)
    except (OSError, TypeError):
        return  # its module is in no file, or nobody may go there: its absolute paths go on working


class Mark:
    """The value of `__mdeploy_handler__`: asks anew for each class that inherits it, since each is another model."""

    def __init__(self, adapt: Callable[[type], type[Handler] | None]) -> None:
        self._adapt = adapt

    def __get__(self, instance: object, owner: type) -> type[Handler]:
        found = self._adapt(owner)
        if found is None:
            raise AttributeError(f"{owner.__name__} has no handler")
        return found
