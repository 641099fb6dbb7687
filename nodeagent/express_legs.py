"""Legs: connections between an application and the proxy whose bytes the kernel hands over without TCP between them. A worker
asks for one of its own sockets; the kernel finds the other end by the addresses, and says whether both are what they are said
to be. Whoever lies gains nothing: bytes go between the two ends of a connection that exists. Blocking, on one thread."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog

from mesh.link import Leg, Legged
from nodeagent.datapath_api import DatapathError, MapFull
from nodeagent.express_path import OK, Enrolment, ends
from nodeagent.express_programs import View

log = structlog.get_logger()

LEGS_MAX = 16_384  # of a node; half of xlegs: what is forgotten is free at once


class Kernel(Protocol):
    """What of `express_path.ExpressPath` is used here. All may raise DatapathError, OSError."""

    def create_leg(self) -> int: ...
    def forget_leg(self, leg: int) -> None: ...
    def enrol(self, netns_fd: int, enrolment: Enrolment) -> tuple[str, int]: ...


class Places(Protocol):
    def netns_fd(self, netns: int) -> int:
        """The caller's own to close. Raises KeyError."""


class _Known(NamedTuple):
    leg: int
    workload: str


class Legs:
    """``wish``: tells a worker of one that is ended here."""

    def __init__(self, kernel: Kernel, places: Places, wish: Callable[[str, Legged], None]) -> None:
        self._kernel, self._places, self._wish = kernel, places, wish
        self.all: dict[tuple[str, int], _Known] = {}
        self.counts: Counter[str] = Counter()

    def join(self, view: View | None, worker: str, ask: Leg, fds: list[int]) -> Legged:
        """The answer. ``fds`` are owned here, and closed."""
        try:
            self.part(worker, ask.number)
            reason = self._join(view, worker, ask, fds)
        except MapFull:
            reason = "full"
        except (DatapathError, OSError, ValueError) as error:
            log.warning("leg_failed", error=str(error))
            reason = "failed"
        finally:
            for fd in fds:
                os.close(fd)
        self.counts[f"leg_{reason or 'made'}"] += 1
        return Legged(ask.number, not reason, reason)

    def _join(self, view: View | None, worker: str, ask: Leg, fds: list[int]) -> str:
        """Why not."""
        if len(fds) != 1:
            return "malformed"
        if len(self.all) >= LEGS_MAX:
            return "too_many"
        workload = view.workload(ask.workload) if view is not None else None
        if view is None or workload is None or ask.workload not in view.local:
            return "no_workload"
        if not _wanted(view, ask.workload):
            return "off"
        try:
            netns = self._places.netns_fd(view.local[ask.workload])
        except KeyError:
            return "no_netns"
        leg = 0
        try:
            local, remote = ends(fds[0])
            leg = self._kernel.create_leg()
            side = "server" if ask.dialled else "client"
            result, _ = self._kernel.enrol(netns, Enrolment(leg, side, local, remote, 0, leg=True))
            if result != OK:
                return result
            self.all[worker, ask.number] = _Known(leg, ask.workload)
            return ""
        finally:
            os.close(netns)
            if leg and (worker, ask.number) not in self.all:
                self._kernel.forget_leg(leg)

    def part(self, worker: str, number: int) -> None:
        found = self.all.pop((worker, number), None)
        if found is not None:
            self._kernel.forget_leg(found.leg)

    def review(self, view: View) -> None:
        """A new state."""
        for worker, number in [key for key, known in self.all.items() if not _wanted(view, known.workload)]:
            self.part(worker, number)
            self._wish(worker, Legged(number, ok=False, reason="off"))

    def lost(self, worker: str) -> None:
        """With its worker go its sockets."""
        for key in [key for key in self.all if key[0] == worker]:
            self.part(*key)


def _wanted(view: View, key: str) -> bool:
    workload = view.workload(key)
    return workload is not None and key in view.local and view.config.express == "auto" and workload.express == "auto"
