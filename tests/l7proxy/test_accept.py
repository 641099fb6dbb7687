from __future__ import annotations

import asyncio
import errno
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from l7proxy import accept
from l7proxy.accept import Acceptor
from l7proxy.budget import Account, Budgets
from tests.l7proxy.rig import open_fds
from tests.l7proxy.two_nodes import until


class Full(socket.socket):
    """Accepts fail as they do without descriptors, for a while."""

    failures = 0
    asked = 0

    def accept(self) -> tuple[socket.socket, Any]:
        type(self).asked += 1
        if type(self).failures:
            type(self).failures -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


@pytest.fixture
def listening() -> Iterator[Full]:
    Full.failures = Full.asked = 0
    sock = Full()
    sock.bind(("127.0.0.1", 0))
    sock.listen(200)
    yield sock
    sock.close()


def worker() -> Any:
    counts: Counter[str] = Counter()
    metrics = SimpleNamespace(count=lambda name: counts.update([name]), counts=counts)
    return SimpleNamespace(loop=asyncio.get_running_loop(), metrics=metrics, log=structlog.get_logger())


async def test_without_descriptors_it_pauses_and_goes_on(listening: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept, "PAUSE_S", 0.05)
    made: list[socket.socket] = []
    fake = worker()
    acceptor = Acceptor(fake, listening, "x", lambda sock, _: made.append(sock))
    Full.failures = 3
    with socket.create_connection(listening.getsockname()):
        await until(lambda: made)
        assert not made[0].getblocking()
    assert fake.metrics.counts["accept_paused"] == 3
    assert Full.asked <= 5  # it did not spin
    made[0].close()
    acceptor.close()


async def test_closed_while_it_pauses(listening: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept, "PAUSE_S", 0.02)
    fake = worker()
    acceptor = Acceptor(fake, listening, "x", lambda sock, _: sock.close())
    Full.failures = 1
    with socket.create_connection(listening.getsockname()):
        await until(lambda: fake.metrics.counts["accept_paused"])
        acceptor.close()
        acceptor.close()
        await asyncio.sleep(0.05)
    assert Full.asked == 1


async def test_a_failing_start_costs_one_connection_and_no_descriptor(listening: Full) -> None:
    made: list[socket.socket] = []
    fake = worker()

    def begin(sock: socket.socket, address: str) -> None:
        assert address == "127.0.0.1"
        if not fake.metrics.counts:
            raise ValueError("a bug")
        made.append(sock)

    acceptor = Acceptor(fake, listening, "x", begin)
    before = open_fds()
    with socket.create_connection(listening.getsockname()) as sock:
        await until(lambda: fake.metrics.counts["accept_failed"])
        sock.settimeout(5)
        assert sock.recv(1) == b""
    with socket.create_connection(listening.getsockname()):
        await until(lambda: made)
    made[0].close()
    assert open_fds() == before
    acceptor.close()


async def test_closed_by_what_a_connection_sets_off(listening: Full) -> None:
    made: list[socket.socket] = []

    def begin(sock: socket.socket, _: str) -> None:
        made.append(sock)
        acceptor.close()

    acceptor = Acceptor(worker(), listening, "x", begin)
    with socket.create_connection(listening.getsockname()):
        await until(lambda: made)
    made[0].close()
    assert Full.asked == 1


async def test_the_real_limit(listening: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLIMIT_NOFILE reached: nothing is lost, the connection waits in the backlog."""
    monkeypatch.setattr(accept, "PAUSE_S", 0.02)
    made: list[socket.socket] = []
    fake = worker()
    acceptor = Acceptor(fake, listening, "x", lambda sock, _: made.append(sock))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_connection(listening.getsockname()) as client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            await until(lambda: fake.metrics.counts["accept_paused"])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: made)
        assert made[0].getpeername() == client.getsockname()
    made[0].close()
    acceptor.close()


async def test_a_flood_waits_in_the_backlog_for_its_identitys_turns(listening: Full) -> None:
    """Each costs more than the loop sees of it; the loop looks at everybody else's sockets in between."""
    loop = asyncio.get_running_loop()
    budgets = Budgets(loop.call_soon)
    loud, other = budgets.of(300, "spiffe://td/ns/a/sa/loud"), budgets.of(301, "spiffe://td/ns/a/sa/other")
    made: list[socket.socket] = []
    in_a_turn: list[int] = []

    def begin(sock: socket.socket, _: str) -> Account:
        made.append(sock)
        other.spent += 1e-6  # it is at work too
        return loud

    def look() -> None:
        in_a_turn.append(len(made))
        if len(made) < 100:
            loop.call_soon(look)

    clients = []
    for _ in range(100):
        clients.append(client := socket.socket())
        client.setblocking(False)
        client.connect_ex(listening.getsockname())
    acceptor = Acceptor(worker(), listening, "x", begin)
    loop.call_soon(look)
    await until(lambda: len(made) == 100)
    room = int(loud.quota / accept.BEGIN_S) + 1
    assert max(b - a for a, b in pairwise(in_a_turn)) <= room
    assert loud.spent > 100 * accept.BEGIN_S
    for sock in (*made, *clients):
        sock.close()
    acceptor.close()
