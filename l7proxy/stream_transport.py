"""A stream of a tunnel that looks like an asyncio transport to the protocol above it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from l7proxy.hbone.stream import CANCEL, ENHANCE_YOUR_CALM, Stream

if TYPE_CHECKING:
    from l7proxy.streams import Tunnel

PIECES_EARLY = 32  # 16 frames: a record and a wake-up cost less than the other end's waiting for more of the same turn


class StreamTransport(asyncio.Transport):
    """One HBONE stream. Callbacks never come from within a call of its own; `connection_lost` comes once, last."""

    __slots__ = ("_closing", "_ended", "_eof", "_lost", "_paused", "_received", "core", "hear", "protocol", "stream", "tunnel")

    def __init__(self, tunnel: Tunnel, stream: Stream) -> None:
        self.tunnel = tunnel
        self.core = tunnel.core
        self.stream = stream
        stream.user = self
        self.protocol: asyncio.Protocol | None = None
        self.hear: Callable[[bytes], None] | None = None  # takes at once what comes; None: it waits, or nobody wants it
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
        self._listen()
        if self._received or self._eof:
            self.tunnel.loop.call_soon(self._deliver)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = cast("asyncio.Protocol", protocol)
        self._listen()

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
        if self._closing or not data:
            return
        tunnel = self.tunnel
        core = self.core
        full = core.send(self.stream, data if type(data) is bytes else bytes(data))
        if not tunnel.armed:
            tunnel.arm()
        elif len(core.said) >= PIECES_EARLY:
            tunnel.hurry()
        if full:
            tunnel.loop.call_soon(self._pause_writing)

    def write_eof(self) -> None:
        if not self._closing and not self._lost:
            self.core.end(self.stream)
            self.tunnel.arm()

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None:
        self._paused = True
        self.hear = None

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            self._listen()
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

    def _listen(self) -> None:
        """After a change of what `hear` depends on."""
        protocol = self.protocol
        if protocol is None or self._paused or self._closing or self._received:
            self.hear = None
        else:
            self.hear = protocol.data_received

    def on_data(self, data: bytes) -> None:
        """For which there is no `hear`."""
        if self._closing:
            self.core.reset(self.stream, CANCEL)
            self.tunnel.loop.call_soon(self.lose, None)
        else:
            self._received.append(data)
            if not self.tunnel.hold(len(data)):
                self.core.reset(self.stream, ENHANCE_YOUR_CALM)
                self.tunnel.loop.call_soon(self.lose, ConnectionAbortedError("too much was held for readers that do not read"))

    def on_end(self) -> None:
        self._eof = True
        if not self._received and not self._paused:
            self._tell_end()
        self._part()

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
        self._listen()
        if self._eof and not self._received and not self._paused:
            self._tell_end()
        self.tunnel.arm()

    def _drop_received(self) -> None:
        """And hear no more."""
        self.hear = None
        if self._received:
            self.tunnel.hold(-sum(map(len, self._received)))
            self._received.clear()

    def lose(self, error: Exception | None) -> None:
        if self._lost:
            self._part()
            return
        self._lost = True
        self._closing = True
        self._drop_received()
        self.tunnel.closing.discard(self)
        protocol, self.protocol = self.protocol, None
        self._part()
        if protocol is not None:
            protocol.connection_lost(error)

    def _part(self) -> None:
        """When both are over: each knows the other, and they would wait for the collector, the tunnel with them."""
        if self._lost and self.stream.id not in self.core.streams:
            self.stream.user = None
