"""``python -m tests.deploy.restarts --write docs/hosts.md``: what is lost when a unit is restarted, upgraded or killed, counted.

A host of lab/host, installed by deploy/install.sh, with services enrolled by `pillion enrol` and a load of each kind of
connection. Counts, not times: they are as good on a busy machine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.host import Container
from lab.state import LabError
from lab.vm import hosts
from tests.deploy import shop
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, service

BEGIN, END = "<!-- restarts: made by python -m tests.deploy.restarts -->", "<!-- restarts: end -->"
AFTER = 300  # requests of each kind that must have been answered since, before an event counts as over
WAIT_S = 300.0
NODE, CONTROLLER = ("pillion-agent", "pillion-proxy"), ("pillion-controller",)

KINDS: dict[str, dict[str, Any]] = {
    "native, open": {"url": shop.ECHO, "keep": True, "connections": 8, "pause_s": 0.02},
    "native, new": {"url": shop.ECHO, "keep": False, "connections": 2, "pause_s": 0.01},
    "TCP, open": {"url": f"tcp://raw.shop.mesh:{ECHO_PORT}", "keep": True, "connections": 8, "pause_s": 0.02},
    "HTTP, paired": {"url": shop.WEB, "keep": True, "connections": 8, "pause_s": 0.02},
    "HTTP, open": {"url": "http://plain.shop.mesh", "keep": True, "connections": 8, "pause_s": 0.02},
    "HTTP, new": {"url": "http://plain.shop.mesh", "keep": False, "connections": 4, "pause_s": 0.005},
}
EVENTS: dict[str, tuple[str, list[str]]] = {  # event -> (unit, command)
    **{f"restart of the {unit.removeprefix('pillion-')}": (unit, ["systemctl", "restart", unit]) for unit in NODE + CONTROLLER},
    **{
        f"kill -9 of the {unit.removeprefix('pillion-')}": (unit, ["systemctl", "kill", "-s", "KILL", unit])
        for unit in NODE + CONTROLLER
    },
}
BOTH = "kill -9 of agent and proxy at once"  # nobody is left who holds the proxy's sockets
EVENTS[BOTH] = "pillion-agent", ["systemctl", "kill", "-s", "KILL", *NODE]
UPGRADE = "upgrade of the package"


@dataclass(frozen=True)
class Lost:
    """During one event, by kind."""

    asked: dict[str, int]
    failed: dict[str, int]
    why: dict[str, list[str]]


def until(done: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > end:
            raise LabError(f"not within {WAIT_S:.0f} s: {what}")
        time.sleep(0.05)


class Host:
    """An installed host under load."""

    def __init__(self, machine: Container, say: Callable[[str], None]) -> None:
        self.machine, self.say = machine, say

    def install(self) -> None:
        hosts.prepare(self.machine, self.say)
        hosts.install_controller(self.machine)
        plain = service("plain", "web", 80, "http", HTTP_PORT)
        raw = service("raw", "echo", ECHO_PORT, "tcp").replace(", appProtocol: tcp", "")  # not native: it might be HTTP
        self.machine.put("/srv/mesh.yaml", shop.resources([self.machine.name], plain, raw).encode())
        self.machine.run(["pillion", "apply", "-f", "/srv/mesh.yaml"], check=True)
        self.machine.run(["pillion", "express", "off", "--service", "shop/plain"], check=True)
        hosts.install_node(self.machine, self.machine)
        until(lambda: self.machine.active(*NODE, *CONTROLLER), "the units are up")
        shop.serve(self.machine, "hello")

    def load(self) -> None:
        shop.ask(self.machine, KINDS)
        until(lambda: self.answered(self.counts(), {}, AFTER), f"the load goes: {self.counts()}")
        until(self.carries, "the kernel carries requests")

    def paired(self) -> bool:
        """Whether the connections that are to be paired are."""
        return bool(shop.express(self.machine)["pairs"] >= KINDS["HTTP, paired"]["connections"])

    def carries(self) -> bool:
        return self.paired() and bool(shop.express(self.machine)["carried"]["requests"] > AFTER)

    def counts(self) -> shop.Counts:
        return shop.counts(self.machine)

    @staticmethod
    def answered(after: shop.Counts, before: shop.Counts, least: int) -> bool:
        """Whether of each kind so many were answered in between."""

        def good(found: shop.Counts, kind: str) -> int:
            return shop.answered(found[kind]) if kind in found else 0

        return bool(after) and all(good(after, kind) - good(before, kind) >= least for kind in KINDS)

    def during(self, event: Callable[[], object]) -> Lost:
        until(self.paired, "what the event before it cut is paired again")
        before = self.counts()
        event()
        over = self.counts()
        until(lambda: self.answered(self.counts(), over, AFTER), f"all kinds are answered again: {self.counts()}")
        after = self.counts()

        def grown(what: str) -> dict[str, int]:
            return {kind: after[kind][what] - before[kind][what] for kind in KINDS}

        failed = grown("failed")
        return Lost(grown("asked"), failed, {kind: after[kind]["why"][-failed[kind] :] for kind in KINDS if failed[kind]})

    def happens(self, unit: str, command: list[str]) -> None:
        """The command, until another process of the unit is ready."""

        def invocation() -> str:
            return self.machine.run(["systemctl", "show", "-P", "InvocationID", unit], check=True).stdout

        old = invocation()
        self.machine.run(command, check=True, timeout=200)
        until(lambda: invocation() != old and self.machine.active(unit), f"{unit} is back")

    def upgrade(self) -> None:
        hosts.upgrade(self.machine)
        until(lambda: self.machine.active(*NODE), "the units are up")


def never_lost(event: str) -> tuple[str, ...]:
    """The kinds of which this event costs nothing."""
    if event == BOTH:
        return ("native, open",)
    if event == "kill -9 of the proxy":
        return "native, open", "native, new", "HTTP, paired"
    return tuple(KINDS)


def table(found: dict[str, Lost]) -> str:
    """Failed of asked. Pure."""
    lines = [f"| event | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for event, lost in found.items():
        lines.append(f"| {event} | " + " | ".join(f"{lost.failed[kind]} of {lost.asked[kind]:,}" for kind in KINDS) + " |")
    return "\n".join(lines) + "\n"


def written(text: str, fresh: str) -> str:
    """The document with its table replaced. Pure. Raises ValueError where it has no place for one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} … {END} in it")
    return f"{before}{BEGIN}\n{fresh}{END}{after}"


def main() -> int:
    """The exit code: 1 if something was lost that must not be."""
    parser = argparse.ArgumentParser(prog="tests.deploy.restarts", description=__doc__)
    parser.add_argument("--write", type=Path, help="the document whose table is replaced")
    parser.add_argument("--name", default="n1", help="of the host")
    parser.add_argument("--only", action="append", help="an event; may repeat")
    options = parser.parse_args()
    found: dict[str, Lost] = {}
    with Container(options.name, print) as machine:
        host = Host(machine, print)
        host.install()
        host.load()
        for event in options.only or (*EVENTS, UPGRADE):
            found[event] = host.during(host.upgrade if event == UPGRADE else lambda event=event: host.happens(*EVENTS[event]))  # type: ignore[misc]  # bound now
            print(f"{event}: {found[event]}", flush=True)
    text = table(found)
    print(text)
    if options.write:
        options.write.write_text(written(options.write.read_text(), text))
    return int(any(lost.failed[kind] for event, lost in found.items() for kind in never_lost(event)))


if __name__ == "__main__":
    sys.exit(main())
