"""What a resource says about others, checked before anything is stored. Pure: resources in, faults out.

The compiler would take a dangling reference as "nothing"; for a policy that would be an open door, so the registry
lets none in, and lets nothing go that is still referred to.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from mesh.model import EGRESS_PORTS_MAX, VIP4, VIP6
from mesh.outside import open_ports
from mesh.resources import AuthorizationPolicy, HTTPRoute, MeshConfig, Resource, Service, Workload

Key = tuple[str, str, str]  # (kind, namespace, name)


@dataclass(frozen=True)
class Fault:
    """``path`` leads to the field in the resource's document."""

    key: Key
    path: tuple[str | int, ...]
    message: str
    remedy: str


def services_of(resource: Resource) -> Iterator[tuple[Key, int, tuple[str | int, ...]]]:
    """The services a resource names: key, port (0: any), path of the reference."""
    if isinstance(resource, HTTPRoute):
        for at, parent in enumerate(resource.spec.parent_refs):
            yield ("Service", resource.namespace, parent.name), parent.port or 0, ("spec", "parentRefs", at)
        for rule_at, rule in enumerate(resource.spec.rules):
            for at, backend in enumerate(rule.backend_refs):
                path = ("spec", "rules", rule_at, "backendRefs", at)
                yield ("Service", resource.namespace, backend.name), backend.port, path
    elif isinstance(resource, AuthorizationPolicy):
        for at, target in enumerate(resource.spec.target_refs or ()):
            yield ("Service", resource.namespace, target.name), 0, ("spec", "targetRefs", at)


def faults(changed: Iterable[Resource], every: Mapping[Key, Resource], trust_domain: str, granted: Granted) -> Iterator[Fault]:
    """What is wrong with ``changed`` in the light of ``every`` (which holds them)."""
    for resource in changed:
        for key, port, path in services_of(resource):
            service = every.get(key)
            if not isinstance(service, Service):
                yield Fault(
                    resource.key,
                    (*path, "name"),
                    f"service {key[1]}/{key[2]} does not exist",
                    "apply it first, or in the same text",
                )
            elif port and port not in (known := [item.port for item in service.spec.ports]):
                listed = ", ".join(map(str, known))
                yield Fault(
                    resource.key, (*path, "port"), f"service {key[1]}/{key[2]} has no port {port}", f"use one of {listed}"
                )
        if isinstance(resource, MeshConfig) and resource.spec.trust_domain not in (None, trust_domain):
            yield Fault(
                resource.key,
                ("spec", "trustDomain"),
                f"the trust domain is {trust_domain}, it is fixed when a mesh is made",
                f"write {trust_domain} or leave the field out",
            )
        if isinstance(resource, MeshConfig):
            yield from _outbound(resource)
        if isinstance(resource, Workload):
            yield from _workload(resource, granted)


class Granted:
    """The grants of every node, indexed."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = frozenset(pairs)  # (node, "<namespace>/<service account>" or "<namespace>/*")

    def __call__(self, node: str, namespace: str, account: str) -> bool:
        return (node, f"{namespace}/{account}") in self._pairs or (node, f"{namespace}/*") in self._pairs

    def nodes(self) -> set[str]:
        return {node for node, _ in self._pairs}


def _outbound(config: MeshConfig) -> Iterator[Fault]:
    """Ranges that open more ports than a kernel's entry has room for; nodes would open the first few."""
    allowed = config.spec.outbound_allow
    opened = open_ports((item.cidr, item.ports) for item in allowed)
    for at, item in enumerate(allowed):
        ports = opened[ipaddress.ip_network(item.cidr)]
        if ports is not None and len(ports) > EGRESS_PORTS_MAX:
            yield Fault(
                config.key,
                ("spec", "outboundAllow", at),
                f"{item.cidr} opens {len(ports)} ports, with those of wider ranges; there is room for {EGRESS_PORTS_MAX}",
                "name fewer, or leave ports out to open all",
            )


def _workload(resource: Workload, granted: Granted) -> Iterator[Fault]:
    spec = resource.spec
    if not granted(spec.node, resource.namespace, spec.service_account):
        yield Fault(
            resource.key,
            ("spec", "serviceAccount"),
            f"node {spec.node} is not granted {resource.namespace}/{spec.service_account}",
            "add it to a NodeGrant of that node",
        )
    for at, address in enumerate(spec.addresses):
        if ipaddress.ip_address(address) in (VIP6 if ":" in address else VIP4):
            yield Fault(
                resource.key,
                ("spec", "addresses", at),
                f"{address} is in the range of the mesh's virtual addresses",
                "use the workload's own address",
            )


def address_owner(workload: Workload, addresses: Mapping[str, AbstractSet[tuple[Key, str]]]) -> tuple[str, Key] | None:
    """An address of ``workload`` that a workload of another node has, with that workload; None: there is none."""
    for address in workload.spec.addresses:
        for key, node in addresses.get(address, ()):
            if key != workload.key and node != workload.spec.node:
                return address, key
    return None


def referrers(key: Key, every: Mapping[Key, Resource]) -> list[Key]:
    """The resources that name the service ``key``."""
    return sorted(other for other, resource in every.items() if any(named == key for named, _, _ in services_of(resource)))
