"""Compiles the registry into one State for each change and wakes the streams; what each node knows is kept here.

Compilation is debounced: changes that arrive together are compiled once. The published revision is always one that
a transaction returned, so "wait until every node has revision N" means what an operator expects.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from controller.events import Telemetry
from controller.inputs import Inputs
from controller.registry import Registry
from mesh.compile import Compilation, Reach
from mesh.model import State
from mesh.snapshot import Versioned

DEBOUNCE_S = 0.02
RETRY_S = 1.0
GONE_S = 3600.0  # what a node had that has been away for so long is forgotten; it begins with a snapshot
INFLIGHT_MAX = 4  # deltas sent to a node and not yet answered; past it changes gather

log = structlog.get_logger()


@dataclass
class NodeView:
    """What the controller knows of one node. ``base``: what it said it has; ``inflight``: sent, not answered."""

    name: str
    connected: bool = False
    left: float = 0.0  # when it was last not connected any more, by time.monotonic
    ready: bool = False
    detail: str = ""
    error: str = ""
    digest_ok: bool = True
    base: Versioned | None = None
    inflight: dict[int, Versioned] = field(default_factory=dict)
    repair: bool = True  # the next frame must be a whole snapshot
    epoch: int = 0  # changes when what the node has became unknown: a frame prepared before is void
    close: Callable[[str], None] | None = None  # ends the open stream, with a reason

    @property
    def acked(self) -> int:
        return self.base.revision if self.base else 0

    @property
    def last(self) -> Versioned | None:
        """The newest state that was sent."""
        return next(reversed(self.inflight.values())) if self.inflight else self.base

    def acknowledge(self, revision: int, digest: str) -> None:
        """Takes an ack; a wrong digest or an unknown revision asks for repair."""
        sent = self.inflight.get(revision)
        if sent is None:
            return  # of a frame before a repair, or twice
        for older in [known for known in self.inflight if known <= revision]:
            del self.inflight[older]
        if sent.digest == digest:
            self.base, self.digest_ok, self.error = sent, True, ""
        else:
            self.digest_ok, self.error = False, f"digest of revision {revision} differs; sending the whole state again"
            self.forget()

    def refuse(self, revision: int, error: str) -> None:
        """Takes a nack."""
        self.error = f"revision {revision}: {error}"[:1000]
        self.forget()

    def forget(self) -> None:
        """What the node has is unknown; acks of older frames will mean nothing."""
        self.base, self.repair = None, True
        self.epoch += 1
        self.inflight.clear()


class Publisher:
    """Owns the published State and the node views."""

    def __init__(self, registry: Registry, telemetry: Telemetry) -> None:
        self._registry, self._telemetry = registry, telemetry
        self.revision = 0
        self.state: State = {}  # changed in a thread: ask it for single keys, or `whole`
        self.nodes: dict[str, NodeView] = {}
        self._compilation: Compilation | None = None  # none: the next one begins with all there is
        self._reach = Reach({})
        self._lock = threading.Lock()  # of all of the above: frames are made in threads
        self._changed = asyncio.Condition()
        self.error = ""

    def node(self, name: str) -> NodeView:
        return self.nodes.setdefault(name, NodeView(name))

    async def run(self) -> None:
        """Compiles whenever the registry is ahead; ends only by cancellation."""
        while True:
            await self._registry.newer_than(self.revision)
            await asyncio.sleep(DEBOUNCE_S if self.revision else 0)
            if not await self.attempt():
                await asyncio.sleep(RETRY_S)

    async def attempt(self) -> bool:
        """Compiles; on a failure nodes keep the last good state and the operator sees why in status."""
        try:
            await self.compile()
        except Exception as error:
            self._compilation = None  # what was new may be lost half way: the next one begins with all there is
            self.error = f"revision {self._registry.revision} cannot be compiled: {error!r}"
            log.exception("compile failed", revision=self._registry.revision)
            await self.wake()
            return False
        return True

    async def compile(self) -> None:
        """Compiles what is new in the registry and publishes the result."""
        inputs = self._registry.inputs(whole=self._compilation is None)
        started = time.perf_counter()
        await asyncio.to_thread(self._compile, inputs)
        self._telemetry.compile_seconds.observe(time.perf_counter() - started)
        self._telemetry.revision.set(inputs.revision)
        self._telemetry.resources.set(inputs.resources)
        for kind, given in self._registry.given().items():
            self._telemetry.numbers.labels(kind).set(given)
        self.error = ""
        await self.wake()

    def _compile(self, inputs: Inputs) -> None:
        with self._lock:
            known, self._compilation = self._compilation, None  # one that failed half way is of no use
            compilation = known or Compilation()
            changed = compilation.change(inputs.changes, inputs.allocations)
            if known is None:
                compilation.take(changed)
                self._reach = Reach(compilation.state)
            else:
                try:
                    self._reach.change(changed.put, changed.gone)
                except BaseException:
                    self._reach = Reach(self.state)  # the last good one
                    raise
                compilation.take(changed)
            self._compilation, self.state, self.revision = compilation, compilation.state, inputs.revision

    async def forget_gone(self) -> None:
        """What nodes had that went: of each it is memory, and work at every change."""
        now = time.monotonic()
        gone = [view for view in self.nodes.values() if not view.connected and now - view.left >= GONE_S]
        for view in gone:
            view.forget()
        await asyncio.to_thread(self._forget, [view.name for view in gone])

    def _forget(self, names: list[str]) -> None:
        with self._lock:
            for name in names:
                self._reach.forget(name)

    async def wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until ``condition()``; it is looked at after every publication, ack and (dis)connection."""
        async with self._changed:
            await self._changed.wait_for(condition)

    def for_node(self, name: str) -> Versioned:
        """The published state as ``name`` may see it, with its digest. Computes; call it in a thread."""
        with self._lock:
            return Versioned(self.revision, *self._reach.part(name))

    def whole(self) -> tuple[int, State]:
        """The published revision and state, for one who takes his time. Copies; call it in a thread."""
        with self._lock:
            return self.revision, dict(self.state)
