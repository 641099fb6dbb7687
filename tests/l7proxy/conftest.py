from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from l7proxy import express_session
from tests.l7proxy.express_rig import Express, express_world
from tests.l7proxy.rig import Mesh, Rig, Server, running


@pytest.fixture(autouse=True)
def paired_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dialogues are about what pairing does; when a connection is worth it, one test says."""
    monkeypatch.setattr(express_session, "LASTING_EXCHANGES", 1)
    monkeypatch.setattr(express_session, "VAIN_S", -1.0)


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


@pytest.fixture
def express(mesh: Mesh, start: Callable[..., Rig], serve: Callable[[Server], Server]) -> Iterator[Express]:
    """A client, and a server whose connections the kernel may carry."""
    found = express_world(mesh, start, serve)
    yield found
    found.close()
