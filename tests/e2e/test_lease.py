"""The policy lease: agents that are frozen let nothing new in once it is over, and everything is well when they wake up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, Refused, until

LEASE_S = 3.0
CONFIG = "apiVersion: mesh.pillion.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: mesh}}\nspec: {{policyLeaseSeconds: {}}}\n"


@pytest.fixture(scope="module")
def leased(mesh: Mesh) -> Iterator[Mesh]:
    before = mesh.lab.controller_api("GET", "/v1/resources?kind=MeshConfig")["items"]
    assert not before, "the shared mesh has a MeshConfig: merge the lease into it"
    mesh.apply(CONFIG.format(LEASE_S))
    yield mesh
    mesh.lab.wait(mesh.lab.delete("MeshConfig", "", "mesh"))


@contextmanager
def frozen(mesh: Mesh, *nodes: str) -> Iterator[None]:
    """The agents of these nodes stand still, for longer than the lease when this begins."""
    pids = [pid for node in nodes for pid in mesh.lab.pids(node, "agent")]
    assert len(pids) == len(nodes)
    since = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: time.monotonic() > since + LEASE_S + 0.2, "", LEASE_S + 5)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def refused(mesh: Mesh, source: str, name: str) -> bool:
    try:
        mesh.echo(source, f"{name}.shop.mesh")
    except Refused:
        return True
    return False


def all_pass(mesh: Mesh) -> bool:
    return (
        not refused(mesh, "client", "echo")
        and not refused(mesh, "client", "echo-far")
        and all(mesh.curl("client", f"http://{name}.shop.mesh:{HTTP_PORT}/")[0] == 200 for name in ("web", "far"))
    )


def expired(mesh: Mesh, node: str) -> float:
    return mesh.denied(node, "lease_expired")


def test_without_a_lease_there_is_none(mesh: Mesh) -> None:
    status = mesh.lab.agent_api("n1", "GET", "/v1/status")
    assert status["policy_lease_s"] == 0 and status["policy_age_s"] is not None
    assert mesh.metric("n1", "pillion_agent_policy_lease_seconds") == 0


def test_nothing_new_passes_frozen_agents_past_the_lease(leased: Mesh) -> None:
    mesh, since = leased, time.time() - 1
    assert all_pass(mesh)
    before = expired(mesh, "n1")
    addresses = {name: mesh.w[name].addresses[0] for name in ("echo", "echo-far", "web", "far")}  # names need a new question
    holders = [mesh.program("client", "hold.py", addresses[name], ECHO_PORT, 60) for name in ("echo", "echo-far")] + [
        mesh.program("client", "load.py", "http", addresses[name], HTTP_PORT, 1, 60) for name in ("web", "far")
    ]
    for holder in holders:
        assert holder.first_line().startswith(("open", "started"))
    with frozen(mesh, "n1", "n2"):
        for name in ("echo", "echo-far"):
            with pytest.raises(Refused):
                mesh.echo("client", addresses[name])
        for name in ("web", "far"):
            assert mesh.curl("client", f"http://{addresses[name]}:{HTTP_PORT}/")[0] == 0
        with pytest.raises(Refused):
            mesh.echo("client", "echo.shop.mesh")  # its DNS question is new as well
    for holder in holders:  # what was let in by a good policy goes on
        report = holder.stopped()
        assert not report.get("error") and not report.get("failures"), report
    assert expired(mesh, "n1") >= before + 5
    until(lambda: all_pass(mesh), "not all passes again")
    denials = [flow for flow in mesh.flows("n1") if flow["reason"] == "lease_expired" and flow["time"] >= since]
    assert denials and all(flow["verdict"] == "denied" for flow in denials)


def test_a_frozen_node_admits_no_stream_of_others(leased: Mesh) -> None:
    """The caller's node is well: the destination's proxy refuses."""
    mesh = leased
    until(lambda: all_pass(mesh), "not all passes")
    before = mesh.metric("n2", "pillion_denied_total", reason="lease_expired")
    with frozen(mesh, "n2"):
        with pytest.raises(Refused):
            mesh.echo("client", "echo-far.shop.mesh")
        assert not refused(mesh, "client", "echo")
    assert mesh.metric("n2", "pillion_denied_total", reason="lease_expired") > before
    until(lambda: all_pass(mesh), "not all passes again")


def test_a_silent_controller_ends_the_lease(leased: Mesh) -> None:
    mesh = leased
    (pid,) = mesh.lab.pids(None, "controller")
    before = expired(mesh, "n1")
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: refused(mesh, "client", "echo"), "new connections still pass", LEASE_S + 5)
        status = mesh.lab.agent_api("n1", "GET", "/v1/status")
        assert status["policy_lease_s"] == LEASE_S < status["policy_age_s"]
        assert mesh.metric("n1", "pillion_agent_policy_age_seconds") > LEASE_S
        assert mesh.curl("client", f"http://{mesh.w['web'].addresses[0]}:{HTTP_PORT}/")[0] == 0
        (agent,) = mesh.lab.pids("n1", "agent")
        os.kill(agent, signal.SIGKILL)  # a new agent grants nothing that the controller did not
        until(
            lambda: mesh.lab.pids("n1", "agent") not in ([], [agent]) and mesh.lab.answers("n1", "/v1/ready"), "no new agent", 20
        )
        assert refused(mesh, "client", "echo")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert expired(mesh, "n1") > before
    until(lambda: all_pass(mesh), "not all passes again")
    assert mesh.metric("n1", "pillion_agent_policy_age_seconds") < LEASE_S
