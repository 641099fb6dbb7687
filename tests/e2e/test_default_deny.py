"""What no policy allows does not pass, and the reason is counted."""

from __future__ import annotations

import time

import pytest

from tests.e2e.mesh import ECHO_PORT, Mesh, Refused, policy, until


def test_without_a_policy_nothing_passes(mesh: Mesh) -> None:
    before = mesh.denied("n1", "policy_denied")
    with pytest.raises(Refused):
        mesh.echo("client", "dark.shop.mesh")
    assert mesh.denied("n1", "policy_denied") > before
    assert any(flow["verdict"] == "denied" and flow["source"].endswith("/sa/client") for flow in mesh.flows("n1"))


def test_outside_destinations_are_denied_by_default(mesh: Mesh) -> None:
    before = mesh.denied("n1", "outbound_denied")
    status, _ = mesh.curl("client", "http://10.77.0.2:15443/")
    assert status == 0
    assert mesh.denied("n1", "outbound_denied") > before


def test_an_undeclared_port_of_a_workload_is_denied(mesh: Mesh) -> None:
    before = mesh.denied("n1", "port_undeclared")
    assert mesh.curl("client", f"http://{mesh.w['web'].addresses[0]}:9999/")[0] == 0
    assert mesh.denied("n1", "port_undeclared") > before


def test_a_policy_ends_an_idle_native_connection_within_a_second(mesh: Mesh) -> None:
    holder = mesh.program("client", "hold.py", "echo.shop.mesh", ECHO_PORT, 60, "idle")
    assert holder.first_line().startswith("open")
    mesh.apply(policy("no-echo", "echo", action="DENY"))
    in_force = time.monotonic()  # `wait REV` has answered
    try:
        report = holder.report(timeout_s=20)
        assert report["error"] and report["at"] < in_force + 1.0, report
        with pytest.raises(Refused):
            mesh.echo("client", "echo.shop.mesh")
    finally:
        mesh.delete("AuthorizationPolicy", "no-echo")
    assert mesh.echo("client", "echo.shop.mesh")


def test_a_policy_ends_an_idle_tunnelled_connection_within_a_second(mesh: Mesh) -> None:
    holder = mesh.program("client", "hold.py", "echo-far.shop.mesh", ECHO_PORT, 60, "idle")
    assert holder.first_line().startswith("open")
    mesh.apply(policy("no-echo-far", "echo-far", action="DENY"))
    in_force = time.monotonic()
    try:
        report = holder.report(timeout_s=20)
        assert report["error"] and report["at"] < in_force + 1.0, report
    finally:
        mesh.delete("AuthorizationPolicy", "no-echo-far")
    until(lambda: mesh.echo("client", "echo-far.shop.mesh"), "allowed again")


def test_what_is_allowed_again_is_served_at_once(mesh: Mesh) -> None:
    """Connections the proxies kept from before the denial are no trap for the first request after it."""
    for _ in range(2):
        mesh.apply(policy("far-client-web", "web", who="far-client"))
        try:
            status, body = mesh.curl("far-client", "http://web.shop.mesh:8080/", "--max-time", "2")
        finally:
            mesh.delete("AuthorizationPolicy", "far-client-web")
        assert status == 200, body
        assert mesh.curl("far-client", "http://web.shop.mesh:8080/")[0] == 403


def test_an_ungranted_identity_is_refused_and_counted(mesh: Mesh) -> None:
    """A workload of an account the node was not granted is not registered, gets no certificate, and connects nowhere."""
    refused = mesh.metric("n1", "pillion_agent_registrations_refused_total", reason="identity_not_granted")
    stranger = mesh.lab.add_workload(
        node="n1", name="payments", namespace="vault", service_account="payments", labels={}, wait=False, grant=False
    )
    try:
        until(
            lambda: mesh.metric("n1", "pillion_agent_registrations_refused_total", reason="identity_not_granted") > refused,
            "no refusal was counted",
        )
        status = mesh.lab.agent_api("n1", "GET", "/v1/status")
        assert "payments" not in {each["name"] for each in status["workloads"] if each.get("svid")}
        before = mesh.denied("n1", "unknown_cgroup")
        done = stranger.run(["curl", "-sS", "--max-time", "2", f"http://{mesh.w['web'].addresses[0]}:8080/"], timeout=10)
        assert done.returncode != 0
        assert mesh.denied("n1", "unknown_cgroup") > before
    finally:
        mesh.lab.remove_workload("payments")
