"""What a worker does at its end, for each kind of connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from l7proxy import drain
from l7proxy.drain import ENDLESS_PART
from mesh import link
from mesh.model import Protocol
from tests.l7proxy.rig import Mesh, Rig, Server, http_server, ok, read_head, read_response, wait_for

Start = Callable[[Mesh], Rig]
Serve = Callable[[Server], Server]
GET = b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"


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


# ---- a planned end, with a successor


def opaque(mesh: Mesh, start: Start, serve: Serve) -> tuple[Rig, Callable[[], socket.socket]]:
    """A worker in front of a server that says "hi" and gives back what it hears, and how to connect."""

    def handle(connection: socket.socket) -> None:
        connection.sendall(b"hi")
        while data := connection.recv(1 << 16):
            connection.sendall(data)
        connection.close()

    server = serve(Server(handle))
    client, db = mesh.workload("client-1", "client"), mesh.service("db", [server.port], Protocol.TCP)
    mesh.allow("db", "client")
    rig = start(mesh)

    def connect() -> socket.socket:
        sock = rig.connect(client, db)
        assert sock.recv(2) == b"hi"
        return sock

    return rig, connect


def through(sock: socket.socket) -> None:
    sock.sendall(b"more")
    assert sock.recv(4, socket.MSG_WAITALL) == b"more"


def test_it_serves_until_its_successor_does_and_what_is_open_to_its_end(mesh: Mesh, start: Start, serve: Serve) -> None:
    rig, connect = opaque(mesh, start, serve)
    with connect() as first:
        rig.call(lambda: rig.worker.ending.retire(60.0))
        wait_for(lambda: rig.agent.of(link.Leaving), "the word to the agent")
        with connect() as second:
            through(second)
            rig.relink()  # another agent is told as well
            wait_for(lambda: rig.agent.of(link.Leaving), "the word to the next one")
            (leaving,) = rig.agent.of(link.Leaving)
            assert 50.0 < leaving.seconds <= 60.0  # type: ignore[attr-defined]
            rig.agent.send(link.Drain(leaving.seconds))  # type: ignore[attr-defined]
            wait_for(lambda: rig.worker.draining, "the successor's turn")
            assert not rig.worker.listeners
            through(second)
        through(first)
        assert rig.thread.is_alive()
    stopped(rig)
    wait_for(lambda: rig.agent.of(link.Drained), "its last word")
    assert rig.agent.of(link.Drained) == [link.Drained(0)]


def test_at_the_limit_it_is_cut_and_told(mesh: Mesh, start: Start, serve: Serve) -> None:
    rig, connect = opaque(mesh, start, serve)
    with connect() as first, connect() as second:
        rig.call(lambda: rig.worker.ending.retire(0.5))
        rig.agent.send(link.Drain(60.0))  # nobody gives it more than it has
        for sock in (first, second):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    stopped(rig)
    wait_for(lambda: rig.agent.of(link.Drained), "its last word")
    assert rig.agent.of(link.Drained) == [link.Drained(2)]


def test_an_agent_can_hurry_it(mesh: Mesh, start: Start, serve: Serve) -> None:
    rig, connect = opaque(mesh, start, serve)
    with connect() as sock:
        rig.call(lambda: rig.worker.ending.retire(60.0))
        rig.agent.send(link.Drain(60.0))
        through(sock)
        rig.agent.send(link.Drain(0.3))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    stopped(rig)


def test_where_no_successor_comes_nothing_new_is_taken(
    mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "SUCCESSOR_S", 0.2)
    rig, connect = opaque(mesh, start, serve)
    with connect() as sock:
        rig.call(lambda: rig.worker.ending.retire(60.0))
        wait_for(lambda: rig.worker.draining, "the end of waiting")
        through(sock)
        assert not rig.worker.listeners
    stopped(rig)


def test_a_successor_that_comes_late_takes_no_time_away(
    mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is open has the limit, and not the third of it that one has who is stopped."""
    for name, value in (("SUCCESSOR_S", 0.1), ("ENDLESS_PART", 0.0), ("LOOK_S", 0.02)):
        monkeypatch.setattr(drain, name, value)
    rig, connect = opaque(mesh, start, serve)
    rig.worker.on_drain.append(lambda _: time.sleep(0.01))  # what there is to do takes its time
    with connect() as sock:
        rig.call(lambda: rig.worker.ending.retire(60.0))
        wait_for(lambda: rig.worker.draining, "the end of waiting")
        for _ in range(50):
            rig.agent.send(link.Drain(60.0))
            through(sock)
    stopped(rig)


def test_an_idle_connection_is_given_time(mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks within it hears with the answer that it is the last; who does not, is closed."""
    monkeypatch.setattr(drain, "IDLE_S", 1.0)
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    asks, rests = rig.connect(client, web), rig.connect(client, web)
    for sock in (asks, rests):
        sock.sendall(GET)
        read_response(sock)
    rig.call(lambda: rig.worker.ending.retire(60.0))
    rig.agent.send(link.Drain(60.0))
    wait_for(lambda: rig.worker.draining, "the end")
    asks.sendall(GET)
    assert b"\r\nconnection: close\r\n" in read_response(asks)[1].lower()
    assert asks.recv(1) == rests.recv(1) == b""
    stopped(rig)


def test_one_with_nothing_to_serve_ends(mesh: Mesh, start: Start) -> None:
    rig = start(mesh)
    rig.call(lambda: rig.worker.ending.retire(60.0))
    stopped(rig)


def test_an_upgraded_connection_lives_on(mesh: Mesh, start: Start, serve: Serve) -> None:
    """No exchange will end it; where there is a successor nothing waits for it to be cut."""

    def handle(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n" + UPGRADE + b"Sec-WebSocket-Accept: x\r\n\r\n")
        while data := connection.recv(1 << 16):
            connection.sendall(data)
        connection.close()

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        sock.sendall(b"GET / HTTP/1.1\r\nHost: web\r\n" + UPGRADE + key)
        assert b" 101 " in read_head(sock)[0]
        rig.call(lambda: rig.worker.ending.retire(60.0))
        rig.agent.send(link.Drain(60.0))
        wait_for(lambda: rig.worker.draining, "the end")
        through(sock)
    stopped(rig)
