"""getaddrinfo() sorts addresses by the source it would have for each: it connects a datagram socket there and sends
nothing. That is no attempt to talk, and no way to."""

from __future__ import annotations

import pytest

from tests.bpf.families import Family
from tests.bpf.steps import refused, silent
from tests.bpf.test_events import drain
from tests.bpf.world import HBONE, IDENTITY, World

PORT, UDP = 7950, 17
DGRAM = "socket.SOCK_DGRAM"
DENIALS = ("outbound_denied", "port_undeclared", "policy_denied", "udp_remote", "map_miss")


def denials(world: World) -> list[int]:
    return [world.count(reason) for reason in DENIALS]


def sent(world: World, family: Family) -> None:
    """One datagram on the connected ``s``, whatever the kernel says of it."""
    world.a("try:\n  s.send(b'leak')\nexcept PermissionError: pass")


@pytest.mark.parametrize("kind", ["NATIVE", "PROXY", "DENY"])
def test_a_look_up_of_a_tcp_service_is_no_denial(world: World, family: Family, kind: str) -> None:
    world.dest(family.vip, 80, kind)
    drain(world)
    before = denials(world)
    world.a(family.udp("s"))
    world.a(f"s.connect(({family.spell(family.vip)!r}, 80))")
    assert world.a("s.getsockname()[0]") == family.spell(family.host("a"))
    assert denials(world) == before and not drain(world)


@pytest.mark.parametrize("outbound", [0, 1])
def test_what_is_sent_on_such_a_socket_goes_nowhere(world: World, family: Family, outbound: int) -> None:
    world.configure(outbound_allow=outbound)
    # To an address that somebody would answer at, were it to arrive
    world.dest(family.host("b"), PORT, "NATIVE", backends=1)
    world.dest(family.host("b"), 0, "DENY", proto=UDP)
    world.b(family.server("s", family.host("b"), PORT, DGRAM))
    before, dropped = denials(world), world.count("egress_no_connect")
    world.a(family.udp("s"))
    world.a(f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
    assert denials(world) == before
    if family.name == "mapped":  # sends by the hook of sendmsg(), which asks as for any datagram
        refused(world.a, "s.send(b'leak')")
    else:
        sent(world, family)
        assert world.count("egress_no_connect") == dropped + 1
        assert denials(world) == before
    silent(world.b, "s.recv(9)")
    world.configure(outbound_allow=0)


def test_a_look_up_without_a_port_is_no_denial_either(world: World, family: Family) -> None:
    before = denials(world)
    world.a(family.udp("s"))
    world.a(f"s.connect(({family.spell(family.host('out'))!r}, 0))")
    world.a("s.close()")
    assert denials(world) == before


def test_sending_without_connecting_is_refused_as_ever(world: World, family: Family) -> None:
    world.dest(family.vip, 80, "PROXY")
    denied = world.count("outbound_denied")
    world.a(family.udp("s"))
    refused(world.a, f"s.sendto(b'x', ({family.spell(family.vip)!r}, 80))")
    assert world.count("outbound_denied") == denied + 1


def test_a_probe_takes_the_place_of_no_peer(world: World, family: Family) -> None:
    """A socket that talks to a service and then probes can only go on with the service."""
    world.b(family.server("l", family.host("b"), PORT, DGRAM))
    world.allow("b", IDENTITY["a"], PORT, UDP)
    world.native(family.vip, 5353, [(family.host("b"), PORT)], proto=UDP)
    world.dest(family.vip, 80, "PROXY")
    world.a(family.udp("s"))
    world.a(f"s.connect(({family.spell(family.vip)!r}, 5353)); s.send(b'one')")
    assert world.b("l.recv(9)") == b"one"
    world.a(f"s.connect(({family.spell(family.vip)!r}, 80))")
    sent(world, family)
    world.a(f"s.connect(({family.spell(family.vip)!r}, 5353)); s.send(b'two')")
    assert world.b("l.recv(9)") == b"two"
    world.a("s.close()")


def test_a_udp_service_and_a_stranger_are_asked_about_as_before(world: World, family: Family) -> None:
    world.dest(family.vip, 80, "PROXY")
    world.native(family.vip, 80, [(family.host("b"), PORT)], proto=UDP)
    before = world.count("policy_denied")
    world.a(family.udp("s"))
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 80))")
    assert world.count("policy_denied") == before + 1
    denied = world.count("outbound_denied")
    refused(world.a, f"s.connect(({family.spell(family.host('out'))!r}, 80))")
    assert world.count("outbound_denied") == denied + 1


def test_no_probe_of_who_is_closed_out(world: World, family: Family) -> None:
    world.dest(family.vip, 80, "PROXY")
    world.dest(family.vip, HBONE, "PROXY")
    world.a(family.udp("s"))
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, {HBONE}))")
    world.configure(lease_until_ns=1)
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 80))")
    world.configure(lease_until_ns=0)
