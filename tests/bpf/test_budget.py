"""One identity's share of what all share in the kernel: records of connections under way, and the flow ring."""

from __future__ import annotations

import struct

from tests.bpf.families import Family
from tests.bpf.steps import connect, refused, serve
from tests.bpf.test_events import drain
from tests.bpf.world import IDENTITY, World, wait_for

PORT = 7950
CONNECTS_MAX = 8
TOLD_IDENTITY_MAX = 128  # bpf/common.h


def under_way(world: World, name: str) -> int:
    """By the map of the programs."""
    found = world.maps["usage"].get({"value": IDENTITY[name]})
    return int(found["arriving"]) if found else 0


def deaf(world: World, family: Family) -> None:
    """A server of b whose backlog is full: what connects to it stays under way."""
    serve(world, family, PORT)
    world.b("l.listen(0)")
    world.a("import struct; made = []")
    # closed by RST: what a deaf server half accepted would stay in FIN_WAIT1, under way, for as long as TCP tries
    world.a(
        "def fill(af, to):\n  s = socket.socket(af); s.setblocking(False); made.append(s)\n"
        "  s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n  return s.connect_ex((to, 80))"
    )
    for _ in range(64):
        world.a(f"fill({family.af}, {family.spell(family.vip)!r})")
        if under_way(world, "a") > 2:
            return
    raise AssertionError("the backlog does not fill")


def test_connections_under_way_are_limited_for_each_identity(world: World, family: Family) -> None:
    world.configure(connects_max=CONNECTS_MAX)
    deaf(world, family)
    before = world.count("budget_connects")
    codes = [world.a(f"fill({family.af}, {family.spell(family.vip)!r})") for _ in range(20)]
    denied = codes.count(1)
    assert under_way(world, "a") == CONNECTS_MAX
    assert set(codes) == {1, 115} and world.count("budget_connects") == before + denied
    # the other identity goes on
    world.a(family.server("own", family.host("a"), PORT))
    world.native(family.vip, 81, [(family.host("a"), PORT)], name="a", service=5001)
    world.allow("a", IDENTITY["b"], PORT)
    connect(world, family, family.vip, 81, actor="b")
    assert under_way(world, "b") == 0
    # and what is given up gives its place back
    world.a("for s in made: s.close()")
    wait_for(lambda: under_way(world, "a") == 0, "the quota is given back")
    assert world.maps["arriving"].keys() == []


def test_every_end_of_a_connection_gives_its_place_back(world: World, family: Family) -> None:
    serve(world, family, PORT)
    world.native(family.vip, 82, [(family.host("b"), PORT + 1)])  # nobody listens
    world.allow("b", IDENTITY["a"], PORT + 1)
    world.a(
        "def one(af, to, port):\n  s = socket.socket(af); s.settimeout(3)\n  try: s.connect((to, port)); return 0\n"
        "  except OSError as error: return error.errno\n  finally: s.close()"
    )
    to = family.spell(family.vip)
    for _ in range(30):
        assert world.a(f"one({family.af}, {to!r}, 80)") == 0
        world.b("c, _ = l.accept(); c.close()")
        assert world.a(f"one({family.af}, {to!r}, 82)") != 0
    wait_for(lambda: under_way(world, "a") == 0, "nothing is under way")
    assert world.maps["arriving"].keys() == []


def test_one_identitys_denials_leave_the_flow_ring_to_others(world: World) -> None:
    wait_for(lambda: quiet_window(world), "a window begins")
    drain(world)
    flood = (
        "import contextlib\ndef flood(n):\n  for _ in range(n):\n    s = socket.socket()\n"
        "    with contextlib.suppress(PermissionError): s.connect(('10.201.9.2', 1))\n    s.close()"
    )
    world.a(flood)
    before = world.count("outbound_denied")
    world.a("flood(1000)")
    refused(world.b, "socket.socket().connect(('10.201.9.2', 1))")
    assert world.count("outbound_denied") == before + 1001
    events = drain(world)
    loud = [event for event in events if event["src_identity"] == IDENTITY["a"]]
    assert len(loud) <= 2 * TOLD_IDENTITY_MAX  # a window may have ended in between
    assert [event for event in events if event["src_identity"] == IDENTITY["b"]]


def quiet_window(world: World) -> bool:
    """Most of a window of 2^30 ns is left."""
    import time

    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) & (1 << 30) - 1 < 1 << 28


def test_the_layouts_agree(world: World) -> None:
    assert world.maps["usage"].leaf["size"] == struct.calcsize("=IIQ")
