"""Express against user space: the same bytes, the same verdicts, the same counts; and that this test would see a difference."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.e2e.differential import Twins
from tests.e2e.exchanges import Plans, draw
from tests.e2e.mesh import Mesh

SEED = int(os.environ.get("PILLION_DIFFERENTIAL_SEED", "5"))
EXCHANGES = int(os.environ.get("PILLION_DIFFERENTIAL_EXCHANGES", "200000"))
DRAWN = 20_000  # different ones; then the list begins anew, with other numbers in it and over other connections
CARRIED_SHARE_MIN = 0.9  # of what the compiler calls expressible
CARRIED_MIN = EXCHANGES // 2


@pytest.fixture(scope="module")
def twins(mesh: Mesh) -> Iterator[Twins]:
    with Twins(mesh, Plans.make(SEED)).up() as found:
        yield found


def test_same_bytes_same_verdicts_same_counts(twins: Twins, capsys: pytest.CaptureFixture[str]) -> None:
    found = twins.run(draw(SEED, min(EXCHANGES, DRAWN), twins.plans), EXCHANGES)
    with capsys.disabled():
        print(f"\n{found}")
    assert not found.wrong, "\n".join(found.wrong)
    assert found.exchanges >= EXCHANGES
    assert found.carried >= CARRIED_SHARE_MIN * found.expressible
    assert found.carried >= CARRIED_MIN
