"""A connection of HBONE streams on a TLS channel, written once per loop turn. Both ends of a tunnel are made of this."""

from __future__ import annotations

import asyncio
import ssl
from socket import socket
from typing import Any

from l7proxy.channel import TlsChannel
from l7proxy.hbone.core import Core
from l7proxy.hbone.stream import CANCEL, Event, HboneError, Headers, Kind, Limits, Stream
from l7proxy.stream_transport import StreamTransport

HELD_BYTES_MAX = 64 << 20  # of one tunnel, for readers that do not read
TAKES_PER_TURN_MAX = 4
LINGER_S = 60.0  # as the kernel's FIN_WAIT2
_DATA = Kind.DATA


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
        """Bytes received and not taken by their reader, or encrypted and not taken by the peer: more, or (negative) fewer.
        False: it is too much."""
        self.held += size
        return size < 0 or self.held <= HELD_BYTES_MAX

    # ---- output

    def arm(self) -> None:
        if not self.armed and not self.lost:
            self.armed = True
            self.loop.call_soon(self._flush)

    def hurry(self) -> None:
        """In the midst of a turn, from a `write`: nobody is called back."""
        channel = self.channel
        if channel.open and not channel.blocked and not self.lost:
            channel.send_whole(b"".join(self.core.take_said()))

    def _flush(self) -> None:
        self.armed = False
        channel, core = self.channel, self.core
        if self.lost or channel.blocked or not channel.open:
            return
        if not (core.wants_take or self.closing):  # nearly always
            if core.said:
                channel.send_whole(b"".join(core.take_said()))
            if not core.streams:
                self.on_idle()
            return
        writable = []
        for _ in range(TAKES_PER_TURN_MAX):  # what the kernel does not take of one is all that is kept encrypted
            data, ready = core.take()
            if data:
                channel.send(data)
            if ready:
                writable += ready
            more = core.wants_write and not channel.blocked
            if not more:
                break
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
        if more:
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
            if kind is _DATA:
                if transport is not None:
                    hear = transport.hear
                    if hear is None:
                        transport.on_data(payload)
                    else:
                        stream.credit = credit = stream.credit + len(payload)
                        if credit >= stream.window >> 1:
                            self.core.credited(stream, len(payload))
                        hear(payload)
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

    def channel_held(self, size: int) -> bool:
        return self.hold(size)

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
