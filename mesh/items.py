"""One resource, one item: what operators wrote in the words nodes work from. Pure; what a resource means beside others (who is
behind a service, which policy wins) is `mesh.selection`'s and `mesh.compile`'s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from msgspec import structs

from mesh import kinds
from mesh.budget_kinds import BudgetsSpec
from mesh.fields import APP_PROTOCOLS
from mesh.model import (
    Action,
    Backend,
    Budget,
    BudgetChange,
    Config,
    DnsForward,
    HeaderMatch,
    IdentityBudget,
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
    TlsMode,
    Workload,
)


class CompileError(ValueError):
    """A number was not allocated, or two workloads claim one address: the controller's fault, nothing is applied."""


@dataclass(frozen=True)
class Allocations:
    """What the controller gave out, never reused: numbers from 256, virtual addresses as (v4, v6), CA roots as PEM."""

    identities: Mapping[str, int] = field(default_factory=dict)  # by SPIFFE URI
    workloads: Mapping[str, int] = field(default_factory=dict)  # by item key
    services: Mapping[str, int] = field(default_factory=dict)  # by item key
    vips: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # by service item key
    bundle: tuple[str, ...] = ()
    revoked: tuple[str, ...] = ()
    trust_domain: str = "mesh.local"
    created: Mapping[str, int] = field(default_factory=dict)  # by item key: the revision a route was made at


def service_key(namespace: str, name: str) -> str:
    return f"Service/{namespace}/{name}"


def workload_key(namespace: str, name: str) -> str:
    return f"Workload/{namespace}/{name}"


def config_of(mesh: kinds.MeshConfig | None, allocations: Allocations) -> Config:
    spec = mesh.spec if mesh is not None else kinds.MeshConfigSpec()
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


def budget(item: kinds.IdentityBudget) -> IdentityBudget:
    principals = tuple(sorted(set(item.spec.principals)))
    return IdentityBudget(item.name, item.namespace, _budget_change(item.spec.budgets), principals)


def entry(entry: kinds.ServiceEntry) -> ServiceEntry:
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


def service_item(service: kinds.Service, endpoints: tuple[str, ...], number: int, vips: Iterable[str]) -> Service:
    return Service(
        id=number,
        name=service.name,
        namespace=service.namespace,
        vips=tuple(vip for vip in vips if vip),
        ports=tuple(ServicePort(port.port, port.target, port.name, protocol(port)) for port in service.spec.ports),
        endpoints=endpoints,
        add_headers=service.add_headers,
        express=service.spec.express,
    )


def labels_of(selector: kinds.Selector | None) -> dict[str, str]:
    return selector.match_labels if selector is not None else {}


def workload_item(
    workload: kinds.Workload, number: int, identity: int, spiffe: str, ports: tuple[int, ...], tls: TlsMode
) -> Workload:
    return Workload(
        id=number,
        name=workload.name,
        namespace=workload.namespace,
        node=workload.spec.node,
        identity=identity,
        spiffe=spiffe,
        addresses=tuple(workload.spec.addresses),
        labels=dict(workload.metadata.labels),
        ports=ports,
        tls=tls,
        express=workload.spec.express,
    )


def route(route: kinds.HTTPRoute, created: int) -> Route:
    return Route(
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
        created=created,
    )


def _match(match: kinds.RouteMatch) -> RouteMatch:
    return RouteMatch(
        PathMatch(match.path.type, match.path.value) if match.path is not None else None,
        match.method,
        tuple(HeaderMatch(header.name, header.value, header.type) for header in match.headers),
    )


def policy(policy: kinds.AuthorizationPolicy, root: str) -> Policy:
    spec = policy.spec
    audit = spec.mode == "audit" and spec.action != "AUDIT"
    return Policy(
        name=policy.name,
        namespace=policy.namespace,
        action=Action.AUDIT if audit else Action(spec.action),
        selector=dict(labels_of(spec.selector)),
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
