"""Contents and the order of writes: pure, on layouts made for the test."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.dataplane import (
    NODE_NETNS,
    BackendEntry,
    BackendKey,
    Dest,
    DestKey,
    DestKind,
    Dial,
    Egress,
    KernelVerdict,
    Member,
    NodePlan,
    PolicyEntry,
    PolicyKey,
)
from nodeagent.datapath import Codec, MapOp, check_room, diff, digest, inverse
from nodeagent.datapath_api import MapFull, Role
from nodeagent.datapath_api import Member as Listed
from nodeagent.layouts import address, text_address
from tests.nodeagent.compiled import compiled_layouts


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(compiled_layouts())


VIP, POD = "240.0.0.9", "fd77:1::5"


def plan(**changes: object) -> NodePlan:
    fields: dict[str, object] = {
        "dests": {
            DestKey(VIP, 80, "tcp"): Dest(DestKind.NATIVE, 1000, 1),
            DestKey(POD, 0, "udp"): Dest(DestKind.DENY, reason="port_undeclared"),
        },
        "backends": {BackendKey(1000, 80, 0): BackendEntry(POD, 8080, 502)},
        "policy": {PolicyKey(502, 301, 8080, "tcp"): PolicyEntry(KernelVerdict.ALLOW, 7)},
        "egress": {"192.0.2.0/24": Egress(True, (443, 8443)), "2001:db8::/32": Egress(True)},
        "dials": frozenset({Dial(37, POD, 15008)}),
    }
    return NodePlan(**(fields | changes))  # type: ignore[arg-type]


def test_the_nodes_own_netns_has_the_cookie_the_agent_knows(codec: Codec) -> None:
    resolver = plan(dials=frozenset({Dial(NODE_NETNS, POD, 53)}))
    (key,) = codec.fill(resolver, 4711)["dials"]
    assert codec.layouts["pl_dial_key"].unpack(key)["netns"] == 4711


def test_fill_says_what_the_plan_says(codec: Codec) -> None:
    layouts, filled = codec.layouts, codec.fill(plan())
    dests = {
        (text_address(key["addr"]), key["port"], key["proto"]): layouts["pl_dest"].unpack(value)
        for key, value in ((layouts["pl_dest_key"].unpack(k), v) for k, v in filled["dests"].items())
    }
    assert dests[VIP, 80, 6] == {"kind": layouts.enums["PL_DEST_NATIVE"], "service": 1000, "backends": 1, "reason": 0}
    assert dests[POD, 0, 17]["reason"] == layouts.reasons.index("port_undeclared")
    (backend,) = filled["backends"].values()
    assert layouts["pl_backend"].unpack(backend)["addr"] == address(POD)
    egress = {
        layouts["pl_egress_key"].unpack(k)["prefixlen"]: layouts["pl_egress"].unpack(v) for k, v in filled["egress"].items()
    }
    assert egress[96 + 24]["nports"] == 2 and egress[96 + 24]["ports"][:4] == (443).to_bytes(2, "little") + (8443).to_bytes(
        2, "little"
    )
    assert egress[32]["nports"] == 0 and egress[32]["allow"] == 1
    assert len(filled["dials"]) == 1


def test_members_are_the_plans_and_the_listed(codec: Codec) -> None:
    planned = plan(members={70: Member(502, 302, 37, True)})
    listed = (Listed(60, Role.AGENT), Listed(70, Role.WORKLOAD, 1, 1, 37, express=False))
    entries = {
        int.from_bytes(k, "little"): codec.layouts["pl_member"].unpack(v) for k, v in codec.members(planned, listed).items()
    }
    assert entries[60]["role"] == Role.AGENT
    assert (entries[70]["workload"], entries[70]["identity"]) == (502, 302)
    assert entries[70]["flags"] == codec.layouts.enums["PL_MEMBER_PERMISSIVE"] | codec.layouts.enums["PL_MEMBER_NO_EXPRESS"]


def test_closing_comes_before_opening(codec: Codec) -> None:
    old = codec.fill(plan())
    new = codec.fill(
        plan(
            dests={
                DestKey(VIP, 80, "tcp"): Dest(DestKind.PROXY, 1000),
                DestKey(VIP, 81, "tcp"): Dest(DestKind.NATIVE, 1001, 1),
            },
            backends={BackendKey(1001, 81, 0): BackendEntry(POD, 8081, 503)},
            policy={PolicyKey(503, 301, 8081, "tcp"): PolicyEntry(KernelVerdict.ALLOW, 7)},
        )
    )
    ops = diff(new, old, codec.openness)
    seen = [(op.map, op.value is None, op.key in old[op.map]) for op in ops]

    def place(*what: object) -> int:
        return seen.index(what)  # type: ignore[arg-type]

    assert place("policy", True, True) < place("policy", False, False)  # a denial before any grant
    assert place("dests", False, True) < place("backends", False, False)  # native becomes proxy at once
    assert place("backends", False, False) < place("policy", False, False) < place("dests", False, False)
    assert place("dests", False, False) < place("dests", True, True) < place("backends", True, True)


_content = st.dictionaries(st.binary(min_size=1, max_size=2), st.binary(min_size=1, max_size=2), max_size=8)
_contents = st.fixed_dictionaries({"dests": _content, "policy": _content, "backends": _content})


def carry_out(ops: list[MapOp], contents: dict[str, dict[bytes, bytes]]) -> dict[str, dict[bytes, bytes]]:
    after = {name: dict(content) for name, content in contents.items()}
    for op in ops:
        if op.value is None:
            del after[op.map][op.key]
        else:
            after[op.map][op.key] = op.value
    return after


@given(_contents, _contents)
def test_diff_leads_to_the_desired_and_back(
    desired: dict[str, dict[bytes, bytes]], observed: dict[str, dict[bytes, bytes]]
) -> None:
    ops = diff(desired, observed, lambda _, value: len(value or b""))
    after = carry_out(ops, observed)
    assert after == desired
    assert diff(desired, after, lambda *_: 0) == []
    assert carry_out(inverse(ops, observed), after) == observed
    assert (digest(after) == digest(observed)) == (after == observed)


def test_room_is_checked_at_every_moment() -> None:
    observed = {"policy": {b"a": b"1", b"b": b"1"}}
    swap = [MapOp("policy", b"a", None), MapOp("policy", b"c", b"1")]
    check_room(swap, observed, {"policy": 2})
    with pytest.raises(MapFull, match="policy has room for 2"):
        check_room(swap[::-1], observed, {"policy": 2})


@pytest.mark.parametrize("text", ["10.0.0.1", "::1", "fd77:1::5", "240.0.0.9"])
def test_addresses_go_there_and_back(text: str) -> None:
    assert text_address(address(text)) == text
