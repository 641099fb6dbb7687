"""A pair on real sockets: a captured client in workload a, servers in workload b, and the proxy's ends of both, all held by
the test. What the proxy would tell the kernel, `arm` tells it."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from typing import Any

from mesh.express.dfa import DONE, Builder, Kind, Table
from mesh.express.grammar import HOST, LENGTH, TEXT, Lines
from mesh.express.response import RESPONSE
from nodeagent.express_path import OK, Enrolment, ExpressPath, Verdict, ends
from nodeagent.maps import BpfMap
from tests.bpf.families import Family
from tests.bpf.steps import capture
from tests.bpf.world import CALLER, IDENTITY, LEVEL, World, wait_for

EXPRESS = 3
ARM, HOLD, TAKE, NO_SLOT = 1, 2, 3, 0xFFFFFFFF
FIRST_PORT = 7600
PLACES = 2000  # workload ids of the endpoints
RULES = {b"/": 1, b"/two": 2, b"/no": 3}
GET = b"GET / HTTP/1.1\r\nHost: shop.test\r\n\r\n"
OKAY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
_numbers = itertools.count(1)


def request_table(seen: bytes = b"x-seen") -> Table:
    """GET, HEAD and POST of a few paths; `POST` and the header ``seen`` set bits of seen."""
    builder = Builder()
    lines = Lines(builder)
    value = builder.state()
    builder.edge(value, TEXT + b" ", value)
    builder.edge(value, b"\r", lines.cr)
    lines.field(b"connection", lines.keep_alive())
    lines.field(b"transfer-encoding", 0)
    lines.field(b"host", value, Kind.ONCE, HOST)
    lines.field(b"content-length", lines.length(6), Kind.ONCE, LENGTH)
    lines.field(seen, value, Kind.MATCH, 2)
    version = builder.state()
    builder.chain(version, b"HTTP/1.1\r\n", lines.line)
    root = builder.state()
    for method, flag, bits in ((b"GET", 0, 0), (b"HEAD", 0x8000, 0), (b"POST", 0, 1)):
        start = builder.state(kind=Kind.MATCH, value=bits)
        ready = builder.state()
        builder.chain(root, method, start)
        builder.edge(start, b" ", ready, act=True)
        at = builder.state(kind=Kind.RULE, value=RULES[b"/"] | flag)
        builder.edge(ready, b"/", at)
        builder.edge(at, b" ", version, act=True)
        for path in (b"/two", b"/no"):
            last = builder.state(kind=Kind.RULE, value=RULES[path] | flag)
            builder.chain(at, path[1:], last)
            builder.edge(last, b" ", version, act=True)
    assert DONE == 1
    return builder.table(root)


class Programs:
    """The tables of these tests, in the kernel."""

    def __init__(self, path: ExpressPath) -> None:
        self.path = path
        table = request_table()
        self.root = table.root_at(path.install(table))
        self.response = RESPONSE.root_at(path.install(RESPONSE))
        self.verdicts = {(rule, seen): Verdict(10 * rule + seen, ((1, 1),)) for rule in (1, 2) for seen in range(4)}

    def put(self, index: int = 1, generation: int = 1, **values: Any) -> None:
        endpoints = values.pop("endpoints", [PLACES])
        self.path.put_program(
            index,
            **{"root": self.root, "response": self.response, "service": 5, "sample": 0, "endpoints": endpoints, **values},
            generation=generation,
        )


class Pair:
    """``client``, ``accepted``, ``upstreams`` and ``servers`` are sockets; counts as l7proxy keeps them."""

    def __init__(
        self,
        world: World,
        path: ExpressPath,
        family: Family,
        servers: int = 1,
        *,
        program: int = 1,
        enrol: bool = True,
        accept: bool = True,
    ) -> None:
        self.world, self.path, self.family = world, path, family
        self.number = next(_numbers)
        self.xends = BpfMap.open(world.fs / "maps" / "xends")
        self.accepted_name = f"accepted{self.number}"
        self.caller = (family.host("a"), 20000 + self.number)
        self._connect_client()
        self.upstreams: list[socket.socket] = []
        self.servers: list[socket.socket] = []
        for slot in range(servers):
            self._connect_server(slot)
            if accept:
                self.accept(slot)
        self.program = program
        self.record = path.create_record(program, IDENTITY["a"])
        self.fds = {name: os.open(f"/run/netns/{world.netns[name]}", os.O_RDONLY) for name in ("a", "b")}
        if enrol:
            assert self.enrol() == [OK] * (1 + servers)
            self.settle()
            for slot in range(servers):
                self.arm(slot)

    def _connect_client(self) -> None:
        world, family = self.world, self.family
        name = f"client{self.number}"
        world.a(family.tcp(name))
        world.a(f"{name}.connect(({family.spell(family.vip)!r}, 80))")
        world.agent["a"](f"{self.accepted_name}, _ = l.accept()")
        self.client, self.accepted = world.a(name), world.agent["a"](self.accepted_name)
        world.proxy.give(self.accepted_name, self.accepted)
        world.a(f"{name}.close()")
        world.agent["a"](f"{self.accepted_name}.close()")
        self._ready(self.client, self.accepted)

    def _connect_server(self, slot: int) -> None:
        world, family = self.world, self.family
        host, name, port = family.host("b"), f"up{self.number}", FIRST_PORT + slot
        world.agent["b"](family.tcp(name))
        world.proxy.give(name, world.agent["b"](name))
        world.proxy(f"{name}.settimeout(3)")
        world.proxy(f"{name}.setsockopt({LEVEL}, {CALLER}, {world.caller(*self.caller, IDENTITY['a'])!r})")
        world.proxy(f"{name}.connect(({family.spell(host)!r}, {port}))")
        self.upstreams.append(world.proxy(name))
        world.agent["b"](f"{name}.close()")
        world.proxy(f"{name}.close()")
        self._ready(self.upstreams[-1])

    def dial(self, slot: int) -> None:
        """One more connection to that server."""
        self._connect_server(slot)
        self.accept(slot)

    def accept(self, slot: int) -> None:
        """The server takes its connection."""
        self.world.b(f"server, _ = l{slot}.accept()")
        self.servers.append(self.world.b("server"))
        self.world.b("server.close()")
        self._ready(self.servers[-1])

    @staticmethod
    def _ready(*socks: socket.socket) -> None:
        for sock in socks:
            sock.settimeout(5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def upstream(self) -> socket.socket:
        return self.upstreams[0]

    @property
    def server(self) -> socket.socket:
        return self.servers[0]

    # ---- pairing

    def enrolment(self, slot: int | None = None, **changes: Any) -> Enrolment:
        """Of the client (None) or a server."""
        local, remote = ends((self.accepted if slot is None else self.upstreams[slot]).fileno())
        values: dict[str, Any] = {"record": self.record, "local": local, "remote": remote, "identity": IDENTITY["a"]}
        if slot is None:
            return Enrolment(**{"side": "client", **values, **changes})
        values |= {"slot": slot, "workload": PLACES + slot, "port": FIRST_PORT + slot, "caller": self.caller}
        return Enrolment(**{"side": "server", **values, **changes})

    def enrol(self) -> list[str]:
        """Both sides; counts begin here."""
        self.consumed = self.sent = 0
        self.up_sent, self.up_consumed = [0] * len(self.upstreams), [0] * len(self.upstreams)
        servers = [(self.fds["b"], self.enrolment(slot)) for slot in range(len(self.upstreams))]
        return [result for result, _ in self.path.enrol_all([(self.fds["a"], self.enrolment()), *servers])]

    def end(self, sock: socket.socket) -> dict[str, Any]:
        """struct pl_xend of an application's socket."""
        raw = self.xends.get(struct.pack("=i", sock.fileno()))
        assert raw is not None
        found: dict[str, Any] = self.path._layouts["pl_xend"].unpack(raw)
        return found

    def settled(self, *socks: socket.socket) -> bool:
        return all(self.end(sock)["settled"] for sock in socks)

    def settle(self) -> None:
        wait_for(lambda: self.settled(self.client, *self.servers), "both ends are settled")

    # ---- what the proxy says and hears

    def say(self, op: int, slot: int = NO_SLOT, **changes: int) -> None:
        values = {"op": op, "slot": slot, "consumed": self.consumed, "sent": self.sent}
        if slot != NO_SLOT:
            values |= {"up_sent": self.up_sent[slot], "up_consumed": self.up_consumed[slot]}
        raw = self.path._layouts["pl_xarm"].pack(**{**values, **changes})
        self.world.proxy(f"{self.accepted_name}.setsockopt({LEVEL}, {EXPRESS}, {raw!r})")

    def arm(self, slot: int = 0, **changes: int) -> None:
        self.say(ARM, slot, **changes)

    def view(self) -> dict[str, Any]:
        layout = self.path._layouts["pl_xview"]
        found: dict[str, Any] = layout.unpack(
            self.world.proxy(f"{self.accepted_name}.getsockopt({LEVEL}, {EXPRESS}, {layout.size})")
        )
        return found

    def punt(self) -> str:
        return self.path.reasons()[int(self.view()["punt"])]

    def is_slow(self, data: bytes) -> None:
        """The client's bytes have reached the proxy, not a server; the proxy has read them."""
        assert read(self.accepted, len(data)) == data
        self.consumed += len(data)
        for server in self.servers:
            assert nothing(server)

    def is_slow_unread(self, data: bytes) -> None:
        """The same, while the server has bytes to read from before."""
        assert read(self.accepted, len(data)) == data
        self.consumed += len(data)

    def is_fast(self, data: bytes, slot: int = 0) -> None:
        """The client's bytes have reached the server and not the proxy."""
        assert read(self.servers[slot], len(data)) == data
        assert nothing(self.accepted)

    def relay(self, data: bytes, slot: int = 0) -> None:
        """The proxy passes on what it has read."""
        self.upstreams[slot].sendall(data)
        self.up_sent[slot] += len(data)
        assert read(self.servers[slot], len(data)) == data

    def answer_slow(self, data: bytes, slot: int = 0, take: int | None = None) -> None:
        """The server's bytes come to the proxy, which passes them on; the client reads all, or ``take``."""
        assert read(self.upstreams[slot], len(data)) == data
        self.up_consumed[slot] += len(data)
        self.accepted.sendall(data)
        self.sent += len(data)
        count = len(data) if take is None else take
        assert read(self.client, count) == data[:count]

    def exchange(self, request: bytes = GET, response: bytes = OKAY, slot: int = 0) -> None:
        """One that goes fast both ways."""
        self.client.sendall(request)
        self.is_fast(request, slot)
        self.servers[slot].sendall(response)
        assert read(self.client, len(response)) == response
        assert nothing(self.upstreams[slot])

    def slow_exchange(self, request: bytes = GET, response: bytes = OKAY, slot: int = 0, arm: bool = True) -> None:
        self.client.sendall(request)
        self.is_slow(request)
        self.relay(request, slot)
        self.servers[slot].sendall(response)
        self.answer_slow(response, slot)
        if arm:
            self.arm(slot)

    def close(self) -> None:
        for sock in (self.client, self.accepted, *self.upstreams, *self.servers):
            sock.close()
        for place in self.fds.values():
            os.close(place)
        self.xends.close()
        self.path.forget_record(self.record)


def open_door(world: World, family: Family, servers: int = 1) -> None:
    """Listeners, destinations and policy, once for a test."""
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    for slot in range(servers):
        world.b(family.server(f"l{slot}", family.host("b"), FIRST_PORT + slot))
        world.dial("b", family.host("b"), FIRST_PORT + slot)
        world.allow("b", IDENTITY["a"], FIRST_PORT + slot, verdict="L7")


def read(sock: socket.socket, count: int) -> bytes:
    """Exactly so many bytes."""
    parts, left = [], count
    while left:
        data = sock.recv(min(left, 1 << 16))
        assert data, f"end of stream with {left} of {count} bytes missing"
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


def nothing(sock: socket.socket) -> bool:
    """No byte waits here. What was sent before is delivered when send() returns, on one machine."""
    sock.setblocking(False)
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(5)
