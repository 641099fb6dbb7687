"""The source's side of :15008: tunnels to other nodes, pooled by who calls and whom, and streams on them.

A tunnel belongs to one (source identity, source netns, endpoint address, endpoint identity): never shared by two
identities. Opaque connections get a tunnel of their own. Pool changes happen without await.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, SO_ERROR, SOL_SOCKET, socket
from typing import TYPE_CHECKING, NamedTuple

from l7proxy.hbone import BULK, CONNECT_ERROR, HboneError, Headers, Limits, Stream
from l7proxy.streams import StreamTransport, Tunnel
from l7proxy.target import DialError, Target
from l7proxy.tls import Contexts, PeerRefused, check_peer, check_times, refusal_of, revoked_nodes, revoked_serials
from mesh.identity import SpiffeId

if TYPE_CHECKING:
    from l7proxy.config import Config
    from l7proxy.worker import Worker

HBONE_PORT = 15008
IDLE_TUNNEL_S = 90.0
WAITING_MAX = 4096  # dials waiting for one tunnel to open


def host_port(address: str, port: int) -> str:
    """``10.0.0.1:80`` or ``[fd77::1]:80``."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Key(NamedTuple):
    source: str
    netns: int
    address: str
    peer: str


Failed = Callable[[DialError], None]


@dataclass(slots=True, eq=False)
class Dial:
    """One wish for a stream. Exactly one of ``protocol.connection_made`` and ``failed`` follows, unless cancelled."""

    target: Target
    protocol: asyncio.Protocol
    failed: Failed
    deadline: float  # perf_counter
    tunnel: SourceTunnel | None = None
    stream: Stream | None = None
    done: bool = False

    def cancel(self) -> None:
        if not self.done:
            self.done = True
            if self.tunnel is not None:
                self.tunnel.forget(self)

    def fail(self, error: DialError) -> None:
        if not self.done:
            self.done = True
            self.failed(error)


def _dial_error(reason: str, detail: str, *, status: int = 503, elsewhere: bool = True) -> DialError:
    return DialError(reason=reason, detail=detail, status=status, elsewhere=elsewhere)


class SourceTunnel(Tunnel):
    """Client end. Dials wait in ``waiting`` until the handshake is done."""

    def __init__(self, pool: Pool, key: Key, sock: socket, context: ssl.SSLContext, limits: Limits, serial: str) -> None:
        self.pool = pool
        self.key = key
        self.serial = serial
        self.waiting: list[Dial] = []
        self.dials: dict[int, Dial] = {}  # stream -> the dial that waits for its response
        self.since = self.idle_since = time.perf_counter()
        name = SpiffeId.parse(key.peer).sni()
        super().__init__(pool.worker.loop, sock, context, client=True, limits=limits, server_name=name)

    @property
    def free(self) -> bool:
        if self.retired or self.lost:
            return False
        if not self.channel.open:
            return len(self.waiting) < min(WAITING_MAX, self.core.peer_streams_max)
        return self.core.can_open

    def take(self, dial: Dial) -> None:
        dial.tunnel = self
        if self.channel.open:
            self._open(dial)
        else:
            self.waiting.append(dial)

    def _open(self, dial: Dial) -> None:
        target, caller = dial.target, dial.target.caller
        headers = (
            (b":method", b"CONNECT"),
            (b":authority", host_port(target.address, target.port).encode()),
            (b"forwarded", b'for="' + host_port(caller.address, caller.port).encode() + b'"'),
        )
        try:
            stream = self.core.open(headers)
        except HboneError:  # it is ending; another takes its place
            self.retired = True
            self.pool.again(dial)
            return
        dial.stream = stream
        self.dials[stream.id] = dial
        if self.core.limits is BULK:
            self.retired = True  # one stream, and the connection goes with it
        self.arm()

    def forget(self, dial: Dial) -> None:
        if dial in self.waiting:
            self.waiting.remove(dial)
        if dial.stream is not None and self.dials.pop(dial.stream.id, None) is not None:
            self.core.reset(dial.stream)
            self.arm()

    # ---- from Tunnel

    def on_open(self) -> None:
        config = self.pool.worker.config
        peer = check_peer(self.channel.tls.getpeercert(True), config.mesh.trust_domain, self.pool.serials)
        if peer.spiffe != self.key.peer:
            raise PeerRefused("peer_identity", f"{self.key.address} showed {peer.spiffe}, expected {self.key.peer}")
        self.peer = peer
        waiting, self.waiting = self.waiting, []
        for dial in waiting:
            if self.core.can_open:
                self._open(dial)
            else:
                self.pool.again(dial)

    def on_response(self, stream: Stream, headers: Headers) -> None:
        dial = self.dials.pop(stream.id, None)
        if dial is None or dial.done:
            return
        status, reason = b"", ""
        for name, value in headers:
            if name == b":status":
                status = value
            elif name == b"x-pillion-reason":
                reason = value.decode("ascii", "replace")[:200]
        if status == b"200":
            dial.done = True
            transport = StreamTransport(self, stream)
            dial.protocol.connection_made(transport)
            transport.start(dial.protocol)
            return
        self.core.reset(stream)
        denied = status == b"403"
        where = host_port(dial.target.address, dial.target.port)
        shown = reason or f"status {status.decode('ascii', 'replace')[:3]}"
        dial.fail(
            _dial_error(
                "policy_denied" if denied else "peer_refused",
                reason if denied and reason else f"the proxy of {where} refused: {shown}",
                status=403 if denied else 503,
                elsewhere=not denied,
            )
        )

    def on_reset(self, stream: Stream, code: int) -> None:
        dial = self.dials.pop(stream.id, None)
        if dial is not None:
            where = host_port(dial.target.address, dial.target.port)
            reason = "connect_refused" if code == CONNECT_ERROR else "peer_refused"
            dial.fail(_dial_error(reason, f"the proxy of {where} reset the stream (code {code})"))

    def on_lost(self, error: Exception | None) -> None:
        dials = [*self.waiting, *self.dials.values()]
        self.waiting.clear()
        self.dials.clear()
        failure = self._why(error)
        self.pool.gone(self, failure.reason)
        for dial in dials:
            dial.fail(failure)

    def _why(self, error: Exception | None) -> DialError:
        where = f"{self.key.address}:{HBONE_PORT}"
        if self.peer is not None and not isinstance(error, ssl.SSLError):
            return _dial_error("tunnel_lost", f"the tunnel to {where} was lost: {error or 'closed by its proxy'}")
        if isinstance(error, TimeoutError):
            return _dial_error("connect_timeout", f"{where}: {error}")
        if error is None:
            return _dial_error("tls_failed", f"{where} closed during the handshake")
        refusal = refusal_of(error)
        identity = refusal.reason != "tls_handshake"
        return _dial_error("peer_identity" if identity else "tls_failed", f"{where}: {refusal}")

    def on_idle(self) -> None:
        self.idle_since = time.perf_counter()
        if self.retired and self.channel.open and not self.waiting:
            self.close()


class Pool:
    """All of a worker's tunnels to other nodes."""

    def __init__(self, worker: Worker, contexts: Contexts) -> None:
        self.worker = worker
        self.contexts = contexts
        self.serials: frozenset[str] = frozenset()
        self._tunnels: dict[Key, list[SourceTunnel]] = {}
        self._connecting: dict[Key, list[Dial]] = {}  # a TCP connection is being made for these
        self._open: set[SourceTunnel] = set()
        self._dials: set[Dial] = set()
        worker.on_config.append(self._configured)
        worker.on_svid.append(self._rotated)
        worker.on_sweep.append(self._sweep)
        worker.on_drain.append(self._drain)

    # ---- dialling

    def dial(self, target: Target, protocol: asyncio.Protocol, failed: Failed) -> Dial:
        """The worker's `dial_remote`. Returns at once; the answer comes in a later turn."""
        timeout = self.worker.config.mesh.connect_timeout_s
        dial = Dial(target, protocol, failed, time.perf_counter() + timeout)
        self._dials.add(dial)
        if target.caller.spiffe is None:
            nobody = _dial_error("no_svid", "a caller without identity cannot leave the node", status=403, elsewhere=False)
            self._later(dial, nobody)
        elif f"node:{target.workload.node}" in self.worker.config.revoked:
            self._later(dial, _dial_error("peer_identity", f"node {target.workload.node} is cut from the mesh"))
        else:
            self._place(dial)
        return dial

    def again(self, dial: Dial) -> None:
        """A dial its tunnel had no room for."""
        self._place(dial)

    def _later(self, dial: Dial, error: DialError) -> None:
        self.worker.loop.call_soon(dial.fail, error)

    def _place(self, dial: Dial) -> None:
        target = dial.target
        key = Key(target.caller.spiffe or "", target.source_netns, target.address, target.workload.spiffe)
        if target.opaque:
            self._connect(key, [dial], BULK)
            return
        for tunnel in self._tunnels.get(key, ()):
            if tunnel.free:
                tunnel.take(dial)
                return
        waiting = self._connecting.get(key)
        if waiting is not None and len(waiting) < WAITING_MAX:
            waiting.append(dial)
            return
        dials = self._connecting[key] = [dial]
        self._connect(key, dials, Limits())

    def _connect(self, key: Key, dials: list[Dial], limits: Limits) -> None:
        family = AF_INET6 if ":" in key.address else AF_INET
        worker = self.worker
        sock = worker.stock.take(key.netns, family)
        if sock is not None:
            self._dial_tcp(key, dials, limits, sock)
            return

        def arrived(sock: socket | None) -> None:
            if sock is None:
                self._fail(key, dials, _dial_error("no_stock", "the agent gave no socket of the caller's network namespace"))
            else:
                self._dial_tcp(key, dials, limits, sock)

        worker.stock.wait(key.netns, family, arrived)

    def _dial_tcp(self, key: Key, dials: list[Dial], limits: Limits, sock: socket) -> None:
        loop, fd = self.worker.loop, sock.fileno()
        sock.setblocking(False)
        deadline = max(dial.deadline for dial in dials)

        def finished() -> None:
            loop.remove_writer(fd)
            timer.cancel()
            self._tcp_done(key, dials, limits, sock, sock.getsockopt(SOL_SOCKET, SO_ERROR))

        def expired() -> None:
            loop.remove_writer(fd)
            self._tcp_done(key, dials, limits, sock, errno.ETIMEDOUT)

        code = sock.connect_ex((key.address, HBONE_PORT))
        if code == errno.EINPROGRESS:
            timer = loop.call_later(max(0.0, deadline - time.perf_counter()), expired)
            loop.add_writer(fd, finished)
        else:
            loop.call_soon(self._tcp_done, key, dials, limits, sock, code)

    def _tcp_done(self, key: Key, dials: list[Dial], limits: Limits, sock: socket, code: int) -> None:
        where = f"{key.address}:{HBONE_PORT}"
        if code:
            sock.close()
            reason = {
                errno.ECONNREFUSED: "connect_refused",
                errno.ETIMEDOUT: "connect_timeout",
                errno.EPERM: "dial_denied",
                errno.EACCES: "dial_denied",
            }.get(code, "connect_reset")
            self._fail(key, dials, _dial_error(reason, f"connect to {where}: {os.strerror(code).lower()}"))
            return
        try:
            context = self.contexts.client(key.source)
            serial = self.worker.svids[key.source].serial
            tunnel = SourceTunnel(self, key, sock, context, limits, serial)
        except PeerRefused as refusal:
            sock.close()
            self._fail(key, dials, _dial_error(refusal.reason, refusal.detail, elsewhere=False))
            return
        except (OSError, ValueError, KeyError) as error:  # ssl.SSLError is an OSError
            sock.close()
            self._fail(key, dials, _dial_error("tls_failed", f"the certificate of {key.source} does not load: {error}"))
            return
        self._open.add(tunnel)
        if limits is not BULK:
            self._connecting.pop(key, None)
            self._tunnels.setdefault(key, []).append(tunnel)
        self.worker.metrics.count("tunnel_opened")
        for dial in dials:
            if not dial.done:
                if tunnel.free:
                    tunnel.take(dial)
                else:
                    self._place(dial)
        if not tunnel.waiting:
            tunnel.abort()  # everyone went away meanwhile

    def _fail(self, key: Key, dials: list[Dial], error: DialError) -> None:
        if self._connecting.get(key) is dials:
            del self._connecting[key]
        for dial in dials:
            dial.fail(error)

    def gone(self, tunnel: SourceTunnel, reason: str) -> None:
        self._open.discard(tunnel)
        tunnels = self._tunnels.get(tunnel.key)
        if tunnels is not None and tunnel in tunnels:
            tunnels.remove(tunnel)
            if not tunnels:
                del self._tunnels[tunnel.key]
        self.worker.metrics.count(f"tunnel_closed_{reason}")

    # ---- what changes under open tunnels

    def _configured(self, _old: Config, new: Config) -> None:
        self.contexts.set_bundle(new.mesh.bundle)
        self.serials = revoked_serials(new.revoked)
        cut = revoked_nodes(new.revoked)
        now = time.time()
        for tunnel in list(self._open):
            if tunnel.peer is None:
                continue
            owners = [w for w in new.by_address.get(tunnel.key.address, ()) if w.spiffe == tunnel.key.peer]
            try:
                check_times(tunnel.peer, self.serials, now)
                if not owners:
                    raise PeerRefused("peer_gone", f"{tunnel.key.address} is no endpoint of {tunnel.key.peer} any more")
                if all(w.node in cut for w in owners):
                    raise PeerRefused("node_cut", f"node {owners[0].node} is cut from the mesh")
            except PeerRefused as refusal:
                if refusal.reason == "peer_gone":
                    tunnel.retire()  # an endpoint that is leaving may finish what it has
                else:
                    tunnel.abort(refusal)

    def _rotated(self, spiffe: str) -> None:
        self.contexts.forget(spiffe)
        svid = self.worker.svids.get(spiffe)
        for tunnel in [t for t in self._open if t.key.source == spiffe]:
            if svid is None:
                tunnel.abort(PeerRefused("no_svid", f"the certificate of {spiffe} was withdrawn"))
            elif svid.serial != tunnel.serial:
                tunnel.retire()
                if not tunnel.core.streams and not tunnel.waiting:
                    tunnel.close()

    def _sweep(self, now: float) -> None:
        late = [dial for dial in self._dials if dial.done or dial.deadline < now]
        for dial in late:
            self._dials.discard(dial)
            if not dial.done:
                tunnel = dial.tunnel
                if tunnel is not None:
                    tunnel.forget(dial)
                where = host_port(dial.target.address, dial.target.port)
                dial.fail(_dial_error("connect_timeout", f"no answer from the proxy of {where} in time"))
        wall = time.time()
        for tunnel in list(self._open):
            tunnel.sweep(now)
            if not tunnel.channel.open and now - tunnel.since > self.worker.config.mesh.connect_timeout_s:
                tunnel.abort(TimeoutError("no TLS handshake in time"))
            elif tunnel.peer is not None and wall >= tunnel.peer.not_after:
                tunnel.abort(PeerRefused("cert_expired", f"the certificate of {tunnel.key.peer} ended"))
            elif not tunnel.core.streams and not tunnel.waiting and now - tunnel.idle_since > IDLE_TUNNEL_S:
                tunnel.close() if tunnel.channel.open else tunnel.abort()

    def _drain(self, _seconds: float) -> None:
        for tunnel in list(self._open):
            if not tunnel.core.streams and not tunnel.waiting:
                tunnel.close()


def install(worker: Worker, contexts: Contexts) -> Pool:
    pool = Pool(worker, contexts)
    worker.dial_remote = pool.dial
    return pool


__all__ = ["HBONE_PORT", "Dial", "Key", "Pool", "host_port", "install"]
