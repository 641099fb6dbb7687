"""Both ends of a tunnel on loopback: streams, flow control, rotation, the end of things."""

from __future__ import annotations

import asyncio
import socket
import time
import weakref
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from l7proxy.hbone.stream import BULK
from l7proxy.stream_transport import PIECES_EARLY
from mesh.model import Action, Budget, BudgetChange, IdentityBudget, key_of
from tests.l7proxy.two_nodes import CLIENT, CLIENT_IP, WEB, WEB_IP, Collect, Echo, TwoNodes, until


@pytest_asyncio.fixture
async def nodes() -> AsyncIterator[TwoNodes]:
    made = TwoNodes()
    yield made
    await made.close()


async def test_echo(nodes: TwoNodes) -> None:
    client = nodes.dial()
    await until(lambda: client.answered)
    assert client.failure is None
    client.transport.write(b"hello")
    client.transport.write(b" there")
    await until(lambda: client.data == b"hello there")
    caller, key, port = nodes.destination.served[0]
    assert (caller.spiffe, caller.identity, caller.address, caller.port) == (CLIENT, 300, CLIENT_IP, 41000)
    assert (key, port) == ("Workload/shop/web-1", 8080)
    client.transport.write_eof()
    await until(lambda: client.eof)
    client.transport.close()
    await until(lambda: client.lost == [None])
    tunnel = next(iter(nodes.pool._open))
    await until(lambda: not tunnel.core.streams and not next(iter(nodes.inbound.tunnels)).core.streams)


async def test_many_streams_share_one_tunnel_and_opaque_does_not(nodes: TwoNodes) -> None:
    clients = [nodes.dial() for _ in range(50)]
    await until(lambda: all(c.answered for c in clients))
    assert not [c.failure for c in clients if c.failure]
    assert len(nodes.inbound.tunnels) == 1
    opaque = [nodes.dial(opaque=True) for _ in range(3)]
    await until(lambda: all(c.answered for c in opaque))
    assert len(nodes.inbound.tunnels) == 4
    for n, client in enumerate([*clients, *opaque]):
        client.transport.write(b"%d" % n)
    await until(lambda: all(c.data == b"%d" % n for n, c in enumerate([*clients, *opaque])))
    for client in opaque:
        client.transport.close()
    await until(lambda: len(nodes.inbound.tunnels) == 1)


async def test_more_streams_than_one_tunnel_takes(nodes: TwoNodes) -> None:
    clients = [nodes.dial() for _ in range(700)]
    await until(lambda: all(c.answered for c in clients))
    assert not [c.failure for c in clients if c.failure]
    assert len(nodes.inbound.tunnels) >= 2


@pytest.mark.parametrize("opaque", [False, True])
async def test_bulk_both_ways_keeps_every_byte(nodes: TwoNodes, opaque: bool) -> None:
    client = nodes.dial(opaque=opaque)
    await until(lambda: client.answered)
    sent = bytes(range(256)) * 4096 * 20  # 20 MiB
    for at in range(0, len(sent), 300_000):
        await until(lambda: not client.paused)
        client.transport.write(sent[at : at + 300_000])
    client.transport.write_eof()
    await until(lambda: client.eof, 30)
    assert client.data == sent
    assert client.lost == []


async def test_many_writes_of_one_turn_do_not_wait_for_its_end(nodes: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [nodes.dial() for _ in range(40)]
    await until(lambda: all(c.answered for c in clients))
    (tunnel,) = nodes.pool._open
    sent: list[int] = []  # pieces
    take = tunnel.core.take_said
    monkeypatch.setattr(tunnel.core, "take_said", lambda: (sent.append(len(tunnel.core.said)), take())[1])
    for n, client in enumerate(clients):
        client.transport.write(b"%d" % n)
    assert sent == [PIECES_EARLY, PIECES_EARLY]  # a frame's head and its bytes each
    await until(lambda: all(c.data == b"%d" % n for n, c in enumerate(clients)))
    assert sum(sent[:3]) == 2 * len(clients)


class Deaf(Collect):
    """Takes one look and stops reading."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()


async def test_a_slow_reader_stops_nobody_else_and_holds_one_window(nodes: TwoNodes) -> None:
    nodes.destination.make = Deaf
    slow = [nodes.dial() for _ in range(5)]
    await until(lambda: all(c.answered for c in slow))
    for client in slow:
        for _ in range(100):
            client.transport.write(b"x" * 50_000)  # a rude writer: ignores pause_writing
    await until(lambda: all(c.paused for c in slow))
    nodes.destination.make = Echo
    quick = nodes.dial()
    await until(lambda: quick.answered)
    data = b"y" * 3_000_000
    quick.transport.write(data)
    await until(lambda: len(quick.data) == len(data), 10)
    tunnel = next(iter(nodes.inbound.tunnels))
    held = [sum(map(len, s.user._received)) for s in tunnel.core.streams.values() if s.user._received]
    assert len(held) == 5 and max(held) <= tunnel.core.limits.stream_window_bytes
    for stream in list(tunnel.core.streams.values()):
        if isinstance(stream.user.protocol, Deaf):
            stream.user.resume_reading()
    await until(lambda: not any(c.paused for c in slow), 10)


async def test_abort_resets_the_other_side(nodes: TwoNodes) -> None:
    made: list[Collect] = []
    nodes.destination.make = lambda: made.append(Collect()) or made[-1]  # type: ignore[func-returns-value]
    client = nodes.dial()
    await until(lambda: client.answered and made)
    client.transport.write(b"q")
    await until(lambda: made[0].data == b"q")
    client.transport.abort()
    await until(lambda: made[0].lost and client.lost)
    assert isinstance(made[0].lost[0], ConnectionResetError)
    assert client.lost == [None]


async def test_lost_tunnel_resets_streams_and_the_next_dial_makes_another(nodes: TwoNodes) -> None:
    client = nodes.dial()
    await until(lambda: client.answered)
    next(iter(nodes.inbound.tunnels)).abort()
    await until(lambda: client.lost)
    assert isinstance(client.lost[0], ConnectionResetError)
    again = nodes.dial()
    await until(lambda: again.answered)
    assert again.failure is None


@pytest.mark.parametrize("answer", [(200, ""), (503, "overloaded")])
async def test_a_tunnel_is_not_kept_for_a_dial_that_was_answered(nodes: TwoNodes, answer: tuple[int, str]) -> None:
    """Else the TLS connections of a second go all at once."""
    nodes.destination.answer = answer
    client = nodes.dial(opaque=True)
    await until(lambda: client.answered)
    assert not nodes.pool._dials
    kept = [weakref.ref(tunnel) for tunnel in nodes.pool._open]
    if client.transport is not None:
        client.transport.close()
    await until(lambda: not nodes.pool._open)
    client.transport = None
    await until(lambda: not any(tunnel() for tunnel in kept))


async def test_what_ended_before_a_fault_in_the_same_read_is_told(nodes: TwoNodes) -> None:
    client = nodes.dial(opaque=True)
    await until(lambda: client.answered)
    (tunnel,) = nodes.inbound.tunnels
    (stream,) = tunnel.core.streams.values()
    stream.user.abort()
    reset, _ = tunnel.core.take()
    tunnel.channel.send([*reset, b"\0\0\4\0\0\0\0\0\1junk"])  # DATA on a stream that is over, and then
    tunnel.channel.send([b"\0\0\0\x08\0\0\0\0\0"])  # a WINDOW_UPDATE without a length
    await until(lambda: client.lost)
    assert isinstance(client.lost[0], ConnectionResetError)


async def test_of_streams_that_come_at_once_only_those_over_the_limit_are_refused(nodes: TwoNodes) -> None:
    budget = IdentityBudget("client", "shop", BudgetChange(streams=10), (CLIENT.removeprefix("spiffe://"),))
    nodes.items[key_of(budget)] = budget
    nodes.destination.reconfigure(nodes.items)
    first = nodes.dial()
    await until(lambda: first.answered)
    clients = [nodes.dial() for _ in range(30)]  # all heads leave in one record
    await until(lambda: all(client.answered for client in clients))
    assert [client.failure is None for client in clients] == [True] * 9 + [False] * 21
    assert nodes.destination.metrics.denials == {"budget_streams": 21}
    served = [first, *clients[:9]]
    for number, client in enumerate(served):
        client.transport.write(b"%d" % number)
    await until(lambda: all(client.data == b"%d" % number for number, client in enumerate(served)))
    for client in served:
        client.transport.close()
    (tunnel,) = nodes.inbound.tunnels
    await until(lambda: not tunnel.core.streams)
    again = [nodes.dial() for _ in range(10)]
    await until(lambda: all(client.answered for client in again))
    assert not [client.failure for client in again if client.failure]


async def test_a_stream_over_the_budget_counts_though_it_was_reset_at_once(nodes: TwoNodes) -> None:
    budget = IdentityBudget("client", "shop", BudgetChange(requests_per_s=1), (CLIENT.removeprefix("spiffe://"),))
    nodes.items[key_of(budget)] = budget
    nodes.destination.reconfigure(nodes.items)
    client = nodes.dial()
    await until(lambda: client.answered)
    (near,), (far,) = nodes.pool._open, nodes.inbound.tunnels
    headers = ((b":method", b"CONNECT"), (b":authority", b"127.77.1.1:8080"), (b"forwarded", b'for="127.77.0.1:1"'))
    asked = []
    for _ in range(3):
        stream = near.core.open(headers)
        asked += near.core.take()[0]
        near.core.reset(stream)
        asked += near.core.take()[0]
    near.channel.send(asked)
    await until(lambda: far.account.requests == 4)
    assert far.account.refused == nodes.destination.metrics.denials == {"budget_requests": 3}


@pytest.mark.parametrize("opaque", [False, True])
async def test_a_node_that_drains_refuses_nothing_that_was_on_its_way(nodes: TwoNodes, opaque: bool) -> None:
    """Streams that cross the GOAWAY, and handshakes nobody finishes, are dialled again: to the successor."""
    first = nodes.dial()
    await until(lambda: first.answered)
    old = set(nodes.inbound.tunnels)
    for tunnel in old:
        tunnel.retire()
    clients = [nodes.dial(opaque=opaque) for _ in range(20)]
    for tunnel in list(nodes.inbound.handshakes):
        tunnel.abort()
    await until(lambda: all(client.answered for client in clients))
    assert [client.failure for client in clients] == [None] * 20
    assert not old & {s.user.tunnel for t in nodes.inbound.tunnels - old for s in t.core.streams.values()}
    first.transport.close()  # the last stream of what is retired takes the tunnel with it
    await until(lambda: not old & nodes.inbound.tunnels)


async def test_a_handshake_cut_off_is_dialled_once_more(nodes: TwoNodes) -> None:
    client = nodes.dial()
    await until(lambda: nodes.inbound.handshakes)
    for tunnel in list(nodes.inbound.handshakes):
        tunnel.abort()
    await until(lambda: client.answered)
    assert client.failure is None
    assert nodes.source.metrics.counts["tunnel_opened"] == 2


async def test_denied_by_the_far_side(nodes: TwoNodes) -> None:
    nodes.destination.answer = (403, "policy_denied shop/none#0")
    client = nodes.dial()
    await until(lambda: client.answered)
    assert client.failure is not None
    assert (client.failure.reason, client.failure.status, client.failure.elsewhere) == ("policy_denied", 403, False)
    assert "RBAC: denied by shop/none#0" in client.failure.detail


async def test_nobody_listens(nodes: TwoNodes) -> None:
    for listener in nodes.listeners:
        listener.close()
    client = nodes.dial()
    await until(lambda: client.answered)
    assert client.failure is not None and client.failure.reason == "connect_refused"


async def test_no_stock_and_cancel(nodes: TwoNodes) -> None:
    nodes.source.stock.empty = True
    client = nodes.dial()
    await until(lambda: client.answered)
    assert client.failure is not None and client.failure.reason == "no_stock"


async def test_rotation_moves_new_streams_to_the_new_certificate(nodes: TwoNodes) -> None:
    old = nodes.dial()
    await until(lambda: old.answered)
    nodes.source.svids[CLIENT] = nodes.authority.svid(CLIENT)
    for call in nodes.source.on_svid:
        call(CLIENT)
    assert old.transport.retired
    new = nodes.dial()
    await until(lambda: new.answered)
    assert {t.peer.serial for t in nodes.inbound.tunnels} >= {nodes.source.svids[CLIENT].serial}
    old.transport.write(b"still here")
    await until(lambda: old.data == b"still here")
    old.transport.close()
    await until(lambda: len(nodes.inbound.tunnels) == 1)


async def test_a_caller_that_is_denied_everywhere_leaves_its_tunnel(nodes: TwoNodes) -> None:
    """The kernels drop what is in it from then on: whoever is allowed again later must not wait for it."""
    nodes.configure(default_action=Action.ALLOW)
    client = nodes.dial()
    await until(lambda: client.answered)
    nodes.configure(default_action=Action.ALLOW)
    assert not client.transport.retired
    nodes.configure(default_action=Action.DENY)
    assert client.transport.retired
    nodes.configure(default_action=Action.ALLOW)
    again = nodes.dial()
    await until(lambda: again.answered)
    assert again.transport.tunnel is not client.transport.tunnel


async def test_expiry_closes(nodes: TwoNodes) -> None:
    nodes.destination.svids[WEB] = nodes.authority.svid(WEB, lasts_s=2.0)  # certificates end at whole seconds: 1 to 2 s
    client = nodes.dial()
    await until(lambda: client.answered)
    assert client.failure is None

    def swept() -> bool:
        nodes.source.sweep()
        nodes.destination.sweep()
        return bool(client.lost)

    await until(swept)


async def test_a_window_grows_only_for_opaque(nodes: TwoNodes) -> None:
    client = nodes.dial(opaque=True)
    await until(lambda: client.answered)
    for _ in range(400):
        await until(lambda: not client.paused)
        client.transport.write(b"z" * 50_000)
    await until(lambda: len(client.data) == 20_000_000, 20)
    (tunnel,) = nodes.inbound.tunnels
    assert next(iter(tunnel.core.streams.values())).window == BULK.stream_window_bytes_max


async def test_a_peer_that_never_shakes_hands(nodes: TwoNodes) -> None:
    for listener in nodes.listeners:
        listener.close()
    with socket.create_server((WEB_IP, 15008)):
        client = nodes.dial()
        await until(lambda: nodes.pool._open)
        for call in nodes.source.on_sweep:
            call(time.perf_counter() + 6)
        await until(lambda: client.answered)
        assert client.failure is not None and client.failure.reason == "connect_timeout"
        await until(lambda: not nodes.pool._open)


async def test_what_is_held_for_one_identity_is_bounded(nodes: TwoNodes) -> None:
    account = nodes.destination.budgets.of(300, CLIENT)
    account.adopt(Budget(bytes_in_flight=1 << 20))
    nodes.destination.make = Deaf
    slow = [nodes.dial() for _ in range(12)]
    await until(lambda: all(c.answered for c in slow))
    for client in slow:
        client.transport.write(b"x" * 250_000)
    await until(lambda: any(c.lost for c in slow))
    await until(lambda: account.held <= 1 << 20)
    assert nodes.destination.reasons == ["budget_bytes"]
    for client in slow:
        client.transport.abort()
    await until(lambda: not account.held)
