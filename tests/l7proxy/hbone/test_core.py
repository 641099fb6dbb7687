"""Dialogues with the framing core: h2, another implementation, as the peer; then bytes no library would send."""

from __future__ import annotations

import struct
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.hbone.core import Core
from l7proxy.hbone.stream import BULK, LOW_WATER_BYTES, HboneError, Kind, Limits, Stream

CONNECT = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"))
OK = ((b":status", b"200"),)


def out(core: Core) -> bytes:
    return b"".join(core.take()[0])


class Peer:
    """An h2 connection on the other side of a core."""

    def __init__(self, *, core_is_client: bool, limits: Limits | None = None) -> None:
        self.core = Core(client=core_is_client, limits=limits)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=not core_is_client, header_encoding=None))
        self.h2.initiate_connection()
        self.seen: list[Any] = []  # by h2
        self.events: list[Any] = []  # by the core
        self.swap()

    def swap(self) -> None:
        for _ in range(50):
            ours, theirs = out(self.core), self.h2.data_to_send()
            if not ours and not theirs:
                return
            if ours:
                self.seen += self.h2.receive_data(ours)
            if theirs:
                self.events += self.core.receive(memoryview(theirs))
        raise AssertionError("the dialogue does not end")

    def kinds(self) -> list[Kind]:
        return [kind for kind, _, _ in self.events]

    def open(self) -> Stream:
        """A stream with both heads exchanged."""
        if self.core.client:
            stream = self.core.open(CONNECT)
            self.swap()
            self.h2.send_headers(stream.id, OK)
        else:
            number = self.h2.get_next_available_stream_id()
            self.h2.send_headers(number, CONNECT)
            self.swap()
            stream = self.core.streams[number]
            self.core.respond(stream, OK)
        self.swap()
        return stream

    def seen_data(self, number: int) -> bytes:
        return b"".join(e.data for e in self.seen if isinstance(e, h2.events.DataReceived) and e.stream_id == number)

    def data(self, stream: Stream) -> bytes:
        return b"".join(payload for kind, of, payload in self.events if kind is Kind.DATA and of is stream)


@pytest.fixture(params=[True, False], ids=["client", "server"])
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(core_is_client=request.param)


def test_exchange(peer: Peer) -> None:
    stream = peer.open()
    peer.core.send(stream, b"ping")
    peer.h2.send_data(stream.id, b"pong")
    peer.swap()
    assert peer.seen_data(stream.id) == b"ping"
    assert peer.data(stream) == b"pong"
    peer.h2.end_stream(stream.id)
    peer.swap()
    assert peer.kinds()[-1] is Kind.END and stream.id in peer.core.streams  # half open
    peer.core.send(stream, b"last")
    peer.core.end(stream)
    peer.swap()
    assert peer.seen_data(stream.id) == b"pinglast"
    assert any(isinstance(e, h2.events.StreamEnded) for e in peer.seen)
    assert not peer.core.streams


def test_we_end_first(peer: Peer) -> None:
    stream = peer.open()
    peer.core.end(stream)
    peer.swap()
    assert stream.local_ended and stream.id in peer.core.streams
    peer.h2.send_data(stream.id, b"tail", end_stream=True)
    peer.swap()
    assert peer.data(stream) == b"tail"
    assert not peer.core.streams


def test_resets_both_ways(peer: Peer) -> None:
    first, second = peer.open(), peer.open()
    peer.core.send(first, b"x" * 200_000)
    peer.core.reset(first)
    peer.h2.reset_stream(second.id, h2.errors.ErrorCodes.CANCEL)
    peer.swap()
    assert any(isinstance(e, h2.events.StreamReset) and e.stream_id == first.id for e in peer.seen)
    assert (Kind.RESET, second, 8) in peer.events
    assert not peer.core.streams


def test_large_transfer_respects_the_peers_windows(peer: Peer) -> None:
    stream = peer.open()
    sent = bytes(range(256)) * 4000
    peer.core.send(stream, sent)
    assert stream.full
    peer.swap()
    assert len(peer.seen_data(stream.id)) == 65535  # h2 gives nothing back by itself
    writable: list[Stream] = []
    while len(peer.seen_data(stream.id)) < len(sent):
        peer.h2.acknowledge_received_data(60_000, stream.id) if peer.h2.remote_flow_control_window(stream.id) < 60_000 else None
        peer.events += peer.core.receive(memoryview(peer.h2.data_to_send()))
        pieces, more = peer.core.take()
        writable += more
        data = b"".join(pieces)
        assert data
        peer.seen += peer.h2.receive_data(data)
    assert peer.seen_data(stream.id) == sent
    assert writable == [stream] and stream.queued < LOW_WATER_BYTES


def test_a_stuck_stream_does_not_stop_another(peer: Peer) -> None:
    stuck, quick = peer.open(), peer.open()
    peer.h2.increment_flow_control_window(1 << 20)  # the connection's
    peer.core.send(stuck, b"s" * 200_000)
    peer.swap()
    peer.core.send(quick, b"q" * 50_000)
    peer.swap()
    assert len(peer.seen_data(stuck.id)) == 65535
    assert len(peer.seen_data(quick.id)) == 50_000


def test_connection_window_wakes_all_who_wait(peer: Peer) -> None:
    streams = [peer.open() for _ in range(4)]
    for stream in streams:
        peer.core.send(stream, b"w" * 40_000)
    peer.swap()
    assert sum(len(peer.seen_data(s.id)) for s in streams) == 65535
    peer.h2.increment_flow_control_window(1 << 20)
    peer.swap()
    assert [len(peer.seen_data(s.id)) for s in streams] == [40_000] * 4


def test_unread_data_is_bounded_by_the_streams_window(peer: Peer) -> None:
    stream = peer.open()
    total = 0
    for _ in range(1000):
        room = peer.h2.local_flow_control_window(stream.id)
        if not room:
            break
        chunk = min(room, peer.h2.max_outbound_frame_size)
        peer.h2.send_data(stream.id, b"z" * chunk)
        total += chunk
        peer.swap()
    assert total == peer.core.limits.stream_window_bytes
    peer.core.consumed(stream, total)
    peer.swap()
    assert peer.h2.local_flow_control_window(stream.id) == total


def test_window_grows_for_a_reader_that_keeps_up() -> None:
    peer = Peer(core_is_client=True, limits=BULK)
    stream = peer.open()
    for _ in range(40):
        chunk = min(peer.h2.local_flow_control_window(stream.id), peer.h2.max_outbound_frame_size)
        peer.h2.send_data(stream.id, b"z" * chunk)
        peer.swap()
        peer.core.consumed(stream, chunk)
        peer.swap()
    assert stream.window == BULK.stream_window_bytes_max


def test_padding_counts_and_is_dropped(peer: Peer) -> None:
    stream = peer.open()
    for _ in range(1500):
        peer.h2.send_data(stream.id, b"data", pad_length=200)
        peer.swap()
        peer.core.consumed(stream, 4)
    assert peer.data(stream) == b"data" * 1500


def test_bytes_one_at_a_time(peer: Peer) -> None:
    stream = peer.open()
    peer.h2.send_data(stream.id, b"hello", pad_length=3)
    peer.h2.send_data(stream.id, b"there")
    peer.h2.increment_flow_control_window(1000, stream.id)
    peer.h2.ping(b"12345678")
    peer.h2.send_data(stream.id, b"!", end_stream=True)
    for byte in peer.h2.data_to_send():
        peer.events += peer.core.receive(memoryview(bytes([byte])))
    peer.swap()
    assert peer.data(stream) == b"hellothere!"
    assert peer.kinds()[-1] is Kind.END


def test_goaway(peer: Peer) -> None:
    stream = peer.open()
    peer.h2.close_connection(last_stream_id=stream.id if peer.core.client else 0)
    peer.events += peer.core.receive(memoryview(peer.h2.data_to_send()))
    assert Kind.GOAWAY in peer.kinds() and not peer.core.can_open
    assert stream.id in peer.core.streams


def test_refused_by_the_server() -> None:
    peer = Peer(core_is_client=False)
    peer.h2.send_headers(1, CONNECT)
    peer.swap()
    (event,) = [e for e in peer.events if e[0] is Kind.REQUEST]
    assert dict(event[2])[b":authority"] == b"10.0.0.1:80"
    peer.core.respond(event[1], ((b":status", b"403"), (b"x-pillion-reason", b"no")), end=True)
    peer.swap()
    assert any(isinstance(e, h2.events.ResponseReceived) for e in peer.seen)
    assert not peer.core.streams


def test_streams_over_the_limit_are_refused() -> None:
    peer = Peer(core_is_client=False, limits=Limits(streams_max=3))
    for number in (1, 3, 5):
        peer.h2.send_headers(number, CONNECT)
    peer.swap()
    with pytest.raises(h2.exceptions.TooManyStreamsError):
        peer.h2.send_headers(7, CONNECT)
    assert len(peer.core.streams) == 3


# ---- bytes no library sends


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack("!IBI", len(payload) << 8 | kind, flags, stream) + payload


def server() -> Core:
    peer = Peer(core_is_client=False)
    peer.open()
    return peer.core


@pytest.mark.parametrize(
    "data",
    [
        frame(0, 0, 0, b"x"),  # DATA on stream 0
        frame(0, 0, 9, b"x"),  # on an idle stream
        frame(0, 0, 2, b"x"),  # on a stream that is ours to open
        frame(0, 8, 1, b"\x09abc"),  # more padding than bytes
        frame(0, 8, 1),  # padded, empty
        frame(8, 0, 0, b"\0\0\0\0"),  # WINDOW_UPDATE of 0
        frame(8, 0, 1, b"\x7f\xff\xff\xff"),  # over 2^31-1
        frame(8, 0, 0, b"\x7f\xff\xff\xff"),
        frame(8, 0, 77, b"\0\0\0\1"),  # idle
        frame(8, 0, 1, b"\0\0\1"),  # short
        struct.pack("!IBI", (1 << 24) - 1 << 8, 0, 1),  # a DATA frame over our limit
        frame(1, 4, 3, b"\xff\xff\xff\xff"),  # HPACK nonsense
        frame(1, 0, 3, b"") + frame(0, 0, 1, b"x"),  # DATA inside a header block
        frame(9, 4, 1, b""),  # CONTINUATION from nowhere
        frame(1, 0, 3, b"\x82") + frame(9, 0, 3, b"") * 20,  # CONTINUATION flood
        frame(0, 0, 1) * 1002,  # empty DATA flood
        frame(5, 4, 1, b"\0\0\0\2"),  # PUSH_PROMISE from a client
        frame(4, 0, 0, b"\0" * 5),  # SETTINGS, wrong size
        frame(6, 0, 0, b"\0" * 8) * 500,  # PING flood
    ],
)
def test_broken_peers_end_the_connection(data: bytes) -> None:
    core = server()
    with pytest.raises(HboneError):  # noqa: PT012
        core.receive(memoryview(data))
        for _ in range(3):
            out(core)
            core.receive(memoryview(frame(6, 0, 0, b"\0" * 8)))
    out(core)


def test_overrunning_a_window_ends_the_connection() -> None:
    core = server()
    with pytest.raises(HboneError, match="window"):  # noqa: PT012
        for _ in range(20):
            core.receive(memoryview(frame(0, 0, 1, b"x" * 16384)))


def test_a_goodbye_is_no_fault() -> None:
    """An idle peer that leaves is not counted among those that broke the rules."""
    client, server = Core(client=True), Core(client=False)
    for _ in range(3):
        server.receive(memoryview(out(client)))
        client.receive(memoryview(out(server)))
    client.goaway()
    server.receive(memoryview(out(client)))
    out(server)
    assert server.failed and not server.at_fault


def test_rapid_reset_is_bounded() -> None:
    peer = Peer(core_is_client=False, limits=Limits(resets_burst=100, resets_per_s=1))
    with pytest.raises((HboneError, AssertionError, h2.exceptions.ProtocolError)):  # noqa: PT012
        for _ in range(300):
            number = peer.h2.get_next_available_stream_id()
            peer.h2.send_headers(number, CONNECT)
            peer.h2.reset_stream(number)
            peer.core.receive(memoryview(peer.h2.data_to_send()))
            peer.h2.receive_data(out(peer.core))
    assert len(peer.core.streams) <= 1 and peer.core.at_fault


def test_heads_are_bounded() -> None:
    peer = Peer(core_is_client=False)
    big = (*CONNECT, *((b"x-%d" % n, b"v" * 1000) for n in range(20)))
    peer.h2.max_outbound_frame_size = 1 << 14
    peer.h2.send_headers(1, big)
    with pytest.raises(HboneError):  # noqa: PT012
        peer.core.receive(memoryview(peer.h2.data_to_send()))
        out(peer.core)
        peer.core.receive(memoryview(frame(6, 0, 0, b"\0" * 8)))
    assert 1 not in peer.core.streams


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 255), st.integers(0, 9), st.binary(max_size=40)), max_size=12))
def test_junk_frames_raise_one_error_or_none(frames: list[tuple[int, int, int, bytes]]) -> None:
    core = server()
    try:
        for kind, flags, stream, payload in frames:
            core.receive(memoryview(frame(kind, flags, stream, payload)))
            out(core)
    except HboneError:
        pass


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_junk_bytes_raise_one_error_or_none(data: bytes, greeted: bool) -> None:
    core = server() if greeted else Core(client=False)
    try:
        core.receive(memoryview(data))
        out(core)
    except HboneError:
        pass


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chunking_gives_the_same_bytes(data: st.DataObject) -> None:
    peer = Peer(core_is_client=False)
    stream = peer.open()
    sent = [data.draw(st.binary(min_size=1, max_size=300)) for _ in range(5)]
    for piece in sent:
        peer.h2.send_data(stream.id, piece, pad_length=data.draw(st.none() | st.integers(0, 30)))
        peer.h2.increment_flow_control_window(10, stream.id)
    wire = peer.h2.data_to_send()
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        peer.events += peer.core.receive(memoryview(wire[:size]))
        wire = wire[size:]
    assert peer.data(stream) == b"".join(sent)
