"""security.md 15: names as a way in (rebinding, forged answers), as a way out (tunnels), or as somebody else's right.

The mesh asks a resolver outside for names that MeshConfig lets out; that resolver is the attacker's, on n2's host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import dns.message
import pytest

from lab.process import Process
from tests.attacks.actions import FAMILIES, PROGRAMS, run
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.outside import FORGED, PORT, RIGHT, asking_outside, look_up, packed
from tests.attacks.test_06_packets import gateway
from tests.e2e.mesh import TRUST_DOMAIN, Mesh, until

ANY_ANSWER = Mutant(
    "b1",
    "private, local and virtual addresses are no answer",
    ("l7proxy/dns_core.py", "            if rrset.name.is_subdomain(_ZONE) or not all(", "            if not all(1 or "),
)
ANY_SENDER = Mutant(
    "b1",
    "id, spelling and sender of an answer are compared",
    ("l7proxy/dns.py", "        if pending is None or pending.upstream != source:\n", "        if pending is None:\n"),
)
ANYBODYS_NAMES = Mutant(
    "b1",
    "names are asked for whom policy names",
    ("l7proxy/dns_core.py", "            any(not principals or ", "            any(1 or "),
)
ANY_NAME = Mutant(
    "b2",
    "only names of the policy leave",
    ("l7proxy/dns_core.py", "if any_pattern(names, name)]", "if names]"),
)
OPEN_WAY_OUT = Mutant(
    "b1",
    "a workload's packets have no way to the resolver",
    (
        "mesh/dataplane.py",
        "            yield Dial(NODE_NETNS, resolver",
        "            for netns in sources:\n                yield Dial(netns, resolver.strip('[]'), int(dns_port))\n"
        "            yield Dial(NODE_NETNS, resolver",
    ),
)

FORWARD = f"""
  - "*.outside.test"
  - names: ["*.private.test"]
    principals: ["{TRUST_DOMAIN}/ns/shop/sa/client"]"""


@dataclass
class Outside:
    """The mesh, and the resolver it asks."""

    mesh: Mesh
    resolver: Process

    def asked(self, name: str) -> bool:
        """Whether the resolver heard of a name."""
        return name in self.resolver.output()


@pytest.fixture(scope="module")
def outside(mesh: Mesh) -> Iterator[Outside]:
    with asking_outside(mesh, FORWARD) as resolver:
        yield Outside(mesh, resolver)


@pytest.fixture
def broken_outside(broken: Mesh) -> Iterator[Outside]:
    with asking_outside(broken, FORWARD) as resolver:
        yield Outside(broken, resolver)


# ---- rebinding


def inside(mesh: Mesh) -> dict[str, str]:
    """Addresses that no name from outside may lead to."""
    web = mesh.w["web"].addresses
    return {
        "a pod": web[0],
        "a pod by IPv6": web[1],
        "a pod, mapped": f"::ffff:{web[0]}",
        "a pod, by NAT64": f"64:ff9b::{web[0]}",
        "metadata": "169.254.169.254",
        "loopback": "127.0.0.1",
        "loopback by IPv6": "::1",
        "a virtual address": "240.0.0.1",
        "a virtual address by IPv6": "fd50:494c::1",
        "link-local": "fe80::1",
        "the node": "10.77.0.11",
        "a carrier's": "100.64.0.1",
        "metadata, by a NAT64 of one's own": "64:ff9b:1::a9fe:a9fe",
        "loopback, as IPv6 once wrote IPv4": "::7f00:1",
        "a site's": "fec0::1",
    }


@pytest.mark.attack("rebinding")
@pytest.mark.parametrize("by", ["udp", "tcp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_from_outside_leads_inside(outside: Outside, counted: Counted, family: str, by: str) -> None:
    mesh = outside.mesh
    names = [f"x{packed(address)}.outside.test." for address in inside(mesh).values()]
    with counted(mesh, "n1", "dns_rebinding", times=len(names)):
        for kind in ("A",) if by == "tcp" else ("A", "AAAA"):
            found = look_up(mesh, "client", *names, kind=kind, family=family, by=by)
            assert (found.rcode, found.answer) == ("REFUSED", [])
    assert look_up(mesh, "client", "www.outside.test.", family=family, by=by).answer == [RIGHT]


@pytest.mark.attack("rebinding")
@pytest.mark.parametrize("name", ["h0a4d010c.outside.test.", f"h{packed('fd77:1::c')}.outside.test.", "poison.outside.test."])
def test_neither_by_hints_nor_beside_the_answer(outside: Outside, counted: Counted, name: str) -> None:
    with counted(outside.mesh, "n1", "dns_rebinding"):
        assert look_up(outside.mesh, "client", name, kind="HTTPS" if name[0] == "h" else "A").rcode == "REFUSED"


@pytest.mark.red("rebinding", ANY_ANSWER)
def test_a_name_from_outside_leads_inside_without(broken_outside: Outside) -> None:
    web = broken_outside.mesh.w["web"].addresses[0]
    assert look_up(broken_outside.mesh, "client", f"x{packed(web)}.outside.test.").answer == [web]


# ---- forged answers


@pytest.mark.attack("a forged answer")
@pytest.mark.parametrize("family", FAMILIES)
def test_forged_answers_are_not_believed(outside: Outside, counted: Counted, family: str) -> None:
    with counted(outside.mesh, "n1", "dns_stray_answer", times=3):
        assert look_up(outside.mesh, "client", "forged.outside.test.", family=family).answer == [RIGHT]


@pytest.mark.red("a forged answer", ANY_SENDER)
def test_forged_answers_are_believed_without(broken_outside: Outside) -> None:
    assert look_up(broken_outside.mesh, "client", "forged.outside.test.").answer == [FORGED]


# ---- the names of others


@pytest.mark.attack("another identity's names")
@pytest.mark.parametrize("by", ["udp", "tcp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_is_for_whom_policy_names(outside: Outside, counted: Counted, family: str, by: str) -> None:
    mesh, name = outside.mesh, f"api-{family}-{by}.private.test."
    with counted(mesh, "n1", "dns_name_denied"):
        assert look_up(mesh, "intruder", name, family=family, by=by).rcode == "REFUSED"
    assert not outside.asked(name)
    assert look_up(mesh, "client", name, family=family, by=by).answer == [RIGHT]
    with counted(mesh, "n1", "dns_name_denied"):  # nor when it is known
        assert look_up(mesh, "intruder", name, family=family, by=by).rcode == "REFUSED"


@pytest.mark.attack("another identity's names")
def test_knowing_its_address_is_no_right(outside: Outside, counted: Counted) -> None:
    """What a name resolves to opens nothing: destinations outside are opened by range."""
    mesh = outside.mesh
    assert look_up(mesh, "client", "api.private.test.").answer == [RIGHT]
    with counted(mesh, "n1", "outbound_denied"):
        assert run(mesh.w["intruder"], "dial.py", "connect", RIGHT, 443)["error"] == "PermissionError"


@pytest.mark.red("another identity's names", ANYBODYS_NAMES)
def test_a_name_is_for_all_without(broken_outside: Outside) -> None:
    assert look_up(broken_outside.mesh, "intruder", "api.private.test.").answer == [RIGHT]


# ---- tunnels


def tunnel(by: str) -> list[str]:
    """As iodine does: data in long labels, and what comes back in TXT or NULL records."""
    return [f"{part:02x}{'0' * 58}.{'1' * 60}.{'2' * 60}.{by}.tunnel.test." for part in range(4)]


@pytest.mark.attack("a tunnel of long labels")
@pytest.mark.parametrize("kind", ["TXT", "NULL", "A"])
@pytest.mark.parametrize("by", ["udp", "tcp"])
def test_data_does_not_leave_in_names(outside: Outside, counted: Counted, by: str, kind: str) -> None:
    with counted(outside.mesh, "n1", "dns_name_denied", times=4):
        assert look_up(outside.mesh, "intruder", *tunnel(by), kind=kind, by=by).rcode == "REFUSED"
    assert not outside.asked("tunnel.test")


@pytest.mark.red("a tunnel of long labels", ANY_NAME)
def test_data_leaves_in_names_without(broken_outside: Outside) -> None:
    look_up(broken_outside.mesh, "intruder", *tunnel("udp"), kind="TXT")
    assert broken_outside.asked("tunnel.test")


def by_hand(outside: Outside, family: int) -> str:
    """A query past every hook, straight to the resolver; its name."""
    mesh, name = outside.mesh, f"by-hand-{family}.outside.test."
    intruder, to = mesh.w["intruder"], mesh.lab.nodes["n2"].addresses[family]
    wire = dns.message.make_query(name, "A").to_wire().hex()
    argv = [
        sys.executable,
        str(PROGRAMS / "raw_udp.py"),
        gateway(mesh, "intruder"),
        intruder.addresses[family],
        to,
        str(PORT),
        wire,
    ]
    assert intruder.run(argv, timeout=30).returncode == 0
    return name


@pytest.mark.attack("packets to the resolver")
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_no_packet_reaches_the_resolver(outside: Outside, counted: Counted, family: int) -> None:
    mesh = outside.mesh
    with counted(mesh, "n1", "outbound_denied"):
        name = by_hand(outside, family)
    with counted(mesh, "n1", "outbound_denied"):
        resolver = mesh.lab.nodes["n2"].addresses[family]
        assert run(mesh.w["intruder"], "lookup.py", resolver, PORT, "udp", "A", name)["error"] == "PermissionError"
    assert look_up(mesh, "client", "after.outside.test.").answer == [RIGHT]
    assert not outside.asked(name)


@pytest.mark.red("packets to the resolver", OPEN_WAY_OUT)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_packets_reach_the_resolver_without(broken_outside: Outside, family: int) -> None:
    name = by_hand(broken_outside, family)
    until(lambda: broken_outside.asked(name), "the query does not arrive")
