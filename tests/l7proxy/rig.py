"""A worker in a thread of this process, with a fake agent on its link and a fake kernel behind it: real sockets on
loopback, no privilege needed. Listener N stands for one destination that an application dialled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from l7proxy.kernel import Kernel, Origin
from l7proxy.target import Caller
from l7proxy.worker import Worker
from lab.pace import PATIENCE
from mesh import link
from mesh.link import LocalWorkload
from mesh.model import (
    Action,
    Config,
    Identity,
    Item,
    Policy,
    Protocol,
    Route,
    Rule,
    Service,
    ServicePort,
    Source,
    State,
    Workload,
    key_of,
)

NODE_NETNS = 77
FIELDS_ORIGIN = ("dst", "client", "cgroup", "netns", "workload", "identity", "service", "dst_port", "client_port")
DEADLINE_S = 5.0 * PATIENCE


def wait_for(condition: Callable[[], object], what: str = "condition", deadline_s: float = DEADLINE_S) -> None:
    """Fails when ``condition`` does not come true in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.005)


def spiffe(name: str) -> str:
    return f"spiffe://mesh.local/ns/shop/sa/{name}"


@dataclass
class Mesh:
    """A State in the making: one service per name, its endpoints on 127.0.0.1 at given ports."""

    items: list[Item] = field(default_factory=list)
    next_id: int = 256
    config: Config = field(default_factory=lambda: Config(trust_domain="mesh.local", connect_timeout_s=2.0))

    def identity(self, name: str) -> int:
        for item in self.items:
            if isinstance(item, Identity) and item.spiffe == spiffe(name):
                return item.id
        self.items.append(Identity(self._id(), spiffe(name)))
        return self.items[-1].id  # type: ignore[union-attr]

    def _id(self) -> int:
        self.next_id += 1
        return self.next_id

    def workload(self, name: str, account: str, ports: tuple[int, ...] = (), address: str = "127.0.0.1") -> Workload:
        found = Workload(
            id=self._id(), name=name, namespace="shop", node="n1", identity=self.identity(account), spiffe=spiffe(account),
            addresses=(address,), labels={"app": account}, ports=tuple(sorted(ports)),
        )  # fmt: skip
        self.items.append(found)
        return found

    def service(
        self,
        name: str,
        targets: list[int],
        protocol: Protocol = Protocol.HTTP,
        add_headers: tuple[str, ...] = (),
        address: str = "127.0.0.1",
    ) -> Service:
        """Port 80 of a VIP; each target port is one workload."""
        workloads = [self.workload(f"{name}-{n}", name, (port,), address) for n, port in enumerate(targets, 1)]
        number = self._id()
        found = Service(
            id=number, name=name, namespace="shop", vips=(f"240.0.{number >> 8}.{number & 255}",),
            ports=tuple(ServicePort(80 + n, port, protocol=protocol) for n, port in enumerate(dict.fromkeys(targets))),
            endpoints=tuple(key_of(w) for w in workloads), add_headers=add_headers,
        )  # fmt: skip
        self.items.append(found)
        return found

    def allow(self, name: str, *sources: str, rules: tuple[Rule, ...] = ()) -> None:
        rules = rules or (Rule(sources=(Source(principals=tuple(spiffe(s).removeprefix("spiffe://") for s in sources)),)),)
        self.items.append(Policy(f"{name}-allow", "shop", Action.ALLOW, selector={"app": name}, rules=rules))

    def deny(self, name: str, rule: Rule) -> None:
        self.items.append(Policy(f"{name}-deny", "shop", Action.DENY, selector={"app": name}, rules=(rule,)))

    def add(self, item: Route | Policy) -> None:
        self.items.append(item)

    @property
    def state(self) -> State:
        return {key_of(item): item for item in [*self.items, self.config]}


class FakeKernel(Kernel):
    """Knows the origin by the listener's port."""

    def __init__(self) -> None:
        super().__init__()
        self.dialled: dict[int, tuple[str, int, Workload]] = {}  # listener port -> destination and client
        self.callers: list[Caller] = []

    def learn(self, hello: link.Hello) -> None:
        pass

    def origin(self, sock: socket.socket) -> Origin | None:  # type: ignore[override]
        known = self.dialled.get(sock.getsockname()[1])
        if known is None:
            return None
        address, port, client = known
        peer = sock.getpeername()
        return Origin(address, port, peer[0], peer[1], NODE_NETNS, client.id, client.identity, 0)

    def set_caller(self, sock: object, caller: Caller) -> None:
        self.callers.append(caller)
        del self.callers[:-1000]

    def check_agent(self, connection: socket.socket) -> bool:
        return True


class Agent:
    """The other end of the link: answers NeedStock, keeps the rest; of what has descriptors, only who asks for them."""

    def __init__(self, path: str, *, listen: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.decoder = link.Decoder()
        self.messages: list[link.Message] = []
        self.on_pair: Callable[[link.Pair, list[int]], None] | None = None  # gets the descriptors
        self.on_leg: Callable[[link.Leg, list[int]], None] | None = None  # the same
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.stocked = True
        self.make: Callable[[int], socket.socket] = socket.socket  # of a family
        if listen:
            self.listen()

    def listen(self) -> None:
        """From here on it hears."""
        self.thread.start()

    def send(self, message: link.Message, fds: list[int] | None = None) -> None:
        with self.lock:
            data = link.encode(message, len(fds or []))
            sent = socket.send_fds(self.sock, [data], fds or [])
            if sent < len(data):
                self.sock.sendall(data[sent:])

    def _read(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 1 << 18, 253)
            except OSError:
                return
            if not data:
                return
            for message, its_fds in self.decoder.feed(data, fds):
                if isinstance(message, link.Pair) and self.on_pair is not None:
                    self.on_pair(message, its_fds)
                if isinstance(message, link.Leg) and self.on_leg is not None:
                    self.on_leg(message, its_fds)
                if isinstance(message, link.NeedStock) and self.stocked:
                    try:
                        self.stock(message)
                    except OSError:  # closed meanwhile
                        return
                self.messages.append(message)

    def stock(self, wanted: link.NeedStock) -> None:
        left = wanted.count
        while left > 0:
            socks = [self.make(wanted.family) for _ in range(min(left, 64))]
            self.send(link.Stock(wanted.netns, wanted.family), [s.fileno() for s in socks])
            for sock in socks:
                sock.close()
            left -= 64

    def of(self, kind: type) -> list[link.Message]:
        return [message for message in self.messages if isinstance(message, kind)]

    def close(self) -> None:
        # shutdown first: close alone does not wake the reading thread
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.thread.join(DEADLINE_S)


class Rig:
    def __init__(self, mesh: Mesh, kernel: FakeKernel | None = None) -> None:
        self.mesh = mesh
        self.kernel = kernel or FakeKernel()
        self.directory = tempfile.TemporaryDirectory(prefix="pillion-rig-")
        self.path = str(Path(self.directory.name) / "worker.sock")
        listen = socket.socket(socket.AF_UNIX)
        listen.bind(self.path)
        listen.listen()
        self.worker = Worker(0, listen, kernel=self.kernel)
        self.thread = threading.Thread(target=lambda: uvloop.run(self.worker.run()), daemon=True)
        self.thread.start()
        self.agent = Agent(self.path)
        self.agent.send(link.Hello("n1", "16s", FIELDS_ORIGIN, "16s", ()))
        self.revision = 0
        self.update()
        self.ports: dict[tuple[str, int, str], int] = {}

    def update(self) -> None:
        """Sends the mesh as it is now, and waits until it is applied."""
        self.revision += 1
        local = tuple(
            LocalWorkload(key, NODE_NETNS, 1)
            for key, item in self.mesh.state.items()
            if isinstance(item, Workload) and item.node == "n1"
        )
        self.agent.send(link.Update(self.revision, True, self.mesh.state, (), local, self.revision))
        wait_for(
            lambda: any(m.revision == self.revision for m in self.agent.of(link.Ack) + self.agent.of(link.Nack)),  # type: ignore[attr-defined]
            "the update",
        )

    def listen(self, client: Workload, service: Service | None = None, *, port: int = 80, address: str = "") -> int:
        """A listener for dials of ``client`` to the service's VIP; its port on 127.0.0.1."""
        address = address or service.vips[0]  # type: ignore[union-attr]
        key = (address, port, client.name)
        if key not in self.ports:
            sock = socket.socket()
            sock.bind(("127.0.0.1", 0))
            sock.listen(256)
            number = sock.getsockname()[1]
            self.kernel.dialled[number] = (address, port, client)
            self.agent.send(
                link.Listener(f"{NODE_NETNS}/outbound/{number}", "outbound", NODE_NETNS, "127.0.0.1", number), [sock.fileno()]
            )
            sock.close()
            self.ports[key] = number
        return self.ports[key]

    def connect(self, client: Workload, service: Service | None = None, *, port: int = 80, address: str = "") -> socket.socket:
        # without a timeout: with one, a RST right after the handshake would surface in connect()
        sock = socket.create_connection(("127.0.0.1", self.listen(client, service, port=port, address=address)))
        sock.settimeout(DEADLINE_S)
        return sock

    def relink(self) -> None:
        """The agent dials again."""
        old, self.agent = self.agent, Agent(self.path, listen=False)
        self.agent.on_pair, self.agent.on_leg = old.on_pair, old.on_leg
        self.agent.listen()  # whoever answers by `self.agent` means this one
        old.close()
        self.agent.send(link.Hello("n1", "16s", FIELDS_ORIGIN, "16s", ()))

    def call(self, function: Callable[[], object]) -> object:
        """Runs in the worker's loop."""

        async def run() -> object:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.worker.loop).result(DEADLINE_S)

    def sweep(self, seconds: float = 0.0) -> None:
        """Lets ``seconds`` pass for the worker's deadlines."""
        self.call(lambda: self.worker.sweep(time.perf_counter() + seconds))

    def close(self) -> None:
        if self.thread.is_alive():
            self.worker.loop.call_soon_threadsafe(self.worker.drain, 0.0)
        self.thread.join(DEADLINE_S)
        self.agent.close()
        self.directory.cleanup()
        assert not self.thread.is_alive(), "the worker did not stop"


@contextlib.contextmanager
def running(mesh: Mesh, kernel: FakeKernel | None = None) -> Iterator[Rig]:
    rig = Rig(mesh, kernel)
    try:
        yield rig
    finally:
        rig.close()


class Server:
    """A TCP server, by default on 127.0.0.1, whose connections are handled by a function in a thread each."""

    def __init__(self, handle: Callable[[socket.socket], None], address: str = "127.0.0.1") -> None:
        self.sock = socket.socket()
        self.sock.bind((address, 0))
        self.sock.listen(128)
        self.port: int = self.sock.getsockname()[1]
        self.accepted = 0
        self.handle = handle
        self.connections: list[socket.socket] = []
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            self.accepted += 1
            connection.settimeout(DEADLINE_S)
            self.connections.append(connection)
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.handle(connection)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        for connection in self.connections:
            connection.close()


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """Head with its blank line, and what came after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return data, b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := sock.recv(65536):
            data += more
    return data


def read_response(sock: socket.socket) -> tuple[int, bytes, bytes]:
    """Status, head and a Content-Length body."""
    head, body = read_head(sock)
    assert head, "the connection was closed without a response"
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    while len(body) < length:
        more = sock.recv(65536)
        assert more, "the body was cut"
        body += more
    return int(head.split()[1]), head, body


def http_server(respond: Callable[[bytes], bytes] | None = None) -> Server:
    """Answers each bodyless request; by default with what it asked, keep-alive."""

    def handle(connection: socket.socket) -> None:
        buffer = b""
        while True:
            while b"\r\n\r\n" not in buffer:
                more = connection.recv(65536)
                if not more:
                    connection.close()
                    return
                buffer += more
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            connection.sendall(respond(head) if respond else ok(head.split(b"\r\n")[0]))

    return Server(handle)


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
