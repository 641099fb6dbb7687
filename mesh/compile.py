"""From what operators wrote to what nodes work from: resources and allocated numbers to a State, and a node's part of it.

A `Compilation` is a State that follows its resources, each change at the price of what it touches; `compile_state` is the
same in one step. Both are pure and total: references to what does not exist yield nothing (a policy for no service selects
nobody), because resources arrive in any order. Only numbers must have been allocated before: `needs` lists them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mesh import items, kinds
from mesh.identity import SpiffeId
from mesh.items import Allocations, CompileError, protocol, service_key, workload_key
from mesh.kinds import Resource
from mesh.model import CONFIG_KEY, Identity, Item, State, Workload
from mesh.reach import Reach, reachable
from mesh.selection import Modes, Selection

__all__ = [
    "Allocations",
    "Changed",
    "Compilation",
    "CompileError",
    "Key",
    "Needs",
    "Reach",
    "compile_state",
    "needs",
    "protocol",
    "reachable",
    "service_key",
    "workload_key",
]

Key = tuple[str, str, str]  # (kind, namespace, name) of a resource
_ITEM_KINDS = {  # of resources that are an item by themselves
    "HTTPRoute": "Route",
    "AuthorizationPolicy": "Policy",
    "ServiceEntry": "ServiceEntry",
    "IdentityBudget": "IdentityBudget",
}


@dataclass(frozen=True)
class Needs:
    """What must be allocated before `compile_state`, sorted."""

    identities: tuple[str, ...]
    workloads: tuple[str, ...]
    services: tuple[str, ...]


@dataclass(frozen=True)
class Changed:
    """What became of a State: items that are new or others, and keys that are gone."""

    put: Mapping[str, Item]
    gone: frozenset[str]


def needs(resources: Iterable[Resource], trust_domain: str) -> Needs:
    """The identities, workloads and services that want a number."""
    identities, workloads, services = set(), set(), set()
    for resource in resources:
        if isinstance(resource, kinds.Workload):
            workloads.add(workload_key(resource.namespace, resource.name))
            identities.add(_spiffe(resource, trust_domain))
        elif isinstance(resource, kinds.Service):
            services.add(service_key(resource.namespace, resource.name))
    return Needs(tuple(sorted(identities)), tuple(sorted(workloads)), tuple(sorted(services)))


def compile_state(resources: Iterable[Resource], allocations: Allocations) -> State:
    """The whole mesh as items. Raises CompileError."""
    compilation = Compilation()
    compilation.take(compilation.change({resource.key: resource for resource in resources}, allocations))
    return compilation.state


class Compilation:
    """``state`` follows the resources, in two steps: what a change makes of it, and taking that."""

    def __init__(self) -> None:
        self.state: State = {}
        self._mesh: dict[Key, kinds.MeshConfig] = {}
        self._root = ""
        self._selection, self._modes = Selection(), Modes()
        self._alone: dict[str, Resource] = {}  # by item key: resources that are an item by themselves
        self._created: dict[str, int] = {}
        self._numbers: dict[str, int] = {}  # by item key or SPIFFE URI
        self._vips: dict[str, tuple[str, str]] = {}
        self._users = Counter[str]()  # workloads of an identity

    def change(self, resources: Mapping[Key, Resource | None], allocations: Allocations) -> Changed:
        """Takes resources that are new or others, and None for what is gone. ``allocations``: the mesh's settings as they are
        now, and numbers at least of what ``resources`` names. The answer is to be given to `take`. Raises CompileError; of what
        followed, ``state`` alone is of use then.
        """
        self._allocate(allocations)
        stale: set[str] = set()
        for name, resource in resources.items():
            stale |= self._sort_in(name, resource)
        mesh = next((self._mesh[name] for name in sorted(self._mesh)), None)
        config = items.config_of(mesh, allocations)
        if config.root_namespace != self._root:
            self._root = config.root_namespace
            stale |= self._selection.workloads.keys()
            stale |= {key for key in self._alone if key.startswith("Policy/")}
        put: dict[str, Item] = {}
        gone: set[str] = set()
        identities: set[str] = set()
        for key in sorted(stale):
            old, new = self.state.get(key), self._item(key, allocations.trust_domain)
            for item, by in ((old, -1), (new, 1)):
                if isinstance(item, Workload):
                    self._users[item.spiffe] += by
                    identities.add(item.spiffe)
            if new is None:
                self._forget(key)
                if old is not None:
                    gone.add(key)
            elif old != new:
                put[key] = new
        if self.state.get(CONFIG_KEY) != config:
            put[CONFIG_KEY] = config
        for spiffe in identities:
            key = f"Identity//{spiffe}"
            if not self._users[spiffe]:
                del self._users[spiffe]
                self._numbers.pop(spiffe, None)
                if key in self.state:
                    gone.add(key)
            elif self.state.get(key) != (identity := Identity(self._number(spiffe), spiffe)):
                put[key] = identity
        return Changed(put, frozenset(gone))

    def take(self, changed: Changed) -> None:
        """Puts into ``state`` what the last change came to."""
        self.state.update(changed.put)
        for key in changed.gone:
            del self.state[key]

    def _allocate(self, allocations: Allocations) -> None:
        for numbers in (allocations.identities, allocations.workloads, allocations.services):
            self._numbers.update(numbers)
        self._vips.update(allocations.vips)
        self._created.update(allocations.created)

    def _forget(self, key: str) -> None:
        self._numbers.pop(key, None)
        self._vips.pop(key, None)
        self._created.pop(key, None)

    def _sort_in(self, key: Key, resource: Resource | None) -> set[str]:
        """Takes a resource in or out; the keys of items that may be others now."""
        kind, namespace, name = key
        match kind:
            case "Workload":
                assert resource is None or isinstance(resource, kinds.Workload)  # noqa: S101  # by its kind
                return self._selection.workload(workload_key(namespace, name), resource)
            case "Service":
                assert resource is None or isinstance(resource, kinds.Service)  # noqa: S101  # by its kind
                return self._selection.service(service_key(namespace, name), resource)
            case "PeerAuthentication":
                assert resource is None or isinstance(resource, kinds.PeerAuthentication)  # noqa: S101  # by its kind
                self._modes.change(namespace, name, resource)
                workloads = self._selection.workloads
                return {at for at, workload in workloads.items() if namespace in (workload.namespace, self._root)}
            case "MeshConfig":
                self._mesh.pop(key, None)
                if isinstance(resource, kinds.MeshConfig):
                    self._mesh[key] = resource
            case _ if kind in _ITEM_KINDS:
                at = f"{_ITEM_KINDS[kind]}/{namespace}/{name}"
                self._alone.pop(at, None)
                if resource is not None:
                    self._alone[at] = resource
                return {at}
        return set()

    def _item(self, key: str, trust_domain: str) -> Item | None:
        if (workload := self._selection.workloads.get(key)) is not None:
            if conflict := self._selection.conflict(workload):
                raise CompileError(conflict)
            spiffe = _spiffe(workload, trust_domain)
            numbers = self._number(key), self._number(spiffe)
            ports, mode = self._selection.ports(key), self._modes.of(workload, self._root)
            return items.workload_item(workload, *numbers, spiffe, ports, mode)
        if (service := self._selection.services.get(key)) is not None:
            return items.service_item(service, self._selection.endpoints(key), self._number(key), self._vips.get(key, ()))
        match self._alone.get(key):
            case kinds.HTTPRoute() as route:
                return items.route(route, self._created.get(key, 0))
            case kinds.AuthorizationPolicy() as policy:
                return items.policy(policy, self._root)
            case kinds.ServiceEntry() as entry:
                return items.entry(entry)
            case kinds.IdentityBudget() as budget:
                return items.budget(budget)
        return None

    def _number(self, name: str) -> int:
        try:
            return self._numbers[name]
        except KeyError:
            raise CompileError(f"{name} has no number; allocate what needs() lists first") from None


def _spiffe(workload: kinds.Workload, trust_domain: str) -> str:
    return str(SpiffeId(trust_domain, workload.namespace, workload.spec.service_account))
