"""DATA frames that the core makes without libnghttp2: read by h2 and libnghttp2 as what was sent, written as they write them."""

from __future__ import annotations

from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import ngh2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.hbone.core import Core
from l7proxy.hbone.sender import QUICK_BYTES_MAX
from l7proxy.hbone.stream import Kind, Limits, Stream

CONNECT = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"))
OK = ((b":status", b"200"),)
STREAMS = 3
WINDOW = 1 << 20


def h2_end(client: bool, window: int = WINDOW) -> h2.connection.H2Connection:
    end = h2.connection.H2Connection(h2.config.H2Configuration(client_side=client, header_encoding=None))
    end.local_settings = h2.settings.Settings(client, {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
    end.initiate_connection()
    end.increment_flow_control_window(WINDOW)
    return end


def ngh2_end(client: bool) -> ngh2.Connection:
    end = ngh2.Connection(ngh2.Role.CLIENT if client else ngh2.Role.SERVER)
    end.initiate_connection({ngh2.Setting.INITIAL_WINDOW_SIZE: WINDOW})
    end.set_local_window_size(WINDOW)
    return end


class Judges:
    """A core and two peers of other makes, each of which hears all that the core says; h2's words are the ones it hears."""

    def __init__(self, client: bool, window: int = WINDOW) -> None:
        self.core = Core(client=client, limits=Limits(stream_window_bytes=WINDOW))
        self.h2, self.ngh2 = h2_end(not client, window), ngh2_end(not client)
        self.read_h2: dict[int, Any] = {}
        self.read_ngh2: dict[int, Any] = {}
        if client:
            self.streams = [self.core.open(CONNECT) for _ in range(STREAMS)]
            self.turn()
            for stream in self.streams:
                self.h2.send_headers(stream.id, OK)
                self.ngh2.send_response(stream.id, OK)
        else:
            for number in range(1, 2 * STREAMS, 2):
                self.h2.send_headers(number, CONNECT)
                self.ngh2.send_request(CONNECT)
            self.turn()
            self.streams = [self.core.streams[number] for number in range(1, 2 * STREAMS, 2)]
            for stream in self.streams:
                self.core.respond(stream, OK)
        self.turn()

    def turn(self) -> bytes:
        """What the core says now, to both; and what h2 says to it."""
        said = b"".join(self.core.take()[0])
        if said:
            for event in self.h2.receive_data(said):
                self._note(self.read_h2, event, h2.events)
            self.ngh2.receive_data(said)
            for event in self.ngh2.events():
                self._note(self.read_ngh2, event, ngh2)
        self.ngh2.data_to_send()
        if answer := self.h2.data_to_send():
            for kind, _, _ in self.core.receive(memoryview(answer)):
                assert kind in (Kind.REQUEST, Kind.RESPONSE)
        return said

    def settle(self) -> None:
        for _ in range(200):
            if not self.turn() and not self.core.wants_write:
                return
        raise AssertionError("the core has something to say for ever")

    @staticmethod
    def _note(read: dict[int, Any], event: Any, library: Any) -> None:
        if isinstance(event, library.DataReceived):
            read.setdefault(event.stream_id, []).append(bytes(event.data))
        elif isinstance(event, library.StreamReset):
            read.setdefault(event.stream_id, []).append("reset")
        elif isinstance(event, library.StreamEnded if library is h2.events else library.StreamClosed):
            pass

    def bodies(self, read: dict[int, Any]) -> dict[int, tuple[bytes, bool]]:
        return {
            stream.id: (b"".join(p for p in pieces if p != "reset"), "reset" in pieces)
            for stream in self.streams
            if (pieces := read.get(stream.id)) is not None
        }


SIZES = st.sampled_from((1, 45)) | st.integers(1, 3000)  # one after another of the same size: a head is used again
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, STREAMS - 1), st.integers(1, 300) | st.integers(1, 3 * QUICK_BYTES_MAX)),
        st.tuples(st.sampled_from(("reset", "credit")), st.integers(0, STREAMS - 1), st.integers(1, 5000)),
        st.tuples(st.just("turn"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.sampled_from((WINDOW, 65535, 700, 0)), OPERATIONS)
def test_two_libraries_read_what_was_sent(client: bool, window: int, operations: list[tuple[str, int, int]]) -> None:
    judges = Judges(client, window)
    core, sent, reset = judges.core, dict.fromkeys((s.id for s in judges.streams), b""), set[int]()
    room = dict.fromkeys(sent, window)
    for number, (what, which, size) in enumerate(operations):
        stream = judges.streams[which]
        if what == "send" and stream.id not in reset:
            data = bytes([number]) * size
            core.send(stream, data)
            sent[stream.id] += data
        elif what == "reset":
            core.reset(stream)
            reset.add(stream.id)
        elif what == "credit" and stream.id not in reset:
            judges.h2.increment_flow_control_window(size, stream.id)
            room[stream.id] += size
        elif what == "turn":
            judges.turn()
    judges.settle()
    bodies = judges.bodies(judges.read_h2)
    assert bodies == judges.bodies(judges.read_ngh2)
    for number, whole in sent.items():
        body, _ = bodies.get(number, (b"", False))
        if number in reset:
            assert whole.startswith(body) and len(body) <= room[number]
        else:
            assert body == whole[: room[number]]


@settings(max_examples=50, deadline=None)
@given(st.booleans(), st.lists(st.lists(st.tuples(st.integers(0, STREAMS - 1), SIZES), max_size=5), max_size=8))
def test_two_libraries_write_the_same_bytes(client: bool, turns: list[list[tuple[int, int]]]) -> None:
    ours = Judges(client)
    theirs_h2, theirs_ngh2 = _pair_h2(client), _pair_ngh2(client)
    for number, sends in enumerate(turns):
        wanted_h2 = wanted_ngh2 = b""
        for which, size in sends:
            stream, data = ours.streams[which], bytes([number]) * size
            ours.core.send(stream, data)
            theirs_h2.send_data(stream.id, data)
            wanted_h2 += theirs_h2.data_to_send()
            theirs_ngh2.send_data(stream.id, data)
            wanted_ngh2 += theirs_ngh2.data_to_send()
        assert ours.turn() == wanted_h2 == wanted_ngh2


def _pair_h2(client: bool) -> h2.connection.H2Connection:
    """An end like the core's, with its streams open."""
    end, other = h2_end(client), h2_end(not client)
    asks, answers = (end, other) if client else (other, end)
    for number in range(1, 2 * STREAMS, 2):
        asks.send_headers(number, CONNECT)
    answers.receive_data(asks.data_to_send())
    for number in range(1, 2 * STREAMS, 2):
        answers.send_headers(number, OK)
    for _ in range(2):
        asks.receive_data(answers.data_to_send())
        answers.receive_data(asks.data_to_send())
    return end


def _pair_ngh2(client: bool) -> ngh2.Connection:
    end, other = ngh2_end(client), ngh2_end(not client)
    asks, answers = (end, other) if client else (other, end)
    for _ in range(STREAMS):
        asks.send_request(CONNECT)
    answers.receive_data(asks.data_to_send())
    for number in range(1, 2 * STREAMS, 2):
        answers.send_response(number, OK)
    for _ in range(2):
        asks.receive_data(answers.data_to_send())
        answers.receive_data(asks.data_to_send())
    return end


@pytest.mark.parametrize("client", [True, False])
def test_what_waits_for_a_turn_is_bounded(client: bool) -> None:
    """A channel that takes nothing: past a record's worth, streams queue, and say so."""
    judges = Judges(client)
    streams: list[Stream] = judges.streams
    for _ in range(2000):
        judges.core.send(streams[0], b"x" * 100)
        if streams[0].full:
            break
    assert streams[0].full and streams[0].queued < 80_000
    assert sum(len(piece) for piece in judges.core.said if len(piece) == 100) <= QUICK_BYTES_MAX
    judges.settle()
    body = judges.bodies(judges.read_h2)[streams[0].id][0]
    assert set(body) == {ord("x")} and body == judges.bodies(judges.read_ngh2)[streams[0].id][0]


def test_the_head_of_a_stream_comes_before_its_bytes() -> None:
    judges = Judges(client=False)
    judges.h2.send_headers(7, CONNECT)
    judges.turn()
    stream = judges.core.streams[7]
    judges.core.respond(stream, OK)
    judges.core.send(stream, b"at once")
    seen = judges.h2.receive_data(b"".join(judges.core.take()[0]))
    assert [type(e) for e in seen] == [h2.events.ResponseReceived, h2.events.DataReceived]
