"""Cgroups of the lab: one tree `pillion-<lab>` on cgroup2, never the root itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from lab.pace import PATIENCE
from lab.state import LabError

KILL_TIMEOUT_S = 10.0 * PATIENCE


def mount_point(mountinfo: str | None = None) -> Path:
    """Where cgroup2 is mounted, from /proc/self/mountinfo (it may be /sys/fs/cgroup/unified)."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            return Path(before.split()[4])
    raise LabError("no cgroup2 is mounted", "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")


def lab_root(name: str) -> Path:
    return mount_point() / f"pillion-{name}"


def tree(root: Path) -> Iterator[Path]:
    """The cgroup and all below it, deepest first."""
    for directory, _, _ in os.walk(root, topdown=False):
        yield Path(directory)


def pids(cgroup: Path) -> list[int]:
    """Processes of this very cgroup; none if it is gone."""
    try:
        return [int(line) for line in (cgroup / "cgroup.procs").read_text().split()]
    except (FileNotFoundError, OSError):
        return []


def populated(cgroup: Path) -> bool:
    """Whether any process lives in the cgroup or below."""
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except (FileNotFoundError, OSError):
        return False


def kill(cgroup: Path, timeout_s: float = KILL_TIMEOUT_S) -> None:
    """SIGKILL everything in the cgroup and below and wait until it is gone. Safe if the cgroup does not exist."""
    deadline = time.monotonic() + timeout_s
    while populated(cgroup):
        try:
            (cgroup / "cgroup.kill").write_text("1")
        except FileNotFoundError:  # 5.14+ has it; the project's floor is above
            if cgroup.exists():
                raise LabError("this kernel has no cgroup.kill", "use kernel 5.14 or newer") from None
            return
        if time.monotonic() > deadline:
            raise LabError(f"processes in {cgroup} do not die", f"look at: cat {cgroup}/cgroup.procs")
        time.sleep(0.01)


def remove(cgroup: Path, timeout_s: float = KILL_TIMEOUT_S) -> None:
    """Kill, then remove the tree. Safe to repeat."""
    kill(cgroup, timeout_s)
    deadline = time.monotonic() + timeout_s
    while cgroup.exists():
        for path in tree(cgroup):
            try:
                path.rmdir()
            except FileNotFoundError:
                pass
            except OSError:  # EBUSY while the last exits finish
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                break
