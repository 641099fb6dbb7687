"""What a change of the resources would come to, before it is stored: its numbers, what the compiler would say, what is
wrong with it. Pure; `faults` and `compile` take a while for a big mesh, call them in a thread."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from controller import allocate, references
from controller.allocate import KINDS, Ledger, Plan
from controller.catalog import Index, Stored, plain
from controller.references import Fault, Granted, Key
from mesh.compile import Allocations, CompileError, compile_state
from mesh.resources import Workload

COMPILED_KINDS = ("Service", "Workload", "MeshConfig", "NodeGrant")  # what the compiler may refuse
Delta = Mapping[Key, Stored | None]  # None: is to go


@dataclass(frozen=True)
class Standing:
    """The resources, and what stands beside them. revoked: serials, and ``node:<name>`` for each cut node."""

    trust_domain: str
    present: Mapping[Key, Stored]
    index: Index
    ledger: Ledger
    bundle: tuple[str, ...]  # roots, PEM
    revoked: tuple[str, ...]

    def plan(self, delta: Delta) -> Plan:
        """The numbers that ``delta`` needs and frees. Raises Exhausted."""
        return allocate.plan(self.ledger, *self.index.demand(delta, self.present))

    def allocations(
        self, stored: Iterable[Stored], numbers: Mapping[str, Mapping[str, int]], vips: Mapping[str, tuple[str, str]]
    ) -> Allocations:
        """What the compiler is told beside ``stored``."""
        identities, workloads, services = (numbers[kind] for kind in KINDS)
        routes = (item for item in stored if item.resource.key[0] == "HTTPRoute")
        return Allocations(
            identities=identities,
            workloads=workloads,
            services=services,
            vips=vips,
            bundle=self.bundle,
            revoked=self.revoked,
            trust_domain=self.trust_domain,
            created={f"Route/{item.resource.namespace}/{item.resource.name}": item.created for item in routes},
        )

    def compile(self, delta: Delta, grants: Granted) -> None:
        """The whole as it would be. Raises CompileError, Exhausted."""
        plan, wanted = self.plan(delta), applied(self.present, delta)
        numbers = {kind: ChainMap(dict(plan.numbers[kind]), self.ledger.numbers(kind)) for kind in KINDS}
        allocations = self.allocations(wanted.values(), numbers, ChainMap(dict(plan.vips), self.ledger.vips))
        # Workloads of cut nodes included: they may be admitted again, and must fit then.
        compile_state((item.resource for item in wanted.values() if runs(item, grants, frozenset())), allocations)

    def faults(self, delta: Delta, grants: Granted) -> list[Fault]:
        """Everything wrong with what ``delta`` puts. Raises Exhausted."""
        every = plain(applied(self.present, delta))
        changed = [item.resource for item in delta.values() if item is not None]
        found = list(references.faults(changed, every, self.trust_domain, grants))
        # A service that loses a port that a route names is as bad as one that goes.
        moved = {resource.key for resource in changed if resource.key[0] == "Service" and resource.key in self.present}
        if moved and not found:
            touched = [item for item in every.values() if any(key in moved for key, _, _ in references.services_of(item))]
            broken = list(references.faults(touched, every, self.trust_domain, grants))
            blamed = next(iter(sorted(moved)))
            found += [
                Fault(
                    blamed,
                    ("spec", "ports"),
                    f"{'/'.join(fault.key)}: {fault.message}",
                    "keep the port, or change that one first",
                )
                for fault in broken
            ]
        addresses = self.index.addresses_after(delta)
        for workload in changed:
            if isinstance(workload, Workload) and (taken := references.address_owner(workload, addresses)):
                message = f"{taken[0]} belongs to workload {'/'.join(taken[1][1:])} of another node"
                found.append(Fault(workload.key, ("spec", "addresses"), message, "give each workload its own address"))
        # Only these can make the compiler refuse (numbers, ports of an address); ten thousand policies need no rehearsal.
        if not found and any(resource.key[0] in COMPILED_KINDS for resource in changed):
            try:
                self.compile(delta, grants)
            except CompileError as error:
                found.append(Fault(changed[0].key, (), str(error), "change one of them"))
        return found


def applied(present: Mapping[Key, Stored], delta: Delta) -> dict[Key, Stored]:
    """The resources with ``delta`` in."""
    return {key: item for key, item in {**present, **delta}.items() if item is not None}


def runs(stored: Stored, grants: Granted, cut: AbstractSet[str]) -> bool:
    """Whether a resource is compiled: workloads of cut nodes and without a grant are not."""
    resource = stored.resource
    if not isinstance(resource, Workload):
        return True
    return resource.spec.node not in cut and grants(resource.spec.node, resource.namespace, resource.spec.service_account)
