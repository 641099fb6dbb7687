"""Sends one UDP datagram by hand on eth0, as no hook of a socket sees it. argv: GATEWAY_MAC SOURCE DESTINATION PORT DATA."""

import sys

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from scapy.sendrecv import sendp

mac, source, destination, port, data = sys.argv[1:6]
layer = IPv6 if ":" in destination else IP
sendp(
    Ether(dst=mac) / layer(src=source, dst=destination) / UDP(sport=40053, dport=int(port)) / Raw(bytes.fromhex(data)),
    iface="eth0",
    verbose=False,
)
