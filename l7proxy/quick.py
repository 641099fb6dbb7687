"""The exchange that nearly all are, in one piece: a head seen before, under a decision remembered, over a connection at
hand; answered in one read. It does what `Cycle` and `HttpSession` do step by step, and leaves to them whatever is not so.

Why it exists: an exchange costs a worker more in calls and attributes than in all else together (ARCHITECTURE.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l7proxy.errors import Reply
from l7proxy.http1.added import last_answer
from l7proxy.http1.cycle import Cycle
from l7proxy.http1.exchange import CLOSED, HEAD, IDLE, NONE, SENT, WAITING
from l7proxy.http1.head import RequestHead
from l7proxy.upstream import IDLE_PER_POOL_MAX

if TYPE_CHECKING:
    from l7proxy.budget import Account
    from l7proxy.config import Endpoint
    from l7proxy.express_session import Newcomer, Pair
    from l7proxy.scope import Candidate, Plan, Scope
    from l7proxy.upstream import UpstreamConnection
    from l7proxy.worker import Worker


class Quick(Cycle):
    """Mixed into `HttpSession`, whose slots these are."""

    if not TYPE_CHECKING:
        __slots__ = ()

    account: Account
    candidate: Candidate | None
    heard: float  # when what the client sent was read
    pair: Newcomer | Pair | None
    plan: Plan | None
    scope: Scope
    started: float
    tried: list[Endpoint]
    upstream: UpstreamConnection | None
    worker: Worker

    def client_data(self, data: bytes) -> None:
        """See `RequestSide`; with `_begin`, `decide`, `_go` and `forward`."""
        scope, worker = self.scope, self.worker
        plan = scope.known.get(data)
        if plan is None or self.rq != IDLE or self.pending or self.client_full or scope.config is not worker.config:
            super().client_data(data)
            return
        self.request = head = plan.head
        self.rq = WAITING
        self.retried = self.response_bytes = False
        self.interim = 0
        self.deadline = self.clock.now + self.limits.request_timeout_s
        self.started = now = self.heard
        account = self.account
        if not account.request(now) or account.held > account.budget.bytes_in_flight:
            self._over_budget(account)
            return
        self.plan = plan
        if self.tried:
            self.tried = []
        candidate = plan.only
        if candidate is None:
            picked = scope.pick(plan, self.tried)
            if isinstance(picked, Reply):
                self.refuse(picked)
                return
            candidate = picked
        pool, pair = candidate.pool, self.pair
        if not candidate.plain or pool.retired:
            self._go(candidate, head)
            return
        if pair is None or pair is worker.express.newcomer:
            idle = pool.idle
            if not idle:
                self._go(candidate, head)
                return
            connection = idle[-1]
            tunnel = connection.tunnel
            if connection.lost or (tunnel is not None and tunnel.retired):
                self._go(candidate, head)
                return
            del idle[-1]
        else:
            own = pair.take(pool)
            if own is None:
                self._go(candidate, head, fresh=True)
                return
            connection = own
        pool.health.outstanding += 1
        self.candidate, self.upstream = candidate, connection
        connection.sink = self  # type: ignore[assignment]  # HttpSession is a Sink
        self.to_upstream = write = connection.write
        self.reused, self.rs, self.rq = True, HEAD, SENT
        write(head.onward)

    def upstream_data(self, data: bytes) -> None:
        """See `ResponseSide`; with `_response_done`, `release`, `keep`, `finished` and `_next`."""
        request, candidate, connection, worker, pair = self.request, self.candidate, self.upstream, self.worker, self.pair
        if (
            self.rs == HEAD and self.rq == SENT
            and request is not None and request.plain and candidate is not None and candidate.plain and connection is not None
            and not (self.uppending or self.pending or self.client_ended or self.client_paused or self.ending)
            and not connection.full and worker.flow_budget <= 0 and worker.access is None
        ):  # fmt: skip
            end = data.find(b"\r\n\r\n") + 4
            head = self.heads.responses.get(data[:end])
            if head is not None and head.plain and head.framing == len(data) - end:
                last, write = request.last, self.to_client
                out = last_answer(head) + data[end:] if last else data
                paired = pair is not None and pair is not worker.express.newcomer
                if not paired:
                    write(out)
                self.upstream = connection.sink = None
                pool, now = connection.pool, self.clock.now
                pool.health.outstanding -= 1
                if paired:
                    pair.keep(self, connection)  # type: ignore[union-attr,arg-type]  # `HttpSession` is all there is
                    if not last:
                        pair.ends_with(out)  # type: ignore[union-attr]  # a Pair
                    write(out)
                elif pair is not None and not last and candidate.endpoint.local:  # it counts: a connection that lasts is paired
                    pair.keep(self, connection)  # type: ignore[arg-type]  # as above
                elif connection.lost or connection.reader_paused or len(pool.idle) >= IDLE_PER_POOL_MAX:
                    worker.upstreams.keep(connection)
                else:
                    connection.idle_since = now
                    pool.idle.append(connection)
                candidate.series.done(head.status, connection.heard - self.started)
                self.request = self.candidate = self.plan = None
                self.rs = NONE
                if last:
                    self.last, self.rq = True, CLOSED
                    self.close_client()
                    return
                self.rq = IDLE
                self.deadline = now + self.limits.idle_timeout_s
                if self.rest is not None:
                    self.rest()
                return
        super().upstream_data(data)

    # ---- `HttpSession`'s

    def _over_budget(self, account: Account) -> None:
        raise NotImplementedError

    def _go(self, candidate: Candidate, head: RequestHead, *, fresh: bool = False) -> None:
        raise NotImplementedError
