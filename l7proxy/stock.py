"""The proxy can make no socket: it takes them from the stock the agent keeps filled, one shelf for each netns and family."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from time import monotonic

from l7proxy.transport import bound

SHELF_MIN = 64
SHELF_MAX = 4096
LAST_S = 120.0  # the stock should outlive the agent by this, less a quarter, at the rate sockets are taken
WAITING_MAX = 4096  # dials that wait for a shelf to be filled

Taker = Callable[[socket.socket | None], None]


class Shelf:
    """Sockets of one netns and family."""

    __slots__ = ("asked", "asked_at", "since", "sockets", "taken", "waiting", "want")

    def __init__(self) -> None:
        self.sockets: deque[socket.socket] = deque()
        self.waiting: deque[tuple[float, Taker]] = deque()
        self.want = SHELF_MIN
        self.asked = 0  # on their way
        self.asked_at = 0.0
        self.taken = 0  # since the last sweep
        self.since = monotonic()


class Stock:
    """``need(netns, family, count)`` asks the agent for more."""

    def __init__(self, need: Callable[[int, int, int], object]) -> None:
        self._need = need
        self._shelves: dict[tuple[int, int], Shelf] = {}

    def shelf(self, netns: int, family: int) -> Shelf:
        found = self._shelves.get((netns, family))
        if found is None:
            found = self._shelves[netns, family] = Shelf()
        return found

    def take(self, netns: int, family: int) -> socket.socket | None:
        """A fresh unconnected socket, at once or not at all."""
        shelf = self.shelf(netns, family)
        found = shelf.sockets.popleft() if shelf.sockets else None
        if found is not None:
            shelf.taken += 1
        if len(shelf.sockets) + shelf.asked < shelf.want * 3 // 4 or found is None:
            self._ask(netns, family, shelf)
        return found

    def wait(self, netns: int, family: int, callback: Taker, timeout_s: float = 5.0) -> None:
        """``callback`` gets the next socket, or None after the timeout; never from within this call."""
        shelf = self.shelf(netns, family)
        shelf.waiting.append((monotonic() + (timeout_s if len(shelf.waiting) < WAITING_MAX else 0.0), callback))
        self._ask(netns, family, shelf)

    def add(self, netns: int, family: int, fds: list[int]) -> None:
        """Sockets from the agent; what is over the limit is closed."""
        shelf = self.shelf(netns, family)
        shelf.asked = max(0, shelf.asked - len(fds))
        for fd in fds:
            sock = socket.socket(family, socket.SOCK_STREAM, 0, fileno=fd)
            sock.setblocking(False)
            bound(sock)
            if shelf.waiting:
                shelf.taken += 1
                shelf.waiting.popleft()[1](sock)
            elif len(shelf.sockets) < SHELF_MAX:
                shelf.sockets.append(sock)
            else:
                sock.close()

    def sweep(self, netns_here: frozenset[int]) -> None:
        """Once a second: gives up on waiters, follows the rate, drops shelves of workloads that are gone."""
        now = monotonic()
        for key, shelf in list(self._shelves.items()):
            while shelf.waiting and shelf.waiting[0][0] <= now:
                shelf.waiting.popleft()[1](None)
            rate = shelf.taken / max(0.5, now - shelf.since)
            shelf.want = max(SHELF_MIN, min(SHELF_MAX, int(max(rate * LAST_S, shelf.want * 0.98))))
            shelf.taken, shelf.since = 0, now
            if shelf.asked and now - shelf.asked_at > 2.0:
                shelf.asked = 0  # the agent was away; ask again
            if key[0] not in netns_here and not shelf.waiting:
                for sock in shelf.sockets:
                    sock.close()
                del self._shelves[key]
            elif len(shelf.sockets) + shelf.asked < shelf.want * 3 // 4:
                self._ask(*key, shelf)

    def counts(self) -> dict[tuple[int, int], int]:
        """Sockets at hand for each netns and family."""
        return {key: len(shelf.sockets) for key, shelf in self._shelves.items()}

    def relink(self) -> None:
        """A new link: what was asked for on the old one will not come."""
        for key, shelf in self._shelves.items():
            shelf.asked = 0
            if len(shelf.sockets) < shelf.want:
                self._ask(*key, shelf)

    def _ask(self, netns: int, family: int, shelf: Shelf) -> None:
        count = max(shelf.want, len(shelf.waiting)) - len(shelf.sockets) - shelf.asked
        if count > 0:
            shelf.asked += count
            shelf.asked_at = monotonic()
            self._need(netns, family, count)
