"""One neighbour that makes noise. argv: kind host port count [seconds]; for how a program of a node that was taken over
makes it, see noisy_peer.py. Prints "started", then JSON; what it counts depends on the kind:
connections: so many held open at once {"open", "refused"}; heads: so many that do not end, the same; sleepers: so many
that write and never read, the same; requests: so many on 8 keep-alive connections {"<status>": n}; denied: connects
{"refused"}."""

import collections
import contextlib
import http.client
import json
import os
import select
import selectors
import socket
import sys
import threading
import time

kind, host, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
seconds = float(sys.argv[5]) if len(sys.argv) > 5 else 5.0
SLOW = max(1.0, float(os.environ.get("PILLION_SLOW", "1")))  # lab/pace.py
OUTBOUND_PORT = 15001  # mesh/ports.py
HEAD = b"GET / HTTP/1.1\r\nHost: noisy\r\n\r\n"


def refused(sock: socket.socket, ask: bytes) -> bool:
    """Whether the connection ends instead of answering."""
    try:
        sock.settimeout(5)
        sock.sendall(ask)
        return not sock.recv(4096)
    except ConnectionError:
        return True


def connections() -> dict[str, int]:
    held = []
    for _ in range(count):
        with contextlib.suppress(ConnectionError):
            held.append(socket.create_connection((host, port), 5))
    outcome = [refused(sock, HEAD) for sock in held]
    return {"open": outcome.count(False), "refused": count - outcome.count(False)}


def requests() -> dict[str, int]:
    statuses: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()

    def one() -> None:
        conn = http.client.HTTPConnection(host, port, timeout=10)
        for _ in range(count // 8):
            conn.request("GET", "/")
            answer = conn.getresponse()
            answer.read()
            with lock:
                statuses[str(answer.status)] += 1
                if answer.status == 429 and answer.headers["retry-after"] != "1":
                    statuses["no retry-after"] += 1

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(statuses)


def sleepers() -> dict[str, int]:
    """Each writes what it can, until nothing moves any more or it is cut."""
    selector, cut = selectors.DefaultSelector(), 0
    for _ in range(count):
        sock = socket.create_connection((host, port), 5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_WRITE)
    end, moved = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < end and time.monotonic() - moved < SLOW:
        for key, _ in selector.select(0.2):
            try:
                key.fileobj.send(b"x" * 65536)
                moved = time.monotonic()
            except BlockingIOError:
                pass
            except OSError:
                cut += 1
                selector.unregister(key.fileobj)
    for key in list(selector.get_map().values()):  # cut while it was not writable
        with contextlib.suppress(OSError):
            cut += bool(key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    return {"open": count - cut, "refused": cut}


def unread() -> bool:
    """The proxy, which is busy, has not read all that was sent to it here."""
    with open("/proc/net/tcp") as table:
        fields = [line.split() for line in table.readlines()[1:]]
    return any(each[1].endswith(f":{OUTBOUND_PORT:04X}") and not each[4].endswith(":00000000") for each in fields)


def heads() -> dict[str, int]:
    """Each is most of a head, and stays."""
    held = [socket.create_connection((host, port), 5) for _ in range(count)]
    poll = select.poll()
    for sock in held:
        sock.sendall(HEAD[:-2] + b"X: ".ljust(30_000 - len(HEAD) + 2, b"a"))
        poll.register(sock, 0)  # errors and hang-ups alone
    cut = 0
    end = time.monotonic() + 10 * SLOW
    while (ended := poll.poll(700 * SLOW)) or (unread() and time.monotonic() < end):  # until none is cut any more
        for fd, _ in ended:
            poll.unregister(fd)
        cut += len(ended)
    return {"open": count - cut, "refused": cut}


def denied() -> dict[str, int]:
    number = 0
    for _ in range(count):
        with socket.socket() as sock:
            try:
                sock.connect((host, port))
            except PermissionError:
                number += 1
    return {"refused": number}


print("started", flush=True)
kinds = {"connections": connections, "requests": requests, "sleepers": sleepers, "heads": heads, "denied": denied}
print(json.dumps(kinds[kind]()), flush=True)
