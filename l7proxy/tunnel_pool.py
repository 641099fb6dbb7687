"""The source's side of :15008: tunnels to other nodes, pooled by who calls and whom.

A tunnel belongs to one (source identity, source netns, endpoint address, endpoint identity): never shared by two
identities. Opaque connections get a tunnel of their own. Pool changes happen without await.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from functools import partial
from socket import AF_INET, AF_INET6, SO_ERROR, SOL_SOCKET, socket
from typing import TYPE_CHECKING

from l7proxy.hbone.stream import BULK, Limits
from l7proxy.target import DialError, Target
from l7proxy.tls import Contexts, PeerRefused, check_times, revoked_nodes, revoked_serials
from l7proxy.tunnel import WAITING_MAX, Dial, Failed, Key, SourceTunnel, dial_error
from mesh.addresses import host_port
from mesh.model import Workload, key_of
from mesh.policy import Peer, could_connect
from mesh.ports import HBONE_PORT

if TYPE_CHECKING:
    from l7proxy.config import Config
    from l7proxy.worker import Worker

IDLE_TUNNEL_S = 90.0


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
        worker.busy.append(self._busy)

    # ---- dialling

    def dial(self, target: Target, protocol: asyncio.Protocol, failed: Failed) -> Dial:
        """The worker's `dial_remote`. Returns at once; the answer comes in a later turn."""
        timeout = self.worker.config.mesh.connect_timeout_s
        dial = Dial(target, protocol, failed, time.perf_counter() + timeout, self._dials.discard)
        self._dials.add(dial)
        if target.caller.spiffe is None:
            nobody = dial_error("no_svid", "a caller without identity cannot leave the node", status=403, elsewhere=False)
            self._later(dial, nobody)
        elif f"node:{target.workload.node}" in self.worker.config.revoked:
            self._later(dial, dial_error("peer_identity", f"node {target.workload.node} is cut from the mesh"))
        else:
            account = self.worker.budgets.of(target.caller.identity, target.caller.spiffe)
            account.when_due(partial(self._begin, dial))
        return dial

    def _begin(self, dial: Dial) -> None:
        if not dial.done:
            self._place(dial)

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
                self._fail(key, dials, dial_error("no_stock", "the agent gave no socket of the caller's network namespace"))
            else:
                self._dial_tcp(key, dials, limits, sock)

        worker.stock.wait(key.netns, family, arrived)

    def _dial_tcp(self, key: Key, dials: list[Dial], limits: Limits, sock: socket) -> None:
        worker, loop, fd = self.worker, self.worker.loop, sock.fileno()
        account = worker.budgets.of(worker.config.identity(key.source), key.source)
        sock.setblocking(False)
        deadline = max(dial.deadline for dial in dials)

        def finished() -> None:
            loop.remove_writer(fd)
            timer.cancel()
            code = sock.getsockopt(SOL_SOCKET, SO_ERROR)
            account.when_due(partial(self._tcp_done, key, dials, limits, sock, code))

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
            if reason == "dial_denied" and self.worker.lease.over(self.worker.config.mesh.policy_lease_s):
                reason = "lease_expired"  # the kernel looks at the same clock
            self._fail(key, dials, dial_error(reason, f"connect to {where}: {os.strerror(code).lower()}"))
            return
        try:
            context = self.contexts.client(key.source)
            serial = self.worker.svids[key.source].serial
            tunnel = SourceTunnel(self, key, sock, context, limits, serial)
        except PeerRefused as refusal:
            sock.close()
            self._fail(key, dials, dial_error(refusal.reason, refusal.detail, elsewhere=False))
            return
        except (OSError, ValueError, KeyError) as error:  # ssl.SSLError is an OSError
            sock.close()
            self._fail(key, dials, dial_error("tls_failed", f"the certificate of {key.source} does not load: {error}"))
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
                if not _may_call(new, tunnel.key.source, owners):  # the kernel drops its packets now: it looks alive and is not
                    raise PeerRefused("peer_gone", f"{tunnel.key.source} may not call {tunnel.key.peer} any more")
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
        late = [dial for dial in self._dials if dial.deadline < now]
        for dial in late:
            if not dial.done:
                tunnel = dial.tunnel
                if tunnel is not None:
                    tunnel.forget(dial)
                where = host_port(dial.target.address, dial.target.port)
                dial.fail(dial_error("connect_timeout", f"no answer from the proxy of {where} in time"))
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

    def _busy(self) -> bool:
        return any(tunnel.channel.blocked or tunnel.core.wants_write for tunnel in self._open if tunnel.channel.open)


def _may_call(config: Config, source: str, owners: list[Workload]) -> bool:
    """Whether some request of ``source`` could be allowed at one of these."""
    peer = Peer(source, config.identity(source), "")
    return any(could_connect(config.policies, peer, key_of(owner), port) for owner in owners for port in owner.ports)


def install(worker: Worker, contexts: Contexts) -> Pool:
    pool = Pool(worker, contexts)
    worker.dial_remote = pool.dial
    return pool
