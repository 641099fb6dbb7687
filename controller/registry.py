"""The resources of the mesh, the numbers they need, and who is cut: checked, then stored in one transaction, then seen.

Everything is kept in memory too (there is one writer); memory changes only after the store has answered, under one
lock. ``revision`` is that of the last change a node could notice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import msgspec
import structlog

from controller import contents, expiry, references, revocation
from controller.allocate import Exhausted
from controller.ca import Authority
from controller.catalog import Index, Result, Stored, encode, errors_of, grants_of, keeping, owner_of, plain, store_key
from controller.contents import Contents
from controller.events import Refused, not_granted
from controller.references import Fault, Granted, Key
from controller.rehearsal import Standing, effective
from controller.revocation import Revocation, live
from controller.store import Check, Delete, Op, Put, Store
from mesh.compile import Allocations, CompileError
from mesh.identity import SpiffeId
from mesh.kinds import MeshConfigSpec
from mesh.resources import MeshConfig, Resource, ResourceErrors, Workload, load, make_workload

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
        self._index = Index(self._resources.values())
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

    def inputs(self) -> tuple[int, list[Resource], Allocations]:
        """What the compiler works from, with its revision. Workloads of cut nodes and without a grant are left out."""
        return (
            self.revision,
            effective(self._resources, self.granted, self._cut),
            self._standing.allocations(self._resources, self._ledger),
        )

    async def newer_than(self, revision: int) -> None:
        async with self._advanced:
            await self._advanced.wait_for(lambda: self.revision > revision)

    def get(self, kind: str = "", namespace: str = "", name: str = "") -> list[Stored]:
        """The resources that match, by key; an empty argument matches all."""
        return [
            stored
            for key, stored in sorted(self._resources.items())
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
        return dict(self._ledger.identity)

    # ---- changes by operators

    async def apply(self, text: str, filename: str) -> tuple[int, list[Result]]:
        """All resources of the text or none. Raises ResourceErrors (the operator's) and Exhausted."""
        loaded = await asyncio.to_thread(load, text, filename)
        return await self._alone(lambda: self._apply(loaded, text, filename))

    async def _apply(self, loaded: list[Resource], text: str, filename: str) -> tuple[int, list[Result]]:
        results, changed, wanted = [], [], dict(self._resources)
        for resource in loaded:
            kind, namespace, name = resource.key
            old = self._resources.get(resource.key)
            owner = owner_of(resource, old)
            value = encode(resource, owner)
            unchanged = old is not None and old.value == value
            results.append(Result(kind, namespace, name, "unchanged" if unchanged else "configured" if old else "created"))
            if not unchanged:
                wanted[resource.key] = Stored(resource, value, old.created if old else 0, owner)
                changed.append(resource.key)
        if not changed:
            return self.revision, results
        if len(wanted) > RESOURCES_MAX:
            fault = Fault(changed[0], (), f"more than {RESOURCES_MAX} resources", "delete some, or make another mesh")
            raise errors_of([fault], loaded, text, filename)
        grants = grants_of(wanted.values()) if any(kind == "NodeGrant" for kind, _, _ in changed) else self.granted
        proposed = [wanted[key].resource for key in changed]
        found = await asyncio.to_thread(self._standing.faults, proposed, wanted, self._resources, grants)
        if found:
            raise errors_of(found, loaded, text, filename)
        return await self._commit(wanted, await self._narrowing(wanted, grants)), results

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
        wanted = {other: stored for other, stored in self._resources.items() if other != key}
        grants = grants_of(wanted.values()) if key[0] == "NodeGrant" else self.granted
        return await self._commit(wanted, await self._narrowing(wanted, grants))

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
        stored = Stored(workload, encode(workload, node), old.created if old else 0, node)
        if old is not None and old.value == stored.value:
            return self.revision
        wanted = {**self._resources, workload.key: stored}
        found = list(references.faults([workload], plain(wanted), self.trust_domain, self.granted))
        if found:
            raise refuse("bad_request", f"workload {shown}: {found[0].message}; {found[0].remedy}", 400)
        taken = references.address_owner(workload, self._index.addresses)
        if taken is not None:
            raise refuse("address_taken", f"{taken[0]} belongs to workload {'/'.join(taken[1][1:])} of another node")
        if any(len(self._index.addresses.get(address, frozenset())) > 0 for address in workload.spec.addresses):
            # Workloads may share a host's address but not a port of it; only the compiler knows the ports.
            try:
                await asyncio.to_thread(self._standing.compile, wanted, self.granted)
            except CompileError as error:
                raise refuse("port_taken", str(error)) from error
        return await self._commit(wanted, [])

    async def unregister(self, node: str, namespace: str, name: str) -> int:
        """Removes a workload of ``node``; the revision now if there is none of that name."""

        async def work() -> int:
            key = ("Workload", namespace, name)
            old = self._resources.get(key)
            if old is None:
                return self.revision
            if not isinstance(old.resource, Workload) or old.resource.spec.node != node:
                raise Refused("workload_taken", f"workload {namespace}/{name} is not of node {node}", 403, node=node)
            return await self._commit({other: stored for other, stored in self._resources.items() if other != key}, [])

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
        return Standing(self.trust_domain, self._ledger, self._authority.bundle, revoked)

    async def _narrowing(self, wanted: dict[Key, Stored], grants: Granted) -> list[tuple[str, Revocation]]:
        """What lost its grant: registered workloads are taken out of ``wanted``, their certificates returned to revoke."""
        if grants is self.granted:
            return []
        for key, stored in list(wanted.items()):
            if stored.owner and isinstance(stored.resource, Workload):
                spec = stored.resource.spec
                if not grants(spec.node, stored.resource.namespace, spec.service_account):
                    del wanted[key]

        revoked: dict[str, Revocation] = {}
        for node in self.granted.nodes():
            revoked.update(await live(self._store, "node", node, self.revoked, revocation.outside(node, grants)))
        return list(revoked.items())

    async def _commit(self, wanted: dict[Key, Stored], revoked: list[tuple[str, Revocation]]) -> int:
        ledger, ops = self._standing.numbers(wanted)
        writes: list[Op] = [*ops, *revocation.writes(dict(revoked))]
        new: list[Key] = []
        for key in wanted.keys() | self._resources.keys():
            stored, old = wanted.get(key), self._resources.get(key)
            if stored is old:
                continue
            if stored is None:
                writes.append(Delete(store_key(key)))
            else:
                writes.append(Put(store_key(key), stored.value))
                if old is None:
                    new.append(key)
        revision = await self._store.transaction([], writes)
        for key in new:
            wanted[key] = Stored(wanted[key].resource, wanted[key].value, revision, wanted[key].owner)
        self._resources, self._ledger = wanted, ledger
        self.revoked.update(revoked)
        self._index = Index(wanted.values())
        return await self._seen(revision)

    async def _seen(self, revision: int) -> int:
        self.revision = revision
        async with self._advanced:
            self._advanced.notify_all()
        return revision
