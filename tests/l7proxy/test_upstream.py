"""Choosing, blaming and keeping, without sockets."""

from __future__ import annotations

import socket

from l7proxy.config import Config, Endpoint
from l7proxy.target import Caller, DialError
from l7proxy.upstream import IDLE_PER_POOL_MAX, UpstreamConnection, Upstreams
from l7proxy.worker import Worker

ENDPOINTS = tuple(Endpoint(f"Workload/shop/web-{n}", "10.0.0.1", 80 + n, True) for n in range(4))
CALLER = Caller("spiffe://mesh.local/ns/shop/sa/client", 300, "10.0.0.9", 1)


class Transport:
    def __init__(self) -> None:
        self.closed = self.aborted = False

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def get_extra_info(self, name: str) -> None:
        return None


def upstreams() -> Upstreams:
    worker = Worker(0, socket.socket(socket.AF_UNIX))
    worker.clock.now = 100.0
    worker.config = Config.empty()
    return worker.upstreams


def connection(up: Upstreams, caller: Caller = CALLER) -> tuple[UpstreamConnection, Transport]:
    made, transport = UpstreamConnection(up, up.pool(caller, ENDPOINTS[0]), None), Transport()  # type: ignore[arg-type]
    made.connection_made(transport)  # type: ignore[arg-type]
    return made, transport


def test_the_less_busy_of_two_is_chosen() -> None:
    up = upstreams()
    for endpoint in ENDPOINTS[1:]:
        up.health_of(endpoint).outstanding = 5
    chosen = [up.choose(ENDPOINTS, (), 100.0) for _ in range(400)]
    assert set(chosen) == set(ENDPOINTS)
    assert chosen.count(ENDPOINTS[0]) > 140  # half of all draws have it, a quarter by chance alone


def test_the_failed_are_left_alone_and_come_back() -> None:
    up = upstreams()
    for endpoint in ENDPOINTS[:3]:
        up.blame(up.health_of(endpoint), DialError("connect_refused"))
    assert {up.choose(ENDPOINTS, (), 100.0) for _ in range(50)} == {ENDPOINTS[3]}
    assert len({up.choose(ENDPOINTS, (), 102.0) for _ in range(200)}) == 4
    assert up.choose(ENDPOINTS[:1], (), 100.0) == ENDPOINTS[0]  # better than none
    assert up.choose(ENDPOINTS, ENDPOINTS, 100.0) is None
    assert up.choose((), (), 100.0) is None


def test_pools_are_by_identity_address_and_endpoint() -> None:
    up = upstreams()
    pool = up.pool(CALLER, ENDPOINTS[0])
    assert up.pool(Caller(CALLER.spiffe, 300, "10.0.0.9", 2), ENDPOINTS[0]) is pool
    for other in (Caller("spiffe://other", 301, "10.0.0.9", 1), Caller(CALLER.spiffe, 300, "10.0.0.8", 1)):
        assert up.pool(other, ENDPOINTS[0]) is not pool
    assert up.pool(CALLER, ENDPOINTS[1]) is not pool


def test_idle_connections_are_bounded_and_swept() -> None:
    up = upstreams()
    made = [connection(up) for _ in range(IDLE_PER_POOL_MAX + 5)]
    pool = up.pool(CALLER, ENDPOINTS[0])
    assert len(pool.idle) == IDLE_PER_POOL_MAX
    assert sum(transport.closed for _, transport in made) == 5
    up.sweep(1000.0)
    assert pool.idle == []
    for one, transport in made:
        assert transport.closed
        one.connection_lost(None)
    assert pool.open == 0
    up.sweep(1000.0)
    assert pool.retired and up.pools == {}


def test_what_nobody_asked_for_ends_the_connection() -> None:
    up = upstreams()
    made, transport = connection(up)
    made.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
    assert transport.aborted
    assert up.pool(CALLER, ENDPOINTS[0]).take() is None
    assert up.worker.metrics.events["unsolicited_response"] == 1


def test_a_dial_given_up_late_counts_once() -> None:
    up = upstreams()

    class Dial:
        def cancel(self) -> None:
            pass

    pool, transport = up.pool(CALLER, ENDPOINTS[0]), Transport()
    made = UpstreamConnection(up, pool, None)  # type: ignore[arg-type]
    made.dial = Dial()
    made.abort()
    made.connection_made(transport)  # type: ignore[arg-type]
    made.connection_lost(None)
    assert transport.aborted
    assert pool.open == 0
