"""One worker process: the link to the agent, the configuration, and everything that hangs on the loop. It listens
on a unix socket it inherited; the agent dials it, again after every break, and the worker serves on in between."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from l7proxy import capture
from l7proxy.access_log import AccessLog
from l7proxy.budget import Budgets
from l7proxy.budget_metrics import BudgetCollector
from l7proxy.config import Config, Destination, Endpoint
from l7proxy.drain import Ending
from l7proxy.express_desk import Desk
from l7proxy.http1.exchange import Clock
from l7proxy.http1.head import Heads
from l7proxy.kernel import Kernel
from l7proxy.learn import Learned
from l7proxy.lease import Lease
from l7proxy.legs import Legs
from l7proxy.linkserver import LinkServer
from l7proxy.metrics import Metrics, known_reason
from l7proxy.opaque import Relay
from l7proxy.scope import Scope
from l7proxy.session import HttpSession
from l7proxy.stock import Stock
from l7proxy.target import Caller, DialError, Target
from l7proxy.upstream import Dial, Upstreams
from mesh import link
from mesh.snapshot import SnapshotError

SWEEP_S = 1.0
SCOPES_MAX = 8192
FLOWS_ALLOWED_PER_S, FLOWS_DENIED_PER_S = 50, 200
RECHECK_PER_TURN = 200  # open connections decided anew before the loop gets its turn


class Closable(Protocol):
    def close(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class SvidEntry:
    """A workload's certificate. ``key_fd``: sealed memfd, to be loaded through /proc/self/fd."""

    chain: str
    key_fd: int
    serial: str
    not_after: float


Handler = Callable[[link.Listener, socket.socket], Closable]
DialRemote = Callable[[Target, asyncio.Protocol, Callable[[DialError], None]], Dial]


class Worker:
    """See the module. ``listen``: the listening unix socket; ``kernel``: replaced in tests."""

    def __init__(self, index: int, listen: socket.socket, *, kernel: Kernel | None = None) -> None:
        self.index, self.generation = index, 0
        self.kernel = kernel or Kernel()
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # there is none before run()
        self.log = structlog.get_logger().bind(worker=index)
        self.node, self.lease = "", Lease()
        self.config = Config.empty()
        self.clock = Clock()
        self.clock.now = time.perf_counter()
        self.heads = Heads()
        self.metrics = Metrics()
        self.upstreams = Upstreams(self)
        self.stock = Stock(lambda netns, family, count: self.send(link.NeedStock(netns, family, count)))
        self.svids: dict[str, SvidEntry] = {}
        self.learned = Learned()
        self.sessions: set[HttpSession | Relay] = set()
        self.budgets = Budgets(lambda work: self.loop.call_soon(work))
        self.rng = random.Random()
        self.handlers: dict[str, Handler] = {"outbound": lambda listener, sock: capture.Capture(self, listener, sock)}
        self.listeners: dict[str, Closable] = {}
        self._serve_to_the_end: set[str] = set()  # listeners that draining leaves open
        self.dial_remote: DialRemote = self._no_tunnel
        self.on_config: list[Callable[[Config, Config], None]] = []
        self.on_svid: list[Callable[[str], None]] = []
        self.on_sweep: list[Callable[[float], None]] = []
        self.on_drain: list[Callable[[float], None]] = []
        self.busy: list[Callable[[], bool]] = []  # whether something still has bytes to send, asked while draining
        self.draining = self.succeeded = False  # succeeded: another worker comes in our place
        self.access: AccessLog | None = None
        self.flow_budget, self.denied_budget = FLOWS_ALLOWED_PER_S, FLOWS_DENIED_PER_S
        self._scopes: dict[tuple[object, ...], Scope] = {}
        self.express = Desk(self)
        self.hears: list[Callable[[link.Message], bool]] = [self.lease.hear, self.express.hear]
        self.legs = Legs(self)
        self.agent = LinkServer(self, listen)
        self.ending = Ending(self, self._drained)
        self._stopped: asyncio.Event | None = None
        self._recheck: asyncio.Task[None] | None = None
        self.metrics.register(BudgetCollector(self.budgets, lambda spiffe: self.config.label(spiffe)))
        self.metrics.gauge("pillion_proxy_sessions", "Open client connections", lambda: len(self.sessions))
        self.metrics.gauge("pillion_proxy_stock", "Client sockets at hand", lambda: sum(self.stock.counts().values()))
        self.metrics.gauge("pillion_proxy_revision", "Revision of the configuration", lambda: self.config.revision)

    # ---- life

    async def run(self) -> None:
        """Until `stop` or SIGTERM, then drained."""
        self.loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        try:
            self.loop.add_signal_handler(signal.SIGTERM, self.stop)
        except (RuntimeError, ValueError):
            pass  # not the main thread: a test, which calls stop()
        self.agent.start()
        sweep = self.loop.create_task(self._sweep_forever())
        await self._stopped.wait()
        sweep.cancel()
        self.agent.close()
        self.close_listeners()
        for session in list(self.sessions):
            session.end_idle()
            session.cut()
        self.stock.sweep(frozenset())
        if self.access is not None:
            self.access.flush()

    def stop(self) -> None:
        """See `l7proxy.drain`."""
        self.ending.stop()

    def drain(self, seconds: float) -> None:
        """The same."""
        self.ending.told(seconds)

    def close_listeners(self, *, all_of_them: bool = True) -> None:
        """Or all but those that lose what comes when nobody reads."""
        for name in self.listeners.keys() - (frozenset() if all_of_them else self._serve_to_the_end):
            self.listeners.pop(name).close()

    def _drained(self) -> None:
        if self._stopped is not None:
            self._stopped.set()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep(time.perf_counter())

    def sweep(self, now: float) -> None:
        """Everything that time brings about, once a second."""
        self.clock.now = now
        self.flow_budget, self.denied_budget = FLOWS_ALLOWED_PER_S, FLOWS_DENIED_PER_S
        late = [session for session in self.sessions if session.deadline < now]
        for session in late:
            session.timeout()
        self.budgets.sweep(self.config.spiffe_id.__contains__)
        self.upstreams.sweep(now)
        self.stock.sweep(frozenset(self.config.by_netns))
        for hook in self.on_sweep:
            hook(now)
        if self.access is not None:
            self.access.flush()
            if not self.config.mesh.access_log:
                self.access = None

    # ---- from the agent

    def send(self, message: link.Message, fds: Sequence[int] = ()) -> bool:
        """To the agent, with duplicates of ``fds``; dropped while there is none (False)."""
        return self.agent.send(message, fds)

    def linked(self) -> None:
        """The agent has dialled."""
        self.send(link.Ready(self.index, os.getpid(), self.generation))
        self.ending.linked()
        self.stock.relink()
        self.express.relinked()
        self.legs.relinked()

    def handle(self, message: link.Message, fds: list[int]) -> None:
        """One message; takes over its descriptors."""
        if isinstance(message, link.Stock):
            self.stock.add(message.netns, message.family, fds)
            return
        if isinstance(message, link.Svid) and len(fds) == 1:
            self._svid(message, fds[0])
            return
        if isinstance(message, link.Listener) and len(fds) == 1:
            self._listener(message, fds[0])
            return
        if isinstance(message, link.Takeover):
            self.express.takeover(message, fds)
            return
        for fd in fds:
            os.close(fd)
        if isinstance(message, link.Update):
            self._update(message)
        elif isinstance(message, link.Hello):
            self.node = message.node
            self.kernel.learn(message)
        elif isinstance(message, link.CloseListener):
            self._serve_to_the_end.discard(message.id)
            if (listener := self.listeners.pop(message.id, None)) is not None:
                listener.close()
        elif isinstance(message, link.DropSvid):
            if (entry := self.svids.pop(message.spiffe, None)) is not None:
                self._tell_svid(message.spiffe)
                os.close(entry.key_fd)  # nobody loads it any more
        elif isinstance(message, link.Scrape):
            self.send(link.Metrics(self.index, self.metrics.text()))
        elif isinstance(message, link.Drain):
            self.drain(message.seconds)
        elif not any(hear(message) for hear in self.hears):
            self.log.warning("the agent sent what it should not", message=type(message).__name__, descriptors=len(fds))

    def _svid(self, message: link.Svid, fd: int) -> None:
        old = self.svids.get(message.spiffe)
        self.svids[message.spiffe] = SvidEntry(message.chain, fd, message.serial, message.not_after)
        self._tell_svid(message.spiffe)
        if old is not None:
            os.close(old.key_fd)

    def _tell_svid(self, spiffe: str) -> None:
        for hook in self.on_svid:
            hook(spiffe)

    def _listener(self, message: link.Listener, fd: int) -> None:
        handler = self.handlers.get(message.kind)
        if handler is None or self.draining:
            self.metrics.count("listener_refused")
            os.close(fd)
            return
        try:
            sock = socket.socket(fileno=fd)  # asks the kernel for family and type
        except OSError as error:
            self.log.error("the agent sent a listener that is no socket", listener=message.id, error=str(error))
            self.metrics.count("listener_refused")
            os.close(fd)
            return
        sock.setblocking(False)
        if message.kind.startswith("dns"):  # a datagram is served or lost: no reason to stop early
            self._serve_to_the_end.add(message.id)
        old = self.listeners.get(message.id)
        self.listeners[message.id] = handler(message, sock)
        if old is not None:
            old.close()

    def _update(self, message: link.Update) -> None:
        try:
            new = self.config.updated(message, self.node)
        except (SnapshotError, ValueError, KeyError, LookupError) as error:
            self.log.error("update refused; the configuration before it stays", revision=message.revision, error=str(error))
            self.send(link.Nack(message.revision, str(error)))
            return
        self.adopt(new)
        self.send(link.Ack(message.revision, new.digest))

    def adopt(self, new: Config) -> None:
        """From here on every decision is made on ``new``; what is open is decided anew when its generation differs."""
        old, self.config = self.config, new
        self._scopes.clear()
        self.budgets.adopt(new.state)
        if new.mesh.access_log and self.access is None:
            self.access = AccessLog()
        self.learned.forget(new.services.keys() | new.workloads.keys())
        self.upstreams.close_idle(lambda endpoint: endpoint.key not in new.workloads)
        for hook in self.on_config:
            hook(old, new)
        if old.generation != new.generation or old.revision != new.revision:
            if self._recheck is not None:
                self._recheck.cancel()
            self._recheck = self.loop.create_task(self._recheck_open())

    async def _recheck_open(self) -> None:
        for number, session in enumerate(list(self.sessions), 1):
            session.recheck()
            if number % RECHECK_PER_TURN == 0:
                await asyncio.sleep(0)

    # ---- for the sessions

    def scope(self, config: Config, caller: Caller, destination: Destination, *, inbound: bool) -> Scope:
        """Shared by the connections of one caller address to one destination."""
        key = (caller.spiffe, caller.address, destination, inbound)
        found = self._scopes.get(key)
        if found is None or found.config is not config:
            if len(self._scopes) >= SCOPES_MAX:
                self._scopes.clear()
            found = self._scopes[key] = Scope(self, config, caller, destination, inbound=inbound)
        return found

    def rescope(self, scope: Scope) -> Scope | None:
        """The same under the configuration of now; None when the destination, or the caller, is no more."""
        config, old, caller = self.config, scope.destination, scope.caller
        if not scope.inbound and caller.workload not in config.local:
            return None
        if old.endpoint is not None:
            new = config.at_workload(old.endpoint.key, old.port, old.endpoint.address)
        else:
            new = config.service_destination(old.service, old.port)
        if new is None or config.identity(caller.spiffe) != caller.identity:
            return None
        return self.scope(config, caller, new, inbound=scope.inbound)

    def serve_inbound(
        self, transport: asyncio.Transport, caller: Caller, workload_key: str, port: int, opened: Callable[[int, str], None]
    ) -> asyncio.Protocol:
        """See `capture.inbound`."""
        return capture.inbound(self, transport, caller, workload_key, port, opened)

    def _no_tunnel(self, _target: Target, _protocol: asyncio.Protocol, failed: Callable[[DialError], None]) -> Dial:
        return self.loop.call_soon(failed, DialError("no_tunnel"))

    # ---- what is told

    def flow(self, *, verdict: str, reason: str, **fields: Any) -> None:
        """One event for ``pillion flows``, within the budget of this second. Fields: see `mesh.link.Flow`."""
        if verdict == "allowed":
            if self.flow_budget <= 0:
                return
            self.flow_budget -= 1
        else:
            if self.denied_budget <= 0 or not self.budgets.may_tell(fields.get("source", "")):
                self.metrics.count("flows_dropped")
                return
            self.denied_budget -= 1
        self.send(
            link.Flow(
                time=time.time(),
                verdict=verdict,
                reason=reason,
                revision=self.config.revision,
                node=self.node or self.config.node,
                **fields,
            )
        )

    def connection_flow(self, scope: Scope, caller: Caller, endpoint: Endpoint | None, verdict: str, reason: str) -> None:
        """About an opaque connection."""
        self.flow(
            verdict=verdict,
            reason=reason,
            source=caller.spiffe or "unknown",
            destination=endpoint.key if endpoint else scope.destination.service,
            source_address=f"{caller.address}:{caller.port}",
            destination_address=f"{endpoint.address}:{endpoint.port}" if endpoint else "",
            direction="inbound" if scope.inbound else "outbound",
        )

    def denied_open(self, scope: Scope, rule: str) -> None:
        """A new configuration denies what is open."""
        self.metrics.denied("generation_denied")
        self.flow(
            verdict="denied",
            reason=rule,
            source=scope.caller.spiffe or "unknown",
            destination=scope.service_label,
            source_address=scope.caller.address,
            direction="inbound" if scope.inbound else "outbound",
        )

    def exchange(self, session: HttpSession, status: int, why: str, seconds: float) -> None:
        """About one HTTP exchange; not on the hot path."""
        head, candidate, scope = session.request, session.candidate, session.scope
        rule = candidate.rule if candidate is not None else ""
        fields: dict[str, Any] = {
            "source": session.caller.spiffe or "unknown",
            "destination": candidate.endpoint.key if candidate else scope.destination.service,
            "source_address": f"{session.caller.address}:{session.caller.port}",
            "destination_address": f"{candidate.endpoint.address}:{candidate.endpoint.port}" if candidate else "",
            "method": head.method if head else "",
            "path": head.path[:512] if head else "",
        }
        if why in ("cut", "client_gone"):
            self.metrics.count(why)
        elif why:
            self.metrics.denied(known_reason(why))
        self.flow(
            verdict="denied" if why and status else "allowed",
            reason=rule if why in ("", "policy_denied") else why,
            protocol="http",
            layer="L7",
            status=status,
            direction="inbound" if scope.inbound else "outbound",
            **fields,
        )
        for audited in candidate.audits if candidate is not None else ():
            self.flow(verdict="audited", reason=audited, protocol="http", layer="L7", status=status, **fields)
        if self.access is not None:
            self.access.write(
                {"time": time.time(), "status": status, "reason": why, "rule": rule, "seconds": round(seconds, 6), **fields}
            )
