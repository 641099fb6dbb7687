"""The harness itself: patches fit, and no attack stands without its proof."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.attacks import mutants

HERE = Path(__file__).parent
_MARK = re.compile(r'^@pytest\.mark\.(attack|red)\(\s*"([^"]+)"', re.MULTILINE)
ROW_FILES = sorted(HERE.glob("test_[0-9]*.py"))
for row_file in ROW_FILES:  # each declares its mutants
    importlib.import_module(f"tests.attacks.{row_file.stem}")


@pytest.mark.parametrize("group", sorted({mutant.group for mutant in mutants.ALL}))
def test_every_patch_fits(tmp_path: Path, group: str) -> None:
    mutants.mutated(tmp_path, mutants.members(group))


@pytest.mark.parametrize("path", ROW_FILES, ids=lambda path: path.stem)
def test_every_attack_is_seen_to_succeed_without_its_defence(path: Path) -> None:
    marks = _MARK.findall(path.read_text())
    attacks, reds = ({name for kind, name in marks if kind == wanted} for wanted in ("attack", "red"))
    assert attacks, "no attack"
    assert attacks == reds
