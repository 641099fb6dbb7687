"""What express rests on, tried on this kernel: real sockets in a network namespace made for it, bytes redirected between them
as bpf/express.c does. Versions tell little: the same fault was fixed in some stable series and came back in others."""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nodeagent.datapath_api import DatapathError
from nodeagent.layouts import Layout
from nodeagent.libbpf import libc
from nodeagent.maps import BpfMap, close_all, open_all
from nodeagent.netns import CLONE_NEWNET

MAPS = ("xends", "xprobes", "xprobereads")
WAIT_S = 1.0  # far more than a byte on loopback needs
CLIENT, SERVER = 1, 2  # keys
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ, _TCP_REPAIR_WINDOW = 19, 20, 21, 29  # linux/tcp.h
_SEGMENT_BYTES = 32_767  # the most that may be asked for
_RECEIVE, _SEND, _REPAIR_OFF_UNHEARD = 1, 2, -1
_U64, _U32, _INT = struct.Struct("=Q"), struct.Struct("=I"), struct.Struct("=i")


class Failed(Exception):
    """The kernel did something else."""


class Four:
    """client <-> accepted, upstream <-> server: what a pair consists of. What client sends reaches server, and back, once
    `redirect` was called; TCP's own bytes of both queue behind, once `read_all` was."""

    def __init__(self, maps: dict[str, BpfMap], end: Layout) -> None:
        self._maps, self._end = maps, end
        self.client, self.accepted = connection()
        self.upstream, self.server = connection()

    def redirect(self) -> None:
        for sock, own, other in ((self.client, CLIENT, SERVER), (self.server, SERVER, CLIENT)):
            self._maps["xends"].put(_INT.pack(sock.fileno()), self._end.pack(record=other))
            self._maps["xprobes"].put(_U64.pack(own), _U32.pack(sock.fileno()))

    def read_all(self) -> None:
        for sock, own in ((self.client, CLIENT), (self.server, SERVER)):
            self._maps["xprobereads"].put(_U64.pack(own), _U32.pack(sock.fileno()))

    def close(self) -> None:
        for sock in (self.client, self.accepted, self.upstream, self.server):
            sock.close()


def connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname(), WAIT_S)
        far, _ = listener.accept()
    for sock in (near, far):
        sock.settimeout(WAIT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def _expect(sock: socket.socket, wanted: bytes, what: str) -> None:
    got = b""
    try:
        while len(got) < max(1, len(wanted)):
            data = sock.recv(1024)
            got += data
            if not data:
                break
    except TimeoutError:
        raise Failed(f"{what}: {len(got)} of {len(wanted)} bytes within {WAIT_S:g} s") from None
    except OSError as error:
        raise Failed(f"{what}: {error.strerror}") from None
    if got != wanted:
        raise Failed(f"{what}: {got[:40]!r} instead of {wanted!r}")


def _waiting(sock: socket.socket, wanted: int, what: str) -> None:
    number, end = array.array("i", [0]), time.monotonic() + WAIT_S
    while True:
        fcntl.ioctl(sock, termios.FIONREAD, number)
        if number[0] == wanted:
            return
        if time.monotonic() > end:
            raise Failed(f"{what}: FIONREAD says {number[0]} of {wanted} bytes")
        time.sleep(0.001)


def fionread(four: Four) -> None:
    """The count of waiting bytes: nginx and Java read by it."""
    four.redirect()
    four.read_all()
    four.client.sendall(b"redirected")
    _waiting(four.server, 10, "redirected bytes")
    four.upstream.sendall(b"ordinary")
    _waiting(four.server, 18, "ordinary bytes behind them")
    _expect(four.server, b"redirectedordinary", "both")
    _waiting(four.server, 0, "after all was read")


def epoll(four: Four) -> None:
    """Edge-triggered epoll wakes for redirected and for ordinary bytes."""
    four.redirect()
    four.read_all()
    with select.epoll() as watch:
        watch.register(four.server, select.EPOLLIN | select.EPOLLET)
        for sender, data in ((four.client, b"redirected"), (four.upstream, b"ordinary"), (four.client, b"again")):
            sender.sendall(data)
            if not watch.poll(WAIT_S):
                raise Failed(f"no event for {data.decode()}")
            _expect(four.server, data, "after the event")


def fin_order(four: Four) -> None:
    """The end of the stream comes after the redirected bytes before it."""
    four.redirect()
    four.read_all()
    four.server.sendall(b"the last response")
    four.accepted.close()
    _expect(four.client, b"the last response", "before the end")
    _expect(four.client, b"", "the end")


def half_close(four: Four) -> None:
    """A client that has shut down its side still gets what is redirected to it."""
    four.redirect()
    four.read_all()
    four.client.sendall(b"request")
    four.client.shutdown(socket.SHUT_WR)
    _expect(four.server, b"request", "the request")
    _expect(four.accepted, b"", "the end of the client's side")
    four.server.sendall(b"response")
    _expect(four.client, b"response", "the response")


def data_before(four: Four) -> None:
    """Bytes that came before the socket was entered, in both steps, are read, and read first."""
    four.accepted.sendall(b"one")
    _waiting(four.client, 3, "before anything")
    four.redirect()
    four.accepted.sendall(b"two")
    time.sleep(0.01)  # on loopback; nothing tells when, where FIONREAD is wrong
    four.read_all()
    _expect(four.client, b"onetwo", "what came before")
    four.server.sendall(b"three")
    _expect(four.client, b"three", "what came after")
    four.accepted.sendall(b"four")
    _expect(four.client, b"four", "ordinary bytes after")


def dead_target(four: Four) -> None:
    """To a socket that is gone nothing is redirected: the bytes take the ordinary way, and the sender hears nothing."""
    four.redirect()
    four.read_all()
    four.client.sendall(b"first")
    _expect(four.server, b"first", "while the target lives")
    four.server.close()
    try:
        four.client.sendall(b"second")
    except OSError as error:
        raise Failed(f"the sender of bytes to a dead target heard {error.strerror}") from None
    _expect(four.accepted, b"second", "on the ordinary way")


def sent_again(four: Four) -> None:
    """A segment that begins with bytes which came already, as TCP may send one when a reader was slow: they are read once."""
    four.redirect()
    four.read_all()
    four.server.sendall(b"redirected")
    _expect(four.client, b"redirected", "before anything of TCP's own")
    four.accepted.sendall(b"first and")
    four.accepted = rewound(four.accepted, 4)
    four.accepted.sendall(b" and last")
    _expect(four.client, b"first and last", "bytes sent twice")


def rewound(sock: socket.socket, count: int) -> socket.socket:
    """The same end of the same connection, in the place of ``sock``, which is closed unheard: it stands ``count`` bytes before
    what was sent last. By TCP_REPAIR."""
    own, other = sock.getsockname(), sock.getpeername()
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    numbers = []
    for side in (_RECEIVE, _SEND):
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, side)
        numbers.append(_U32.unpack(sock.getsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ, _U32.size))[0])
    sock.close()
    made = socket.socket(sock.family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
    made.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    made.bind(own)
    for side, number in ((_RECEIVE, numbers[0]), (_SEND, numbers[1] - count)):
        made.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, side)
        made.setsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ, _U32.pack(number & 0xFFFFFFFF))
    made.connect(other)
    # struct tcp_repair_window: what the peer would say of its own acknowledges more than this end has sent
    made.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_WINDOW, struct.pack("=5I", numbers[0], *[0xFFFF] * 3, numbers[0]))
    made.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_UNHEARD)
    made.settimeout(WAIT_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


PROBES: dict[str, Callable[[Four], None]] = {
    "fionread": fionread,
    "epoll": epoll,
    "fin_order": fin_order,
    "half_close": half_close,
    "data_before": data_before,
    "dead_target": dead_target,
    "sent_again": sent_again,
}


def run(directory: Path, end: Layout, make: Callable[[dict[str, BpfMap], Layout], Four] = Four) -> dict[str, str]:
    """Probe -> "ok" or why not. ``directory``: pins of the maps; ``end``: struct pl_xend. Raises DatapathError."""
    found: dict[str, str] = {}
    maps = open_all(directory, MAPS)

    def try_all() -> None:
        for name, probe in PROBES.items():
            found[name] = _one(probe, lambda: make(maps, end))

    try:
        alone(try_all)
    finally:
        close_all(maps)
    return found


def _one(probe: Callable[[Four], None], make: Callable[[], Four]) -> str:
    try:
        four = make()
        try:
            probe(four)
        finally:
            four.close()
    except (Failed, OSError, DatapathError) as error:
        return str(error)
    return "ok"


def alone(work: Callable[[], object]) -> None:
    """In a network namespace that ends with the call. Raises DatapathError."""
    failure: list[BaseException] = []

    def body() -> None:
        try:
            if libc.unshare(CLONE_NEWNET):
                raise DatapathError(f"a network namespace for the probes: {os.strerror(ctypes.get_errno())}")
            _up("lo")
            work()
        except BaseException as error:  # handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=body, name="probes")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def _up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", interface.encode(), 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", interface.encode(), flags | _IFF_UP))
