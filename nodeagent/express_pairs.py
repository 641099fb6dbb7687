"""Pairs: whose sockets the kernel carries requests between. A worker asks; what it says is checked against what the kernel
recorded of the sockets it hands over (where they come from, whom they were dialled for), never believed. Keeps duplicates of
both of its sockets, so that a pair outlives the worker. Blocking, on one thread."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from msgspec import structs

from mesh.link import Pair as Ask
from mesh.link import Paired, PairEnd, Takeover
from nodeagent.datapath_api import DatapathError, MapFull
from nodeagent.express_path import OK, Enrolment, duplicate, ends
from nodeagent.express_programs import Key, Program, Programs, View
from nodeagent.express_share import too_many
from nodeagent.layouts import text_address

log = structlog.get_logger()

PAIRS_MAX = 16_384  # of a node; less than PL_X_RECORDS: the places of former ones are free only after a while
ORPHANED_S = 10.0  # how long the pairs of a worker that is gone wait for another one
RESET = struct.pack("ii", 1, 0)
NO_PROGRAM = 0  # is never valid: what it would judge goes to user space, what runs is handed over

Owner = tuple[str, int]  # worker, session


class Kernel(Protocol):
    """What of `express_path.ExpressPath` is used here. All may raise DatapathError, OSError."""

    def create_record(self, program: int, identity: int) -> int: ...
    def forget_record(self, record: int) -> None: ...
    def set_program(self, record: int, program: int) -> str: ...
    def enrol_all(self, items: Sequence[tuple[int, Enrolment]]) -> list[tuple[str, int]]: ...
    def check(self, netns_fd: int, enrolment: Enrolment) -> str: ...


class Sockets(Protocol):
    """What the data path knows of sockets and places."""

    def origin(self, sock: socket.socket) -> dict[str, Any] | None:
        """Fields of struct pl_origin of a captured socket."""

    def netns_fd(self, netns: int) -> int:
        """The caller's own to close. Raises KeyError."""


@dataclass(slots=True)
class Pair:
    ask: Ask
    program: Program
    record: int
    fds: list[int]  # ours: the accepted socket, then the upstreams
    slots: tuple[int, ...]
    enrolled: list[tuple[int, Enrolment]] = field(default_factory=list)  # netns cookie
    spiffes: frozenset[str] = frozenset()  # of both sides
    orphaned: float = 0.0  # since when nobody's


class Refused(Exception):
    """``lasting``: as in mesh.link.Paired."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.lasting = reason, lasting


class Pairs:
    """``wish``: tells a worker, see mesh.link.Paired."""

    def __init__(self, kernel: Kernel, sockets: Sockets, wish: Callable[[str, Paired], None]) -> None:
        self._kernel, self._sockets, self._wish = kernel, sockets, wish
        self.all: dict[Owner, Pair] = {}
        self.counts: dict[str, int] = {}

    def close(self) -> None:
        """Duplicates only: the kernel goes on with the workers' own."""
        for pair in self.all.values():
            _close(pair.fds)
        self.all.clear()

    # ---- what a worker asks

    def pair(self, programs: Programs, worker: str, ask: Ask, fds: list[int]) -> Paired:
        """The answer. ``fds`` are owned here from now on."""
        again = (worker, ask.session) in self.all
        self.unpair(worker, ask.session)
        record = 0
        try:
            if len(fds) != 1 + len(ask.endpoints) or not ask.endpoints:
                raise Refused("malformed")
            if not again and too_many(self.all, worker, PAIRS_MAX):  # it may have more than its share by a takeover
                raise Refused("too_many_pairs")
            program, origin = self._program(programs, ask, fds[0])
            record = self._kernel.create_record(program.index, origin["identity"])
            found = Pair(ask, program, record, fds, ())
            self._enrol(found, programs.view, origin)
        except (Refused, DatapathError, OSError, ValueError) as error:
            refusal = error if isinstance(error, Refused) else Refused("full" if isinstance(error, MapFull) else "failed")
            if not isinstance(error, Refused):
                log.warning("pair_failed", error=str(error))
            if record:
                self._kernel.forget_record(record)
            _close(fds)
            self._count(refusal.reason)
            return Paired(ask.session, False, reason=refusal.reason, lasting=refusal.lasting)
        self.all[worker, ask.session] = found
        self._count("paired")
        slots = found.slots
        _let_go(found)
        return Paired(ask.session, True, slots, _missing(found))

    def unpair(self, worker: str, session: int) -> None:
        found = self.all.pop((worker, session), None)
        if found is not None:
            self._kernel.forget_record(found.record)
            _close(found.fds)

    def _count(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def _program(self, programs: Programs, ask: Ask, accepted: int) -> tuple[Program, dict[str, Any]]:
        view = programs.view
        if view is None:
            raise Refused("no_state")
        with duplicate(accepted) as sock:
            origin = self._sockets.origin(sock)
        if origin is None:
            raise Refused("not_captured")
        caller = view.workload(ask.caller)
        known = view.workloads.get(origin["workload"])
        if caller is None or known != ask.caller or caller.identity != origin["identity"] or ask.caller not in view.local:
            raise Refused("not_the_caller")
        if view.local[ask.caller] != origin["netns"]:
            raise Refused("not_the_caller")
        dialled = view.dialled(text_address(origin["dst"]), origin["dst_port"], origin["service"])
        if not dialled or origin["dst_port"] != ask.port:
            raise Refused("no_service", lasting=True)
        if dialled.startswith("Service/") and dialled != ask.service:
            raise Refused("no_service")
        if caller.express == "off":
            raise Refused("caller_off", lasting=True)
        program = programs.of(Key(caller.identity, dialled, ask.port), text_address(origin["client"]))
        if program is None:
            raise Refused("too_many_programs")
        if program.reason:
            raise Refused("not_expressible", lasting=True)
        return program, origin

    def _enrol(self, pair: Pair, view: View | None, origin: dict[str, Any]) -> None:
        """Sets its slots. Raises Refused when there is nothing to carry between."""
        local, remote = ends(pair.fds[0])
        client = Enrolment(pair.record, "client", local, remote, origin["identity"])
        wanted = [(int(origin["netns"]), client)]
        for fd, end in zip(pair.fds[1:], pair.ask.endpoints, strict=True):
            found = self._server(pair, view, origin, fd, end)
            if found is not None:
                wanted.append(found)
        with self._places(wanted) as items:
            results = [result for result, _ in self._kernel.enrol_all(items)]
        if results[0] != OK:
            raise Refused(f"client_{results[0]}")
        pair.enrolled = [entry for entry, result in zip(wanted, results, strict=True) if result == OK]
        taken = {(entry.workload, entry.port): entry.slot for _, entry in pair.enrolled[1:]}
        if not taken:
            raise Refused(f"server_{results[1]}" if len(results) > 1 else "no_endpoint")
        pair.slots = tuple(taken.get((view.number(end.workload), end.port), -1) if view else -1 for end in pair.ask.endpoints)
        sides = [view.workload(key) for key in (pair.ask.caller, *(end.workload for end in pair.ask.endpoints))] if view else []
        pair.spiffes = frozenset(side.spiffe for side in sides if side is not None)

    @contextmanager
    def _places(self, wanted: Sequence[tuple[int, Enrolment]]) -> Iterator[list[tuple[int, Enrolment]]]:
        """The same with descriptors of their netns, open for so long. Raises Refused."""
        held: list[int] = []
        try:
            for netns, _ in wanted:
                held.append(self._sockets.netns_fd(netns))
            yield [(fd, enrolment) for fd, (_, enrolment) in zip(held, wanted, strict=True)]
        except KeyError:
            raise Refused("no_netns") from None
        finally:
            _close(held)

    def _server(
        self, pair: Pair, view: View | None, origin: dict[str, Any], fd: int, end: PairEnd
    ) -> tuple[int, Enrolment] | None:
        """None: the program does not lead there."""
        place = pair.program.place((end.workload, end.port))
        workload = view.workload(end.workload) if view else None
        if place < 0 or view is None or workload is None:
            return None
        local, remote = ends(fd)
        if remote[0] not in workload.addresses or remote[1] != end.port:
            raise Refused("not_the_endpoint")
        caller = text_address(origin["client"]), int(origin["client_port"])
        identity = int(origin["identity"])
        enrolment = Enrolment(pair.record, "server", local, remote, identity, place, workload.id, end.port, caller)
        return view.local[end.workload], enrolment

    # ---- what changes

    def moved(self, program: Program) -> None:
        """Its places mean something else from now on: its pairs shall go, once what they carry is over."""
        for (worker, session), pair in list(self.all.items()):
            if pair.program is program:
                self._wish(worker, Paired(session, False, reason="moved"))

    def review(self, view: View) -> None:
        """A new state, after its programs."""
        for (worker, session), pair in list(self.all.items()):
            caller = view.workload(pair.ask.caller)
            if caller is None or pair.ask.caller not in view.local or caller.identity != pair.program.key.identity:
                self._wish(worker, Paired(session, False, reason="caller_gone"))
            elif caller.express == "off" or pair.program.reason:
                self._wish(worker, Paired(session, False, reason="not_expressible"))
            elif _astray(pair):
                self._wish(worker, Paired(session, False, reason="endpoint_gone"))
            elif missing := _missing(pair):
                self._wish(worker, Paired(session, True, pair.slots, missing))

    def revoked(self, spiffes: frozenset[str]) -> None:
        """Certificates of these were taken back. From now on their requests go to user space; whether they may be paired
        again is seen there, by who they are then."""
        for (worker, session), pair in list(self.all.items()):
            if not pair.spiffes.isdisjoint(spiffes):
                try:
                    self._kernel.set_program(pair.record, NO_PROGRAM)
                except DatapathError as error:  # nor may that keep the others
                    log.error("pair_not_taken_back", error=str(error), remedy="its worker ends it")
                self._count("certificate_revoked")
                self._wish(worker, Paired(session, False, reason="certificate_revoked"))

    # ---- workers that go and come

    def orphan(self, worker: str, now: float, session: int | None = None) -> None:
        """The worker is gone, or has left this one. Its pairs go on in the kernel; who takes them over is seen later."""
        for key in [key for key in self.all if key[0] == worker] if session is None else [(worker, session)]:
            if key in self.all:
                self.all[key].orphaned = now

    def hand_over(self, worker: str) -> list[tuple[Takeover, list[int]]]:
        """What a new worker is to go on with: pairs whose sockets stand where they were armed. The others were in the
        middle of something that died with their worker: reset. The descriptors stay ours."""
        out = []
        for key in [key for key, pair in self.all.items() if pair.orphaned]:
            pair = self.all.pop(key)
            if self._at_rest(pair):
                pair.orphaned = 0.0
                self.all[worker, pair.ask.session] = pair
                ask = pair.ask
                out.append((Takeover(ask.session, ask.service, ask.port, ask.caller, ask.endpoints, pair.slots), pair.fds))
                self._count("taken_over")
            else:
                self._lose(pair)
        return out

    def tick(self, now: float) -> None:
        for key in [key for key, pair in self.all.items() if pair.orphaned and now - pair.orphaned > ORPHANED_S]:
            self._lose(self.all.pop(key))

    def _at_rest(self, pair: Pair) -> bool:
        try:
            with self._places(pair.enrolled) as items:
                return all(self._kernel.check(fd, enrolled) == OK for fd, enrolled in items)
        except (Refused, DatapathError, OSError):
            return False

    def _lose(self, pair: Pair) -> None:
        self._count("lost")
        self._kernel.forget_record(pair.record)
        for fd in pair.fds:
            try:
                with duplicate(fd) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            except OSError:
                pass  # gone already
        _close(pair.fds)


def _let_go(pair: Pair) -> None:
    """Of the ends that were not taken: they are the worker's alone, which uses them for others."""
    taken = [place for place, slot in enumerate(pair.slots) if slot >= 0]
    _close([fd for place, fd in enumerate(pair.fds[1:]) if place not in taken])
    pair.fds = [pair.fds[0], *(pair.fds[1 + place] for place in taken)]
    pair.ask = structs.replace(pair.ask, endpoints=tuple(pair.ask.endpoints[place] for place in taken))
    pair.slots = tuple(pair.slots[place] for place in taken)


def _missing(pair: Pair) -> tuple[PairEnd, ...]:
    have = {slot for slot in pair.slots if slot >= 0}
    return tuple(PairEnd(*end) for end in pair.program.current if pair.program.place(end) not in have)


def _astray(pair: Pair) -> bool:
    """Whether the program leads no more to one of its endpoints, or from another place."""
    slots = zip(pair.ask.endpoints, pair.slots, strict=True)
    return any(slot >= 0 and pair.program.place((end.workload, end.port)) != slot for end, slot in slots)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
