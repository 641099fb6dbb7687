"""What one read brought is handed on in pieces when it costs much and others wait; what waits is counted, and what passed
leaves little behind: see `TlsChannel`."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import socket
import ssl
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest

from l7proxy import channel
from l7proxy.budget import Account, Budgets
from l7proxy.channel import PIECE_BYTES_MIN, TlsChannel
from l7proxy.seal import CHUNK_BYTES
from tests.l7proxy.pki import Authority
from tests.l7proxy.two_nodes import until


class Reader:
    """A handler to which each byte costs the same."""

    def __init__(self, cost_s: float, other: Account) -> None:
        self.cost_s, self.other = cost_s, other
        self.got = b""
        self.turns: list[int] = []  # bytes, between two looks of the loop at everybody's sockets
        self.error: list[Exception | None] = []

    def channel_open(self) -> None: ...

    def channel_data(self, data: memoryview) -> None:
        self.other.spent += 1e-9  # it is at work too
        self.got += data
        self.turns[-1] += len(data)
        end = time.perf_counter() + len(data) * self.cost_s
        while time.perf_counter() < end:
            pass

    def channel_held(self, _size: int) -> bool:
        return True

    def channel_drained(self) -> None: ...

    def channel_lost(self, error: Exception | None) -> None:
        self.error.append(error)


@pytest.fixture
def contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    monkeypatch.setattr(channel, "_OPTIONS", ())  # TCP's; this is a pair of unix sockets
    entry = Authority().svid("spiffe://td/ns/a/sa/x")
    os.close(entry.key_fd)
    pem = tmp_path / "pem"
    pem.write_text(entry.chain + entry.key)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(pem)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return server, client


@pytest.mark.parametrize(("cost_s", "piece_max"), [(1e-6, 4 * PIECE_BYTES_MIN), (1e-10, 1 << 18)], ids=["dear", "cheap"])
async def test_a_read_is_handed_on_in_pieces_while_others_wait(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], cost_s: float, piece_max: int
) -> None:
    loop = asyncio.get_running_loop()
    budgets = Budgets(loop.call_soon)
    loud, other = budgets.of(300, "spiffe://td/ns/a/sa/loud"), budgets.of(301, "spiffe://td/ns/a/sa/other")
    reader, sender = Reader(cost_s, other), Reader(0.0, other)
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    data = bytes(range(256)) * 512  # 128 KiB in one read

    def look() -> None:
        reader.turns.append(0)
        if len(reader.got) < len(data):
            loop.call_soon(look)

    look()
    near = TlsChannel(loop, ours, contexts[0], reader, server_side=True)
    far = TlsChannel(loop, theirs, contexts[1], sender, server_side=False, server_name="x")
    await until(lambda: near.open and far.open)
    other.spent, loud.spent = 1e-9, loud.quota * 2  # who was at work before a long handshake would count no more
    assert loud.over()
    loud.shut = False
    loud.limit = loud.spent
    near.meter = loud
    far.send([data])
    far.close()
    await until(lambda: reader.error)
    assert reader.got == data
    assert reader.error == [None]  # the end came after the bytes
    assert max(reader.turns) <= piece_max
    near.abort()


class Counter:
    """Counts what comes, and what waits."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.got = self.held = self.drained = 0
        self.most = most
        self.channel: TlsChannel | None = None
        self.error: list[Exception | None] = []

    def channel_open(self) -> None: ...

    def channel_data(self, data: memoryview) -> None:
        self.got += len(data)

    def channel_held(self, size: int) -> bool:
        self.held += size
        return size < 0 or self.held <= self.most

    def channel_drained(self) -> None:
        self.drained += 1

    def channel_lost(self, error: Exception | None) -> None:
        self.error.append(error)


@dataclass
class End:
    channel: TlsChannel
    seen: Counter


async def pair(contexts: tuple[ssl.SSLContext, ssl.SSLContext], most: int = 1 << 30) -> tuple[End, End]:
    """A server's and a client's end, open."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    one, other = Counter(), Counter(most)
    near = TlsChannel(loop, ours, contexts[0], one, server_side=True)
    far = TlsChannel(loop, theirs, contexts[1], other, server_side=False, server_name="x")
    await until(lambda: near.open and far.open)
    return End(near, one), End(far, other)


async def test_what_the_kernel_does_not_take_is_counted_until_it_has_gone(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    near, far = await pair(contexts)
    near.channel.pause()
    size = 4 << 20
    far.channel.send([b"head", b"x" * (size - 8), b"tail"])
    assert far.channel.blocked
    assert far.seen.held == far.channel.kept > size // 2
    near.channel.resume()
    await until(lambda: near.seen.got == size)
    assert (far.channel.blocked, far.channel.kept, far.seen.held, far.seen.drained) == (False, 0, 0, 1)
    near.channel.pause()
    far.channel.send([b"y" * size])
    assert far.channel.kept
    far.channel.abort()
    await until(lambda: far.seen.error)
    assert far.seen.held == 0
    near.channel.abort()


async def test_what_is_whole_goes_the_same_way(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    near, far = await pair(contexts)
    near.channel.pause()
    sizes = [3000, CHUNK_BYTES + 1] + [16_384] * 256  # more than the kernel takes: a record is cut, the rest waits
    for size in sizes:
        far.channel.send_whole(b"x" * size)
    assert far.channel.blocked
    assert far.seen.held == far.channel.kept > 0
    near.channel.resume()
    await until(lambda: near.seen.got == sum(sizes))
    assert (far.channel.blocked, far.channel.kept, far.seen.held, far.seen.drained) == (False, 0, 0, 1)
    near.channel.abort()
    await until(lambda: far.seen.error)
    far.channel.send_whole(b"for nobody")


async def test_too_much_that_waits_ends_the_channel(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    near, far = await pair(contexts, most=1 << 20)
    near.channel.pause()
    far.channel.send([b"x" * (4 << 20)])
    await until(lambda: far.seen.error)
    assert isinstance(far.seen.error[0], ConnectionAbortedError)
    assert (far.channel.closed, far.seen.held) == (True, 0)
    near.channel.abort()


async def test_what_was_lost_does_not_wait_for_the_collector(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    near, far = await pair(contexts)
    gone = weakref.ref(far.channel.tls)
    gc.collect()
    gc.disable()
    try:
        far.seen.channel = far.channel  # as a tunnel knows its channel
        errors = far.seen.error
        far.channel.abort()
        del far
        await until(lambda: errors)
        await until(lambda: gone() is None)
    finally:
        gc.enable()
    near.channel.abort()


class _Allocated(ctypes.Structure):
    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]


def allocated() -> int:
    """Bytes that malloc has given out."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Allocated
    found = libc.mallinfo2()
    return int(found.field4) + int(found.field7)


async def test_what_passed_leaves_little_behind(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """A buffer inside TLS never shrinks: it must not have been as large as a read, or as what was sent at once."""
    pairs = [await pair(contexts) for _ in range(24)]
    before = allocated()
    for near, far in pairs:
        data = b"x" * (1 << 20)
        far.channel.send([data])
        await until(lambda near=near: near.seen.got == 1 << 20)
        del data
    grown = (allocated() - before) / len(pairs)
    assert grown < 4 * CHUNK_BYTES, grown
    for near, far in pairs:
        far.channel.abort()
        near.channel.abort()
