"""Which connections the kernel is asked to carry without TCP, when, and that nothing is lost on the way there and back."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, cast

import pytest
from msgspec.structs import replace

from l7proxy import express_session
from l7proxy import legs as module
from l7proxy.config import Endpoint
from l7proxy.express import LEG_ASKED, LEG_MADE, LEG_NEW, LEG_REFUSED, LEG_WANTED
from l7proxy.legs import AGAIN_S, Legs
from l7proxy.session import HttpSession
from l7proxy.target import Caller, DialError, Target
from l7proxy.transport import SocketTransport
from l7proxy.upstream import IDLE_PER_POOL_MAX, Pool, UpstreamConnection
from l7proxy.worker import Worker
from mesh import link
from mesh.model import Budget, Config, Service, Workload, key_of
from tests.l7proxy.express_rig import get
from tests.l7proxy.rig import FakeKernel, Mesh, Rig, Server, ok, open_fds, read_head, read_response, wait_for
from tests.l7proxy.test_worker import metric, reason

Start = Callable[..., Rig]
Serve = Callable[[Server], Server]
CLIENT = "Workload/shop/client-1"
LATER = 1e15  # by perf_counter: nothing was heard since


@pytest.fixture(autouse=True)
def looks_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 3600.0)
    monkeypatch.setattr(module, "LEG_ANSWER_S", 3600.0)


class Legwork:
    """A client of this node, services here ("near") and on another node ("far"), and an agent that hears of legs."""

    def __init__(self, mesh: Mesh, start: Start, serve: Serve) -> None:
        self.near, self.far = (serve(Server(lambda connection: None)) for _ in range(2))
        self.client = mesh.workload("client-1", "client")
        self.here, self.there = mesh.service("near", [self.near.port]), mesh.service("far", [self.far.port])
        mesh.allow("near", "client")
        mesh.allow("far", "client")
        mesh.items = [replace(i, node="n2") if isinstance(i, Workload) and i.name == "far-1" else i for i in mesh.items]
        self.kernel = FakeKernel()
        self.kernel.express = True
        self.rig = start(mesh, self.kernel)
        self.worker = self.rig.worker
        self.worker.dial_remote = self._dial
        self.peers: list[tuple[str, int]] = []  # of what came with Leg
        self.rig.agent.on_leg = self._leg

    def _leg(self, _leg: link.Leg, fds: list[int]) -> None:
        for fd in fds:
            with socket.socket(fileno=fd) as sock:
                self.peers.append(sock.getpeername()[:2])

    def _dial(self, target: Target, protocol: asyncio.Protocol, _failed: Callable[[DialError], None]) -> asyncio.Handle:
        sock = socket.create_connection((target.address, target.port))
        sock.setblocking(False)
        return self.worker.loop.call_soon(lambda: SocketTransport(self.worker.loop, sock, protocol) and None)

    @property
    def legs(self) -> Legs:
        return self.worker.legs

    @property
    def asked(self) -> list[link.Leg]:
        return cast(list[link.Leg], self.rig.agent.of(link.Leg))

    @property
    def unlegged(self) -> list[int]:
        return [message.number for message in self.rig.agent.of(link.Unleg)]  # type: ignore[attr-defined]

    def look(self, at: float = 0.0) -> None:
        """By default all that was ever heard was so since the last one."""
        self.rig.call(lambda: self.legs.look(at))

    def turns(self) -> None:
        """The worker has done what was to be done soon."""
        for _ in range(4):
            self.rig.call(lambda: None)

    def answer(self, ok: bool = True, reason: str = "", *, number: int = 0) -> None:
        self.rig.agent.send(link.Legged(number or self.asked[-1].number, ok, reason))

    def session(self) -> HttpSession:
        (session,) = self.worker.sessions
        assert isinstance(session, HttpSession)
        return session

    def made(self) -> float:
        return metric(self.rig, "pillion_express_legs")


class Talk:
    """One connection of the client's; the test speaks for both ends."""

    def __init__(self, work: Legwork, service: Service | None = None) -> None:
        self.work = work
        self.service = service or work.there
        self.server = work.near if self.service is work.here else work.far
        self.sock = work.rig.connect(work.client, self.service)
        self.upstream: socket.socket | None = None

    def ask(self, request: bytes = b"") -> None:
        """Until the server has it, on whichever connection."""
        self.sock.sendall(request or get())
        wait_for(self._arrived, "the request at the server")
        assert self.upstream is not None and read_head(self.upstream)[0]

    def _arrived(self) -> bool:
        found = select.select([one for one in self.server.connections if one.fileno() >= 0], [], [], 0)[0]
        self.upstream = next((one for one in found if one.recv(1, socket.MSG_PEEK)), None)
        return self.upstream is not None

    def reply(self, response: bytes = b"") -> None:
        assert self.upstream is not None
        self.upstream.sendall(response or ok(b"one"))
        assert read_response(self.sock)[0]

    def busy(self) -> None:
        """At two looks in a row; it does not rest yet."""
        for again in (False, True):
            self.ask()
            self.work.look()
            if not again:
                self.reply()

    def rest(self) -> None:
        self.reply()
        wait_for(lambda: self.work.asked, "Leg")


@pytest.fixture
def work(mesh: Mesh, start: Start, serve: Serve) -> Legwork:
    return Legwork(mesh, start, serve)


@pytest.fixture
def talk(work: Legwork) -> Iterator[Talk]:
    made = Talk(work)
    yield made
    made.sock.close()


# ---- clients


def test_a_busy_connection_is_asked_for_when_it_rests(work: Legwork, talk: Talk) -> None:
    talk.ask()
    work.look()
    talk.reply()
    work.turns()
    assert not work.asked  # busy once
    talk.ask()
    work.look()
    work.turns()
    assert not work.asked  # it does not rest
    talk.rest()
    (leg,) = work.asked
    assert (leg.workload, leg.dialled) == (CLIENT, False)
    assert work.peers == [talk.sock.getsockname()]
    # until the answer it is not read, so nothing is written
    talk.sock.sendall(get("/waits"))
    work.turns()
    assert talk.upstream is not None
    talk.upstream.setblocking(False)
    with pytest.raises(BlockingIOError):
        talk.upstream.recv(1)
    talk.upstream.settimeout(5)
    work.answer()
    assert read_head(talk.upstream)[0] == get("/waits")
    talk.reply()
    assert work.made() == 1 and work.session().leg == LEG_MADE
    work.look()
    work.look()
    talk.ask()
    talk.reply()
    assert len(work.asked) == 1


def test_when_it_ends_the_agent_hears_of_it_once(work: Legwork, talk: Talk) -> None:
    talk.busy()
    talk.rest()
    work.answer()
    wait_for(lambda: work.made() == 1, "the leg")
    work.rig.sweep()
    assert not work.unlegged
    talk.sock.close()
    wait_for(lambda: not work.worker.sessions, "the end")
    work.rig.sweep()
    work.rig.sweep()
    wait_for(lambda: work.unlegged, "Unleg")
    work.turns()
    assert work.unlegged == [work.asked[0].number] and work.made() == 0


def test_busy_now_and_then_is_not_enough(work: Legwork, talk: Talk) -> None:
    for _ in range(3):
        talk.ask()
        work.look()
        talk.reply()
        work.look(LATER)
        work.look()  # nothing was heard since the last one
    work.turns()
    assert not work.asked and work.session().leg < LEG_WANTED


def test_between_two_exchanges_it_is_busy_still(work: Legwork, talk: Talk) -> None:
    talk.ask()
    work.look()
    talk.reply()
    for _ in range(3):
        work.look()
    assert work.session().leg < LEG_WANTED  # where the next goes is not known
    talk.ask()
    work.look()
    assert work.session().leg == LEG_WANTED
    talk.rest()


@pytest.mark.parametrize("why", ["here", "mesh", "workload", "service", "kernel", "ending", "inbound"])
def test_what_is_not_asked_for(work: Legwork, mesh: Mesh, why: str) -> None:
    if why == "mesh":
        mesh.config = Config(trust_domain="mesh.local", express="off")
    elif why == "workload":
        mesh.items = [replace(item, express="off") if item is work.client else item for item in mesh.items]
    elif why == "service":
        mesh.items = [replace(item, express="off") if item is work.there else item for item in mesh.items]
    elif why == "kernel":
        work.kernel.express = False
    work.rig.update()
    talk = Talk(work, work.here if why == "here" else None)
    talk.ask()
    if why == "ending":
        work.rig.call(work.session().end)
    elif why == "inbound":
        work.session().metered = False
    for _ in range(3):
        work.look()
    assert work.session().leg < LEG_WANTED and work.session().rest is None
    talk.reply()
    work.turns()
    assert not work.asked
    talk.sock.close()


def test_one_that_the_agent_ends_may_be_asked_for_again(work: Legwork, talk: Talk) -> None:
    talk.busy()
    talk.rest()
    work.answer()
    wait_for(lambda: work.made() == 1, "the leg")
    work.answer(False, "off")
    wait_for(lambda: work.made() == 0, "its end")
    assert work.session().leg == LEG_NEW


@pytest.mark.parametrize(("why", "later"), [("busy", LEG_NEW), ("lowat", LEG_REFUSED)])
def test_a_refusal_may_pass(work: Legwork, talk: Talk, why: str, later: int) -> None:
    talk.busy()
    talk.rest()
    work.answer(False, why)
    wait_for(lambda: work.session().leg == LEG_REFUSED, "the refusal")
    now = perf_counter()
    work.rig.call(lambda: work.legs.sweep(now))
    assert work.session().leg == LEG_REFUSED
    work.rig.call(lambda: work.legs.sweep(now + AGAIN_S))
    assert work.session().leg == later


@pytest.mark.parametrize("reason", ["off", "not_captured"])
def test_one_that_is_refused_goes_on_and_is_not_asked_for_again(work: Legwork, talk: Talk, reason: str) -> None:
    talk.busy()
    talk.rest()
    work.answer(False, reason)
    talk.busy()
    talk.reply()
    work.turns()
    assert len(work.asked) == 1 and not work.unlegged and work.made() == 0
    assert work.session().leg == LEG_REFUSED
    assert work.worker.metrics.events[f"leg_refused_{reason}"] == 1


def test_no_pair_is_planned_for_what_is_one_or_may_become_one(work: Legwork, talk: Talk) -> None:
    talk.ask()
    session, desk = work.session(), work.worker.express
    may = {}
    for leg in (LEG_NEW, LEG_WANTED, LEG_REFUSED, LEG_ASKED, LEG_MADE):
        session.leg = leg
        may[leg] = desk.open(session)
    assert may == {LEG_NEW: True, LEG_WANTED: True, LEG_REFUSED: True, LEG_ASKED: False, LEG_MADE: False}


def test_an_agent_that_does_not_answer(work: Legwork, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEG_ANSWER_S", 0.01)
    talk.busy()
    talk.rest()
    wait_for(lambda: work.unlegged, "Unleg")
    assert work.unlegged == [work.asked[0].number]
    talk.ask()
    talk.reply()
    work.answer()  # late: it was told that nobody waits any more
    talk.ask()
    talk.reply()
    assert work.made() == 0 and work.session().leg == LEG_REFUSED
    assert work.worker.metrics.events["leg_refused_unanswered"] == 1


def test_an_answer_ends_the_wait(work: Legwork, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEG_ANSWER_S", 0.2)
    talk.busy()
    talk.rest()
    asks = work.legs._asks
    (timer,) = [entry.unanswered for entry in asks.values()]
    work.answer()
    wait_for(lambda: work.made() == 1, "the leg")
    assert timer.cancelled() and not asks


@pytest.mark.parametrize("made", [True, False])
def test_one_that_ends_while_it_is_asked_for(work: Legwork, talk: Talk, made: bool) -> None:
    talk.busy()
    talk.rest()
    work.rig.call(lambda: work.session().cut())
    wait_for(lambda: not work.worker.sessions, "the end")
    work.answer(made, "" if made else "not_established")
    work.turns()
    work.rig.sweep()
    wait_for(lambda: bool(work.unlegged) is made, "Unleg")
    assert work.made() == 0 and not work.legs._asks


def test_time_that_runs_out_while_it_is_asked_for(work: Legwork, talk: Talk) -> None:
    talk.busy()
    talk.rest()
    work.rig.sweep(4000.0)  # idle for too long
    assert talk.sock.recv(1) == b""
    work.answer()
    work.rig.sweep()
    wait_for(lambda: work.unlegged, "Unleg")


def test_draining_waits_for_the_answer(work: Legwork, talk: Talk) -> None:
    """A request may have come meanwhile that nobody has read."""
    talk.busy()
    talk.rest()
    assert not work.session().idle
    talk.sock.sendall(get("/waits"))
    work.rig.call(lambda: work.session().end_idle())
    work.answer()
    assert talk.upstream is not None and read_head(talk.upstream)[0] == get("/waits")
    talk.reply()
    wait_for(lambda: work.session().idle, "rest")


def test_a_worker_that_drains_asks_for_nothing_more(work: Legwork, talk: Talk) -> None:
    talk.busy()
    assert work.session().leg == LEG_WANTED
    work.rig.agent.send(link.Drain(60.0))
    wait_for(lambda: work.worker.draining, "the drain")
    talk.reply()
    work.turns()
    assert not work.asked


def test_a_new_link_forgets_all_and_asks_anew(work: Legwork, talk: Talk) -> None:
    talk.busy()
    talk.rest()
    work.answer()
    wait_for(lambda: work.made() == 1, "the leg")
    former = work.asked[0].number
    work.rig.relink()
    wait_for(lambda: work.made() == 0, "the new link")
    talk.busy()
    talk.rest()
    assert work.asked[0].number > former  # never given again
    work.answer()
    wait_for(lambda: work.made() == 1, "the leg")
    assert not work.unlegged


def test_a_link_that_ends_while_it_is_asked_for(work: Legwork, talk: Talk) -> None:
    talk.busy()
    talk.rest()
    former = work.asked[0].number
    work.rig.relink()
    talk.ask()  # it is read again
    talk.reply()
    work.answer(number=former)  # another agent's, or nobody's
    talk.busy()
    talk.rest()
    assert work.made() == 0 and work.asked[0].number > former


@pytest.mark.parametrize("how", ["unlinked", "descriptors"])
def test_where_it_can_not_be_asked_for_it_goes_on(work: Legwork, talk: Talk, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def out_of_them(_message: link.Message, _fds: object = ()) -> bool:
        if isinstance(_message, link.Leg):
            raise OSError(24, "Too many open files")
        return True

    talk.busy()
    if how == "unlinked":
        work.rig.agent.close()
        wait_for(lambda: work.worker.agent.connection is None, "the end of the link")
    else:
        monkeypatch.setattr(work.worker.agent, "send", out_of_them)
    talk.reply()
    work.turns()
    assert work.session().leg == LEG_NEW and not work.legs._asks
    talk.ask()
    talk.reply()
    assert not work.asked


def test_one_that_is_over_its_budget_is_not_read_for_a_while(work: Legwork, talk: Talk) -> None:
    """The agent's answer would have it read again at once."""
    talk.ask()
    talk.reply()
    work.turns()
    session = work.session()
    session.leg = LEG_WANTED
    session.rest = lambda: work.legs._rests(session)
    work.rig.call(lambda: session.account.requesting.empty(perf_counter() + 60))
    talk.sock.sendall(get())
    status, head, _ = read_response(talk.sock)
    assert (status, reason(head)) == (429, "budget_requests")
    work.turns()
    assert not work.asked and session.leg == LEG_NEW and session.rest is None
    wait_for(lambda: session.transport.is_reading(), "the end of that while")


class Unsent:
    """A transport whose last bytes wait."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def get_write_buffer_size(self) -> int:
        return 1


@pytest.mark.parametrize("what", ["unsent", "pending", "late", "ended"])
def test_what_does_not_quite_rest_is_not_asked_for(work: Legwork, talk: Talk, what: str) -> None:
    """Two turns on; what waits would be written while the kernel takes it over."""
    talk.busy()
    session = work.session()

    def rests() -> None:
        work.legs._rests(session)
        assert session.transport._paused  # type: ignore[attr-defined]  # a SocketTransport
        if what == "unsent":
            session.transport = cast(asyncio.Transport, Unsent(session.transport))
        elif what == "pending":
            session.pending = b"GET"
        elif what == "late":
            session.late = b"GET"
        else:
            session.client_ended = True

    talk.reply()
    wait_for(lambda: work.asked, "Leg")  # the first time it does
    work.answer(False, "busy")
    wait_for(lambda: session.leg == LEG_REFUSED, "the answer")
    session.leg = LEG_WANTED
    work.rig.call(rests)
    work.turns()
    assert len(work.asked) == 1 and session.leg == LEG_NEW
    assert session.transport._paused is (what == "late")  # type: ignore[attr-defined]  # the account's turn goes on with that
    session.late = None


def test_there_is_a_limit_to_what_is_asked_at_once(work: Legwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEG_ASKS_MAX", 1)
    one, two = Talk(work), Talk(work)
    one.ask()
    two.ask()
    sessions = [cast(HttpSession, session) for session in work.worker.sessions]
    one.reply()
    two.reply()
    for session in sessions:
        session.leg = LEG_WANTED

    def both() -> None:  # in one turn
        for session in sessions:
            work.legs._rests(session)

    work.rig.call(both)
    wait_for(lambda: work.asked, "Leg")
    work.turns()
    assert len(work.asked) == 1 and sorted(session.leg for session in sessions) == [LEG_NEW, LEG_ASKED]
    left = next(session for session in sessions if session.leg == LEG_NEW)
    assert left.transport.is_reading()
    left.leg = LEG_WANTED
    work.rig.call(lambda: work.legs._rests(left))
    work.turns()
    assert left.leg == LEG_NEW and left.transport.is_reading()
    work.answer()
    wait_for(lambda: work.made() == 1, "the leg")
    left.leg = LEG_WANTED
    work.rig.call(lambda: work.legs._rests(left))
    wait_for(lambda: len(work.asked) == 2, "the other")
    for talk in (one, two):
        talk.sock.close()


def test_who_else_waits_for_its_rest_is_not_displaced(work: Legwork, talk: Talk) -> None:
    heard: list[str] = []
    talk.ask()
    session = work.session()
    session.rest = lambda: heard.append("rest")
    for _ in range(3):
        work.look()
    assert session.leg < LEG_WANTED
    talk.reply()
    wait_for(lambda: heard, "rest")
    work.turns()
    assert heard == ["rest"] and not work.asked


def test_a_paired_session_is_not_asked_for(work: Legwork, talk: Talk) -> None:
    talk.ask()
    session = work.session()
    pair, session.pair = session.pair, cast(Any, object())
    for _ in range(3):
        work.look()
    session.pair = pair
    assert session.leg < LEG_WANTED


UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.parametrize("first", ["leg", "upgrade"])
def test_an_upgraded_connection(work: Legwork, talk: Talk, first: str) -> None:
    """Of a leg: any bytes, in any order. Never asked for: it does not rest."""
    if first == "leg":
        talk.busy()
        talk.rest()
        work.answer()
        wait_for(lambda: work.made() == 1, "the leg")
    talk.ask(get("/", *UPGRADE))
    assert talk.upstream is not None
    talk.upstream.sendall(SWITCH)
    assert read_head(talk.sock)[0].startswith(b"HTTP/1.1 101")
    for _ in range(3):
        work.look()
    talk.upstream.sendall(b"unasked")
    assert talk.sock.recv(7, socket.MSG_WAITALL) == b"unasked"
    talk.sock.sendall(b"raw")
    assert talk.upstream.recv(3, socket.MSG_WAITALL) == b"raw"
    assert len(work.asked) == (first == "leg")
    session = work.session()
    talk.sock.close()
    talk.upstream.close()
    wait_for(lambda: session.lost, "the end")
    assert session.rest is None  # it holds nobody
    work.rig.sweep()
    wait_for(lambda: len(work.unlegged) == (first == "leg"), "Unleg")


def test_connections_that_come_and_go_lose_no_descriptor(work: Legwork) -> None:
    def come_and_go() -> None:
        before = len(work.asked)
        talk = Talk(work)
        talk.busy()
        talk.reply()
        wait_for(lambda: len(work.asked) > before, "Leg")
        work.answer()
        wait_for(lambda: work.made() == 1, "the leg")
        talk.sock.close()
        wait_for(lambda: not work.worker.sessions, "the end")
        work.rig.sweep()

    come_and_go()
    before = open_fds()
    for _ in range(10):
        come_and_go()
    wait_for(lambda: open_fds() <= before, "the descriptors")
    wait_for(lambda: len(work.unlegged) == 11, "Unleg")
    assert work.unlegged == [leg.number for leg in work.asked]


# ---- servers


class Nobody:
    def upstream_open(self, connection: UpstreamConnection) -> None: ...
    def upstream_failed(self, error: Exception) -> None: ...
    def upstream_data(self, data: bytes) -> None: ...
    def upstream_eof(self) -> None: ...
    def upstream_lost(self, error: Exception | None) -> None: ...
    def upstream_full(self) -> None: ...
    def upstream_drained(self) -> None: ...


class Idle:
    """Connections to the server of this node, for a caller; in their pool."""

    def __init__(self, work: Legwork, count: int = 1, address: str = "10.9.9.9") -> None:
        self.work = work
        self.caller = Caller(work.client.spiffe, work.client.identity, address, 4711, None)
        self.endpoint = Endpoint("Workload/shop/near-1", "127.0.0.1", work.near.port, True)
        self.pool = cast(Pool, work.rig.call(lambda: work.worker.upstreams.pool(self.caller, self.endpoint)))
        upstreams = work.worker.upstreams
        opened = cast(
            list[UpstreamConnection],
            work.rig.call(lambda: [upstreams.open(self.pool, self.caller, 0, Nobody()) for _ in range(count)]),
        )
        wait_for(lambda: all(one.transport is not None for one in opened), "the connections")
        self.all = opened
        work.rig.call(lambda: [upstreams.keep(one) for one in opened])
        self.used(*opened)

    def used(self, *which: UpstreamConnection) -> None:
        for one in which:
            one.heard = perf_counter()

    def busy(self) -> None:
        for _ in range(2):
            self.work.look()


def test_a_servers_connection_is_asked_for_out_of_its_pool(work: Legwork) -> None:
    idle = Idle(work)
    (connection,) = idle.all
    work.look()
    work.turns()
    assert idle.pool.idle == [connection] and not work.asked
    work.look()
    wait_for(lambda: work.asked, "Leg")
    (leg,) = work.asked
    assert (leg.workload, leg.dialled) == ("Workload/shop/near-1", True)
    wait_for(lambda: work.peers == [("127.0.0.1", work.near.port)], "its descriptor")
    assert not idle.pool.idle and idle.pool.open == 1  # nobody writes on it
    work.answer()
    wait_for(lambda: idle.pool.idle == [connection], "it back")
    assert connection.leg == LEG_MADE and work.made() == 1
    idle.busy()
    work.turns()
    assert len(work.asked) == 1 and idle.pool.idle == [connection]
    work.rig.call(connection.close)
    wait_for(lambda: not idle.pool.open, "the end")
    work.rig.sweep()
    wait_for(lambda: work.unlegged == [leg.number], "Unleg")


@pytest.mark.parametrize("how", ["refused", "unanswered", "relinked"])
def test_it_comes_back_to_its_pool(work: Legwork, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "unanswered":
        monkeypatch.setattr(module, "LEG_ANSWER_S", 0.01)
    idle = Idle(work)
    idle.busy()
    wait_for(lambda: work.asked, "Leg")
    if how == "refused":
        work.answer(False, "off")
    elif how == "relinked":
        work.rig.relink()
    wait_for(lambda: idle.pool.idle == idle.all, "it back")
    assert idle.all[0].leg == (LEG_NEW if how == "relinked" else LEG_REFUSED)
    assert (idle.pool.open, idle.pool.account.descriptors) == (1, 1) and not idle.all[0].lost
    idle.busy()
    work.turns()
    if how == "relinked":
        wait_for(lambda: work.asked, "Leg")  # by the new agent
    assert len(work.asked) == 1


@pytest.mark.parametrize("how", ["closed", "spoke", "cut"])
@pytest.mark.parametrize("made", [True, False])
def test_a_server_that_ends_while_it_is_asked_for(work: Legwork, how: str, made: bool) -> None:
    idle = Idle(work)
    idle.busy()
    wait_for(lambda: work.asked, "Leg")
    wait_for(lambda: work.near.connections, "the server's side")
    (server,) = work.near.connections
    if how == "closed":
        server.close()
    elif how == "spoke":
        server.sendall(b"unasked")
    else:
        work.rig.call(idle.all[0].abort)
    wait_for(lambda: not idle.pool.open, "the end")
    work.rig.sweep()
    assert idle.pool.retired  # and swept away
    work.answer(made, "" if made else "not_established")
    work.turns()
    work.rig.sweep()
    wait_for(lambda: bool(work.unlegged) is made, "Unleg")
    assert not idle.pool.idle and not idle.pool.open and not idle.pool.account.descriptors and work.made() == 0


def test_a_full_pool_takes_it_back_only_to_close_it(work: Legwork) -> None:
    idle = Idle(work)
    idle.busy()
    wait_for(lambda: work.asked, "Leg")
    others = [cast(UpstreamConnection, object())] * IDLE_PER_POOL_MAX
    idle.pool.idle.extend(others)
    work.answer()
    wait_for(lambda: not idle.pool.open, "the end")
    idle.pool.idle.clear()
    work.rig.sweep()
    wait_for(lambda: work.unlegged, "Unleg")


def test_an_endpoint_that_is_removed_meanwhile(work: Legwork, mesh: Mesh) -> None:
    idle = Idle(work)
    idle.busy()
    wait_for(lambda: work.asked, "Leg")
    mesh.items = [item for item in mesh.items if key_of(item) != idle.endpoint.key]
    work.rig.update()
    work.answer()
    wait_for(lambda: work.made() == 1, "the leg")
    work.rig.sweep(100.0)  # it idles, as what was in use at that moment
    wait_for(lambda: not idle.pool.open, "the end")
    work.rig.sweep()
    wait_for(lambda: work.unlegged, "Unleg")
    work.rig.sweep()
    assert idle.pool.retired and not idle.pool.account.descriptors


def test_only_a_part_of_a_pool_is_asked_for_at_once(work: Legwork) -> None:
    """Requests that find none would dial more."""
    idle = Idle(work, 8)
    idle.busy()
    wait_for(lambda: len(work.asked) == 3, "Leg")
    work.turns()
    assert len(work.asked) == 3 and len(idle.pool.idle) == 5
    idle.used(*idle.pool.idle)
    work.look()
    wait_for(lambda: len(work.asked) == 5, "Leg")
    for leg in work.asked:
        work.answer(number=leg.number)
    wait_for(lambda: len(idle.pool.idle) == 8, "them back")
    assert {id(one) for one in idle.pool.idle} == {id(one) for one in idle.all}


def test_of_a_pool_only_what_is_used_is_asked_for(work: Legwork) -> None:
    idle = Idle(work, 8)
    for one in idle.all[:-1]:
        one.heard = 1.0
    idle.all[-1].heard = LATER
    work.look(5.0)  # all of them were heard until here
    work.look(5.0)
    wait_for(lambda: work.asked, "Leg")
    work.turns()
    assert len(work.asked) == 1 and idle.pool.idle == idle.all[:-1]


@pytest.mark.parametrize("where", ["account", "pool", "asks"])
def test_none_is_taken_where_none_can_be_had_instead(work: Legwork, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A request would be refused for it."""
    idle = Idle(work)
    if where == "account":
        idle.pool.account.budget = Budget(descriptors=1)
    elif where == "pool":
        monkeypatch.setattr(module, "OPEN_PER_POOL_MAX", 1)
    else:
        monkeypatch.setattr(module, "LEG_ASKS_MAX", 0)
    for _ in range(3):
        work.look()
    work.turns()
    assert not work.asked and idle.pool.idle == idle.all


@pytest.mark.parametrize("why", ["from here", "elsewhere", "workload", "unused", "once", "lost", "unsent"])
def test_servers_connections_that_are_not_asked_for(work: Legwork, mesh: Mesh, why: str) -> None:
    if why == "workload":
        mesh.items = [replace(i, express="off") if key_of(i) == "Workload/shop/near-1" else i for i in mesh.items]
        work.rig.update()
    idle = Idle(work, address="127.0.0.1" if why == "from here" else "10.9.9.9")
    (connection,) = idle.all
    if why == "elsewhere":
        idle.pool.endpoint = Endpoint(idle.endpoint.key, idle.endpoint.address, idle.endpoint.port, False)
    elif why == "lost":
        connection.lost = True
    elif why == "unsent":
        connection.transport = cast(asyncio.Transport, Unsent(connection.transport))
    elif why == "unused":
        work.look(LATER)
    work.look(LATER if why in ("unused", "once") else 0.0)
    if why == "unused":
        work.look(LATER)
    work.look()
    work.turns()
    assert not work.asked and idle.pool.idle == idle.all
    connection.lost = False


def test_one_that_is_in_use_is_busy_and_asked_for_at_rest(work: Legwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express_session, "LASTING_EXCHANGES", 1000)
    monkeypatch.setattr(work.legs, "_from_afar", lambda _pool: True)
    talk = Talk(work, work.here)
    for _ in range(3):
        talk.ask()
        work.look()
        work.turns()
        assert not work.asked
        talk.reply()
    work.turns()
    work.look()
    wait_for(lambda: work.asked, "Leg")
    assert work.asked[0].dialled
    talk.sock.close()


def test_two_looks_that_are_not_in_a_row(work: Legwork) -> None:
    Idle(work)
    work.look(LATER)
    work.look(0.0)  # nothing was heard since
    work.look()
    work.turns()
    assert not work.asked
    work.look()
    wait_for(lambda: work.asked, "Leg")


def test_it_looks_by_itself_once_it_is_linked(mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    work = Legwork(mesh, start, serve)
    seen: list[float] = []
    monkeypatch.setattr(work.legs, "look", seen.append)
    wait_for(lambda: len(seen) > 2, "looks")
    assert seen == sorted(seen) and perf_counter() - seen[0] < 60


def test_numbers_tell_workers_and_their_lives_apart() -> None:
    first = set()
    for index in (0, 1, 1):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            worker = Worker(index, ours, kernel=FakeKernel())
            assert worker.legs._number >> 48 == index
            first.add(worker.legs._number)
    assert len(first) == 3


def test_what_is_of_no_leg_is_not_taken(work: Legwork) -> None:
    assert not work.legs.hear(link.Lease(1))
    assert work.rig.call(lambda: work.legs.hear(link.Legged(12345, True)))
    assert work.made() == 0
