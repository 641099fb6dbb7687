from __future__ import annotations

import pytest

from tests.bpf.families import Family
from tests.bpf.steps import NO_OPTION, call_for_a, connect, refused, silent, stock
from tests.bpf.world import CALLER, HBONE, IDENTITY, LEVEL, ORIGIN, World

PORT = 7400


def test_the_server_sees_the_caller_the_proxy_names(world: World, family: Family) -> None:
    world.b(family.server("l", family.host("b"), PORT))
    world.dial("b", family.host("b"), PORT)
    world.allow("b", IDENTITY["a"], PORT, verdict="L7")
    stock(world, family, "b")
    world.proxy(f"s.setsockopt({LEVEL}, {CALLER}, {world.caller(family.host('a'), 43210, IDENTITY['a'])!r})")
    world.proxy(f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    world.b("c, who = l.accept()")
    shown = (family.spell(family.host("a")), 43210)
    assert world.b("who[:2]") == shown
    assert world.b("c.getpeername()[:2]") == shown
    world.proxy("s.sendall(b'request')")
    assert world.b("c.recv(9)") == b"request"
    world.proxy("s.close()")
    world.b("c.close(); l.close()")


def test_without_a_caller_the_proxy_reaches_no_endpoint(world: World, family: Family) -> None:
    world.dial("b", family.host("b"), PORT)
    before = world.count("no_caller")
    stock(world, family, "b")
    refused(world.proxy, f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    assert world.count("no_caller") == before + 1


def test_a_caller_whom_policy_denies_stays_out(world: World, family: Family) -> None:
    world.b(family.server("l", family.host("b"), PORT))
    world.dial("b", family.host("b"), PORT)
    before = world.count("policy_denied")
    stock(world, family, "b")
    call_for_a(world, family)
    silent(world.proxy, f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    assert world.count("policy_denied") > before
    world.proxy("s.close()")
    world.b("l.close()")


def test_the_proxy_dials_only_what_the_agent_listed(world: World, family: Family) -> None:
    world.configure(outbound_allow=1)
    world.dial("a", family.host("b"), PORT)  # right place, other netns
    world.dial("b", family.host("b"), PORT + 1)
    before = world.count("dial_denied")
    stock(world, family, "b")
    call_for_a(world, family)
    refused(world.proxy, f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    refused(world.proxy, f"s.connect(({family.spell(family.loopback)!r}, {PORT}))")
    assert world.count("dial_denied") == before + 2


def test_tunnels_need_no_caller(world: World, family: Family) -> None:
    world.out(family.server("l", family.host("out"), HBONE))
    world.dial("a", family.host("out"), HBONE)
    stock(world, family, "a")
    world.proxy(f"s.connect(({family.spell(family.host('out'))!r}, {HBONE}))")
    world.proxy("s.sendall(b'x')")
    world.out("c, _ = l.accept()")
    assert world.out("c.recv(1)") == b"x"
    world.proxy("s.close()")
    world.out("c.close(); l.close()")


def test_a_remote_node_reaches_our_tunnel_listener(world: World, family: Family) -> None:
    world.agent["b"](family.server("l", family.host("b"), HBONE))
    world.proxy.give("l", world.agent["b"]("l"))
    connect(world, family, family.host("b"), HBONE, actor="out")
    world.proxy("l.settimeout(3); c, who = l.accept(); c.sendall(b'hi')")
    assert world.out("s.recv(2)") == b"hi"
    assert world.proxy("who[0]") == family.spell(family.host("out"))
    with pytest.raises(OSError, match=NO_OPTION):
        world.proxy(f"c.getsockopt({LEVEL}, {ORIGIN}, 64)")
    world.out("s.close()")
    world.proxy("c.close(); l.close()")
    world.agent["b"]("l.close()")


def test_workloads_name_no_caller(world: World, family: Family) -> None:
    before = world.count("socket_option")
    world.a(family.tcp("s"))
    refused(world.a, f"s.setsockopt({LEVEL}, {CALLER}, {world.caller(family.host('b'), 1, 1)!r})")
    assert world.count("socket_option") == before + 1


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::"])
def test_loopback_is_shown_on_nobodys_behalf(world: World, address: str) -> None:
    world.agent["b"]("s = socket.socket(socket.AF_INET6)")
    world.proxy.give("s", world.agent["b"]("s"))
    refused(world.proxy, f"s.setsockopt({LEVEL}, {CALLER}, {world.caller(address, 1, 1)!r})")


def test_other_options_are_left_alone(world: World) -> None:
    world.a("s = socket.socket(); s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)")
    assert world.a("s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)") == 1
    refused(world.a, "s.setsockopt(socket.IPPROTO_TCP, 19, 1)")  # TCP_REPAIR


def test_the_proxys_record_missing_means_no_connection(world: World, family: Family) -> None:
    """What a caller's address would rest on is the record alone."""
    world.b(family.server("l", family.host("b"), PORT))
    world.allow("b", IDENTITY["a"], PORT)
    before = world.count("ingress_plaintext")
    world.agent["b"](family.tcp("s", 0.4))  # the agent itself may dial, but leaves no record
    with pytest.raises(TimeoutError):
        world.agent["b"](f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    assert world.count("ingress_plaintext") > before
    world.agent["b"]("s.close()")
    world.b("l.close()")
