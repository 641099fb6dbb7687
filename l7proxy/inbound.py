"""The destination's side of :15008. Accepts tunnels from other nodes' proxies, shows the certificate that the local
address and SNI pick, and admits a stream only when everything it claims is registered: each refusal is its own
counted reason. What comes after admission (authorization, dialling) is the worker's `serve_inbound`.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections import Counter
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from l7proxy.hbone import BULK, Headers, Limits, Stream
from l7proxy.streams import StreamTransport, Tunnel
from l7proxy.target import Caller
from l7proxy.tls import (
    Contexts,
    PeerCertificate,
    PeerRefused,
    ServerSide,
    check_peer,
    check_times,
    refusal_of,
    revoked_nodes,
    revoked_serials,
)
from mesh.link import Listener

if TYPE_CHECKING:
    from l7proxy.config import Config
    from l7proxy.worker import Worker

ACCEPTS_PER_TURN = 32
HANDSHAKES_MAX = 1024  # of all sources, before a peer is known
HANDSHAKES_PER_SOURCE_MAX = 64
HANDSHAKE_TIMEOUT_S = 10.0
TUNNELS_PER_IDENTITY_MAX = 2048  # opaque connections count: each has its own
STREAMS_PER_IDENTITY_MAX = 8192
HELD_BYTES_PER_IDENTITY_MAX = 64 << 20  # received for readers that do not read
IDLE_TUNNEL_S = 300.0
# A peer may open either kind of tunnel; windows grow only for a stream that is alone on its connection.
LIMITS = Limits(connection_window_bytes=BULK.connection_window_bytes, frame_bytes_max=BULK.frame_bytes_max)

_FORWARDED = re.compile(r'for="(\[[0-9a-f:.]{2,45}\]|[0-9.]{7,15}):([0-9]{1,5})"')


class Refusal(Exception):
    """A stream that is not served. ``status``: what the other proxy is told."""

    def __init__(self, reason: str, detail: str, status: int = 403) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.status = reason, detail, status


def parse_host_port(text: str, reason: str) -> tuple[str, int]:
    """A literal address and port in their one canonical spelling. Raises Refusal(reason)."""
    host, colon, port_text = text.rpartition(":")
    port = int(port_text) if port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 else 0
    if not colon or not 0 < port < 65536 or str(port) != port_text:
        raise Refusal(reason, f"{text[:80]!r} does not end in a port")
    try:
        if host.startswith("[") and host.endswith("]"):
            v6 = IPv6Address(host[1:-1])
            if v6.ipv4_mapped is not None or v6.scope_id is not None:
                raise Refusal(reason, f"{text[:80]!r} is not canonical")
            address = str(v6)
            same = address == host[1:-1]
        else:
            address = str(IPv4Address(host))
            same = address == host
    except AddressValueError as error:
        raise Refusal(reason, f"{text[:80]!r} is no literal address and port") from error
    if not same:
        raise Refusal(reason, f"{text[:80]!r} is not canonical: {address}")
    return address, port


def parse_forwarded(text: str) -> tuple[str, int]:
    """``for="10.0.0.1:4000"`` or ``for="[fd77::1]:4000"``, one hop, nothing else. Raises Refusal."""
    match = _FORWARDED.fullmatch(text)
    if match is None:
        raise Refusal("forwarded_malformed", f"forwarded: {text[:80]!r}")
    return parse_host_port(f"{match[1]}:{match[2]}", "forwarded_malformed")


@dataclass(frozen=True, slots=True)
class Connect:
    """What a CONNECT asks for."""

    address: str
    port: int
    client: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Admission:
    workload: str  # item key
    port: int
    caller: Caller


def parse_connect(headers: Headers) -> Connect:
    """From the request's fields. Raises Refusal."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in found and name in (b":method", b":authority", b"forwarded"):
            raise Refusal("connect_malformed", f"{name.decode()} comes twice", 400)
        found[name] = value
    if found.get(b":method") != b"CONNECT" or b":protocol" in found:
        raise Refusal("method", "only CONNECT is served here", 405)
    address, port = parse_host_port(found.get(b":authority", b"").decode("latin-1"), "authority_malformed")
    if b"forwarded" not in found:
        raise Refusal("forwarded_missing", "no forwarded field names the application's address")
    return Connect(address, port, parse_forwarded(found[b"forwarded"].decode("latin-1")))


def check_source(config: Config, peer: PeerCertificate, address: str) -> None:
    """The connection must come from an address where the peer's identity is registered, on a node that is not cut."""
    if peer.spiffe not in config.spiffe_id:
        raise Refusal("identity_unknown", f"{peer.spiffe} is not known to this mesh")
    homes = [w for w in config.by_address.get(address, ()) if w.spiffe == peer.spiffe]
    if not homes:
        raise Refusal("peer_address", f"{address} is no address of {peer.spiffe}")
    cut = revoked_nodes(config.revoked)
    if all(w.node in cut for w in homes):
        raise Refusal("node_cut", f"node {homes[0].node} is cut from the mesh")


def admit(config: Config, served: str, listener: str, peer: PeerCertificate, asked: Connect) -> Admission:
    """Whether a stream may reach what it asks for. Pure. Raises Refusal.

    ``served``: the identity whose certificate was shown; ``listener``: the local address the tunnel arrived at.
    """
    here = [w for w in config.by_address.get(asked.address, ()) if f"Workload/{w.namespace}/{w.name}" in config.local]
    if not here:
        raise Refusal("authority_not_local", f"{asked.address} is no workload of this node")
    here = [w for w in here if w.spiffe == served and listener in w.addresses]
    if not here:
        raise Refusal("authority_identity", f"{asked.address} is not {served}, to whom this tunnel was opened")
    workload = next((w for w in here if asked.port in w.ports), None)
    if workload is None:
        raise Refusal("authority_port", f"port {asked.port} of {asked.address} is not declared by a service")
    address, port = asked.client
    homes = [w for w in config.by_address.get(address, ()) if w.spiffe == peer.spiffe]
    if not homes:
        raise Refusal("forwarded_foreign", f"{address} is no address of {peer.spiffe}")
    cut = revoked_nodes(config.revoked)
    if all(w.node in cut for w in homes):
        raise Refusal("node_cut", f"node {homes[0].node} is cut from the mesh")
    home = f"Workload/{homes[0].namespace}/{homes[0].name}"
    caller = Caller(peer.spiffe, config.spiffe_id.get(peer.spiffe, 0), address, port, home if home in config.local else None)
    return Admission(f"Workload/{workload.namespace}/{workload.name}", asked.port, caller)


class DestinationTunnel(Tunnel):
    """Server end of one tunnel."""

    def __init__(self, listener: HboneListener, sock: socket.socket, context: ssl.SSLContext, source: str) -> None:
        self.listener = listener
        self.inbound = listener.inbound
        self.source = source  # the connection's other address, text
        self.served = ""
        self.since = time.perf_counter()
        self.idle_since = self.since
        self.asked: dict[int, Connect] = {}
        super().__init__(self.inbound.worker.loop, sock, context, client=False, limits=LIMITS)

    # ---- from Tunnel

    def on_open(self) -> None:
        inbound = self.inbound
        config = inbound.worker.config
        tls = self.channel.tls
        self.served = (tls.served or "") if isinstance(tls, ServerSide) else ""
        peer = check_peer(tls.getpeercert(True), config.mesh.trust_domain, inbound.serials)
        check_source(config, peer, self.source)
        if inbound.tunnels_of[peer.spiffe] >= TUNNELS_PER_IDENTITY_MAX:
            raise Refusal("budget_tunnels", f"{peer.spiffe} has {TUNNELS_PER_IDENTITY_MAX} tunnels here")
        self.peer = peer
        inbound.handshaken(self)

    def on_request(self, stream: Stream, headers: Headers) -> None:
        worker = self.inbound.worker
        answered = False
        try:
            asked = parse_connect(headers)
            if not self.core.peer_is_bulk and self.inbound.streams_of(self.peer.spiffe) > STREAMS_PER_IDENTITY_MAX:
                raise Refusal("budget_streams", f"{self.peer.spiffe} has {STREAMS_PER_IDENTITY_MAX} streams here", 503)
            admission = admit(worker.config, self.served, self.listener.address, self.peer, asked)
        except Refusal as refusal:
            self.inbound.refused(refusal, self.peer.spiffe, self.source)
            self._respond(stream, refusal.status, refusal.reason)
            return

        def opened(status: int, reason: str) -> None:
            nonlocal answered
            if not answered:
                answered = True
                if status != 200:
                    transport.discard()
                self._respond(stream, status, reason)

        if self.core.peer_is_bulk and len(self.core.streams) == 1:
            self.core.window_max = BULK.stream_window_bytes_max
        self.asked[stream.id] = asked
        transport = StreamTransport(self, stream)
        protocol = worker.serve_inbound(transport, admission.caller, admission.workload, admission.port, opened)
        if stream.id in self.core.streams:
            transport.start(protocol)

    def _respond(self, stream: Stream, status: int, reason: str) -> None:
        if status == 200:
            self.core.respond(stream, ((b":status", b"200"),))
        else:
            text = "".join(c if " " <= c <= "~" else "?" for c in reason[:200])
            self.core.respond(
                stream, ((b":status", str(status).encode()), (b"x-pillion-reason", text.strip().encode() or b"refused")), end=True
            )
        self.arm()

    def on_lost(self, error: Exception | None) -> None:
        tls = self.channel.tls
        refused = tls.refused if isinstance(tls, ServerSide) else None
        self.inbound.gone(self)
        if self.peer is not None:
            return
        if isinstance(error, Refusal):
            self.inbound.refused(error, "", self.source)
        elif refused is not None:
            self.inbound.refused(Refusal(refused, "no certificate of this address fits the server name"), "", self.source)
        elif error is None:
            self.inbound.refused(Refusal("tls_handshake", "the peer closed before it was known"), "", self.source)
        else:
            refusal = refusal_of(error)
            self.inbound.refused(Refusal(refusal.reason, refusal.detail), "", self.source)

    def hold(self, size: int) -> bool:
        super().hold(size)
        held_of = self.inbound.held_of
        held_of[self.peer.spiffe] += size
        if size < 0 or held_of[self.peer.spiffe] <= HELD_BYTES_PER_IDENTITY_MAX:
            return True
        self.inbound.refused(Refusal("budget_held", "its readers do not read"), self.peer.spiffe, self.source)
        return False

    def on_idle(self) -> None:
        self.idle_since = time.perf_counter()
        self.asked.clear()

    def sweep(self, now: float) -> None:
        super().sweep(now)
        for number in [n for n in self.asked if n not in self.core.streams]:
            del self.asked[number]

    def recheck(self, config: Config) -> None:
        """After a change: end the tunnel or those of its streams that would not be admitted now."""
        try:
            check_times(self.peer, self.inbound.serials, time.time())
            check_source(config, self.peer, self.source)
        except (PeerRefused, Refusal) as refusal:
            self.inbound.refused(Refusal(refusal.reason, refusal.detail), self.peer.spiffe, self.source)
            self.abort(refusal)
            return
        for stream in list(self.core.streams.values()):
            asked = self.asked.get(stream.id)
            if asked is None or stream.user is None:
                continue
            try:
                admit(config, self.served, self.listener.address, self.peer, asked)
            except Refusal as refusal:
                self.inbound.refused(refusal, self.peer.spiffe, self.source)
                self.core.reset(stream)
                stream.user.lose(ConnectionAbortedError(str(refusal)))
                self.arm()


class HboneListener:
    """One listening socket of one address; several workers accept from it."""

    def __init__(self, inbound: Inbound, listener: Listener, sock: socket.socket) -> None:
        self.inbound = inbound
        self.address = listener.address
        self._sock = sock
        self._context: ssl.SSLContext | None = None
        self._bundle: tuple[str, ...] | None = None
        sock.setblocking(False)
        inbound.worker.loop.add_reader(sock.fileno(), self._accept)
        inbound.listeners.add(self)

    def close(self) -> None:
        if self in self.inbound.listeners:
            self.inbound.listeners.discard(self)
            self.inbound.worker.loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _identities(self) -> list[str]:
        config = self.inbound.worker.config
        owners = config.by_address.get(self.address, ())
        return sorted({w.spiffe for w in owners if f"Workload/{w.namespace}/{w.name}" in config.local})

    def _front(self) -> ssl.SSLContext:
        bundle = self.inbound.worker.config.mesh.bundle
        if self._context is None or bundle != self._bundle:
            self.inbound.contexts.set_bundle(bundle)
            self._context, self._bundle = self.inbound.contexts.front(self._identities), bundle
        return self._context

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, peer = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self.inbound.worker.log.warning("accept failed", address=self.address, error=str(error))
                return
            sock.setblocking(False)
            self._begin(sock, str(peer[0]))

    def _begin(self, sock: socket.socket, source: str) -> None:
        inbound = self.inbound
        source = source.removeprefix("::ffff:")
        if len(inbound.handshakes) >= HANDSHAKES_MAX or inbound.handshakes_from[source] >= HANDSHAKES_PER_SOURCE_MAX:
            sock.close()
            inbound.refused(Refusal("handshake_flood", "too many unfinished handshakes"), "", source)
            return
        try:
            tunnel = DestinationTunnel(self, sock, self._front(), source)
        except (OSError, ValueError) as error:  # no bundle yet, or the peer went away
            sock.close()
            inbound.refused(Refusal("tls_handshake", f"{error}"), "", source)
            return
        inbound.handshakes.add(tunnel)
        inbound.handshakes_from[source] += 1


class Inbound:
    """All of a worker's incoming tunnels."""

    def __init__(self, worker: Worker, contexts: Contexts) -> None:
        self.worker = worker
        self.contexts = contexts
        self.serials: frozenset[str] = frozenset()
        self.listeners: set[HboneListener] = set()
        self.tunnels: set[DestinationTunnel] = set()
        self.tunnels_of: Counter[str] = Counter()
        self.held_of: Counter[str] = Counter()
        self.handshakes: set[DestinationTunnel] = set()
        self.handshakes_from: Counter[str] = Counter()
        self._by_peer: dict[str, set[DestinationTunnel]] = {}
        worker.handlers["hbone"] = self.listen
        worker.on_config.append(self._configured)
        worker.on_svid.append(self._rotated)
        worker.on_sweep.append(self._sweep)
        worker.on_drain.append(self._drain)

    def listen(self, listener: Listener, sock: socket.socket) -> HboneListener:
        return HboneListener(self, listener, sock)

    def streams_of(self, spiffe: str) -> int:
        return sum(len(tunnel.core.streams) for tunnel in self._by_peer.get(spiffe, ()))

    def refused(self, refusal: Refusal, peer: str, address: str) -> None:
        """Counted by reason, shown in the flow log."""
        self.worker.metrics.denied(refusal.reason)
        self.worker.flow(
            verdict="denied",
            reason=refusal.reason,
            source=peer or "unknown",
            source_address=address,
            direction="inbound",
            path="",
        )
        self.worker.log.info("inbound tunnel refused", reason=refusal.reason, detail=refusal.detail, source=peer, address=address)

    def handshaken(self, tunnel: DestinationTunnel) -> None:
        self._leave_handshakes(tunnel)
        self.tunnels.add(tunnel)
        self.tunnels_of[tunnel.peer.spiffe] += 1
        self._by_peer.setdefault(tunnel.peer.spiffe, set()).add(tunnel)

    def _leave_handshakes(self, tunnel: DestinationTunnel) -> None:
        if tunnel in self.handshakes:
            self.handshakes.discard(tunnel)
            self.handshakes_from[tunnel.source] -= 1
            if self.handshakes_from[tunnel.source] <= 0:
                del self.handshakes_from[tunnel.source]

    def gone(self, tunnel: DestinationTunnel) -> None:
        self._leave_handshakes(tunnel)
        if tunnel in self.tunnels:
            self.tunnels.discard(tunnel)
            spiffe = tunnel.peer.spiffe
            self.tunnels_of[spiffe] -= 1
            peers = self._by_peer[spiffe]
            peers.discard(tunnel)
            if not peers:
                del self._by_peer[spiffe], self.tunnels_of[spiffe], self.held_of[spiffe]

    # ---- what changes under open tunnels

    def _configured(self, _old: Config, new: Config) -> None:
        self.contexts.set_bundle(new.mesh.bundle)
        self.serials = revoked_serials(new.revoked)
        for tunnel in list(self.tunnels):
            tunnel.recheck(new)

    def _rotated(self, spiffe: str) -> None:
        self.contexts.forget(spiffe)
        if spiffe not in self.worker.svids:
            for tunnel in [t for t in self.tunnels if t.served == spiffe]:
                tunnel.abort(PeerRefused("no_svid", f"the certificate of {spiffe} was withdrawn"))

    def _sweep(self, now: float) -> None:
        for tunnel in [t for t in self.handshakes if now - t.since > HANDSHAKE_TIMEOUT_S]:
            tunnel.abort(Refusal("handshake_timeout", f"no handshake within {HANDSHAKE_TIMEOUT_S:.0f} s"))
        wall = time.time()
        for tunnel in list(self.tunnels):
            tunnel.sweep(now)
            if wall >= tunnel.peer.not_after:
                self.refused(Refusal("cert_expired", "its certificate ended"), tunnel.peer.spiffe, tunnel.source)
                tunnel.abort(Refusal("cert_expired", "its certificate ended"))
            elif not tunnel.core.streams and now - tunnel.idle_since > IDLE_TUNNEL_S:
                tunnel.close()

    def _drain(self, _seconds: float) -> None:
        for listener in list(self.listeners):
            listener.close()
        for tunnel in list(self.handshakes):
            tunnel.abort()
        for tunnel in list(self.tunnels):
            tunnel.retire()
            if not tunnel.core.streams:
                tunnel.close()


def install(worker: Worker) -> None:
    """Give a worker both ends of cross-node traffic, and DNS."""
    from l7proxy import dns, tunnel

    contexts = Contexts(lambda: worker.svids)
    tunnel.install(worker, contexts)
    Inbound(worker, contexts)
    dns.install(worker)


__all__ = ["Admission", "Connect", "Inbound", "Refusal", "admit", "check_source", "install", "parse_connect", "parse_host_port"]
