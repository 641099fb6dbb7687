"""The load on both machines: what it asks, and what was lost while something happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.vm import VmHandle

PROGRAMS = Path(__file__).with_name("programs")
COUNTS = "/srv/counts.json"
ADDRESSES = ("http://web.shop.mesh", "tcp://echo.shop.mesh:7000")
WHERE = {"n1": "across", "n2": "within"}  # the servers are on n2
MORE = 4  # requests of each kind that must have been answered since, before an event counts as over
Counts = dict[str, dict[str, Any]]


def start(vm: VmHandle) -> None:
    """`client` of the mesh, asking from now on."""
    for name in ("load.py", "echo.py"):
        vm.put(f"/srv/{name}", (PROGRAMS / name).read_bytes())
    vm.run(["rm", "-f", COUNTS], check=True)
    program = ["/usr/bin/python3", "/srv/load.py", COUNTS, *ADDRESSES]
    unit = ["systemd-run", "-q", "--unit=load", "--collect", "--setenv=HOME=/root"]
    vm.run([*unit, "/usr/local/bin/pillion", "run", "-n", "shop", "--service", "client", "--", *program], check=True, timeout=120)


def counts(vm: VmHandle) -> Counts:
    """By kind, `within fresh http` for example; empty before there are any."""
    done = vm.run(["cat", COUNTS], timeout=120)
    if done.returncode != 0:
        return {}
    return {f"{WHERE[vm.name]}, {kind}": each for kind, each in json.loads(done.stdout).items()}


def goes(vm: VmHandle, least: int = MORE) -> bool:
    """Whether each kind was answered so often."""
    found = counts(vm)
    return bool(found) and all(each["asked"] - each["failed"] > least for each in found.values())


@dataclass(frozen=True)
class Losses:
    """Between two looks."""

    seconds: float
    kinds: dict[str, dict[str, int]]
    why: list[str]

    def recorded(self) -> str:
        return json.dumps({"seconds": self.seconds, "kinds": self.kinds})

    def of(self, *kinds: str) -> int:
        return sum(self.kinds[kind]["failed"] for kind in kinds)


def during(machines: tuple[VmHandle, ...], event: Callable[[], object], patience_s: float = 300.0) -> Losses:
    """What was lost from before the event until all is answered again."""
    before = {vm.name: counts(vm) for vm in machines}
    began = time.monotonic()
    event()
    took = time.monotonic() - began
    over = {vm.name: counts(vm) for vm in machines}
    while True:
        after = {vm.name: counts(vm) for vm in machines}
        if all(_answered(after[name][kind]) - _answered(each) >= MORE for name in over for kind, each in over[name].items()):
            break
        assert time.monotonic() - began < took + patience_s, f"not all is answered again: {after}"
        time.sleep(1)
    kinds = {
        kind: {what: each[what] - before[name][kind][what] for what in ("asked", "failed", "lost")}
        for name in after
        for kind, each in after[name].items()
    }
    why = [f"{kind}: {text}" for found in after.values() for kind, each in found.items() for text in each["why"]]
    return Losses(took, kinds, why)


def _answered(each: dict[str, Any]) -> int:
    return int(each["asked"]) - int(each["failed"])
