from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab
from tests.e2e.mesh import Mesh


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One populated mesh for all end-to-end tests; each test leaves it as it found it."""
    scratch: Path = tmp_path_factory.mktemp("mesh")
    for folder in (scratch, *list(scratch.parents)[:2]):
        folder.chmod(0o755)  # nginx's worker is not root
    lab = Lab(os.environ.get("PILLION_LAB", "e2e"))  # another name: two runs at once do not meet
    lab.down()
    try:
        made = Mesh(lab, scratch)
        made.populate()
        yield made
    finally:
        lab.down()
