"""Controllers for tests: one shared by a module's tests, and one that a test may kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.controller.rig import Controller


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    made = Controller(tmp_path / "controller")
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """For tests that leave it as they found it."""
    made = Controller(tmp_path_factory.mktemp("shared") / "controller")
    made.start()
    try:
        yield made
    finally:
        made.stop()
