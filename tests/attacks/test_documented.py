"""docs/security.md names the tests that show what it claims: they are there, and no row's test is left out."""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
TEXT = (PROJECT / "docs/security.md").read_text()
ROWS = {
    int(number): line
    for line in TEXT.splitlines()
    if (number := line.split("|")[1].strip() if line.count("|") > 4 else "").isdigit()
}


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w./*-]+)`", TEXT)
    assert named
    missing = [name for name in named if not list(PROJECT.glob(name.rstrip("/")))]
    assert not missing


def test_every_row_names_all_its_tests() -> None:
    files = [path.relative_to(PROJECT) for path in PROJECT.glob("tests/attacks/test_[0-9]*.py")]
    assert files
    for path in files:
        number = int(path.name.split("_")[1])
        assert number in ROWS, f"{path} is of a row that docs/security.md does not tell of"
        assert f"`{path}`" in ROWS[number], f"row {number} of docs/security.md does not name {path}"
