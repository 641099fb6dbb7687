"""The end of a worker's service. New connections wait in the backlogs of listeners the agent holds, or are a successor's;
the next answer on each HTTP connection says that it is the last; one that stays idle is closed; the rest is cut when its time
is over. Those that the kernel carries are left to a successor where one comes, see `express_session.Pair.bequeath`.

Two ways: a worker that is stopped has seconds. One whose proxy is restarted by plan serves on until workers of a newer
generation do, and then goes on with what is open for as long as that lasts, or `--drain-limit-s`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh import link

if TYPE_CHECKING:
    from l7proxy.opaque import Relay
    from l7proxy.session import HttpSession
    from l7proxy.worker import Worker

LIMIT_S = 600.0  # of a planned end, where no other is given
STOP_S = 3.0  # at SIGTERM; with a successor's start this stays below connect_timeout_s
ENDLESS_PART = 1 / 3  # of these seconds, for what has no boundary to end at: everything new waits meanwhile
SUCCESSOR_S = 60.0  # at a planned end: nobody has come by then, and nobody may; a start has taken half of that in emulation
IDLE_S = 5.0  # with time enough, a connection is closed that has been idle for so long; its next answer would have said it
ANSWERS_S = 6.0  # of resolvers outside, to questions that were asked before
LOOK_S = 0.25


class Ending:
    """A worker's: how it is told, and what it tells the agent."""

    def __init__(self, worker: Worker, done: Callable[[], None]) -> None:
        self._worker, self._done = worker, done
        self._retiring, self._until = False, 0.0
        self._drain: Drain | None = None

    def stop(self) -> None:
        """Polite: what runs may end within a few seconds, and who comes after us goes on with what the kernel carries."""
        if not self._retiring:
            self._worker.succeeded = self._worker.send(link.Leaving())
        self._begin(STOP_S, patient=False)

    def retire(self, limit_s: float) -> None:
        """Serves on until the agent says that a successor does."""
        worker = self._worker
        if self._retiring or worker.draining:
            return
        self._retiring, self._until = True, worker.loop.time() + limit_s
        if not worker.listeners and not worker.sessions:
            self._begin(limit_s, patient=True)
            return
        self.linked()
        worker.loop.call_later(min(SUCCESSOR_S, limit_s), self._alone)

    def linked(self) -> None:
        """The agent has dialled, perhaps another one."""
        if self._retiring:
            self._worker.send(link.Leaving(max(0.001, self._until - self._worker.loop.time())))

    def told(self, seconds: float) -> None:
        """The agent's `Drain`."""
        if self._retiring:
            self._worker.succeeded = True
            seconds = min(seconds, self._until - self._worker.loop.time())
        self._begin(seconds, patient=self._retiring)

    def _alone(self) -> None:
        if not self._worker.draining:
            self._worker.log.warning("no successor serves; nothing new is taken any more", waited_s=SUCCESSOR_S)
            self._begin(self._until - self._worker.loop.time(), patient=True)

    def _begin(self, seconds: float, *, patient: bool) -> None:
        worker = self._worker
        if self._drain is not None:
            self._drain.hasten(seconds)
            return
        worker.draining = True
        worker.close_listeners(all_of_them=False)
        if worker.succeeded and patient:
            worker.loop.call_later(ANSWERS_S, worker.close_listeners)
        for hook in worker.on_drain:
            hook(seconds)
        self._drain = Drain(worker, seconds, self._over, patient=patient)

    def _over(self, cut: int) -> None:
        worker = self._worker
        worker.log.info("drained", cut=cut)
        worker.send(link.Drained(cut))
        worker.loop.call_soon(self._done)  # when that is sent


class Drain:
    """Begins at once; ``done`` is called when nothing is left, or ``seconds`` are over, with how many are to be cut then.
    ``patient``: nothing new waits for the end, so nothing is cut before it."""

    def __init__(self, worker: Worker, seconds: float, done: Callable[[int], None], *, patient: bool = False) -> None:
        self._worker, self._done = worker, done
        now = worker.loop.time()
        self._deadline = now + seconds
        self._endless_until = self._deadline if patient else now + seconds * ENDLESS_PART
        self._idle_s = IDLE_S if patient else 0.0
        self._idle: dict[HttpSession | Relay, float] = {}  # since when
        self._cut = 0
        for session in list(worker.sessions):
            session.end()
        self._look()

    def hasten(self, seconds: float) -> None:
        """If that is less than there is. The same deadline told again, some milliseconds of work later, is not."""
        now = self._worker.loop.time()
        if now + seconds < self._deadline - LOOK_S:
            self._deadline = now + seconds
            self._endless_until = now + seconds * ENDLESS_PART
            self._idle_s = 0.0

    def _look(self) -> None:
        worker, now = self._worker, self._worker.loop.time()
        if now >= self._endless_until:
            for session in [session for session in worker.sessions if session.endless]:
                session.cut()
                self._cut += 1
        self._idle = {session: self._idle.get(session, now) for session in worker.sessions if session.idle}
        for session, since in self._idle.items():
            if since < now and now - since >= self._idle_s:  # quiet since the last look: not about to ask
                session.end_idle()
        if now >= self._deadline or not (worker.sessions or any(busy() for busy in worker.busy)):
            self._done(self._cut + sum(not session.idle and not session.endless for session in worker.sessions))
        else:
            worker.loop.call_later(LOOK_S, self._look)
