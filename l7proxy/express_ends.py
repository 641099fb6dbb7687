"""A paired session's connections to servers: its own while it is paired, with their bytes counted, since the kernel is told
in bytes from the pairing on where user space stands."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING, cast

from l7proxy.target import DialError
from l7proxy.upstream import UpstreamConnection

if TYPE_CHECKING:
    from l7proxy.express_asking import Asking

_LINGER = struct.Struct("ii")


class UpstreamEnd(asyncio.Protocol):
    """Between the transport and its `UpstreamConnection`: counts, and asks the pair before it believes an event that comes
    while the session rests. ``slot``: the kernel's number of it, -1: none yet."""

    __slots__ = ("connection", "consumed", "counting", "early", "early_eof", "pair", "sent", "slot")

    def __init__(self, pair: Asking, connection: UpstreamConnection) -> None:
        self.pair, self.connection, self.slot = pair, connection, -1
        self.sent = self.consumed = 0
        self.counting = False
        self.early, self.early_eof = b"", False  # came while a takeover was not complete

    @property
    def idle(self) -> bool:
        return self.connection.sink is None

    def count(self) -> None:
        """From here on, from zero."""
        connection = self.connection
        self.sent = self.consumed = 0
        if not self.counting:
            self.counting = True
            connection.transport.set_protocol(self)
            connection.write = self.write

    def write(self, data: bytes) -> None:
        self.sent += len(data)
        self.connection.transport.write(data)

    def part(self) -> None:
        """An upstream like any other again: of whoever uses it now, or of its pool."""
        connection = self.connection
        if self.counting:
            self.counting = False
            connection.write = connection.transport.write
            if not connection.transport.is_closing():
                connection.transport.set_protocol(connection)
        if connection.sink is None and not connection.lost:
            connection.upstreams.keep(connection)

    def drop(self) -> None:
        """Of no use to anybody: the kernel may have sent through it what user space does not know of."""
        if self.connection.sink is None:
            self.connection.close()

    # ---- the transport's events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Only of a takeover."""
        self.counting = True
        self.connection.connection_made(transport)
        self.connection.write = self.write

    def data_received(self, data: bytes) -> None:
        self.consumed += len(data)
        if not self.pair.complete:
            self.early += data
        elif self.connection.sink is not None:
            self.connection.data_received(data)
        else:
            self.pair.server_spoke(self, data)

    def eof_received(self) -> bool:
        if not self.pair.complete:
            self.early_eof = True
            return True
        if self.connection.sink is None:
            self.pair.server_ended(self)
        return self.connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        connection = self.connection
        if connection.sink is None:
            self.pair.server_ended(self)
        self.pair.server_gone(self)
        shut(connection.transport)
        connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self.connection.pause_writing()

    def resume_writing(self) -> None:
        self.connection.resume_writing()


class Spare:
    """Waits for a connection to an endpoint that the pair lacks."""

    __slots__ = ("pair",)

    def __init__(self, pair: Asking) -> None:
        self.pair = pair

    def upstream_open(self, connection: UpstreamConnection) -> None:
        connection.sink = None
        self.pair.dialled(connection)

    def upstream_failed(self, error: DialError) -> None:  # noqa: ARG002  # counted where it is dialled
        self.pair.dialled(None)

    def upstream_data(self, data: bytes) -> None: ...
    def upstream_eof(self) -> None: ...
    def upstream_lost(self, error: Exception | None) -> None: ...
    def upstream_full(self) -> None: ...
    def upstream_drained(self) -> None: ...


def descriptor(transport: asyncio.Transport) -> int:
    """Raises OSError when the transport has none any more."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        raise OSError("the connection is gone")
    return cast(int, sock.fileno())


def shut(transport: asyncio.Transport) -> None:
    """At its end, when all is sent: the agent holds a duplicate, so closing alone would not end it. One that is to end
    by RST is left to the agent's close."""
    try:
        fd = os.dup(descriptor(transport))
    except OSError:
        return
    with socket.socket(fileno=fd) as sock:
        try:
            if not _LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.size))[0]:
                sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was faster
