"""HTTP between two nodes whose applications' connections go without TCP to the proxy and back (legs): the same bytes, nothing
lost, nothing stuck, whatever the other side does and whoever dies."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator
from typing import Any

import pytest

from lab.pace import SLOW
from tests.e2e import express
from tests.e2e.express import NAME, PORT, clean, event, load, pairings, started, stopped
from tests.e2e.mesh import Background, Mesh, until
from tests.e2e.test_express_flow import GB, KB, MB, bounded, queued_mb, right
from tests.e2e.test_express_kill import pillion
from tests.e2e.test_kill import kill, ready

pytestmark = pytest.mark.timeout(400)
QUEUED_MB_MAX = 24  # by TCP, on the way from server to client, but for the client's own window
CONNECTIONS, RATE = 8, 200
WHO = "far-client"  # on n2; the server is on n1
TRIES = 4
WARM = 400  # exchanges of a client before it is odd, a few milliseconds each: busy at two looks in a row
NODES = ("n1", "n2")
LOADS: list[Background] = []  # of this test


@pytest.fixture(scope="module", autouse=True)
def serving(mesh: Mesh) -> Iterator[None]:
    with express.exact(mesh, accounts=(WHO, "client")):
        yield


@pytest.fixture(autouse=True)
def alone(mesh: Mesh) -> Iterator[None]:
    ready(mesh)
    yield
    while LOADS:
        made = LOADS.pop()
        made.popen.kill()
        made.popen.communicate()


def handed_over(mesh: Mesh) -> dict[str, float]:
    """Messages that went by legs so far, by node."""
    return {node: event(mesh, "leg", node) for node in NODES}


def goes_on(mesh: Mesh, messages: int = 100) -> None:
    """Until so many more have gone by legs on both nodes."""
    before = handed_over(mesh)
    until(lambda: all(now >= before[node] + messages for node, now in handed_over(mesh).items()), "nothing goes by legs", 30)


def running(mesh: Mesh, **options: Any) -> Background:
    """A load whose every client is on a leg by now."""
    asked = {"connections": CONNECTIONS, "seconds": 150.0, "rate": RATE, **options}
    before = pairings(mesh, "leg_made", "n2")
    made = load(mesh, WHO, **asked)
    LOADS.append(made)
    started(made)
    until(lambda: pairings(mesh, "leg_made", "n2") - before >= asked["connections"], "not all have a leg", 30)
    goes_on(mesh)
    return made


def odd(mesh: Mesh, mode: str, **options: Any) -> Background:
    """`programs/odd_client.py` on a connection that has a leg by now; done anew where it got none in that time."""
    question = {"host": f"{NAME}.shop.mesh", "port": PORT, "mode": mode, "warm": WARM, **options}
    for more in range(1, TRIES + 1):
        before = pairings(mesh, "leg_made", "n2")
        made = mesh.program(WHO, "odd_client.py", json.dumps({**question, "warm": more * WARM}))
        LOADS.append(made)
        line = made.first_line()
        assert line == "ready\n", line or made.popen.communicate()
        if pairings(mesh, "leg_made", "n2") > before:
            return made
        made.popen.kill()
        made.popen.communicate()
    raise AssertionError("it has no leg")


def others(mesh: Mesh) -> Background:
    """Two connections that notice nothing of them, on legs."""
    return running(mesh, connections=2, rate=100)


@pytest.mark.parametrize("kind", ["small", "post", "mixed"])
def test_the_same_bytes(mesh: Mesh, kind: str) -> None:
    """ "mixed" has answers that are more than may be handed over at once: those go by TCP, and what follows by the leg again."""
    under_load = running(mesh, kind=kind)
    before, requests = handed_over(mesh), mesh.metric("n2", "pillion_requests_total")
    goes_on(mesh, 1000)
    carried, asked = handed_over(mesh), mesh.metric("n2", "pillion_requests_total") - requests
    report = stopped(under_load)
    clean(report)
    assert report["opened"] == CONNECTIONS
    for node in NODES:  # of a request and its answer two; of "mixed" some are too long
        assert carried[node] - before[node] > asked, (node, carried, before, asked)


@pytest.mark.parametrize("size", [100 * KB, 300 * KB, 5 * MB])
@pytest.mark.parametrize("mode", ["eager", "sleepy"])
def test_clients_that_do_not_read(mesh: Mesh, mode: str, size: int) -> None:
    """Or ask again before they have; others notice nothing."""
    with bounded(mesh):
        neighbours = others(mesh)
        report = odd(mesh, mode, size=size, times=2).report(60 * SLOW)
        beside = stopped(neighbours)
    right(report)
    clean(beside)
    assert beside["slowest_s"] < 1 * SLOW


@pytest.mark.parametrize("size", [100 * KB, 5 * MB])
def test_clients_that_vanish_while_they_are_answered(mesh: Mesh, size: int) -> None:
    with bounded(mesh):
        neighbours = others(mesh)
        right(odd(mesh, "vanish", size=size, times=6).report(60 * SLOW))
        clean(stopped(neighbours))
    gauge = "pillion_express_legs"
    if size < 1 * MB:  # else a minute and more: see test_express_flow.py
        until(lambda: not mesh.metric("n2", gauge), f"legs stay: {mesh.metric('n2', gauge):g}", 15)


def test_servers_that_reset(mesh: Mesh) -> None:
    report = odd(mesh, "broken", size=100 * KB, times=4).report(120 * SLOW)
    assert not report["wrong"], report
    assert report["statuses"].get("502", 0) + report["statuses"].get("503", 0) == 2, report
    assert len(report["errors"]) == 2 and all(text.startswith("half: ") for text in report["errors"]), report


def test_an_answer_of_many_megabytes(mesh: Mesh) -> None:
    with bounded(mesh):
        running = odd(mesh, "huge", size=GB // 8)
        highest = 0.0
        while not select.select([running.popen.stdout], [], [], 0.05)[0]:
            highest = max(highest, queued_mb(mesh)[2])
        report = running.report(60 * SLOW)
    right(report)
    assert highest < QUEUED_MB_MAX, f"{highest:.0f} MB in TCP's queues"


def test_off_and_on_costs_no_request(mesh: Mesh) -> None:
    under_load = running(mesh, kind="mixed")
    try:
        pillion(mesh, "off")
        until(lambda: not sum(mesh.lab.agent_api(node, "GET", "/v1/express")["legs"]["open"] for node in NODES), "legs stay")
        before, asked = handed_over(mesh), mesh.metric("n2", "pillion_requests_total")
        until(lambda: mesh.metric("n2", "pillion_requests_total") > asked + 200, "the load has stopped")
        assert handed_over(mesh) == before
    finally:
        pillion(mesh, "on")
        mesh.lab.wait(mesh.lab.delete("MeshConfig", "", "mesh"))
    goes_on(mesh)
    report = stopped(under_load)
    clean(report)
    assert report["opened"] == CONNECTIONS


@pytest.mark.parametrize("node", NODES)
def test_nobody_notices_that_the_agent_died(mesh: Mesh, node: str) -> None:
    under_load = running(mesh, kind="mixed")
    kill(mesh, node, "agent")
    ready(mesh)
    goes_on(mesh)
    report = stopped(under_load)
    clean(report)
    assert report["opened"] == CONNECTIONS


@pytest.mark.parametrize("node", NODES)
def test_without_a_proxy_its_connections_end_and_others_come(mesh: Mesh, node: str) -> None:
    under_load = running(mesh)
    pids = mesh.lab.pids(node, "proxy-worker")
    kill(mesh, node, "proxy-worker")
    ready(mesh)
    goes_on(mesh)
    report = stopped(under_load)
    assert not set(pids) & set(mesh.lab.pids(node, "proxy-worker"))
    assert not report["wrong"], report
    assert report["doubled"] <= CONNECTIONS, report  # GET: asked again by the other node when the tunnel died with its answer
    assert report["failed"] <= 2 * CONNECTIONS, report
    known = mesh.lab.agent_api(node, "GET", "/v1/express")["legs"]["open"]
    assert known <= os.cpu_count() * 64, known  # type: ignore[operator]  # not those of the dead worker for ever
