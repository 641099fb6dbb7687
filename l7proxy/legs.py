"""Which of the worker's own connections the kernel is to carry without TCP: those to applications of this node on which HTTP
goes to or comes from another node. They are user space's before and after; it is only cheaper to read and write them.

One that was busy at two looks in a row is asked for, when it rests: to enter it takes the agent about 2 ms, and until then
nothing is written on it, since the application could not ask how much there is to read."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from itertools import takewhile
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from l7proxy.express import LEG_ASKED, LEG_MADE, LEG_NEW, LEG_REFUSED, LEG_WANTED
from l7proxy.express_ends import descriptor
from l7proxy.session import HttpSession
from l7proxy.upstream import OPEN_PER_POOL_MAX, Pool, UpstreamConnection
from mesh import link
from mesh.link import LEG_ANSWER_S, LEG_ASKS_MAX, Legged

if TYPE_CHECKING:
    from l7proxy.worker import Worker

LOOK_S = 0.1
AGAIN_S = 5.0  # after a refusal that may pass
LASTING = frozenset(("lowat", "peek_off", "zerocopy", "ulp", "paired", "not_captured", "not_the_proxys", "identity", "caller"))
TAKEN_PART = 4  # one of so many is asked for at once: what the pool lacks for so long is dialled


class _Asked(NamedTuple):
    of: HttpSession | UpstreamConnection
    unanswered: asyncio.TimerHandle


class Legs:
    """One of each worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._asks: dict[int, _Asked] = {}
        self._made: dict[int, HttpSession | UpstreamConnection] = {}
        self._number = worker.index << 48 | random.getrandbits(40) << 7  # a former life used others
        self._later: deque[tuple[float, HttpSession | UpstreamConnection]] = deque()  # refused; when they may be asked for again
        self._timer: asyncio.TimerHandle | None = None
        self._this, self._looked = LEG_NEW - 1, 0.0  # the last look: `leg` of what was busy, and when
        worker.hears.append(self.hear)
        worker.on_sweep.append(self.sweep)
        worker.metrics.gauge("pillion_express_legs", "Connections to applications that go without TCP", lambda: len(self._made))

    # ---- which

    def _look(self) -> None:
        self._timer = self._worker.loop.call_later(LOOK_S, self._look)
        self.look(perf_counter())

    def look(self, now: float) -> None:
        """Each LOOK_S. ``now``: perf_counter."""
        worker = self._worker
        since, self._looked = self._looked, now
        last, self._this = self._this, self._this - 1
        if not worker.kernel.express or worker.config.mesh.express != "auto" or worker.draining:
            return
        for session in worker.sessions:
            if isinstance(session, HttpSession) and session.heard > since:
                upstream = session.upstream
                if upstream is not None and upstream.leg < LEG_WANTED:
                    upstream.leg = self._this  # asked for when a look finds it at rest
                if session.leg < LEG_WANTED:
                    self._look_at_client(session, last)
        for pool in worker.upstreams.pools.values():
            if pool.idle and pool.idle[-1].heard > since and pool.endpoint.local and self._from_afar(pool):
                self._look_at(pool, since, last)

    def _look_at_client(self, session: HttpSession, last: int) -> None:
        if self._may(session):
            if session.leg != last:
                session.leg = self._this
            elif session.rest is None:
                session.leg = LEG_WANTED
                session.rest = lambda: self._rests(session)
        elif session.leg == last and session.candidate is None:  # between two exchanges: where the next goes is not known
            session.leg = self._this

    def _may(self, session: HttpSession) -> bool:
        """Its requests go to other nodes, as far as one sees: what stays on this one, the kernel may carry as a whole."""
        candidate, pair, worker = session.candidate, session.pair, self._worker
        newcomer = pair is worker.express.newcomer
        near = candidate is None or candidate.endpoint.local
        service = worker.config.services.get(session.scope.destination.service)
        return (
            session.metered
            and (newcomer or pair is None)
            and not near
            and not session.ending
            and (service is None or service.express == "auto")
            and self._wanted(session.caller.workload or "")
        )

    def _from_afar(self, pool: Pool) -> bool:
        config = self._worker.config
        near = any(f"Workload/{w.namespace}/{w.name}" in config.local for w in config.by_address.get(pool.key[1], ()))
        return not near and self._wanted(pool.endpoint.key)

    def _wanted(self, key: str) -> bool:
        """The agent says the same, later."""
        workload = self._worker.config.workloads.get(key)
        return workload is not None and workload.express == "auto"

    def _look_at(self, pool: Pool, since: float, last: int) -> None:
        """What was used last is at the end."""
        busy = [one for one in takewhile(lambda one: one.heard > since, reversed(pool.idle)) if one.leg < LEG_WANTED]
        again = [one for one in busy if one.leg == last]
        for connection in busy:
            connection.leg = self._this
        for connection in again[: 1 + len(pool.idle) // TAKEN_PART]:
            self._take(connection)

    # ---- asking

    def _rests(self, session: HttpSession) -> None:
        """An exchange is over, nothing is pending. Asked once all is written, two turns on."""
        session.rest = None
        if session.leg == LEG_WANTED:
            session.transport.pause_reading()
            loop = self._worker.loop
            loop.call_soon(lambda: loop.call_soon(self._ask_client, session))

    def _ask_client(self, session: HttpSession) -> None:
        transport = session.transport
        ready = session.unread and not transport.is_closing() and not transport.get_write_buffer_size()
        if not ready or not self._ask(session, session.caller.workload or "", dialled=False):
            session.leg = LEG_NEW
            _go_on(session)

    def _take(self, connection: UpstreamConnection) -> None:
        """Out of its pool, for so long; where another may be dialled meanwhile."""
        pool = connection.pool
        if pool.open >= OPEN_PER_POOL_MAX or pool.account.descriptors >= pool.account.budget.descriptors:
            return
        ready = not connection.lost and not connection.transport.get_write_buffer_size()
        if ready and self._ask(connection, pool.endpoint.key, dialled=True):
            pool.idle.remove(connection)

    def _ask(self, of: HttpSession | UpstreamConnection, workload: str, *, dialled: bool) -> bool:
        if len(self._asks) >= LEG_ASKS_MAX:
            return False
        try:
            fd = descriptor(of.transport)
            self._number += 1
            asked = self._worker.send(link.Leg(self._number, workload, dialled), [fd])
        except OSError:
            asked = False
        if asked:
            of.leg = LEG_ASKED
            timer = self._worker.loop.call_later(LEG_ANSWER_S, self._unanswered, self._number)
            self._asks[self._number] = _Asked(of, timer)
        return asked

    def _unanswered(self, number: int) -> None:
        self._worker.send(link.Unleg(number))
        self._answered(Legged(number, ok=False, reason="unanswered"))

    def hear(self, message: link.Message) -> bool:
        """Whether it was about a leg."""
        if not isinstance(message, Legged):
            return False
        self._answered(message)
        return True

    def _answered(self, message: Legged) -> None:
        asked = self._asks.pop(message.number, None)
        if asked is None:  # the agent has ended it; or we gave up waiting, and said so
            if not message.ok and (made := self._made.pop(message.number, None)) is not None:
                made.leg = LEG_NEW
            return
        asked.unanswered.cancel()
        if message.ok:
            asked.of.leg = LEG_MADE
            self._made[message.number] = asked.of
        else:
            asked.of.leg = LEG_REFUSED
            if message.reason not in LASTING:
                self._later.append((perf_counter() + AGAIN_S, asked.of))
            self._worker.express.count(f"leg_refused_{message.reason}")
        _go_on(asked.of)

    # ---- the end

    def sweep(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            of = self._later.popleft()[1]
            if of.leg == LEG_REFUSED:
                of.leg = LEG_NEW
        for number in [number for number, of in self._made.items() if of.lost]:
            del self._made[number]
            self._worker.send(link.Unleg(number))

    def relinked(self) -> None:
        """The agent forgot them all, or is another one: what is still busy is asked for anew."""
        if self._timer is None:
            self._timer = self._worker.loop.call_later(LOOK_S, self._look)
        for of in self._made.values():
            of.leg = LEG_NEW
        self._made.clear()
        for number in list(self._asks):
            asked = self._asks.pop(number)
            asked.unanswered.cancel()
            asked.of.leg = LEG_NEW
            _go_on(asked.of)


def _go_on(of: HttpSession | UpstreamConnection) -> None:
    if isinstance(of, UpstreamConnection):
        of.upstreams.keep(of)
    elif not of.lost and not of.client_paused and not of.transport.is_closing():
        of.resume_client()
