"""The resources operators write, as strict models: the shapes alone. `mesh.resources` reads and writes them.

Field names are those of the YAML (camelCase), by alias. Nothing unknown is taken. Limits are named with their unit.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mesh.budget_kinds import BudgetsSpec, IdentityBudget
from mesh.entry_kinds import ServiceEntry
from mesh.fields import (
    APP_PROTOCOLS,
    Address,
    Cidr,
    Decision,
    Endpoint,
    ExpressMode,
    Grant,
    HeaderName,
    HostPattern,
    Label,
    Labels,
    LeaseSeconds,
    Method,
    PathPattern,
    Pattern,
    Port,
    PortText,
    Principals,
    Text,
    TrustDomain,
    fault,
    regex,
    seconds,
)
from mesh.model import EGRESS_PORTS_MAX
from mesh.ports import RESERVED_PORTS
from mesh.resource import Model, Resource

__all__ = [
    "KINDS",
    "AuthorizationPolicy",
    "HTTPRoute",
    "IdentityBudget",
    "MeshConfig",
    "NodeGrant",
    "PeerAuthentication",
    "Resource",
    "Service",
    "ServiceEntry",
    "Workload",
]

ENTRIES_MAX = 256  # of any list in a resource, unless its field says otherwise
NODE_GRANTS_MAX = 4096
RULES_MAX = 64
OUTBOUND_MAX = 1024

ADD_HEADERS_ANNOTATION = "mesh.pillion.dev/add-headers"
ADDABLE_HEADERS = ("x-forwarded-client-cert", "x-request-id", "traceparent")
PILLION_V1 = "mesh.pillion.dev/v1alpha1"


class Selector(Model):
    match_labels: Labels = {}


# ---- Service


class ServicePortSpec(Model):
    port: Port
    target_port: Port | None = None
    name: Text = ""
    protocol: Literal["TCP", "UDP"] = "TCP"
    app_protocol: Text | None = None

    @property
    def target(self) -> int:
        return self.target_port or self.port

    @model_validator(mode="after")
    def _speaks(self) -> ServicePortSpec:
        if self.target in RESERVED_PORTS:
            raise fault(f"port {self.target} is the mesh's own", "let the workload listen on another port")
        if self.app_protocol is not None and self.app_protocol.lower() not in APP_PROTOCOLS:
            known = ", ".join(sorted(APP_PROTOCOLS))
            raise fault(f"appProtocol {self.app_protocol!r} is not spoken", f"use one of {known}; tcp carries anything as it is")
        return self


class ServiceSpec(Model):
    selector: Annotated[Labels, Field(min_length=1)]
    ports: Annotated[list[ServicePortSpec], Field(min_length=1, max_length=ENTRIES_MAX)]
    type: Literal["ClusterIP"] = "ClusterIP"
    # Whose workloads may be behind it; None: anybody's
    service_accounts: Annotated[list[Label], Field(min_length=1, max_length=ENTRIES_MAX)] | None = None
    express: ExpressMode = "auto"

    @model_validator(mode="after")
    def _distinct(self) -> ServiceSpec:
        seen = set()
        for port in self.ports:
            if (port.port, port.protocol) in seen:
                raise fault(f"port {port.port}/{port.protocol} is listed twice", "keep one of them")
            seen.add((port.port, port.protocol))
        return self


class Service(Resource):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    spec: ServiceSpec

    @property
    def add_headers(self) -> tuple[str, ...]:
        """What the proxy adds to requests, sorted."""
        text = self.metadata.annotations.get(ADD_HEADERS_ANNOTATION, "")
        return tuple(sorted({name.strip().lower() for name in text.split(",") if name.strip()}))

    @model_validator(mode="after")
    def _addable(self) -> Service:
        for name in self.add_headers:
            if name not in ADDABLE_HEADERS:
                raise fault(f"header {name!r} can not be added", f"{ADD_HEADERS_ANNOTATION} takes {', '.join(ADDABLE_HEADERS)}")
        return self


# ---- Workload, NodeGrant


class WorkloadSpec(Model):
    node: Label
    service_account: Label
    addresses: Annotated[list[Address], Field(min_length=1, max_length=2)]
    express: ExpressMode = "auto"

    @model_validator(mode="after")
    def _families(self) -> WorkloadSpec:
        if len({":" in address for address in self.addresses}) != len(self.addresses):
            raise fault("two addresses of one family", "give at most one IPv4 and one IPv6 address")
        return self


class Workload(Resource):
    api_version: Literal["mesh.pillion.dev/v1alpha1"]
    kind: Literal["Workload"]
    spec: WorkloadSpec


class NodeGrantSpec(Model):
    node: Label
    service_accounts: Annotated[list[Grant], Field(max_length=NODE_GRANTS_MAX)]


class NodeGrant(Resource):
    """Which service accounts a node may run. Several for one node add up."""

    cluster_wide: ClassVar[bool] = True
    api_version: Literal["mesh.pillion.dev/v1alpha1"]
    kind: Literal["NodeGrant"]
    spec: NodeGrantSpec


# ---- HTTPRoute


class ParentRef(Model):
    group: Literal["", "core"] = ""
    kind: Literal["Service"]
    name: Label
    namespace: Label | None = None
    port: Port | None = None


class BackendRef(Model):
    group: Literal["", "core"] = ""
    kind: Literal["Service"] = "Service"
    name: Label
    namespace: Label | None = None
    port: Port
    weight: Annotated[int, Field(ge=0, le=1_000_000)] = 1


class PathMatch(Model):
    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    value: Text = "/"

    @model_validator(mode="after")
    def _form(self) -> PathMatch:
        if self.type == "RegularExpression":
            regex(self.value)
        elif not self.value.startswith("/") or "//" in self.value or any(char in self.value for char in "?# *\\"):
            raise fault(f"path {self.value!r} is not a path", "start it with '/', no '//', query, '*' or blanks")
        return self


class HeaderMatch(Model):
    type: Literal["Exact", "RegularExpression"] = "Exact"
    name: HeaderName
    value: Text

    @model_validator(mode="after")
    def _form(self) -> HeaderMatch:
        if self.type == "RegularExpression":
            regex(self.value)
        return self


class RouteMatch(Model):
    path: PathMatch | None = None
    method: Method | None = None
    headers: Annotated[list[HeaderMatch], Field(max_length=16)] = []


class RouteRule(Model):
    name: Text | None = None
    matches: Annotated[list[RouteMatch], Field(max_length=RULES_MAX)] = []
    backend_refs: Annotated[list[BackendRef], Field(max_length=16)] = []


class HTTPRouteSpec(Model):
    parent_refs: Annotated[list[ParentRef], Field(min_length=1, max_length=32)]
    hostnames: Annotated[list[HostPattern], Field(max_length=16)] = []
    rules: Annotated[list[RouteRule], Field(max_length=RULES_MAX)] = []


class HTTPRoute(Resource):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    spec: HTTPRouteSpec

    @model_validator(mode="after")
    def _own_namespace(self) -> HTTPRoute:
        refs: list[ParentRef | BackendRef] = [*self.spec.parent_refs]
        refs += [ref for rule in self.spec.rules for ref in rule.backend_refs]
        for ref in refs:
            if ref.namespace not in (None, self.namespace):
                raise fault(
                    f"service {ref.namespace}/{ref.name} is of another namespace",
                    f"route within {self.namespace}, or move the route",
                )
        return self


# ---- policies


class SourceSpec(Model):
    principals: Principals = []
    not_principals: Principals = []
    namespaces: Annotated[list[Pattern], Field(max_length=ENTRIES_MAX)] = []
    not_namespaces: Annotated[list[Pattern], Field(max_length=ENTRIES_MAX)] = []
    ip_blocks: Annotated[list[Cidr], Field(max_length=ENTRIES_MAX)] = []
    not_ip_blocks: Annotated[list[Cidr], Field(max_length=ENTRIES_MAX)] = []


class HeaderSpec(Model):
    """Exact ``value``, or present where none is given."""

    name: HeaderName
    value: Text | None = None


class OperationSpec(Model):
    ports: Annotated[list[PortText], Field(max_length=ENTRIES_MAX)] = []
    not_ports: Annotated[list[PortText], Field(max_length=ENTRIES_MAX)] = []
    methods: Annotated[list[Method], Field(max_length=32)] = []
    not_methods: Annotated[list[Method], Field(max_length=32)] = []
    paths: Annotated[list[PathPattern], Field(max_length=ENTRIES_MAX)] = []
    not_paths: Annotated[list[PathPattern], Field(max_length=ENTRIES_MAX)] = []
    hosts: Annotated[list[HostPattern], Field(max_length=ENTRIES_MAX)] = []
    not_hosts: Annotated[list[HostPattern], Field(max_length=ENTRIES_MAX)] = []
    headers: Annotated[list[HeaderSpec], Field(max_length=16)] = []


class From(Model):
    source: SourceSpec


class To(Model):
    operation: OperationSpec


class PolicyRule(Model):
    from_: Annotated[list[From] | None, Field(alias="from", min_length=1, max_length=ENTRIES_MAX)] = None
    to: Annotated[list[To] | None, Field(min_length=1, max_length=ENTRIES_MAX)] = None


class TargetRef(Model):
    group: Literal["", "core"] = ""
    kind: Literal["Service"]
    name: Label


class AuthorizationPolicySpec(Model):
    selector: Selector | None = None
    target_refs: Annotated[list[TargetRef], Field(min_length=1, max_length=16)] | None = None
    action: Literal["ALLOW", "DENY", "AUDIT"] = "ALLOW"
    mode: Literal["enforce", "audit"] = "enforce"
    rules: Annotated[list[PolicyRule], Field(max_length=RULES_MAX)] = []

    @model_validator(mode="after")
    def _one_way(self) -> AuthorizationPolicySpec:
        if self.selector is not None and self.target_refs is not None:
            raise fault("selector and targetRefs exclude each other", "keep one of them")
        return self


class AuthorizationPolicy(Resource):
    api_version: Literal["mesh.pillion.dev/v1alpha1"]
    kind: Literal["AuthorizationPolicy"]
    spec: AuthorizationPolicySpec


class MtlsSpec(Model):
    mode: Literal["STRICT", "PERMISSIVE"]


class PeerAuthenticationSpec(Model):
    selector: Selector | None = None
    mtls: MtlsSpec


class PeerAuthentication(Resource):
    api_version: Literal["mesh.pillion.dev/v1alpha1"]
    kind: Literal["PeerAuthentication"]
    spec: PeerAuthenticationSpec


# ---- MeshConfig


class OutboundAllowSpec(Model):
    cidr: Cidr
    ports: Annotated[list[Port], Field(max_length=EGRESS_PORTS_MAX)] = []


class DnsForwardSpec(Model):
    """Names that identities may ask for outside the mesh; no principals: all identities."""

    names: Annotated[list[Pattern], Field(min_length=1, max_length=ENTRIES_MAX)]
    principals: Principals = []


# A pattern alone is for all identities. Told apart by type, so that an error is one error
DnsForwardEntry = Annotated[
    Annotated[Pattern, Tag("name")] | Annotated[DnsForwardSpec, Tag("rule")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "rule"),
]


class MeshConfigSpec(Model):
    trust_domain: TrustDomain | None = None
    root_namespace: Label = "pillion-system"
    default_action: Decision = "DENY"
    outbound: Decision = "DENY"
    outbound_allow: Annotated[list[OutboundAllowSpec], Field(max_length=OUTBOUND_MAX)] = []
    dns_upstreams: Annotated[list[Endpoint], Field(max_length=8)] = []
    dns_forward: Annotated[list[DnsForwardEntry], Field(max_length=ENTRIES_MAX)] = []
    access_log: bool = False
    express: ExpressMode = "auto"
    head_bytes_max: Annotated[int, Field(ge=1024, le=1 << 20)] = 32768
    head_timeout_seconds: Annotated[float, seconds(0.1, 600)] = 10.0
    idle_timeout_seconds: Annotated[float, seconds(1, 86400)] = 3600.0
    request_timeout_seconds: Annotated[float, seconds(0.1, 86400)] = 15.0
    connect_timeout_seconds: Annotated[float, seconds(0.1, 60)] = 5.0
    leaf_ttl_seconds: Annotated[float, seconds(10, 30 * 86400)] = 86400.0
    policy_lease_seconds: LeaseSeconds = 0.0
    budgets: BudgetsSpec = BudgetsSpec()
    connects_under_way: Annotated[int, Field(ge=16, le=16384)] = 2048


class MeshConfig(Resource):
    cluster_wide: ClassVar[bool] = True
    api_version: Literal["mesh.pillion.dev/v1alpha1"]
    kind: Literal["MeshConfig"]
    spec: MeshConfigSpec

    @model_validator(mode="after")
    def _one(self) -> MeshConfig:
        if self.name != "mesh":
            raise fault("there is one MeshConfig", "name it mesh")
        return self


KINDS: dict[str, type[Resource]] = {
    kind.__name__: kind
    for kind in (
        Service, Workload, NodeGrant, HTTPRoute, AuthorizationPolicy, PeerAuthentication, ServiceEntry, IdentityBudget, MeshConfig
    )
}  # fmt: skip
