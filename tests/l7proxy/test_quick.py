"""`Quick` does in one piece what `Cycle` and `HttpSession` do step by step: the same events to both give the same bytes, the
same use of connections, the same numbers."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy import capture
from l7proxy.config import Config
from l7proxy.express_session import LASTING_EXCHANGES
from l7proxy.http1.exchange import IDLE
from l7proxy.http1.head import HeadError
from l7proxy.http1.request_side import RequestSide
from l7proxy.http1.response_side import ResponseSide
from l7proxy.quick import Quick
from l7proxy.session import HttpSession
from l7proxy.target import Caller
from l7proxy.worker import Worker
from mesh.link import LocalWorkload
from mesh.model import Operation, Rule, Service, Workload, key_of
from tests.l7proxy.rig import FakeKernel, Mesh, spiffe

REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: web\r\n\r\n",
    b"GET /other HTTP/1.1\r\nHost: web\r\nX: y\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: web\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.0\r\nHost: web\r\nConnection: keep-alive\r\n\r\n",
    b"GET /denied HTTP/1.1\r\nHost: web\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\n\r\nbody",
    b"POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\n\r\n",
    b"body",
    b"GET / HTTP/1.1\r\nHost: web\r\n\r\nGET /other HTTP/1.1\r\nHost: web\r\n\r\n",
    b"GET / HT",
    b"nonsense\r\n\r\n",
)
RESPONSES = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello too much",
    b"hello",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
    b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\n\r\nuntil close",
    b"what?\r\n\r\n",
)


def config(node: str = "n1") -> tuple[Config, Workload, Service]:
    """A client of n1 that may GET all but /denied, and the service it asks, with two endpoints on a node."""
    mesh = Mesh()
    client = mesh.workload("client-1", "client", address="10.0.0.1")
    web = mesh.service("web", [8080, 8080], address="10.0.1.1")
    mesh.allow("web", "client")
    mesh.deny("web", Rule(operations=(Operation(paths=("/denied",)),)))
    mesh.items = [
        msgspec.structs.replace(item, node=node) if isinstance(item, Workload) and item != client else item for item in mesh.items
    ]
    local = tuple(LocalWorkload(key_of(w), 7, 1) for w in mesh.items if isinstance(w, Workload) and w.node == "n1")
    return Config(mesh.state, revision=1, node="n1", local=local), client, web


NEAR = config()


class Loop:
    """Runs what is due when told."""

    def __init__(self) -> None:
        self.due: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def call_soon(self, call: Callable[..., object], *arguments: object) -> Loop:
        self.due.append((call, arguments))
        return self

    def call_later(self, _delay: float, _call: Callable[..., object], *_arguments: object) -> Loop:
        return self

    def cancel(self) -> None: ...

    def run(self) -> None:
        while self.due:
            call, arguments = self.due.pop(0)
            call(*arguments)


class Wire:
    """A transport that keeps what it is told."""

    def __init__(self, protocol: Any) -> None:
        self.protocol = protocol
        self.log: list[object] = []

    def write(self, data: bytes) -> None:
        self.log.append(data)

    def get_extra_info(self, _name: str, default: object = None) -> object:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return "close" in self.log or "abort" in self.log

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name not in {"pause_reading", "resume_reading", "write_eof", "close", "abort"}:
            raise AttributeError(name)
        return lambda: self.log.append(name)


class Slow(HttpSession):
    """Without the short way."""

    __slots__ = ()
    client_data = RequestSide.client_data
    upstream_data = ResponseSide.upstream_data


class Side:
    """A worker with one session, whose server is played."""

    def __init__(
        self, kind: type[HttpSession], monkeypatch: pytest.MonkeyPatch, configured: Any = NEAR, *, express: bool = False
    ) -> None:
        self.worker = worker = Worker(0, cast(socket.socket, None), kernel=FakeKernel())
        self.loop = Loop()
        worker.loop = cast(Any, self.loop)  # as much of one as it needs
        worker.kernel.express = express
        self.configured = configured
        worker.config = configured[0]
        worker.budgets.adopt(worker.config.state)
        worker.flow_budget = 0
        for raw in (*REQUESTS, *RESPONSES):  # the short way is for heads seen before
            with contextlib.suppress(HeadError):
                (worker.heads.response if raw.startswith(b"HTTP") else worker.heads.request)(raw[: raw.find(b"\r\n\r\n") + 4])
        self.servers: list[Wire] = []
        monkeypatch.setattr(capture, "HttpSession", kind)
        monkeypatch.setattr(worker.upstreams, "dial", self._dial)
        self.clients: list[Wire] = []
        self.open()

    def open(self) -> None:
        """One more client, whose session is played from now on."""
        worker = self.worker
        _, client, web = self.configured
        destination = worker.config.destination(web.vips[0], 80)
        assert destination is not None
        caller = Caller(spiffe("client"), client.identity, "10.0.0.1", 4000, key_of(client))
        session = capture.session_for(worker, worker.config, caller, destination, 7, inbound=False)
        if session is None:
            return  # over its budget
        assert isinstance(session, HttpSession)
        self.session = session
        self.clients.append(Wire(session))
        session.connection_made(self.clients[-1])  # type: ignore[arg-type]  # played

    def _dial(self, endpoint: object, _caller: object, _netns: int, protocol: Any, _failed: object, **_options: object) -> Loop:
        wire = Wire(protocol)
        wire.log.append(endpoint)
        self.servers.append(wire)
        return self.loop.call_soon(protocol.connection_made, wire)

    def play(self, what: str, which: int) -> None:
        session = self.session
        random.seed(which)  # which of two endpoints
        if what == "request":
            session.data_received(REQUESTS[which % len(REQUESTS)])
        elif what == "response" and self.servers:
            wire = self.servers[which % len(self.servers)]
            if not wire.is_closing():
                wire.protocol.data_received(RESPONSES[which // 2 % len(RESPONSES)])
        elif what == "answer" and session.upstream is not None and session.upstream.transport is not None:
            session.upstream.data_received(RESPONSES[which % len(RESPONSES)])
        elif what == "server eof" and session.upstream is not None and session.upstream.transport is not None:
            session.upstream.eof_received()
        elif what == "server full" and session.upstream is not None:
            session.upstream.pause_writing()
        elif what == "server drained" and session.upstream is not None:
            session.upstream.resume_writing()
        elif what == "client":
            self.open()
        elif what == "held":
            session.account.held = which % 2 * (session.account.budget.bytes_in_flight + 1)
        elif what in ("pause_writing", "resume_writing", "eof_received", "end"):
            getattr(session, what)()
        self.loop.run()

    def seen(self) -> dict[str, object]:
        pools = self.worker.upstreams.pools.values()
        return {
            "clients": [wire.log for wire in self.clients],
            "servers": [wire.log for wire in self.servers],
            "idle": [len(pool.idle) for pool in pools],
            "outstanding": [pool.health.outstanding for pool in pools],
            "codes": {(s.source, s.destination, s.path_kind): s.codes for s in self.worker.metrics._http.values() if s.codes},
            "requests": self.session.account.requests,
            "refused": dict(self.session.account.refused),
            "state": (self.session.rq, self.session.rs, self.session.pending, self.session.client_paused),
            "denied": dict(self.worker.metrics.denials),
        }


EVENTS = st.tuples(
    st.sampled_from(
        ("request",) * 6
        + ("answer",) * 7
        + (
            "client",
            "client",
            "held",
            "held",
            "response",
            "server eof",
            "server full",
            "server drained",
            "pause_writing",
            "resume_writing",
            "eof_received",
            "end",
        )
    ),
    st.integers(0, 1) | st.integers(0, 40),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=30))
def test_the_short_way_is_the_long_one(events: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        quick = Side(HttpSession, monkeypatch)
        slow = Side(Slow, monkeypatch)
        for what, which in [("request", 0), ("answer", 0), ("request", 1), ("answer", 0), *events]:
            quick.play(what, which)
            slow.play(what, which)
            assert quick.seen() == slow.seen(), (what, which)


def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(HttpSession, monkeypatch)
    side.play("request", 0)
    side.play("answer", 0)
    for name in ("_begin", "decide", "_go", "_response_done", "release"):
        monkeypatch.setattr(HttpSession, name, None)
    for _ in range(3):
        side.play("request", 0)
        assert side.session.rq != IDLE
        side.play("answer", 0)
        assert side.session.rq == IDLE
    assert len(side.servers) == 1 and issubclass(HttpSession, Quick)


def test_clients_that_ask_once_take_the_short_way_over_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(HttpSession, monkeypatch)
    side.play("request", 3)
    side.play("answer", 0)
    for name in ("_begin", "decide", "_go", "_response_done", "release"):
        monkeypatch.setattr(HttpSession, name, None)
    for _ in range(3):
        side.open()
        side.play("request", 3)
        side.play("answer", 0)
        assert side.clients[-1].log == [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nconnection: close\r\n\r\nhello", "close"]
    (server,) = side.servers
    assert server.log[1:] == [REQUESTS[0]] * 4
    assert not side.session.idle


@pytest.mark.parametrize(("node", "prepared"), [("n1", True), ("n2", False)])
def test_no_connection_to_another_node_is_prepared_for_the_kernel(
    monkeypatch: pytest.MonkeyPatch, node: str, prepared: bool
) -> None:
    side = Side(HttpSession, monkeypatch, config(node), express=True)
    side.worker.flow_budget = 1000  # the long way; each is told of
    for _ in range(LASTING_EXCHANGES + 1):
        side.play("request", 0)
        side.play("answer", 0)
    assert (side.session.pair is not side.worker.express.newcomer) is prepared
