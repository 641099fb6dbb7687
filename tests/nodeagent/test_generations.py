"""Workers of several generations: a proxy that was restarted by plan left them behind. A real agent over a fake kernel."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mesh import link
from nodeagent import proxy_link
from tests.nodeagent.fakes import FakeWorker, until
from tests.nodeagent.test_agent import DENY, Node


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """With one worker, of generation 1."""
    made = Node(tmp_path)
    made.worker.born = 1
    await made.controller.start()
    made.worker.start()
    await made.start()
    await until(made.ready, "never ready")
    made.more = []
    try:
        yield made
    finally:
        await made.stop()
        for worker in (made.worker, *made.more):
            await worker.stop()
        await made.controller.stop()


def another(node: Node, index: int, born: int) -> FakeWorker:
    worker = FakeWorker(node.scratch / f"run/proxy/worker-{index}.sock", index, born)
    worker.start()
    node.more.append(worker)
    return worker


async def test_a_worker_that_does_not_accept_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "worker-0.sock"
    fleet = proxy_link.ProxyFleet(tmp_path, lambda: link.Hello("n1", "", (), "", ()), None)  # type: ignore[arg-type]
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as others:
        listener.bind(str(path))
        listener.listen(0)
        others.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))  # its backlog is full
        dialling = asyncio.create_task(fleet._dial(path))
        await until(lambda: dialling.done() or fleet.counts["dials"] > 1)
        assert not dialling.done()
        others.enter_context(listener.accept()[0])
        found = await asyncio.wait_for(dialling, 5)
        assert found is not None
        with found:
            assert found.getpeername() == str(path)
    assert await fleet._dial(path) is None


async def test_no_worker_stands_for_another(node: Node) -> None:
    """In metrics and status it is told by its number, which is its socket's."""
    liar = FakeWorker(node.scratch / "run/proxy/worker-1.sock", index=0)
    liar.start()
    node.more.append(liar)
    await until(lambda: node.agent.fleet.counts["protocol_errors"])
    assert {worker.name for worker in node.agent.fleet.links.values()} == {"worker-0"}


async def test_it_drains_when_a_newer_one_serves_and_not_before(node: Node) -> None:
    """Until then the node is not called ready, though it serves; and what has no newer one is of the same generation."""
    old = node.worker
    sibling = another(node, 1, 1)
    await until(lambda: sibling.listeners)
    old.say(link.Leaving(60.0))
    sibling.say(link.Leaving(60.0))
    await until(lambda: node.agent.fleet.heir() is None)
    assert not await node.ready() and not old.drains and old.listeners
    new = another(node, 2, 2)
    await until(node.ready)
    await until(lambda: old.drains and sibling.drains)
    assert old.drains == sibling.drains == [60.0]
    assert new.listeners and not new.drains and node.agent.fleet.heir() == "worker-2"


async def test_what_drains_is_kept_at_the_state_in_force(node: Node) -> None:
    """Open connections are the policy's as others are: a revision counts when every generation has it."""
    old = node.worker
    old.say(link.Leaving(60.0))
    new = another(node, 1, 2)
    await until(lambda: old.drains and new.listeners)
    old.answers = False
    revision = await node.controller.change(**{"Policy/shop/no": DENY})
    await until(lambda: "Policy/shop/no" in old.state and "Policy/shop/no" in new.state)
    assert all(ack.revision != revision for ack in node.controller.acks)
    await old.stop()
    await until(lambda: node.controller.acks[-1].revision == revision)
    await until(node.ready)


async def test_a_new_agent_finds_them_as_they_are(node: Node) -> None:
    """Which of two is to serve it sees by their generations, whoever answers first; what leaves gets no new listeners."""
    old = node.worker
    old.say(link.Leaving(60.0))
    new = another(node, 1, 2)
    await until(lambda: old.drains and new.listeners)
    await node.stop()
    await node.start()
    await until(lambda: old.connections == 2)
    old.say(link.Leaving(50.0))
    await until(lambda: new.connections == 2 and old.drains == [50.0])
    await until(node.ready)
    assert not new.drains and new.listeners


async def test_of_too_many_the_oldest_hurries(node: Node) -> None:
    generations = [node.worker]
    for number in range(1, proxy_link.LEAVING_MAX + 2):
        generations[-1].say(link.Leaving(60.0))
        generations.append(another(node, number, number + 1))
        await until(lambda number=number: generations[number - 1].drains and generations[number].listeners)  # type: ignore[misc]  # bound now
    await until(lambda: generations[0].drains == [60.0, proxy_link.HURRY_S])
    assert all(worker.drains == [60.0] for worker in generations[1:-1])


async def test_what_was_cut_is_counted(node: Node) -> None:
    node.worker.say(link.Drained(3))
    await until(lambda: node.agent.fleet.counts["drain_cut"] == 3)
    node.worker.say(link.Drained(-5))
    node.worker.say(link.Drained(1 << 40))
    await until(lambda: node.agent.fleet.counts["drain_cut"] == 3 + proxy_link.CUT_MAX)
    text = (await node.call("GET", "/metrics"))[1]
    assert 'pillion_agent_events_total{kind="proxy_drain_cut"} 1.0' in text
