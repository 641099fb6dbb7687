"""DNS on the sockets the agent opened in each workload's netns: the mesh's names at once, others by way of upstream
sockets the agent gave for that (listener kind ``dns-forward``: bound UDP sockets of the node's netns, several, so
that the port is random too). No upstream socket, no forwarding.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import dns.rcode

from l7proxy import dns_core
from l7proxy.accept import Acceptor
from l7proxy.dns_core import Asked, Askers, Forward, Names, Refused
from l7proxy.dns_grants import Asking, answered
from mesh.addresses import parse_host_port
from mesh.link import Listener
from mesh.outside import WaysOut

if TYPE_CHECKING:
    from collections.abc import Callable

    from l7proxy.config import Config
    from l7proxy.worker import Worker

PACKETS_PER_TURN = 64
PENDING_MAX = 2048  # questions under way upstream, of all workloads
PENDING_PER_NETNS_MAX = 256
UPSTREAM_TIMEOUT_S = 5.0
TCP_CLIENTS_MAX = 128  # of one listener
TCP_IDLE_S = 10.0
TCP_QUERIES_MAX = 1000  # on one connection


@dataclass(frozen=True, slots=True)
class Client:
    """Where a question came from."""

    netns: int
    address: tuple[str, int]
    transport: str  # udp | tcp


@dataclass(slots=True, eq=False)
class Pending:
    asked: Asked
    name: str
    client: Client
    upstream: tuple[str, int]
    reply: Any  # Callable[[bytes], None]
    deadline: float


def upstream_address(text: str) -> tuple[str, int] | None:
    """``10.0.0.1:53`` or ``[fd77::1]:53``."""
    try:
        return parse_host_port(text)
    except ValueError:
        return None


class UdpListener:
    def __init__(self, server: Server, listener: Listener, sock: socket.socket) -> None:
        self._server, self._sock, self._netns = server, sock, listener.netns
        sock.setblocking(False)
        server.loop.add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._server.loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _readable(self) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                wire, client = self._sock.recvfrom(dns_core.MESSAGE_BYTES_MAX)
            except OSError:  # nothing left, or an ICMP error of an earlier reply
                return
            asking = Client(self._netns, (str(client[0]), int(client[1])), "udp")
            self._server.query(wire, asking, partial(self._send, client))

    def _send(self, client: Any, wire: bytes) -> None:
        try:
            self._sock.sendto(wire, client)
        except OSError:
            self._server.count("dns_reply_lost")


class TcpClient:
    """One connection: two bytes of length before each message, either way."""

    def __init__(self, listener: TcpListener, sock: socket.socket) -> None:
        self._listener, self._sock = listener, sock
        try:
            self._address = sock.getpeername()[:2]
        except OSError:  # gone already: its questions are nobody's
            self._address = "", 0
        self._in, self._out = bytearray(), bytearray()
        self._queries = 0
        self.used = perf_counter()
        sock.setblocking(False)
        listener.loop.add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._listener.loop.remove_reader(self._sock.fileno())
            self._listener.loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._listener.clients.discard(self)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self.used = perf_counter()
        self._in += data
        while len(self._in) >= 2:
            length = int.from_bytes(self._in[:2], "big")
            if not length or length > dns_core.QUERY_BYTES_MAX or self._queries >= TCP_QUERIES_MAX:
                self.close()
                return
            if len(self._in) < 2 + length:
                return
            wire = bytes(self._in[2 : 2 + length])
            del self._in[: 2 + length]
            self._queries += 1
            self._listener.query(wire, self._address, self._send)

    def _send(self, wire: bytes) -> None:
        if self._sock.fileno() < 0:
            return
        if len(self._out) > 4 * dns_core.MESSAGE_BYTES_MAX:  # asks and does not listen
            self.close()
            return
        self._out += len(wire).to_bytes(2, "big") + wire
        self._writable()

    def _writable(self) -> None:
        try:
            del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._out:
            self._listener.loop.add_writer(self._sock.fileno(), self._writable)
        else:
            self._listener.loop.remove_writer(self._sock.fileno())


class TcpListener:
    def __init__(self, server: Server, listener: Listener, sock: socket.socket) -> None:
        self._server, self._netns = server, listener.netns
        self.loop = server.loop
        self.clients: set[TcpClient] = set()
        self._acceptor = Acceptor(server.worker, sock, listener.id, self._begin)
        server.tcp.add(self)

    def close(self) -> None:
        self._server.tcp.discard(self)
        self._acceptor.close()
        for client in list(self.clients):
            client.close()

    def query(self, wire: bytes, address: tuple[str, int], reply: Callable[[bytes], None]) -> None:
        self._server.query(wire, Client(self._netns, address, "tcp"), reply)

    def _begin(self, sock: socket.socket, _address: str) -> None:
        if len(self.clients) >= TCP_CLIENTS_MAX:
            oldest = min(self.clients, key=lambda client: client.used)
            oldest.close()
        self.clients.add(TcpClient(self, sock))

    def sweep(self, now: float) -> None:
        for client in [c for c in self.clients if now - c.used > TCP_IDLE_S]:
            client.close()


class Upstream:
    """One UDP socket for questions to the outside."""

    def __init__(self, server: Server, _listener: Listener, sock: socket.socket) -> None:
        self._server, self.sock = server, sock
        self.family = sock.family
        self.pending: dict[int, Pending] = {}
        sock.setblocking(False)
        server.loop.add_reader(sock.fileno(), self._readable)
        server.upstreams.append(self)

    def close(self) -> None:
        if self in self._server.upstreams:
            self._server.upstreams.remove(self)
            self._server.loop.remove_reader(self.sock.fileno())
            self.sock.close()

    def _readable(self) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                wire, source = self.sock.recvfrom(dns_core.MESSAGE_BYTES_MAX)
            except OSError:
                return
            self._heard(wire, (str(source[0]), int(source[1])))

    def _heard(self, wire: bytes, source: tuple[str, int]) -> None:
        pending = self.pending.get(int.from_bytes(wire[:2], "big")) if len(wire) >= 12 else None
        if pending is None or pending.upstream != source:
            self._server.worker.metrics.denied("dns_stray_answer")  # a guess, or too late
            return
        reply, reason = dns_core.believe(pending.asked, wire)
        if reply is None:
            self._server.worker.metrics.denied("dns_stray_answer")  # a guess, or too late
            return
        del self.pending[pending.asked.id]
        if reason:
            self._server.denied(reason, str(pending.asked.query.question[0].name), pending.client.netns)
        self._server.answer(pending, reply, refused=bool(reason))


@dataclass(slots=True, eq=False)
class Server:
    """All of a worker's DNS."""

    worker: Worker
    names: Names = field(default_factory=lambda: Names({}))
    tcp: set[TcpListener] = field(default_factory=set)
    upstreams: list[Upstream] = field(default_factory=list)
    asking: Asking = field(init=False)
    _who: dict[int, Askers] = field(default_factory=dict)  # by netns

    def __post_init__(self) -> None:
        worker = self.worker
        self.asking = Asking(worker)
        worker.hears.append(self.asking.hear)
        worker.handlers["dns-udp"] = partial(UdpListener, self)
        worker.handlers["dns-tcp"] = partial(TcpListener, self)
        worker.handlers["dns-forward"] = partial(Upstream, self)
        worker.on_config.append(self._configured)
        worker.on_sweep.append(self._sweep)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.worker.loop  # there is none before the worker runs

    def count(self, name: str) -> None:
        self.worker.metrics.count(name)

    def denied(self, reason: str, name: str, netns: int) -> None:
        self.worker.metrics.denied(reason)
        self.worker.flow(
            verdict="denied",
            reason=reason,
            source=next(iter(self._askers(netns)), "unknown"),
            protocol="udp",
            layer="L7",
            path=name[:255],
            direction="outbound",
        )

    def _configured(self, _old: Config, new: Config) -> None:
        outside = bool(new.mesh.dns_upstreams)
        self.names = Names(new.service_names, new.mesh.dns_forward if outside else (), WaysOut(new.state) if outside else None)
        self._who.clear()

    def _askers(self, netns: int) -> Askers:
        """A datagram does not say whose it is: everybody who lives in the netns."""
        found = self._who.get(netns)
        if found is None:
            config = self.worker.config
            spiffes = {config.workloads[key].spiffe for key in config.by_netns.get(netns, ()) if key in config.workloads}
            found = self._who[netns] = tuple(sorted(spiffes))
        return found

    def query(self, wire: bytes, client: Client, reply: Callable[[bytes], None]) -> None:
        answer = self.names.answer(wire, tcp=client.transport == "tcp", askers=self._askers(client.netns))
        if isinstance(answer, Forward):
            self._forward(answer, client, reply)
        elif isinstance(answer, Refused):
            self.denied("dns_name_denied", answer.name, client.netns)
            reply(answer.reply)
        elif answer is not None:
            self.count("dns_answer")
            reply(answer)

    def answer(self, pending: Pending, reply: bytes, *, refused: bool) -> None:
        """What came from outside, to the client: when the addresses are open that it may reach."""
        netns, name = pending.client.netns, pending.name
        opens = not refused and self.names.opens(name, self._askers(netns))
        found = answered(reply) if opens else None
        if found is None:
            pending.reply(reply)
            return

        def opened(reason: str) -> None:
            if reason:
                self.denied("grant_refused", name, netns)
            pending.reply(found.wire)

        self.asking.ask(netns, pending.client.address, pending.client.transport, name, found, opened)

    def _forward(self, forward: Forward, client: Client, reply: Callable[[bytes], None]) -> None:
        servers = [a for text in self.worker.config.mesh.dns_upstreams if (a := upstream_address(text)) is not None]
        server = secrets.choice(servers) if servers else None
        family = socket.AF_INET6 if server and ":" in server[0] else socket.AF_INET
        ways = [u for u in self.upstreams if u.family == family]
        total = sum(len(u.pending) for u in self.upstreams)
        crowded = total > PENDING_PER_NETNS_MAX
        mine = sum(p.client.netns == client.netns for u in self.upstreams for p in u.pending.values()) if crowded else 0
        if server is None or not ways or total >= PENDING_MAX or mine >= PENDING_PER_NETNS_MAX:
            self.count("dns_forward_unavailable" if not ways else "dns_forward_full")
            reply(dns_core.refused(forward.query, dns.rcode.SERVFAIL))
            return
        way = secrets.choice(ways)
        asked, wire = dns_core.ask(forward, tcp=client.transport == "tcp")
        if asked.id in way.pending:
            reply(dns_core.refused(forward.query, dns.rcode.SERVFAIL))
            return
        try:
            way.sock.sendto(wire, server)
        except OSError:
            self.count("dns_forward_failed")
            reply(dns_core.refused(forward.query, dns.rcode.SERVFAIL))
            return
        way.pending[asked.id] = Pending(asked, forward.name, client, server, reply, perf_counter() + UPSTREAM_TIMEOUT_S)
        self.count("dns_forwarded")

    def _sweep(self, now: float) -> None:
        for upstream in self.upstreams:
            for number, pending in [(n, p) for n, p in upstream.pending.items() if p.deadline < now]:
                del upstream.pending[number]
                pending.reply(dns_core.refused(pending.asked.query, dns.rcode.SERVFAIL))
        for listener in self.tcp:
            listener.sweep(now)


def install(worker: Worker) -> Server:
    return Server(worker)
