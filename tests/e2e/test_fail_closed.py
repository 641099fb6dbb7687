"""Whatever is missing, full, corrupt, expired or foreign is denied, and each denial has its own counted reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.e2e.certificates import Issuer, new_key, request_pem
from tests.e2e.kernel import Kernel
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, TRUST_DOMAIN, Mesh, Refused, policy, until

HBONE_CLIENT = Path(__file__).parents[1] / "attacks" / "hbone_client.py"
REPAIRED_WITHIN_S = 8.0  # the agent looks every 5 s
FAR_CLIENT = f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/far-client"


@pytest.fixture
def kernel(mesh: Mesh) -> Kernel:
    return Kernel(mesh, "n1")


@pytest.fixture
def far_client_allowed(mesh: Mesh) -> Iterator[None]:
    mesh.apply(policy("far-client-echo", "echo", who="far-client") + policy("far-client-web", "web", who="far-client"))
    yield
    mesh.delete("AuthorizationPolicy", "far-client-echo")
    mesh.delete("AuthorizationPolicy", "far-client-web")


def told(mesh: Mesh, node: str, reason: str, since: float) -> None:
    """The denial can be seen in `pillion flows`."""

    def seen() -> bool:
        return any(f["reason"] == reason and f["verdict"] == "denied" and f["time"] >= since for f in mesh.flows(node))

    until(seen, f"no flow with reason {reason}")


# ---- an unknown map entry


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dests", "outbound_denied"),
        ("backends", "map_miss"),
        ("policy", "policy_denied"),
        ("members", "unknown_cgroup"),
    ],
)
def test_an_unknown_entry_denies_native_connections(mesh: Mesh, kernel: Kernel, name: str, reason: str) -> None:
    vip = kernel.vip("echo")
    keys = {
        "dests": [kernel.dest(vip, ECHO_PORT)],
        "backends": kernel.backends(vip, ECHO_PORT),
        "policy": [kernel.policy("echo", "client", ECHO_PORT)],
        "members": [kernel.member("client")],
    }[name]
    before, since = mesh.denied("n1", reason), time.time() - 1
    with kernel.without(name, keys), pytest.raises(Refused):
        mesh.echo("client", vip)
    assert mesh.denied("n1", reason) > before
    told(mesh, "n1", reason, since)
    assert mesh.echo("client", vip)


def test_an_unknown_listener_denies_captured_connections(mesh: Mesh, kernel: Kernel) -> None:
    before, since = mesh.denied("n1", "no_listener"), time.time() - 1
    with kernel.without("listeners", [kernel.listener("client")]):
        assert mesh.curl("client", f"http://{kernel.vip('web')}:{HTTP_PORT}/")[0] == 0
    assert mesh.denied("n1", "no_listener") > before
    told(mesh, "n1", "no_listener", since)
    assert mesh.curl("client", f"http://{kernel.vip('web')}:{HTTP_PORT}/")[0] == 200


@pytest.mark.usefixtures("far_client_allowed")
def test_an_unknown_dial_denies_the_proxy(mesh: Mesh, kernel: Kernel) -> None:
    before, since = mesh.denied("n1", "dial_denied"), time.time() - 1
    with kernel.without("dials", kernel.dials("echo", ECHO_PORT)), pytest.raises(Refused):
        mesh.echo("far-client", kernel.vip("echo"))
    assert mesh.denied("n1", "dial_denied") > before
    told(mesh, "n1", "dial_denied", since)
    assert mesh.echo("far-client", kernel.vip("echo"))


@pytest.mark.parametrize(("field", "value", "reason"), [("lease_until_ns", 1, "lease_expired"), ("schema", 99, "schema")])
def test_a_policy_past_its_lease_or_of_another_schema_denies(
    mesh: Mesh, kernel: Kernel, field: str, value: int, reason: str
) -> None:
    """Both what is native and what the proxy would serve; what is open goes on."""
    vip, before, since = kernel.vip("echo"), mesh.denied("n1", reason), time.time() - 1
    holder = mesh.program("client", "hold.py", vip, ECHO_PORT, 60)
    assert holder.first_line().startswith("open")
    with kernel.configured(**{field: value}):
        with pytest.raises(Refused):
            mesh.echo("client", vip)
        assert mesh.curl("client", f"http://{kernel.vip('web')}:{HTTP_PORT}/")[0] == 0
    assert holder.stopped()["error"] == ""
    assert mesh.denied("n1", reason) >= before + 2
    told(mesh, "n1", reason, since)
    assert passes(mesh, vip)


LEASE_S = 4
LEASE = f"""
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {{name: mesh}}
spec: {{policyLeaseSeconds: {LEASE_S}}}
"""


def test_without_a_word_of_the_agent_nothing_new_passes_past_the_lease(mesh: Mesh, kernel: Kernel) -> None:
    """The operator chose so: by default a node goes on with the policy it has."""
    vip, url = kernel.vip("echo"), f"http://{kernel.vip('web')}:{HTTP_PORT}/"
    before, since = mesh.denied("n1", "lease_expired"), time.time() - 1
    mesh.apply(LEASE)
    try:
        holder = mesh.program("client", "hold.py", vip, ECHO_PORT, 90)
        assert holder.first_line().startswith("open")
        with kernel.agent_paused():
            assert passes(mesh, vip)
            until(lambda: not passes(mesh, vip), "new connections still pass", LEASE_S + 2)
            assert mesh.curl("client", url)[0] in (0, 503)
            assert holder.popen.poll() is None
        until(lambda: passes(mesh, vip), "the agent is back, and nothing passes")
        until(lambda: mesh.curl("client", url)[0] == 200, "the agent is back, and no request passes")
        assert mesh.denied("n1", "lease_expired") >= before + 2
        told(mesh, "n1", "lease_expired", since)
        assert holder.stopped()["error"] == ""
    finally:
        mesh.lab.wait(mesh.lab.delete("MeshConfig", "", "mesh"))


def test_the_agent_puts_back_what_is_gone(mesh: Mesh, kernel: Kernel) -> None:
    vip = kernel.vip("echo")
    repaired = mesh.metric("n1", "pillion_agent_events_total", kind="maps_repaired")
    with kernel.agent_paused():
        kernel.remove("backends", kernel.backends(vip, ECHO_PORT))
        kernel.remove("policy", [kernel.policy("echo", "client", ECHO_PORT)])
        kernel.remove("dests", [kernel.dest(vip, ECHO_PORT)])
        with pytest.raises(Refused):
            mesh.echo("client", vip)
    until(lambda: passes(mesh, vip), "the maps are not repaired", REPAIRED_WITHIN_S)
    assert mesh.metric("n1", "pillion_agent_events_total", kind="maps_repaired") >= repaired + 3


def passes(mesh: Mesh, host: str) -> bool:
    try:
        return bool(mesh.echo("client", host))
    except Refused:
        return False


# ---- a full map


def test_a_full_map_denies_what_is_new_and_spares_what_is_open(mesh: Mesh, kernel: Kernel) -> None:
    vip, before, since = kernel.vip("echo"), mesh.denied("n1", "map_full"), time.time() - 1
    holder = mesh.program("client", "hold.py", vip, ECHO_PORT, 60)
    assert holder.first_line().startswith("open")
    with kernel.full("arriving"):
        with pytest.raises(Refused):
            mesh.echo("client", vip)
        assert mesh.denied("n1", "map_full") > before
        assert mesh.curl("client", f"http://{kernel.vip('web')}:{HTTP_PORT}/")[0] == 0
    assert holder.popen.poll() is None  # it was there all the time
    assert passes(mesh, vip)
    assert mesh.curl("client", f"http://{kernel.vip('web')}:{HTTP_PORT}/")[0] == 200
    report = holder.stopped()
    assert report["error"] == ""
    assert report["rounds"] > 50
    told(mesh, "n1", "map_full", since)


# ---- a corrupt snapshot


def test_a_corrupt_state_file_is_refused_and_the_kernel_polices_meanwhile(mesh: Mesh, kernel: Kernel) -> None:
    """The stream's snapshots are garbled in tests/nodeagent; here it is the agent's own file."""
    vip = kernel.vip("echo")
    holder = mesh.program("client", "hold.py", vip, ECHO_PORT, 90)
    assert holder.first_line().startswith("open")
    with mesh.lab.stopped("n1-agent"):
        path = mesh.lab.paths.agent_state("n1") / "state"
        content = path.read_bytes()
        changed = content.replace(b'"action":"ALLOW"', b'"action":"AUDIT"', 1)  # still a state, to whoever checks no digest
        assert changed != content
        path.write_bytes(changed)
        assert passes(mesh, vip)
        with pytest.raises(Refused):
            mesh.echo("intruder", vip)
        assert mesh.curl("intruder", f"http://{kernel.vip('web')}:{HTTP_PORT}/")[0] == 403
    assert mesh.metric("n1", "pillion_agent_events_total", kind="state_corrupt") == 1
    assert holder.stopped()["error"] == ""
    assert passes(mesh, vip)
    with pytest.raises(Refused):
        mesh.echo("intruder", vip)
    status = mesh.lab.agent_api("n1", "GET", "/v1/status")
    assert status["controller"]["connected"]
    assert status["revision"] == mesh.lab.controller_api("GET", "/v1/status")["revision"]
    # What it recovered is what it keeps
    until(lambda: b'"action":"AUDIT"' not in path.read_bytes(), "the corrupt file still stands")


# ---- certificates


@pytest.fixture(scope="module")
def authority(mesh: Mesh) -> Issuer:
    return authority_of(mesh)


def authority_of(mesh: Mesh) -> Issuer:
    """The mesh's own: its intermediate from any chain, its key from the controller's state."""
    chain = x509.load_pem_x509_certificates(stored_svid(mesh, FAR_CLIENT)["chain"].encode())
    (path,) = (mesh.lab.paths.controller_state / "ca").glob("*.intermediate.key")
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Issuer(chain[1], key)


def stored_svid(mesh: Mesh, spiffe: str) -> dict[str, Any]:
    """Chain and key as n2's agent keeps them."""
    for path in (mesh.lab.paths.agent_state("n2") / "svids").iterdir():
        stored: dict[str, Any] = json.loads(path.read_bytes())
        if stored["spiffe"] == spiffe:
            return stored
    raise AssertionError(f"n2 holds no certificate of {spiffe}")


def loot(mesh: Mesh, folder: Path, chain: str, key: str) -> Path:
    """A directory as hbone_client.py finds one on a node that was taken over, with this pair in it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(mesh.lab.paths.agent_state("n2") / "bundle.pem", folder)
    (folder / "svid").write_text(json.dumps({"spiffe": FAR_CLIENT, "chain": chain, "key": key}, separators=(",", ":")))
    return folder


def knock(mesh: Mesh, state: Path) -> str:
    """From far-client's netns on n2, hooks and filter out of the way, ask for web on n1: "200", or the refusal."""
    web, source = mesh.w["web"], mesh.w["far-client"]
    argv = [
        *(sys.executable, str(HBONE_CLIENT), "--state", str(state), "--who", "shop/far-client", "--dial", web.addresses[0]),
        *("--authority", f"{web.addresses[0]}:{HTTP_PORT}", "--forwarded", f'for="{source.addresses[0]}:4242"'),
        *("--sni", f"web.shop.{TRUST_DOMAIN}"),
    ]
    return str(json.loads(mesh.unhooked(source.name, argv))["answer"])


@pytest.fixture(scope="module", autouse=True)
def filters_back(mesh: Mesh) -> Iterator[None]:
    """The agent puts the filter back by itself."""
    yield
    veth = mesh.w["far-client"].pod.veth
    until(lambda: "clsact" in mesh.lab.nodes["n2"].run(["tc", "qdisc", "show", "dev", veth]).stdout, "the filter is off")


@pytest.mark.usefixtures("far_client_allowed")
def test_a_good_certificate_is_served(mesh: Mesh, authority: Issuer, tmp_path: Path) -> None:
    """Bad ones: tests/attacks/test_09_certificates.py."""
    assert knock(mesh, loot(mesh, tmp_path / "state", *authority.issue([FAR_CLIENT]))) == "200"


# ---- identities a node may not have


@pytest.mark.parametrize(
    ("spiffe", "reason"),
    [
        (f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/web", "identity_not_scheduled"),  # granted, but runs on n1 only
        (f"spiffe://{TRUST_DOMAIN}/ns/treasury/sa/keys", "identity_not_granted"),
        ("spiffe://other.local/ns/shop/sa/far-client", "foreign_trust_domain"),
    ],
)
def test_a_node_taken_over_gets_no_certificate_for_others(mesh: Mesh, spiffe: str, reason: str) -> None:
    state = mesh.lab.paths.agent_state("n2")
    argv = [
        *("curl", "-sS", "--max-time", "5", "-w", "\n%{http_code}", "https://10.77.0.2:15443/v1/agent/sign"),
        *("--cacert", str(state / "bundle.pem"), "--cert", str(state / "node.pem"), "--key", str(state / "node.key")),
        *("--data-binary", "@-"),
    ]

    def ask(what: str) -> tuple[int, dict[str, Any]]:
        body = json.dumps({"csr": request_pem(new_key()), "spiffe": what})
        out = mesh.lab.nodes["n2"].run(argv, input=body, timeout=15)
        text, _, status = out.stdout.rpartition("\n")
        assert text, out.stderr
        return int(status), json.loads(text)

    assert ask(FAR_CLIENT)[0] == 200  # or the refusal proves nothing
    before = mesh.refused_by_controller(reason)
    status, answer = ask(spiffe)
    assert (status, answer["reason"]) == (403, reason)
    assert mesh.refused_by_controller(reason) == before + 1


# ---- a node that is cut


@pytest.mark.usefixtures("far_client_allowed")
def test_a_cut_node_is_dead_within_seconds_even_if_it_ignores_the_cut(mesh: Mesh, tmp_path: Path) -> None:
    """n2's agent is stopped at first, so that nothing but n1 can be what ends and refuses."""
    shutil.copytree(mesh.lab.paths.agent_state("n2"), stolen := tmp_path / "stolen")
    assert knock(mesh, stolen) == "200"
    (agent,) = mesh.lab.pids("n2", "agent")
    revoked, since = mesh.denied("n1", "cert_revoked"), time.time() - 1
    holder = mesh.program("far-client", "hold.py", "echo.shop.mesh", ECHO_PORT, 90)
    assert holder.first_line().startswith("open")
    assert open_at_echo(mesh)
    try:
        os.kill(agent, signal.SIGSTOP)
        mesh.lab.controller_api("POST", "/v1/nodes/n2/cut")
        until(lambda: not open_at_echo(mesh), "the connection of the cut node's workload still stands", 5)
        until(lambda: mesh.denied("n1", "cert_revoked") > revoked, "its tunnel is not refused")
        told(mesh, "n1", "cert_revoked", since)
        # Its addresses are nobody's now: the answer to its SYN does not leave n1, or whoever is asked refuses
        reasons = ("outbound_denied", "cert_revoked", "node_cut", "peer_address", "identity_unknown")
        before = sum(mesh.denied("n1", reason) for reason in reasons)
        with pytest.raises(Refused):
            mesh.echo("far-client", mesh.w["echo"].addresses[0])
        assert sum(mesh.denied("n1", reason) for reason in reasons) > before
        os.kill(agent, signal.SIGCONT)  # now it hears of the cut, and obeys
        until(lambda: not mesh.lab.answers("n2", "/v1/ready"), "n2 does not notice", 5)
        assert holder.report(timeout_s=20)["error"]
    finally:
        os.kill(agent, signal.SIGCONT)
        # Only a new token brings it back; its agent reads it when it is turned away
        token = mesh.lab.controller_api("POST", "/v1/nodes/n2/token", {"ttl_s": 600, "readmit": True})["token"]
        mesh.lab.paths.join_token("n2").write_text(token)
        until(lambda: member(mesh, "n2"), "n2 is not a member again")
        mesh.lab.wait_enrolled(workload for workload in mesh.w.values() if workload.node == "n2")
    until(lambda: mesh.curl("client", f"http://far.shop.mesh:{HTTP_PORT}/")[0] == 200, "n2 does not serve again")
    until(lambda: mesh.curl("far-client", f"http://web.shop.mesh:{HTTP_PORT}/")[0] == 200, "n2's workloads are not served")
    revoked = mesh.denied("n1", "cert_revoked")
    assert knock(mesh, stolen) != "200"  # what was stolen before stays worthless
    assert mesh.denied("n1", "cert_revoked") > revoked


def open_at_echo(mesh: Mesh) -> str:
    """Connections to the echo server, as its own node has them."""
    argv = ["ip", "netns", "exec", mesh.w["echo"].pod.netns, "ss", "-Htn", "state", "established", f"sport = :{ECHO_PORT}"]
    return mesh.lab.nodes["n1"].run(argv, check=True).stdout.strip()


def member(mesh: Mesh, node: str) -> bool:
    nodes = mesh.lab.controller_api("GET", "/v1/status")["nodes"]
    return any(n["name"] == node and n["connected"] and n["ready"] and not n["cut"] for n in nodes)
