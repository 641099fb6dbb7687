"""Processes that leave their workload's cgroup, and with it their identity: to another workload's, or out of the mesh.

Only who may write cgroup files can do that, or have it done (a session of PAM's, say). Nothing in the kernel stops it, and no
program of ours sees it: it is looked for, told and counted. Who comes and goes between two looks is not seen, nor is a child
that was born elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from nodeagent import cgroups

WATCHED_MAX = 65_536  # processes
STRAYS_MAX = 256

log = structlog.get_logger()


class Stray(NamedTuple):
    """A process that lives elsewhere than where its workload does."""

    pid: int
    workload: str  # namespace/name, as it was
    into: str  # another's namespace/name, or the cgroup's path
    born: int  # ticks since boot


class Moves:
    """`look` now and then, always with the same ``proc``."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._known: dict[int, tuple[str, int]] = {}  # pid -> workload, born
        self._strays: dict[int, Stray] = {}
        self.counts = {"process_moved_out": 0, "process_moved_between": 0}  # since the start of this agent

    def look(self, groups: Mapping[str, Path]) -> None:
        """``groups``: of the workloads, namespace/name -> cgroup. Never raises."""
        now: dict[int, str] = {}
        for workload, path in groups.items():
            now |= dict.fromkeys(cgroups.pids(path)[: max(0, WATCHED_MAX - len(now))], workload)
        for pid, (workload, born) in self._known.items():
            # One whose workload is withdrawn is nobody's business any more
            if now.get(pid) != workload and workload in groups and self._born(pid) == born:
                self._moved(pid, workload, born, now, groups[workload])
        self._strays = {
            pid: stray for pid, stray in self._strays.items() if now.get(pid) != stray.workload and self._born(pid) == stray.born
        }
        known = {pid: self._known.get(pid) for pid in now}
        self._known = {
            pid: seen if (seen := known[pid]) is not None and seen[0] == workload else (workload, self._born(pid))
            for pid, workload in now.items()
        }

    def _moved(self, pid: int, workload: str, born: int, now: dict[int, str], group: Path) -> None:
        if pid not in now and pid in cgroups.pids(group):  # within its own, while we looked
            now[pid] = workload
            return
        home = self._strays.get(pid)
        if home is not None and now.get(pid) == home.workload:
            return
        into = now.get(pid) or self._path(pid)
        if not into or self._born(pid) != born:  # it has ended meanwhile
            return
        self.counts["process_moved_between" if pid in now else "process_moved_out"] += 1
        log.warning("process_moved", pid=pid, workload=workload, into=into)
        if home is not None or len(self._strays) < STRAYS_MAX:
            self._strays[pid] = Stray(pid, home.workload if home else workload, into, born)

    def report(self) -> dict[str, Any]:
        """For `GET /v1/status`. From any thread."""
        strays = [{"pid": stray.pid, "workload": stray.workload, "into": stray.into} for stray in self._strays.values()]
        return {**self.counts, "strays": strays}

    def _born(self, pid: int) -> int:
        """0: there is none, or it has ended."""
        try:
            fields = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
            return 0 if fields[0] in "ZX" else int(fields[19])
        except (OSError, ValueError, IndexError):
            return 0

    def _path(self, pid: int) -> str:
        try:
            lines = (self._proc / str(pid) / "cgroup").read_text().splitlines()
        except OSError:
            return ""
        return next((line[3:] for line in lines if line.startswith("0::")), "?")
