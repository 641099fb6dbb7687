from __future__ import annotations

import errno

import pytest

from tests.bpf.steps import refused
from tests.bpf.world import World, run


@pytest.mark.parametrize(
    "made",
    [
        "socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP",
        "socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW",
        "socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6",
        "socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP",
        "socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6",
        "socket.AF_INET, socket.SOCK_DGRAM, 136",
        "socket.AF_INET6, socket.SOCK_DGRAM, 136",
    ],
)
def test_kinds_no_hook_could_police_are_not_made(world: World, made: str) -> None:
    for place in (world.netns["a"], world.netns["node"]):  # else the kernel itself refuses ping sockets
        run("ip", "netns", "exec", place, "sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
    before = world.count("socket_type")
    refused(world.a, f"socket.socket({made})")
    refused(world.proxy, f"socket.socket({made})")
    assert world.count("socket_type") == before + 2


def test_sctp_is_not_made(world: World) -> None:
    wanted = f"Errno ({int(errno.EPERM)}|{int(errno.EPROTONOSUPPORT)})"  # the latter: no such module
    with pytest.raises(OSError, match=wanted):
        world.a("socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)")


@pytest.mark.parametrize("made", ["SOCK_STREAM, 0", "SOCK_STREAM, 262", "SOCK_DGRAM, 0"])
@pytest.mark.parametrize("af", ["AF_INET", "AF_INET6"])
def test_tcp_mptcp_and_udp_are_made(world: World, af: str, made: str) -> None:
    world.a(f"socket.socket(socket.{af}, socket.{made}).close()")


def test_the_agent_makes_what_it_needs(world: World) -> None:
    world.agent["a"]("socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()")
