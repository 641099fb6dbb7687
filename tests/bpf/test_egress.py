from __future__ import annotations

import pytest

from tests.bpf.steps import refused
from tests.bpf.world import V4, World

PORT = 7600


def test_a_raw_socket_older_than_the_programs_sends_nothing(world: World) -> None:
    world.configure(outbound_allow=1)
    before = world.count("egress_protocol")
    refused(world.old, f"raw.sendto(bytes([8, 0, 0xf7, 0xff, 0, 0, 0, 0]), ({V4['out']!r}, 0))")
    assert world.count("egress_protocol") == before + 1


def test_udplite_older_than_the_programs_sends_nothing(world: World) -> None:
    world.configure(outbound_allow=1)
    refused(world.old, f"lite.sendto(b'x', ({V4['out']!r}, 9))")


def test_a_connection_older_than_the_programs_is_cut(world: World) -> None:
    before = world.count("egress_no_connect")
    world.old("import contextlib\nwith contextlib.suppress(OSError): live.sendall(b'late')")
    world.out_old("c.settimeout(0.3)")
    with pytest.raises(TimeoutError):
        world.out_old("c.recv(4)")
    assert world.count("egress_no_connect") > before


def test_an_old_socket_serves_its_owner_and_nobody_else(world: World) -> None:
    """Made before the hooks stood, it carries no creator: its first packet is judged by the cgroup it belongs to."""
    world.configure(outbound_allow=1)
    world.out(f"l = socket.create_server(({V4['out']!r}, {PORT}))")
    world.b.give("s", world.old("early"))
    before = world.count("foreign_socket")
    world.b("s.settimeout(0.4)")
    with pytest.raises(OSError, match=r"timed out|not permitted"):
        world.b(f"s.connect(({V4['out']!r}, {PORT}))")
    assert world.count("foreign_socket") > before
    world.old(f"own.settimeout(3); own.connect(({V4['out']!r}, {PORT})); own.sendall(b'x')")
