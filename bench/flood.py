"""A neighbour that floods until it is killed. argv: kind host port. requests: keep-alive, as fast as they are answered, on
32 connections; connections: opened, asked once, dropped, and held as far as it may; sleepers: connections that write and do
not read; handshakes: opaque connections to another node, each a TLS connection between the nodes; denials: connects."""

import contextlib
import socket
import sys
import time

kind, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
ASK = b"GET / HTTP/1.1\r\nHost: noisy\r\n\r\n"
WIDE = 32


def dial() -> socket.socket | None:
    sock = socket.socket()
    sock.settimeout(2)
    try:
        sock.connect((host, port))
    except OSError:
        sock.close()
        return None
    return sock


def requests() -> None:
    socks = [dial() for _ in range(WIDE)]
    while True:
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
    while True:
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
    while True:
        for sock in held:
            with contextlib.suppress(OSError):
                sock.send(ASK * 500)
        time.sleep(0.01)


def handshakes() -> None:
    while True:
        sock = dial()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.sendall(b"x")
                sock.settimeout(0.02)
                sock.recv(1)
            sock.close()


def denials() -> None:
    while True:
        dial()


{"requests": requests, "connections": connections, "sleepers": sleepers, "handshakes": handshakes, "denials": denials}[kind]()
