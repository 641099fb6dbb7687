"""The end of a worker's service. New connections wait in the backlogs of listeners the agent holds, for a successor;
the next answer on each HTTP connection says that it is the last; one that stays idle is closed; the rest is cut in time. Those
that the kernel carries are left to a successor where one comes, see `express_session.Pair.bequeath`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l7proxy.opaque import Relay
    from l7proxy.session import HttpSession
    from l7proxy.worker import Worker

STOP_S = 3.0  # at SIGTERM; with a successor's start this stays below connect_timeout_s
ENDLESS_PART = 1 / 3  # of the time, for what has no boundary to end at: everything new waits meanwhile
LOOK_S = 0.25


class Drain:
    """Begins at once; ``done`` is called when nothing is left, or ``seconds`` are over."""

    def __init__(self, worker: Worker, seconds: float, done: Callable[[], None]) -> None:
        self._worker, self._done = worker, done
        now = worker.loop.time()
        self._endless_until, self._deadline = now + seconds * ENDLESS_PART, now + seconds
        self._idle: frozenset[HttpSession | Relay] = frozenset()  # at the last look
        for session in list(worker.sessions):
            session.end()
        self._look()

    def _look(self) -> None:
        worker, now = self._worker, self._worker.loop.time()
        if now >= self._endless_until:
            for session in [session for session in worker.sessions if session.endless]:
                session.cut()
        idle = frozenset(session for session in worker.sessions if session.idle)
        for session in idle & self._idle:  # quiet since the last look: not about to ask
            session.end_idle()
        self._idle = idle
        if now >= self._deadline or not (worker.sessions or any(busy() for busy in worker.busy)):
            self._done()
        else:
            worker.loop.call_later(LOOK_S, self._look)
