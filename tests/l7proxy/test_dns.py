"""DNS on real sockets of loopback: UDP, TCP, forwarding."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import dns.asyncquery
import dns.message
import dns.rcode
import dns.rrset
import pytest_asyncio

from l7proxy import dns as proxy_dns
from l7proxy.dns import upstream_address
from mesh.link import Listener
from mesh.model import CONFIG_KEY, DnsForward, Workload
from mesh.model import Config as MeshConfig
from tests.l7proxy.pki import Authority
from tests.l7proxy.two_nodes import CLIENT_IP, FakeWorker, state, until

CALLER, OTHER = "Workload/shop/client-1", "Workload/shop/web-1"


class Upstream(asyncio.DatagramProtocol):
    """A resolver outside. ``answer``: the address it gives; None: silent."""

    answer: str | None = "93.184.215.14"

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.asked = 0

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.asked += 1
        query = dns.message.from_wire(data)
        response = dns.message.make_response(query)
        if self.answer is None:
            return
        response.answer.append(dns.rrset.from_text(query.question[0].name, 300, "IN", "A", self.answer))
        wire = response.to_wire()
        self.transport.sendto(bytes([wire[0] ^ 1]) + wire[1:], addr)  # a forger's guess first
        self.transport.sendto(wire, addr)


class Setup:
    def __init__(self) -> None:
        self.items = state(Authority())
        self.worker = FakeWorker("n1", CLIENT_IP, self.items, ())
        self.server = proxy_dns.install(self.worker)  # type: ignore[arg-type]  # a fake
        self.closables: list[Any] = []
        self.udp = self._give("dns-udp", socket.SOCK_DGRAM)
        self.tcp = self._give("dns-tcp", socket.SOCK_STREAM)
        self.worker.reconfigure(self.items)

    def _give(self, kind: str, type_: int) -> int:
        sock = socket.socket(socket.AF_INET, type_)
        sock.bind(("127.0.0.1", 0))
        if type_ == socket.SOCK_STREAM:
            sock.listen()
        port: int = sock.getsockname()[1]
        self.closables.append(
            self.worker.handlers[kind](Listener(id=kind, kind=kind, netns=7, address="127.0.0.1", port=port), sock)
        )
        return port

    async def forwarding(self, *, sockets: int = 2, who: str = "*", local: tuple[str, ...] = (CALLER,)) -> Upstream:
        transport, upstream = await asyncio.get_running_loop().create_datagram_endpoint(Upstream, local_addr=("127.0.0.1", 0))
        port = transport.get_extra_info("sockname")[1]
        self.closables.append(transport)
        for _ in range(sockets):
            self._give("dns-forward", socket.SOCK_DGRAM)
        items = dict(self.items)
        rules = (DnsForward(("*.example.com",)), DnsForward(("*",), (who,)))
        items[CONFIG_KEY] = MeshConfig(trust_domain="mesh.local", dns_upstreams=(f"127.0.0.1:{port}",), dns_forward=rules)
        self.worker.reconfigure(items, local)
        return upstream

    async def ask(self, name: str, *, tcp: bool = False) -> dns.message.Message:
        query = dns.message.make_query(name, "A")
        if tcp:
            return await dns.asyncquery.tcp(query, "127.0.0.1", port=self.tcp, timeout=5)
        return await dns.asyncquery.udp(query, "127.0.0.1", port=self.udp, timeout=5)


@pytest_asyncio.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup()
    yield made
    for closable in made.closables:
        closable.close()


async def test_udp_and_tcp(setup: Setup) -> None:
    for tcp in (False, True):
        assert (await setup.ask("nope.shop.mesh.", tcp=tcp)).rcode() == dns.rcode.NXDOMAIN
        assert (await setup.ask("example.com.", tcp=tcp)).rcode() == dns.rcode.REFUSED
    assert setup.worker.metrics.counts["dns_answer"] == 2
    assert setup.worker.metrics.denials["dns_name_denied"] == 2


async def test_many_queries_on_one_connection_and_junk(setup: Setup) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", setup.tcp)
    query = dns.message.make_query("web.shop.mesh.", "A").to_wire()
    framed = len(query).to_bytes(2, "big") + query
    writer.write(framed * 20 + framed[:5])
    for _ in range(20):
        length = int.from_bytes(await reader.readexactly(2), "big")
        await reader.readexactly(length)
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", setup.tcp)
    writer.write(b"\xff\xff" + b"x" * 100)
    assert await reader.read() == b""  # too long to be a query: closed
    writer.close()


async def test_forwarded(setup: Setup) -> None:
    upstream = await setup.forwarding()
    for tcp in (False, True):
        reply = await setup.ask("www.Example.com.", tcp=tcp)
        assert reply.answer[0][0].to_text() == "93.184.215.14"
    assert upstream.asked == 2
    assert setup.worker.metrics.denials["dns_stray_answer"] == 2  # the forger's
    upstream.answer = "169.254.169.254"
    assert (await setup.ask("rebind.example.com.")).rcode() == dns.rcode.REFUSED
    assert setup.worker.reasons == ["dns_stray_answer", "dns_rebinding"]


async def test_who_may_ask(setup: Setup) -> None:
    """A rule for the client is the client's alone; where others live beside it, nobody's."""
    item = setup.items[CALLER]
    assert isinstance(item, Workload)
    spiffe = item.spiffe
    await setup.forwarding(who=spiffe.removeprefix("spiffe://"))
    assert (await setup.ask("www.other.net.")).answer
    for who, local in (("mesh.local/ns/shop/sa/other", (CALLER,)), (spiffe.removeprefix("spiffe://"), (CALLER, OTHER))):
        upstream = await setup.forwarding(who=who, local=local)
        assert (await setup.ask("www.other.net.")).rcode() == dns.rcode.REFUSED
        assert (await setup.ask("www.other.net.", tcp=True)).rcode() == dns.rcode.REFUSED
        assert upstream.asked == 0
        assert (await setup.ask("www.example.com.")).answer
    assert setup.worker.metrics.denials["dns_name_denied"] == 4


async def test_silent_upstream(setup: Setup) -> None:
    upstream = await setup.forwarding()
    upstream.answer = None
    task = asyncio.create_task(setup.ask("slow.example.com."))
    await until(lambda: any(u.pending for u in setup.server.upstreams))
    for call in setup.worker.on_sweep:
        call(1e12)
    assert (await task).rcode() == dns.rcode.SERVFAIL
    assert not any(u.pending for u in setup.server.upstreams)


async def test_no_socket_for_it(setup: Setup) -> None:
    await setup.forwarding(sockets=0)
    assert (await setup.ask("example.com.")).rcode() == dns.rcode.SERVFAIL
    assert setup.worker.metrics.counts["dns_forward_unavailable"] == 1


def test_upstream_addresses() -> None:
    assert upstream_address("10.0.0.1:53") == ("10.0.0.1", 53)
    assert upstream_address("[fd77::1]:53") == ("fd77::1", 53)
    assert upstream_address("resolver:53") is None
