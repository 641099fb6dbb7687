"""The same as test_deny_under_load.py, when it is not a policy that changes: a grant is taken back, which revokes the
certificates it stood for, or a whole node is cut. In a lab of its own, which is worse off afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, NS, Mesh, policy
from tests.e2e.test_deny_under_load import Kind, falls

NODE_KINDS = {
    "native": Kind("stream", "echo-far", ECHO_PORT),
    "native-idle": Kind("idle", "echo-far", ECHO_PORT),
    "tunnel": Kind("stream", "echo", ECHO_PORT),
    "tunnel-idle": Kind("idle", "echo", ECHO_PORT),
    "http": Kind("http", "far", HTTP_PORT),
    "http-far": Kind("http", "web", HTTP_PORT),
}
KEPT = (("native", "stream", "echo", ECHO_PORT), ("native-idle", "idle", "echo", ECHO_PORT), ("http", "http", "web", HTTP_PORT))
CUT_GRACE_S = 1.0
CALLERS = ("far-client", "far-other")
GRANT = """apiVersion: mesh.pillion.dev/v1alpha1
kind: NodeGrant
metadata: {{name: lab-n2-shop}}
spec: {{node: n2, serviceAccounts: [{accounts}]}}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    scratch: Path = tmp_path_factory.mktemp("own")
    for folder in (scratch, *list(scratch.parents)[:2]):
        folder.chmod(0o755)  # nginx's worker is not root
    lab = Lab(os.environ.get("PILLION_LAB", "e2e")[:10] + "cu")
    lab.down()
    try:
        made = Mesh(lab, scratch)
        made.populate()
        made.w["far-other"] = lab.add_workload("n2", "far-other", namespace=NS)
        served = sorted({kind.service for kind in NODE_KINDS.values()})
        made.apply("".join(policy(f"{who}-{name}", name, who=who) for who in CALLERS for name in served))
        yield made
    finally:
        lab.down()


def revoked(mesh: Mesh) -> set[str]:
    return set(mesh.lab.controller_api("GET", "/v1/state")["items"]["Config//mesh"].get("revoked", ()))


def serial(mesh: Mesh, node: str, name: str) -> str:
    status = mesh.lab.agent_api(node, "GET", "/v1/status")
    return str(next(w["svid"]["serial"] for w in status["workloads"] if w["name"] == name))


def test_a_grant_that_is_taken_back_revokes_its_certificates(own: Mesh) -> None:
    gone, kept = serial(own, "n2", "far-client"), serial(own, "n2", "far-other")
    rest = ", ".join(f"{NS}/{name}" for name in ("far", "echo-far", "far-other"))
    falls(own, "far-client", "far-other", NODE_KINDS, lambda: own.apply(GRANT.format(accounts=rest)))
    assert gone in revoked(own) and kept not in revoked(own)
    assert serial(own, "n2", "far-other") == kept


def test_a_node_that_is_cut(own: Mesh) -> None:
    """Its workloads lose what they have elsewhere and at home; those elsewhere lose what they have there, and nothing else."""
    lost = {name: kind for name, kind in NODE_KINDS.items() if kind.service in ("echo-far", "far")}
    running = {name: kind.start(own, "far-other") for name, kind in NODE_KINDS.items()}
    for each in running.values():
        assert each.first_line() == "started\n"

    def cut() -> None:
        own.lab.wait(int(own.lab.controller_api("POST", "/v1/nodes/n2/cut")["revision"]))

    kept = {f"kept-{name}": Kind(load, service, port) for name, load, service, port in KEPT}
    in_force = falls(own, "client", "client", lost, cut, kept)
    for name, each in running.items():
        report = each.report(20)
        assert report["failures"] > 0, f"{name}: {report}"
        assert report["last_ok"] < in_force + CUT_GRACE_S, f"{name} passed {report['last_ok'] - in_force:.2f} s after: {report}"
