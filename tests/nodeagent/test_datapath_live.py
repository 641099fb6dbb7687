"""The facade against the kernel: programs attached, maps pinned, two workloads."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lab.pace import SLOW
from mesh.link import Flow
from nodeagent import cgroups
from nodeagent import netns as spaces
from nodeagent.datapath_api import DatapathError, MapFull, Member, Role
from nodeagent.datapath_live import Datapath
from tests.nodeagent.kernel_world import World, loaded
from tests.nodeagent.plans import PORT, TARGET, VIPS, A, plan, wider

TRIES = 4
Setup = tuple[World, Datapath, tuple[int, int]]


@pytest.fixture(scope="module")
def attached() -> Iterator[tuple[World, Datapath]]:
    with loaded() as (world, datapath):
        yield world, datapath


@pytest.fixture
def mesh(attached: tuple[World, Datapath]) -> Setup:
    """Both workloads enrolled, a allowed to reach b."""
    world, datapath = attached
    cookies = datapath.adopt(world.a.path), datapath.adopt(world.b.path)
    roles = (("agent", Role.AGENT), ("proxy", Role.PROXY))
    datapath.set_members([Member(cgroups.cgroup_id(world.cgroup / name), role) for name, role in roles])
    for place, cookie in zip((world.a, world.b), cookies, strict=True):
        datapath.open_listeners(cookie, place.addresses)
    datapath.apply(plan(world, cookies), 1)
    return world, datapath, cookies


SERVER = """
s = socket.create_server(({address!r}, {port}), family={family})
say("up")
c, peer = s.accept()
say(peer[0])
try: say(c.recv(10))
except OSError as error: say(error.strerror)
"""
CLIENT = """
try:
    c = socket.create_connection(({vip!r}, {port}), 3)
    say(c.getpeername()[0])
    c.settimeout(30)
    say(c.recv(10))
except OSError as error: say(error.strerror or error)
"""


def families(family: int) -> tuple[int, socket.AddressFamily]:
    return (0, socket.AF_INET) if family == 4 else (1, socket.AF_INET6)


@pytest.mark.parametrize("family", [4, 6])
def test_a_denial_ends_an_idle_native_connection(mesh: Setup, family: int) -> None:
    took = [ending(mesh, family)]
    while took[-1] >= 1.0:  # other work makes it longer, and nothing shorter
        assert len(took) < TRIES, took
        took.append(ending(mesh, family))


def ending(mesh: Setup, family: int) -> float:
    """Seconds that it takes; then nothing is denied again."""
    world, datapath, cookies = mesh
    index, number = families(family)
    datapath.apply(plan(world, cookies), 1)
    server = world.b.start(SERVER.format(address=world.b.addresses[index], port=TARGET, family=int(number)))
    assert server.stdout is not None and server.stdout.readline().strip() == "up"
    client = world.a.start(CLIENT.format(vip=VIPS[family], port=PORT))
    assert client.stdout is not None and client.stdout.readline().strip() == VIPS[family]
    assert server.stdout.readline().strip() == world.a.addresses[index]

    assert datapath.end_denied(plan(world, cookies)) == 0
    started = time.monotonic()
    denial = plan(world, cookies, allowed=False)
    datapath.apply(denial, 2)
    assert datapath.end_denied(denial) >= 1
    assert client.stdout.readline().strip() in ("Software caused connection abort", "Connection reset by peer")
    assert server.stdout.readline().strip() in ("Software caused connection abort", "Connection reset by peer")
    took = time.monotonic() - started
    assert world.a.run(CLIENT.format(vip=VIPS[family], port=PORT)) == "Operation not permitted"
    return took


def test_who_is_no_member_connects_nowhere(mesh: Setup) -> None:
    world, _, _ = mesh
    stranger = world.cgroup / "workloads" / "stranger"
    cgroups.create(stranger)
    try:
        out = world.a.run("try: socket.socket()\nexcept OSError as error: say(error.strerror)", stranger)
        assert out == "Operation not permitted"
    finally:
        cgroups.remove(stranger)


def test_an_agent_outside_its_cgroup_is_refused(mesh: Setup) -> None:
    world, _, _ = mesh
    other = Datapath(world.cgroup / "workloads", world.bpf_dir, world.run_dir)
    with pytest.raises(DatapathError, match="runs outside"):
        other.load()


def test_equal_plans_have_equal_digests(mesh: Setup) -> None:
    world, datapath, cookies = mesh
    first = datapath.apply(plan(world, cookies), 3)
    assert datapath.apply(plan(world, cookies, allowed=False), 4) != first
    assert datapath.apply(plan(world, cookies), 5) == first == datapath.observed_digest()


def test_repair_puts_back_what_somebody_changed(mesh: Setup) -> None:
    world, datapath, cookies = mesh
    before = datapath.apply(plan(world, cookies), 6)
    assert datapath.repair() == 0
    policy, members = datapath._maps["policy"], datapath._maps["members"]
    (key,) = policy.items()
    policy.delete(key)
    policy.put(bytes(len(key)), bytes(policy.value_size))
    members.delete(struct.pack("=Q", world.a.cgroup_id))
    datapath._maps["config"].put(bytes(4), bytes(datapath._maps["config"].value_size))
    assert datapath.observed_digest() != before
    assert datapath.repair() == 4
    assert datapath.observed_digest() == before
    assert datapath.repair() == 0


def test_how_many_connects_one_identity_may_have_under_way(mesh: Setup) -> None:
    world, datapath, cookies = mesh
    for most in (300, 2048):
        datapath.apply(replace(plan(world, cookies), connects_max=most), 7)
        held = datapath._layouts["pl_config"].unpack(datapath._maps["config"].get(bytes(4)) or b"")
        assert held["connects_max"] == most


def test_a_full_map_is_refused_and_nothing_changes(mesh: Setup) -> None:
    world, datapath, cookies = mesh
    good = plan(world, cookies)
    before = datapath.apply(good, 7)
    datapath._maps["policy"].entries_max, real = 10, datapath._maps["policy"].entries_max
    try:
        with pytest.raises(MapFull, match="policy"):
            datapath.apply(wider(good, 10), 8)
    finally:
        datapath._maps["policy"].entries_max = real
    assert datapath.observed_digest() == before
    assert datapath._layouts["pl_config"].unpack(datapath._maps["config"].get(bytes(4)) or b"")["generation"] == 7
    assert "pillion_datapath_map_full{" not in datapath.metrics_text()
    assert "pillion_datapath_map_full 1" in datapath.metrics_text()


def test_a_refusal_of_the_kernel_is_undone(mesh: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    world, datapath, cookies = mesh
    good = plan(world, cookies)
    before = datapath.apply(good, 9)

    def refuse(entries: object) -> None:
        raise DatapathError("no memory")

    monkeypatch.setattr(datapath._maps["policy"], "put_many", refuse)
    more = wider(good, 5)
    with pytest.raises(DatapathError, match="no memory"):
        datapath.apply(more, 10)
    monkeypatch.undo()
    assert datapath.observed_digest() == before
    assert datapath.repair() == 0


def test_a_new_agent_finds_the_old_ones_maps(mesh: Setup) -> None:
    world, datapath, cookies = mesh
    before = datapath.apply(plan(world, cookies), 11)
    second = Datapath(world.cgroup, world.bpf_dir, world.run_dir)
    try:
        assert all(second.load().values())
        assert second.observed_digest() == before  # nothing cleared
        second.set_members([Member(cgroups.cgroup_id(world.cgroup / "proxy"), Role.PROXY)])
        members = second._maps["members"].items()
        assert struct.pack("=Q", world.a.cgroup_id) in members  # still who it was, with no plan yet
        for place in (world.a, world.b):
            second.adopt(place.path)
        assert second.apply(plan(world, cookies), 11) == before
    finally:
        second.close()
        datapath.repair()  # what the first believes is out of date


def test_listeners_are_ours_alone_and_come_back_from_the_proxy(mesh: Setup) -> None:
    world, datapath, (cookie, _) = mesh
    opened = datapath.open_listeners(cookie, world.a.addresses)
    assert {(frame.kind, frame.address, frame.port) for frame, _ in opened} == {
        *(
            (kind, at, port)
            for at in ("127.0.0.1", "::1")
            for kind, port in (("outbound", 15001), ("dns-udp", 15053), ("dns-tcp", 15053))
        ),
        *(("hbone", at, 15008) for at in world.a.addresses),
    }
    assert [listener.fd for listener in datapath.open_listeners(cookie, world.a.addresses)] == [one.fd for one in opened]
    hbone = next(listener for listener in opened if listener.frame.id == f"{cookie}/hbone/{world.a.addresses[0]}")
    with socket.socket(fileno=os.dup(hbone.fd)) as listening:
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
        inode = inode_of(listening.fileno())
    # The proxy keeps it while the agent is gone
    code = "import sys; print('up', flush=True); sys.stdin.read()"  # up: it opens no file any more
    join = 'echo $$ > "$1/cgroup.procs"; exec "$2" -c "$3"'
    argv = ["sh", "-c", join, "-", str(world.cgroup / "proxy"), sys.executable, code]
    keeper = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[hbone.fd])
    try:
        assert keeper.stdout is not None and keeper.stdout.readline() == b"up\n"
        datapath.forget(cookie)
        assert datapath.adopt(world.a.path) == cookie
        again = datapath.open_listeners(cookie, world.a.addresses)
        taken = next(listener for listener in again if listener.frame.id == hbone.frame.id)
        assert inode_of(taken.fd) == inode
    finally:
        keeper.kill()
        keeper.communicate()


def inode_of(fd: int) -> int:
    return os.fstat(fd).st_ino


@pytest.mark.parametrize("at", ["127.0.0.1", "::1"])
def test_the_port_of_a_stranger_is_an_error_not_a_takeover(mesh: Setup, at: str) -> None:
    world, datapath, (cookie, _) = mesh
    datapath.forget(cookie)
    place = datapath.adopt(world.a.path)
    squatter = datapath._places[place].run(lambda: spaces.listen_tcp(at, 15001))  # as if older than the programs
    stranger = subprocess.Popen(["sleep", "60"], pass_fds=[squatter.fileno()])
    squatter.close()
    try:
        with pytest.raises(OSError, match="15001"):
            datapath.open_listeners(place, world.a.addresses)
        datapath.repair()
        assert struct.pack("=Q", place) not in datapath._maps["listeners"].items()  # so connects fail closed
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_stock_is_made_in_the_netns(mesh: Setup, family: int) -> None:
    _, datapath, (cookie, _) = mesh
    fds = datapath.make_stock(cookie, family, 3)
    assert len(set(fds)) == 3
    for fd in fds:
        with socket.socket(fileno=fd) as sock:
            assert struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, spaces.SO_NETNS_COOKIE, 8))[0] == cookie
            assert sock.family == family and not os.get_blocking(fd)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    with pytest.raises(KeyError):
        datapath.make_stock(12345, family, 1)


def test_a_netns_is_given_by_a_descriptor_that_nobody_else_closes(mesh: Setup) -> None:
    """Express visits it on a thread of its own, which the netns may be let go beside: the number would be another's."""
    _, datapath, (cookie, _) = mesh
    ours, others = datapath.netns_fd(cookie), datapath.netns_fd(cookie)
    assert ours != others
    os.close(others)
    assert spaces.cookie(ours) == cookie
    os.close(ours)
    with pytest.raises(KeyError):
        datapath.netns_fd(12345)


def test_servers_see_a_workloads_own_address(mesh: Setup) -> None:
    world, datapath, cookies = mesh
    datapath.apply(plan(world, cookies), 12)
    source = datapath._maps["sources"].get(struct.pack("=I", A))
    assert source is not None
    shown = datapath._layouts["pl_source"].unpack(source)
    assert shown["v4"].endswith(socket.inet_aton(world.a.addresses[0]))
    assert shown["v6"] == socket.inet_pton(socket.AF_INET6, world.a.addresses[1])


def test_a_lease_that_ran_out_denies(mesh: Setup) -> None:
    world, datapath, _ = mesh
    try:
        datapath.extend_lease(1)
        assert datapath.leased_until_ns() == 1
        assert world.a.run(CLIENT.format(vip=VIPS[4], port=PORT)) == "Operation not permitted"
        assert 'reason="lease_expired"} 0' not in datapath.metrics_text()
    finally:
        datapath.extend_lease(0)


async def test_verdicts_come_as_flows(mesh: Setup) -> None:
    world, datapath, cookies = mesh
    datapath.apply(plan(world, cookies, allowed=False), 13)
    datapath.set_names({301: "spiffe://mesh.local/ns/shop/sa/a"}, {A: "Workload/shop/a", 502: "Workload/shop/b"})
    datapath.set_revision("n1", 42)
    flows = datapath.flows()

    async def denial() -> Flow:
        async for flow in flows:
            if flow.reason == "policy_denied" and flow.time > started:
                return flow
        raise AssertionError("the stream ended")

    started = time.time()
    waiting = asyncio.create_task(denial())
    client = world.a.start(CLIENT.format(vip=VIPS[4], port=PORT))
    flow = await asyncio.wait_for(waiting, 5 * SLOW)
    client.communicate(timeout=5 * SLOW)
    assert (flow.verdict, flow.source, flow.destination) == ("denied", "spiffe://mesh.local/ns/shop/sa/a", "Workload/shop/b")
    assert (flow.destination_address, flow.protocol, flow.revision, flow.node) == (f"{VIPS[4]}:{PORT}", "tcp", 42, "n1")
    assert abs(flow.time - time.time()) < 5 * SLOW
