"""The agent's end of mesh.link: dials each worker's socket, keeps every worker supplied, dials again when one dies.

The fleet holds what every worker must have besides the state: listeners and certificates. A worker is equipped when
the core says its state stands; then it gets what it lacks, and later what changes. What a worker sends is untrusted:
bounded, counted, and never more than a request for sockets of this node's workloads.

A proxy that is restarted by plan leaves its workers behind: they serve until one of a newer generation is equipped, then drain.
They are kept supplied with state and certificates to their end.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog

from mesh import link
from nodeagent import forwarders
from nodeagent.datapath_api import OpenListener
from nodeagent.flows import VERDICTS
from nodeagent.keys import sealed_memfd
from nodeagent.svid import Held
from nodeagent.worker_link import STOCK_ASK_MAX, WorkerLink, close_all

log = structlog.get_logger()

DIAL_EVERY_S = 0.2
HELLO_S = 5.0  # from dialling to Ready
WORKERS_MAX = 1024  # of all generations
LEAVING_MAX = 4  # generations that drain side by side; of more, the oldest has no time left
HURRY_S = 3.0
CUT_MAX = 1 << 20  # connections that one worker can say it cut
SCRAPE_S = 1.0
STOCK_INITIAL = 32  # for each netns and family
METRICS_CHARS_MAX = 16 << 20


Asked = link.Pair | link.Unpair | link.Leg | link.Unleg | link.Leaving | link.Left


class FleetHandler(Protocol):
    """Who hears of the workers. All calls come from the loop."""

    def worker_up(self, worker: str) -> None: ...
    def worker_down(self, worker: str, gone: bool) -> None: ...
    def worker_acked(self, worker: str, revision: int, digest: str) -> None: ...
    def worker_refused(self, worker: str, revision: int, error: str) -> None: ...
    def flow(self, flow: link.Flow) -> None: ...
    def stock_wanted(self, worker: str, netns: int, family: int, count: int) -> None: ...
    def worker_leaving(self, worker: str) -> None: ...
    def express_asked(self, worker: str, message: Asked, fds: list[int]) -> None: ...
    def grant_asked(self, worker: str, grant: link.Grant) -> None: ...
    def worker_equipped(self, worker: str) -> None: ...


def _made(path: Path) -> tuple[int, int] | None:
    """Tells one socket of this name from the next; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


class ProxyFleet:
    """All workers under ``directory`` (``worker-<i>.sock``)."""

    def __init__(self, directory: Path, hello: Callable[[], link.Hello], handler: FleetHandler) -> None:
        self._directory, self._hello, self._handler = directory, hello, handler
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.links: dict[str, WorkerLink] = {}  # those that said Ready
        self.listeners: Mapping[str, OpenListener] = {}  # by id
        self.svids: dict[str, Held] = {}
        self.forward: frozenset[int] = frozenset()  # families of sockets to resolvers outside
        self.netns: dict[int, frozenset[int]] = {}  # cookie -> families the workers may have sockets of
        self.leased_ns = 0
        self.counts = {"dials": 0, "lost": 0, "protocol_errors": 0, "stock_sent": 0, "stock_refused": 0, "drain_cut": 0}

    async def run(self) -> None:
        """Watches the directory until cancelled."""
        try:
            while True:
                for path in self._sockets():
                    if path.name not in self._tasks:
                        self._tasks[path.name] = asyncio.create_task(self._keep(path), name=f"worker {path.name}")
                await asyncio.sleep(DIAL_EVERY_S)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _sockets(self) -> list[Path]:
        try:
            return sorted(self._directory.glob("worker-*.sock"))[:WORKERS_MAX]
        except OSError:
            return []

    async def _keep(self, path: Path) -> None:
        """Dials one worker again and again, until its socket is taken away."""
        name = path.name.removesuffix(".sock")
        pause = DIAL_EVERY_S
        gone: tuple[int, int] | None = None  # this socket: nobody listens there
        try:
            while True:
                found = _made(path)
                sock = await self._dial(path)
                if sock is None:
                    if gone is None:
                        self._handler.worker_down(name, True)
                    gone = found
                    if found is None:
                        return
                else:
                    gone = None
                    if await self._serve(name, sock):
                        pause = DIAL_EVERY_S
                until = time.monotonic() + pause * random.uniform(0.8, 1.2)
                while time.monotonic() < until and (gone is None or _made(path) == gone):  # noqa: ASYNC110  # another is dialled at once
                    await asyncio.sleep(min(pause, DIAL_EVERY_S))
                pause = min(pause * 1.5, 2.0)
        finally:
            self._tasks.pop(path.name, None)

    async def _dial(self, path: Path) -> socket.socket | None:
        """None: nobody listens there."""
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self.counts["dials"] += 1
            try:
                sock.connect(str(path))  # never under way on a Unix socket, which the loop's sock_connect would take it for
                return sock
            except BlockingIOError:  # its backlog is full: it exists and does not answer
                sock.close()
                await asyncio.sleep(DIAL_EVERY_S)
            except OSError:
                sock.close()
                return None

    async def _serve(self, name: str, sock: socket.socket) -> bool:
        """One link from Hello to its end; whether the worker ever said Ready."""
        worker = WorkerLink(name, sock, self._message)
        try:
            worker.send(self._hello())
            either: list[asyncio.Future[Any]] = [worker.ready, worker.closed]
            await asyncio.wait(either, timeout=HELLO_S, return_when=asyncio.FIRST_COMPLETED)
            if not worker.ready.done():
                worker.close("not ready in time")
            reason = await asyncio.shield(worker.closed)  # a cancelled wait must not look like a closed link
            self.counts["protocol_errors"] += worker.broke
            if worker.pid:
                self.counts["lost"] += 1
                (log.info if worker.leaving else log.warning)("worker_lost", worker=name, pid=worker.pid, reason=reason)
            return bool(worker.pid)
        finally:
            worker.close("the agent stops")
            if self.links.get(name) is worker:
                del self.links[name]
                self._handler.worker_down(name, False)

    def _message(self, worker: WorkerLink, message: link.Message, fds: list[int]) -> None:
        match message:
            case link.Ready(index, pid, generation):
                if worker.name != f"worker-{index}":  # or it would stand for another one, in metrics and status
                    self.counts["protocol_errors"] += 1
                    worker.close("says it is another worker")
                elif not worker.pid and pid > 0:
                    worker.pid, worker.index, worker.generation = pid, index, generation
                    worker.ready.set_result(None)
                    self.links[worker.name] = worker
                    log.info("worker_ready", worker=worker.name, pid=pid)
                    self._handler.worker_up(worker.name)
            case _ if not worker.pid:
                close_all(fds)
                self.counts["protocol_errors"] += 1
                worker.close("spoke before it was ready")
            case link.Pair() | link.Unpair() | link.Leg() | link.Unleg() | link.Leaving() | link.Left():
                self._handler.express_asked(worker.name, message, fds)
                if isinstance(message, link.Leaving):
                    self._leaves(worker, message.seconds)
            case link.Drained(cut):
                self.counts["drain_cut"] += max(0, min(cut, CUT_MAX))
                log.info("worker_drained", worker=worker.name, pid=worker.pid, cut=cut)
            case link.Grant():
                self._handler.grant_asked(worker.name, message)
            case link.Ack(revision, digest):
                worker.acked_revision = revision
                self._handler.worker_acked(worker.name, revision, digest[:128])
            case link.Nack(revision, error):
                self._handler.worker_refused(worker.name, revision, error[:500])
            case link.NeedStock(netns, family, count):
                granted = worker.allow_stock(count) if family in self.netns.get(netns, frozenset()) else 0
                self.counts["stock_refused"] += max(0, min(count, STOCK_ASK_MAX) - granted)
                if granted:
                    self._handler.stock_wanted(worker.name, netns, family, granted)
            case link.Metrics(_, text):
                if worker.scrape is not None and not worker.scrape.done():
                    worker.scrape.set_result(text[:METRICS_CHARS_MAX])
            case link.Flow(verdict=verdict) if verdict in VERDICTS:
                self._handler.flow(message)
            case _:
                self.counts["protocol_errors"] += 1
                worker.close(f"a worker does not send such a {type(message).__name__}")

    # ---- generations

    def _leaves(self, worker: WorkerLink, seconds: float) -> None:
        log.info("worker_leaves", worker=worker.name, pid=worker.pid, seconds=round(seconds, 1))
        worker.leaving, worker.leaves_s = True, seconds
        worker.drains = worker.drains or not seconds
        self._handler.worker_leaving(worker.name)
        self._relieve()

    def heir(self) -> str | None:
        """Who serves in place of those that leave: an equipped worker of the newest generation."""
        serving = [worker for worker in self.links.values() if worker.equipped and not worker.leaving]
        newest = max((worker.generation for worker in serving), default=0)
        return random.choice([worker.name for worker in serving if worker.generation == newest]) if serving else None

    def _relieve(self) -> None:
        """Workers that wait for a newer generation, which serves now, drain. Those of too many hurry."""
        heir = self.heir()
        leaving = [worker for worker in self.links.values() if worker.leaving]
        kept = sorted({worker.generation for worker in leaving})[-LEAVING_MAX:]
        for worker in leaving:
            if worker.generation not in kept:
                if not worker.hurries:
                    worker.hurries = worker.drains = True
                    worker.send(link.Drain(HURRY_S))
            elif heir is not None and not worker.drains and worker.generation < self.links[heir].generation:
                worker.drains = True
                worker.send(link.Drain(worker.leaves_s))

    # ---- what the core and the shell ask

    def update(self, name: str, update: link.Update) -> None:
        if name in self.links:
            self._lease(self.links[name])
            self.links[name].send(update)

    def lease(self, until_ns: int) -> None:
        """Every worker hears of it, those to come as well: see `mesh.link.Lease`."""
        self.leased_ns = until_ns
        for worker in self.links.values():
            self._lease(worker)

    def _lease(self, worker: WorkerLink) -> None:
        if worker.leased_ns != self.leased_ns:
            worker.leased_ns = self.leased_ns
            worker.send(link.Lease(self.leased_ns))

    def drop(self, name: str, reason: str) -> None:
        """Close the link; it is dialled again."""
        if name in self.links:
            self.links[name].close(reason)

    def equip(self, name: str) -> None:
        """Bring the worker's listeners, certificates and first sockets to what they should be."""
        worker = self.links.get(name)
        if worker is None:
            return
        fresh, worker.equipped = not worker.equipped, True
        for spiffe in worker.svids.keys() - self.svids.keys():
            del worker.svids[spiffe]
            worker.send(link.DropSvid(spiffe))
        for spiffe, held in self.svids.items():
            if worker.svids.get(spiffe) != held.leaf.serial:
                self._send_svid(worker, held)
        for missing in worker.listeners - self.listeners.keys():
            worker.listeners.discard(missing)
            worker.send(link.CloseListener(missing))
        if worker.leaving:
            return  # it has what it has
        for netns, families in self.netns.items():
            for family in families:
                if (netns, family) not in worker.stocked:
                    worker.stocked.add((netns, family))
                    self._handler.stock_wanted(name, netns, family, STOCK_INITIAL)
        worker.stocked = {(netns, family) for netns, family in worker.stocked if netns in self.netns}
        for key, (frame, fd) in self.listeners.items():
            if key not in worker.listeners:
                worker.listeners.add(key)
                worker.send(frame, [os.dup(fd)], owned=True)  # the frame may wait longer than the listener lives
        forwarders.supply(worker, self.forward)
        if fresh:
            self._handler.worker_equipped(name)
            self._relieve()

    def tell(self, name: str, message: link.Message, fds: Iterable[int] = ()) -> None:
        """``fds`` are owned here from now on; dropped when the worker is gone."""
        worker = self.links.get(name)
        if worker is None:
            close_all(fds)
        else:
            worker.send(message, fds, owned=True)

    def _send_svid(self, worker: WorkerLink, held: Held) -> None:
        try:
            fd = sealed_memfd(held.key)
        except OSError as error:
            log.error("memfd_failed", error=str(error))
            return
        worker.svids[held.spiffe] = held.leaf.serial
        worker.send(link.Svid(held.spiffe, held.chain, held.leaf.serial, held.leaf.not_after), [fd], owned=True)

    def stock(self, name: str, netns: int, family: int, fds: list[int]) -> None:
        """Fresh sockets for a worker; owned from here on."""
        worker = self.links.get(name)
        if worker is None:
            close_all(fds)
            return
        self.counts["stock_sent"] += len(fds)
        for start in range(0, len(fds), link.FRAME_FDS_MAX):
            worker.send(link.Stock(netns, family), fds[start : start + link.FRAME_FDS_MAX], owned=True)

    async def scrape(self) -> dict[str, str]:
        """Each worker's metrics text; a worker that does not answer within a second has none."""

        async def one(worker: WorkerLink) -> str:
            if worker.scrape is None or worker.scrape.done():
                worker.scrape = asyncio.get_running_loop().create_future()
                worker.send(link.Scrape())
            try:
                async with asyncio.timeout(SCRAPE_S):
                    return await asyncio.shield(worker.scrape)
            except TimeoutError:
                return ""

        workers = list(self.links.values())
        texts = await asyncio.gather(*(one(worker) for worker in workers))
        return {str(worker.index): text for worker, text in zip(workers, texts, strict=True)}
