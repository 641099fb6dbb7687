"""What a change of the resources would come to, before it is stored: its numbers, what the compiler would say, what is
wrong with it. Pure; takes a while for a big mesh, call it in a thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from controller import allocate, references
from controller.allocate import Ledger
from controller.catalog import Stored, addresses_of, plain
from controller.references import Fault, Granted, Key
from controller.store import Op
from mesh.compile import Allocations, CompileError, compile_state, needs
from mesh.resources import Resource, Workload

COMPILED_KINDS = ("Service", "Workload", "MeshConfig", "NodeGrant")  # what the compiler may refuse


@dataclass(frozen=True)
class Standing:
    """What stands beside the resources. revoked: serials, and ``node:<name>`` for each cut node."""

    trust_domain: str
    ledger: Ledger
    bundle: tuple[str, ...]  # roots, PEM
    revoked: tuple[str, ...]

    def numbers(self, wanted: Mapping[Key, Stored]) -> tuple[Ledger, Sequence[Op]]:
        """The ledger with the numbers ``wanted`` needs, and the writes that make it so. Raises Exhausted."""
        want = needs((stored.resource for stored in wanted.values()), self.trust_domain)
        return allocate.plan(self.ledger, set(want.identities), set(want.workloads), set(want.services))

    def allocations(self, wanted: Mapping[Key, Stored], ledger: Ledger) -> Allocations:
        """What the compiler is told beside the resources."""
        return Allocations(
            identities=ledger.identity,
            workloads=ledger.workload,
            services=ledger.service,
            vips=ledger.vips,
            bundle=self.bundle,
            revoked=self.revoked,
            trust_domain=self.trust_domain,
            created={f"Route/{key[1]}/{key[2]}": stored.created for key, stored in wanted.items() if key[0] == "HTTPRoute"},
        )

    def compile(self, wanted: Mapping[Key, Stored], grants: Granted) -> None:
        """Raises CompileError, Exhausted."""
        ledger, _ = self.numbers(wanted)
        # Workloads of cut nodes included: they may be admitted again, and must fit then.
        compile_state(effective(wanted, grants, frozenset()), self.allocations(wanted, ledger))

    def faults(
        self, changed: list[Resource], wanted: Mapping[Key, Stored], present: Mapping[Key, Stored], grants: Granted
    ) -> list[Fault]:
        """Everything wrong with ``changed``, which would make ``wanted`` of ``present``. Raises Exhausted."""
        every = plain(wanted)
        found = list(references.faults(changed, every, self.trust_domain, grants))
        # A service that loses a port that a route names is as bad as one that goes.
        moved = {resource.key for resource in changed if resource.key[0] == "Service" and resource.key in present}
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
        workloads = [resource for resource in changed if isinstance(resource, Workload)]
        if workloads:
            addresses = addresses_of(wanted.values())
            for workload in workloads:
                if taken := references.address_owner(workload, addresses):
                    message = f"{taken[0]} belongs to workload {'/'.join(taken[1][1:])} of another node"
                    found.append(Fault(workload.key, ("spec", "addresses"), message, "give each workload its own address"))
        # Only these can make the compiler refuse (numbers, ports of an address); ten thousand policies need no rehearsal.
        if not found and any(resource.key[0] in COMPILED_KINDS for resource in changed):
            try:
                self.compile(wanted, grants)
            except CompileError as error:
                found.append(Fault(changed[0].key, (), str(error), "change one of them"))
        return found


def effective(wanted: Mapping[Key, Stored], grants: Granted, cut: AbstractSet[str]) -> list[Resource]:
    """What is compiled: workloads of cut nodes and without a grant are left out."""
    return [
        stored.resource
        for stored in wanted.values()
        if not isinstance(stored.resource, Workload)
        or (
            stored.resource.spec.node not in cut
            and grants(stored.resource.spec.node, stored.resource.namespace, stored.resource.spec.service_account)
        )
    ]
