"""What a name opens, for how long, to whom; what it never opens. The map is a dictionary."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from mesh.dataplane import Dest, DestKey, DestKind, Dial, Member, NodePlan
from mesh.link import Grant
from mesh.outside import GRANT_ADDRESSES_MAX, GRANT_GRACE_S, GRANT_S_MAX, GRANT_S_MIN, WayOut
from nodeagent import grants
from nodeagent.datapath_api import MapFull
from nodeagent.datapath_live import Datapath
from nodeagent.grants import Grants, asker, leads_to
from nodeagent.layouts import text_address
from nodeagent.sockdiag import Sock, State
from tests.nodeagent.compiled import compiled_layouts

CLIENT, MATE, OTHER = 501, 502, 503
PLACE, ELSEWHERE = 7, 8  # netns
THERE, THERE6 = "93.184.215.14", "2606:2800:21f:cb07::14"
API = WayOut("shop/api#api.test", "api.test", ((443, "tcp"),))
WIDE = WayOut("shop/wide#*.wide.test", "*.wide.test", ((443, "tcp"), (443, "udp")))
PLAN = NodePlan(
    members={
        71: Member(CLIENT, 301, PLACE, False),
        72: Member(MATE, 302, PLACE, False),
        73: Member(OTHER, 303, ELSEWHERE, False),
    },
    ways_out={CLIENT: (API, WIDE), OTHER: (API,)},
    dests={DestKey("198.41.0.4", 0, "tcp"): Dest(DestKind.DENY, reason="port_undeclared")},
    dials=frozenset({Dial(0, "9.9.9.9", 53)}),
)


class Map(dict[bytes, bytes]):
    """As `maps.BpfMap`, in memory."""

    def expect(self, key_size: int, value_size: int) -> None:
        layouts = compiled_layouts()
        assert (key_size, value_size) == (layouts["pl_grant_key"].size, layouts["pl_grant"].size)

    def items(self) -> dict[bytes, bytes]:  # type: ignore[override]  # a copy, as there
        return dict(self)

    def put(self, key: bytes, value: bytes) -> None:
        self[key] = value

    def delete(self, key: bytes) -> bool:
        return self.pop(key, None) is not None


class Desk:
    """Grants with a clock of ours."""

    def __init__(self, table: Map | None = None) -> None:
        self.now = 1000.0
        self.map = Map() if table is None else table
        self.grants = Grants(lambda: int(self.now * 1e9))
        self.grants.attach(self.map, compiled_layouts())  # type: ignore[arg-type]  # a dictionary
        if table is None:
            self.grants.settle(PLAN)

    def ask(self, *addresses: str, who: int | None = CLIENT, name: str = "api.test", ttl: float = 60) -> str:
        grant = Grant(1, PLACE, ("127.0.0.1", 5000), "udp", name, addresses, ttl)
        return self.grants.ask(grant, PLAN, who, lambda: {"62.1.1.1"})

    def open(self) -> dict[tuple[int, int, str, int, int], float]:
        """(netns, workload, address, port, protocol) -> seconds left."""
        layouts, found = compiled_layouts(), {}
        for raw, leaf in self.map.items().items():
            key, value = layouts["pl_grant_key"].unpack(raw), layouts["pl_grant"].unpack(leaf)
            place = key["netns"], key["workload"], text_address(key["addr"]), key["port"], key["proto"]
            found[place] = value["until_ns"] / 1e9 - self.now
        return found


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_for_the_workload_and_for_its_cable(desk: Desk) -> None:
    assert desk.ask(THERE) == ""
    left = 60 + GRANT_GRACE_S
    assert desk.open() == {(0, CLIENT, THERE, 443, 6): left, (PLACE, 0, THERE, 443, 6): left}
    assert desk.grants.allows(CLIENT, THERE, 443)
    for workload, address, port, protocol in (
        (MATE, THERE, 443, "tcp"),
        (OTHER, THERE, 443, "tcp"),
        (CLIENT, THERE6, 443, "tcp"),
        (CLIENT, THERE, 444, "tcp"),
        (CLIENT, THERE, 443, "udp"),
    ):
        assert not desk.grants.allows(workload, address, port, protocol)


@pytest.mark.parametrize(
    ("ttl", "left"),
    [
        (0, GRANT_S_MIN),
        (-5, GRANT_S_MIN),
        (100, 100 + GRANT_GRACE_S),
        (1e9, GRANT_S_MAX),
        (float("inf"), GRANT_S_MAX),
    ],
)
def test_for_so_long(desk: Desk, ttl: float, left: float) -> None:
    assert desk.ask(THERE, ttl=ttl) == ""
    assert set(desk.open().values()) == {left}


def test_a_later_answer_makes_it_longer_never_shorter(desk: Desk) -> None:
    desk.ask(THERE, ttl=600)
    desk.ask(THERE, ttl=1)
    assert set(desk.open().values()) == {610}
    desk.now += 500
    desk.ask(THERE, ttl=600)
    assert set(desk.open().values()) == {610}


@pytest.mark.parametrize(
    ("address", "name", "who", "reason"),
    [
        (THERE, "api.test", None, "unknown_asker"),
        (THERE, "api.test", MATE, "not_named"),
        (THERE, "other.test", CLIENT, "not_named"),
        (THERE, "api.test.evil.test", CLIENT, "not_named"),
        (THERE, "wide.test", CLIENT, "not_named"),  # what is below it
        *(
            (address, "api.test", CLIENT, "address")
            for address in (
                "169.254.169.254", "127.0.0.1", "10.0.0.1", "100.64.0.1", "240.0.0.1", "224.0.0.1", "0.0.0.0", "::1", "fe80::1",
                "fd77::1", "fd50:494c::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "::ffff:93.184.215.14",
                "093.184.215.14", "2606:2800:21F::14", "api.test", "", "198.41.0.4", "9.9.9.9", "62.1.1.1",
            )
        ),
    ],
)  # fmt: skip
def test_what_opens_nothing(desk: Desk, address: str, name: str, who: int | None, reason: str) -> None:
    assert desk.ask(address, who=who, name=name) == reason
    assert desk.ask(THERE, address, who=who, name=name) == reason  # nor what stands beside it
    assert desk.open() == {}
    assert desk.grants.counts == {"granted": 0, "grants_refused": 2}


def test_a_limit_for_each_answer_each_workload_and_the_node(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [f"93.184.1.{n}" for n in range(GRANT_ADDRESSES_MAX + 1)]
    assert desk.ask(*many) == "address"
    monkeypatch.setattr(grants, "WORKLOAD_GRANTS_MAX", 4)
    assert desk.ask(*many[:4]) == ""
    assert desk.ask(*many[:4]) == ""  # again is no more
    assert desk.ask(many[5]) == "full"
    assert desk.ask(many[5], who=OTHER) == ""  # it is nobody else's loss
    monkeypatch.setattr(grants, "GRANTS_MAX", 5)
    assert desk.ask(many[6], who=OTHER) == "full"
    desk.now += 3600
    assert desk.grants.sweep(lambda _: ()) == 5
    assert desk.open() == {}
    assert desk.ask(many[5]) == ""


def test_what_the_map_had_no_room_for_counts_too(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next plan, or the next answer, will find room for it."""
    monkeypatch.setattr(grants, "WORKLOAD_GRANTS_MAX", 2)
    with monkeypatch.context() as full:
        full.setattr(desk.map, "put", Mock(side_effect=MapFull("full")))
        with pytest.raises(MapFull):
            desk.ask(THERE)
    assert desk.ask(THERE6) == ""
    assert desk.ask("93.184.215.15") == "full"


def test_what_is_past_stays_while_a_connection_needs_it(desk: Desk) -> None:
    desk.ask(THERE, THERE6, name="a.wide.test", ttl=0)
    desk.now += GRANT_S_MIN
    assert set(desk.open().values()) == {0.0}  # nothing new
    assert desk.grants.sweep(lambda netns: {(6, THERE, 443)} if netns == PLACE else set()) == 3
    assert desk.open() == {(0, CLIENT, THERE, 443, 6): 0.0, (PLACE, 0, THERE, 443, 6): 0.0}
    assert desk.grants.sweep(lambda _: {(6, THERE, 444), (17, THERE, 443), (6, THERE6, 443)}) == 1
    assert desk.open() == {}


def test_what_policy_names_no_more_is_closed(desk: Desk) -> None:
    desk.ask(THERE)
    desk.ask(THERE, THERE6, name="a.wide.test")
    desk.ask(THERE, who=OTHER)
    less = replace(WIDE, ports=((443, "udp"),))
    desk.grants.settle(replace(PLAN, ways_out={CLIENT: (less,), OTHER: (API,)}))
    assert {key[:4] for key in desk.open() if key[4] == 6} == {(0, OTHER, THERE, 443), (ELSEWHERE, 0, THERE, 443)}
    assert {key[:3] for key in desk.open() if key[4] == 17} == {
        (0, CLIENT, THERE), (PLACE, 0, THERE), (0, CLIENT, THERE6), (PLACE, 0, THERE6)
    }  # fmt: skip
    desk.grants.settle(replace(PLAN, members={73: PLAN.members[73]}))  # the client is gone
    assert {key[:2] for key in desk.open()} == {(0, OTHER), (ELSEWHERE, 0)}
    desk.grants.settle(replace(PLAN, dests={DestKey(THERE, 0, "tcp"): Dest(DestKind.DENY, reason="port_undeclared")}))
    assert desk.open() == {}  # a workload has the address now


def test_two_names_of_one_address_are_two_rights(desk: Desk) -> None:
    desk.ask(THERE)
    desk.ask(THERE, name="a.wide.test")
    desk.grants.settle(replace(PLAN, ways_out={CLIENT: (API,)}))
    assert {key[:2] for key in desk.open()} == {(0, CLIENT), (PLACE, 0)}


def test_a_workload_that_moved_takes_its_rights_along(desk: Desk) -> None:
    desk.ask(THERE)
    desk.grants.settle(replace(PLAN, members={74: Member(CLIENT, 301, ELSEWHERE, False)}))
    assert set(desk.open()) == {(0, CLIENT, THERE, 443, 6), (ELSEWHERE, 0, THERE, 443, 6)}


def test_the_next_agent_goes_on(desk: Desk) -> None:
    desk.ask(THERE, ttl=600)
    desk.ask(THERE6, name="a.wide.test")
    before = desk.open()
    following = Desk(desk.map)
    assert following.grants.allows(CLIENT, THERE, 443)
    following.grants.sweep(lambda _: ())
    following.grants.settle(PLAN)
    assert following.open() == before
    following.grants.settle(replace(PLAN, ways_out={}))
    assert following.open() == {}


def sock(protocol: int, port: int, cgroup: int, remote: int = 0) -> Sock:
    there = THERE if remote else "0.0.0.0"
    return Sock(socket.AF_INET, protocol, State.ESTABLISHED, "127.0.0.1", port, there, remote, 1, cgroup, b"", {})


@pytest.mark.parametrize(
    ("socks", "found"),
    [
        ([sock(17, 5000, 71)], CLIENT),
        ([sock(17, 5000, 711), sock(17, 5001, 72), sock(6, 5000, 72)], CLIENT),
        ([sock(17, 5000, 72)], MATE),
        ([sock(17, 5000, 71), sock(17, 5000, 72)], None),  # they share the port
        ([sock(17, 5000, 99)], None),
        ([], None),
    ],
)
def test_who_asked_where_several_live(socks: list[Sock], found: int | None) -> None:
    diag: Any = SimpleNamespace(dump=lambda *_: socks)
    grant = Grant(1, PLACE, ("127.0.0.1", 5000), "udp", "api.test", (THERE,), 1)
    assert asker(grant, PLAN, lambda: diag, lambda: {711: (711, 71)}) == found


def test_who_lives_alone_is_who_asked() -> None:
    def nobody() -> Any:
        raise AssertionError("nobody is to be looked for")

    assert asker(Grant(1, ELSEWHERE, ("x", 1), "tcp", "api.test", (THERE,), 1), PLAN, nobody, nobody) == OTHER
    assert asker(Grant(1, 99, ("x", 1), "tcp", "api.test", (THERE,), 1), PLAN, nobody, nobody) is None


def test_where_sockets_lead() -> None:
    assert leads_to([sock(6, 1, 1, 443), sock(17, 1, 1)]) == {(6, THERE, 443)}


def test_a_place_that_was_let_go_leads_nowhere(tmp_path: Path) -> None:
    assert Datapath(tmp_path, tmp_path, tmp_path)._reached_from(4711) == frozenset()
