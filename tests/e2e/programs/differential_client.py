"""Client of the differential test. Reads the names of files with jobs; the first one's connections serve them all. Sends the
same exchanges to both services of the job, in parts that take turns, and compares what comes back. After each part it prints a
line of JSON and waits for one; last comes the report."""

from __future__ import annotations

import json
import pickle
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.e2e.exchanges import ID, Sent

ANSWER_S = 10.0
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.I)
CODED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.I)
CLOSES = re.compile(rb"\r\nconnection:[^\r]*close|^HTTP/1\.0 ", re.I)
UNTIL_CLOSE, CHUNKED = -1, -2
SILENCE = b"[nothing more]"
OWN = b"\r\nserver: pillion\r\n"  # the proxy's own answers may name the service

heads: dict[bytes, tuple[int, int, bool]] = {}  # bytes -> status, length, closes


def understand(head: bytes) -> tuple[int, int, bool]:
    found = heads.get(head)
    if found is None:
        length = LENGTH.search(head)
        status = int(head[9:12])
        size = CHUNKED if CODED.search(head) else int(length[1]) if length else UNTIL_CLOSE
        if status in (204, 304) or status < 200:
            size = 0
        found = heads[head] = status, size, bool(CLOSES.search(head))
    return found


class Ended(Exception):
    pass


class Connection:
    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.sock: socket.socket | None = None
        self.got = b""
        self.at = 0
        self.made = 0  # connections

    def send(self, raw: bytes, cuts: tuple[int, ...]) -> None:
        if self.sock is None:
            self.made += 1
            self.sock = socket.create_connection(self.address, ANSWER_S)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if not cuts:
                self.sock.sendall(raw)
                return
            start = 0
            for cut in (*cuts, len(raw)):
                self.sock.sendall(raw[start:cut])
                start = cut
        except OSError:  # it shows when reading
            pass

    def more(self) -> None:
        assert self.sock is not None
        try:
            data = self.sock.recv(262144)
        except TimeoutError:
            raise Ended(SILENCE) from None
        except OSError as error:
            raise Ended(b"[%s]" % type(error).__name__.encode()) from None
        if not data:
            raise Ended(b"[end]")
        self.got = self.got + data if self.got else data

    def answers(self, sent: Sent, codes: dict[int, int]) -> bytes:
        """All bytes of the answers, and how the connection ended if it did."""
        self.got, self.at = b"", 0
        try:
            ends = False
            for is_head in sent.heads:
                ends = self.answer(is_head, codes)
                if ends:
                    break
            if not (ends or sent.ends):
                return self.got if self.at == len(self.got) else self.got + b"[surplus]"
            while True:
                self.more()
        except Ended as end:
            if self.sock is not None:
                self.sock.close()
            self.sock = None
            got = self.got
            return (got if len(got) < 20_000 else b"%s %d %d" % (got[:500], len(got), hash(got))) + bytes(end.args[0])

    def answer(self, is_head: bool, codes: dict[int, int]) -> bool:
        """Whether it is the last. Counted once it is whole, or may be."""
        while True:
            while (end := self.got.find(b"\r\n\r\n", self.at) + 4) < 4:
                self.more()
            head = self.got[self.at : end]
            if head[:9] not in (b"HTTP/1.1 ", b"HTTP/1.0 "):
                raise Ended(b"[no answer]")
            status, size, ends = understand(head)
            self.at = end
            if status >= 200:
                break
        if is_head or not size:
            pass
        elif size > 0:
            parts = [self.got]
            have = len(self.got)
            while have < end + size:
                self.got = b""
                self.more_into(parts)
                have += len(parts[-1])
            self.got = parts[0] if len(parts) == 1 else b"".join(parts)
            self.at = end + size
        elif size == CHUNKED:
            self.chunks()
        codes[status] = codes.get(status, 0) + 1
        if size == UNTIL_CLOSE and not is_head:
            while True:
                self.more()
        return ends

    def more_into(self, parts: list[bytes]) -> None:
        try:
            self.more()
        except Ended:
            self.got = b"".join(parts)
            raise
        parts.append(self.got)

    def chunks(self) -> None:
        while True:
            while (line := self.got.find(b"\r\n", self.at)) < 0:
                self.more()
            size = int(self.got[self.at : line], 16)
            self.at = line + 2 + (size + 2 if size else 0)
            if not size:
                while (end := self.got.find(b"\r\n\r\n", line)) < 0:
                    self.more()
                self.at = end + 4
                return
            while len(self.got) < self.at:
                self.more()


def part(connections: list[Connection], items: list[tuple[int, Sent]], codes: dict[int, int], name: bytes) -> list[bytes]:
    """What came back for each, in order. The n-th goes over connection n modulo their number, when that is answered."""
    seen = []
    count = len(connections)

    def send(place: int) -> None:
        number, sent = items[place]
        connections[place % count].send(sent.raw.replace(ID, b"%06d" % number), sent.cuts)

    for place in range(min(count, len(items))):
        send(place)
    for place, (_, sent) in enumerate(items):
        got = connections[place % count].answers(sent, codes)
        seen.append(got.replace(name, b"[name]") if got.startswith(OWN, got.find(b"\r")) else got)
        if place + count < len(items):
            send(place + count)
    return seen


def run(job: dict[str, Any], connections: list[list[Connection]]) -> dict[str, Any] | None:
    """The report; None: nobody listens."""
    exchanges: list[Sent] = job["exchanges"]
    order: list[int] = job["order"]
    differences: list[dict[str, str]] = []
    differing = silent = 0
    codes: list[dict[int, int]] = [{}, {}]
    seconds = [0.0, 0.0]
    for start in range(0, len(order), job["part"]):
        items = [(number, exchanges[place]) for number, place in enumerate(order[start : start + job["part"]], start)]
        seen = []
        for side, name in enumerate(job["names"]):
            began = time.monotonic()
            seen.append(part(connections[side], items, codes[side], name.encode()))
            seconds[side] += time.monotonic() - began
        for (number, sent), first, second in zip(items, *seen, strict=True):
            mute = first.endswith(SILENCE) or second.endswith(SILENCE)
            silent += mute
            if first != second or mute:
                differing += first != second
                if len(differences) < 20:
                    raw = sent.raw.replace(ID, b"%06d" % number)
                    differences.append({
                        "number": str(number), "kind": sent.kind, "sent": repr(raw[:1500]), "cuts": str(sent.cuts),
                        "first": repr(first[:1500]), "second": repr(second[:1500]),
                    })  # fmt: skip
        print(json.dumps({"done": start + len(items)}), flush=True)
        if not sys.stdin.readline():
            return None
    made = [sum(one.made for one in side) for side in connections]
    return {
        "differing": differing, "silent": silent, "differences": differences, "codes": codes, "seconds": seconds, "made": made,
    }  # fmt: skip


def main() -> None:
    connections: list[list[Connection]] = []
    while path := sys.stdin.readline().strip():
        job: dict[str, Any] = pickle.loads(Path(path).read_bytes())
        if not connections:
            connections = [[Connection(address) for _ in range(job["connections"])] for address in job["addresses"]]
        report = run(job, connections)
        if report is None:
            return
        print(json.dumps(report), flush=True)


main()
