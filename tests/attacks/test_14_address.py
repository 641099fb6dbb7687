"""security.md 14: be taken for somebody by one's address: the node's (where probes come from), or a spoofed one.

The attacker has a root shell on a node, or passes on what comes to the node; no hook of a mesh saw its socket. (No probe is
exempt: who probes from the node is such a program.)
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from lab.members import Runner
from lab.process import Process
from tests.attacks.actions import FAMILIES, PROGRAMS, UNANSWERED_S, Dialled, address, dial
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, policy, until

PLAIN_TCP = Mutant(
    "b4",
    "TCP without a record is nobody's",
    ("bpf/ingress.c", "    return PL_R_INGRESS_PLAINTEXT;\n  if (verdict_of(owner->workload, 0, p->dport, IPPROTO_TCP",
     "    return PASS;\n  if (verdict_of(owner->workload, 0, p->dport, IPPROTO_TCP"),
    ("bpf/packet.h", "      may = verdict == PL_ALLOW && (owner->flags & PL_MEMBER_PERMISSIVE);\n  }", "      may = true;\n  }"),
    ("bpf/veth.c", "    if (reply && (v->flags & PL_MEMBER_PERMISSIVE))\n", "    if (reply)\n"),
)  # fmt: skip
PLAIN_UDP = Mutant(
    "b4",
    "a datagram without a record is nobody's",
    ("bpf/ingress.c", "      return PL_R_INGRESS_PLAINTEXT;\n    if (verdict_of", "      return PASS;\n    if (verdict_of"),
)
UNKNOWN_IS_ALLOWED = Mutant(
    "b4",
    "who is not known is asked about as unknown",
    (
        "bpf/ingress.c",
        "  if (verdict_of(owner->workload, 0, p->dport, IPPROTO_TCP, &t->rule) != PL_ALLOW)\n    return PL_R_POLICY_DENIED;\n",
        "",
    ),
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


def from_hosts(mesh: Mesh, *servers: tuple[str, int]) -> list[Dialled]:
    """What a program of each node gets from these, in each family, all at once."""
    places = [
        (node, address(mesh.w[name], family), port)
        for node in mesh.lab.nodes.values()
        for name, port in servers
        for family in FAMILIES
    ]
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(lambda place: dial(*place, timeout_s=UNANSWERED_S), places))


@pytest.mark.attack("a program of the node")
def test_a_program_of_the_node_is_nobody(mesh: Mesh, counted: Counted) -> None:
    """What a kubelet's probe looks like, from the workload's own node and from another's."""
    with counted(mesh, "n1", "ingress_plaintext", times=12):
        assert set(from_hosts(mesh, ("web", HTTP_PORT), ("echo", ECHO_PORT))) == {Dialled("", "TimeoutError")}
    assert "web for" in dial(mesh.w["client"], mesh.w["web"].addresses[0], HTTP_PORT).answer


@pytest.mark.red("a program of the node", PLAIN_TCP)
def test_a_program_of_the_node_is_served_without(broken: Mesh) -> None:
    assert all("web for" in found.answer for found in from_hosts(broken, ("web", HTTP_PORT)))


@pytest.mark.attack("plaintext where it is taken")
def test_permissive_makes_nobody_somebody(mesh: Mesh, counted: Counted) -> None:
    """Plaintext is of an unknown identity, whatever its address: policy names none such."""
    mesh.apply(PERMISSIVE)
    try:
        with counted(mesh, "n1", "policy_denied", times=6):
            assert {found.answer for found in from_hosts(mesh, ("web", HTTP_PORT))} == {""}
        assert "web for" in dial(mesh.w["client"], mesh.w["web"].addresses[0], HTTP_PORT).answer
    finally:
        mesh.delete("PeerAuthentication", "plain")


@pytest.mark.red("plaintext where it is taken", UNKNOWN_IS_ALLOWED)
def test_permissive_lets_anybody_in_without(broken: Mesh) -> None:
    broken.apply(PERMISSIVE)
    assert all("web for" in found.answer for found in from_hosts(broken, ("web", HTTP_PORT)))
    broken.delete("PeerAuthentication", "plain")


# ---- a port of the node


NODE_PORT = 30080


@contextmanager
def node_port(mesh: Mesh, family: int) -> Iterator[str]:
    """n1 passes on what comes to a port of its own, with its own address as the source; where that is."""
    node = mesh.lab.nodes["n1"]
    argv = [sys.executable, str(PROGRAMS / "hairpin.py"), str(NODE_PORT), mesh.w["web"].addresses[family], str(HTTP_PORT)]
    process = node.start(argv, name=f"hairpin-{family}")
    try:
        until(lambda: "ready" in process.output(), "the node's port is not open")
        yield node.addresses[family]
    finally:
        process.kill()


@pytest.mark.attack("through a port of the node")
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_who_comes_through_a_node_port_is_nobody(mesh: Mesh, counted: Counted, family: int) -> None:
    """From another node, from the node itself; a workload cannot even reach it."""
    with node_port(mesh, family) as at:
        for node in ("n1", "n2"):
            with counted(mesh, "n1", "ingress_plaintext"):
                assert dial(mesh.lab.nodes[node], at, NODE_PORT) == Dialled("", "")  # the node took it and had no answer
        with counted(mesh, "n1", "outbound_denied"):
            assert not dial(mesh.w["intruder"], at, NODE_PORT).opened


@pytest.mark.red("through a port of the node", PLAIN_TCP)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_who_comes_through_a_node_port_is_served_without(broken: Mesh, family: int) -> None:
    with node_port(broken, family) as at:
        assert "web for" in dial(broken.lab.nodes["n2"], at, NODE_PORT).answer


# ---- a port of the node, by its kernel


NAT_PORT = 30081
OUTBOUND = """---
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {{name: mesh}}
spec: {{outboundAllow: [{{cidr: "{}", ports: [{}]}}]}}
"""


@contextmanager
def natted(mesh: Mesh, family: int) -> Iterator[str]:
    """The kernel of n1 leads a port of the node to `web`, under the node's own address, and workloads may go there; where
    that is."""
    node = mesh.lab.nodes["n1"]
    at = node.addresses[family]
    argv = [sys.executable, str(PROGRAMS / "nat.py"), str(NAT_PORT), mesh.w["web"].addresses[family], str(HTTP_PORT)]
    process = node.start(argv, name=f"nat-{family}")
    try:
        until(lambda: "ready" in process.output(), "the rules do not stand")
        mesh.apply(OUTBOUND.format(f"{at}/{128 if family else 32}", NAT_PORT))
        yield at
        mesh.lab.wait(mesh.lab.delete("MeshConfig", "", "mesh"))
    finally:
        process.stop()


def through(mesh: Mesh, at: str, *who: Runner) -> list[Dialled]:
    with ThreadPoolExecutor(len(who)) as pool:
        return list(pool.map(lambda each: dial(each, at, NAT_PORT, timeout_s=UNANSWERED_S), who))


@pytest.mark.attack("through NAT in the node's kernel")
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_who_comes_through_nat_is_nobody(mesh: Mesh, counted: Counted, family: int) -> None:
    """From both nodes, and from workloads of both that may go to the node: at the server all have the node's address."""
    who = (*mesh.lab.nodes.values(), mesh.w["intruder"], mesh.w["far-client"])
    with natted(mesh, family) as at, counted(mesh, "n1", "ingress_plaintext", times=len(who)):
        assert through(mesh, at, *who) == [Dialled("", "TimeoutError")] * len(who)
    assert "web for" in dial(mesh.w["client"], mesh.w["web"].addresses[family], HTTP_PORT).answer


@pytest.mark.red("through NAT in the node's kernel", PLAIN_TCP)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_who_comes_through_nat_is_served_without(broken: Mesh, family: int) -> None:
    who = (*broken.lab.nodes.values(), broken.w["intruder"], broken.w["far-client"])
    with natted(broken, family) as at:
        assert all("web for" in found.answer for found in through(broken, at, *who))


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
            for number in (0, 1):
                with counted(mesh, "n1", "ingress_plaintext"):
                    texts.append(spoofed(mesh, node, number))
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
