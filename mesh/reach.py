"""A node's part of the State: what its workloads can reach, what can reach them, and what decides between the two.

Kept for a node: the Config and every IdentityBudget; its own workloads and the ServiceEntries of their namespaces;
services whose endpoints an identity of the node could connect to, was denied by a named rule, or that share a namespace
with one of its workloads (so that a denial names its rule instead of looking like a missing name); the routes of these
services and the services they lead to; all their endpoints; workloads elsewhere that could connect to the node's own; the
identities of every workload kept; every policy that selects a kept workload, and the services such policies name. A
decision about a kept workload is so the same on the node as on the whole State.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.model import (
    CONFIG_KEY,
    IDENTITY_UNKNOWN,
    Config,
    Identity,
    IdentityBudget,
    Policy,
    Route,
    Service,
    ServiceEntry,
    State,
    Workload,
    key_of,
)
from mesh.policy import Peer, PolicySet, Request, authorize


class Reach:
    """The filter for every node of one State; what nodes have in common is computed once."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._policies = PolicySet(state)
        self._services = {key: item for key, item in state.items() if isinstance(item, Service)}
        self._workloads = {key: item for key, item in state.items() if isinstance(item, Workload)}
        self._routes: dict[str, list[str]] = {}
        for key, item in state.items():
            if isinstance(item, Route):
                for service, _ in item.parents:
                    self._routes.setdefault(service, []).append(key)
        self._budgets = [key for key, item in state.items() if isinstance(item, IdentityBudget)]
        self._entries = {key: item for key, item in state.items() if isinstance(item, ServiceEntry)}
        config = state.get(CONFIG_KEY)
        self._root = config.root_namespace if isinstance(config, Config) else ""
        self._by_node: dict[str, list[str]] = {}
        self._by_identity: dict[str, list[str]] = {}
        for key, workload in self._workloads.items():
            self._by_node.setdefault(workload.node, []).append(key)
            self._by_identity.setdefault(workload.spiffe, []).append(key)
        self._identities = {workload.spiffe: workload.identity for workload in self._workloads.values()}
        self._known: dict[tuple[str, int, tuple[int, ...]], tuple[bool, bool]] = {}

    def nodes(self) -> tuple[str, ...]:
        """Nodes that have workloads, sorted."""
        return tuple(sorted(self._by_node))

    def of(self, node: str) -> State:
        """The node's part."""
        own = self._by_node.get(node, ())
        spiffes = {self._workloads[key].spiffe for key in own}
        namespaces = {self._workloads[key].namespace for key in own}
        services = {
            key for key, service in self._services.items() if service.namespace in namespaces or self._visible(spiffes, service)
        }
        callers = {
            key
            for spiffe, instances in self._by_identity.items()
            if any(self._reaches(spiffe, target)[0] for target in own)
            for key in instances
        }
        # A policy may select by service; that service then belongs to the decision, and its endpoints to it
        while True:
            services = self._closure(services)
            workloads = {key for service in services for key in self._services[service].endpoints if key in self._workloads}
            workloads |= callers.union(own)
            policies = {key: policy for workload in workloads for key, policy in self._selecting(workload)}
            named = {service for policy in policies.values() for service in policy.services if service in self._services}
            if named <= services:
                break
            services |= named
        keep: set[str] = {*services, *workloads, *policies}
        if CONFIG_KEY in self._state:
            keep.add(CONFIG_KEY)
        keep.update(self._budgets)
        keep.update(key for key, entry in self._entries.items() if own and entry.namespace in (*namespaces, self._root))
        for key in services:
            keep.update(self._routes.get(key, ()))
        seen = {self._workloads[key].spiffe for key in keep if key in self._workloads}
        keep.update(key for key in (f"Identity//{spiffe}" for spiffe in seen) if isinstance(self._state.get(key), Identity))
        return {key: item for key, item in self._state.items() if key in keep}

    def _selecting(self, workload_key: str) -> list[tuple[str, Policy]]:
        return [(key_of(policy), policy) for policy in self._policies.selecting(workload_key)]

    def _visible(self, spiffes: set[str], service: Service) -> bool:
        return any(any(self._reaches(spiffe, endpoint)) for endpoint in service.endpoints for spiffe in spiffes)

    def _reaches(self, spiffe: str, workload_key: str) -> tuple[bool, bool]:
        """Whether an identity could connect to some port of a workload, and whether a rule denies it by name."""
        workload = self._workloads.get(workload_key)
        if workload is None or not workload.ports:
            return False, False
        key = (spiffe, id(self._policies.index(workload_key)), workload.ports)
        known = self._known.get(key)
        if known is None:
            verdicts = [
                authorize(
                    self._policies, Peer(spiffe, self._identities.get(spiffe, IDENTITY_UNKNOWN)), workload_key, Request(port)
                )
                for port in workload.ports
            ]
            known = self._known[key] = (
                any(verdict.possible for verdict in verdicts),
                any(verdict.reason == "deny_rule" for verdict in verdicts),
            )
        return known

    def _closure(self, start: Iterable[str]) -> set[str]:
        """The services and those that routes lead to from them."""
        out: set[str] = set()
        todo = list(start)
        while todo:
            key = todo.pop()
            if key in out or key not in self._services:
                continue
            out.add(key)
            for route_key in self._routes.get(key, ()):
                route = self._state[route_key]
                if isinstance(route, Route):
                    todo += [backend.service for rule in route.rules for backend in rule.backends]
        return out


def reachable(state: State, node: str) -> State:
    """What ``node`` needs of ``state``. For many nodes of one State use `Reach`."""
    return Reach(state).of(node)
