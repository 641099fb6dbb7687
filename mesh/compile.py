"""From what operators wrote to what nodes work from: resources and allocated numbers to a State, and a node's part of it.

`compile_state` is pure and total: references to what does not exist yield nothing (a policy for no service selects
nobody), because resources arrive in any order. Only numbers must have been allocated before: `needs` lists them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import structs

from mesh import kinds
from mesh.budget_kinds import BudgetsSpec
from mesh.fields import APP_PROTOCOLS
from mesh.identity import SpiffeId
from mesh.kinds import Resource
from mesh.model import (
    Action,
    Backend,
    Budget,
    BudgetChange,
    Config,
    DnsForward,
    HeaderMatch,
    Identity,
    IdentityBudget,
    Item,
    Operation,
    OutboundAllow,
    PathMatch,
    Policy,
    Protocol,
    Route,
    RouteMatch,
    RouteRule,
    Rule,
    Service,
    ServiceEntry,
    ServicePort,
    Source,
    State,
    TlsMode,
    Workload,
    key_of,
)
from mesh.reach import Reach, reachable

__all__ = [
    "Allocations",
    "CompileError",
    "Needs",
    "Reach",
    "compile_state",
    "needs",
    "protocol",
    "reachable",
    "service_key",
    "workload_key",
]


class CompileError(ValueError):
    """A number was not allocated, or two workloads claim one address: the controller's fault, nothing is applied."""


@dataclass(frozen=True)
class Allocations:
    """What the controller gave out, never reused: numbers from 256, virtual addresses as (v4, v6), CA roots as PEM."""

    identities: dict[str, int] = field(default_factory=dict)  # by SPIFFE URI
    workloads: dict[str, int] = field(default_factory=dict)  # by item key
    services: dict[str, int] = field(default_factory=dict)  # by item key
    vips: dict[str, tuple[str, str]] = field(default_factory=dict)  # by service item key
    bundle: tuple[str, ...] = ()
    revoked: tuple[str, ...] = ()
    trust_domain: str = "mesh.local"
    created: dict[str, int] = field(default_factory=dict)  # by item key: the revision a route was made at


@dataclass(frozen=True)
class Needs:
    """What must be allocated before `compile_state`, sorted."""

    identities: tuple[str, ...]
    workloads: tuple[str, ...]
    services: tuple[str, ...]


def service_key(namespace: str, name: str) -> str:
    return f"Service/{namespace}/{name}"


def workload_key(namespace: str, name: str) -> str:
    return f"Workload/{namespace}/{name}"


def needs(resources: Iterable[Resource], trust_domain: str) -> Needs:
    """The identities, workloads and services that want a number."""
    identities, workloads, services = set(), set(), set()
    for resource in resources:
        if isinstance(resource, kinds.Workload):
            workloads.add(workload_key(resource.namespace, resource.name))
            identities.add(str(SpiffeId(trust_domain, resource.namespace, resource.spec.service_account)))
        elif isinstance(resource, kinds.Service):
            services.add(service_key(resource.namespace, resource.name))
    return Needs(tuple(sorted(identities)), tuple(sorted(workloads)), tuple(sorted(services)))


def compile_state(resources: Iterable[Resource], allocations: Allocations) -> State:
    """The whole mesh as items. Raises CompileError."""
    every = sorted(resources, key=lambda resource: resource.key)
    config = _config(every, allocations)
    workloads = [resource for resource in every if isinstance(resource, kinds.Workload)]
    services = [resource for resource in every if isinstance(resource, kinds.Service)]
    by_label: dict[tuple[str, str, str], list[kinds.Workload]] = {}
    for workload in workloads:
        for name, value in workload.metadata.labels.items():
            by_label.setdefault((workload.namespace, name, value), []).append(workload)
    items: list[Item] = [config]
    ports: dict[str, set[int]] = {}
    for service in services:
        # The first label narrows, all decide
        first = next(iter(service.spec.selector.items()))
        endpoints = [
            workload_key(workload.namespace, workload.name)
            for workload in by_label.get((service.namespace, *first), ())
            if _selects(service.spec.selector, workload.metadata.labels) and _may_serve(workload, service)
        ]
        for endpoint in endpoints:
            ports.setdefault(endpoint, set()).update(port.target for port in service.spec.ports)
        items.append(_service(service, tuple(sorted(endpoints)), allocations))
    modes = _Modes(every, config.root_namespace)
    claimed: dict[tuple[str, int], str] = {}
    identities: set[str] = set()
    for workload in workloads:
        item = _workload(workload, ports, modes, allocations)
        for address in item.addresses:
            for port in item.ports:
                other = claimed.setdefault((address, port), key_of(item))
                if other != key_of(item):
                    raise CompileError(f"{other} and {key_of(item)} both claim {address} port {port}; give one another port")
        identities.add(item.spiffe)
        items.append(item)
    items += [Identity(_number(allocations.identities, spiffe), spiffe) for spiffe in identities]
    for resource in every:
        if isinstance(resource, kinds.HTTPRoute):
            items.append(_route(resource, allocations))
        elif isinstance(resource, kinds.AuthorizationPolicy):
            items.append(_policy(resource, config.root_namespace))
        elif isinstance(resource, kinds.ServiceEntry):
            items.append(_entry(resource))
        elif isinstance(resource, kinds.IdentityBudget):
            principals = tuple(sorted(set(resource.spec.principals)))
            items.append(IdentityBudget(resource.name, resource.namespace, _budget_change(resource.spec.budgets), principals))
    return {key_of(item): item for item in items}


def _selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


def _may_serve(workload: kinds.Workload, service: kinds.Service) -> bool:
    """Labels are what a node says of its workloads; their service accounts it has been granted."""
    accounts = service.spec.service_accounts
    return accounts is None or workload.spec.service_account in accounts


def _number(allocated: dict[str, int], key: str) -> int:
    try:
        return allocated[key]
    except KeyError:
        raise CompileError(f"{key} has no number; allocate what needs() lists first") from None


def _config(resources: list[Resource], allocations: Allocations) -> Config:
    spec = next((resource.spec for resource in resources if isinstance(resource, kinds.MeshConfig)), kinds.MeshConfigSpec())
    if spec.trust_domain not in (None, allocations.trust_domain):
        raise CompileError(f"MeshConfig says trust domain {spec.trust_domain}, the controller runs {allocations.trust_domain}")
    return Config(
        trust_domain=allocations.trust_domain,
        bundle=allocations.bundle,
        default_action=Action(spec.default_action),
        outbound=Action(spec.outbound),
        outbound_allow=tuple(OutboundAllow(item.cidr, tuple(sorted(set(item.ports)))) for item in spec.outbound_allow),
        dns_upstreams=tuple(spec.dns_upstreams),
        dns_forward=tuple(_dns_forward(entry) for entry in spec.dns_forward),
        access_log=spec.access_log,
        head_bytes_max=spec.head_bytes_max,
        head_timeout_s=float(spec.head_timeout_seconds),
        idle_timeout_s=float(spec.idle_timeout_seconds),
        request_timeout_s=float(spec.request_timeout_seconds),
        connect_timeout_s=float(spec.connect_timeout_seconds),
        leaf_ttl_s=float(spec.leaf_ttl_seconds),
        policy_lease_s=float(spec.policy_lease_seconds),
        revoked=tuple(sorted(allocations.revoked)),
        root_namespace=spec.root_namespace,
        budgets=_budget(spec.budgets),
        connects_max=spec.connects_under_way,
        express=spec.express,
    )


def _dns_forward(entry: str | kinds.DnsForwardSpec) -> DnsForward:
    if isinstance(entry, str):
        return DnsForward((entry.lower(),))
    return DnsForward(tuple(sorted({name.lower() for name in entry.names})), tuple(sorted(set(entry.principals))))


def _entry(entry: kinds.ServiceEntry) -> ServiceEntry:
    ports = {(port.number, port.transport) for port in entry.spec.ports}
    hosts, principals = tuple(sorted(set(entry.spec.hosts))), tuple(sorted(set(entry.spec.principals)))
    return ServiceEntry(entry.name, entry.namespace, hosts, tuple(sorted(ports)), principals)


def _budget_change(spec: BudgetsSpec) -> BudgetChange:
    return BudgetChange(
        connections=spec.connections,
        streams=spec.streams,
        bytes_in_flight=spec.bytes_in_flight,
        descriptors=spec.descriptors,
        requests_per_s=spec.requests_per_second,
        handshakes_per_s=spec.handshakes_per_second,
        worker_share=spec.worker_share,
    )


def _budget(spec: BudgetsSpec) -> Budget:
    named = structs.asdict(_budget_change(spec))
    return Budget(**{field: value for field, value in named.items() if value is not None})


def protocol(port: kinds.ServicePortSpec) -> Protocol:
    """What a port speaks: by transport, appProtocol, or the first part of its name; else learned."""
    if port.protocol == "UDP":
        return Protocol.UDP
    said = port.app_protocol.lower() if port.app_protocol is not None else port.name.partition("-")[0].lower()
    known = APP_PROTOCOLS.get(said)
    return Protocol(known) if known is not None else Protocol.AUTO


def _service(service: kinds.Service, endpoints: tuple[str, ...], allocations: Allocations) -> Service:
    key = service_key(service.namespace, service.name)
    return Service(
        id=_number(allocations.services, key),
        name=service.name,
        namespace=service.namespace,
        vips=tuple(vip for vip in allocations.vips.get(key, ()) if vip),
        ports=tuple(ServicePort(port.port, port.target, port.name, protocol(port)) for port in service.spec.ports),
        endpoints=endpoints,
        add_headers=service.add_headers,
        express=service.spec.express,
    )


class _Modes:
    """PeerAuthentication: a workload's own before its namespace's before the mesh's; the first by name where two tie."""

    def __init__(self, resources: list[Resource], root: str) -> None:
        self._root = root
        self._by_namespace: dict[str, list[kinds.PeerAuthentication]] = {}
        for resource in resources:
            if isinstance(resource, kinds.PeerAuthentication):
                self._by_namespace.setdefault(resource.namespace, []).append(resource)

    def of(self, workload: kinds.Workload) -> TlsMode:
        own = self._by_namespace.get(workload.namespace, [])
        labels = workload.metadata.labels
        groups = (
            [item for item in own if (found := _labels(item.spec.selector)) and _selects(found, labels)],
            [item for item in own if not _labels(item.spec.selector)],
            [item for item in self._by_namespace.get(self._root, []) if not _labels(item.spec.selector)],
        )
        for group in groups:
            if group:
                return TlsMode(group[0].spec.mtls.mode)
        return TlsMode.STRICT


def _labels(selector: kinds.Selector | None) -> dict[str, str]:
    return selector.match_labels if selector is not None else {}


def _workload(workload: kinds.Workload, ports: dict[str, set[int]], modes: _Modes, allocations: Allocations) -> Workload:
    key = workload_key(workload.namespace, workload.name)
    spiffe = str(SpiffeId(allocations.trust_domain, workload.namespace, workload.spec.service_account))
    return Workload(
        id=_number(allocations.workloads, key),
        name=workload.name,
        namespace=workload.namespace,
        node=workload.spec.node,
        identity=_number(allocations.identities, spiffe),
        spiffe=spiffe,
        addresses=tuple(workload.spec.addresses),
        labels=dict(workload.metadata.labels),
        ports=tuple(sorted(ports.get(key, ()))),
        tls=modes.of(workload),
        express=workload.spec.express,
    )


def _route(route: kinds.HTTPRoute, allocations: Allocations) -> Route:
    item = Route(
        name=route.name,
        namespace=route.namespace,
        parents=tuple((service_key(route.namespace, ref.name), ref.port or 0) for ref in route.spec.parent_refs),
        rules=tuple(
            RouteRule(
                tuple(_match(match) for match in rule.matches),
                tuple(Backend(service_key(route.namespace, ref.name), ref.port, ref.weight) for ref in rule.backend_refs),
            )
            for rule in route.spec.rules
        ),
        hostnames=tuple(route.spec.hostnames),
    )
    created = allocations.created.get(key_of(item), 0)
    return Route(item.name, item.namespace, item.parents, item.rules, item.hostnames, created)


def _match(match: kinds.RouteMatch) -> RouteMatch:
    return RouteMatch(
        PathMatch(match.path.type, match.path.value) if match.path is not None else None,
        match.method,
        tuple(HeaderMatch(header.name, header.value, header.type) for header in match.headers),
    )


def _policy(policy: kinds.AuthorizationPolicy, root: str) -> Policy:
    spec = policy.spec
    audit = spec.mode == "audit" and spec.action != "AUDIT"
    return Policy(
        name=policy.name,
        namespace=policy.namespace,
        action=Action.AUDIT if audit else Action(spec.action),
        selector=dict(_labels(spec.selector)),
        services=tuple(service_key(policy.namespace, ref.name) for ref in spec.target_refs or ()),
        rules=tuple(
            Rule(
                tuple(_source(entry.source) for entry in rule.from_ or ()),
                tuple(_operation(entry.operation) for entry in rule.to or ()),
            )
            for rule in spec.rules
        ),
        every_namespace=policy.namespace == root and not spec.target_refs,
        dry_run=Action(spec.action) if audit else None,
    )


def _source(spec: kinds.SourceSpec) -> Source:
    return Source(
        tuple(spec.principals),
        tuple(spec.not_principals),
        tuple(spec.namespaces),
        tuple(spec.not_namespaces),
        tuple(spec.ip_blocks),
        tuple(spec.not_ip_blocks),
    )


def _operation(spec: kinds.OperationSpec) -> Operation:
    return Operation(
        ports=tuple(int(port) for port in spec.ports),
        not_ports=tuple(int(port) for port in spec.not_ports),
        methods=tuple(spec.methods),
        not_methods=tuple(spec.not_methods),
        paths=tuple(spec.paths),
        not_paths=tuple(spec.not_paths),
        hosts=tuple(spec.hosts),
        not_hosts=tuple(spec.not_hosts),
        headers=tuple((header.name, header.value) for header in spec.headers),
    )
