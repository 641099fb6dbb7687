"""The outbound listener: a captured connection is asked where it wanted to go, and gets the session that speaks it."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from l7proxy.accept import Acceptor
from l7proxy.budget import Account
from l7proxy.config import Config, Destination
from l7proxy.kernel import Origin
from l7proxy.learn import Learner
from l7proxy.opaque import Relay
from l7proxy.session import HttpRefusal, HttpSession
from l7proxy.target import Caller
from l7proxy.transport import SocketTransport, bound
from l7proxy.upstream import RESET
from mesh.link import Listener
from mesh.model import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from l7proxy.worker import Worker

ALL_MAX = 32768


class Capture:
    """One listening socket of one netns."""

    def __init__(self, worker: Worker, listener: Listener, sock: socket.socket) -> None:
        self.worker, self.listener = worker, listener
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted has it too
        bound(sock)
        self._acceptor = Acceptor(worker, sock, listener.id, self._begin)

    def close(self) -> None:
        """Accepts no more; open connections stay."""
        self._acceptor.close()

    def _begin(self, sock: socket.socket, _address: str) -> Account | None:
        worker, listener = self.worker, self.listener
        origin = worker.kernel.origin(sock)
        if origin is None or (origin.netns != listener.netns and listener.netns):
            worker.metrics.denied("no_origin")
            refuse(sock)
            return None
        session = outbound(worker, origin)
        if session is None:
            refuse(sock)
            return worker.budgets.accounts.get(origin.identity)
        try:
            SocketTransport(worker.loop, sock, session)
        except BaseException:
            session.ended()
            raise
        return session.account


def refuse(sock: socket.socket) -> None:
    """RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def outbound(worker: Worker, origin: Origin) -> HttpSession | Relay | None:
    """The session for a captured connection; None: it is refused, and counted."""
    config = worker.config
    workload = config.by_id.get(origin.workload)
    if workload is None or workload.identity != origin.identity:
        worker.metrics.denied("unknown_workload")
        return None
    key = f"Workload/{workload.namespace}/{workload.name}"
    if key not in config.local:
        worker.metrics.denied("unknown_workload")
        return None
    caller = Caller(workload.spiffe, workload.identity, origin.client_address, origin.client_port, key)
    destination = config.destination(origin.address, origin.port)
    if destination is None:
        worker.metrics.denied("no_service")
        worker.flow(
            verdict="denied",
            reason="no_service",
            source=workload.spiffe,
            source_address=f"{origin.client_address}:{origin.client_port}",
            destination_address=f"{origin.address}:{origin.port}",
            direction="outbound",
        )
        return None
    return session_for(worker, config, caller, destination, origin.netns, inbound=False)


def session_for(
    worker: Worker,
    config: Config,
    caller: Caller,
    destination: Destination,
    source_netns: int,
    *,
    inbound: bool,
    opened: Callable[[int, str], None] | None = None,
) -> HttpSession | Relay | None:
    """By what the port speaks. None when there are too many connections, or the policy is past its lease."""
    if len(worker.sessions) >= ALL_MAX:
        worker.metrics.denied("overloaded")
        return None
    scope = worker.scope(config, caller, destination, inbound=inbound)
    if worker.lease.over(config.mesh.policy_lease_s):
        if destination.mode is Protocol.HTTP and not inbound:
            return HttpRefusal(worker, scope, caller, source_netns)  # it counts and tells
        worker.metrics.denied("lease_expired")
        worker.connection_flow(scope, caller, destination.endpoint, "denied", "lease_expired")
        return None
    mode = destination.mode
    account = worker.budgets.of(caller.identity, caller.spiffe)
    sockets = (0 if inbound else 1) + (mode is not Protocol.HTTP)  # the client's, an opaque server's; HTTP servers' are pooled
    excess = account.connect(sockets, asks=mode is not Protocol.HTTP)
    if excess:
        worker.metrics.denied(excess)
        worker.connection_flow(scope, caller, destination.endpoint, "denied", excess)
        return None
    learner: Learner | None = None
    if mode is Protocol.AUTO:
        learned_key = (destination.service or (destination.endpoint.key if destination.endpoint else ""), destination.port)
        mode = worker.learned.known.get(learned_key, Protocol.AUTO)
        if mode is Protocol.AUTO:
            learner = Learner(worker, learned_key)
    if mode is Protocol.HTTP:
        session = HttpSession(worker, scope, caller, source_netns)
        session.sockets = sockets
        if opened is not None:
            opened(200, "")
        return session
    relay = Relay(worker, scope, caller, source_netns, learner=learner, opened=opened)
    relay.sockets = sockets
    return relay


def inbound(
    worker: Worker, transport: asyncio.Transport, caller: Caller, workload_key: str, port: int, opened: Callable[[int, str], None]
) -> asyncio.Protocol:
    """The destination's side of a stream; see `Worker.serve_inbound`."""
    config = worker.config
    workload, v6 = config.workloads.get(workload_key), ":" in caller.address
    # The kernel shows the caller's address to the server: both are of one family, or it can not
    address = next((a for a in workload.addresses if (":" in a) == v6), "") if workload else ""
    destination = config.at_workload(workload_key, port, address)
    session: HttpSession | Relay | None = None
    if destination is None:
        worker.metrics.denied("no_service")
        opened(503, "no_service")
    else:
        scope = worker.scope(config, caller, destination, inbound=True)
        endpoint = destination.endpoint
        if destination.mode is Protocol.TCP and endpoint is not None:
            verdict = scope.transport_verdict(endpoint)
            if not verdict.allowed:
                worker.metrics.denied("policy_denied")
                worker.connection_flow(scope, caller, endpoint, "denied", verdict.rule)
                opened(403, f"policy_denied {verdict.rule}")
                return asyncio.Protocol()
        session = session_for(worker, config, caller, destination, 0, inbound=True, opened=opened)
        if session is None:
            opened(503, "lease_expired" if worker.lease.over(config.mesh.policy_lease_s) else "overloaded")
    if session is None:
        return asyncio.Protocol()
    session.connection_made(transport)
    return session
