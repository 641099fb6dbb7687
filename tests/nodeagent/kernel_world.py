"""Two workloads on one kernel for tests of the data path: cgroups, namespaces joined by a veth pair, and processes in
both. Everything carries our pid in its name and goes away at the end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lab.pace import PATIENCE
from nodeagent import cgroups
from nodeagent.datapath_live import Datapath

DEADLINE_S = 10.0 * PATIENCE


def sh(*argv: str) -> str:
    """Run a command that must succeed; its output."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for it. Raises AssertionError."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.01)


class Place:
    """A workload's netns and cgroup."""

    def __init__(self, netns: str, cgroup: Path, addresses: tuple[str, ...]) -> None:
        self.name, self.cgroup, self.addresses = netns, cgroup, addresses
        self.path = Path("/run/netns") / netns
        self.started: list[subprocess.Popen[str]] = []

    @property
    def cgroup_id(self) -> int:
        return cgroups.cgroup_id(self.cgroup)

    def start(self, code: str, cgroup: Path | None = None) -> subprocess.Popen[str]:
        """A python in there; ``code`` has socket, sys and say(text) at hand. Talks by lines."""
        prologue = "import socket, sys, time\ndef say(*a): print(*a, flush=True)\n"
        shell = 'echo $$ > "$1/cgroup.procs"; exec ip netns exec "$2" "$3" -c "$4"'
        argv = ["sh", "-c", shell, "-", str(cgroup or self.cgroup), self.name, sys.executable, prologue + code]
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.started.append(child)
        return child

    def run(self, code: str, cgroup: Path | None = None) -> str:
        """What it said, once it ended."""
        child = self.start(code, cgroup)
        out, _ = child.communicate(timeout=DEADLINE_S)
        return out.strip()


class World:
    """``a`` and ``b``; this process is in the agent's cgroup meanwhile."""

    def __init__(self, directory: Path) -> None:
        tag = f"pl-kern-{os.getpid()}"
        self.root = cgroups.mount() / f"pillion-kern-{os.getpid()}"
        self.cgroup = self.root / "n1"
        for name in ("agent", "proxy", "workloads/a", "workloads/b"):
            cgroups.create(self.cgroup / name)
        self.bpf_dir, self.run_dir = directory / "bpf", directory
        self.a = Place(f"{tag}-a", self.cgroup / "workloads/a", ("10.99.7.1", "fd99:7::1"))
        self.b = Place(f"{tag}-b", self.cgroup / "workloads/b", ("10.99.7.2", "fd99:7::2"))

    def up(self) -> None:
        for place in (self.a, self.b):
            sh("ip", "netns", "add", place.name)
            sh("ip", "-n", place.name, "link", "set", "lo", "up")
        sh("ip", "-n", self.a.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.b.name)
        for place in (self.a, self.b):
            sh("ip", "-n", place.name, "addr", "add", f"{place.addresses[0]}/24", "dev", "eth0")
            sh("ip", "-n", place.name, "addr", "add", f"{place.addresses[1]}/64", "dev", "eth0", "nodad")
            sh("ip", "-n", place.name, "link", "set", "eth0", "up")

    def down(self, home: Path) -> None:
        for place in (self.a, self.b):
            for child in place.started:
                child.kill()
                child.communicate()
        cgroups.move(home, os.getpid())
        subprocess.run(["umount", "-l", str(self.bpf_dir)], check=False, capture_output=True)
        cgroups.remove(self.root)
        for place in (self.a, self.b):
            subprocess.run(["ip", "netns", "del", place.name], check=False, capture_output=True)


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Made, and taken away whatever happens."""
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    home = cgroups.mount() / line[3:].lstrip("/")
    with tempfile.TemporaryDirectory(prefix="pillion-kern-") as directory:
        made = World(Path(directory))
        try:
            made.up()
            cgroups.move(made.cgroup / "agent", os.getpid())
            yield made
        finally:
            made.down(home)


@contextlib.contextmanager
def loaded() -> Iterator[tuple[World, Datapath]]:
    """The same with the programs attached."""
    with world() as made:
        datapath = Datapath(made.cgroup, made.bpf_dir, made.run_dir)
        try:
            datapath.load()
            yield made, datapath
        finally:
            datapath.close()
            datapath.unload()
