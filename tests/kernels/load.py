"""The load on both machines: what it asks, and what was lost while something happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from lab.vm import VmHandle
from tests.deploy import shop
from tests.deploy.shop import answered

PATIENCE_S = 60.0  # far more than a restart of anything takes, in emulation too
ASKED = (  # what, how, and the pause between two requests
    (shop.WEB, "keep", 0.1),
    (shop.WEB, "paired", 0.02),  # close upon each other, as a connection must have that the kernel is to carry
    (shop.WEB, "fresh", 0.3),
    (shop.ECHO, "keep", 0.1),
    (shop.ECHO, "fresh", 0.3),
)
KINDS = {
    f"{url.partition(':')[0]} {kind}": {
        "url": url,
        "keep": kind != "fresh",
        "connections": 1,
        "pause_s": pause_s,
        "patience_s": PATIENCE_S,
    }
    for url, kind, pause_s in ASKED
}
WHERE = {"n1": "across", "n2": "within"}  # the servers are on n2
MORE = 4  # requests of each kind that must have been answered since, before an event counts as over


def start(vm: VmHandle) -> None:
    """`client` of the mesh, asking from now on."""
    shop.ask(vm, KINDS)


def counts(vm: VmHandle) -> shop.Counts:
    """By kind, `within, http fresh` for example; empty before there are any."""
    return {f"{WHERE[vm.name]}, {kind}": each for kind, each in shop.counts(vm).items()}


def goes(vm: VmHandle, least: int = MORE) -> bool:
    """Whether each kind was answered so often."""
    found = counts(vm)
    return bool(found) and all(answered(each) > least for each in found.values())


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
        if all(answered(after[name][kind]) - answered(each) >= MORE for name in over for kind, each in over[name].items()):
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
