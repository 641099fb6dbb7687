"""A hostile resolver outside the mesh, on UDP: answers what the name asks for. Prints each name that reaches it.

argv: PORT ADDRESS… First labels: x<hex> an A or AAAA record of these bytes; h<hex> the same as hint of an HTTPS record;
poison an address for one of the mesh's own names beside the right one; forged three forgeries (another id, another spelling,
another port of this host), each with FORGED, then the right answer; anything else: the right answer.
"""

import selectors
import socket
import sys

import dns.message
import dns.name
import dns.rrset

RIGHT, FORGED = "93.184.215.14", "192.88.99.66"


def address(text: str) -> str:
    raw = bytes.fromhex(text)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def records(first: str, name: dns.name.Name) -> list[dns.rrset.RRset]:
    if first.startswith("h"):
        there = address(first[1:])
        return [dns.rrset.from_text(name, 1, "IN", "HTTPS", f"1 . ipv{6 if ':' in there else 4}hint={there}")]
    there = address(first[1:]) if first.startswith("x") else RIGHT
    return [dns.rrset.from_text(name, 1, "IN", "AAAA" if ":" in there else "A", there)]


def answer(query: dns.message.Message, there: str = "") -> dns.message.Message:
    name = query.question[0].name
    first = name.labels[0].decode().lower()
    response = dns.message.make_response(query)
    response.answer += [dns.rrset.from_text(name, 1, "IN", "A", there)] if there else records(first, name)
    if first == "poison":
        response.additional.append(dns.rrset.from_text("web.shop.mesh.", 1, "IN", "A", RIGHT))
    return response


def serve(sock: socket.socket, other: socket.socket) -> None:
    wire, client = sock.recvfrom(4096)
    query = dns.message.from_wire(wire)
    name = query.question[0].name
    print(name.to_text().lower(), flush=True)
    if name.labels[0].lower() == b"forged":
        forged = answer(query, FORGED).to_wire()
        sock.sendto(bytes([forged[0] ^ 1]) + forged[1:], client)
        spelled = dns.message.make_query(name.to_text().swapcase(), "A")
        spelled.id = query.id
        sock.sendto(answer(spelled, FORGED).to_wire(), client)
        other.sendto(forged, client)
    sock.sendto(answer(query).to_wire(), client)


def main() -> None:
    selector = selectors.DefaultSelector()
    for text in sys.argv[2:]:
        pair = [socket.socket(socket.AF_INET6 if ":" in text else socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
        pair[0].bind((text, int(sys.argv[1])))
        pair[1].bind((text, 0))
        selector.register(pair[0], selectors.EVENT_READ, pair[1])
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            serve(key.fileobj, key.data)  # type: ignore[arg-type]  # a socket


main()
