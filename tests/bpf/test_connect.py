from __future__ import annotations

import errno

import pytest

from tests.bpf.families import Family
from tests.bpf.steps import NO_OPTION, capture, refused
from tests.bpf.world import DNS, HBONE, IDENTITY, LEVEL, ORIGIN, OUTBOUND, SERVICE, V4, V6, WORKLOAD, World, addr, text


def test_a_captured_connection_carries_its_origin(world: World, family: Family) -> None:
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    world.maps["sources"].put({"value": WORKLOAD["a"]}, {"v4": addr(V4["a"]), "v6": addr(V6["a"])})
    world.a(family.tcp("s"))
    world.a(f"s.connect(({family.spell(family.vip)!r}, 80))")
    world.agent["a"]("c, _ = l.accept()")
    origin = world.origin(world.agent["a"](f"c.getsockopt({LEVEL}, {ORIGIN}, 64)"))
    assert (text(origin["dst"]), origin["dst_port"]) == (family.vip, 80)
    assert (origin["workload"], origin["identity"], origin["service"]) == (WORKLOAD["a"], IDENTITY["a"], SERVICE)
    assert origin["netns"] == world.cookie["a"]
    assert origin["cgroup"] == (world.cgroup / "workloads/a").stat().st_ino
    assert (text(origin["client"]), origin["client_port"]) == (family.host("a"), world.a("s.getsockname()[1]"))
    assert world.a("s.getpeername()[:2]") == (family.spell(family.vip), 80)
    world.a("s.sendall(b'hello')")
    assert world.agent["a"]("c.recv(9)") == b"hello"
    assert world.maps["arriving"].keys() == []
    world.a("s.close()")
    world.agent["a"]("c.close(); l.close()")


@pytest.mark.parametrize("has", ["v4", "v6"])
def test_a_caller_of_one_family_is_known_by_that_address(world: World, family: Family, has: str) -> None:
    """Services have virtual addresses of both: the caller's is one of its own, never loopback, which is nobody's."""
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    own = {"v4": V4["a"], "v6": V6["a"]}[has]
    world.maps["sources"].put({"value": WORKLOAD["a"]}, {"v4": addr("::"), "v6": addr("::")} | {has: addr(own)})
    world.a(f"{family.tcp('s')}; s.connect(({family.spell(family.vip)!r}, 80))")
    world.agent["a"]("c, _ = l.accept()")
    assert text(world.origin(world.agent["a"](f"c.getsockopt({LEVEL}, {ORIGIN}, 64)"))["client"]) == own
    world.a("s.close()")
    world.agent["a"]("c.close(); l.close()")


def test_the_workload_itself_learns_no_origin(world: World, family: Family) -> None:
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    world.a(family.tcp("s"))
    world.a(f"s.connect(({family.spell(family.vip)!r}, 80))")
    with pytest.raises(OSError, match=NO_OPTION):
        world.a(f"s.getsockopt({LEVEL}, {ORIGIN}, 64)")
    world.a("s.close()")
    world.agent["a"]("l.close()")


def test_without_our_listener_a_capture_fails(world: World, family: Family) -> None:
    world.dest(family.vip, 80, "PROXY")
    before = world.count("no_listener")
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 80))")
    assert world.count("no_listener") == before + 1


@pytest.mark.parametrize("port", [OUTBOUND, HBONE, DNS])
def test_dialling_our_ports_is_refused(world: World, family: Family, port: int) -> None:
    world.configure(outbound_allow=1)
    before = world.count("reserved_port")
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(family.loopback)!r}, {port}))")
    unspecified = {"v4": "0.0.0.0", "v6": "::", "mapped": "::ffff:0.0.0.0"}[family.name]
    refused(world.a, f"s.connect(({unspecified!r}, {port}))")
    assert world.count("reserved_port") == before + 2


def test_a_socket_made_by_another_member_is_refused(world: World, family: Family) -> None:
    world.configure(outbound_allow=1)
    world.out(family.server("l", family.host("out"), 7001))
    before = world.count("foreign_socket")
    world.b(family.tcp("s"))
    world.a.give("s", world.b("s"))
    refused(world.a, f"s.connect(({family.spell(family.host('out'))!r}, 7001))")
    assert world.count("foreign_socket") == before + 1
    world.out("l.close()")


def test_a_socket_of_the_agent_is_refused_to_a_workload(world: World) -> None:
    world.configure(outbound_allow=1)
    world.agent["a"]("s = socket.socket()")
    world.a.give("s", world.agent["a"]("s"))
    refused(world.a, "s.connect(('10.201.9.2', 7001))")


def test_unknown_destinations_are_denied_and_egress_ranges_allow(world: World, family: Family) -> None:
    host = family.host("out")
    world.out(family.server("l", host, 7002))
    before = world.count("outbound_denied"), world.count("outbound_allowed")
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(host)!r}, 7002))")
    world.egress(f"{host}/{128 if family.name == 'v6' else 32}", ports=(7003,))
    refused(world.a, f"s.connect(({family.spell(host)!r}, 7002))")
    world.egress(f"{host}/{128 if family.name == 'v6' else 32}", ports=(7003, 7002))
    world.a(f"s.connect(({family.spell(host)!r}, 7002))")
    world.a("s.sendall(b'x')")
    world.out("c, _ = l.accept()")
    assert world.out("c.recv(1)") == b"x"
    assert (world.count("outbound_denied"), world.count("outbound_allowed")) == (before[0] + 2, before[1] + 1)
    world.a("s.close()")
    world.out("c.close(); l.close()")


def test_outbound_allow_lets_the_rest_pass(world: World, family: Family) -> None:
    host = family.host("out")
    world.out(family.server("l", host, 7004))
    world.configure(outbound_allow=1)
    world.a(family.tcp("s"))
    world.a(f"s.connect(({family.spell(host)!r}, 7004))")
    world.a("s.close()")
    world.out("l.close()")


def test_undeclared_ports_of_a_workload_are_denied(world: World, family: Family) -> None:
    world.configure(outbound_allow=1)
    world.dest(family.host("b"), 0, "DENY", reason=world.layouts["constants"]["PL_R_PORT_UNDECLARED"])
    before = world.count("port_undeclared")
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(family.host('b'))!r}, 9999))")
    assert world.count("port_undeclared") == before + 1


def test_an_unknown_cgroup_is_denied(world: World, family: Family) -> None:
    world.configure(outbound_allow=1)
    world.a(family.tcp("s"))
    before = world.count("unknown_cgroup")
    world.maps["members"].delete({"value": (world.cgroup / "workloads/a").stat().st_ino})
    refused(world.a, f"s.connect(({family.spell(family.host('out'))!r}, 7005))")
    refused(world.a, "socket.socket()")
    refused(world.a, f"s.bind(({family.spell(family.loopback)!r}, 7005))")
    assert world.count("unknown_cgroup") == before + 3


def test_past_the_lease_new_connections_are_denied(world: World) -> None:
    world.configure(outbound_allow=1, lease_until_ns=1)
    before = world.count("lease_expired")
    world.a("s = socket.socket()")
    refused(world.a, "s.connect(('10.201.9.2', 7006))")
    assert world.count("lease_expired") == before + 1


def test_maps_of_another_schema_deny(world: World) -> None:
    world.configure(outbound_allow=1, schema=99)
    world.a("s = socket.socket()")
    refused(world.a, "s.connect(('10.201.9.2', 7006))")


def test_loopback_of_ones_own_netns_passes(world: World, family: Family) -> None:
    world.a(family.server("l", family.loopback, 7007))
    world.a(family.tcp("s"))
    world.a(f"s.connect(({family.spell(family.loopback)!r}, 7007)); c, _ = l.accept(); s.sendall(b'own')")
    assert world.a("c.recv(3)") == b"own"
    world.a("s.close(); c.close(); l.close()")


def test_a_full_map_of_arrivals_fails_closed(world: World, family: Family) -> None:
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    entries = world.layouts["maps"]["arriving"]["max_entries"]
    arriving = world.maps["arriving"]
    try:
        for number in range(entries + 2000):  # per-CPU free lists: past the nominal size it is full for sure
            try:
                arriving.put({"netns": 1, "sport": number & 0xFFFF, "pad": number >> 16}, {})
            except AssertionError:
                break
        before = world.count("map_full")
        world.a(family.tcp("s", timeout=6))
        refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 80))", errno.ETIMEDOUT)
        assert world.count("map_full") > before
        world.agent["a"]("l.settimeout(0)")
        with pytest.raises(BlockingIOError):
            world.agent["a"]("l.accept()")
    finally:
        arriving.clear()
        world.a("s.close()")
        world.agent["a"]("l.close()")


def test_a_child_cgroup_keeps_its_parents_identity(world: World, family: Family) -> None:
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    (world.cgroup / "workloads/a/child/deeper").mkdir(parents=True, exist_ok=True)
    child = world.actor("workloads/a/child/deeper", "a")
    child(family.tcp("s"))
    child(f"s.connect(({family.spell(family.vip)!r}, 80))")
    world.agent["a"]("c, _ = l.accept()")
    origin = world.origin(world.agent["a"](f"c.getsockopt({LEVEL}, {ORIGIN}, 64)"))
    assert (origin["identity"], origin["workload"]) == (IDENTITY["a"], WORKLOAD["a"])
    child.close()


def test_two_identities_in_one_netns_are_told_apart(world: World, family: Family) -> None:
    """The second workload lives in the first one's netns: its loopback is shared, its identity is not."""
    values = {"workload": WORKLOAD["b"], "identity": IDENTITY["b"], "netns": world.cookie["a"]}
    world.member("workloads/b", role="WORKLOAD", **values)
    second = world.actor("workloads/b", "a")
    world.a(family.server("l", family.loopback, 7008))
    before = world.count("policy_denied")
    second(family.tcp("s", 0.4))
    with pytest.raises(TimeoutError):
        second(f"s.connect(({family.spell(family.loopback)!r}, 7008))")
    assert world.count("policy_denied") > before
    world.allow("a", IDENTITY["b"], 7008)
    second(family.tcp("s"))
    second(f"s.connect(({family.spell(family.loopback)!r}, 7008))")
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    second(family.tcp("s"))
    second(f"s.connect(({family.spell(family.vip)!r}, 80))")
    world.agent["a"]("c, _ = l.accept()")
    assert world.origin(world.agent["a"](f"c.getsockopt({LEVEL}, {ORIGIN}, 64)"))["identity"] == IDENTITY["b"]
    second.close()


def test_the_nodes_own_loopback_is_outside(world: World, family: Family) -> None:
    world.configure(host_netns=world.cookie["a"])
    before = world.count("outbound_denied")
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(family.loopback)!r}, 7009))")
    assert world.count("outbound_denied") == before + 1


def test_a_workload_in_another_netns_than_its_own_is_not_captured(world: World, family: Family) -> None:
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    astray = world.actor("workloads/a", "b")
    before = world.count("no_listener")
    astray(family.tcp("s"))
    refused(astray, f"s.connect(({family.spell(family.vip)!r}, 80))")
    refused(astray, f"s.connect(({family.spell(family.loopback)!r}, 7010))")
    assert world.count("no_listener") == before + 1
    astray.close()
