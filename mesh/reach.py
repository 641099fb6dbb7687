"""A node's part of the State: what its workloads can reach, what can reach them, and what decides between the two.

Kept for a node: the Config and every IdentityBudget; its own workloads and the ServiceEntries of their namespaces;
services whose endpoints an identity of the node could connect to, was denied by a named rule, or that share a namespace
with one of its workloads (so that a denial names its rule instead of looking like a missing name); the routes of these
services and the services they lead to; all their endpoints; workloads elsewhere that could connect to the node's own; the
identities of every workload kept; every policy that selects a kept workload, and the services such policies name. A
decision about a kept workload is so the same on the node as on the whole State.

A `Reach` follows its State. What nodes were told is kept (`_Part`), and a workload that comes, goes or changes costs what it
touches: parts it has nothing to do with stay the very same object; in most others the services and policies stay what they
are, and only items are exchanged. Where that is not certain a part is made anew when it is asked for, and all are after a
change of policies, routes, settings or of services themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TypeVar

from msgspec import structs

from mesh.model import (
    CONFIG_KEY,
    IDENTITY_UNKNOWN,
    Config,
    Identity,
    IdentityBudget,
    Item,
    Policy,
    Route,
    Service,
    ServiceEntry,
    State,
    Workload,
    key_of,
)
from mesh.policy import Peer, PolicySet, Request, authorize
from mesh.snapshot import item_digest, summed

K = TypeVar("K")
KNOWN_MAX = 1_000_000  # answers kept; all are dropped when full
INDEXES_MAX = 65_536  # sets of policies, those of workloads that went too; past it all is made anew

Answers = tuple[int, tuple[int, ...]]  # which policies decide, and for which ports


@dataclass
class _Part:
    """What one node is told, and what that rests on."""

    state: State
    sum: int  # the digest's number
    namespaces: set[str]  # of its own workloads
    spiffes: Counter[str]  # its own workloads, by SPIFFE URI, and by the answers they give
    answers: Counter[Answers]
    own: list[str]  # one for each answer
    services: set[str]
    policies: set[str]
    indexes: Counter[int]  # workloads told, by the policies that select them
    identities: Counter[str]  # workloads told, by SPIFFE URI
    shared: bool = False  # `state` is in others' hands too: it is copied before a change


@dataclass
class _Step:
    """Items that have become others, and what they were. By item key."""

    put: Mapping[str, Item]
    shares: dict[str, int] = field(default_factory=dict)  # of the digest, as they were
    workloads: dict[str, tuple[Workload | None, int]] = field(default_factory=dict)  # with the policies that selected them
    services: set[str] = field(default_factory=set)  # that may be seen by fewer


class Reach:
    """The filter for every node of one State; what nodes have in common is computed once."""

    def __init__(self, state: State) -> None:
        self._shares: dict[str, int] = {}  # of the digest, by key; filled when first asked for
        self._begin(dict(state))

    def _begin(self, state: State) -> None:
        self._state = state
        self._policies = PolicySet(state)
        self._services: dict[str, Service] = {}
        self._workloads: dict[str, Workload] = {}
        self._by_node: dict[str, set[str]] = {}
        self._by_identity: dict[str, set[str]] = {}
        self._behind: dict[str, set[str]] = {}  # by workload: services
        self._routes: dict[str, list[str]] = {}
        for key, item in state.items():
            self._place(key, None, item)
            if isinstance(item, Route):
                for service, _ in item.parents:
                    self._routes.setdefault(service, []).append(key)
        self._budgets = [key for key, item in state.items() if isinstance(item, IdentityBudget)]
        self._entries = {key: item for key, item in state.items() if isinstance(item, ServiceEntry)}
        config = state.get(CONFIG_KEY)
        self._root = config.root_namespace if isinstance(config, Config) else ""
        self._known: dict[tuple[str, int, tuple[int, ...]], tuple[bool, bool]] = {}
        self._alike: dict[str, list[str]] = {}  # by service: endpoints, one for each answer they give
        self._parts: dict[str, _Part] = {}

    def _place(self, key: str, old: Item | None, new: Item | None) -> None:
        if isinstance(old, Workload):
            del self._workloads[key]
            _discard(self._by_node, old.node, key)
            _discard(self._by_identity, old.spiffe, key)
        if isinstance(new, Workload):
            self._workloads[key] = new
            self._by_node.setdefault(new.node, set()).add(key)
            self._by_identity.setdefault(new.spiffe, set()).add(key)
        if isinstance(new, Service):
            self._services[key] = new
        before, after = _endpoints(old), _endpoints(new)
        for endpoint in before - after:
            _discard(self._behind, endpoint, key)
        for endpoint in after - before:
            self._behind.setdefault(endpoint, set()).add(key)

    def nodes(self) -> tuple[str, ...]:
        """Nodes that have workloads, sorted."""
        return tuple(sorted(self._by_node))

    def of(self, node: str) -> State:
        """The node's part: the very same object as long as it is the same. Not to be changed."""
        return self.part(node)[0]

    def part(self, node: str) -> tuple[State, int]:
        """The node's part and its digest's number."""
        part = self._parts.get(node)
        if part is None:
            part = self._parts[node] = self._part(node)
        part.shared = True
        return part.state, part.sum

    def forget(self, node: str) -> None:
        """Nobody is going to ask for the node's part soon."""
        self._parts.pop(node, None)

    def _part(self, node: str) -> _Part:
        own = self._by_node.get(node, set())
        spiffes = Counter(self._workloads[key].spiffe for key in own)
        namespaces = {self._workloads[key].namespace for key in own}
        answers = Counter(map(self._answers, own))
        alike = self._one_of_each(own)
        services = {
            key for key, service in self._services.items() if service.namespace in namespaces or self._visible(spiffes, key)
        }
        callers = {
            key
            for spiffe, instances in self._by_identity.items()
            if any(self._reaches(spiffe, target)[0] for target in alike)
            for key in instances
        }
        # A policy may select by service; that service then belongs to the decision, and its endpoints to it
        while True:
            services = self._closure(services)
            workloads = {key for service in services for key in self._services[service].endpoints if key in self._workloads}
            workloads |= callers | own
            indexes = Counter(id(self._policies.index(key)) for key in workloads)
            one_of_each = {id(self._policies.index(key)): key for key in workloads}.values()
            policies = {key: policy for workload in one_of_each for key, policy in self._selecting(workload)}
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
        identities = Counter(self._workloads[key].spiffe for key in workloads)
        keep.update(key for key in map(_identity, identities) if isinstance(self._state.get(key), Identity))
        state = {key: self._state[key] for key in keep}
        total = summed(self._share(key) for key in keep)
        return _Part(state, total, namespaces, spiffes, answers, alike, services, set(policies), indexes, identities)

    # ---- following

    def change(self, put: Mapping[str, Item], gone: AbstractSet[str]) -> None:
        """Items that are new or others, and keys that are no more."""
        if self._policies.indexes <= INDEXES_MAX and all(self._simple(key, put.get(key)) for key in (*put, *gone)):
            step = self._step(put, gone)
            self._parts = {node: part for node, part in self._parts.items() if self._follow(node, part, step)}
            return
        for key in (*put, *gone):
            self._shares.pop(key, None)
        self._begin({**{key: item for key, item in self._state.items() if key not in gone}, **put})

    def _simple(self, key: str, new: Item | None) -> bool:
        """Whether services, routes and policies may stay what they are to everybody."""
        old = self._state.get(key)
        if isinstance(old, Service) and isinstance(new, Service):
            return structs.replace(old, endpoints=new.endpoints) == new
        return isinstance(new or old, Workload | Identity)

    def _step(self, put: Mapping[str, Item], gone: AbstractSet[str]) -> _Step:
        step = _Step(put)
        for key in (*put, *gone):
            old = self._state.get(key)
            if old is not None:
                step.shares[key] = self._share(key)
            if isinstance(old, Service):
                for endpoint in _endpoints(old) ^ _endpoints(put[key]):
                    self._note(step, endpoint)
            elif key.startswith("Workload/"):
                self._note(step, key)
        for key in (*put, *gone):
            old, new = self._state.pop(key, None), put.get(key)
            self._shares.pop(key, None)
            self._place(key, old, new)
            self._policies.move(key, old, new)
            if new is not None:
                self._state[key] = new
        for service in step.services.union(*(self._behind.get(key, ()) for key in step.workloads)):
            self._alike.pop(service, None)
        return step

    def _note(self, step: _Step, workload: str) -> None:
        if workload not in step.workloads:
            step.workloads[workload] = self._workloads.get(workload), id(self._policies.index(workload))
            step.services |= self._behind.get(workload, set())

    def _follow(self, node: str, part: _Part, step: _Step) -> bool:
        """Takes a step in a node's part; False, and nothing done, where the part may be quite another."""
        for key in step.services & part.services:
            if self._services[key].namespace not in part.namespaces and not self._visible(part.spiffes, key):
                return False
        told: dict[str, Item | None] = {key: item for key, item in step.put.items() if key in part.services}
        indexes, identities = Counter[int](), Counter[str]()
        spiffes, answers = Counter[str](), Counter[Answers]()
        moved = [(key, old, self._workloads.get(key), index) for key, (old, index) in step.workloads.items()]
        mine = any(side is not None and side.node == node for _, old, new, _ in moved for side in (old, new))
        alike = self._one_of_each(self._by_node.get(node, ())) if mine else part.own
        for key, old, new, index in moved:
            for side, by, answer in (
                (old, -1, (index, old.ports if old else ())),
                (new, 1, self._answers(key) if new else (0, ())),
            ):
                if side is not None and side.node == node:
                    spiffes[side.spiffe] += by
                    answers[answer] += by
            if old is not None and key in part.state:
                indexes[index] -= 1
                identities[old.spiffe] -= 1
                told[key] = None
            if new is None:
                continue
            behind = self._behind.get(key, set())
            if not behind <= part.services and any(any(self._reaches(spiffe, key)) for spiffe in part.spiffes):
                return False  # of a service the node had not seen
            if behind & part.services or new.node == node or any(self._reaches(new.spiffe, own)[0] for own in alike):
                if not {at for at, _ in self._selecting(key)} <= part.policies:
                    return False
                indexes[id(self._policies.index(key))] += 1
                identities[new.spiffe] += 1
                told[key] = new
        if any(by < 0 and part.indexes[index] + by <= 0 for index, by in indexes.items()):
            return False  # its policies may have selected nothing else
        if _others(part.spiffes, spiffes) or _others(part.answers, answers):
            return False  # the node asks as somebody else, or answers otherwise
        part.own = alike
        part.spiffes.update(spiffes)
        part.answers.update(answers)
        part.indexes.update(indexes)
        part.identities.update(identities)
        for spiffe in identities:
            found = self._state.get(_identity(spiffe))
            told[_identity(spiffe)] = found if part.identities[spiffe] else None
            if not part.identities[spiffe]:
                del part.identities[spiffe]
        self._tell(part, told, step)
        return True

    def _tell(self, part: _Part, told: Mapping[str, Item | None], step: _Step) -> None:
        told = {key: item for key, item in told.items() if part.state.get(key) is not item}
        if told and part.shared:
            part.state, part.shared = dict(part.state), False
        for key, item in told.items():
            if part.state.pop(key, None) is not None:
                part.sum -= step.shares[key] if key in step.shares else self._share(key)
            if item is not None:
                part.state[key] = item
                part.sum += self._share(key)
        part.sum = summed((part.sum,))

    def _share(self, key: str) -> int:
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = item_digest(key, self._state[key])
        return share

    def _answers(self, workload_key: str) -> Answers:
        """Workloads for which this is equal answer everybody the same."""
        return id(self._policies.index(workload_key)), self._workloads[workload_key].ports

    def _selecting(self, workload_key: str) -> list[tuple[str, Policy]]:
        return [(key_of(policy), policy) for policy in self._policies.selecting(workload_key)]

    def _visible(self, spiffes: Iterable[str], service: str) -> bool:
        endpoints = self._alike.get(service)
        if endpoints is None:
            endpoints = self._alike[service] = self._one_of_each(self._services[service].endpoints)
        return any(any(self._reaches(spiffe, endpoint)) for endpoint in endpoints for spiffe in spiffes)

    def _one_of_each(self, workloads: Iterable[str]) -> list[str]:
        """One for each answer that these workloads give."""
        return list({self._answers(key): key for key in workloads if key in self._workloads}.values())

    def _reaches(self, spiffe: str, workload_key: str) -> tuple[bool, bool]:
        """Whether an identity could connect to some port of a workload, and whether a rule denies it by name."""
        workload = self._workloads.get(workload_key)
        if workload is None or not workload.ports:
            return False, False
        key = (spiffe, *self._answers(workload_key))
        known = self._known.get(key)
        if known is None:
            peer = Peer(spiffe, IDENTITY_UNKNOWN)  # policies ask for names
            verdicts = [authorize(self._policies, peer, workload_key, Request(port)) for port in workload.ports]
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
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


def _identity(spiffe: str) -> str:
    return f"Identity//{spiffe}"


def _endpoints(item: Item | None) -> frozenset[str]:
    return frozenset(item.endpoints) if isinstance(item, Service) else frozenset()


def _others(counted: Counter[K], by: Counter[K]) -> bool:
    """Whether one comes that was not there, or one leaves."""
    return any((counted[key] > 0) != (counted[key] + more > 0) for key, more in by.items())


def _discard(index: dict[str, set[str]], at: str, what: str) -> None:
    held = index[at]
    held.discard(what)
    if not held:
        del index[at]


def reachable(state: State, node: str) -> State:
    """What ``node`` needs of ``state``. For many nodes of one State use `Reach`."""
    return Reach(state).of(node)
