from __future__ import annotations

import errno

import pytest

from tests.bpf.families import Family
from tests.bpf.steps import capture, connect, refused, serve, silent
from tests.bpf.world import IDENTITY, World

PORT = 7300


def test_a_native_connection_reaches_its_backend(world: World, family: Family) -> None:
    serve(world, family, PORT)
    before = world.count("native_allowed")
    connect(world, family, family.vip, 80)
    world.b("c, who = l.accept()")
    assert world.b("who[:2]") == (family.spell(family.host("a")), world.a("s.getsockname()[1]"))
    assert world.a("s.getpeername()[:2]") == (family.spell(family.vip), 80)
    world.b("c.sendall(b'first')")
    assert world.a("s.recv(9)") == b"first"
    assert world.count("native_allowed") == before + 1
    assert world.maps["arriving"].keys() == []
    world.a("s.close()")
    world.b("c.close(); l.close()")


def test_backends_share_the_connections(world: World, family: Family) -> None:
    for slot in (0, 1):
        world.b(family.server(f"l{slot}", family.host("b"), PORT + slot))
        world.allow("b", IDENTITY["a"], PORT + slot)
    world.native(family.vip, 80, [(family.host("b"), PORT), (family.host("b"), PORT + 1)])
    for _ in range(24):
        connect(world, family, family.vip, 80)
    world.b(
        "import select; taken = [0, 0]\nwhile sum(taken) < 24:\n  ready, _, _ = select.select([l0, l1], [], [], 9)\n"
        "  assert ready\n  for l in ready: l.accept(); taken[l is l1] += 1"
    )
    assert sum(world.b("taken")) == 24 and min(world.b("taken")) > 0
    world.b("l0.close(); l1.close()")


def test_policy_denies_at_connect(world: World, family: Family) -> None:
    serve(world, family, PORT)
    world.forbid("b", IDENTITY["a"], PORT)
    before = world.count("policy_denied")
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 80))")
    assert world.count("policy_denied") == before + 1
    world.b("l.close()")


def test_an_l7_verdict_sends_a_native_connection_to_the_proxy(world: World, family: Family) -> None:
    serve(world, family, PORT)
    capture(world, family)
    world.allow("b", IDENTITY["a"], PORT, verdict="L7")
    connect(world, family, family.vip, 80)
    world.agent["a"]("c, _ = l.accept()")
    world.agent["a"]("l.close()")
    world.b("l.close()")


def test_a_missing_backend_is_a_counted_denial(world: World, family: Family) -> None:
    world.dest(family.vip, 80, "NATIVE", backends=1)
    world.dest(family.vip, 81, "NATIVE", backends=0)
    before = world.count("map_miss"), world.count("no_backend")
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 80))")
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 81))")
    assert (world.count("map_miss"), world.count("no_backend")) == (before[0] + 1, before[1] + 1)


def test_the_receiver_is_judged_not_the_address(world: World, family: Family) -> None:
    """The map says workload b lives there, but a's own listener answers: policy for a decides."""
    world.a(family.server("l", family.host("a"), PORT))
    world.native(family.vip, 80, [(family.host("a"), PORT)], name="b")
    world.allow("b", IDENTITY["a"], PORT)
    before = world.count("policy_denied")
    world.a(family.tcp("s", 0.4))
    with pytest.raises(TimeoutError):
        world.a(f"s.connect(({family.spell(family.vip)!r}, 80))")
    assert world.count("policy_denied") > before
    world.a("l.close(); s.close()")


def test_plaintext_from_outside_is_dropped(world: World, family: Family) -> None:
    world.b(family.server("l", family.host("b"), PORT))
    world.allow("b", 0, PORT)
    before = world.count("ingress_plaintext")
    world.out(family.tcp("s"))
    silent(world.out, f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    assert world.count("ingress_plaintext") > before
    world.out("s.close()")
    world.b("l.close()")


def test_permissive_lets_the_unknown_in_as_policy_says(world: World, family: Family) -> None:
    world.permissive("b")
    world.b(family.server("l", family.host("b"), PORT))
    world.out(family.tcp("s"))
    silent(world.out, f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    world.allow("b", 0, PORT)
    connect(world, family, family.host("b"), PORT, actor="out")
    world.b("c, who = l.accept(); c.sendall(b'hello')")
    assert world.out("s.recv(9)") == b"hello"
    assert world.b("who[0]") == family.spell(family.host("out"))
    world.forbid("b", 0, PORT)
    world.bump()
    world.out("s.sendall(b'more')")
    world.b("c.settimeout(0.4)")
    with pytest.raises(TimeoutError):
        world.b("c.recv(4)")
    world.out("s.close()")
    world.b("c.close(); l.close()")


def test_loopback_without_a_record_is_dropped(world: World, family: Family) -> None:
    """A process of the netns that is no member, as after `ip netns exec`."""
    world.permissive("b")
    world.allow("b", 0, PORT)
    world.b(family.server("l", family.loopback, PORT))
    stranger = world.actor(None, "b")
    before = world.count("ingress_no_record")
    stranger(family.tcp("s"))
    silent(stranger, f"s.connect(({family.spell(family.loopback)!r}, {PORT}))")
    assert world.count("ingress_no_record") > before
    stranger("s.close()")
    world.b("l.close()")


def test_a_new_generation_keeps_what_is_allowed_and_ends_the_rest(world: World, family: Family) -> None:
    serve(world, family, PORT)
    connect(world, family, family.vip, 80)
    world.b("c, _ = l.accept(); c.settimeout(0.5)")
    world.a("s.sendall(b'1')")
    assert world.b("c.recv(1)") == b"1"
    world.bump()
    world.a("s.sendall(b'2')")
    assert world.b("c.recv(1)") == b"2"
    world.b("c.sendall(b'3')")
    assert world.a("s.recv(1)") == b"3"
    before = world.count("generation_denied")
    world.forbid("b", IDENTITY["a"], PORT)
    world.bump()
    world.a("s.sendall(b'4')")
    with pytest.raises(TimeoutError):
        world.b("c.recv(1)")
    assert world.count("generation_denied") > before
    world.b("c.sendall(b'5')")
    silent(world.a, "s.recv(1)")
    world.allow("b", IDENTITY["a"], PORT)
    world.bump()
    world.a("s.settimeout(3)")
    assert world.a("s.recv(1)") == b"5"  # retransmitted
    world.a("s.close()")
    world.b("c.close(); l.close()")


def test_a_withdrawn_range_ends_outbound_connections(world: World, family: Family) -> None:
    host = family.host("out")
    world.out(family.server("l", host, PORT))
    world.egress(f"{host}/{128 if family.name == 'v6' else 32}")
    connect(world, family, host, PORT)
    world.out("c, _ = l.accept(); c.settimeout(0.4)")
    world.maps["egress"].clear()
    world.bump()
    before = world.count("generation_denied")
    world.a("s.sendall(b'x')")
    with pytest.raises(TimeoutError):
        world.out("c.recv(1)")
    assert world.count("generation_denied") > before
    world.a("s.close()")
    world.out("c.close(); l.close()")


def test_a_disconnected_client_that_listens_carries_no_admission(world: World, family: Family) -> None:
    serve(world, family, PORT)
    world.a("import ctypes; libc = ctypes.CDLL(None, use_errno=True)")
    connect(world, family, family.vip, 80)
    world.a("assert libc.connect(s.fileno(), bytes(28), 28) == 0")  # AF_UNSPEC
    world.a(f"s.bind(({family.spell(family.host('a'))!r}, {PORT + 9})); s.listen(4)")
    before = world.count("ingress_plaintext")
    world.out(family.tcp("s"))
    silent(world.out, f"s.connect(({family.spell(family.host('a'))!r}, {PORT + 9}))")
    assert world.count("ingress_plaintext") > before
    world.a("s.close()")
    world.b("l.close()")


def test_a_closed_client_leaves_no_record(world: World, family: Family) -> None:
    world.native(family.vip, 80, [(family.host("b"), PORT)])
    world.allow("b", IDENTITY["a"], PORT)
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 80))", errno.ECONNREFUSED)
    assert world.maps["arriving"].keys() == []
    world.a("s.close()")
