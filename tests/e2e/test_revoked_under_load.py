"""The same as test_deny_under_load.py, when it is not a policy that changes: one certificate is revoked, a grant is taken
back, which revokes the certificates it stood for, or a whole node is cut. In a lab of its own, which is worse off afterwards."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab
from tests.conftest import SESSION, opened
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, NS, Mesh, policy, populated, until
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
AGAIN_S = 2.0  # connections are made anew in far less
CALLERS = ("far-client", "far-other")
GRANT = """apiVersion: mesh.pillion.dev/v1alpha1
kind: NodeGrant
metadata: {{name: lab-n2-shop}}
spec: {{node: n2, serviceAccounts: [{accounts}]}}
"""


@pytest.fixture(scope="module")
def own(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with populated(Lab(f"{SESSION}cu", code=tree), opened(tmp_path_factory.mktemp("own"))) as made:
        made.w["far-other"] = made.lab.add_workload("n2", "far-other", namespace=NS)
        served = sorted({kind.service for kind in NODE_KINDS.values()})
        made.apply("".join(policy(f"{who}-{name}", name, who=who) for who in CALLERS for name in served))
        yield made


def revoked(mesh: Mesh) -> set[str]:
    return set(mesh.lab.controller_api("GET", "/v1/state")["items"]["Config//mesh"].get("revoked", ()))


def serial(mesh: Mesh, node: str, name: str) -> str:
    status = mesh.lab.agent_api(node, "GET", "/v1/status")
    return str(next(w["svid"]["serial"] for w in status["workloads"] if w["name"] == name))


HBONE_CLIENT = Path(__file__).parents[1] / "attacks" / "hbone_client.py"


@pytest.mark.parametrize(("holder", "node"), [("far-other", "n2"), ("echo", "n1")], ids=["caller's", "server's"])
def test_one_certificate_that_is_revoked(own: Mesh, holder: str, node: str) -> None:
    """Connections with it end, and no others; its workload has another at once and goes on with that."""
    tunnel = Kind("idle", "echo", ECHO_PORT)
    hit = tunnel.start(own, "far-other")
    spared = (tunnel if holder == "far-other" else Kind("http", "web", HTTP_PORT)).start(own, "far-client")
    assert hit.first_line() == spared.first_line() == "started\n"
    old = serial(own, node, holder)
    answer = own.lab.controller_api("POST", f"/v1/certificates/{old}/revoke")
    assert answer["spiffe"].endswith(f"/ns/{NS}/sa/{holder}")
    own.lab.wait(answer["revision"])
    in_force = time.monotonic()
    until(lambda: time.monotonic() > in_force + AGAIN_S, "")
    report = hit.stopped()
    assert report["failures"] >= 3 and report["ok"] >= 6, report  # each ended, each was made again
    assert spared.stopped()["failures"] == 0
    until(lambda: serial(own, node, holder) not in ("", old), "no new certificate")
    assert old in revoked(own) and serial(own, node, holder) not in revoked(own)


def test_a_certificate_that_was_stolen_and_revoked(own: Mesh, tmp_path: Path) -> None:
    """A copy of key and certificate opens tunnels from the workload's own address, until it is revoked."""
    stolen = tmp_path / "stolen"
    shutil.copytree(own.lab.paths.agent_state("n2"), stolen)
    caller, server = own.w["far-other"], own.w["echo"]

    def tunnel() -> str:
        argv = [sys.executable, str(HBONE_CLIENT), "--state", str(stolen), "--who", f"{NS}/far-other"]
        argv += ["--dial", server.addresses[0], "--authority", f"{server.addresses[0]}:{ECHO_PORT}"]
        argv += ["--forwarded", f'for="{caller.addresses[0]}:4242"', "--sni", f"echo.{NS}.mesh.local"]
        return str(json.loads(own.unhooked("far-other", argv))["answer"])

    assert tunnel() == "200"
    own.lab.wait(own.lab.controller_api("POST", f"/v1/certificates/{serial(own, 'n2', 'far-other')}/revoke")["revision"])
    before = own.denied("n1", "cert_revoked")
    assert tunnel() != "200"
    assert own.denied("n1", "cert_revoked") > before


def test_a_grant_that_is_taken_back_revokes_its_certificates(own: Mesh) -> None:
    gone, kept = serial(own, "n2", "far-client"), serial(own, "n2", "far-other")
    rest = ", ".join(f"{NS}/{name}" for name in ("far", "echo-far", "far-other"))

    def take_back() -> None:
        until(
            lambda: own.metric("n2", "pillion_requests_total", path_kind="express", source=f"{NS}/far-client"), "none is paired"
        )
        own.apply(GRANT.format(accounts=rest))

    falls(own, "far-client", "far-other", NODE_KINDS, take_back)
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
        report = each.stopped()
        assert report["failures"] > 0, f"{name}: {report}"
        assert report["last_ok"] < in_force + CUT_GRACE_S, f"{name} passed {report['last_ok'] - in_force:.2f} s after: {report}"
