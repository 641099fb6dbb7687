"""What each worker may have of what all of a node's workers have together: places in the kernel, and turns of the one thread
that asks it. One that is mad, hostile, or drains with all it has, leaves room for the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from mesh.link import LEG_ASKS_MAX, PAIR_ASKS_MAX

TIMES_FREE = 3  # so many times as many as are free is one worker's share: of one alone three quarters, of two three sevenths each
QUEUE_MAX = 4096  # questions that wait, of all
ASKS_MAX = 4 * (PAIR_ASKS_MAX + LEG_ASKS_MAX)  # of one: what it has given up waiting for may be here still when it asks again


def too_many(taken: Collection[tuple[str, int]], worker: str, most: int) -> bool:
    """Whether it may take no more places, of ``most``. The kernel does without, later than for who has fewer."""
    free = most - len(taken)  # while that is more than a quarter, nobody is counted
    return 4 * free <= most and sum(owner == worker for owner, _ in taken) >= TIMES_FREE * free


class Turns:
    """What waits for the thread, by worker. Of the loop alone. ``ends_max``: of messages that end something."""

    def __init__(self, ends_max: int) -> None:
        self._ends_max = ends_max
        self.asks: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()

    def ask(self, worker: str) -> bool:
        """One more question, until `answered`; False: not now."""
        if self.asks[worker] >= ASKS_MAX or self.asks.total() >= QUEUE_MAX:
            return False
        self.asks[worker] += 1
        return True

    def answered(self, worker: str) -> None:
        _less(self.asks, worker)

    def end(self, worker: str) -> str:
        """One more that ends something, until `ended`. Not of whom this names, if anybody: it ends more than there can be."""
        self.ends[worker] += 1
        if self.ends.total() <= self._ends_max:
            return ""
        most = max(self.ends, key=self.ends.__getitem__)
        if most == worker:
            _less(self.ends, worker)
        return most

    def ended(self, worker: str) -> None:
        _less(self.ends, worker)


def _less(counter: Counter[str], worker: str) -> None:
    counter[worker] -= 1
    if counter[worker] <= 0:
        del counter[worker]
