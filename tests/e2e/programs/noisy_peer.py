"""A peer of the mesh with a certificate that makes noise on HBONE. argv: kind state who host sni authority forwarded count
seconds (how long it waits to be hung up on). handshakes: so many TCP connections that never speak; resets: so many streams,
each reset at once; streams: so many open at once, asked for one after the other; burst: the same in one write; continuations:
a head that never ends. Prints JSON {"made": n, "ended": bool}: how many of them were made (of streams: served), and whether
the proxy hung up."""

import json
import socket
import ssl
import sys
from pathlib import Path

import h2.events

from lab import peer
from mesh.ports import HBONE_PORT

kind, state, who, host, sni, authority, forwarded, number, seconds = sys.argv[1:10]
count = int(number)


def tls() -> ssl.SSLSocket:
    context = peer.certified(Path(state), who)
    sock = context.wrap_socket(socket.create_connection((host, HBONE_PORT), 20), server_hostname=sni)
    sock.settimeout(5)
    return sock


def gone(sock: socket.socket) -> bool:
    sock.settimeout(float(seconds))
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def handshakes() -> tuple[int, bool]:
    held, ended = [], 0
    for _ in range(count):
        try:
            held.append(socket.create_connection((host, HBONE_PORT), 20))
        except ConnectionResetError:  # refused before connect() had returned
            ended += 1
    for sock in held:
        sock.settimeout(0.5)
        try:
            ended += not sock.recv(1)
        except TimeoutError:
            break  # the first that is kept is followed by the ended ones, but those were reset at once
        except OSError:
            ended += 1
    for sock in held:
        sock.close()
    return count, bool(ended)


def resets() -> tuple[int, bool]:
    sock, own = tls(), peer.http2()
    made = 0
    try:
        for index in range(count):
            own.send_headers(2 * index + 1, peer.tunnel(authority, forwarded))
            own.reset_stream(2 * index + 1, 8)
            sock.sendall(own.data_to_send())
            made += 1
    except OSError:
        return made, True
    return made, gone(sock)


def streams() -> tuple[int, bool]:
    sock, own = tls(), peer.http2()
    served = 0
    for index in range(count):
        own.send_headers(2 * index + 1, peer.tunnel(authority, forwarded))
        sock.sendall(own.data_to_send())
        answered = False
        while not answered:
            if not (data := sock.recv(65536)):
                return served, True
            for event in own.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    answered = True
                    served += dict(event.headers)[":status"] == "200"
        sock.sendall(own.data_to_send())
    return served, False


def burst() -> tuple[int, bool]:
    sock, own = tls(), peer.http2()
    for index in range(count):
        own.send_headers(2 * index + 1, peer.tunnel(authority, forwarded))
    sock.sendall(own.data_to_send())
    served = answered = 0
    while answered < count:
        if not (data := sock.recv(65536)):
            return served, True
        for event in own.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                answered += 1
                served += dict(event.headers)[":status"] == "200"
    return served, False


def continuations() -> tuple[int, bool]:
    sock, (begin, more) = tls(), peer.endless_head()
    sock.sendall(begin)
    made = 0
    try:
        for _ in range(count):
            sock.sendall(more)
            made += 1
    except OSError:
        return made, True
    return made, gone(sock)


kinds = {"handshakes": handshakes, "resets": resets, "streams": streams, "burst": burst, "continuations": continuations}
made, ended = kinds[kind]()
print(json.dumps({"made": made, "ended": ended}))
