"""The source's end of one tunnel to another node's :15008, and the dials that become streams on it."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from socket import socket
from typing import TYPE_CHECKING, NamedTuple

from l7proxy.hbone.stream import BULK, CONNECT_ERROR, REFUSED_STREAM, HboneError, Headers, Limits, Stream
from l7proxy.stream_transport import StreamTransport
from l7proxy.streams import Tunnel
from l7proxy.target import DialError, Target
from l7proxy.tls import PeerRefused, check_peer, refusal_of
from mesh.addresses import host_port
from mesh.identity import SpiffeId
from mesh.ports import HBONE_PORT

if TYPE_CHECKING:
    from l7proxy.tunnel_pool import Pool

TRIES_MAX = 2  # of one dial, when the tunnel is lost before it was answered
WAITING_MAX = 4096  # dials waiting for one tunnel to open


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
    ended: Callable[[Dial], object]  # told once it is done: nobody keeps it, and with it its TLS connection, any longer
    tunnel: SourceTunnel | None = None
    stream: Stream | None = None
    done: bool = False
    tries: int = 1

    def cancel(self) -> None:
        if not self.done:
            self.end()
            if self.tunnel is not None:
                self.tunnel.forget(self)

    def another_try(self) -> bool:
        """Whether to dial once more; counted."""
        if self.done or self.tries >= TRIES_MAX or time.perf_counter() >= self.deadline:
            return False
        self.tries += 1
        self.tunnel = self.stream = None
        return True

    def fail(self, error: DialError) -> None:
        if not self.done:
            self.end()
            self.failed(error)

    def end(self) -> None:
        self.done = True
        self.ended(self)


def dial_error(reason: str, detail: str, *, status: int = 503, elsewhere: bool = True) -> DialError:
    return DialError(reason=reason, detail=detail, status=status, elsewhere=elsewhere)


class SourceTunnel(Tunnel):
    """Client end. Dials wait in ``waiting`` until the handshake is done."""

    def __init__(self, pool: Pool, key: Key, sock: socket, context: ssl.SSLContext, limits: Limits, serial: str) -> None:
        self.pool = pool
        self.key = key
        self.serial = serial
        self.account = pool.worker.budgets.of(pool.worker.config.identity(key.source), key.source)
        self.waiting: list[Dial] = []
        self.dials: dict[int, Dial] = {}  # stream -> the dial that waits for its response
        self.since = self.idle_since = time.perf_counter()
        name = SpiffeId.parse(key.peer).sni()
        super().__init__(pool.worker.loop, sock, context, client=True, limits=limits, server_name=name)
        self.channel.meter = self.account  # of the handshake; what passes is metered where it comes from

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
        self.loop.call_soon(self._unmeter)
        waiting, self.waiting = self.waiting, []
        for dial in waiting:
            if self.core.can_open:
                self._open(dial)
            else:
                self.pool.again(dial)

    def _unmeter(self) -> None:
        self.channel.meter = None

    def hold(self, size: int) -> bool:
        fits, account = super().hold(size), self.account
        account.held += size
        if size < 0 or not account.overfull:
            return fits
        self.pool.worker.metrics.denied(account.refuse("budget_bytes"))
        return False

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
            dial.end()
            transport = StreamTransport(self, stream)
            dial.protocol.connection_made(transport)
            transport.start(dial.protocol)
            return
        self.core.reset(stream)
        denied = status == b"403"
        rule = reason.removeprefix("policy_denied ") if denied and reason.startswith("policy_denied ") else ""
        where = host_port(dial.target.address, dial.target.port)
        shown = reason or f"status {status.decode('ascii', 'replace')[:3]}"
        dial.fail(
            dial_error(
                "policy_denied" if rule else "peer_refused",
                f"RBAC: denied by {rule}" if rule else f"the proxy of {where} refused the stream: {shown}",
                status=403 if denied else 503,
                elsewhere=not denied,
            )
        )

    def on_reset(self, stream: Stream, code: int) -> None:
        dial = self.dials.pop(stream.id, None)
        if dial is not None:
            if code == REFUSED_STREAM and dial.another_try():  # above the last stream of a GOAWAY: nobody has seen it
                self.pool.again(dial)
                return
            where = host_port(dial.target.address, dial.target.port)
            reason = "connect_refused" if code == CONNECT_ERROR else "peer_refused"
            dial.fail(dial_error(reason, f"the proxy of {where} reset the stream (code {code})"))

    def on_lost(self, error: Exception | None) -> None:
        dials = [*self.waiting, *self.dials.values()]
        self.waiting.clear()
        self.dials.clear()
        failure = self._why(error)
        self.pool.gone(self, failure.reason)
        lost = error is None or (isinstance(error, ConnectionError) and not isinstance(error, PeerRefused))
        for dial in dials:
            # No byte of the application's was sent yet. A proxy that restarts leaves its listener: the next dial waits there.
            if lost and dial.another_try():
                self.pool.again(dial)
            else:
                dial.fail(failure)

    def _why(self, error: Exception | None) -> DialError:
        where = f"{self.key.address}:{HBONE_PORT}"
        if self.peer is not None and not isinstance(error, ssl.SSLError):
            return dial_error("tunnel_lost", f"the tunnel to {where} was lost: {error or 'closed by its proxy'}")
        if isinstance(error, TimeoutError):
            return dial_error("connect_timeout", f"{where}: {error}")
        if error is None:
            return dial_error("tls_failed", f"{where} closed during the handshake")
        refusal = refusal_of(error)
        identity = refusal.reason != "tls_handshake"
        return dial_error("peer_identity" if identity else "tls_failed", f"{where}: {refusal}")

    def on_idle(self) -> None:
        self.idle_since = time.perf_counter()
        if self.retired and self.channel.open and not self.waiting:
            self.close()
