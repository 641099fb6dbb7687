"""Two whole workers, one for each node, with fake agents: a request's way through both, on loopback."""

from __future__ import annotations

import http.server
import resource
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from l7proxy import inbound
from l7proxy.worker import Worker
from mesh import link
from mesh.link import LocalWorkload
from mesh.model import Protocol, Service, Workload, key_of
from tests.l7proxy import rig as rig_module
from tests.l7proxy.pki import Authority
from tests.l7proxy.rig import (
    DEADLINE_S,
    NODE_NETNS,
    Mesh,
    Rig,
    Server,
    read_all,
    read_head,
    read_response,
    spiffe,
    wait_for,
)

WEB_IP = "127.77.9.1"


class Node(Rig):
    def __init__(self, mesh: Mesh, node: str) -> None:
        self.node = node
        super().__init__(mesh)

    def update(self) -> None:
        self.revision += 1
        local = tuple(
            LocalWorkload(key, NODE_NETNS, 1)
            for key, item in self.mesh.state.items()
            if isinstance(item, Workload) and item.node == self.node
        )
        self.agent.send(link.Update(self.revision, True, self.mesh.state, (), local, self.revision))
        wait_for(lambda: any(m.revision == self.revision for m in self.agent.of(link.Ack)), "the update")  # type: ignore[attr-defined]

    def svid(self, authority: Authority, name: str) -> str:
        entry = authority.svid(spiffe(name))
        self.agent.send(link.Svid(spiffe(name), entry.chain, entry.serial, entry.not_after), [entry.key_fd])
        wait_for(lambda: getattr(self.worker.svids.get(spiffe(name)), "serial", "") == entry.serial, "the svid")
        return entry.serial


class Web(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b"b" * 300_000 if self.path == "/big" else f"hello {self.path}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Pair:
    """n1 with a client, n2 with web (HTTP) and echo (opaque)."""

    def __init__(self) -> None:
        self.authority = Authority()
        self.server = http.server.ThreadingHTTPServer((WEB_IP, 0), Web)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.echo = socket.create_server((WEB_IP, 0))
        threading.Thread(target=self._echo, daemon=True).start()
        self.mesh = Mesh()
        self.mesh.config = msgspec.structs.replace(self.mesh.config, bundle=(self.authority.root,))
        self.client = self.mesh.workload("client-1", "client")
        self.web = self.mesh.service("web", [self.server.server_port], address=WEB_IP)
        self.raw = self.mesh.service("raw", [self.echo.getsockname()[1]], Protocol.TCP, address=WEB_IP)
        self.mesh.items = [
            msgspec.structs.replace(item, node="n2") if isinstance(item, Workload) and item.name != "client-1" else item
            for item in self.mesh.items
        ]
        self.mesh.allow("web", "client")
        self.mesh.allow("raw", "client")
        self.source, self.destination = Node(self.mesh, "n1"), Node(self.mesh, "n2")
        self.source.svid(self.authority, "client")
        for name in ("web", "raw"):
            self.destination.svid(self.authority, name)
        with socket.create_server((WEB_IP, 15008)) as listener:
            message = link.Listener("77/hbone/4", "hbone", NODE_NETNS, WEB_IP, 15008)
            self.destination.agent.send(message, [listener.fileno()])
            wait_for(lambda: "77/hbone/4" in self.destination.worker.listeners, "the listener")

    def _echo(self) -> None:
        while True:
            try:
                connection, _ = self.echo.accept()
            except OSError:
                return
            connection.sendall(b"server first\n")
            threading.Thread(target=self._relay, args=(connection,), daemon=True).start()

    @staticmethod
    def _relay(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    def get(self, path: str, sock: socket.socket | None = None) -> tuple[int, bytes]:
        sock = sock or self.source.connect(self.client, self.web)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: web.shop.mesh\r\n\r\n".encode())
        status, _, body = read_response(sock)
        return status, body

    def service(self, service: Service) -> socket.socket:
        return self.source.connect(self.client, service)

    def close(self) -> None:
        self.source.close()
        self.destination.close()
        self.server.shutdown()
        self.server.server_close()
        self.echo.shutdown(socket.SHUT_RDWR)
        self.echo.close()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    def make(*arguments: object, **options: object) -> Worker:
        worker = Worker(*arguments, **options)  # type: ignore[arg-type]  # passed through
        inbound.install(worker)
        return worker

    monkeypatch.setattr(rig_module, "Worker", make)
    made = Pair()
    yield made
    made.close()


def test_http(pair: Pair) -> None:
    with pair.service(pair.web) as sock:
        for n in range(20):
            assert pair.get(f"/{n}", sock) == (200, f"hello /{n}".encode())
        status, body = pair.get("/big", sock)
        assert (status, len(body)) == (200, 300_000)


def test_opaque_server_first_bulk_and_half_close(pair: Pair) -> None:
    with pair.service(pair.raw) as sock:
        greeting = b""
        while len(greeting) < 13:
            greeting += sock.recv(100)
        assert greeting == b"server first\n"
        sent = bytes(range(256)) * 20_000
        threading.Thread(target=lambda: (sock.sendall(sent), sock.shutdown(socket.SHUT_WR)), daemon=True).start()
        assert read_all(sock) == sent


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("kind", ["raw", "web"])
def test_a_sleeping_reader_holds_windows_not_the_stream(pair: Pair, kind: str) -> None:
    """A server that sends without end, to a client that reads nothing: both workers and all in between stay small."""
    sent, looked = 0, threading.Event()

    def pour(connection: socket.socket) -> None:
        nonlocal sent
        if kind == "web":
            read_head(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n")
        connection.settimeout(DEADLINE_S)
        while True:
            sent += connection.send(b"y" * 65536)

    server = Server(pour, WEB_IP)
    service = pair.mesh.service("pour", [server.port], Protocol.TCP if kind == "raw" else Protocol.HTTP, address=WEB_IP)
    pair.mesh.items = [
        msgspec.structs.replace(item, node="n2") if isinstance(item, Workload) and item.name == "pour-1" else item
        for item in pair.mesh.items
    ]
    pair.mesh.allow("pour", "client")
    for node in (pair.source, pair.destination):
        node.update()
    pair.destination.svid(pair.authority, "pour")
    before = resident_bytes()
    with pair.service(service) as sock:
        if kind == "web":
            sock.sendall(b"GET / HTTP/1.1\r\nHost: pour\r\n\r\n")
        last = -1

        def still() -> bool:
            nonlocal last
            same, last = sent == last and sent > 0, sent
            looked.wait(0.15)
            return same

        wait_for(still, "the server to be stopped")
        assert sent < 64 << 20  # mostly socket buffers, which are the kernel's to limit
        assert resident_bytes() - before < 40 << 20
        data = b"go on"
        while data and sent < last + (8 << 20):  # and it goes on
            data = sock.recv(1 << 20)
        assert data
    server.close()


def test_denied_at_the_destination_is_a_403(pair: Pair) -> None:
    pair.mesh.items = [item for item in pair.mesh.items if getattr(item, "name", "") != "web-allow"]
    pair.destination.update()  # the source still believes otherwise
    with pair.service(pair.web) as sock:
        assert pair.get("/", sock)[0] == 403


def test_rotation_shows_the_new_serial_and_loses_nothing(pair: Pair) -> None:
    serial = ""
    with pair.service(pair.web) as sock:
        for n in range(3):
            assert pair.get("/a", sock)[0] == 200
            serial = pair.source.svid(pair.authority, "client")
            assert pair.get(f"/{n}", sock)[0] == 200
    with pair.service(pair.web) as sock:
        assert pair.get("/", sock)[0] == 200
    assert key_of(pair.client) in pair.source.worker.config.local
    (listener,) = pair.destination.worker.listeners.values()
    serials = pair.destination.call(lambda: [t.peer.serial for t in listener.inbound.tunnels])  # type: ignore[attr-defined]
    assert serial in serials  # type: ignore[operator]
