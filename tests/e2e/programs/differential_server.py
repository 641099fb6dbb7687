"""Server of the differential test: `differential_server.py PLANS OUT PORT:SIDE…`. Answers as a request's `r<plan>` says and
keeps the request's bytes by its `i=<number>` and side; on SIGUSR1 compares the sides, writes what differs to OUT as JSON, and
begins anew."""

from __future__ import annotations

import json
import os
import pickle
import re
import select
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
import tests.e2e.answers  # noqa: F401  # what PLANS is made of

NUMBER = re.compile(rb"\?i=(\d+\.\d+)r(\d+)")
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.I)
CODED = re.compile(rb"\r\ntransfer-encoding:", re.I)
FIXED = re.compile(rb" /only|\r\nx-variant: *b\r\n(?!x-variant)", re.I)  # routes with one backend

plans = pickle.loads(Path(sys.argv[1]).read_bytes())
out = Path(sys.argv[2])
sides: dict[str, dict[bytes, list[bytes]]] = {}


def compare(*_: object) -> None:
    first, second = sides.values()
    differing = [key for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
    report = {
        "requests": [sum(map(len, side.values())) for side in sides.values()],
        "differing": len(differing),
        "differences": [[repr(side.get(key))[:1500] for side in sides.values()] for key in sorted(differing)[:20]],
    }
    for side in sides.values():
        side.clear()
    fresh = out.with_suffix(".new")
    fresh.write_text(json.dumps(report))
    os.replace(fresh, out)


class Connection:
    def __init__(self, sock: socket.socket, side: dict[bytes, list[bytes]], place: bytes) -> None:
        self.sock, self.side, self.place = sock, side, place
        self.data = b""
        self.unsent: list[bytes] = []
        self.closing = False

    def heard(self, data: bytes) -> None:
        self.data = self.data + data if self.data else data
        while self.data and not self.closing:
            end = self.data.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            size = self.body(end)
            if size < 0:
                return
            raw, self.data = self.data[: end + size], self.data[end + size :]
            self.answer(raw, end)

    def body(self, end: int) -> int:
        """Its length in bytes, -1: not all here."""
        data = self.data
        if CODED.search(data, 0, end):
            at = end
            while (line := data.find(b"\r\n", at)) >= 0:
                size = int(data[at:line], 16)
                if not size:
                    last = data.find(b"\r\n\r\n", line)
                    return last + 4 - end if last >= 0 else -1
                at = line + 2 + size + 2
            return -1
        length = LENGTH.search(data, 0, end)
        size = int(length[1]) if length else 0
        return size if len(data) - end >= size else -1

    def answer(self, raw: bytes, end: int) -> None:
        found = NUMBER.search(raw)
        key, plan = (found[1], plans[int(found[2])]) if found else (raw[:200], plans[0])
        seen = raw if len(raw) < 20_000 else b"%s %d %d" % (raw[:500], len(raw), hash(raw))
        known = self.side.setdefault(key, [])
        if plan.pieces or not known:  # how often one without an answer is asked depends on which connection was taken
            known.append(self.place + seen if FIXED.search(raw, 0, end) else seen)
        for piece in plan.head if raw.startswith(b"HEAD ") else plan.pieces:
            self.send(piece)
        if plan.close:
            self.closing = True
            if not self.unsent:
                self.close()

    def send(self, piece: bytes) -> None:
        if not self.unsent:
            try:
                sent = self.sock.send(piece)
            except BlockingIOError:
                sent = 0
            except OSError:
                return
            if sent == len(piece):
                return
            piece = piece[sent:]
            poll.modify(self.sock, select.EPOLLIN | select.EPOLLOUT)
        self.unsent.append(piece)

    def flush(self) -> None:
        waiting, self.unsent = self.unsent, []
        for piece in waiting:
            self.send(piece)
        if not self.unsent:
            if self.closing:
                self.close()
            else:
                poll.modify(self.sock, select.EPOLLIN)

    def close(self) -> None:
        connections.pop(self.sock.fileno(), None)
        self.sock.close()


poll = select.epoll()
connections: dict[int, Connection] = {}
listeners: dict[int, tuple[socket.socket, dict[bytes, list[bytes]], bytes]] = {}
for argument in sys.argv[3:]:
    port, _, name = argument.partition(":")
    listener = socket.create_server(("", int(port)), backlog=1024)
    listener.setblocking(False)
    of, _, backend = name.partition("/")
    listeners[listener.fileno()] = listener, sides.setdefault(of, {}), backend.encode() + b" "
    poll.register(listener, select.EPOLLIN)
signal.signal(signal.SIGUSR1, compare)

while True:
    for number, events in poll.poll():
        if number in listeners:
            listener, seen, which = listeners[number]
            while True:
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    break
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = Connection(sock, seen, which)
                poll.register(sock, select.EPOLLIN)
            continue
        connection = connections.get(number)
        if connection is None:
            continue
        if events & select.EPOLLOUT:
            connection.flush()
        if events & ~select.EPOLLOUT and number in connections:
            try:
                data = connection.sock.recv(262144)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if data:
                connection.heard(data)
            else:
                connection.close()
