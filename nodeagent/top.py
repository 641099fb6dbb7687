"""Who uses the proxy: its workers' accounts, by identity, added up."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "pillion_budget_"


def top(node: str, workers: Mapping[str, str]) -> dict[str, Any]:
    """``workers``: the exposition of each. Rates are the reader's: totals twice, and the times between."""
    found: dict[str, dict[str, Any]] = {}
    for text in workers.values():
        lines = "\n".join(line for line in text.splitlines() if line.startswith((PREFIX, f"# TYPE {PREFIX}")))
        for name, labels, value in _samples(lines):
            entry = found.setdefault(
                labels["identity"],
                {"identity": labels["identity"], "used": {}, "max": {}, "asked": {}, "seconds": 0.0, "refused": {}},
            )
            kind = name.removeprefix(PREFIX).removesuffix("_total")
            if kind in ("used", "asked"):
                entry[kind][labels["what"]] = entry[kind].get(labels["what"], 0) + int(value)
            elif kind == "max":
                entry[kind][labels["what"]] = value  # of one worker
            elif kind == "seconds":
                entry[kind] += value
            elif kind == "refused":
                entry[kind][labels["reason"]] = entry[kind].get(labels["reason"], 0) + int(value)
    return {
        "node": node,
        "time": time.time(),
        "workers": len(workers),
        "identities": sorted(found.values(), key=lambda entry: (-entry["seconds"], entry["identity"])),
    }


def _samples(text: str) -> Iterable[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text + "\n"):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value
