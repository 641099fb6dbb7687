"""A kernel that carries nothing but says what the test wants it to say of a pair, and an agent that answers Pair."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from l7proxy.express import ARM, HOLD, NO_SLOT, RESPONSE_HEAD, TAKE, View
from mesh import link
from mesh.model import Service, Workload
from tests.l7proxy.rig import FakeKernel, Mesh, Rig, Server, ok, read_head, read_response, wait_for

REST = View(-1)


@dataclass(frozen=True)
class Op:
    op: int
    slot: int
    consumed: int
    sent: int
    up_sent: int
    up_consumed: int


class ExpressKernel(FakeKernel):
    """One view for each client, by its port. `ops`: what user space said, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[int, View] = {}
        self.ops: list[Op] = []
        self.refuse: set[int] = set()
        self.at_take: dict[str, Any] = {}  # what has happened by then
        self._ports: dict[int, int] = {}
        self.express = True

    def _port(self, sock: Any) -> int:
        with suppress(OSError):
            self._ports[sock.fileno()] = sock.getpeername()[1]
        return self._ports.get(sock.fileno(), 0)

    def express_view(self, sock: Any) -> View | None:
        return self.views.get(self._port(sock))

    def express_op(
        self, sock: Any, op: int, slot: int, consumed: int = 0, sent: int = 0, up_sent: int = 0, up_consumed: int = 0
    ) -> bool:
        port = self._port(sock)
        view = self.views.get(port)
        if view is None or op in self.refuse or (op == ARM and view.busy):
            return False
        self.ops.append(Op(op, slot, consumed, sent, up_sent, up_consumed))
        if op == TAKE:
            self.views[port] = replace(view, slot=-1, handed=False, **self.at_take)
        return True

    def of(self, op: int) -> list[Op]:
        return [entry for entry in self.ops if entry.op == op]


@dataclass
class Express:
    """A worker whose agent pairs what is asked, and one client of one service."""

    rig: Rig
    kernel: ExpressKernel
    client: Workload
    web: Service
    servers: list[Server]
    pairs: list[link.Pair] = field(default_factory=list)
    answer: Callable[[link.Pair], link.Paired | None] = lambda pair: link.Paired(
        pair.session, True, tuple(range(len(pair.endpoints)))
    )
    fds: dict[int, list[int]] = field(default_factory=dict)  # by session: the agent's duplicates

    def __post_init__(self) -> None:
        self.rig.agent.on_pair = self._pair

    def _pair(self, pair: link.Pair, fds: list[int]) -> None:
        self._close(pair.session)
        self.fds[pair.session] = fds
        self.pairs.append(pair)
        answer = self.answer(pair)
        if answer is not None:
            if answer.ok:
                with socket.socket(fileno=os.dup(fds[0])) as accepted:
                    self.kernel.views[accepted.getpeername()[1]] = REST
            with suppress(OSError):  # the test is over
                self.rig.agent.send(answer)

    def unpaired(self) -> list[int]:
        """Sessions the worker let go of; their descriptors are closed."""
        gone = [message.session for message in self.rig.agent.of(link.Unpair)]  # type: ignore[attr-defined]
        for session in gone:
            self._close(session)
        return gone

    def _close(self, session: int) -> None:
        for fd in self.fds.pop(session, []):
            os.close(fd)

    def close(self) -> None:
        for session in list(self.fds):
            self._close(session)

    def events(self) -> dict[str, int]:
        return dict(self.rig.worker.metrics.events)

    def dialogue(self) -> Dialogue:
        return Dialogue(self)


class Dialogue:
    """One client connection, paired; the test speaks for both ends."""

    def __init__(self, express: Express) -> None:
        self.express, self.kernel = express, express.kernel
        before = len(express.kernel.of(ARM))
        self.sock = express.rig.connect(express.client, express.web)
        self.port = self.sock.getsockname()[1]
        self.sent = self.got = 0
        self.server = self.exchange()
        wait_for(lambda: len(express.kernel.of(ARM)) > before, "the pair to be armed")

    def exchange(self, request: bytes = b"", response: bytes = b"") -> socket.socket:
        """One that goes through user space; the server's connection."""
        request, response = request or get(), response or ok(b"one")
        self.sock.sendall(request)
        connection = self.reached(request)
        connection.sendall(response)
        assert read_response(self.sock)[1].startswith(response[:12])
        return connection

    def reached(self, request: bytes) -> socket.socket:
        """The server's connection on which it came."""
        found: list[socket.socket] = []

        def arrived() -> bool:
            opened = [c for server in self.express.servers for c in server.connections if c.fileno() >= 0]
            for connection in select.select(opened, [], [], 0)[0]:
                with suppress(OSError):
                    if connection.recv(1, socket.MSG_PEEK):
                        found.append(connection)
            return bool(found)

        wait_for(arrived, "the request at a server")
        assert read_head(found[0])[0] == request[: len(request)]
        return found[0]

    def begin(self, slot: int = 0, **view: Any) -> View:
        """The kernel has carried a request."""
        values: dict[str, Any] = {"phase": RESPONSE_HEAD, "head": get("/fast"), "started": time.perf_counter()} | view
        found = self.kernel.views[self.port] = View(slot, **values)
        return found

    def change(self, **view: Any) -> None:
        self.kernel.views[self.port] = replace(self.kernel.views[self.port], **view)

    def over(self) -> None:
        """The kernel has carried the response."""
        self.change(slot=-1)

    def forget(self) -> None:
        del self.kernel.views[self.port]


def get(path: str = "/", *lines: str, method: str = "GET") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: web.shop.mesh", *lines, "", "")).encode()


def express_world(mesh: Mesh, start: Callable[..., Rig], serve: Callable[[Server], Server], servers: int = 1) -> Express:
    """``start``, ``serve``: the fixtures."""
    found = [serve(Server(lambda connection: None)) for _ in range(servers)]
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [server.port for server in found])
    mesh.allow("web", "client")
    kernel = ExpressKernel()
    rig = start(mesh, kernel)
    return Express(rig, kernel, client, web, found)


__all__ = ["ARM", "HOLD", "NO_SLOT", "TAKE", "Dialogue", "Express", "ExpressKernel", "Op", "express_world", "get"]
