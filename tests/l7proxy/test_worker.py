"""A worker on real sockets, from the captured connection to the server and back."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec
import pytest

from mesh import link
from mesh.model import Action, Backend, HeaderMatch, Operation, PathMatch, Policy, Route, RouteMatch, RouteRule, Rule, key_of
from mesh.snapshot import digest
from tests.l7proxy.rig import (
    NODE_NETNS,
    Agent,
    Mesh,
    Rig,
    Server,
    http_server,
    ok,
    open_fds,
    read_all,
    read_head,
    read_response,
    wait_for,
)

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST
Start = Callable[[Mesh], Rig]
Serve = Callable[[Server], Server]


def get(path: str = "/", *lines: str, method: str = "GET", host: str = "web.shop.mesh") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", "")).encode()


def reason(head: bytes) -> str:
    found = re.search(rb"x-pillion-reason: (\w+)", head)
    return found[1].decode() if found else ""


def metric(rig: Rig, name: str, **labels: str) -> float:
    total = 0.0
    for line in str(rig.call(rig.worker.metrics.text)).splitlines():
        if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


def test_keep_alive_pipelining_and_pool(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        for n in range(20):
            sock.sendall(get(f"/{n}"))
            assert read_response(sock) == (
                200,
                ok(b"x" * len(f"GET /{n} HTTP/1.1"))[: -len(f"GET /{n} HTTP/1.1")],
                f"GET /{n} HTTP/1.1".encode(),
            )
        sock.sendall(b"".join(get(f"/p{n}") for n in range(10)))
        data = b""
        while data.count(b"HTTP/1.1 200") < 10 or not data.endswith(b"GET /p9 HTTP/1.1"):
            data += sock.recv(65536)
        assert re.findall(rb"GET /p(\d)", data) == [str(n).encode() for n in range(10)]
    with rig.connect(client, web) as sock:
        sock.sendall(get())
        assert read_response(sock)[0] == 200
    assert server.accepted == 1  # the same caller address and identity share it
    assert rig.kernel.callers[0].spiffe == "spiffe://mesh.local/ns/shop/sa/client"
    assert (
        metric(rig, "pillion_requests_total", code="200", source="shop/client", destination="shop/web", path_kind="local") == 31
    )
    assert metric(rig, "pillion_request_seconds_count", source="shop/client") == 31


def test_clients_that_ask_once_share_a_server_connection(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    one, two = mesh.workload("client-1", "client"), mesh.workload("other-1", "other")
    web = mesh.service("web", [server.port])
    mesh.allow("web", "client", "other")
    rig = start(mesh)
    for client in (one, two, one, two, one):
        with rig.connect(client, web) as sock:
            sock.sendall(get("/", "Connection: close"))
            status, head, body = read_response(sock)
            assert (status, body) == (200, b"GET / HTTP/1.1") and b"\r\nconnection: close\r\n" in head
            assert read_all(sock) == b""
    assert server.accepted == 2
    assert [caller.spiffe for caller in rig.kernel.callers] == [one.spiffe, two.spiffe]


def test_two_identities_never_share_a_server_connection(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    one, two = mesh.workload("client-1", "client"), mesh.workload("other-1", "other")
    web = mesh.service("web", [server.port])
    mesh.allow("web", "client", "other")
    rig = start(mesh)
    for client in (one, two, one, two):
        with rig.connect(client, web) as sock:
            sock.sendall(get())
            assert read_response(sock)[0] == 200
    assert server.accepted == 2
    assert [caller.spiffe for caller in rig.kernel.callers] == [one.spiffe, two.spiffe]


def test_bytes_go_through_as_they_came(mesh: Mesh, start: Start, serve: Serve) -> None:
    seen: list[bytes] = []
    answer = b"HTTP/1.1 200 Fine\r\nX-oDD:  a \t\r\nTransfer-Encoding: chunked\r\n\r\n3;e=1\r\nabc\r\n0\r\nT: 1\r\n\r\n"

    def handle(connection: socket.socket) -> None:
        data = b""
        while not data.endswith(b"0\r\nA: b\r\n\r\n"):
            data += connection.recv(65536)
        seen.append(data)
        connection.sendall(answer)

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    request = b"POST /a%20b?c HTTP/1.1\r\nhOST:web.shop.mesh \r\nx-y:  z\r\nTransfer-Encoding: chunked\r\n\r\n"
    request += b"5\r\nhello\r\n0\r\nA: b\r\n\r\n"
    with rig.connect(client, web) as sock:
        for byte in request:
            sock.send(bytes([byte]))
        data = b""
        while len(data) < len(answer):
            data += sock.recv(65536)
    assert seen == [request]
    assert data == answer


def test_large_bodies_both_ways(mesh: Mesh, start: Start, serve: Serve) -> None:
    size = 8 << 20

    def handle(connection: socket.socket) -> None:
        _, body = read_head(connection)
        count = len(body)
        while count < size:
            count += len(connection.recv(1 << 20))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            connection.sendall(b"y" * 65536)

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(get("/", f"Content-Length: {size}", method="POST"))
        for _ in range(size >> 16):
            sock.sendall(b"x" * 65536)
        status, _, body = read_response(sock)
    assert (status, len(body)) == (200, size)


def test_a_slow_reader_stops_the_server_not_the_memory(mesh: Mesh, start: Start, serve: Serve) -> None:
    sent = 0

    def handle(connection: socket.socket) -> None:
        nonlocal sent
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
        connection.settimeout(0.5)
        while True:
            sent += connection.send(b"y" * 65536)

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(get())
        stopped = threading.Event()
        last = -1

        def still() -> bool:
            nonlocal last
            same, last = sent == last and sent > 0, sent
            stopped.wait(0.1)
            return same

        wait_for(still, "the server to be stopped")
        # the socket buffers of three hops, each up to some MB, and the transports' marks
        assert sent < 48 << 20


def test_a_server_that_resets_behind_half_an_answer(mesh: Mesh, start: Start, serve: Serve) -> None:
    """The end may come along with the bytes before it, and is passed on all the same."""

    def handle(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(50_000))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.close()

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    for _ in range(20):
        with rig.connect(client, web) as sock:
            sock.settimeout(5)
            sock.sendall(get())
            with suppress(ConnectionResetError):
                while sock.recv(65536):
                    pass


def test_a_client_that_never_reads_costs_no_memory(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, intruder = mesh.workload("client-1", "client"), mesh.workload("intruder-1", "intruder")
    web = mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    for who in (client, intruder):
        with rig.connect(who, web) as sock:
            sock.setblocking(False)
            sent, stuck = 0, 0
            pause = threading.Event()
            while stuck < 20:  # a second without progress
                try:
                    sent += sock.send(get() * 100)
                    stuck = 0
                except BlockingIOError:
                    stuck += 1
                    pause.wait(0.05)
                assert sent < 64 << 20
            (session,) = rig.worker.sessions
            assert session.transport.get_write_buffer_size() < 1 << 20  # type: ignore[union-attr]
            assert len(session.pending) < 1 << 20  # type: ignore[union-attr]
        wait_for(lambda: not rig.worker.sessions, "the end")


def test_websocket_is_raw_after_101(mesh: Mesh, start: Start, serve: Serve) -> None:
    def handle(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhi")
        while data := connection.recv(65536):
            connection.sendall(data.upper())
        connection.sendall(b"bye")
        connection.close()

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(get("/ws", "Upgrade: websocket", "Connection: Upgrade"))
        head, rest = read_head(sock)
        assert head.startswith(b"HTTP/1.1 101")
        sock.sendall(b"get / http/1.1\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert rest + read_all(sock) == b"hiGET / HTTP/1.1\r\n\r\nbye"


@pytest.mark.parametrize(
    ("raw", "status", "why"),
    [
        (b"POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "bad_request"),
        (b"POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: web\r\nA: b\r\n c\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\nHost: web\n\n", 400, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: web\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", 400, "bad_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version"),
        (b"CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n\r\n", 501, "connect_method"),
        (b"GET / HTTP/1.1\r\nHost: web\r\nA: " + b"a" * 40000, 431, "head_too_large"),
    ],
)
def test_bad_input_never_reaches_the_server(mesh: Mesh, start: Start, serve: Serve, raw: bytes, status: int, why: str) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(raw)
        got, head, body = read_response(sock)
        assert (got, reason(head)) == (status, why)
        assert b"server: pillion" in head and body.endswith(b"\n")
        assert read_all(sock) == b""
    assert server.accepted == 0
    assert metric(rig, "pillion_denied_total", reason=why) == 1


def test_403_names_the_rule_404_the_route_and_503_the_reason(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, intruder = mesh.workload("client-1", "client"), mesh.workload("intruder-1", "intruder")
    web = mesh.service("web", [server.port])
    gone = socket.socket()
    gone.bind(("127.0.0.1", 0))
    dead = mesh.service("dead", [gone.getsockname()[1]])
    for name in ("web", "dead"):
        mesh.allow(name, "client")
    mesh.deny("web", Rule(operations=(Operation(methods=("DELETE",)),)))
    mesh.add(
        Route(
            "r",
            "shop",
            ((key_of(web), 0),),
            (RouteRule((RouteMatch(PathMatch("PathPrefix", "/api")),), (Backend(key_of(web), 80),)),),
        )
    )
    rig = start(mesh)
    cases = [
        (client, web, get("/api/x"), 200, ""),
        (client, web, get("/other"), 404, "no_route"),
        (client, web, get("/api", method="DELETE"), 403, "policy_denied"),
        (intruder, web, get("/api"), 403, "policy_denied"),
        (client, web, get("/api//x"), 400, "path_not_canonical"),
        (client, web, get("/%61pi"), 400, "path_not_canonical"),
        (client, dead, get(), 503, "connect_refused"),
    ]
    for who, service, request, status, why in cases:
        with rig.connect(who, service) as sock:
            for _ in range(2):  # an answer of our own keeps the connection
                sock.sendall(request)
                got, head, body = read_response(sock)
                assert (got, reason(head)) == (status, why), request
                if why == "policy_denied" and who is client:
                    assert body.startswith(b"RBAC: denied by shop/web-deny#0")
    gone.close()
    wait_for(lambda: [m for m in rig.agent.of(link.Flow) if m.verdict == "denied" and m.status == 403], "the denied flow")  # type: ignore[attr-defined]


def test_header_rules_refuse_underscores(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", rules=(Rule(operations=(Operation(headers=(("x-user", "ann"),)),)),))
    rig = start(mesh)
    for lines, status in ((("X-User: ann",), 200), (("X_User: ann",), 400), ((), 403), (("X-User: ann", "X-User: eve"), 403)):
        with rig.connect(client, web) as sock:
            sock.sendall(get("/", *lines))
            assert read_response(sock)[0] == status


def test_a_slow_head_is_answered_408(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(b"GET / HTTP")
        wait_for(lambda: any(getattr(s, "pending", b"") for s in list(rig.worker.sessions)), "the bytes")
        rig.sweep(rig.worker.config.mesh.head_timeout_s + 1)
        assert read_response(sock)[0] == 408


def test_retries_on_another_endpoint_and_remembers_the_dead_one(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    good = mesh.workload("good", "web", (server.port,))
    bad = mesh.workload("bad", "web", (server.port,), address="127.0.0.2")  # nobody listens there
    alone = mesh.service("web", [server.port])
    web = msgspec.structs.replace(alone, endpoints=(key_of(good), key_of(bad)))
    mesh.items = [item for item in mesh.items if key_of(item) != key_of(web)] + [web]
    mesh.allow("web", "client")
    client = mesh.workload("client-1", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        for _ in range(50):
            sock.sendall(get())
            assert read_response(sock)[0] == 200
    assert metric(rig, "pillion_proxy_events_total", event="dial_connect_refused") <= 1


def test_weights_and_header_routes(mesh: Mesh, start: Start, serve: Serve) -> None:
    one, two = serve(http_server(lambda _: ok(b"one"))), serve(http_server(lambda _: ok(b"two")))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [one.port])
    v2 = mesh.service("v2", [two.port])
    for name in ("web", "v2"):
        mesh.allow(name, "client")
    split = (Backend(key_of(web), 80, 9), Backend(key_of(v2), 80, 1))
    canary = RouteRule((RouteMatch(headers=(HeaderMatch("x-canary", "1"),)),), (Backend(key_of(v2), 80),))
    mesh.add(Route("r", "shop", ((key_of(web), 80),), (canary, RouteRule((), split))))
    rig = start(mesh)
    counts = {b"one": 0, b"two": 0}
    with rig.connect(client, web) as sock:
        for _ in range(400):
            sock.sendall(get())
            counts[read_response(sock)[2]] += 1
        for _ in range(10):
            sock.sendall(get("/", "X-Canary: 1"))
            assert read_response(sock)[2] == b"two"
    assert 10 <= counts[b"two"] <= 80


def test_a_stale_pooled_connection_is_tried_again(mesh: Mesh, start: Start, serve: Serve) -> None:
    """The server closes after its answer, and the close crosses the next request."""

    def handle(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(ok(b"1"))
        read_head(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        for _ in range(5):
            sock.sendall(get())
            assert read_response(sock)[0] == 200
        sock.sendall(get())
        assert read_response(sock)[0] == 200
        sock.sendall(get("/", "Content-Length: 0", method="POST"))
        assert read_response(sock)[0] == 502  # not idempotent: not sent twice


def test_a_new_policy_cuts_a_websocket_and_denies_the_next_request(mesh: Mesh, start: Start, serve: Serve) -> None:
    def handle(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        connection.recv(1)

    server = serve(Server(handle))
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as open_sock:
        open_sock.sendall(get("/ws", "Upgrade: websocket", "Connection: Upgrade"))
        read_head(open_sock)
        mesh.deny("web", Rule())
        rig.update()
        with pytest.raises(ConnectionResetError):
            open_sock.recv(1)
    with rig.connect(client, web) as sock:
        sock.sendall(get())
        assert read_response(sock)[0] == 403


def test_added_headers(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server(lambda head: ok(head)))
    client = mesh.workload("client-1", "client")
    web = mesh.service("web", [server.port], add_headers=("x-forwarded-client-cert", "x-request-id", "traceparent"))
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(get("/", "X-Forwarded-Client-Cert: By=me", "X-Request-Id: mine"))
        body = read_response(sock)[2].lower()
    assert b"by=me" not in body
    assert b"x-forwarded-client-cert: by=spiffe://mesh.local/ns/shop/sa/web;uri=spiffe://mesh.local/ns/shop/sa/client" in body
    assert body.count(b"x-request-id") == 1
    assert re.search(rb"traceparent: 00-[0-9a-f]{32}-[0-9a-f]{16}-01", body)


def test_no_origin_and_no_service_are_reset_and_counted(mesh: Mesh, start: Start, serve: Serve) -> None:
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [1])
    rig = start(mesh)
    port = rig.listen(client, web)
    rig.kernel.dialled.pop(port)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        assert read_all(sock) == b""
    with rig.connect(client, address="240.9.9.9") as sock:
        assert read_all(sock) == b""
    assert metric(rig, "pillion_denied_total", reason="no_origin") == 1
    assert metric(rig, "pillion_denied_total", reason="no_service") == 1


# ---- the link


def test_updates_are_acked_with_the_digest_and_bad_ones_refused(mesh: Mesh, start: Start) -> None:
    rig = start(mesh)
    acks = rig.agent.of(link.Ack)
    assert acks[-1].digest == digest(mesh.state)  # type: ignore[attr-defined]
    client = mesh.workload("client-1", "client")
    rig.agent.send(link.Update(9, False, {key_of(client): client}, (), (), 9))
    wait_for(lambda: rig.worker.config.revision == 9, "the delta")
    wait_for(lambda: len(rig.agent.of(link.Ack)) == 2, "its ack")
    state = {**mesh.state}
    assert "Identity//spiffe://mesh.local/ns/shop/sa/client" in state
    del state["Identity//spiffe://mesh.local/ns/shop/sa/client"]
    assert rig.agent.of(link.Ack)[-1].digest == digest(state)  # type: ignore[attr-defined]
    rig.agent.send(link.Update(10, True, {}, (), (), 10))
    wait_for(lambda: rig.agent.of(link.Nack), "the nack")
    assert rig.worker.config.revision == 9


def test_an_agent_that_comes_back_finds_the_worker_serving(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(get())
        assert read_response(sock)[0] == 200
        rig.agent.close()
        sock.sendall(get())
        assert read_response(sock)[0] == 200
        with rig.connect(client, web) as another:
            another.sendall(get())
            assert read_response(another)[0] == 200
        rig.agent = Agent(rig.path)
        wait_for(lambda: rig.agent.of(link.Ready), "ready")
        rig.agent.send(link.Scrape())
        wait_for(lambda: rig.agent.of(link.Metrics), "metrics")
        assert "pillion_requests_total" in rig.agent.of(link.Metrics)[0].text  # type: ignore[attr-defined]


def test_broken_framing_drops_the_link_only(mesh: Mesh, start: Start) -> None:
    rig = start(mesh)
    rig.agent.sock.sendall(b"\xff" * 64)
    rig.agent.thread.join(5)
    rig.agent = Agent(rig.path)
    wait_for(lambda: rig.agent.of(link.Ready), "ready")


def test_descriptors_are_not_leaked(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(get())
        read_response(sock)
    wait_for(lambda: not rig.worker.sessions, "the session to end")
    before = open_fds()
    for _ in range(5):
        read, write = os.pipe()
        rig.agent.send(link.Svid("spiffe://x", "pem", "1", 0.0), [read])
        rig.agent.send(link.Listener("1/nothing/4", "nothing", NODE_NETNS, "127.0.0.1", 1), [write])
        rig.agent.send(link.Listener("1/outbound/4", "outbound", NODE_NETNS, "127.0.0.1", 1), [write])  # no socket
        os.close(read)
        os.close(write)
    wait_for(lambda: "spiffe://x" in rig.worker.svids, "the svid")
    rig.agent.send(link.DropSvid("spiffe://x"))
    wait_for(lambda: "spiffe://x" not in rig.worker.svids and open_fds() <= before, "the descriptors to be closed")


def test_no_stock_is_a_503_that_says_so(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    rig = start(mesh)
    rig.agent.stocked = False
    with rig.connect(client, web) as sock:
        sock.sendall(get())
        wait_for(lambda: any(s.waiting for s in rig.worker.stock._shelves.values()), "the wait")
        wait_for(
            lambda: (
                rig.call(lambda: rig.worker.stock.sweep(frozenset((NODE_NETNS,))))
                or not any(s.waiting for s in rig.worker.stock._shelves.values())
            ),
            "the timeout",
        )
        status, head, _ = read_response(sock)
    assert (status, reason(head)) == (503, "no_stock")


def test_access_log_is_json_with_control_bytes_escaped(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    mesh.config = msgspec.structs.replace(mesh.config, access_log=True)
    rig = start(mesh)
    read, write = os.pipe()
    assert rig.worker.access is not None
    rig.worker.access.__init__(write)  # type: ignore[misc]  # to a pipe of ours
    with rig.connect(client, web) as sock:
        sock.sendall(get("/a%1b?q"))
        assert read_response(sock)[0] == 200
    rig.sweep()
    record = json.loads(os.read(read, 65536))
    assert (record["method"], record["path"], record["status"], record["rule"]) == ("GET", "/a%1b", 200, "shop/web-allow#0")
    os.close(read)
    os.close(write)


def test_audit_rules_are_told_and_never_decide(mesh: Mesh, start: Start, serve: Serve) -> None:
    server = serve(http_server())
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port])
    mesh.allow("web", "client")
    mesh.add(
        Policy("watch", "shop", Action.AUDIT, selector={"app": "web"}, rules=(Rule(operations=(Operation(paths=("/secret",)),)),))
    )
    rig = start(mesh)
    with rig.connect(client, web) as sock:
        sock.sendall(get("/secret"))
        assert read_response(sock)[0] == 200
    wait_for(lambda: [m for m in rig.agent.of(link.Flow) if m.verdict == "audited" and m.reason == "shop/watch#0"], "the flow")  # type: ignore[attr-defined]
