"""The facts a node works from: what the controller compiles resources into and streams as items.

A snapshot is a flat mapping ``key -> Item``; a key is ``"<Kind>/<namespace>/<name>"`` (namespace empty
for cluster-wide items). Deltas put and delete keys, so every consumer can diff without knowing kinds.
All types are frozen msgspec structs: JSON on the wire, validated at the edge, hashable inside.
"""

from __future__ import annotations

from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Literal

import msgspec

IDENTITY_UNKNOWN, IDENTITY_HOST, IDENTITY_WORLD = 0, 1, 2
FIRST_USER_ID = 256  # identities, workloads and services are numbered by the controller from here, never reused
IDENTITY_ID_MAX = (1 << 32) - 1
ID_MAX = (1 << 29) - 1  # of workloads and services: the three bits above tell groups of backends apart, see `mesh.dataplane`
VIP4, VIP6 = IPv4Network("240.0.0.0/4"), IPv6Network("fd50:494c::/64")  # what services' virtual addresses are taken from
EGRESS_PORTS_MAX = 8  # of one range outside the mesh, as the kernel's entry has room for


Express = Literal["auto", "off"]  # off: HTTP takes the proxy, always


class Protocol(StrEnum):
    """What a port speaks. AUTO: learned from the server, first speaker."""

    HTTP = "http"
    TCP = "tcp"
    UDP = "udp"
    AUTO = "auto"


class Action(StrEnum):
    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"


class TlsMode(StrEnum):
    STRICT = "STRICT"
    PERMISSIVE = "PERMISSIVE"


class Base(msgspec.Struct, frozen=True, tag_field="kind", omit_defaults=True, forbid_unknown_fields=True):
    """One item of a snapshot; the tag is its kind."""


class Identity(Base, frozen=True, tag="Identity"):
    """key ``Identity//<spiffe uri>``"""

    id: int
    spiffe: str


class ServicePort(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    port: int
    target_port: int
    name: str = ""
    protocol: Protocol = Protocol.AUTO


class Service(Base, frozen=True, tag="Service"):
    """key ``Service/<ns>/<name>``; reached as ``<name>.<ns>.mesh`` and by its virtual addresses."""

    id: int
    name: str
    namespace: str
    vips: tuple[str, ...] = ()  # one of `VIP4`, one of `VIP6`
    ports: tuple[ServicePort, ...] = ()
    endpoints: tuple[str, ...] = ()  # item keys of the workloads behind it, sorted
    add_headers: tuple[str, ...] = ()  # of x-forwarded-client-cert, x-request-id, traceparent
    express: Express = "auto"


class Workload(Base, frozen=True, tag="Workload"):
    """key ``Workload/<ns>/<name>``: one running instance with addresses and an identity."""

    id: int
    name: str
    namespace: str
    node: str
    identity: int
    spiffe: str
    addresses: tuple[str, ...] = ()  # canonical text, at most one per family; a host's address if it shares one
    labels: dict[str, str] = {}
    ports: tuple[int, ...] = ()  # declared: target ports of the services that select it, sorted
    tls: TlsMode = TlsMode.STRICT  # PeerAuthentication, resolved by the controller
    express: Express = "auto"  # of what it asks and of what it is asked


class Source(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Fields are ANDed, values of a field ORed. Principals without ``spiffe://``; ``*`` as prefix or suffix."""

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    ip_blocks: tuple[str, ...] = ()
    not_ip_blocks: tuple[str, ...] = ()


class Operation(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """L4: ports. L7: the rest; paths are exact, ``/prefix/*`` or ``*/suffix``; headers are exact or present."""

    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    not_methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    not_paths: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    not_hosts: tuple[str, ...] = ()
    headers: tuple[tuple[str, str | None], ...] = ()  # (lower-case name, exact value or None for present)


class Rule(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """``from`` AND ``to``; an empty tuple matches everything."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()


class Policy(Base, frozen=True, tag="Policy"):
    """key ``Policy/<ns>/<name>``: an AuthorizationPolicy that selects destination workloads."""

    name: str
    namespace: str  # the mesh's root namespace: selects in every namespace
    action: Action
    selector: dict[str, str] = {}  # labels of the destination; empty: all of the namespace
    services: tuple[str, ...] = ()  # targetRefs: item keys of services; empty: by selector
    rules: tuple[Rule, ...] = ()  # none: ALLOW allows nothing, DENY denies nothing
    every_namespace: bool = False
    dry_run: Action | None = None  # of an AUDIT policy: what it would do if it were enforced


class PathMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str  # Exact | PathPrefix (by element) | RegularExpression
    value: str


class HeaderMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str  # lower case
    value: str
    type: str = "Exact"  # Exact | RegularExpression


class RouteMatch(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    path: PathMatch | None = None
    method: str | None = None
    headers: tuple[HeaderMatch, ...] = ()


class Backend(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    service: str  # item key
    port: int
    weight: int = 1


class RouteRule(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    matches: tuple[RouteMatch, ...] = ()
    backends: tuple[Backend, ...] = ()


class Route(Base, frozen=True, tag="Route"):
    """key ``Route/<ns>/<name>``: an HTTPRoute whose parentRefs are services (item key, port or 0 for all)."""

    name: str
    namespace: str
    parents: tuple[tuple[str, int], ...]
    rules: tuple[RouteRule, ...] = ()
    hostnames: tuple[str, ...] = ()
    created: int = 0  # revision at creation: the older wins ties


class OutboundAllow(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A destination outside the mesh that workloads may reach natively."""

    cidr: str
    ports: tuple[int, ...] = ()  # empty: all


class DnsForward(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Names outside the mesh that may be asked upstream, and by whom."""

    names: tuple[str, ...]  # patterns, lower case, ``*`` for all
    principals: tuple[str, ...] = ()  # patterns without ``spiffe://``; none: all


class ServiceEntry(Base, frozen=True, tag="ServiceEntry"):
    """key ``ServiceEntry/<ns>/<name>``: hosts outside the mesh that identities of its namespace may reach by name, in the root
    namespace those of any."""

    name: str
    namespace: str
    hosts: tuple[str, ...]  # lower case, without the last dot; ``*.example.com`` is every name below
    ports: tuple[tuple[int, Literal["tcp", "udp"]], ...]
    principals: tuple[str, ...] = ()  # patterns without ``spiffe://``; none: all


class Budget(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one identity may take of one worker of a node's proxy. The defaults fit a node of 2 CPUs and 4 GiB."""

    connections: int = 4096  # open, captured or through a tunnel
    streams: int = 8192  # HBONE streams open here
    bytes_in_flight: int = 64 << 20  # held for ends that do not read, and unfinished heads
    descriptors: int = 12288  # sockets: its own, to servers, to other nodes
    requests_per_s: int = 50_000  # HTTP requests, opaque connections and streams; bursts of a second's worth
    handshakes_per_s: int = 500  # TLS, from its addresses
    worker_share: float = 0.5  # of a turn of the worker, while others wait


class BudgetChange(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Fields of `Budget` that are not the mesh's."""

    connections: int | None = None
    streams: int | None = None
    bytes_in_flight: int | None = None
    descriptors: int | None = None
    requests_per_s: int | None = None
    handshakes_per_s: int | None = None
    worker_share: float | None = None


class IdentityBudget(Base, frozen=True, tag="IdentityBudget"):
    """key ``IdentityBudget/<ns>/<name>``: other budgets for identities of its namespace, in the root namespace of any."""

    name: str
    namespace: str
    budgets: BudgetChange
    principals: tuple[str, ...] = ()  # patterns without ``spiffe://``; none: all


class Config(Base, frozen=True, tag="Config"):
    """key ``Config//mesh``"""

    trust_domain: str
    bundle: tuple[str, ...] = ()  # PEM roots; several while rotating
    default_action: Action = Action.DENY  # for mesh destinations no policy selects
    outbound: Action = Action.DENY  # for destinations outside the mesh
    outbound_allow: tuple[OutboundAllow, ...] = ()
    dns_upstreams: tuple[str, ...] = ()  # ip:port; empty: the mesh's names only
    dns_forward: tuple[DnsForward, ...] = ()
    access_log: bool = False
    head_bytes_max: int = 32768
    head_timeout_s: float = 10.0
    idle_timeout_s: float = 3600.0
    request_timeout_s: float = 15.0
    connect_timeout_s: float = 5.0
    leaf_ttl_s: float = 86400.0
    policy_lease_s: float = 0.0  # past it without a word of the controller nothing new is let in; 0: no limit
    revoked: tuple[str, ...] = ()  # serials (hex) and, as ``node:<name>``, nodes that are cut
    root_namespace: str = "pillion-system"
    budgets: Budget = Budget()
    connects_max: int = 2048  # of one identity on one node: captured, and not established yet
    express: Express = "auto"


Item = Identity | Service | Workload | Policy | Route | ServiceEntry | IdentityBudget | Config
State = dict[str, Item]

CONFIG_KEY = "Config//mesh"


def key_of(item: Item) -> str:
    """The key under which an item lives in a State."""
    if isinstance(item, Config):
        return CONFIG_KEY
    if isinstance(item, Identity):
        return f"Identity//{item.spiffe}"
    return f"{type(item).__struct_config__.tag}/{item.namespace}/{item.name}"
