"""The filter on a veth's host side: raw frames from the workload's end, what comes out at the other workload."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from mesh.dataplane import Dest, DestKey, DestKind, Dial, Egress, NodePlan
from nodeagent import counters
from nodeagent.datapath_api import DatapathError
from nodeagent.datapath_live import Datapath
from nodeagent.layouts import address
from nodeagent.tc import TAKEN, VethGuard
from tests.nodeagent.kernel_world import World, loaded, sh

A4, A6 = "10.99.7.1", "fd99:7::1"
PEER4, PEER6 = "10.99.7.2", "fd99:7::2"  # seen from the filter: the world outside this node


class Rig:
    """``b`` is the node: it guards its end of the veth. Frames come from ``a``'s end by AF_PACKET."""

    def __init__(self, world: World, datapath: Datapath) -> None:
        self.world, self.datapath = world, datapath
        self.cookie = datapath.adopt(world.a.path)
        self.node = datapath._places[datapath.adopt(world.b.path)]
        self.workload = datapath._places[self.cookie]
        self.guard: VethGuard = self.node.run(lambda: VethGuard(world.bpf_dir, world.run_dir))
        self.sender = self.workload.run(self._packet_socket)
        self.receiver = self.node.run(self._packet_socket)
        self.receiver.settimeout(5)
        self.sent = 0

    @staticmethod
    def _packet_socket() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind(("eth0", 3))
        return sock

    def counts(self) -> dict[str, int]:
        return counters.read(self.datapath._maps["counters"], self.datapath._layouts.reasons, counters.possible_cpus())

    def reason(self, packet: object) -> str:
        """The reason for which the filter dropped it; "" if it passed."""
        before = self.counts()
        self.sender.send(bytes(Ether(dst="ff:ff:ff:ff:ff:ff") / packet))
        self.sent += 1
        marker = bytes(Ether(dst="ff:ff:ff:ff:ff:ff") / ARP(psrc="0.0.0.0", pdst=f"10.98.0.{self.sent}"))
        self.sender.send(marker)
        while self.receiver.recv(65536) != marker:  # frames keep their order: the verdict before it has been counted
            pass
        after = self.counts()
        changed = [reason for reason in after if after[reason] != before[reason]]
        assert len(changed) <= 1, changed
        return changed[0] if changed else ""


PLAN = NodePlan(
    dests={DestKey("10.99.9.9", 0, "tcp"): Dest(DestKind.DENY, reason="port_undeclared")},
    egress={"192.0.2.0/24": Egress(True, (443,)), "2001:db8::/32": Egress(True)},
)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with loaded() as (world, datapath):
        made = Rig(world, datapath)
        plan = replace(PLAN, dials=frozenset({Dial(made.cookie, "10.99.9.9", 15008), Dial(made.cookie, "fd99:9::9", 15008)}))
        datapath.apply(plan, 1)
        made.node.run(lambda: made.guard.guard("eth0", (A4, A6), made.cookie, 0))
        with closing(made.sender), closing(made.receiver), closing(made.guard):
            yield made


def tcp(destination: str, port: int, source: str = A4, flags: str = "S", sport: int = 40000) -> object:
    return IP(src=source, dst=destination) / TCP(sport=sport, dport=port, flags=flags)


def tcp6(destination: str, port: int, source: str = A6, flags: str = "S", sport: int = 40000) -> object:
    return IPv6(src=source, dst=destination) / TCP(sport=sport, dport=port, flags=flags)


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (tcp("10.99.9.9", 15008), ""),
        (tcp6("fd99:9::9", 15008), ""),
        (tcp("10.99.9.9", 80), "outbound_denied"),
        (tcp("10.99.9.9", 80, flags="SA", sport=15008), ""),
        (tcp("10.99.9.9", 80, flags="S", sport=15008), "outbound_denied"),
        (tcp("10.99.8.8", 15008), "outbound_denied"),
        (IP(src=A4, dst="10.99.9.9") / UDP(sport=1, dport=15008), "outbound_denied"),
        (IP(src=A4, dst="192.0.2.7", ihl=0, len=443) / TCP(dport=80), "egress_protocol"),
        (tcp("192.0.2.7", 443), ""),
        (tcp("192.0.2.7", 80), "outbound_denied"),
        (tcp6("2001:db8::7", 80), ""),
        (tcp6("2001:db9::7", 80), "outbound_denied"),
        (tcp("192.0.2.7", 443, source="10.99.7.77"), "spoofed"),
        (tcp6("2001:db8::7", 80, source="fd99:7::77"), "spoofed"),
        (tcp(A4, 1), "egress_no_connect"),  # a workload of this node: nobody connected
        (tcp(A4, 1, flags="A"), ""),  # opens nothing; its ingress hook decides
        (IP(src=A4, dst=A4) / UDP(sport=1, dport=1), "egress_no_connect"),
        (IP(src=A4, dst=A4, proto=17, frag=9) / (b"middle" * 8), ""),
        (IP(src=A4, dst=A4, proto=6, frag=9) / (b"middle" * 8), "egress_protocol"),
        (IPv6(src=A6, dst=A6) / IPv6ExtHdrFragment(nh=58) / (b"ping" * 8), "egress_protocol"),
        (IPv6(src=A6, dst=A6) / IPv6ExtHdrFragment(nh=17) / UDP(sport=1, dport=1), "egress_no_connect"),
        (IP(src=A4, dst="192.0.2.7") / UDP(sport=1, dport=443), ""),
        (IP(src=A4, dst="192.0.2.7") / ICMP() / b"tunnel", "egress_protocol"),
        (IP(src=A4, dst="192.0.2.7", proto=132) / (b"sctp" * 8), "egress_protocol"),
        (IP(src=A4, dst="192.0.2.7", proto=136) / (b"lite" * 8), "egress_protocol"),
        (IP(src=A4, dst="192.0.2.7", frag=9) / (b"middle" * 8), "egress_protocol"),
        (IPv6(src=A6, dst="2001:db8::7") / ICMPv6EchoRequest(), "egress_protocol"),
        (IPv6(src=A6, dst="ff02::1:ff00:2", hlim=255) / ICMPv6ND_NS(tgt=PEER6), ""),
        (IPv6(src=A6, dst=PEER6, hlim=255) / ICMPv6ND_NA(tgt=A6), ""),
        (IPv6(src=A6, dst=PEER6, hlim=255) / ICMPv6ND_NA(tgt="fd99:7::77"), "spoofed"),
        (ARP(psrc=A4, pdst=PEER4), ""),
        (ARP(psrc="10.99.7.77", pdst=PEER4), "spoofed"),
        (Raw(b"\0" * 64), "egress_protocol"),
    ],
)
def test_what_passes(rig: Rig, packet: object, reason: str) -> None:
    assert rig.reason(packet) == reason


def test_addresses_without_an_interface_are_of_this_node(rig: Rig) -> None:
    def of_this_node(address: str) -> bool:
        return rig.reason(tcp(address, 1, flags="A")) == ""

    def share(*addresses: str) -> None:
        rig.node.run(lambda: rig.guard.set_unguarded(addresses))

    assert not of_this_node(PEER4)
    share(PEER4, PEER6, A4)
    assert of_this_node(PEER4) and of_this_node(A4)
    assert rig.reason(tcp(PEER4, 1)) == rig.reason(tcp6(PEER6, 1)) == "egress_no_connect"  # nobody connected
    assert rig.reason(tcp("192.0.2.7", 443, source=PEER4)) == "spoofed"
    rig.node.run(rig.guard.sweep)
    rig.node.run(lambda: rig.guard.unguard("eth0"))  # which takes along what is its own alone
    rig.node.run(lambda: rig.guard.guard("eth0", ("10.99.7.3",), rig.cookie, 0))
    assert rig.reason(tcp(A4, 1, "10.99.7.3", flags="A")) == rig.reason(tcp(PEER4, 1, "10.99.7.3", flags="A")) == ""
    rig.node.run(lambda: rig.guard.guard("eth0", (A4, A6), rig.cookie, 0))
    with closing(rig.node.run(lambda: VethGuard(rig.world.bpf_dir, rig.world.run_dir))) as restarted:
        rig.node.run(lambda: restarted.set_unguarded((PEER6,)))
        assert not of_this_node(PEER4) and of_this_node(A4)
        assert rig.reason(tcp6(PEER6, 1, flags="A")) == ""
        rig.node.run(lambda: restarted.set_unguarded(()))
        assert rig.reason(tcp6(PEER6, 1, flags="A")) == "outbound_denied" and of_this_node(A4)
    share()


def test_guarding_again_moves_the_addresses(rig: Rig) -> None:
    try:
        rig.node.run(lambda: rig.guard.guard("eth0", ("10.99.7.3",), rig.cookie, 0))
        assert rig.reason(tcp("192.0.2.7", 443)) == "spoofed"
        assert rig.reason(tcp("192.0.2.7", 443, source="10.99.7.3")) == ""
        assert (
            sh("ip", "netns", "exec", rig.world.b.name, "tc", "filter", "show", "dev", "eth0", "ingress").count("pillion-veth")
            == 1
        )
    finally:
        rig.node.run(lambda: rig.guard.guard("eth0", (A4, A6), rig.cookie, 0))
    assert rig.reason(tcp("192.0.2.7", 443)) == ""


def same_place(rig: Rig) -> str:
    """An address that goes where A4 goes in the array `ways`, of eth0 and of the node alike."""

    def place(text: str) -> bytes:
        return rig.guard._ways._place(rig.guard._key.pack(ifindex=0, addr=address(text)))

    return next(text for text in (f"10.99.{i}.{j}" for i in range(100, 250) for j in range(1, 255)) if place(text) == place(A4))


def test_addresses_that_share_a_place(rig: Rig) -> None:
    other = same_place(rig)

    def passes(source: str, destination: str) -> bool:
        return rig.reason(tcp(destination, 1, source, flags="A")) == ""

    def guard(*addresses: str) -> None:
        rig.node.run(lambda: rig.guard.guard("eth0", addresses, rig.cookie, 0))

    try:
        guard(A4, other)
        assert passes(A4, other) and passes(other, A4)
        guard(other)
        assert passes(other, other) and not passes(A4, other) and not passes(other, A4)
        guard(A4, other)
        assert passes(A4, other) and passes(other, A4)
    finally:
        guard(A4, A6)
    assert passes(A4, A4) and not passes(other, A4) and not passes(A4, other)


def test_what_a_killed_agent_left_in_the_array_is_mended(rig: Rig) -> None:
    ways, keys = rig.guard._ways, set(rig.guard._map)
    index = max(rig.guard._key.unpack(key)["ifindex"] for key in keys)
    strangers = {
        text: rig.guard._key.pack(ifindex=index, addr=address(text)) for text in ("10.99.7.77", "10.99.7.78", "10.99.7.79")
    }
    free = next(text for text, key in strangers.items() if not (ways._map.get(ways._place(key)) or b"").strip(b"\0"))
    forged = tcp(A4, 1, free, flags="A")
    assert rig.reason(forged) == "spoofed"
    ways.put(strangers[free])
    assert rig.reason(forged) == ""
    for key in keys:
        ways.delete(key)
    ways.restore(keys)
    assert rig.reason(forged) == "spoofed" and rig.reason(tcp(A4, 1, flags="A")) == ""
    assert {value.removesuffix(TAKEN) for value in ways._map.items().values() if value.strip(b"\0")} == keys


def test_permissive_answers_outside(rig: Rig) -> None:
    answer = tcp("198.51.100.1", 55555, flags="SA", sport=8080)
    assert rig.reason(answer) == "outbound_denied"
    flag = rig.datapath._layouts.enums["PL_MEMBER_PERMISSIVE"]
    try:
        rig.node.run(lambda: rig.guard.guard("eth0", (A4, A6), rig.cookie, flag))
        assert rig.reason(answer) == ""
        assert rig.reason(tcp("198.51.100.1", 55555, sport=8080)) == "outbound_denied"  # it may answer, not ask
    finally:
        rig.node.run(lambda: rig.guard.guard("eth0", (A4, A6), rig.cookie, 0))


def test_lost_filters_are_found_by_one_question_for_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each look, and a node may have thousands of pods."""
    sent: list[int] = []

    class Counted(socket.socket):
        def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]  # as it is called
            sent.append(len(data))
            return super().send(data, flags)

    names = [f"d{number}" for number in range(4)]
    node = ("ip", "netns", "exec", rig.world.b.name)
    try:
        for number, name in enumerate(names):
            sh(*node, "ip", "link", "add", name, "type", "bridge")
            rig.node.run(lambda name=name, number=number: rig.guard.guard(name, (f"10.99.7.{50 + number}",), rig.cookie, 0))
        sh(*node, "tc", "qdisc", "del", "dev", "d1", "clsact")
        sh(*node, "tc", "filter", "del", "dev", "d2", "ingress")
        monkeypatch.setattr("nodeagent.tc.IPRoute", None)
        monkeypatch.setattr("nodeagent.tc.socket.socket", Counted)
        assert rig.node.run(lambda: rig.guard.bare([*names, "eth0", "gone"])) == ["d1", "d2"]
        assert len(sent) == 1
        assert rig.node.run(lambda: rig.guard.bare([])) == []
    finally:
        monkeypatch.undo()
        for name in names:
            sh(*node, "ip", "link", "del", name)
        rig.node.run(rig.guard.sweep)


def test_an_interface_that_is_not_there(rig: Rig) -> None:
    with pytest.raises(DatapathError, match="nothere"):
        rig.node.run(lambda: rig.guard.guard("nothere", (A4,), rig.cookie, 0))
    rig.node.run(lambda: rig.guard.unguard("nothere"))


def test_an_interface_that_went_leaves_no_addresses(rig: Rig) -> None:
    """A workload's namespace is gone before the agent hears of it, as a rule; the map would fill up."""
    before = set(rig.guard._map)

    def cable(*command: str) -> None:
        sh("ip", "-n", rig.world.b.name, "link", *command)

    def guard(*addresses: str) -> None:
        rig.node.run(lambda: rig.guard.guard("gone", addresses, rig.cookie, 0))

    made = ("add", "gone", "type", "veth", "peer", "name", "gone-too")
    cable(*made)
    guard("10.99.7.50", "fd99:7::50")
    assert len(set(rig.guard._map) - before) == 4
    cable("delete", "gone")
    cable(*made)  # another one, under its name
    guard("10.99.7.50")
    assert len(set(rig.guard._map) - before) == 2
    cable("delete", "gone")
    rig.node.run(lambda: rig.guard.unguard("gone"))
    assert set(rig.guard._map) == before


def test_unguarded_again_all_passes(rig: Rig) -> None:
    rig.node.run(lambda: rig.guard.unguard("eth0"))
    assert rig.reason(tcp("192.0.2.7", 80, source="10.99.7.77")) == ""
    assert not list(rig.guard._map)
    rig.node.run(lambda: rig.guard.guard("eth0", (A4, A6), rig.cookie, 0))
