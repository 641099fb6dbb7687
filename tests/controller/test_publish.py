"""The publisher and the stream in one process: failures shown, consumers that stall cut, nothing half done."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from controller import allocate, publish, streams
from controller.ca import Authority, Leaf
from controller.events import Refused, Telemetry
from controller.publish import NodeView, Publisher
from controller.registry import Registry
from controller.revocation import Revocation
from controller.sqlite import SqliteStore
from controller.streams import NodeStream
from lab.pace import PATIENCE
from mesh.model import CONFIG_KEY, Config, State
from mesh.snapshot import Ack, Pong, Snapshot, Versioned, decode_server, encode
from tests.controller.rig import SHOP, eventually


@dataclass
class Inside:
    """A controller without its process."""

    store: SqliteStore
    registry: Registry
    publisher: Publisher
    telemetry: Telemetry

    def cuts(self) -> dict[str, float]:
        samples = next(iter(self.telemetry.stream_cuts.collect())).samples
        return {sample.labels["reason"]: sample.value for sample in samples if sample.name.endswith("_total")}

    @contextlib.asynccontextmanager
    async def port(self, expires_s: float = 3600.0, *, cut: bool = False) -> AsyncIterator[int]:
        view = self.publisher.node("n1")

        async def handler(request: web.Request) -> web.WebSocketResponse:
            return await NodeStream(
                self.publisher, self.telemetry, view, time.time() + expires_s, lambda: "cut" if cut else ""
            ).serve(request, 0)

        app = web.Application()
        app.router.add_get("/", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    @contextlib.asynccontextmanager
    async def stream(self, expires_s: float = 3600.0, *, cut: bool = False) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        async with (
            self.port(expires_s, cut=cut) as port,
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://127.0.0.1:{port}/") as socket,
        ):
            yield socket


@pytest.fixture
async def inside(tmp_path: Path) -> AsyncIterator[Inside]:
    store = await SqliteStore.open(tmp_path / "db")
    authority = await Authority.open(store, tmp_path / "ca", "mesh.local")
    registry = await Registry.open(store, authority, "mesh.local")
    telemetry = Telemetry()
    publisher = Publisher(registry, telemetry)
    task = asyncio.create_task(publisher.run())
    yield Inside(store, registry, publisher, telemetry)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.close()


async def cut_for(inside: Inside, reason: str) -> None:
    async def seen() -> bool:
        return inside.cuts().get(reason) == 1.0

    await eventually(seen)


async def test_when_all_numbers_are_given_out_the_node_is_told(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    await inside.registry.apply(SHOP, "shop.yaml")
    monkeypatch.setitem(allocate.NUMBER_MAX, "workload", 0)
    with pytest.raises(Refused, match="every workload number") as refused:
        await inside.registry.register("n1", "shop", "web-1", "web", ["10.0.1.1"], {}, source="test")
    assert (refused.value.reason, refused.value.status, refused.value.node) == ("exhausted", 409, "n1")


async def test_a_silent_node_is_cut(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(streams, "SILENCE_S_MAX", 0.2)
    async with inside.stream():
        await cut_for(inside, "silent")
    assert not inside.publisher.node("n1").connected


async def test_a_node_that_never_acks_is_cut(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(streams, "ACK_S_MAX", 0.3)
    async with inside.stream() as socket:

        async def chat() -> None:
            while not socket.closed:
                await socket.receive()
                await socket.send_str(encode(Pong()).decode())

        task = asyncio.create_task(chat())
        await cut_for(inside, "slow")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_node_that_does_not_read_is_cut(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SEND_S_MAX", 0.3)
    big: State = {CONFIG_KEY: Config(trust_domain="mesh.local", bundle=("x" * (40 << 20),))}
    monkeypatch.setattr(inside.publisher, "for_node", lambda _: Versioned(1, big, 0))
    head = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    async with inside.port() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(head)
        await cut_for(inside, "slow")
        writer.transport.abort()


async def test_a_stream_ends_with_its_certificate(inside: Inside) -> None:
    async with inside.stream(expires_s=0.2):
        await cut_for(inside, "certificate_expired")


async def test_a_node_cut_while_it_connects_gets_nothing(inside: Inside) -> None:
    async with inside.stream(cut=True):
        await cut_for(inside, "cut")


async def test_a_stream_that_a_newer_one_replaced_sends_nothing(inside: Inside) -> None:
    """It ends some turns of the loop later; what it sent meanwhile the newer one would take for said."""
    await inside.publisher.until(lambda: inside.publisher.revision > 0)
    view, sent = inside.publisher.node("n1"), list[bytes]()

    class Socket:
        async def send_frame(self, frame: bytes, _: object) -> None:
            sent.append(frame)

    def stream() -> NodeStream:
        return NodeStream(inside.publisher, inside.telemetry, view, time.time() + 3600, lambda: "")

    older, newer = stream(), stream()
    view.close, before = newer.close, (view.repair, view.epoch)
    async with asyncio.timeout(2 * PATIENCE):
        await older._send(Socket())
    assert not sent and not view.inflight and (view.repair, view.epoch) == before
    # Replaced while the frame was made
    view.close = older.close
    made = older._next

    def replaced(last: Versioned | None) -> tuple[Versioned, bytes]:
        view.close = newer.close
        return made(last)

    older._next = replaced  # type: ignore[method-assign]  # the moment
    async with asyncio.timeout(2 * PATIENCE):
        await older._send(Socket())
    assert not sent and not view.inflight and (view.repair, view.epoch) == before


async def test_what_a_node_had_that_is_gone_is_forgotten(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs memory, and a look at every change; nodes come and go."""
    await inside.publisher.until(lambda: inside.publisher.revision > 0)
    view, parts = inside.publisher.node("n1"), inside.publisher._reach._parts
    async with inside.stream() as socket:
        frame = decode_server((await socket.receive()).data)
        assert isinstance(frame, Snapshot)
        await socket.send_str(encode(Ack(frame.revision, frame.digest)).decode())

        async def acked() -> bool:
            return view.base is not None

        await eventually(acked)
        monkeypatch.setattr(publish, "GONE_S", 0.0)
        await inside.publisher.forget_gone()
        assert view.base is not None and "n1" in parts  # it is there

    async def left() -> bool:
        return not view.connected

    await eventually(left)
    monkeypatch.setattr(publish, "GONE_S", 3600.0)
    await inside.publisher.forget_gone()
    assert view.base is not None and "n1" in parts  # it may be back soon
    monkeypatch.setattr(publish, "GONE_S", 0.0)
    await inside.publisher.forget_gone()
    assert view.base is None and view.repair and not view.inflight and parts == {}


async def test_a_failed_compilation_keeps_the_last_good_state(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    await inside.publisher.until(lambda: inside.publisher.revision > 0)
    good, seen = inside.publisher.state, inside.publisher.for_node("n1")
    kept = dict(good)
    monkeypatch.setattr(publish, "RETRY_S", 0.05)
    with monkeypatch.context() as patch:

        def broken(*_: object) -> State:
            raise ValueError("boom")

        patch.setattr(publish.Reach, "change", broken)
        revision, _ = await inside.registry.apply(SHOP, "shop")
        await inside.publisher.until(lambda: "boom" in inside.publisher.error)
        assert inside.publisher.state is good and good == kept
        assert inside.publisher.for_node("n1") == seen
    async with asyncio.timeout(5):
        await inside.publisher.until(lambda: inside.publisher.revision >= revision)
    assert inside.publisher.error == "" and "Service/shop/web" in inside.publisher.state


async def test_a_caller_that_leaves_does_not_part_store_and_memory(inside: Inside) -> None:
    before = inside.registry.revision
    for number in range(20):
        task = asyncio.create_task(inside.registry.apply(SHOP.replace("name: web,", f"name: web{number},"), "shop"))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await inside.registry.bundle_changed()  # waits for the lock
    _, entries = await inside.store.list("resource/")
    assert {entry.key.removeprefix("resource/") for entry in entries} == {
        "/".join(stored.resource.key) for stored in inside.registry.get()
    }
    assert inside.registry.revision >= before


async def test_what_is_over_is_forgotten(inside: Inside) -> None:
    now = time.time()
    leaf = msgspec.json.encode(Leaf("spiffe://mesh.local/node/n1", "k", 1, now - 9e5, now - 8e5))
    await inside.store.put("serial/node:n1/ab", leaf)
    await inside.store.put("revoked/ab", msgspec.json.encode(Revocation("n1", now - 1)))
    inside.registry.revoked["ab"] = Revocation("n1", now - 1)
    revision = inside.registry.revision
    await inside.registry.prune(now)
    assert inside.registry.revoked == {} and inside.registry.revision > revision
    assert await inside.store.get("serial/node:n1/ab") is None and await inside.store.get("revoked/ab") is None


def test_a_view_trusts_only_the_digest_it_sent() -> None:
    view, sent = NodeView("n1"), Versioned(5, {}, 7)
    view.inflight[5] = sent
    view.acknowledge(4, sent.digest)
    assert view.acked == 0
    view.acknowledge(5, sent.digest)
    assert view.acked == 5 and view.last is sent
    view.inflight[6] = Versioned(6, {}, 8)
    view.acknowledge(6, sent.digest)
    assert (view.acked, view.repair, view.digest_ok) == (0, True, False)
    view.acknowledge(6, Versioned(6, {}, 8).digest)
    assert view.acked == 0  # of a frame before the repair
