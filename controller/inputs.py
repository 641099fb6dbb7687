"""What the compiler is given of the registry: the resources that run, and their numbers. Copies, for a thread. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from controller.allocate import KINDS
from controller.catalog import Stored
from controller.references import Granted, Key
from controller.rehearsal import Standing, runs
from mesh.compile import Allocations, needs
from mesh.resources import Resource


@dataclass(frozen=True)
class Inputs:
    """changes: resources by key, None for what is no more or does not run."""

    revision: int
    resources: int  # there are, in all
    changes: dict[Key, Resource | None]
    allocations: Allocations


def gather(standing: Standing, revision: int, keys: Iterable[Key], granted: Granted, cut: AbstractSet[str]) -> Inputs:
    """What became of ``keys``, at the price of these."""
    changes: dict[Key, Resource | None] = {}
    told: list[Stored] = []
    for key in keys:
        stored = standing.present.get(key)
        if stored is None or not runs(stored, granted, cut):
            changes[key] = None
        else:
            changes[key] = stored.resource
            told.append(stored)
    ledger, want = standing.ledger, needs((stored.resource for stored in told), standing.trust_domain)
    wanted = zip(KINDS, (want.identities, want.workloads, want.services), strict=True)
    numbers = {kind: {name: ledger.numbers(kind)[name] for name in names} for kind, names in wanted}
    vips = {name: ledger.vips[name] for name in want.services}
    return Inputs(revision, len(standing.present), changes, standing.allocations(told, numbers, vips))
