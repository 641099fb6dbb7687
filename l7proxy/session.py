"""The shell of `http1.cycle.Cycle`: an asyncio protocol for the client's side, whatever carries it (a captured
socket, a stream of a tunnel), that carries out the cycle's commands. Nothing here waits, and nothing makes a task."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, cast

from l7proxy.budget import Account
from l7proxy.budgeted import LOST_S, PARKED_S, Budgeted, put_off, waiting
from l7proxy.config import Endpoint
from l7proxy.errors import Reply, denied, reply
from l7proxy.express import ANSWER_BYTES_MAX, LEG_ASKED, LEG_NEW, LEG_WANTED
from l7proxy.http1.added import with_headers
from l7proxy.http1.exchange import BODY, CLOSED, IDLE, RAW
from l7proxy.http1.head import RequestHead
from l7proxy.http1.request_side import RequestSide
from l7proxy.quick import Quick
from l7proxy.scope import Candidate, Plan, Scope
from l7proxy.target import Caller, DialError
from l7proxy.transport import SocketTransport
from l7proxy.upstream import UpstreamConnection, reset

if TYPE_CHECKING:
    from l7proxy.express_session import Newcomer, Pair
    from l7proxy.worker import Worker

TRIES_MAX = 5  # endpoints tried for one request


class HttpSession(Quick, Budgeted, asyncio.Protocol):
    """One client connection that carries HTTP. ``source_netns``: see `Target`."""

    __slots__ = (
        "account", "caller", "candidate", "exchanges", "heard", "holds", "late", "late_eof", "leg", "lost", "metered", "pair",
        "parked", "plan", "scope", "since", "sockets", "source_netns", "started", "transport", "tried", "upstream", "worker",
    )  # fmt: skip

    def __init__(self, worker: Worker, scope: Scope, caller: Caller, source_netns: int) -> None:
        super().__init__(worker.heads, scope.config.limits, worker.clock)
        self.worker, self.scope, self.caller, self.source_netns = worker, scope, caller, source_netns
        self.plan: Plan | None = None
        self.candidate: Candidate | None = None
        self.upstream: UpstreamConnection | None = None
        self.tried: list[Endpoint] = []
        self.started = self.since = self.heard = 0.0  # of this exchange; the end of the first one; the last read
        self.exchanges = 0  # until it is paired
        self.leg = LEG_NEW
        self.lost = False
        self.account = worker.budgets.of(caller.identity, caller.spiffe)
        self.metered = not scope.inbound  # a tunnel is metered as a whole
        self.sockets: int | None = None
        self.holds = 0
        self.late: bytes | None = None  # came when its identity's turn was over
        self.late_eof = False
        self.parked: asyncio.TimerHandle | None = None  # after a 429: not read until then, nor asked for at the agent
        self.pair: Pair | Newcomer | None = worker.express.newcomer if scope.express else None

    # ---- the client's transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.to_client = self.transport.write
        self.worker.sessions.add(self)
        if self.worker.draining:
            self.end()

    def data_received(self, data: bytes) -> None:
        account = self.account
        if self.metered:
            if self.late is not None or (account.spent > account.limit and account.over()):
                put_off(self, account, data)
                self._count_held()
                return
            started = self.heard = perf_counter()
            self.client_data(data)
            account.spent += perf_counter() - started
        else:
            self.heard = perf_counter()
            self.client_data(data)
        if self.rq in (BODY, RAW) and isinstance(self.transport, SocketTransport):
            self.transport.more()
        if self.pending or self.holds:
            self._count_held()

    def proceed(self) -> None:
        """Its identity's next turn."""
        data, self.late = self.late, None
        if data is None or self.lost:
            return
        if not self.client_paused:
            self.transport.resume_reading()
        started = self.heard = perf_counter()
        self.client_data(data)
        if self.late_eof:
            self.late_eof = False
            self.client_eof()
        self.account.spent += perf_counter() - started
        self._count_held()

    def _count_held(self) -> None:
        """Rarely: only a connection on which something waits."""
        size = len(self.pending) + (len(self.late) if self.late is not None else 0)
        if not self.lost and self.client_full:
            size += waiting(self.transport)
        if self.upstream is not None and self.client_paused and self.upstream.transport is not None:
            size += waiting(self.upstream.transport)
        self.hold(size)

    def eof_received(self) -> bool:
        if self.late is not None:
            self.late_eof = True
        else:
            self.client_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        started = perf_counter()
        self.lost, self.late, self.rest = True, None, None
        self.worker.sessions.discard(self)
        self.client_lost()
        newcomer = self.worker.express.newcomer
        if self.pair is newcomer:
            newcomer.ended(self)
        elif self.pair is not None:
            self.pair.lost()
        self.ended()
        if self.metered:
            self.account.spent += perf_counter() - started + LOST_S

    def pause_writing(self) -> None:
        self.client_blocked()
        if self.upstream is not None:
            self.upstream.pause()
        self._count_held()

    def resume_writing(self) -> None:
        if self.upstream is not None:
            self.upstream.resume()
        self.client_drained()
        self._count_held()

    # ---- commands

    def decide(self, head: RequestHead) -> None:
        now = self.started = perf_counter()
        worker, account = self.worker, self.account
        if not account.request(now) or account.overfull:
            self._over_budget(account)
            return
        scope = self.scope
        if scope.config is not worker.config:
            again = worker.rescope(scope)
            if again is None:
                self.refuse(reply("no_service", keep=False))
                return
            scope = self.scope = again
            self.limits = scope.config.limits
            if self.pair is None and scope.express:
                self.pair = worker.express.newcomer
        plan = self.plan = scope.plans.get(head) or scope.plan(head)
        if self.tried:
            self.tried = []
        candidate = plan.only
        if candidate is None or plan.error is not None:
            picked = scope.pick(plan, self.tried)
            if isinstance(picked, Reply):
                self.refuse(picked)
                return
            candidate = picked
        self._go(candidate, head)

    def _over_budget(self, account: Account) -> None:
        """429, and what else this client has to say is not read for a moment."""
        if account.overfull:
            account.refuse("budget_bytes")
        if self.leg == LEG_WANTED:  # the agent's answer would end that moment
            self.leg = LEG_NEW
        if self.parked is not None:
            self.parked.cancel()
        self.parked = self.worker.loop.call_later(PARKED_S, self._unpark)
        self.refuse(reply("budget_bytes" if account.overfull else "budget_requests", keep=not self.pending))
        if not self.lost and self.rq == IDLE:
            self.transport.pause_reading()
        else:
            self.parked.cancel()
            self._unpark()

    def _unpark(self) -> None:
        self.parked = None
        if not self.client_paused:
            self.resume_client()

    def again(self, head: RequestHead) -> None:
        if self.candidate is not None:
            self._go(self.candidate, head, fresh=True)

    def _go(self, candidate: Candidate, head: RequestHead, *, fresh: bool = False) -> None:
        self.candidate = candidate
        if candidate.error is not None:
            self.refuse(candidate.error)
            return
        pool = candidate.pool
        if pool.retired:
            pool = candidate.pool = self.worker.upstreams.pool(self.caller, candidate.endpoint)
        pair = self.pair
        connection = None if fresh else pool.take() if pair is None else pair.take(pool)
        if connection is None:
            connection = self.worker.upstreams.open(pool, self.caller, self.source_netns, self)
            if connection is None:
                over = self.account.descriptors >= self.account.budget.descriptors
                self.refuse(reply(self.account.refuse("budget_descriptors") if over else "overloaded"))
                return
            self.upstream = connection
            pool.health.outstanding += 1
            return
        self.upstream = connection
        connection.sink = self
        pool.health.outstanding += 1
        self.to_upstream = connection.write
        self.forward(head.onward if not candidate.add_headers else self._rewritten(candidate, head), reused=True)

    def upstream_open(self, connection: UpstreamConnection) -> None:
        head, candidate = self.request, self.candidate
        if head is None or candidate is None:
            return
        self.to_upstream = connection.write
        self.forward(head.onward if not candidate.add_headers else self._rewritten(candidate, head), reused=False)

    def upstream_failed(self, error: DialError) -> None:
        """Before any byte was sent: another endpoint may do."""
        connection, self.upstream = self.upstream, None
        if connection is not None:
            connection.pool.health.outstanding -= 1
        if self.candidate is not None and self.plan is not None and self.request is not None:
            self.tried.append(self.candidate.endpoint)
            if error.elsewhere and len(self.tried) < TRIES_MAX:
                picked = self.scope.pick(self.plan, self.tried)
                if isinstance(picked, Candidate):
                    self._go(picked, self.request)
                    return
        self.refuse(Reply(error.status, error.reason, error.detail))

    def _rewritten(self, candidate: Candidate, head: RequestHead) -> bytes:
        workload = self.scope.config.workloads.get(candidate.endpoint.key)
        return with_headers(head, candidate.add_headers, self.caller.spiffe, workload.spiffe if workload else "")

    def release(self, reusable: bool) -> None:
        connection = self.upstream
        if connection is not None:
            self.upstream = None
            connection.pool.health.outstanding -= 1
            if reusable and not connection.full:  # nobody would tell the next one that the server does not read
                if self.pair is None:
                    self.worker.upstreams.keep(connection)
                else:
                    self.pair.keep(self, connection)
            else:
                connection.close()

    def abandon(self) -> None:
        connection = self.upstream
        if connection is not None:
            self.upstream = None
            connection.pool.health.outstanding -= 1
            connection.abort()

    def end_client(self) -> None:
        if not self.lost and self.transport.can_write_eof():
            self.transport.write_eof()

    def close_client(self) -> None:
        if not self.lost:
            self.transport.close()

    def reset_client(self) -> None:
        if not self.lost:
            reset(self.transport)

    def end_upstream(self) -> None:
        if self.upstream is not None and not self.upstream.lost:
            self.upstream.transport.write_eof()

    def pause_client(self) -> None:
        if not self.lost:
            self.transport.pause_reading()

    def resume_client(self) -> None:
        if not self.lost and self.late is None and self.parked is None:
            self.transport.resume_reading()

    def upstream_full(self) -> None:
        """The server reads slowly."""
        if not self.client_paused:
            self.client_paused = True
            self.pause_client()
        self._count_held()

    def upstream_drained(self) -> None:
        if self.client_paused:
            self._resume()
        self._count_held()

    def finished(self, status: int, why: str) -> None:
        candidate = self.candidate
        seconds = perf_counter() - self.started if self.request is not None else 0.0
        series = candidate.series if candidate is not None else self.scope.refused
        series.done(status, seconds)
        worker = self.worker
        if why or worker.flow_budget > 0 or worker.access is not None or (candidate is not None and candidate.audits):
            worker.exchange(self, status, why, seconds)
        self.candidate = None
        self.plan = None

    # ---- paired with the kernel

    @property
    def for_kernel(self) -> bool:
        """Whether the answer that has just ended was of those it carries. None: it came in one read, see `Quick`."""
        answer, request = self.response, self.request
        if answer is None or answer.status in (204, 304) or (request is not None and request.method == "HEAD"):
            return True
        return 0 <= answer.framing <= ANSWER_BYTES_MAX

    def carry_on(self, head: RequestHead, connection: UpstreamConnection, elapsed: float) -> None:
        """Before `adopt`: what `decide` would have set, for a request that went without us."""
        scope = self.scope
        if scope.config is not self.worker.config:
            scope = self.scope = self.worker.rescope(scope) or scope
            self.limits = scope.config.limits
        endpoint = connection.pool.endpoint
        plan = self.plan = scope.plan(head)
        self.candidate = plan.candidates.get(endpoint) or scope.candidate(plan, endpoint)
        self.tried, self.started = [], perf_counter() - elapsed
        self.upstream, connection.sink = connection, self
        self.to_upstream = connection.write
        connection.pool.health.outstanding += 1

    @property
    def unread(self) -> bool:
        """At rest on this side, with nothing half read."""
        return self.rq == IDLE and not (self.pending or self.late or self.lost or self.ending or self.client_ended)

    @property
    def idle(self) -> bool:
        return super().idle and self.leg != LEG_ASKED and (self.pair is None or self.pair.quiet)

    def end(self) -> None:
        if self.pair is not None and self.pair.bequeath():
            return
        super().end()
        if self.pair is not None:
            self.pair.refuse_more()

    def cut(self) -> None:
        if self.pair is not None:
            self.pair.seize()
        super().cut()

    # ---- from the worker

    def recheck(self) -> None:
        """A new configuration: what runs now is decided anew, and cut if it is denied."""
        if self.pair is not None:
            self.pair.recheck()
        if self.rq in (IDLE, CLOSED) or self.request is None or self.candidate is None:
            return
        scope = self.worker.rescope(self.scope)
        endpoint = self.candidate.endpoint
        if scope is not None and endpoint.key in scope.config.workloads:
            candidate = scope.candidate(Plan(self.request), endpoint)
            if candidate.error is None:
                return
            self.worker.denied_open(self.scope, candidate.rule)
            if self.rq != RAW and not self.response_bytes:
                self.abandon()
                self.rs = IDLE
                self.refuse(denied(candidate.rule))
                return
        self.cut()


class HttpRefusal(HttpSession):
    """A connection that came after the policy's lease: whatever it asks is refused."""

    __slots__ = ()

    client_data = RequestSide.client_data  # by way of `decide`

    def decide(self, head: RequestHead) -> None:  # noqa: ARG002  # the cycle's signature
        self.started = perf_counter()
        self.refuse(reply("lease_expired", keep=False))
