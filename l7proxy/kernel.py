"""What the proxy asks of the kernel, answered there by eBPF. Replaced by a fake where no programs are loaded."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable
from functools import lru_cache
from operator import itemgetter
from time import CLOCK_BOOTTIME, clock_gettime_ns, perf_counter
from typing import Any, Protocol

import msgspec

from l7proxy.express import FLAG_ANSWERING, FLAG_INSIDE, FLAG_OFF, FLAG_TORN, View
from l7proxy.target import Caller
from mesh.link import Hello

_PEERCRED = struct.Struct("iII")
_ORIGIN = ("dst", "dst_port", "client", "client_port", "netns", "workload", "identity", "service")  # as in `Origin`
_CALLER = ("addr", "identity", "port")
_MAPPED = b"\0" * 10 + b"\xff\xff"  # an IPv4 address in 16 bytes
_U32 = 0xFFFFFFFF
_HEAD_BYTES = 1024  # PL_X_HEAD_BYTES; as much as Python's getsockopt takes
_VIEW = (
    "flags", "busy", "phase", "handed", "handed_slow", "status", "head_len", "req_left", "resp_left", "punt", "t0_ns", "head",
)  # fmt: skip
_ARM = ("op", "slot", "consumed", "sent", "up_sent", "up_consumed")


class SocketLike(Protocol):
    """What the loop's transports give for a socket."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...
    def setsockopt(self, level: int, option: int, value: bytes, /) -> None: ...


class Origin(msgspec.Struct, frozen=True, gc=False):
    """What the application dialled, and who it is: a fact of the kernel, not of the packet."""

    address: str
    port: int
    client_address: str
    client_port: int
    netns: int
    workload: int
    identity: int
    service: int


class Kernel:
    """The real one. Layouts come with Hello; before it nothing is answered."""

    def __init__(self) -> None:
        self._hello: Hello | None = None
        self._origin = self._caller = self._view = self._arm = struct.Struct("")
        self._origin_at: tuple[int, ...] = ()  # where the fields above stand
        self._caller_at: tuple[int, ...] = ()
        self.express = False  # this node's kernel carries exchanges by itself
        self._view_at: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple  # the fields of _VIEW
        self._arm_at: tuple[int, ...] = ()
        self._blank: tuple[int | bytes, ...] = ()  # what is in pl_xarm besides

    def learn(self, hello: Hello) -> None:
        """Takes the layouts of the programs that are loaded now. Raises ValueError when they lack a field."""
        origin, caller = struct.Struct(hello.origin_format), struct.Struct(hello.caller_format)
        if missing := set(_ORIGIN) - set(hello.origin_fields) | set(_CALLER) - set(hello.caller_fields):
            raise ValueError(f"the agent's layouts lack {', '.join(sorted(missing))}")
        self._view, self._arm = struct.Struct(hello.xview_format), struct.Struct(hello.xarm_format)
        self.express = set(hello.xview_fields) >= set(_VIEW) and set(hello.xarm_fields) >= set(_ARM)
        if self.express:
            self._view_at = itemgetter(*map(hello.xview_fields.index, _VIEW))
            others = [name for name in hello.xarm_fields if name not in _ARM]
            blank = dict(zip(hello.xarm_fields, self._arm.unpack(bytes(self._arm.size)), strict=True))
            self._blank = tuple(blank[name] for name in others)
            self._arm_at = tuple(map((*_ARM, *others).index, hello.xarm_fields))
        self._hello, self._origin, self._caller = hello, origin, caller
        self._origin_at = tuple(hello.origin_fields.index(name) for name in _ORIGIN)
        self._caller_at = tuple(_CALLER.index(name) if name in _CALLER else len(_CALLER) for name in hello.caller_fields)

    def origin(self, sock: SocketLike) -> Origin | None:
        """None when the socket was not captured: close it."""
        hello = self._hello
        if hello is None:
            return None
        try:
            raw = sock.getsockopt(hello.origin_level, hello.origin_opt, self._origin.size)
            values = self._origin.unpack(raw)
        except (OSError, struct.error):
            return None
        dst, dst_port, client, client_port, *numbers = [values[at] for at in self._origin_at]
        return Origin(address_text(dst), dst_port, address_text(client), client_port, *numbers)

    def set_caller(self, sock: SocketLike, caller: Caller) -> None:
        """Before connect(): whom the server shall see. Raises OSError when no program answers."""
        hello = self._hello
        if hello is None:
            raise OSError("no layouts yet")
        values = (address_bytes(caller.address), caller.identity, caller.port, 0)
        packed = self._caller.pack(*[values[at] for at in self._caller_at])
        sock.setsockopt(hello.origin_level, hello.caller_opt, packed)

    def express_view(self, sock: SocketLike) -> View | None:
        """The kernel's account of a paired accepted socket; None: it is not paired."""
        hello = self._hello
        if hello is None or not self.express:
            return None
        try:
            values = self._view.unpack(sock.getsockopt(hello.origin_level, hello.express_opt, self._view.size))
            flags, busy, phase, handed, slow, status, head_len, req_left, resp_left, punt, began, head = self._view_at(values)
            if head_len > len(head):  # the option next to it has all of it
                head = sock.getsockopt(hello.origin_level, hello.express_opt + 1, _HEAD_BYTES)
        except (OSError, struct.error):
            return None
        return View(
            busy - 1,
            phase,
            handed != 0,
            slow,
            status,
            head[:head_len],
            req_left,
            resp_left,
            hello.xreasons[punt] if punt < len(hello.xreasons) else "",
            perf_counter() - (clock_gettime_ns(CLOCK_BOOTTIME) - began) / 1e9,
            flags & FLAG_OFF != 0,
            began,
            flags & FLAG_INSIDE != 0,
            flags & FLAG_TORN != 0,
            flags & FLAG_ANSWERING != 0,
        )

    def express_op(
        self, sock: SocketLike, op: int, slot: int, consumed: int = 0, sent: int = 0, up_sent: int = 0, up_consumed: int = 0
    ) -> bool:
        """ARM, HOLD or TAKE (see bpf/types.h; bytes are counted from the pairing on). False: refused, or not paired."""
        hello = self._hello
        if hello is None or not self.express:
            return False
        values = (op, slot, consumed & _U32, sent & _U32, up_sent & _U32, up_consumed & _U32, *self._blank)
        try:
            sock.setsockopt(hello.origin_level, hello.express_opt, self._arm.pack(*[values[at] for at in self._arm_at]))
        except (OSError, struct.error):
            return False
        return True

    def check_agent(self, connection: socket.socket) -> bool:
        """Whether the other end of the link is root."""
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        return bool(_PEERCRED.unpack(raw)[1] == 0)


def address_text(raw: bytes) -> str:
    """16 bytes, IPv4 as v4-mapped, to canonical text."""
    return socket.inet_ntoa(raw[12:]) if raw.startswith(_MAPPED) else _v6_text(raw)


@lru_cache(4096)  # slow to make, and there are as many as workloads
def _v6_text(raw: bytes) -> str:
    return str(ipaddress.IPv6Address(raw))


def address_bytes(text: str) -> bytes:
    """The reverse of `address_text`. Raises OSError for what is no address."""
    return socket.inet_pton(socket.AF_INET6, text) if ":" in text else _MAPPED + socket.inet_pton(socket.AF_INET, text)
