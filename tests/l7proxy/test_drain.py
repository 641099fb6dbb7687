"""What a worker does at its end, for each kind of connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from l7proxy.drain import ENDLESS_PART
from mesh import link
from mesh.model import Protocol
from tests.l7proxy.rig import Mesh, Rig, Server, http_server, ok, read_head, read_response, wait_for

Start = Callable[[Mesh], Rig]
Serve = Callable[[Server], Server]
GET = b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"


def stopped(rig: Rig) -> None:
    rig.thread.join(5)
    assert not rig.thread.is_alive()


def test_what_runs_finishes_and_what_is_idle_ends(mesh: Mesh, start: Start, serve: Serve) -> None:
    go = threading.Event()

    def handle(connection: socket.socket) -> None:
        read_head(connection)
        go.wait(5)
        connection.sendall(ok(b"late"))

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    idle, busy = rig.connect(client, web), rig.connect(client, web)
    busy.sendall(GET)
    wait_for(lambda: server.accepted, "the request")
    rig.agent.send(link.Drain(5.0))
    assert idle.recv(1) == b""
    go.set()
    _, head, body = read_response(busy)
    assert body == b"late"
    assert b"\r\nconnection: close\r\n" in head
    assert busy.recv(1) == b""
    stopped(rig)


def test_a_client_that_keeps_asking_is_told_before_it_is_closed(mesh: Mesh, start: Start, serve: Serve) -> None:
    answer = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"
    server = serve(http_server(lambda _: answer))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(GET)
        answers = [read_response(sock)[1].lower()]
        assert b"connection: keep-alive" in answers[0]
        rig.agent.send(link.Drain(5.0))
        for _ in range(10_000):
            sock.sendall(GET)
            answers.append(read_response(sock)[1].lower())
            if b"connection: close" in answers[-1]:
                break
        assert answers[-1].count(b"connection:") == 1
        assert sock.recv(1) == b""
    stopped(rig)


@pytest.mark.parametrize("seconds", [0.6, 3.0])
def test_the_opaque_is_cut_before_the_rest(mesh: Mesh, start: Start, serve: Serve, seconds: float) -> None:
    server = serve(Server(lambda c: c.sendall(b"hi") or c.recv(1)))
    client, db = mesh.workload("client-1", "client"), mesh.service("db", [server.port], Protocol.TCP)
    mesh.allow("db", "client")
    rig = start(mesh)
    with rig.connect(client, db) as sock:
        assert sock.recv(2) == b"hi"
        rig.agent.send(link.Drain(seconds))
        sock.settimeout(seconds * ENDLESS_PART + 1)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    stopped(rig)


def test_new_connections_wait_for_a_successor(mesh: Mesh, start: Start, serve: Serve) -> None:
    """The agent holds the listener: what dials while nobody accepts is served by the next worker."""
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    listener = socket.create_server(("127.0.0.1", 0))
    number = listener.getsockname()[1]
    offer = link.Listener("77/outbound/x", "outbound", 77, "127.0.0.1", number)

    def serves(rig: Rig) -> None:
        rig.kernel.dialled[number] = (web.vips[0], 80, client)
        rig.agent.send(offer, [listener.fileno()])
        wait_for(lambda: offer.id in rig.worker.listeners, "the listener")

    old = start(mesh)
    serves(old)
    old.agent.send(link.Drain(5.0))
    wait_for(lambda: old.worker.draining, "the end")
    with socket.create_connection(("127.0.0.1", number)) as sock:
        sock.settimeout(5)
        sock.sendall(GET)
        stopped(old)
        serves(start(mesh))
        assert read_response(sock)[0] == 200
    listener.close()
