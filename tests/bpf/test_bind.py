from __future__ import annotations

import pytest

from tests.bpf.families import Family
from tests.bpf.steps import capture, refused
from tests.bpf.world import DNS, HBONE, OUTBOUND, World


@pytest.mark.parametrize("port", [OUTBOUND, HBONE, DNS])
@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_nobody_takes_our_ports_first(world: World, family: Family, port: int, kind: str) -> None:
    before = world.count("bind_denied")
    world.a(f"s = socket.socket({family.af}, socket.{kind})")
    refused(world.a, f"s.bind(({family.spell(family.loopback)!r}, {port}))")
    refused(world.a, f"s.bind(('', {port}))")
    assert world.count("bind_denied") == before + 2


def test_nobody_joins_our_listener(world: World, family: Family) -> None:
    capture(world, family)
    world.a(f"s = socket.socket({family.af}); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)")
    refused(world.a, f"s.bind(({family.spell(family.loopback)!r}, {OUTBOUND}))")
    world.agent["a"]("l.close()")


def test_other_ports_are_free(world: World, family: Family) -> None:
    world.a(family.server("l", family.loopback, 7100))
    world.a("l.close()")


def test_the_proxy_binds_none_either(world: World) -> None:
    world.proxy("s = socket.socket()")
    refused(world.proxy, f"s.bind(('127.0.0.1', {OUTBOUND}))")
