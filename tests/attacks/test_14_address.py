"""threats.md 14: be taken for somebody by one's address: the node's (where probes come from), or a spoofed one.

The attacker has a root shell on a node, or a packet rewritten on its way; no hook of a mesh saw its socket. (Probes: not yet.)
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.process import Process
from tests.attacks.actions import FAMILIES, PROGRAMS, Dialled, address, dial, run
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.test_06_packets import gateway
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, policy, until

PLAIN_TCP = Mutant(
    "b3",
    "TCP without a record is nobody's",
    ("bpf/ingress.c", "    return PL_R_INGRESS_PLAINTEXT;\n  if (verdict_of(owner->workload, 0, p->dport, IPPROTO_TCP",
     "    return PASS;\n  if (verdict_of(owner->workload, 0, p->dport, IPPROTO_TCP"),
    ("bpf/packet.h", "      may = verdict == PL_ALLOW && (owner->flags & PL_MEMBER_PERMISSIVE);\n  }", "      may = true;\n  }"),
)  # fmt: skip
PLAIN_UDP = Mutant(
    "b3",
    "a datagram without a record is nobody's",
    ("bpf/ingress.c", "      return PL_R_INGRESS_PLAINTEXT;\n    if (verdict_of", "      return PASS;\n    if (verdict_of"),
)
UNKNOWN_IS_ALLOWED = Mutant(
    "b3",
    "who is not known is asked about as unknown",
    ("bpf/ingress.c", "  if (verdict_of(owner->workload, 0, p->dport, IPPROTO_TCP, &t->rule) != PL_ALLOW)\n    return PL_R_POLICY_DENIED;\n", ""),
)
UDP_PORT = 7001
UDP_SERVICE = f"""---
apiVersion: v1
kind: Service
metadata: {{name: datagrams, namespace: shop}}
spec:
  selector: {{app: dark}}
  ports: [{{name: main, port: {UDP_PORT}, targetPort: {UDP_PORT}, protocol: UDP}}]
"""
PERMISSIVE = """---
apiVersion: mesh.pillion.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: plain, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}}
"""


def from_host(mesh: Mesh, node: str, family: str, server: str = "web", port: int = HTTP_PORT) -> Dialled:
    return dial(mesh.lab.nodes[node], address(mesh.w[server], family), port)


@pytest.mark.attack("a program of the node")
@pytest.mark.parametrize(("server", "port"), [("web", HTTP_PORT), ("echo", ECHO_PORT)])
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_program_of_the_node_is_nobody(mesh: Mesh, counted: Counted, node: str, server: str, port: int) -> None:
    """What a kubelet's probe looks like, from the workload's own node and from another's."""
    for family in FAMILIES:
        with counted(mesh, "n1", "ingress_plaintext"):
            assert from_host(mesh, node, family, server, port) == Dialled("", "TimeoutError")
    assert "web for" in dial(mesh.w["client"], mesh.w["web"].addresses[0], HTTP_PORT).answer


@pytest.mark.red("a program of the node", PLAIN_TCP)
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_program_of_the_node_is_served_without(broken: Mesh, node: str) -> None:
    assert "web for" in from_host(broken, node, "v4").answer


@pytest.mark.attack("plaintext where it is taken")
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_permissive_makes_nobody_somebody(mesh: Mesh, counted: Counted, node: str) -> None:
    """Plaintext is of an unknown identity, whatever its address: policy names none such."""
    mesh.apply(PERMISSIVE)
    try:
        for family in FAMILIES:
            with counted(mesh, "n1", "policy_denied"):
                assert from_host(mesh, node, family).answer == ""
        assert "web for" in dial(mesh.w["client"], mesh.w["web"].addresses[0], HTTP_PORT).answer
    finally:
        mesh.delete("PeerAuthentication", "plain")


@pytest.mark.red("plaintext where it is taken", UNKNOWN_IS_ALLOWED)
def test_permissive_lets_anybody_in_without(broken: Mesh) -> None:
    broken.apply(PERMISSIVE)
    assert "web for" in from_host(broken, "n2", "v4").answer
    broken.delete("PeerAuthentication", "plain")


# ---- packets rewritten on their way


def behind_nat(mesh: Mesh, family: int) -> bool:
    """A packet by hand, which the node gives its own address on the way to web; whether web answers it."""
    intruder, web = mesh.w["intruder"], mesh.w["web"]
    node = mesh.lab.nodes["n1"]
    with run_nat(mesh):
        argv = [gateway(mesh, "intruder"), intruder.addresses[family], web.addresses[family], HTTP_PORT]
        with web.capture() as seen:
            found = bool(run(intruder, "syn.py", *argv)["answered"])
    assert node.name == "n1" and seen.frames
    return found


@contextmanager
def run_nat(mesh: Mesh) -> Iterator[None]:
    """The node masquerades what is forwarded to web's port."""
    node = mesh.lab.nodes["n1"]
    process = node.start([sys.executable, str(PROGRAMS / "masquerade.py"), str(HTTP_PORT)], name="masquerade")
    try:
        until(lambda: "ready" in process.output(), process.output() or "no rule")
        yield
    finally:
        process.stop()


@pytest.mark.attack("a packet behind the node's address")
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_a_packet_behind_the_nodes_address_is_nobodys(mesh: Mesh, counted: Counted, family: int) -> None:
    with counted(mesh, "n1", "ingress_plaintext"):
        assert not behind_nat(mesh, family)


@pytest.mark.red("a packet behind the node's address", PLAIN_TCP)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_a_packet_behind_the_nodes_address_is_answered_without(broken: Mesh, family: int) -> None:
    assert behind_nat(broken, family)


# ---- datagrams


@contextmanager
def datagrams(mesh: Mesh) -> Iterator[Process]:
    """A server of datagrams on n1 that `client` may talk to."""
    mesh.apply(UDP_SERVICE + policy("datagrams", "dark"))
    server = mesh.w["dark"].start([sys.executable, str(PROGRAMS / "datagrams.py"), str(UDP_PORT)], name="datagrams")
    try:
        until(lambda: "ready" in server.output(), "the server does not listen")
        yield server
    finally:
        server.kill()
        mesh.delete("AuthorizationPolicy", "datagrams")
        mesh.delete("Service", "datagrams")


def spoofed(mesh: Mesh, node: str, family: int) -> str:
    """A datagram from a node, under the client's address; its text."""
    source, to, text = mesh.w["client"].addresses[family], mesh.w["dark"].addresses[family], secrets.token_hex(8)
    argv = [sys.executable, str(PROGRAMS / "datagram.py"), source, to, str(UDP_PORT), text]
    assert mesh.lab.nodes[node].run(argv).stdout.strip() == "PASSED"
    return text


@pytest.mark.attack("a spoofed datagram")
def test_a_datagram_is_nobodys_whatever_its_source(mesh: Mesh, counted: Counted) -> None:
    with datagrams(mesh) as server:
        texts = []
        for node in ("n1", "n2"):
            for family in (0, 1):
                with counted(mesh, "n1", "ingress_plaintext"):
                    texts.append(spoofed(mesh, node, family))
        for family in FAMILIES:  # from the client itself they arrive, and all the others would have by now
            text = secrets.token_hex(8)
            argv = [sys.executable, str(PROGRAMS / "datagram.py"), "", address(mesh.w["dark"], family), str(UDP_PORT), text]
            assert mesh.w["client"].run(argv).stdout.strip() == "PASSED"
            until(lambda text=text: text in server.output(), "an allowed datagram does not arrive")
        assert not [text for text in texts if text in server.output()]


@pytest.mark.red("a spoofed datagram", PLAIN_UDP)
def test_a_spoofed_datagram_arrives_without(broken: Mesh) -> None:
    with datagrams(broken) as server:
        text = spoofed(broken, "n2", 0)
        until(lambda: text in server.output(), "the datagram does not arrive")
