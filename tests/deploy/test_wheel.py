"""The wheel: carries the programs' sources where the agent looks for them, and is the same each time."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> Path:
    environment = {**os.environ, "PYTHON": sys.executable, "BUILD_WITH": "own"}
    done = subprocess.run(
        [str(ROOT / "deploy/wheel.sh"), str(folder)], env=environment, capture_output=True, text=True, check=True, timeout=110
    )
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_all_sources_are_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {f"bpf/{path.name}" for path in (ROOT / "bpf").iterdir() if path.suffix in (".c", ".h")}
    assert names >= {f"lab/demo/services/{path.name}" for path in (ROOT / "lab/demo/services").iterdir() if path.is_file()}
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]


def test_the_agent_finds_them(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from nodeagent.loading import SOURCES; print(SOURCES, (SOURCES / 'types.h').exists())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "bpf"), "True"]


def test_commands(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    names = [line.split(" = ")[0] for line in archive.read(entry).decode().splitlines() if " = " in line]
    assert names == ["pillion", "pillion-agent", "pillion-controller", "pillion-proxy"]


def test_the_same_sources_give_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    assert build(tmp_path).read_bytes() == wheel.read_bytes()


def test_the_checkout_stays_as_it_was(wheel: Path) -> None:
    assert not (ROOT / "build").exists()
