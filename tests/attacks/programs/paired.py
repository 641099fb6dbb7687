"""Attacks from a client whose connection the kernel carries, on a server of tests/e2e/programs/exact_server.py.
argv: JSON {host, port, mode, …}. Prints JSON.
 smuggle {step}: a POST whose body is a request, in two or three messages, split at every byte (`step`: every so many)
     -> {splits, wrong: [texts], smuggled: how often the server took the body for a request}
 listen {seconds}: asks one server slowly, and another that speaks out of turn now and then
     -> {asked, wrong: [texts], forged: how often bytes came that nobody had asked for}
 spell {targets, warm}: each target on a kept connection -> [[status, body]…]
 options {what}: see OPTIONS; the exchange after it -> {answer, after}
 sleep {size, seconds}: an answer of so many bytes, not read until for so long no more has come -> {waited: bytes, after}
Each connection exchanges `warms` requests before, and more until there is a file `until`."""

import array
import fcntl
import hashlib
import json
import os
import socket
import struct
import sys
import termios
import time

from lab.pace import SLOW

ask = {"step": 1, "seconds": 3.0, "warm": "/size/10/warm", "warms": 50, "until": "/"} | json.loads(sys.argv[1])
HOST, PORT, MODE = ask["host"], ask["port"], ask["mode"]
ADDRESS = socket.getaddrinfo(HOST, PORT, type=socket.SOCK_STREAM)[0]
NAME = f"{os.getpid():x}"
TIMEOUT_S, PAUSE_S, WARMS = 5.0 * SLOW, 0.004, ask["warms"]


class Connection:
    def __init__(self, *warm: str) -> None:
        self.sock = socket.socket(ADDRESS[0], socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(ADDRESS[4])
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer, self.low_water = b"", False
        turn = 0
        while warm and (turn < WARMS or not os.path.exists(ask["until"])):
            self.get(warm[turn % len(warm)])
            time.sleep(PAUSE_S)
            turn += 1

    def get(self, target: str) -> tuple[dict[str, str], bytes]:
        self.sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode("latin-1"))
        return self.answer()

    def fill(self, missing: int = 1) -> None:
        if self.low_water:  # as one does who knows what is to come; a mark above what is left would never be reached
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, missing)
        data = self.sock.recv(1 << 20)
        if not data:
            raise EOFError("the connection has ended")
        self.buffer += data

    def answer(self) -> tuple[dict[str, str], bytes]:
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            self.fill()
        lines = self.buffer[:end].decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        fields["status"] = lines[0].split()[1]
        length = int(fields.get("content-length", "0"))
        while (missing := end + 4 + length - len(self.buffer)) > 0:
            self.fill(missing)
        body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
        return fields, body

    def silent(self) -> bool:
        if self.buffer:
            return False
        self.sock.setblocking(False)
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.sock.settimeout(TIMEOUT_S)


def smuggle() -> dict[str, object]:
    wrong: list[str] = []
    smuggled = f"smuggled-{NAME}"
    body = f"GET /size/10/{smuggled} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    plain = f"POST /echo/%s HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n%s\r\n"
    splits: list[tuple[str, tuple[int, ...]]] = []
    for odd in ("", "TE: trailers\r\n"):  # the kernel takes the one head as far as it is whole, the other never
        head = len(plain % (f"{NAME}-0000", odd))
        splits += [(odd, (at,)) for at in range(1, head + len(body), ask["step"])]
        splits += [(odd, (at, head)) for at in range(1, head, ask["step"])]
        splits += [(odd, (head,))]
    connection = Connection("/size/10/warm")
    for number, (odd, cuts) in enumerate(splits):
        tag = f"{NAME}-{number:04d}"
        message = (plain % (tag, odd)).encode() + body
        try:
            for start, end in zip((0, *cuts), (*cuts, len(message)), strict=True):
                connection.sock.sendall(message[start:end])
            fields, answer = connection.answer()
            if fields.get("x-tag") != tag or answer != hashlib.sha1(body).hexdigest().encode():
                wrong.append(f"{odd!r} {cuts}: {fields} {answer!r}")
            for turn in range(2):  # user space arms again; the next split finds the kernel ready
                after = f"{tag}-{turn}"
                if connection.get(f"/size/10/{after}")[0].get("x-tag") != after:
                    wrong.append(f"{odd!r} {cuts}: another's answer after it")
        except (OSError, EOFError, ValueError, IndexError) as error:
            wrong.append(f"{odd!r} {cuts}: {type(error).__name__} {error}")
            connection = Connection("/size/10/warm")
        if len(wrong) > 20:
            break
    count = int(Connection().get(f"/saw/{smuggled}")[1])
    return {"splits": len(splits), "wrong": wrong, "smuggled": count}


def listen() -> dict[str, object]:
    wrong: list[str] = []
    forged = asked = 0
    end = time.monotonic() + ask["seconds"]

    def fresh() -> Connection:
        """Used to both. Of the proxy's older connections to the other, one may speak out of turn meanwhile: anew, then."""
        while True:
            connection, target = Connection(), ""
            try:
                for turn in range(WARMS):
                    target = ("/size/10/warm", "/b/warm")[turn % 2]
                    connection.get(target)
                    time.sleep(PAUSE_S)
                return connection
            except (OSError, EOFError, ValueError, IndexError):
                if target != "/b/warm":
                    raise
                if time.monotonic() > end:
                    return connection

    connection = fresh()
    while time.monotonic() < end:
        try:
            asked += 1
            if asked % 12 == 0:
                try:
                    for _ in range(6):
                        connection.get("/b/again")
                except (OSError, EOFError, ValueError, IndexError):  # it was asked: what it says is its own affair
                    connection = fresh()
                continue
            tag = f"{NAME}-{asked}"
            fields, body = connection.get(f"/slow/5/{tag}")
            if fields.get("x-tag") != tag or b"FORGED" in body:
                wrong.append(f"{fields} {body!r}")
                forged += b"FORGED" in body
            time.sleep(PAUSE_S)
            if not connection.silent():
                forged += 1
                connection = fresh()
        except (OSError, EOFError, ValueError, IndexError) as error:
            wrong.append(f"{type(error).__name__} {error}, request {asked}")
            connection = fresh()
    return {"asked": asked, "wrong": wrong[:20], "forged": forged}


def spell() -> list[tuple[int, str]]:
    """On one connection as far as it goes, warm before each spelling."""
    found = []
    connection = Connection(ask["warm"])
    for target in ask["targets"]:
        try:
            fields, body = connection.get(target)
            found.append((int(fields["status"]), body.decode("latin-1")))
            if fields.get("connection") == "close":
                connection = Connection(ask["warm"])
            connection.get(ask["warm"])
        except (OSError, EOFError, ValueError, IndexError) as error:
            found.append((0, f"{type(error).__name__} {error}")) if len(found) < 1 + ask["targets"].index(target) else None
            connection = Connection(ask["warm"])
    return found


OPTIONS = {
    "TCP_ULP": (socket.IPPROTO_TCP, 31, b"tls"),
    "TCP_REPAIR": (socket.IPPROTO_TCP, 19, struct.pack("i", 1)),
    "SO_RCVLOWAT": (socket.SOL_SOCKET, socket.SO_RCVLOWAT, struct.pack("i", 4000)),
    "SO_RCVBUF": (socket.SOL_SOCKET, socket.SO_RCVBUF, struct.pack("i", 4096)),
    "TCP_MAXSEG": (socket.IPPROTO_TCP, socket.TCP_MAXSEG, struct.pack("i", 500)),
    "SO_ZEROCOPY": (socket.SOL_SOCKET, 60, struct.pack("i", 1)),
    "TCP_INQ": (socket.IPPROTO_TCP, 36, struct.pack("i", 1)),
}


def options() -> dict[str, str]:
    """What the option is answered, and what becomes of the exchanges behind it."""
    connection = Connection("/size/10/warm")
    what = ask["what"]
    try:
        if what == "disconnect":
            unspecified = struct.pack("H14x", socket.AF_UNSPEC)
            import ctypes

            libc = ctypes.CDLL(None, use_errno=True)
            if libc.connect(connection.sock.fileno(), unspecified, len(unspecified)):
                raise OSError(ctypes.get_errno(), "disconnect")
        elif what == "listen":
            connection.sock.listen(1)
        else:
            connection.sock.setsockopt(*OPTIONS[what])
        answer = "PASSED"
        connection.low_water = what == "SO_RCVLOWAT"
    except OSError as error:
        answer = type(error).__name__
    try:
        for turn in range(100):
            fields, body = connection.get(f"/size/5000/{NAME}-{turn}")
            if fields.get("x-tag") != f"{NAME}-{turn}" or len(body) != 5000:
                return {"answer": answer, "after": f"wrong: {fields}"}
        after = "right"
    except TimeoutError:
        after = "stuck"
    except (OSError, EOFError) as error:
        after = f"ended: {type(error).__name__}"
    return {"answer": answer, "after": after}


def sleep() -> dict[str, object]:
    connection, waiting, tag = Connection("/size/10/warm"), array.array("i", [0]), f"{NAME}-slept"
    connection.sock.sendall(f"GET /size/{ask['size']}/{tag} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    waited, since = 0, time.monotonic()
    while time.monotonic() < since + ask["seconds"]:
        time.sleep(0.02)
        fcntl.ioctl(connection.sock, termios.FIONREAD, waiting)
        if waiting[0] != waited:
            waited, since = waiting[0], time.monotonic()
    fields, body = connection.answer()
    right = fields.get("x-tag") == tag and len(body) == ask["size"]
    return {"waited": waited, "after": "right" if right else f"wrong: {fields} {len(body)}"}


print(json.dumps({"sleep": sleep, "smuggle": smuggle, "listen": listen, "spell": spell, "options": options}[MODE]()))
