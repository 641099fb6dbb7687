"""Starts the loader: a child that compiles, attaches, pins and exits, so that the agent never holds a compiler."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from nodeagent.datapath_api import DatapathError, SchemaMismatch
from nodeagent.libbpf import is_bpffs, libc

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = PROJECT / "bpf"
# A slow host, or one in emulation, compiles for minutes: it may, while it gets anywhere
LOADER_S_MAX = 1800.0
IDLE_S_MAX = 120.0  # without any processor time
LOOK_S = 0.5
TOLD_EVERY_S = 10.0
EXIT_SCHEMA = 3
STDERR_BYTES_MAX = 2000
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_under_way: dict[int, tuple[str, float]] = {}  # pid of a child -> its module, since when

log = structlog.get_logger()


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
    argv, pipe = [sys.executable, "-m", module, *arguments], subprocess.PIPE
    with subprocess.Popen(argv, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as child:
        try:
            out, errors = _watched(child, module)
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        said = errors.decode(errors="replace").strip()[-STDERR_BYTES_MAX:]
        kind = SchemaMismatch if child.returncode == EXIT_SCHEMA else DatapathError
        raise kind(f"{module} ended with {child.returncode}: {said}")
    return out


def _watched(child: subprocess.Popen[bytes], module: str) -> tuple[bytes, bytes]:
    """Its output and errors. Raises DatapathError if it hangs."""
    began = moved = told = time.monotonic()
    used = 0.0
    _under_way[child.pid] = module, began
    try:
        while True:
            try:
                return child.communicate(timeout=LOOK_S)
            except subprocess.TimeoutExpired:
                now, before, used = time.monotonic(), used, _processor_s(child.pid)
            if used > before:
                moved = now
            if now - began > LOADER_S_MAX:
                raise DatapathError(f"{module} took more than {LOADER_S_MAX:g} s; what was attached before still is")
            if now - moved > IDLE_S_MAX:
                raise DatapathError(f"{module} did nothing for {IDLE_S_MAX:g} s; what was attached before still is")
            if now - told >= TOLD_EVERY_S:
                told = now
                log.info("compiling", module=module, seconds=round(now - began), processor_seconds=round(used, 1))
    finally:
        del _under_way[child.pid]


def _processor_s(pid: int) -> float:
    """What a process has used so far, its children included; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(field) for field in fields[11:15]) * _TICK_S


def under_way() -> str:
    """What is being compiled for this kernel now, and for how long; "" for nothing. From any thread."""
    now, found = time.monotonic(), []
    for module, began in tuple(_under_way.values()):
        seconds = int((now - began) // TOLD_EVERY_S * TOLD_EVERY_S)
        found.append(f"{module}, {seconds} s so far" if seconds else module)
    return f"compiling for this kernel: {'; '.join(sorted(found))}" if found else ""


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
