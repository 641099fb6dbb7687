"""The way of a request: names, both families, both nodes, and who the server thinks is calling."""

from __future__ import annotations

import pytest

from tests.e2e.mesh import Mesh, Refused


@pytest.mark.parametrize("server", ["web", "far"])
@pytest.mark.parametrize("family", ["-4", "-6"])
def test_a_name_answers_and_the_server_sees_its_callers_address(mesh: Mesh, server: str, family: str) -> None:
    status, body = mesh.curl("client", f"http://{server}.shop.mesh:8080/", family)
    address = mesh.w["client"].addresses[0 if family == "-4" else 1]
    assert (status, body.strip()) == (200, f"{server} for {'::ffff:' * (family == '-4') + address}") or (
        status,
        body.strip(),
    ) == (200, f"{server} for {address}")


@pytest.mark.parametrize("server", ["echo", "echo-far"])
def test_opaque_tcp_shows_the_callers_address(mesh: Mesh, server: str) -> None:
    assert mesh.echo("client", f"{server}.shop.mesh") in mesh.w["client"].addresses


def test_a_workloads_own_address_is_the_same_service(mesh: Mesh) -> None:
    for address in mesh.w["web"].addresses:
        host = f"[{address}]" if ":" in address else address
        assert mesh.curl("client", f"http://{host}:8080/")[0] == 200
    assert mesh.echo("client", mesh.w["echo-far"].addresses[0]) in mesh.w["client"].addresses


@pytest.mark.parametrize("server", ["echo", "echo-far"])
def test_the_intruder_is_refused_by_opaque_tcp(mesh: Mesh, server: str) -> None:
    with pytest.raises(Refused):
        mesh.echo("intruder", f"{server}.shop.mesh")


@pytest.mark.parametrize("server", ["web", "far"])
def test_the_intruder_gets_a_403_that_names_the_rule(mesh: Mesh, server: str) -> None:
    status, body = mesh.curl("intruder", f"http://{server}.shop.mesh:8080/")
    assert status == 403
    assert "RBAC" in body


def test_plaintext_to_a_pods_address_from_the_other_node_is_dropped(mesh: Mesh) -> None:
    """From the node itself, outside the mesh: no record at the destination, no entry."""
    before = mesh.denied("n1", "ingress_plaintext") + mesh.denied("n1", "ingress_no_record")
    done = mesh.lab.nodes["n2"].run(["curl", "-sS", "--max-time", "2", f"http://{mesh.w['web'].addresses[0]}:8080/"], timeout=10)
    assert done.returncode == 28, done.stderr  # timed out: dropped, not refused
    assert mesh.denied("n1", "ingress_plaintext") + mesh.denied("n1", "ingress_no_record") > before
