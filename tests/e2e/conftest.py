from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab
from tests.conftest import WORKER, opened
from tests.e2e.mesh import Mesh, populated


@pytest.fixture(scope="session")
def mesh(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One populated mesh for all end-to-end tests; each test leaves it as it found it."""
    scratch = opened(tmp_path_factory.mktemp("mesh"))
    lab = Lab(os.environ.get("PILLION_LAB", "e2e") + WORKER, code=tree)  # another name: two runs at once do not meet
    with populated(lab, scratch) as made:
        yield made
