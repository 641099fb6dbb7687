"""Clients that do not behave like most, on a connection that the kernel carries; what they read is checked byte by byte.
argv: JSON {host, port, mode, size, times, warm: exchanges before}.
 eager: writes `times` requests before it reads the first answer, again and again
 sleepy: asks for `size` bytes, sleeps, reads some, sleeps, reads the rest
 vanish: asks, reads a little, and goes (by turns FIN and RST)
 short: `times` connections, one after the other, of one to three requests
 huge: one answer of `size` bytes, read as it comes
 broken: asks for what the server ends by RST, before or in the middle of its answer
Prints "ready" when the connection is warm, then JSON: {ok, wrong: [texts], errors: [texts], statuses, seconds}."""

import collections
import json
import os
import socket
import struct
import sys
import time

from exact_body import PERIOD, body_of, place_of

ask = {"times": 4, "size": 100_000} | json.loads(sys.argv[1])
HOST, PORT, SIZE, TIMES, MODE = ask["host"], ask["port"], ask["size"], ask["times"], ask["mode"]
WARM, TIMEOUT_S = ask["warm"], 30.0
ADDRESS = socket.getaddrinfo(HOST, PORT, type=socket.SOCK_STREAM)[0]
wrong: list[str] = []
errors: list[str] = []
statuses: collections.Counter[str] = collections.Counter()
ok = 0
tags = iter(range(1 << 40))


class Connection:
    def __init__(self, warm: int = WARM) -> None:
        self.sock = socket.socket(ADDRESS[0], socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(ADDRESS[4])
        self.buffer = b""
        for _ in range(warm):
            self.exchange("size", 10)
            time.sleep(0.001 if warm == WARM else 0)

    def ask(self, kind: str, size: int) -> str:
        tag = f"{MODE}-{os.getpid():x}-{next(tags)}"
        path = f"/{kind}/{tag}" if kind == "reset" else f"/{kind}/{size}/{tag}"
        self.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        return tag

    def fill(self) -> None:
        data = self.sock.recv(1 << 16)
        if not data:
            raise EOFError("the connection has ended")
        self.buffer += data

    def head(self) -> dict[str, str]:
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            self.fill()
        lines = self.buffer[:end].decode("latin-1").split("\r\n")
        self.buffer = self.buffer[end + 4 :]
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        fields["status"] = lines[0].split()[1]
        statuses[fields["status"]] += 1
        return fields

    def answer(self, tag: str, size: int) -> None:
        global ok
        fields = self.head()
        if fields["status"] != "200" or fields["x-tag"] != tag or fields["x-count"] != "1":
            wrong.append(f"asked for {tag}: {fields}")
        length = int(fields["content-length"])
        if fields["status"] == "200" and length != size:
            wrong.append(f"{tag}: {length} bytes for {size}")
        self.body(tag, length)
        ok += 1

    def body(self, tag: str, length: int) -> None:
        """Read and checked as it comes: it may be longer than memory."""
        pattern = body_of(tag, 2 * PERIOD)
        at = 0
        while at < length:
            if not self.buffer:
                self.fill()
            here = self.buffer[: length - at]
            self.buffer = self.buffer[len(here) :]
            start = at % PERIOD
            if pattern[start : start + len(here)] != here:
                same = next(i for i, byte in enumerate(here) if byte != pattern[start + i])
                there, found = (at + same) % PERIOD, here[same:]
                wrong.append(f"{tag}: other bytes from {at + same} on: for {there} {place_of(tag, found)}: {found[:64]!r}")
                raise EOFError("it reads nonsense")
            at += len(here)

    def exchange(self, kind: str, size: int) -> None:
        self.answer(self.ask(kind, size), size)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def eager(connection: Connection) -> None:
    for _ in range(5):
        asked = [connection.ask("size", SIZE) for _ in range(TIMES)]
        for tag in asked:
            connection.answer(tag, SIZE)
        connection.exchange("size", 64)


def sleepy(connection: Connection) -> None:
    for _ in range(TIMES):
        tag = connection.ask("size", SIZE)
        time.sleep(0.5)
        while len(connection.buffer) < 5000:
            connection.fill()
        time.sleep(0.5)
        connection.answer(tag, SIZE)
        connection.exchange("size", 64)


def vanish(connection: Connection) -> None:
    for turn in range(TIMES):
        connection.ask("size", SIZE)
        if turn % 3:
            connection.fill()
        connection.reset() if turn % 2 else connection.sock.close()
        connection = Connection()
    connection.exchange("size", SIZE)


def short(connection: Connection) -> None:
    for turn in range(TIMES):
        made = Connection(0)
        for _ in range(1 + turn % 3):
            made.exchange("size", 64 + turn % 1000)
        made.sock.close()
    connection.exchange("size", SIZE)


def huge(connection: Connection) -> None:
    connection.exchange("size", SIZE)
    connection.exchange("size", 64)


def broken(connection: Connection) -> None:
    for turn in range(TIMES):
        half = turn % 2
        connection.ask("half" if half else "reset", SIZE)
        try:
            fields = connection.head()
            if half:
                tag = fields["x-tag"]
                connection.body(tag, SIZE)
                wrong.append("a whole answer of half of one")
            else:  # 502, and the connection is as good as before
                connection.body("", 0)
                while len(connection.buffer) < int(fields["content-length"]):
                    connection.fill()
                connection.buffer = connection.buffer[int(fields["content-length"]) :]
                if fields.get("connection") == "close":
                    connection = Connection()
                connection.exchange("size", 64)
        except (OSError, EOFError) as error:
            errors.append(f"{'half' if half else 'reset'}: {type(error).__name__} {error}")
            connection = Connection()


began = time.monotonic()
try:
    first = Connection()
    print("ready", flush=True)
    began = time.monotonic()
    {"eager": eager, "sleepy": sleepy, "vanish": vanish, "short": short, "huge": huge, "broken": broken}[MODE](first)
except (OSError, EOFError, ValueError, KeyError) as error:
    errors.append(f"{type(error).__name__} {error}")
print(json.dumps({"ok": ok, "wrong": wrong[:20], "errors": errors, "statuses": statuses, "seconds": time.monotonic() - began}))
