"""What the worker knows: one State and the tables made of it, immutable and swapped as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from l7proxy.http1.exchange import Limits
from mesh import snapshot
from mesh.link import LocalWorkload, Update
from mesh.metrics import UNKNOWN, identity_label
from mesh.model import CONFIG_KEY, IDENTITY_UNKNOWN, Identity, Protocol, Service, ServicePort, State, Workload
from mesh.model import Config as MeshConfig
from mesh.policy import PolicySet, port_needs_l7
from mesh.routing import RouteTable


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place a request can go to. Equal endpoints are equal across configurations."""

    key: str  # the workload's item key
    address: str
    port: int
    local: bool


@dataclass(frozen=True, slots=True)
class Destination:
    """What an address and port mean: a service's port, or (``endpoint``) one workload's."""

    service: str  # item key of the service, "" for a workload no service claims
    port: int
    mode: Protocol  # HTTP, TCP or AUTO
    endpoint: Endpoint | None = None


class Config:
    """See the attributes; look-ups that derive something remember it."""

    def __init__(
        self,
        state: State,
        *,
        revision: int,
        generation: int = 0,
        node: str = "",
        local: Iterable[LocalWorkload] = (),
        total: int | None = None,
    ) -> None:
        self.state, self.revision, self.generation, self.node = state, revision, generation, node
        self.sum = snapshot.digest_sum(state) if total is None else total
        mesh = state.get(CONFIG_KEY)
        self.known = isinstance(mesh, MeshConfig)
        self.mesh = mesh if isinstance(mesh, MeshConfig) else MeshConfig(trust_domain="")
        self.limits = Limits(
            self.mesh.head_bytes_max, self.mesh.head_timeout_s, self.mesh.idle_timeout_s, self.mesh.request_timeout_s
        )
        self.policies, self.routes = PolicySet(state), RouteTable(state)
        self.workloads: dict[str, Workload] = {}
        self.services: dict[str, Service] = {}
        self.service_names: dict[str, Service] = {}
        self.by_id: dict[int, Workload] = {}
        self.spiffe_id: dict[str, int] = {}
        self.identities: dict[int, str] = {}
        by_address: dict[str, list[Workload]] = {}
        self._vips: dict[str, str] = {}
        self._claims: dict[tuple[str, int], list[tuple[str, ServicePort]]] = {}  # workload and target port -> services
        for key, item in state.items():
            if isinstance(item, Workload):
                self.workloads[key] = item
                self.by_id[item.id] = item
                for address in item.addresses:
                    by_address.setdefault(address, []).append(item)
            elif isinstance(item, Service):
                self.services[key] = item
                self.service_names[f"{item.name}.{item.namespace}"] = item
                for vip in item.vips:
                    self._vips[vip] = key
                for port in item.ports:
                    for endpoint in item.endpoints:
                        self._claims.setdefault((endpoint, port.target_port), []).append((key, port))
            elif isinstance(item, Identity):
                self.spiffe_id[item.spiffe] = item.id
                self.identities[item.id] = item.spiffe
        self.by_address = {address: tuple(found) for address, found in by_address.items()}
        self.local: dict[str, LocalWorkload] = {entry.key: entry for entry in local}
        by_netns: dict[int, list[str]] = {}
        for entry in self.local.values():
            by_netns.setdefault(entry.netns, []).append(entry.key)
        self.by_netns = {netns: tuple(keys) for netns, keys in by_netns.items()}
        self.revoked = frozenset(self.mesh.revoked)
        self._endpoints: dict[tuple[str, int, bool], tuple[Endpoint, ...]] = {}
        self._destinations: dict[tuple[str, int], Destination | None] = {}

    @classmethod
    def empty(cls) -> Config:
        """Before the first Update: knows nothing, so denies everything."""
        return cls({}, revision=0)

    def updated(self, update: Update, node: str) -> Config:
        """A new Config after an Update. Raises SnapshotError when it does not hold a usable state."""
        if update.full:
            state, total = dict(update.put), None
        else:
            total = snapshot.advance(self.sum, self.state, update.put, update.delete)
            state = snapshot.changed(self.state, update.put, update.delete)
        snapshot.config_of(state)
        return Config(state, revision=update.revision, generation=update.generation, node=node, local=update.local, total=total)

    @property
    def digest(self) -> str:
        return snapshot.digest_hex(self.sum)

    def local_port(self, address: str, port: int) -> Workload | None:
        """The workload of this node that has this address and declares this port."""
        for workload in self.by_address.get(address, ()):
            if port in workload.ports and f"Workload/{workload.namespace}/{workload.name}" in self.local:
                return workload
        return None

    def destination(self, address: str, port: int) -> Destination | None:
        """What a dialled address means; None: nothing in the mesh."""
        key = (address, port)
        if key in self._destinations:
            return self._destinations[key]
        found = self._find(address, port)
        if found is not None:  # only what exists is remembered: addresses come from outside
            self._destinations[key] = found
        return found

    def _find(self, address: str, port: int) -> Destination | None:
        service_key = self._vips.get(address)
        if service_key is not None:
            return self.service_destination(service_key, port)
        for workload in self.by_address.get(address, ()):
            if port in workload.ports:
                return self.at_workload(f"Workload/{workload.namespace}/{workload.name}", port, address)
        return None

    def service_destination(self, service: str, port: int) -> Destination | None:
        """A service's port."""
        item = self.services.get(service)
        for found in item.ports if item else ():
            if found.port == port and found.protocol is not Protocol.UDP:
                return Destination(service, port, self._mode(service, found))
        return None

    def at_workload(self, key: str, port: int, address: str = "") -> Destination | None:
        """One workload's declared port, spoken to as the strictest of its services says."""
        workload = self.workloads.get(key)
        if workload is None or port not in workload.ports:
            return None
        claims = [(service, found) for service, found in self._claims.get((key, port), ()) if found.protocol is not Protocol.UDP]
        modes = {self._mode(service, found) for service, found in claims}
        mode = next((m for m in (Protocol.HTTP, Protocol.AUTO, Protocol.TCP) if m in modes), Protocol.AUTO)
        if port_needs_l7(self.policies, key, port):
            mode = Protocol.HTTP
        endpoint = Endpoint(key, address or workload.addresses[0], port, key in self.local)
        return Destination(claims[0][0] if claims else "", port, mode, endpoint)

    def _mode(self, service: str, port: ServicePort) -> Protocol:
        """A port that an L7 rule selects carries HTTP or nothing."""
        if port.protocol is Protocol.HTTP or self.routes.routed(service, port.port):
            return Protocol.HTTP
        if any(port_needs_l7(self.policies, key, port.target_port) for key in self.services[service].endpoints):
            return Protocol.HTTP
        return port.protocol

    def endpoints(self, service: str, port: int, v6: bool) -> tuple[Endpoint, ...]:
        """Where a service's port leads, in the caller's family where the endpoint has it."""
        key = (service, port, v6)
        found = self._endpoints.get(key)
        if found is None:
            found = self._endpoints[key] = tuple(self._make_endpoints(service, port, v6))
        return found

    def _make_endpoints(self, service: str, port: int, v6: bool) -> Iterable[Endpoint]:
        item = self.services.get(service)
        target = next((p.target_port for p in item.ports if p.port == port), 0) if item else 0
        for key in item.endpoints if item and target else ():
            workload = self.workloads.get(key)
            if workload is not None and workload.addresses:
                address = next((a for a in workload.addresses if (":" in a) == v6), workload.addresses[0])
                yield Endpoint(key, address, target, key in self.local)

    def label(self, spiffe: str | None) -> str:
        """ "namespace/service account" for metrics, from a closed set."""
        return identity_label(spiffe) if spiffe in self.spiffe_id else UNKNOWN

    def identity(self, spiffe: str | None) -> int:
        """The number of an identity, 0 when it is not known here."""
        return self.spiffe_id.get(spiffe, IDENTITY_UNKNOWN) if spiffe else IDENTITY_UNKNOWN
