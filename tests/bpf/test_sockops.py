from __future__ import annotations

import pytest

from tests.bpf.families import FAMILIES, Family
from tests.bpf.steps import call_for_a, capture, connect, refused, stock
from tests.bpf.world import IDENTITY, LEVEL, ORIGIN, V4, V6, World, run, text

PORT = 7800
FLOOD = 300  # connections of one round


def test_each_of_many_connections_keeps_its_own_origin(world: World, family: Family) -> None:
    """Old source ports come back, other destinations in between: no record is mixed up, none is left."""
    capture(world, family)
    for port in range(1, 5):
        world.dest(family.vip, port, "PROXY")
    world.agent["a"](
        "def take(n):\n  out = []\n  for _ in range(n):\n    c, who = l.accept()\n"
        f"    out.append((who[1], c.getsockopt({LEVEL}, {ORIGIN}, 64))); c.close()\n  return out"
    )
    world.a(
        "def burst(af, vip, n):\n  made = []\n  for i in range(n):\n    s = socket.socket(af)\n"
        "    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.connect((vip, 1 + i % 4))\n"
        "    made.append((s, s.getsockname()[1], 1 + i % 4))\n  return made"
    )
    for _ in range(FLOOD // 50):
        world.a(f"made = burst({family.af}, {family.spell(family.vip)!r}, 50)")
        wanted = dict(world.a("[(port, to) for _, port, to in made]"))
        seen = {port: world.origin(raw) for port, raw in world.agent["a"]("take(50)")}
        assert {port: origin["dst_port"] for port, origin in seen.items()} == wanted
        assert {origin["client_port"] for origin in seen.values()} == set(wanted)
        world.a("for s, _, _ in made: s.close()")
    assert world.maps["arriving"].keys() == []


def test_a_client_bound_to_its_own_address_is_captured_too(world: World) -> None:
    v4 = FAMILIES[0]
    capture(world, v4)
    world.dest(v4.vip, 80, "PROXY")
    world.a(v4.tcp("s"))
    world.a(f"s.bind(({V4['a']!r}, 0)); s.connect(({v4.vip!r}, 80))")
    world.agent["a"]("c, _ = l.accept()")
    origin = world.origin(world.agent["a"](f"c.getsockopt({LEVEL}, {ORIGIN}, 64)"))
    assert text(origin["client"]) == V4["a"]


def test_bytes_between_an_application_and_the_proxy_are_not_held_back(world: World, family: Family) -> None:
    """Nagle's algorithm, and a peer that delays its acknowledgements. The application's word counts."""
    asked = "s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)"
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    connect(world, family, family.vip, 80)
    assert world.a(asked)
    world.a("s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)")
    assert not world.a(asked)

    world.b(family.server("l", family.host("b"), PORT))
    world.dial("b", family.host("b"), PORT)
    world.allow("b", IDENTITY["a"], PORT)
    stock(world, family, "b")
    call_for_a(world, family)
    world.proxy(f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    world.b("s, _ = l.accept()")
    assert world.b(asked)
    world.agent["b"]("s.close()")
    world.proxy("s.close()")  # first, here and below: the next test's listener has the port
    world.b("s.settimeout(3); assert not s.recv(1); s.close()")

    world.native(family.vip, 81, [(family.host("b"), PORT)])  # nobody's business but theirs
    connect(world, family, family.vip, 81)
    world.b("s, _ = l.accept()")
    assert not world.a(asked) and not world.b(asked)
    world.a("s.close()")
    world.b("s.settimeout(3); assert not s.recv(1); s.close(); l.close()")


def test_connections_are_led_nowhere_once_the_listener_is_gone(world: World, family: Family) -> None:
    """Whoever comes next to the port is a stranger. What the agent gave to the proxy lives on there."""
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    world.proxy.give("l", world.agent["a"]("l"))
    world.agent["a"]("l.close(); other = socket.create_server(('127.0.0.1', 7999)); other.close()")
    connect(world, family, family.vip, 80)
    world.proxy("c, _ = l.accept(); c.close(); l.close()")
    before = world.count("no_listener")
    world.a(family.tcp("s"))
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 80))")
    assert world.count("no_listener") == before + 1
    capture(world, family)  # the agent is back
    connect(world, family, family.vip, 80)


def test_a_reconnected_socket_has_the_new_origin(world: World, family: Family) -> None:
    capture(world, family)
    world.dest(family.vip, 80, "PROXY")
    world.dest(family.vip, 81, "PROXY")
    world.a("import ctypes; libc = ctypes.CDLL(None, use_errno=True)")
    connect(world, family, family.vip, 80)
    world.agent["a"]("c, _ = l.accept(); c.close()")
    world.a("assert libc.connect(s.fileno(), bytes(28), 28) == 0")  # AF_UNSPEC
    world.a(f"s.connect(({family.spell(family.vip)!r}, 81))")
    world.agent["a"]("c, _ = l.accept()")
    assert world.origin(world.agent["a"](f"c.getsockopt({LEVEL}, {ORIGIN}, 64)"))["dst_port"] == 81
    assert world.a("s.getpeername()[1]") == 81


def test_fast_open_goes_through_the_same_hook(world: World, family: Family) -> None:
    world.dest(family.host("b"), 0, "DENY")
    world.a(family.tcp("s"))
    refused(world.a, f"s.sendto(b'x', 0x20000000, ({family.spell(family.host('b'))!r}, {PORT}))")
    world.a(family.tcp("s") + "; s.setsockopt(socket.IPPROTO_TCP, 30, 1)")  # TCP_FASTOPEN_CONNECT
    refused(world.a, f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")


def test_fast_open_data_arrives_once_with_its_record(world: World, family: Family) -> None:
    for name in ("a", "b"):
        run("ip", "netns", "exec", world.netns[name], "sysctl", "-qw", "net.ipv4.tcp_fastopen=3")
    world.b(family.server("l", family.host("b"), PORT) + "; l.setsockopt(socket.IPPROTO_TCP, 23, 16)")
    world.native(family.vip, 80, [(family.host("b"), PORT)])
    world.allow("b", IDENTITY["a"], PORT)
    for _ in range(3):  # without a cookie, then with
        world.a(f"s = socket.socket({family.af})")
        world.a(f"s.sendto(b'early', 0x20000000, ({family.spell(family.vip)!r}, 80))")
        world.b("c, who = l.accept(); c.settimeout(3)")
        assert world.b("c.recv(9)") == b"early"
        assert world.b("who[0]") == family.spell(family.host("a"))
        world.a("s.close()")
        world.b("c.close()")
    assert world.maps["arriving"].keys() == []


@pytest.mark.parametrize("server", [0, 262])
def test_multipath_tcp_is_tcp(world: World, family: Family, server: int) -> None:
    """The subflow, which the kernel makes, stands for the socket; 262 is IPPROTO_MPTCP."""
    world.b(f"l = socket.socket({family.af}, socket.SOCK_STREAM, {server}); l.settimeout(3)")
    world.b("l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)")
    world.b(f"l.bind(({family.spell(family.host('b'))!r}, {PORT})); l.listen(4)")
    world.native(family.vip, 80, [(family.host("b"), PORT)])
    world.allow("b", IDENTITY["a"], PORT)
    world.a(f"s = socket.socket({family.af}, socket.SOCK_STREAM, 262); s.settimeout(3)")
    world.a(f"s.connect(({family.spell(family.vip)!r}, 80)); s.sendall(b'multi')")
    world.b("c, _ = l.accept(); c.settimeout(3)")
    assert world.b("c.recv(9)") == b"multi"
    world.forbid("b", IDENTITY["a"], PORT)
    world.a(f"t = socket.socket({family.af}, socket.SOCK_STREAM, 262); t.settimeout(3)")
    refused(world.a, f"t.connect(({family.spell(family.vip)!r}, 80))")


def test_a_multipath_socket_of_another_workload_is_known_by_its_owner(world: World) -> None:
    """Its subflow carries no creator; the first packet compares the cgroup."""
    world.configure(outbound_allow=1)
    world.out(f"l = socket.create_server(({V4['out']!r}, {PORT}))")
    world.b("s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)")
    world.a.give("s", world.b("s"))
    before = world.count("foreign_socket")
    world.a("s.settimeout(0.4)")
    with pytest.raises(OSError, match=r"timed out|not permitted"):
        world.a(f"s.connect(({V4['out']!r}, {PORT}))")
    assert world.count("foreign_socket") > before


def test_a_listener_on_both_families_takes_both(world: World) -> None:
    world.b("l = socket.socket(socket.AF_INET6); l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)")
    world.b(f"l.bind(('::', {PORT})); l.listen(4); l.settimeout(3)")
    for family, host in zip(FAMILIES[:2], (V4["b"], V6["b"]), strict=True):
        world.native(family.vip, 80, [(host, PORT)], service=6004 if family.name == "v4" else 6006)
        world.allow("b", IDENTITY["a"], PORT)
        connect(world, family, family.vip, 80)
        world.b("c, who = l.accept()")
        assert world.b("who[0]") == (f"::ffff:{V4['a']}" if family.name == "v4" else V6["a"])
