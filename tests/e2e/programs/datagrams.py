"""UDP. argv: "serve" PORT: answers each datagram with its sender's address and its bytes.
argv: "ask" HOST PORT: sends one from an unconnected and one from a connected socket; prints JSON with what each got."""

import json
import socket
import sys


def ask(host: str, port: int, *, connected: bool) -> list[str]:
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        try:
            if connected:
                sock.connect(target)
                sock.send(b"hello")
            else:
                sock.sendto(b"hello", target)
            data, source = sock.recvfrom(2048)
        except OSError as error:
            return [repr(error), ""]
    return [data.decode(), "the name's" if source[:2] == target[:2] else str(source)]


if sys.argv[1] == "serve":
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", int(sys.argv[2])))
    while True:
        body, sender = server.recvfrom(2048)
        server.sendto(f"{sender[0].removeprefix('::ffff:')} {body.decode()}".encode(), sender)
else:
    name, number = sys.argv[2], int(sys.argv[3])
    print(json.dumps({"unconnected": ask(name, number, connected=False), "connected": ask(name, number, connected=True)}))
