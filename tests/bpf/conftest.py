from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.express_path import ExpressPath
from tests.bpf.express_pair import Pair, Programs, open_door
from tests.bpf.families import FAMILIES, Family
from tests.bpf.world import TAG, World

Pairs = Callable[..., Pair]


@pytest.fixture(scope="session")
def loaded() -> Iterator[World]:
    """One world for all tests of this folder."""
    world = World(Path(tempfile.mkdtemp(prefix=f"{TAG}-")))
    try:
        world.up()
        yield world
    finally:
        world.down()


@pytest.fixture
def world(loaded: World) -> World:
    """The same, with nothing allowed."""
    loaded.reset()
    return loaded


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """v4, v6, and v4 through IPv6 sockets."""
    found: Family = request.param
    return found


@pytest.fixture(scope="session")
def express(loaded: World) -> Iterator[ExpressPath]:
    """The express programs, in the same world."""
    made = ExpressPath(loaded.fs, loaded.tmp)
    made.probes()  # as an agent: what this kernel needs beside, it has then
    yield made
    made.close()


@pytest.fixture(scope="session")
def programs(express: ExpressPath) -> Programs:
    return Programs(express)


@pytest.fixture
def pairs(world: World, express: ExpressPath, programs: Programs) -> Iterator[Pairs]:
    """Makes pairs, of IPv4 if not said; closes them. Program 1 is valid and lets / and /two pass."""
    made: list[Pair] = []
    doors: set[str] = set()

    def make(family: Family = FAMILIES[0], servers: int = 1, **values: Any) -> Pair:
        if family.name not in doors:
            open_door(world, family, 3)
            doors.add(family.name)
        made.append(Pair(world, express, family, servers, **values))
        return made[-1]

    programs.put()
    express.set_verdicts(1, programs.verdicts)
    yield make
    for pair in made:
        pair.close()
    express.reap()
