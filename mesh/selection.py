"""What resources mean for others: who is behind a service, on which ports a workload is asked, how it speaks TLS. Kept as they
change, at the price of what a change touches. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from mesh import kinds
from mesh.items import labels_of, workload_key
from mesh.model import TlsMode

K = TypeVar("K")
V = TypeVar("V")
Label = tuple[str, str, str]  # (namespace, name, value)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


def may_serve(workload: kinds.Workload, service: kinds.Service) -> bool:
    """Labels are what a node says of its workloads; their service accounts it has been granted."""
    accounts = service.spec.service_accounts
    return accounts is None or workload.spec.service_account in accounts


class Selection:
    """Services and workloads by item key, each with those of the other kind that go with it."""

    def __init__(self) -> None:
        self.workloads: dict[str, kinds.Workload] = {}
        self.services: dict[str, kinds.Service] = {}
        self._labelled: dict[Label, set[str]] = {}  # workloads
        self._wanting: dict[Label, set[str]] = {}  # services, by the first label they select by
        self._endpoints: dict[str, list[str]] = {}  # by service, sorted
        self._behind: dict[str, set[str]] = {}  # by workload: the services it is behind
        self._claims: dict[tuple[str, int], set[str]] = {}  # by address and port: workloads
        self._claimed: dict[str, tuple[tuple[str, int], ...]] = {}

    def endpoints(self, service: str) -> tuple[str, ...]:
        """Item keys of the workloads behind a service, sorted."""
        return tuple(self._endpoints.get(service, ()))

    def ports(self, workload: str) -> tuple[int, ...]:
        """The ports a workload is asked on, sorted."""
        return self._ports(self._behind.get(workload, ()))

    def conflict(self, workload: kinds.Workload) -> str:
        """What keeps a workload out, in there already or not: another has a port of an address of its. Else nothing."""
        key = workload_key(workload.namespace, workload.name)
        for address, port in _claims(workload, self._ports(self._for(workload))):
            for other in self._claims.get((address, port), ()):
                if other != key:
                    first, second = sorted((key, other))
                    return f"{first} and {second} both claim {address} port {port}; give one another port"
        return ""

    def workload(self, key: str, resource: kinds.Workload | None) -> set[str]:
        """Puts or takes away a workload; the item keys whose items may be others now."""
        old = self.workloads.pop(key, None)
        touched = {key}
        if old is not None:
            for label in _labels(old):
                _discard(self._labelled, label, key)
            for service in self._behind.pop(key, ()):
                self._leave(service, key)
                touched.add(service)
        if resource is not None:
            self.workloads[key] = resource
            for label in _labels(resource):
                self._labelled.setdefault(label, set()).add(key)
            for service in list(self._for(resource)):
                insort(self._endpoints[service], key)
                self._behind.setdefault(key, set()).add(service)
                touched.add(service)
        self._claim((key,))
        return touched

    def service(self, key: str, resource: kinds.Service | None) -> set[str]:
        """Puts or takes away a service; as `workload`."""
        old = self.services.pop(key, None)
        touched = {key}
        if old is not None:
            _discard(self._wanting, _wanted(old), key)
            for workload in self._endpoints.pop(key):
                _discard(self._behind, workload, key)
                touched.add(workload)
        if resource is not None:
            self.services[key] = resource
            self._wanting.setdefault(_wanted(resource), set()).add(key)
            found = (name for name in self._labelled.get(_wanted(resource), ()) if _goes(self.workloads[name], resource))
            self._endpoints[key] = sorted(found)
            for workload in self._endpoints[key]:
                self._behind.setdefault(workload, set()).add(key)
                touched.add(workload)
        self._claim(touched - {key})
        return touched

    def _for(self, workload: kinds.Workload) -> Iterator[str]:
        """The services whose selectors fit."""
        for label in _labels(workload):
            for service in self._wanting.get(label, ()):
                if _goes(workload, self.services[service]):
                    yield service

    def _leave(self, service: str, workload: str) -> None:
        endpoints = self._endpoints[service]
        del endpoints[bisect_left(endpoints, workload)]

    def _ports(self, services: Iterable[str]) -> tuple[int, ...]:
        return tuple(sorted({port.target for service in services for port in self.services[service].spec.ports}))

    def _claim(self, workloads: Iterable[str]) -> None:
        for key in workloads:
            for claim in self._claimed.pop(key, ()):
                _discard(self._claims, claim, key)
            workload = self.workloads.get(key)
            if workload is None:
                continue
            self._claimed[key] = _claims(workload, self.ports(key))
            for claim in self._claimed[key]:
                self._claims.setdefault(claim, set()).add(key)


class Modes:
    """PeerAuthentication: a workload's own before its namespace's before the mesh's; the first by name where two tie."""

    def __init__(self) -> None:
        self._by_namespace: dict[str, dict[str, kinds.PeerAuthentication]] = {}

    def change(self, namespace: str, name: str, resource: kinds.PeerAuthentication | None) -> None:
        held = dict(self._by_namespace.get(namespace, {}))
        held.pop(name, None)
        if resource is not None:
            held[name] = resource
        if held:
            self._by_namespace[namespace] = dict(sorted(held.items()))
        else:
            self._by_namespace.pop(namespace, None)

    def of(self, workload: kinds.Workload, root: str) -> TlsMode:
        """``root``: the namespace whose resources are the mesh's."""
        own = self._by_namespace.get(workload.namespace, {}).values()
        labels = workload.metadata.labels
        groups = (
            [item for item in own if (found := labels_of(item.spec.selector)) and selects(found, labels)],
            [item for item in own if not labels_of(item.spec.selector)],
            [item for item in self._by_namespace.get(root, {}).values() if not labels_of(item.spec.selector)],
        )
        for group in groups:
            if group:
                return TlsMode(group[0].spec.mtls.mode)
        return TlsMode.STRICT


def _goes(workload: kinds.Workload, service: kinds.Service) -> bool:
    return selects(service.spec.selector, workload.metadata.labels) and may_serve(workload, service)


def _labels(workload: kinds.Workload) -> Iterator[Label]:
    for name, value in workload.metadata.labels.items():
        yield workload.namespace, name, value


def _wanted(service: kinds.Service) -> Label:
    """The first label narrows, all decide."""
    return service.namespace, *next(iter(service.spec.selector.items()))


def _claims(workload: kinds.Workload, ports: Iterable[int]) -> tuple[tuple[str, int], ...]:
    return tuple((address, port) for address in workload.spec.addresses for port in ports)


def _discard(index: dict[K, set[V]], at: K, what: V) -> None:
    held = index[at]
    held.discard(what)
    if not held:
        del index[at]
