"""Workloads with IPv6 addresses alone: names, opaque TCP and HTTP on both nodes, default deny; beside others that have both."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lab.members import Workload
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, NS, PROGRAMS, Mesh, Refused, policy, service

SERVERS = (("six-web", "n1"), ("six-far", "n2"), ("six-echo", "n1"), ("six-echo-far", "n2"), ("six-dark", "n1"))
RESOURCES = (
    "".join(
        service(
            name,
            name,
            HTTP_PORT if name in ("six-web", "six-far") else ECHO_PORT,
            "http" if name in ("six-web", "six-far") else "tcp",
        )
        + (policy(name, name, who="six-client") + policy(f"{name}-too", name) if name != "six-dark" else "")
        for name, _node in SERVERS
    )
    + policy("six-to-web", "web", who="six-client")
    + policy("six-to-echo", "echo", who="six-client")
)
KINDS = ("Service", "AuthorizationPolicy")


@pytest.fixture(scope="module")
def six(mesh: Mesh) -> Iterator[Mesh]:
    """The mesh with workloads whose agent and interface know IPv6 alone."""
    both = Workload.entry

    def entry(workload: Workload) -> dict[str, Any]:
        found = both(workload)
        if workload.name.startswith("six-"):
            found["addresses"] = [workload.pod.addresses[1]]
        return found

    specs = (("six-client", "n1"), *SERVERS)
    before = set(mesh.w)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Workload, "entry", entry)
        try:
            for each in mesh.lab.add_workloads(
                {"node": node, "name": name, "namespace": NS, "service_account": name, "labels": {"app": name}}
                for name, node in specs
            ):
                mesh.w[each.name] = each
                mesh.lab.nodes[each.node].run(["ip", "-4", "-n", each.pod.netns, "addr", "flush", "dev", "eth0"], check=True)
            for name, _node in SERVERS:
                http = name in ("six-web", "six-far")
                server = (
                    ["-m", "http.server", str(HTTP_PORT), "--bind", "::"] if http else [str(PROGRAMS / "echo.py"), str(ECHO_PORT)]
                )
                mesh.w[name].start([sys.executable, *server], name="server")
                mesh.listening(name, HTTP_PORT if http else ECHO_PORT)
            mesh.apply(RESOURCES)
            yield mesh
        finally:
            for name in mesh.w.keys() - before:
                mesh.lab.remove_workload(name)
                del mesh.w[name]
            for item in mesh.lab.controller_api("GET", f"/v1/resources?namespace={NS}", None)["items"]:
                if item["kind"] in KINDS and item["metadata"]["name"].startswith("six-"):
                    mesh.delete(item["kind"], item["metadata"]["name"])


@pytest.mark.parametrize("client", ["six-client", "client"])
@pytest.mark.parametrize("server", ["six-web", "six-far"])
def test_http_by_name_and_by_address(six: Mesh, client: str, server: str) -> None:
    status, body = six.curl(client, f"http://{server}.shop.mesh:8080/")
    assert status == 200, body
    status, body = six.curl(client, f"http://[{six.w[server].pod.addresses[1]}]:8080/")
    assert status == 200, body


@pytest.mark.parametrize("client", ["six-client", "client"])
@pytest.mark.parametrize("server", ["six-echo", "six-echo-far"])
def test_opaque_tcp_shows_the_callers_address(six: Mesh, client: str, server: str) -> None:
    assert six.echo(client, f"{server}.shop.mesh") == six.w[client].pod.addresses[1]


def test_a_server_of_both_families_is_reached(six: Mesh) -> None:
    assert six.curl("six-client", "http://web.shop.mesh:8080/")[0] == 200
    assert six.echo("six-client", "echo.shop.mesh") == six.w["six-client"].pod.addresses[1]


def test_what_no_policy_allows_is_denied(six: Mesh) -> None:
    for client, server in (
        ("six-client", "six-dark"),
        ("intruder", "six-echo"),
        ("intruder", "six-echo-far"),
        ("six-client", "dark"),
    ):
        with pytest.raises(Refused):
            six.echo(client, f"{server}.shop.mesh")
    for server in ("six-web", "six-far"):
        assert six.curl("intruder", f"http://{server}.shop.mesh:8080/")[0] == 403
    before = six.denied("n1", "outbound_denied")
    assert six.curl("six-client", "http://[fd77::2]:15443/")[0] == 0
    assert six.denied("n1", "outbound_denied") > before


def test_plaintext_from_outside_is_dropped(six: Mesh) -> None:
    address = six.w["six-web"].pod.addresses[1]
    done = six.lab.nodes["n2"].run(["curl", "-sS", "--max-time", "2", f"http://[{address}]:8080/"], timeout=10)
    assert done.returncode == 28, done.stderr
