"""HBONE framing, sans-IO: HTTP/2 CONNECT streams over one byte stream, with flow control for each stream.

libnghttp2 (ngh2) keeps everything that is hard (HPACK, SETTINGS, stream states, floods); DATA and
WINDOW_UPDATE, nearly all of the traffic, are framed here, because an event object for each DATA frame costs more than
the rest of a request. ngh2 never sees a byte of a body: an END_STREAM reaches it as an empty DATA frame.

Windows: what arrives is credited to the connection at once and to its stream when the consumer has taken it, so a
slow reader holds one stream's window (`Limits.stream_window_bytes`) and stops nobody else.
"""

from __future__ import annotations

from typing import Any

import ngh2

from l7proxy.hbone.sender import DATA, FRAME, WINDOW_UPDATE, Sender
from l7proxy.hbone.stream import (
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    NO_ERROR,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    STREAM_CLOSED,
    WINDOW_MAX,
    Event,
    HboneError,
    Kind,
    Limits,
    Stream,
)

_PREFACE_BYTES = 24
_HEADERS, _PUSH, _CONTINUATION = 1, 5, 9
_END_STREAM, _END_HEADERS, _PADDED = 1, 4, 8
_COPY_BYTES_MAX = 16384
_unpack = FRAME.unpack_from
_EVENT_DATA = Kind.DATA  # a member looked up costs more than the rest of an event


class Core(Sender):
    """One end of a connection. Bytes in by `receive`, bytes out by `take`; nothing else moves."""

    def __init__(self, *, client: bool, limits: Limits | None = None) -> None:
        super().__init__(client=client, limits=limits)
        # the frame being read
        self._cut = b""  # less than a frame's head, or a cut WINDOW_UPDATE
        self._left = 0 if client else _PREFACE_BYTES  # bytes still to pass to ngh2
        self._data_left = 0
        self._data_pad = 0
        self._data_flags = 0
        self._data_stream: Stream | None = None
        self._in_headers = False

    def receive(self, data: memoryview) -> list[Event]:
        """What the bytes mean, in order. Raises HboneError."""
        events: list[Event] = []
        try:
            self._read(data, events)
        except HboneError as error:
            error.events = events
            raise
        if self._asked:  # what libnghttp2 resets by itself (malformed heads) shows only once it has said so
            self.said.append(self._pull())
        if self._lost:
            events += [(Kind.RESET, stream, code) for stream, code in self._lost]
            self._lost.clear()
        return events

    def _read(self, data: memoryview | bytes, events: list[Event]) -> None:
        if self._cut:
            data, self._cut = memoryview(self._cut + bytes(data)), b""
        at, size = 0, len(data)
        if size <= _COPY_BYTES_MAX:  # pieces of bytes cost less than pieces of a view
            data = bytes(data)
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
            if not self._in_headers:
                at = self._whole_frames(data, at, size, events)
            if size - at < 9:
                self._cut = bytes(data[at:])
                break
            word, flags, number = _unpack(data, at)
            at += 9
            kind, length = word & 0xFF, word >> 8
            if kind == DATA and not self._in_headers:
                self._begin_data(length, flags, number, events)
            elif kind == WINDOW_UPDATE and not self._in_headers:
                if length != 4:
                    self._fail(FRAME_SIZE_ERROR, "a WINDOW_UPDATE is not 4 bytes")
                if size - at < 4:
                    self._cut = bytes(data[at - 9 :])
                    break
                self._window_update(number & WINDOW_MAX, int.from_bytes(data[at : at + 4], "big") & WINDOW_MAX)
                at += 4
            else:
                if kind in (_HEADERS, _PUSH, _CONTINUATION):
                    self._in_headers = not flags & _END_HEADERS
                self._left = length
                self._feed(FRAME.pack(word, flags, number), events)

    def _whole_frames(self, data: memoryview | bytes, at: int, size: int, events: list[Event]) -> int:
        """Nearly all that comes: DATA frames here to their last byte, unpadded, within every window, not the last of their
        stream. Where they end; what is not so is for the others to judge."""
        get, append, longest = self.streams.get, events.append, self.limits.frame_bytes_max
        room = before = self._receive_window
        while size - at > 9:
            word, flags, number = _unpack(data, at)
            if flags or word & 0xFF:  # DATA is 0
                break
            length = word >> 8
            begin = at + 9
            end = begin + length
            stream = get(number)
            if stream is None or end > size or not 0 < length <= longest or length > room or stream.remote_ended:
                break
            left = stream.receive_window - length
            if left < 0:
                break
            stream.receive_window = left
            room -= length
            piece = data[begin:end]
            append((_EVENT_DATA, stream, piece if type(piece) is bytes else bytes(piece)))
            at = end
        self._receive_window = room
        self._credit += before - room
        return at

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

    def _data(self, piece: memoryview | bytes, events: list[Event]) -> None:
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
        if stream is not None:
            stream.receive_window -= length
        self._overrun(stream)

    def _overrun(self, stream: Stream | None) -> None:
        if self._receive_window < 0:
            self._fail(FLOW_CONTROL_ERROR, "the peer overran the connection's window")
        if stream is not None and stream.receive_window < 0:
            self._fail(FLOW_CONTROL_ERROR, f"the peer overran the window of stream {stream.id}")

    def _remote_end(self, stream: Stream, events: list[Event]) -> None:
        self._peer_ended(stream, events)
        self._tell_ngh2(FRAME.pack(0, _END_STREAM, stream.id))

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
            if self._send_window > WINDOW_MAX:
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
        if stream.send_window > WINDOW_MAX:
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
            elif isinstance(event, ngh2.ConnectionClosed) and event.error_code == NO_ERROR:
                self._closed(NO_ERROR)
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
