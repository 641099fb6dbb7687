"""A dial on one node: what it may come to, and that it never does so from within the call."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from l7proxy.budget import Budgets
from l7proxy.local_dial import LocalDial
from l7proxy.stock import Stock
from l7proxy.target import Caller, DialError, Target
from mesh.model import Workload
from tests.l7proxy.two_nodes import until

CALLER = Caller("spiffe://mesh.local/ns/shop/sa/client", 300, "10.77.1.2", 40000)
KEY, NETNS = "Workload/shop/web", 7


class Ear(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.data = b""
        self.failed: list[DialError] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # what is dialled here is one

    def data_received(self, data: bytes) -> None:
        self.data += data


class Kernel:
    error: OSError | None = None

    def set_caller(self, sock: socket.socket, caller: Caller) -> None:
        assert caller == CALLER
        if self.error is not None:
            raise self.error


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(1)
        sock.settimeout(5)
        yield sock


class World:
    """A worker as far as a dial knows one."""

    def __init__(self, stocked: int = 1, timeout_s: float = 5.0) -> None:
        self.socks: list[socket.socket] = []
        self.kernel = Kernel()
        self.worker: Any = SimpleNamespace(
            loop=asyncio.get_running_loop(),
            budgets=Budgets(lambda _work: None),
            config=SimpleNamespace(
                local={KEY: SimpleNamespace(netns=NETNS)},
                mesh=SimpleNamespace(connect_timeout_s=timeout_s, policy_lease_s=0.0),
            ),
            kernel=self.kernel,
            lease=SimpleNamespace(over=lambda lease_s: lease_s > 0),
            stock=Stock(lambda *_: None),
        )
        for _ in range(stocked):
            self.stock()
        self.ear = Ear()

    def stock(self) -> None:
        sock = socket.socket()
        fd = sock.detach()
        self.worker.stock.add(NETNS, socket.AF_INET, [fd])
        shelf = self.worker.stock.shelf(NETNS, socket.AF_INET)
        self.socks += [kept for kept in shelf.sockets if kept not in self.socks]

    def dial(self, port: int, key: str = KEY) -> LocalDial:
        name = key.rpartition("/")[2]
        workload = Workload(1, name, "shop", "n1", 400, "spiffe://mesh.local/ns/shop/sa/web", ("127.0.0.1",), {}, (port,))
        dial = LocalDial(self.worker, Target(workload, "127.0.0.1", port, CALLER, 0, False), self.ear, self.ear.failed.append)
        assert self.ear.transport is None
        assert not self.ear.failed  # later
        return dial

    @property
    def outcome(self) -> tuple[str, int]:
        (error,) = self.ear.failed
        return error.reason, error.status


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


async def test_it_is_made(server: socket.socket) -> None:
    world = World()
    world.dial(port_of(server))
    await until(lambda: world.ear.transport)
    peer, _ = server.accept()
    with peer:
        peer.sendall(b"hello")
        await until(lambda: world.ear.data == b"hello")
        assert world.ear.transport is not None
        world.ear.transport.close()
        await until(lambda: world.socks[0].fileno() < 0)
    assert world.worker.budgets.of(CALLER.identity, CALLER.spiffe).spent > 0
    assert not world.ear.failed


async def test_nobody_listens(server: socket.socket) -> None:
    port = port_of(server)
    server.close()
    world = World()
    world.dial(port)
    await until(lambda: world.ear.failed)
    assert world.outcome == ("connect_refused", 503)
    assert world.socks[0].fileno() < 0


def no_kernel(world: World) -> None:
    world.kernel.error = OSError(errno.EPERM, "no")


def no_lease(world: World) -> None:
    no_kernel(world)
    world.worker.config.mesh.policy_lease_s = 60.0


def no_network(world: World) -> None:
    world.kernel.error = OSError(errno.ENETUNREACH, "unreachable")


@pytest.mark.parametrize(
    ("how", "reason"), [(no_kernel, "dial_denied"), (no_lease, "lease_expired"), (no_network, "connect_reset")]
)
async def test_the_kernel_refuses(server: socket.socket, how: Callable[[World], None], reason: str) -> None:
    world = World()
    how(world)
    world.dial(port_of(server))
    await until(lambda: world.ear.failed)
    assert world.outcome[0] == reason
    assert world.socks[0].fileno() < 0


async def test_the_workload_left() -> None:
    world = World()
    world.dial(1, "Workload/shop/gone")
    await until(lambda: world.ear.failed)
    assert world.outcome[0] == "no_endpoints"


async def test_a_server_that_does_not_answer(server: socket.socket) -> None:
    world = World(timeout_s=0.05)
    full = [socket.socket() for _ in range(4)]
    for sock in full:  # its backlog
        sock.setblocking(False)
        sock.connect_ex(server.getsockname())
    world.dial(port_of(server))
    await until(lambda: world.ear.failed)
    assert world.outcome[0] == "connect_timeout"
    assert world.socks[0].fileno() < 0
    for sock in full:
        sock.close()


async def test_one_that_answers_late(server: socket.socket) -> None:
    world = World()
    full = [socket.socket() for _ in range(4)]
    for sock in full:
        sock.setblocking(False)
        sock.connect_ex(server.getsockname())
    world.dial(port_of(server))
    assert world.ear.transport is None
    for _ in range(3):
        server.accept()[0].close()
    await until(lambda: world.ear.transport, 10.0)  # the SYN is sent again after a second
    for sock in full:
        sock.close()
    assert world.ear.transport is not None
    world.ear.transport.abort()


async def test_given_up_it_says_nothing(server: socket.socket) -> None:
    world = World()
    world.dial(port_of(server)).cancel()
    await asyncio.sleep(0.01)
    assert (world.ear.transport, world.ear.failed) == (None, [])
    assert world.socks[0].fileno() < 0


async def test_without_stock_it_waits(server: socket.socket) -> None:
    world = World(stocked=0)
    world.dial(port_of(server))
    world.stock()
    await until(lambda: world.ear.transport)
    world.ear.transport.abort()  # type: ignore[union-attr]  # it is there


async def test_given_up_while_it_waits_it_lets_the_socket_go(server: socket.socket) -> None:
    world = World(stocked=0)
    world.dial(port_of(server)).cancel()
    world.stock()
    await asyncio.sleep(0.01)
    assert (world.ear.transport, world.ear.failed, world.socks) == (None, [], [])


async def test_no_stock_comes() -> None:
    world = World(stocked=0, timeout_s=0.0)
    world.dial(1)
    world.worker.stock.sweep(frozenset({NETNS}))
    assert world.outcome[0] == "no_stock"
