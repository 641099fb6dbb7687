"""Work inside another network namespace: on a thread of its own that dies afterwards, so that no thread of the
agent is ever left in the wrong one. Sockets stay in the netns they were made in, whoever holds them."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nodeagent.libbpf import libc

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
SO_NETNS_COOKIE = 71
IPV6_FREEBIND = 78
LISTEN_BACKLOG = 4096
OWN = Path("/proc/thread-self/ns/net")


def open_netns(path: Path | None) -> int:
    """A descriptor that keeps the netns alive; None is the caller's own. Raises OSError."""
    return os.open(path or OWN, os.O_RDONLY | os.O_CLOEXEC)


def enter(netns_fd: int) -> None:
    """Moves the calling thread for good. Needs CAP_SYS_ADMIN; raises OSError."""
    if libc.setns(netns_fd, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


def run_in(netns_fd: int, call: Callable[[], T]) -> T:
    """The result (or exception) of ``call`` made inside the netns. Needs CAP_SYS_ADMIN; blocks until it returns."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            enter(netns_fd)
            result.append(call())
        except BaseException as error:  # handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def cookie_here() -> int:
    """The cookie of the calling thread's netns: never reused while the machine runs, 0 only on kernels before 5.14."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])


def cookie(netns_fd: int) -> int:
    """The cookie (SO_NETNS_COOKIE) of a netns."""
    return run_in(netns_fd, cookie_here)


def listen_tcp(address: str, port: int) -> socket.socket:
    """A listener nobody else can join: no SO_REUSEPORT. SO_REUSEADDR, for our own TIME_WAITs. Raises OSError."""
    sock = _bound(socket.SOCK_STREAM, address, port)
    sock.listen(LISTEN_BACKLOG)
    return sock


def bind_udp(address: str, port: int) -> socket.socket:
    """A bound datagram socket. Raises OSError."""
    return _bound(socket.SOCK_DGRAM, address, port)


def _bound(kind: int, address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # The address may still be tentative (duplicate address detection) when a workload is made.
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"port {port} of {address}: {error.strerror}") from error
    return sock


def client_sockets(family: int, count: int) -> list[int]:
    """Descriptors of unconnected TCP sockets (non-blocking, TCP_NODELAY), made in the calling thread's netns."""
    made: list[int] = []
    try:
        for _ in range(count):
            with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                made.append(sock.detach())
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return made
