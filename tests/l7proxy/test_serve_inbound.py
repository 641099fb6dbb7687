"""What `Worker.serve_inbound` does with a stream that was admitted: the destination's side, with the peer's identity."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from l7proxy.target import Caller
from mesh.model import Operation, Protocol, Rule, Source
from tests.l7proxy.rig import Mesh, Rig, Server, http_server, spiffe, wait_for
from tests.l7proxy.test_worker import get, metric

Start = Callable[[Mesh], Rig]
Serve = Callable[[Server], Server]


class Stream(asyncio.Transport):
    """A tunnel's stream, in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""
        self.ended = self.closed = self.aborted = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.data += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Peer:
    """One inbound stream of a client of another node."""

    def __init__(self, rig: Rig, account: str, workload: str, port: int) -> None:
        self.rig, self.stream, self.opened = rig, Stream(), [(0, "")]
        identity = rig.worker.config.identity(spiffe(account))
        caller = Caller(spiffe(account), identity, "10.77.9.9", 4711)
        self.protocol = rig.call(
            lambda: rig.worker.serve_inbound(self.stream, caller, workload, port, lambda *status: self.opened.append(status))
        )

    def send(self, data: bytes) -> None:
        self.rig.call(lambda: self.protocol.data_received(data))  # type: ignore[attr-defined]

    def lose(self) -> None:
        self.rig.call(lambda: self.protocol.connection_lost(None))  # type: ignore[attr-defined]


def test_http_is_parsed_and_decided_on_the_peers_identity(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    web = mesh.service("web", [server.port])
    mesh.identity("far")
    rule = Rule((Source(principals=(spiffe("far").removeprefix("spiffe://"),)),), (Operation(methods=("GET",)),))
    mesh.allow("web", rules=(rule,))
    rig = start(mesh)
    peer = Peer(rig, "far", web.endpoints[0], server.port)
    assert peer.opened[1:] == [(200, "")]
    peer.send(get("/x") + get("/y"))
    wait_for(lambda: peer.stream.data.endswith(b"GET /y HTTP/1.1"), "two answers")
    peer.send(get(method="DELETE"))
    wait_for(lambda: b"403 Forbidden" in peer.stream.data, "the denial")
    assert rig.kernel.callers[-1].address == "10.77.9.9"
    assert metric(rig, "pillion_requests_total", source="shop/far", destination="shop/web", path_kind="inbound", code="200") == 2
    peer.lose()


def test_tcp_is_answered_when_the_server_is_there(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(Server(lambda connection: connection.sendall(b"220 hi") or connection.recv(1)))
    db = mesh.service("db", [server.port], Protocol.TCP)
    mesh.identity("far")
    mesh.identity("stranger")
    mesh.allow("db", "far")
    rig = start(mesh)
    peer = Peer(rig, "far", db.endpoints[0], server.port)
    wait_for(lambda: peer.stream.data == b"220 hi", "the server's word")
    assert peer.opened[1:] == [(200, "")]
    peer.lose()
    denied = Peer(rig, "stranger", db.endpoints[0], server.port)
    status, reason = denied.opened[1]
    assert status == 403 and reason.startswith("policy_denied")


@pytest.mark.parametrize(("workload", "port"), [("Workload/shop/nobody", 80), ("", 0)])
def test_what_is_not_declared_is_not_served(mesh: Mesh, start: Start, workload: str, port: int) -> None:
    web = mesh.service("web", [8080])
    rig = start(mesh)
    peer = Peer(rig, "far", workload or web.endpoints[0], port)
    assert peer.opened[1:] == [(503, "no_service")]
