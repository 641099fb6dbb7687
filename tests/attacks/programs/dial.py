"""Connects in one of many ways, asks GET /, prints {"answer": what came back, "error": why not}.

argv: WAY HOST PORT [SOURCE_PORT [TIMEOUT_S]]. Ways: connect, nonblocking, fastopen, mptcp, uring, again (AF_UNSPEC
between two connects: HOST is then "first,second").
"""

import ctypes
import errno
import json
import mmap
import os
import select
import socket
import struct
import sys

IPPROTO_MPTCP, MSG_FASTOPEN = 262, 0x20000000
SETUP, ENTER, GETEVENTS = 425, 426, 1
OP_CONNECT, OP_SOCKET = 16, 45
SQES_AT = 0x10000000

way, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
source_port = int(sys.argv[4]) if sys.argv[4:] else 0
TIMEOUT_S = float(sys.argv[5]) if sys.argv[5:] else 5.0
family = socket.AF_INET6 if ":" in host else socket.AF_INET
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Ring:
    """io_uring, as little of it as needed: one entry at a time."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)
        self.fd = checked(libc.syscall(SETUP, 8, parameters))
        numbers = struct.unpack("30I", parameters.raw)
        self.sq, self.cq = numbers[10:20], numbers[20:30]
        size = max(self.sq[6] + numbers[0] * 4, self.cq[5] + numbers[1] * 16)
        self.rings = mmap.mmap(self.fd, size)
        self.entries = mmap.mmap(self.fd, numbers[0] * 64, offset=SQES_AT)

    def u32(self, at: int) -> int:
        return int(struct.unpack_from("I", self.rings, at)[0])

    def submit(self, opcode: int, fd: int, off: int, addr: int, length: int) -> int:
        struct.pack_into("=BBHiQQIIQQQQ", self.entries, 0, opcode, 0, 0, fd, off, addr, length, 0, 1, 0, 0, 0)
        tail, mask = self.u32(self.sq[1]), self.u32(self.sq[2])
        struct.pack_into("I", self.rings, self.sq[6] + (tail & mask) * 4, 0)
        struct.pack_into("I", self.rings, self.sq[1], tail + 1)
        checked(libc.syscall(ENTER, self.fd, 1, 1, GETEVENTS, None, 0))
        head = self.u32(self.cq[0])
        result = struct.unpack_from("QiI", self.rings, self.cq[5] + (head & self.u32(self.cq[2])) * 16)[1]
        struct.pack_into("I", self.rings, self.cq[0], head + 1)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return int(result)


def sockaddr(address: str) -> bytes:
    number = struct.pack("!H", port)
    if family == socket.AF_INET:
        return struct.pack("H", family) + number + socket.inet_aton(address) + bytes(8)
    return struct.pack("H", family) + number + bytes(4) + socket.inet_pton(family, address) + bytes(4)


def by_uring() -> socket.socket:
    ring = Ring()
    conn = socket.socket(fileno=ring.submit(OP_SOCKET, family, socket.SOCK_STREAM, 0, 0))
    where = ctypes.create_string_buffer(sockaddr(host))
    ring.submit(OP_CONNECT, conn.fileno(), len(where.raw) - 1, ctypes.addressof(where), 0)
    return conn


def opened(request: bytes) -> socket.socket:
    """A connected socket that has sent its request."""
    if way == "uring":
        conn = by_uring()
        conn.settimeout(TIMEOUT_S)
        conn.sendall(request)
        return conn
    conn = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP if way == "mptcp" else 0)
    conn.settimeout(TIMEOUT_S)
    if source_port:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves the port free at once
        conn.bind(("", source_port))
    if way == "fastopen":
        conn.setblocking(True)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(TIMEOUT_S), 0))
        conn.sendto(request, MSG_FASTOPEN, (host, port))
        conn.settimeout(TIMEOUT_S)
        return conn
    if way == "nonblocking":
        conn.setblocking(False)
        code = conn.connect_ex((host, port))
        if code == errno.EINPROGRESS:
            select.select([], [conn], [], TIMEOUT_S)
            code = conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        conn.settimeout(TIMEOUT_S)
    elif way == "again":
        first, second = host.split(",")
        conn.connect((first, port))
        checked(libc.connect(conn.fileno(), bytes(16), 16))
        conn.connect((second, port))
    else:
        conn.connect((host, port))
    conn.sendall(request)
    return conn


def main() -> dict[str, str]:
    out = b""
    try:
        with opened(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as conn:
            while data := conn.recv(65536):
                out += data
        return {"answer": out.decode(errors="replace"), "error": ""}
    except OSError as error:
        return {"answer": out.decode(errors="replace"), "error": type(error).__name__}


print(json.dumps(main()))
