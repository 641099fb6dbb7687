"""The picture of the README, from the results: requests a second of the same client and server, by who carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LABEL, BAR, GAP, TOP = 720, 210, 26, 12, 54
UNDER = "32 keep-alive connections; policy, metrics and a weighted route on; medians of one machine"
COLOURS = {"pillion": "#2563eb", "other": "#94a3b8"}


def bars(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """(who, requests/s, colour); nothing when the rows that belong together are not all there. Parties of other runs are
    scaled by what direct TCP made there: machines are noisy, ratios less so."""
    by_name = {str(row["name"]): row for row in rows}
    express, proxy = by_name.get("express-http1"), by_name.get("http1-same-node")
    if express is None or proxy is None or not all(express[party] and proxy[party] for party in ("pillion", "direct", "envoy")):
        return []
    scale = float(express["direct"]) / float(proxy["direct"])
    return [
        ("Pillion, carried by the kernel", float(express["pillion"]), COLOURS["pillion"]),
        ("no mesh at all", float(express["direct"]), COLOURS["other"]),
        ("Pillion, proxy alone", float(proxy["pillion"]) * scale, COLOURS["pillion"]),
        ("Envoy", float(express["envoy"]), COLOURS["other"]),
    ]


def svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """The picture; "" without the rows it needs."""
    found = bars(rows)
    if not found:
        return ""
    most = max(value for _, value, _ in found)
    room = WIDTH - LABEL - 90
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TOP + len(found) * (BAR + GAP) + 8}" '
        'font-family="system-ui, sans-serif" font-size="14" role="img">',
        "<title>HTTP/1.1 requests a second between two workloads of one node</title>",
        f'<rect width="{WIDTH}" height="100%" fill="white"/>',
        '<text x="12" y="24" font-size="16" font-weight="600">HTTP/1.1 requests a second, two workloads of one node</text>',
        f'<text x="12" y="43" fill="#475569">{UNDER}</text>',
    ]
    for index, (who, value, colour) in enumerate(found):
        y = TOP + index * (BAR + GAP)
        size = max(1, round(room * value / most))
        lines += [
            f'<text x="{LABEL - 10}" y="{y + 18}" text-anchor="end">{escape(who)}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{size}" height="{BAR}" rx="3" fill="{colour}"/>',
            f'<text x="{LABEL + size + 8}" y="{y + 18}">{value / 1000:,.0f} k</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    text = svg(rows)
    if text:
        path.write_text(text)
