from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from l7proxy.lease import Lease
from mesh import link
from mesh.model import Protocol
from tests.l7proxy.rig import Mesh, Rig, Server, http_server, read_response, wait_for
from tests.l7proxy.test_serve_inbound import Peer
from tests.l7proxy.test_worker import metric

HOUR_NS = 3600 * 10**9
Start = Callable[[Mesh], Rig]
Serve = Callable[[Server], Server]


def test_before_the_agent_spoke_it_is_over_where_there_is_a_limit() -> None:
    assert Lease().over(60.0)
    assert not Lease().over(0.0)


def test_it_lasts_as_long_as_the_agent_said() -> None:
    lease, now = Lease(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert lease.hear(link.Lease(now + HOUR_NS))
    assert not lease.over(60.0)
    assert lease.hear(link.Lease(now - 1))
    assert lease.over(60.0)
    assert not lease.hear(link.Scrape())


HTTP_REQUEST = b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"


def ends(rig: Rig, in_s: float) -> None:
    """The agent says when the lease ends."""
    until = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + int(in_s * 1e9)
    rig.agent.send(link.Lease(until))
    wait_for(lambda: rig.worker.lease.until_ns == until, "the lease")


def test_past_it_nothing_new_begins_and_what_is_open_goes_on(mesh: Mesh, start: Start, serve: Serve) -> None:
    server, echo = serve(http_server()), serve(Server(lambda sock: sock.sendall(sock.recv(100))))
    client = mesh.workload("client-1", "client")
    web, db = mesh.service("web", [server.port]), mesh.service("db", [echo.port], Protocol.TCP)
    mesh.allow("web", "client")
    mesh.allow("db", "client")
    mesh.config = replace(mesh.config, policy_lease_s=60.0)
    rig = start(mesh)
    ends(rig, 60.0)
    with rig.connect(client, web) as kept:
        kept.sendall(HTTP_REQUEST)
        assert read_response(kept)[0] == 200
        ends(rig, -0.001)
        kept.sendall(HTTP_REQUEST)
        assert read_response(kept)[0] == 200
        with rig.connect(client, web) as sock:
            sock.sendall(HTTP_REQUEST)
            status, *rest = read_response(sock)
            assert status == 503 and "policyLeaseSeconds" in str(rest)
        with rig.connect(client, db) as sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
        peer = Peer(rig, "client", web.endpoints[0], server.port)
        assert peer.opened[-1] == (503, "lease_expired")
    assert metric(rig, "pillion_denied_total", reason="lease_expired") == 3
    ends(rig, 60.0)
    with rig.connect(client, web) as sock:
        sock.sendall(HTTP_REQUEST)
        assert read_response(sock)[0] == 200
