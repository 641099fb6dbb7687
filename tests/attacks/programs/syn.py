"""Sends a SYN by hand on eth0 and waits for the answer. argv: GATEWAY_MAC SOURCE DESTINATION PORT. Prints {"answered"}."""

import json
import sys

from scapy.all import IP, TCP, Ether, IPv6, srp1

mac, source, destination, port = sys.argv[1:5]
layer = IPv6 if ":" in destination else IP
packet = Ether(dst=mac) / layer(src=source, dst=destination) / TCP(sport=40080, dport=int(port), flags="S", seq=7)
reply = srp1(packet, iface="eth0", timeout=2, verbose=False)
print(json.dumps({"answered": reply is not None and reply.haslayer(TCP) and reply[TCP].flags == "SA"}))
