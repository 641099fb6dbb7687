"""Connections to endpoints: which endpoint, kept where, dialled how.

A pool belongs to one (caller identity, caller address, endpoint): the server sees the caller's address on the
connection, so no two callers ever share one.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Collection, Sequence
from random import random
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, cast

from l7proxy.budget import Account
from l7proxy.budgeted import put_off
from l7proxy.config import Endpoint
from l7proxy.express import LEG_NEW
from l7proxy.local_dial import LocalDial
from l7proxy.target import Caller, DialError, Target
from l7proxy.transport import SocketTransport

if TYPE_CHECKING:
    from l7proxy.streams import Tunnel
    from l7proxy.worker import Worker

IDLE_PER_POOL_MAX = 128
OPEN_PER_POOL_MAX = 4096
IDLE_S = 60.0
FAILED_FIRST_S, FAILED_MAX_S = 1.0, 30.0  # an endpoint that refused is left alone for this long, doubling
DIAL_S = 0.0002  # of the worker's time, about, to another node; it comes in pieces that nobody measures
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST

PoolKey = tuple[str | None, str, Endpoint]


class Dial(Protocol):
    """A dial under way."""

    def cancel(self) -> Any:
        """Neither success nor failure is wanted any more."""


class Sink(Protocol):
    """Who uses an `UpstreamConnection` during an exchange."""

    def upstream_open(self, connection: UpstreamConnection) -> None: ...
    def upstream_failed(self, error: DialError) -> None: ...
    def upstream_data(self, data: bytes) -> None: ...
    def upstream_eof(self) -> None: ...
    def upstream_lost(self, error: Exception | None) -> None: ...
    def upstream_full(self) -> None: ...
    def upstream_drained(self) -> None: ...


class Health:
    """What is known of one endpoint, across configurations."""

    __slots__ = ("failed_until", "failures", "outstanding")

    def __init__(self) -> None:
        self.outstanding = 0
        self.failures = 0
        self.failed_until = 0.0


class Pool:
    """Open connections of one caller to one endpoint."""

    __slots__ = ("account", "endpoint", "health", "idle", "key", "open", "retired")

    def __init__(self, key: PoolKey, health: Health, account: Account) -> None:
        self.account = account
        self.key, self.endpoint, self.health = key, key[2], health
        self.idle: list[UpstreamConnection] = []
        self.open = 0
        self.retired = False  # swept away: look it up anew

    def take(self) -> UpstreamConnection | None:
        """The connection used last, or None."""
        while self.idle:
            connection = self.idle.pop()
            if connection.retired:
                connection.close()
            elif not connection.lost:
                return connection
        return None


class UpstreamConnection(asyncio.Protocol):
    """A server's connection, local or through a tunnel, whoever uses it now."""

    __slots__ = (
        "counted",
        "dial",
        "full",
        "heard",
        "idle_since",
        "late",
        "late_eof",
        "leg",
        "lost",
        "pool",
        "reader_paused",
        "sink",
        "transport",
        "tunnel",
        "upstreams",
        "write",
    )

    def __init__(self, upstreams: Upstreams, pool: Pool, sink: Sink) -> None:
        self.upstreams, self.pool = upstreams, pool
        self.sink: Sink | None = sink
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.tunnel: Tunnel | None = None
        self.write: Callable[[bytes], None] = _unconnected
        self.dial: Dial | None = None
        self.lost = self.reader_paused = self.late_eof = False
        self.full = False  # the server reads slowly
        self.late: bytes | None = None  # came when the caller's turn was over
        self.idle_since = self.heard = 0.0  # heard: the last read
        self.leg = LEG_NEW
        self.counted = True
        pool.open += 1
        pool.account.descriptors += 1

    @property
    def meter(self) -> Account:
        """See `SocketTransport`."""
        return self.pool.account

    def waits(self) -> bool:
        return self.sink is not None  # what nobody asked for is seen before anybody asks

    @property
    def retired(self) -> bool:
        """Its tunnel takes no more work: rotation, or a node that leaves."""
        return self.tunnel is not None and self.tunnel.retired

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.dial = None
        self.transport = cast(asyncio.Transport, transport)
        self.tunnel = getattr(transport, "tunnel", None)
        if self.lost:  # given up while it was being made
            self.transport.abort()
            return
        self.write = self.transport.write
        health = self.pool.health
        health.failures, health.failed_until = 0, 0.0
        if self.sink is None:
            self.upstreams.keep(self)
        else:
            self.sink.upstream_open(self)

    def failed(self, error: DialError) -> None:
        """The dial's other outcome."""
        self.dial = None
        self._gone()
        self.upstreams.blame(self.pool.health, error)
        if self.sink is not None:
            sink, self.sink = self.sink, None
            sink.upstream_failed(error)

    def data_received(self, data: bytes) -> None:
        sink, account = self.sink, self.pool.account
        if sink is not None:
            if self.late is not None or (account.spent > account.limit and account.over()):
                account.held += len(data)
                put_off(self, account, data)
                return
            started = self.heard = perf_counter()
            sink.upstream_data(data)
            if self.sink is not None and isinstance(self.transport, SocketTransport):
                self.transport.more()
            account.spent += perf_counter() - started
        else:  # nobody asked: whatever it means, it must not become the next answer
            self.upstreams.worker.metrics.count("unsolicited_response")
            self.abort()

    def proceed(self) -> None:
        """The caller's next turn."""
        data, self.late = self.late, None
        if data is None:
            return
        account = self.pool.account
        account.held -= len(data)
        if self.sink is None:
            return
        if not self.reader_paused and not self.lost:
            self.transport.resume_reading()
        started = self.heard = perf_counter()
        self.sink.upstream_data(data)
        if self.late_eof and self.sink is not None:
            self.late_eof = False
            self.eof_received()
        account.spent += perf_counter() - started

    def eof_received(self) -> bool:
        if self.late is not None:
            self.late_eof = True
            return True
        if self.sink is not None:
            self.sink.upstream_eof()
            return True
        self.transport.close()
        self.lost = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone()
        self.proceed()
        if self in self.pool.idle:
            self.pool.idle.remove(self)
        if self.sink is not None:
            sink, self.sink = self.sink, None
            sink.upstream_lost(exc)

    def pause_writing(self) -> None:
        self.full = True
        if self.sink is not None:
            self.sink.upstream_full()

    def resume_writing(self) -> None:
        self.full = False
        if self.sink is not None:
            self.sink.upstream_drained()

    def pause(self) -> None:
        if not self.reader_paused and not self.lost:
            self.reader_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.reader_paused and not self.lost:
            self.reader_paused = False
            if self.late is None:
                self.transport.resume_reading()

    def abort(self) -> None:
        """RST; or give the dial up."""
        self.sink = None
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None
            self._gone()
        elif self.transport is not None and not self.lost:
            self.lost = True
            reset(self.transport)

    def _gone(self) -> None:
        """Once."""
        self.lost = True
        if self.counted:
            self.counted = False
            self.pool.open -= 1
            self.pool.account.descriptors -= 1

    def close(self) -> None:
        self.sink = None
        if not self.lost:
            self.lost = True
            self.transport.close()


class Upstreams:
    """All pools of a worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.pools: dict[PoolKey, Pool] = {}
        self.health: dict[Endpoint, Health] = {}

    def pool(self, caller: Caller, endpoint: Endpoint) -> Pool:
        key = (caller.spiffe, caller.address, endpoint)
        found = self.pools.get(key)
        if found is None:
            found = self.pools[key] = Pool(key, self.health_of(endpoint), self.worker.budgets.of(caller.identity, caller.spiffe))
        return found

    def health_of(self, endpoint: Endpoint) -> Health:
        found = self.health.get(endpoint)
        if found is None:
            found = self.health[endpoint] = Health()
        return found

    def choose(self, endpoints: Sequence[Endpoint], tried: Collection[Endpoint], now: float) -> Endpoint | None:
        """The one of two drawn that has fewer requests outstanding; those that refused lately only if all did."""
        if not tried and len(endpoints) > 1:  # nearly always two healthy ones are drawn at once
            one, two = _draw(endpoints)
            first, second = self.health_of(one), self.health_of(two)
            if first.failed_until <= now and second.failed_until <= now:
                return one if first.outstanding <= second.outstanding else two
        fresh = [endpoint for endpoint in endpoints if endpoint not in tried] if tried else list(endpoints)
        if len(fresh) > 1:
            healthy = [endpoint for endpoint in fresh if self.health_of(endpoint).failed_until <= now]
            fresh = healthy or fresh
        if len(fresh) < 2:
            return fresh[0] if fresh else None
        one, two = _draw(fresh)
        return one if self.health_of(one).outstanding <= self.health_of(two).outstanding else two

    def blame(self, health: Health, error: DialError) -> None:
        """An endpoint could not be reached."""
        self.worker.metrics.count(f"dial_{error.reason}")
        if error.reason in ("connect_refused", "connect_timeout", "connect_reset", "tls_failed", "peer_identity"):
            health.failed_until = self.worker.clock.now + min(FAILED_MAX_S, FAILED_FIRST_S * 2**health.failures)
            health.failures = min(health.failures + 1, 8)

    def open(self, pool: Pool, caller: Caller, source_netns: int, sink: Sink) -> UpstreamConnection | None:
        """Dials; ``sink`` hears upstream_open or upstream_failed, never from within this call. None: too many are open."""
        account = pool.account
        if pool.open >= OPEN_PER_POOL_MAX or account.descriptors >= account.budget.descriptors:
            return None
        connection = UpstreamConnection(self, pool, sink)
        connection.dial = self.dial(pool.endpoint, caller, source_netns, connection, connection.failed, opaque=False)
        return connection

    def dial(
        self,
        endpoint: Endpoint,
        caller: Caller,
        source_netns: int,
        protocol: asyncio.Protocol,
        failed: Callable[[DialError], None],
        *,
        opaque: bool,
    ) -> Dial:
        """By the endpoint's node: a socket of its netns, or the tunnel."""
        worker = self.worker
        workload = worker.config.workloads.get(endpoint.key)
        if workload is None:
            return worker.loop.call_soon(failed, DialError("no_endpoints", f"{endpoint.key} is gone"))
        target = Target(workload, endpoint.address, endpoint.port, caller, source_netns, opaque)
        if endpoint.local:
            return LocalDial(worker, target, protocol, failed)
        worker.budgets.of(caller.identity, caller.spiffe).spent += DIAL_S
        return worker.dial_remote(target, protocol, failed)

    def keep(self, connection: UpstreamConnection) -> None:
        """Back to its pool."""
        pool = connection.pool
        connection.sink = None
        if connection.lost or len(pool.idle) >= IDLE_PER_POOL_MAX:
            connection.close()
            return
        connection.resume()
        connection.idle_since = self.worker.clock.now
        pool.idle.append(connection)

    def sweep(self, now: float) -> None:
        """Once a second: closes what idles too long, forgets what is gone"""
        for key, pool in list(self.pools.items()):
            idle = pool.idle
            while idle and idle[0].idle_since < now - IDLE_S:
                idle.pop(0).close()
            if not pool.open:
                pool.retired = True
                del self.pools[key]
        workloads = self.worker.config.workloads
        for endpoint in [e for e, health in self.health.items() if not health.outstanding and e.key not in workloads]:
            del self.health[endpoint]

    def close_idle(self, gone: Callable[[Endpoint], bool]) -> None:
        """After a new configuration: connections to endpoints that are no more."""
        for pool in self.pools.values():
            if pool.idle and gone(pool.endpoint):
                for connection in pool.idle:
                    connection.close()
                pool.idle.clear()


def _draw(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, Endpoint]:
    """Two different ones."""
    count = len(endpoints)
    first = int(random() * count)
    return endpoints[first], endpoints[(first + 1 + int(random() * (count - 1))) % count]


def _unconnected(data: bytes) -> None:
    raise RuntimeError(f"bug: {len(data)} bytes written before the connection was made")


def reset(transport: asyncio.Transport) -> None:
    """Ends a connection so that the other end knows it was cut: RST, or RST_STREAM."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        except OSError:
            pass  # gone already
    transport.abort()
