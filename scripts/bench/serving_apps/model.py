"""The model that every system serves: it takes BENCH_BASE_MS + BENCH_ITEM_MS an item and answers what it was asked.

A sleep stands for a GPU that computes: it needs none of the one core that all processes of the server share. With
BENCH_STATE each worker keeps a file there, named by its pid: how many items it is computing now.
"""

import os
import time
from pathlib import Path
from typing import Any

BASE_S = float(os.environ.get("BENCH_BASE_MS", "0")) / 1000
ITEM_S = float(os.environ.get("BENCH_ITEM_MS", "0")) / 1000
MAX_BATCH = int(os.environ.get("BENCH_MAX_BATCH", "1"))
WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))
RAW = "BENCH_RAW" in os.environ
_STATE = os.environ.get("BENCH_STATE")


def tell(items: int) -> None:
    """Write down how many items this process is computing."""
    if _STATE:
        (Path(_STATE) / str(os.getpid())).write_text(str(items))


def run(batch: list[Any]) -> list[Any]:
    """One batch through the model."""
    tell(len(batch))
    if BASE_S or ITEM_S:
        time.sleep(BASE_S + ITEM_S * len(batch))
    tell(0)
    return batch
