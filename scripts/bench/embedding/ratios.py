"""From rows to what the reader wants to know. A ratio is taken within each round; the median of them is shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
Rows = dict[str, dict[str, list[Row]]]


def medians(rows: Rows) -> dict[str, dict[str, Row]]:
    """Each figure's median over the rounds; exactness and failures are the worst of all rounds."""
    return {measure: {what: _median(found) for what, found in by.items()} for measure, by in rows.items()}


def _median(rows: list[Row]) -> Row:
    found: Row = {}
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        if key == "cosine_min":
            found[key] = min(values)
        elif isinstance(value, bool):
            found[key] = any(values)
        elif isinstance(value, dict):
            found[key] = {name: _middle(row[key].get(name, 0) for row in rows) for row in rows for name in row[key]}
        else:
            found[key] = _middle(values)
    return found


def _middle(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def ratios(rows: Rows) -> Row:
    """What the issue asks; what was not measured is left out."""
    offline, found = rows.get("offline", {}), dict[str, Any]()
    for name, figure in (("share", "tokens_s"), ("cpu_share", "tokens_cpu_s")):
        limit = _best(offline, "packed", figure)
        for measure in (measure for measure in rows if measure != "offline" and limit):
            by = rows[measure]
            found[f"{name}_{measure}"] = {what: _over([row[figure] for row in own], limit) for what, own in by.items()}
    limit = _best(offline, "packed", "tokens_s")
    pairs = {"packed_over_st_bf16": (limit, _best(offline, "st-bf16", "tokens_s"))}
    pairs["packed_over_padded"] = (limit, _best(offline, "padded", "tokens_s"))
    for measure, by in rows.items():
        ours = by.get("mdeploy", [])
        for peer in (name for name in by if measure != "offline" and name != "mdeploy"):
            for figure in ("texts_s", "p99_ms"):
                own, theirs = ([row[figure] for row in some] for some in (ours, by[peer]))
                pairs[f"{measure}_{figure}_over_{peer}"] = (own, theirs)
    found.update({name: _over(own, theirs) for name, (own, theirs) in pairs.items() if own and theirs})
    return {**found, "cosine_min": _worst(rows)}


def _best(offline: dict[str, list[Row]], kind: str, figure: str) -> list[float]:
    """Of the ways of one kind, the better one in each round."""
    ways = [[row[figure] for row in own] for way, own in offline.items() if way.startswith(kind)]
    return [max(values) for values in zip(*ways, strict=True)] if ways else []


def _over(own: list[float], theirs: list[float]) -> float:
    """0 where one of them answered nothing."""
    return _middle(a / b if b else 0.0 for a, b in zip(own, theirs, strict=True))


def _worst(rows: Rows) -> dict[str, float]:
    """Least cosine of each system or way, over all loads."""
    found: dict[str, float] = {}
    for by in rows.values():
        for what, own in by.items():
            found[what] = min([found.get(what, 1.0), *(row["cosine_min"] for row in own)])
    return found
