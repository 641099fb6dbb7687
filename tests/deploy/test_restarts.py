"""The table of docs/hosts.md: how it gets there, and that what stands there is what must hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.restarts import BEGIN, END, EVENTS, KINDS, UPGRADE, Lost, never_lost, table, written

TEXT = (Path(__file__).resolve().parents[2] / "docs/hosts.md").read_text()


def test_a_table_is_replaced_and_nothing_else() -> None:
    lost = Lost(dict.fromkeys(KINDS, 1200), {**dict.fromkeys(KINDS, 0), "HTTP, open": 3}, {})
    fresh = table({"kill -9 of the proxy": lost})
    cells = ("3 of 1,200" if kind == "HTTP, open" else "0 of 1,200" for kind in KINDS)
    assert f"| kill -9 of the proxy | {' | '.join(cells)} |\n" in fresh
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert written(text, fresh) == f"before\n{BEGIN}\n{fresh}{END}\nafter\n"
    with pytest.raises(ValueError, match="restarts"):
        written("no place", fresh)


def test_what_was_seen_is_what_must_hold() -> None:
    lines = TEXT.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = {cells[1].strip(): [cell.split() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines[2:])}
    assert set(rows) == {*EVENTS, UPGRADE}
    for event, cells in rows.items():
        lost = {kind: int(cell[0]) for kind, cell in zip(KINDS, cells, strict=True)}
        assert not any(lost[kind] for kind in never_lost(event)), event
        assert all(int(cell[2].replace(",", "")) > 300 for cell in cells), event
