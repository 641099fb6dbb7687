"""A NAT rule in one's own namespace sends connections to PORT to the proxy's listener; then dials PORT. Prints {"error"}.

argv: HOST PORT LISTENER. For such a connection conntrack answers SO_ORIGINAL_DST with an address that no hook allowed. The
rule is written over netlink by hand: no tool for it is needed.
"""

import json
import socket
import struct
import sys

host, port, listener = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
NETLINK_NETFILTER, REQUEST, ACK, CREATE = 12, 1, 4, 0x400
NFTABLES, INET, BATCH_BEGIN, BATCH_END = 10, 1, 0x10, 0x11
NEW_TABLE, DELETE_TABLE, NEW_CHAIN, NEW_RULE = 0, 2, 3, 6
OUTPUT, BEFORE_ROUTING = 3, -100


def attribute(kind: int, value: bytes | str | int) -> bytes:
    if isinstance(value, str):
        value = value.encode() + b"\0"
    elif isinstance(value, int):
        value = struct.pack("!i", value)
    return struct.pack("HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def nest(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | 0x8000, b"".join(parts))


def expression(name: str, *parts: bytes) -> bytes:
    return nest(1, attribute(1, name), nest(2, *parts))


def message(kind: int, family: int, body: bytes = b"", flags: int = 0, resource: int = 0) -> bytes:
    return struct.pack("=IHHIIBBH", 20 + len(body), kind, REQUEST | flags, 1, 0, family, 0, socket.htons(resource)) + body


def send(*messages: tuple[int, bytes]) -> None:
    """One transaction. Raises OSError with the kernel's reason."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        parts = [message(BATCH_BEGIN, 0, resource=NFTABLES)]
        parts += [message(NFTABLES << 8 | kind, INET, body, ACK | CREATE) for kind, body in messages]
        netlink.send(b"".join([*parts, message(BATCH_END, 0, resource=NFTABLES)]))
        netlink.settimeout(2.0)
        for _ in messages:
            code = struct.unpack_from("=i", netlink.recv(65536), 16)[0]
            if code:
                raise OSError(-code, "nftables")


def number(value: int) -> bytes:
    return struct.pack("!H", value)


rule = nest(
    4,
    expression("payload", attribute(1, 1), attribute(2, 2), attribute(3, 2), attribute(4, 2)),  # register 1 = destination port
    expression("cmp", attribute(1, 1), attribute(2, 0), nest(3, attribute(1, number(port)))),
    expression("immediate", attribute(1, 1), nest(2, attribute(1, number(listener)))),
    expression("redir", attribute(1, 1), attribute(3, 2)),
)
send(
    (NEW_TABLE, attribute(1, "lie")),
    (
        NEW_CHAIN,
        attribute(1, "lie")
        + attribute(3, "out")
        + nest(4, attribute(1, OUTPUT), attribute(2, BEFORE_ROUTING))
        + attribute(7, "nat"),
    ),
    (NEW_RULE, attribute(1, "lie") + attribute(2, "out") + rule),
)
try:
    with socket.create_connection((host, port), timeout=5) as conn:
        conn.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        error = "" if conn.recv(1) else "closed"
except OSError as failure:
    error = type(failure).__name__
finally:
    send((DELETE_TABLE, attribute(1, "lie")))
print(json.dumps({"error": error}))
