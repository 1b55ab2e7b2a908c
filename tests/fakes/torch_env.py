"""A stand-in for an interpreter with torch: a real one, in whose environment the packages are said to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VERSIONS = {
    "torch": "2.13.0+cpu",
    "transformers": "5.2.0",
    "tokenizers": "0.23.1",
    "numpy": "2.4.0",
    "safetensors": "0.7.0",
    "pillow": "12.0.0",
}


def make(root: Path, **versions: str) -> Path:
    """Build the environment under `root`; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    return add(root / "bin/python", **versions)


def add(python: Path, **versions: str) -> Path:
    """Note the packages in an environment that is there; "" leaves one out."""
    site = next(python.parent.parent.glob("lib/python3*/site-packages"))
    for name, version in {**VERSIONS, **versions}.items():
        if version:
            info = site / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return python
