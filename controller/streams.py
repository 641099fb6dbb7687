"""One WebSocket for each node: a snapshot, then deltas as the state changes, each acknowledged with a digest.

A node has one stream; a newer one ends the older. A consumer that does not read, answer or acknowledge in time is
cut and may come back: it resumes from the revision it names if that is still known here, else from a snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog
from aiohttp import WSCloseCode, WSMsgType, web

from controller.events import Telemetry
from controller.publish import INFLIGHT_MAX, NodeView, Publisher
from mesh.model import CONFIG_KEY, Config
from mesh.snapshot import Ack, Delta, Nack, Ping, Pong, Ready, Snapshot, SnapshotError, Versioned, decode_agent, encode

PING_INTERVAL_S = 5.0
PINGS_PER_LEASE = 4  # a node's policy lease must not end because the controller had nothing to say
WATCH_INTERVAL_S = 1.0
SILENCE_S_MAX = 15.0
ACK_S_MAX = 60.0
SEND_S_MAX = 10.0
FRAME_BYTES_MAX = 64 << 10  # of an agent's frame
REPAIR_INTERVAL_S = 1.0

log = structlog.get_logger()


class Cut(Exception):
    """The stream ends; the reason is an enum."""


class NodeStream:
    """Serves one node until it leaves or is cut. ``expires``: unix seconds at which its certificate ends."""

    def __init__(
        self, publisher: Publisher, telemetry: Telemetry, view: NodeView, expires: float, refused: Callable[[], str]
    ) -> None:
        self._refused = refused  # "" or, if the node may be told nothing more since its request was admitted, why
        self._publisher, self._telemetry, self._view, self._expires = publisher, telemetry, view, expires
        self._heard = self._repaired = 0.0
        self._sent = 0
        self._sent_at: dict[int, float] = {}
        self._end, self._reason = asyncio.Event(), ""

    def close(self, reason: str) -> None:
        """Ends the stream soon, from the event loop."""
        self._reason = self._reason or reason
        self._end.set()

    async def serve(self, request: web.Request, has_revision: int) -> web.WebSocketResponse:
        view = self._view
        socket = web.WebSocketResponse(max_msg_size=FRAME_BYTES_MAX, compress=False, timeout=1.0, autoping=True)
        await socket.prepare(request)
        if view.close is not None:
            view.close("newer_stream")
        view.close, view.connected = self.close, True
        if reason := self._refused():
            self.close(reason)
        self._resume(has_revision)
        self._telemetry.streams.inc()
        self._heard = time.monotonic()
        await self._publisher.wake()
        tasks = [asyncio.create_task(work) for work in (self._send(socket), self._receive(socket), self._watch(socket))]
        ended = asyncio.ensure_future(self._end.wait())
        reason = "left"
        try:
            await asyncio.wait([*tasks, ended], return_when=asyncio.FIRST_COMPLETED)
            reason = self._reason or _outcome(tasks)
        finally:
            for task in (*tasks, ended):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if view.close == self.close:  # else a newer stream has taken the view over
                view.close, view.connected, view.ready, view.left = None, False, False, time.monotonic()
            self._telemetry.streams.dec()
            if reason != "left":
                self._telemetry.stream_cuts.labels(reason).inc()
            if self._telemetry.sparing.passes("stream ended", reason, f"node {view.name}"):
                log.info("stream ended", node=view.name, reason=reason)
            await self._publisher.wake()
        await self._shut(socket, request, reason)
        return socket

    def _resume(self, has_revision: int) -> None:
        view = self._view
        known = view.base
        view.forget()
        if known is not None and known.revision == has_revision:
            view.base, view.repair = known, False

    async def _shut(self, socket: web.WebSocketResponse, request: web.Request, reason: str) -> None:
        transport = request.transport
        if reason in ("cut", "slow", "silent", "certificate_expired", "certificate_revoked"):
            if transport is not None:
                transport.abort()  # a polite close could wait for the peer
            return
        try:
            async with asyncio.timeout(2.0):
                await socket.close(code=WSCloseCode.GOING_AWAY, message=reason.encode())
        except TimeoutError:
            if transport is not None:
                transport.abort()

    async def _send(self, socket: web.WebSocketResponse) -> None:
        view, publisher = self._view, self._publisher
        self._sent = view.acked
        while True:
            await publisher.until(self._due)
            if view.close != self.close:
                return  # a newer stream speaks to the node: it alone says what was sent
            if why := self._refused():
                raise Cut(why)
            if view.repair:
                await asyncio.sleep(max(0.0, self._repaired + REPAIR_INTERVAL_S - time.monotonic()))
                self._repaired = time.monotonic()
            epoch, last = view.epoch, None if view.repair else view.last
            new, frame = await asyncio.to_thread(self._next, last)
            if view.epoch != epoch or view.close != self.close:
                continue  # a nack came meanwhile: what we prepared builds on what the node has not; or a newer stream
            self._sent = new.revision
            view.repair = False
            view.inflight[new.revision] = new
            self._sent_at[new.revision] = time.monotonic()
            await self._frame(socket, frame)

    def _due(self) -> bool:
        """Whether there is something to send and the node can take it."""
        view, revision = self._view, self._publisher.revision
        return revision > 0 and (view.repair or (revision > self._sent and len(view.inflight) < INFLIGHT_MAX))

    def _next(self, last: Versioned | None) -> tuple[Versioned, bytes]:
        """The next state to send and its frame; runs in a thread."""
        new = self._publisher.for_node(self._view.name)
        frame: Snapshot | Delta = new.snapshot()
        if last is not None:
            _, frame = last.next(new.state, new.revision)
        return new, encode(frame)

    async def _frame(self, socket: web.WebSocketResponse, frame: bytes) -> None:
        try:
            async with asyncio.timeout(SEND_S_MAX):
                await socket.send_frame(frame, WSMsgType.TEXT)
        except TimeoutError:
            raise Cut("slow") from None

    async def _receive(self, socket: web.WebSocketResponse) -> None:
        view = self._view
        async for message in socket:
            self._heard = time.monotonic()
            if view.close != self.close:
                return  # a newer stream speaks for the node
            if message.type is not WSMsgType.TEXT:
                raise Cut("bad_frame")
            try:
                frame = decode_agent(message.data)
            except SnapshotError as error:
                view.error = str(error)[:1000]
                raise Cut("bad_frame") from error
            match frame:
                case Ack(revision, digest):
                    view.acknowledge(revision, digest)
                case Nack(revision, error_text):
                    if self._telemetry.sparing.passes("nack", "nack", f"node {view.name}"):
                        log.warning("nack", node=view.name, revision=revision, error=error_text[:1000])
                    view.refuse(revision, error_text)
                case Ready(ready, detail):
                    view.ready, view.detail = ready, detail[:1000]
                case Pong():
                    continue
            await self._publisher.wake()

    async def _watch(self, socket: web.WebSocketResponse) -> None:
        ping, pinged = encode(Ping()), time.monotonic()
        while True:
            interval = self._ping_interval_s()
            await asyncio.sleep(min(interval, WATCH_INTERVAL_S, max(0.0, self._expires - time.time())))
            now = time.monotonic()
            if time.time() >= self._expires:
                raise Cut("certificate_expired")
            if why := self._refused():
                raise Cut(why)
            if now - self._heard > SILENCE_S_MAX:
                raise Cut("silent")
            self._sent_at = {revision: at for revision, at in self._sent_at.items() if revision in self._view.inflight}
            if any(now - at > ACK_S_MAX for at in self._sent_at.values()):
                raise Cut("slow")
            if now - pinged >= interval:
                pinged = now
                await self._frame(socket, ping)

    def _ping_interval_s(self) -> float:
        config = self._publisher.state.get(CONFIG_KEY)
        lease_s = config.policy_lease_s if isinstance(config, Config) else 0.0
        return min(PING_INTERVAL_S, lease_s / PINGS_PER_LEASE) if lease_s else PING_INTERVAL_S


def _outcome(tasks: list[asyncio.Task[None]]) -> str:
    for task in tasks:
        if task.done() and not task.cancelled():
            error = task.exception()
            if isinstance(error, Cut):
                return str(error)
            if error is not None and not isinstance(error, ConnectionError):
                log.error("stream failed", exc_info=error)
                return "bug"
    return "left"
