"""What the proxy asks of the kernel, answered there by eBPF. Replaced by a fake where no programs are loaded."""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import Protocol

from l7proxy.target import Caller
from mesh.link import Hello

_PEERCRED = struct.Struct("iII")


class SocketLike(Protocol):
    """What the loop's transports give for a socket."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...
    def setsockopt(self, level: int, option: int, value: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Origin:
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
        self._origin = self._caller = struct.Struct("")

    def learn(self, hello: Hello) -> None:
        """Takes the layouts of the programs that are loaded now. Raises ValueError when they lack a field."""
        origin, caller = struct.Struct(hello.origin_format), struct.Struct(hello.caller_format)
        wanted = {"dst", "client", "netns", "workload", "identity", "service", "dst_port", "client_port"}
        if missing := wanted - set(hello.origin_fields) | {"addr", "identity", "port"} - set(hello.caller_fields):
            raise ValueError(f"the agent's layouts lack {', '.join(sorted(missing))}")
        self._hello, self._origin, self._caller = hello, origin, caller

    def origin(self, sock: SocketLike) -> Origin | None:
        """None when the socket was not captured: close it."""
        hello = self._hello
        if hello is None:
            return None
        try:
            raw = sock.getsockopt(hello.origin_level, hello.origin_opt, self._origin.size)
            values = dict(zip(hello.origin_fields, self._origin.unpack(raw), strict=False))
        except (OSError, struct.error):
            return None
        return Origin(
            address_text(values["dst"]),
            values["dst_port"],
            address_text(values["client"]),
            values["client_port"],
            values["netns"],
            values["workload"],
            values["identity"],
            values["service"],
        )

    def set_caller(self, sock: SocketLike, caller: Caller) -> None:
        """Before connect(): whom the server shall see. Raises OSError when no program answers."""
        hello = self._hello
        if hello is None:
            raise OSError("no layouts yet")
        values = {"addr": address_bytes(caller.address), "identity": caller.identity, "port": caller.port}
        packed = self._caller.pack(*(values.get(name, 0) for name in hello.caller_fields))
        sock.setsockopt(hello.origin_level, hello.caller_opt, packed)

    def check_agent(self, connection: socket.socket) -> bool:
        """Whether the other end of the link is root."""
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        return bool(_PEERCRED.unpack(raw)[1] == 0)


def address_text(raw: bytes) -> str:
    """16 bytes, IPv4 as v4-mapped, to canonical text."""
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def address_bytes(text: str) -> bytes:
    """The reverse of `address_text`."""
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed
