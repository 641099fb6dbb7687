"""Which workloads this node should run and what the controller says about each: a part of the core, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.model import Item, State, Workload
from nodeagent import reconcile_events as ev
from nodeagent.workloads import Spec

RETRY_FIRST_S, RETRY_MAX_S = 0.5, 10.0
RETRIES_MAX = 16  # of the exponent
UNGRANTED = "identity_not_granted"  # the controller's reason: such a workload is none of the mesh's, and holds up nothing
PODS_OFF = "pods are off on this node"  # nor does one that this kernel can not have; what its error begins with
KEPT_OUT = "a program in its own namespace keeps the agent out"  # nor one that is served as soon as it wants to be


@dataclass(slots=True)
class Registration:
    """Of one workload at the controller."""

    spec: Spec | None = None  # as the controller has it
    revision: int = 0
    asking: bool = False
    refused: str = ""  # reason: message
    error: str = ""
    tries: int = 0
    retry_at: float = 0.0


class Roster:
    """Methods return whether the enrolled workloads may be others now; commands go to ``out``."""

    def __init__(self, node: str, out: list[ev.Command]) -> None:
        self._node, self._out = node, out
        self.placed: Mapping[str, ev.Placed] = {}
        self.error = ""
        self.registrations: dict[str, Registration] = {}
        self.refused: dict[str, int] = {}  # counts, by reason
        self.stale: set[str] = set()  # keys to unregister
        self._known = False  # until the specs were told, nobody is missing from them

    def specs(self, event: ev.SpecsChanged) -> bool:
        for key in self.placed.keys() - event.placed.keys():
            if self.registrations.pop(key, None) is not None:
                self.stale.add(key)
        self.stale -= event.placed.keys()
        self.placed, self.error = event.placed, event.error
        self._known = not event.error
        for key in event.placed:
            self.registrations.setdefault(key, Registration())
        return True

    def registered(self, event: ev.Registered) -> bool:
        registration = self.registrations.get(event.spec.key)
        if registration is None:
            self.stale.add(event.spec.key)  # removed meanwhile
            return False
        was_refused, registration.refused = registration.refused, ""
        registration.asking, registration.tries, registration.error = False, 0, ""
        registration.spec, registration.revision = event.spec, event.revision
        return bool(was_refused)

    def register_refused(self, event: ev.RegisterRefused, now: float) -> bool:
        self.refused[event.reason] = self.refused.get(event.reason, 0) + 1
        registration = self.registrations.get(event.spec.key)
        if registration is None:
            return False
        registration.refused = f"{event.reason}: {event.message}" if event.message else event.reason
        registration.spec = None
        self._later(registration, now)
        return True  # it may be enrolled by an older state

    def register_failed(self, event: ev.RegisterFailed, now: float) -> None:
        registration = self.registrations.get(event.spec.key)
        if registration is not None:
            registration.error = event.error
            self._later(registration, now)

    @staticmethod
    def _later(registration: Registration, now: float) -> None:
        registration.asking = False
        registration.retry_at = now + min(RETRY_FIRST_S * 2**registration.tries, RETRY_MAX_S)
        registration.tries = min(registration.tries + 1, RETRIES_MAX)

    def unregistered(self, event: ev.Unregistered) -> None:
        if event.error and event.key not in self.placed:
            self.stale.add(event.key)  # the next tick tries again

    def retry_all(self, now: float) -> None:
        """A stream is open again: no answer is worth waiting longer for."""
        for registration in self.registrations.values():
            registration.retry_at = now

    def ask(self, state: State, revision: int, now: float) -> None:
        """Register and unregister what is due; ``state`` is the newest, of ``revision``."""
        for key, placed in self.placed.items():
            registration = self.registrations[key]
            if registration.asking or now < registration.retry_at or placed.error:
                continue
            lost = revision >= registration.revision and not self._owns(placed.spec, state.get(key))
            if registration.spec != placed.spec or registration.refused or lost:
                registration.asking = True
                self._out.append(ev.Register(placed.spec))
        if not self._known:
            return
        for key in sorted(self.stale - self.placed.keys()):
            self._out.append(ev.Unregister(key))
        self.stale.clear()

    def _owns(self, spec: Spec, item: Item | None) -> bool:
        return (
            isinstance(item, Workload)
            and item.node == self._node
            and item.spiffe.endswith(f"/ns/{spec.namespace}/sa/{spec.service_account}")
            and sorted(item.addresses) == sorted(spec.addresses)
        )

    def enrollable(self, state: State) -> tuple[ev.Enrolled, ...]:
        """What is placed here, not refused, and in the state as this node's with the identity it asked for."""
        out = []
        for key, placed in sorted(self.placed.items()):
            item = state.get(key)
            if placed.error or self.registrations[key].refused:
                continue
            if isinstance(item, Workload) and self._owns(placed.spec, item):
                out.append(ev.Enrolled(placed.spec, placed.netns, placed.cgroup, item))
        return tuple(out)

    def lacks(self, key: str, enrolled: ev.Enrolled | None) -> str:
        """Why a workload is not enrolled as it should be; empty: it is."""
        placed = self.placed.get(key)
        if placed is None:
            return "not a workload of this node"
        if placed.error:
            return placed.error
        registration = self.registrations.get(key, Registration())
        if registration.refused:
            return registration.refused
        if enrolled is None or enrolled.spec != placed.spec:
            return registration.error or ("waiting for the controller's state" if registration.spec else "not registered yet")
        return ""
