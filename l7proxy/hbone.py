"""HBONE framing, sans-IO: HTTP/2 CONNECT streams over one byte stream, with flow control for each stream.

libnghttp2 (ngh2) keeps everything that is hard (HPACK, SETTINGS, stream states, floods); DATA and
WINDOW_UPDATE, nearly all of the traffic, are framed here, because an event object for each DATA frame costs more than
the rest of a request. ngh2 never sees a byte of a body: an END_STREAM reaches it as an empty DATA frame.

Windows: what arrives is credited to the connection at once and to its stream when the consumer has taken it, so a
slow reader holds one stream's window (`Limits.stream_window_bytes`) and stops nobody else.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import ngh2

Headers = tuple[tuple[bytes, bytes], ...]

CANCEL, NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED = 8, 0, 1, 3, 5
FRAME_SIZE_ERROR, REFUSED_STREAM, CONNECT_ERROR, ENHANCE_YOUR_CALM = 6, 7, 10, 11
HIGH_WATER_BYTES, LOW_WATER_BYTES = 64 << 10, 16 << 10  # queued for a stream: pause and resume its writer
_WINDOW_MAX = (1 << 31) - 1
_WINDOW_DEFAULT = 65535
_PREFACE_BYTES = 24
_DATA, _HEADERS, _PUSH, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 5, 8, 9
_END_STREAM, _END_HEADERS, _PADDED = 1, 4, 8
_FRAME = struct.Struct("!IBI")  # length << 8 | type, flags, stream
_UPDATE = struct.Struct("!IBII")


class HboneError(Exception):
    """The peer broke the protocol; the connection is finished. Send what `Core.take` still gives, then close."""


class Kind(IntEnum):
    """What `Core.receive` reports, as ``(kind, stream, payload)``."""

    DATA = 0  # payload: bytes
    END = 1  # the peer's half is complete
    RESET = 2  # payload: error code; the stream is gone
    REQUEST = 3  # payload: Headers; server side, a new stream
    RESPONSE = 4  # payload: Headers; client side
    WRITABLE = 5  # the stream's queue fell below the low water mark
    GOAWAY = 6  # stream None; no new streams; those above payload are gone (RESET reported)


@dataclass(frozen=True, slots=True)
class Limits:
    streams_max: int = 512
    stream_window_bytes: int = 256 << 10
    stream_window_bytes_max: int = 256 << 10  # a window whose reader keeps up grows to this
    connection_window_bytes: int = 16 << 20
    frame_bytes_max: int = 256 << 10
    header_bytes_max: int = 8 << 10
    header_count_max: int = 32
    continuations_max: int = 4
    resets_burst: int = 1000  # rapid reset: this many at once, then resets_per_s
    resets_per_s: int = 100
    empty_frames_max: int = 1000  # DATA without bytes or end
    turn_bytes_max: int = 512 << 10  # output of one `take`
    stream_turn_bytes_max: int = 128 << 10  # of which one stream may fill


# One opaque connection: one stream on its own TLS connection. A server knows one by its announced window.
BULK = Limits(
    streams_max=1,
    stream_window_bytes=1 << 20,
    stream_window_bytes_max=8 << 20,
    connection_window_bytes=16 << 20,
    frame_bytes_max=1 << 20,
    stream_turn_bytes_max=512 << 10,
)


class Stream:
    """One CONNECT. ``user`` is the shell's; the rest is for reading only."""

    __slots__ = (
        "credit",
        "dirty",
        "end_asked",
        "full",
        "id",
        "local_ended",
        "queue",
        "queued",
        "receive_window",
        "remote_ended",
        "send_window",
        "user",
        "window",
    )

    def __init__(self, number: int, send_window: int, receive_window: int) -> None:
        self.id = number
        self.send_window = send_window
        self.receive_window = receive_window
        self.window = receive_window  # what receive_window is refilled to
        self.credit = 0  # consumed and not yet given back to the peer
        self.queue: deque[bytes | memoryview] = deque()
        self.queued = 0  # bytes in queue
        self.full = False  # over the high water mark since
        self.dirty = False
        self.end_asked = False
        self.local_ended = False
        self.remote_ended = False
        self.user: Any = None


Event = tuple[Kind, Stream | None, Any]


class Core:
    """One end of a connection. Bytes in by `receive`, bytes out by `take`; nothing else moves."""

    def __init__(self, *, client: bool, limits: Limits | None = None) -> None:
        self.limits = limits = limits or Limits()
        self.client = client
        self.streams: dict[int, Stream] = {}
        self.peer_streams_max = 100
        self.window_max = limits.stream_window_bytes_max
        self.going_away = False
        self.failed = False
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
        self._send_window = _WINDOW_DEFAULT
        self._peer_stream_window = _WINDOW_DEFAULT
        self._peer_frame_max = 16384
        self._receive_window = limits.connection_window_bytes
        self._credit = 0
        self._greeted = False
        self._dirty: deque[Stream] = deque()
        self._stalled: set[Stream] = set()  # waiting for the connection's window
        self._updates: list[bytes] = []
        self._credits: list[Stream] = []
        self._ends: list[Stream] = []
        self._highest = 0
        self._empties = 0
        # the frame being read
        self._cut = b""  # less than a frame's head, or a cut WINDOW_UPDATE
        self._left = 0 if client else _PREFACE_BYTES  # bytes still to pass to ngh2
        self._data_left = 0
        self._data_pad = 0
        self._data_flags = 0
        self._data_stream: Stream | None = None
        self._in_headers = False

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

    def send(self, stream: Stream, data: bytes | memoryview) -> None:
        """Queue bytes. ``stream.full`` tells when to stop; WRITABLE follows."""
        if stream.end_asked or stream.id not in self.streams:
            return
        stream.queue.append(data)
        stream.queued += len(data)
        if stream.queued > HIGH_WATER_BYTES:
            stream.full = True
        if not stream.dirty:
            stream.dirty = True
            self._dirty.append(stream)

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
        before = stream.credit
        stream.credit = before + size
        if before < stream.window >> 1 <= stream.credit and not stream.remote_ended:
            self._credits.append(stream)

    def goaway(self, code: int = NO_ERROR) -> None:
        """No new streams from now on; those open go on."""
        if not self.going_away and not self.failed:
            self.going_away = True
            self._ask(self._ngh2.send_goaway, code)

    # ---- bytes out

    @property
    def wants_write(self) -> bool:
        return bool(
            self._asked
            or self._dirty
            or self._credits
            or self._updates
            or self._ends
            or self._credit >= self.limits.connection_window_bytes >> 1
        )

    def take(self) -> tuple[list[bytes | memoryview], list[Stream]]:
        """Bytes to send now, in pieces (at most about ``turn_bytes_max``), and the streams that became writable again."""
        out: list[bytes | memoryview] = []
        writable: list[Stream] = []
        if self._asked:
            out.append(self._pull())
        if not self._greeted:
            self._greeted = True
            self._update(0, self.limits.connection_window_bytes - _WINDOW_DEFAULT)
        if self._credit >= self.limits.connection_window_bytes >> 1:
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
                    self.failed = self.going_away = True
        except ngh2.NGH2Error:
            self.failed = True
            return b""
        return data

    def _ask(self, call: Callable[..., object], *arguments: object, **options: object) -> None:
        """What ngh2 refuses here is about a stream or connection that is already gone: `receive` tells."""
        try:
            call(*arguments, **options)
        except ngh2.NGH2Error:
            pass
        self._asked = True

    def _update(self, number: int, increment: int) -> None:
        self._updates.append(_UPDATE.pack(4 << 8 | _WINDOW_UPDATE, 0, number, increment))

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
            out.append(_FRAME.pack(size << 8, 0, number))
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

    # ---- bytes in

    def receive(self, data: memoryview) -> list[Event]:
        """What the bytes mean, in order. Raises HboneError; what was understood before it is lost with the connection."""
        events: list[Event] = []
        if self._cut:
            data, self._cut = memoryview(self._cut + bytes(data)), b""
        at, size = 0, len(data)
        streams = self.streams
        while at < size:
            if self._data_left:
                take = min(self._data_left, size - at)
                self._data(data[at : at + take], events)
                at += take
                continue
            if self._left:
                take = min(self._left, size - at)
                self._feed(data[at : at + take], events)
                self._left -= take
                at += take
                continue
            if size - at < 9:
                self._cut = bytes(data[at:])
                break
            word, flags, number = _FRAME.unpack_from(data, at)
            at += 9
            kind, length = word & 0xFF, word >> 8
            if kind == _DATA and not self._in_headers:
                stream = streams.get(number)
                end = at + length
                if stream is not None and end <= size and length > 0 and flags <= 1 and not stream.remote_ended:
                    # the whole frame is here, without padding: nearly always
                    if length > self.limits.frame_bytes_max:
                        self._fail(FRAME_SIZE_ERROR, "a DATA frame is too long")
                    self._account(stream, length)
                    if number in streams:
                        events.append((Kind.DATA, stream, bytes(data[at:end])))
                        if flags:
                            self._remote_end(stream, events)
                    at = end
                else:
                    self._begin_data(length, flags, number, events)
            elif kind == _WINDOW_UPDATE and not self._in_headers:
                if length != 4:
                    self._fail(FRAME_SIZE_ERROR, "a WINDOW_UPDATE is not 4 bytes")
                if size - at < 4:
                    self._cut = bytes(data[at - 9 :])
                    break
                self._window_update(number & _WINDOW_MAX, int.from_bytes(data[at : at + 4], "big") & _WINDOW_MAX)
                at += 4
            else:
                if kind in (_HEADERS, _PUSH, _CONTINUATION):
                    self._in_headers = not flags & _END_HEADERS
                self._left = length
                self._feed(_FRAME.pack(word, flags, number), events)
        return events

    def _begin_data(self, length: int, flags: int, number: int, events: list[Event]) -> None:
        stream = self.streams.get(number)
        if length > self.limits.frame_bytes_max:
            self._fail(FRAME_SIZE_ERROR, "a DATA frame is too long")
        if stream is None:
            if number == 0 or number > self._highest or not number & 1:
                self._fail(PROTOCOL_ERROR, f"DATA on idle stream {number}")
        elif stream.remote_ended:
            self.reset(stream, STREAM_CLOSED)
            events.append((Kind.RESET, stream, STREAM_CLOSED))
            stream = None
        if not length:
            if flags & _PADDED:
                self._fail(FRAME_SIZE_ERROR, "a padded DATA frame has no pad length")
            if stream is not None and flags & _END_STREAM:
                self._remote_end(stream, events)
            else:
                self._empties += 1
                if self._empties > self.limits.empty_frames_max:
                    self._fail(ENHANCE_YOUR_CALM, "too many empty DATA frames")
            return
        self._data_left = length
        self._data_pad = -1 if flags & _PADDED else 0
        self._data_flags = flags
        self._data_stream = stream
        self._account(stream, length)

    def _data(self, piece: memoryview, events: list[Event]) -> None:
        """A part of a DATA frame that is cut, padded, or for a stream that is gone."""
        stream = self._data_stream
        if stream is not None and stream.id not in self.streams:
            stream = self._data_stream = None
        total = len(piece)
        self._data_left -= total
        if self._data_pad < 0:
            self._data_pad = piece[0]
            piece = piece[1:]
            if self._data_pad > self._data_left + len(piece):
                self._fail(PROTOCOL_ERROR, "a DATA frame has more padding than bytes")
            if stream is not None:
                self.consumed(stream, 1 + self._data_pad)
        keep = len(piece)
        if self._data_pad:
            keep -= max(0, min(keep, self._data_pad - self._data_left))
        if stream is not None:
            if keep:
                events.append((Kind.DATA, stream, bytes(piece[:keep])))
            if not self._data_left and self._data_flags & _END_STREAM:
                self._remote_end(stream, events)

    def _account(self, stream: Stream | None, length: int) -> None:
        self._receive_window -= length
        self._credit += length
        if self._receive_window < 0:
            self._fail(FLOW_CONTROL_ERROR, "the peer overran the connection's window")
        if stream is not None:
            stream.receive_window -= length
            if stream.receive_window < 0:
                self._fail(FLOW_CONTROL_ERROR, f"the peer overran the window of stream {stream.id}")

    def _remote_end(self, stream: Stream, events: list[Event]) -> None:
        stream.remote_ended = True
        events.append((Kind.END, stream, None))
        if stream.local_ended:
            self.streams.pop(stream.id, None)
        self._tell_ngh2(_FRAME.pack(0, _END_STREAM, stream.id))

    def _tell_ngh2(self, frame: bytes) -> None:
        try:
            self._ngh2.receive_data(frame)
            self._ngh2.events()
        except ngh2.NGH2Error as error:
            self.failed = True
            raise HboneError(str(error)) from error
        self._asked = True

    def _window_update(self, number: int, increment: int) -> None:
        if number == 0:
            if not increment:
                self._fail(PROTOCOL_ERROR, "a WINDOW_UPDATE of 0")
            self._send_window += increment
            if self._send_window > _WINDOW_MAX:
                self._fail(FLOW_CONTROL_ERROR, "the connection's window is over 2^31-1")
            for stream in self._stalled:
                if not stream.dirty and stream.id in self.streams:
                    stream.dirty = True
                    self._dirty.append(stream)
            self._stalled.clear()
            return
        stream_or_none = self.streams.get(number)
        if stream_or_none is None:
            if number > self._highest or not number & 1:
                self._fail(PROTOCOL_ERROR, f"WINDOW_UPDATE on idle stream {number}")
            return
        if not increment:
            self._fail(PROTOCOL_ERROR, "a WINDOW_UPDATE of 0")
        self._grow(stream_or_none, increment)

    def _grow(self, stream: Stream, increment: int) -> None:
        stream.send_window += increment
        if stream.send_window > _WINDOW_MAX:
            self._fail(FLOW_CONTROL_ERROR, f"the window of stream {stream.id} is over 2^31-1")
        if stream.queue and not stream.dirty and stream.send_window > 0:
            stream.dirty = True
            self._dirty.append(stream)

    def _feed(self, data: bytes | memoryview, events: list[Event]) -> None:
        """Everything but DATA and WINDOW_UPDATE."""
        self._asked = True
        try:
            self._ngh2.receive_data(data)
            happened = self._ngh2.events()
        except ngh2.NGH2Error as error:
            self.failed = True
            raise HboneError(str(error)) from error
        for event in happened:
            if isinstance(event, ngh2.RequestReceived):
                self._highest = max(self._highest, event.stream_id)
                stream = Stream(event.stream_id, self._peer_stream_window, self.limits.stream_window_bytes)
                self.streams[event.stream_id] = stream
                events.append((Kind.REQUEST, stream, event.headers))
                if event.end_stream:
                    stream.remote_ended = True
                    events.append((Kind.END, stream, None))
            elif isinstance(event, ngh2.ResponseReceived):
                if found := self.streams.get(event.stream_id):
                    events.append((Kind.RESPONSE, found, event.headers))
                    if event.end_stream:
                        self._peer_ended(found, events)
            elif isinstance(event, ngh2.TrailersReceived):
                if found := self.streams.get(event.stream_id):
                    self._peer_ended(found, events)
            elif isinstance(event, ngh2.StreamReset | ngh2.StreamClosed):
                if found := self.streams.pop(event.stream_id, None):
                    found.queue.clear()
                    found.queued = 0
                    found.end_asked = True
                    events.append((Kind.RESET, found, event.error_code))
            elif isinstance(event, ngh2.SettingsReceived):
                self._settings(event.settings)
            elif isinstance(event, ngh2.GoAwayReceived):
                self.going_away = True
                for number in [n for n in self.streams if n > event.last_stream_id] if self.client else ():
                    gone = self.streams.pop(number)
                    events.append((Kind.RESET, gone, REFUSED_STREAM))
                events.append((Kind.GOAWAY, None, event.last_stream_id))
            elif isinstance(event, ngh2.ConnectionClosed):
                raise self._broken(f"error {event.error_code}: {event.debug_data[:80]!r}")

    def _peer_ended(self, stream: Stream, events: list[Event]) -> None:
        stream.remote_ended = True
        events.append((Kind.END, stream, None))
        if stream.local_ended:
            self.streams.pop(stream.id, None)

    def _settings(self, settings: Any) -> None:
        window = settings.get(ngh2.Setting.INITIAL_WINDOW_SIZE)
        if window is not None and window != self._peer_stream_window:
            grown, self._peer_stream_window = window - self._peer_stream_window, window
            for stream in self.streams.values():
                self._grow(stream, grown)
        self._peer_frame_max = settings.get(ngh2.Setting.MAX_FRAME_SIZE, self._peer_frame_max)
        self.peer_streams_max = settings.get(ngh2.Setting.MAX_CONCURRENT_STREAMS, self.peer_streams_max)

    def _fail(self, code: int, why: str) -> None:
        """Say goodbye with a GOAWAY and raise."""
        if not self.failed:
            self._ask(self._ngh2.terminate_connection, code)
        raise self._broken(why)

    def _broken(self, why: str) -> HboneError:
        self.going_away = True
        return HboneError(why)
