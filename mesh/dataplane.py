"""What a node's kernel maps must hold, in terms of the model: a pure function of the State and the workloads here.

`plan_node` makes no decision of its own: verdicts come from `mesh.policy.authorize`, asked with what the kernel knows
(identity and port). What is not in the plan is denied, so every table may be read as "and nothing else".

Numbers: ``Dest.service`` of a PROXY destination is the service's id. Of a NATIVE destination it is a *backend group*,
the number `Backend` entries are filed under; a service has up to one group for each family and protocol, and a workload
that is dialled by its own address has one of its own.
"""

from __future__ import annotations

import ipaddress
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from mesh.addresses import parse_host_port
from mesh.link import LocalWorkload
from mesh.model import (
    EGRESS_PORTS_MAX,
    IDENTITY_UNKNOWN,
    Action,
    Config,
    Identity,
    Protocol,
    Service,
    ServicePort,
    State,
    TlsMode,
    Workload,
)
from mesh.outside import WayOut, WaysOut, open_ports
from mesh.policy import Peer, PolicySet, Request, authorize, could_connect, port_needs_proxy
from mesh.ports import HBONE_PORT
from mesh.routing import RouteTable
from mesh.snapshot import config_of

ANY_PORT = 0  # of a workload's address: its undeclared ports
GROUP_DIRECT, GROUP_V6, GROUP_UDP = 1 << 31, 1 << 30, 1 << 29
BACKENDS_MAX = 65_535  # of one group; the slot is 16 bits
_V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
NODE_NETNS = 0  # stands for the node's own, whose cookie the agent knows


class DestKind(StrEnum):
    NATIVE = "native"
    PROXY = "proxy"
    DENY = "deny"


class KernelVerdict(StrEnum):
    """No entry is a denial, so there is no word for it."""

    ALLOW = "allow"
    L7 = "l7"  # only the proxy can tell


@dataclass(frozen=True, slots=True)
class DestKey:
    address: str  # canonical text
    port: int
    protocol: str  # "tcp" or "udp"


@dataclass(frozen=True, slots=True)
class Dest:
    """``reason`` of a DENY names a counter: port_undeclared, udp_remote, no_backend."""

    kind: DestKind
    service: int = 0
    backends: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BackendKey:
    group: int
    port: int  # the destination's, not the target's
    slot: int


@dataclass(frozen=True, slots=True)
class BackendEntry:
    address: str
    port: int
    workload: int


@dataclass(frozen=True, slots=True)
class PolicyKey:
    workload: int  # destination
    identity: int  # source
    port: int  # the workload's
    protocol: str


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """``rule`` is the name's number, see `rule_number` and `NodePlan.rules`."""

    verdict: KernelVerdict
    rule: int


@dataclass(frozen=True, slots=True)
class Egress:
    """Destinations outside the mesh; no ports: every port."""

    allow: bool
    ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Dial:
    """Where the proxy's sockets of a netns may connect to."""

    netns: int  # cookie, or NODE_NETNS
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Member:
    """Whose processes a cgroup holds."""

    workload: int
    identity: int
    netns: int
    permissive: bool


@dataclass(frozen=True, slots=True)
class NodePlan:
    outbound_allow: bool = False
    connects_max: int = 2048  # of one identity, under way at once
    members: dict[int, Member] = field(default_factory=dict)  # by cgroup id
    dests: dict[DestKey, Dest] = field(default_factory=dict)
    backends: dict[BackendKey, BackendEntry] = field(default_factory=dict)
    policy: dict[PolicyKey, PolicyEntry] = field(default_factory=dict)
    egress: dict[str, Egress] = field(default_factory=dict)  # by CIDR
    ways_out: dict[int, tuple[WayOut, ...]] = field(default_factory=dict)  # by workload here: what it may reach by name
    dials: frozenset[Dial] = frozenset()
    rules: dict[int, str] = field(default_factory=dict)  # what policy entries' numbers stand for


def rule_number(rule: str) -> int:
    """A number for a rule's name in kernel entries and events: the same in every plan, for display only."""
    return zlib.crc32(rule.encode()) or 1


def protocol_of(port: ServicePort) -> str:
    """The transport: "udp" or "tcp"."""
    return "udp" if port.protocol is Protocol.UDP else "tcp"


def family_of(address: str) -> int:
    """4 or 6."""
    return 6 if ":" in address else 4


def address_of(workload: Workload, family: int) -> str | None:
    """The workload's address of that family."""
    return next((address for address in workload.addresses if family_of(address) == family), None)


def plan_node(state: State, node: str, local: Iterable[LocalWorkload]) -> NodePlan:
    """The plan for ``node``. Local workloads that the State does not place on this node have no part in it: they are
    nobody until the controller says otherwise. Raises SnapshotError when the State has no Config.
    """
    return _Planner(state, node, local).plan()


class _Planner:
    def __init__(self, state: State, node: str, local: Iterable[LocalWorkload]) -> None:
        self.config: Config = config_of(state)
        self.policies = PolicySet(state)
        self.routes = RouteTable(state)
        self.ways_out = WaysOut(state)
        self.workloads = {key: item for key, item in state.items() if isinstance(item, Workload)}
        self.services = {key: item for key, item in sorted(state.items()) if isinstance(item, Service)}
        self.identities = [item for item in state.values() if isinstance(item, Identity)]
        self.local: dict[str, tuple[Workload, LocalWorkload]] = {}
        for entry in local:
            workload = self.workloads.get(entry.key)
            if workload is not None and workload.node == node:
                self.local[entry.key] = (workload, entry)
        # Declared ports of each workload: (port, transport) -> the service ports that target it
        self.declared: dict[str, dict[tuple[int, str], list[tuple[str, ServicePort]]]] = {}
        for key, service in self.services.items():
            for port in service.ports:
                for endpoint in service.endpoints:
                    ports = self.declared.setdefault(endpoint, {})
                    ports.setdefault((port.target_port, protocol_of(port)), []).append((key, port))
        self.dests: dict[DestKey, Dest] = {}
        self.backends: dict[BackendKey, BackendEntry] = {}

    def plan(self) -> NodePlan:
        for key, service in self.services.items():
            for port in service.ports:
                self._service_port(key, service, port)
        for key, workload in self.workloads.items():
            self._addresses(key, workload)
        policy, rules = self._verdicts()
        ways_out = {workload.id: ways for workload, _ in self.local.values() if (ways := self.ways_out.of(workload.spiffe))}
        rules |= {rule_number(way.rule): way.rule for ways in ways_out.values() for way in ways}
        return NodePlan(
            outbound_allow=self.config.outbound is Action.ALLOW,
            connects_max=self.config.connects_max,
            members={
                entry.cgroup: Member(workload.id, workload.identity, entry.netns, workload.tls is TlsMode.PERMISSIVE)
                for workload, entry in self.local.values()
            },
            dests=self.dests,
            backends=self.backends,
            policy=policy,
            egress=plan_egress(self.config),
            ways_out=ways_out,
            dials=frozenset(self._dials()),
            rules=rules,
        )

    # ---- destinations

    def _kernel_may(self, service_key: str, port: ServicePort, endpoints: Iterable[str]) -> bool:
        return kernel_may(self.policies, self.routes, service_key, port, endpoints)

    def _service_port(self, key: str, service: Service, port: ServicePort) -> None:
        known = [endpoint for endpoint in service.endpoints if endpoint in self.workloads]
        here = [endpoint for endpoint in known if endpoint in self.local]
        udp = protocol_of(port) == "udp"
        native = self._kernel_may(key, port, known) and (udp or len(here) == len(known))
        for vip in service.vips:
            dest_key = DestKey(vip, port.port, protocol_of(port))
            if not known and port.protocol in (Protocol.TCP, Protocol.UDP):
                self.dests[dest_key] = Dest(DestKind.DENY, service.id, reason="no_backend")
                continue
            entries = self._entries(here, port, family_of(vip)) if native else []
            if entries and (udp or len(entries) == len(known)):
                group = service.id | (GROUP_V6 if family_of(vip) == 6 else 0) | (GROUP_UDP if udp else 0)
                self._native(dest_key, group, entries)
            elif udp:
                self.dests[dest_key] = Dest(DestKind.DENY, service.id, reason="udp_remote")
            else:
                self.dests[dest_key] = Dest(DestKind.PROXY, service.id)

    def _entries(self, endpoints: list[str], port: ServicePort, family: int) -> list[BackendEntry]:
        out = []
        for endpoint in endpoints[:BACKENDS_MAX]:
            workload = self.workloads[endpoint]
            address = address_of(workload, family)
            if address is not None:
                out.append(BackendEntry(address, port.target_port, workload.id))
        return out

    def _native(self, key: DestKey, group: int, entries: list[BackendEntry]) -> None:
        self.dests[key] = Dest(DestKind.NATIVE, group, len(entries))
        for slot, entry in enumerate(entries):
            self.backends[BackendKey(group, key.port, slot)] = entry

    def _addresses(self, key: str, workload: Workload) -> None:
        """A workload dialled by its own address: declared ports as their services say, others not at all."""
        for address in workload.addresses:
            for (port, transport), users in sorted(self.declared.get(key, {}).items()):
                dest_key = DestKey(address, port, transport)
                native = key in self.local and all(self._kernel_may(service, used, (key,)) for service, used in users)
                if native:
                    group = GROUP_DIRECT | workload.id | (GROUP_V6 if family_of(address) == 6 else 0)
                    group |= GROUP_UDP if transport == "udp" else 0
                    self._native(dest_key, group, [BackendEntry(address, port, workload.id)])
                elif transport == "udp":
                    self.dests[dest_key] = Dest(DestKind.DENY, reason="udp_remote")
                else:
                    self.dests[dest_key] = Dest(DestKind.PROXY, self.services[users[0][0]].id)
            for transport in ("tcp", "udp"):
                self.dests[DestKey(address, ANY_PORT, transport)] = Dest(DestKind.DENY, reason="port_undeclared")

    # ---- verdicts

    def _verdicts(self) -> tuple[dict[PolicyKey, PolicyEntry], dict[int, str]]:
        out: dict[PolicyKey, PolicyEntry] = {}
        rules: dict[int, str] = {}
        # Replicas are selected by the same policies: decide once for each index and port
        known: dict[tuple[int, int], list[tuple[int, PolicyEntry]]] = {}
        peers = [Peer(identity.spiffe, identity.id) for identity in self.identities]
        for key, (workload, _) in self.local.items():
            index = self.policies.index(key)
            for port, transport in self.declared.get(key, ()):
                shared = known.get((id(index), port))
                if shared is None:
                    shared = known[id(index), port] = []
                    for peer in (Peer(None, IDENTITY_UNKNOWN), *peers):
                        entry = self._verdict(key, port, peer, rules)
                        if entry is not None:
                            shared.append((peer.identity, entry))
                for identity, entry in shared:
                    if identity != IDENTITY_UNKNOWN or workload.tls is TlsMode.PERMISSIVE:
                        out[PolicyKey(workload.id, identity, port, transport)] = entry
        return out, rules

    def _verdict(self, key: str, port: int, peer: Peer, rules: dict[int, str]) -> PolicyEntry | None:
        verdict = authorize(self.policies, peer, key, Request(port))
        if not verdict.possible:
            return None
        number = rule_number(verdict.rule)
        rules[number] = verdict.rule
        return PolicyEntry(KernelVerdict.ALLOW if verdict.allowed else KernelVerdict.L7, number)

    # ---- the proxy's dials

    def _dials(self) -> Iterable[Dial]:
        for key, (workload, entry) in self.local.items():
            for port, transport in self.declared.get(key, ()):
                if transport == "tcp":
                    for address in workload.addresses:
                        yield Dial(entry.netns, address, port)
        sources: dict[int, dict[int, Peer]] = {}
        for workload, entry in self.local.values():
            sources.setdefault(entry.netns, {})[workload.identity] = Peer(workload.spiffe, workload.identity)
        reach: dict[tuple[int, int, tuple[int, ...]], bool] = {}
        for key, workload in self.workloads.items():
            ports = tuple(sorted(port for port, transport in self.declared.get(key, ()) if transport == "tcp"))
            if key in self.local or not ports:
                continue
            index = id(self.policies.index(key))
            for netns, peers in sources.items():
                for identity, peer in peers.items():
                    known = reach.get((identity, index, ports))
                    if known is None:
                        known = reach[identity, index, ports] = any(
                            could_connect(self.policies, peer, key, port) for port in ports
                        )
                    if known:
                        for address in workload.addresses:
                            yield Dial(netns, address, HBONE_PORT)
                        break
        for upstream in self.config.dns_upstreams if sources else ():  # of the node's netns alone: workloads have no way there
            resolver, dns_port = parse_host_port(upstream)
            yield Dial(NODE_NETNS, resolver, dns_port)


def kernel_may(policies: PolicySet, routes: RouteTable, service_key: str, port: ServicePort, endpoints: Iterable[str]) -> bool:
    """Whether connections to a service port need nothing but an L4 verdict. A port of unknown protocol goes through the
    proxy, which learns it."""
    if port.protocol not in (Protocol.TCP, Protocol.UDP) or routes.routed(service_key, port.port):
        return False
    return not any(port_needs_proxy(policies, endpoint, port.target_port) for endpoint in endpoints)


def plan_egress(config: Config) -> dict[str, Egress]:
    """What `open_ports` says. Nothing where ``Config.outbound`` allows everything: a range with ports would only narrow that."""
    if config.outbound is Action.ALLOW:
        return {}
    ranges = open_ports((item.cidr, item.ports) for item in config.outbound_allow)
    out = {}
    for network, ports in ranges.items():
        # Past the kernel's room: a subset is allowed, never more than was asked for; the controller takes no such config
        out[str(network)] = Egress(True, tuple(sorted(ports)[:EGRESS_PORTS_MAX]) if ports is not None else ())
    # The kernel keeps IPv4 within ::ffff:0:0/96: an IPv6 range around it must not open IPv4
    if any(isinstance(network, ipaddress.IPv6Network) and _V4_MAPPED.subnet_of(network) for network in ranges):
        out.setdefault("0.0.0.0/0", Egress(False))
    return out
