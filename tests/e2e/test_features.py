"""What a user asks of a mesh beyond the first request, each seen from the outside: routes by header and method, audit mode, added
headers, WebSocket, DNS of other kinds, UDP services, migration from plaintext, operators over TLS, metrics and logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mesh import HTTP_PORT, NS, PROGRAMS, Mesh, policy, until

MIRROR_PORT, UDP_PORT = 8081, 7002
ROOT = Path(__file__).parents[2]

MIRROR = """---
apiVersion: v1
kind: Service
metadata: {{name: mirror-{app}, namespace: shop, annotations: {{mesh.pillion.dev/add-headers: "{add}"}}}}
spec:
  selector: {{app: {app}}}
  ports: [{{name: http-mirror, port: 80, targetPort: 8081}}]
"""
ROUTE = """---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: by-what-is-asked, namespace: shop}
spec:
  parentRefs: [{kind: Service, name: web}]
  rules:
  - matches: [{method: POST}, {headers: [{name: x-canary, value: "yes"}]}, {path: {type: Exact, value: /new}}]
    backendRefs: [{name: far, port: 8080}]
  - matches: [{path: {value: /none}}]
    backendRefs: []
  - backendRefs: [{name: web, port: 8080}]
"""
WATCH = """---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: watched, namespace: shop}
spec:
  selector: {matchLabels: {app: far}}
  action: DENY
  mode: audit
  rules: [{to: [{operation: {paths: [/watched]}}]}]
"""
DATAGRAMS = """---
apiVersion: v1
kind: Service
metadata: {{name: udp-{app}, namespace: shop}}
spec:
  selector: {{app: {app}}}
  ports: [{{name: main, port: 700, targetPort: 7002, protocol: UDP}}]
"""
PERMISSIVE = """---
apiVersion: mesh.pillion.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: migrating, namespace: shop}
spec: {selector: {matchLabels: {app: dark}}, mtls: {mode: PERMISSIVE}}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: migrating, namespace: shop}
spec:
  selector: {matchLabels: {app: dark}}
  rules: [{to: [{operation: {ports: ["7000"]}}]}]
"""
CONFIG = """---
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {accessLog: true}
"""


@contextmanager
def applied(mesh: Mesh, text: str, *names: tuple[str, str]) -> Iterator[None]:
    mesh.apply(text)
    try:
        yield
    finally:
        for kind, name in names:
            mesh.lab.wait(mesh.lab.delete(kind, "" if kind == "MeshConfig" else NS, name))


def asked(mesh: Mesh, source: str, program: str, *arguments: object) -> Any:
    done = mesh.w[source].run([sys.executable, str(PROGRAMS / program), *map(str, arguments)], timeout=20)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def audited(mesh: Mesh, node: str) -> list[dict[str, Any]]:
    return [flow for flow in mesh.flows(node) if flow["verdict"] == "audited"]


@pytest.fixture(scope="module")
def mirrors(mesh: Mesh) -> Iterator[Mesh]:
    """A server that shows what it was sent, beside nginx on both nodes; the one on n2 asks for added headers."""
    running = []
    for app in ("web", "far"):
        running.append(mesh.w[app].start([sys.executable, str(PROGRAMS / "mirror.py"), str(MIRROR_PORT)], name="mirror"))
        mesh.listening(app, MIRROR_PORT)
    every = "x-forwarded-client-cert, x-request-id, traceparent"
    with applied(
        mesh,
        MIRROR.format(app="web", add="") + MIRROR.format(app="far", add=every),
        ("Service", "mirror-web"),
        ("Service", "mirror-far"),
    ):
        yield mesh
    for process in running:
        process.kill()


def test_a_route_by_method_header_and_path(mesh: Mesh) -> None:
    url = f"http://web.shop.mesh:{HTTP_PORT}"
    with applied(mesh, ROUTE, ("HTTPRoute", "by-what-is-asked")):
        asks = {
            "web": [["/"], ["/", "-H", "x-canary: no"], ["/new/er"]],
            "far": [["/", "-X", "POST"], ["/", "-H", "X-Canary: yes"], ["/new"]],
        }
        for server, requests in asks.items():
            for path, *options in requests:
                status, body = mesh.curl("client", url + path, *options)
                assert (status, body.split()[0]) == (200, server), (path, options)
        assert mesh.curl("client", url + "/none")[0] == 500


def test_audit_mode_is_seen_and_harms_nobody(mesh: Mesh) -> None:
    with applied(mesh, WATCH, ("AuthorizationPolicy", "watched")):
        assert mesh.curl("client", f"http://far.shop.mesh:{HTTP_PORT}/watched")[0] == 200
        for node in ("n1", "n2"):
            flows = until(partial(audited, mesh, node), "an audited flow")
            assert flows[-1]["path"] == "/watched" and "shop/watched#0 would DENY" in json.dumps(flows[-1])


def test_bytes_go_through_as_they_came_unless_a_service_asks(mirrors: Mesh) -> None:
    lines = ["X-Odd-CASE: kept", "x-forwarded-client-cert: forged", "X-Request-Id: mine"]
    options = [part for line in lines for part in ("-H", line)]
    plain = json.loads(mirrors.curl("client", "http://mirror-web.shop.mesh/a?b=%20", *options)[1])
    assert plain["start"] == "GET /a?b=%20 HTTP/1.1"
    assert {"X-Odd-CASE", "X-Request-Id", "User-Agent"} <= {name for name, _ in plain["headers"]}
    assert not {"via", "server", "traceparent"} & {name.lower() for name, _ in plain["headers"]}

    asked_for = json.loads(mirrors.curl("client", "http://mirror-far.shop.mesh/a", *options)[1])["headers"]
    values = [value for name, value in asked_for if name.lower() == "x-forwarded-client-cert"]
    assert len(values) == 1 and "URI=spiffe://mesh.local/ns/shop/sa/client" in values[0] and "forged" not in values[0]
    assert [value for name, value in asked_for if name.lower() == "x-request-id"] == ["mine"]
    assert [len(value) for name, value in asked_for if name.lower() == "traceparent"] == [55]


@pytest.mark.parametrize("app", ["web", "far"])
def test_a_websocket(mirrors: Mesh, app: str) -> None:
    assert asked(mirrors, "client", "upgrade.py", f"mirror-{app}.shop.mesh", 80) == {
        "start": "HTTP/1.1 101 Switching Protocols",
        "same": True,
    }


@pytest.mark.parametrize("how", ["udp", "tcp"])
def test_dns_of_every_kind(mesh: Mesh, how: str) -> None:
    (v4,) = asked(mesh, "client", "names.py", how, "A", "far.shop.mesh")
    (v6,) = asked(mesh, "client", "names.py", how, "AAAA", "far.shop.mesh")
    assert int(v4.split(".")[0]) >= 240 and v6.startswith("fd50:494c:")
    assert asked(mesh, "client", "names.py", how, "SRV", "far.shop.mesh") == [f"0 0 {HTTP_PORT} far.shop.mesh."]
    assert asked(mesh, "client", "names.py", how, "A", "nobody.shop.mesh") == []


def test_a_udp_service_on_the_same_node_and_not_across(mesh: Mesh) -> None:
    servers = [
        mesh.w[app].start([sys.executable, str(PROGRAMS / "datagrams.py"), "serve", str(UDP_PORT)], name="udp")
        for app in ("web", "far")
    ]
    names = [("Service", "udp-web"), ("Service", "udp-far")]
    try:
        with applied(mesh, DATAGRAMS.format(app="web") + DATAGRAMS.format(app="far"), *names):
            for where in ("web", "far"):
                listens = ["ip", "netns", "exec", mesh.w[where].pod.netns, "ss", "-Hunl", f"sport = :{UDP_PORT}"]
                until(partial(subprocess.check_output, listens), f"{where} listens")
            here = asked(mesh, "client", "datagrams.py", "ask", "udp-web.shop.mesh", 700)
            for text, source in here.values():
                assert text.split()[0] in mesh.w["client"].addresses and text.endswith(" hello"), here
                assert source == "the name's"
            refused = asked(mesh, "intruder", "datagrams.py", "ask", "udp-web.shop.mesh", 700)
            assert all("PermissionError" in text for text, _ in refused.values()), refused
            across = asked(mesh, "client", "datagrams.py", "ask", "udp-far.shop.mesh", 700)
            assert not any("hello" in text for text, _ in across.values()), across
    finally:
        for server in servers:
            server.kill()


def test_permissive_lets_plaintext_in_where_it_is_named_and_a_rule_allows_it(mesh: Mesh) -> None:
    ask = [sys.executable, str(PROGRAMS / "hold.py"), mesh.w["dark"].addresses[0], "7000", "0.1"]

    def outside() -> str:
        return str(json.loads(mesh.lab.nodes["n2"].run(ask, timeout=20).stdout.splitlines()[-1])["error"])

    with applied(mesh, PERMISSIVE, ("PeerAuthentication", "migrating"), ("AuthorizationPolicy", "migrating")):
        until(lambda: outside() == "", "plaintext from outside")
        assert mesh.echo("client", "dark.shop.mesh") in mesh.w["client"].addresses
        # In the same mesh the others stay strict
        strict = mesh.lab.nodes["n2"].run(["curl", "-sS", "--max-time", "1", f"http://{mesh.w['web'].addresses[0]}:8080/"])
        assert strict.returncode == 28
    assert mesh.lab.nodes["n2"].run(["timeout", "1", *ask]).returncode == 124


def test_an_operator_over_tls(mesh: Mesh, tmp_path: Path) -> None:
    add = ["operator", "add", "ann", "--out", str(tmp_path), "-o", "json"]
    argv = [sys.executable, "-m", "pillion", "--lab", mesh.lab.name, *add]
    made = json.loads(subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout)
    env = {**os.environ, **made["environment"], "PILLION_LAB": "another"}  # what is typed wins

    def pillion(*arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
        argv = ["ip", "netns", "exec", f"pl-{mesh.lab.name}-net", sys.executable, "-m", "pillion"]
        where = ["--controller", "https://10.77.0.2:15443"]
        given = {name: value for name, value in env.items() if name not in without.split()}
        return subprocess.run([*argv, *where, *arguments], env=given, cwd=ROOT, capture_output=True, text=True, timeout=30)

    listed = pillion("get", "svc", "-o", "json")
    assert listed.returncode == 0 and "echo-far" in listed.stdout, listed.stderr
    nobody = pillion("get", "svc", without="PILLION_CERT PILLION_KEY")
    assert nobody.returncode == 1 and "operator certificate" in nobody.stderr, nobody.stderr
    blind = pillion("get", "svc", without="PILLION_CA")
    assert blind.returncode == 1 and "PILLION_CA" in blind.stderr, blind.stderr


def test_labels_of_metrics_do_not_grow_with_what_clients_send(mesh: Mesh) -> None:
    """One connection of 1,000 requests: the proxy counts the first, the kernel the rest, each in its own series."""

    def series() -> set[str]:
        lines = str(mesh.lab.agent_api("n1", "GET", "/metrics")).splitlines()
        return {
            line.rpartition(" ")[0] for line in lines if line.startswith(("pillion_requests_total", "pillion_request_seconds"))
        }

    def send(first: int) -> None:
        urls = f"http://web.shop.mesh:{HTTP_PORT}/x[{first}-{first + 999}]"
        mesh.curl("client", urls, "-H", f"x-what: {first}", "-o", "/dev/null")

    def both_count() -> bool:
        send(1)
        workers = {line.partition('worker="')[2].partition('"')[0] for line in series() if 'source="shop/client"' in line}
        return "kernel" in workers and len(workers) > 1

    until(both_count, "not both the proxy and the kernel count requests")
    before = series()
    send(5000)
    assert series() == before


def test_the_access_log_when_asked_for(mesh: Mesh) -> None:
    log = mesh.lab.paths.logs / "n1-proxy.log"
    with applied(mesh, CONFIG, ("MeshConfig", "mesh")):
        mesh.curl("client", f"http://web.shop.mesh:{HTTP_PORT}/logged?secret=1")
        (line,) = until(lambda: [x for x in log.read_text().splitlines() if "/logged" in x], "a line in the access log")
    entry = json.loads(line)
    assert entry["status"] == 200 and entry["method"] == "GET", entry
    assert entry["source"].endswith(f"ns/{NS}/sa/client"), entry


def test_a_grant_taken_back_shuts_the_workload_out(mesh: Mesh) -> None:
    """Of the identities a node runs, those that are no longer granted are gone at once."""
    late = mesh.lab.add_workload(node="n2", name="late", namespace="guest", labels={"app": "late"})
    try:
        mesh.apply(policy("late", "echo-far", who="none").replace("mesh.local/ns/shop/sa/none", "mesh.local/ns/guest/sa/late"))
        argv = [sys.executable, str(PROGRAMS / "hold.py"), "echo-far.shop.mesh", "7000", "0.1"]
        assert json.loads(late.run(argv).stdout.splitlines()[-1])["error"] == ""
        mesh.lab.wait(mesh.lab.delete("NodeGrant", "", "lab-n2-guest"))
        assert json.loads(late.run(argv).stdout.splitlines()[-1])["error"] != ""
    finally:
        mesh.delete("AuthorizationPolicy", "late")
        late.remove()
