from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bpf.families import FAMILIES, Family
from tests.bpf.world import TAG, World


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
