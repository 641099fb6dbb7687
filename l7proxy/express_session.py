"""A session that the kernel carries: looked at before any event is believed, since what went by unseen may be running.
The decisions are in `l7proxy.express`; pairing and arming, in `l7proxy.express_asking`; who may, in `l7proxy.express_desk`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from l7proxy import express
from l7proxy.express import NO_SLOT, TAKE, Step, View
from l7proxy.express_asking import APART, ASKING, OVER, PAIRED, PARTING, PLANNED, SETTLE_S, TRIES_MAX, Asking
from l7proxy.express_ends import UpstreamEnd, shut
from l7proxy.http1.exchange import IDLE
from l7proxy.http1.head import HeadError
from l7proxy.upstream import Pool, UpstreamConnection

if TYPE_CHECKING:
    from l7proxy.express_desk import Desk
    from l7proxy.session import HttpSession

LOOK_FIRST_S, LOOK_MAX_S = 0.001, 0.05
LEAVE_LOOK_S = 0.01  # whether all is written
TORN_LOOKS = 200  # about a millisecond: a send() takes some microseconds, unless it is kept from its CPU
LASTING_EXCHANGES, LASTING_S = 32, 0.25  # a connection with so many exchanges for the kernel, or that old at one, is paired
VAIN_S = 0.1  # a pair that ends sooner has cost more than it saved: to make one takes the agent about 3 ms
BRIEF_MANY = 8  # in a row that were not worth it: after them age is no sign,
BRIEF_TIMES = 1.5  # and it takes so many times the exchanges
UNUSED_S = 300.0  # a pair without an exchange for this long goes apart


class Pair(Asking):
    """One session's, from the first time it might be paired to its end. The transport's protocol while it is paired."""

    __slots__ = ()

    # ---- a predecessor's

    def taken_over(self, number: int) -> None:
        """Its record is there; its sockets come one by one."""
        self.number, self.state, self.recorded, self.more, self.complete = number, PAIRED, True, True, False
        self.armed = True

    def completed(self) -> None:
        """They are all here, and so may be what came meanwhile."""
        self.complete = True
        self._hold()
        for end in list(self.ends):
            data, end.early = end.early, b""
            if data:
                end.connection.data_received(data) if not end.idle else self.server_spoke(end, data)
            if end.early_eof:
                end.eof_received()
        if self.kept or self.kept_eof:
            if self.session.rq != IDLE or self._client_spoke(eof=self.kept_eof):
                self._hear_kept()
            else:
                self._wait()
        else:
            self.again()

    # ---- the client's transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Only of a takeover."""
        self.sock = transport.get_extra_info("socket")
        self.session.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self.consumed += len(data)
        if self.state == ASKING:  # nobody knows whether the agent counts it: not now
            self.refused("client_spoke", tell=True)
            self.session.data_received(data)
        elif not self.complete or self.kept or self.kept_eof:
            self.kept += data
        elif self.session.rq != IDLE or self._client_spoke(eof=False):
            self.session.data_received(data)
        else:
            self.kept = data
            self._wait()

    def eof_received(self) -> bool:
        self.done = True
        if self.state == ASKING:
            self.refused("client_gone", tell=True)
            return self.session.eof_received()
        if not self.complete or self.kept or self.kept_eof:
            self.kept_eof = True
        elif self.session.rq != IDLE or self._client_spoke(eof=True):
            return self.session.eof_received()
        else:
            self.kept_eof = True
            self._wait()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        session = self.session
        self.done = self.done or exc is not None
        if self.recorded and session.rq == IDLE:
            view = self._hold()
            if view is not None and view.busy:
                self._adopt(view)
        shut(session.transport)
        scope = session.scope
        scope.brief = scope.brief + 1 if self.desk.now() - session.since < VAIN_S else 0
        session.connection_lost(exc)

    def pause_writing(self) -> None:
        self.session.pause_writing()

    def resume_writing(self) -> None:
        self.session.resume_writing()

    def _client_spoke(self, *, eof: bool) -> bool:
        """Whether the session may hear it now."""
        view = self._view()
        if view is None:
            self._lost_record()
            return True
        step = express.client_spoke(view)
        if step is Step.WAIT:
            return False
        if step is Step.ADOPT:
            self._adopt(view)
        elif not eof:
            self.armed = False  # the sequence numbers have moved
            self.desk.count(f"express_punt_{view.punt}")
            if view.punt == "rate":
                self.session.account.requesting.empty(self.desk.now())
            if view.off or self.futility.punted(view):
                self.tries = TRIES_MAX  # until the configuration changes
                self.desk.count("express_futile")
                self._apart(tell=True)
            elif self.unsettled.punted(view):
                self.more = True
        return True

    # ---- looking again

    def _wait(self) -> None:
        """Until the kernel's exchange is ours, or over."""
        session = self.session
        session.pause_client()
        session.hold(len(self.kept))
        self._hold()
        self._look_in(LOOK_FIRST_S)

    def _look_in(self, delay: float) -> None:
        self._stop_timer()
        self.delay = delay
        self.timer = self.desk.worker.loop.call_later(delay, self._look)

    def _look(self) -> None:
        self.timer = None
        if self.session.lost or self.state == OVER:
            return
        view = self._view()
        if view is None:
            if self.kept or self.kept_eof:  # there was an exchange before them
                self.session.cut()
            self._lost_record()
        elif self.session.rq != IDLE:  # an event came first
            if self.state == PARTING:
                self._apart(tell=True)
        elif (step := express.waited(view, kept=bool(self.kept))) is Step.WAIT:
            self._look_in(min(2 * self.delay, LOOK_MAX_S))
        elif step is Step.ADOPT and self._adopt(view):
            pass
        elif self.state == PARTING:
            self._apart(tell=True)
        else:
            self.armed = False
            self._hear_kept()

    def _hear_kept(self) -> None:
        """What waited, in its order."""
        data, self.kept = self.kept, b""
        eof, self.kept_eof = self.kept_eof, False
        if not data and not eof:
            return
        self._stop_timer()
        session = self.session
        session.hold(0)
        self._read_on()
        if data:
            session.data_received(data)
        if eof:
            session.eof_received()

    # ---- the servers

    def server_spoke(self, end: UpstreamEnd, data: bytes) -> None:
        """While the session rests, or does something else."""
        if end in self.limbo:
            self.session.cut()  # the answer to a request of which nothing is known
        elif self.recorded and self.session.rq == IDLE and self.state != ASKING:
            view = self._view()
            if view is None:
                self.session.cut()  # as above
            elif express.server_spoke(view, end.slot) is Step.ADOPT and self._adopt(view):
                end.connection.data_received(data)
                return
        self.desk.count("express_unasked")
        end.connection.data_received(data)  # nobody's: it ends the connection
        self.server_gone(end)

    def server_ended(self, end: UpstreamEnd) -> None:
        """FIN or RST, not of a connection in use: if the kernel's exchange was there, it becomes ours, with what follows."""
        if self.recorded and self.session.rq == IDLE and self.state != ASKING and end in self.ends:
            view = self._hold()
            if view is not None and view.slot == end.slot and self._adopt(view):
                return
        self.server_gone(end)

    def server_gone(self, end: UpstreamEnd) -> None:
        if end in self.ends:
            self.ends.remove(end)
            if end in self.used:
                self.used.remove(end)
            self.leave()

    # ---- taking over what the kernel began

    def _adopt(self, view: View) -> bool:
        """Its exchange goes on here. False: it was over after all."""
        desk, session = self.desk, self.session
        end = next((end for end in self.ends if end.slot == view.slot), None)
        desk.kernel.express_op(self.sock, TAKE, NO_SLOT)
        self.armed = False
        taken = self._view()
        looks = TORN_LOOKS
        while taken is not None and taken.torn and (looks := looks - 1):
            os.sched_yield()
            taken = self._view()
        if taken is None or (not view.handed and taken.ended):
            return False
        desk.count("express_adopted")
        if end is None or taken.torn:  # what the client sends next would overtake what is on its way from it
            session.cut()
            return True
        self.used.append(end)
        try:
            head = session.heads.request(view.head)
        except HeadError:  # the kernel takes no head that we refuse: a bug
            desk.count("express_bad_head")
            session.cut()
            return True
        elapsed = max(0.0, desk.now() - view.started)
        session.carry_on(head, end.connection, elapsed)
        session.adopt(head, left=taken.req_left, status=taken.status, upleft=taken.resp_left, elapsed=elapsed)
        if session.candidate is None or session.candidate.error is not None:
            session.recheck()
        if self.kept or self.kept_eof:
            desk.worker.loop.call_soon(self._hear_kept)
        if self.state == PARTING:
            desk.worker.loop.call_soon(self._look)
        return True

    # ---- left to the next worker

    def bequeath(self) -> bool:
        """This worker ends, and another comes: whether it goes on with this pair, as soon as nothing of it is here."""
        worker = self.desk.worker
        if not worker.succeeded or worker.agent.connection is None or self.state not in (PAIRED, ASKING):
            return False  # it ends for good, or nobody is there who would keep the sockets
        self.leaving = True
        self._leave_behind()
        return True

    def _leave_behind(self) -> None:
        """Where it stands where it was armed last: the agent has its sockets, and the next worker what comes to them."""
        session, loop = self.session, self.desk.worker.loop
        if self.state != PAIRED or not self.armed or not self.complete or self.more or self.kept or self.kept_eof:
            return
        if not session.unread or any(not end.idle or end.connection.late is not None for end in self.ends):
            return
        transports = (session.transport, *(end.connection.transport for end in self.ends))
        if any(transport.is_closing() for transport in transports):
            return
        if any(transport.get_write_buffer_size() for transport in transports):
            loop.call_later(LEAVE_LOOK_S, self._leave_behind)
            return
        for transport in transports:
            transport.pause_reading()
            transport.set_protocol(asyncio.Protocol())
        self._stop_timer()
        self.state = OVER
        self.desk.left(self)
        for transport in transports:
            transport.abort()  # of ours; the agent has its own

    # ---- from the worker

    @property
    def quiet(self) -> bool:
        """Nothing runs, and nothing can begin, that user space does not see."""
        return self.state in (APART, PLANNED, OVER)

    def refuse_more(self) -> None:
        """The session is to end."""
        self.tries = TRIES_MAX
        self.leave()

    def seize(self) -> None:
        """Before the session is cut: the exchange that ends with it is counted."""
        if self.recorded and self.session.rq == IDLE and not self.session.lost:
            view = self._hold()
            if view is not None and view.busy:
                self._adopt(view)

    def recheck(self) -> None:
        """A new configuration. The kernel carries nothing under an old one; here it is asked whether it ever may again."""
        self.tries = min(self.tries, TRIES_MAX - 1)
        self.wanted.clear()
        if self.state not in (PAIRED, ASKING):
            return
        session = self.session
        if not self.desk.still(session, [end.connection.pool.endpoint for end in self.ends]):
            self.leave()
        if self.state == PAIRED and session.rq == IDLE:
            view = self._view()
            if view is not None and view.busy and not self.desk.allowed(session, view, self.ends):
                self._press(session.recheck)

    def sweep(self, now: float) -> None:
        """Now and then, what user space's deadlines are for others."""
        session = self.session
        if self.state not in (PAIRED, PARTING) or session.rq != IDLE or session.pending:
            return
        view = self._view()
        if view is None:
            self._lost_record()
        elif self.watch.late(view, now, session.limits):
            self._press(session.timeout)
        elif not view.busy and self.state == PAIRED and not self.kept and not self.kept_eof:
            quiet = now - max(self.rested, view.started)
            if quiet > min(UNUSED_S, session.limits.idle_timeout_s):
                self.leave()
                session.deadline = now + session.limits.idle_timeout_s - quiet
            elif self.more:
                self.again()
            elif self.held:
                self._arm([])

    def _press(self, then: Callable[[], None]) -> None:
        """The kernel's exchange is to end: seen again after HOLD, it is taken, and ``then`` called."""
        view = self._hold()
        if view is not None and view.busy:
            self.desk.worker.loop.call_later(SETTLE_S, self._pressed, view.began, then)

    def _pressed(self, began: int, then: Callable[[], None]) -> None:
        session = self.session
        if session.lost or not self.recorded or session.rq != IDLE:
            return
        view = self._view()
        if view is not None and view.busy and view.began == began and not view.handed and self._adopt(view):
            then()


class Newcomer:
    """In the place of a Pair for all sessions that have not shown yet that they last: pairing costs as much as a few dozen
    exchanges, so it is for connections that will have more. Shared."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def take(self, pool: Pool) -> UpstreamConnection | None:
        return pool.take()

    def keep(self, session: HttpSession, connection: UpstreamConnection) -> None:
        if not session.exchanges:
            session.since = self.desk.now()
        session.exchanges += session.for_kernel
        if session.scope.brief < BRIEF_MANY:
            lasts = session.exchanges >= LASTING_EXCHANGES or self.desk.now() - session.since > LASTING_S
        else:
            lasts = session.exchanges >= LASTING_EXCHANGES * BRIEF_TIMES
        if lasts and session.for_kernel and self.desk.open(session) and self.desk.carries(session, connection.pool.endpoint):
            session.since = self.desk.now()
            pair = session.pair = Pair(self.desk, session)
            session.rest = pair.rest
            pair.keep(session, connection)
        else:
            connection.upstreams.keep(connection)

    def ended(self, session: HttpSession) -> None:
        """It was not paired."""
        if session.exchanges or session.last:
            session.scope.brief += 1

    quiet = True

    def bequeath(self) -> bool:
        return False

    def lost(self) -> None: ...
    def refuse_more(self) -> None: ...
    def seize(self) -> None: ...
    def recheck(self) -> None: ...
