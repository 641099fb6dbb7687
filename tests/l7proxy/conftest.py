from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.l7proxy.rig import Mesh, Rig, Server, running


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


@pytest.fixture
def start() -> Iterator[Callable[..., Rig]]:
    """Starts a worker for a mesh; it ends with the test."""
    with ExitStack() as stack:
        yield lambda mesh, kernel=None: stack.enter_context(running(mesh, kernel))


@pytest.fixture
def serve() -> Iterator[Callable[[Server], Server]]:
    """Closes a server with the test."""
    with ExitStack() as stack:

        def add(server: Server) -> Server:
            stack.callback(server.close)
            return server

        yield add
