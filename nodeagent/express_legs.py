"""Legs: connections between an application and the proxy whose bytes the kernel hands over without TCP between them. A worker
asks for one of its own sockets; the kernel finds the other end by the addresses, and says whether both are what they are said
to be. Whoever lies gains nothing: bytes go between the two ends of a connection that exists. Blocking, on one thread."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import structlog

from mesh.link import Leg, Legged
from nodeagent.datapath_api import DatapathError, MapFull
from nodeagent.express_path import OK, Enrolment, ends
from nodeagent.express_programs import View
from nodeagent.express_share import too_many

log = structlog.get_logger()

LEGS_MAX = 16_384  # of a node; half of xlegs: what is forgotten is free at once
JOIN_MAX = 32  # at once: nothing is written on any of them until the last is entered


class Kernel(Protocol):
    """What of `express_path.ExpressPath` is used here. All may raise DatapathError, OSError."""

    def create_leg(self) -> int: ...
    def forget_leg(self, leg: int) -> None: ...
    def enrol_all(self, items: Sequence[tuple[int, Enrolment]]) -> list[tuple[str, int]]: ...


class Places(Protocol):
    def netns_fd(self, netns: int) -> int:
        """The caller's own to close. Raises KeyError."""


class Asked(NamedTuple):
    worker: str
    leg: Leg
    fds: list[int]


class _Known(NamedTuple):
    leg: int
    workload: str


class Legs:
    """``wish``: tells a worker of one that is ended here."""

    def __init__(self, kernel: Kernel, places: Places, wish: Callable[[str, Legged], None]) -> None:
        self._kernel, self._places, self._wish = kernel, places, wish
        self.all: dict[tuple[str, int], _Known] = {}
        self.counts: Counter[str] = Counter()

    def join(self, view: View | None, asks: Sequence[Asked]) -> list[Legged]:
        """The answers. Many take hardly longer than one, which is looked at again after a pause. Descriptors are owned here, and
        closed."""
        held = [fd for asked in asks for fd in asked.fds]
        try:
            plans = [self._plan(view, asked, held) for asked in asks]
            results = iter(self._enter([plan for plan in plans if not isinstance(plan, str)]))
            reasons = [plan if isinstance(plan, str) else next(results) for plan in plans]
        except BaseException:  # a bug: none of them is told that it is one
            for worker, leg, _ in asks:
                self.part(worker, leg.number)
            raise
        finally:
            for fd in held:
                os.close(fd)
        for (worker, leg, _), reason in zip(asks, reasons, strict=True):
            if reason:
                self.part(worker, leg.number)
            self.counts[f"leg_{reason or 'made'}"] += 1
        return [Legged(asked.leg.number, not reason, reason) for asked, reason in zip(asks, reasons, strict=True)]

    def _plan(self, view: View | None, asked: Asked, held: list[int]) -> tuple[int, Enrolment] | str:
        """What to enter, or why not. ``held``: descriptors to close."""
        worker, ask, fds = asked
        self.part(worker, ask.number)
        if len(fds) != 1:
            return "malformed"
        if too_many(self.all, worker, LEGS_MAX):
            return "too_many"
        workload = view.workload(ask.workload) if view is not None else None
        if view is None or workload is None or ask.workload not in view.local:
            return "no_workload"
        if not _wanted(view, ask.workload):
            return "off"
        try:
            held.append(self._places.netns_fd(view.local[ask.workload]))
            local, remote = ends(fds[0])
            leg = self._kernel.create_leg()
        except KeyError:
            return "no_netns"
        except (DatapathError, OSError, ValueError) as error:
            return _failed(error)
        self.all[worker, ask.number] = _Known(leg, ask.workload)
        return held[-1], Enrolment(leg, "server" if ask.dialled else "client", local, remote, 0, leg=True)

    def _enter(self, items: list[tuple[int, Enrolment]]) -> list[str]:
        """Why not, of each."""
        try:
            return ["" if result == OK else result for result, _ in self._kernel.enrol_all(items)] if items else []
        except (DatapathError, OSError, ValueError) as error:
            return [_failed(error)] * len(items)

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


class Joining:
    """Those that are asked for while the thread is at others: they go together. Of the loop alone. ``start``: has them joined,
    which ends with `joined`."""

    def __init__(self, start: Callable[[list[Asked]], None]) -> None:
        self._start = start
        self._waiting: list[Asked] = []
        self._busy = False

    def ask(self, asked: Asked) -> None:
        self._waiting.append(asked)
        self._next()

    def joined(self) -> None:
        self._busy = False
        self._next()

    def give_up(self, whose: Callable[[Asked], bool]) -> list[Asked]:
        """Of those that wait, as if they had been joined, and ended then. They are the caller's again."""
        gone = [asked for asked in self._waiting if whose(asked)]
        if gone:
            self._waiting = [asked for asked in self._waiting if not whose(asked)]
        return gone

    def _next(self) -> None:
        if self._waiting and not self._busy:
            self._busy = True
            now, self._waiting = self._waiting[:JOIN_MAX], self._waiting[JOIN_MAX:]
            self._start(now)


def _wanted(view: View, key: str) -> bool:
    workload = view.workload(key)
    return workload is not None and key in view.local and view.config.express == "auto" and workload.express == "auto"


def _failed(error: Exception) -> str:
    if isinstance(error, MapFull):
        return "full"
    log.warning("leg_failed", error=str(error))
    return "failed"
