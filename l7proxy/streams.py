"""A connection of HBONE streams on a TLS channel, written once per loop turn, and a stream that looks like an
asyncio transport to the protocol above it. Both ends of a tunnel are made of this.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from socket import socket
from typing import Any, cast

from l7proxy.channel import TlsChannel
from l7proxy.hbone.core import Core
from l7proxy.hbone.stream import CANCEL, ENHANCE_YOUR_CALM, Event, HboneError, Headers, Kind, Limits, Stream

HELD_BYTES_MAX = 64 << 20  # of one tunnel, for readers that do not read
LINGER_S = 60.0  # as the kernel's FIN_WAIT2


class StreamTransport(asyncio.Transport):
    """One HBONE stream. Callbacks never come from within a call of its own; `connection_lost` comes once, last."""

    __slots__ = ("_closing", "_ended", "_eof", "_lost", "_paused", "_received", "core", "protocol", "stream", "tunnel")

    def __init__(self, tunnel: Tunnel, stream: Stream) -> None:
        self.tunnel = tunnel
        self.core = tunnel.core
        self.stream = stream
        stream.user = self
        self.protocol: asyncio.Protocol | None = None
        self._received: deque[bytes] = deque()  # while paused, or before there is a protocol
        self._paused = False
        self._eof = False  # the peer ended, to be told after `_received`
        self._ended = False  # told
        self._closing = False
        self._lost = False

    # ---- the protocol's side

    def start(self, protocol: asyncio.Protocol) -> None:
        """Deliver to this protocol from now on; what came early follows on the next turn."""
        self.protocol = protocol
        if self._received or self._eof:
            self.tunnel.loop.call_soon(self._deliver)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = cast("asyncio.Protocol", protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast("asyncio.BaseProtocol", self.protocol)

    @property
    def retired(self) -> bool:
        """The tunnel takes no more work (rotation, GOAWAY): do not reuse this stream for another request."""
        return self.tunnel.retired

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peer_certificate":
            return self.tunnel.peer
        return default

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def get_write_buffer_size(self) -> int:
        return self.stream.queued

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._lost or not data:
            return
        stream = self.stream
        was_full = stream.full
        self.core.send(stream, data if type(data) is bytes else bytes(data))
        tunnel = self.tunnel
        if not tunnel.armed:
            tunnel.arm()
        if stream.full and not was_full:
            tunnel.loop.call_soon(self._pause_writing)

    def write_eof(self) -> None:
        if not self._closing and not self._lost:
            self.core.end(self.stream)
            self.tunnel.arm()

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            if self._received or self._eof:
                self.tunnel.loop.call_soon(self._deliver)

    def close(self) -> None:
        """Send what is queued and END_STREAM. Bytes that still come are answered as TCP does: by a reset."""
        if self._closing or self._lost:
            return
        self._closing = True
        self._drop_received()
        self.core.end(self.stream)
        self.tunnel.arm()
        self.tunnel.closing.add(self)
        if self.tunnel.lost:
            self.tunnel.loop.call_soon(self.lose, None)

    def abort(self) -> None:
        if not self._lost:
            self._closing = True
            self._drop_received()
            self.core.reset(self.stream, CANCEL)
            self.tunnel.arm()
            self.tunnel.loop.call_soon(self.lose, None)

    # ---- the tunnel's side

    def discard(self) -> None:
        """The stream is being refused: whatever still comes is not for anyone. `connection_lost` follows."""
        if not self._lost:
            self._closing = True
            self._drop_received()
            self.tunnel.loop.call_soon(self.lose, None)

    def _pause_writing(self) -> None:
        if self.stream.full and not self._lost and self.protocol is not None:
            self.protocol.pause_writing()

    def on_writable(self) -> None:
        if not self._lost and self.protocol is not None:
            self.protocol.resume_writing()

    def on_data(self, data: bytes) -> None:
        if self._closing:
            self.core.reset(self.stream, CANCEL)
            self.tunnel.loop.call_soon(self.lose, None)
        elif self._paused or self.protocol is None or self._received:
            self._received.append(data)
            if not self.tunnel.hold(len(data)):
                self.core.reset(self.stream, ENHANCE_YOUR_CALM)
                self.tunnel.loop.call_soon(self.lose, ConnectionAbortedError("too much was held for readers that do not read"))
        else:
            self.core.consumed(self.stream, len(data))
            self.protocol.data_received(data)

    def on_end(self) -> None:
        self._eof = True
        if not self._received and not self._paused:
            self._tell_end()

    def _tell_end(self) -> None:
        if self.protocol is not None and not self._ended and not self._closing:
            self._ended = True
            if not self.protocol.eof_received():
                self.close()

    def _deliver(self) -> None:
        while self._received and not self._paused and not self._closing and self.protocol is not None:
            data = self._received.popleft()
            self.tunnel.hold(-len(data))
            self.core.consumed(self.stream, len(data))
            self.protocol.data_received(data)
        if self._eof and not self._received and not self._paused:
            self._tell_end()
        self.tunnel.arm()

    def _drop_received(self) -> None:
        if self._received:
            self.tunnel.hold(-sum(map(len, self._received)))
            self._received.clear()

    @property
    def is_lost(self) -> bool:
        return self._lost

    def lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._closing = True
        self._drop_received()
        self.tunnel.closing.discard(self)
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            protocol.connection_lost(error)


class Tunnel:
    """One TLS connection of HBONE streams. Subclasses say what a request or a response means.

    ``loop_turn``: sends of a turn leave in one record and one syscall; `arm` schedules it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket,
        context: ssl.SSLContext,
        *,
        client: bool,
        limits: Limits,
        server_name: str | None = None,
    ) -> None:
        self.loop = loop
        self.core = Core(client=client, limits=limits)
        self.armed = False
        self.retired = False
        self.lost = False
        self.held = 0
        self.peer: Any = None  # tls.PeerCertificate, once checked
        self.closing: set[StreamTransport] = set()  # close() called, our half not all sent
        self._lingering: dict[int, float] = {}  # stream -> since when, for streams whose transport is closed
        self.channel = TlsChannel(loop, sock, context, self, server_side=not client, server_name=server_name)

    # ---- for subclasses

    def on_open(self) -> None:
        """Handshake done: check the peer; raise to refuse it."""

    def on_request(self, stream: Stream, headers: Headers) -> None:
        raise NotImplementedError

    def on_response(self, stream: Stream, headers: Headers) -> None:
        raise NotImplementedError

    def on_reset(self, stream: Stream, code: int) -> None:
        """A stream without a transport was reset."""

    def on_lost(self, error: Exception | None) -> None:
        """The connection is gone; streams with a transport have been told."""

    def on_idle(self) -> None:
        """The last stream went."""

    def hold(self, size: int) -> bool:
        """Bytes received and not taken by their reader: more, or (negative) fewer. False: it is too much."""
        self.held += size
        return size < 0 or self.held <= HELD_BYTES_MAX

    # ---- output

    def arm(self) -> None:
        if not self.armed and not self.lost:
            self.armed = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self.armed = False
        channel = self.channel
        if self.lost or channel.blocked or not channel.open:
            return
        core = self.core
        data, writable = core.take()
        if data:
            channel.send(data)
        if core.failed:  # GOAWAY with an error is on its way
            self.close()
            return
        for stream in writable:
            if stream.user is not None:
                stream.user.on_writable()
        if self.closing:
            for transport in [t for t in self.closing if t.stream.local_ended]:
                self.closing.discard(transport)
                self._parted(transport)
        if core.wants_write and not channel.blocked:
            self.arm()
        if not core.streams:
            self.on_idle()

    def _parted(self, transport: StreamTransport) -> None:
        """Our half is sent after `close`. The peer's half may still come, to be discarded or reset."""
        transport.lose(None)

    # ---- channel callbacks

    def channel_open(self) -> None:
        try:
            if self.channel.tls.selected_alpn_protocol() != "h2":
                raise HboneError("the peer did not agree on h2")
            self.on_open()
        except Exception as error:  # whatever it was, this peer gets nothing; on_lost counts the reason
            self.channel.abort(error)
            self.channel.pause()
            return
        self._flush()

    def channel_data(self, data: memoryview) -> None:
        try:
            self._happened(self.core.receive(data))
        except HboneError as error:
            self._happened(error.events)
            last, _ = self.core.take()
            if last:
                self.channel.send(last)
            self.channel.abort(error)
            self.channel.pause()
            return
        if self.core.wants_write or not self.core.streams:
            self.arm()

    def _happened(self, events: list[Event]) -> None:
        for kind, stream, payload in events:
            if stream is None:  # GOAWAY
                self.retired = True
                continue
            transport = stream.user
            if kind is Kind.DATA:
                if transport is not None:
                    transport.on_data(payload)
            elif kind is Kind.END:
                if transport is not None:
                    transport.on_end()
            elif kind is Kind.RESET:
                if transport is not None:
                    transport.lose(ConnectionResetError(f"the peer reset the stream (code {payload})"))
                else:
                    self.on_reset(stream, payload)
            elif kind is Kind.REQUEST:
                self.on_request(stream, payload)
            elif kind is Kind.RESPONSE:
                self.on_response(stream, payload)

    def channel_drained(self) -> None:
        self._flush()

    def channel_lost(self, error: Exception | None) -> None:
        if self.lost:
            return
        self.lost = self.retired = True
        streams = list(self.core.streams.values())
        self.core.streams.clear()
        for transport in list(self.closing):
            transport.lose(None)
        for stream in streams:
            if stream.user is not None:
                stream.user.lose(ConnectionResetError(f"the tunnel was lost: {error or 'closed by the peer'}"))
        self.on_lost(error)

    # ---- the end

    def sweep(self, now: float) -> None:
        """Reset streams that were closed here `LINGER_S` ago and still wait for the peer. ``now``: perf_counter."""
        streams = self.core.streams
        for number in [n for n in self._lingering if n not in streams]:
            del self._lingering[number]
        for stream in [s for s in streams.values() if s.user is not None and s.user.is_closing()]:
            if now - self._lingering.setdefault(stream.id, now) > LINGER_S:
                self.core.reset(stream, CANCEL)
                stream.user.lose(None)
                self.arm()

    def retire(self) -> None:
        """No new streams; the connection goes with its last one."""
        if not self.retired:
            self.retired = True
            self.core.goaway()
            self.arm()

    def close(self) -> None:
        if not self.lost:
            self.retired = True
            self.channel.close()

    def abort(self, error: Exception | None = None) -> None:
        if not self.lost:
            self.retired = True
            self.channel.abort(error)
