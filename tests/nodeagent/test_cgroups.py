"""Cgroups of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent import cgroups

PROJECT = Path(__file__).parents[2]
HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
"""


@pytest.fixture
def group() -> Iterator[Path]:
    path = cgroups.mount() / f"pillion-kern-cg-{os.getpid()}"
    cgroups.create(path)
    yield path
    cgroups.remove(path)


def test_the_mount_is_found() -> None:
    assert cgroups.parse_mounts(HYBRID) == [Path("/sys/fs/cgroup/unified")]
    assert cgroups.parse_mounts(HYBRID.splitlines()[0]) == []
    assert (cgroups.mount() / "cgroup.procs").exists()


def test_levels_and_ids(group: Path) -> None:
    inner = group / "workloads" / "web"
    assert cgroups.create(inner) == inner.stat().st_ino == cgroups.cgroup_id(inner)
    assert (cgroups.level(group), cgroups.level(inner)) == (1, 3)
    lineages = cgroups.lineages(group)
    assert lineages[cgroups.cgroup_id(inner)] == tuple(cgroups.cgroup_id(path) for path in (inner, inner.parent, group))
    with pytest.raises(cgroups.CgroupError, match="not a cgroup"):
        cgroups.level(Path("/tmp"))


def test_programs_are_never_attached_to_the_root(group: Path) -> None:
    assert cgroups.attachable(group) == group
    with pytest.raises(cgroups.CgroupError, match="root cgroup"):
        cgroups.attachable(cgroups.mount())
    with pytest.raises(cgroups.CgroupError, match="does not exist"):
        cgroups.attachable(group / "nothere")


# What runs in a cgroup namespace, as in a container: argv: the cgroup to be rooted at, where to mount cgroup2 ("" nowhere), the
# cgroup that is asked about. Prints its level, and its own cgroup's id
CONTAINED = """
import ctypes, os, sys
from pathlib import Path
from nodeagent import cgroups
root, mounted, asked = sys.argv[1:]
Path(root, "cgroup.procs").write_text("0")
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.unshare(0x02000000 | 0x00020000), "CLONE_NEWCGROUP | CLONE_NEWNS"
assert not libc.mount(None, b"/", None, 0x44000, None), "MS_REC | MS_PRIVATE"
if mounted:
    for each in cgroups.mounts():
        assert not libc.umount2(os.fsencode(each), 2)
    assert not libc.mount(b"none", os.fsencode(mounted), b"cgroup2", 0, None)
if os.environ.get("BOUND"):
    libc.prctl(24, 2)  # PR_CAPBSET_DROP, CAP_DAC_READ_SEARCH
    os.execv(sys.executable, [sys.executable, "-c", os.environ["BOUND"], asked])
print(cgroups.level(Path(asked)), cgroups.own_cgroup())
"""
REFUSED = "import sys; from pathlib import Path; from nodeagent import cgroups; print(cgroups.level(Path(sys.argv[1])))"


def contained(root: Path, mounted: object, asked: Path, bound: str = "") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", CONTAINED, str(root), str(mounted), str(asked)]
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "BOUND": bound}
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=30, check=False)


def test_a_namespace_of_cgroups_moves_no_level(group: Path, tmp_path: Path) -> None:
    """The kernel's programs count from the root of the machine, whatever a container sees of it."""
    pod, inner = group / "pod", group / "pod" / "n1"
    cgroups.create(inner)
    whole = contained(pod, "", inner)  # the host's mount is still there: /proc tells "0::/" all the same
    assert whole.stdout.split() == ["3", str(cgroups.cgroup_id(pod))], whole.stderr
    part = contained(pod, tmp_path, tmp_path / "n1")
    assert part.stdout.split() == ["3", str(cgroups.cgroup_id(pod))], part.stderr
    top = contained(pod, tmp_path, tmp_path)
    assert top.stdout.split()[0] == "2", top.stderr


def test_where_the_kernel_does_not_tell_the_level_it_is_not_guessed(group: Path, tmp_path: Path) -> None:
    cgroups.create(group / "pod" / "n1")
    blind = contained(group / "pod", tmp_path, tmp_path / "n1", REFUSED)
    assert blind.returncode == 1 and "CAP_DAC_READ_SEARCH" in blind.stderr and "cgroup namespace" in blind.stderr, blind


def test_kill_waits_until_all_are_gone(group: Path) -> None:
    inner = group / "deep"
    cgroups.create(inner)
    child = subprocess.Popen(
        ["sh", "-c", f'echo $$ > "{inner}/cgroup.procs"; echo in; exec cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"in\n"
    assert cgroups.pids(group) == [child.pid] and cgroups.populated(group)
    cgroups.kill(group)
    assert not cgroups.populated(group)
    assert child.wait(5) == -9
    child.communicate()
    cgroups.remove(group)
    cgroups.remove(group)
    assert not group.exists() and cgroups.pids(group) == [] and not cgroups.populated(group)
