"""The node's recent verdicts: a bounded ring that many readers follow. A slow reader loses flows (counted),
never holds up the node."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import msgspec

from mesh.link import Flow

VERDICTS = frozenset(("allowed", "denied", "audited"))
TEXT_CHARS_MAX = 512  # of each field of a worker's flow; what a worker of ours sends is shorter
SKEW_S_MAX = 60.0  # between a worker's clock and ours: they are one
RING_FLOWS_MAX = 8192
FOLLOWER_FLOWS_MAX = 1024
FOLLOWERS_MAX = 16


class TooManyFollowers(RuntimeError):
    """The limit of followers is reached; close another `pillion flows -f`."""


def of_worker(flow: Flow, node: str, now: float) -> Flow:
    """A flow that a worker sent, as it may be kept and shown: of this node, of about now (unix seconds), each text short."""
    texts = {name: text[:TEXT_CHARS_MAX] for name in flow.__struct_fields__ if isinstance(text := getattr(flow, name), str)}
    when = flow.time if abs(flow.time - now) <= SKEW_S_MAX else now
    return msgspec.structs.replace(flow, **{**texts, "node": node, "time": when})


class FlowRing:
    """Add is O(followers) and never waits."""

    def __init__(self, flows_max: int = RING_FLOWS_MAX) -> None:
        self._ring: deque[Flow] = deque(maxlen=flows_max)
        self._followers: set[asyncio.Queue[Flow]] = set()
        self.seen: dict[str, int] = {}  # verdict -> count
        self.missed = 0  # flows that a slow follower did not get

    def add(self, flow: Flow) -> None:
        self._ring.append(flow)
        self.seen[flow.verdict] = self.seen.get(flow.verdict, 0) + 1
        for queue in self._followers:
            try:
                queue.put_nowait(flow)
            except asyncio.QueueFull:
                self.missed += 1

    def last(self, limit: int) -> list[Flow]:
        """The newest ``limit`` flows, oldest first."""
        flows = list(self._ring)
        return flows[-limit:] if limit > 0 else []

    @property
    def crowded(self) -> bool:
        """Whether nobody else may `follow`."""
        return len(self._followers) >= FOLLOWERS_MAX

    async def follow(self, limit: int) -> AsyncIterator[Flow]:
        """The newest ``limit``, then each as it comes. Raises TooManyFollowers."""
        if self.crowded:
            raise TooManyFollowers(f"{FOLLOWERS_MAX} readers follow the flows already; close one")
        queue: asyncio.Queue[Flow] = asyncio.Queue(FOLLOWER_FLOWS_MAX)
        self._followers.add(queue)
        try:
            for flow in self.last(limit):
                yield flow
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)
