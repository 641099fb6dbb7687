"""Cgroups of version 2: where they are mounted, who is in them, their ids (a cgroup's id is its inode, which is what
bpf_get_current_cgroup_id says) and levels (depth below the root, what bpf_get_current_ancestor_cgroup_id counts)."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

EVENTS_WAIT_S = 5.0
AGENT_SLICE = "pillion-agent.slice"  # of deploy/systemd


class CgroupError(Exception):
    """A cgroup could not be used; the message says what to do."""


def parse_mount(mountinfo: str) -> Path | None:
    """The first cgroup2 mount in /proc/<pid>/mountinfo text (``/sys/fs/cgroup``, or ``…/unified`` beside v1), or None."""
    for line in mountinfo.splitlines():
        fields, _, after = line.partition(" - ")
        kind = after.split(" ", 1)[0]
        if kind == "cgroup2":
            return Path(fields.split(" ")[4].replace("\\040", " "))
    return None


def mount() -> Path:
    """Where cgroup2 is mounted. Raises CgroupError."""
    found = parse_mount(Path("/proc/self/mountinfo").read_text())
    if found is None:
        raise CgroupError("no cgroup2 is mounted: mount one, e.g. `mount -t cgroup2 none /sys/fs/cgroup/unified`")
    return found


def cgroup_id(path: Path) -> int:
    """The id programs see. Raises OSError."""
    return path.stat().st_ino


def level(path: Path, root: Path | None = None) -> int:
    """Depth below the cgroup2 mount: 0 is the root itself. Raises CgroupError for a path outside it."""
    try:
        return len(path.resolve().relative_to((root or mount()).resolve()).parts)
    except ValueError:
        raise CgroupError(f"{path} is not a cgroup: give a directory below the cgroup2 mount {root or mount()}") from None


def attachable(path: Path) -> Path:
    """``path`` if programs may be attached there: an existing cgroup that is not the root. Raises CgroupError."""
    if level(path) == 0:
        raise CgroupError(f"{path} is the root cgroup: every process of the machine would be in the mesh; give a cgroup below it")
    if not path.is_dir():
        raise CgroupError(f"{path} does not exist: make it first")
    return path


def create(path: Path) -> int:
    """Make the cgroup and its parents; its id. An existing one is fine."""
    path.mkdir(parents=True, exist_ok=True)
    return cgroup_id(path)


def move(path: Path, pid: int = 0) -> None:
    """Put a process (0: the caller) into the cgroup. Its open sockets keep the identity they were made with."""
    (path / "cgroup.procs").write_text(str(pid))


def pids(path: Path) -> list[int]:
    """Processes in the cgroup and all below it; empty when it is gone."""
    found: list[int] = []
    for directory, _, files in os.walk(path):
        if "cgroup.procs" in files:
            try:
                found += [int(pid) for pid in (Path(directory) / "cgroup.procs").read_text().split()]
            except OSError:
                continue  # removed while we walked
    return found


def populated(path: Path) -> bool:
    """Whether any process lives in the cgroup or below."""
    try:
        return "populated 1" in (path / "cgroup.events").read_text()
    except FileNotFoundError:
        return False


def kill(path: Path, wait_s: float = EVENTS_WAIT_S) -> None:
    """SIGKILL everything in the cgroup and below, and wait until it is empty. Raises CgroupError after ``wait_s``."""
    try:
        events = os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        (path / "cgroup.kill").write_text("1")
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        deadline = time.monotonic() + wait_s
        while populated(path):
            left = deadline - time.monotonic()
            if left <= 0:
                raise CgroupError(f"{path} still has processes {pids(path)[:8]} {wait_s} s after SIGKILL: uninterruptible sleep?")
            poller.poll(min(left, 0.5) * 1000)
            os.pread(events, 64, 0)
    finally:
        os.close(events)


def remove(path: Path) -> None:
    """Kill what is in there, then remove the cgroup and all below it. One that is gone is fine."""
    kill(path)
    for directory, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            continue


def lineages(ancestor: Path) -> dict[int, tuple[int, ...]]:
    """Id of the cgroup and of each below it -> ids from itself up to ``ancestor``. Those removed meanwhile are left out."""
    found: dict[int, tuple[int, ...]] = {}
    known: dict[Path, tuple[int, ...]] = {}
    for directory, _, _ in os.walk(ancestor):
        path = Path(directory)
        try:
            known[path] = (cgroup_id(path), *known.get(path.parent, ()))
        except OSError:
            continue
        found[known[path][0]] = known[path]
    return found


def own_path() -> Path:
    """The cgroup this process is in."""
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return mount() / line[3:].lstrip("/")


def own_cgroup() -> int:
    """Its id."""
    return cgroup_id(own_path())


def agent_path() -> Path:
    """What the agent is known by: its own cgroup, or the slice that is its alone and outlives it. Sockets it made for the
    proxy belong there still when the next agent comes."""
    own = own_path()
    return own.parent if own.parent.name == AGENT_SLICE else own
