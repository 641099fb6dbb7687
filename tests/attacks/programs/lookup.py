"""Asks a resolver; prints {"rcode", "answer": rdata as text, "error"}. argv: SERVER PORT udp|tcp TYPE NAME…: asks for all names
and prints the last one's."""

import json
import socket
import sys

import dns.message
import dns.rcode

from lab.pace import SLOW

server, port, transport, kind, names = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:]
family = socket.AF_INET6 if ":" in server else socket.AF_INET


def exactly(conn: socket.socket, count: int) -> bytes:
    out = b""
    while len(out) < count:
        data = conn.recv(count - len(out))
        if not data:
            raise ConnectionError("closed")
        out += data
    return out


def ask(wire: bytes) -> bytes:
    if transport == "tcp":
        with socket.create_connection((server, port), timeout=5 * SLOW) as conn:
            conn.sendall(len(wire).to_bytes(2, "big") + wire)
            return exactly(conn, int.from_bytes(exactly(conn, 2), "big"))
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3 * SLOW)
        sock.sendto(wire, (server, port))
        return sock.recv(4096)


def one(name: str) -> dict[str, object]:
    try:
        reply = dns.message.from_wire(ask(dns.message.make_query(name, kind).to_wire()))
    except OSError as error:
        return {"rcode": "", "answer": [], "error": type(error).__name__}
    return {
        "rcode": dns.rcode.to_text(reply.rcode()),
        "answer": [r.to_text() for rrset in reply.answer for r in rrset],
        "error": "",
    }


print(json.dumps([one(name) for name in names][-1]))
