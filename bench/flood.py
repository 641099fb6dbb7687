"""A neighbour that floods until it is killed. argv: kind host port. requests: keep-alive, as fast as they are answered, on
32 connections; connections: opened, asked once, dropped, and held as far as it may; sleepers: connections that write and do
not read; handshakes: opaque connections to another node, each a TLS connection between the nodes; denials: connects.
SIGTERM: it ends and prints, as JSON, how often it was denied a connection."""

import contextlib
import json
import signal
import socket
import sys
import time

kind, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
ASK = b"GET / HTTP/1.1\r\nHost: noisy\r\n\r\n"
WIDE = 32
over: list[int] = []
denied = 0
signal.signal(signal.SIGTERM, lambda number, _: over.append(number))


def dial() -> socket.socket | None:
    global denied
    sock = socket.socket()
    sock.settimeout(2)
    try:
        sock.connect((host, port))
    except OSError as error:
        denied += isinstance(error, PermissionError)
        sock.close()
        return None
    return sock


def requests() -> None:
    socks = [dial() for _ in range(WIDE)]
    while not over:
        for index, sock in enumerate(socks):
            try:
                if sock is not None:
                    sock.sendall(ASK)
            except OSError:
                socks[index] = None
        for index, sock in enumerate(socks):
            try:
                if sock is None or not sock.recv(65536):
                    raise ConnectionError
            except OSError:
                socks[index] = dial()


def connections() -> None:
    held: list[socket.socket] = []
    while not over:
        sock = dial()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.sendall(ASK)
                held.append(sock)
        if len(held) > 400:
            held.pop(0).close()


def sleepers() -> None:
    held = [sock for _ in range(200) if (sock := dial())]
    for sock in held:
        sock.setblocking(False)
    while not over:
        for sock in held:
            with contextlib.suppress(OSError):
                sock.send(ASK * 500)
        time.sleep(0.01)


def handshakes() -> None:
    while not over:
        sock = dial()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.sendall(b"x")
                sock.settimeout(0.02)
                sock.recv(1)
            sock.close()


def denials() -> None:
    while not over:
        dial()


{"requests": requests, "connections": connections, "sleepers": sleepers, "handshakes": handshakes, "denials": denials}[kind]()
print(json.dumps({"denied": denied}), flush=True)
