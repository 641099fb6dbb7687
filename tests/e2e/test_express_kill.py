"""Express under load while what surrounds it dies or changes: what is paired goes on, what is new waits, no request is lost,
doubled or answered with another's bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e import express
from tests.e2e.express import NAME, clean, event, load, pairings, started, stopped
from tests.e2e.mesh import NS, Mesh, policy, until
from tests.e2e.test_kill import kill, ready

pytestmark = pytest.mark.timeout(400)
CONNECTIONS, RATE = 8, 200
SECONDS_MAX = 150.0  # each load is stopped when its test has seen enough
CHANGES_EVERY_S = 0.1


@pytest.fixture(scope="module", autouse=True)
def serving(mesh: Mesh) -> Iterator[None]:
    with express.exact(mesh, accounts=("client", "far-client")):
        express.warm(mesh)
        yield


def running(mesh: Mesh, **options: Any) -> Any:
    """A load that the kernel carries by now."""
    made = load(mesh, **{"connections": CONNECTIONS, "seconds": SECONDS_MAX, "rate": RATE, **options})
    started(made)
    express.carried_on(mesh)
    return made


@pytest.mark.parametrize("what", ["proxy-worker", "proxy"])
@pytest.mark.parametrize("kind", ["small", "mixed"])
def test_pairs_outlive_the_proxy(mesh: Mesh, what: str, kind: str) -> None:
    """What user space held at that moment is reset, once, and counted; all others are taken over by the next worker, also
    those that wait for it with a request. "mixed" has answers over the budget: user space holds more of those."""
    before = {result: pairings(mesh, result) for result in ("lost", "taken_over")}
    under_load = running(mesh, kind=kind)
    kill(mesh, "n1", what)
    fresh = load(mesh, connections=2, seconds=20, each=5).report(60)
    ready(mesh)
    express.carried_on(mesh)
    report = stopped(under_load)
    clean(fresh)
    lost = pairings(mesh, "lost") - before["lost"]
    assert pairings(mesh, "taken_over") - before["taken_over"] >= CONNECTIONS - lost
    assert not report["wrong"] and not report["doubled"], report
    assert report["failed"] <= lost <= (1 if kind == "small" else CONNECTIONS / 2), (lost, report)
    assert report["opened"] == CONNECTIONS + report["failed"]


def test_nobody_notices_that_the_agent_died(mesh: Mesh) -> None:
    under_load = running(mesh, kind="mixed")
    kill(mesh, "n1", "agent")
    ready(mesh)
    express.carried_on(mesh)
    report = stopped(under_load)
    clean(report)
    assert report["opened"] == CONNECTIONS


def test_proxy_and_agent_at_once(mesh: Mesh) -> None:
    """Nobody is left who holds a connection: each ends, once, and what comes after is served when both are back."""
    under_load = running(mesh)
    began = time.monotonic()
    victims = {what: mesh.lab.pids("n1", what) for what in ("proxy", "agent")}
    for pids in victims.values():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    for what, pids in victims.items():
        until(lambda what=what, pids=pids: (now := mesh.lab.pids("n1", what)) and not set(now) & set(pids), f"no {what}", 20)
    ready(mesh)
    report = stopped(under_load)
    assert not report["wrong"] and not report["doubled"], report
    ended = [entry for entry in report["errors"] if entry[2]]  # on a connection that stood
    assert len(ended) == CONNECTIONS and all(began - 0.1 < at < began + 1 for at, *_ in ended), report
    express.warm(mesh)


def test_a_policy_change_every_100_ms(mesh: Mesh) -> None:
    """Each voids what the kernel knows: requests go by the proxy meanwhile, and back."""
    under_load = running(mesh, kind="mixed")
    carried, changes, deadline = event(mesh, "carried"), 0, time.monotonic() + 4
    while time.monotonic() < deadline:
        at = time.monotonic()
        text = policy("churn", NAME, action="DENY", who="client", operation=f'{{paths: ["/never-{changes}"]}}')
        mesh.lab.apply(text)
        changes += 1
        time.sleep(max(0.0, at + CHANGES_EVERY_S - time.monotonic()))
    mesh.delete("AuthorizationPolicy", "churn")
    report = stopped(under_load)
    clean(report)
    assert report["opened"] == CONNECTIONS
    assert changes > 10
    assert event(mesh, "generation") > 0
    assert event(mesh, "carried") > carried + 50, "nothing was carried between the changes"


def pillion(mesh: Mesh, *argv: str) -> None:
    command = [sys.executable, "-m", "pillion", "--lab", mesh.lab.name, "express", *argv, "--wait"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("which", ["mesh", "service", "server", "caller"])
def test_off_and_on_costs_no_request(mesh: Mesh, which: str) -> None:
    named = {
        "mesh": (),
        "service": ("--service", f"{NS}/{NAME}"),
        "server": ("--workload", f"{NS}/{NAME}"),
        "caller": ("--workload", f"{NS}/client"),
    }[which]
    under_load = running(mesh, kind="mixed")
    try:
        for _ in range(2):
            pillion(mesh, "off", *named)
            off = until(lambda: quiet(mesh), f"the kernel goes on with {which} off")
            assert off
            pillion(mesh, "on", *named)
            express.carried_on(mesh)
    finally:
        pillion(mesh, "on", *named)
        if which == "mesh":
            mesh.lab.wait(mesh.lab.delete("MeshConfig", "", "mesh"))
    report = stopped(under_load)
    clean(report)
    assert report["opened"] == CONNECTIONS


def quiet(mesh: Mesh) -> bool:
    """Whether nothing of a load was carried for a moment."""
    before = event(mesh, "carried")
    asked = mesh.metric("n1", "pillion_requests_total")
    until(lambda: mesh.metric("n1", "pillion_requests_total") > asked + 20, "the load has stopped")
    return event(mesh, "carried") == before


def test_a_deny_stops_the_very_next_request(mesh: Mesh) -> None:
    """On every open connection: what is asked once it is in force is answered with 403 by user space."""
    for _ in range(3):
        under_load = running(mesh, expected=[403], rate=400)
        carried = event(mesh, "carried")
        assert carried
        mesh.apply(policy("flip", NAME, action="DENY"))
        in_force = time.monotonic()
        after = event(mesh, "carried")
        denied = mesh.metric("n1", "pillion_requests_total", code="403")
        until(lambda denied=denied: mesh.metric("n1", "pillion_requests_total", code="403") > denied + 200, "no load any more")
        report = stopped(under_load)
        assert report["last_asked"] < in_force, f"{report['last_asked'] - in_force:.4f} s after: {report}"
        assert not report["wrong"] and not report["errors"] and report["opened"] == CONNECTIONS, report
        assert report["statuses"]["403"] > 10 * CONNECTIONS
        assert event(mesh, "carried") == after
        mesh.delete("AuthorizationPolicy", "flip")
        express.warm(mesh)


def test_one_caller_is_denied_and_the_other_goes_on(mesh: Mesh) -> None:
    """By the path: the kernel's own rule tells, not the connection."""
    text = policy("paths", NAME, action="DENY", operation='{paths: ["/size/64/*"]}')
    under_load = running(mesh, expected=[403], kind="mixed")
    mesh.apply(text)
    try:
        express.carried_on(mesh, 200)
        report = stopped(under_load)
        assert not report["wrong"] and not report["errors"] and not report["doubled"], report
        assert report["statuses"]["403"] > 50 and report["ok"] > 50
    finally:
        mesh.delete("AuthorizationPolicy", "paths")
