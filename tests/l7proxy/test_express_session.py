"""Paired sessions against a kernel that a test speaks for: each case is a dialogue of client, kernel and server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from l7proxy import express_session
from l7proxy.express import ANSWER_BYTES_MAX, FUTILE_MAX, REQUEST_BODY, RESPONSE_BODY, View
from l7proxy.transport import SocketTransport
from mesh import link
from tests.l7proxy.express_rig import ARM, HOLD, TAKE, Dialogue, Express, Op, express_world, get
from tests.l7proxy.rig import Mesh, Rig, Server, ok, read_all, read_head, read_response, wait_for
from tests.l7proxy.test_worker import metric, reason

Start = Callable[..., Rig]
Serve = Callable[[Server], Server]


@pytest.fixture
def talk(express: Express) -> Iterator[Dialogue]:
    found = express.dialogue()
    yield found
    found.sock.close()


def requests(express: Express, code: int = 200) -> float:
    return metric(express.rig, "pillion_requests_total", code=str(code), path_kind="local")


# ---- pairing


def test_the_first_exchange_over_the_session_is_paired_and_armed(express: Express, talk: Dialogue) -> None:
    (pair,) = express.pairs
    assert (pair.service, pair.port, pair.caller) == ("Service/shop/web", 80, "Workload/shop/client-1")
    assert pair.endpoints == (link.PairEnd("Workload/shop/web-1", express.servers[0].port),)
    assert express.kernel.ops == [Op(ARM, 0, 0, 0, 0, 0)]
    accepted, upstream = (socket.socket(fileno=fd) for fd in express.fds[pair.session])
    assert accepted.getpeername() == talk.sock.getsockname()
    assert upstream.getpeername()[1] == express.servers[0].port
    for sock in (accepted, upstream):
        sock.detach()
    assert metric(express.rig, "pillion_express_pairs") == 1
    assert express.events()["express_paired"] == 1


def test_it_is_armed_before_the_last_bytes_leave(express: Express, talk: Dialogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks again as soon as it has them."""
    order: list[str] = []
    say, write = express.kernel.express_op, SocketTransport.write

    def listen(sock: object, op: int, *values: int) -> bool:
        if op == ARM:
            order.append("armed")
        return say(sock, op, *values)

    def send(transport: SocketTransport, data: bytes) -> None:
        if data == ok(b"one"):
            order.append("written")
        write(transport, data)

    monkeypatch.setattr(express.rig.worker, "flow_budget", 0)  # of none is told: the short way
    before = len(express.kernel.of(ARM))
    for _ in range(3):
        talk.exchange()  # heads are known after the first
    wait_for(lambda: len(express.kernel.of(ARM)) == before + 3, "the pair to be armed after each")
    monkeypatch.setattr(express.kernel, "express_op", listen)
    monkeypatch.setattr(SocketTransport, "write", send)
    before = len(express.kernel.ops)
    talk.exchange()
    wait_for(lambda: len(order) > 1, "the pair to be armed")
    assert order == ["armed", "written"]
    (last,) = express.kernel.ops[before:]
    first = express.kernel.ops[before - 1]
    size = last.sent - first.sent
    assert (last.consumed - first.consumed, size) == (len(get()), len(ok(b"one")))
    talk.exchange()


def test_a_connection_is_paired_once_it_has_shown_that_it_lasts(
    mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(express_session, "LASTING_EXCHANGES", 5)
    monkeypatch.setattr(express_session, "LASTING_S", 3600.0)
    express = express_world(mesh, start, serve)
    with express.rig.connect(express.client, express.web) as sock:
        for n in range(5):
            assert not express.pairs, n
            sock.sendall(get())
            (connection,) = wait_connections(express, 1)
            read_head(connection)
            connection.sendall(ok(b"one"))
            read_response(sock)
        wait_for(lambda: express.pairs, "the session to be paired")
    express.close()


def test_a_connection_is_paired_for_answers_that_the_kernel_carries(
    mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(express_session, "LASTING_EXCHANGES", 3)
    monkeypatch.setattr(express_session, "LASTING_S", -1.0)
    monkeypatch.setattr(express_session, "BRIEF_MANY", 0)
    express = express_world(mesh, start, serve)
    long = ok(b"x" * (ANSWER_BYTES_MAX + 1))
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n0\r\n\r\n"
    with express.rig.connect(express.client, express.web) as sock:
        for n, answer in enumerate([long, chunks] * 4 + [ok(b"one")] * int(3 * express_session.BRIEF_TIMES + 0.5)):
            assert not express.pairs, n
            sock.sendall(get())
            (connection,) = wait_connections(express, 1)
            read_head(connection)
            connection.sendall(answer)
            read_response(sock)
        wait_for(lambda: express.pairs, "the session to be paired")
    express.close()


def test_an_old_connection_is_paired_at_its_next_exchange(
    mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(express_session, "LASTING_EXCHANGES", 100)
    monkeypatch.setattr(express_session, "LASTING_S", -1.0)
    express = express_world(mesh, start, serve)
    found = express.dialogue()
    assert len(express.pairs) == 1
    found.sock.close()
    express.close()


def test_where_connections_are_brief_it_takes_more_to_be_paired(
    mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(express_session, "LASTING_EXCHANGES", 4)
    monkeypatch.setattr(express_session, "LASTING_S", -1.0)
    monkeypatch.setattr(express_session, "VAIN_S", 3600.0)
    enough = int(4 * express_session.BRIEF_TIMES)
    express = express_world(mesh, start, serve)
    servers = express.servers[0].connections

    def exchanges(count: int, *, last: bool = False) -> None:
        with express.rig.connect(express.client, express.web) as sock:
            for n in range(count):
                sock.sendall(get("/", *(("Connection: close",) if last and n == count - 1 else ())))
                (connection,) = wait_connections(express, 1)
                read_head(connection)
                connection.sendall(ok(b"one"))
                read_response(sock)
            if last:
                assert read_all(sock) == b""

    def paired(count: int) -> None:
        number = len(express.pairs)
        exchanges(count)
        wait_for(lambda: len(express.unpaired()) == number + 1, "Unpair")
        assert servers.pop().recv(1) == b""

    for _ in range(express_session.BRIEF_MANY):
        paired(1)
    exchanges(enough, last=True)
    assert len(express.pairs) == express_session.BRIEF_MANY
    monkeypatch.setattr(express_session, "VAIN_S", -1.0)
    paired(enough)  # that one lasts
    paired(1)
    for _ in range(express_session.BRIEF_MANY):
        exchanges(1, last=True)
    number = len(express.pairs)
    exchanges(enough, last=True)
    assert len(express.pairs) == number
    express.close()


def test_every_exchange_through_user_space_arms_it_anew_with_its_bytes(express: Express, talk: Dialogue) -> None:
    asked, answered = get("/a"), ok(b"x" * 100)
    for n in (1, 2, 3):
        talk.exchange(asked, answered)
        wait_for(lambda n=n: len(express.kernel.ops) == 1 + n, "the next arm")  # type: ignore[misc]
        up, down = n * len(asked), n * len(answered)
        assert express.kernel.ops[-1] == Op(ARM, 0, up, down, up, down)
    assert express.servers[0].accepted == 1
    assert len(express.pairs) == 1
    assert requests(express) == 4
    assert sum(count for name, count in express.events().items() if name.startswith("express_punt")) == 3


def test_a_refused_session_goes_on_in_user_space(mesh: Mesh, start: Start, serve: Serve) -> None:
    express = express_world(mesh, start, serve)
    express.answer = lambda pair: link.Paired(pair.session, False, reason="regex", lasting=True)
    for n in range(2):
        with express.rig.connect(express.client, express.web) as sock:
            for _ in range(3):
                sock.sendall(get())
                (connection,) = wait_connections(express, 1)
                assert read_head(connection)[0] == get()
                connection.sendall(ok(b"one"))
                assert read_response(sock)[0] == 200
        assert len(express.pairs) == 1, n  # lasting: nobody asks again
    assert express.events()["express_refused_regex"] == 1
    assert not express.kernel.ops


def wait_connections(express: Express, count: int) -> list[socket.socket]:
    wait_for(lambda: len(express.servers[0].connections) == count, "the server's connections")
    return express.servers[0].connections


# ---- adopting


def test_adopted_at_the_response_head(express: Express, talk: Dialogue) -> None:
    talk.begin(handed=True)
    talk.server.sendall(ok(b"two"))
    assert read_response(talk.sock)[2] == b"two"
    wait_for(lambda: len(express.kernel.of(ARM)) == 2, "the arm after it")
    assert [entry.op for entry in express.kernel.ops] == [ARM, TAKE, ARM]
    assert express.kernel.ops[-1] == Op(ARM, 0, 0, len(ok(b"two")), 0, len(ok(b"two")))
    assert requests(express) == 2
    assert express.events()["express_adopted"] == 1


def test_adopted_in_the_response_body_with_what_is_left_of_it(express: Express, talk: Dialogue) -> None:
    talk.begin(handed=True, phase=RESPONSE_BODY, status=201, resp_left=6)
    talk.server.sendall(b"abc")
    talk.server.sendall(b"def")
    assert talk.sock.recv(3, socket.MSG_WAITALL) == b"abc"
    assert talk.sock.recv(3, socket.MSG_WAITALL) == b"def"
    wait_for(lambda: len(express.kernel.of(ARM)) == 2, "the arm after it")
    assert requests(express, 201) == 1


def test_adopted_in_the_request_body(express: Express, talk: Dialogue) -> None:
    talk.begin(phase=REQUEST_BODY, head=get("/post", "Content-Length: 10", method="POST"), req_left=4)
    talk.sock.sendall(b"6789")
    assert talk.server.recv(4, socket.MSG_WAITALL) == b"6789"
    talk.server.sendall(ok(b"two"))
    assert read_response(talk.sock)[2] == b"two"
    wait_for(lambda: len(express.kernel.of(ARM)) == 2, "the arm after it")
    assert express.kernel.ops[-1] == Op(ARM, 0, 4, len(ok(b"two")), 4, len(ok(b"two")))
    assert requests(express) == 2


def test_an_early_answer_before_the_body_is_whole(express: Express, talk: Dialogue) -> None:
    talk.begin(handed=True, phase=REQUEST_BODY, head=get("/post", "Content-Length: 10", method="POST"), req_left=4)
    talk.server.sendall(ok(b"no thanks"))
    assert read_response(talk.sock)[2] == b"no thanks"
    talk.sock.sendall(b"6789")
    assert read_all(talk.server) == b"6789"  # the rest goes there, but no other request: it might be taken for the body
    talk.exchange()
    assert express.servers[0].accepted == 2


# ---- pipelining and half-close


def test_a_pipelined_request_waits_for_the_answer_before_it(express: Express, talk: Dialogue) -> None:
    talk.begin()
    talk.sock.sendall(get("/next"))
    wait_for(lambda: express.kernel.of(HOLD), "HOLD")
    talk.change(handed=True)
    talk.server.sendall(ok(b"two"))
    assert read_response(talk.sock)[2] == b"two"
    assert read_head(talk.server)[0] == get("/next")
    talk.server.sendall(ok(b"three"))
    assert read_response(talk.sock)[2] == b"three"
    wait_for(lambda: len(express.kernel.of(ARM)) == 2, "the arm after it")


def test_a_pipelined_request_waits_for_an_answer_that_the_kernel_carries(express: Express, talk: Dialogue) -> None:
    talk.begin()
    talk.sock.sendall(get("/next"))
    wait_for(lambda: express.kernel.of(HOLD), "HOLD")
    talk.over()
    assert read_head(talk.server)[0] == get("/next")
    talk.server.sendall(ok(b"three"))
    assert read_response(talk.sock)[2] == b"three"
    assert requests(express) == 2  # the one in between is the kernel's to count


def test_a_body_waits_for_its_head(express: Express, talk: Dialogue) -> None:
    """The kernel has judged the head, and the thread that sent it is not done: what is passed on now would come first."""
    head = get("/fast", "Content-Length: 5", method="POST")
    talk.begin(phase=REQUEST_BODY, head=head, req_left=5, inside=True, torn=True)
    talk.sock.sendall(b"12345")
    wait_for(lambda: express.kernel.of(HOLD), "HOLD")
    assert not express.kernel.of(TAKE)
    talk.change(inside=False, torn=False)
    assert talk.server.recv(5, socket.MSG_WAITALL) == b"12345"
    talk.server.sendall(ok(b"two"))
    assert read_response(talk.sock)[2] == b"two"


def test_nothing_is_passed_on_beside_a_thread_that_may_be_on_its_way(express: Express, talk: Dialogue) -> None:
    head = get("/fast", "Content-Length: 5", method="POST")
    talk.begin(phase=REQUEST_BODY, head=head, req_left=5, handed=True, inside=True, torn=True)
    talk.server.sendall(ok(b"two"))  # before the body
    wait_for(express.unpaired, "Unpair")
    with pytest.raises(ConnectionResetError):
        talk.sock.recv(1)
    assert express.events()["express_adopted"] == 1


def test_a_half_closed_client_gets_its_answer(express: Express, talk: Dialogue) -> None:
    talk.begin()
    talk.sock.shutdown(socket.SHUT_WR)
    wait_for(lambda: express.kernel.of(HOLD), "HOLD")
    talk.change(handed=True)
    talk.server.sendall(ok(b"two"))
    assert read_all(talk.sock) == ok(b"two")
    wait_for(express.unpaired, "Unpair")


def test_a_half_closed_client_is_closed_when_the_kernel_is_done(express: Express, talk: Dialogue) -> None:
    talk.begin()
    talk.sock.shutdown(socket.SHUT_WR)
    wait_for(lambda: express.kernel.of(HOLD), "HOLD")
    talk.over()
    assert read_all(talk.sock) == b""
    wait_for(express.unpaired, "Unpair")
    assert requests(express) == 1


# ---- servers that go


def test_a_safe_request_is_tried_again_when_its_server_closes(express: Express, talk: Dialogue) -> None:
    talk.begin()
    talk.server.shutdown(socket.SHUT_RDWR)
    talk.server.close()
    wait_for(lambda: express.servers[0].accepted == 2, "the second connection")
    connection = talk.reached(get("/fast"))
    connection.sendall(ok(b"again"))
    assert read_response(talk.sock)[2] == b"again"
    assert TAKE in [entry.op for entry in express.kernel.ops]
    wait_for(lambda: len(express.pairs) == 2, "a new pair")
    assert express.unpaired() == [express.pairs[0].session]


@pytest.mark.parametrize("rst", [False, True])
def test_an_unsafe_request_is_answered_502(express: Express, talk: Dialogue, rst: bool) -> None:
    talk.begin(head=get("/post", "Content-Length: 2", method="POST"))
    if rst:
        talk.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    else:
        talk.server.shutdown(socket.SHUT_RDWR)
    talk.server.close()
    status, head, _ = read_response(talk.sock)
    assert (status, reason(head)) == (502, "upstream_reset")
    wait_for(express.unpaired, "Unpair")
    assert read_all(talk.sock) == b""
    assert requests(express, 502) == 1


def test_a_response_that_breaks_off_resets_the_client(express: Express, talk: Dialogue) -> None:
    talk.begin(phase=RESPONSE_BODY, status=200, resp_left=6)
    talk.server.shutdown(socket.SHUT_RDWR)
    talk.server.close()
    wait_for(express.unpaired, "Unpair")
    with pytest.raises(ConnectionResetError):
        talk.sock.recv(1)
    assert requests(express, 0) == 1


def test_an_idle_server_that_closes_unpairs(express: Express, talk: Dialogue) -> None:
    talk.server.shutdown(socket.SHUT_RDWR)
    talk.server.close()
    wait_for(express.unpaired, "Unpair")
    assert HOLD in [entry.op for entry in express.kernel.ops]
    talk.exchange()
    assert express.servers[0].accepted == 2
    wait_for(lambda: len(express.pairs) == 2, "a new pair")


def test_unasked_bytes_of_a_server_end_its_connection(express: Express, talk: Dialogue) -> None:
    talk.server.sendall(ok(b"unasked"))
    wait_for(express.unpaired, "Unpair")
    with pytest.raises(ConnectionResetError):
        talk.server.recv(1)
    assert express.events()["unsolicited_response"] == 1
    talk.exchange()
    assert express.servers[0].accepted == 2


def test_bytes_that_came_before_the_request_are_no_answer(express: Express, talk: Dialogue) -> None:
    talk.begin(handed=True, handed_slow=5)
    talk.server.sendall(ok(b"unasked"))
    wait_for(lambda: express.events().get("unsolicited_response"), "the count")


# ---- time


def test_a_late_answer_is_504(express: Express, talk: Dialogue) -> None:
    talk.begin()
    express.rig.sweep(1.0)
    assert not express.kernel.of(HOLD)
    express.rig.sweep(express.rig.worker.config.mesh.request_timeout_s + 1)
    status, head, _ = read_response(talk.sock)
    assert (status, reason(head)) == (504, "request_timeout")
    wait_for(express.unpaired, "Unpair")
    assert requests(express, 504) == 1


def test_a_paired_session_outlives_the_idle_timeout_while_the_kernel_is_busy_with_it(express: Express, talk: Dialogue) -> None:
    idle = express.rig.worker.config.mesh.idle_timeout_s
    now = float(str(express.rig.call(lambda: express.rig.worker.clock.now)))
    talk.begin(slot=-1, started=now + idle)
    express.rig.sweep(idle + 60)
    assert not express.kernel.of(HOLD)
    express.rig.sweep(3 * idle)
    wait_for(express.unpaired, "Unpair")
    express.rig.sweep(4 * idle)
    assert read_all(talk.sock) == b""


# ---- the agent's answers


def test_a_slow_answer_is_not_waited_for(mesh: Mesh, start: Start, serve: Serve) -> None:
    express = express_world(mesh, start, serve)
    held: list[link.Pair] = []
    express.answer = lambda pair: held.append(pair)
    with express.rig.connect(express.client, express.web) as sock:
        sock.sendall(get())
        (connection,) = wait_connections(express, 1)
        read_head(connection)
        connection.sendall(ok(b"one"))
        read_response(sock)
        wait_for(lambda: held, "the question")
        sock.sendall(get("/meanwhile"))
        assert read_head(connection)[0] == get("/meanwhile")  # after a second
        wait_for(lambda: express.rig.agent.of(link.Unpair), "Unpair")
        express.rig.agent.send(link.Paired(held[0].session, True, (0,)))
        connection.sendall(ok(b"two"))
        assert read_response(sock)[2] == b"two"
    assert express.events()["express_refused_unanswered"] == 1
    express.close()


def test_a_server_lost_while_the_agent_thinks(mesh: Mesh, start: Start, serve: Serve) -> None:
    express = express_world(mesh, start, serve)
    held: list[link.Pair] = []
    express.answer = lambda pair: held.append(pair)
    with express.rig.connect(express.client, express.web) as sock:
        sock.sendall(get())
        (connection,) = wait_connections(express, 1)
        read_head(connection)
        connection.sendall(ok(b"one"))
        read_response(sock)
        wait_for(lambda: held, "the question")
        connection.shutdown(socket.SHUT_RDWR)
        wait_for(lambda: express.rig.agent.of(link.Unpair), "Unpair")
        express.answer = lambda pair: link.Paired(pair.session, True, (0,))
        sock.sendall(get("/next"))
        wait_connections(express, 2)
        assert read_head(express.servers[0].connections[1])[0] == get("/next")
    express.close()


def test_the_agent_wants_it_apart(express: Express, talk: Dialogue) -> None:
    express.rig.agent.send(link.Paired(express.pairs[0].session, False, reason="program", lasting=True))
    wait_for(express.unpaired, "Unpair")
    assert express.kernel.of(HOLD)
    talk.exchange()
    assert express.servers[0].accepted == 1  # the same connection, now of the pool
    assert len(express.pairs) == 1


def test_a_record_that_is_gone(express: Express, talk: Dialogue) -> None:
    talk.forget()
    talk.exchange()
    wait_for(express.unpaired, "Unpair")
    wait_for(lambda: len(express.pairs) == 2, "a new pair")


@pytest.mark.parametrize("noticed", [False, True])
def test_a_record_that_vanishes_under_a_request(express: Express, talk: Dialogue, noticed: bool) -> None:
    """Its answer is nobody else's, and its client is told."""
    talk.begin()
    talk.forget()
    if noticed:
        express.rig.agent.send(link.Paired(express.pairs[0].session, False, reason="moved"))
        wait_for(express.unpaired, "Unpair")
        other = express.dialogue()
        assert express.servers[0].accepted == 2  # not that connection
        other.sock.close()
    talk.server.sendall(ok(b"late"))
    wait_for(lambda: express.pairs[0].session in express.unpaired(), "Unpair")
    with pytest.raises(ConnectionResetError):
        talk.sock.recv(1)
    with pytest.raises(ConnectionResetError):
        talk.server.recv(1)


def test_a_record_that_vanishes_before_a_pipelined_request(express: Express, talk: Dialogue) -> None:
    talk.begin()
    talk.sock.sendall(get("/next"))
    wait_for(lambda: express.kernel.of(HOLD), "HOLD")
    talk.forget()
    wait_for(express.unpaired, "Unpair")
    with pytest.raises(ConnectionResetError):
        talk.sock.recv(1)


def test_an_agent_that_dials_anew_is_told_of_the_pair(express: Express, talk: Dialogue) -> None:
    express.rig.relink()
    wait_for(lambda: len(express.pairs) == 2, "the pair again")
    assert express.pairs[0] == express.pairs[1]
    wait_for(lambda: len(express.kernel.of(ARM)) == 2, "the arm after it")
    talk.exchange()


# ---- the end


def test_a_client_that_closes_takes_its_servers_connection_along(express: Express, talk: Dialogue) -> None:
    talk.sock.close()
    wait_for(express.unpaired, "Unpair")
    assert talk.server.recv(1) == b""  # it stays enrolled: each answer would pass a program that knows nothing of it
    again = express.dialogue()
    assert express.servers[0].accepted == 2
    again.sock.close()


def test_a_client_that_asks_once_is_not_paired(mesh: Mesh, start: Start, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express_session, "LASTING_S", -1.0)  # every other is, at its first exchange
    express = express_world(mesh, start, serve)
    for _ in range(3):
        with express.rig.connect(express.client, express.web) as sock:
            sock.sendall(get("/", "Connection: close"))
            (connection,) = wait_connections(express, 1)
            assert read_head(connection)[0] == get()
            connection.sendall(ok(b"one"))
            _, head, body = read_response(sock)
            assert b"\r\nconnection: close\r\n" in head and body == b"one"
            assert read_all(sock) == b""
    assert not express.pairs
    assert express.servers[0].accepted == 1
    express.close()


def test_a_client_that_vanishes_in_the_middle_is_counted(express: Express, talk: Dialogue) -> None:
    talk.begin()
    talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    talk.sock.close()
    wait_for(express.unpaired, "Unpair")
    assert requests(express, 0) == 1
    with pytest.raises(ConnectionResetError):
        talk.server.recv(1)


def test_an_answer_that_was_faster_than_the_look_is_the_kernels_to_count(express: Express, talk: Dialogue) -> None:
    talk.begin()
    express.kernel.at_take = {"status": 200}
    talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    talk.sock.close()
    wait_for(express.unpaired, "Unpair")
    assert express.kernel.of(TAKE)
    assert requests(express, 0) == 0
    assert requests(express) == 1


def test_what_the_kernel_can_not_carry_is_not_asked_about_for_ever(express: Express, talk: Dialogue) -> None:
    express.kernel.views[talk.port] = View(-1, punt="body", began=1)
    for _ in range(FUTILE_MAX + 2):
        talk.exchange()
    wait_for(express.unpaired, "Unpair")
    for _ in range(5):
        talk.exchange()
    assert len(express.pairs) == 1
    assert express.servers[0].accepted == 1


@pytest.mark.parametrize("punt", ["unsettled", "unclean"])
def test_an_end_that_did_not_rest_is_paired_anew_when_it_does(express: Express, talk: Dialogue, punt: str) -> None:
    for pairs in (2, 2, 2, 2, 3):  # by and by more rarely
        express.kernel.views[talk.port] = View(-1, punt=punt, began=1)
        before = len(express.kernel.of(ARM))
        talk.exchange()
        wait_for(lambda: len(express.kernel.of(ARM)) > before, "the pair to be armed")
        assert len(express.pairs) == pairs
    assert express.servers[0].accepted == 1
    assert len({pair.session for pair in express.pairs}) == 1


def test_an_application_that_wants_a_low_water_mark_is_left_alone(express: Express, talk: Dialogue) -> None:
    express.kernel.views[talk.port] = View(-1, punt="off", off=True)
    talk.exchange()
    wait_for(express.unpaired, "Unpair")
    talk.exchange()
    assert len(express.pairs) == 1


def test_an_arm_that_fails_unpairs(express: Express, talk: Dialogue) -> None:
    express.kernel.refuse = {ARM}
    talk.exchange()
    wait_for(express.unpaired, "Unpair")
    talk.exchange()


def test_draining_lets_go(express: Express, talk: Dialogue) -> None:
    talk.begin()
    express.rig.worker.loop.call_soon_threadsafe(express.rig.worker.drain, 5.0)
    wait_for(lambda: express.kernel.of(HOLD), "HOLD")
    talk.change(handed=True)
    talk.server.sendall(ok(b"two"))
    head, _ = read_head(talk.sock)
    assert b"connection: close" in head.lower()
    wait_for(express.unpaired, "Unpair")


def test_an_endpoint_that_is_gone_unpairs(express: Express, talk: Dialogue) -> None:
    express.rig.mesh.items = [item for item in express.rig.mesh.items if getattr(item, "name", "") != "web-1"]
    express.rig.update()
    wait_for(express.unpaired, "Unpair")


def test_a_policy_that_denies_what_the_kernel_carries(express: Express, talk: Dialogue) -> None:
    talk.begin()
    express.rig.mesh.items = [item for item in express.rig.mesh.items if getattr(item, "name", "") != "web-allow"]
    express.rig.update()
    assert read_response(talk.sock)[0] == 403
    wait_for(lambda: express.kernel.of(TAKE), "TAKE")
