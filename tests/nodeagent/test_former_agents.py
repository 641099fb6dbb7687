"""What a former agent made for the proxy outlives it, though its cgroup is gone: as on a host, where each start of the unit is
a new cgroup in the agent's slice."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nodeagent import cgroups
from nodeagent.datapath import FORMER_AGENTS_KEPT, FORMER_AGENTS_MAX, former_agents
from nodeagent.datapath_api import Member, Role
from nodeagent.datapath_live import Datapath
from tests.nodeagent.kernel_world import World, world
from tests.nodeagent.plans import plan

RESOLVER = ("192.0.2.53", "2001:db8::53")  # whatever it is: port 53 leads to the agent's listener
CLIENT = """
c = socket.create_connection(({to!r}, 53), 3)
say("open")
c.settimeout(8)
try: say(c.recv(10))
except OSError as error: say(error.strerror or error)
"""


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([], ()),
        ([4, 2], (2, 4)),
        ([1, 5], (5,)),  # our own
        ([7, 5], (5,)),  # somebody may be in there
    ],
)
def test_former_agents(known: list[int], expected: tuple[int, ...]) -> None:
    assert former_agents(known, (1,), {1, 7}) == expected


def test_they_are_bounded_and_the_oldest_stay() -> None:
    """The first agent of a boot made the listeners; one that starts again and again made nothing."""
    found = former_agents(range(10, 9000), (), ())
    assert len(found) == FORMER_AGENTS_MAX
    assert found[0] == 10 and found[-1] == 8999


class Life:
    """One agent after the other, each in a cgroup of its own."""

    def __init__(self, made: World) -> None:
        self.world, self.slice = made, made.cgroup / cgroups.AGENT_SLICE
        self.home: Path | None = None

    def start(self, name: str, load: bool = False) -> tuple[Datapath, tuple[int, int]]:
        """The agent before it is no more: its cgroup is removed. The proxy's part, which keeps the sockets, is ours."""
        home = self.slice / name
        cgroups.create(home)
        cgroups.move(home, os.getpid())
        if self.home is not None:
            self.home.rmdir()
        self.home = home
        datapath = Datapath(self.world.cgroup, self.world.bpf_dir, self.world.run_dir, proxy_cgroup=home)
        (datapath.load if load else datapath.open)()
        cookies = datapath.adopt(self.world.a.path), datapath.adopt(self.world.b.path)
        datapath.set_members([Member(cgroups.cgroup_id(self.world.cgroup / "proxy"), Role.PROXY)])
        datapath.open_listeners(cookies[0], self.world.a.addresses)
        return datapath, cookies


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    """One load of the programs for all."""
    with world() as made:
        found = Life(made)
        try:
            found.start("load.service", load=True)[0].close()
            yield found
        finally:
            Datapath(made.cgroup, made.bpf_dir, made.run_dir).unload()
            cgroups.move(made.cgroup / "agent", os.getpid())


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_a_restart_ends_no_connection_through_the_proxy(life: Life, family: int) -> None:
    first, cookies = life.start(f"first{family}.service")
    first.apply(plan(life.world, cookies), 1)
    first.enrol(cookies[0])
    opened = first.open_listeners(cookies[0], life.world.a.addresses)
    at = ("127.0.0.1", "::1")[family]
    with ExitStack() as proxy:
        kept = {(frame.kind, frame.address): proxy.enter_context(held(fd)) for frame, fd in opened if frame.kind != "dns-udp"}
        listener = kept["dns-tcp", at]
        client = life.world.a.start(CLIENT.format(to=RESOLVER[family]))
        accepted = [listener.accept()[0]]
        first.close()
        for generation, name in ((2, f"second{family}.service"), (3, f"third{family}.service")):
            agent, again = life.start(name)
            assert again == cookies
            agent.apply(plan(life.world, cookies), generation)
            assert not agent.enrol(cookies[0]).destroyed
            assert agent.end_denied(plan(life.world, cookies)) == 0
            assert agent.repair() == 0
            agent.close()
        late = life.world.a.start(CLIENT.format(to=RESOLVER[family]))
        accepted.append(listener.accept()[0])
        for each, sock in zip((client, late), accepted, strict=True):
            sock.sendall(b"still")
            assert each.communicate(timeout=10)[0].splitlines() == ["open", "b'still'"]
            sock.close()


def held(fd: int) -> socket.socket:
    """A listener as the proxy has it: it stays when the agent closes its own."""
    listener = socket.socket(fileno=os.dup(fd))
    listener.settimeout(10)
    return listener


def test_those_without_a_socket_are_forgotten(life: Life) -> None:
    first, cookies = life.start("maker.service")
    with held(first.open_listeners(cookies[0], life.world.a.addresses)[0].fd):
        maker = cgroups.own_cgroup()
        first.close()
        second, _ = life.start("filler.service")
        never = {number.to_bytes(8, "little") for number in range(1 << 40, (1 << 40) + FORMER_AGENTS_KEPT)}
        value = next(iter(second._codec.members(None, [Member(1, Role.AGENT)]).values()))
        for key in never:
            second._maps["members"].put(key, value)
        second.close()
        last, _ = life.start("last.service")
        last.apply(plan(life.world, cookies), 1)
        assert never < last._maps["members"].items().keys()
        last.end_denied(plan(life.world, cookies))
        left = last._codec.agents(last._maps["members"].items())
        assert {maker, cgroups.own_cgroup(), cgroups.cgroup_id(life.slice)} < set(left)
        assert len(left) <= FORMER_AGENTS_KEPT
        assert last.repair() == 0
        last.close()
