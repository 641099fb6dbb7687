"""How a session comes to be paired, and apart again: it asks the agent when it rests, and is armed when an exchange that took
user space is over.

    APART -> PLANNED (an upstream is kept aside) -> ASKING (not read) -> PAIRED -> PARTING (HOLD, until it rests) -> APART
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from l7proxy.express import ARM, HOLD, NO_SLOT, Futility, Unsettled, View, Watch
from l7proxy.express_ends import Spare, UpstreamEnd
from l7proxy.http1.exchange import IDLE, NEVER
from l7proxy.upstream import Pool, UpstreamConnection
from mesh.link import PAIR_ENDS_MAX, Paired, PairEnd

if TYPE_CHECKING:
    from l7proxy.express_desk import Desk
    from l7proxy.session import HttpSession

APART, PLANNED, ASKING, PAIRED, PARTING, OVER = range(6)

TRIES_MAX = 3  # refusals that may pass, for one connection; then
AGAIN_S = 10.0  # between two: an agent that starts has none of what it is asked about, for seconds where processors are slow
ANSWER_S = 1.0
SETTLE_S = 0.01  # after HOLD: what another CPU had begun is visible by then
LOOK_S = 0.00001  # of the worker's time, about


class Asking(asyncio.Protocol):
    """What `l7proxy.express_session.Pair` is made on. The rules of events are there."""

    __slots__ = (
        "armed", "complete", "consumed", "delay", "desk", "dialling", "done", "ends", "futility", "held", "kept", "kept_eof",
        "leaving", "limbo", "more", "number", "patient", "recorded", "rested", "sent", "session", "sock", "state", "timer",
        "tries", "unsettled", "used", "wanted", "watch",
    )  # fmt: skip

    def __init__(self, desk: Desk, session: HttpSession) -> None:
        self.desk, self.session = desk, session
        self.state = APART
        self.number = self.dialling = self.tries = self.consumed = self.sent = 0
        self.recorded = False  # the kernel has a record of it
        self.complete = True  # a takeover has all its sockets
        self.ends: list[UpstreamEnd] = []
        self.limbo: list[UpstreamEnd] = []  # of a record that vanished: an answer may still come there
        self.used: list[UpstreamEnd] = []  # since it was armed last
        self.kept, self.kept_eof = b"", False  # came while the kernel was busy
        self.armed = self.held = self.done = False
        self.more = False  # to be paired anew, with all ends it has by now
        self.leaving = False  # the worker ends: to be left to the next one as soon as it rests
        self.wanted: set[PairEnd] = set()  # dialled once
        self.rested = self.delay = self.patient = 0.0  # patient: not asked before then
        self.timer: asyncio.TimerHandle | None = None
        self.watch, self.futility, self.unsettled = Watch(), Futility(), Unsettled()
        self.sock: Any = None

    # ---- events, of the subclass

    def server_spoke(self, end: UpstreamEnd, data: bytes) -> None:
        raise NotImplementedError

    def server_ended(self, end: UpstreamEnd) -> None:
        raise NotImplementedError

    def server_gone(self, end: UpstreamEnd) -> None:
        raise NotImplementedError

    def sweep(self, now: float) -> None:
        raise NotImplementedError

    def _hear_kept(self) -> None:
        raise NotImplementedError

    def _look_in(self, delay: float) -> None:
        raise NotImplementedError

    def _leave_behind(self) -> None:
        raise NotImplementedError

    # ---- the kernel

    def _view(self) -> View | None:
        self.session.account.spent += LOOK_S
        return self.desk.kernel.express_view(self.sock)

    def _hold(self) -> View | None:
        """No exchange begins after it, and the next bytes of a server come through user space."""
        if not self.desk.kernel.express_op(self.sock, HOLD, NO_SLOT):
            return None
        self.held = True
        return self._view()

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    # ---- from the session, between exchanges

    def take(self, pool: Pool) -> UpstreamConnection | None:
        """Its own connection to that endpoint, or one of the pool's."""
        for end in self.ends:
            connection = end.connection
            if connection.sink is None and not connection.lost and _same(connection.pool, pool):
                if end not in self.used:
                    self.used.append(end)
                return connection
        return pool.take()

    def keep(self, session: HttpSession, connection: UpstreamConnection) -> None:  # noqa: ARG002  # as Newcomer's
        """An exchange is over and its connection good for the next."""
        connection.sink = None
        for end in self.ends:
            if end.connection is connection:
                connection.resume()
                return
        if not connection.lost and self._may_have(connection):
            self.ends.append(UpstreamEnd(self, connection))
            if self.state == APART:
                self.state = PLANNED
            elif self.state == PAIRED:
                self.more = True
        else:
            connection.upstreams.keep(connection)

    def _may_have(self, connection: UpstreamConnection) -> bool:
        if self.state == APART:
            if self.tries >= TRIES_MAX or self.session.clock.now < self.patient or not self.desk.open(self.session):
                return False
        elif self.state not in (PLANNED, PAIRED) or len(self.ends) >= PAIR_ENDS_MAX:
            return False
        endpoint = connection.pool.endpoint
        if any(end.connection.pool.endpoint == endpoint for end in self.ends):
            return False
        return self.desk.carries(self.session, endpoint)

    def rest(self) -> None:
        """An exchange is over, nothing is pending. Its last bytes may still wait in the transport: what is armed counts
        them, and holds only when the client has them all."""
        if self.kept or self.kept_eof or self.session.late is not None:
            return  # comes next
        if self.state == PAIRED:
            if self.more:
                self.again()
            else:
                if self.armed:
                    self.session.deadline = NEVER
                else:
                    self._arm(self.used)
                if self.leaving:
                    self._leave_behind()
        elif self.state == PLANNED and self.session.parked is None:
            self.ask()

    def ends_with(self, data: bytes) -> None:
        """An exchange is over once this is written, at once and as a whole. Armed before it is, so that it is armed when the
        client has it and asks again."""
        session = self.session
        if self.state == PAIRED and not (self.more or self.kept or self.kept_eof) and session.late is None:
            self._arm(self.used, len(data))

    def _arm(self, ends: list[UpstreamEnd], unsent: int = 0) -> None:
        session, op = self.session, self.desk.kernel.express_op
        sent = self.sent + unsent
        for end in ends:
            if end.connection.lost or end.connection.late is not None:
                self.leave()
                return
            if end.slot >= 0 and not op(self.sock, ARM, end.slot, self.consumed, sent, end.sent, end.consumed):
                self.leave()
                return
        if not ends and not op(self.sock, ARM, NO_SLOT, self.consumed, sent):
            self.leave()
            return
        self.used = []
        self.armed, self.held = True, False
        self.rested = session.clock.now
        session.deadline = NEVER  # it is looked at instead: requests go by unseen
        self.desk.count("express_armed")

    # ---- asking

    def ask(self) -> None:
        """Once all is written, two turns on."""
        self.state = ASKING
        self.session.transport.pause_reading()
        loop = self.desk.worker.loop
        loop.call_soon(lambda: loop.call_soon(self._ask))

    def again(self) -> None:
        """Paired anew, when the kernel rests. Until then HOLD keeps it from beginning more. Not after a 429: the answer would
        have it read again, or that moment's end while nothing may be."""
        session = self.session
        if self.state != PAIRED or session.rq != IDLE or session.parked is not None or self.kept or self.kept_eof:
            return
        view = self._hold()
        if view is None:
            self._lost_record()
        elif not view.busy and not view.inside:
            self.ask()

    def _ask(self) -> None:
        if self.state != ASKING:
            return
        session = self.session
        view = self._view() if self.recorded else None
        ready = (
            session.unread
            and not session.transport.is_closing()
            and not session.transport.get_write_buffer_size()
            and not (view is not None and (view.busy or view.inside))
            and all(end.idle and end.connection.late is None and not end.connection.transport.get_write_buffer_size()
                    for end in self.ends if not end.connection.lost)
        )  # fmt: skip
        self.ends = [end for end in self.ends if not end.connection.lost and not end.connection.transport.is_closing()]
        if not ready or not self.ends or not self.desk.ask(self):
            self.state = PAIRED if self.recorded else PLANNED if self.ends else APART
            self._read_on()
            if self.recorded:
                self.more = True
                self.desk.later(self)
            return
        self.timer = self.desk.worker.loop.call_later(ANSWER_S, self._unanswered)

    def count(self) -> None:
        """From here on, from zero: it is being asked."""
        session = self.session
        if self.sock is None:
            self.sock = session.transport.get_extra_info("socket")
        session.transport.set_protocol(self)
        session.to_client = self._write
        self.consumed = self.sent = 0
        self.used, self.more = [], False
        for end in self.ends:
            end.count()

    def _write(self, data: bytes) -> None:
        self.sent += len(data)
        self.session.transport.write(data)

    def _unanswered(self) -> None:
        self.timer = None
        if self.state == ASKING:
            self.refused("unanswered", tell=True)

    def unasked(self) -> None:
        """There was nobody to ask."""
        if self.state == ASKING:
            self.refused("unlinked")

    def refused(self, reason: str, *, tell: bool = False) -> None:
        self.tries += 1
        if self.tries == TRIES_MAX:  # and not past it, where nothing is asked any more
            self.tries, self.patient = TRIES_MAX - 1, self.session.clock.now + AGAIN_S
        self.desk.count(f"express_refused_{reason}")
        self._apart(tell=tell or self.recorded)

    def heard(self, message: Paired) -> None:
        """The agent's answer; or, unasked, that it is over, or that there is one endpoint more."""
        if self.state != ASKING:
            if not message.ok:
                self.desk.count(f"express_unpaired_{message.reason or 'agent'}")
                if message.lasting:
                    self.session.scope.express = False
                self.leave()
            else:
                self._fill(message.missing)
            return
        self._stop_timer()
        if not message.ok or max(message.slots, default=-1) < 0 or len(message.slots) != len(self.ends):
            if message.lasting:
                self.session.scope.express = False
            self.refused(message.reason or "no_slot", tell=message.ok)
            return
        self.state, self.recorded, self.tries = PAIRED, True, 0
        for end, slot in zip(list(self.ends), message.slots, strict=True):
            end.slot = slot
            if slot < 0:
                self.ends.remove(end)
                end.part()
        self.desk.count("express_paired")
        self._arm(list(self.ends))
        if self.leaving:
            self._leave_behind()
        if self.state == PAIRED:
            self._read_on()
            if not self.leaving:
                self._fill(message.missing)

    def _read_on(self) -> None:
        session = self.session
        if not session.lost and not session.client_paused and not session.transport.is_closing():
            session.resume_client()

    def _fill(self, missing: tuple[PairEnd, ...]) -> None:
        """Dials what the program may choose and the pair has not; then it is paired anew with all of them."""
        for wanted in missing:
            if wanted in self.wanted or len(self.ends) + self.dialling >= PAIR_ENDS_MAX:
                continue
            self.wanted.add(wanted)
            pool = self.desk.pool(self.session, wanted)
            if pool is None:
                continue
            connection = pool.take()
            if connection is not None:
                self.ends.append(UpstreamEnd(self, connection))
                self.more = True
            elif self.desk.worker.upstreams.open(pool, self.session.caller, self.session.source_netns, Spare(self)) is not None:
                self.dialling += 1
        if self.more and not self.dialling:
            self.again()

    def dialled(self, connection: UpstreamConnection | None) -> None:
        """One that was missing, or why not."""
        self.dialling -= 1
        if connection is not None:
            if self.state in (PAIRED, ASKING) and len(self.ends) < PAIR_ENDS_MAX:
                self.ends.append(UpstreamEnd(self, connection))
                self.more = True
            else:
                connection.upstreams.keep(connection)
        if self.more and not self.dialling:
            self.again()

    # ---- going apart

    def leave(self) -> None:
        """Back to user space for good, or until it asks anew; at once where nothing runs in the kernel."""
        if self.state == ASKING:
            self.refused("left", tell=True)
        elif self.state == PAIRED:
            if self.session.rq != IDLE:
                self._apart(tell=True)
            elif self._hold() is None:
                self._lost_record()
            else:
                self.state = PARTING
                self._look_in(SETTLE_S)
        elif self.state == PLANNED:
            self._apart()

    def _lost_record(self) -> None:
        """The kernel does not know it any more: all goes through user space already. If it was in the middle of something
        nobody knows, so its connections serve nobody else: an answer that comes on one tells, and ends the session."""
        if self.armed:
            self.desk.count("express_record_lost")
            self.limbo, self.ends = [end for end in self.ends if end.idle], [end for end in self.ends if not end.idle]
            self.desk.worker.loop.call_later(self.session.limits.request_timeout_s, self._end_limbo)
        self._apart(tell=True)

    def _end_limbo(self) -> None:
        limbo, self.limbo = self.limbo, []
        for end in limbo:
            end.drop()

    def _apart(self, *, tell: bool = False) -> None:
        """At rest in the kernel, or never in it."""
        session = self.session
        if self.state == OVER:
            return
        self._stop_timer()
        self.state, self.armed, self.recorded, self.more = APART, False, False, False
        self.desk.forget(self, tell=tell)
        if self.sock is not None and not session.transport.is_closing():
            session.transport.set_protocol(session)
        session.to_client = session.transport.write
        ends, self.ends, self.used = self.ends, [], []
        for end in ends:
            end.part()
        if session.deadline == NEVER and session.rq == IDLE:
            session.deadline = session.clock.now + session.limits.idle_timeout_s
        if self.kept or self.kept_eof:
            self._hear_kept()
        else:
            self._read_on()
        if self.leaving:
            self.leaving = False
            session.end()

    def lost(self) -> None:
        """The client's connection is no more."""
        self._stop_timer()
        safe = not self.armed or self.done
        self.state, self.recorded = OVER, False
        self.desk.forget(self, tell=self.number != 0)
        self._end_limbo()
        ends, self.ends = self.ends, []
        for end in ends:
            if safe and end.slot < 0:
                end.part()
            else:
                end.drop()
        self.session.rest = None


def _same(one: Pool, other: Pool) -> bool:
    """Whether they lead to the same endpoint. A pool that was swept away has a successor."""
    return one is other or one.endpoint == other.endpoint
