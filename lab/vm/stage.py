"""The project as it is now, for a quick VM: it sees this copy in the project's place, whatever is edited meanwhile. Compiled,
for in emulation compiling is most of a start. The virtual environment is copied by hard links: it may be made anew meanwhile.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lab.vm.kernels import CACHE, tool

PROJECT = Path(__file__).resolve().parents[2]
LEFT_OUT = (".venv", ".git", ".mypy_cache", ".ruff_cache", ".hypothesis", ".pytest_cache", "__pycache__", "build", "dist")


def snapshots_of(lab: str) -> Path:
    return CACHE / "snapshots" / lab


def take(lab: str, vm: str) -> Path:
    place = snapshots_of(lab) / vm
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(PROJECT, place, ignore=shutil.ignore_patterns(*LEFT_OUT))
    tool(sys.executable, "-m", "compileall", "-q", "-s", str(place), "-p", str(PROJECT), str(place))
    venv = PROJECT / ".venv"
    if venv.is_dir():
        linked = ["-l"] if venv.stat().st_dev == place.stat().st_dev else []
        tool("cp", "-a", *linked, str(venv), str(place / ".venv"))
    return place
