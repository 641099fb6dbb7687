"""The sending half of a connection of HBONE streams: what is asked of it, and bytes out as the peer's windows allow."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable

import ngh2

from l7proxy.hbone.stream import (
    BULK,
    CANCEL,
    HIGH_WATER_BYTES,
    LOW_WATER_BYTES,
    NO_ERROR,
    HboneError,
    Headers,
    Limits,
    Stream,
)

FRAME = struct.Struct("!IBI")  # length << 8 | type, flags, stream
DATA, WINDOW_UPDATE = 0, 8
_UPDATE = struct.Struct("!IBII")
_WINDOW_DEFAULT = 65535
QUICK_BYTES_MAX = 16384  # framed as they come, between two `take`s: about a TLS record, and a frame that any peer takes


class Sender:
    """What both halves share, and the half that sends. `Core` adds the one that receives."""

    def __init__(self, *, client: bool, limits: Limits | None = None) -> None:
        self.limits = limits = limits or Limits()
        self.client = client
        self.streams: dict[int, Stream] = {}
        self.peer_streams_max = 100
        self.window_max = limits.stream_window_bytes_max
        self.going_away = False
        self.failed = False
        self.at_fault = False  # it failed by what the peer did, not by a goodbye
        self._ngh2 = ngh2.Connection(
            ngh2.Role.CLIENT if client else ngh2.Role.SERVER,
            ngh2.Configuration(
                stream_reset_rate_limit=(limits.resets_burst, limits.resets_per_s),
                max_continuations=limits.continuations_max,
                max_inbound_header_list_size=limits.header_bytes_max,
                max_inbound_header_count=limits.header_count_max,
                max_outbound_ack=100,
                glitch_rate_limit=(1000, 33),
            ),
        )
        settings = {
            ngh2.Setting.MAX_CONCURRENT_STREAMS: 0 if client else limits.streams_max,
            ngh2.Setting.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
            ngh2.Setting.MAX_FRAME_SIZE: limits.frame_bytes_max,
            ngh2.Setting.MAX_HEADER_LIST_SIZE: limits.header_bytes_max,
        }
        if client:
            settings[ngh2.Setting.ENABLE_PUSH] = 0
        self._ngh2.initiate_connection(settings)
        self._asked = True  # ngh2 has something to say
        self.said: list[bytes | memoryview] = []  # goes out next, in this order
        self._room = QUICK_BYTES_MAX
        self._lost: list[tuple[Stream, int]] = []  # streams it has reset by itself, and with which code
        self._send_window = _WINDOW_DEFAULT
        self._peer_stream_window = _WINDOW_DEFAULT
        self._peer_frame_max = 16384
        self._receive_window = limits.connection_window_bytes
        self._credit = 0
        self._credit_due = limits.connection_window_bytes >> 1
        self._greeted = False
        self._dirty: deque[Stream] = deque()
        self._stalled: set[Stream] = set()  # waiting for the connection's window
        self._updates: list[bytes] = []
        self._credits: list[Stream] = []
        self._ends: list[Stream] = []
        self._highest = 0  # stream number
        self._empties = 0

    # ---- asking

    def open(self, headers: Headers) -> Stream:
        """Client: a new stream. Check `can_open` first. Raises HboneError when the connection is ending."""
        try:
            number: int = self._ngh2.send_request(headers, end_stream=False)
        except ngh2.NGH2Error as error:
            self.going_away = True
            raise HboneError(str(error)) from error
        self._asked = True
        self._highest = number
        stream = self.streams[number] = Stream(number, self._peer_stream_window, self.limits.stream_window_bytes)
        return stream

    @property
    def peer_is_bulk(self) -> bool:
        """The peer announced the window of an opaque connection: it opens one stream."""
        return self._peer_stream_window >= BULK.stream_window_bytes

    @property
    def can_open(self) -> bool:
        return not self.going_away and not self.failed and len(self.streams) < self.peer_streams_max

    def respond(self, stream: Stream, headers: Headers, *, end: bool = False) -> None:
        """Server: the response's head; with ``end`` it is all there is, and the stream goes."""
        if stream.id not in self.streams:
            return
        self._ask(self._ngh2.send_response, stream.id, headers, end_stream=end)
        if end:
            stream.local_ended = True
            if stream.remote_ended:
                self.streams.pop(stream.id, None)
            else:
                self._ends.append(stream)  # RST_STREAM(NO_ERROR) after the head: the rest is not wanted

    def send(self, stream: Stream, data: bytes | memoryview) -> bool:
        """Frame bytes, or queue them. True: its queue is full from now on; `take` tells when it is no more."""
        if stream.end_asked or stream.id not in self.streams:
            return False
        size = len(data)
        if size <= self._room and not stream.queue and size <= stream.send_window and size <= self._send_window:
            # nearly always: a frame at once, for the next `take`
            if self._asked:  # the head of its stream comes first
                self.said.append(self._pull())
                if stream.id not in self.streams:
                    return False
            self._room -= size
            stream.send_window -= size
            self._send_window -= size
            if size != stream.framed:
                stream.framed, stream.head = size, FRAME.pack(size << 8, 0, stream.id)
            self.said += (stream.head, data)
            return False
        stream.queue.append(data)
        stream.queued += size
        if not stream.dirty:
            stream.dirty = True
            self._dirty.append(stream)
        was_full, stream.full = stream.full, stream.queued > HIGH_WATER_BYTES or stream.full
        return stream.full and not was_full

    def end(self, stream: Stream) -> None:
        """END_STREAM after what is queued."""
        if not stream.end_asked:
            stream.end_asked = True
            if not stream.dirty:
                stream.dirty = True
                self._dirty.append(stream)

    def reset(self, stream: Stream, code: int = CANCEL) -> None:
        """RST_STREAM; what is queued is dropped."""
        if self.streams.pop(stream.id, None) is not None:
            stream.queue.clear()
            stream.queued = 0
            stream.end_asked = True
            if not self.failed:
                self._ask(self._ngh2.reset_stream, stream.id, code)

    def consumed(self, stream: Stream, size: int) -> None:
        """The consumer has taken bytes of a DATA event: the peer may send as many again."""
        stream.credit += size
        self.credited(stream, size)

    def credited(self, stream: Stream, size: int) -> None:
        """The latter half of `consumed`: ``stream.credit`` has grown by this. Needs no call below half of its window."""
        if stream.credit - size < stream.window >> 1 <= stream.credit and not stream.remote_ended:
            self._credits.append(stream)

    def goaway(self, code: int = NO_ERROR) -> None:
        """No new streams from now on; those open go on."""
        if not self.going_away and not self.failed:
            self.going_away = True
            self._ask(self._ngh2.send_goaway, code)

    # ---- bytes out

    def take_said(self) -> list[bytes | memoryview]:
        """Ahead of `take`: what is framed already, at most QUICK_BYTES_MAX and heads."""
        out, self.said = self.said, []
        self._room = QUICK_BYTES_MAX
        return out

    @property
    def wants_take(self) -> bool:
        """Whether there is more to say than `take_said` has."""
        return bool(
            self._asked
            or self._dirty
            or self._credits
            or self._updates
            or self._ends
            or self._credit >= self._credit_due
            or not self._greeted
        )

    @property
    def wants_write(self) -> bool:
        return bool(self.said) or self.wants_take

    def take(self) -> tuple[list[bytes | memoryview], list[Stream]]:
        """Bytes to send now, in pieces (at most about ``turn_bytes_max``), and the streams that became writable again."""
        out = self.take_said()
        writable: list[Stream] = []
        if self._asked:
            out.append(self._pull())
        if not self._greeted:
            self._greeted = True
            self._update(0, self.limits.connection_window_bytes - _WINDOW_DEFAULT)
        if self._credit >= self._credit_due:
            self._update(0, self._credit)
            self._receive_window += self._credit
            self._credit = 0
        if self._credits:
            for stream in self._credits:
                if stream.id in self.streams and not stream.remote_ended:
                    credit = stream.credit
                    if stream.window < self.window_max:  # the reader has kept up with half of it
                        credit += stream.window
                        stream.window <<= 1
                    self._update(stream.id, credit)
                    stream.receive_window += credit
                    stream.credit = 0
            self._credits.clear()
        if self._updates:
            out += self._updates
            self._updates.clear()
        budget = self.limits.turn_bytes_max
        for _ in range(len(self._dirty)):
            if budget <= 0:
                break
            stream = self._dirty.popleft()
            stream.dirty = False
            if stream.queue:
                budget -= self._frames(stream, out, budget)
                if stream.full and stream.queued < LOW_WATER_BYTES:
                    stream.full = False
                    writable.append(stream)
            if stream.end_asked and not stream.queue and not stream.local_ended and stream.id in self.streams:
                stream.local_ended = True
                self._ask(self._ngh2.end_stream, stream.id)
                if stream.remote_ended:
                    self.streams.pop(stream.id, None)
        for stream in self._ends:
            self.reset(stream, NO_ERROR)
        self._ends.clear()
        if self._asked:
            out.append(self._pull())
        return out, writable

    def _pull(self) -> bytes:
        self._asked = False
        if self.failed:
            return b""
        try:
            data: bytes = self._ngh2.data_to_send()
            for event in self._ngh2.events():  # closings of our own making are known already
                if isinstance(event, ngh2.ConnectionClosed):
                    self._closed(event.error_code)
                elif isinstance(event, ngh2.StreamClosed) and (lost := self.streams.pop(event.stream_id, None)):
                    lost.queue.clear()
                    lost.queued = 0
                    lost.end_asked = True
                    self._lost.append((lost, event.error_code))
        except ngh2.NGH2Error:
            self.failed = self.at_fault = True
            return b""
        return data

    def _closed(self, code: int) -> None:
        """ngh2 has nothing more to say or to hear."""
        self.failed = self.going_away = True
        self.at_fault |= code != NO_ERROR

    def _ask(self, call: Callable[..., object], *arguments: object, **options: object) -> None:
        """What ngh2 refuses here is about a stream or connection that is already gone: `receive` tells."""
        try:
            call(*arguments, **options)
        except ngh2.NGH2Error:
            pass
        self._asked = True

    def _update(self, number: int, increment: int) -> None:
        self._updates.append(_UPDATE.pack(4 << 8 | WINDOW_UPDATE, 0, number, increment))

    def _frames(self, stream: Stream, out: list[bytes | memoryview], budget: int) -> int:
        """Move a stream's bytes into frames as windows allow. Returns the bytes moved; requeues what waits for a turn."""
        queue, number = stream.queue, stream.id
        budget = min(budget, self.limits.stream_turn_bytes_max)
        moved = 0
        while queue:
            chunk = queue[0]
            size = len(chunk)
            room = min(stream.send_window, self._send_window, self._peer_frame_max, budget - moved)
            if size <= room:
                queue.popleft()
            elif room > 0:
                view = memoryview(chunk)
                queue[0] = view[room:]
                chunk, size = view[:room], room
            else:
                break
            out.append(FRAME.pack(size << 8, 0, number))
            out.append(chunk)
            moved += size
            stream.send_window -= size
            self._send_window -= size
        stream.queued -= moved
        if queue:
            if stream.send_window > 0 and self._send_window > 0:
                stream.dirty = True
                self._dirty.append(stream)  # its turn is over, others first
            elif stream.send_window > 0:
                self._stalled.add(stream)
        return moved
