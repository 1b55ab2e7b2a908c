"""mdeploy as a wheel, packed from the files of an installation: images can have it without an index that does."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Mapping

_WHEEL = "Wheel-Version: 1.0\nGenerator: mdeploy export\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The same files give the same bytes, so that images are not built anew for nothing."""


def name_of(version: str) -> str:
    """The file name of the wheel (PEP 427)."""
    return f"mdeploy-{version}-py3-none-any.whl"


def pack(version: str, files: Mapping[str, bytes], metadata: str, entry_points: str) -> bytes:
    """The wheel: `files` by their path below site-packages, and the core metadata of the installation."""
    info = f"mdeploy-{version}.dist-info"
    texts = {"METADATA": metadata, "WHEEL": _WHEEL, "entry_points.txt": entry_points}
    contents = {**files, **{f"{info}/{name}": text.encode() for name, text in texts.items()}}
    record = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in contents.items():
            archive.writestr(zipfile.ZipInfo(path, _LONG_AGO), data, zipfile.ZIP_DEFLATED)
    return wheel.getvalue()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
