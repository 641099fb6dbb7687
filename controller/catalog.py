"""The resources as the registry holds them, what is looked up in them often, and how they are stored. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from controller.allocate import KINDS
from controller.references import Fault, Granted, Key
from mesh import yamltree
from mesh.compile import needs
from mesh.resources import NodeGrant, Resource, ResourceError, ResourceErrors, Workload, dump

ERRORS_MAX = 100  # reported at once

T = TypeVar("T")


class Record(msgspec.Struct, frozen=True):
    """A resource as stored under ``resource/<kind>/<namespace>/<name>``. owner: the node that registered it, or ""."""

    resource: dict[str, object]
    owner: str = ""


@dataclass(frozen=True)
class Stored:
    resource: Resource
    value: bytes
    created: int
    owner: str = ""


@dataclass(frozen=True)
class Result:
    kind: str
    namespace: str
    name: str
    result: str  # created | configured | unchanged


class Index:
    """What is asked of the resources on every request, kept as they change, at the price of what changes."""

    def __init__(self, stored: Iterable[Stored], trust_domain: str) -> None:
        self._trust_domain = trust_domain
        self._grants: dict[Key, Stored] = {}
        self._users = {kind: Counter[str]() for kind in KINDS}  # resources that want the number of a name
        self.granted = Granted([])
        self.grant_made: dict[str, int] = {}  # by node: the revision of its oldest grant
        self.scheduled = Counter[tuple[str, str, str]]()  # workloads of (node, namespace, service account)
        self.by_node: dict[str, set[Key]] = {}  # workloads
        self.addresses: dict[str, set[tuple[Key, str]]] = {}  # workloads with their nodes
        self.change((None, item) for item in stored)

    def change(self, moved: Iterable[tuple[Stored | None, Stored | None]]) -> None:
        """Takes pairs of what was and what is now."""
        granting = False
        for old, new in moved:
            for stored, by in ((old, -1), (new, 1)):
                if stored is None:
                    continue
                self._count(stored, by)
                if isinstance(stored.resource, Workload):
                    self._place(stored.resource, by)
                elif isinstance(stored.resource, NodeGrant):
                    granting = True
                    if by > 0:
                        self._grants[stored.resource.key] = stored
                    else:
                        del self._grants[stored.resource.key]
        if granting:
            self.granted = grants_of(self._grants.values())
            self.grant_made = {}
            for stored in self._grants.values():
                if isinstance(stored.resource, NodeGrant):
                    node = stored.resource.spec.node
                    self.grant_made[node] = min(self.grant_made.get(node, stored.created), stored.created)

    def _count(self, stored: Stored, by: int) -> None:
        for kind, names in _wanted(stored, self._trust_domain):
            users = self._users[kind]
            for name in names:
                users[name] += by
                if not users[name]:
                    del users[name]

    def _place(self, workload: Workload, by: int) -> None:
        spec, key = workload.spec, workload.key
        place = (spec.node, workload.namespace, spec.service_account)
        self.scheduled[place] += by
        if not self.scheduled[place]:
            del self.scheduled[place]
        _hold(self.by_node, spec.node, key, by)
        for address in spec.addresses:
            _hold(self.addresses, address, (key, spec.node), by)

    def grants_after(self, delta: Mapping[Key, Stored | None]) -> Granted:
        """What is granted once ``delta`` is in; the very object of now if no grant changes."""
        if not any(kind == "NodeGrant" for kind, _, _ in delta):
            return self.granted
        return grants_of(stored for stored in ({**self._grants, **delta}).values() if stored is not None)

    def addresses_after(self, delta: Mapping[Key, Stored | None]) -> dict[str, set[tuple[Key, str]]]:
        """Who has the addresses of the workloads in ``delta``, once it is in."""
        found: dict[str, set[tuple[Key, str]]] = {}
        for stored in delta.values():
            if stored is not None and isinstance(stored.resource, Workload):
                own = stored.resource.key, stored.resource.spec.node
                for address in stored.resource.spec.addresses:
                    if address not in found:
                        found[address] = {owner for owner in self.addresses.get(address, ()) if owner[0] not in delta}
                    found[address].add(own)
        return found

    def demand(
        self, delta: Mapping[Key, Stored | None], present: Mapping[Key, Stored]
    ) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """The names that get a number by ``delta`` on ``present``, which is what is indexed, and those that lose theirs;
        by kind."""
        moved = {kind: Counter[str]() for kind in KINDS}
        for key, stored in delta.items():
            for side, by in ((present.get(key), -1), (stored, 1)):
                if side is not None:
                    for kind, names in _wanted(side, self._trust_domain):
                        for name in names:
                            moved[kind][name] += by
        new: dict[str, set[str]] = {kind: set() for kind in KINDS}
        gone: dict[str, set[str]] = {kind: set() for kind in KINDS}
        for kind in KINDS:
            for name, by in moved[kind].items():
                before = self._users[kind][name]
                if not before and by > 0:
                    new[kind].add(name)
                elif before and before + by <= 0:
                    gone[kind].add(name)
        return new, gone


def _wanted(stored: Stored, trust_domain: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    want = needs([stored.resource], trust_domain)
    return zip(KINDS, (want.identities, want.workloads, want.services), strict=True)


def _hold(index: dict[str, set[T]], at: str, what: T, by: int) -> None:
    if by > 0:
        index.setdefault(at, set()).add(what)
        return
    held = index[at]
    held.discard(what)
    if not held:
        del index[at]


def grants_of(stored: Iterable[Stored]) -> Granted:
    return Granted(
        (item.resource.spec.node, grant)
        for item in stored
        if isinstance(item.resource, NodeGrant)
        for grant in item.resource.spec.service_accounts
    )


def plain(stored: Mapping[Key, Stored]) -> dict[Key, Resource]:
    return {key: item.resource for key, item in stored.items()}


def store_key(key: Key) -> str:
    return "resource/" + "/".join(key)


def encode(resource: Resource, owner: str) -> bytes:
    return msgspec.json.encode(Record(dump(resource), owner))


def owner_of(resource: Resource, old: Stored | None) -> str:
    """Who registered what an operator applies: a node's workload stays the node's, and goes with its grant."""
    same = old is not None and isinstance(resource, Workload) and resource.spec.node == old.owner
    return old.owner if old is not None and same else ""


def keeping(workload: Workload, old: Stored | None) -> Workload:
    """A node's registration with what an operator has set on the workload, which the node knows nothing of."""
    if old is None or not isinstance(old.resource, Workload) or old.resource.spec.express == workload.spec.express:
        return workload
    spec = workload.spec.model_copy(update={"express": old.resource.spec.express})
    return workload.model_copy(update={"spec": spec})


def errors_of(found: Iterable[Fault], loaded: list[Resource], text: str, filename: str) -> ResourceErrors:
    """Faults with the lines they are at."""
    documents = dict(zip((resource.key for resource in loaded), yamltree.parse(text), strict=True))
    errors = []
    for fault in found:
        document = documents.get(fault.key)
        line = document.line_of(fault.path) if document else 0
        errors.append(ResourceError(filename, line, yamltree.shown(fault.path), fault.message, fault.remedy))
    return ResourceErrors(errors[:ERRORS_MAX])
