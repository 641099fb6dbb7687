"""What a node may take of the mesh's numbers. They never come back, since somewhere in a kernel one may still stand for what
is gone; so a node that registers and removes for ever would take them from all. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

NUMBERS_AT_ONCE = 10_000  # of workloads and identities: as many as a node has workloads, ten times over
NUMBERS_PER_S = 1.0  # afterwards; at that pace one node needs 17 years for all there are
NODES_KEPT = 4_096  # past it those that have everything again are forgotten


class Allowance:
    """For each node so much at once, and so much a second. ``now``: seconds of a clock that does not jump. ``owed_s``: what
    `owed` told of nodes before a restart."""

    def __init__(self, now: Callable[[], float], owed_s: Mapping[str, float] | None = None) -> None:
        self._now = now
        # By node: when nothing it took counts any more. No more than all at once counts, whatever became of the clocks
        most_s, began = NUMBERS_AT_ONCE / NUMBERS_PER_S, now()
        self._full_at = {node: began + min(seconds, most_s) for node, seconds in (owed_s or {}).items()}

    def take(self, node: str, numbers: int) -> float:
        """Takes them if the node may, and is 0 then; else seconds until it may."""
        now = self._now()
        full_at = max(now, self._full_at.get(node, now)) + numbers / NUMBERS_PER_S
        late = full_at - now - NUMBERS_AT_ONCE / NUMBERS_PER_S
        if numbers and late > 1e-6:
            return late
        if numbers:
            self._full_at[node] = full_at
            if len(self._full_at) > NODES_KEPT:
                self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        return 0.0

    def owed(self, node: str) -> float:
        """Seconds until nothing it took counts any more."""
        now = self._now()
        return max(0.0, self._full_at.get(node, now) - now)
