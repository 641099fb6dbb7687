"""Taking a lab away by its name alone, whatever state it is in: no file of the lab is asked or believed."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from lab import cgroups, netns
from lab.state import CHECKOUT, LabError
from lab.topology import LAB_NAME, RUN_ROOT, Paths

MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_libc = ctypes.CDLL(None, use_errno=True)


def remove(name: str) -> None:
    """Processes, mounts, cgroups, namespaces and files of a lab. Safe to repeat; with the lab's lock held."""
    base, root = Paths(name).base, cgroups.lab_root(name)
    cgroups.kill(root)
    unmount_below(base)
    cgroups.remove(root)
    for each in netns.names(f"pl-{name}-"):
        netns.delete(each)
    if base.exists():
        shutil.rmtree(base)


def unmount_below(base: Path) -> None:
    """Unmount what is mounted below a folder (the agents' bpffs), the innermost first."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].replace("\\040", " ")
        if Path(point).is_relative_to(base):
            mounts.append(point)
    for point in reversed(mounts):
        if _libc.umount2(os.fsencode(point), MNT_DETACH | UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            raise LabError(f"{point} does not unmount: {os.strerror(number)}", f"run: umount -l {point}")


def known_labs() -> list[str]:
    """Labs with any trace on this machine, also half-made ones."""
    found = {path.name.removesuffix(".lock") for path in RUN_ROOT.iterdir()} if RUN_ROOT.is_dir() else set()
    for name in netns.names("pl-"):
        lab = name.split("-")[1]
        if LAB_NAME.fullmatch(lab) and (cgroups.lab_root(lab) / "supervise").is_dir():  # a lab's own mark
            found.add(lab)
    return sorted(found)


def take_down(
    what: str, names: Iterable[str], down: Callable[[str], object], command: str, whose: Callable[[str], str] | None = None
) -> None:
    """Says of each what became of it. With `whose`, which tells a name's checkout: those of this one alone."""
    for name in names:
        if whose is not None and (checkout := whose(name)) != CHECKOUT:
            stays = f"{what} {name} stays: {checkout or 'unknown'} is its checkout"
            print(f"{stays}; else: {command} --name {name}", file=sys.stderr)
            continue
        down(name)
        print(f"{what} {name} is down, nothing of it is left", file=sys.stderr)
