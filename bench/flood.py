"""A neighbour that floods until it is killed. argv: kind host port. requests: keep-alive, as fast as they are answered, on
32 connections; connections: opened, asked once, dropped, and held as far as it may; sleepers: connections that write and do
not read; handshakes: opaque connections to another node, each a TLS connection between the nodes; denials: connects.
SIGTERM: it ends and prints, as JSON, how often it was refused: a connect() that was not allowed, a connection that was reset, an
answer that is no 200."""

import json
import select
import signal
import socket
import sys
import time

kind, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
ASK = b"GET / HTTP/1.1\r\nHost: noisy\r\n\r\n"
WIDE = 32
ANSWER_S = 2.0
over: list[int] = []
refused = 0
signal.signal(signal.SIGTERM, lambda number, _: over.append(number))


def hears(error: OSError) -> None:
    global refused
    refused += isinstance(error, PermissionError | ConnectionResetError | BrokenPipeError)


def dial() -> socket.socket | None:
    sock = socket.socket()
    sock.settimeout(ANSWER_S)
    try:
        sock.connect((host, port))
    except OSError as error:
        hears(error)
        sock.close()
        return None
    return sock


def answered(sock: socket.socket, flags: int = 0) -> None:
    """Waits for one answer. Raises OSError; ConnectionError when it was the last."""
    global refused
    data = sock.recv(65536, flags)
    if not data:
        raise ConnectionError
    refused += not data.startswith(b"HTTP/1.1 200")


def requests() -> None:
    socks = [dial() for _ in range(WIDE)]
    while not over:
        for index, sock in enumerate(socks):
            try:
                if sock is not None:
                    sock.sendall(ASK)
            except OSError as error:
                hears(error)
                socks[index] = None
        for index, sock in enumerate(socks):
            try:
                if sock is None:
                    raise ConnectionError
                answered(sock)
            except OSError as error:
                hears(error)
                socks[index] = None if over else dial()


def connections() -> None:
    held: list[socket.socket] = []

    def drop() -> None:
        """With its answer unread."""
        with held.pop(0) as sock:
            try:
                answered(sock, socket.MSG_PEEK)
            except OSError as error:
                hears(error)

    while not over:
        sock = dial()
        if sock is not None:
            try:
                sock.sendall(ASK)
                held.append(sock)
            except OSError as error:
                hears(error)
        if len(held) > 400:
            drop()
    while held:
        drop()


def sleepers() -> None:
    held = [sock for _ in range(200) if (sock := dial())]
    for sock in held:
        sock.setblocking(False)
    while not over:
        for sock in list(held):
            try:
                sock.send(ASK * 500)
            except BlockingIOError:
                pass
            except OSError as error:
                hears(error)
                held.remove(sock)
        time.sleep(0.01)
    poll = select.poll()
    for sock in held:
        poll.register(sock, 0)  # those that were reset since
    time.sleep(0.2)
    for _fd, _event in poll.poll(0):
        hears(ConnectionResetError())


def handshakes() -> None:
    while not over:
        sock = dial()
        if sock is not None:
            try:
                sock.sendall(b"x")
                sock.settimeout(0.02)
                sock.recv(1)
            except OSError as error:
                hears(error)
            sock.close()


def denials() -> None:
    while not over:
        dial()


{"requests": requests, "connections": connections, "sleepers": sleepers, "handshakes": handshakes, "denials": denials}[kind]()
print(json.dumps({"refused": refused}), flush=True)
