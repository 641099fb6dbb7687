"""What one read brought is handed on in pieces when it costs much and others wait: see `TlsChannel`."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from pathlib import Path

import pytest

from l7proxy import channel
from l7proxy.budget import Account, Budgets
from l7proxy.channel import PIECE_BYTES_MIN, TlsChannel
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
    other.spent, loud.spent = 1e-9, loud.quota * 2
    assert loud.over()
    loud.shut = False
    loud.limit = loud.spent
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
    near.meter = loud
    far = TlsChannel(loop, theirs, contexts[1], sender, server_side=False, server_name="x")
    await until(lambda: near.open and far.open)
    far.send([data])
    far.close()
    await until(lambda: reader.error)
    assert reader.got == data
    assert reader.error == [None]  # the end came after the bytes
    assert max(reader.turns) <= piece_max
    near.abort()
