"""The resources of the mesh, the numbers they need, and who is cut: checked, then stored in one transaction, then seen.

Everything is kept in memory too (there is one writer); memory changes only after the store has answered, under one
lock. ``revision`` is that of the last change a node could notice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec
import structlog

from controller import contents, expiry, references, revocation
from controller.allocate import Exhausted
from controller.allowance import Allowance
from controller.ca import Authority
from controller.catalog import Index, Result, Stored, encode, errors_of, keeping, owner_of, plain, store_key
from controller.contents import Contents
from controller.events import Refused, not_granted
from controller.inputs import Inputs, gather
from controller.references import Fault, Granted, Key
from controller.rehearsal import Standing, runs
from controller.revocation import Revocation, live
from controller.store import Check, Delete, Op, Put, Store
from mesh.compile import service_key, workload_key
from mesh.identity import SpiffeId
from mesh.kinds import MeshConfigSpec
from mesh.model import FIRST_USER_ID
from mesh.resources import MeshConfig, NodeGrant, Resource, ResourceErrors, Service, Workload, load, make_workload
from mesh.selection import Selection

RESOURCES_MAX = 200_000
NODE_WORKLOADS_MAX = 1_000

log = structlog.get_logger()
T = TypeVar("T")


class Registry:
    def __init__(self, store: Store, authority: Authority, trust_domain: str, held: Contents) -> None:
        self._store, self._authority, self.trust_domain = store, authority, trust_domain
        self.lock = asyncio.Lock()
        self.revision = held.revision
        self.revoked, self.nodes = held.revoked, held.nodes
        self._cut, self._resources, self._ledger = held.cut, held.resources, held.ledger
        self._index = Index(self._resources.values(), trust_domain)
        self._selection = Selection()  # of what is granted, of cut nodes too: who has which port of which address
        self._fresh: set[Key] = set()  # what the compiler has not been told of
        self._touch(self._resources)
        self._allowance = Allowance(time.monotonic, held.owed_s)
        self._advanced = asyncio.Condition()
        self._background: set[asyncio.Task[object]] = set()

    @classmethod
    async def open(cls, store: Store, authority: Authority, trust_domain: str) -> Registry:
        """Reads everything. Raises StoreError if the store holds what cannot be read or is of another trust domain."""
        return cls(store, authority, trust_domain, await contents.read(store, trust_domain))

    # ---- questions

    @property
    def granted(self) -> Granted:
        """Whether a node may run a service account."""
        return self._index.granted

    def inputs(self, *, whole: bool) -> Inputs:
        """What the compiler works from: all there is, or what is new since it was asked last."""
        keys = self._resources.keys() if whole else self._fresh
        self._fresh = set()
        return gather(self._standing, self.revision, keys, self.granted, self._cut)

    async def newer_than(self, revision: int) -> None:
        async with self._advanced:
            await self._advanced.wait_for(lambda: self.revision > revision)

    def get(self, kind: str = "", namespace: str = "", name: str = "") -> list[Stored]:
        """The resources that match, by key; an empty argument matches all."""
        return [
            stored
            for key, stored in sorted(self._resources.copy().items())  # at once: others ask in threads
            if all(not wanted or wanted == part for wanted, part in zip((kind, namespace, name), key, strict=True))
        ]

    def is_cut(self, node: str) -> bool:
        return node in self._cut

    def scheduled(self, node: str, namespace: str, account: str) -> bool:
        """Whether a workload of the service account is registered on the node."""
        return (node, namespace, account) in self._index.scheduled

    def workload_counts(self) -> dict[str, int]:
        """Registered workloads by node."""
        return {node: len(keys) for node, keys in self._index.by_node.items()}

    def grant_made(self, node: str) -> int:
        """The revision of the node's oldest grant, 0 if it has none."""
        return self._index.grant_made.get(node, 0)

    @property
    def leaf_ttl_s(self) -> float:
        stored = self._resources.get(("MeshConfig", "", "mesh"))
        spec = stored.resource.spec if stored is not None and isinstance(stored.resource, MeshConfig) else MeshConfigSpec()
        return float(spec.leaf_ttl_seconds)

    def identities(self) -> dict[str, int]:
        """Numbers by SPIFFE URI."""
        return self._ledger.identity.copy()

    def given(self) -> dict[str, int]:
        """How many numbers were given out since the mesh began, by kind."""
        return {kind: following - FIRST_USER_ID for kind, following in self._ledger.next.items()}

    # ---- changes by operators

    async def apply(self, text: str, filename: str, *, dry_run: bool = False) -> tuple[int, list[Result]]:
        """All of the text or none; a dry run does all but write. Raises ResourceErrors (the operator's) and Exhausted."""
        loaded = await asyncio.to_thread(load, text, filename)
        return await self._alone(lambda: self._apply(loaded, text, filename, dry_run))

    async def _apply(self, loaded: list[Resource], text: str, filename: str, dry_run: bool) -> tuple[int, list[Result]]:
        results: list[Result] = []
        delta: dict[Key, Stored | None] = {}
        for resource in loaded:
            kind, namespace, name = resource.key
            old = self._resources.get(resource.key)
            owner = owner_of(resource, old)
            value = encode(resource, owner)
            unchanged = old is not None and old.value == value
            results.append(Result(kind, namespace, name, "unchanged" if unchanged else "configured" if old else "created"))
            if not unchanged:
                delta[resource.key] = Stored(resource, value, old.created if old else 0, owner)
        if not delta:
            return self.revision, results
        if len(self._resources.keys() | delta.keys()) > RESOURCES_MAX:
            fault = Fault(next(iter(delta)), (), f"more than {RESOURCES_MAX} resources", "delete some, or make another mesh")
            raise errors_of([fault], loaded, text, filename)
        grants = self._index.grants_after(delta)
        found = await asyncio.to_thread(self._standing.faults, delta, grants)
        if found:
            raise errors_of(found, loaded, text, filename)
        revoked = await self._narrowing(delta, grants)
        if dry_run:
            self._standing.plan(delta)  # as _commit does; raises Exhausted
            return self.revision, results
        return await self._commit(delta, revoked), results

    async def delete(self, kind: str, namespace: str, name: str) -> int:
        """Removes one resource; Refused with 404 when it is not there, 409 while others refer to it."""
        return await self._alone(lambda: self._delete((kind, namespace, name)))

    async def _delete(self, key: Key) -> int:
        shown = "/".join(part for part in key if part)
        if key not in self._resources:
            raise Refused("not_found", f"there is no {shown}; `pillion get {key[0]}` lists what is", 404)
        if key[0] == "Service" and (users := references.referrers(key, plain(self._resources))):
            named = ", ".join("/".join(part for part in user if part) for user in users[:5])
            raise Refused("referenced", f"{shown} is named by {named}; delete or change those first", 409)
        delta: dict[Key, Stored | None] = {key: None}
        return await self._commit(delta, await self._narrowing(delta, self._index.grants_after(delta)))

    async def cut(self, node: str) -> int:
        """Refuses a node and revokes every certificate it was issued."""
        return await self._alone(lambda: self._cut_node(node))

    async def _cut_node(self, node: str) -> int:
        if node in self._cut:
            return self.revision
        revoked = await live(self._store, "node", node, self.revoked)
        ops: list[Op] = [Put(f"cut/{node}", msgspec.json.encode(time.time())), *revocation.writes(revoked)]
        revision = await self._store.transaction([], ops)
        self._cut.add(node)
        self._fresh |= self._index.by_node.get(node, set())
        self.revoked.update(revoked)
        return await self._seen(revision)

    async def revoke(self, find: revocation.Find) -> int:
        """Revokes what ``find`` picks from the store, given what is revoked already. The revision it is in force at."""

        async def work() -> int:
            revoked = await find(self._store, self.revoked)
            if not revoked:
                return self.revision
            revision = await self._store.transaction([], list(revocation.writes(revoked)))
            self.revoked.update(revoked)
            return await self._seen(revision)

        return await self._alone(work)

    # ---- changes by nodes

    async def admit(self, node: str, checks: Sequence[Check], ops: Sequence[Op], *, readmit: bool) -> None:
        """A node has joined: writes ``ops`` under ``checks`` with it. Raises Conflict and Refused."""

        async def work() -> None:
            if node in self._cut and not readmit:
                raise Refused("node_cut", f"node {node} is cut; ask an operator for a token that admits it again", node=node)
            now = time.time()
            more: list[Op] = [Put(f"node/{node}", msgspec.json.encode(now)), Delete(f"cut/{node}")]
            revision = await self._store.transaction(checks, [*ops, *more])
            self.nodes[node] = now
            if node in self._cut:
                self._cut.discard(node)
                self._fresh |= self._index.by_node.get(node, set())
                await self._seen(revision)

        await self._alone(work)

    async def register(
        self,
        node: str,
        namespace: str,
        name: str,
        account: str,
        addresses: Sequence[str],
        labels: Mapping[str, str],
        *,
        source: str,
    ) -> int:
        """A workload of ``node``; Refused when it is not granted, taken by another node, or not well formed."""

        async def work() -> int:
            return await self._register(make_workload(namespace, name, node, account, addresses, labels), source)

        try:
            return await self._alone(work)
        except ResourceErrors as errors:
            raise Refused(
                "bad_request", "; ".join(str(error) for error in errors.errors), 400, node=node, source=source
            ) from errors
        except Exhausted as error:
            raise Refused("exhausted", f"{error}; an operator has to make another mesh", 409, node=node, source=source) from error

    async def _register(self, workload: Workload, source: str) -> int:
        node, account, shown = workload.spec.node, workload.spec.service_account, f"{workload.namespace}/{workload.name}"
        spiffe = str(SpiffeId(self.trust_domain, workload.namespace, account))

        def refuse(reason: str, message: str, status: int = 409) -> Refused:
            return Refused(reason, message, status, node=node, spiffe=spiffe, source=source)

        if node in self._cut:
            raise refuse("node_cut", f"node {node} is cut", 403)
        if not self.granted(node, workload.namespace, account):
            raise not_granted(node, workload.namespace, account, spiffe, source)
        old = self._resources.get(workload.key)
        workload = keeping(workload, old)
        if old is not None and isinstance(old.resource, Workload) and old.resource.spec.node != node:
            raise refuse("workload_taken", f"workload {shown} runs on node {old.resource.spec.node}; give this one another name")
        if old is None and len(self._index.by_node.get(node, ())) >= NODE_WORKLOADS_MAX:
            raise refuse("too_many_workloads", f"node {node} has {NODE_WORKLOADS_MAX} workloads already; remove some", 429)
        if old is None and len(self._resources) >= RESOURCES_MAX:
            raise refuse("too_many_resources", f"the mesh has {RESOURCES_MAX} resources already; an operator removes some", 429)
        stored = Stored(workload, encode(workload, node), old.created if old else 0, node)
        if old is not None and old.value == stored.value:
            return self.revision
        found = list(references.faults([workload], {workload.key: workload}, self.trust_domain, self.granted))
        if found:
            raise refuse("bad_request", f"workload {shown}: {found[0].message}; {found[0].remedy}", 400)
        delta: dict[Key, Stored | None] = {workload.key: stored}
        taken = references.address_owner(workload, self._index.addresses_after(delta))
        if taken is not None:
            raise refuse("address_taken", f"{taken[0]} belongs to workload {'/'.join(taken[1][1:])} of another node")
        # Workloads may share a host's address but not a port of it
        if conflict := self._selection.conflict(workload):
            raise refuse("port_taken", conflict)
        new, _ = self._index.demand(delta, self._resources)
        if late_s := self._allowance.take(node, sum(map(len, new.values()))):
            why = f"node {node} takes numbers for new workloads and identities too fast, and numbers never come back"
            raise refuse("too_many_numbers", f"{why}; try again in {late_s:.0f} s, or find out what it starts so often", 429)
        owed = Put(f"allowance/{node}", msgspec.json.encode(time.time() + self._allowance.owed(node)))
        return await self._commit(delta, [], [owed] if any(new.values()) else [])

    async def unregister(self, node: str, namespace: str, name: str) -> int:
        """Removes a workload of ``node``; the revision now if there is none of that name."""

        async def work() -> int:
            key = ("Workload", namespace, name)
            old = self._resources.get(key)
            if old is None:
                return self.revision
            if not isinstance(old.resource, Workload) or old.resource.spec.node != node:
                raise Refused("workload_taken", f"workload {namespace}/{name} is not of node {node}", 403, node=node)
            return await self._commit({key: None}, [])

        return await self._alone(work)

    # ---- upkeep

    async def bundle_changed(self) -> int:
        """The authority's roots changed in the store: let nodes see it."""

        async def work() -> int:
            return await self._seen(await self._store.revision())

        return await self._alone(work)

    async def prune(self, now: float) -> None:
        """Forgets certificates, revocations and tokens whose time is over."""

        async def work() -> None:
            ops, over = await expiry.over(self._store, self.revoked, now)
            if not ops:
                return
            revision = await self._store.transaction([], ops)
            for serial in over:
                del self.revoked[serial]
            if over:
                await self._seen(revision)

        await self._alone(work)

    # ---- inside

    async def _alone(self, work: Callable[[], Awaitable[T]]) -> T:
        """Under the lock, and to its end even if the caller leaves: store and memory must not part."""

        async def run() -> T:
            async with self.lock:
                return await work()

        task = asyncio.ensure_future(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return await asyncio.shield(task)

    @property
    def _standing(self) -> Standing:
        revoked = (*self.revoked, *(f"node:{node}" for node in self._cut))
        return Standing(self.trust_domain, self._resources, self._index, self._ledger, self._authority.bundle, revoked)

    async def _narrowing(self, delta: dict[Key, Stored | None], grants: Granted) -> list[tuple[str, Revocation]]:
        """What lost its grant: registered workloads are to go with ``delta``, their certificates returned to revoke."""
        if grants is self.granted:
            return []
        for key, present in self._resources.items():
            stored = delta.get(key, present)
            if stored is not None and stored.owner and isinstance(stored.resource, Workload):
                spec = stored.resource.spec
                if not grants(spec.node, stored.resource.namespace, spec.service_account):
                    delta[key] = None

        revoked: dict[str, Revocation] = {}
        for node in self.granted.nodes():
            revoked.update(await live(self._store, "node", node, self.revoked, revocation.outside(node, grants)))
        return list(revoked.items())

    async def _commit(
        self, delta: Mapping[Key, Stored | None], revoked: list[tuple[str, Revocation]], more: Sequence[Op] = ()
    ) -> int:
        plan = self._standing.plan(delta)
        writes: list[Op] = [*plan.ops, *revocation.writes(dict(revoked)), *more]
        for key, stored in delta.items():
            writes.append(Delete(store_key(key)) if stored is None else Put(store_key(key), stored.value))
        revision = await self._store.transaction([], writes)
        moved: list[tuple[Stored | None, Stored | None]] = []
        for key, stored in delta.items():
            old = self._resources.pop(key, None)
            if stored is not None:
                stored = replace(stored, created=old.created if old else revision)
                self._resources[key] = stored
            moved.append((old, stored))
        self._ledger.take(plan)
        self._index.change(moved)
        self._touch(delta)
        for stored in (side for sides in moved for side in sides if side is not None):
            if isinstance(stored.resource, NodeGrant):
                self._touch(self._index.by_node.get(stored.resource.spec.node, ()))
        self.revoked.update(revoked)
        return await self._seen(revision)

    def _touch(self, keys: Iterable[Key]) -> None:
        """These are others now, or may run now, or may not."""
        for key in keys:
            self._fresh.add(key)
            stored = self._resources.get(key)
            resource = stored.resource if stored is not None and runs(stored, self.granted, frozenset()) else None
            if key[0] == "Workload" and (resource is None or isinstance(resource, Workload)):
                self._selection.workload(workload_key(*key[1:]), resource)
            elif key[0] == "Service" and (resource is None or isinstance(resource, Service)):
                self._selection.service(service_key(*key[1:]), resource)

    async def _seen(self, revision: int) -> int:
        self.revision = revision
        async with self._advanced:
            self._advanced.notify_all()
        return revision
