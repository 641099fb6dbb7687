"""Steps that several tests take."""

from __future__ import annotations

import errno

import pytest

from tests.bpf.families import Family
from tests.bpf.world import CALLER, IDENTITY, LEVEL, OUTBOUND, Actor, World

NO_OPTION = f"Errno ({int(errno.ENOPROTOOPT)}|{int(errno.EOPNOTSUPP)})"


def refused(actor: Actor, code: str, number: int = errno.EPERM) -> None:
    """The code fails with this errno."""
    with pytest.raises(OSError, match=rf"^\[Errno {int(number)}\]"):
        actor(code)


def silent(actor: Actor, code: str, seconds: float = 0.4) -> None:
    """The code, which may use ``s``, waits in vain."""
    actor(f"s.settimeout({seconds})")
    with pytest.raises(TimeoutError):
        actor(code)


def capture(world: World, family: Family) -> None:
    """Workload a's netns has the agent's listener, ``l``."""
    plain = "socket.AF_INET6" if family.name == "v6" else "socket.AF_INET"
    world.agent["a"](
        f"l = socket.socket({plain}); l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
        f"l.bind(({family.loopback!r}, {OUTBOUND})); l.listen(128); l.settimeout(3)"
    )
    world.listeners("a")


def connect(world: World, family: Family, address: str, port: int, actor: str = "a") -> None:
    """``s`` of the workload is connected there."""
    who: Actor = getattr(world, actor)
    who(family.tcp("s"))
    who(f"s.connect(({family.spell(address)!r}, {port}))")


def stock(world: World, family: Family, name: str) -> None:
    """The proxy's ``s``: a client socket the agent made in a workload's netns."""
    world.agent[name](family.tcp("s"))
    world.proxy.give("s", world.agent[name]("s"))
    world.proxy("s.settimeout(3)")


def serve(world: World, family: Family, port: int, rule: int = 7) -> None:
    """Workload b listens, ``l``; a's calls to the service go there natively, and policy allows them."""
    world.b(family.server("l", family.host("b"), port))
    world.native(family.vip, 80, [(family.host("b"), port)])
    world.allow("b", IDENTITY["a"], port, rule=rule)


def call_for_a(world: World, family: Family) -> None:
    """The proxy's ``s`` is for workload a."""
    world.proxy(f"s.setsockopt({LEVEL}, {CALLER}, {world.caller(family.host('a'), 1, IDENTITY['a'])!r})")
