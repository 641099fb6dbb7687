"""The resources as the registry holds them, what is looked up in them often, and how they are stored. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from controller.references import Fault, Granted, Key
from mesh import yamltree
from mesh.resources import NodeGrant, Resource, ResourceError, ResourceErrors, Workload, dump

ERRORS_MAX = 100  # reported at once


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
    """What is asked of the resources on every request."""

    def __init__(self, stored: Iterable[Stored]) -> None:
        stored = list(stored)
        self.granted = grants_of(stored)
        self.grant_made: dict[str, int] = {}  # by node: the revision of its oldest grant
        self.scheduled: set[tuple[str, str, str]] = set()  # (node, namespace, service account)
        self.by_node: dict[str, set[Key]] = {}  # workloads
        for item in stored:
            resource = item.resource
            if isinstance(resource, NodeGrant):
                node = resource.spec.node
                self.grant_made[node] = min(self.grant_made.get(node, item.created), item.created)
            elif isinstance(resource, Workload):
                self.scheduled.add((resource.spec.node, resource.namespace, resource.spec.service_account))
                self.by_node.setdefault(resource.spec.node, set()).add(resource.key)
        self.addresses = addresses_of(stored)


def grants_of(stored: Iterable[Stored]) -> Granted:
    return Granted(
        (item.resource.spec.node, grant)
        for item in stored
        if isinstance(item.resource, NodeGrant)
        for grant in item.resource.spec.service_accounts
    )


def addresses_of(stored: Iterable[Stored]) -> dict[str, frozenset[tuple[Key, str]]]:
    found: dict[str, set[tuple[Key, str]]] = {}
    for item in stored:
        if isinstance(item.resource, Workload):
            for address in item.resource.spec.addresses:
                found.setdefault(address, set()).add((item.resource.key, item.resource.spec.node))
    return {address: frozenset(owners) for address, owners in found.items()}


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
