"""The README's picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench import picture

ROWS = [
    {"name": "express-http1", "pillion": 200_000.0, "direct": 100_000.0, "envoy": 20_000.0},
    {"name": "http1-same-node", "pillion": 25_000.0, "direct": 50_000.0, "envoy": 12_000.0},
]


def test_parties_of_two_runs_stand_on_one_scale() -> None:
    assert {who: value for who, value, _ in picture.bars(ROWS)} == {
        "Pillion, carried by the kernel": 200_000,
        "no mesh at all": 100_000,
        "Pillion, proxy alone": 50_000,
        "Envoy": 20_000,
    }


def test_it_is_a_picture_and_the_longest_bar_is_the_largest_number() -> None:
    root = ElementTree.fromstring(picture.svg(ROWS))
    widths = [int(rect.get("width", "")) for rect in root.iter("{http://www.w3.org/2000/svg}rect") if rect.get("rx")]
    assert widths == sorted(widths, reverse=True) and len(widths) == 4


def test_without_its_rows_there_is_none_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "bench.svg"
    path.write_text("old")
    picture.write(ROWS[:1], path)
    assert path.read_text() == "old"
    picture.write(ROWS, path)
    assert path.read_text().startswith("<svg")
