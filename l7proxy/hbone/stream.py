"""The vocabulary of HBONE framing: limits, streams, and what a peer's bytes mean."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

Headers = tuple[tuple[bytes, bytes], ...]
CANCEL, NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED = 8, 0, 1, 3, 5
FRAME_SIZE_ERROR, REFUSED_STREAM, CONNECT_ERROR, ENHANCE_YOUR_CALM = 6, 7, 10, 11
HIGH_WATER_BYTES, LOW_WATER_BYTES = 64 << 10, 16 << 10  # queued for a stream: pause and resume its writer
WINDOW_MAX = (1 << 31) - 1
# With frames' heads and TLS's just below two packets as the kernel makes them of what is sent at once (45 segments of 1,448
# bytes each). A little more, and every take ends in a third packet of a few hundred bytes, which costs as much as the others.
TAKE_BYTES = 126 << 10


class HboneError(Exception):
    """The peer broke the protocol; the connection is finished. Send what `Core.take` still gives, then close.

    ``events``: what the bytes before the fault meant. Streams that ended there are told by nothing else.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.events: list[Event] = []


class Kind(IntEnum):
    """What `Core.receive` reports, as ``(kind, stream, payload)``."""

    DATA = 0  # payload: bytes
    END = 1  # the peer's half is complete
    RESET = 2  # payload: error code; the stream is gone
    REQUEST = 3  # payload: Headers; server side, a new stream
    RESPONSE = 4  # payload: Headers; client side
    GOAWAY = 5  # stream None; no new streams; those above payload are gone (RESET reported)


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
    turn_bytes_max: int = TAKE_BYTES  # output of one `take`
    stream_turn_bytes_max: int = TAKE_BYTES  # of which one stream may fill


# One opaque connection: one stream on its own TLS connection. A server knows one by its announced window.
BULK = Limits(
    streams_max=1,
    stream_window_bytes=512 << 10,
    stream_window_bytes_max=8 << 20,
    connection_window_bytes=16 << 20,
    frame_bytes_max=1 << 20,
)


class Stream:
    """One CONNECT. ``user`` is the shell's; the rest is for reading only."""

    __slots__ = (
        "credit",
        "dirty",
        "end_asked",
        "framed",
        "full",
        "head",
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
        self.framed, self.head = 0, b""  # size of the DATA frame whose head is kept: many in a row are of one size
        self.full = False  # over the high water mark since
        self.dirty = False
        self.end_asked = False
        self.local_ended = False
        self.remote_ended = False
        self.user: Any = None


Event = tuple[Kind, Stream | None, Any]
