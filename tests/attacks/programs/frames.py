"""Packets by hand (scapy), past every socket: one of each kind through AF_PACKET. Prints {"sent": kinds}.

argv: MAC of the gateway, own address, peer address, somebody else's address, marker. The marker and the kind's name are in each.
"""

import json
import socket
import sys

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import GRE, Dot1Q, Ether
from scapy.packet import Packet, Raw

gateway, own, peer, other, marker = sys.argv[1:]
six = ":" in own
PORT, ELSEWHERE = 7000, 53211
TUNNELS = 15008
SCTP, UDPLITE, UNASSIGNED, IP_IN_IP = 132, 136, 253, 4
EXPERIMENT = 0x88B5


def ip(protocol: int | None = None, source: str = own) -> Packet:
    if six:
        return IPv6(src=source, dst=peer) if protocol is None else IPv6(src=source, dst=peer, nh=protocol)
    return IP(src=source, dst=peer) if protocol is None else IP(src=source, dst=peer, proto=protocol)


def payload(kind: str) -> Packet:
    return Raw(f"{marker}/{kind}/".encode() + bytes(16))


def ports(kind: str) -> Packet:
    """A transport header of no scapy layer: two ports, then what the receiver makes of it."""
    return Raw(ELSEWHERE.to_bytes(2, "big") + PORT.to_bytes(2, "big") + bytes(8)) / payload(kind)


def syn() -> Packet:
    return TCP(sport=ELSEWHERE, dport=PORT, flags="S", seq=1)


def ack(port: int) -> Packet:
    """As if it belonged to a connection."""
    return TCP(sport=port, dport=PORT, flags="A", seq=1, ack=1)


def udp() -> Packet:
    return UDP(sport=ELSEWHERE, dport=PORT)


packets = {
    "tcp": ip() / syn() / payload("tcp"),
    "ack": ip() / ack(ELSEWHERE) / payload("ack"),
    "ack-of-a-tunnel": ip() / ack(TUNNELS) / payload("ack-of-a-tunnel"),
    "udp": ip() / udp() / payload("udp"),
    "icmp": ip() / (ICMPv6EchoRequest(data=payload("icmp").load) if six else ICMP() / payload("icmp")),
    "sctp": ip(SCTP) / ports("sctp"),
    "udplite": ip(UDPLITE) / ports("udplite"),
    "raw-ip": ip(UNASSIGNED) / payload("raw-ip"),
    "gre": ip() / GRE() / IP(src="192.0.2.1", dst="192.0.2.2") / udp() / payload("gre"),
    "ip-in-ip": ip(IP_IN_IP) / IP(src="192.0.2.1", dst="192.0.2.2") / udp() / payload("ip-in-ip"),
    "spoofed-tcp": ip(source=other) / syn() / payload("spoofed-tcp"),
    "spoofed-ack": ip(source=other) / ack(TUNNELS) / payload("spoofed-ack"),
    "spoofed-udp": ip(source=other) / udp() / payload("spoofed-udp"),
    "spoofed-loopback": ip(source="::1" if six else "127.0.0.1") / syn() / payload("spoofed-loopback"),
}
if six:
    packets["options"] = ip() / IPv6ExtHdrDestOpt() / udp() / payload("options")
    packets["fragment"] = ip() / IPv6ExtHdrFragment(nh=socket.IPPROTO_ICMPV6, id=7) / payload("fragment")
else:
    packets["options"] = (
        IP(src=own, dst=peer, options=b"\x83\x07\x04" + socket.inet_aton(peer) + b"\0") / syn() / payload("options")
    )
frames = {kind: Ether(dst=gateway) / packet for kind, packet in packets.items()}
frames["priority-tag"] = Ether(dst=gateway) / Dot1Q(vlan=0) / ip(UNASSIGNED) / payload("priority-tag")
frames["no-ip"] = Ether(dst=gateway, type=EXPERIMENT) / payload("no-ip")
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
    wire.bind(("eth0", 0))
    for frame in frames.values():
        wire.send(bytes(frame))
print(json.dumps({"sent": list(frames)}))
