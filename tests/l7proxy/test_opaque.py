"""Opaque TCP and learning, on real sockets."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from l7proxy.opaque import Relay
from mesh.model import Operation, Protocol, Rule, key_of
from tests.l7proxy.rig import Mesh, Rig, Server, http_server, read_all, read_response, wait_for
from tests.l7proxy.test_worker import get, metric

Start = Callable[[Mesh], Rig]
Serve = Callable[[Server], Server]
RESET = struct.pack("ii", 1, 0)


def test_the_server_speaks_first_and_fin_is_fin(mesh: Mesh, start: Start, serve: Serve) -> None:
    def handle(connection: socket.socket) -> None:
        connection.sendall(b"hello from the server\n")
        data = read_all(connection)
        connection.sendall(b"got " + data)
        connection.close()

    server = serve(Server(handle))
    client, db = mesh.workload("client-1", "client"), mesh.service("db", [server.port], Protocol.TCP)
    mesh.allow("db", "client")
    rig = start(mesh)
    with rig.connect(client, db) as sock:
        assert sock.recv(100) == b"hello from the server\n"
        sock.sendall(b"\x00\xff\r\n" * 1000)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"got " + b"\x00\xff\r\n" * 1000
    wait_for(lambda: not rig.worker.sessions, "the end")
    for name in ("pillion_tcp_opened_total", "pillion_tcp_closed_total"):
        assert metric(rig, name, source="shop/client", destination="shop/db") == 1
    assert metric(rig, "pillion_bytes_total", direction="sent") == 4000


def test_the_server_ends_first(mesh: Mesh, start: Start, serve: Serve) -> None:
    late: list[bytes] = []

    def handle(connection: socket.socket) -> None:
        connection.sendall(b"bye")
        connection.shutdown(socket.SHUT_WR)
        late.append(read_all(connection))

    server = serve(Server(handle))
    client, db = mesh.workload("client-1", "client"), mesh.service("db", [server.port], Protocol.TCP)
    mesh.allow("db", "client")
    rig = start(mesh)
    with rig.connect(client, db) as sock:
        assert read_all(sock) == b"bye"
        sock.sendall(b"after your end")
    wait_for(lambda: late, "the server to read on")
    assert late == [b"after your end"]


@pytest.mark.parametrize("who", ["client", "server"])
def test_rst_is_rst(mesh: Mesh, start: Start, serve: Serve, who: str) -> None:
    errors: list[type] = []
    done = threading.Event()

    def handle(connection: socket.socket) -> None:
        connection.sendall(b"1")
        if who == "server":
            connection.recv(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.close()
            return
        try:
            connection.recv(1)
        except OSError as error:
            errors.append(type(error))
        done.set()

    server = serve(Server(handle))
    client, db = mesh.workload("client-1", "client"), mesh.service("db", [server.port], Protocol.TCP)
    mesh.allow("db", "client")
    rig = start(mesh)
    with rig.connect(client, db) as sock:
        assert sock.recv(1) == b"1"
        if who == "server":
            sock.sendall(b"x")
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    assert done.wait(5)
    assert errors == [ConnectionResetError]


def test_what_is_denied_or_dead_is_reset(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(Server(lambda connection: connection.sendall(b"secret")))
    client, intruder = mesh.workload("client-1", "client"), mesh.workload("intruder-1", "intruder")
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        db, gone = mesh.service("db", [server.port], Protocol.TCP), mesh.service("gone", [dead.getsockname()[1]], Protocol.TCP)
        for name in ("db", "gone"):
            mesh.allow(name, "client")
        rig = start(mesh)
        for who, service in ((intruder, db), (client, gone)):
            with rig.connect(who, service) as sock, pytest.raises(ConnectionResetError):
                sock.recv(1)
    assert server.accepted == 0
    assert metric(rig, "pillion_denied_total", reason="policy_denied") == 1
    assert metric(rig, "pillion_denied_total", reason="connect_refused") == 1


def test_a_new_policy_cuts_an_idle_connection(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(Server(lambda connection: connection.sendall(b"1") or connection.recv(1)))
    client, db = mesh.workload("client-1", "client"), mesh.service("db", [server.port], Protocol.TCP)
    mesh.allow("db", "client")
    rig = start(mesh)
    with rig.connect(client, db) as sock:
        assert sock.recv(1) == b"1"
        mesh.workload("other-1", "other")
        rig.update()  # nothing to do with it
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        mesh.deny("db", Rule())
        rig.update()
        sock.settimeout(5)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert metric(rig, "pillion_denied_total", reason="generation_denied") == 1


def test_bulk_with_a_slow_reader_is_bounded(mesh: Mesh, start: Start, serve: Serve) -> None:
    sent = 0

    def handle(connection: socket.socket) -> None:
        nonlocal sent
        connection.settimeout(0.5)
        while True:
            sent += connection.send(b"y" * 65536)

    server = serve(Server(handle))
    client, db = mesh.workload("client-1", "client"), mesh.service("db", [server.port], Protocol.TCP)
    mesh.allow("db", "client")
    rig = start(mesh)
    with rig.connect(client, db):
        wait_for(lambda: sent > 0, "bytes")
        server.connections[0].settimeout(0.5)
        pause, last = threading.Event(), 0
        while sent != last:
            last = sent
            pause.wait(0.2)
        assert sent < 48 << 20


def test_an_early_client_waits_for_a_server_that_does_not_read(mesh: Mesh, start: Start, serve: Serve) -> None:
    over = threading.Event()
    server = serve(Server(lambda _connection: over.wait(20) and None))
    server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client, db = mesh.workload("client-1", "client"), mesh.service("db", [server.port], Protocol.TCP)
    mesh.allow("db", "client")
    rig = start(mesh)

    def narrow(family: int) -> socket.socket:
        """Not even the first bytes fit."""
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return made

    rig.agent.make = narrow
    rig.listen(client, db)
    rig.worker.loop.call_soon_threadsafe(time.sleep, 0.2)  # what it sends is there before the server is
    with rig.connect(client, db) as sock:
        sock.settimeout(0.3)
        sent, end = 0, time.monotonic() + 1.5
        with contextlib.suppress(TimeoutError):
            while sent < 64 << 20 and time.monotonic() < end:
                sent += sock.send(b"x" * (1 << 18))
        kept = [relay.far.transport.get_write_buffer_size() for relay in rig.worker.sessions if isinstance(relay, Relay)]
    over.set()
    assert len(kept) == 1 and kept[0] < 1 << 20


def test_auto_learns_from_the_server_without_waiting(mesh: Mesh, start: Start, serve: Serve) -> None:
    web_server, db_server = serve(http_server()), serve(Server(lambda c: c.sendall(b"220 hi\r\n") or c.recv(1)))
    client = mesh.workload("client-1", "client")
    web, db = mesh.service("web", [web_server.port], Protocol.AUTO), mesh.service("db", [db_server.port], Protocol.AUTO)
    mesh.allow("web", "client")
    mesh.allow("db", "client")
    rig = start(mesh)
    for _ in range(4):
        with rig.connect(client, db) as sock:
            assert sock.recv(100) == b"220 hi\r\n"
        with rig.connect(client, web) as sock:
            sock.sendall(get())
            assert read_response(sock)[0] == 200
    assert rig.worker.learned.known == {(key_of(web), 80): Protocol.HTTP, (key_of(db), 80): Protocol.TCP}
    with rig.connect(client, web) as sock:
        sock.sendall(b"GET / HTTP/1.1\nHost: a\r\n\r\n")
        assert read_response(sock)[0] == 400  # it is parsed from now on


def test_clients_teach_nothing(mesh: Mesh, start: Start, serve: Serve) -> None:
    """Silent ones, and ones that make an echo server say what they like."""
    server = serve(Server(lambda connection: [connection.sendall(connection.recv(1000)) for _ in range(2)]))
    client, echo = mesh.workload("client-1", "client"), mesh.service("echo", [server.port], Protocol.AUTO)
    mesh.allow("echo", "client")
    rig = start(mesh)
    for _ in range(20):
        rig.connect(client, echo).close()
    assert rig.worker.learned.known == {}
    for _ in range(5):
        with rig.connect(client, echo) as sock:
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            sock.recv(1000)
    assert rig.worker.learned.known.get((key_of(echo), 80)) is not Protocol.HTTP


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.AUTO])
def test_a_port_with_an_l7_rule_carries_http_or_nothing(mesh: Mesh, start: Start, serve: Serve, protocol: Protocol) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port], protocol)
    mesh.allow("web", rules=(Rule(operations=(Operation(methods=("GET",)),)),))
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(b"\x00junk")
        assert read_response(sock)[0] == 400
    with rig.connect(client, web) as sock:
        sock.sendall(get(method="DELETE"))
        assert read_response(sock)[0] == 403
    assert server.accepted == 0
