"""Rules of nftables over netlink, by hand: no tool for it is needed."""

import socket
import struct

NETLINK_NETFILTER, REQUEST, ACK, CREATE = 12, 1, 4, 0x400
IPV4, IPV6 = 2, 10  # tables of one family; INET has both
NFTABLES, INET, BATCH_BEGIN, BATCH_END = 10, 1, 0x10, 0x11
NEW_TABLE, DELETE_TABLE, NEW_CHAIN, NEW_RULE = 0, 2, 3, 6
PREROUTING, OUTPUT, POSTROUTING, BEFORE_ROUTING, SOURCE_NAT = 0, 3, 4, -100, 100


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


def send(*messages: tuple[int, bytes], family: int) -> None:
    """One transaction. Raises OSError with the kernel's reason."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        parts = [message(BATCH_BEGIN, 0, resource=NFTABLES)]
        parts += [message(NFTABLES << 8 | kind, family, body, ACK | CREATE) for kind, body in messages]
        netlink.send(b"".join([*parts, message(BATCH_END, 0, resource=NFTABLES)]))
        netlink.settimeout(2.0)
        for _ in messages:
            code = struct.unpack_from("=i", netlink.recv(65536), 16)[0]
            if code:
                raise OSError(-code, "nftables")


def number(value: int) -> bytes:
    return struct.pack("!H", value)


def to_port(port: int) -> tuple[bytes, bytes]:
    """Expressions: the packet goes to this port."""
    return (
        expression(
            "payload", attribute(1, 1), attribute(2, 2), attribute(3, 2), attribute(4, 2)
        ),  # register 1 = destination port
        expression("cmp", attribute(1, 1), attribute(2, 0), nest(3, attribute(1, number(port)))),
    )


def add_nat(table: str, hook: int, priority: int, *expressions: bytes, family: int = INET) -> None:
    """A table with one chain and one rule. Raises OSError."""
    where = nest(4, attribute(1, hook), attribute(2, priority))
    send(
        (NEW_TABLE, attribute(1, table)),
        (NEW_CHAIN, attribute(1, table) + attribute(3, "chain") + where + attribute(7, "nat")),
        (NEW_RULE, attribute(1, table) + attribute(2, "chain") + nest(4, *expressions)),
        family=family,
    )


def add_closed(table: str, hook: int) -> None:
    """A table with one chain, which lets nothing pass. Raises OSError."""
    where, drop = nest(4, attribute(1, hook), attribute(2, 0)), attribute(5, 0)
    chain = attribute(1, table) + attribute(3, "chain") + where + drop + attribute(7, "filter")
    send((NEW_TABLE, attribute(1, table)), (NEW_CHAIN, chain), family=INET)


def delete(table: str, family: int = INET) -> None:
    send((DELETE_TABLE, attribute(1, table)), family=family)
