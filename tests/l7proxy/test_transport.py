"""`SocketTransport` keeps asyncio's contract, on the loop the worker runs and on Python's own."""

from __future__ import annotations

import array
import asyncio
import fcntl
import gc
import inspect
import socket
import struct
import termios
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import pytest
import uvloop

from l7proxy.budget import Account, Budgets
from l7proxy.transport import HIGH_BYTES, READ_BYTES, READ_FIRST_BYTES, RECEIVED_BYTES_MAX, SocketTransport, bound
from tests.l7proxy.two_nodes import until

RESET = struct.pack("ii", 1, 0)
SLEEPERS = 100


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def on(run: Callable[[Coroutine[Any, Any, None]], None], **given: Any) -> None:
        run(test(**given))

    known = inspect.signature(test)
    run = inspect.Parameter("run", inspect.Parameter.KEYWORD_ONLY)
    on.__name__, on.__doc__ = test.__name__, test.__doc__
    vars(on)["__signature__"] = known.replace(parameters=[*known.parameters.values(), run])  # pytest reads it
    pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])(on)
    return on


class Ear(asyncio.Protocol):
    """What it heard, in its order."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.data = b""
        self.half_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.heard.append("made")

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        assert len(data) <= READ_BYTES
        self.data += data

    def eof_received(self) -> bool:
        self.heard.append("eof")
        return self.half_open

    def pause_writing(self) -> None:
        self.heard.append("pause")

    def resume_writing(self) -> None:
        self.heard.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.heard.append(type(exc) if exc else None)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours, non-blocking, and the peer's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        peer = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    peer.settimeout(5)
    yield ours, peer
    ours.close()
    peer.close()


Ends = tuple[socket.socket, socket.socket]


def made(ends: Ends, ear: Ear | None = None) -> tuple[SocketTransport, Ear]:
    ear = ear or Ear()
    return SocketTransport(asyncio.get_running_loop(), ends[0], ear), ear


@on_both_loops
async def test_bytes_go_both_ways_and_a_half_may_end(ends: Ends) -> None:
    transport, ear = made(ends)
    ends[1].sendall(b"ask")
    await until(lambda: ear.data == b"ask")
    transport.write(b"ans")
    transport.write(b"wer")
    assert transport.get_write_buffer_size() == 0  # nothing waits for the loop
    assert ends[1].recv(6, socket.MSG_WAITALL) == b"answer"
    ends[1].shutdown(socket.SHUT_WR)
    await until(lambda: "eof" in ear.heard)
    transport.resume_reading()
    transport.write(b"more")
    transport.write_eof()
    assert ends[1].recv(4, socket.MSG_WAITALL) == b"more"
    assert ends[1].recv(1) == b""
    with pytest.raises(RuntimeError, match="after write_eof"):
        transport.write(b"late")
    transport.close()
    assert ear.heard == ["made", "eof"]  # not from within
    await until(lambda: ear.heard == ["made", "eof", None])
    assert ends[0].fileno() < 0


@on_both_loops
async def test_a_protocol_that_wants_no_half_is_closed_at_the_end(ends: Ends) -> None:
    _, ear = made(ends)
    ear.half_open = False
    ends[1].close()
    await until(lambda: ear.heard == ["made", "eof", None])


@on_both_loops
async def test_much_is_read_in_large_pieces(ends: Ends) -> None:
    transport, ear = made(ends)
    transport.pause_reading()
    ends[1].setblocking(False)
    sent = 0
    while True:
        try:
            sent += ends[1].send(b"x" * 65536)
        except BlockingIOError:
            break
    assert sent > 2 * READ_FIRST_BYTES
    transport.resume_reading()
    await until(lambda: len(ear.data) == sent)


@on_both_loops
async def test_who_does_not_read_is_told_and_gets_all_of_it(ends: Ends) -> None:
    transport, ear = made(ends)
    data = bytes(range(256)) * 40_000
    view = bytearray(data)
    transport.write(memoryview(view))
    view[:] = b"\0" * len(view)  # the buffer is its owner's again
    assert transport.get_write_buffer_size() > HIGH_BYTES
    assert ear.heard == ["made", "pause"]
    transport.write(b"end")
    transport.close()
    assert transport.is_closing()
    loop = asyncio.get_running_loop()
    got = await loop.run_in_executor(None, lambda: b"".join(iter(lambda: ends[1].recv(1 << 20), b"")))
    assert got == data + b"end"
    await until(lambda: ear.heard == ["made", "pause", "resume", None])


@on_both_loops
async def test_what_waits_when_the_half_ends_goes_first(ends: Ends) -> None:
    transport, ear = made(ends)
    data = bytes(5_000_000)
    transport.write(data)
    transport.write_eof()
    loop = asyncio.get_running_loop()
    got = await loop.run_in_executor(None, lambda: b"".join(iter(lambda: ends[1].recv(1 << 20), b"")))
    assert len(got) == len(data)
    assert None not in ear.heard
    transport.abort()
    await until(lambda: ear.heard[-1] is None)


@on_both_loops
async def test_paused_it_hears_nothing(ends: Ends) -> None:
    transport, ear = made(ends)
    transport.pause_reading()
    assert not transport.is_reading()
    ends[1].sendall(b"one")
    ends[1].shutdown(socket.SHUT_WR)
    for _ in range(5):
        await asyncio.sleep(0.002)
    assert (ear.heard, len(ear.data)) == (["made"], 0)
    transport.resume_reading()
    transport.pause_reading()
    transport.resume_reading()
    await until(lambda: ear.heard == ["made", "eof"])
    assert ear.data == b"one"
    transport.abort()
    await until(lambda: None in ear.heard)


@pytest.mark.parametrize("writing", [False, True])
@on_both_loops
async def test_a_reset_is_told_as_one(ends: Ends, writing: bool) -> None:
    transport, ear = made(ends)
    if writing:
        transport.write(bytes(10_000_000))
        transport.pause_reading()
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    ends[1].close()
    await until(lambda: ear.heard[-1] in (ConnectionResetError, BrokenPipeError))
    transport.write(b"into the void")
    transport.close()
    transport.abort()
    await asyncio.sleep(0.005)
    assert sum(isinstance(what, type) for what in ear.heard) == 1
    assert transport.get_write_buffer_size() == 0


@on_both_loops
async def test_a_reset_that_came_along_with_bytes_is_told_when_more_is_needed(ends: Ends) -> None:
    class Hungry(Ear):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            transport.more()

    ends[1].sendall(bytes(READ_FIRST_BYTES + 1))
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    ends[1].close()
    ear = Hungry()
    transport, _ = made(ends, ear)
    await until(lambda: ear.heard[-1] is ConnectionResetError)
    assert len(ear.data) == READ_FIRST_BYTES + 1


@on_both_loops
async def test_aborted_it_drops_what_waits(ends: Ends) -> None:
    transport, ear = made(ends)
    transport.write(bytes(10_000_000))
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    transport.abort()
    await until(lambda: ear.heard[-1] is None)
    with pytest.raises(ConnectionResetError):
        list(iter(lambda: ends[1].recv(1 << 20), b""))


@on_both_loops
async def test_a_protocol_that_fails_loses_its_connection_and_no_other(ends: Ends) -> None:
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))

    class Broken(Ear):
        def data_received(self, data: bytes) -> None:
            raise ValueError(data)

    _, ear = made(ends, Broken())
    ends[1].sendall(b"x")
    await until(lambda: ear.heard == ["made", ValueError])
    assert [type(error) for error in told] == [ValueError]
    assert ends[1].recv(1) == b""


@on_both_loops
async def test_it_may_be_refused_while_it_is_made(ends: Ends) -> None:
    class Refusing(Ear):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            transport.close()

    ends[1].sendall(b"x")
    _, ear = made(ends, Refusing())
    await until(lambda: ear.heard == ["made", None])
    assert not ear.data


@on_both_loops
async def test_another_protocol_hears_the_rest(ends: Ends) -> None:
    transport, first = made(ends)
    second = Ear()
    transport.set_protocol(second)
    assert transport.get_protocol() is second
    ends[1].sendall(b"x")
    await until(lambda: second.data == b"x")
    ends[1].close()
    await until(lambda: "eof" in second.heard)
    transport.close()
    await until(lambda: second.heard == ["eof", None])
    assert first.heard == ["made"]


@on_both_loops
async def test_what_is_over_leaves_no_cycle(ends: Ends) -> None:
    transport, ear = made(ends)
    ear.transport = transport  # type: ignore[attr-defined]  # as sessions do
    gone = weakref.ref(ear)
    transport.close()
    del transport, ear
    gc.disable()
    try:
        await until(lambda: gone() is None)
    finally:
        gc.enable()


class Sleeper(Ear):
    """One of many connections of an identity."""

    def __init__(self, meter: Account, seen: list[int]) -> None:
        super().__init__()
        self.meter, self.seen, self.open = meter, seen, True

    def waits(self) -> bool:
        return self.open

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.seen[-1] += 1
        self.meter.spent += 0.001
        if self.meter.spent > self.meter.limit:
            self.meter.over()  # as sessions ask, who then put off what comes next


@on_both_loops
async def test_many_that_speak_at_once_are_no_long_turn() -> None:
    """However many of an identity's connections have something to say: few are read in a turn while others are at work."""
    loop = asyncio.get_running_loop()
    budgets = Budgets(loop.call_soon)
    noisy, victim = budgets.of(256, "spiffe://x/ns/a/sa/noisy"), budgets.of(257, "spiffe://x/ns/a/sa/victim")
    turns = [0]

    def turn() -> None:
        """Once in each round of the loop, which this makes take no time."""
        turns.append(0)
        victim.spent += 0.000001
        if len(turns) < 3 * SLEEPERS:
            loop.call_soon(turn)

    pairs = [socket.socketpair() for _ in range(SLEEPERS)]
    ears = [Sleeper(noisy, turns) for _ in pairs]
    try:
        for (ours, peer), ear in zip(pairs, ears, strict=True):
            ours.setblocking(False)
            SocketTransport(loop, ours, ear)
            peer.sendall(b"x" * 4096)
        ears[-1].open = False  # does not wait
        turn()
        await until(lambda: all(ear.data for ear in ears))
        assert max(turns) <= 2, turns  # it, and one that does not wait
        pairs[0][1].sendall(b"y")
        pairs[0][1].close()
        noisy.shut = True
        await until(lambda: "eof" in ears[0].heard)  # one that is gone is not waited for
        assert ears[0].data.endswith(b"y")
    finally:
        for pair in pairs:
            for sock in pair:
                sock.close()


def test_what_waits_in_the_kernel_is_bounded_however_fast_it_was_read() -> None:
    """TCP's own limit follows the reader's speed, and stays when the reader gets slow."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        bound(server)
        with socket.create_connection(server.getsockname()) as client:
            reader = server.accept()[0]
            with reader:
                for _ in range(256):
                    left = client.send(bytes(1 << 20))
                    while left:
                        left -= len(reader.recv(1 << 20))
                client.settimeout(0.2)
                with suppress(TimeoutError):
                    while client.send(bytes(1 << 20)):
                        pass
                waiting = array.array("i", [0])
                fcntl.ioctl(reader, termios.FIONREAD, waiting)
                assert 0 < waiting[0] <= RECEIVED_BYTES_MAX
