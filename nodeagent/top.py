"""Who uses the proxy: its workers' accounts, by identity, added up. What a worker says may be anything."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "pillion_budget_"


def top(node: str, workers: Mapping[str, str]) -> dict[str, Any]:
    """``workers``: the exposition of each; what is none in it has no part. Rates are the reader's: totals twice, and the times
    between."""
    found: dict[str, dict[str, Any]] = {}
    for text in workers.values():
        lines = "\n".join(line for line in text.splitlines() if line.startswith((PREFIX, f"# TYPE {PREFIX}")))
        for name, labels, value in _samples(lines):
            identity, by = labels.get("identity"), labels.get("what", labels.get("reason", ""))
            if identity is None or not math.isfinite(value):
                continue
            empty = {"identity": identity, "used": {}, "max": {}, "asked": {}, "seconds": 0.0, "refused": {}}
            entry = found.setdefault(identity, empty)
            kind = name.removeprefix(PREFIX).removesuffix("_total")
            if kind in ("used", "asked", "refused"):
                entry[kind][by] = entry[kind].get(by, 0) + int(value)
            elif kind == "max":
                entry[kind][by] = value  # of one worker
            elif kind == "seconds":
                entry[kind] += value
    return {
        "node": node,
        "time": time.time(),
        "workers": len(workers),
        "identities": sorted(found.values(), key=lambda entry: (-entry["seconds"], entry["identity"])),
    }


def _samples(text: str) -> Iterable[tuple[str, dict[str, str], float]]:
    try:
        for family in text_string_to_metric_families(text + "\n"):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
    except Exception:  # the parser raises many types, all of them the worker's doing
        return
