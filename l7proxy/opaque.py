"""Opaque TCP: bytes both ways without looking, the server's first if it likes; FIN as FIN, RST as RST, and never
more in memory than the transports' marks: a side whose peer is slow is not read."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, cast

from l7proxy.budgeted import Budgeted, waiting
from l7proxy.config import Endpoint
from l7proxy.errors import REASONS
from l7proxy.http1.exchange import NEVER
from l7proxy.metrics import TcpSeries
from l7proxy.scope import Scope
from l7proxy.target import Caller, DialError
from l7proxy.transport import SocketTransport
from l7proxy.upstream import Dial, Health, reset

if TYPE_CHECKING:
    from collections.abc import Callable

    from l7proxy.budget import Account
    from l7proxy.learn import Learner
    from l7proxy.worker import Worker

TRIES_MAX = 5
EARLY_BYTES_MAX = 1 << 16  # from the client before the server is there


class Relay(Budgeted, asyncio.Protocol):
    """The client's side; `Far` is the server's. ``opened``: told once, with (200, "") or (status, reason)."""

    __slots__ = (
        "account", "caller", "clock", "closed", "deadline", "dialling", "early", "early_eof", "endpoint", "far", "health",
        "holds", "late", "learner", "metered", "near", "opened", "paused_far", "paused_near", "scope", "series",
        "sockets", "source_netns", "tried", "worker",
    )  # fmt: skip

    def __init__(
        self,
        worker: Worker,
        scope: Scope,
        caller: Caller,
        source_netns: int,
        *,
        learner: Learner | None = None,
        opened: Callable[[int, str], None] | None = None,
    ) -> None:
        self.worker, self.scope, self.caller, self.source_netns = worker, scope, caller, source_netns
        self.learner, self.opened = learner, opened
        self.clock = worker.clock
        self.account = worker.budgets.of(caller.identity, caller.spiffe)
        self.metered = not scope.inbound  # a tunnel is metered as a whole
        self.sockets: int | None = None
        self.holds = 0
        self.late = False  # neither side is read until its identity's next turn
        self.near: asyncio.Transport = cast(asyncio.Transport, None)
        self.far: Far | None = None
        self.dialling: Dial | None = None
        self.endpoint: Endpoint | None = None
        self.health: Health | None = None
        self.series: TcpSeries | None = None
        self.tried: list[Endpoint] = []
        self.early = b""
        self.early_eof = self.closed = False
        self.paused_near = self.paused_far = False  # not read, because the other side is full
        self.deadline = self.clock.now + scope.config.mesh.idle_timeout_s

    # ---- the client's transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.near = cast(asyncio.Transport, transport)
        self.worker.sessions.add(self)
        self._dial(None)

    def data_received(self, data: bytes) -> None:
        far = self.far
        if far is None:
            self.early += data
            if len(self.early) >= EARLY_BYTES_MAX and not self.paused_near:
                self.paused_near = True
                self.near.pause_reading()
            self.count_held()
            return
        started = perf_counter()
        if self.learner is not None:
            self.learner.client_data(data)
        self.deadline = self.clock.now + self.scope.config.mesh.idle_timeout_s
        self.series.sent += len(data)  # type: ignore[union-attr]  # set with far
        far.transport.write(data)
        if isinstance(self.near, SocketTransport):
            self.near.more()
        if self.metered:
            self.spend(perf_counter() - started)

    def spend(self, seconds: float) -> None:
        """What moving bytes cost; when its turn is over, the relay stands still until the next."""
        account = self.account
        account.spent += seconds
        if account.spent > account.limit and not self.late and account.over():
            self.late = True
            self.near.pause_reading()
            if self.far is not None and not self.far.lost:
                self.far.transport.pause_reading()
            account.defer(self)

    def proceed(self) -> None:
        """Its identity's next turn."""
        self.late = False
        if not self.closed:
            if not self.paused_near:
                self.near.resume_reading()
            if self.far is not None and not self.far.lost and not self.paused_far:
                self.far.transport.resume_reading()

    def count_held(self) -> None:
        size = len(self.early)
        far = self.far
        if self.paused_far and not self.closed:
            size += waiting(self.near)
        if self.paused_near and far is not None and not far.lost:
            size += waiting(far.transport)
        self.hold(size)

    def eof_received(self) -> bool:
        if self.far is None:
            self.early_eof = True
        else:
            self.far.end()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._over()
        if self.far is not None:
            if self.far.lost:
                self.far = None
            elif exc is not None:
                reset(self.far.transport)
            else:
                self.far.transport.close()

    def pause_writing(self) -> None:
        self.paused_far = True
        if self.far is not None and not self.far.lost:
            self.far.transport.pause_reading()
        self.count_held()

    def resume_writing(self) -> None:
        self.paused_far = False
        if self.far is not None and not self.far.lost and not self.late:
            self.far.transport.resume_reading()
        self.count_held()

    # ---- the server's side

    def _dial(self, error: DialError | None) -> None:
        scope, worker = self.scope, self.worker
        endpoint = None
        if len(self.tried) < TRIES_MAX and (error is None or error.elsewhere):
            endpoint = worker.upstreams.choose(scope.all_endpoints(), self.tried, self.clock.now)
        if endpoint is None:
            self._refuse(error.status if error else 503, error.reason if error else "no_endpoints")
            return
        verdict = scope.transport_verdict(endpoint)
        if not verdict.allowed:
            worker.metrics.denied("policy_denied")
            worker.connection_flow(scope, self.caller, endpoint, "denied", verdict.rule)
            self._refuse(403, "policy_denied", counted=True)
            return
        for rule in verdict.audits:
            worker.connection_flow(scope, self.caller, endpoint, "audited", rule)
        self.endpoint = endpoint
        self.health = worker.upstreams.health_of(endpoint)
        far = Far(self, endpoint, verdict.rule)
        self.dialling = worker.upstreams.dial(endpoint, self.caller, self.source_netns, far, self._failed, opaque=True)

    def _failed(self, error: DialError) -> None:
        self.dialling = None
        if self.closed or self.endpoint is None:
            return
        self.worker.upstreams.blame(self.worker.upstreams.health_of(self.endpoint), error)
        self.tried.append(self.endpoint)
        self._dial(error)

    def _refuse(self, status: int, reason: str, *, counted: bool = False) -> None:
        """There is no language to answer in: RST."""
        if not counted:
            self.worker.metrics.denied(reason if reason in REASONS else "other")
            self.worker.connection_flow(self.scope, self.caller, self.endpoint, "denied", reason)
        self.worker.sessions.discard(self)
        self.closed = True
        self.ended()
        if self.opened is not None:
            opened, self.opened = self.opened, None
            opened(status, reason)
        else:
            reset(self.near)

    def far_open(self, far: Far, rule: str) -> None:
        self.dialling = None
        if self.closed:
            reset(far.transport)
            return
        scope, worker, endpoint = self.scope, self.worker, far.endpoint
        self.far = far
        workload = scope.config.workloads.get(endpoint.key)
        self.series = worker.metrics.tcp(scope.label, scope.config.label(workload.spiffe if workload else None))
        self.series.opened += 1
        health = worker.upstreams.health_of(endpoint)
        health.outstanding += 1
        health.failures, health.failed_until = 0, 0.0
        self.health = health
        worker.connection_flow(scope, self.caller, endpoint, "allowed", rule)
        if self.opened is not None:
            opened, self.opened = self.opened, None
            opened(200, "")
        was_paused, self.paused_near = self.paused_near, False
        if self.early:
            data, self.early = self.early, b""
            self.data_received(data)
        if was_paused and not self.paused_near:  # else the server reads slowly, and says when it goes on
            self.near.resume_reading()
        if self.early_eof:
            far.end()

    def _over(self) -> None:
        self.worker.sessions.discard(self)
        if self.dialling is not None:
            self.dialling.cancel()
            self.dialling = None
        if not self.closed and self.series is not None and self.health is not None:
            self.series.closed += 1
            self.health.outstanding -= 1
        self.closed = True
        self.ended()

    # ---- from the worker

    def timeout(self) -> None:
        self.cut()

    idle, endless = False, True

    def end(self) -> None:
        """Draining: such a connection has no boundary to end at; it is cut when its time is over."""

    end_idle = end

    def cut(self) -> None:
        """RST to both sides."""
        self.deadline = NEVER
        reset(self.near)
        if self.far is not None and not self.far.lost:
            reset(self.far.transport)

    def recheck(self) -> None:
        """A new configuration: cut when it denies this."""
        scope = self.worker.rescope(self.scope)
        if scope is not None and self.endpoint is not None and self.endpoint.key in scope.config.workloads:
            verdict = scope.transport_verdict(self.endpoint)
            if verdict.allowed:
                self.scope = scope
                return
            self.worker.denied_open(scope, verdict.rule)
        self.cut()


class Far(asyncio.Protocol):
    """The server's side of a `Relay`."""

    __slots__ = ("ended", "endpoint", "lost", "relay", "rule", "transport")

    def __init__(self, relay: Relay, endpoint: Endpoint, rule: str) -> None:
        self.relay, self.endpoint, self.rule = relay, endpoint, rule
        self.lost = self.ended = False

    @property
    def meter(self) -> Account | None:
        """See `SocketTransport`."""
        return self.relay.meter

    def waits(self) -> bool:
        return True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.relay.far_open(self, self.rule)

    def data_received(self, data: bytes) -> None:
        relay = self.relay
        if relay.learner is not None:
            relay.learner.server_data(data)
        relay.deadline = relay.clock.now + relay.scope.config.mesh.idle_timeout_s
        relay.series.received += len(data)  # type: ignore[union-attr]  # set with far
        started = perf_counter()
        relay.near.write(data)
        if isinstance(self.transport, SocketTransport):
            self.transport.more()
        if relay.metered:
            relay.spend(perf_counter() - started)

    def eof_received(self) -> bool:
        if not self.relay.closed and self.relay.near.can_write_eof():
            self.relay.near.write_eof()
        self._both_ended()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.relay.closed:
            self.relay.far = None  # else they would wait for the collector
        else:
            if exc is not None:
                reset(self.relay.near)
            else:
                self.relay.near.close()

    def pause_writing(self) -> None:
        relay = self.relay
        relay.paused_near = True
        relay.near.pause_reading()
        relay.count_held()

    def resume_writing(self) -> None:
        relay = self.relay
        relay.paused_near = False
        if not relay.late:
            relay.near.resume_reading()
        relay.count_held()

    def end(self) -> None:
        """The client sent FIN."""
        if not self.lost:
            self.transport.write_eof()
            self._both_ended()

    def _both_ended(self) -> None:
        if self.ended and not self.lost:
            self.transport.close()
            self.relay.near.close()
        self.ended = True
