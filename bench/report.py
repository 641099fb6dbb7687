"""The table a person reads and the list a machine reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One benchmark: medians in `unit`, ratios of medians; null where a party does not apply."""

    name: str
    unit: str
    pillion: float | None
    direct: float | None
    envoy: float | None
    ratio_direct: float | None
    ratio_envoy: float | None
    ratio_self: float | None


def _ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a and b else None


def row(name: str, unit: str, samples: dict[str, list[float]]) -> Row:
    """`samples`: party -> values. The party `self` is Pillion in the configuration it is compared with."""
    mid = {party: round(median(values), 3) for party, values in samples.items() if values}
    pillion = mid.get("pillion")
    return Row(
        name,
        unit,
        pillion,
        mid.get("direct"),
        mid.get("envoy"),
        _ratio(pillion, mid.get("direct")),
        _ratio(pillion, mid.get("envoy")),
        _ratio(pillion, mid.get("self")),
    )


def write(rows: list[Row], path: Path) -> None:
    """Rows of this run replace those of the same name; the others stay, so that ONLY= adds to a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else []
    names = {r.name for r in rows}
    path.write_text(json.dumps([k for k in kept if k["name"] not in names] + [asdict(r) for r in rows], indent=1) + "\n")


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Pillion beside no mesh and Envoy (medians)")
    for column in ("benchmark", "unit", "pillion", "direct", "envoy", "× direct", "× envoy", "× self"):
        table.add_column(column, justify="left" if column in ("benchmark", "unit") else "right")
    for r in rows:
        values = (r.pillion, r.direct, r.envoy, r.ratio_direct, r.ratio_envoy, r.ratio_self)
        table.add_row(r.name, r.unit, *("" if v is None else f"{v:,.0f}" if v > 1000 else f"{v:.2f}" for v in values))
    console.print(table)
