"""Accounts without I/O, then a worker that enforces them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from l7proxy.budget import CALM_S, TURN_S, Account, Budgets
from mesh.model import Budget, BudgetChange, Config, IdentityBudget, Protocol, Service, Workload
from tests.l7proxy.rig import Mesh, Rig, Server, http_server, ok, read_all, read_response, spiffe, wait_for
from tests.l7proxy.test_worker import metric

Start = Callable[[Mesh], Rig]
Serve = Callable[[Server], Server]
GET = b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"


class Loop:
    """A clock that is moved, and what is to run soon."""

    def __init__(self) -> None:
        self.now = 100.0
        self.soon: list[Callable[[], None]] = []
        self.budgets = Budgets(self.soon.append, lambda: self.now)

    def account(self, number: int, **budget: float) -> Account:
        account = self.budgets.of(number, spiffe(f"id-{number}"))
        account.adopt(Budget(**budget))  # type: ignore[arg-type]
        return account

    def turn(self) -> None:
        soon, self.soon[:] = list(self.soon), []
        for work in soon:
            work()


class Work:
    """Costs so much of the worker's time, several times over."""

    def __init__(self, account: Account, seconds: float, log: list[int], number: int = 0) -> None:
        self.account, self.seconds, self.log, self.number = account, seconds, log, number

    def proceed(self) -> None:
        self.account.spent += self.seconds
        self.log.append(self.number)


# ---- pure


def test_a_second_may_come_at_once_and_no_more() -> None:
    loop = Loop()
    account = loop.account(300, requests_per_s=10)
    assert [account.request(loop.now) for _ in range(12)] == [True] * 10 + [False] * 2
    loop.now += 0.3
    assert [account.request(loop.now) for _ in range(5)] == [True] * 3 + [False] * 2
    loop.now += 3600
    assert [account.request(loop.now) for _ in range(12)].count(True) == 10
    assert account.refused == {"budget_requests": 6}


def test_gauges_are_exact() -> None:
    account = Loop().account(300, connections=2, descriptors=3, bytes_in_flight=1 << 20)
    assert account.connect(2, asks=False) == ""
    assert account.connect(2, asks=False) == "budget_descriptors"
    assert account.connect(1, asks=False) == ""
    assert account.connect(0, asks=False) == "budget_connections"
    account.connections = account.descriptors = 0
    account.held = (1 << 20) + 1
    assert account.connect(1, asks=False) == "budget_bytes"
    assert account.refused == {"budget_descriptors": 1, "budget_connections": 1, "budget_bytes": 1}


def test_alone_nobody_waits() -> None:
    account = Loop().account(300)
    for _ in range(100):
        account.spent += TURN_S
        assert not (account.spent > account.limit and account.over())


def test_who_is_over_its_share_waits_while_others_work() -> None:
    loop = Loop()
    loud, other = loop.account(300), loop.account(301)
    other.spent += 0.00001
    loud.spent += TURN_S
    assert loud.over()
    log: list[int] = []
    for number in range(5):
        loud.defer(Work(loud, TURN_S * 0.4, log, number))
    assert len(loop.soon) == 1  # one call for all
    loop.turn()
    assert log == [0, 1]  # a share of half a turn, and what was begun within it
    assert loud.over()
    assert not other.shut
    loop.turn()
    loop.turn()
    assert log == [0, 1, 2, 3, 4] and not loud.shut


def test_who_was_at_work_lately_counts() -> None:
    loop = Loop()
    loud, other = loop.account(300), loop.account(301)
    other.spent += 0.00001
    loud.spent += TURN_S
    assert loud.over()
    loop.budgets.arm(loud)
    loop.now += 2.0
    loop.turn()
    loud.spent += TURN_S
    assert not loud.over()


def test_a_crowd_is_told_of_and_its_end() -> None:
    loop = Loop()
    loud, other = loop.account(300), loop.account(301)
    told: list[bool] = []
    loop.budgets.on_crowd = told.append
    loud.spent += TURN_S
    assert not loud.over() and told == []
    other.spent += 0.00001
    for _ in range(3):
        loud.spent += 100 * TURN_S
        assert loud.over()
        loop.budgets.arm(loud)
        loop.turn()
    assert told == [True]
    loop.budgets.sweep(lambda _spiffe: True)
    assert told == [True]
    loop.now += CALM_S + 0.1
    loop.budgets.sweep(lambda _spiffe: True)
    loop.budgets.sweep(lambda _spiffe: True)
    assert told == [True, False]


def test_what_comes_when_a_turn_is_over_waits_and_is_paid_for() -> None:
    loop = Loop()
    loud, other = loop.account(300), loop.account(301)
    log: list[int] = []

    def work() -> None:
        log.append(1)
        loud.spent += TURN_S

    loud.when_due(work)
    assert log == [1] and loud.spent == TURN_S
    other.spent += 0.00001
    loud.when_due(work)
    assert log == [1]
    loop.turn()
    assert log == [1, 1] and loud.spent == 2 * TURN_S


def test_shares_are_weights() -> None:
    loop = Loop()
    small, large = loop.account(300, worker_share=0.1), loop.account(301, worker_share=0.9)
    counts: dict[int, list[int]] = {300: [], 301: []}
    for account, number in ((small, 300), (large, 301)):
        account.spent += TURN_S
        for _ in range(200):
            account.defer(Work(account, TURN_S * 0.05, counts[number]))
    for _ in range(5):
        loop.turn()
    assert len(counts[301]) > 4 * len(counts[300]) > 0


def test_budgets_follow_the_configuration_and_the_gone_are_forgotten() -> None:
    loop = Loop()
    account = loop.budgets.of(300, spiffe("web"))
    change = IdentityBudget("web", "shop", BudgetChange(requests_per_s=1), ("mesh.local/ns/shop/sa/web",))
    loop.budgets.adopt({"Config//mesh": Config(trust_domain="mesh.local", budgets=Budget(connections=5)), "a": change})
    assert account.budget == Budget(connections=5, requests_per_s=1)
    account.connections = 1
    loop.budgets.sweep(lambda _spiffe: False)
    assert 300 in loop.budgets.accounts
    account.connections = 0
    loop.budgets.sweep(lambda _spiffe: False)
    assert 300 not in loop.budgets.accounts


def test_the_unknown_share_one_account() -> None:
    budgets = Loop().budgets
    assert budgets.of(0, None) is budgets.of(700, None)


def test_one_identitys_denials_are_told_in_part() -> None:
    loop = Loop()
    loop.account(300), loop.account(301)
    told = [loop.budgets.may_tell(spiffe("id-300")) for _ in range(100)]
    assert 0 < told.count(True) < 100
    assert loop.budgets.may_tell(spiffe("id-301"))


# ---- a worker


def world(mesh: Mesh, port: int, protocol: Protocol = Protocol.HTTP, **budget: int) -> tuple[Workload, Workload, Service]:
    """A loud client with this budget, its neighbour, and a service for both."""
    loud, quiet = mesh.workload("loud-1", "loud"), mesh.workload("quiet-1", "quiet")
    service = mesh.service("web", [port], protocol)
    mesh.allow("web", "loud", "quiet")
    change = BudgetChange(**budget)
    mesh.items.append(IdentityBudget("loud", "shop", change, (spiffe("loud").removeprefix("spiffe://"),)))
    return loud, quiet, service


def account(rig: Rig, name: str) -> Account:
    return rig.worker.budgets.of(rig.worker.config.identity(spiffe(name)), spiffe(name))


def test_connections_over_the_budget_are_reset_and_counted(mesh: Mesh, start: Start, serve: Serve) -> None:
    loud, quiet, service = world(mesh, serve(http_server()).port, connections=3)
    rig = start(mesh)
    held = [rig.connect(loud, service) for _ in range(5)]
    wait_for(lambda: metric(rig, "pillion_denied_total", reason="budget_connections") == 2)
    outcomes = []
    for sock in held:
        try:
            sock.sendall(GET)
            outcomes.append(read_response(sock)[0])
        except (ConnectionError, AssertionError):
            outcomes.append(0)
    assert sorted(outcomes) == [0, 0, 200, 200, 200]
    neighbour = rig.connect(quiet, service)
    neighbour.sendall(GET)
    assert read_response(neighbour)[0] == 200
    for sock in held:
        sock.close()
    wait_for(lambda: account(rig, "loud").connections == 0, "the connections are given back")
    assert account(rig, "loud").refused == {"budget_connections": 2}
    again = rig.connect(loud, service)
    again.sendall(GET)
    assert read_response(again)[0] == 200


def test_requests_over_the_budget_are_told_when_to_come_back(mesh: Mesh, start: Start, serve: Serve) -> None:
    loud, quiet, service = world(mesh, serve(http_server()).port, requests_per_s=3)
    rig = start(mesh)
    sock, statuses = rig.connect(loud, service), []
    for _ in range(5):
        sock.sendall(GET)
        status, head, _ = read_response(sock)
        statuses.append(status)
        assert (b"\r\nretry-after: 1\r\n" in head) == (status == 429)
    assert statuses == [200, 200, 200, 429, 429]
    assert metric(rig, "pillion_denied_total", reason="budget_requests") == 2
    neighbour = rig.connect(quiet, service)
    for _ in range(10):
        neighbour.sendall(GET)
        assert read_response(neighbour)[0] == 200


def test_pipelined_requests_over_the_budget_end_the_connection(mesh: Mesh, start: Start, serve: Serve) -> None:
    loud, _, service = world(mesh, serve(http_server()).port, requests_per_s=2)
    rig = start(mesh)
    sock = rig.connect(loud, service)
    sock.sendall(GET * 100)
    data = read_all(sock)
    assert data.count(b"HTTP/1.1 200") == 2 and data.count(b"HTTP/1.1 429") == 1


def test_readers_that_sleep_are_cut(mesh: Mesh, start: Start, serve: Serve) -> None:
    def pour(connection: socket.socket) -> None:
        for _ in range(64):
            connection.sendall(b"x" * (1 << 20))

    limit = 1 << 20
    loud, quiet, service = world(mesh, serve(Server(pour)).port, Protocol.TCP, bytes_in_flight=limit)
    rig = start(mesh)
    sleepers = [rig.connect(loud, service) for _ in range(20)]
    wait_for(lambda: metric(rig, "pillion_denied_total", reason="budget_bytes") > 0, "one is cut")
    wait_for(lambda: account(rig, "loud").held <= limit, "the rest fits")
    neighbour = rig.connect(quiet, service)
    assert neighbour.recv(1 << 16, socket.MSG_WAITALL)
    assert rig.worker.budgets.accounts  # and the worker lives
    wait_for(
        lambda: account(rig, "loud").refused["budget_bytes"] == metric(rig, "pillion_denied_total", reason="budget_bytes"),
        "every cut is counted twice",
    )
    for sock in sleepers:
        sock.close()
    wait_for(lambda: account(rig, "loud").held == account(rig, "loud").connections == 0, "everything is given back")


def test_a_connection_that_is_full_is_not_given_to_the_next(mesh: Mesh, start: Start, serve: Serve) -> None:
    """Only its own request was told that the server reads slowly."""
    go = threading.Event()

    def respond(head: bytes) -> bytes:
        go.wait(5)
        return ok(head.split(b"\r\n")[0])

    server = serve(http_server(respond))
    loud, _, service = world(mesh, server.port)
    rig = start(mesh)
    with rig.connect(loud, service) as sock:
        sock.sendall(GET)
        wait_for(lambda: server.connections, "the server is asked")
        rig.call(lambda: [session.upstream.pause_writing() for session in rig.worker.sessions])  # type: ignore[union-attr]
        go.set()
        assert read_response(sock)[0] == 200
        sock.sendall(GET)
        assert read_response(sock)[0] == 200
    assert server.accepted == 2


def test_sockets_to_servers_count(mesh: Mesh, start: Start, serve: Serve) -> None:
    loud, _, service = world(mesh, serve(http_server()).port, descriptors=2)
    rig = start(mesh)
    first, second = rig.connect(loud, service), rig.connect(loud, service)
    wait_for(lambda: account(rig, "loud").descriptors == 2, "both are open")
    first.sendall(GET)
    assert read_response(first)[0] == 429
    second.close()
    wait_for(lambda: account(rig, "loud").descriptors == 1, "one is given back")
    first.sendall(GET)
    assert read_response(first)[0] == 200


@pytest.mark.parametrize("protocol", [Protocol.HTTP, Protocol.TCP])
def test_what_is_put_off_keeps_its_order(mesh: Mesh, start: Start, serve: Serve, protocol: Protocol) -> None:
    """Every turn is over at once: nothing is lost, doubled or moved, and the end is told last."""

    def respond(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            connection.sendall(data)
        connection.close()

    server = http_server() if protocol is Protocol.HTTP else Server(respond)
    loud, _, service = world(mesh, serve(server).port, protocol)
    rig = start(mesh)
    rig.call(lambda: setattr(account(rig, "loud"), "quota", 0.0))
    other = account(rig, "quiet")
    sock = rig.connect(loud, service)
    body = bytes(range(256)) * 4000
    for _ in range(20):
        other.spent += 1e-6  # somebody else is at work
        if protocol is Protocol.HTTP:
            sock.sendall(b"POST /x HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n")
            assert read_response(sock)[2] == b"POST /x HTTP/1.1"
        else:
            sock.sendall(body[:50_000])
            got = b""
            while len(got) < 50_000 and (more := sock.recv(50_000 - len(got))):  # with a timeout, MSG_WAITALL waits for nothing
                got += more
            assert got == body[:50_000]
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b""
    wait_for(lambda: account(rig, "loud").connections == 0, "it is over")
