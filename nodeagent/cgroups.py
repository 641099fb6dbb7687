"""Cgroups of version 2: where they are mounted, who is in them, their ids (a cgroup's id is its inode, which is what
bpf_get_current_cgroup_id says) and levels (depth below the root, what bpf_get_current_ancestor_cgroup_id counts).

In a cgroup namespace (a container's) the mount shows a part of the tree, and /proc tells paths from there; the kernel's programs
count from the true root all the same."""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time
from pathlib import Path

EVENTS_WAIT_S = 5.0
AGENT_SLICE = "pillion-agent.slice"  # of deploy/systemd
ROOT_ID = 1  # of the hierarchy's root
_HANDLE_KERNFS = 0xFE  # <linux/exportfs.h>: a file handle that is an id


class CgroupError(Exception):
    """A cgroup could not be used; the message says what to do."""


def parse_mounts(mountinfo: str) -> list[Path]:
    """The cgroup2 mounts in /proc/<pid>/mountinfo text (``/sys/fs/cgroup``, or ``…/unified`` beside v1)."""
    found = []
    for line in mountinfo.splitlines():
        fields, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            found.append(Path(fields.split(" ")[4].replace("\\040", " ")))
    return found


def mounts() -> list[Path]:
    """Where cgroup2 is mounted, once or more. Raises CgroupError."""
    found = parse_mounts(Path("/proc/self/mountinfo").read_text())
    if not found:
        raise CgroupError("no cgroup2 is mounted: mount one, e.g. `mount -t cgroup2 none /sys/fs/cgroup/unified`")
    return found


def mount() -> Path:
    """The first of them. Raises CgroupError."""
    return mounts()[0]


def cgroup_id(path: Path) -> int:
    """The id programs see. Raises OSError."""
    return path.stat().st_ino


def level(path: Path) -> int:
    """Depth below the hierarchy's root: 0 is the root itself. Raises CgroupError for a path outside it."""
    tops = mounts()
    for top in sorted((top.resolve() for top in tops), key=lambda top: len(top.parts), reverse=True):
        if path.resolve().is_relative_to(top):
            return _above(top) + len(path.resolve().relative_to(top).parts)
    raise CgroupError(f"{path} is not a cgroup: give a directory below the cgroup2 mount {tops[0]}")


def _above(top: Path) -> int:
    """The level at which a mount begins; 0 unless it was made in a cgroup namespace, or shows a part only. Raises CgroupError."""
    wanted = cgroup_id(top)
    if wanted == ROOT_ID:
        return 0
    try:
        root = _root(top)
    except OSError as error:
        raise CgroupError(
            f"{top} shows a part of the machine's cgroups, and the kernel does not tell which ({error.strerror}): run the agent "
            "in the host's cgroup namespace, mount the host's whole cgroup2 tree for it, or give it CAP_DAC_READ_SEARCH"
        ) from error
    try:
        for directory, _, _, fd in os.fwalk(".", dir_fd=root):
            if os.fstat(fd).st_ino == wanted:
                return directory.count("/")
    finally:
        os.close(root)
    raise CgroupError(f"{top} shows a cgroup that was removed: mount cgroup2 anew, and start the agent again")


class _Handle(ctypes.Structure):
    """struct file_handle"""

    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("id", ctypes.c_uint8 * 8))


def _root(top: Path) -> int:
    """A descriptor of the hierarchy's root, which a mount may not lead to. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = _Handle(8, _HANDLE_KERNFS, (ctypes.c_uint8 * 8)(*ROOT_ID.to_bytes(8, sys.byteorder)))
    mounted = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = int(libc.open_by_handle_at(mounted, ctypes.byref(handle), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    finally:
        os.close(mounted)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


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
    """The cgroup this process is in. Raises CgroupError where no mount shows it."""
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    told = mount() / line[3:].lstrip("/")
    if _is_in(told):
        return told
    for top in mounts():  # told from the root of our namespace: the mount begins elsewhere
        for directory, _, _ in os.walk(top):
            if _is_in(Path(directory)):
                return Path(directory)
    raise CgroupError(f"no cgroup2 mount shows the cgroup of this process ({line[3:]}): mount the host's for it")


def _is_in(path: Path) -> bool:
    """Whether this process is a member of that very cgroup."""
    try:
        return str(os.getpid()) in (path / "cgroup.procs").read_text().split()
    except OSError:
        return False


def own_cgroup() -> int:
    """Its id."""
    return cgroup_id(own_path())


def agent_path() -> Path:
    """What the agent is known by: its own cgroup, or the slice that is its alone and outlives it. Sockets it made for the
    proxy belong there still when the next agent comes."""
    own = own_path()
    return own.parent if own.parent.name == AGENT_SLICE else own
