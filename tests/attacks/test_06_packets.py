"""security.md 6: what never calls connect: packets by AF_PACKET, raw, ping, UDP-Lite and SCTP sockets, foreign source addresses.

The attacker is root in a pod with NET_RAW and NET_ADMIN. The peer is watched on its own interface: not one packet may arrive.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

import pytest

from tests.attacks.actions import run
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import Mesh, until

UNFILTERED = Mutant(
    "a", "the filter on the host's side of the cable", ("bpf/veth.c", "  u16 type = 0;\n  if (bpf_skb_load_bytes(skb, 12,",
     "  u16 type = 0;\n  return TC_OK;\n  if (bpf_skb_load_bytes(skb, 12,"),
)  # fmt: skip
ANY_SOCKET = Mutant(
    "a",
    "socket() and packets of known kinds only",
    ("bpf/create.c", "  if (m->role != PL_ROLE_AGENT) {\n", "  if (0) {\n"),
    ("bpf/egress.c", "    reason = PL_R_EGRESS_PROTOCOL;\n", "    reason = PASS;\n"),
)
PEERS = ("dark", "echo-far")
# What belongs to no connection opens none; a filter without a memory can not tell it from what does. See security.md, "Also"
PASSES = {"dark": ["ack", "ack-of-a-tunnel"], "echo-far": ["ack-of-a-tunnel"]}
REASONS = ("egress_protocol", "spoofed", "outbound_denied", "egress_no_connect")
ANYWHERE = frozenset({"no-ip", "spoofed-loopback"})  # the node's own stack forwards neither: nothing of the mesh is asked


def gateway(mesh: Mesh, name: str) -> str:
    """MAC of the host's end of a workload's cable."""
    workload = mesh.w[name]
    out = mesh.lab.nodes[workload.node].run(["ip", "-j", "link", "show", workload.pod.veth], check=True).stdout
    return str(json.loads(out)[0]["address"])


def flood(mesh: Mesh, peer: str, family: int) -> tuple[list[str], list[str]]:
    """(kinds sent, kinds that arrived at the peer's interface)."""
    marker = secrets.token_hex(8)
    own, to, other = (mesh.w[name].addresses[family] for name in ("intruder", peer, "client"))
    with mesh.w[peer].capture() as seen:
        sent = run(mesh.w["intruder"], "frames.py", gateway(mesh, "intruder"), own, to, other, marker)["sent"]
        after_all(mesh, peer)
    return sent, arrived(seen.frames, marker, sent)


def after_all(mesh: Mesh, peer: str) -> None:
    """What was sent before has arrived by now: a later packet of an allowed caller has."""
    if peer == "echo-far":
        mesh.echo("client", "echo-far.shop.mesh")
    else:
        mesh.lab.nodes[mesh.w[peer].node].run(["ping", "-c1", "-W2", mesh.w[peer].addresses[0]])


def arrived(frames: Sequence[bytes], marker: str, kinds: Sequence[str]) -> list[str]:
    return [kind for kind in kinds if any(f"{marker}/{kind}/".encode() in frame for frame in frames)]


@pytest.mark.attack("packets by AF_PACKET")
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_no_packet_by_hand_arrives(mesh: Mesh, counted: Counted, family: int, peer: str) -> None:
    with counted(mesh, "n1", *REASONS, times=12), counted(mesh, "n1", "spoofed", times=3):
        sent, seen = flood(mesh, peer, family)
    assert len(sent) >= 16
    assert seen == PASSES[peer]


@pytest.mark.red("packets by AF_PACKET", UNFILTERED)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_packets_by_hand_arrive_without(broken: Mesh, family: int, peer: str) -> None:
    sent, seen = flood(broken, peer, family)
    assert set(seen) >= set(sent) - ANYWHERE - {"options", "fragment", "priority-tag"}


def by_sockets(mesh: Mesh, peer: str, family: int) -> tuple[dict[str, str], list[str]]:
    """(what became of each kind, kinds that arrived)."""
    marker = secrets.token_hex(8)
    with mesh.w[peer].capture() as seen:
        results = run(mesh.w["intruder"], "sockets.py", mesh.w[peer].addresses[family], marker)
        after_all(mesh, peer)
    return results, arrived(seen.frames, marker, list(results))


@pytest.mark.attack("raw, ping, UDP-Lite and SCTP sockets")
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_no_socket_of_another_kind_is_made(mesh: Mesh, counted: Counted, family: int, peer: str) -> None:
    with counted(mesh, "n1", "socket_type", times=5):
        results, seen = by_sockets(mesh, peer, family)
    absent = results.pop("sctp")  # this kernel may have none
    assert absent in ("PermissionError", "OSError")
    assert set(results.values()) == {"PermissionError"}, results
    assert seen == []


@pytest.mark.red("raw, ping, UDP-Lite and SCTP sockets", ANY_SOCKET)
@pytest.mark.parametrize("peer", PEERS)
def test_sockets_of_other_kinds_send_without(broken: Mesh, peer: str) -> None:
    results, seen = by_sockets(broken, peer, 0)
    assert set(seen) >= {"raw-icmp", "raw-ip", "header-included", "ping"}, results  # sendmsg() stops UDP-Lite once more


@pytest.mark.attack("packets by AF_PACKET")
def test_the_same_bytes_by_an_ordinary_socket_pass(mesh: Mesh) -> None:
    until(lambda: mesh.echo("client", "echo.shop.mesh"), "an allowed caller is not served")
