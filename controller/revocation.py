"""Certificates that are taken back before their end: which they are, and how that is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping

import msgspec

from controller.ca import Leaf
from controller.references import Granted
from controller.store import Op, Put, Store
from mesh.identity import SpiffeId, parse

SKEW_S = 3600.0  # a revocation outlives its certificate by this, for clocks that run behind


class Revocation(msgspec.Struct, frozen=True):
    """Under ``revoked/<serial>``; ``until``: unix seconds after which nobody would accept the certificate anyway."""

    node: str
    until: float


async def live(
    store: Store, role: str, name: str, revoked: Container[str], chosen: Callable[[Leaf], bool] = lambda _: True
) -> dict[str, Revocation]:
    """An owner's certificates that are neither expired nor revoked yet, as revocations by serial."""
    prefix, now = f"serial/{role}:{name}/", time.time()
    _, entries = await store.list(prefix)
    found: dict[str, Revocation] = {}
    for entry in entries:
        leaf, serial = msgspec.json.decode(entry.value, type=Leaf), entry.key.removeprefix(prefix)
        if leaf.not_after > now and serial not in revoked and chosen(leaf):
            found[serial] = Revocation(name, leaf.not_after + SKEW_S)
    return found


def outside(node: str, grants: Granted) -> Callable[[Leaf], bool]:
    """Picks workloads' certificates that ``node`` is not granted."""

    def of(leaf: Leaf) -> bool:
        who = parse(leaf.spiffe)
        return isinstance(who, SpiffeId) and not grants(node, who.namespace, who.service_account)

    return of


def writes(revoked: Mapping[str, Revocation]) -> list[Op]:
    """What to store."""
    return [Put(f"revoked/{serial}", msgspec.json.encode(revocation)) for serial, revocation in revoked.items()]
