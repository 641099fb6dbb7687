"""Which rule denied. The kernel holds entries for what policy allows and none for what it denies, so it tells a denial
without a rule; whoever reads the event asks the evaluator, which decides the same."""

from __future__ import annotations

from mesh.dataplane import BackendEntry, BackendKey, DestKey, NodePlan
from mesh.model import Identity, State, Workload
from mesh.policy import Peer, PolicySet, Request, authorize


class Blame:
    """Under one State and its plan. Indexes are built at the first question; for one thread."""

    def __init__(self, state: State, plan: NodePlan) -> None:
        self._state, self._plan = state, plan
        self._policies: PolicySet | None = None

    def __call__(self, identity: int, workload: int, address: str, port: int, protocol: str) -> str:
        """The rule by which identity (a number) may not reach ``workload`` (a number), asked at address and port; "" if
        none is known, or it may by now."""
        if self._policies is None:
            self._policies = PolicySet(self._state)
            items = self._state.items()
            self._keys = {item.id: key for key, item in items if isinstance(item, Workload)}
            self._spiffes = {item.id: item.spiffe for _, item in items if isinstance(item, Identity)}
        key = self._keys.get(workload)
        if key is None:
            return ""
        asked = Request(self._target(workload, address, port, protocol))
        verdict = authorize(self._policies, Peer(self._spiffes.get(identity), identity), key, asked)
        return "" if verdict.possible else verdict.rule

    def _target(self, workload: int, address: str, port: int, protocol: str) -> int:
        """The workload's own port behind what was asked; that itself if it was no service's."""
        dest = self._plan.dests.get(DestKey(address, port, protocol))
        for slot in range(dest.backends if dest is not None else 0):
            backend: BackendEntry | None = self._plan.backends.get(BackendKey(dest.service, port, slot)) if dest else None
            if backend is not None and backend.workload == workload:
                return backend.port
        return port
