"""What a worker's pairs share: several endpoints, a predecessor's pairs, limits, and the budget that the kernel knows."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from time import perf_counter

import pytest

from l7proxy import express_asking
from l7proxy import session as session_module
from l7proxy.express import RESPONSE_BODY, View
from l7proxy.express_session import Pair
from l7proxy.session import HttpSession
from mesh import link
from mesh.link import PairEnd
from mesh.model import Backend, Config, Route, RouteRule, key_of
from tests.l7proxy.express_rig import ARM, HOLD, REST, TAKE, Dialogue, Express, ExpressKernel, express_world, get
from tests.l7proxy.rig import Mesh, Rig, Server, ok, open_fds, read_head, read_response, wait_for
from tests.l7proxy.test_worker import metric, reason

Start = Callable[..., Rig]
Serve = Callable[[Server], Server]


def two_endpoints(mesh: Mesh, start: Start, serve: Serve) -> Express:
    """Of one service, by the way of two backends: each has a port of its own."""
    servers = [serve(Server(lambda connection: None)) for _ in range(2)]
    client, web = mesh.workload("client-1", "client"), mesh.service("web", [servers[0].port])
    other = mesh.service("other", [servers[1].port])
    mesh.allow("web", "client")
    mesh.allow("other", "client")
    backends = (Backend(key_of(web), 80), Backend(key_of(other), 80))
    mesh.add(Route("split", "shop", ((key_of(web), 0),), (RouteRule((), backends),)))
    kernel = ExpressKernel()
    return Express(start(mesh, kernel), kernel, client, web, servers)


def ends(express: Express) -> tuple[PairEnd, PairEnd]:
    web, other = (server.port for server in express.servers)
    return PairEnd("Workload/shop/web-1", web), PairEnd("Workload/shop/other-1", other)


def test_missing_endpoints_are_dialled_and_paired_too(mesh: Mesh, start: Start, serve: Serve) -> None:
    express = two_endpoints(mesh, start, serve)
    both = ends(express)
    slots = dict(zip(both, (0, 1), strict=True))
    express.answer = lambda pair: link.Paired(
        pair.session, True, tuple(slots[e] for e in pair.endpoints), tuple(e for e in both if e not in pair.endpoints)
    )
    talk = express.dialogue()
    wait_for(lambda: len(express.pairs) == 2, "the second pair")
    first, second = express.pairs
    assert second.session == first.session
    assert set(second.endpoints) == set(both) and second.endpoints[0] == first.endpoints[0]
    wait_for(lambda: {op.slot for op in express.kernel.of(ARM)} == {0, 1}, "both slots armed")
    wait_for(lambda: [server.accepted for server in express.servers] == [1, 1], "both servers")
    for _ in range(12):
        talk.exchange()
    assert [server.accepted for server in express.servers] == [1, 1]  # by its own connections, whichever is drawn
    talk.begin(slot=1, handed=True)
    connection = express.servers[1].connections[0]
    connection.sendall(ok(b"from the other"))
    assert read_response(talk.sock)[2] == b"from the other"
    talk.sock.close()
    wait_for(express.unpaired, "Unpair")
    express.close()


def test_it_waits_for_the_kernel_before_it_is_paired_anew(mesh: Mesh, start: Start, serve: Serve) -> None:
    express = two_endpoints(mesh, start, serve)
    both = ends(express)
    slots = dict(zip(both, (0, 1), strict=True))
    express.answer = lambda pair: link.Paired(pair.session, True, tuple(slots[e] for e in pair.endpoints))
    talk = express.dialogue()
    has = both.index(express.pairs[0].endpoints[0])
    talk.begin(slot=has)
    express.rig.agent.send(link.Paired(express.pairs[0].session, True, (), (both[1 - has],)))
    wait_for(lambda: express.kernel.of(HOLD), "HOLD")
    assert len(express.pairs) == 1
    talk.change(handed=True)
    talk.server.sendall(ok(b"two"))
    assert read_response(talk.sock)[2] == b"two"
    wait_for(lambda: len(express.pairs) == 2, "the second pair")
    wait_for(lambda: len(express.kernel.of(ARM)) == 3, "both slots armed")
    talk.sock.close()
    express.close()


def test_an_upstream_that_the_agent_refuses_goes_to_the_pool(mesh: Mesh, start: Start, serve: Serve) -> None:
    express = two_endpoints(mesh, start, serve)
    both = ends(express)
    first = express.answer

    def answer(pair: link.Pair) -> link.Paired:
        if len(pair.endpoints) == 1:
            return link.Paired(pair.session, True, (0,), tuple(e for e in both if e not in pair.endpoints))
        return link.Paired(pair.session, True, (0, -1))

    assert first is not None
    express.answer = answer
    talk = express.dialogue()
    wait_for(lambda: len(express.pairs) == 2, "the second pair")
    wait_for(lambda: len(express.kernel.of(ARM)) == 2, "the slot armed anew")
    assert {op.slot for op in express.kernel.of(ARM)} == {0}
    talk.exchange()
    talk.sock.close()
    express.close()


class Unpaired(Dialogue):
    def __init__(self, express: Express) -> None:
        self.express, self.kernel, self.sent, self.got = express, express.kernel, 0, 0
        self.sock = express.rig.connect(express.client, express.web)
        self.port = self.sock.getsockname()[1]


def test_what_is_refused_for_a_while_is_asked_again(express: Express, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by an agent that starts and has no state yet; after a few times not at every exchange."""
    monkeypatch.setattr(express_asking, "AGAIN_S", 0.3)
    paired, express.answer = express.answer, lambda pair: link.Paired(pair.session, False, reason="no_state")
    talk, asked = Unpaired(express), list[float]()

    def goes_on() -> int:
        talk.exchange()
        asked.extend([perf_counter()] * (len(express.pairs) - len(asked)))
        return len(asked)

    wait_for(lambda: goes_on() == 5, "it asks again, and again")
    assert asked[4] - asked[3] > 0.2
    express.answer = paired
    wait_for(lambda: goes_on() and express.events().get("express_paired"), "a pair")
    talk.sock.close()


def test_over_the_rate_of_the_kernel_is_429(express: Express) -> None:
    talk = express.dialogue()
    express.kernel.views[talk.port] = View(-1, punt="rate")
    talk.sock.sendall(get())
    status, head, _ = read_response(talk.sock)
    assert (status, reason(head)) == (429, "budget_requests")
    express.kernel.views[talk.port] = REST
    assert express.events()["express_punt_rate"] == 1
    talk.sock.close()


def over_budget(express: Express, talk: Dialogue) -> HttpSession:
    """The next request of a session that is to be paired anew is one too many."""
    (session,) = express.rig.worker.sessions
    assert isinstance(session, HttpSession) and isinstance(session.pair, Pair)
    session.pair.more = True
    express.rig.call(lambda: session.account.requesting.empty(perf_counter() + 60))
    talk.sock.sendall(get())
    assert read_response(talk.sock)[0] == 429
    for _ in range(4):
        express.rig.call(lambda: None)
    return session


def test_after_a_429_it_is_not_read_for_a_while_whatever_the_agent_says(
    express: Express, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not paired meanwhile: the answer would have it read again at once."""
    monkeypatch.setattr(session_module, "PARKED_S", 3600.0)
    talk = express.dialogue()
    session = over_budget(express, talk)
    express.rig.call(lambda: session.pair.again())  # type: ignore[union-attr]  # as a sweep does
    express.rig.call(lambda: session.resume_client())
    assert len(express.pairs) == 1 and not session.transport.is_reading()
    express.rig.call(session._unpark)
    assert session.transport.is_reading()
    session.account.requesting._at = 0.0
    talk.exchange()
    wait_for(lambda: len(express.kernel.of(ARM)) == 2, "the pair anew")
    assert len(express.pairs) == 2
    talk.sock.close()


def test_what_comes_while_the_kernel_takes_it_over_is_not_read_when_a_429_is_past(
    express: Express, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's answer would be written to a socket whose application can not ask how much there is to read."""
    monkeypatch.setattr(session_module, "PARKED_S", 0.01)
    monkeypatch.setattr(express_asking, "ANSWER_S", 3600.0)
    talk = express.dialogue()
    express.answer = lambda _pair: None
    session = over_budget(express, talk)
    wait_for(lambda: session.transport.is_reading(), "the end of that while")
    session.account.requesting._at = 0.0
    talk.exchange()
    wait_for(lambda: len(express.pairs) == 2, "the question")
    assert not session.transport.is_reading()
    talk.sock.sendall(get("/waits"))
    (asked,) = express.pairs[1:]
    express.kernel.views[talk.port] = REST
    express.rig.agent.send(link.Paired(asked.session, True, (0,)))
    assert talk.reached(get("/waits"))
    assert "express_refused_client_spoke" not in express.events() and not express.unpaired()
    talk.sock.close()


def test_off_by_the_mesh_the_service_or_a_workload(mesh: Mesh, start: Start, serve: Serve) -> None:
    mesh.config = Config(trust_domain="mesh.local", express="off")
    express = express_world(mesh, start, serve)
    with express.rig.connect(express.client, express.web) as sock:
        for _ in range(3):
            sock.sendall(get())
            wait_for(lambda: express.servers[0].connections, "the connection")
            assert read_head(express.servers[0].connections[0])[0] == get()
            express.servers[0].connections[0].sendall(ok(b"one"))
            assert read_response(sock)[0] == 200
        assert not express.pairs
        mesh.config = Config(trust_domain="mesh.local")
        express.rig.update()
        for _ in range(2):  # what is open already may be paired now
            sock.sendall(get())
            read_head(express.servers[0].connections[0])
            express.servers[0].connections[0].sendall(ok(b"one"))
            read_response(sock)
        wait_for(lambda: express.kernel.of(ARM), "the pair")
        mesh.config = Config(trust_domain="mesh.local", express="off")
        express.rig.update()
        wait_for(express.unpaired, "Unpair")
    express.close()


def test_many_pairs_come_and_go_without_a_descriptor_lost(express: Express) -> None:
    def come_and_go(*, talks: bool) -> None:
        talk = express.dialogue()
        if talks:
            talk.exchange()
        talk.sock.close()
        assert talk.server.recv(1) == b""
        talk.server.close()

    come_and_go(talks=False)
    wait_for(lambda: len(express.unpaired()) == 1, "Unpair")
    before = open_fds()
    for _ in range(20):
        come_and_go(talks=True)
    wait_for(lambda: len(express.unpaired()) == 21, "Unpair")
    wait_for(lambda: open_fds() <= before, "the descriptors")
    assert express.servers[0].accepted == 21
    assert metric(express.rig, "pillion_express_pairs") == 0


# ---- a planned end


def unread(express: Express, session: int) -> bytes:
    """What waits on the client's connection for whoever reads it next."""
    with socket.socket(fileno=os.dup(express.fds[session][0])) as accepted:
        accepted.setblocking(False)
        return accepted.recv(65536, socket.MSG_PEEK)


def ended(express: Express) -> None:
    """The worker stops, as by SIGTERM; until it is gone."""
    express.rig.worker.loop.call_soon_threadsafe(express.rig.worker.stop)
    wait_for(lambda: not express.rig.thread.is_alive(), "the worker's end")


def test_what_is_paired_is_left_to_the_next_worker(express: Express) -> None:
    """At once, and nobody notices: what comes meanwhile waits."""
    talk = express.dialogue()
    (pair,) = express.pairs
    ended(express)
    talk.sock.sendall(get("/waits"))
    wait_for(lambda: unread(express, pair.session) == get("/waits"), "the request")
    assert not express.unpaired() and not express.kernel.of(HOLD)
    talk.sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        talk.sock.recv(1)
    talk.sock.close()


def test_what_is_being_answered_is_left_when_it_rests(express: Express) -> None:
    talk = express.dialogue()
    (pair,) = express.pairs
    talk.sock.sendall(get("/slow"))
    talk.reached(get("/slow"))
    express.rig.worker.loop.call_soon_threadsafe(express.rig.worker.stop)
    wait_for(lambda: express.rig.worker.draining, "the drain")
    talk.server.sendall(ok(b"two"))
    status, head, body = read_response(talk.sock)
    assert (status, body) == (200, b"two") and b"close" not in head.lower()
    wait_for(lambda: not express.rig.thread.is_alive(), "the worker's end")
    talk.sock.sendall(get("/waits"))
    wait_for(lambda: unread(express, pair.session) == get("/waits"), "the request")
    assert not express.unpaired() and len(express.kernel.of(ARM)) == 2
    talk.sock.close()


def test_with_a_successor_it_is_left_while_the_worker_lives_on(express: Express) -> None:
    """And told of, with nothing of it kept here; until the successor serves, it is this worker's as before."""
    talk, other = express.dialogue(), express.dialogue()
    one, two = express.pairs
    worker, agent = express.rig.worker, express.rig.agent
    other.sock.sendall(get("/slow"))
    other.reached(get("/slow"))
    worker.loop.call_soon_threadsafe(worker.ending.retire, 60.0)
    wait_for(lambda: agent.of(link.Leaving), "the word to the agent")
    assert not agent.of(link.Left)
    agent.send(link.Drain(60.0))
    wait_for(lambda: agent.of(link.Left), "what rests is left")
    assert agent.of(link.Left) == [link.Left(one.session)] and express.rig.thread.is_alive()
    talk.sock.sendall(get("/waits"))
    wait_for(lambda: unread(express, one.session) == get("/waits"), "the request, for whoever comes")
    other.server.sendall(ok(b"two"))
    assert read_response(other.sock)[2] == b"two"
    wait_for(lambda: not express.rig.thread.is_alive(), "the worker's end")
    assert agent.of(link.Left) == [link.Left(one.session), link.Left(two.session)] and not express.unpaired()
    talk.sock.close()
    other.sock.close()


def test_an_exchange_of_the_kernels_goes_on(express: Express) -> None:
    talk = express.dialogue()
    talk.begin()
    ended(express)
    assert not express.unpaired() and not express.kernel.of(TAKE)
    talk.sock.close()


@pytest.mark.parametrize("how", ["without an agent", "for good"])
def test_where_nobody_comes_after_it_connections_end(express: Express, how: str) -> None:
    talk = express.dialogue()
    if how == "for good":
        express.rig.agent.send(link.Drain(2.0))
        wait_for(express.unpaired, "Unpair")
    else:
        express.rig.agent.close()
        express.close()
        express.rig.worker.loop.call_soon_threadsafe(express.rig.worker.stop)
    assert talk.sock.recv(1) == b""
    talk.sock.close()


# ---- takeover


def taken(express: Express, *, view: View = REST, session: int = 77) -> tuple[socket.socket, socket.socket, list[int]]:
    """The agent's copies of a former worker's pair: client, server, and what is sent."""
    listener = socket.socket()
    number = express.rig.listen(express.client, express.web)
    listener.bind(("127.0.0.1", 0))
    express.kernel.dialled[listener.getsockname()[1]] = express.kernel.dialled[number]
    listener.listen()
    client = socket.create_connection(listener.getsockname())
    client.settimeout(5)
    accepted, _ = listener.accept()
    upstream = socket.create_connection(("127.0.0.1", express.servers[0].port))
    wait_for(lambda: express.servers[0].connections, "the server's side")
    express.kernel.views[client.getsockname()[1]] = view
    fds = [accepted.detach(), upstream.detach()]
    express.fds[session] = fds
    listener.close()
    end = PairEnd("Workload/shop/web-1", express.servers[0].port)
    express.rig.agent.send(link.Takeover(session, "Service/shop/web", 80, "Workload/shop/client-1", (end,), (0,)), fds)
    return client, express.servers[0].connections[-1], fds


def test_a_pair_of_a_former_worker_is_taken_over(express: Express) -> None:
    client, server, _ = taken(express)
    wait_for(lambda: express.kernel.of(ARM), "the arm")
    assert [op.op for op in express.kernel.ops] == [HOLD, HOLD, ARM]
    (pair,) = express.pairs
    assert (pair.session, pair.endpoints) == (77, (PairEnd("Workload/shop/web-1", express.servers[0].port),))
    client.sendall(get())
    assert read_head(server)[0] == get()
    server.sendall(ok(b"one"))
    assert read_response(client)[2] == b"one"
    wait_for(lambda: len(express.kernel.of(ARM)) == 2, "the next arm")
    assert express.servers[0].accepted == 1
    assert express.events()["express_takeover"] == 1
    client.close()
    wait_for(lambda: express.unpaired() == [77], "Unpair")


def test_a_takeover_in_the_middle_of_an_exchange(express: Express) -> None:
    running = View(0, phase=RESPONSE_BODY, head=get("/fast"), status=200, resp_left=4, handed=True, started=1.0)
    client, server, _ = taken(express, view=running)
    server.sendall(b"rest")
    assert client.recv(4, socket.MSG_WAITALL) == b"rest"
    wait_for(lambda: express.kernel.of(ARM), "the arm")
    assert len(express.kernel.of(TAKE)) == 1
    assert len(express.pairs) == 1
    assert metric(express.rig, "pillion_requests_total", code="200", path_kind="local") == 1
    client.close()


def test_a_takeover_with_a_request_that_waits(express: Express) -> None:
    number = express.rig.listen(express.client, express.web)
    assert number
    client, server, _ = taken(express)
    client.sendall(get("/waits"))
    assert read_head(server)[0] == get("/waits")
    server.sendall(ok(b"one"))
    assert read_response(client)[2] == b"one"
    wait_for(lambda: express.kernel.of(ARM), "the arm")
    client.close()


@pytest.mark.parametrize("wrong", ["caller", "service", "count"])
def test_a_takeover_that_does_not_fit_is_refused(express: Express, wrong: str) -> None:
    sock = socket.socket()
    fds = [sock.detach(), os.open("/dev/null", os.O_RDONLY)]
    message = link.Takeover(78, "Service/shop/web", 80, "Workload/shop/client-1", (PairEnd("Workload/shop/web-1", 1),), (0,))
    if wrong == "count":
        fds.append(os.open("/dev/null", os.O_RDONLY))
    express.rig.agent.send(message, fds)
    for fd in fds:
        os.close(fd)
    wait_for(lambda: express.unpaired() == [78], "Unpair")
    assert express.events()["express_takeover_refused"] == 1


def test_an_agent_that_offers_what_is_ours_already(express: Express) -> None:
    talk, gone = express.dialogue(), express.dialogue()
    mine, past = (pair.session for pair in express.pairs)
    gone.sock.close()
    wait_for(lambda: express.unpaired() == [past], "Unpair")
    for session in (mine, past):
        fds = [socket.socket().detach() for _ in range(2)]
        express.rig.agent.send(link.Takeover(session, "Service/shop/web", 80, "Workload/shop/client-1", (), ()), fds)
        for fd in fds:
            os.close(fd)
    wait_for(lambda: express.unpaired() == [past, past], "Unpair")
    talk.exchange()
    assert len(express.rig.worker.sessions) == 1
    talk.sock.close()


def test_no_agent_no_question(express: Express) -> None:
    with express.rig.connect(express.client, express.web) as sock:
        for n in range(3):
            sock.sendall(get())
            wait_for(lambda: express.servers[0].connections, "the connection")
            assert read_head(express.servers[0].connections[0])[0] == get()
            if not n:
                express.rig.agent.close()
            express.servers[0].connections[0].sendall(ok(b"one"))
            assert read_response(sock)[0] == 200
    assert not express.pairs
