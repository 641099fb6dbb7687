"""Target hbone: HTTP/2 frames to either end of the HBONE core, h2 as the judge of what it accepts."""

from __future__ import annotations

import struct
from collections.abc import Hashable
from random import Random
from typing import Any
from zlib import crc32

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from hpack import Encoder, HPACKError, NeverIndexedHeaderTuple
from hyperframe.exceptions import HyperframeError

from fuzz.target import Disagreement, Target
from l7proxy.hbone.core import Core
from l7proxy.hbone.stream import HboneError, Kind, Limits, Stream

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LIMITS = Limits()
SERVER, CLIENT = b"S", b"C"  # a case's first byte: which end the core is
STREAMS = 3  # a client core has opened so many
_RST_STREAM = 3
JUDGE_EVERY = 3  # accepted cases
_CONNECT = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack("!IBI", len(payload) << 8 | kind, flags, stream) + payload


def _block(*fields: tuple[bytes, bytes]) -> bytes:
    return bytes(Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in fields], huffman=False))


REQUESTS = (
    _block(*_CONNECT),
    _block(*_CONNECT, (b"forwarded", b'for="10.0.0.2:1234"')),
    _block((b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"a")),
    _block((b":method", b"CONNECT")),
    _block((b":authority", b"a:1"), (b":method", b"CONNECT"), (b"A", b"b")),
    _block((b":method", b"CONNECT"), (b":authority", b"a"), (b":authority", b"b")),
    _block((b"x", b"y"), (b":method", b"CONNECT"), (b":authority", b"a")),
    _block(*_CONNECT, (b"connection", b"close")),
    _block(*_CONNECT, (b"content-length", b"3")),
    _block(*_CONNECT, *((b"x%d" % n, b"y") for n in range(40))),
    _block(*_CONNECT, (b"x", b"y" * 9000)),
    _block(*_CONNECT, (b"x", b"a\r\nb")),
    _block(*_CONNECT, (b"", b"b")),
    b"\x80", b"\xff\xff\xff\xff\xff", b"\x3f\xe1\x1f", b"",
)  # fmt: skip
RESPONSES = (
    _block((b":status", b"200")),
    _block((b":status", b"503"), (b"x-pillion-reason", b"refused")),
    _block((b":status", b"100")),
    _block((b":status", b"abc")),
    _block((b"x", b"y")),
    _block((b":status", b"200"), (b"content-length", b"3")),
    _block((b":status", b"200"), (b":status", b"200")),
    b"\xff",
)  # fmt: skip
TRAILERS = (_block((b"x", b"y")), _block((b":status", b"200")), b"")


class Hbone(Target):
    name = "hbone"
    tokens = (
        frame(4, 0, 0), frame(4, 1, 0), frame(0, 1, 1), frame(0, 0, 1, b"abc"), frame(8, 0, 0, b"\0\0\0\1"), frame(8, 0, 1,
            bytes(4)),
        frame(3, 0, 1, b"\0\0\0\x08"), frame(6, 0, 0, bytes(8)), frame(7, 0, 0, bytes(8)), frame(0, 8, 1, b"\1a\0"), frame(9, 4,
            1),
        frame(1, 4, 3, REQUESTS[0]), frame(1, 5, 1, TRAILERS[0]), frame(5, 4, 1, bytes(4)), b"\0\0\0\1", b"\xff\xff\xff\xff",
            b"\x7f",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.compared = {"accepted": 0, "h2": 0, "h2-refused": 0}

    def generate(self, rng: Random) -> bytes:
        random = rng.random
        server = random() < 0.6
        blocks = REQUESTS if server else RESPONSES
        out = [SERVER + PREFACE if server else CLIENT]
        if random() < 0.95:
            values = (
                (1, 0),
                (1, 4096),
                (3, 100),
                (4, 65535),
                (4, 1 << 20),
                (5, 16384),
                (5, 1 << 20),
                (6, 8192),
                (2, 0),
                (2, 1),
                (4, 1 << 31),
                (9, 1),
            )
            chosen = [struct.pack("!HI", *values[int(random() * len(values))]) for _ in range(int(random() * 3))]
            out.append(frame(4, 0, 0, b"".join(chosen)))
        opened = 1 if server else 1 + 2 * (STREAMS - 1)
        for _ in range(int(random() * 12)):
            kind = random()
            number = 1 + 2 * int(random() * ((opened + 1) // 2)) if random() < 0.95 else int(random() * 12)
            if kind < 0.3:
                block = blocks[0] if random() < 0.7 else blocks[int(random() * len(blocks))]
                flags = 4 | (random() < 0.2)
                if random() < 0.1:
                    cut = int(random() * len(block))
                    out += [frame(1, flags & 1, opened, block[:cut]), frame(9, 4, opened, block[cut:])]
                else:
                    out.append(frame(1, flags, opened if server else number, block))
                opened += 2 * (server and random() < 0.8)
            elif kind < 0.75:
                data = b"d" * int(random() ** 3 * 5000)
                if random() < 0.2:
                    pad = int(random() * 20)
                    data = bytes([pad if random() < 0.8 else pad + 50]) + data + bytes(pad)
                    out.append(frame(0, 8 | (random() < 0.2), number, data))
                else:
                    out.append(frame(0, random() < 0.15, number, data))
            elif kind < 0.83:
                increment = (1, 1000, 0, 0x7FFFFFFF, 0xFFFFFFFF)[int(random() ** 2 * 5)]
                out.append(frame(8, 0, number if random() < 0.6 else 0, struct.pack("!I", increment)))
            elif kind < 0.88:
                out.append(frame(3, 0, number, struct.pack("!I", int(random() * 14))))
            elif kind < 0.92:
                out.append(frame(1, 5, number, TRAILERS[int(random() * len(TRAILERS))]))
            elif kind < 0.95:
                out.append(frame(6, random() < 0.3, 0, bytes(8)))
            elif kind < 0.97:
                out.append(frame(7, 0, 0, struct.pack("!II", int(random() * 9), 0) + b"bye"))
            else:
                out.append(frame(int(random() * 256), int(random() * 256), int(random() * 9), bytes(int(random() * 20))))
        return b"".join(out)

    def check(self, case: bytes, *, deep: bool = False) -> Hashable:
        if case[:1] not in (SERVER, CLIENT) or len(case) < 2:
            return None
        client, data = case[:1] == CLIENT, case[1:]
        whole = _Run(client, [data])
        number = crc32(case)
        size = len(data)
        plans = [[data[:at], data[at:]] for at in range(1, size)] if deep and size < 600 else []
        plans.append(
            [data[n : n + 1] for n in range(size)] if deep or number % 16 == 0 else [data[: number % size], data[number % size :]]
        )
        for pieces in plans:
            parts = _Run(client, [piece for piece in pieces if piece])
            if whole.error != parts.error and (whole.reset | whole.refused | parts.reset | parts.refused):
                continue  # a malformed stream is gone at the end of a piece: what is said of it later may be a fault before
            if parts.seen() != whole.seen():
                raise Disagreement("pillion", "other events when cut", f"{whole.seen()} then {parts.seen()}"[:1000])
        if whole.error is None:
            self.compared["accepted"] += 1
            self.count += 1
            if deep or self.count % JUDGE_EVERY == 0:
                self._judge(client, data, whole)
        return (client, whole.error, tuple(whole.kinds[:12]))

    def _judge(self, client: bool, data: bytes, whole: _Run) -> None:
        self.compared["h2"] += 1
        frames = _whole_frames(client, data)  # h2 waits for whole ones
        if len(frames) < len(data):
            whole = _Run(client, [frames] if frames else [])
        events = _h2(client, frames)
        if events is None:
            self.compared["h2-refused"] += 1
            return
        heads: dict[int, Any] = {}
        bodies: dict[int, bytes] = {}
        ended: set[int] = set()
        reset: set[int] = set()
        for event in events:
            number = getattr(event, "stream_id", 0) or 0
            if isinstance(event, h2.events.RequestReceived | h2.events.ResponseReceived):
                fields = tuple((bytes(name), bytes(value)) for name, value in event.headers or ())
                if client:  # in an answer to CONNECT it says nothing (RFC 9110, 8.6), and libnghttp2 takes it out
                    fields = tuple(field for field in fields if field[0] != b"content-length")
                heads[number] = fields
            elif isinstance(event, h2.events.DataReceived):
                if event.data:
                    bodies[number] = bodies.get(number, b"") + event.data
            elif isinstance(event, h2.events.StreamEnded):
                ended.add(number)
            elif isinstance(event, h2.events.StreamReset):
                reset.add(number)
        for what, ours, theirs in (("heads", whole.heads, heads), ("bytes", whole.bodies, bodies)):
            for number in ours.keys() | theirs.keys():
                if number in reset | whole.reset | whole.refused:
                    continue  # what a reset stream still says is each reader's own matter
                if ours.get(number) != theirs.get(number):
                    detail = f"stream {number}: {theirs.get(number)!r}, Pillion {ours.get(number)!r}"
                    raise Disagreement("h2", f"other {what}", detail[:1000])
        if different := (ended ^ whole.ended) - reset - whole.reset - whole.refused:
            raise Disagreement(
                "h2", "another end", f"streams {sorted(different)}: {sorted(ended)}, Pillion {sorted(whole.ended)}"
            )


class _Run:
    """Bytes through a core, piece by piece; and what it says must be frames."""

    def __init__(self, client: bool, pieces: list[bytes]) -> None:
        self.core = Core(client=client, limits=LIMITS)
        self.core.take()
        self.heads: dict[int, Any] = {}
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self.refused: set[int] = set()  # by a RST_STREAM of its own, known to nobody if the stream never was
        self.kinds: list[Kind] = []
        self.error: str | None = None
        if client:
            for _ in range(STREAMS):
                self.core.open(_CONNECT)
        self.core.take()
        try:
            for piece in pieces:
                for kind, stream, payload in self.core.receive(memoryview(piece)):
                    self._note(kind, stream, payload)
        except HboneError as error:
            self.error = str(error)
            for kind, stream, payload in error.events:
                self._note(kind, stream, payload)
        said = b"".join(self.core.take()[0])
        if self.core.failed:  # libnghttp2 has said goodbye; the shell closes
            self.error = self.error or "failed"
        at = 0
        while at < len(said):
            word, _, number = struct.unpack_from("!IBI", said, at)
            if word & 0xFF == _RST_STREAM:
                self.refused.add(number)
                if number in self.core.streams:
                    raise Disagreement("pillion", "keeps a stream it has reset", f"stream {number}")
            at += 9 + (word >> 8)
        if at != len(said):
            raise Disagreement("pillion", "says half a frame", repr(said[-100:]))

    def seen(self) -> tuple[Any, ...]:
        """What must not depend on cuts: nothing of a broken connection, nor what came for a stream beside its reset."""
        if self.error:
            return ("error",)
        bodies = {number: body for number, body in self.bodies.items() if number not in self.reset}
        return (self.heads, bodies, self.ended - self.reset, self.reset)

    def _note(self, kind: Kind, stream: Stream | None, payload: Any) -> None:
        if not self.kinds or self.kinds[-1] != kind:
            self.kinds.append(kind)
        if stream is None:
            return
        number = stream.id
        if kind is Kind.DATA:
            if number in self.ended or number in self.reset:
                raise Disagreement("pillion", "bytes after the end", f"stream {number}")
            self.bodies[number] = self.bodies.get(number, b"") + payload
            self.core.consumed(stream, len(payload))
        elif kind is Kind.END:
            if number in self.ended:
                raise Disagreement("pillion", "two ends", f"stream {number}")
            self.ended.add(number)
        elif kind is Kind.RESET:
            self.reset.add(number)
        elif kind in (Kind.REQUEST, Kind.RESPONSE):
            self.heads[number] = tuple((bytes(name), bytes(value)) for name, value in payload)


def _whole_frames(client: bool, data: bytes) -> bytes:
    at = 0 if client else len(PREFACE)
    while (end := at + 9 + int.from_bytes(data[at : at + 3], "big")) <= len(data) and at + 9 <= len(data):
        at = end
    return data[:at]


def _h2(client: bool, data: bytes) -> list[h2.events.Event] | None:
    """h2's reading with the same limits; None when it refuses."""
    config = h2.config.H2Configuration(client_side=client, header_encoding=None)
    judge = h2.connection.H2Connection(config)
    judge.local_settings = h2.settings.Settings(
        client=client,
        initial_values={
            h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: LIMITS.stream_window_bytes,
            h2.settings.SettingCodes.MAX_FRAME_SIZE: LIMITS.frame_bytes_max,
            h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: LIMITS.header_bytes_max,
            h2.settings.SettingCodes.ENABLE_PUSH: 0,
        },
    )
    judge.max_inbound_frame_size = LIMITS.frame_bytes_max
    judge.initiate_connection()
    judge.increment_flow_control_window(LIMITS.connection_window_bytes - 65535)
    if client:
        for number in range(STREAMS):
            judge.send_headers(1 + 2 * number, _CONNECT)
    try:
        return judge.receive_data(data)
    except (h2.exceptions.ProtocolError, HyperframeError, HPACKError, ValueError, KeyError):
        return None
