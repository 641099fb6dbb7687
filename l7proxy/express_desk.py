"""What a worker's paired sessions share: who may ask the agent, the questions under way, sweeps, and a predecessor's pairs."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING

from l7proxy import capture
from l7proxy.config import Config, Destination, Endpoint
from l7proxy.express import LEG_ASKED, View
from l7proxy.express_asking import PAIRED, Asking
from l7proxy.express_ends import UpstreamEnd, descriptor
from l7proxy.express_session import Newcomer, Pair
from l7proxy.http1.head import HeadError
from l7proxy.scope import Plan
from l7proxy.session import HttpSession
from l7proxy.target import Caller
from l7proxy.upstream import Pool, Sink, UpstreamConnection
from mesh import link
from mesh.link import PAIR_ASKS_MAX, Left, Paired, PairEnd, Takeover

if TYPE_CHECKING:
    from l7proxy.worker import Worker

LOOKS_PER_SWEEP_MAX = 2000  # pairs looked at in one second, a few microseconds each
EVENTS_MAX = 200  # names of events: those of the agent's reasons are not ours


class Desk:
    """One of each worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.kernel = worker, worker.kernel
        self.newcomer = Newcomer(self)
        self.pairs: dict[int, Asking] = {}  # asked for or paired, by the session's number
        self.asks: set[int] = set()  # of them, the ones not answered
        self._waiting: deque[Asking] = deque()
        self._first = self._number = worker.index << 48 | random.getrandbits(40) << 7  # a former life used others
        self._looked: deque[Asking] = deque()
        self._names: set[str] = set()
        self._left: set[int] = set()  # numbers of pairs that wait for the next worker
        self._takeovers: set[asyncio.Task[None]] = set()
        worker.on_sweep.append(self.sweep)
        worker.metrics.gauge("pillion_express_pairs", "Client connections that the kernel carries", self._paired)

    def _paired(self) -> float:
        return sum(pair.recorded for pair in self.pairs.values())

    def now(self) -> float:
        return perf_counter()

    def count(self, name: str) -> None:
        """An event, by a bounded number of names."""
        if name not in self._names:
            if len(self._names) >= EVENTS_MAX or not name.replace("_", "").isalnum():
                name = "express_other"
            self._names.add(name)
        self.worker.metrics.count(name)

    # ---- who may

    def allows(self, config: Config, caller: Caller, destination: Destination) -> bool:
        """Whether it is worth asking the agent, by what needs no compiling."""
        service = config.services.get(destination.service)
        workload = config.workloads.get(caller.workload or "")
        return (
            self.kernel.express
            and config.mesh.express == "auto"
            and not config.mesh.access_log
            and workload is not None
            and workload.express == "auto"
            and (service is None or (service.express == "auto" and not service.add_headers))
        )

    def open(self, session: HttpSession) -> bool:
        """Whether this session may be planned now."""
        worker = self.worker
        return (
            session.scope.express
            and session.leg < LEG_ASKED
            and len(self.asks) < PAIR_ASKS_MAX
            and session.scope.config is worker.config
            and not session.ending
            and not session.last
            and not session.client_ended
            and not worker.draining
        )

    def carries(self, session: HttpSession, endpoint: Endpoint) -> bool:
        """An endpoint that the kernel may have to do with."""
        workload = session.scope.config.workloads.get(endpoint.key)
        return endpoint.local and workload is not None and workload.express == "auto"

    def still(self, session: HttpSession, endpoints: list[Endpoint]) -> bool:
        """Under the configuration of now."""
        scope, config = self.worker.rescope(session.scope), self.worker.config
        if scope is None or not self.allows(config, session.caller, scope.destination):
            return False
        return all(
            e.key in config.local and (w := config.workloads.get(e.key)) is not None and w.express == "auto" for e in endpoints
        )

    def allowed(self, session: HttpSession, view: View, ends: list[UpstreamEnd]) -> bool:
        """Whether the exchange that the kernel carries now is allowed by the configuration of now."""
        scope = self.worker.rescope(session.scope)
        end = next((end for end in ends if end.slot == view.slot), None)
        if scope is None or end is None:
            return False
        try:
            head = session.heads.request(view.head)
        except HeadError:
            return False
        return scope.candidate(Plan(head), end.connection.pool.endpoint).error is None

    def pool(self, session: HttpSession, wanted: PairEnd) -> Pool | None:
        """Of an endpoint that the agent names."""
        config = session.scope.config
        workload = config.workloads.get(wanted.workload)
        if workload is None or wanted.workload not in config.local or not workload.addresses:
            return None
        address = next((a for a in workload.addresses if (":" in a) == session.scope.v6), workload.addresses[0])
        return self.worker.upstreams.pool(session.caller, Endpoint(wanted.workload, address, wanted.port, True))

    # ---- questions

    def ask(self, pair: Asking) -> bool:
        """False: not now."""
        session, destination = pair.session, pair.session.scope.destination
        if len(self.asks) >= PAIR_ASKS_MAX:
            return False
        try:
            fds = [descriptor(session.transport), *(descriptor(end.connection.transport) for end in pair.ends)]
        except OSError:
            return False
        pair.count()
        if not pair.number:
            self._number += 1
            pair.number = self._number
        self.pairs[pair.number] = pair
        self.asks.add(pair.number)
        ends = tuple(PairEnd(end.connection.pool.endpoint.key, end.connection.pool.endpoint.port) for end in pair.ends)
        message = link.Pair(pair.number, destination.service, destination.port, session.caller.workload or "", ends)
        try:
            asked = self.worker.send(message, fds)
        except OSError:  # out of descriptors
            asked = False
        if not asked:
            self.worker.loop.call_soon(pair.unasked)
        return True

    def later(self, pair: Asking) -> None:
        """There are too many questions, or it was not at rest: when one is answered."""
        if len(self._waiting) < len(self.pairs) + PAIR_ASKS_MAX:
            self._waiting.append(pair)

    def _next(self) -> None:
        while self._waiting and len(self.asks) < PAIR_ASKS_MAX:
            pair = self._waiting.popleft()
            if pair.more and pair.state == PAIRED:
                pair.again()

    def hear(self, message: link.Message) -> bool:
        """Whether it was about a pair."""
        if not isinstance(message, Paired):
            return False
        pair = self.pairs.get(message.session)
        if pair is not None:  # else we gave up waiting, and said so
            self.asks.discard(message.session)
            pair.heard(message)
            self._next()
        return True

    def forget(self, pair: Asking, *, tell: bool) -> None:
        if not pair.number:
            return
        self.asks.discard(pair.number)
        if self.pairs.pop(pair.number, None) is not None and tell:
            self.worker.send(link.Unpair(pair.number))
        pair.number = 0

    def left(self, pair: Asking) -> None:
        """To the next worker, with all that is the agent's by now: its connections do not end with our descriptors."""
        self.pairs.pop(pair.number, None)
        self._left.add(pair.number)
        self.worker.send(Left(pair.number))
        self.worker.sessions.discard(pair.session)
        self.count("express_left")

    def relinked(self) -> None:
        """Perhaps another agent: it is told of every pair, when that rests."""
        for pair in list(self.pairs.values()):
            if pair.state == PAIRED:
                pair.more = True
                self.later(pair)
        self._next()

    def sweep(self, now: float) -> None:
        """Every pair in its turn."""
        if not self._looked:
            self._looked.extend(self.pairs.values())
        for _ in range(min(len(self._looked), LOOKS_PER_SWEEP_MAX)):
            self._looked.popleft().sweep(now)
        self._next()

    # ---- of a former worker

    def takeover(self, message: Takeover, fds: list[int]) -> None:
        """Its session and upstreams are made here; then it is paired anew. One of ours was lost to the agent with the link:
        it hears of it again, or of its end."""
        if self._first < message.session <= self._number or message.session in self.pairs:
            for fd in fds:
                os.close(fd)
            if message.session not in self.pairs and message.session not in self._left:
                self.worker.send(link.Unpair(message.session))
            return
        socks: list[socket.socket] = []
        try:
            for fd in fds:
                socks.append(socket.socket(fileno=fd))
                socks[-1].setblocking(False)
        except OSError:
            for fd in fds[len(socks) :]:
                os.close(fd)
            fds = []
        session = None
        if not self.worker.draining and len(fds) == 1 + len(message.endpoints) == 1 + len(message.slots) and len(fds) > 1:
            session = self._session(message, socks[0])
        if session is None:
            self.count("express_takeover_refused")
            for sock in socks:
                sock.close()  # Unpair makes the agent close the last descriptors
            self.worker.send(link.Unpair(message.session))
            return
        task = self.worker.loop.create_task(self._take_over(message, session, socks))
        self._takeovers.add(task)
        task.add_done_callback(self._takeovers.discard)

    def _session(self, message: Takeover, sock: socket.socket) -> HttpSession | None:
        origin = self.kernel.origin(sock)
        session = capture.outbound(self.worker, origin) if origin is not None else None
        if session is None:
            return None
        fits = session.caller.workload == message.caller and session.scope.express
        destination = session.scope.destination
        if (
            fits
            and (destination.service, destination.port) == (message.service, message.port)
            and isinstance(session, HttpSession)
        ):
            return session
        session.ended()
        return None

    async def _take_over(self, message: Takeover, session: HttpSession, socks: list[socket.socket]) -> None:
        loop, upstreams = self.worker.loop, self.worker.upstreams
        pair = session.pair = Pair(self, session)
        session.rest = pair.rest
        pair.taken_over(message.session)
        self.pairs[message.session] = pair
        try:
            for sock, wanted, slot in zip(socks[1:], message.endpoints, message.slots, strict=True):
                pool = upstreams.pool(session.caller, Endpoint(wanted.workload, sock.getpeername()[0], wanted.port, True))
                end = UpstreamEnd(pair, UpstreamConnection(upstreams, pool, _NOBODY))
                end.slot = slot
                pair.ends.append(end)
                await loop.create_connection(lambda end=end: end, sock=sock)  # type: ignore[misc]  # a default binds it
                end.connection.sink = None
            await loop.connect_accepted_socket(lambda: pair, socks[0])
        except (OSError, ValueError) as error:
            self.worker.log.warning("a pair could not be taken over", error=str(error))
            self.count("express_takeover_failed")
            for end in pair.ends:
                end.connection.close()
            for sock in socks:
                sock.close()
            pair.lost()
            session.ended()
            return
        self.count("express_takeover")
        pair.completed()


class _Nobody:
    """Holds a taken upstream until its pair is complete."""

    def upstream_open(self, connection: UpstreamConnection) -> None: ...
    def upstream_failed(self, error: Exception) -> None: ...
    def upstream_data(self, data: bytes) -> None: ...
    def upstream_eof(self) -> None: ...
    def upstream_lost(self, error: Exception | None) -> None: ...
    def upstream_full(self) -> None: ...
    def upstream_drained(self) -> None: ...


_NOBODY: Sink = _Nobody()
