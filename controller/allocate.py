"""Numbers and virtual addresses: planned as a pure function of what exists, persisted with what needs them.

Numbers count upwards for each kind and are never given twice, not even after a deletion or a restart. A virtual
address starts from a hash of the service's key, so that a service deleted and made again usually keeps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from controller.store import Delete, Entry, Op, Put
from mesh.model import FIRST_USER_ID, ID_MAX, IDENTITY_ID_MAX, VIP4, VIP6

NUMBER_MAX = {"identity": IDENTITY_ID_MAX, "workload": ID_MAX, "service": ID_MAX}
KINDS = tuple(NUMBER_MAX)


class Exhausted(Exception):
    """No number or address is left."""


@dataclass(frozen=True)
class Ledger:
    """What is given out. ``next``: the next number of each kind."""

    identity: dict[str, int] = field(default_factory=dict)  # by SPIFFE URI
    workload: dict[str, int] = field(default_factory=dict)  # by item key
    service: dict[str, int] = field(default_factory=dict)  # by item key
    vips: dict[str, tuple[str, str]] = field(default_factory=dict)  # by item key of the service
    next: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, FIRST_USER_ID))

    def numbers(self, kind: str) -> dict[str, int]:
        return {"identity": self.identity, "workload": self.workload, "service": self.service}[kind]


def load(entries: Iterable[Entry]) -> Ledger:
    """From the store's ``alloc/`` entries."""
    ledger = Ledger()
    for entry in entries:
        _, kind, name = entry.key.split("/", 2)
        if kind == "next":
            ledger.next[name] = msgspec.json.decode(entry.value, type=int)
        elif kind == "vip":
            ledger.vips[name] = msgspec.json.decode(entry.value, type=tuple[str, str])
        else:
            ledger.numbers(kind)[name] = msgspec.json.decode(entry.value, type=int)
    return ledger


def plan(ledger: Ledger, identities: set[str], workloads: set[str], services: set[str]) -> tuple[Ledger, Sequence[Op]]:
    """The ledger in which exactly these have numbers (and services addresses), and what to write. Raises Exhausted."""
    ops: list[Op] = []
    following = dict(ledger.next)
    numbers: dict[str, dict[str, int]] = {}
    for kind, wanted in zip(KINDS, (identities, workloads, services), strict=True):
        have = ledger.numbers(kind)
        gone, new = have.keys() - wanted, wanted - have.keys()
        numbers[kind] = have
        if not gone and not new:
            continue
        numbers[kind] = {name: number for name, number in have.items() if name not in gone}
        ops += [Delete(f"alloc/{kind}/{name}") for name in sorted(gone)]
        for name in sorted(new):
            number = following[kind]
            if number > NUMBER_MAX[kind]:
                raise Exhausted(f"every {kind} number has been given out")
            following[kind] = number + 1
            numbers[kind][name] = number
            ops.append(Put(f"alloc/{kind}/{name}", msgspec.json.encode(number)))
        if new:
            ops.append(Put(f"alloc/next/{kind}", msgspec.json.encode(following[kind])))
    vips, vip_ops = _plan_vips(ledger.vips, services)
    return Ledger(numbers["identity"], numbers["workload"], numbers["service"], vips, following), ops + vip_ops


def _plan_vips(have: dict[str, tuple[str, str]], wanted: set[str]) -> tuple[dict[str, tuple[str, str]], list[Op]]:
    gone, new = have.keys() - wanted, wanted - have.keys()
    if not gone and not new:
        return have, []
    vips = {name: pair for name, pair in have.items() if name not in gone}
    ops: list[Op] = [Delete(f"alloc/vip/{name}") for name in sorted(gone)]
    taken = {address for pair in vips.values() for address in pair}
    for name in sorted(new):
        seed = hashlib.sha256(name.encode()).digest()
        pair = (_free(_vip4, int.from_bytes(seed[:4], "big"), taken), _free(_vip6, int.from_bytes(seed[4:12], "big"), taken))
        vips[name] = pair
        taken.update(pair)
        ops.append(Put(f"alloc/vip/{name}", msgspec.json.encode(pair)))
    return vips, ops


def _free(address: Callable[[int], str | None], start: int, taken: set[str]) -> str:
    for step in range(len(taken) + 1024):  # more steps than could be taken or skipped in a row
        found = address(start + step)
        if found is not None and found not in taken:
            return found
    raise Exhausted("no virtual address is free")


def _vip4(number: int) -> str | None:
    offset = number % VIP4.num_addresses
    if offset & 0xFF in (0, 0xFF):  # .0 and .255 look like a network's and its broadcast to many tools
        return None
    return str(VIP4.network_address + offset)


def _vip6(number: int) -> str | None:
    offset = number % VIP6.num_addresses
    return None if offset == 0 else str(VIP6.network_address + offset)
