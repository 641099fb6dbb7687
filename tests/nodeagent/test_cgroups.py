"""Cgroups of our own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent import cgroups

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
    assert cgroups.parse_mount(HYBRID) == Path("/sys/fs/cgroup/unified")
    assert cgroups.parse_mount(HYBRID.splitlines()[0]) is None
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
