"""What the store holds of the registry's, read whole when it opens."""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec

from controller import allocate
from controller.allocate import Ledger
from controller.catalog import Record, Stored
from controller.references import Key
from controller.revocation import Revocation
from controller.store import Store, StoreError
from mesh.resources import ResourceErrors, from_dict


@dataclass(frozen=True)
class Contents:
    resources: dict[Key, Stored]
    ledger: Ledger
    cut: set[str]
    revoked: dict[str, Revocation]  # by serial
    nodes: dict[str, float]  # joined, unix seconds
    owed_s: dict[str, float]  # by node: until its allowance is whole again
    revision: int


async def read(store: Store, trust_domain: str) -> Contents:
    """A new store is made one of this trust domain. Raises StoreError if it is of another, or holds what cannot be read."""
    said = await store.get("meta/trust_domain")
    if said is None:
        await store.put("meta/trust_domain", trust_domain.encode(), expect=0)
    elif said.value.decode() != trust_domain:
        raise StoreError(
            f"this state directory is of trust domain {said.value.decode()}, not {trust_domain}; "
            "start with that --trust-domain, or with another --state-dir"
        )
    try:
        return await _read(store)
    except (msgspec.MsgspecError, ResourceErrors, ValueError) as error:
        raise StoreError(f"the store holds what this version cannot read: {error}; run the version that wrote it") from error


async def _read(store: Store) -> Contents:
    async def named(prefix: str) -> dict[str, bytes]:
        _, entries = await store.list(prefix)
        return {entry.key.removeprefix(prefix): entry.value for entry in entries}

    resources, now = {}, time.time()
    _, entries = await store.list("resource/")
    for entry in entries:
        record = msgspec.json.decode(entry.value, type=Record)
        resource = from_dict(record.resource, entry.key)
        resources[resource.key] = Stored(resource, entry.value, entry.created, record.owner)
    _, entries = await store.list("alloc/")
    return Contents(
        resources,
        ledger=allocate.load(entries),
        cut=set(await named("cut/")),
        revoked={serial: msgspec.json.decode(value, type=Revocation) for serial, value in (await named("revoked/")).items()},
        nodes={node: msgspec.json.decode(value, type=float) for node, value in (await named("node/")).items()},
        owed_s={node: msgspec.json.decode(value, type=float) - now for node, value in (await named("allowance/")).items()},
        # Not the last change's own revision, which a compacted history may have lost: revisions must never go back.
        revision=await store.revision(),
    )
