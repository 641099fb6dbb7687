"""Peers that take their time, in-process with small limits: the handshake, the head, the body, and too many at once."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from controller import server
from controller.events import Refused
from controller.listener import TlsListener
from tests.controller.rig import eventually, new_key, pem_of

SOON_S = 3.0
Open = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Certified:
    """Stands in for `server.Tls`: one self-signed certificate."""

    def __init__(self, folder: Path) -> None:
        key, name, now = new_key(), x509.Name([]), datetime.now(UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(1).not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        made = builder.add_extension(names, critical=True).sign(key, hashes.SHA256())
        self.path = folder / "server.pem"
        self.path.write_bytes(pem_of(key).encode() + made.public_bytes(serialization.Encoding.PEM))

    def listening(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path)
        return context


@pytest.fixture
def hasty() -> None:
    """What is not done in a moment is given up; elsewhere nothing is, or a slow machine's tests would be."""


@pytest.fixture
async def listener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TlsListener]:
    for name in ("HANDSHAKE_TIMEOUT_S", "IDLE_TIMEOUT_S", "BODY_TIMEOUT_S"):
        monkeypatch.setattr(server, name, 0.3 if "hasty" in request.fixturenames else 60.0)
    for name, value in (
        ("LINGER_S", 0.1),
        ("HANDSHAKES_MAX", 6), ("HANDSHAKES_PER_SOURCE_MAX", 4), ("CONNECTIONS_MAX", 5), ("CONNECTIONS_PER_SOURCE_MAX", 4),
    ):  # fmt: skip
        monkeypatch.setattr(server, name, value)

    async def read(request: web.Request) -> web.Response:
        try:
            return web.Response(body=await server.body_of(request))
        except Refused as refusal:
            return server.answer({"reason": refusal.reason}, refusal.status)

    app = web.Application(client_max_size=server.BODY_BYTES_MAX)
    app.add_routes([web.post("/", read)])
    runner, servers = await server.serve(app, [("127.0.0.1", 0)], Certified(tmp_path), tmp_path / "controller.sock")
    try:
        assert isinstance(servers[0], TlsListener)
        yield servers[0]
    finally:
        for one in servers:
            one.close()
        await runner.cleanup()


@pytest.fixture
async def connect(listener: TlsListener) -> AsyncIterator[Open]:
    """TLS connections to it, closed in the end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opened: list[asyncio.StreamWriter] = []

    async def connect(source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*listener.address, ssl=context, local_addr=(source, 0))
        opened.append(writer)
        return reader, writer

    yield connect
    for writer in opened:
        writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What was said until the end, which comes soon."""
    async with asyncio.timeout(SOON_S):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


@pytest.mark.usefixtures("hasty")
async def test_a_handshake_that_is_not_made_ends(listener: TlsListener) -> None:
    started = time.monotonic()
    reader, writer = await asyncio.open_connection(*listener.address)
    writer.write(b"\x16\x03\x01\x02\x00")  # the head of a record that never comes
    assert await ended(reader) == b""
    assert 0.2 < time.monotonic() - started < SOON_S
    writer.close()

    async def forgotten() -> bool:
        return listener.handshakes == 0

    await eventually(forgotten)


async def test_no_source_may_hold_every_handshake(listener: TlsListener, connect: Open) -> None:
    held = [socket.create_connection(listener.address) for _ in range(4)]

    async def held_all() -> bool:
        return listener.handshakes == 4

    await eventually(held_all)
    reader, writer = await asyncio.open_connection(*listener.address)  # the fifth of this source
    assert await ended(reader) == b"" and listener.turned_away == 1
    writer.close()
    # Other sources have two left
    for number, wanted in ((2, 5), (3, 6), (4, 6)):
        other = socket.socket()
        other.bind((f"127.0.0.{number}", 0))
        other.connect(listener.address)
        held.append(other)

        async def taken(wanted: int = wanted, turned: int = 1 if number < 4 else 2) -> bool:
            return listener.handshakes == wanted and listener.turned_away == turned

        await eventually(taken)
    for sock in held:
        sock.close()

    async def free() -> bool:
        return listener.handshakes == 0

    await eventually(free)
    reader, writer = await connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
    assert (await ended(reader)).endswith(b"\r\n\r\nhi")


async def test_connections_have_a_limit(listener: TlsListener, connect: Open) -> None:
    for number in range(5):
        await connect(f"127.0.0.{1 + number % 2}")
    with pytest.raises(OSError):  # noqa: PT011  # reset or end of file, by what came first
        await connect("127.0.0.2")
    assert listener.turned_away == 1


async def test_no_source_may_hold_every_connection(listener: TlsListener, connect: Open) -> None:
    """Or one stranger would keep all nodes and operators out."""
    first, *_ = await asyncio.gather(*(connect() for _ in range(4)))
    with pytest.raises(OSError):  # noqa: PT011  # as above
        await connect()
    assert listener.turned_away == 1
    await connect("127.0.0.2")
    first[1].close()
    await first[1].wait_closed()

    async def again() -> bool:
        try:
            await connect()
        except OSError:
            return False
        return True

    await eventually(again)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("said", [b"", b"POST / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_head_that_does_not_end_is_not_waited_for(connect: Open, said: bytes) -> None:
    reader, writer = await connect()
    writer.write(said)
    dripping = asyncio.create_task(drip(writer, b"a")) if said else None
    assert await ended(reader) == b""
    if dripping:
        dripping.cancel()


@pytest.mark.usefixtures("hasty")
async def test_a_body_that_does_not_end_is_answered(connect: Open) -> None:
    reader, writer = await connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nConnection: close\r\n\r\n")
    dripping = asyncio.create_task(drip(writer, b"b"))
    said = await ended(reader)
    dripping.cancel()
    assert said.startswith(b"HTTP/1.1 408") and b"body_timeout" in said


async def test_a_body_has_a_size(connect: Open) -> None:
    reader, writer = await connect()
    length = server.BODY_BYTES_MAX + 1
    writer.write(f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n".encode())
    writer.write(bytes(length))
    assert (await ended(reader)).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "head", [b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 70 + b"\r\n"]
)
async def test_a_head_has_a_size(connect: Open, head: bytes) -> None:
    reader, writer = await connect()
    writer.write(head)
    assert b" 400 " in (await ended(reader)).partition(b"\r\n")[0]


async def drip(writer: asyncio.StreamWriter, byte: bytes) -> None:
    """Never silent for long, never done."""
    while True:
        writer.write(byte)
        await asyncio.sleep(0.05)
