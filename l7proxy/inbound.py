"""The destination's side of :15008. Accepts tunnels from other nodes' proxies, shows the certificate that the local
address and SNI pick, and admits a stream only when everything it claims is registered: each refusal is its own
counted reason. What comes after admission (authorization, dialling) is the worker's `serve_inbound`.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections import Counter
from typing import TYPE_CHECKING

from l7proxy.accept import Acceptor
from l7proxy.admission import Connect, Refusal, admit, check_source, parse_connect
from l7proxy.budget import Account
from l7proxy.hbone.stream import BULK, HboneError, Headers, Limits, Stream
from l7proxy.stream_transport import StreamTransport
from l7proxy.streams import Tunnel
from l7proxy.tls import Contexts, PeerRefused, ServerSide, check_peer, check_times, refusal_of, revoked_serials
from l7proxy.upstream import RESET
from mesh.link import Listener

if TYPE_CHECKING:
    from l7proxy.config import Config
    from l7proxy.worker import Worker

HANDSHAKES_MAX = 1024  # of all sources, before a peer is known
HANDSHAKES_PER_SOURCE_MAX = 64
HANDSHAKE_TIMEOUT_S = 10.0
IDLE_TUNNEL_S = 300.0
LOGGED_PER_S_MAX = 50  # refusals; all are counted
# A peer may open either kind of tunnel; windows grow only for a stream that is alone on its connection.
LIMITS = Limits(connection_window_bytes=BULK.connection_window_bytes, frame_bytes_max=BULK.frame_bytes_max)


class DestinationTunnel(Tunnel):
    """Server end of one tunnel."""

    def __init__(
        self, listener: HboneListener, sock: socket.socket, context: ssl.SSLContext, source: str, account: Account
    ) -> None:
        self.listener = listener
        self.inbound = listener.inbound
        self.source = source  # the connection's other address, text
        self.served = ""
        self.account = account  # of who is registered at the address; once the peer is known, the peer's
        self.since = time.perf_counter()
        self.idle_since = self.since
        self.asked: dict[int, Connect] = {}
        super().__init__(self.inbound.worker.loop, sock, context, client=False, limits=LIMITS)
        self.channel.meter = account

    # ---- from Tunnel

    def on_open(self) -> None:
        inbound = self.inbound
        config = inbound.worker.config
        tls = self.channel.tls
        self.served = (tls.served or "") if isinstance(tls, ServerSide) else ""
        if self.served not in inbound.worker.svids:
            raise PeerRefused("no_svid", f"the certificate of {self.served} was withdrawn meanwhile")
        peer = check_peer(tls.getpeercert(True), config.mesh.trust_domain, inbound.serials)
        check_source(config, peer, self.source)
        budgets = inbound.worker.budgets
        account = budgets.of(config.identity(peer.spiffe), peer.spiffe)
        if inbound.tunnels_of[peer.spiffe] >= account.budget.connections:
            raise Refusal(
                account.refuse("budget_connections"), f"{peer.spiffe} has {account.budget.connections} tunnels here", 429
            )
        if account.descriptors >= account.budget.descriptors:
            raise Refusal(account.refuse("budget_descriptors"), f"{peer.spiffe} has {account.descriptors} sockets here", 429)
        self.account.held -= self.held
        account.held += self.held
        self.peer, self.account, self.channel.meter = peer, account, account
        inbound.handshaken(self)
        if inbound.worker.draining:  # what it asked for with its handshake is served, the rest by our successor
            self.loop.call_soon(self.retire)

    def on_request(self, stream: Stream, headers: Headers) -> None:
        worker = self.inbound.worker
        if stream.id not in self.core.streams:  # reset by the same bytes
            if not self.account.request(worker.budgets.clock()):
                worker.metrics.denied("budget_requests")
            return
        answered = False
        try:
            asked = parse_connect(headers)
            account, most = self.account, self.account.budget.streams
            if not account.request(worker.budgets.clock()):
                raise Refusal("budget_requests", f"{self.peer.spiffe} opens streams too fast", 429)
            if not self.core.peer_is_bulk and self.inbound.full(self.peer.spiffe, most):
                raise Refusal(account.refuse("budget_streams"), f"{self.peer.spiffe} has {most} streams here", 429)
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
        else:
            protocol.connection_lost(None)

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
            # What HTTP/2 forbids: rapid resets, CONTINUATION without end, …
            if self.core.at_fault or isinstance(error, HboneError):
                self.account.refused["hbone_error"] += 1
                self.inbound.refused(
                    Refusal("hbone_error", str(error or "it was told to calm down")), self.peer.spiffe, self.source
                )
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
        account = self.account
        account.held += size
        if size < 0 or not account.overfull:
            return True
        spiffe = self.peer.spiffe if self.peer is not None else ""
        self.inbound.refused(Refusal(account.refuse("budget_bytes"), "its readers do not read"), spiffe, self.source)
        return False

    def on_idle(self) -> None:
        self.idle_since = time.perf_counter()
        self.asked.clear()
        if self.retired and self.peer is not None:
            self.close()

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
        self._context: ssl.SSLContext | None = None
        self._bundle: tuple[str, ...] | None = None
        self._acceptor = Acceptor(inbound.worker, sock, listener.id, self._begin)
        inbound.listeners.add(self)

    def close(self) -> None:
        self.inbound.listeners.discard(self)
        self._acceptor.close()

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

    def _begin(self, sock: socket.socket, source: str) -> Account:
        inbound = self.inbound
        source = source.removeprefix("::ffff:")
        config, budgets = inbound.worker.config, inbound.worker.budgets
        spiffe = next((workload.spiffe for workload in config.by_address.get(source, ())), None)
        account = budgets.of(config.identity(spiffe), spiffe)
        if len(inbound.handshakes) >= HANDSHAKES_MAX or inbound.handshakes_from[source] >= HANDSHAKES_PER_SOURCE_MAX:
            sock.close()
            inbound.refused(Refusal("handshake_flood", "too many unfinished handshakes"), "", source)
            return account
        if not account.handshake():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
            inbound.refused(Refusal("budget_handshakes", "too many TLS handshakes in a second"), spiffe or "", source)
            return account
        try:
            tunnel = DestinationTunnel(self, sock, self._front(), source, account)
        except (OSError, ValueError) as error:  # no bundle yet, or the peer went away
            sock.close()
            inbound.refused(Refusal("tls_handshake", f"{error}"), "", source)
            return account
        inbound.handshakes.add(tunnel)
        inbound.handshakes_from[source] += 1
        return account


class Inbound:
    """All of a worker's incoming tunnels."""

    def __init__(self, worker: Worker, contexts: Contexts) -> None:
        self.worker = worker
        self.contexts = contexts
        self.serials: frozenset[str] = frozenset()
        self.listeners: set[HboneListener] = set()
        self.tunnels: set[DestinationTunnel] = set()
        self.tunnels_of: Counter[str] = Counter()
        self.handshakes: set[DestinationTunnel] = set()
        self.handshakes_from: Counter[str] = Counter()
        self._by_peer: dict[str, set[DestinationTunnel]] = {}
        self._logged = 0  # refusals in this second
        worker.handlers["hbone"] = self.listen
        worker.budgets.streams_of = self.streams_of
        worker.on_config.append(self._configured)
        worker.on_svid.append(self._rotated)
        worker.on_sweep.append(self._sweep)
        worker.on_drain.append(self._drain)
        worker.busy.append(self._busy)

    def listen(self, listener: Listener, sock: socket.socket) -> HboneListener:
        return HboneListener(self, listener, sock)

    def streams_of(self, spiffe: str) -> int:
        return sum(len(tunnel.core.streams) for tunnel in self._by_peer.get(spiffe, ()))

    def full(self, spiffe: str, most: int) -> bool:
        """Whether so many streams of a peer are served. Of those that one read brought, the later ones are not yet."""
        if self.streams_of(spiffe) <= most:
            return False
        streams = (stream for tunnel in self._by_peer[spiffe] for stream in tunnel.core.streams.values())
        return sum(stream.user is not None for stream in streams) >= most

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
        self._logged += 1
        if self._logged <= LOGGED_PER_S_MAX:  # a line costs more than a refusal
            self.worker.log.info(
                "inbound tunnel refused", reason=refusal.reason, detail=refusal.detail, source=peer, address=address
            )

    def handshaken(self, tunnel: DestinationTunnel) -> None:
        self._leave_handshakes(tunnel)
        self.tunnels.add(tunnel)
        self.tunnels_of[tunnel.peer.spiffe] += 1
        tunnel.account.descriptors += 1
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
            tunnel.account.descriptors -= 1
            peers = self._by_peer[spiffe]
            peers.discard(tunnel)
            if not peers:
                del self._by_peer[spiffe], self.tunnels_of[spiffe]

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
        if self._logged > LOGGED_PER_S_MAX:
            self.worker.log.info("inbound tunnels refused, not told of each", more=self._logged - LOGGED_PER_S_MAX)
        self._logged = 0
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
        for tunnel in list(self.tunnels):
            tunnel.retire()

    def _busy(self) -> bool:
        return any(tunnel.channel.blocked or tunnel.core.wants_write for tunnel in self.tunnels)


def install(worker: Worker) -> None:
    """Give a worker both ends of cross-node traffic, and DNS."""
    from l7proxy import dns, tunnel_pool

    contexts = Contexts(lambda: worker.svids)
    tunnel_pool.install(worker, contexts)
    Inbound(worker, contexts)
    dns.install(worker)
