"""Starts the loader: a child that compiles, attaches, pins and exits, so that the agent never holds a compiler."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nodeagent.datapath_api import DatapathError, SchemaMismatch
from nodeagent.libbpf import is_bpffs, libc

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = PROJECT / "bpf"
LOADER_TIMEOUT_S = 150.0
EXIT_SCHEMA = 3
STDERR_BYTES_MAX = 2000


def mount_bpffs(path: Path) -> None:
    """A bpffs of our own, for root alone, unless there is one. Raises DatapathError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_bpffs(path):
        return
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700"):
        raise DatapathError(f"mount bpffs on {path}: {os.strerror(ctypes.get_errno())}")


def run_child(module: str, arguments: Sequence[str]) -> bytes:
    """Standard output of ``python -m module``. Raises SchemaMismatch, DatapathError with its last words."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    try:
        child = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LOADER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DatapathError(f"{module} took more than {LOADER_TIMEOUT_S:g} s; what was attached before still is") from None
    if child.returncode:
        said = child.stderr.decode(errors="replace").strip()[-STDERR_BYTES_MAX:]
        kind = SchemaMismatch if child.returncode == EXIT_SCHEMA else DatapathError
        raise kind(f"{module} ended with {child.returncode}: {said}")
    return child.stdout


def unload(bpf_dir: Path) -> None:
    """Detach the programs and remove the pins. Raises DatapathError."""
    if is_bpffs(bpf_dir):
        run_child("nodeagent.loader", ["--bpf-dir", str(bpf_dir), "--unload"])


def run_loader(cgroup: Path, bpf_dir: Path, layouts: Path) -> dict[str, bool]:
    """Load and attach the programs; program -> attached. Raises DatapathError, SchemaMismatch; what stood then still stands."""
    mount_bpffs(bpf_dir)
    out = run_child(
        "nodeagent.loader", ["--cgroup", str(cgroup), "--bpf-dir", str(bpf_dir), "--src", str(SOURCES), "--layouts", str(layouts)]
    )
    try:
        status: dict[str, bool] = json.loads(out)["programs"]
    except (ValueError, KeyError) as error:
        raise DatapathError(f"the loader's answer makes no sense: {error!r}; this is a bug") from None
    return status
