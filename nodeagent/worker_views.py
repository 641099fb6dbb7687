"""What each proxy worker was told and has acknowledged: a part of the core, without I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mesh import link, snapshot
from mesh.snapshot import Versioned
from nodeagent import reconcile_events as ev

WORKER_ACK_S = 2.0  # past it a worker is dropped and told to the controller; the rest of the node does not wait


@dataclass(slots=True)
class WorkerView:
    """One link."""

    sent: Versioned | None = None  # what it was told last
    local: tuple[link.LocalWorkload, ...] = ()
    generation: int = 0
    acked: str = ""  # digest
    asked_at: float = 0.0
    waiting: bool = False
    refused: str = ""
    leaving: bool = False  # serves what it has until a successor does


class Workers:
    """Commands go to ``out``; ``nack`` tells the controller what a worker could not do."""

    def __init__(self, out: list[ev.Command], nack: Callable[[str], None]) -> None:
        self._out, self._nack = out, nack
        self.views: dict[str, WorkerView] = {}
        self.lagging: dict[str, str] = {}  # did not apply, and still exist: they may serve by an old state
        self.counts = {"wrong_state": 0, "refused": 0, "timeout": 0}
        self._state: Versioned | None = None
        self._local: tuple[link.LocalWorkload, ...] = ()
        self._generation = 0

    def tell(self, state: Versioned, local: tuple[link.LocalWorkload, ...], generation: int, now: float) -> None:
        """The state in force; every worker is brought to it."""
        self._state, self._local, self._generation = state, local, generation
        for name in self.views:
            self._update(name, now)

    def holds(self, name: str) -> bool:
        """Whether the worker acknowledged what is in force."""
        view, state = self.views[name], self._state
        return state is not None and view.sent is state and not view.waiting and view.acked == state.digest

    def leave(self, name: str) -> None:
        if name in self.views:
            self.views[name].leaving = True

    def serving(self) -> dict[str, bool]:
        """Those who take new connections -> whether they hold what is in force."""
        return {name: self.holds(name) for name, view in self.views.items() if not view.leaving}

    def all_hold(self) -> bool:
        return all(self.holds(name) for name in self.views) and not self.lagging

    def waiting(self) -> list[str]:
        """Those that owe an answer."""
        return [name for name, view in self.views.items() if view.waiting and not view.refused]

    def up(self, name: str, now: float) -> None:
        self.views[name] = WorkerView()
        if self._state is not None:
            self._update(name, now)

    def down(self, name: str, gone: bool) -> None:
        self.views.pop(name, None)
        if gone:
            self.lagging.pop(name, None)

    def _update(self, name: str, now: float, full: bool = False) -> None:
        view, state = self.views[name], self._state
        if state is None or (
            not full and view.sent is state and view.local == self._local and view.generation == self._generation
        ):
            if view.acked:
                self._out.append(ev.EquipWorker(name))  # a listener may have become ours at a second try
            return
        if full or view.sent is None:
            update = link.Update(state.revision, True, state.state, (), self._local, self._generation)
        else:
            delta = snapshot.make_delta(view.sent.state, state.state, new_digest="-")
            update = link.Update(state.revision, False, delta.put, delta.delete, self._local, self._generation)
        view.sent, view.local, view.generation = state, self._local, self._generation
        view.waiting, view.asked_at = True, now
        self._out.append(ev.UpdateWorker(name, update))
        if view.acked and not full:
            self._out.append(ev.EquipWorker(name))  # frames keep their order: the state comes first

    def acked(self, name: str, revision: int, digest: str, now: float) -> None:
        view = self.views.get(name)
        if view is None or view.sent is None or revision != view.sent.revision:
            return  # of an update that was followed by another
        view.acked, view.waiting = digest, False
        if digest == view.sent.digest:
            view.refused = ""
            self.lagging.pop(name, None)
            self._out.append(ev.EquipWorker(name))
            return
        self.counts["wrong_state"] += 1
        view.acked = ""
        if view.refused:
            self.lag(name, "holds another state than it was sent, twice")
        else:
            view.refused = "digest"
            self._update(name, now, full=True)

    def refused(self, name: str, error: str, now: float) -> None:
        view = self.views.get(name)
        if view is None or view.sent is None:
            return
        self.counts["refused"] += 1
        if view.refused:  # of a whole state too: a new link will try again
            self.lag(name, error)
        else:
            view.refused = error or "refused"
            self._update(name, now, full=True)

    def late(self, now: float) -> None:
        """Drops those that have not answered in time."""
        for name, view in list(self.views.items()):
            if view.waiting and now - view.asked_at > WORKER_ACK_S:
                self.lag(name, f"did not answer within {WORKER_ACK_S:g} s")

    def lag(self, name: str, why: str) -> None:
        """The worker is dropped; until it has the state, or is gone, nothing is acknowledged."""
        self.counts["timeout"] += 1
        self.views.pop(name, None)
        self.lagging[name] = why
        self._out.append(ev.DropWorker(name, why))
        self._nack(f"proxy worker {name}: {why}")

    def equip(self) -> None:
        """Certificates changed: those that have a state take them."""
        for name, view in self.views.items():
            if view.acked:
                self._out.append(ev.EquipWorker(name))
