"""Tries to make the sockets that no connect() hook would see, and to send MARKER by them. Prints {kind: "sent" or why not}.

argv: PEER MARKER. Root in its own namespace: it may set ping_group_range.
"""

import json
import socket
import sys
from pathlib import Path

peer, marker = sys.argv[1], sys.argv[2].encode()
six = ":" in peer
family = socket.AF_INET6 if six else socket.AF_INET
icmp = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
SCTP, UDPLITE, UNASSIGNED, ECHO = 132, 136, 253, 128 if six else 8
KINDS = {
    "raw-icmp": (socket.SOCK_RAW, icmp),
    "raw-ip": (socket.SOCK_RAW, UNASSIGNED),
    "header-included": (socket.SOCK_RAW, socket.IPPROTO_RAW),
    "ping": (socket.SOCK_DGRAM, icmp),
    "udplite": (socket.SOCK_DGRAM, UDPLITE),
    "sctp": (socket.SOCK_STREAM, SCTP),
}


def attempt(kind: str) -> str:
    text = marker + b"/" + kind.encode() + b"/"
    if kind.endswith(("icmp", "ping")):
        text = bytes([ECHO, 0, 0, 0, 0, 1, 0, 1]) + text
    elif kind == "header-included":
        addresses = bytes(4) + socket.inet_aton(peer) if not six else b""
        text = bytes([0x45, 0, 0, 0, 0, 1, 0, 0, 64, UNASSIGNED, 0, 0]) + addresses + text if not six else text
    try:
        with socket.socket(family, *KINDS[kind]) as made:
            if kind == "sctp":
                made.settimeout(1)
                made.connect((peer, 7000))
            else:
                made.sendto(text, (peer, 7000 if kind == "udplite" else 0))
        return "sent"
    except OSError as error:
        return type(error).__name__


Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
print(json.dumps({kind: attempt(kind) for kind in KINDS}))
