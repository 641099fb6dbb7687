"""The agent's core, without I/O: events in, commands out. One rollout at a time takes a new state through

    kernel maps -> every connected proxy worker -> disk -> denied connections ended -> ack to the controller

so that an acknowledged revision is one the whole node enforces. What arrives meanwhile waits and is merged: only the
newest counts. Nothing here can raise on outside input; the old state stands until the new one is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mesh import link, snapshot
from mesh.model import CONFIG_KEY
from mesh.snapshot import Versioned
from nodeagent import reconcile_events as ev
from nodeagent.readiness import Facts, Readiness, assess
from nodeagent.rollout import Counts, Rollout
from nodeagent.roster import KEPT_OUT, PODS_OFF, UNGRANTED, Roster
from nodeagent.states import Intake, generation_changes
from nodeagent.worker_views import WORKER_ACK_S, Workers

REPAIR_EVERY_S = 5.0
ROLLOUT_S = 2 * WORKER_ACK_S  # a node that needs longer is not ready


class Reconciler:
    """`handle` is the only entrance; the attributes may be read for status."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.counts = Counts()
        self.applied: Versioned | None = None  # received revision that is in the kernel
        self.enforced = Versioned.empty()  # what of it is enforced: all, or almost nothing when cut
        self.enrolled: tuple[ev.Enrolled, ...] = ()
        self.generation = 0
        self.kernel_digest = ""
        self.kernel_error = ""
        self.persist_error = ""
        self.programs: Mapping[str, bool] = {}
        self._out: list[ev.Command] = []
        self.intake = Intake(node, self._out)
        self.roster = Roster(node, self._out)
        self.workers = Workers(self._out, self._nack_worker)
        self.connected = False
        self.readiness = Readiness(False, "starting")
        self._by_key: dict[str, ev.Enrolled] = {}
        self._serving: frozenset[str] = frozenset()
        self._listener_errors: Mapping[str, str] = {}
        self._svids: frozenset[str] = frozenset()
        self._svid_errors: Mapping[str, str] = {}
        self._wanted_svids: frozenset[str] | None = None
        self._drift = False
        self._rollout: Rollout | None = None
        self._dirty = False
        self._ending_due = True  # at start: connections of before may be denied now
        self._persisted_digest = ""
        self._token = 0
        self._acked: tuple[int, str] | None = None
        self._nacked = ""
        self._told: Readiness | None = None
        self._repair_at = self._retry_at = 0.0
        self._repairing = False
        self._now = 0.0

    # ---- the entrance

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """What to do about it. ``now``: monotonic seconds."""
        self._now = now
        self._handlers[type(event)](self, event)
        self._ack()  # what is done, before the next rollout begins
        self._pump()
        self._ack()
        self._tell_readiness()
        out = list(self._out)
        self._out.clear()
        return out

    @property
    def received(self) -> Versioned:
        """The newest from the controller."""
        return self.intake.newest

    @property
    def resume(self) -> int:
        """The revision a new stream continues from: the controller takes it as enforced. 0: send everything."""
        return self.received.revision if self.applied is self.received and self.settled and not self.intake.cut else 0

    def lacks(self, key: str) -> str:
        """What a workload of this node still needs before it is enforced and served; empty: nothing."""
        enrolled = self.enrolled_as(key)
        missing = self.roster.lacks(key, enrolled)
        if missing or enrolled is None:
            return missing
        if key in self._listener_errors:
            return self._listener_errors[key]
        if key not in self._serving:
            return "no listeners yet"
        if enrolled.item.spiffe not in self._svids:
            return f"no certificate: {self._svid_errors.get(enrolled.item.spiffe, 'not issued yet')}"
        return ""

    def unserved(self) -> tuple[dict[str, str], dict[str, str]]:
        """Workload -> what it lacks: those that will be served, and those that can not be here, which hold up nothing."""
        lacking = {key: text for key in self.roster.placed if (text := self.lacks(key))}
        refused = {key: text for key, text in lacking.items() if text.startswith((UNGRANTED, PODS_OFF, KEPT_OUT))}
        return {key: text for key, text in lacking.items() if key not in refused}, refused

    def enrolled_as(self, key: str) -> ev.Enrolled | None:
        """The workload as it is enforced now."""
        return self._by_key.get(key)

    # ---- the controller's stream

    def _up(self, _: ev.ControllerUp) -> None:
        self.connected = True
        self._acked, self._told, self._nacked = None, None, ""
        self.roster.retry_all(self._now)

    def _receive(self, event: ev.Received) -> None:
        if self.intake.receive(event.message):
            self._acked = None  # every frame wants an answer, a repeated one too
            self._dirty, self._retry_at = True, 0.0

    def _cut_off(self, _: ev.CutOff) -> None:
        self._dirty |= self.intake.cut_off()

    def _restore(self, event: ev.Restored) -> None:
        self.generation = event.generation
        self._persisted_digest = event.state.digest
        self.intake.take(event.state)
        self._dirty = True

    # ---- workloads

    def _specs(self, event: ev.SpecsChanged) -> None:
        self._dirty |= self.roster.specs(event)

    def _registered(self, event: ev.Registered) -> None:
        self._dirty |= self.roster.registered(event)

    def _register_refused(self, event: ev.RegisterRefused) -> None:
        self._dirty |= self.roster.register_refused(event, self._now)

    # ---- the rollout

    def _pump(self) -> None:
        if self._rollout is None and self._dirty and self.programs and self._now >= self._retry_at:
            self._dirty = False
            self._start()

    def _start(self) -> None:
        enrolled = () if self.intake.cut else self.roster.enrollable(self.received.state)
        received = self.received
        if not received.revision:
            enforced = Versioned.empty()
        elif self.intake.cut:
            enforced = Versioned.of({CONFIG_KEY: received.state[CONFIG_KEY]}, received.revision)
        else:
            enforced = received
        spiffes = frozenset(entry.item.spiffe for entry in enrolled)
        if spiffes != self._wanted_svids:
            self._wanted_svids = spiffes
            self._out.append(ev.WantSvids(spiffes))
        same = enrolled == self.enrolled and enforced.digest == self.enforced.digest and self.applied is not None
        if same and not self.kernel_error and not self._listener_errors:
            self.applied = received  # a revision that changes nothing here
            return
        if CONFIG_KEY not in enforced.state:
            return  # no state yet: members stay unknown, so everything is denied
        generation = self.generation
        if self.applied is None or generation_changes(self.enforced.state, enforced.state) or self._left(enrolled):
            generation += 1
            self._ending_due = True
        self._token += 1
        self._rollout = Rollout(self._token, received, enforced, enrolled, generation, started_at=self._now)
        self._out.append(ev.ApplyKernel(self._token, received.revision, enforced.state, enrolled, generation))

    def _left(self, enrolled: tuple[ev.Enrolled, ...]) -> bool:
        """Whether a workload is enforced no more, or in another place."""
        after = {entry.spec.key: (entry.netns, entry.cgroup) for entry in enrolled}
        return any(after.get(entry.spec.key) != (entry.netns, entry.cgroup) for entry in self.enrolled)

    def _kernel_applied(self, event: ev.KernelApplied) -> None:
        rollout = self._rollout
        if rollout is None or rollout.token != event.token:
            return
        self.counts.rollouts += 1
        self.applied, self.enforced, self.enrolled = rollout.received, rollout.enforced, rollout.enrolled
        self._by_key = {entry.spec.key: entry for entry in self.enrolled}
        self.generation, self.kernel_digest, self.kernel_error = rollout.generation, event.digest, ""
        self._serving, self._listener_errors = event.serving, event.errors
        self._drift = False
        if event.errors:
            self._retry_later()
        rollout.stage, rollout.deadline = "workers", self._now + WORKER_ACK_S
        local = tuple(link.LocalWorkload(entry.spec.key, entry.netns, entry.cgroup) for entry in self.enrolled)
        self.workers.tell(self.enforced, local, self.generation, self._now)
        self._out.append(ev.Persist(rollout.token, rollout.received, rollout.generation))
        self._advance()

    def _kernel_failed(self, event: ev.KernelFailed) -> None:
        rollout = self._rollout
        if rollout is None or rollout.token != event.token:
            return
        self._rollout = None
        self.counts.kernel_failed += 1
        self.kernel_error = event.error
        self._nack(rollout.received.revision, event.error)
        self._retry_later()

    def _retry_later(self) -> None:
        self._dirty = True
        self._retry_at = self._now + REPAIR_EVERY_S / 2

    def _advance(self) -> None:
        """Moves the rollout on when the workers have answered, and finishes it when all is done."""
        rollout = self._rollout
        if rollout is None:
            return
        if rollout.stage == "workers":
            late = self.workers.waiting()
            if late and self._now < rollout.deadline:
                return
            for name in late:
                self.workers.lag(name, f"did not apply revision {rollout.received.revision} within {WORKER_ACK_S:g} s")
            rollout.stage = "end"
            if self._ending_due:
                self._out.append(ev.EndDenied(rollout.token))
                return
            rollout.stage = "done"
        if rollout.stage == "done" and not rollout.persisting:
            self._rollout = None

    def _ended(self, event: ev.Ended) -> None:
        rollout = self._rollout
        if rollout is None or rollout.token != event.token or rollout.stage != "end":
            return
        self.counts.ended += event.connections
        rollout.stage = "done"
        if event.error:
            self.kernel_error = event.error
            self._nack(rollout.received.revision, event.error)
            self._retry_later()
        else:
            self._ending_due = False
        self._advance()

    def _persisted(self, event: ev.Persisted) -> None:
        rollout = self._rollout
        if rollout is None or rollout.token != event.token:
            return
        rollout.persisting = False
        if event.error:
            if not self.persist_error:
                self._nack(rollout.received.revision, f"cannot keep the state: {event.error}")
            self.persist_error = event.error
        else:
            self.persist_error = ""
            self._persisted_digest = rollout.received.digest
        self._advance()

    def _ack(self) -> None:
        """Tells the controller what this node enforces, once, and never earlier."""
        applied = self.applied
        if not self.connected or applied is None or not self.settled:
            return
        if self._acked != (applied.revision, applied.digest):
            self._acked = applied.revision, applied.digest
            self._nacked = ""
            self._out.append(ev.Send(snapshot.Ack(applied.revision, applied.digest)))

    @property
    def settled(self) -> bool:
        """Whether `applied` is in force everywhere on this node, denied connections ended, and kept on disk."""
        if self._rollout is not None or self.applied is None or self.kernel_error or self._drift:
            return False
        return self._persisted_digest == self.applied.digest and self.workers.all_hold()

    def _nack(self, revision: int, error: str) -> None:
        text = f"{revision}: {error}"
        if self.connected and text != self._nacked:
            self._nacked = text
            self._out.append(ev.Send(snapshot.Nack(revision, error)))

    def _nack_worker(self, error: str) -> None:
        self._nack(self.received.revision, error)

    # ---- proxy workers

    def _worker_down(self, event: ev.WorkerDown) -> None:
        self.workers.down(event.worker, event.gone)
        self._advance()

    def _worker_acked(self, event: ev.WorkerAcked) -> None:
        self.workers.acked(event.worker, event.revision, event.digest, self._now)
        self._advance()

    def _worker_refused(self, event: ev.WorkerRefused) -> None:
        self.workers.refused(event.worker, event.error, self._now)
        self._advance()

    # ---- the rest

    def _started(self, event: ev.Started) -> None:
        self.programs = dict(event.programs)
        self._dirty = True

    def _svids_changed(self, event: ev.SvidsChanged) -> None:
        self._svids, self._svid_errors = event.held, event.errors
        self.workers.equip()

    def _observed(self, event: ev.Observed) -> None:
        self._repairing = False
        if self._rollout is not None:
            return  # looked at while it changed
        self.counts.repaired += event.repaired
        drift = bool(event.error) or (self.applied is not None and event.digest != self.kernel_digest)
        if drift:
            self._dirty = True
            self.kernel_error = self.kernel_error or event.error or "maps differ from what was applied"
        self._drift = drift

    def _tick(self, _: ev.Tick) -> None:
        self._advance()
        if self.connected:
            self.roster.ask(self.received.state, self.received.revision, self._now)
        if self._rollout is None:
            self.workers.late(self._now)
        if self.applied is not None and self._rollout is None and self._now >= self._repair_at and not self._repairing:
            self._repair_at = self._now + REPAIR_EVERY_S
            self._repairing = True
            self._out.append(ev.Repair())
        if self.persist_error and self._rollout is None:
            self._retry_persist()

    def _retry_persist(self) -> None:
        if self.applied is None:
            return
        self._token += 1
        rollout = Rollout(self._token, self.applied, self.enforced, self.enrolled, self.generation, "done", self._now)
        self._rollout = rollout
        self._out.append(ev.Persist(rollout.token, rollout.received, rollout.generation))

    def _tell_readiness(self) -> None:
        rollout = self._rollout
        served = bool(serving := self.workers.serving()) and not self.workers.lagging
        if served and rollout is not None and self.readiness.ready and self._now - rollout.started_at < ROLLOUT_S:
            return  # an ordinary change makes no node unready
        waiting, refused = self.unserved()
        self.readiness = assess(
            Facts(
                programs=self.programs,
                revision=self.applied.revision if self.applied else 0,
                applied=self.applied is not None and self.applied.digest == self.received.digest and self._rollout is None,
                kernel_error=self.kernel_error,
                kernel_drift=self._drift,
                persist_error=self.persist_error,
                cut=self.intake.cut,
                specs_error=self.roster.error,
                workers=serving,
                lagging=tuple(sorted(self.workers.lagging)),
                waiting=waiting,
                refused=refused,
            )
        )
        if self.connected and self.readiness != self._told:
            self._told = self.readiness
            self._out.append(ev.Send(snapshot.Ready(self.readiness.ready, self.readiness.detail)))

    _handlers: Mapping[type, Callable[[Any, Any], None]] = {  # each takes its own event
        ev.Restored: _restore,
        ev.Started: _started,
        ev.ControllerUp: _up,
        ev.ControllerDown: lambda core, _: setattr(core, "connected", False),
        ev.Received: _receive,
        ev.Garbled: lambda core, event: core.intake.refuse(core.received.revision, event.error),
        ev.CutOff: _cut_off,
        ev.SpecsChanged: _specs,
        ev.Registered: _registered,
        ev.RegisterRefused: _register_refused,
        ev.RegisterFailed: lambda core, event: core.roster.register_failed(event, core._now),
        ev.Unregistered: lambda core, event: core.roster.unregistered(event),
        ev.KernelApplied: _kernel_applied,
        ev.KernelFailed: _kernel_failed,
        ev.Ended: _ended,
        ev.Persisted: _persisted,
        ev.Observed: _observed,
        ev.WorkerUp: lambda core, event: core.workers.up(event.worker, core._now),
        ev.WorkerDown: _worker_down,
        ev.WorkerLeaving: lambda core, event: core.workers.leave(event.worker),
        ev.WorkerAcked: _worker_acked,
        ev.WorkerRefused: _worker_refused,
        ev.SvidsChanged: _svids_changed,
        ev.Tick: _tick,
    }
