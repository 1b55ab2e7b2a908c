"""The device as the source systems' classes take it: as text, as a number, or written to CUDA_VISIBLE_DEVICES.

A worker of ours sees its own GPU only, so that torch calls it cuda:0 whatever its number in the machine is.
"""

from __future__ import annotations

import os


class Device(str):
    """A device's name that also survives `int(device)` and `os.environ["CUDA_VISIBLE_DEVICES"] = device`.

    The number inside the worker is always 0. Written to the environment it is what CUDA_VISIBLE_DEVICES held when
    the worker started: a class that selects "its" GPU there selects the one it has.
    """

    __slots__ = ("_visible",)
    _visible: str

    def __new__(cls, name: str, visible: str | None = None) -> Device:
        """`visible` is the value for CUDA_VISIBLE_DEVICES; None takes the name, as plain text would."""
        self = super().__new__(cls, name)
        self._visible = name if visible is None else visible
        return self

    def __int__(self) -> int:
        number = self.rpartition(":")[2]
        if number.isdecimal():
            return int(str(number))
        return 0

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """What os.environ stores: it encodes with `surrogateescape`, which nobody else asks for."""
        return (self._visible if errors == "surrogateescape" else str(self)).encode(encoding, errors)

    def __reduce__(self) -> tuple[type[Device], tuple[str, str]]:
        return Device, (str(self), self._visible)


def own(name: str) -> Device:
    """This worker's device under a name."""
    return Device(name, os.environ.get("CUDA_VISIBLE_DEVICES"))
