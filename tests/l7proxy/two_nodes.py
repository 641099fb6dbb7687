"""Two nodes' tunnels on loopback addresses in one process: real Config, TLS and framing; the rest of a worker is faked."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import structlog

from l7proxy.budget import Budgets
from l7proxy.config import Config
from l7proxy.inbound import Inbound
from l7proxy.target import Caller, DialError, Target
from l7proxy.tls import Contexts
from l7proxy.tunnel_pool import Pool
from lab.pace import PATIENCE
from mesh.link import Listener, LocalWorkload
from mesh.model import CONFIG_KEY, Identity, Item, Service, ServicePort, Workload, key_of
from mesh.model import Config as MeshConfig
from tests.l7proxy.pki import Authority, Entry

TD = "mesh.local"
CLIENT, WEB, DB = (f"spiffe://{TD}/ns/shop/sa/{name}" for name in ("client", "web", "db"))
CLIENT_IP, WEB_IP, DB_IP, NODE_IP = "127.77.0.1", "127.77.1.1", "127.77.1.2", "127.77.1.254"


def workload(number: int, name: str, node: str, spiffe: str, address: str, *ports: int) -> Workload:
    return Workload(
        id=number, name=name, namespace="shop", node=node, identity=number, spiffe=spiffe, addresses=(address,), ports=ports
    )


def state(authority: Authority, **config: Any) -> dict[str, Item]:
    items: list[Item] = [
        MeshConfig(trust_domain=TD, bundle=(authority.root,), **config),
        Identity(id=300, spiffe=CLIENT),
        Identity(id=301, spiffe=WEB),
        Identity(id=302, spiffe=DB),
        workload(300, "client-1", "n1", CLIENT, CLIENT_IP),
        workload(301, "web-1", "n2", WEB, WEB_IP, 8080),
        workload(302, "db-1", "n2", DB, DB_IP, 3306),
        Service(
            id=400,
            name="web",
            namespace="shop",
            ports=(ServicePort(port=80, target_port=8080),),
            endpoints=("Workload/shop/web-1",),
        ),
    ]
    return {(CONFIG_KEY if isinstance(item, MeshConfig) else key_of(item)): item for item in items}


class Stock:
    def __init__(self, address: str) -> None:
        self.address = address
        self.empty = False

    def take(self, _netns: int, family: int) -> socket.socket | None:
        if self.empty:
            return None
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.bind((self.address, 0))
        return sock

    def wait(self, netns: int, family: int, callback: Callable[[socket.socket | None], None], timeout_s: float = 5.0) -> None:
        asyncio.get_running_loop().call_soon(callback, self.take(netns, family))


class Metrics:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.denials: Counter[str] = Counter()

    def count(self, name: str, by: int = 1) -> None:
        self.counts[name] += by

    def denied(self, reason: str) -> None:
        self.denials[reason] += 1


class FakeWorker:
    """The attributes of a Worker that tunnels use."""

    def __init__(self, node: str, address: str, items: dict[str, Item], local: tuple[str, ...]) -> None:
        self.loop = asyncio.get_running_loop()
        self.node = node
        self.local = tuple(LocalWorkload(key=key, netns=7, cgroup=9) for key in local)
        self.config = Config(items, revision=1, node=node, local=self.local)
        self.svids: dict[str, Entry] = {}
        self.stock = Stock(address)
        self.metrics = Metrics()
        self.budgets = Budgets(self.loop.call_soon)
        self.budgets.adopt(items)
        self.handlers: dict[str, Any] = {}
        self.hears: list[Any] = []
        self.sent: list[Any] = []  # to the agent
        self.agent = True
        self.on_config: list[Any] = []
        self.on_svid: list[Any] = []
        self.on_sweep: list[Any] = []
        self.on_drain: list[Any] = []
        self.busy: list[Callable[[], bool]] = []
        self.draining = False
        self.dial_remote: Any = None
        self.flows: list[dict[str, Any]] = []
        self.log = structlog.get_logger()
        self.serve_inbound: Any = self._serve
        self.make: Callable[[], asyncio.Protocol] = Echo
        self.served: list[tuple[Caller, str, int]] = []
        self.answer = (200, "")

    def send(self, message: Any) -> bool:
        if self.agent:
            self.sent.append(message)
        return self.agent

    def flow(self, **fields: Any) -> None:
        self.flows.append(fields)

    @property
    def reasons(self) -> list[str]:
        """Of every refusal that was counted, in order of their first time."""
        return list(self.metrics.denials)

    def reconfigure(self, items: dict[str, Item], local: tuple[str, ...] | None = None) -> None:
        old = self.config
        if local is not None:
            self.local = tuple(LocalWorkload(key=key, netns=7, cgroup=9) for key in local)
        self.config = Config(items, revision=old.revision + 1, generation=old.generation + 1, node=self.node, local=self.local)
        self.budgets.adopt(items)
        for call in self.on_config:
            call(old, self.config)

    def sweep(self) -> None:
        for call in self.on_sweep:
            call(time.perf_counter())

    def _serve(
        self, transport: Any, caller: Caller, workload_key: str, port: int, opened: Callable[[int, str], None]
    ) -> asyncio.Protocol:
        self.served.append((caller, workload_key, port))
        protocol = self.make()
        protocol.connection_made(transport)
        opened(*self.answer)
        return protocol


class Echo(asyncio.Protocol):
    transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def eof_received(self) -> bool:
        self.transport.close()
        return True

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class Collect(asyncio.Protocol):
    """Keeps what comes; conditions to wait for."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.data = bytearray()
        self.eof = False
        self.lost: list[Exception | None] = []
        self.paused = False
        self.failure: DialError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes and not self.lost
        self.data += data

    def eof_received(self) -> bool:
        self.eof = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False

    def fail(self, error: DialError) -> None:
        assert self.failure is None and self.transport is None
        self.failure = error

    @property
    def answered(self) -> bool:
        return self.transport is not None or self.failure is not None


async def until(condition: Callable[[], Any], timeout_s: float = 5.0 * PATIENCE) -> None:
    deadline = time.perf_counter() + timeout_s
    while not condition():  # any condition, with a deadline
        assert time.perf_counter() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.002)


class TwoNodes:
    """``n1`` has the client, ``n2`` web and db. `dial` goes through both."""

    def __init__(self, **config: Any) -> None:
        self.authority = Authority()
        self.items = state(self.authority, **config)
        self.source = FakeWorker("n1", CLIENT_IP, self.items, ("Workload/shop/client-1",))
        self.destination = FakeWorker("n2", NODE_IP, self.items, ("Workload/shop/web-1", "Workload/shop/db-1"))
        self.source.svids[CLIENT] = self.authority.svid(CLIENT)
        self.destination.svids[WEB] = self.authority.svid(WEB)
        self.destination.svids[DB] = self.authority.svid(DB)
        self.pool = Pool(self.source, Contexts(lambda: self.source.svids))  # type: ignore[arg-type]  # a fake
        self.source.dial_remote = self.pool.dial
        self.inbound = Inbound(self.destination, Contexts(lambda: self.destination.svids))  # type: ignore[arg-type]  # a fake
        self.listeners = [self.listen(address) for address in (WEB_IP, DB_IP)]
        for worker in (self.source, self.destination):
            worker.reconfigure(self.items)

    def listen(self, address: str) -> Any:
        sock = socket.create_server((address, 15008), backlog=1024)
        listener = Listener(id=f"7/hbone/{address}", kind="hbone", netns=7, address=address, port=15008)
        return self.inbound.listen(listener, sock)

    def configure(self, **config: Any) -> None:
        """Both nodes get another MeshConfig."""
        self.items = state(self.authority, **config)
        for worker in (self.source, self.destination):
            worker.reconfigure(self.items)

    def dial(
        self,
        address: str = WEB_IP,
        port: int = 8080,
        key: str = "Workload/shop/web-1",
        opaque: bool = False,
        client: str = CLIENT_IP,
    ) -> Collect:
        protocol = Collect()
        target = Target(
            workload=self.items[key],  # type: ignore[arg-type]  # a Workload by its key
            address=address,
            port=port,
            caller=Caller(CLIENT, 300, client, 41000),
            source_netns=7,
            opaque=opaque,
        )
        self.source.dial_remote(target, protocol, protocol.fail)
        return protocol

    async def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        for tunnel in [*self.pool._open, *self.inbound.tunnels, *self.inbound.handshakes]:
            tunnel.abort()
        await until(lambda: not self.pool._open and not self.inbound.tunnels and not self.inbound.handshakes)
