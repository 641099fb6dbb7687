"""Numbers and virtual addresses, as a pure plan."""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller import allocate
from controller.allocate import KINDS, Exhausted, Ledger
from controller.store import Delete, Entry, Op, Put
from mesh.model import VIP4, VIP6


def plan(ledger: Ledger, *wanted: set[str]) -> tuple[Ledger, Sequence[Op]]:
    """The ledger in which exactly these have numbers, kind by kind, and what to write."""
    have = {kind: ledger.numbers(kind).keys() for kind in KINDS}
    by_kind = dict(zip(KINDS, wanted, strict=True))
    step = allocate.plan(
        ledger, {kind: by_kind[kind] - have[kind] for kind in KINDS}, {kind: have[kind] - by_kind[kind] for kind in KINDS}
    )
    following = copy.deepcopy(ledger)
    following.take(step)
    return following, step.ops


NAMES = st.sets(st.sampled_from([f"Service/shop/s{n}" for n in range(12)]))


@given(st.lists(NAMES, max_size=12))
def test_no_number_is_given_twice_and_the_store_says_the_same(steps: list[set[str]]) -> None:
    ledger = Ledger()
    stored: dict[str, bytes] = {}
    ever: dict[str, int] = {}
    for wanted in steps:
        before = ledger
        ledger, ops = plan(ledger, set(), set(), wanted)
        for op in ops:
            if isinstance(op, Put):
                stored[op.key] = op.value
            else:
                assert isinstance(op, Delete)
                del stored[op.key]
        assert ledger.service.keys() == wanted == ledger.vips.keys()
        for name, number in ledger.service.items():
            if name in before.service:
                assert number == before.service[name]
            else:
                assert number > max([255, *ever.values()])
            ever[name] = number
        assert allocate.load(Entry(key, value, 1, 1) for key, value in stored.items()) == ledger
        addresses = [address for pair in ledger.vips.values() for address in pair]
        assert len(set(addresses)) == len(addresses)


def test_addresses_are_in_range_and_stable() -> None:
    names = {f"Service/ns/{n}" for n in range(3000)}
    ledger, _ = plan(Ledger(), set(), set(), names)
    for v4, v6 in ledger.vips.values():
        assert ipaddress.ip_address(v4) in VIP4 and ipaddress.ip_address(v6) in VIP6
        assert int(v4.rsplit(".")[-1]) not in (0, 255)
    again, _ = plan(plan(ledger, set(), set(), set())[0], set(), set(), names)
    assert again.vips == ledger.vips
    assert again.service.keys() == ledger.service.keys()
    assert min(again.service.values()) > max(ledger.service.values())


def test_a_taken_address_leads_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate, "VIP4", ipaddress.IPv4Network("240.0.0.0/29"))
    ledger, _ = plan(Ledger(), set(), set(), {f"Service/a/{n}" for n in range(7)})
    assert {v4 for v4, _ in ledger.vips.values()} == {f"240.0.0.{n}" for n in range(1, 8)}
    with pytest.raises(Exhausted):
        plan(ledger, set(), set(), {*ledger.service, "Service/a/more"})


@pytest.mark.parametrize(("kind", "bits"), tuple(zip(KINDS, (32, 29, 29), strict=True)))  # above 29: GROUP_* of mesh.dataplane
def test_the_last_number(kind: str, bits: int) -> None:
    def wanted(names: set[str]) -> list[set[str]]:
        return [names if each == kind else set() for each in KINDS]

    ledger = Ledger()
    ledger.next[kind] = (1 << bits) - 1
    ledger, _ = plan(ledger, *wanted({"a"}))
    with pytest.raises(Exhausted):
        plan(ledger, *wanted({"a", "b"}))
