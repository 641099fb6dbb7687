"""The project inside a VM: a copy taken now, at the same path, compiled (in emulation compiling is most of a start)."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from lab.vm.handle import VmHandle
from lab.vm.kernels import tool

PROJECT = Path(__file__).resolve().parents[2]
LEFT_OUT = (".venv", ".git", ".mypy_cache", ".ruff_cache", ".hypothesis", ".pytest_cache", "__pycache__", "build", "dist")


def into(vm: VmHandle) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        tool(sys.executable, "-m", "compileall", "-q", "-s", str(copy), "-p", str(PROJECT), str(copy))
        vm.copy_in(copy, str(PROJECT))
