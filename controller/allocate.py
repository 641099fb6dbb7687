"""Numbers and virtual addresses: planned as a pure function of what exists, persisted with what needs them.

Numbers count upwards for each kind and are never given twice, not even after a deletion or a restart. A virtual
address starts from a hash of the service's key, so that a service deleted and made again usually keeps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
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

    def take(self, plan: Plan) -> None:
        """What was planned has been stored."""
        for kind in KINDS:
            held = self.numbers(kind)
            held.update(plan.numbers[kind])
            for name in plan.gone[kind]:
                held.pop(name, None)
        self.vips.update(plan.vips)
        for name in plan.gone["service"]:
            self.vips.pop(name, None)
        self.next.update(plan.next)


@dataclass(frozen=True)
class Plan:
    """A step of the ledger, and what to write for it. By kind: the numbers it gives, what has none afterwards."""

    numbers: Mapping[str, Mapping[str, int]]
    vips: Mapping[str, tuple[str, str]]
    gone: Mapping[str, AbstractSet[str]]
    next: Mapping[str, int]  # of the kinds that gave numbers
    ops: Sequence[Op]


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


def plan(ledger: Ledger, new: Mapping[str, AbstractSet[str]], gone: Mapping[str, AbstractSet[str]]) -> Plan:
    """What gives numbers (to services addresses too) to ``new`` and takes them from ``gone``, both by kind; at the price of
    these, and of the services' addresses where a service is new. Raises Exhausted."""
    ops: list[Op] = []
    following: dict[str, int] = {}
    numbers: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        ops += [Delete(f"alloc/{kind}/{name}") for name in sorted(gone[kind])]
        numbers[kind] = {}
        at = ledger.next[kind]
        for number, name in enumerate(sorted(new[kind]), at):
            if number > NUMBER_MAX[kind]:
                raise Exhausted(f"every {kind} number has been given out")
            numbers[kind][name] = number
            ops.append(Put(f"alloc/{kind}/{name}", msgspec.json.encode(number)))
        if new[kind]:
            following[kind] = at + len(new[kind])
            ops.append(Put(f"alloc/next/{kind}", msgspec.json.encode(following[kind])))
    vips = _vips(ledger.vips, new["service"], gone["service"])
    ops += [Delete(f"alloc/vip/{name}") for name in sorted(gone["service"])]
    ops += [Put(f"alloc/vip/{name}", msgspec.json.encode(pair)) for name, pair in vips.items()]
    return Plan(numbers, vips, gone, following, ops)


def _vips(have: Mapping[str, tuple[str, str]], new: AbstractSet[str], gone: AbstractSet[str]) -> dict[str, tuple[str, str]]:
    if not new:
        return {}
    taken = {address for name, pair in have.items() if name not in gone for address in pair}
    vips: dict[str, tuple[str, str]] = {}
    for name in sorted(new):
        seed = hashlib.sha256(name.encode()).digest()
        pair = (_free(_vip4, int.from_bytes(seed[:4], "big"), taken), _free(_vip6, int.from_bytes(seed[4:12], "big"), taken))
        vips[name] = pair
        taken.update(pair)
    return vips


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
